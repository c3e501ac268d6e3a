"""The server's side of one run: the strategy, evaluation after each round, and the files of the run folder."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Protocol, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result

from fl_sim import codecs
from fl_sim.config import Experiment
from fl_sim.federation import Federation
from fl_sim.flops import count_macs
from fl_sim.ledger import Ledger
from fl_sim.model_file import write_model
from fl_sim.replay import MaskRecorder
from fl_sim.report import ModelFacts, Report, summarise
from fl_sim.runtime.setup import Setup, unseen
from fl_sim.sparsity import density, layer_densities
from fl_sim.training import evaluate, load
from fl_sim.types import Mask, Params, UserError


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

    def strategy(self, setup: Setup) -> ServerStrategy:
        """The strategy of one run."""


class ServerStrategy(Protocol):
    """A Flower strategy whose model and current round can be read."""

    @property
    def params(self) -> Params:
        """Global parameters."""

    @property
    def mask(self) -> Mask | None:
        """Global mask."""

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
    recorder: MaskRecorder | None = None,
    on_reply: Callable[[int, int], None] = unseen,
) -> ServerStrategy:
    """The Flower strategy that the config's `[strategy]` names.

    Raises:
        UserError: the target makes something else.
    """
    experiment = federation.experiment
    method = experiment.strategy.build({})
    if not hasattr(method, "strategy"):
        raise UserError(f"strategy {experiment.strategy.target!r} made a {type(method).__name__}, not a Method")
    setup = Setup(
        federation.exchange,
        federation.initial,
        ledger,
        cohort_size=experiment.cohort.size,
        seed=experiment.seed,
        model=cache(lambda: copy.deepcopy(federation.model).to(federation.device)),
        proxy=federation.proxy(),
        evaluate_size=experiment.evaluate.clients,
        network=experiment.network,
        recorder=recorder,
        on_reply=on_reply,
    )
    return cast(ServerMethod, method).strategy(setup)


def _run_folder(experiment: Experiment) -> Path:
    folder = Path(experiment.out) / f"{experiment.name}-{experiment.id}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out = {experiment.out!r}: {error.strerror or error}") from error
    return folder


class Session:
    """The server's side of one run: strategy, evaluation, and the files of the run folder.

    `asked` is the experiment as the user wrote it and names the run; the federation's has machine-dependent choices
    settled.
    """

    def __init__(self, asked: Experiment, federation: Federation, observer: Observer = SILENT) -> None:
        self.asked, self.federation, self.observer = asked, federation, observer
        self.folder = folder = _run_folder(asked)
        self.ledger = Ledger()
        self.rows: list[dict[str, float]] = []
        self.recorder = MaskRecorder([]) if asked.wire.record_masks else None
        self.strategy = build_strategy(federation, self.ledger, recorder=self.recorder, on_reply=observer.reply)
        self.started = self._round_started = time.perf_counter()
        self._seconds = 0.0
        (folder / "config.toml").write_text(asked.to_toml() + "\n", encoding="utf-8")
        (folder / "partition.json").write_text(json.dumps(federation.label_counts), encoding="utf-8")
        self._lines = (folder / "rounds.jsonl").open("w", encoding="utf-8")

    def server_app(self) -> ServerApp:
        """The Flower ServerApp; runs unchanged on any Grid."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self.serve(grid)

        return app

    def serve(self, grid: Grid) -> None:
        """Run all rounds over a Grid."""
        self.strategy.start(
            grid,
            ArrayRecord(),
            num_rounds=self.federation.experiment.rounds,
            train_config=ConfigRecord(dict(self._client_options())),
            evaluate_fn=self._after_round,
        )

    def _client_options(self) -> dict[str, bool | int | float | str]:
        """Options of a plain client function travel in `task.config`; presets took theirs when they were built."""
        options = self.federation.experiment.client.options
        return {k: v for k, v in options.items() if isinstance(v, (bool, int, float, str))}

    def _after_round(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        if number == 0:
            self._round_started = time.perf_counter()
            return None
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
            row |= self._evaluate()
        self.rows.append(row)
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        self.observer.round(row)
        self._round_started = time.perf_counter()
        return MetricRecord({"accuracy": row["accuracy"]}) if "accuracy" in row else None

    def _evaluate(self) -> dict[str, float]:
        """Accuracy on the test set, and on the validation set, which alone may choose anything."""
        federation = self.federation
        section, chosen = federation.experiment.evaluate, federation.experiment.training.precision
        model = load(federation.model, self.strategy.params)
        parts = {"": federation.data.test, "validation_": federation.data.validation}
        row: dict[str, float] = {}
        for prefix, split in parts.items():
            metrics = evaluate(model, split.to(federation.device), batch_size=section.batch_size, precision=chosen)
            row |= {prefix + "accuracy": metrics["accuracy"], prefix + "loss": metrics["loss"]}
        return row

    def finish(self) -> Report:
        """Write what a finished run leaves behind."""
        self._lines.close()
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
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self._save_model()
        return Report(self.folder, summary, self.rows, self.ledger, dict(self.strategy.params))

    def _facts(self) -> ModelFacts:
        federation, strategy = self.federation, self.strategy
        shape = federation.data.shape
        return ModelFacts(
            params=sum(p.numel() for p in federation.model.parameters()),
            prunable=federation.exchange.schema.prunable_size,
            density=1.0 if strategy.mask is None else density(strategy.mask),
            dense_payload_bytes=len(codecs.encode(federation.initial, None, schema=federation.exchange.schema)),
            index_dims=_index_dims(federation.exchange.schema),
            macs_dense=count_macs(federation.model, shape),
            macs=count_macs(federation.model, shape, mask=strategy.mask),
            params_hash=hashlib.sha256(federation.exchange.schema.flat(strategy.params).numpy().tobytes()).hexdigest(),
            failures=dict(strategy.failures),
        )

    def _save_model(self) -> None:
        write_model(self.folder / "model.safetensors", self.strategy.params, self.federation.described)
