"""An experiment as one frozen, typed tree: TOML in, `key=value` overrides on top, unknown keys refused by name.

>>> Experiment.load("configs/quickstart.toml", ["rounds=2", "training.lr=0.05"]).rounds
2
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fl_sim.communication import messages, sparse_broadcast
from fl_sim.communication.messages import Coding
from fl_sim.communication.sparse_broadcast import SparseBroadcast
from fl_sim.communication.virtual_clock import Network
from fl_sim.config.overrides import quoted, require_tables
from fl_sim.config.toml import Json, apply_override, explain, has_null, plain, text_of
from fl_sim.core.errors import in_one_line
from fl_sim.core.lookup import imported, nearest, typed
from fl_sim.core.types import UserError
from fl_sim.gating import Gating
from fl_sim.runtime.grids.faults import Faults
from fl_sim.runtime.grids.ray import RayOptions
from fl_sim.runtime.grids.workers import WorkersOptions
from fl_sim.training.loop import Training
from fl_sim.training.losses import HOTTEST
from fl_sim.training.model_file import content_hash

INDIFFERENT = frozenset({"name", "engine", "out", "device", "ray", "workers", "checkpoint", "faults"})
"""Config keys that change nothing of what an experiment is: its name, and where and how it runs."""
Engine = Literal["inline", "workers", "ray", "cohort", "auto", "flower"]


RESERVED = (messages.ROUND, messages.SEED, *sparse_broadcast.RESERVED)
"""Keys of a task's config that are a run's own: an option of a client function under such a name would be lost."""
GIVEN = 2
"""Positional arguments that a client function is called with: task and context."""


class Section(BaseModel):
    """A table of the config: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(BaseModel):
    """Something named by import path, with its keyword arguments: `"module:name"` or `{ target = "...", key = ... }`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    target: str = Field(description="import path, module:name")

    @model_validator(mode="after")
    def _options_have_values(self) -> Self:
        """A null option would be lost in config.toml, and the run that is loaded from there would be another one."""
        if empty := [key for key, value in self.options.items() if has_null(value)]:
            raise ValueError(f"option {empty[0]!r} is null: TOML has no null; leave it out for its default")
        return self

    @property
    def options(self) -> dict[str, Json]:
        """The keyword arguments."""
        return dict(self.model_extra or {})

    def resolve(self) -> Callable[..., object]:
        """Import the object.

        Raises:
            UserError: no such module or name.
        """
        return cast("Callable[..., object]", imported("", self.target))

    def build(self, given: Mapping[str, object]) -> object:
        """A preset (all parameters keyword-only) or a class is called with its options and what it asks of `given`.

        Anything else is the thing itself, such as a client function `(task, ctx)`. Options that it has parameters for, such
        as `lr` of `(task, ctx, lr=0.05)`, are passed to it at every call; numbers and texts travel in `task.config` too.

        Raises:
            UserError: an option that it does not take, of a wrong type, or that it could never see.
        """
        found = self.resolve()
        try:
            parameters = inspect.signature(found).parameters
        except ValueError as error:
            raise UserError(f"{self.target!r}: is built in and does not say what it takes; write a function") from error
        if not inspect.isclass(found) and any(p.kind is not p.KEYWORD_ONLY for p in parameters.values()):
            return self._with_options(found, parameters)
        for key in self.options:
            if key not in parameters:
                raise UserError(f"{self.target!r} has no option {key!r}{nearest(key, list(parameters))}")
        typed(repr(self.target), found, self.options)
        wanted = {k: v for k, v in given.items() if k in parameters}
        try:
            return found(**{**wanted, **self.options})
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.target!r}: {error}") from error

    def _with_options(
        self, found: Callable[..., object], parameters: Mapping[str, inspect.Parameter]
    ) -> Callable[..., object]:
        """A function that is given its options by name, at every call."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = [name for name, p in parameters.items() if p.kind in kinds][GIVEN:]
        mine = {key: value for key, value in self.options.items() if key in named}
        typed(repr(self.target), found, mine)
        for key, value in self.options.items():
            if key in mine:
                continue
            if key in RESERVED:
                raise UserError(f"{self.target!r}: option {key!r} is the run's own in task.config; choose another name")
            if not isinstance(value, (bool, int, float, str)):
                hint = f"only numbers and texts travel in task.config; give the function a parameter {key!r}"
                raise UserError(f"{self.target!r}: option {key} = {value!r}: {hint}")
        return partial(found, **mine) if mine else found


