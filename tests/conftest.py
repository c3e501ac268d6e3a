"""What holds for all tests.

PyTorch is imported where it is used: the process that only hands tests to others collects none.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING
from unittest import mock

import hypothesis
import pytest
from properties import examples

if TYPE_CHECKING:
    from fl_sim import Report

# No test is timed: how long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None, max_examples=examples(100))
hypothesis.settings.load_profile("untimed")
gc.disable()  # while tests are collected: a quarter of that time went into collections of what pytest keeps


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that need a GPU where there is none."""
    import torch

    if torch.cuda.is_available():
        return
    without = [item for item in items if item.get_closest_marker("gpu") is None]
    if len(without) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu") is not None])
        items[:] = without


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data decoded earlier, by other code, would hide that this code cannot decode them."""
    with mock.patch.dict(os.environ, FL_SIM_CACHE=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture(autouse=True, scope="session")
def _imported_modules_are_not_searched() -> None:
    """A full garbage collection takes seconds where it searches all imported modules, and some test pays for it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # of 700: a collection for every few hundred objects took seconds in all
    gc.enable()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test draws the same weights and inputs alone, after others, and in another order."""
    import torch

    torch.default_generator.manual_seed(0)  # `torch.manual_seed` reads the stack for devices that are not there


@pytest.fixture(autouse=True)
def _modules_of_a_test_are_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test wrote and imported is not what the next test gets under the same name."""
    before = set(sys.modules)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """The finished run of a tiny federation with these overrides, run once for all tests; they only read it."""
    from federation import run_tiny

    return cache(lambda *overrides: run_tiny(tmp_path_factory.mktemp("finished"), *overrides))
