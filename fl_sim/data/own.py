"""A user's own data source, `module:function`: called once, and what it returns is checked before anything trains on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.lookup import accepts, imported
from fl_sim.core.process_state import unchanged_settings
from fl_sim.core.types import UserError
from fl_sim.data.arrays import NEEDED, check_classes
from fl_sim.data.dataset import Data
from fl_sim.data.kinds import Inputs, Targets, described, input_kind, target_kind
from fl_sim.data.split import Split
from fl_sim.data.weights import as_weights

DEFAULTS: Mapping[str, float] = {"validation": 0.1, "proxy": 0.0}
"""Shares of the config that nobody may have written: an own source may have others, which the log then says."""
SLACK = 0.005
"""By how much a share may differ from what is asked, beside a sample of each class."""
UNLABELLED = -1
PARTS = ("train", "validation", "test", "proxy")


def is_own(source: str) -> bool:
    """Whether a source is a user's function, and no name, file or folder."""
    return ":" in source and not Path(source).exists()


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
        with unchanged_settings():
            made = make(**taken)
    except UserError:
        raise
    except USERS_OWN as error:  # the user's own function, whatever it raises
        raise UserError(f"{where}: it raised {error_line(error)}") from error
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
        if abs(got - share) <= SLACK + max(data.num_classes, len(data.groups)) / samples:
            continue
        if share != DEFAULTS[name]:
            raise UserError(
                f"{where}: data.{name} = {share:g}, but the function returned {got:.3g} of its samples for {name}; "
                f"let it take {name!r} as an argument, or leave data.{name} out"
            )
        notes.append(f"holds {got:.3g} of its samples for {name}, not data.{name} = {share:g}")
    return notes


def checked(where: str, made: object) -> Data:
    """The data of a user, with int64 classes.

    Raises:
        UserError: not `Data`, or a part that is not what `Split` says.
    """
    if not isinstance(made, Data):
        raise UserError(f"{where}: returned {type(made).__name__}, not fl_sim.data.Data")
    check_classes(where, made.num_classes)
    outputs = int(made.num_classes)
    parts = {name: part for name in PARTS if (part := getattr(made, name)) is not None or name != "proxy"}
    splits = {
        name: _split(f"{where}: {name}", part, made, UNLABELLED if name == "proxy" else 0)
        for name, part in parts.items()
    }
    train = splits["train"]
    if not len(train):
        raise UserError(f"{where}: train holds no samples")
    for name, part in splits.items():
        if part.shape != train.shape or part.stored.dtype != train.stored.dtype:
            both = f"{_each(train)} in train and {_each(part)} in {name}"
            raise UserError(f"{where}: inputs of {both}; needed: one shape and dtype")
        if target_kind(part.labels) is not target_kind(train.labels):
            raise UserError(
                f"{where}: labels of two kinds, {described(train.labels)} in train and {described(part.labels)} in {name}"
            )
    vocabulary = made.vocabulary
    if train.stored.dtype == torch.int64 and vocabulary is None:
        vocabulary = outputs if target_kind(train.labels) is Targets.TOKENS else None
        check_classes(where, vocabulary, "vocabulary")
    for name, part in splits.items():
        if vocabulary is not None:
            _within(f"{where}: {name} inputs", part.stored, 0, vocabulary)
    return replace(
        made,
        train=train,
        validation=splits["validation"],
        test=splits["test"],
        proxy=splits.get("proxy"),
        num_classes=outputs,
        vocabulary=vocabulary,
    )


def _each(split: Split) -> str:
    return f"{str(split.stored.dtype).removeprefix('torch.')} {tuple(split.shape)}"


def _split(where: str, split: object, data: Data, lowest: int) -> Split:
    """A split whose tensors are what its fields say."""
    if not isinstance(split, Split):
        raise UserError(f"{where} is of type {type(split).__name__}; needed: fl_sim.data.Split")
    for name in ("stored", "labels", "mean", "std", "positions", "groups", "weights"):
        value: object = getattr(split, name)
        if value is None and name not in ("stored", "labels"):
            continue
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            kind = value.device if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{where}.{name} is of {kind}; needed: a torch.Tensor on the CPU")
    if split.augment is not None:
        raise UserError(f"{where}.augment is set; augmentation is chosen by data.augment")
    kind_of_inputs = input_kind(split.stored)
    if kind_of_inputs is None or 0 in split.shape:
        raise UserError(f"{where} inputs are {described(split.stored)}; needed: {NEEDED}")
    positions = _positions(where, split)
    mean, std = _normalisation(where, split, kind_of_inputs)
    return replace(
        split,
        labels=_targets(where, split.labels, data, lowest),
        positions=positions,
        mean=mean,
        std=std,
        groups=_groups(where, split, data),
        weights=None
        if split.weights is None
        else torch.from_numpy(as_weights(split.weights, len(split), f"{where}.weights")),
    )


