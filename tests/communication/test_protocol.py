"""Flower's own byte counts: the remembered frame plus the payload equals what Flower's classes give for the whole message."""

from __future__ import annotations

import random
import time

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.communication import flower_private as flower_compat
from fl_sim.communication import flower_traffic as protocol
from fl_sim.communication.flower_private import CHUNK_BYTES, inbound_bytes, outbound_bytes
from fl_sim.communication.flower_traffic import protocol_bytes
from fl_sim.communication.messages import content

flower_compat.adopt_identity()

EXACT = {"down": outbound_bytes, "up": inbound_bytes}


def exchange(data: bytes, *, number: int = 1, node: int = 5) -> dict[str, Message]:
    """A task and its reply, as this framework sends them."""
    down = Message(content(data, config={"round": number, "seed": 3, "mu": 0.5}), node, "train", group_id=str(number))
    up = Message(content(data, metrics={"num-examples": number, "loss": 0.25}), reply_to=down)
    return {"down": down, "up": up}


def check(messages: dict[str, Message]) -> None:
    for direction, message in messages.items():
        exact = EXACT[direction](message)
        assert protocol_bytes(message, direction=direction) == exact
        assert protocol_bytes(message, direction=direction) == exact


SIZES = [0, 1, 9, 10, 127, 128, 16_383, 16_384, 99_999, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 12_000_000]


def test_every_payload_size() -> None:
    noise = random.Random(0).randbytes(max(SIZES))
    for size in (*SIZES, *reversed(SIZES)):
        check(exchange(noise[:size]))


EDGES = [sign * (2**k + d) for k in (0, 6, 7, 13, 14, 62) for d in (-1, 0, 1) for sign in (1, -1)]
EDGES += [2**63 - 1, 2**63, 2**64 - 1, -(2**63)]


def test_one_structure_with_numbers_of_every_length() -> None:
    """Neighbours of a length's edge must not share what is remembered for the other."""
    for number in EDGES:
        record = MetricRecord({"n": number, "pair": [1, number % 2**62]})
        check({"down": Message(RecordDict({"config": ConfigRecord(dict(record))}), 5, "train", group_id="1")})
        check({"up": Message(RecordDict({"metrics": record}), 5, "train", group_id="1")})


def test_tasks_with_numbers_of_every_length() -> None:
    for number in (1, 127, 128, 2**14, 2**35, 2**62):
        asked = Message(content(b"x"), 5, "train", group_id="1", dst_task_id=number)
        check({"down": asked, "up": Message(content(b"y"), reply_to=asked)})


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.sampled_from(EDGES)
NAMES = st.text(max_size=8)
SCALARS = NUMBERS | st.floats(allow_nan=False) | st.booleans() | st.text(max_size=200) | st.binary(max_size=200)
LISTS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4) | st.lists(st.text(max_size=3), max_size=3)


@st.composite
def contents(draw: st.DrawFn) -> RecordDict:
    """Several records of every kind; arrays differ, as encoded payloads do."""
    arrays = ArrayRecord()
    for i, name in enumerate(draw(st.lists(NAMES, max_size=3, unique=True))):
        data = bytes([i]) + draw(st.binary(max_size=300))
        shape = tuple(draw(st.lists(st.integers(0, 10**6), max_size=3)))
        arrays[name] = Array(draw(st.sampled_from(["uint8", "float32"])), shape, draw(NAMES), data)
    made = RecordDict({"arrays": arrays})
    made["config"] = ConfigRecord(draw(st.dictionaries(NAMES, SCALARS | LISTS, max_size=4)))
    made["metrics"] = MetricRecord(draw(st.dictionaries(NAMES, NUMBERS | st.floats(allow_nan=False), max_size=4)))
    return made


@given(
    sent=contents(),
    returned=contents(),
    node=st.sampled_from([1, 127, 128, 16_383, 16_384, 2**63 - 1, 2**64 - 1]),
    group=NAMES,
    kind=st.sampled_from(["train", "evaluate", "query", "train.action"]),
)
@settings(deadline=None, max_examples=examples(150))
def test_every_structure(sent: RecordDict, returned: RecordDict, node: int, group: str, kind: str) -> None:
    down = Message(sent, node, kind, group_id=group)
    check({"down": down, "up": Message(returned, reply_to=down)})


def test_error_replies() -> None:
    task = exchange(b"x")["down"]
    for reason in ("", "y" * 127, "z" * 128):
        check({"up": Message(Error(2, reason), reply_to=task)})


def test_one_calculation_serves_all_lengths_of_a_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_FRAMES", {})
    noise = random.Random(1).randbytes(200_000)
    for size in range(100_000, 200_000, 500):
        for direction, message in exchange(noise[:size]).items():
            protocol_bytes(message, direction=direction)
    assert len(protocol._FRAMES) == 2


def test_a_large_payload_costs_no_more_than_a_small_one() -> None:
    """A payload that is copied or hashed takes milliseconds; its length takes microseconds."""
    message = exchange(bytes(40_000_000))["up"]
    protocol_bytes(message, direction="up")
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        protocol_bytes(message, direction="up")
        spent.append(time.perf_counter() - start)
    assert min(spent) < 1e-3


def test_chunks_of_many_sizes() -> None:
    for size in (0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 17):
        objects = [min(CHUNK_BYTES, size - start) for start in range(0, size, CHUNK_BYTES)]
        assert flower_compat.chunk_bytes(size) == sum(len(f"ArrayChunk  {n}\0") + n for n in objects)
