"""Traces a model into a graph of module calls (`torch.fx`)."""

from __future__ import annotations

from torch import fx, nn
from torch.nn import functional

from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.models.computed import copied


def trace(model: nn.Module) -> fx.GraphModule:
    """A copy of the model as a graph of module calls; training and evaluation mode still differ in it.

    Raises:
        UserError: control flow that depends on the data, or functional dropout, whose mode a graph would freeze.
    """
    own = copied(model)
    try:
        traced = fx.GraphModule(own, fx.Tracer().trace(own), type(model).__name__)
    except USERS_OWN as error:  # whatever the user's own forward pass raises on what is no tensor
        raise UserError(
            f"{type(model).__name__} cannot be traced, as gates and cut channels need it: {error_line(error)}"
        ) from error
    if any(node.target in (functional.dropout, functional.batch_norm) for node in traced.graph.nodes):
        raise UserError(f"gating: {type(model).__name__} calls functional dropout or batch_norm; use modules")
    traced.train(model.training)
    return traced


def modules_of(traced: fx.GraphModule) -> dict[fx.Node, nn.Module]:
    """Node -> the module that it calls."""
    return {node: traced.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
