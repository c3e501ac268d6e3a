"""Hostile bytes: mutated payloads with a repaired checksum are refused or decode to legal values, within bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import tracemalloc

import numpy as np
import payloads
import pytest
import torch
import xxhash

from fl_sim.codecs import CorruptPayload, describe
from fl_sim.codecs.payload_format import CHECK


def repaired(data: bytearray) -> bytes:
    body = bytes(data[: -CHECK.size])
    return body + CHECK.pack(xxhash.xxh3_64_intdigest(body) & 0xFFFFFFFF)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four edits: a flipped bit, another byte, a cut, an insertion, a repeated piece."""
    edited = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, max(1, len(edited) if rng.random() < 0.5 else min(len(edited), 96))))
        kind = rng.integers(0, 6)
        if kind == 0:
            edited[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            edited[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(0, 256))]))
        elif kind == 2:
            del edited[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            edited[at:at] = rng.bytes(int(rng.integers(1, 16)))
        elif kind == 4:
            edited[at : at + 9] = b"\xff" * int(rng.integers(1, 9))
        else:
            edited[at:at] = edited[at : at + int(rng.integers(1, 64))]
        if len(edited) <= CHECK.size:
            return bytes(edited)
    return repaired(edited)


def attack(name: str, count: int) -> tuple[int, int]:
    """(refused, accepted) of `count` mutations."""
    case = payloads.CASES[name]()
    data, rng = case.encode(), np.random.default_rng(11)
    refused = accepted = 0
    for _ in range(count):
        hostile = mutate(data, rng)
        try:
            params, mask = case.decode(hostile)
        except CorruptPayload:
            refused += 1
            continue
        accepted += 1
        assert bool(torch.isfinite(params.flat).all())
        assert params.flat.numel() == case.schema.size
        assert mask is None or mask.flat.numel() == case.schema.prunable_size
        assert sum(describe(hostile, schema=case.schema, held_mask=case.held_mask).sections.values()) == len(hostile)
    return refused, accepted


@pytest.mark.parametrize("name", payloads.CASES)
def test_mutations_are_refused_or_legal(name: str) -> None:
    refused, accepted = attack(name, 600)
    assert refused > 200
    assert refused + accepted == 600


@pytest.mark.parametrize("name", payloads.CASES)
def test_every_value_type_and_mask_mode_with_every_flag_is_refused_or_legal(name: str) -> None:
    """Those of the header's numbers that belong to other payloads, and those that no payload has."""
    case = payloads.CASES[name]()
    data = case.encode()
    assert data == repaired(bytearray(data))
    for place, value, flags in itertools.product((5, 6), range(32), range(4)):
        hostile = bytearray(data)
        hostile[place], hostile[7] = value, flags
        with contextlib.suppress(CorruptPayload):
            assert case.decode(repaired(hostile))[0].flat.numel() == case.schema.size


@pytest.mark.slow
@pytest.mark.parametrize("name", payloads.CASES)
def test_a_hundred_thousand_mutations(name: str) -> None:
    refused, accepted = attack(name, 100_000)
    assert refused > 25_000
    assert refused + accepted == 100_000


@pytest.mark.parametrize("name", payloads.CASES)
def test_memory_stays_within_three_times_the_schema(name: str) -> None:
    """Of everything that decoding allocates through Python and NumPy; PyTorch's one output buffer comes on top of it."""
    case = payloads.CASES[name]()
    data, rng = case.encode(), np.random.default_rng(5)
    bound = 3 * case.schema.nbytes - 4 * case.schema.size + 64_000
    tracemalloc.start()
    try:
        for _ in range(200):
            hostile = mutate(data, rng)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(CorruptPayload):
                case.decode(hostile)
            assert tracemalloc.get_traced_memory()[1] - before < bound
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", payloads.CASES)
def test_every_truncation_is_refused(name: str) -> None:
    case = payloads.CASES[name]()
    data = case.encode()
    for length in range(0, len(data), max(1, len(data) // 400)):
        with pytest.raises(CorruptPayload):
            case.decode(data[:length])
        if length > CHECK.size:
            with pytest.raises(CorruptPayload):
                case.decode(repaired(bytearray(data[:length])))


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    """A zstd frame that declares more than the schema has, where values are due."""
    import zstandard

    case = payloads.CASES["values-float32-zstd"]()
    data = case.encode()
    described = describe(data, schema=case.schema)
    bomb = zstandard.compress(bytes(1 << 28))
    start = described.sections["header"] - CHECK.size + described.sections["mask"]
    hostile = bytearray(
        data[:start]
        + bomb[: described.sections["values"]].ljust(described.sections["values"], b"\0")
        + data[start + described.sections["values"] :]
    )
    with pytest.raises(CorruptPayload, match="declare"):
        case.decode(repaired(hostile))
