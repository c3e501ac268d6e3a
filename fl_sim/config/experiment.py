"""An experiment as one frozen, typed tree: TOML in, `key=value` overrides on top, unknown keys refused by name.

>>> Experiment.load("configs/quickstart.toml", ["rounds=2", "training.lr=0.05"]).rounds
2
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from fl_sim.communication.schedule import KINDS, Schedule
from fl_sim.communication.traces import trace_hash
from fl_sim.communication.virtual_clock import Network
from fl_sim.config.overrides import quoted, replace_other, require_tables
from fl_sim.config.sections import (
    AttackSection,
    ByName,
    Capacity,
    CheckpointOptions,
    CohortSection,
    DataSection,
    EvaluateSection,
    ModelSection,
    Section,
    StudySection,
    WireSection,
)
from fl_sim.config.stop import Stop
from fl_sim.config.target import FEDAVG, FEDAVG_CLIENT, Target, or_preset
from fl_sim.config.toml import apply_override, explain, plain, text_of
from fl_sim.core.errors import in_one_line
from fl_sim.core.types import UserError
from fl_sim.gating import Gating
from fl_sim.runtime.grids.faults import Faults
from fl_sim.runtime.grids.ray import RayOptions
from fl_sim.runtime.grids.workers import WorkersOptions
from fl_sim.training.further_metrics import with_further
from fl_sim.training.loop import Training
from fl_sim.training.model_file import content_hash
from fl_sim.training.tasks import TASKS, LearningTask, learning_task

INDIFFERENT = frozenset({"name", "engine", "out", "device", "ray", "workers", "checkpoint", "faults"})
"""Config keys that change nothing of what an experiment is: its name, and where and how it runs."""
Engine = Literal["inline", "workers", "ray", "cohort", "auto", "flower"]


class Experiment(Section):
    """Complete description of one run."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="name of the run and start of its folder's name: letters, digits, `.`, `_`, `-`, at most 64",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of every random draw, from 0 to below 2^31")
    rounds: int = Field(10, ge=1, description="number of federated rounds, at least 1; `[stop]` may end a run earlier")
    task: str = Field(
        "classification", description="what is learnt: " + ", ".join(TASKS) + ", or `module:task` of your own"
    )
    engine: Engine = Field("inline", description="what executes the clients: " + ", ".join(get_args(Engine)))
    device: str = Field("auto", description="PyTorch device: auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    out: str = Field("runs", description="folder in which the run's folder is made")
    client: Annotated[Target, or_preset(FEDAVG_CLIENT)] = Field(
        Target(target=FEDAVG_CLIENT),
        description="the client function or preset; further keys of the table are its options",
    )
    strategy: Annotated[Target, or_preset(FEDAVG)] = Field(
        Target(target=FEDAVG), description="the server's method; further keys of the table are its options"
    )
    data: DataSection = DataSection()
    model: Annotated[ModelSection, ByName] = ModelSection()
    gating: Gating | None = None
    capacities: tuple[Capacity, ...] = Field(
        (),
        description="further models: a list of tables with `name`, `width` (1.0) and `share` of the clients (0.5)",
    )
    study: StudySection | None = None
    stop: Stop | None = None
    attack: AttackSection | None = None
    cohort: CohortSection = CohortSection()
    training: Training = Field(default_factory=Training)
    evaluate: EvaluateSection = EvaluateSection()
    wire: WireSection = WireSection()
    network: Network = Field(default_factory=Network)
    schedule: Schedule = Field(default_factory=Schedule)
    faults: Faults = Field(default_factory=Faults)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    workers: WorkersOptions = Field(default_factory=WorkersOptions)
    ray: RayOptions = Field(default_factory=RayOptions)

    def __init__(self, /, **tables: object) -> None:
        """Validate keys and tables; functions and classes may stand where the config has an import path.

        Raises:
            UserError: one line, as `load` raises it.
        """
        try:
            super().__init__(**tables)
        except ValidationError as error:
            raise UserError(f"Experiment: {explain(error.errors()[0], type(self))}") from error

    @model_validator(mode="after")
    def _task_is_known(self) -> Self:
        if ":" not in self.task:
            with_further(learning_task(self.task), self.evaluate.metrics)
        return self

    @property
    def learning(self) -> LearningTask:
        """The task, with the further metrics that evaluations measure."""
        return with_further(learning_task(self.task), self.evaluate.metrics)

    @model_validator(mode="after")
    def _stop_can_come(self) -> Self:
        if self.stop is not None and ":" not in self.task:
            self.stop.require_metrics(self.learning)
        if (
            self.stop is not None
            and self.stop.seconds is not None
            and not (self.network.links or self.schedule.devices)
        ):
            raise ValueError("stop.seconds: without network.links there is no virtual clock; needed: network.links")
        return self

    @model_validator(mode="after")
    def _network_has_links(self) -> Self:
        """Without links nobody would read the other keys of the table."""
        if not self.network.links and self.schedule.devices is None:
            for key, default in vars(Network()).items():
                if getattr(self.network, key) != default:
                    raise ValueError(f"network.{key} needs network.links: without links there is no simulated network")
        return self

    @model_validator(mode="after")
    def _schedule_has_a_clock(self) -> Self:
        kind, network = self.schedule.kind, self.network
        if self.schedule.in_rounds:
            if self.schedule != Schedule():
                raise ValueError(f"schedule: rounds have no further keys; name a kind: {', '.join(list(KINDS)[1:])}")
            return self
        if not network.links and self.schedule.devices is None:
            raise ValueError(f"schedule.kind = {kind!r} needs a virtual clock: network.links or schedule.devices")
        if kind == "deadline" and network.deadline_s is None:
            raise ValueError("schedule.kind = 'deadline' needs network.deadline_s: seconds between two steps")
        if kind != "deadline" and network.deadline_s is not None:
            raise ValueError(f"network.deadline_s: not with schedule.kind = {kind!r}; allowed: 'rounds', 'deadline'")
        recorded = {"wire.record_masks": self.wire.record_masks, "wire.record_payloads": self.wire.record_payloads}
        if refused := [key for key, value in recorded.items() if value]:
            raise ValueError(
                f"{refused[0]}: not with schedule.kind = {kind!r}, as a replay encodes each upload against the model of its "
                "own round; allowed: 'rounds'"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_has_rounds(self) -> Self:
        if self.wire.budget is not None and not self.schedule.in_rounds:
            raise ValueError(f"wire.budget: is of a round; schedule.kind = {self.schedule.kind!r}; allowed: 'rounds'")
        if self.wire.budget is not None and self.capacities:
            raise ValueError("wire.budget: not with capacities; allowed with one model only")
        return self

    @model_validator(mode="after")
    def _somebody_can_evaluate(self) -> Self:
        """A client that is on its way is not asked to evaluate."""
        schedule, asked = self.schedule, self.evaluate.clients
        stays = schedule.in_rounds or (schedule.max_staleness == 0 and schedule.wanted is not None)
        left = self.data.clients - (schedule.concurrency or self.cohort.size)
        if asked > left and not stays:
            raise ValueError(
                f"evaluate.clients = {asked}: clients that train are not asked to evaluate, which leaves {max(left, 0)} of "
                f"data.clients = {self.data.clients} (schedule.concurrency, or cohort.size); allowed: at most as many"
            )
        return self

    @model_validator(mode="after")
    def _cohort_fits(self) -> Self:
        if self.cohort.size > self.data.clients:
            raise ValueError(f"cohort.size = {self.cohort.size} is more than data.clients = {self.data.clients}")
        if self.data.client_test and not (self.evaluate.clients or self.evaluate.fit):
            raise ValueError(
                f"data.client_test = {self.data.client_test:g}: nobody would measure on these samples; needed: evaluate.clients or "
                "evaluate.fit above 0"
            )
        if self.model.personal is not None and not self.evaluate.clients:
            raise ValueError(
                f"model.personal = {self.model.personal!r}: the server holds no trained personal parts, so that clients measure; "
                "needed: evaluate.clients above 0"
            )
        if self.model.personal is not None and self.capacities:
            raise ValueError(
                f"model.personal = {self.model.personal!r}: not with capacities; allowed with one model only"
            )
        if not self.data.validation and not self.data.proxy and self.model.statistics != "average":
            raise ValueError(
                f"model.statistics = {self.model.statistics!r}: the server measures them on validation or proxy samples; "
                "needed: data.validation or data.proxy above 0"
            )
        if self.evaluate.clients and self.model.statistics == "recalibrate":
            raise ValueError("evaluate.clients > 0 needs model.statistics = 'average' or 'local': clients hold none")
        return self

    @property
    def step_size(self) -> int:
        """Clients whose updates the server folds at a time: a cohort, or without rounds a buffer."""
        return self.schedule.wanted or self.cohort.size

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read a TOML file and apply `a.b=value` overrides (TOML values; bare words are strings).

        Raises:
            UserError: missing file, bad TOML, unknown key (with the nearest valid one), or a wrong value.
        """
        try:
            tree = tomllib.loads(text_of(Path(path)))
        except OSError as error:
            raise UserError(f"config {path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:  # too deep, or an integer of thousands of digits
            raise UserError(f"config {path}: not valid TOML: {in_one_line(error)}") from error
        return cls.from_tree(tree, overrides, where=f"config {path}")

    @classmethod
    def from_tree(
        cls, tree: Mapping[str, object], overrides: Sequence[str] = (), *, where: str = "config"
    ) -> Experiment:
        """Validate a nested mapping; `where` starts the error message."""
        merged = {key: plain(value, f"{where}: {key}") for key, value in tree.items()}
        for text in overrides:
            apply_override(merged, quoted(text, cls))
        replace_other(merged, overrides)
        require_tables(merged, cls, where)
        try:
            return cls(**merged)
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix('Experiment: ')}") from error

    @property
    def local_training(self) -> Training:
        """`[training]` as clients get it: a decay without `decay_end` ends with the last round."""
        chosen = self.training
        if chosen.decay == "constant" or chosen.decay_end is not None:
            return chosen
        return replace(chosen, decay_end=max(self.rounds, chosen.warmup + 1))

    @property
    def id(self) -> str:
        """Eight hex digits of what determines the result: every non-default key but those of `INDIFFERENT`.

        Weights to start from, and traces, count by their content, not by their path.

        Raises:
            UserError: there is no such file.
        """
        tree = self.model_dump(mode="json", exclude_defaults=True, exclude=set(INDIFFERENT))
        if self.model.weights is not None:
            tree["model"]["weights"] = content_hash(Path(self.model.weights))
        for key in ("availability", "devices"):
            if (file := getattr(self.schedule, key)) is not None:
                tree["schedule"][key] = trace_hash(f"schedule.{key}", Path(file))
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]

    def to_toml(self) -> str:
        """The resolved config as TOML that loads back to an equal experiment."""
        import tomli_w  # here: most commands write no config

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def run_folder(experiment: Experiment) -> Path:
    """`<out>/<name>-<id>`; need not exist. A relative `out` is of the folder where the program is at this call."""
    return Path(experiment.out) / f"{experiment.name}-{experiment.id}"
