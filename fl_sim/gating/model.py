"""A model with per-sample channel gates, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn

from fl_sim.core.lookup import find
from fl_sim.core.types import UserError
from fl_sim.gating import active_macs
from fl_sim.gating.gates import SALIENCES, Gate, Masking, at_temperature, both_ways
from fl_sim.gating.graph import channels_from, find_pairs
from fl_sim.models.graph import modules_of, trace
from fl_sim.models.macs import count_macs

Keep = float | Mapping[str, float]
"""Share of a layer's channels kept for each sample: one for all, or by module path of the convolution or of what
contains it, with shell wildcards (`"*.conv1"`). The last entry that fits a convolution counts; one that none fits has no
gate."""


@dataclass(frozen=True)
class ChannelUse:
    """Counts of a gate since its last reset.

    Attributes:
        active: share of the samples for which each channel was on, float32 (C,).
        salience: sum over the samples of a channel's score where it was on, float32 (C,).
    """

    active: Tensor
    salience: Tensor


class Gated(nn.Module):
    """The model's graph with a gate behind each gated convolution's BatchNorm; `net` holds both.

    State-dict names are the model's behind `net.`, and the gates' behind `net.gates.`.
    """

    def __init__(self, net: fx.GraphModule, layers: Mapping[str, tuple[str, str]]) -> None:
        super().__init__()
        self.net = net
        self._layers = dict(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Like the model's."""
        return self.net(x)  # type: ignore[no-any-return]

    @property
    def gates(self) -> dict[str, Gate]:
        """Module path of a gated convolution in the original model -> its gate."""
        found = {conv: self.net.get_submodule(f"gates.{key}") for conv, (_, key) in self._layers.items()}
        return {conv: gate for conv, gate in found.items() if isinstance(gate, Gate)}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Gated convolution -> names of the parameters whose row c belongs to its channel c.

        The filters and their bias, BatchNorm's gamma and beta, the gate's weight rows and bias. Of what filters are computed
        from, as in weight norm, it is what has a row for each channel.
        """
        rows = {name: len(value) for name, value in self.named_parameters() if value.dim()}
        found = {}
        for conv, gate in self.gates.items():
            norm, key = self._layers[conv]
            starts = tuple(f"net.{path}." for path in (conv, norm, f"gates.{key}"))
            found[conv] = tuple(n for n, count in rows.items() if n.startswith(starts) and count == gate.channels)
        return found

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Gated convolution -> names of the convolution weights whose column c reads its channel c alone."""
        called = modules_of(self.net)
        gate_of = {gate: conv for conv, gate in self.gates.items()}
        found: dict[str, list[str]] = {conv: [] for conv in self._layers}
        for node, origin in channels_from(
            self.net, lambda module: isinstance(module, Gate) and module.silences
        ).items():
            gate = called[origin]
            for user in node.users:
                layer = called.get(user)
                if isinstance(gate, Gate) and isinstance(layer, nn.Conv2d) and layer.groups == 1:
                    found[gate_of[gate]].append(f"net.{user.target}.weight")
        return {conv: tuple(names) for conv, names in found.items()}

    @property
    def gate_names(self) -> frozenset[str]:
        """Names of the gates' own parameters."""
        return frozenset(name for name, _ in self.named_parameters() if name.startswith("net.gates."))

    @property
    def keep(self) -> dict[str, float]:
        """Gated convolution -> share of its channels that is kept."""
        return {conv: gate.kept / gate.channels for conv, gate in self.gates.items()}

    def set_keep(self, keep: Keep) -> None:
        """Keep round(ratio * C) channels of each layer from now on, at least one.

        Raises:
            UserError: a ratio outside (0, 1], or a path that no gated convolution has.
        """
        for conv, ratio in ratios(keep, list(self._layers)).items():
            self.gates[conv].set_keep(ratio)

    def masks(self) -> dict[str, Tensor]:
        """Gated convolution -> which channels were on for each sample of the last pass, bool (B, C)."""
        return {conv: gate.mask for conv, gate in self.gates.items() if gate.mask is not None}

    def forget_masks(self) -> None:
        """Forget which channels were on in the last pass."""
        for gate in self.gates.values():
            gate.mask = None

    def reset(self) -> None:
        """Forget what training counted."""
        for gate in self.gates.values():
            gate.reset()

    def use(self) -> dict[str, ChannelUse]:
        """Gated convolution -> what its gate counted in training mode since the last reset."""
        return {
            conv: ChannelUse(gate.active / gate.seen.clamp_min(1), gate.salience_sum.clone())
            for conv, gate in self.gates.items()
        }

    def count_macs(self, x: Tensor) -> Tensor:
        """MACs for each sample of x (B, C, H, W), int64 (B,), in evaluation mode: `dense_macs` less what the gates save.

        What a gate has off is left out where skipping is possible (`fl_sim.gating.salience` says for which salience). The
        gates' own MACs are `gate_macs`, the same for every sample.
        """
        return self.dense_macs(x) - self.saved_macs(x)

    def saved_macs(self, x: Tensor) -> Tensor:
        """MACs that each sample of x (B, C, H, W) does without at the keep ratio of now, int64 (B,)."""
        return active_macs.saved_macs(self.net, x)

    def dense_macs(self, x: Tensor) -> int:
        """MACs of one sample of x's shape with every channel on: those of the plain model, whatever operations it runs."""
        return count_macs(self, tuple(x.shape[1:]), tokens=not x.is_floating_point()) - self.gate_macs

    @property
    def gate_macs(self) -> int:
        """MACs of the gates' linear maps for one sample."""
        layers = (m for gate in self.gates.values() for m in gate.modules() if isinstance(m, nn.Linear))
        return sum(layer.weight.numel() for layer in layers)


