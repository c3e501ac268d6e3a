"""Values coded against the model that the receiver holds: exact for every float, small for small changes, never silent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import payloads
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_sim.codecs import CorruptPayload, Schema, decode, describe, encode
from fl_sim.codecs.exact_delta_coding import ExactDelta
from fl_sim.codecs.value_coder import ValueCoder
from fl_sim.codecs.value_coding import fitted

PRECISION = {"float32-delta": torch.float32, "float16-delta": torch.float16, "bfloat16-delta": torch.bfloat16}


def coder(base: np.ndarray, counts: tuple[int, ...] = ()) -> ValueCoder:
    return fitted("float32-delta", counts, base)


@given(bits=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=40))
@settings(deadline=None)
def test_every_float32_comes_back_nan_and_minus_zero_included(bits: list[tuple[int, int]]) -> None:
    special = [(0x80000000, 0), (0, 0x80000000), (0x7FC00001, 0x7F800000), (0xFFFFFFFF, 0x00000001)]
    values, base = np.array([*special, *bits], dtype=np.uint32).T.copy().view(np.float32)
    counts = (3, 0, len(values) - 3)
    data = coder(base, counts).encode(values, 0)
    assert coder(base, counts).decode(memoryview(data), len(values)).tobytes() == values.tobytes()


@pytest.mark.parametrize("values", PRECISION)
@pytest.mark.parametrize("masked", [False, True])
def test_the_model_comes_back_in_its_precision_and_the_rest_exactly(values: str, masked: bool) -> None:
    case = payloads.case(payloads.bernoulli(payloads.SMALL, 0.4) if masked else None, values=values)
    got, mask = case.decode(case.encode())
    for name, value in case.params.items():
        expected = value.to(PRECISION[values]).float() if name in payloads.SMALL else value
        if mask is not None and name in payloads.SMALL:
            expected = expected * mask[name]
        assert torch.equal(got[name], expected), name


def test_a_small_change_costs_what_it_changes() -> None:
    """Gaussian weights moved by a tenth: the noise of the change, and none of what both ends know."""
    params = {"w": torch.randn(70_000), "v": 0.01 * torch.randn(30_000)}
    schema = Schema.of(params, params)
    near = payloads.near(params, 0.0, seed=1)
    sizes = {}
    for values in ("float32-zstd", *PRECISION):
        base = {name: value * (1 + 2.0**-10 * torch.randn(value.shape)) for name, value in near.items()}
        data = encode(params, None, schema=schema, values=values, base=base)
        sizes[values] = describe(data, schema=schema).sections["values"] / 100_000
        got, _ = decode(data, schema=schema, base=base)
        assert all(torch.equal(got[n], params[n].to(PRECISION.get(values, torch.float32)).float()) for n in params)
        same = describe(encode(params, None, schema=schema, values=values, base=params), schema=schema)
        assert values == "float32-zstd" or same.sections["values"] < 600
    assert sizes["float32-zstd"] > 3.2
    assert sizes["float32-delta"] < 2.05
    assert sizes["bfloat16-delta"] < 0.25
    assert sizes["float16-delta"] < 0.5


@pytest.mark.parametrize("values", [*PRECISION, ("float32-delta", "int8")])
def test_another_model_or_none_is_refused(values: str | tuple[str, ...]) -> None:
    case = payloads.case(payloads.bernoulli(payloads.SMALL, 0.4), values=values)
    data = case.encode()
    with pytest.raises(CorruptPayload, match="none is held"):
        decode(data, schema=case.schema)
    with pytest.raises(CorruptPayload, match="another model"):
        decode(data, schema=case.schema, base=case.params)
    with pytest.raises(ValueError, match=r"delta codes against the model .* none is given"):
        replace(case, base=None).encode()
    unnamed = bytearray(data)
    unnamed[7] = 0
    with pytest.raises(CorruptPayload):
        case.decode(bytes(unnamed))


def test_only_what_is_sent_has_to_be_held() -> None:
    case = payloads.case(payloads.bernoulli(payloads.SMALL, 0.4), values="float32-delta")
    assert case.base is not None
    assert case.mask is not None
    other = {n: torch.where(case.mask[n], v, v + 1) if n in case.mask else v for n, v in case.base.items()}
    assert torch.equal(
        decode(case.encode(), schema=case.schema, base=other)[0].flat, case.decode(case.encode())[0].flat
    )


def test_a_flag_without_a_type_that_needs_it_is_refused() -> None:
    case = payloads.case(None, values="int8")
    data = bytearray(case.encode())
    data[7] = 1
    with pytest.raises(CorruptPayload, match="does not code against"):
        case.decode(bytes(data))
    data[7] = 2
    with pytest.raises(CorruptPayload, match="version 6"):
        case.decode(bytes(data))


def test_other_dtypes_travel_exactly_and_name_no_model() -> None:
    params = {"w": torch.randn(40).double(), "n": torch.arange(5)}
    schema = Schema.of(params, ["w"])
    data = encode(params, None, schema=schema, values="float32-delta", base=params)
    got, _ = decode(data, schema=schema)
    assert all(torch.equal(got[name], value) for name, value in params.items())


def test_a_value_beyond_float16_is_refused() -> None:
    zeros = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="range"):
        fitted("float16-delta", (2,), zeros).encode(np.array([1.0, 1e6], np.float32), 0)


def test_what_is_frequent_shows_in_changes_of_weights_of_any_size() -> None:
    """Adam's first step moves each weight by the learning rate, up or down: a sign, and what rounding leaves."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.05, 50_000).astype(np.float32)
    values = base + np.float32(0.003) * rng.choice([-1, 1], len(base)).astype(np.float32)
    data = coder(base).encode(values, 0)
    assert coder(base).decode(memoryview(data), len(values)).tobytes() == values.tobytes()
    # A change has 20 bits in units in the last place on average, of which 4 are known, and so is how many there are.
    assert 8 * len(data) / len(values) < 17


