"""The limit of files that a process may have open, under which most systems start one with 1,024, and let it have more."""

from __future__ import annotations

import resource

OF_WORKER = 16
"""Descriptors that a worker process takes in the program: its slots of shared memory, pipes, and what tells of its end."""


def allow_for_workers(count: int) -> None:
    """Raise this process's limit for so many worker processes, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + OF_WORKER * count
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
