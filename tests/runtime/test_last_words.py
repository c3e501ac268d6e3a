"""A program that a library ends without a word still leaves one line: which of its listeners is gone."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing

import pytest

ENDS = """
import os, sys
from fl_sim.runtime.grids.last_words import LastWords

words = LastWords()
words.watch([("the head", ("127.0.0.1", int(sys.argv[1]))), ("the node", ("127.0.0.1", int(sys.argv[2])))])
if sys.argv[3] == "closes":
    words.close()
    words.close()
os._exit(1)
"""


def said(first: int, second: int, how: str) -> str:
    command = [sys.executable, "-c", ENDS, str(first), str(second), how]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr


@pytest.fixture
def gone() -> int:
    """A port that nobody listens at."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def test_the_listener_that_is_gone_is_named_in_one_line(gone: int) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        there = server.getsockname()[1]
        for ports, name in (((gone, there), "the head"), ((there, gone), "the node"), ((gone, gone), "the head")):
            line = said(*ports, "ends")
            assert line.startswith(f"fl-sim: the run failed: {name} at 127.0.0.1 is lost; ")
            assert line.count("\n") == 1
            assert "--resume" in line


def test_nothing_is_said_where_all_are_there_or_the_program_ends_by_itself(gone: int) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        there = server.getsockname()[1]
        assert said(there, there, "ends") == ""
    assert said(gone, gone, "closes") == ""
