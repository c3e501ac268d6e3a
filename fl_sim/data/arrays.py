"""Arrays of a user's as inputs, targets and groups of samples: taken as they are meant, or refused in one line."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.core.errors import in_one_line
from fl_sim.core.types import UserError
from fl_sim.data.kinds import Inputs, Targets
from fl_sim.data.pictures import is_picture

Array = NDArray[np.generic]
Labels = NDArray[np.int64]
MOST_CLASSES = 1 << 16
"""A label above is a damaged file, not a class: models have an output for each."""
NEEDED = "; ".join(kind.value for kind in Inputs)
COARSE = 0.01
"""Rounding to float32 may move numbers by this share of their range."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an array that lies in a mapped file; they are not copied, so that all parts share the file's memory."""

    whole: Array
    at: Labels


@dataclass(frozen=True, eq=False)
class Numbered:
    """Groups of samples as numbers int64 (N,), with the names of all groups by number."""

    numbers: Labels
    names: tuple[str, ...]


class Unshared(np.ndarray[tuple[int, ...], np.dtype[np.generic]]):
    """An array in memory that nobody but `Data` holds: its parts are positions in it, and no copies."""


class Cached(np.memmap[tuple[int, ...], np.dtype[np.generic]]):
    """An array of the data cache, mapped: nobody has written to it."""


LEAST_MAPPED = 1 << 25
"""Bytes from which on an array stays in its mapped file: smaller ones are copied, which takes no time."""


def stays_whole(array: Array) -> bool:
    """Whether an array is large, and its parts are to be positions in it: in a mapped file, or nobody else's."""
    return array.nbytes >= LEAST_MAPPED and _base(array, (np.memmap, Unshared)) is not None


