"""Keep freed memory in the process instead of giving it back to the system.

A dense payload is a block of megabytes that lives for milliseconds. glibc maps such blocks afresh each time, and the page
faults cost several times the copy itself. Reusing them bounds the process at its peak, which is a few payloads. Blocks of
`LARGE` bytes and more are given back: kept, they leave holes between each other that nothing fits in, and the peak of a
model of 100 million parameters is a third higher.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""`mallopt` parameters of glibc's malloc.h."""
LARGE = 1 << 27


def keep_freed_memory() -> None:
    """Ask glibc's allocator to keep what is freed; does nothing with another C library."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, LARGE)
    libc.mallopt(TRIM_THRESHOLD, 1 << 30)
    # One arena: what one thread frees, the other can take.
    libc.mallopt(ARENA_MAX, 1)