@dataclass(frozen=True)
class CheckpointOptions:
    """The config's `[checkpoint]` table.

    Attributes:
        every: rounds between checkpoints; 0 = none, and a run that was killed starts over.
    """

    every: Annotated[int, Field(ge=0)] = 1


def _or(default: str) -> BeforeValidator:
    """A bare import path is a target, and a table of options without one is about the default."""

    def complete(value: object) -> object:
        given = {"target": value} if isinstance(value, str) else value
        return {"target": default, **given} if isinstance(given, dict) else given

    return BeforeValidator(complete)


FEDAVG_CLIENT, FEDAVG = "clients.presets:fedavg", "strategies.presets:fedavg"


class DataSection(Section):
    """Data set, and how its samples are partitioned over the clients."""

    source: str = Field(
        "digits", description="digits, a torchvision data set's name, a parquet folder or an image folder"
    )
    clients: int = Field(20, ge=1, description="number of partitions, one per client")
    partition: str = Field("dirichlet", description="iid, dirichlet, shards, quantity")
    alpha: float = Field(0.5, gt=0, description="Dirichlet concentration; smaller is more skewed")
    shards: int = Field(2, ge=1, description="label shards per client, for partition = 'shards'")
    min_size: int | None = Field(None, ge=1, description="fewest samples of a client; unset = the partition's own rule")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the training set kept for validation")
    proxy: float = Field(
        0.0, ge=0, lt=1, description="share of the training set that the server holds, not the clients"
    )
    noise: int = Field(0, ge=0, le=1_000_000, description="unlabelled noise images that the server holds instead")
    augment: Literal["none", "crop_flip"] = Field("none", description="augmentation of training batches")

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.validation + self.proxy >= 1:
            raise ValueError(f"validation + proxy = {self.validation + self.proxy}: must leave training data, below 1")
        if self.proxy and self.noise:
            raise ValueError("proxy and noise: give one of them")
        return self


class ModelSection(Section):
    """The model, by name."""

    name: str = Field("cnn_bn", description="see `fl-sim list models`, or module:function")
    width: float = Field(1.0, gt=0, le=100, description="channel multiplier of the CIFAR ResNets")
    trainable: str = Field(
        "all", description="what is trained and travels: all, batchnorm, head, random, a glob; several joined by '+'"
    )
    batchnorm_init: str | None = Field(
        None,
        description="fixed, uniform, positive_negative, one_one; unset = uniform where trainable = 'batchnorm', else "
        "the model's own",
    )
    statistics: Literal["average", "local", "recalibrate"] = Field(
        "average", description="BatchNorm statistics: averaged, kept by each client, or measured by the server"
    )
    weights: str | None = Field(
        None,
        description="start from this model: a run folder, or a safetensors file; what travels is sent and booked in full, "
        "what never travels every client reads from the same file; unset = from the seed",
    )


class Capacity(Section):
    """A further model, for a share of the clients."""

    name: str = Field(description="see `fl-sim list models`")
    width: float = Field(1.0, gt=0, le=100, description="channel multiplier of the CIFAR ResNets")
    share: float = Field(0.5, gt=0, lt=1, description="of the clients, and of each cohort")


Share = Annotated[float, Field(ge=0, le=1)]


class StudySection(Section):
    """A capacity study: `fl-sim sweep` trains these students from these teachers, centralised, instead of federations."""

    pairs: tuple[tuple[str, str], ...] = Field(
        (("resnet20", "resnet8"),), min_length=1, description="[teacher, student] by model name, several of them"
    )
    alphas: tuple[Share, ...] = Field(
        (0.3, 0.5, 0.7), min_length=1, description="weights of the teacher, from which validation chooses"
    )
    temperatures: tuple[Annotated[float, Field(gt=0, le=HOTTEST)], ...] = Field(
        (2.0, 3.0, 4.0), min_length=1, description="temperatures, from which validation chooses"
    )
    beta: float = Field(0.5, ge=0, description="weight of the cosine between features beside their squared error")
    teacher: float = Field(2.0, gt=0, description="a teacher's training over a student's: epochs, or steps")


