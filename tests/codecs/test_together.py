"""Payloads of several clients decoded together: the bits of each alone, and nothing where one of them is wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor

from fl_sim import codecs
from fl_sim.codecs import CorruptPayload, Schema, bits
from fl_sim.core.types import Params

RELATIVE = [name for name in codecs.VALUES if codecs.is_relative(name)]
ONE_BY_ONE = [name for name in codecs.VALUES if name.startswith("top") or name.endswith("16-delta")]
TOGETHER = [name for name in codecs.VALUES if name not in ONE_BY_ONE]


def _model(shapes: dict[str, tuple[int, ...]] | None = None) -> Schema:
    shapes = shapes or {"w": (40, 130), "v": (7, 9), "b": (40,), "n.running_mean": (7,)}
    return Schema.of({name: torch.zeros(shape) for name, shape in shapes.items()}, [n for n in shapes if n in "wv"])


MODELS = {
    "all kinds": _model(),
    "nothing but prunable": _model({"w": (30, 20)}),
    "nothing prunable": _model({"b": (30,)}),
    "many tensors": Schema.of({str(i): torch.zeros(9) for i in range(20)}, [str(i) for i in range(20)]),
    "classes of runs": _model({"w": (300, 130)}),
}


def _rows(schema: Schema, clients: int = 5) -> Tensor:
    rows = torch.randn(clients, schema.size, generator=torch.Generator().manual_seed(0))
    rows[:, : schema.size // 2] *= 1e-3
    rows[1] = 0.0
    return rows


def _payloads(schema: Schema, rows: Tensor, values: str, masks: Tensor | None = None) -> list[bytes]:
    return [
        codecs.encode(
            schema.view(row),
            None if masks is None else schema.view_mask(masks[i]),
            schema=schema,
            values=values,
            seed=i,
            base=_base(schema, values),
        )
        for i, row in enumerate(rows)
    ]


def _base(schema: Schema, values: str) -> Params | None:
    return schema.view(torch.full((schema.size,), 0.01)) if values in RELATIVE else None


def _stack(payloads: Sequence[bytes], schema: Schema, base: Params | None = None) -> codecs.Stack | None:
    return codecs.decode_all([codecs.opened(data, schema=schema) for data in payloads], base)


def _require_equal(
    stack: codecs.Stack | None, payloads: Sequence[bytes], schema: Schema, base: Params | None = None
) -> None:
    assert stack is not None
    for i, data in enumerate(payloads):
        params, mask = codecs.decode(data, schema=schema, base=base)
        assert torch.equal(stack.rows[i].view(torch.int32), schema.flat(params).view(torch.int32))
        assert (mask is None) == (stack.masks is None)
        if mask is not None and stack.masks is not None:
            assert torch.equal(stack.masks[i], schema.flat_mask(mask))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("values", TOGETHER)
def test_payloads_decoded_together_have_the_bits_of_each(values: str, model: str) -> None:
    schema = MODELS[model]
    payloads, base = _payloads(schema, _rows(schema), values), _base(schema, values)
    _require_equal(_stack(payloads, schema, base), payloads, schema, base)


@pytest.mark.parametrize("values", ["float32", "float16", "int8", "sign"])
def test_payloads_under_masks_decoded_together_have_the_bits_of_each(values: str) -> None:
    schema = _model()
    masks = torch.rand(6, schema.prunable_size, generator=torch.Generator().manual_seed(1)) < 0.3
    payloads = _payloads(schema, _rows(schema, 6), values, masks)
    _require_equal(_stack(payloads, schema), payloads, schema)


def test_masks_of_which_a_tensor_is_empty_are_decoded_one_by_one() -> None:
    schema = _model()
    masks = torch.rand(3, schema.prunable_size, generator=torch.Generator().manual_seed(1)) < 0.3
    masks[1, -63:] = False
    assert _stack(_payloads(schema, _rows(schema, 3), "float32", masks), schema) is None


@pytest.mark.parametrize("values", ONE_BY_ONE)
def test_other_types_are_decoded_one_by_one(values: str) -> None:
    schema = _model()
    assert _stack(_payloads(schema, _rows(schema), values), schema, _base(schema, values)) is None


def test_changes_of_another_model_are_left_to_be_refused_alone() -> None:
    schema = _model()
    payloads = _payloads(schema, _rows(schema), "float32-delta")
    assert _stack(payloads, schema, schema.view(torch.zeros(schema.size))) is None
    assert _stack(payloads, schema) is None


def test_payloads_are_alike_in_values_mask_mode_and_base() -> None:
    schema = _model()
    masks = torch.rand(2, schema.prunable_size, generator=torch.Generator().manual_seed(1)) < 0.3
    rows = _rows(schema, 2)
    plain, masked = _payloads(schema, rows, "float32"), _payloads(schema, rows, "float32", masks)
    changes = _payloads(schema, rows, "float32-delta")
    other = codecs.encode(schema.view(rows[0]), None, schema=schema, values="float32-delta", base=schema.view(rows[1]))
    mixed = [plain[0], masked[0], changes[0], other, changes[1], masked[1], plain[1]]
    assert list(codecs.alike([codecs.opened(each, schema=schema) for each in mixed])) == [[0, 6], [1, 5], [2, 4], [3]]


def _damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A payload with a byte changed behind its header, and a checksum that fits."""
    wrong = bytearray(data[:-4])
    wrong[rng.integers(16, len(wrong))] ^= rng.integers(1, 256)
    return bytes(wrong) + struct.pack("<I", xxhash.xxh3_64_intdigest(bytes(wrong)) & 0xFFFFFFFF)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("values", ["float32", "float32-zstd", "bfloat16", "int8", "sign"])
def test_a_damaged_payload_is_decoded_as_alone_or_leaves_all_to_be_decoded_alone(values: str, masked: bool) -> None:
    schema, rng = _model({"w": (12, 13), "v": (7, 9), "b": (5,)}), np.random.default_rng(2)
    drawn = torch.rand(3, schema.prunable_size, generator=torch.Generator().manual_seed(1)) < 0.3
    payloads = _payloads(schema, _rows(schema, 3), values, drawn if masked else None)
    seen = set()
    for _ in range(300):
        wrong = [payloads[0], _damaged(payloads[1], rng), payloads[2]]
        try:
            codecs.opened(wrong[1], schema=schema)
        except CorruptPayload:
            continue
        try:
            codecs.decode(wrong[1], schema=schema)
        except CorruptPayload:
            assert _stack(wrong, schema) is None
            seen.add("refused")
            continue
        stack = _stack(wrong, schema)
        if stack is not None:
            _require_equal(stack, wrong, schema)
            seen.add("equal")
    assert seen


def test_a_payload_without_its_checksum_leaves_all_to_be_decoded_alone() -> None:
    schema = _model()
    payloads = _payloads(schema, _rows(schema, 3), "float32")
    assert _stack([*payloads[:2], payloads[2][:-1] + bytes([payloads[2][-1] ^ 1])], schema) is None


def test_masks_with_other_ones_than_they_say_are_refused() -> None:
    masks = np.random.default_rng(0).random((3, 100)) < 0.3
    ones = np.count_nonzero(masks, axis=1)[:, None]

    def words(said: np.ndarray) -> list[memoryview]:
        return [memoryview(data)[1:] for data in bits.encode_all([masks], said)]  # a byte says how many

    assert np.array_equal(bits.decode_all(words(ones), ones, [100]), masks)
    more = ones + np.array([[0], [1], [0]])
    with pytest.raises(CorruptPayload, match="another number of ones"):
        bits.decode_all(words(more), more, [100])
