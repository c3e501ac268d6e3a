"""What matters: non-negative scores of the shape of the parameters."""

from __future__ import annotations

from fl_sim.types import Grads, Params, Scores


def magnitude(params: Params) -> Scores:
    """|w|."""
    return {name: value.detach().abs() for name, value in params.items()}


def saliency(params: Params, grads: Grads) -> Scores:
    """|w * g|, the first-order change of the loss (Molchanov et al., 2017)."""
    return {name: (value.detach() * grads[name]).abs() for name, value in params.items()}
