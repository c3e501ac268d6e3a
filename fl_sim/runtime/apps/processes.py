"""The workers engine of foreign apps: processes that are forked off this one, so that any app can run there as it is.

A process of two: a keeper, which does nothing but fork a worker and another one when that dies, and the worker, which runs
one client at a time. Messages and contexts cross a pipe, pickled by `multiprocessing` between processes of this program.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

import torch
from flwr.app import Context, Message

from fl_sim.communication.flower_private import CLIENT_APP_CRASHED, CLIENT_APP_RAISED
from fl_sim.core.errors import UserError, in_one_line
from fl_sim.runtime.apps.client import Call, Outcome, call, error_of
from fl_sim.runtime.grids.allocator import keep_freed_memory
from fl_sim.runtime.grids.watchdog import end_group, own_group

DONE = 77
"""Exit status of a worker whose pipe was closed; with any other one it has died of a client."""
PARENT_DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl.h."""


def can_fork() -> bool:
    """Whether processes can be forked off this one: a GPU that it uses would not work in them."""
    return hasattr(os, "fork") and not torch.cuda.is_initialized()


def forked(app: Call, count: int) -> list[ProcessLane]:
    """Start as many processes.

    Raises:
        UserError: this system cannot fork, or this process uses a GPU, which a forked one could not.
    """
    if not can_fork():
        why = "this process uses a GPU already" if hasattr(os, "fork") else "this system cannot"
        raise UserError(f"engine = 'workers' forks processes: {why}; use inline or ray")
    lanes: list[ProcessLane] = []
    for _ in range(count):
        lanes.append(ProcessLane(app, [lane.pipe for lane in lanes]))
    return lanes


class ProcessLane:
    """A keeper process with its worker. `others`: pipes of earlier ones, which the new process must not hold open."""

    def __init__(self, app: Call, others: Sequence[Connection]) -> None:
        self.pipe, theirs = Pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent = os.getpid()
        self._keeper: int | None = os.fork()
        if self._keeper == 0:
            for pipe in (self.pipe, *others):
                pipe.close()
            _keep(app, theirs, parent)
        theirs.close()

    def run(self, message: Message, context: Context, seed: int) -> Outcome:
        """Run a client in the process; one that ends its process is answered for with an error reply."""
        try:
            self.pipe.send((message, context, seed))
            answer: Outcome | str = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a worker process was ended from outside") from error
        if isinstance(answer, Outcome):
            return answer
        return Outcome(
            error_of(message.metadata.dst_node_id, CLIENT_APP_CRASHED, f"its worker process died ({answer})")
        )

    def close(self) -> None:
        """End keeper and worker, whatever the worker is at."""
        if self._keeper is not None:
            end_group(self._keeper)
            os.waitpid(self._keeper, 0)
            self._keeper = None
            self.pipe.close()


def _keep(app: Call, pipe: Connection, parent: int) -> NoReturn:
    """The life of a keeper."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this
        own_group()
        _end_with(parent)
        me = os.getpid()
        while True:
            worker = os.fork()
            if worker == 0:
                _end_with(me)
                _work(app, pipe)
            _, status = os.waitpid(worker, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == DONE:
                break
            pipe.send(signal.Signals(-code).name if code < 0 else f"exit status {code}")
    finally:
        os._exit(0)


def _work(app: Call, pipe: Connection) -> NoReturn:
    """The life of a worker: answer until the pipe closes."""
    status = 1
    try:
        keep_freed_memory()
        torch.set_num_threads(1)
        logging.getLogger("flwr").setLevel(logging.WARNING)
        while (task := _received(pipe)) is not None:
            node = task[0].metadata.dst_node_id
            outcome = call(app, *task)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            _send(pipe, outcome, node)
        status = DONE
    finally:
        os._exit(status)


def _received(pipe: Connection) -> tuple[Message, Context, int] | None:
    """The next task; None where the pipe was closed."""
    try:
        task: tuple[Message, Context, int] = pipe.recv()
    except (EOFError, OSError):
        return None
    return task


def _send(pipe: Connection, outcome: Outcome, node: int) -> None:
    try:
        pipe.send(outcome)
    except Exception as error:  # it cannot be pickled, such as a function that the client put into its context
        why = f"what it keeps or answers cannot be sent: {in_one_line(error)}"
        pipe.send(Outcome(error_of(node, CLIENT_APP_RAISED, why)))


def _end_with(parent: int) -> None:
    """From now on this process ends when its parent does, killed or not (Linux)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
