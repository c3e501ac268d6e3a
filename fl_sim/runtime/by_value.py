"""Functions of the running script or notebook, sent by value to this program's own worker processes.

A worker cannot import `__main__` of the program that started it. What is unpickled here comes through the pipe (or Ray's store)
by which that program starts the worker, never from a payload, a file or a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from fl_sim.core.errors import UserError, in_one_line
from fl_sim.core.given import MAIN
from fl_sim.core.lookup import imported


def pack(paths: Iterable[str]) -> bytes:
    """Pickle those of the import paths that are of `__main__`, with what they use of it; empty where none is.

    Raises:
        UserError: there is no such function, or it holds something that cannot be sent, such as an open file.
    """
    own = {path.partition(":")[2]: imported("", path) for path in paths if path.startswith(f"{MAIN}:")}
    if not own:
        return b""
    for name, function in own.items():
        try:
            _bytes_of(function)
        except Exception as error:  # whatever the user's objects raise
            raise UserError(
                f"{MAIN}:{name} cannot be sent to worker processes ({type(error).__name__}: {in_one_line(error)}); save it to a "
                f"file mine.py and name it mine:{name}"
            ) from error
    return _bytes_of(own)  # together: they share their globals


def _bytes_of(value: object) -> bytes:
    import cloudpickle  # here: most runs send none

    return bytes(cloudpickle.dumps(value))


def unpack(packed: bytes) -> None:
    """Put what `pack` packed into this process's own `__main__`, where import paths find it."""
    if packed:
        import cloudpickle

        vars(sys.modules[MAIN]).update(cloudpickle.loads(packed))
