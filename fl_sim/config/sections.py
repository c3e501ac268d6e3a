"""Tables of a config: what each key means, its allowed values and its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fl_sim.codecs import LOSSLESS, is_relative
from fl_sim.communication.byte_budget import ByteBudget
from fl_sim.communication.exchange import Coding
from fl_sim.communication.sparse_broadcast import SparseBroadcast
from fl_sim.config.codecs import CodecSection
from fl_sim.core.given import path_of
from fl_sim.data.table import Columns
from fl_sim.models.adapters import Adapter
from fl_sim.training.losses import HOTTEST

Named = Annotated[str, BeforeValidator(path_of)]
"""A name, an import path, or, in Python, the function itself."""


Pixels = Annotated[int, Field(ge=1, le=2048)]


class Section(BaseModel):
    """A table of the config: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class CheckpointOptions:
    """How often a run is saved, so that a stopped one can be resumed.

    Attributes:
        every: rounds between checkpoints; 0 = no checkpoints: a stopped run starts over.
    """

    every: Annotated[int, Field(ge=0)] = 1


class DataSection(Section):
    """Data set, and how its samples are partitioned over the clients."""

    source: Named = Field(
        "digits",
        description="a data set of `fl-sim list data`, an image folder, a parquet folder, a table, or `module:function`",
    )
    input: tuple[str, ...] = Field((), description="columns of a table that a model gets; empty = all others")
    target: str | tuple[str, ...] | None = Field(None, description="column of a table to predict, or several")
    group: str | None = Field(None, description="column of a table that names each row's group, such as its user")
    weight: str | None = Field(
        None,
        description="column of a table with each training row's weight in the loss, above 0; evaluation counts all alike",
    )
    class_weights: str | tuple[float, ...] | None = Field(
        None,
        description='weights of the classes in the training loss: "balanced" (N / (K N_k) for N_k of N samples), or a list of a '
        "number for each class; on top of data.weight",
    )
    weigh_clients: bool = Field(
        False,
        description="whether a client counts in the mean by the sum of its samples' weights, instead of by their number",
    )
    test: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of a table's rows for the test set, where it has none of its own; unset = 0.2",
    )
    context: int | None = Field(
        None, ge=1, le=4096, description="characters of a text that a model sees at once; unset = 64"
    )
    resize: Pixels | tuple[Pixels, Pixels] | None = Field(
        None,
        description="pixels a side that the images of a folder are brought to, or [height, width]; unset = all have one size",
    )
    clients: int = Field(20, ge=1, description="number of clients; each has one part of the training set")
    partition: Named = Field(
        "dirichlet",
        description="how samples are split over the clients: iid, dirichlet, shards, quantity, natural (by group), a "
        "partitioner of flwr_datasets by its class name, or `module:function`",
    )
    partitioner: dict[str, object] = Field(
        {}, description="options of a partitioner of flwr_datasets, such as `{ num_classes_per_partition = 2 }`"
    )
    client_test: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each client's own samples that it does not train on and evaluates on (evaluate.clients, "
        "evaluate.fit), instead of samples of the test set; 0 = none",
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
        resize = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        return Columns(self.input, target, self.group, self.weight, self.test, self.context, resize)


class ModelSection(Section):
    """The model, by name."""

    name: Named = Field("cnn_bn", description="a model of `fl-sim list models`, or `module:function`")
    width: float = Field(1.0, gt=0, le=100, description="channel multiplier of the CIFAR ResNets, above 0")
    trainable: str = Field(
        "all",
        description="which parameters are trained and sent: all, batchnorm, norm, head, random, or a glob over names such as "
        "`layer3.*`; several are joined by `+`. The others are frozen",
    )
    batchnorm_init: str | None = Field(
        None,
        description='first gamma and beta of BatchNorm: "fixed" (1 and 0), "uniform" (0 to 1, and 0), "positive_negative" '
        '(-1 to 1, and 0), "one_one" (1 and 1), and weights of convolutions and linear layers Kaiming-normal (He et al., 2015); '
        'unset = uniform where trainable = "batchnorm", else the model\'s own',
    )
    personal: str | None = Field(
        None,
        description="parameters that each client trains and keeps, and never sends: head (FedPer), batchnorm (FedBN), norm, a "
        "glob; several joined by '+'; needs evaluate.clients, which measure their own models",
    )
    adapter: Adapter | None = Field(
        None, description="low-rank adapters beside frozen weights (LoRA): only they are trained and sent"
    )
    statistics: Literal["average", "local", "recalibrate"] = Field(
        "average",
        description='BatchNorm statistics: sent and averaged ("average"), kept by each client ("local"), or measured by the '
        'server on its own images ("recalibrate")',
    )
    weights: str | None = Field(
        None,
        description="start from this model: a run folder or a safetensors file. What fits is loaded, what does not is said. "
        "Trained entries are sent and booked in full; frozen and personal ones are sent once to each client, at its first "
        "contact, and booked as auxiliary. Unset = a random start from the seed",
    )

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.adapter is not None and self.trainable != "all":
            raise ValueError(
                f"trainable = {self.trainable!r}: adapters are what is trained; name it in model.adapter.train instead"
            )
        return self


