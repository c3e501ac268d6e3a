"""Leftovers of a client on the model, beside its update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_sim.models.parameters import COUNTER

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Shape:
    """State of a model that no payload carries: hooks, dtypes, names, attributes and buffers outside its state dict."""

    hooks: Mapping[str, int]
    dtypes: Mapping[str, tuple[torch.dtype, bool]]
    kept: Mapping[str, object]

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """The model's, copied."""
        travelling = model.state_dict().keys()
        hooks = {name: sum(len(getattr(module, kind)) for kind in HOOKS) for name, module in model.named_modules()}
        entries = [*model.named_parameters(), *model.named_buffers()]
        kept: dict[str, object] = {n: b.clone() for n, b in model.named_buffers() if n not in travelling}
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name != "training" and not name.startswith("_"):
                    kept[f"{path}.{name}".lstrip(".")] = value.clone() if isinstance(value, Tensor) else repr(value)
        return cls(hooks, {name: (value.dtype, value.requires_grad) for name, value in entries}, kept)

    def changes(self, after: Shape) -> str:
        """Describe the differences afterwards in one line; empty where there are none."""
        if self.hooks != after.hooks:
            return "hooks left on the model: the next client runs under them; call handle.remove()"
        for name, (dtype, trained) in self.dtypes.items():
            if name.endswith(COUNTER):
                continue
            if after.dtypes.get(name) != (dtype, trained):
                now = after.dtypes.get(name)
                what = (
                    "is gone"
                    if now is None
                    else f"is {now[0]}, was {dtype}"
                    if now[0] != dtype
                    else "was frozen or freed"
                )
                return f"the model itself changed: {name} {what}; work on copy.deepcopy(ctx.model), or put it back"
        for name, value in after.kept.items():
            if not _same(self.kept.get(name), value):
                return (
                    f"the model keeps {name!r} from call to call, which is in no state dict: it reaches the next client"
                )
        return ""


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)
