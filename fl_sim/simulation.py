"""The composition root: an `Experiment` becomes a federation, runs, and leaves a run folder and a `Report`.

>>> from fl_sim import Experiment, run
>>> report = run(Experiment.load("configs/quickstart.toml"))
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from torch import nn

from fl_sim import codecs, models, precision, wire
from fl_sim.config import Experiment
from fl_sim.data import CropFlip, Data, Split
from fl_sim.data import load as load_data
from fl_sim.data import partition as make_partition
from fl_sim.flops import count_macs
from fl_sim.ledger import Ledger
from fl_sim.replay import MaskRecorder
from fl_sim.report import ModelFacts, Report, summarise
from fl_sim.runtime.app import ClientHost, client_app
from fl_sim.runtime.inline import InlineGrid
from fl_sim.runtime.local import LocalGrid
from fl_sim.runtime.ray import RayGrid
from fl_sim.runtime.setup import Setup, unseen
from fl_sim.sparsity import density
from fl_sim.training import evaluate, load, snapshot
from fl_sim.types import Client, FlatParams, Mask, Params, UserError

AUGMENT = {"none": None, "crop_flip": CropFlip()}
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


@dataclass(frozen=True)
class Federation:
    """What server and clients build alike from the experiment: data, partitions, the seeded model, the exchange."""

    experiment: Experiment
    data: Data
    parts: list[np.ndarray]
    model: nn.Module
    initial: FlatParams
    exchange: wire.Exchange

    @classmethod
    def build(cls, experiment: Experiment) -> Federation:
        """Load data, partition it, and make the seeded model.

        Raises:
            UserError: data missing, partition impossible, model unknown.
        """
        torch.set_num_threads(1)
        section = experiment.data
        data = load_data(section.source, validation=section.validation)
        parts = make_partition(
            data.train.labels.numpy(),
            section.clients,
            kind=section.partition,
            alpha=section.alpha,
            shards=section.shards,
            min_size=section.min_size,
            seed=experiment.seed,
        )
        channels, height, _ = data.shape
        model = models.build(
            experiment.model.name,
            num_classes=data.num_classes,
            in_channels=channels,
            image_size=height,
            width=experiment.model.width,
            seed=experiment.seed,
        )
        params = snapshot(model)
        schema = codecs.Schema.of(params, models.prunable_names(model))
        options = experiment.wire
        exchange = wire.Exchange(schema, options.uplink, options.downlink, options.error_feedback)
        return cls(experiment, data, parts, model, schema.view(schema.flat(params)), exchange)

    @property
    def device(self) -> torch.device:
        """Where models train."""
        name = self.experiment.device
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UserError(f"device = {name!r}: {error}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device = {name!r}: no CUDA device here; allowed: auto, cpu")
        return device

    def client(self) -> Client:
        """The client that the config names.

        Raises:
            UserError: no such client, or not with these options.
        """
        return cast(Client, self.experiment.client.build({"training": self.experiment.training}))

    def host(self) -> ClientHost:
        """The resident client side of one process."""
        experiment = self.experiment
        augment = AUGMENT[experiment.data.augment]
        device = self.device

        @cache
        def split_of(partition: int) -> Split:
            return self.data.train.subset(self.parts[partition]).augmented(augment).to(device)

        return ClientHost(self.client(), self.model.to(device), split_of, self.exchange, self.initial)


def make_client_app(experiment: Experiment) -> ClientApp:
    """The Flower ClientApp of an experiment; its host is built at the first message and stays."""
    hosts: list[ClientHost] = []

    def host(context: Context) -> ClientHost:
        if not hosts:
            hosts.append(Federation.build(experiment).host())
        return hosts[0]

    return client_app(host)


def resolved(experiment: Experiment, federation: Federation) -> Experiment:
    """Settle what depends on the machine once, so that every worker computes the same numbers."""
    if experiment.training.precision != "auto":
        return experiment
    chosen = precision.choose(
        federation.model, federation.data.shape, experiment.training.batch_size, federation.device
    )
    return experiment.model_copy(update={"training": replace(experiment.training, precision=chosen)})


@contextmanager
def open_grid(experiment: Experiment, federation: Federation) -> Iterator[LocalGrid]:
    """The engine of an experiment, closed at the end."""
    factory = ENGINES.get(experiment.engine)
    if factory is None:
        raise UserError(
            f"engine = {experiment.engine!r} is started by Flower: flwr run examples/flower; here: {', '.join(ENGINES)}"
        )
    with closing(factory(experiment, federation)) as grid:
        yield grid


def _inline(experiment: Experiment, federation: Federation) -> LocalGrid:
    host = federation.host()
    return InlineGrid(client_app(lambda context: host), len(federation.parts))


def _ray(experiment: Experiment, federation: Federation) -> LocalGrid:
    federation.client()  # wrong input is for this process to say, before others start
    return RayGrid(partial(make_client_app, experiment), len(federation.parts), experiment.ray)


ENGINES: Mapping[str, Callable[[Experiment, Federation], LocalGrid]] = {"inline": _inline, "ray": _ray}


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
        evaluate_size=experiment.evaluate.clients,
        network=experiment.network,
        recorder=recorder,
        on_reply=on_reply,
    )
    return cast(ServerMethod, method).strategy(setup)


def run(experiment: Experiment, observer: Observer = SILENT) -> Report:
    """Run an experiment on its engine; writes `<out>/<name>-<id>/` and returns the same as a value.

    Raises:
        UserError: the experiment asks for something impossible.
        RoundFailed: a round in which no client returned a usable update.
    """
    federation = Federation.build(experiment)
    settled = resolved(experiment, federation)
    federation = replace(federation, experiment=settled)
    session = Session(experiment, federation, observer)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with open_grid(settled, federation) as grid:
        session.server_app()(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}))
    return session.finish()


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
        from safetensors.torch import save_file

        save_file(
            {n: p.contiguous().clone() for n, p in self.strategy.params.items()}, self.folder / "model.safetensors"
        )
