"""Updates as a stream that is read once: the second pass over them is an error, and what was not read is said."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch

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
