"""Clients that misbehave: what each fault makes of an honest update, and how the ledger books it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fl_sim.core.types import Update


def raises(update: Update) -> object:
    raise ValueError("out of order")


def memory(update: Update) -> object:
    raise MemoryError("no more")


def no_exception(update: Update) -> object:
    raise GeneratorExit("what `except Exception` does not catch")


def hang(update: Update) -> object:
    time.sleep(3600)
    return update


def spin(update: Update) -> object:
    """Hangs in Python code that catches every Exception."""
    while True:
        try:
            math.factorial(50)
        except Exception:
            continue


def poisoned(value: float) -> Callable[[Update], object]:
    def spoil(update: Update) -> object:
        name = max(update.params)
        spoilt = update.params[name].clone()
        spoilt.view(-1)[-1] = value
        return replace(update, params={**update.params, name: spoilt})

    return spoil


FAULTS: Mapping[str, Callable[[Update], object]] = {
    "raises": raises,
    "memory": memory,
    "no exception": no_exception,
    "returns a number": lambda update: 3,
    "returns nothing": lambda update: None,
    "no parameters": lambda update: replace(update, params={}),
    "wrong shape": lambda update: replace(update, params={n: v[..., :1] for n, v in update.params.items()}),
    "wrong mask": lambda update: replace(update, mask={n: torch.ones(3, dtype=torch.bool) for n in update.params}),
    "no examples": lambda update: replace(update, num_examples=0),
    "words for examples": lambda update: replace(update, num_examples="many"),
    "half an example": lambda update: replace(update, num_examples=2.5),
    "words for metrics": lambda update: replace(update, metrics={"loss": "low"}),
    "nan": poisoned(math.nan),
    "inf": poisoned(-math.inf),
    "hangs": hang,
    "spins": spin,
}
KINDS = {"hangs": "late", "spins": "late"}
