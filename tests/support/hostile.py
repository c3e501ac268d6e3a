"""What tests of hostile files share: mutations of valid files, and the one line that a refusal may say."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.core.types import UserError

QUICK = settings(deadline=None, max_examples=examples(60), suppress_health_check=list(HealthCheck))
LONG = settings(deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
LENGTHS = pytest.mark.parametrize("length", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just("x" * 70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SEEDS = st.integers(0, 2**32 - 1)


def mutate(data: bytes, seed: int) -> bytes:
    """One to four edits: a flipped bit, another byte, a cut, an insertion, a repeated piece."""
    rng, edited = np.random.default_rng(seed), bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, kind = int(rng.integers(0, len(edited) + 1)), rng.integers(0, 5)
        if kind == 0 and at < len(edited):
            edited[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and at < len(edited):
            edited[at] = int(rng.choice([0, 0x7F, 0x80, 0xFF, 0x22, 0x7B]))
        elif kind == 2:
            del edited[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            edited[at:at] = rng.bytes(int(rng.integers(1, 16)))
        else:
            edited[at:at] = edited[at : at + int(rng.integers(1, 64))]
    return bytes(edited)


def replaced(tree: object, value: object, seed: int) -> object:
    """A copy of a JSON tree with one node, drawn by the seed, replaced."""
    rng = np.random.default_rng(seed)
    copy = json.loads(json.dumps(tree))
    node = copy
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return copy
        key = keys[int(rng.integers(len(keys)))]
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.4:
            node[key] = value
            return copy
        node = node[key]


def one_line(action: Callable[[], object], *allowed: type[Exception]) -> object:
    """The action's result, or None where it refuses in one line."""
    try:
        return action()
    except (UserError, *allowed) as error:
        said = str(error)
    assert "\n" not in said
    return None
