"""Replies decoded together: each client's update, description and rejection are those that it has alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flwr.app import RecordDict

from fl_sim.codecs import Schema
from fl_sim.communication import messages as wire
from fl_sim.communication.exchange import Coding, Exchange
from fl_sim.core.types import Task, Update
from strategies.decoding import Decoded, Rejected, decoded, decoded_all

SCHEMA = Schema.of({"w": torch.zeros(20, 30), "b": torch.zeros(20)}, ["w"])
START = SCHEMA.view(torch.linspace(-1, 1, SCHEMA.size))


def _content(exchange: Exchange, client: int, mangle: Callable[[bytes], bytes] = bytes) -> RecordDict:
    drawn = torch.Generator().manual_seed(client)
    update = Update(SCHEMA.view(START.flat + 0.01 * torch.randn(SCHEMA.size, generator=drawn)), client + 1)
    data = exchange.encode_up(update, Task(1, START), seed=client)
    return wire.update_content(Update(update.params, client + 1, metrics={"loss": float(client)}), mangle(data))


def _outcome(found: Decoded | Rejected) -> tuple[object, ...]:
    if isinstance(found, Rejected):
        return str(found), found.described
    update = found.update
    return SCHEMA.flat(update.params).tolist(), update.num_examples, update.metrics, found.described


def _alone(exchange: Exchange, content: RecordDict) -> Decoded | Rejected:
    try:
        return decoded(exchange, content, START, None)
    except Rejected as problem:
        return problem


@pytest.mark.parametrize("coding", [Coding(), Coding("float16"), Coding("int8", "difference")])
def test_a_rejected_reply_among_others_is_rejected_alone(coding: Coding) -> None:
    exchange = Exchange(SCHEMA, uplink=coding)
    contents = [_content(exchange, client) for client in range(6)]
    contents[1] = _content(exchange, 1, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    contents[2] = _content(exchange, 2, lambda data: data[:9])
    contents[3] = wire.content(b"", metrics={})
    found = decoded_all(exchange, contents, START, None)
    assert [isinstance(each, Rejected) for each in found] == [False, True, True, True, False, False]
    assert [_outcome(each) for each in found] == [_outcome(_alone(exchange, content)) for content in contents]


def test_a_value_that_overflows_the_sum_is_rejected_alone() -> None:
    exchange = Exchange(SCHEMA, uplink=Coding("float32", "difference"))
    high, low = (SCHEMA.view(torch.full((SCHEMA.size,), value)) for value in (3e38, -3e38))
    zeros = Update(SCHEMA.view(torch.zeros(SCHEMA.size)), 1)
    data = [exchange.encode_up(zeros, Task(1, start), seed=0) for start in (low, high, low)]
    contents = [wire.update_content(zeros, each) for each in data]
    found = decoded_all(exchange, contents, low, None)
    assert [isinstance(each, Rejected) for each in found] == [False, True, False]
    assert exchange.decode_up_all(data, low) is None
    assert exchange.decode_up_all(data[::2], low) is not None
