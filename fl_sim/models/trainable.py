"""Choice of trainable parameters; frozen ones stay at values that every party makes from one seed.

    freeze(model, "batchnorm", seed=0)     # only BatchNorm's gamma and beta require a gradient from here on

A frozen parameter requires no gradient; the training loop, snapshots and exchanges follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fl_sim.core.types import Params, UserError
from fl_sim.models.layers import CONVOLUTION, batchnorm_names, head_names, map_names, norm_names
from fl_sim.models.parameters import canonical
from fl_sim.models.reparametrized import Reparametrized, compute

VALUES = ".parametrizations.weight.0.values"
PER_CHANNEL = 2
"""BatchNorm has two parameters per channel, gamma and beta; the control "random" trains as many weights."""


class ChosenWeights(Reparametrized):
    """A weight (C_out, ...) whose entries at seeded random places are parameters of their own, `values` (C_out, k)."""

    indices: Tensor

    def __init__(self, weight: Tensor, count: int, generator: torch.Generator) -> None:
        super().__init__()
        rows = weight.detach().flatten(1)
        drawn = torch.rand(rows.shape, generator=generator).topk(min(count, rows.shape[1]), dim=1).indices
        self.register_buffer("indices", drawn, persistent=False)
        self.values = nn.Parameter(rows.gather(1, drawn))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).scatter(1, self.indices, self.values.to(weight.dtype)).view_as(weight)

    def first(self, weight: Tensor) -> Params:
        """See `Reparametrized`."""
        return {"values": weight.flatten(1).gather(1, self.indices)}


def choose_random_weights(model: nn.Module, generator: torch.Generator) -> list[str]:
    """Make two random weights of every output channel of every convolution parameters of their own; their names.

    The control of arXiv 2003.00152, section 4: equally many parameters as BatchNorm has, elsewhere.
    """
    names = []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CONVOLUTION) and layer.weight.requires_grad:
            compute(layer, "weight", ChosenWeights(layer.weight, PER_CHANNEL, generator))
            names.append(name + VALUES)
    return names


Select = Callable[[nn.Module, torch.Generator], list[str]]
SELECTORS: Mapping[str, Select] = {
    "all": lambda model, generator: [name for name, _ in model.named_parameters()],
    "batchnorm": lambda model, generator: batchnorm_names(model),
    "norm": lambda model, generator: norm_names(model),
    "head": lambda model, generator: head_names(model),
    "random": choose_random_weights,
}

PERSONAL: Mapping[str, Select] = {name: SELECTORS[name] for name in ("head", "batchnorm", "norm")}
"""What a client may keep for itself, by role: its classifier (FedPer; Arivazhagan et al., 2019), or its BatchNorm (FedBN; Li
et al., 2021), whose statistics it keeps with `model.statistics = "local"`."""


def freeze(model: nn.Module, trainable: str, *, seed: int = 0, key: str = "model.trainable") -> list[str]:
    """Let only the chosen parameters require a gradient; those that require none already stay frozen.

    Args:
        model: changed in place; "random" also adds parameters.
        trainable: names of `SELECTORS` or globs over parameter names, joined by "+": "batchnorm+head", "layer3.*".
        seed: draws the places of "random".
        key: the config key that asks for it, for messages.

    Returns:
        Names of the trainable parameters, in model order.

    Raises:
        UserError: a part selects nothing, or only what is frozen already.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: set[str] = set()
    for part in trainable.split("+"):
        selected = SELECTORS.get(part, _matching(part))(model, generator)
        if not selected:
            raise UserError(
                f"{key} = {trainable!r}: {part!r} selects no parameter of this model; allowed: "
                f"{_allowed(model, SELECTORS)}a glob such as 'layer3.*', or several joined by '+'"
            )
        unfrozen = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if unfrozen.isdisjoint(selected):
            raise UserError(
                f"{key} = {trainable!r}: the model's builder froze all that {part!r} selects, for instance "
                f"{selected[0]!r}; frozen parameters (requires_grad_(False)) stay frozen"
            )
        chosen.update(unfrozen.intersection(selected))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name, _ in model.named_parameters() if name in chosen]


