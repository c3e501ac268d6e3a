"""Entries of a resident model that do not travel: frozen weights, buffers, and each client's personal entries.

One model serves all clients of a process, so both are put in place before a client runs and looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from fl_sim.communication.exchange import Exchange, Frozen
from fl_sim.core.types import Params
from fl_sim.models.content import digest_of
from fl_sim.models.module_state import ModuleState
from fl_sim.models.parameters import constants, entries, load, tensors
from fl_sim.runtime.client.isolation import Isolation


class WrongFrozenWeights(ValueError):
    """Client and server do not have the same frozen weights, or tables."""


@dataclass
class Resident:
    """The entries of one process's model that do not travel.

    Attributes:
        model: the model that all clients of this process share.
        exchange: what travels.
        rebuild: seed -> the frozen weights and the first values of personal entries, on the CPU.
        built: the model before anybody used it; None = as it is now.
    """

    model: nn.Module
    exchange: Exchange
    rebuild: Callable[[int], Params]
    built: ModuleState | None = None
    _frozen: Frozen | None = field(default=None, repr=False)
    _first: Params = field(default_factory=dict, repr=False)
    _settled: bool = field(default=False, repr=False)
    _tables: dict[str, tuple[torch.Tensor, str]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        elsewhere = {*self.exchange.schema.names, *self.exchange.personal}
        self.isolation = Isolation(self.built or ModuleState(self.model, elsewhere))
        self._tables = {
            name: (buffer, digest_of(buffer))
            for name, buffer in constants(self.model).items()
            if buffer.dtype.is_floating_point and not isinstance(buffer, nn.Parameter)
        }

    def receive(self, announced: Frozen | None, known: Frozen | None) -> Frozen:
        """Put the frozen weights in place: as `announced` now, or as this client was told earlier (`known`).

        Raises:
            WrongFrozenWeights: the weights made here differ from the server's, or nobody has said which they are.
        """
        frozen = announced or known
        if frozen is None:
            raise WrongFrozenWeights("this client was never told the seed of the frozen weights")
        if frozen != self._frozen or not self._settled:
            made = self.rebuild(frozen.seed)
            if frozen.base:
                made = {**made, **self.exchange.decode_base(frozen)}
            fixed = {name: value for name, value in made.items() if name not in self.exchange.personal}
            if (digest := Frozen.digest_of(fixed)) != frozen.digest:
                raise WrongFrozenWeights(
                    f"the frozen weights made here from seed {frozen.seed} have hash {digest.hex()}, the server's "
                    f"{frozen.digest.hex()}: model, initialisation or library versions differ"
                )
            load(self.model, made)
            self._frozen, self._first, self._settled = frozen, made, True
        return frozen

    def enter(self, kept: Params) -> None:
        """A client is about to run: load its personal entries, as it `kept` them or their first values."""
        self._settled = False  # until `leave` has looked: a client that raises may leave anything behind
        self.isolation.prepare()
        self._load(kept)

    def place(self, kept: Params) -> None:
        """Put what does not travel back as it was: the model as built, personal entries as the client `kept` them."""
        self.isolation.built.put_back()
        self._load(kept)

    def _load(self, kept: Params) -> None:
        if self.exchange.personal:
            first = self._first or self.rebuild(0)
            load(self.model, {name: kept.get(name, first[name]) for name in self.exchange.personal})

    def leave(self) -> Params:
        """The client is done: its personal entries, to be kept; float32 holds those of half precision, and NumPy not all of them.

        Raises:
            WrongFrozenWeights: the client changed weights that are frozen, or buffers that are known as constant; they are
                made anew for the next.
        """
        # What came with the frozen weights is looked at below.
        alone = ((name, held) for name, held in self._tables.items() if name not in self._first)
        if moved := next((name for name, (buffer, was) in alone if digest_of(buffer) != was), None):
            raise WrongFrozenWeights(
                f"training changed the buffer {moved!r}, which it left alone in a trial of two passes: it does not travel, and "
                "nobody else would have its values; change it in every pass, or register it with persistent=False where each "
                "client needs it for itself alone"
            )
        if self._frozen is None and not self.exchange.personal:
            return {}  # nothing to look at, and a state dict costs as much as a small client's whole answer
        own = entries(self.model)
        if self._frozen is not None:
            held = tensors(self.model)
            now = {name: held[name].detach() for name in self._first if name not in self.exchange.personal}
            if Frozen.digest_of(now) != self._frozen.digest:
                raise WrongFrozenWeights(_changed(self._first, now))
        self._settled = True
        return {name: own[name].detach().to("cpu", torch.float32, copy=True) for name in self.exchange.personal}


def _changed(before: Params, now: Params) -> str:
    """What to say of frozen weights that are not what they were: whoever trains and the model itself can have changed them."""
    names = [n for n, value in now.items() if Frozen.digest_of({n: value}) != Frozen.digest_of({n: before[n]})]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"frozen weights changed: {names[0]!r}{more}; a client trains only parameters that require a gradient, and a model "
        "registers tensors that its own forward pass changes as buffers"
    )
