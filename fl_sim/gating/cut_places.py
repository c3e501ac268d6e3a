"""Where channels can be cut out of a model: behind a gate, or where a pruning mask can remove them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import fx, nn

from fl_sim.core.types import UserError
from fl_sim.gating.gates import Gate
from fl_sim.gating.graph import is_channelwise
from fl_sim.gating.model import Gated
from fl_sim.gating.salience import FilterWeight
from fl_sim.models.channels import inner_channels
from fl_sim.models.computed import computed
from fl_sim.models.graph import modules_of

DRAWING = (nn.Dropout, nn.Dropout2d)
"""Channel by channel, but other numbers are drawn for fewer channels."""


@dataclass(frozen=True)
class Place:
    """Channels that can be cut out, by module path.

    Attributes:
        conv, norm: the convolution that makes them and the BatchNorm behind it.
        gate: the gate behind the BatchNorm; None = a pruning mask alone switches channels off.
        readers: the convolutions that read these channels, if nothing else does; empty = the cut ends at the gate, which
            puts zeros where the other channels were.
    """

    conv: str
    norm: str
    gate: str | None
    readers: tuple[str, ...]


def places_of(model: nn.Module) -> list[Place]:
    """Where channels of a model can be cut out.

    Raises:
        UserError: gates that choose for each sample, or no such place.
    """
    if not isinstance(model, Gated):
        found = [Place(inner.conv, inner.norm, None, (inner.reader,)) for inner in inner_channels(model)]
    else:
        per_sample = [g for g in model.gates.values() if not isinstance(g.salience, FilterWeight) or not g.silences]
        if per_sample:
            raise UserError(
                "training.cut_channels: the gates choose channels for each sample; it takes gating.salience = 'weight' "
                "and gating.masking = 'both_ways'"
            )
        found = _gated_places(model)
    if not found:
        raise UserError(
            f"training.cut_channels: {type(model).__name__} has no channels between a convolution with BatchNorm and "
            "convolutions that alone read them"
        )
    return found


def _gated_places(model: Gated) -> list[Place]:
    called = modules_of(model.net)
    runs = Counter(str(node.target) for node in called)
    found = []
    for conv, (norm, key) in model._layers.items():
        made = cast(nn.Conv2d, model.net.get_submodule(conv))
        (node,) = (n for n, module in called.items() if module is model.net.get_submodule(f"gates.{key}"))
        if made.groups == 1 and runs[conv] == runs[norm] == 1:
            readers = _readers(node, called, runs)
            path = tuple(f"net.{reader}" for reader in readers)
            _require_own(model, f"net.{conv}", f"net.{norm}")
            found.append(Place(f"net.{conv}", f"net.{norm}", f"net.gates.{key}", path))
    return found


def _require_own(model: nn.Module, *paths: str) -> None:
    """Refuse layers of whose tensors one is computed: a part of its channels would be computed to other values than all are."""
    for path in paths:
        for name in computed(model.get_submodule(path)):
            where = f"training.cut_channels: {path.removeprefix('net.')}.{name}"
            raise UserError(
                f"{where} is computed from other tensors (weight norm, spectral norm, torch.nn.utils.prune), so that its channels "
                "cannot be cut out; allowed: gating.keep as a table without this layer, or training.cut_channels = false"
            )


def _readers(gate: fx.Node, called: Mapping[fx.Node, nn.Module], runs: Counter[str]) -> tuple[str, ...]:
    """The convolutions that alone read a gate's channels; empty where anything else reads them too, or where the weight of one
    is computed from other tensors."""
    found, open_nodes = [], [gate]
    while open_nodes:
        node = open_nodes.pop()
        for user in node.users:
            module = called.get(user)
            whole = isinstance(module, nn.Conv2d) and module.groups == 1 and runs[str(user.target)] == 1
            if whole and not computed(cast(nn.Conv2d, module)):
                found.append(str(user.target))
            elif isinstance(module, Gate):
                continue  # it ranks by filters, and does not look at its convolution's input
            elif user.op != "call_method" and is_channelwise(user, called) and not isinstance(module, DRAWING):
                open_nodes.append(user)
            else:
                return ()
    return tuple(found)