def _allowed(model: nn.Module, offered: Collection[str]) -> str:
    """Names of `SELECTORS` that select something of this model that is trained, each with a comma behind it."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def selects(name: str) -> bool:
        if name == "random":  # which would change the model
            return any(isinstance(layer, CONVOLUTION) and layer.weight.requires_grad for layer in model.modules())
        return not trained.isdisjoint(SELECTORS[name](model, torch.Generator()))

    return "".join(f"{name}, " for name in filter(selects, offered))


def personal_names(model: nn.Module, personal: str | None, *, seed: int = 0) -> list[str]:
    """Names of the parameters that each client trains and keeps for itself, in model order; None = there are none.

    Args:
        model: with its frozen parameters frozen.
        personal: names of `PERSONAL` or globs over parameter names, joined by "+": "head", "batchnorm", "layer3.*".

    Raises:
        UserError: a part selects nothing that is trained, or nothing is left to be shared.
    """
    if personal is None:
        return []
    generator = torch.Generator().manual_seed(seed)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    chosen: set[str] = set()
    for part in personal.split("+"):
        selected = (PERSONAL[part] if part in PERSONAL else _matching(part))(model, generator)
        if set(trained).isdisjoint(selected):
            raise UserError(
                f"model.personal = {personal!r}: {part!r} selects no trained parameter of this model; allowed: "
                f"{_allowed(model, PERSONAL)}a glob such as 'layer3.*', or several joined by '+'"
            )
        chosen.update(selected)
    if chosen.issuperset(trained):
        raise UserError(f"model.personal = {personal!r}: selects every trained parameter, so that nothing is shared")
    return [name for name in trained if name in chosen]


def _matching(pattern: str) -> Select:
    def matching(model: nn.Module, generator: torch.Generator) -> list[str]:
        return list(dict.fromkeys(entry for name, entry in canonical(model).items() if fnmatchcase(name, pattern)))

    return matching


Gammas = Callable[[Tensor, torch.Generator], Tensor]
BATCHNORM_INITS: Mapping[str, tuple[Gammas, float]] = {
    "fixed": (lambda gamma, generator: gamma.fill_(1.0), 0.0),
    "uniform": (lambda gamma, generator: gamma.uniform_(0.0, 1.0, generator=generator), 0.0),
    "positive_negative": (lambda gamma, generator: gamma.uniform_(-1.0, 1.0, generator=generator), 0.0),
    "one_one": (lambda gamma, generator: gamma.fill_(1.0), 1.0),
}
"""Name -> (how gamma is drawn, beta): the four of the code of arXiv 2003.00152; "uniform" is the paper's default."""


def initialise(model: nn.Module, batchnorm: str, *, seed: int = 0) -> None:
    """Initialise a model in place: Kaiming-normal convolutions and linear layers (He et al., 2015), BatchNorm as named.

    Args:
        model: changed in place; parameters on the CPU, so that every machine draws the same bits.
        batchnorm: a name of `BATCHNORM_INITS`.

    Raises:
        UserError: no such initialisation.
    """
    if batchnorm not in BATCHNORM_INITS:
        raise UserError(f"model.batchnorm_init = {batchnorm!r}: allowed: {', '.join(BATCHNORM_INITS)}")
    draw, beta = BATCHNORM_INITS[batchnorm]
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    scales = [name for name in batchnorm_names(model) if name.endswith("weight")]
    with torch.no_grad():
        for name in map_names(model):
            nn.init.kaiming_normal_(named[name], generator=generator)
        for name in scales:
            draw(named[name], generator)
            named[name.removesuffix("weight") + "bias"].fill_(beta)
