"""Heartbeat of a cluster's machines: a connection to a port of each, once a second, in a thread of its own.

Ray's head finds out by itself that a node is lost, but by default only after more than a minute where a cable was cut. The
connection is made by the kernel of the other machine, so that a busy machine answers as fast as an idle one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping

Address = tuple[str, int]
EVERY_S = 1.0
PATIENCE_S = 1.0
"""How long one connection may take; a machine that is only slow has many more."""


class Heartbeat:
    """Tells which of the watched machines are lost: nothing listens at their port, or they are silent for too long."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._watched: dict[str, Address] = {}
        self._heard: dict[str, float] = {}
        self._lost: dict[str, str] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, nodes: Mapping[str, Address]) -> None:
        """Watch these as well: node -> host and port. A node that is watched already keeps its history."""
        for node in nodes.keys() - self._watched.keys():
            self._heard[node], self._watched[node] = time.monotonic(), nodes[node]
        if self._watched and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fl_sim-heartbeat", daemon=True)
            self._thread.start()

    @property
    def lost(self) -> Mapping[str, str]:
        """Lost node -> why."""
        return self._lost

    def forget(self, node: str) -> None:
        """Watch a node no more."""
        for table in (self._watched, self._heard, self._lost):
            table.pop(node, None)

    def ask(self, node: str) -> bool:
        """Whether a node answers now; one that is not watched does."""
        address = self._watched.get(node)
        return address is None or self._knock(node, address)

    def close(self) -> None:
        """End the thread; harmless when called twice."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._closed.wait(EVERY_S):
            for node, address in list(self._watched.items()):
                if node not in self._lost:
                    self._knock(node, address)

    def _knock(self, node: str, address: Address) -> bool:
        try:
            socket.create_connection(address, timeout=PATIENCE_S).close()
        except ConnectionRefusedError:
            self._lost[node] = "nothing runs there any more"
            return False
        except OSError as error:  # no answer, no route
            silent = time.monotonic() - self._heard.get(node, time.monotonic())
            if silent > self.timeout_s:
                self._lost[node] = f"no answer for {silent:.0f} s ({error.strerror or error})"
            return False
        self._heard[node] = time.monotonic()
        return True