def _by_name(value: object) -> object:
    named = path_of(value)
    return {"name": named} if isinstance(named, str) else named


ByName = BeforeValidator(_by_name)
"""A bare name or function is the table with that `name`."""


class Capacity(Section):
    """A further model, for a share of the clients."""

    name: Named = Field(description="a model of `fl-sim list models`")
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


class AttackSection(Section):
    """Attackers: a share of the clients, drawn once from the seed, that do not send what they learnt."""

    kind: str = Field(
        "sign_flip",
        description="what an attacker sends: sign_flip, label_flip, scaled, gaussian, alie, colluding, or `module:function`, "
        "(client, task, context, attackers) -> update; see docs/robustness.md",
    )
    share: float = Field(0.2, ge=0, le=1, description="share of the clients that attack; 0 = all are honest")
    scale: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="strength of the attack, above 0; unset = its own: sign_flip and colluding 1, scaled and gaussian 10, alie as "
        "much as hides in a cohort",
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
    metrics: tuple[str, ...] = Field(
        (),
        description="further metrics of the server's and the clients' evaluations: auc, top5, f1 (macro), by scikit-learn",
    )


class WireSection(Section):
    """Encoding of payloads."""

    uplink: Coding = Field(default_factory=Coding, description="encoding of what clients send")
    downlink: Coding = Field(default_factory=Coding, description="encoding of what the server sends")
    broadcast: SparseBroadcast | None = Field(
        None,
        description="sparse broadcast: the server sends only changes against the model that a client holds",
    )
    codec: CodecSection | None = Field(
        None,
        description="compressors of your own, or of `fl-sim list codecs`: a class with `encode` and `decode`",
    )
    budget: ByteBudget | None = Field(
        None,
        description="byte budget of a round, for both directions and all clients together, in which a value type is chosen for "
        "each tensor of each payload",
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

    @model_validator(mode="after")
    def _uplink_codes_against_what_clients_hold(self) -> Self:
        down = self.downlink
        codec = None if self.codec is None else self.codec.downlink
        if is_relative(self.uplink.values) and codec is not None and self.broadcast is None:
            raise ValueError(
                f"uplink.values = {self.uplink.values!r} codes against the model that clients received, bit for bit, and "
                f"codec.downlink = {codec.target!r} may round; remove one"
            )
        if is_relative(self.uplink.values) and self.broadcast is None and not down.is_exact:
            raise ValueError(
                f"uplink.values = {self.uplink.values!r} codes against the model that clients received, bit for bit, and the "
                f"downlink ({down.values}, {down.content}) rounds; allowed there: {', '.join(LOSSLESS)} of parameters, or "
                "a broadcast"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_chooses(self) -> Self:
        """What a byte budget chooses would be ignored beside it."""
        if self.budget is None:
            return self
        for key in ("codec", "broadcast"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key}: not beside budget, which chooses a value type for each tensor of a whole model; remove one"
                )
        for way in ("uplink", "downlink"):
            if (values := getattr(self, way).values) != Coding().values:
                raise ValueError(f"{way}.values = {values!r}: not beside budget, which chooses it; allowed: unset")
        if self.uplink.content == "parameters":
            raise ValueError(
                "uplink.content = 'parameters': beside budget, under which little of them would be left; needed: 'difference'"
            )
        return self

    @model_validator(mode="after")
    def _a_codec_is_alone(self) -> Self:
        """What a codec of the user's own takes the place of would be ignored beside it."""
        for way in ("uplink", "downlink") if self.codec is not None else ():
            named = getattr(self.codec, way)
            if named is None:
                continue
            if (coding := getattr(self, way)) != Coding(content=coding.content):
                key = "values" if coding.values != Coding().values else "masks"
                raise ValueError(
                    f"{way}.{key} = {getattr(coding, key)!r}: not beside codec.{way} = {named.target!r}, which codes the "
                    f"values and takes no mask; allowed: {way}.content"
                )
            if way == "downlink" and self.broadcast not in (None, whole := SparseBroadcast(density=1.0)):
                key = next(key for key, value in vars(whole).items() if getattr(self.broadcast, key) != value)
                raise ValueError(
                    f"broadcast.{key} = {getattr(self.broadcast, key)!r}: beside codec.downlink = {named.target!r}, which codes "
                    "the whole change; needed: broadcast = { density = 1.0 }"
                )
        return self
