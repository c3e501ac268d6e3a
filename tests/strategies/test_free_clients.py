"""Clients that can be sent a task: which ones are drawn follows from NumPy's `choice`, however many at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_sim.core.seeding import Purpose, numpy_generator
from strategies.free_clients import FreeClients


@given(size=st.one_of(st.integers(1, 6), st.integers(1, 20_000)), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_draws_are_those_of_numpys_choice_without_replacement(size: int, seed: int) -> None:
    free = FreeClients(np.arange(size), [], seed=seed, number=2, availability=None)
    rng, left = numpy_generator(seed, 2, Purpose.COHORT), list(range(size))
    for count in (1, 1, 3, 1):
        count = min(count, len(left))
        places = rng.choice(len(left), size=count, replace=False).tolist() if left else []
        expected = sorted(left[place] for place in places)
        assert free.draw(count, 0.0) == expected
        left = [client for client in left if client not in expected]
