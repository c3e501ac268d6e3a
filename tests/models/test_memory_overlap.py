"""Tensors that share memory: two in one place are found by the byte, views of one table that only interleave are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_sim.core.types import UserError
from fl_sim.models.memory_overlap import overlapping
from fl_sim.models.parameters import check_entries


def table() -> Tensor:
    return torch.zeros(8, 6)


def one_array() -> tuple[Tensor, Tensor]:
    memory = np.zeros(12, dtype=np.float32)
    return torch.from_numpy(memory[::2]), torch.from_numpy(memory[4:])


PAIRS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], bool]] = {
    "even and odd columns": (lambda: (lambda t: (t[:, ::2], t[:, 1::2]))(table()), False),
    "halves of the columns": (lambda: (lambda t: (t[:, :3], t[:, 3:]))(table()), False),
    "columns that meet in one": (lambda: (lambda t: (t[:, :4], t[:, 3:]))(table()), True),
    "every second and every third column": (lambda: (lambda t: (t[:, ::2], t[:, ::3]))(table()), True),
    "a transposed view of the same": (lambda: (lambda t: (t, t.T))(table()), True),
    "a column and the rows behind it": (lambda: (lambda t: (t[:4, 0], t[4:]))(table()), False),
    "a column and the table": (lambda: (lambda t: (t[:, 5], t))(table()), True),
    "real and imaginary parts": (lambda: (lambda t: (t.real, t.imag))(torch.zeros(4, dtype=torch.complex64)), False),
    "a complex table and its imaginary part": (lambda: (lambda t: (t, t.imag))(torch.zeros(4, dtype=torch.complex64)), True),
    "halves of each number": (lambda: (lambda t: (t[::2], t[1::2]))(table().view(torch.float16).reshape(-1)), False),
    "numbers of two widths": (lambda: (lambda t: (t[:, 1:3], t.view(torch.float16)[:, 4:6]))(table()), True),
    "two tensors of one NumPy array": (one_array, True),
    "apart": (lambda: (table(), table()), False),
    "empty": (lambda: (lambda t: (t[:0], t))(table()), False),
}  # fmt: skip


@pytest.mark.parametrize(("pair", "share"), PAIRS.values(), ids=PAIRS)
def test_a_byte_in_common_is_found_and_interleaving_is_none(
    pair: Callable[[], tuple[Tensor, Tensor]], share: bool
) -> None:
    one, other = pair()
    assert [set(names) for names in overlapping({"a": one, "b": other})] == [{"a", "b"}] * share
    if one.numel():
        with torch.no_grad():  # the oracle: writing to one changes the other
            before = other.clone()
            one.fill_(1 + 1j if one.is_complex() else 1)
        assert torch.equal(before, other) is not share


def test_a_model_whose_strided_weights_meet_is_refused_and_one_whose_interleave_is_not() -> None:
    memory = torch.zeros(4, 8)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight, model[1].weight = nn.Parameter(memory[:, ::2]), nn.Parameter(memory[:, 1::2])
    check_entries(model, "model")
    model[1].weight = nn.Parameter(memory[:, 2:6])
    with pytest.raises(UserError, match=r"'0.weight' and '1.weight' lie in the same memory but are two tensors"):
        check_entries(model, "model")
