"""Grids that behave as a network may."""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import Message

from fl_sim.runtime.grids.inline import InlineGrid


class Shuffled(InlineGrid):
    """Answers in an order of its own, as a network would."""

    def stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        replies = list(super().stream(messages, timeout))
        return iter([*replies[1::2], *reversed(replies[::2])])
