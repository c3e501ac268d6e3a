"""The contract of a client: what it owns, and the function that users write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_sim.core.types import Params, Task, Update, UserError
from fl_sim.data.split import Split
from fl_sim.training.tasks import CLASSIFICATION, LearningTask


def as_they_are(params: Params) -> Params:
    """Parameters as they are: there is no error feedback."""
    return params


def alone(client: int) -> Split:
    """A context that was made by hand knows no other client. Raises UserError."""
    raise UserError(f"ctx.peer({client}): this context knows no other clients")


@dataclass(slots=True)
class ClientContext:
    """Client context: the model, data and state that a client owns; it never travels.

    Attributes:
        model: resident in the worker and shared by its clients: load parameters before use.
        data: this client's training samples.
        rng: draws the round's random numbers; starts from `seed`.
        state: tensors that are kept between this client's rounds.
        seed: made of the run's seed, the round and the partition, for a generator of your own.
        corrected: adds the residual of error feedback to prunable parameters, for clients that choose what to send. The
            framework adds it to the parameters that any client returns (`wire.error_feedback`), so return them as they
            were trained, and make the upload mask from `corrected(params)`. Without error feedback it changes nothing.
        loss: the loss of the config's `task`, for the training loop; `evaluate(model, data, ctx.loss)` measures the task.
        personal: names of the model's entries that this client keeps for itself (`model.personal`).
        client: number of this client, its partition.
        peer: number of a client -> that client's training samples, for attackers that collude (`clients.attacks`). An honest
            client has no business with them.
    """

    model: nn.Module
    data: Split
    rng: torch.Generator
    state: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    corrected: Callable[[Params], Params] = as_they_are
    loss: LearningTask = CLASSIFICATION
    personal: Collection[str] = ()
    client: int = 0
    peer: Callable[[int], Split] = alone

    @property
    def num_examples(self) -> int:
        """This client's weight in the mean: the number of its training samples, or what their weights sum up to, in thousandths
        of the mean weight (`data.weigh_clients`)."""
        return self.data.examples


Client = Callable[[Task, ClientContext], Update]
DECLARED = frozenset(
    (
        "before_evaluation",
        "class_scores",
        "extra",
        "keeps",
        "require",
        "sends_all",
        "token_scores",
        "trained_on",
        "training",
        "weighs",
    )
)
"""Attributes of a client that tell the framework about it. How to train several as one batch is not among them: what is
around a client does more than that client."""


class Around:
    """A client around another one, its attribute `client`: it declares what the inner one does, unless it says otherwise."""

    def __getattr__(self, name: str) -> object:
        if name in DECLARED:
            return getattr(getattr(self, "client"), name)  # noqa: B009 - subclasses have it
        raise AttributeError(name)


ANYTHING, PARTS, BATCHNORM, NOTHING = "anything", "parts", "batchnorm", "nothing"
KEEPS: Mapping[str, str] = {
    ANYTHING: "",
    PARTS: "model.personal, for instance 'head'",
    BATCHNORM: "model.personal = 'batchnorm' and model.statistics = 'local'",
    NOTHING: "no model.personal, and model.statistics = 'average': its personal model is a whole one",
}
"""What a client's method says in `keeps` of the parts that clients keep -> what the config needs for it."""