def _targets(where: str, labels: Tensor, data: Data, lowest: int) -> Tensor:
    """Targets of a kind, within the number of outputs; integers of any width become int64."""
    if labels.dim() in (1, 2) and not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        labels = labels.long()
    kind = target_kind(labels)
    if kind is None:
        raise UserError(f"{where}.labels are {described(labels)}; needed: {'; '.join(k.value for k in Targets)}")
    if kind in (Targets.CLASSES, Targets.TOKENS):
        _within(f"{where}.labels", labels, lowest, data.num_classes)
    elif (outputs := labels.shape[1] if labels.dim() == 2 else 1) != data.num_classes:
        raise UserError(f"{where}.labels are {described(labels)}, num_classes = {data.num_classes}; needed: {outputs}")
    if kind is Targets.NUMBERS and not labels.isfinite().all():
        raise UserError(f"{where}.labels hold NaN or infinity")
    return labels


def _within(where: str, values: Tensor, lowest: int, above: int) -> None:
    if values.numel() and not lowest <= int(values.min()) <= int(values.max()) < above:
        found = f"go from {int(values.min())} to {int(values.max())}"
        raise UserError(f"{where} {found}; needed: {lowest} to {above - 1}")


def _normalisation(where: str, split: Split, kind: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Mean and deviation, float32: both or neither, one for each channel or feature; images have them, tokens do not."""
    if kind is Inputs.IMAGES and (split.mean is None or split.std is None):
        raise UserError(f"{where}: images without mean and std; needed: both, one number a channel, for images in 0..1")
    if kind is Inputs.TOKENS and (split.mean is not None or split.std is not None):
        raise UserError(f"{where}: tokens are not normalised; needed: mean = None, std = None")
    if (split.mean is None) != (split.std is None):
        raise UserError(f"{where}: mean or std alone; needed: both, or neither")
    for name, channel in (("mean", split.mean), ("std", split.std)):
        if channel is None:
            continue
        fits = channel.shape == split.stored.shape[1:2] and channel.is_floating_point() and channel.isfinite().all()
        if not fits or (name == "std" and (channel <= 0).any()):
            unit = "for images in 0..1" if kind is Inputs.IMAGES else "in the unit of the inputs"
            needed = f"{split.stored.shape[1]} finite numbers, one a channel, {unit}"
            raise UserError(
                f"{where}.{name} is {described(channel)}; needed: {needed}{', above 0' if name == 'std' else ''}"
            )
    return tuple(None if channel is None else channel.float() for channel in (split.mean, split.std))  # type: ignore[return-value]


def _positions(where: str, split: Split) -> Tensor | None:
    """The positions of the samples, int64; there are as many labels as positions, or as inputs."""
    count, positions = len(split.stored), None
    if split.positions is not None:
        positions = _integers(f"{where}.positions", split.positions)
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < count:
            raise UserError(f"{where}.positions leave the {count} inputs")
        count = len(positions)
    if split.labels.shape[:1] != (count,):
        raise UserError(f"{where}.labels are {described(split.labels)}; needed: a target for each of {count} inputs")
    return positions


def _groups(where: str, split: Split, data: Data) -> Tensor | None:
    """The number of each sample's group, int64, within the names that the data has."""
    if split.groups is None:
        return None
    groups = _integers(f"{where}.groups", split.groups)
    if len(groups) != len(split):
        raise UserError(f"{where}.groups are {described(groups)}; needed: one for each of {len(split)} samples")
    if not data.groups:
        raise UserError(f"{where}.groups are set, but Data.groups holds no names; needed: a name for each group")
    _within(f"{where}.groups", groups, 0, len(data.groups))
    return groups


def _integers(where: str, values: Tensor) -> Tensor:
    """int64 (N,)."""
    if values.dim() != 1 or values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise UserError(f"{where} are {described(values)}; needed: one integer for each sample")
    return values.long()
