"""A process that says why this program ended, where a library ends it without a word: Ray does when its head is lost.

Ray's own code ends the whole process then, past every handler of Python. The process here only waits for that, at no cost.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from fl_sim.runtime.grids.heartbeat import Address

CODE = """
import json, signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
said = sys.stdin.read().splitlines()
for name, (host, port) in json.loads(said[0]) if len(said) == 1 else ():
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        print(f"fl-sim: the run failed: {name} at {host} is lost; {sys.argv[1]}", file=sys.stderr)
        break
"""
KEPT = "the rounds that were saved are kept, --resume goes on from there once it runs again"


class LastWords:
    """Waits for this program to end; if it ends before `close`, says which of its listeners is gone, in one line."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", CODE, KEPT]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def watch(self, listeners: Sequence[tuple[str, Address]]) -> None:
        """These are the listeners, by what they are; the most telling one first."""
        self._tell(json.dumps(listeners))

    def close(self) -> None:
        """Nothing is to be said: this program goes on, or says itself what happened. Harmless when called twice."""
        if self._process.poll() is None:
            self._tell("bye\nbye")
            self._process.communicate()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # somebody ended it: then nothing is said
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
