"""Entropy coder of integers and signs: sizes against the entropy of what is sent, round trips, damaged tables."""

from __future__ import annotations

import numpy as np
import payloads
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.codecs import CorruptPayload, Schema, decode, describe, encode, symbol_coding
from fl_sim.codecs.integer_coding import BLOCK
from fl_sim.codecs.symbol_coding import single
from fl_sim.core.types import Params


def entropy_bytes(symbols: np.ndarray) -> float:
    """Order-0 entropy of all symbols together."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 40.0])), max_size=400),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=examples(60))
def test_symbols_come_back_whatever_their_contexts(sizes: list[tuple[int, float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    contexts = np.array([context for context, _ in sizes], dtype=np.uint8)
    symbols = np.array([min(255, abs(int(rng.normal(0, spread)))) for _, spread in sizes], dtype=np.uint8)
    data = symbol_coding.encode(symbols, contexts, 4)
    assert symbol_coding.decode(memoryview(data), contexts, 4).tolist() == symbols.tolist()


@pytest.mark.parametrize("spread", [0.05, 0.3, 2, 25, 1000])
@pytest.mark.parametrize("size", [20_000, 300_000])
def test_a_code_is_within_one_percent_of_its_entropy(spread: float, size: int) -> None:
    rng = np.random.default_rng(1)
    symbols = np.minimum(np.abs(rng.laplace(0, spread, size)), 255).astype(np.uint8)
    floor = entropy_bytes(symbols)
    assert (
        len(symbol_coding.encode(symbols, single(size), 1)) <= 1.01 * floor + 4 * 64 + 360
    )  # lanes, and the table of 256 symbols


@pytest.mark.parametrize("size", [1, 40, 300])
def test_few_symbols_take_no_more_than_their_bytes(size: int) -> None:
    symbols = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    data = symbol_coding.encode(symbols, single(size), 1)
    assert len(data) == 1 + size
    assert symbol_coding.decode(memoryview(data), single(size), 1).tolist() == symbols.tolist()
    with pytest.raises(CorruptPayload):
        symbol_coding.decode(memoryview(data[:-1]), single(size), 1)


@pytest.mark.parametrize("size", [5, 3000, 70_000])
@pytest.mark.parametrize("length", [0, 3, 40, 700])
def test_a_rider_comes_back_and_costs_no_more_than_its_bytes(size: int, length: int) -> None:
    rng = np.random.default_rng(size)
    symbols, rider = rng.binomial(40, 0.3, size).astype(np.uint8), rng.bytes(length)
    alone, data = (symbol_coding.encode(symbols, single(size), 1, rider=r) for r in (b"", rider))
    got, carried = symbol_coding.with_rider(memoryview(data), single(size), 1, 256, length)
    assert got.tolist() == symbols.tolist()
    assert bytes(carried) == rider
    assert len(data) <= len(alone) + max(2, length - 2 * symbol_coding._lanes(size) + 8)
    if length == 40:
        with pytest.raises(CorruptPayload):
            symbol_coding.with_rider(memoryview(data), single(size), 1, 256, 0)


def tensors(size: int) -> Params:
    rng = torch.Generator().manual_seed(0)
    peaked = torch.randn(size, generator=rng) ** 3
    return {"w": torch.randn(size, generator=rng).view(100, -1), "v": 0.01 * peaked.view(100, -1)}


@pytest.mark.parametrize(("values", "top"), [("int8", 127), ("int4", 7), ("int2", 1), ("sign", 1)])
def test_values_are_within_one_percent_of_the_entropy_of_their_integers(values: str, top: int) -> None:
    params = tensors(100_000)
    schema = Schema.of(params, params)
    data = encode(params, None, schema=schema, values=values)
    got, _ = decode(data, schema=schema)
    flat, blocks = schema.flat(got).numpy(), 4 * sum(-(-n // BLOCK) for n in schema.numels)
    steps = []
    for at in (0, 100_000):
        for start in range(at, at + 100_000, BLOCK):
            part = flat[start : min(start + BLOCK, at + 100_000)]
            unit = (
                np.abs(part[part != 0]).min()
                if values == "sign"
                else np.abs(schema.flat(params).numpy()[start : start + len(part)]).max() / top
            )
            steps.append(np.rint(part / unit))
    floor = entropy_bytes(np.concatenate(steps))
    assert describe(data, schema=schema).sections["values"] <= 1.01 * floor + blocks + 200


def test_tensors_of_different_peaks_share_no_table() -> None:
    params = tensors(100_000)
    schema = Schema.of(params, params)
    both = len(encode(params, None, schema=schema, values="int8"))
    alone = sum(
        len(encode({name: value}, None, schema=Schema.of({name: value}, [name]), values="int8"))
        for name, value in params.items()
    )
    assert both <= 1.005 * alone


def test_signs_have_one_magnitude_for_each_tensor_and_zeros_stay() -> None:
    params = {"a": torch.tensor([3.0, -1.0, 0.0, 2.0]), "b": torch.tensor([[0.5], [-0.5]]), "c": torch.zeros(3)}
    schema = Schema.of(params, params)
    got, _ = decode(encode(params, None, schema=schema, values="sign"), schema=schema)
    assert got["a"].tolist() == [2.0, -2.0, 0.0, 2.0]
    assert got["b"].tolist() == [[0.5], [-0.5]]
    assert got["c"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("values", "one_in"), [("top10-ternary", 10), ("top1-ternary", 100)])
def test_ternary_sends_the_mean_of_the_largest(values: str, one_in: int) -> None:
    params = {"w": torch.randn(5000, generator=torch.Generator().manual_seed(1))}
    schema = Schema.of(params, ["w"])
    data = encode(params, None, schema=schema, values=values)
    got, _ = decode(data, schema=schema)
    largest = params["w"].abs().topk(5000 // one_in)
    expected = torch.zeros(5000)
    expected[largest.indices] = largest.values.mean() * params["w"][largest.indices].sign()
    assert torch.allclose(got["w"], expected)
    assert len(data) < 5000 / one_in * (1 / 8 + 1.2) + 60


def test_the_largest_float32_has_a_sign() -> None:
    params = {"w": torch.full((3,), 3.4e38)}
    schema = Schema.of(params, ["w"])
    assert torch.equal(decode(encode(params, None, schema=schema, values="sign"), schema=schema)[0]["w"], params["w"])


def test_damaged_tables_and_codes_are_refused() -> None:
    symbols = np.arange(200, dtype=np.uint8) % 7
    data = symbol_coding.encode(symbols, single(200), 1)
    for damaged in (data[:0], data[:3], data[:-1], data + b"\0\0", b"\0" + data[1:], b"\xff\x01" + data[1:]):
        with pytest.raises(CorruptPayload):
            symbol_coding.decode(memoryview(damaged), single(200), 1)
    with pytest.raises(CorruptPayload, match="none are due"):
        symbol_coding.decode(memoryview(data), single(0), 1)


def test_types_that_are_refused_by_name_are_few() -> None:
    case = payloads.case(None, values="sign")
    data = bytearray(case.encode())
    for older in (3, 4):
        data[4] = older
        with pytest.raises(CorruptPayload, match="version 6"):
            case.decode(bytes(data))
