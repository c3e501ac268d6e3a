"""Payloads: round trips bit for bit, sizes against the entropy floor, refusals."""

from __future__ import annotations

import math
import struct

import numpy as np
import payloads
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Schema, decode, describe, encode, mask_hash
from fl_sim.codecs.bits import varint
from fl_sim.codecs.tensor_coding import PIECE
from fl_sim.core.types import FlatMask, FlatParams, Mask, Params

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
SHAPES = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (0, 4), (4, 3, 3, 3), (13, 31), (64, 9)])


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    shape = draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    values = torch.from_numpy(np.asarray(rng.normal(size=shape) * 50))
    values = torch.where(torch.from_numpy(np.asarray(rng.random(shape) < 0.2)), torch.tensor(-0.0).double(), values)
    return (values > 0) if dtype == torch.bool else values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


@st.composite
def masks(draw: st.DrawFn, shape: torch.Size) -> torch.Tensor:
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]))
    if draw(st.booleans()) and len(shape) > 1:
        rows = torch.from_numpy(rng.random(shape[0]) < density)
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    return torch.from_numpy(np.asarray(rng.random(tuple(shape)) < density))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Params, list[str], Mask | None, Mask | None]:
    uniform = draw(st.booleans())
    params, prunable = {}, []
    for i in range(draw(st.integers(1, 5))):
        name = f"{draw(st.sampled_from(['w', 'bn.running_mean', 'bn.running_var', 'aux']))}{i}"
        params[name] = draw(tensors(torch.float32 if uniform else draw(st.sampled_from(DTYPES))))
        if name.startswith("w"):
            prunable.append(name)
    chosen = [n for n in prunable if draw(st.booleans())]
    mask = {n: draw(masks(params[n].shape)) for n in chosen} if draw(st.booleans()) else None
    held_mask = {n: draw(masks(params[n].shape)) for n in prunable} if draw(st.booleans()) else None
    return params, prunable, mask, held_mask


@given(case=cases(), values=st.sampled_from(["float32", "float32-zstd"]))
@settings(deadline=None, max_examples=examples(300))
def test_round_trip_bit_for_bit(case, values: str) -> None:
    params, prunable, mask, held_mask = case
    schema = Schema.of(params, prunable)
    data = encode(params, mask, schema=schema, held_mask=held_mask, values=values)
    assert data == encode(params, mask, schema=schema, held_mask=held_mask, values=values)
    got, alive = decode(data, schema=schema, held_mask=held_mask)
    assert (alive is None) == (mask is None)
    for name, value in params.items():
        expected = value.clone()
        if mask is not None and name in prunable:
            known = mask.get(name, torch.ones(value.shape, dtype=torch.bool))
            assert torch.equal(alive[name], known)
            expected[~known] = 0
        assert got[name].dtype == value.dtype
        assert got[name].shape == value.shape
        assert bits(got[name]) == bits(expected), name
    described = describe(data, schema=schema, held_mask=held_mask)
    assert sum(described.sections.values()) == len(data)
    assert sum(described.dense_bytes.values()) == sum(v.numel() * v.dtype.itemsize for v in params.values())


@pytest.mark.parametrize("name", payloads.CASES)
def test_every_case_uses_its_mode_and_is_flat(name: str) -> None:
    case = payloads.CASES[name]()
    data = case.encode()
    described = describe(data, schema=case.schema, held_mask=case.held_mask)
    if name in payloads.MODES:
        assert described.mask_mode == name
    else:
        assert described.values == ("mixed" if name.startswith("values-mixed") else name.removeprefix("values-"))
    params, mask = case.decode(data)
    assert isinstance(params, FlatParams)
    assert params.flat.numel() == case.schema.size
    if mask is not None:
        assert isinstance(mask, FlatMask)
        assert described.nnz == int(mask.flat.sum())
    if str(case.values).startswith("float32"):
        for other in payloads.OTHERS:
            assert torch.equal(params[other], case.params[other])


def floor_bytes(mask: Mask) -> float:
    def bits_of(n: int, k: int) -> float:
        return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)

    return sum(bits_of(m.numel(), int(m.sum())) for m in mask.values()) / 8


def mask_bytes(mask: Mask, *, held_mask: Mask | None = None) -> int:
    params = {name: torch.ones(m.shape) for name, m in mask.items()}
    schema = Schema.of(params, list(params))
    return describe(
        encode(params, mask, schema=schema, held_mask=held_mask), schema=schema, held_mask=held_mask
    ).sections.get("mask", 0)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.3, 0.5])
