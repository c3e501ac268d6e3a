"""One process's clients, kept apart: each finds the model as it was built, and global generators seeded for it alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_sim.core.process_state import generators, seeded
from fl_sim.core.types import FlatMask, FlatParams, Mask, Params, Task, Update
from fl_sim.data.split import Split
from fl_sim.models.module_state import ModuleState
from fl_sim.training.client import Client, ClientContext, as_they_are


class LentContext(ClientContext):
    """A `ClientContext` that tells when its model is first asked for."""

    __slots__ = ("_model", "_use")

    def __init__(
        self,
        model: nn.Module,
        data: Split,
        num_examples: int,
        rng: torch.Generator,
        state: dict[str, Tensor],
        seed: int = 0,
        corrected: Callable[[Params], Params] = as_they_are,
        *,
        use: Callable[[], None] = lambda: None,
    ) -> None:
        self._use = use
        super().__init__(model, data, num_examples, rng, state, seed, corrected)

    @property
    def model(self) -> nn.Module:
        """The resident model."""
        self._use()
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = model


@dataclass
class Isolation:
    """Runs a process's clients so that none finds what another one left on the model or in a global generator.

    A client that only looks at its task pays nothing for this: the first client of a process is always isolated, later
    ones from the moment that one has asked for the model or drawn a global random number.

    Attributes:
        built: the model as it was.
        needed: whether the next client is isolated from its beginning.
        used: whether a client of this process has asked for the model.
    """

    built: ModuleState
    needed: bool = True
    used: bool = False
    _seed: int = 0
    _block: ExitStack = field(default_factory=ExitStack, repr=False)

    def prepare(self) -> None:
        """Put the model back, before anything is loaded into it for a client."""
        if self.needed:
            self.built.put_back()

    def use(self) -> None:
        """A client is about to get the model."""
        if not self.needed:
            self.built.put_back()
            self._block.enter_context(seeded(self._seed))
        self.needed = self.used = True

    def call(self, client: Client, task: Task, ctx: ClientContext) -> Update:
        """Run a client on a model that was prepared."""
        self._seed = ctx.seed
        with ExitStack() as self._block:
            if not self.needed:
                return client(task, ctx)
            self._block.enter_context(seeded(self._seed))
            before = None if self.used else generators()
            update = client(task, ctx)
            if not self.used:
                self.needed = generators() != before
            return update


@dataclass
class Received:
    """Parameters and a mask that several clients share, and what tells whether one of them changed any of it.

    Attributes:
        params: what clients are given: a copy, because decoded values may lie in the message itself.
        mask: as decoded.
        original: the decoded values, 1-D; None where there is no flat vector to compare with.
    """

    params: Params
    mask: Mask | None
    original: Tensor | None = None
    _versions: tuple[int, ...] = ()
    _compared: bool = False

    @classmethod
    def of(cls, params: Params, mask: Mask | None) -> Received:
        """Of what a payload was decoded to."""
        if not isinstance(params, FlatParams):
            return cls(params, mask, None, _versions(params, mask))
        shapes = tuple(value.shape for value in params.values())
        lent = FlatParams.view(params.flat.clone(), params.names, shapes)
        return cls(lent, mask, params.flat, _versions(lent, mask))

    @property
    def changed(self) -> bool:
        """Whether somebody wrote into it: told by PyTorch's version counters, which `.data` and NumPy do not move; for
        those, the first client that had it is followed by a comparison of all values."""
        if _versions(self.params, self.mask) != self._versions:
            return True
        if self._compared or self.original is None or not isinstance(self.params, FlatParams):
            return False
        self._compared = True
        return not torch.equal(self.params.flat, self.original)


def _versions(params: Params, mask: Mask | None) -> tuple[int, ...]:
    """Version counters of all memory; views share the one of their buffer."""
    parts = [*_buffers(params), *(() if mask is None else _buffers(mask))]
    return tuple(tensor._version for tensor in parts)


def _buffers(tensors: Params | Mask) -> list[Tensor]:
    return [tensors.flat] if isinstance(tensors, (FlatParams, FlatMask)) else list(tensors.values())


@dataclass
class LentData:
    """The samples that this process lends to its clients, which share them, and their versions when they were first lent."""

    _first: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def lend(self, data: Split) -> Split:
        """Remember the samples as they are, unless they were lent before."""
        for tensor in (data.stored, data.labels):
            if id(tensor) not in self._first:
                self._first[id(tensor)] = tensor, tensor._version
        return data

    def changed(self, data: Split) -> bool:
        """Whether somebody wrote into these samples since."""
        return any(tensor._version != self._first[id(tensor)][1] for tensor in (data.stored, data.labels))
