"""The one error that a user can mend, and other errors in one line.

A module of its own, so that the command line need not import PyTorch to say them.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / package) for package in ("fl_sim", "strategies", "clients"))
INSTALLED = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib", "stdlib"))
SITES = {"site-packages", "dist-packages"}
"""Folders of installed packages, also of another environment that this one sees."""


def is_installed(real: str) -> bool:
    """Whether a file, by its real path, is of the standard library or of an installed package."""
    return real.startswith(INSTALLED) or not SITES.isdisjoint(real.split(os.sep))


class UserError(ValueError):
    """Wrong input by the user: one line that says what, where and what is allowed. The CLI exits with status 2."""


USERS_OWN = (Exception, SystemExit)
"""What code of the user's may raise, to be caught where it is called: `sys.exit` in it would end the program without a word."""
MOST = 300
"""Characters of an error's own text that are shown."""


def shortened(text: str) -> str:
    """A text of at most `MOST` characters, its end left out where it is longer; says so.

    What is no Unicode, such as a part of a file's name, is escaped: no stream, log or page could be written with it.
    """
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= MOST else f"{text[:MOST]}... ({len(text):,} characters)"


def in_one_line(error: BaseException) -> str:
    """First line of an error's message, or its type where it has none. CUDA's messages have five lines."""
    said = str(error).strip()
    first = said.splitlines()[0] if said else type(error).__name__
    return first if isinstance(error, UserError) else shortened(first)


def users_line(error: BaseException) -> str:
    """`file, line n`: where an error left the user's own code last; empty where none was involved."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith(".py")
        and not (real := os.path.realpath(frame.filename)).startswith(OURS)
        and not is_installed(real)
    ]
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


def error_line(error: BaseException) -> str:
    """An error of a user's own code in one line: its type, what it says, and where it left that code."""
    where = users_line(error)
    said = shortened(" ".join(str(error).split()))
    return f"{type(error).__name__}: {said}" + (f" ({where})" if where else "")
