"""Inference that skips a sample's off channels instead of multiplying them by zero.

    fast = skipping(gated)          # the same function in evaluation mode, one sample after another
    fast(image[None])

BatchNorm is folded into the filters. Each gate chooses its channels first; only their filters are gathered, scaled by
their scores and convolved. The result stays narrow through channel-by-channel operations, so that the next convolution
gathers only the matching columns; an addition puts the channels back where they belong. This pays when a convolution
costs more than choosing and gathering, tens of microseconds a layer: `fl-sim bench inference` tells. `exported(fast,
image)` is the same as TorchScript, which spares Python's part of that and can be saved.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fl_sim.core.types import UserError
from fl_sim.gating.gates import Gate
from fl_sim.gating.graph import ADDITIONS, is_channelwise
from fl_sim.gating.model import Gated
from fl_sim.gating.narrow import Choice, LearnedChoice, NarrowConv, SkippingConv, add_channels, widen
from fl_sim.gating.salience import LearnedGate
from fl_sim.models import BATCHNORM
from fl_sim.models.computed import copied, materialized
from fl_sim.models.graph import modules_of

RECTIFIERS: frozenset[object] = frozenset({torch.relu, nn.functional.relu, nn.functional.relu6, "relu"})


class Skipping(nn.Module):
    """A gated model for inference, one sample at a time; not to be trained."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> what the gated model gives in evaluation mode."""
        with torch.no_grad():
            return torch.cat([self.net(sample) for sample in x.split(1)])


def skipping(model: Gated) -> Skipping:
    """The model that skips; `model` is left as it is. Where a gate keeps everything, nothing is gathered.

    Weights that the model computes from others, as weight norms do, are computed here once.

    Raises:
        UserError: a salience that is known only after the convolution (`activation`, `taylor`), or dense forward passes; a
            weight that a hook of the user's own computes.
    """
    if late := [conv for conv, gate in model.gates.items() if not gate.skips]:
        raise UserError(f"the gate of {late[0]} is known after its convolution: nothing to skip; use salience = 'gate'")
    return Skipping(_Rewriting(cast(Gated, _inferring(model)).net).result()).eval()


def exported(model: nn.Module, image: Tensor) -> torch.jit.ScriptModule:
    """Export a model for inference as frozen TorchScript, for images (1, C, H, W) like `image`; `.save(path)` writes it."""
    with torch.no_grad(), warnings.catch_warnings():
        # Newer releases of PyTorch advise compilers instead, which the machine that runs the model would need.
        warnings.simplefilter("ignore")
        # A first pass fills what depends on the image's size; it must not be part of the trace.
        model.eval()(image)
        script: torch.jit.ScriptModule = torch.jit.freeze(torch.jit.trace(model, image, check_trace=False))
        return script


def folded(model: nn.Module) -> fx.GraphModule:
    """A copy for inference with BatchNorm folded into the convolutions that it alone reads."""
    return _Rewriting(fx.symbolic_trace(_inferring(model))).result()


