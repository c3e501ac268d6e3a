"""Keep freed memory in the process instead of giving it back to the system.

A dense payload is a block of megabytes that lives for milliseconds. glibc maps such blocks afresh each time, and the page
faults cost several times the copy itself. Reusing them bounds the process at its peak, which is a few payloads. Blocks of
`LARGE_BYTES` and more are given back: kept, they leave holes between each other that nothing fits in, and the peak of a
model of 100 million parameters is a third higher.
"""

from __future__ import annotations

import ctypes
import gc
import platform

from fl_sim.core.large import LARGE_BYTES

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""`mallopt` parameters of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Ask glibc's allocator to keep what is freed; does nothing with another C library."""
    if (libc := _glibc()) is None:
        return
    libc.mallopt(MMAP_THRESHOLD, LARGE_BYTES)
    libc.mallopt(TRIM_THRESHOLD, 1 << 30)
    # One arena: what one thread frees, the other can take.
    libc.mallopt(ARENA_MAX, 1)


def give_back() -> None:
    """Collect what is garbage and give all free memory back, once a large model that nobody needs any more is gone.

    The modules of a model refer to each other in rings, which would stay for rounds.
    """
    gc.collect()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
