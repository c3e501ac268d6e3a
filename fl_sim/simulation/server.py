"""The server's side of one run: the strategy, evaluation after each round, and the files of the run folder."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import MaskRecorder
from fl_sim.config.experiment import Experiment
from fl_sim.core.errors import in_one_line
from fl_sim.core.files import as_json, create, flush, write_atomically
from fl_sim.core.observer import SILENT, Observer
from fl_sim.core.types import Params, UserError
from fl_sim.models import merged
from fl_sim.models.parameters import snapshot
from fl_sim.report import Report, against_dense, summarise
from fl_sim.runtime.grids.base import LocalGrid
from fl_sim.runtime.state.client_states import ClientStates
from fl_sim.simulation import capacity_groups as capacities
from fl_sim.simulation import model_facts as facts
from fl_sim.simulation.checkpoint_store import Checkpoints
from fl_sim.simulation.checkpointing import Keeper
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.run_folder import CHECKPOINTS, RESULTS, SUMMARY
from fl_sim.simulation.strategy import GlobalModel, build_strategy
from fl_sim.sparsity import density, layer_densities
from fl_sim.training.loop import evaluate
from fl_sim.training.model_file import write_model

log = logging.getLogger("fl_sim")


def saved_params(folder: Path) -> Params:
    """The final parameters of a finished run.

    Raises:
        UserError: they are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}") from error


class RunStopped(RuntimeError):
    """A run that could not go on; what it had finished is on disk."""


