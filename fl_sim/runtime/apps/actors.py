"""The Ray engine of foreign apps: an actor for each lane, which keeps the ClientApp."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol, cast

import torch
from flwr.app import Context, Message

from fl_sim.communication.flower_private import CLIENT_APP_CRASHED, adopt_identity
from fl_sim.core.errors import UserError, in_one_line
from fl_sim.runtime.apps.client import Call, Lane, Outcome, call, error_of
from fl_sim.runtime.grids.allocator import keep_freed_memory
from fl_sim.runtime.grids.ray import RayOptions, connected, fetched, fitting


class _Remote(Protocol):
    def remote(self, *given: object) -> object: ...


class _Handle(Protocol):
    """Handle of an actor, as this process sees it."""

    run: _Remote


class _Actor:
    """The actor: one ClientApp, on one thread."""

    def __init__(self, app: list[object], run_id: int, path: list[str]) -> None:
        sys.path[:] = [*path, *(p for p in sys.path if p not in path)]
        keep_freed_memory()
        torch.set_num_threads(1)
        logging.getLogger("flwr").setLevel(logging.WARNING)
        adopt_identity(run_id)
        self._app = cast(Call, fetched(app))
        gc.freeze()  # what is imported is no garbage, and Flower's records start full collections

    def run(self, message: Message, context: Context, seed: int) -> Outcome:
        return call(self._app, message, context, seed)


class ActorLane:
    """An actor, and another one in its place when it dies."""

    def __init__(self, ray: ModuleType, app: object, run_id: int) -> None:
        self._ray, self._app, self._run_id = ray, app, run_id
        self._actor = self._started()

    def _started(self) -> _Handle:
        kind = self._ray.remote(_Actor).options(num_cpus=1)
        return cast(_Handle, kind.remote([self._app], self._run_id, list(sys.path)))

    def run(self, message: Message, context: Context, seed: int) -> Outcome:
        """Run a client in the actor; one that ends its process is answered for with an error reply."""
        try:
            return cast(Outcome, self._ray.get(self._actor.run.remote(message, context, seed)))
        except self._ray.exceptions.RayActorError as error:
            if error.actor_init_failed:
                raise RuntimeError(f"the ClientApp could not be sent to Ray: {in_one_line(error)}") from error
            self._actor = self._started()
            why = f"its worker process died ({type(error).__name__})"
            return Outcome(error_of(message.metadata.dst_node_id, CLIENT_APP_CRASHED, why))

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)


@contextmanager
def actor_lanes(app: Call, most: int, run_id: int) -> Iterator[Sequence[Lane]]:
    """As many lanes as the cluster has processors for, at most `most`; Ray is started for the block unless it runs."""
    options = RayOptions()
    with connected(options) as ray:
        try:
            shared = ray.put(app)
        except Exception as error:
            raise UserError(f"engine = 'ray': the ClientApp cannot be pickled: {in_one_line(error)}") from error
        yield [ActorLane(ray, shared, run_id) for _ in range(min(fitting(options), most))]
