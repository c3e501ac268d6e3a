"""The value types: float32 as it is, types that lose nothing, and lossy types that a config must ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fl_sim.codecs.delta_coding import BFLOAT16, FLOAT16, Delta
from fl_sim.codecs.exact_delta_coding import ExactDelta
from fl_sim.codecs.float_coding import Float32, Float32Zstd, Half
from fl_sim.codecs.integer_coding import Largest, Rounded, Signs
from fl_sim.codecs.value_coder import Counts, ValueCoder, Values

VALUES: Mapping[str, ValueCoder] = {
    "float32": Float32(),
    "float32-zstd": Float32Zstd(),
    "float32-delta": ExactDelta(10),
    "float16": Half(2, torch.float16),
    "float16-delta": Delta(11, FLOAT16),
    "bfloat16": Half(3, torch.bfloat16),
    "bfloat16-delta": Delta(12, BFLOAT16),
    "int8": Rounded(4, 127),
    "int4": Rounded(5, 7),
    "int2": Rounded(6, 1),
    # 7 is a payload of several types, `fl_sim.codecs.mixed_coding`.
    "sign": Signs(13),
    "top25-int8": Largest(8, 4, Rounded(4, 127)),
    "top10-int8": Largest(9, 10, Rounded(4, 127)),
    "top10-ternary": Largest(14, 10, Signs(13)),
    "top1-ternary": Largest(15, 100, Signs(13)),
}
BY_ID: Mapping[int, str] = {coder.id: name for name, coder in VALUES.items()}
EXACT = "float32"
COMPRESSED = frozenset(VALUES) - {EXACT}
LOSSLESS = (EXACT, "float32-zstd", "float32-delta")
"""Value types that lose nothing."""


RELATIVE = (Delta, ExactDelta)
"""Coders against the model that the receiver holds."""
BY_TENSOR = (Rounded, Signs, Largest, *RELATIVE)
"""Coders that treat each tensor by itself: they are told how many values each has."""


def is_relative(values: str) -> bool:
    """Whether a value type codes against the model that the receiver holds."""
    return isinstance(VALUES.get(values), RELATIVE)


def by_itself(values: str) -> str:
    """The value type that codes what the receiver holds nothing of: the type without the difference."""
    return values.removesuffix("-delta") if is_relative(values) else values


def fitted(values: str, counts: Counts, base: Values | None) -> ValueCoder:
    """The coder of a value type for tensors of so many sent values.

    Args:
        values: name of the type.
        counts: values of each tensor.
        base: the receiver's values at the same coordinates; None = it holds none.

    Raises:
        ValueError: the type codes against values that are not held.
    """
    coder = VALUES[values]
    if isinstance(coder, RELATIVE):
        if base is None:
            raise ValueError(f"{values} codes against the model that the receiver holds, and none is given")
        return replace(coder, counts=counts, base=base)
    return replace(coder, counts=counts) if isinstance(coder, BY_TENSOR) else coder
