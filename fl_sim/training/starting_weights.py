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
from fl_sim.models.content import digest_of
from fl_sim.models.parameters import FLOATS, constants, snapshot
from fl_sim.models.reparametrized import held, parts, split_name
from fl_sim.training.model_file import Stored, unwrapped

NOTHING: Mapping[str, str] = {}
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
        constants: buffers that training leaves alone and whose values in the file are not those of the builder.
    """

    params: Params
    lacks: tuple[str, ...]
    unused: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    constants: tuple[str, ...] = ()

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
            ("the file has other values than the builder in ", self.constants, ": the file's are used, and sent once"),
        ]
        return [start + _listed(names) + end for start, names, end in said if names]


def fit(model: nn.Module, stored: Stored, built: Mapping[str, str] = NOTHING) -> Fit:
    """Find the file's values for a model's entries, under the model's names.

    Gates may be put on a model that was saved without, and adapters beside its weights: their own entries are then missing
    in the file, and are not among those that it lacks.

    Args:
        model: the run's model.
        stored: the file.
        built: hashes of the constants that the builder made (`models.repeatable.contents_of`), where the model may hold those
            of the file already.

    Raises:
        UserError: nothing fits, what fits holds NaN or infinity, or the file has other values of a constant than the builder
            and they are no floating-point numbers that can be sent.
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
    fixed = constants(model)
    others = {
        n: given[n]
        for n, value in fixed.items()
        if n in given and _differs(given[n], value, built.get(n.removeprefix("net.")))
    }
    shapes |= {n: (tuple(v.shape), tuple(fixed[n].shape)) for n, v in others.items() if v.shape != fixed[n].shape}
    others = {name: value for name, value in others.items() if name not in shapes}
    unused = tuple(name for name in given if name not in names and name not in fixed)
    params = _with_parts(model, _renamed(fitting, names)) | others
    found = Fit(params, lacks, unused, shapes, tuple(others))
    for name in others:
        if fixed[name].dtype not in FLOATS:
            raise UserError(
                f"{stored.path}: {name!r} is {str(fixed[name].dtype).removeprefix('torch.')} and has other values than the "
                "builder gives; allowed where a file has its own: float32, float16, bfloat16"
            )
    if not fitting:
        raise UserError(f"{stored.path}: nothing of it fits this run's model; {'; '.join(found.lines())}")
    for name, value in {**fitting, **others}.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{stored.path}: {name!r} holds NaN or infinity, which is never sent")
    return found


def entries_for(model: nn.Module, stored: Stored, built: Mapping[str, str] = NOTHING) -> Params:
    """The file's values that fit a model's entries; arguments and exceptions are those of `fit`."""
    return fit(model, stored, built).params


def _differs(given: Tensor, own: Tensor, built: str | None) -> bool:
    return given.shape != own.shape or digest_of(given.to(own.dtype)) != (digest_of(own) if built is None else built)


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