class CohortSection(Section):
    """Client sampling: how many clients train in a round."""

    size: int = Field(10, ge=1, description="clients per round, drawn from the seed without replacement")
    chunk: int | None = Field(
        None, ge=1, description="clients that engine = 'cohort' trains together; unset = as many as memory holds"
    )


class EvaluateSection(Section):
    """Evaluation of the global model: when, and on which data."""

    every: int = Field(1, ge=1, description="rounds between evaluations on the server; the last round always counts")
    clients: int = Field(0, ge=0, description="clients that also evaluate after each round, on their own data")
    fit: int = Field(
        0,
        ge=0,
        description="samples, of its own and as many test samples of their kind, on which each client measures the model "
        "that it trained: its over-fitting",
    )
    batch_size: int = Field(512, ge=1, description="evaluation batch")


class WireSection(Section):
    """Encoding of payloads."""

    uplink: Coding = Field(default_factory=Coding, description="values and content of what clients send")
    downlink: Coding = Field(default_factory=Coding, description="values and content of what the server sends")
    broadcast: SparseBroadcast | None = Field(
        None, description="send clients only what changed against the model they hold; unset = the whole model"
    )
    error_feedback: bool = Field(
        False,
        description="what an upload leaves out stays with the client and is added to its next one, whichever client it is; "
        "the mean is then over all clients of a round (strategies.presets:fedavg, aggregate)",
    )
    record_masks: bool = Field(False, description="keep the masks that travel, for `fl-sim replay`")


class Experiment(Section):
    """Complete description of one run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="names the run's folder")
    seed: int = Field(0, ge=0, lt=2**31, description="the only source of randomness")
    rounds: int = Field(10, ge=1, description="federated rounds")
    engine: Engine = Field("inline", description="runtime: " + ", ".join(get_args(Engine)))
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    out: str = Field("runs", description="folder that receives the run's folder")
    client: Annotated[Target, _or(FEDAVG_CLIENT)] = Field(
        Target(target=FEDAVG_CLIENT), description="what every client runs; further keys are its options"
    )
    strategy: Annotated[Target, _or(FEDAVG)] = Field(
        Target(target=FEDAVG), description="what the server does; further keys are its options"
    )
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    gating: Gating | None = None
    capacities: tuple[Capacity, ...] = Field((), description="further models, each for a share of the clients")
    study: StudySection | None = None
    cohort: CohortSection = CohortSection()
    training: Training = Field(default_factory=Training)
    evaluate: EvaluateSection = EvaluateSection()
    wire: WireSection = WireSection()
    network: Network = Field(default_factory=Network)
    faults: Faults = Field(default_factory=Faults)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    workers: WorkersOptions = Field(default_factory=WorkersOptions)
    ray: RayOptions = Field(default_factory=RayOptions)

    @model_validator(mode="after")
    def _cohort_fits(self) -> Self:
        if self.cohort.size > self.data.clients:
            raise ValueError(f"cohort.size = {self.cohort.size} is more than data.clients = {self.data.clients}")
        if self.evaluate.clients and self.model.statistics == "recalibrate":
            raise ValueError("evaluate.clients > 0 needs model.statistics = 'average' or 'local': clients hold none")
        return self

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
        require_tables(merged, cls, where)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error.errors()[0], cls)}") from error

    @property
    def id(self) -> str:
        """Eight hex digits of what determines the result: every non-default key but those of `INDIFFERENT`.

        Weights to start from count by their content, not by their path.

        Raises:
            UserError: there are no such weights.
        """
        tree = self.model_dump(mode="json", exclude_defaults=True, exclude=set(INDIFFERENT))
        if self.model.weights is not None:
            tree["model"]["weights"] = content_hash(Path(self.model.weights))
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]

    def to_toml(self) -> str:
        """The resolved config as TOML that loads back to an equal experiment."""
        import tomli_w  # here: most commands write no config

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def run_folder(experiment: Experiment) -> Path:
    """`<out>/<name>-<id>`; need not exist. A relative `out` is of the folder where the program is at this call."""
    return Path(experiment.out) / f"{experiment.name}-{experiment.id}"
