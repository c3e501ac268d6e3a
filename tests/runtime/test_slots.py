"""Memory that a worker shares with the program: replies are read where they lie, and nothing is written over them meanwhile."""

from __future__ import annotations

import gc
import os
import resource
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from federation import run_tiny

from fl_sim.codecs import Schema, decode, encode
from fl_sim.codecs.payload_memory import lent_by
from fl_sim.runtime.grids.slots import MOST_TASKS, Areas, Slots
from fl_sim.runtime.state.shared_memory import ALIGNMENT, Area, Key

KEY: Key = ("payload", "p")


def _answered(slots: Slots, letter: bytes) -> Mapping[Key, bytes] | Mapping[Key, memoryview]:
    """What is read of a task whose reply is this letter, many times."""
    slot = slots.answered()
    spans = slots.areas.outbox[slot].write([{KEY: np.frombuffer(letter * 100, dtype=np.uint8)}])
    return slots.read(slot, spans)[0]


def test_a_reply_that_somebody_has_is_not_written_over() -> None:
    slots = Slots(Areas(Area()))
    for _ in range(MOST_TASKS):
        slots.take()
    held = _answered(slots, b"a")
    assert isinstance(held[KEY], memoryview)
    part = held[KEY][10:20]
    del held
    for letter in (b"b", b"c", b"d", b"e"):  # as many tasks as the worker may have, all the time
        slots.take()
        copied = _answered(slots, letter)
        assert isinstance(copied[KEY], bytes)
        assert copied[KEY] == letter * 100
    assert bytes(part) == b"a" * 10
    del part
    slots.take()
    again = _answered(slots, b"f")
    assert isinstance(again[KEY], memoryview)
    assert again[KEY].readonly
    slots.areas.close()


def test_a_payload_is_encoded_where_it_is_sent_from() -> None:
    params = {"w": torch.arange(1.0, 1000.0)}
    schema = Schema.of(params, ("w",))
    area = Area()
    other = np.arange(7, dtype=np.uint8)
    with lent_by(area.room):
        encoded = encode(params, None, schema=schema)
    spans = area.write([{("a", "b"): other, KEY: np.frombuffer(encoded, dtype=np.uint8)}])
    (read,) = area.lend(spans, lambda: None)
    assert all(start % ALIGNMENT == 0 for start, _ in spans[0].values())
    assert bytes(read["a", "b"]) == other.tobytes()
    assert bytes(read[KEY]) == encode(params, None, schema=schema)
    assert torch.equal(decode(read[KEY], schema=schema)[0]["w"], params["w"])
    room, sent = (np.frombuffer(data, dtype=np.uint8) for data in (encoded, read[KEY]))
    assert np.array_equal(room, sent)
    # The same memory: nothing was copied.
    area._mapped(1)[spans[0][KEY][1] - 1] ^= 255
    assert room[-1] == sent[-1] != encode(params, None, schema=schema)[-1]
    area.close()


def test_a_part_of_a_room_is_sent_as_a_part() -> None:
    area = Area()
    room = area.room(100)
    room[:] = b"a" * 100
    spans = area.write([{KEY: np.frombuffer(room[:10], dtype=np.uint8)}])
    assert area.copied(spans[0]) == {KEY: b"a" * 10}
    area.close()


def test_nothing_else_comes_to_lie_where_a_room_was_given() -> None:
    """A client that fails leaves its payload to nobody; the memory grows, and what was mapped first would be given back."""
    area = Area()
    first = weakref.ref(area.room(100).obj)
    area.room(1 << 20)
    assert first() is not None
    area.write([])
    gc.collect()
    assert first() is None
    area.close()


def test_workers_start_whose_slots_are_more_files_than_a_process_may_open_at_first(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, before[1]))
        report = run_tiny(tmp_path, "engine=workers", "workers.count=3", "rounds=1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert report.summary["rounds"] == 1