class Session:
    """The server's side of one run: strategy, evaluation, and the files of the run folder.

    `asked` is the experiment as the user wrote it and names the run; the federation's has machine-dependent choices
    settled. `folder` is the claimed run folder, `ledger` an empty one.
    """

    def __init__(
        self, asked: Experiment, federation: Federation, folder: Path, ledger: Ledger, observer: Observer = SILENT
    ) -> None:
        self.asked, self.federation, self.observer = asked, federation, observer
        self.folder, self.ledger = folder, ledger
        self.rows: list[dict[str, float]] = []
        self.recorder = MaskRecorder([]) if asked.wire.record_masks else None
        others = federation.others()
        self.federations = [federation, *others]
        self.strategy = build_strategy(
            federation, self.ledger, others=others, recorder=self.recorder, on_reply=observer.reply
        )
        self.started = self._round_started = time.perf_counter()
        self._seconds = 0.0
        self._weighed = self._saved = 0
        self._keeper: Keeper | None = None

    def server_app(self) -> ServerApp:
        """The Flower ServerApp; runs unchanged on any Grid."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self.serve(grid)

        return app

    def keeper(self, grid: LocalGrid) -> Keeper:
        """What saves this run's rounds over a Grid whose clients live here; on other Grids they keep their own state."""
        grid.contexts = states = ClientStates(grid.contexts.nodes, self.folder)
        return Keeper(
            Checkpoints(self.folder / CHECKPOINTS),
            self.asked.id,
            self.federation.experiment.training.precision,
            [(f.exchange.schema, part) for f, part in zip(self.federations, self.strategy.parts, strict=True)],
            self.ledger,
            self.rows,
            self.recorder,
            grid,
            states,
        )

    def restore(self, grid: LocalGrid) -> None:
        """Go on from the newest checkpoint in the folder; without one, from the beginning.

        Raises:
            UserError: no checkpoint can be read.
        """
        self._keeper = self.keeper(grid)
        manifest = self._keeper.load()
        if manifest is not None:
            self._seconds, self.started = manifest.training_s, self.started - manifest.wall_s
            log.warning("%s: going on after round %d", self.folder, len(self.rows))

    def serve(self, grid: Grid) -> None:
        """Run the rounds that are left over a Grid.

        Raises:
            RunStopped: a round failed, or the folder cannot be written.
        """
        if self._keeper is None and isinstance(grid, LocalGrid):
            self._keeper = self.keeper(grid)
        with self._stopping():
            write_atomically(self.folder / "config.toml", (self.asked.to_toml() + "\n").encode())
            write_atomically(self.folder / "partition.json", json.dumps(self.federation.label_counts).encode())
            with create(self.folder / "rounds.jsonl") as self._lines:
                for row in self.rows:
                    self._write_line(row)
                self.strategy.start(
                    grid,
                    ArrayRecord(),
                    num_rounds=self.federation.experiment.rounds - len(self.rows),
                    train_config=ConfigRecord(dict(self._client_options())),
                    evaluate_fn=self._after_round,
                )

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Whatever stops a run says which rounds are safe."""
        try:
            yield
        except (OSError, RuntimeError, MemoryError) as error:
            said = in_one_line(error)
            reason = (
                f"{error.filename or self.folder}: {error.strerror or said}" if isinstance(error, OSError) else said
            )
            kept = 0 if self._keeper is None else self._keeper.saved_round
            hint = f"; {kept} finished rounds are kept, --resume goes on from there" if kept else ""
            raise RunStopped(reason + hint) from error

    def _write_line(self, row: Mapping[str, float]) -> None:
        self._lines.write((as_json(row) + "\n").encode())
        self._lines.flush()

    def _client_options(self) -> dict[str, bool | int | float | str]:
        """Options of a plain client function travel in `task.config`; presets took theirs when they were built."""
        options = self.federation.experiment.client.options
        return {k: v for k, v in options.items() if isinstance(v, (bool, int, float, str))}

    def _after_round(self, since_start: int, arrays: ArrayRecord) -> MetricRecord | None:
        if since_start == 0:
            self._round_started = time.perf_counter()
            return None
        number = len(self.rows) + 1
        spent = time.perf_counter() - self._round_started
        self._seconds += spent
        experiment = self.federation.experiment
        row: dict[str, float] = {"round": number, "seconds": round(spent, 4)}
        row |= self.strategy.metrics
        row |= {"uplink_bytes": self.ledger.sent["up"], "downlink_bytes": self.ledger.sent["down"]}
        mask = self.strategy.mask
        row["density"] = 1.0 if mask is None else density(mask)
        row |= {f"density/{name}": round(share, 4) for name, share in layer_densities(mask or {}).items()}
        if number % experiment.evaluate.every == 0 or number == experiment.rounds:
            row |= self._evaluate(number)
            dense, moved = against_dense(self.ledger, *self._dense_payloads, start=self._weighed)
            self._weighed, self._saved = len(self.ledger), self._saved + dense - moved
            row["saved_bytes"] = self._saved
        self.rows.append(row)
        self._write_line(row)
        self._checkpoint(number)
        self.observer.round(row)
        self._round_started = time.perf_counter()
        return MetricRecord({"accuracy": row["accuracy"]}) if "accuracy" in row else None

    def _checkpoint(self, number: int) -> None:
        every = self.asked.checkpoint.every
        if self._keeper is not None and every and (number % every == 0 or number == self.asked.rounds):
            self._keeper.save(training_s=self._seconds, wall_s=time.perf_counter() - self.started)

    def _evaluate(self, number: int) -> dict[str, float]:
        """Accuracy on the test set, and on the validation set, which alone may choose anything."""
        row: dict[str, float] = {}
        for federation, part, suffix in self._models("/"):
            section, chosen = federation.experiment.evaluate, federation.experiment.training.precision
            splits = {"": federation.data.test, "validation_": federation.data.validation}
            with federation.as_in(number):
                model = federation.complete(part.params)
                for prefix, split in splits.items():
                    split = split.to(federation.device)
                    found = evaluate(model, split, batch_size=section.batch_size, precision=chosen)
                    row |= {f"{prefix}{name}{suffix}": found[name] for name in ("accuracy", "loss")}
        return row

    def _models(self, separator: str) -> list[tuple[Federation, GlobalModel, str]]:
        """Each model with its federation and what its name adds to a key: nothing for the first."""
        labels = capacities.labels(self.asked)[1:]
        suffixes = ["", *(separator + label for label in labels)]
        return list(zip(self.federations, self.strategy.parts, suffixes, strict=True))

    def finish(self) -> Report:
        """Write what a finished run leaves behind, the summary last: where it is, the run is complete.

        Raises:
            RunStopped: the folder cannot be written.
        """
        with self._stopping():
            return self._finish()

    def _finish(self) -> Report:
        self.ledger.write(self.folder / "ledger.parquet")
        if self.recorder is not None:
            self.recorder.write(self.folder / "masks.parquet")
        summary = summarise(
            self.asked,
            precision=self.federation.experiment.training.precision,
            rows=self.rows,
            ledger=self.ledger,
            facts=facts.of_model(self.federation, self.strategy, *self._dense_payloads),
            wall_s=time.perf_counter() - self.started,
            training_s=self._seconds,
        )
        self._save_model()
        for name in RESULTS:
            if (self.folder / name).exists():
                flush(self.folder / name)
        write_atomically(self.folder / SUMMARY, (as_json(summary, indent=2) + "\n").encode())
        flush(self.folder)
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        kept = Ledger.read(self.folder / "ledger.parquet")  # the rows' own file goes with the run
        return Report(self.folder, summary, self.rows, kept, dict(self.strategy.params))

    @cached_property
    def _dense_payloads(self) -> tuple[int, Sequence[tuple[Sequence[int], int]]]:
        """Length of a dense payload, and (clients, the same of their model) where a federation has several."""
        members = list(zip(capacities.members(self.asked), self.federations, strict=True))[1:]
        others = [(clients, facts.plain_payload_bytes(other)) for clients, other in members]
        return facts.plain_payload_bytes(self.federation), others

    def _save_model(self) -> None:
        for federation, part, suffix in self._models("-"):
            model = federation.complete(part.params)
            whole = merged(snapshot(model), model=model)
            write_model(self.folder / f"model{suffix}.safetensors", whole, federation.described)
