"""Values as tensors of a checkpoint: back with their types and identities, and nothing runs that a checkpoint says."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from strategies.kept_values import TEXT, owned, read, written


def test_scalars_come_back_with_their_types() -> None:
    values = {
        "none": None,
        "bool": True,
        "int": -(2**70),
        "float": -0.0,
        "infinite": float("-inf"),
        "text": "\ud800 ü",
        "bytes": b"\0\xff",
        "complex": 1 - 2j,
        "half": np.float16(0.1),
        "bit": np.bool_(True),
        "time": np.datetime64("2026-12-01"),
        "tuple": (1, ("a", None)),
        "set": {1, (2, "b")},
        "keys": {1: "int", "1": "text", (1,): "tuple", None: "none", 2.5: "float"},
    }
    found = read(written(values))
    assert repr(found) == repr(values)
    assert [type(value) for value in found.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize("dtype", ["?", "i2", ">i4", "u8", "e", "f8", "c16", "U3", "S2", "M8[s]"])
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 3)])
def test_arrays_come_back_with_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(6).reshape(2, 3)[::-1].astype(dtype) if shape == (2, 3) else np.zeros(shape, dtype)
    found = read(written({"a": array}))["a"]
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert found.flags.writeable


def test_generators_go_on_where_they_were() -> None:
    def numbers(of: dict[str, object]) -> list[object]:
        generator, old, plain, torchs = of.values()
        assert isinstance(generator, np.random.Generator)
        assert isinstance(old, np.random.RandomState)
        assert isinstance(plain, random.Random)
        assert isinstance(torchs, torch.Generator)
        drawn = [generator.normal(), generator.spawn(1)[0].normal(), old.normal(), plain.gauss(0, 1)]
        return [*drawn, float(torch.randn(1, generator=torchs))]

    of = {
        "a": np.random.Generator(np.random.SFC64(7)),
        "b": np.random.RandomState(1),
        "c": random.Random(2),
        "d": torch.Generator().manual_seed(3),
    }
    numbers(of)
    tensors = written(of)
    assert numbers(of) == numbers(read(tensors))


def test_what_stands_twice_is_one_object_again() -> None:
    inner: list[object] = []
    inner.append(inner)
    values = {"a": [inner, inner], "b": inner, "x": np.zeros(2), "y": None}
    values["y"] = values["x"]
    found = read(written(values))
    assert found["a"][0] is found["a"][1] is found["b"] is found["b"][0]  # type: ignore[index]
    assert found["x"] is found["y"]


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Text("a"),
        [object()],
        np.array([object()]),
        np.ma.masked_array([1]),
        1 << 10_000,
        random.SystemRandom(),
    ],
)
def test_what_cannot_be_kept_is_said(value: object) -> None:
    assert owned(value) is None
    deep: list[object] = []
    for _ in range(200):
        deep = [deep]
    assert owned(deep) is None


@pytest.mark.parametrize(
    "node",
    [
        ["array", 0, "O", [1]],
        ["array", 0, "<f8", [2**40]],
        ["array", 1, "<f8", [1]],
        ["array", 0, "no dtype", [1]],
        ["scalar", "O", "00" * 8],
        ["tensor", "../0"],
        ["Generator", "__import__", {}, {}],
        ["Generator", "PCG64", ["dict"], ["dict", "pool_size", 2**40]],
        ["Random", ["tuple", 3, ["tuple", *[2**40] * 625], None]],
        ["RandomState", ["dict", "bit_generator", "MT19937"]],
        ["torch.Generator", ["list"]],
        ["object"],
        ["os.system", "true"],
        ["again", 5],
        ["set", ["list"]],
        ["dict", 1],
        [],
    ],
)
def test_a_hostile_text_is_refused(node: object) -> None:
    tensors = {"array.000000": torch.zeros(8, dtype=torch.uint8)}
    for text in (json.dumps({"a": node}), json.dumps({"a": node})[:-1], "[" * 100_000):
        with pytest.raises(ValueError, match="no kept values"):
            read({TEXT: torch.tensor(list(text.encode()), dtype=torch.uint8), **tensors})
    with pytest.raises(ValueError, match="no kept values"):
        read(tensors)