def test_mask_of_464k_weights_is_within_two_percent_of_its_floor(density: float) -> None:
    mask = payloads.bernoulli(payloads.resnet_shapes(), density)
    assert mask_bytes(mask) <= 1.02 * floor_bytes(mask)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_mask_of_11m_weights_is_within_two_tenths_of_a_percent(density: float) -> None:
    mask = payloads.bernoulli(payloads.resnet_shapes(38, 70), density)
    assert sum(m.numel() for m in mask.values()) > 1.0e7
    assert mask_bytes(mask) <= 1.002 * floor_bytes(mask)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
def test_channel_masks_are_within_twice_their_floor(density: float) -> None:
    mask = payloads.channels(payloads.resnet_shapes(), density)
    rows = {name: m.reshape(m.shape[0], -1)[:, 0] for name, m in mask.items()}
    assert mask_bytes(mask) <= 2 * floor_bytes(rows)


def test_small_changes_of_a_held_mask_cost_little() -> None:
    held_mask = payloads.bernoulli(payloads.resnet_shapes(), 0.1)
    mask = payloads.swapped(held_mask, 0.02)
    assert mask_bytes(mask, held_mask=held_mask) < 0.15 * mask_bytes(mask)
    assert mask_bytes(held_mask, held_mask=held_mask) == 0


def test_clustered_masks_go_below_the_floor_of_independent_bits() -> None:
    mask = payloads.clustered(payloads.resnet_shapes(8), 0.1)
    assert mask_bytes(mask) < 0.9 * floor_bytes(mask)


@pytest.mark.parametrize("density", [0.02, 0.1])
def test_contexts_are_smaller_for_masks_of_kernels_and_never_larger(density: float) -> None:
    shapes = payloads.resnet_shapes(8)
    params = payloads.params_of(shapes)
    schema = Schema.of(params, shapes)
    for mask, ratio in ((payloads.kernels(shapes, density), 0.9), (payloads.bernoulli(shapes, density), 1.0)):
        sizes, modes = [], []
        for contexts in (False, True):
            described = describe(encode(params, mask, schema=schema, contexts=contexts), schema=schema)
            sizes.append(described.sections["mask"])
            modes.append(described.mask_mode)
        assert sizes[1] <= ratio * sizes[0]
        assert (modes[1] == "contexts") == (sizes[1] < sizes[0])


def test_contexts_of_a_mask_that_is_held_cost_nothing() -> None:
    mask = payloads.bernoulli(payloads.SMALL, 0.3)
    params = payloads.params_of(payloads.SMALL)
    schema = Schema.of(params, params)
    data = encode(params, mask, schema=schema, held_mask=mask, contexts=True)
    assert describe(data, schema=schema, held_mask=mask).mask_mode == "held"


def test_dense_payloads_have_one_size_and_no_overhead_per_tensor() -> None:
    shapes = payloads.resnet_shapes()
    sizes = set()
    for seed in range(3):
        params = payloads.params_of(shapes, seed)
        sizes.add(len(encode(params, None, schema=Schema.of(params, shapes))))
    assert len(sizes) == 1
    assert sizes.pop() - 4 * 464_432 < 64


