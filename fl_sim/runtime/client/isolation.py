"""One process's clients, kept apart: each finds the model as it was built, and global generators seeded for it alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_sim.core.process_state import generators, seeded, settings, unchanged_settings
from fl_sim.core.types import FlatMask, FlatParams, Mask, Params, Task, Update
from fl_sim.data.split import Split
from fl_sim.models.module_state import ModuleState
from fl_sim.training.client import Client, ClientContext, alone, as_they_are
from fl_sim.training.tasks import CLASSIFICATION, LearningTask


class LentContext(ClientContext):
    """A `ClientContext` that tells when its model is first asked for."""

    __slots__ = ("_model", "_use")

    def __init__(
        self,
        model: nn.Module,
        data: Split,
        rng: torch.Generator,
        state: dict[str, Tensor],
        seed: int = 0,
        corrected: Callable[[Params], Params] = as_they_are,
        loss: LearningTask = CLASSIFICATION,
        personal: Collection[str] = (),
        client: int = 0,
        peer: Callable[[int], Split] = alone,
        *,
        use: Callable[[], None] = lambda: None,
    ) -> None:
        self._use = use
        super().__init__(model, data, rng, state, seed, corrected, loss, personal, client, peer)

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
    """Runs a process's clients so that none finds what another one left on the model, in a global generator, or in a
    setting of the process.

    A client that only looks at its task pays nothing for this: the first client of a process is always isolated, later
    ones from the moment that one has asked for the model, drawn a global random number or changed a setting.

    Attributes:
        built: the model as it was.
        needed: whether the next client is isolated from its beginning.
        used: whether a client of this process has asked for the model.
    """

    built: ModuleState
    needed: bool = True
    used: bool = False
    _seed: int = 0
    _block: ExitStack | None = field(default=None, repr=False)

    def prepare(self) -> None:
        """Put the model back, before anything is loaded into it for a client."""
        if self.needed:
            self.built.put_back()

    def use(self) -> None:
        """A client is about to get the model."""
        if not self.needed:
            self.built.put_back()
            self._enter()
        self.needed = self.used = True

    def call(self, client: Client, task: Task, ctx: ClientContext) -> Update:
        """Run a client on a model that was prepared."""
        self._seed = ctx.seed
        try:
            if not self.needed:
                return client(task, ctx)
            self._enter()
            before = None if self.used else (settings(), generators())
            update = client(task, ctx)
            if not self.used:
                self.needed = (settings(), generators()) != before
            return update
        finally:
            if self._block is not None:
                self._block.close()
                self._block = None

    def _enter(self) -> None:
        self._block = ExitStack()
        self._block.enter_context(unchanged_settings())
        self._block.enter_context(seeded(self._seed))


@dataclass
class Received:
    """Parameters and a mask that several clients share, and what tells whether one of them changed any of it.

    Attributes:
        params: what clients are given.
        mask: as decoded.
        original: the decoded values, 1-D, of which `params` are a copy; None where they are no copy.
    """

    params: Params
    mask: Mask | None
    original: Tensor | None = None
    _compared: bool = False

    def __post_init__(self) -> None:
        self._shared = [*_buffers(self.params), *(() if self.mask is None else _buffers(self.mask))]
        self._versions = [tensor._version for tensor in self._shared]
        self._held = self._holding()

    @classmethod
    def of(cls, params: Params, mask: Mask | None, *, copied: bool) -> Received:
        """Wrap decoded parameters, which may lie in the message itself; with `copied` the clients get a copy of them."""
        if not copied or not isinstance(params, FlatParams):
            return cls(params, mask)
        return cls(params.over(params.flat.clone()), mask, params.flat)

    @property
    def changed(self) -> bool:
        """Whether somebody wrote into it: told by PyTorch's version counters, which `.data` and NumPy do not move; for
        those, the first client that had a copy is followed by a comparison of all values. An entry that was assigned,
        added or removed, or whose `.data` was, is told by what the dicts hold."""
        if [tensor._version for tensor in self._shared] != self._versions or self._holding() != self._held:
            return True
        if self._compared or self.original is None or not isinstance(self.params, FlatParams):
            return False
        self._compared = True
        return not torch.equal(self.params.flat, self.original)

    def _holding(self) -> list[object]:
        """Names and places of all that the clients share; of a flat dict its buffer, where all entries lie in it."""
        return [*_holding(self.params), *(() if self.mask is None else _holding(self.mask))]


def _holding(tensors: Params | Mask) -> list[object]:
    if isinstance(tensors, (FlatParams, FlatMask)):
        return [tensors.whole]
    return [*tensors, *map(Tensor.data_ptr, tensors.values())]


def _buffers(tensors: Params | Mask) -> list[Tensor]:
    """All memory; views share the version counter of their buffer."""
    return [tensors.flat] if isinstance(tensors, (FlatParams, FlatMask)) else list(tensors.values())


@dataclass(frozen=True, slots=True)
class Loan:
    """Samples that were lent to a client: images, labels, and their versions when they were first lent."""

    data: Split
    stored: Tensor
    labels: Tensor
    versions: tuple[int, int]

    @property
    def changed(self) -> bool:
        """Whether somebody wrote into these samples since."""
        return self.stored._version != self.versions[0] or self.labels._version != self.versions[1]


@dataclass
class LentData:
    """The samples that this process lends to its clients, which share the images."""

    _loans: dict[int, Loan] = field(default_factory=dict)
    _first: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def lend(self, data: Split) -> Loan:
        """Remember the samples as they are, unless they were lent before."""
        loan = self._loans.get(id(data))
        if loan is None:
            _, version = self._first.setdefault(id(data.stored), (data.stored, data.stored._version))
            loan = Loan(data, data.stored, data.labels, (version, data.labels._version))
            self._loans[id(data)] = loan
        return loan
