"""Random seeds: each generator is derived from a key of integers that ends in a purpose; no global generator is used.

generator(seed, round, partition, Purpose.CLIENT)
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

from fl_sim.core import kernels


class Purpose(IntEnum):
    """The last element of a key: two uses with the same key otherwise never share a stream."""

    COHORT = 1
    CLIENT = 2
    MODEL = 3
    DATA = 4
    EVALUATION = 5
    ENCODING = 6
    NETWORK = 7
    PROJECTION = 8
    DISTILLATION = 9
    CAPACITY = 90
    GATES = 10
    CALIBRATION = 11
    PRIVACY = 12
    SHARED_MASK = 13
    ATTACK = 21


def derive(*key: int) -> int:
    """A 63-bit seed from a key of non-negative integers."""
    try:
        return kernels.seed(*key) >> 1
    except OverflowError:  # a number of several words, or a negative one, which NumPy refuses
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


def generator(*key: int) -> torch.Generator:
    """A CPU generator of PyTorch for this key."""
    return torch.Generator().manual_seed(derive(*key))


def numpy_generator(*key: int) -> np.random.Generator:
    """A generator of NumPy for this key."""
    return np.random.default_rng(np.random.SeedSequence(key))
