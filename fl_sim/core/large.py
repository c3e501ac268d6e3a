"""Large models: those of which one copy more counts more than the time to do without it."""

from __future__ import annotations

LARGE_BYTES = 1 << 27
"""Bytes of a model, or of one block of memory, from which on it is large: 33.5 million float32 values."""


def is_large(nbytes: int) -> bool:
    """Whether something of so many bytes is large."""
    return nbytes >= LARGE_BYTES
