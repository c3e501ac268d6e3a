"""Flat parameters that are made when somebody first asks for their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import xxhash
from torch import Tensor

from fl_sim.core.types import FlatParams, UserError


class Deferred(FlatParams):
    """`FlatParams` whose buffer is made when it is first asked for, and that can give it up until it is asked for again.

    >>> made = Deferred.of(lambda: torch.ones(2), ("weight",), (torch.Size([2]),))
    >>> made.is_held, made["weight"].tolist(), made.is_held
    (False, [1.0, 1.0], True)
    """

    _make: Callable[[], Tensor]
    _buffer: Tensor | None
    _check: bytes

    @classmethod
    def of(cls, make: Callable[[], Tensor], names: tuple[str, ...], shapes: tuple[torch.Size, ...]) -> Self:
        """Parameters of these names and shapes, whose values `make` gives as one 1-D tensor on the CPU."""
        made = dict.__new__(cls)
        made.names, made._shapes, made._lazy = names, shapes, True
        made._make, made._buffer, made._check = make, None, b""
        return made

    @property
    def flat(self) -> Tensor:
        """The values, 1-D.

        Raises:
            UserError: they were given up, and `make` gives others now.
        """
        if self._buffer is None:
            made = self._make()
            if self._check and _digest(made) != self._check:
                raise UserError("model: its builder draws other weights than before from the same seed")
            self._buffer = made
        return self._buffer

    @flat.setter
    def flat(self, values: Tensor) -> None:
        self._buffer = values

    @property
    def is_held(self) -> bool:
        """Whether the values are in memory."""
        return self._buffer is not None

    def give_up(self) -> None:
        """Forget the values; they are made again, and compared, when they are next asked for."""
        if self._buffer is not None:
            self._check = _digest(self._buffer)
            dict.clear(self)
            self._lazy, self._buffer = True, None


def _digest(values: Tensor) -> bytes:
    return xxhash.xxh3_64_digest(values.contiguous().numpy().data)
