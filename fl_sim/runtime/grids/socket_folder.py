"""The folder of `multiprocessing`'s Unix sockets, where TMPDIR is longer than the system allows for a socket's path.

It imports little: a program starts its fork server before its own imports.
"""

from __future__ import annotations

import os
import tempfile
from multiprocessing.util import get_temp_dir

from fl_sim.core.errors import UserError

LONGEST = 103
"""Bytes of a socket's path on macOS; Linux allows 107 (`sun_path` of `sockaddr_un` without its closing zero)."""
NAMES = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Bytes that `multiprocessing` appends to the folder of temporary files."""
SHORT = "/tmp"


def settle_socket_folder() -> None:
    """Have `multiprocessing` make its sockets in /tmp where a path in TMPDIR would be too long; other files stay in TMPDIR.

    `multiprocessing` chooses that folder once for a process, so this comes before its first socket.

    Raises:
        UserError: TMPDIR is too long, and nothing can be written in /tmp.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) + NAMES <= LONGEST:
        return
    before, tempfile.tempdir = tempfile.tempdir, SHORT
    try:
        get_temp_dir()
    except OSError as error:
        raise UserError(
            f"TMPDIR = {folder!r}: too long for the sockets of worker processes, at most {LONGEST - NAMES} bytes; "
            f"and {SHORT}: {error.strerror}"
        ) from error
    finally:
        tempfile.tempdir = before
