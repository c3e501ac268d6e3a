"""The server's side of one run: the strategy, evaluation after each round, and the files of the run folder."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Protocol, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from torch import nn

from fl_sim import capacities, codecs, facts
from fl_sim.checkpoint import Checkpoints
from fl_sim.config import Experiment
from fl_sim.errors import in_one_line
from fl_sim.federation import Federation
from fl_sim.files import create, flush, write_atomically
from fl_sim.folder import CHECKPOINTS, RESULTS, SUMMARY
from fl_sim.ledger import Ledger
from fl_sim.model_file import write_model
from fl_sim.models import disabled_features, merged, prunable_names
from fl_sim.replay import MaskRecorder
from fl_sim.report import ModelFacts, Report, against_dense, summarise
from fl_sim.resume import Keeper, Restorable
from fl_sim.runtime.local import LocalGrid
from fl_sim.runtime.setup import Setup, unseen
from fl_sim.sparsity import density, layer_densities
from fl_sim.training import evaluate, snapshot
from fl_sim.types import Mask, Params, UserError

log = logging.getLogger("fl_sim")


class Observer(Protocol):
    """What a display hears of a run."""

    def reply(self, answered: int, cohort: int) -> None:
        """One client of the current round has answered."""

    def round(self, row: Mapping[str, float]) -> None:
        """A round is done; `row` is its line of rounds.jsonl."""


class Silent:
    """An observer that shows nothing."""

    def reply(self, answered: int, cohort: int) -> None:
        """Ignore."""

    def round(self, row: Mapping[str, float]) -> None:
        """Ignore."""


SILENT = Silent()


class ServerMethod(Protocol):
    """What a `[strategy]` target must make: something that builds a Flower strategy (`strategies.base.Method`)."""

    def strategy(self, setup: Setup, *others: Setup) -> ServerStrategy:
        """The strategy of one run; `others` are the surroundings of the other capacities."""


class GlobalModel(Restorable, Protocol):
    """A model that a strategy trains, whose side of the server can be saved and restored."""

    @property
    def params(self) -> Params:
        """Global parameters."""

    @property
    def mask(self) -> Mask | None:
        """Global mask."""


class ServerStrategy(Protocol):
    """A Flower strategy whose models and current round can be read."""

    @property
    def params(self) -> Params:
        """Global parameters."""

    @property
    def mask(self) -> Mask | None:
        """Global mask."""

    @property
    def parts(self) -> Sequence[GlobalModel]:
        """The models of this federation, the first of which `params` and `mask` show."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Training metrics of the last round, with `clients` and `failures`."""

    @property
    def failures(self) -> Mapping[str, int]:
        """Failed client tasks so far, by kind: raised, rejected, late, lost."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of a round."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies of a round."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = ...,
        timeout: float = ...,
        train_config: ConfigRecord | None = ...,
        evaluate_config: ConfigRecord | None = ...,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = ...,
    ) -> Result:
        """Flower's round loop."""


def _index_dims(schema: codecs.Schema) -> float:
    count = len(schema.prunable)
    sizes = list(zip(schema.shapes[:count], schema.numels[:count], strict=True))
    return sum(len(shape) * size for shape, size in sizes) / max(1, schema.prunable_size)


def build_strategy(
    federation: Federation,
    ledger: Ledger,
    *,
    others: Sequence[Federation] = (),
    recorder: MaskRecorder | None = None,
    on_reply: Callable[[int, int], None] = unseen,
) -> ServerStrategy:
    """The Flower strategy that the config's `[strategy]` names; `others` are the federations of further capacities.

    Raises:
        UserError: the target makes something else, or several capacities are asked for what one model alone can have.
    """
    experiment = federation.experiment
    run = {"seed": experiment.seed, "num_clients": len(federation.parts), "cohort_size": experiment.cohort.size}
    method = experiment.strategy.build(run)
    if not hasattr(method, "strategy"):
        raise UserError(f"strategy {experiment.strategy.target!r} made a {type(method).__name__}, not a Method")
    alone = {"network.links": experiment.network.links, "wire.record_masks": experiment.wire.record_masks}
    if others and (refused := [key for key, value in alone.items() if value]):
        raise UserError(f"{refused[0]}: not with capacities; allowed with one model only")
    setups = [
        Setup(
            each.exchange,
            each.initial,
            ledger,
            cohort_size=size,
            seed=experiment.seed,
            model=cache(partial(_servers_own, each)),
            start=each.start,
            precision=experiment.training.precision,
            proxy=each.proxy(),
            members=members,
            label=label,
            broadcast=experiment.wire.broadcast,
            evaluate_size=experiment.evaluate.clients,
            network=experiment.network,
            faults=experiment.faults,
            recorder=recorder,
            on_reply=on_reply,
        )
        for each, size, members, label in zip(
            [federation, *others],
            capacities.cohort_sizes(experiment),
            capacities.members(experiment),
            capacities.labels(experiment),
            strict=True,
        )
    ]
    return cast(ServerMethod, method).strategy(*setups)


