"""Keys and seeds: NumPy's own entropy mixing, however the key is handed over."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_sim.core.seeding import derive

NUMBERS = st.one_of(
    st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1), st.sampled_from([0, 2**32 - 1, 2**32, 2**64, 2**70])
)


@given(st.lists(NUMBERS, min_size=1, max_size=6))
def test_seeds_are_those_of_the_key_as_it_is(key: list[int]) -> None:
    expected = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
    assert derive(*key) == expected
    assert 0 <= expected < 2**63


def test_a_key_is_never_negative() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        derive(1, -1)
