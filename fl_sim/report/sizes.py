"""A size as text, in the unit that leaves it digits: MB = 10^6 bytes, kB = 10^3 bytes."""

from __future__ import annotations


def size(count: float, digits: int = 2) -> str:
    """`1.25 MB`; below 0.1 MB `12.50 kB`, below 0.1 kB `57 B`: a small run must not read 0.00 MB."""
    if abs(count) < 100:
        return f"{count:.0f} B"
    return f"{count / 1e6:.{digits}f} MB" if abs(count) >= 1e5 else f"{count / 1e3:.{digits}f} kB"
