"""Updates as a stream that is read once: the second pass over them is an error, and what was not read is said.

What the user's rule raises over them is told from what receiving them raises.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fl_sim.core.errors import error_line, users_line
from fl_sim.core.types import Update, UserError

log = logging.getLogger("fl_sim")


class ReadOnce(Iterator[Update]):
    """Updates in their order, one at a time; each is forgotten once the next is asked for.

    A second `for` over a plain generator sees nothing, so that a rule with two passes would average nothing.
    """

    def __init__(self, updates: Iterable[Update]) -> None:
        self._updates = iter(updates)
        self._ended = False

    def __iter__(self) -> ReadOnce:
        if self._ended:
            raise UserError(
                "the aggregation rule reads `updates` a second time; they come one at a time and are read once: "
                "start with updates = list(updates)"
            )
        return self

    def __next__(self) -> Update:
        try:
            if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                return next(self._updates)
            # A rule that reads them without gradients: on some engines the next client trains inside this call.
            with torch.inference_mode(False), torch.enable_grad():
                return next(self._updates)
        except StopIteration:
            self._ended = True
            raise

    def finish(self) -> None:
        """Read what the rule left, so that every reply is booked; the log says how many it left."""
        left = sum(1 for _ in self._updates)
        if left:
            log.warning("the aggregation rule did not read %d of the round's updates; they do not count", left)


@dataclass
class Stream:
    """Updates as they arrive, which remembers what the last one reported, and what went wrong with receiving them."""

    updates: Iterable[Update]
    failure: BaseException | None = None
    metrics: Collection[str] = ()

    def __iter__(self) -> Iterator[Update]:
        try:
            for update in self.updates:
                self.metrics = tuple(update.metrics)
                yield update
                del update  # before the next client trains: one update is held, whatever the cohort
        except Exception as error:
            self.failure = error
            raise


@contextmanager
def naming(who: str, stream: Stream | None = None) -> Iterator[None]:
    """Context manager for a rule: what the user's own code in it raises says whose it is.

    Raises:
        RuntimeError: in the place of an error that left the user's code, and that is none of receiving updates.
    """
    try:
        yield
    except Exception as error:
        received = stream is not None and error is stream.failure
        if received or isinstance(error, UserError) or not users_line(error):
            raise
        reported = "" if stream is None else f"; metrics that its clients report: {', '.join(sorted(stream.metrics))}"
        raise RuntimeError(f"{who} raised {error_line(error)}{reported * isinstance(error, KeyError)}") from error