@pytest.mark.parametrize("size", [2.0**-26, 2.0**-20, 2.0**-8, 1.0, 2.0**30])
def test_changes_of_any_size_and_scales_of_many_tensors(size: float) -> None:
    rng = np.random.default_rng(1)
    counts = (9000, 0, 3, 20_000, *[500] * 30)
    base = rng.normal(0, 0.05, sum(counts)).astype(np.float32)
    scales = np.repeat(2.0 ** -np.arange(len(counts), dtype=float), counts)
    values = (base + size * 0.05 * scales * rng.normal(size=len(base))).astype(np.float32)
    data = coder(base, counts).encode(values, 0)
    assert coder(base, counts).decode(memoryview(data), len(values)).tobytes() == values.tobytes()
    assert len(data) < 4.2 * len(values)


def test_plans_of_changes_that_cannot_be_are_refused() -> None:
    base = np.ones(5000, np.float32)
    made = ExactDelta(10, (4000, 1000), base)
    data = bytearray(made.encode(base * np.float32(1.01), 0))
    for place, byte in ((0, 5), (3, 17), (0, 0xFF)):
        hostile = data.copy()
        hostile[place] = byte
        with pytest.raises(CorruptPayload, match="bins"):
            made.decode(memoryview(hostile), len(base))
    for hostile in (data[:3], data[:4], data + b"\0", data[:-1]):
        with pytest.raises(CorruptPayload):
            made.decode(memoryview(hostile), len(base))


def test_places_outside_of_their_bins_are_refused() -> None:
    """Weights just below 1 that change to just above it: bins there have a number of floats between two powers of two."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.98999, 0.99001, 4096).astype(np.float32)
    values = (base + rng.uniform(0.0099, 0.0101, 4096)).astype(np.float32)
    data = bytearray(coder(base).encode(values, 0))
    ones = data.copy()
    ones[-400:-200] = b"\xff" * 200
    far = data.copy()
    far[1:3] = b"\xff\xff"
    for hostile in (ones, far):
        with pytest.raises(CorruptPayload, match="outside of its bin"):
            coder(base).decode(memoryview(hostile), len(base))