def _inferring(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in which every weight is a parameter that can be folded and gathered."""
    return materialized(copied(model).eval()).requires_grad_(False)


@dataclass(frozen=True)
class _Narrow:
    """A value that holds some channels of a dense one."""

    values: fx.Node
    channels: fx.Node
    size: int


_Value = fx.Node | _Narrow


class _Rewriting:
    """Rewrites a graph in one pass: gated triples become `SkippingConv`, and narrow values flow as far as they can."""

    def __init__(self, net: fx.GraphModule) -> None:
        self.net, self.graph = net, fx.Graph()
        self.called = modules_of(net)
        self.values: dict[fx.Node, _Value] = {}
        self.folded: dict[fx.Node, nn.Conv2d] = {}
        self.inside: set[fx.Node] = set()
        for norm, module in self.called.items():
            conv = norm.args[0]
            if isinstance(module, BATCHNORM) and isinstance(conv, fx.Node) and len(conv.users) == 1:
                filters = self.called.get(conv)
                if isinstance(filters, nn.Conv2d):
                    self.folded[norm] = fuse_conv_bn_eval(filters, module)
                    self.inside.add(conv)

    def result(self) -> fx.GraphModule:
        """The rewritten model."""
        gated = [n for n, m in self.called.items() if isinstance(m, Gate) and m.kept < m.channels]
        gated = [n for n in gated if self._norm(n) in self.folded and self.folded[self._norm(n)].groups == 1]
        self.inside |= {self._norm(n) for n in gated}
        for node in self.net.graph.nodes:
            if node in gated:
                self.values[node] = self._skip(node)
            elif node not in self.inside:
                self.values[node] = self._copy(node)
        made = fx.GraphModule(self.net, self.graph)
        made.graph.eliminate_dead_code()
        made.delete_all_unused_submodules()
        made.recompile()
        return made

    @staticmethod
    def _norm(gate: fx.Node) -> fx.Node:
        norm = gate.args[1]
        assert isinstance(norm, fx.Node)
        return norm

    def _module(self, near: fx.Node, module: nn.Module) -> str:
        path = f"rewritten_{near.name}"
        self.net.add_module(path, module)
        return path

    def _dense(self, node: fx.Node) -> fx.Node:
        """The node's value with all channels."""
        value = self.values[node]
        if isinstance(value, _Narrow):
            made = self.graph.call_function(widen, (value.values, value.channels, value.size))
            self.values[node] = value = made
        return value

    def _skip(self, node: fx.Node) -> _Narrow:
        gate, conv, source = self.called[node], self.folded[self._norm(node)], node.args[0]
        assert isinstance(gate, Gate)
        assert isinstance(source, fx.Node)
        learned = isinstance(gate.salience, LearnedGate) and self._not_negative(source)
        # Scores look at the filters as they were trained, before BatchNorm is folded in.
        raw = self.net.get_parameter(str(node.args[2].target))  # type: ignore[union-attr]
        choice = LearnedChoice(gate.salience, gate.kept) if learned else Choice(gate, raw)  # type: ignore[arg-type]
        value = self.values[source]
        arguments = (value.values, value.channels) if isinstance(value, _Narrow) else (value, None)
        # `LearnedChoice` answers sigmoids; the gate is twice that.
        made = SkippingConv(conv, choice, 2.0 if learned else 1.0)
        out = self.graph.call_module(self._module(node, made), arguments)
        values, channels = (self.graph.call_function(operator.getitem, (out, i)) for i in (0, 1))
        return _Narrow(values, channels, gate.channels)

    def _copy(self, node: fx.Node) -> _Value:
        source = node.args[0] if node.args else None
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        module = self.folded.get(node) or self.called.get(node)
        if node in self.folded:
            source = source.args[0]  # type: ignore[union-attr]
            value = self.values[source]  # type: ignore[index]
        if isinstance(module, nn.Conv2d) and isinstance(value, _Narrow) and module.groups == 1:
            path = self._module(node, NarrowConv(module))
            return self.graph.call_module(path, (value.values, value.channels))
        if node in self.folded:
            return self.graph.call_module(self._module(node, module), (self._dense(source),))  # type: ignore[arg-type]
        if isinstance(value, _Narrow) and is_channelwise(node, self.called) and not _flattens(node, module):
            same = self.graph.node_copy(node, lambda n: value.values if n is source else self._dense(n))
            return _Narrow(same, value.channels, value.size)
        if node.target in ADDITIONS and not node.kwargs and len(node.args) == 2:
            return self._add(*node.args)  # type: ignore[arg-type]
        return self.graph.node_copy(node, self._dense)

    def _add(self, left: fx.Node, right: fx.Node) -> fx.Node:
        for dense, narrow in ((left, right), (right, left)):
            value = self.values.get(narrow) if isinstance(narrow, fx.Node) else None
            if isinstance(value, _Narrow) and isinstance(dense, fx.Node):
                return self.graph.call_function(add_channels, (self._dense(dense), value.values, value.channels))
        return self.graph.call_function(
            operator.add, tuple(self._dense(n) if isinstance(n, fx.Node) else n for n in (left, right))
        )

    def _not_negative(self, node: fx.Node) -> bool:
        """Whether a rectifier made this value."""
        rectifiers = (nn.ReLU, nn.ReLU6)
        passing = isinstance(self.called.get(node), (nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.Identity))
        if passing and isinstance(node.args[0], fx.Node):
            return self._not_negative(node.args[0])
        return isinstance(self.called.get(node), rectifiers) or node.target in RECTIFIERS


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    return isinstance(module, nn.Flatten) or node.target in (torch.flatten, "flatten")
