"""Sums that no addition rounds: compiled where there was a C compiler at installation, else NumPy; both give the same bits."""

from fl_sim.core.kernels import exact_reference as reference

try:
    from fl_sim.core.kernels._exact import add_exactly, add_scaled_exactly, add_sent_exactly

    FORM = "compiled"
except ImportError:
    from fl_sim.core.kernels.exact_reference import add_exactly, add_scaled_exactly, add_sent_exactly

    FORM = "NumPy"

__all__ = ["FORM", "add_exactly", "add_scaled_exactly", "add_sent_exactly", "reference"]