def let_go(array: Array) -> None:
    """Let the memory go that a mapped array of the cache took while it was read; the system still has the file's pages."""
    base = _base(array, (Cached,))
    mapped: mmap.mmap | None = getattr(base, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _base(array: Array, kinds: tuple[type[np.ndarray], ...]) -> object:
    """The array of these kinds that an array is or is a view of; None where it is of none."""
    base: object = array
    while isinstance(base, np.ndarray) and not isinstance(base, kinds):
        base = base.base
    return base if isinstance(base, kinds) else None


def check_classes(where: str, number: object, what: str = "num_classes") -> None:
    """Complain of a number of classes or tokens that is none. Raises UserError."""
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not (whole and 1 <= cast(int, number) <= MOST_CLASSES):
        raise UserError(f"{where}: {what} = {number!r}; needed: a whole number from 1 to {MOST_CLASSES}")


def as_array(value: object, name: str) -> Array:
    """An array of a user's value, in this machine's byte order.

    Raises:
        UserError: it is none, some values are masked, or it is a picture or a list of them, which only a Dataset's samples are.
    """
    if _holds_pictures(value):
        kind = "a picture of Pillow" if is_picture(value) else f"a {type(value).__name__} of pictures of Pillow"
        raise UserError(f"data: {name} are {kind}; needed: an array, or a Dataset of pairs (picture, target)")
    if np.ma.is_masked(value):
        raise UserError(
            f"data: {name} hold masked values, which NumPy would show; fill them in, or leave the samples out"
        )
    if (
        isinstance(value, Tensor) and value.dtype == torch.bfloat16
    ):  # which NumPy does not know, and float32 holds exactly
        value = value.float()
    try:
        found = np.asarray(value)
        return found.astype(found.dtype.newbyteorder("="), copy=False)  # PyTorch takes no other
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors of a GPU or with gradients
        raise UserError(f"data: {name} are no array: {in_one_line(error)}") from error


def _holds_pictures(value: object) -> bool:
    """Whether NumPy would read pictures of Pillow by itself: as palette numbers, or with their channels last."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, np.ndarray) and value.dtype == object and value.size:
        value = value.flat[0]
    return is_picture(value)


def as_inputs(value: object, name: str) -> Array:
    """uint8 images, float32 numbers or int64 tokens, (N, ...), C-contiguous.

    Raises:
        UserError: another dtype or shape, or numbers that are missing or infinite.
    """
    given = as_array(value, name)
    kinds = {np.uint8: given.ndim == 4, np.floating: given.ndim > 1, np.integer: given.ndim > 1}
    fits = next((right for kind, right in kinds.items() if np.issubdtype(given.dtype, kind)), False)
    if not fits or 0 in given.shape:
        raise UserError(f"data: {name} are {given.dtype} {given.shape}; needed: {NEEDED}")
    if given.dtype == np.uint8:
        return np.require(given, np.uint8, ["C", "W"])  # PyTorch takes no mirrored views, and warns of read-only ones
    return _finite(given, name) if np.issubdtype(given.dtype, np.floating) else np.require(given, np.int64, ["C", "W"])


def _finite(given: Array, name: str) -> Array:
    """float32 numbers that are there."""
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
        numbers = np.require(given, np.float32, ["C", "W"])
    require_finite(numbers, name)
    check_rounding(f"data: {name}", given, numbers)
    return numbers


def require_finite(numbers: Array, name: str) -> None:
    """Complain of the first sample with a number that is missing, infinite, or beyond float32. Raises UserError."""
    for start in range(0, len(numbers), 1 << 16):  # some rows at a time: a mapped file's memory is let go
        with np.errstate(over="ignore"):
            piece = np.isfinite(numbers[start : start + (1 << 16)].astype(np.float32, copy=False))
        if not piece.all():
            at = int(np.argwhere(~piece)[0][0]) + start
            raise UserError(
                f"data: {name} hold NaN or infinity, first in sample {at} (from 0); needed: finite numbers of float32"
            )
        let_go(numbers)


def check_rounding(where: str, given: Array, numbers: NDArray[np.float32]) -> None:
    """Refuse numbers that lie so close together, far from 0, that float32 does not tell them apart, such as times of one hour.

    Args:
        where: start of the error's line.
        given: real numbers or integers (N, ...); checked feature by feature (axis 1).
        numbers: the same, rounded.

    Raises:
        UserError: rounding moves a feature by more than `COARSE` of its range.
    """
    if given.dtype.kind not in "iuf" or given.dtype.itemsize < numbers.dtype.itemsize or given.dtype == numbers.dtype:
        return
    axes = (0, *range(2, given.ndim))
    close = too_close(given.min(axis=axes), given.max(axis=axes))
    for feature in np.flatnonzero(close):
        one, rounded = (given, numbers) if given.ndim == 1 else (given[:, feature], numbers[:, feature])
        exact, kept = _above_lowest(one), rounded.astype(np.float64) - float(rounded.flat[int(one.argmin())])
        if np.abs(kept - exact).max() > COARSE * exact.max():
            which = "" if given.ndim == 1 else f", feature {feature},"
            raise UserError(
                f"{where}{which} go from {one.min()} to {one.max()}: float32 does not tell these numbers apart; "
                "subtract the smallest first"
            )


def too_close(low: Array, high: Array) -> NDArray[np.bool_]:
    """Whether float32 may not tell apart the numbers of features (K,) that go from `low` to `high`; their dtype is the numbers'."""
    if low.dtype.kind not in "iuf" or low.dtype.itemsize < 4 or low.dtype == np.float32:
        return np.zeros(1, dtype=bool)
    step = np.spacing(np.maximum(np.abs(low.astype(np.float32)), np.abs(high.astype(np.float32))))
    return np.atleast_1d((low != high) & (step > COARSE * (high.astype(np.float64) - low.astype(np.float64))))


def _above_lowest(numbers: Array) -> NDArray[np.float64]:
    """Distances from the smallest number; those of integers are exact before they are float64."""
    above = numbers - numbers.min()
    exact = above.astype(np.uint64) if above.dtype.kind == "i" else above  # what wrapped around is right again
    return cast("NDArray[np.float64]", exact.astype(np.float64))


def as_targets(value: object, inputs: Array, name: str, asked: object) -> Array:
    """Targets of so many inputs as one of the kinds of `Targets`; `asked` is the number of classes, where it was given.

    Raises:
        UserError: of no kind, not one for each input, or numbers where classes were asked for.
    """
    targets, samples = as_array(value, name), len(inputs)
    is_number = np.issubdtype(targets.dtype, np.floating)
    if is_number and asked is None and targets.shape in ((samples,), (samples, *targets.shape[1:2])) and targets.size:
        return _finite(targets, name)
    if targets.dtype == np.bool_ and targets.ndim == 2 and len(targets) == samples and targets.size:
        return np.require(targets, np.bool_, ["C", "W"])
    is_class = targets.shape == (samples,)
    is_next = targets.shape == inputs.shape and inputs.dtype == np.int64 and inputs.ndim == 2
    if np.issubdtype(targets.dtype, np.integer) and (is_class or is_next):
        return np.require(targets, np.int64, ["C", "W"])
    other = "" if asked is None and is_class else f"; other kinds: {'; '.join(k.value for k in Targets)}"
    raise UserError(
        f"data: {name} are {targets.dtype} {targets.shape}; needed: an integer for each of {samples}{other}"
    )


def as_groups(
    groups: object, tested: object, samples: int, test_samples: int
) -> tuple[tuple[str, ...], Labels | None, Labels | None]:
    """(names of the groups, number of each training sample's group, number of each test sample's); None where not given.

    Raises:
        UserError: not an integer or a name for each sample.
    """
    if isinstance(groups, Numbered):
        return groups.names, groups.numbers, tested.numbers if isinstance(tested, Numbered) else None
    if groups is None:
        if tested is not None:
            raise UserError("data: test_groups without groups; needed: both, or groups alone")
        return (), None, None
    every = [_names(groups, samples, "groups")]
    every += [] if tested is None else [_names(tested, test_samples, "test_groups")]
    if len({array.dtype.kind == "U" for array in every}) > 1:
        raise UserError(f"data: groups are {every[0].dtype}, test_groups {every[1].dtype}; needed: one kind")
    names, numbers = np.unique(np.concatenate(every), return_inverse=True)
    numbers = numbers.astype(np.int64)
    return tuple(map(str, names)), numbers[:samples], None if tested is None else numbers[samples:]


def _names(value: object, samples: int, name: str) -> Array:
    found = as_array(value, name)
    if found.dtype == object and all(isinstance(one, str) for one in found.flat):
        found = found.astype(str)
    if found.shape != (samples,) or found.dtype.kind not in "Uiu":
        raise UserError(
            f"data: {name} are {found.dtype} {found.shape}; needed: an integer or a name for each of {samples}"
        )
    return found
