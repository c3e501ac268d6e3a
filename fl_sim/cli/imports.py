"""Imports of a command, without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_uncollected() -> Iterator[None]:
    """Turn the garbage collector off while modules are imported, and leave them out of later collections.

    Imports make hardly any garbage, and each full collection in between searches all of PyTorch: 0.1 to 0.2 s of a start.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once: what is frozen is never given back
            gc.freeze()
        if was_on:
            gc.enable()
