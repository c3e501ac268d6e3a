"""Files of tensors: the bytes of the safetensors library, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import save

from fl_sim.core.tensor_file import DTYPES, TensorFile


@pytest.mark.parametrize("metadata", [{}, {"a": '{"b": 1}'}])
def test_the_bytes_are_those_of_the_library(metadata: Mapping[str, str]) -> None:
    tensors = {f"t.{number}": torch.ones(3, 5).to(dtype) for number, dtype in enumerate(DTYPES)}
    tensors |= {'é"': torch.zeros(()), "none": torch.empty(0, 2), "turned": torch.randn(4, 3).t()}
    whole = {name: value.contiguous() for name, value in tensors.items()}
    file = TensorFile(tensors, metadata)
    assert b"".join(file) == save(whole, metadata=dict(metadata) or None)
    assert b"".join(file) == b"".join(file), "it can be read twice: for its name, and for the disk"
    assert b"".join(TensorFile({})) == save({})


def test_a_type_that_a_file_does_not_hold_is_named() -> None:
    with pytest.raises(ValueError, match=r"'w' is torch\.complex128"):
        TensorFile({"w": torch.zeros(1, dtype=torch.complex128)})