def ratios(keep: Keep, convs: Sequence[str]) -> dict[str, float]:
    """The keep ratio of each convolution that `keep` names.

    Raises:
        UserError: a ratio outside (0, 1], or a path that fits none.
    """
    given = dict(keep) if isinstance(keep, Mapping) else {"*": keep}
    found: dict[str, float] = {}
    for path, ratio in given.items():
        where = f"gating.keep{f'[{path!r}]' if path != '*' else ''} = {ratio}"
        if not 0 < ratio <= 1:
            raise UserError(f"{where}: must be above 0 and at most 1")
        fitting = [conv for conv in convs if fnmatchcase(conv, path) or fnmatchcase(conv, f"{path}.*")]
        if not fitting:
            raise UserError(f"{where}: no gated convolution there; allowed: {', '.join(convs)}, or what contains them")
        found |= dict.fromkeys(fitting, ratio)
    return found


def gate(
    model: nn.Module,
    keep: Keep = 0.5,
    salience: str = "gate",
    seed: int = 0,
    *,
    masking: Masking = both_ways,
    temperature: float = 1.0,
) -> Gated:
    """A copy of a convolutional model with per-sample channel gates after normalisation.

    Composite of arXiv 2106.06921 (v2 "Heterogeneous FL using Dynamic Model Pruning and Adaptive Gradient") and of both
    public codes of its authors: for each sample and gated layer, the round(keep * C) most salient channels are on (equal
    scores: lowest index first) and the rest is multiplied by zero after BatchNorm, forward and therefore backward. So a
    filter's gradient is the sum over the samples that had it on. Batch statistics still see all samples.

    Gated is every convolution that BatchNorm alone reads, but the one on the image and projection shortcuts.

    Args:
        model: any traceable module with such convolutions; left as it is.
        keep: share of channels kept; see `Keep`.
        salience: what ranks channels, and which MACs that saves (`fl_sim.gating.salience` has the formulas):
            "gate": learned, bounded, scale-free; skips off filters and their columns in the next convolution.
            "gate_relu": as published; diverges in residual networks; saves the same.
            "weight": size of the filters, for all samples alike; saves the same.
            "activation": size of the output; the guarded convolution is needed whole, the next one saves its columns.
            "taylor": gradient times output, training only; masks gradients, saves no inference MACs.
        seed: initial parameters of the gates.
        masking: `both_ways`, or `backward_only` for the ablation with a dense forward pass.
        temperature: what divides the logits of "gate", above 0; see `LearnedGate`.

    Raises:
        UserError: unknown salience, a temperature where nothing is learned, a bad ratio or path, or nothing to gate.
    """
    make = at_temperature(find("gating.salience", salience, SALIENCES), temperature)
    net = trace(model)
    pairs = find_pairs(net)
    if not pairs:
        raise UserError(f"gating: {type(model).__name__} has no inner convolution that BatchNorm alone reads")
    chosen = ratios(keep, [pair.conv for pair, _, _ in pairs])
    pairs = [found for found in pairs if found[0].conv in chosen]
    rng = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    net.add_module("gates", nn.ModuleDict())
    for pair, conv_node, norm_node in pairs:
        conv = net.get_submodule(pair.conv)
        assert isinstance(conv, nn.Conv2d)
        net.get_submodule("gates").add_module(pair.key, make(conv, rng, masking).to(device).train(model.training))
        readers = list(norm_node.users)
        with net.graph.inserting_after(norm_node):
            # Behind the convolution, which may compute its weight anew in each pass. `get_attr` would warn of a weight that is
            # computed, and read it here: a spectral norm's singular vectors move at each read.
            filters = net.graph.create_node("get_attr", f"{pair.conv}.weight")
        with net.graph.inserting_after(filters):
            gated = net.graph.call_module(f"gates.{pair.key}", (conv_node.args[0], norm_node, filters))
        for reader in readers:
            reader.replace_input_with(norm_node, gated)
    net.recompile()
    made = Gated(net, {pair.conv: (pair.norm, pair.key) for pair, _, _ in pairs})
    made.set_keep(keep)
    return made.train(model.training)
