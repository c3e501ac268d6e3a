"""A model in one safetensors file that says which model it is: what `fl-sim run` leaves behind and teachers are read from.

The file's metadata holds the keyword arguments of `fl_sim.models.build`, so a teacher may have another architecture
than the student. Nothing is unpickled, and only models of this package are built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fl_sim.channels import shrink
from fl_sim.gating import Gating
from fl_sim.models import MODELS, build
from fl_sim.training import load, snapshot
from fl_sim.types import Params, UserError

MODEL = "fl_sim.model"
"""The metadata's key: a JSON object with `name`, the other arguments of `build`, and `gating` where there are gates."""


def write_model(path: Path, params: Params, described: Mapping[str, object]) -> None:
    """Save parameters with the arguments of `fl_sim.models.build` that make their model."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in params.items()}
    save_file(tensors, path, metadata={MODEL: json.dumps(dict(described))})


def require(path: Path) -> Path:
    """The path, when there is a file.

    Raises:
        UserError: there is none.
    """
    if not path.is_file():
        raise UserError(f"model file {str(path)!r}: no such file; allowed: a model.safetensors that `fl-sim run` wrote")
    return path


def read_model(path: Path) -> nn.Module:
    """The model of a file, on the CPU, frozen in evaluation mode.

    Raises:
        UserError: no such file, not a safetensors file with a description, or parameters that do not fit it.
    """
    try:
        with safe_open(require(path), framework="pt") as stored:
            described = json.loads((stored.metadata() or {}).get(MODEL, "{}"))
            params = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"model file {str(path)!r}: {error}") from error
    name = described.pop("name", None) if isinstance(described, dict) else None
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"model file {str(path)!r}: its metadata name no model of this package, but {name!r}")
    try:
        gating = described.pop("gating", None)
        model = build(name, **described)
        if gating is not None:
            model = Gating(**gating).wrap(model, seed=0)
        if missing := snapshot(model).keys() - params.keys():
            raise ValueError(f"lacks {min(missing)!r}")
        return fill(model, params).eval().requires_grad_(False)
    except (TypeError, ValueError) as error:
        raise UserError(f"model file {str(path)!r}: {error}") from error


def fill(model: nn.Module, params: Params) -> nn.Module:
    """Load stored parameters in place; a model that was saved with channels removed is made that small first.

    Raises:
        ValueError: a shape that is not the model's.
    """
    own = snapshot(model)
    if any(value.shape != own[name].shape for name, value in params.items() if name in own):
        shrink(model, {name: value.shape for name, value in params.items()})
    return load(model, params)
