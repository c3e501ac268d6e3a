"""Client context: what follows from the data is derived, not passed in beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fl_sim import ClientContext
from fl_sim.data import Split


def test_the_number_of_examples_is_that_of_the_data() -> None:
    data = Split(torch.zeros(12, 1, 2, 2, dtype=torch.uint8), torch.zeros(12).long(), torch.zeros(1), torch.ones(1))
    ctx = ClientContext(nn.Linear(1, 1), data, torch.Generator())
    assert ctx.num_examples == 12
    assert replace(ctx, data=data.subset(np.arange(9))).num_examples == 9
    with pytest.raises(AttributeError):
        ctx.num_examples = 5  # type: ignore[misc]
