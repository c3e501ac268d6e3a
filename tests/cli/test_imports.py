"""Imports of a command run without the garbage collector, which is on again afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from fl_sim.cli.imports import imports_uncollected

PROGRAM = """
import gc
from fl_sim.cli.imports import imports_uncollected
with imports_uncollected():
    import decimal
first = gc.get_freeze_count()
kept = [[] for _ in range(1000)]
with imports_uncollected():
    pass
print(first > 1000, gc.get_freeze_count() <= first, gc.isenabled())
"""


def test_modules_are_left_out_of_later_collections_once() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "True", "True"]


def _fails() -> None:
    with imports_uncollected():
        assert not gc.isenabled()
        import no_such_module  # noqa: F401


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was_after_a_failed_import(on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ModuleNotFoundError):
            _fails()
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()
