"""Lossy integer types treat each tensor by itself: its own scales, its own largest values."""

from __future__ import annotations

import math

import payloads
import pytest
import torch

from fl_sim.codecs import CorruptPayload, Schema, decode, describe, encode
from fl_sim.codecs.integer_coding import BLOCK
from fl_sim.core.types import FlatParams, Mask, Params

SHAPES = {"tiny": (40,), "empty": (0, 3), "long": (BLOCK + 5,), "last": (3, 700)}
SCALES = {"tiny": 1e-3, "empty": 1.0, "long": 1.0, "last": 50.0}


def made(seed: int = 0) -> Params:
    """Tensors whose magnitudes differ by a factor of 50,000."""
    rng = torch.Generator().manual_seed(seed)
    return {name: SCALES[name] * torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def sparse() -> Mask:
    return payloads.bernoulli({name: torch.Size(shape) for name, shape in SHAPES.items()}, 0.3)


def through(params: Params, mask: Mask | None, values: str) -> Params:
    schema = Schema.of(params, list(params))
    return decode(encode(params, mask, schema=schema, values=values, seed=3), schema=schema)[0]


@pytest.mark.parametrize(("values", "top"), [("int8", 127), ("int4", 7), ("int2", 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_tensor_is_rounded_by_its_own_scale(values: str, top: int, masked: bool) -> None:
    params, mask = made(), sparse() if masked else None
    got = through(params, mask, values)
    for name, value in params.items():
        sent = value if mask is None else value * mask[name]
        if sent.numel():
            assert float((got[name] - sent).abs().max()) <= float(sent.abs().max()) / top * (1 + 1e-5), name


@pytest.mark.parametrize(("values", "share"), [("top25-int8", 0.25), ("top10-int8", 0.1)])
@pytest.mark.parametrize("masked", [False, True])
def test_of_each_tensor_the_same_share_is_sent(values: str, share: float, masked: bool) -> None:
    params, mask = made(), sparse() if masked else None
    got = through(params, mask, values)
    for name, value in params.items():
        chosen = value.flatten() if mask is None else value[mask[name]]
        kept = math.ceil(share * chosen.numel())
        least = chosen.abs().sort(descending=True).values[kept - 1] if kept else math.inf
        # Rounding takes a value to zero at most where it is below a step of its block's scale.
        step = float(value.abs().max()) / 127 if kept else 0.0
        assert int(got[name].count_nonzero()) <= kept
        assert int(got[name].count_nonzero()) >= int((chosen.abs() > max(float(least), step)).sum())
        assert not bool(got[name][value.abs() < least].any())


def test_relative_error_of_each_tensor_is_that_of_its_own_scale() -> None:
    params = made()
    for name, value in through(params, None, "int8").items():
        if value.numel():
            alone = through({name: params[name]}, None, "int8")[name]
            error = float((value - params[name]).norm() / params[name].norm())
            assert error < 1.3 * float((alone - params[name]).norm() / params[name].norm()) + 1e-3
            assert error < 0.03


@pytest.mark.parametrize("values", ["int8", "int4", "int2", "top25-int8", "top10-int8"])
def test_one_tensor_alone_costs_what_it_costs_in_a_mixed_payload(values: str) -> None:
    params = {"w": made()["long"]}
    schema = Schema.of(params, ["w"])
    alone, mixed = (encode(params, None, schema=schema, values=v) for v in (values, [values]))
    sizes = [describe(data, schema=schema).sections["values"] for data in (alone, mixed)]
    assert abs(sizes[1] - sizes[0]) < 8


@pytest.mark.parametrize("values", ["int8", "top10-int8"])
def test_a_tensor_that_sends_nothing_has_no_scale(values: str) -> None:
    params = made()
    mask = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in params.items()}
    assert not any(bool(value.any()) for value in through(params, mask, values).values())
    mask["tiny"][:7] = True
    assert int(through(params, mask, values)["tiny"].count_nonzero()) >= 1


def test_version_two_whose_scales_crossed_tensors_is_refused() -> None:
    case = payloads.case(None, values="int8")
    data = bytearray(case.encode())
    data[4] = 2
    with pytest.raises(CorruptPayload, match="version 6"):
        decode(bytes(data), schema=case.schema)


@pytest.mark.parametrize("held", [False, True])
def test_types_of_no_tensor_are_none(held: bool) -> None:
    """A model of which only biases travel has no tensor to choose a type for."""
    params = FlatParams.pack({"bias": torch.arange(5.0)})
    schema = Schema.of(params, [])
    base = params if held else None
    data = encode(params, None, schema=schema, values=(), base=base)
    assert torch.equal(decode(data, schema=schema, base=base)[0]["bias"], params["bias"])
