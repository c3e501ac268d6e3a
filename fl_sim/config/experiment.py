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

from fl_sim.communication.messages import Coding
from fl_sim.communication.sparse_broadcast import SparseBroadcast
from fl_sim.communication.virtual_clock import Network
from fl_sim.config.overrides import quoted, require_tables
from fl_sim.config.toml import Json, apply_override, explain, has_null, plain, text_of
from fl_sim.core.errors import in_one_line
from fl_sim.core.lookup import imported, nearest, typed
from fl_sim.core.types import UserError
from fl_sim.data.table import Columns
from fl_sim.gating import Gating
from fl_sim.runtime.grids.faults import Faults
from fl_sim.runtime.grids.ray import RayOptions
from fl_sim.runtime.grids.workers import WorkersOptions
from fl_sim.training.loop import Training
from fl_sim.training.losses import HOTTEST
from fl_sim.training.model_file import content_hash
from fl_sim.training.tasks import TASKS, learning_task

INDIFFERENT = frozenset({"name", "engine", "out", "device", "ray", "workers", "checkpoint", "faults"})
"""Config keys that change nothing of what an experiment is: its name, and where and how it runs."""
Engine = Literal["inline", "workers", "ray", "cohort", "auto", "flower"]
GIVEN = 2
"""Positional arguments that a client function is called with: task and context."""