@pytest.mark.parametrize(
    ("values", "tolerance"), [("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 1 / 60), ("int4", 1 / 3), ("int2", 2)]
)
def test_lossy_values_are_close_and_the_rest_is_exact(values: str, tolerance: float) -> None:
    case = payloads.case(None, values=values)
    got, _ = case.decode(case.encode())
    for name, value in case.params.items():
        if name in payloads.SMALL:
            assert float((got[name] - value).abs().max()) <= tolerance * float(value.abs().max())
        else:
            assert torch.equal(got[name], value)


@pytest.mark.parametrize(("values", "share"), [("top25-int8", 0.25), ("top10-int8", 0.1)])
def test_sparse_value_types_send_the_largest_and_nothing_else(values: str, share: float) -> None:
    rng = torch.Generator().manual_seed(0)
    for size in (1, 3, 4097, 20_000):
        weights = {"w": torch.randn(size, generator=rng)}
        schema = Schema.of(weights, ["w"])
        data = encode(weights, None, schema=schema, values=values)
        got, mask = decode(data, schema=schema)
        assert mask is None
        kept = weights["w"].abs() >= weights["w"].abs().sort(descending=True).values[math.ceil(share * size) - 1]
        assert not bool(got["w"][~kept].any())
        assert float((got["w"] - weights["w"])[kept].abs().max()) <= float(weights["w"].abs().max()) / 127 + 1e-6
    assert len(data) < 1.02 * floor_bytes({"w": kept}) + share * 20_000 + 100


def test_a_type_for_each_tensor_costs_what_the_tensors_cost_alone() -> None:
    for mask in (None, payloads.bernoulli(payloads.SMALL, 0.4)):
        values = {}
        for first in codecs.VALUES:
            for second in ("float32-zstd", "int2"):
                case = payloads.case(mask, values=(first, second))
                data = case.encode()
                values[first, second] = describe(data, schema=case.schema).sections["values"]
                got, _ = case.decode(data)
                sent = torch.ones(payloads.SMALL["a.weight"], dtype=torch.bool) if mask is None else mask["a.weight"]
                if first.startswith("float32"):
                    assert torch.equal(got["a.weight"][sent], case.params["a.weight"][sent])
                for name in payloads.OTHERS:
                    assert torch.equal(got[name], case.params[name])
        saved = [values[first, "float32-zstd"] - values[first, "int2"] for first in codecs.VALUES]
        assert max(saved) - min(saved) <= 1


def test_types_that_do_not_match_the_tensors_are_refused() -> None:
    for types in ((), ("int8",), ("int8", "int9"), ("int8", "int8", "int8")):
        with pytest.raises(ValueError, match="2 tensors"):
            payloads.case(None, values=types).encode()


def test_int8_is_unbiased() -> None:
    params = {"w": torch.linspace(-1, 1, 101)}
    schema = Schema.of(params, ["w"])
    draws = torch.stack(
        [decode(encode(params, None, schema=schema, values="int8", seed=s), schema=schema)[0]["w"] for s in range(2000)]
    )
    step = 1 / 127
    error = (draws.mean(0) - params["w"]).abs()
    assert float(error.max()) < 4 * step * 0.5 / math.sqrt(2000)
    assert float(draws.std(0).max()) > 0.3 * step


def test_zero_blocks_and_empty_values_survive_every_value_type() -> None:
    for values in codecs.VALUES:
        for size in (0, 1, 5000):
            params = {"w": torch.zeros(size)}
            schema = Schema.of(params, ["w"])
            data = encode(params, None, schema=schema, values=values, base=params)
            got, _ = decode(data, schema=schema, base=params)
            assert torch.equal(got["w"], params["w"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["a.weight", "bn.running_var"])
def test_nan_and_infinity_are_refused_by_name(bad: float, name: str) -> None:
    case = payloads.MODES["none"]()
    case.params[name].view(-1)[3] = bad
    with pytest.raises(ValueError, match=name):
        case.encode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", ["float32", "float32-zstd"])
def test_a_flat_vector_of_another_layout_or_dtype_is_sent_as_its_float32_values(
    dtype: torch.dtype, values: str
) -> None:
    params = {"w": torch.randn(7), "b": torch.randn(3)}
    schema, mask = Schema.of(params, ["w"]), {"w": torch.arange(7) % 2 == 0}
    whole = torch.cat([params["w"], params["b"]])
    spread = FlatParams.view(whole.to(dtype).repeat_interleave(2)[::2], schema.names, schema.shapes)
    assert not spread.flat.is_contiguous()
    dense = FlatParams.view(whole.to(dtype), schema.names, schema.shapes)
    for sent in (None, mask):
        plain = encode(schema.view(whole), sent, schema=schema, values=values)
        assert encode(spread, sent, schema=schema, values=values) == plain
        assert encode(dense, sent, schema=schema, values=values) == plain
    holes = FlatMask.view(mask["w"].repeat_interleave(2)[::2], schema.prunable, schema.shapes[:1])
    assert encode(schema.view(whole), holes, schema=schema) == encode(schema.view(whole), mask, schema=schema)
    assert schema.flat_mask(holes).is_contiguous()


LONG = 3 * PIECE + 5
EDGES = [0, 1, PIECE - 1, PIECE, 2 * PIECE + 17, LONG - 1, LONG, LONG + 2]


def several_pieces() -> tuple[Params, Schema]:
    """Four pieces of prunable values, and three values behind them."""
    params = {**payloads.params_of({"w": torch.Size([LONG]), "b": torch.Size([3])})}
    return params, Schema.of(params, ["w"])


def sealed(data: bytes) -> bytes:
    """The payload with its checksum made right."""
    return data[:-4] + struct.pack("<I", xxhash.xxh3_64_intdigest(data[:-4]) & 0xFFFFFFFF)


@pytest.mark.parametrize("at", EDGES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_special_value_hides_in_any_piece_of_a_complete_payload(at: int, bad: float) -> None:
    params, schema = several_pieces()
    good = encode(params, None, schema=schema)
    name, index = ("w", at) if at < LONG else ("b", at - LONG)
    params[name][index] = bad
    with pytest.raises(ValueError, match=name):
        encode(params, None, schema=schema)
    body = len(good) - 4 - schema.nbytes
    forged = good[: body + 4 * at] + struct.pack("<f", bad) + good[body + 4 * at + 4 :]
    with pytest.raises(CorruptPayload, match="checksum"):
        decode(forged, schema=schema)
    for data in (sealed(forged), memoryview(sealed(forged))):
        with pytest.raises(CorruptPayload, match="NaN or infinite"):
            decode(data, schema=schema)


def test_every_flipped_byte_of_a_complete_payload_is_noticed() -> None:
    params, schema = several_pieces()
    good = encode(params, None, schema=schema)
    assert sealed(good) == good
    assert torch.equal(decode(good, schema=schema)[0]["b"], params["b"])
    body = len(good) - 4 - schema.nbytes
    for at in [*range(body), *(body + 4 * edge for edge in EDGES), *range(len(good) - 4, len(good))]:
        spoiled = bytearray(good)
        spoiled[at] ^= 1
        with pytest.raises(CorruptPayload):
            decode(bytes(spoiled), schema=schema)


def test_sections_of_a_complete_payload_cannot_change_their_borders() -> None:
    params, schema = several_pieces()
    good = encode(params, None, schema=schema)
    sizes = [LONG, 0, 4 * LONG, 12, 0, 0]
    told = b"".join(map(varint, sizes))
    assert told in good[: len(good) - 4 - schema.nbytes]
    for count, change in ((0, (0, 0, 0, 0, 0)), (-1, (0, 0, 0, 0, 0)), (0, (0, -4, 4, 0, 0)), (0, (4, -4, 0, 0, 0))):
        other = [sizes[0] + count, *(size + by for size, by in zip(sizes[1:], change, strict=True))]
        forged = sealed(good.replace(told, b"".join(map(varint, other)), 1))
        if other == sizes:
            decode(forged, schema=schema)
        else:
            assert len(forged) == len(good)
            with pytest.raises(CorruptPayload, match="another length"):
                decode(forged, schema=schema)


def test_values_whose_squares_overflow_are_legal() -> None:
    params = {"w": torch.full((1000,), 3e38)}
    schema = Schema.of(params, ["w"])
    assert torch.equal(decode(encode(params, None, schema=schema), schema=schema)[0]["w"], params["w"])


def test_float16_overflow_is_refused() -> None:
    params = {"w": torch.tensor([1e6])}
    with pytest.raises(ValueError, match="range"):
        encode(params, None, schema=Schema.of(params, ["w"]), values="float16")


def test_another_schema_or_another_held_mask_is_refused() -> None:
    case = payloads.MODES["split"]()
    data = case.encode()
    with pytest.raises(CorruptPayload, match="held"):
        decode(data, schema=case.schema)
    with pytest.raises(CorruptPayload, match="another mask"):
        decode(data, schema=case.schema, held_mask=case.mask)
    renamed = {f"x{n}": p for n, p in case.params.items()}
    with pytest.raises(CorruptPayload, match="schema"):
        decode(data, schema=Schema.of(renamed, []), held_mask=case.held_mask)


def test_the_hash_of_a_mask_is_the_same_for_every_kind_of_dict() -> None:
    mask = payloads.bernoulli(payloads.SMALL, 0.3)
    assert mask_hash(mask) == mask_hash(FlatMask.pack(mask))
    assert mask_hash(mask) != mask_hash(payloads.swapped(mask, 0.1))


def test_unknown_names_and_shapes_are_refused() -> None:
    case = payloads.MODES["whole"]()
    with pytest.raises(ValueError, match="not prunable"):
        encode(case.params, {"bn.weight": torch.ones(16, dtype=torch.bool)}, schema=case.schema)
    with pytest.raises(ValueError, match="shape"):
        encode(case.params, {"a.weight": torch.ones(2, dtype=torch.bool)}, schema=case.schema)
