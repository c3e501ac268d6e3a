"""Keep freed memory in the process instead of giving it back to the system.

A dense payload is a block of megabytes that lives for milliseconds. glibc maps such blocks afresh each time, and the page
faults cost several times the copy itself. What is kept is mostly used again, but not always: tensors are aligned, and glibc's
`memalign` finds no hole that is as large as a tensor and no larger. Where small objects that live until the end of a round lie
between such holes, a process grows by about one model a client. So blocks of `LARGE_BYTES` and more are given back, and smaller
ones where that could come to more than `MOST_KEPT`.
"""

from __future__ import annotations

import ctypes
import gc
import platform

from fl_sim.core.large import LARGE_BYTES

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""`mallopt` parameters of glibc's malloc.h."""


MOST_KEPT, SMALL_BYTES = 1 << 30, 1 << 22
"""Bytes that a round may leave in holes; where it could leave more, blocks from so many bytes on are given back."""


def keep_freed_memory(left_in_holes: int = 0) -> None:
    """Ask glibc's allocator to keep what is freed; does nothing with another C library.

    Args:
        left_in_holes: bytes of the models of all clients that this process trains in a round.
    """
    if (libc := _glibc()) is None:
        return
    libc.mallopt(MMAP_THRESHOLD, LARGE_BYTES if left_in_holes <= MOST_KEPT else SMALL_BYTES)
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
