"""MACs that gates save each sample: of the layers behind and before a gate, inactive inputs and outputs cost nothing."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from fl_sim.gating.gates import Gate
from fl_sim.gating.graph import channels_from
from fl_sim.models.graph import modules_of


def saved_macs(net: fx.GraphModule, x: Tensor) -> Tensor:
    """MACs that each sample of `x` (B, C, H, W) does without, int64 (B,), in evaluation mode.

        saved = sum_l K_l^2 H_l W_l sum_groups (inputs outputs - (active inputs)(active outputs))

    over the convolutions and linear layers that a gate stands behind or feeds. An output is inactive where a predictive gate
    has it off; an input where the layer that made it has it off and only channel-by-channel operations lie between. No
    other operation saves anything.
    """
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            ShapeProp(net).propagate(x)
    finally:
        net.train(training)
    called = modules_of(net)
    origin = channels_from(net, lambda module: isinstance(module, Gate) and module.silences)
    skipping = {
        node.args[1].args[0]: gate
        for node, gate in called.items()
        if isinstance(gate, Gate) and gate.skips and isinstance(node.args[1], fx.Node)
    }
    total = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for node, layer in called.items():
        source = node.args[0]
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or not isinstance(source, fx.Node):
            continue
        if isinstance(layer, nn.Linear) and len(_shape(source)) > 2:
            continue  # it reads the last dimension of a map, which is not that of the channels
        feeding = called[origin[source]] if source in origin else None
        inputs, outputs = _mask(feeding), _mask(skipping.get(node))
        if inputs is not None or outputs is not None:
            positions = int(_shape(node)[2:].numel())  # 1 of a linear layer
            total += (_layer_macs(layer, positions, None, None) - _layer_macs(layer, positions, inputs, outputs)).to(
                x.device
            )
    return total


def _mask(gate: nn.Module | None) -> Tensor | None:
    return gate.mask if isinstance(gate, Gate) else None


def _shape(node: fx.Node) -> torch.Size:
    """Shape of what a node of the graph made in the last pass."""
    shape: torch.Size = node.meta["tensor_meta"].shape
    return shape


def _layer_macs(layer: nn.Conv2d | nn.Linear, positions: int, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
    """(B,) or a scalar, int64; masks (B, C) or None for all on."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    out_size, in_size = layer.weight.shape[:2]
    out_size //= groups
    kernel = layer.weight[0, 0].numel()
    active_out = torch.full((1, groups), out_size) if outputs is None else outputs.view(-1, groups, out_size).sum(2)
    # A linear layer behind a flattened map reads in_size / C inputs of each channel.
    active_in = (
        torch.full((1, groups), in_size)
        if inputs is None
        else inputs.view(len(inputs), groups, -1).sum(2) * (groups * in_size // inputs.shape[1])
    )
    return kernel * positions * (active_in.to(active_out.device) * active_out).sum(1)