class Section(BaseModel):
    """A table of the config: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(BaseModel):
    """Something named by import path, with its keyword arguments: `"module:name"` or `{ target = "...", key = ... }`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    target: str = Field(description="import path, `module:name`; `fl-sim list` shows those of the project")

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
        """Import the object that the path names.

        Raises:
            UserError: no such module or name.
        """
        return cast("Callable[..., object]", imported("", self.target))

    def build(self, given: Mapping[str, object]) -> object:
        """Build the object that the path names.

        A preset (all parameters keyword-only) or a class is called with the options, and with those entries of `given`
        that it has parameters for. Any other function, such as a client `(task, ctx)`, is used as it is: an option that
        the function has a parameter for, such as `lr` of `(task, ctx, lr=0.05)`, is passed at every call. Numbers and
        texts also travel in `task.config`.

        Raises:
            UserError: an option that the object does not take, that has a wrong type, or that could never reach it.
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
            if not isinstance(value, (bool, int, float, str)):
                hint = f"only numbers and texts travel in task.config; give the function a parameter {key!r}"
                raise UserError(f"{self.target!r}: option {key} = {value!r}: {hint}")
        return partial(found, **mine) if mine else found


@dataclass(frozen=True)
class CheckpointOptions:
    """How often a run is saved, so that a stopped one can be resumed.

    Attributes:
        every: rounds between checkpoints; 0 = no checkpoints: a stopped run starts over.
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
        "digits",
        description="a data set of `fl-sim list data`, an image folder, a parquet folder, a table, or `module:function`",
    )
    input: tuple[str, ...] = Field((), description="columns of a table that a model gets; empty = all others")
    target: str | tuple[str, ...] | None = Field(None, description="column of a table to predict, or several")
    group: str | None = Field(None, description="column of a table that names each row's group, such as its user")
    test: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of a table's rows for the test set, where it has none of its own; unset = 0.2",
    )
    context: int | None = Field(
        None, ge=1, le=4096, description="characters of a text that a model sees at once; unset = 64"
    )
    clients: int = Field(20, ge=1, description="number of clients; each has one part of the training set")
    partition: str = Field(
        "dirichlet",
        description="how samples are split over the clients: iid, dirichlet, shards, quantity, natural (by group), or "
        "`module:function`",
    )
    overlap: bool = Field(
        False, description="whether a partition of your own may give a sample to several clients, or to none"
    )
    alpha: float = Field(
        0.5, gt=0, description="Dirichlet concentration of dirichlet and quantity, above 0; smaller is more skewed"
    )
    shards: int = Field(2, ge=1, description='label shards per client, for partition = "shards" alone')
    min_size: int | None = Field(
        None,
        ge=1,
        description="fewest samples of a client; unset = 10, or a tenth of an even share where that is less; natural: 1",
    )
    validation: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the training set held out for validation, from 0 to below 1; no client trains on it; 0 = no "
        "validation set",
    )
    proxy: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training set that the server holds as proxy data and no client has, from 0 to below 1",
    )
    noise: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="number of unlabelled noise images that the server holds instead of proxy data",
    )
    augment: Literal["none", "crop_flip"] = Field(
        "none",
        description='augmentation of training batches: "none", or "crop_flip" (pads by 4 pixels, crops and flips at random)',
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.validation + self.proxy >= 1:
            raise ValueError(f"validation + proxy = {self.validation + self.proxy}: must leave training data, below 1")
        if self.proxy and self.noise:
            raise ValueError("proxy and noise: give one of them")
        return self

    @property
    def columns(self) -> Columns:
        """What of a table or a text is read."""
        target = (self.target,) if isinstance(self.target, str) else self.target or ()
        return Columns(self.input, target, self.group, self.test, self.context)


class ModelSection(Section):
    """The model, by name."""

    name: str = Field("cnn_bn", description="a model of `fl-sim list models`, or `module:function`")
    width: float = Field(1.0, gt=0, le=100, description="channel multiplier of the CIFAR ResNets, above 0")
    trainable: str = Field(
        "all",
        description="which parameters are trained and sent: all, batchnorm, head, random, or a glob over names such as "
        "`layer3.*`; several are joined by `+`. The others are frozen",
    )
    batchnorm_init: str | None = Field(
        None,
        description='first gamma and beta of BatchNorm: "fixed" (1 and 0), "uniform" (0 to 1, and 0), "positive_negative" '
        '(-1 to 1, and 0), "one_one" (1 and 1); unset = uniform where trainable = "batchnorm", else the model\'s own',
    )
    personal: str | None = Field(
        None,
        description="parameters that each client trains and keeps, and never sends: head (FedPer), batchnorm (FedBN), a glob; "
        "several joined by '+'; needs evaluate.clients, which measure their own models",
    )
    statistics: Literal["average", "local", "recalibrate"] = Field(
        "average",
        description='BatchNorm statistics: sent and averaged ("average"), kept by each client ("local"), or measured by the '
        'server on its own images ("recalibrate")',
    )
    weights: str | None = Field(
        None,
        description="start from this model: a run folder or a safetensors file. Trained entries are sent and booked in full; "
        "every client reads frozen ones from the same file. Unset = a random start from the seed",
    )


class Capacity(Section):
    """A further model, for a share of the clients."""

    name: str = Field(description="a model of `fl-sim list models`")
    width: float = Field(1.0, gt=0, le=100, description="channel multiplier of the CIFAR ResNets, above 0")
    share: float = Field(0.5, gt=0, lt=1, description="share of the clients, and of each cohort, that has this model")


Share = Annotated[float, Field(ge=0, le=1)]


class StudySection(Section):
    """A capacity study: `fl-sim sweep` trains student models from teachers centrally, without a federation."""

    pairs: tuple[tuple[str, str], ...] = Field(
        (("resnet20", "resnet8"),), min_length=1, description="pairs [teacher, student] of model names"
    )
    alphas: tuple[Share, ...] = Field(
        (0.3, 0.5, 0.7),
        min_length=1,
        description="weights of the teacher's loss to try, from 0 to 1; validation accuracy chooses",
    )
    temperatures: tuple[Annotated[float, Field(gt=0, le=HOTTEST)], ...] = Field(
        (2.0, 3.0, 4.0),
        min_length=1,
        description="distillation temperatures to try, above 0; validation accuracy chooses",
    )
    beta: float = Field(
        0.5, ge=0, description="weight of the cosine term of feature distillation, beside the squared error; at least 0"
    )
    teacher: float = Field(
        2.0, gt=0, description="length of a teacher's training, in multiples of the student's (epochs or steps)"
    )


class CohortSection(Section):
    """Client sampling: how many clients train in a round."""

    size: int = Field(10, ge=1, description="clients per round, drawn without replacement; at most data.clients")
    chunk: int | None = Field(
        None, ge=1, description='clients that engine = "cohort" trains as one batch; unset = as many as memory holds'
    )


class EvaluateSection(Section):
    """Evaluation of the global model: when, and on which data."""

    every: int = Field(
        1, ge=1, description="rounds between evaluations on the server; the last round is always evaluated"
    )
    clients: int = Field(
        0,
        ge=0,
        description="number of clients that also evaluate the global model after each round, each on test samples in the "
        "proportions of its own labels; 0 = none",
    )
    fit: int = Field(
        0,
        ge=0,
        description="samples for measuring over-fitting: each client evaluates its trained model on so many of its own "
        "training samples and as many test samples with the same labels; 0 = off",
    )
    batch_size: int = Field(512, ge=1, description="samples per evaluation batch")


class WireSection(Section):
    """Encoding of payloads."""

    uplink: Coding = Field(default_factory=Coding, description="encoding of what clients send")
    downlink: Coding = Field(default_factory=Coding, description="encoding of what the server sends")
    broadcast: SparseBroadcast | None = Field(
        None,
        description="sparse broadcast: the server sends only changes against the model that a client holds",
    )
    error_feedback: bool = Field(
        False,
        description="error feedback: each client adds what its last upload left out to its next one. The default mean then "
        "divides by all clients of a round",
    )
    record_masks: bool = Field(False, description="save all masks that are sent, for `fl-sim replay RUN --mask NAME`")
    record_payloads: int = Field(
        0,
        ge=0,
        description="save all payloads of every n-th round from the first on, for `fl-sim replay`; 0 = nothing",
    )
    record_megabytes: float = Field(
        1000.0,
        gt=0,
        description="saved payloads take at most so much disk; the first round beyond it ends the recording",
    )


class Experiment(Section):
    """Complete description of one run."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="name of the run and start of its folder's name: letters, digits, `.`, `_`, `-`, at most 64",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of every random draw, from 0 to below 2^31")
    rounds: int = Field(10, ge=1, description="number of federated rounds, at least 1")
    task: str = Field(
        "classification", description="what is learnt: " + ", ".join(TASKS) + ", or `module:task` of your own"
    )
    engine: Engine = Field("inline", description="what executes the clients: " + ", ".join(get_args(Engine)))
    device: str = Field("auto", description="PyTorch device: auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    out: str = Field("runs", description="folder in which the run's folder is made")
    client: Annotated[Target, _or(FEDAVG_CLIENT)] = Field(
        Target(target=FEDAVG_CLIENT),
        description="the client function or preset; further keys of the table are its options",
    )
    strategy: Annotated[Target, _or(FEDAVG)] = Field(
        Target(target=FEDAVG), description="the server's method; further keys of the table are its options"
    )
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    gating: Gating | None = None
    capacities: tuple[Capacity, ...] = Field(
        (),
        description="further models: a list of tables with `name`, `width` (1.0) and `share` of the clients (0.5)",
    )
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
    def _task_is_known(self) -> Self:
        if ":" not in self.task:
            learning_task(self.task)
        return self

    @model_validator(mode="after")
    def _cohort_fits(self) -> Self:
        if self.cohort.size > self.data.clients:
            raise ValueError(f"cohort.size = {self.cohort.size} is more than data.clients = {self.data.clients}")
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
