"""Weights that a run starts from: which entries of a model file fit the run's model, and which do not.

A file of another head, or of none, fills what fits; all else keeps its seeded values, and is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_sim.core.types import Params, UserError
from fl_sim.gating import Gated
from fl_sim.models.parameters import snapshot
from fl_sim.models.reparametrized import held, parts, split_name
from fl_sim.training.model_file import Stored, unwrapped

SHOWN = 4
"""Names in one line of what does not fit."""


@dataclass(frozen=True)
class Fit:
    """What of a file is in the model.

    Attributes:
        params: values by the model's names.
        lacks: entries of the model that the file does not have.
        unused: entries of the file that the model does not have.
        shapes: entry -> its shape in the file, and in the model, where the two differ.
    """

    params: Params
    lacks: tuple[str, ...]
    unused: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def lines(self) -> list[str]:
        """What does not fit, in lines for a reader; none where all fits."""
        shapes = [
            f"{name!r} has shape {here} in the file, {ours} in this run's model"
            for name, (here, ours) in self.shapes.items()
        ]
        said = [
            ("", shapes, ": not loaded, so that they start from the seed"),
            ("the file lacks ", self.lacks, ": they start from the seed"),
            ("the file also has ", self.unused, ": not used"),
        ]
        return [start + _listed(names) + end for start, names, end in said if names]


def fit(model: nn.Module, stored: Stored) -> Fit:
    """Find the file's values for a model's entries, under the model's names.

    Gates may be put on a model that was saved without, and adapters beside its weights: their own entries are then missing
    in the file, and are not among those that it lacks.

    Raises:
        UserError: nothing fits, or what fits holds NaN or infinity.
    """
    own = snapshot(model)
    names, made = _names(model, own)
    bare = isinstance(model, Gated) and not any(name.startswith("net.") for name in stored.params)
    given = unwrapped(stored.params, (n.removeprefix("net.") if bare else n for n in names), str(stored.path))
    if bare:
        given = {f"net.{name}": value for name, value in given.items()}
        made |= {name for name in own if name.startswith("net.gates.")}
    known = {name: given[name] for name in names if name in given}
    fitting = {name: value for name, value in known.items() if value.shape == own[names[name]].shape}
    shapes = {n: (tuple(v.shape), tuple(own[names[n]].shape)) for n, v in known.items() if n not in fitting}
    lacks = tuple(name for name in names if name not in known and name not in made)
    found = Fit(_with_parts(model, _renamed(fitting, names)), lacks, tuple(n for n in given if n not in names), shapes)
    if not fitting:
        raise UserError(f"{stored.path}: nothing of it fits this run's model; {'; '.join(found.lines())}")
    for name, value in fitting.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{stored.path}: {name!r} holds NaN or infinity, which is never sent")
    return found


def entries_for(model: nn.Module, stored: Stored) -> Params:
    """The file's values that fit a model's entries; raises as `fit` does."""
    return fit(model, stored).params


def _names(model: nn.Module, own: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """(name that a file has -> the model's entry, entries that no file has as the model computes weights from them)."""
    places = held(model)
    inside = tuple(place.start for place in places.values() if place.start is not None)
    made = {name for name in own if inside and name.startswith(inside)}
    back = {place.original: name for name, place in places.items()}
    return {back.get(name, name): name for name in own if name not in made}, made


def _renamed(params: Mapping[str, Tensor], names: Mapping[str, str]) -> Params:
    return {names[name]: value for name, value in params.items()}


def _with_parts(model: nn.Module, params: Params) -> Params:
    """`params` with the first values of what computes a weight, where they follow from the weight."""
    found = dict(params)
    for weight, part in parts(model).items():
        original, start = split_name(weight)
        if original in params:
            found |= {start + name: value for name, value in part.first(params[original]).items()}
    return found


def _listed(names: Iterable[str]) -> str:
    known = list(names)
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return ", ".join(known[:SHOWN]) + more
