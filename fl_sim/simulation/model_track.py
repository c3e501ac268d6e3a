"""Model track: one model of a federation, and the clients that train it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_sim.communication.exchange import Exchange
from fl_sim.communication.extra import declared
from fl_sim.config.experiment import Experiment
from fl_sim.core.deferred import Deferred
from fl_sim.core.large import is_large
from fl_sim.core.types import Params, UserError
from fl_sim.data import Data, Split
from fl_sim.gating import Gated, Gating, keeping
from fl_sim.models import MODELS
from fl_sim.models.module_state import ModuleState
from fl_sim.models.own import remarks_of, training_answer_of
from fl_sim.models.parameters import load, unit_singular_vectors, values
from fl_sim.models.repeatable import contents_of
from fl_sim.simulation.starting_model import interface_of, make_exchange, make_model
from fl_sim.training.model_file import Stored, described_by
from fl_sim.training.recalibration import recalibrate
from fl_sim.training.starting_weights import entries_for


def device_of(experiment: Experiment) -> torch.device:
    """The device on which models train.

    Raises:
        UserError: no such device, or no CUDA here.
    """
    name = experiment.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device = {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device = {name!r}: no CUDA device here; allowed: auto, cpu")
    return device


@dataclass(frozen=True)
class ModelTrack:
    """A model of a federation and its clients. A federation has one, or one for each capacity.

    Attributes:
        experiment: the experiment with this model in `[model]`.
        data: of all clients and the server.
        label: name of the model, unique in the federation.
        members: partitions whose clients train this model.
        cohort_size: of them, clients that train in a round.
        model: the seeded model, on its device.
        initial: its travelling entries, which every party can build by itself.
        start: first global parameters; `initial` itself unless the experiment starts from given weights.
        exchange: which entries travel, and how they are encoded.
        built: the model before anybody used it; whoever uses it puts it back first.
        gating: the gates' plan; None without gates.
        weights: the model file that the experiment starts from; None without one.
        own: the first values of the parameters that each client keeps for itself.
        contents: what a user's own plain model holds; see `fl_sim.models.repeatable.contents_of`.
        remarks: what its user should know of it.
        training_answer: what a user's own model answers in training, where it answers otherwise in evaluation; else empty.
    """

    experiment: Experiment
    data: Data
    label: str
    members: Sequence[int]
    cohort_size: int
    model: nn.Module
    initial: Deferred
    start: Deferred
    exchange: Exchange
    built: ModuleState
    gating: Gating | None = None
    weights: Stored | None = None
    own: Params = field(default_factory=dict)
    contents: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    training_answer: str = ""

    @classmethod
    def build(
        cls,
        experiment: Experiment,
        data: Data,
        *,
        label: str,
        members: Sequence[int],
        cohort_size: int,
        weights: Stored | None = None,
    ) -> ModelTrack:
        """Build the seeded model.

        Raises:
            UserError: the model is unknown, or the given weights do not fit it.
        """
        contents: dict[str, str] = {}
        remarks: list[str] = []
        answers: list[str] = []

        def look(plain: nn.Module) -> None:
            if experiment.model.name not in MODELS:
                contents.update(contents_of(plain))
                remarks.extend(remarks_of(plain))
                answers.append(training_answer_of(plain))

        model, gating = make_model(experiment, data, experiment.seed, weights, look)
        given = {} if weights is None else entries_for(model, weights, contents)
        client = experiment.client.build({"training": experiment.local_training, "gating": gating}, "client")
        exchange = make_exchange(experiment, model, given, declared(client))
        schema = exchange.schema

        def seeded() -> Tensor:
            return schema.flat(values(make_model(experiment, data, experiment.seed, weights)[0]))

        initial = Deferred.of(seeded, schema.names, schema.shapes)
        initial.flat = schema.flat(values(model))
        travelling = {n: p for n, p in given.items() if n in initial}
        start = initial
        if travelling:
            start = Deferred.of(lambda: schema.flat({**initial, **travelling}), schema.names, schema.shapes)
        model.to(device_of(experiment))
        built = ModuleState(model, {*schema.names, *exchange.personal})
        named = dict(model.named_parameters())
        own = {name: named[name].detach().cpu().clone() for name in exchange.personal if name in named}
        return cls(
            experiment,
            data,
            label,
            members,
            cohort_size,
            model,
            initial,
            start,
            exchange,
            built,
            gating,
            weights,
            own,
            contents,
            tuple(remarks),
            "".join(answers),
        )

    def give_up_first_values(self) -> None:
        """Forget the first parameters of a large model, until somebody asks for them: then it is built once more."""
        if is_large(self.exchange.schema.nbytes):
            for first in (self.initial, self.start):
                first.give_up()

    @property
    def device(self) -> torch.device:
        """The device on which the model trains."""
        return device_of(self.experiment)

    @property
    def described(self) -> dict[str, object]:
        """What makes this model, initialisation aside, and its gates: see `fl_sim.training.model_file.Architecture`."""
        asked = self.experiment.model
        shape = described_by(interface_of(self.data))
        gates = {} if self.gating is None else {"gating": self.gating.described()}
        # What a builder of the user's draws and no file holds, as plain attributes, comes out of the run's seed alone.
        seed = {} if asked.name in MODELS else {"seed": self.experiment.seed}
        return {"name": asked.name, "width": asked.width, **shape, **gates, **seed}

    def as_in(self, number: int) -> AbstractContextManager[object]:
        """Context manager: a gated model keeps the share of channels that its plan has for round `number`."""
        if self.gating is None or not isinstance(self.model, Gated):
            return nullcontext()
        return keeping(self.model, self.gating.at(number))

    def complete(self, params: Params) -> nn.Module:
        """Load global parameters into the model, and give it BatchNorm statistics that fit, as the server measures it.

        Parameters that clients keep for themselves get their first values: a client of this process may have left its own.
        """
        return self.settled(load(self.model, {**self.own, **params} if self.own else params))

    def settled(self, model: nn.Module) -> nn.Module:
        """Make averaged entries fit `model`, and return it: unit singular vectors of a spectral norm, and BatchNorm statistics
        on the server's images where none travel."""
        unit_singular_vectors(model)
        if self.experiment.model.statistics != "average":
            images: Split = self.data.proxy or self.data.validation  # the config sees to it that there are some
            recalibrate(model, images.to(self.device), precision=self.experiment.training.precision)
        return model
