"""The loops that every coordinate of every update passes through: compiled where there was a C compiler at installation.

NumPy and PyTorch have no operation that widens float32 and adds it to float64 in one pass; in two, the fold of an update
takes twice the time. A seed, and a generator for each small model, takes NumPy longer than that model's fold. Both forms give
the same bits (`tests/core/test_kernels.py`), so that nobody needs a compiler.
"""

from fl_sim.core.kernels import reference

try:
    from fl_sim.core.kernels._compiled import add_scaled, add_sent, add_squares, all_finite, moved, random_bits, seed

    FORM = "compiled"
except ImportError:
    from fl_sim.core.kernels.reference import add_scaled, add_sent, add_squares, all_finite, moved, random_bits, seed

    FORM = "NumPy"

__all__ = ["FORM", "add_scaled", "add_sent", "add_squares", "all_finite", "moved", "random_bits", "reference", "seed"]