def _servers_own(federation: Federation) -> nn.Module:
    return copy.deepcopy(federation.model).to(federation.device)


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
    settled. `folder` is the claimed run folder.
    """

    def __init__(self, asked: Experiment, federation: Federation, folder: Path, observer: Observer = SILENT) -> None:
        self.asked, self.federation, self.observer = asked, federation, observer
        self.folder = folder
        self.ledger = Ledger()
        self.rows: list[dict[str, float]] = []
        self.recorder = MaskRecorder([]) if asked.wire.record_masks else None
        others = federation.others()
        self.federations = [federation, *others]
        self.strategy = build_strategy(
            federation, self.ledger, others=others, recorder=self.recorder, on_reply=observer.reply
        )
        self.started = self._round_started = time.perf_counter()
        self._seconds = 0.0
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
        return Keeper(
            Checkpoints(self.folder / CHECKPOINTS),
            self.asked.id,
            self.federation.experiment.training.precision,
            [(f.exchange.schema, part) for f, part in zip(self.federations, self.strategy.parts, strict=True)],
            self.ledger,
            self.rows,
            self.recorder,
            grid,
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
        self._lines.write((json.dumps(row) + "\n").encode())
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
            dense, moved = against_dense(self.ledger, *self._dense_payloads)
            row["saved_bytes"] = dense - moved
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
            facts=self._facts(),
            wall_s=time.perf_counter() - self.started,
            training_s=self._seconds,
        )
        self._save_model()
        for name in RESULTS:
            if (self.folder / name).exists():
                flush(self.folder / name)
        write_atomically(self.folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        flush(self.folder)
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        return Report(self.folder, summary, self.rows, self.ledger, dict(self.strategy.params))

    @cached_property
    def _dense_payloads(self) -> tuple[int, Sequence[tuple[Sequence[int], int]]]:
        """Length of a dense payload, and (clients, the same of their model) where a federation has several."""
        members = list(zip(capacities.members(self.asked), self.federations, strict=True))[1:]
        others = [(clients, facts.plain_payload_bytes(other)) for clients, other in members]
        return facts.plain_payload_bytes(self.federation), others

    def _facts(self) -> ModelFacts:
        federation, strategy = self.federation, self.strategy
        macs_dense, macs = facts.macs(federation, strategy.params, strategy.mask)
        model = federation.complete(strategy.params)
        named = dict(model.named_parameters())
        return ModelFacts(
            params=sum(p.numel() for p in named.values()),
            trainable=sum(p.numel() for p in named.values() if p.requires_grad),
            disabled_features=disabled_features(model),
            prunable=sum(model.get_parameter(name).numel() for name in prunable_names(model) if name in named),
            density=1.0 if strategy.mask is None else density(strategy.mask),
            dense_payload_bytes=self._dense_payloads[0],
            index_dims=_index_dims(federation.exchange.schema),
            macs_dense=macs_dense,
            macs=macs,
            params_hash=hashlib.sha256(federation.exchange.schema.flat(strategy.params).numpy().tobytes()).hexdigest(),
            failures=dict(strategy.failures),
            other_payloads=self._dense_payloads[1],
        )

    def _save_model(self) -> None:
        for federation, part, suffix in self._models("-"):
            model = federation.complete(part.params)
            whole = merged(snapshot(model), model=model)
            write_model(self.folder / f"model{suffix}.safetensors", whole, federation.described)
