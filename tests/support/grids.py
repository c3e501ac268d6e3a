"""Grids of a test's own kind in place of the inline engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from flwr.app import Message

from fl_sim.runtime.client.host import client_app
from fl_sim.runtime.grids.inline import InlineGrid
from fl_sim.simulation.client_side import hosts_of
from fl_sim.simulation.engines import ENGINES
from fl_sim.simulation.federation import Federation


class Shuffled(InlineGrid):
    """Answers in an order of its own, as a network would."""

    def stream(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        replies = list(super().stream(messages, timeout))
        return iter([*replies[1::2], *reversed(replies[::2])])


def inline_is(monkeypatch: pytest.MonkeyPatch, make: Callable[..., InlineGrid]) -> None:
    """From here on engine = "inline" is made by `make`, which takes what `InlineGrid` takes."""

    def opened(federation: Federation) -> InlineGrid:
        timeout_s = federation.experiment.faults.timeout_s
        return make(client_app(hosts_of(federation)), len(federation.partitions), timeout_s=timeout_s)

    monkeypatch.setitem(ENGINES, "inline", opened)  # type: ignore[arg-type]
