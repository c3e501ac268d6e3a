"""A user's own data source, `module:function`: called once, and what it returns is checked before anything trains on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fl_sim.core.errors import told
from fl_sim.core.lookup import accepts, imported
from fl_sim.core.types import UserError
from fl_sim.data.dataset import NEEDED, Data, check_classes, levels
from fl_sim.data.split import Split

DEFAULTS: Mapping[str, float] = {"validation": 0.1, "proxy": 0.0}
"""Shares of the config that nobody may have written: an own source may have others, which the log then says."""
SLACK = 0.005
"""By how much a share may differ from what is asked, beside a sample of each class."""
UNLABELLED = -1


def load_own(path: str, *, validation: float, proxy: float) -> tuple[Data, list[str]]:
    """Call the function behind an import path, with the shares that it takes: `validation`, `proxy`, both or none.

    Returns:
        its data, checked; and notes on shares that it chose itself.

    Raises:
        UserError: no such function, it raised, it returned no such data, or data with other shares than the config's.
    """
    where = f"data.source = {path!r}"
    make = cast("Callable[..., object]", imported("data.source = ", path))
    asked = {"validation": validation, "proxy": proxy}
    taken = {name: share for name, share in asked.items() if name in _parameters(make)}
    accepts(where, make, **taken)
    try:
        made = make(**taken)
    except UserError:
        raise
    except Exception as error:  # the user's own function, whatever it raises
        raise UserError(f"{where}: it raised {told(error)}") from error
    data = checked(where, made)
    return data, _check_shares(where, data, asked)


def _parameters(function: Callable[..., object]) -> list[str]:
    """Names of what can be given by name."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # built in: it says nothing of itself
        return []
    return [name for name, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _check_shares(where: str, data: Data, asked: Mapping[str, float]) -> list[str]:
    """The data hold the shares of the config; others are noted where the config has its default, and refused elsewhere."""
    held = {"validation": len(data.validation), "proxy": len(data.proxy) if data.proxy else 0}
    samples = len(data.train) + sum(held.values())
    notes = []
    for name, share in asked.items():
        got = held[name] / samples
        if abs(got - share) <= SLACK + data.num_classes / samples:
            continue
        if share != DEFAULTS[name]:
            raise UserError(
                f"{where}: data.{name} = {share:g}, but the function returned {got:.3g} of its samples for {name}; "
                f"let it take {name!r} as an argument, or leave data.{name} out"
            )
        notes.append(f"holds {got:.3g} of its samples for {name}, not data.{name} = {share:g}")
    return notes


def checked(where: str, made: object) -> Data:
    """The data of a user, with int64 labels.

    Raises:
        UserError: not `Data`, or a part that is not what `Split` says.
    """
    if not isinstance(made, Data):
        raise UserError(f"{where}: returned {type(made).__name__}, not fl_sim.data.Data")
    check_classes(where, made.num_classes)
    classes = int(made.num_classes)
    train = _split(f"{where}: train", made.train, classes)
    validation = _split(f"{where}: validation", made.validation, classes)
    test = _split(f"{where}: test", made.test, classes)
    proxy = None if made.proxy is None else _split(f"{where}: proxy", made.proxy, classes, lowest=UNLABELLED)
    if not len(train):
        raise UserError(f"{where}: train holds no samples")
    for name, part in (("validation", validation), ("test", test), ("proxy", proxy)):
        if part is not None and part.shape != train.shape:
            shapes = f"{tuple(train.shape)} in train and {tuple(part.shape)} in {name}"
            raise UserError(f"{where}: images of {shapes}; needed: one (channels, height, width)")
    return Data(train, validation, test, classes, proxy)


def _split(where: str, split: object, num_classes: int, lowest: int = 0) -> Split:
    """A split whose tensors are what its fields say."""
    if not isinstance(split, Split):
        raise UserError(f"{where} is of type {type(split).__name__}; needed: fl_sim.data.Split")
    for name in ("stored", "labels", "mean", "std", "positions"):
        value: object = getattr(split, name)
        if name == "positions" and value is None:
            continue
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            kind = value.device if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{where}.{name} is of {kind}; needed: a torch.Tensor on the CPU")
    if split.augment is not None:
        raise UserError(f"{where}.augment is set; augmentation is chosen by data.augment")
    _check_images(where, split.stored)
    positions = _positions(where, split)
    for name, channel in (("mean", split.mean), ("std", split.std)):
        fits = channel.shape == split.stored.shape[1:2] and channel.is_floating_point() and channel.isfinite().all()
        if not fits or (name == "std" and (channel <= 0).any()):
            needed = f"{split.stored.shape[1]} finite numbers, one a channel, for images in 0..1"
            raise UserError(
                f"{where}.{name} is {_kind(channel)}; needed: {needed}{', above 0' if name == 'std' else ''}"
            )
    labels = _integers(f"{where}.labels", split.labels)
    if len(labels) and not lowest <= int(labels.min()) <= int(labels.max()) < num_classes:
        found = f"go from {int(labels.min())} to {int(labels.max())}"
        raise UserError(f"{where}.labels {found}; needed: {lowest} to {num_classes - 1}")
    return replace(split, labels=labels, positions=positions, mean=split.mean.float(), std=split.std.float())


def _check_images(where: str, stored: Tensor) -> None:
    if stored.dtype != torch.uint8 or stored.dim() != 4 or 0 in stored.shape[1:]:
        fractions = stored.is_floating_point() and stored.numel()
        hint = levels(float(stored.min()), float(stored.max())) if fractions else ""
        raise UserError(f"{where} images are {_kind(stored)}; needed: {NEEDED}{hint}")


def _positions(where: str, split: Split) -> Tensor | None:
    """The positions of the samples, int64; there are as many labels as positions, or as images."""
    count, positions = len(split.stored), None
    if split.positions is not None:
        positions = _integers(f"{where}.positions", split.positions)
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < count:
            raise UserError(f"{where}.positions leave the {count} images")
        count = len(positions)
    if split.labels.shape != (count,):
        raise UserError(f"{where}.labels are {_kind(split.labels)}; needed: an integer for each of {count} images")
    return positions


def _integers(where: str, values: Tensor) -> Tensor:
    """int64 (N,)."""
    if values.dim() != 1 or values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise UserError(f"{where} are {_kind(values)}; needed: one integer for each sample")
    return values.long()


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
