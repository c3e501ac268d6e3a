"""Memory that payloads are written into: their own, or what a transport lends, which spares it a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Lender = Callable[[int], memoryview]
"""(bytes of a payload) -> room for it, which is its own until the transport has sent it."""
_lender: ContextVar[Lender | None] = ContextVar("lender", default=None)


@contextmanager
def lent_by(lender: Lender | None) -> Iterator[None]:
    """Context manager: complete payloads of float32 that are encoded in the block lie in memory of this lender."""
    before = _lender.set(lender)
    try:
        yield
    finally:
        _lender.reset(before)


def room(size: int) -> memoryview | None:
    """Room for a payload of so many bytes; None where nobody lends any."""
    lender = _lender.get()
    return None if lender is None else lender(size)
