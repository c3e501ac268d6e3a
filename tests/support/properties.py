"""How many examples a property is tried with."""

from __future__ import annotations

import os

# Set by `make test-all`.
THOROUGH = "FL_SIM_ALL_EXAMPLES"


def examples(thorough: int) -> int:
    """A fifth of `thorough`, at least 20; all of them where FL_SIM_ALL_EXAMPLES is set.

    The default tests have a budget of processor time, and each has seen its property hold thousands of times.
    """
    return thorough if os.environ.get(THOROUGH) else max(20, thorough // 5)
