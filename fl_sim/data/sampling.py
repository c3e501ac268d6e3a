"""Shares of samples that validate, test, or are the server's: drawn from each group alike, else from each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch

from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import UserError
from fl_sim.data.arrays import Array, Labels, Rows, as_array, require_finite, stays_whole
from fl_sim.data.kinds import Targets, target_kind
from fl_sim.data.torch_dataset import is_dataset, read_dataset

TEST = 0.2
"""Share of the samples that tests, where nobody says another."""


def strata(targets: Array, groups: Labels | None) -> Labels:
    """Number what shares are taken of, each alike: groups, else classes, else everything."""
    if groups is not None:
        return groups
    is_class = target_kind(torch.from_numpy(targets[:0].copy())) is Targets.CLASSES
    return cast(Labels, targets) if is_class else np.zeros(len(targets), dtype=np.int64)


def stratified(strata: Labels, validation: float, proxy: float) -> list[Labels]:
    """Draw samples from each stratum alike: sorted positions of those to train on, held out, and of the server's."""
    rng = numpy_generator(0, Purpose.DATA)
    parts: tuple[list[Labels], ...] = ([], [], [])
    for members in _members(strata):
        drawn = rng.permutation(members)
        first, second = round(validation * len(drawn)), round((validation + proxy) * len(drawn))
        for part, taken in zip(parts, (drawn[second:], drawn[:first], drawn[first:second]), strict=True):
            part.append(taken)
    return [np.sort(np.concatenate(part)) for part in parts]


def _members(strata: Labels) -> Sequence[Labels]:
    """Positions of each stratum's samples, ascending, in the order of the strata."""
    order = np.argsort(strata, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(strata[order])) + 1)


def with_test(parts: Mapping[str, Array], test: float | None) -> dict[str, Array | Rows]:
    """The arrays of a training and a test set; a share of the samples is the test set where there is none.

    Inputs that stay whole are rows of one array.

    Raises:
        UserError: a share of data that have a test set, or one that leaves no samples of a part; numbers that are not finite.
    """
    if "test_inputs" in parts:
        if test is not None:
            raise UserError(f"data.test = {test:g}: the source has a test set of its own; leave data.test out")
        return dict(parts)
    for name in ("inputs", "targets"):  # before the split: a sample's number is that of the array that was given
        if np.issubdtype(parts[name].dtype, np.floating) and not stays_whole(parts[name]):
            require_finite(parts[name], name)
    targets, groups = parts["targets"], parts.get("groups")
    if groups is not None and groups.dtype != np.int64:
        groups = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    rest, held, _ = stratified(strata(targets, cast("Labels | None", groups)), TEST if test is None else test, 0.0)
    for rows, part, share in ((held, "test", "larger"), (rest, "training", "smaller")):
        if not len(rows):
            left = f"data.test: {len(targets)} rows leave none for the {part} set"
            raise UserError(f"{left}; needed: more rows, or a {share} share")
    return {
        f"{part}{name}": Rows(array, rows) if name == "inputs" and stays_whole(array) else array[rows]
        for part, rows in (("", rest), ("test_", held))
        for name, array in parts.items()
    }


def whole_parts(train: Mapping[str, object], tested: Mapping[str, object], test: float | None) -> dict[str, object]:
    """What `Data.of` was given, as arrays of a training and a test set: frames as their columns, next tokens cut off.

    Raises:
        UserError: as `with_test` does; half of a test set; no targets where inputs are no tokens.
    """
    from fl_sim.data.frame import is_frame, numbered, read_frame  # here: it reads tables, as sources do

    made = dict(train)
    if is_frame(train["inputs"]):
        made = read_frame(train["inputs"], train["targets"], train["groups"], train["weights"])
    elif is_dataset(train["inputs"]) and train["targets"] is None:
        made |= read_dataset(train["inputs"], "inputs")
    elif train["targets"] is None:
        made |= _next_tokens(train["inputs"], "inputs")
    parts = {name: value for name, value in made.items() if value is not None}
    columns = cast("Sequence[str] | None", parts.pop("columns", None))
    if tested["inputs"] is not None:
        ours = dict(tested)
        if is_frame(tested["inputs"]):
            answers, groups = (tested[n] if tested[n] is not None else train[n] for n in ("targets", "groups"))
            ours = read_frame(tested["inputs"], answers, groups, None, columns)
        elif is_dataset(tested["inputs"]) and tested["targets"] is None:
            ours |= read_dataset(tested["inputs"], "test_inputs")
        elif tested["targets"] is None:
            ours |= _next_tokens(tested["inputs"], "test_inputs")
        if test is not None:
            raise UserError(f"data: test = {test:g}, and test_inputs are given; needed: one of both")
        found = {f"test_{name}": value for name, value in ours.items() if value is not None and name != "columns"}
        return numbered(parts | found)
    if beside := [name for name in ("targets", "groups") if tested[name] is not None]:
        raise UserError(f"data: test_{beside[0]} without test_inputs; needed: both, or neither")
    given = numbered(parts)
    if test is not None and not 0 < test < 1:
        raise UserError(f"data: test = {test}; needed: a share between 0 and 1")
    arrays = {name: as_array(value, name) for name, value in given.items()}
    if single := [name for name, array in arrays.items() if not array.ndim]:
        told = f"a {type(given[single[0]]).__name__}"
        raise UserError(
            f"data: {single[0]} are {told}; needed: an array or a frame (names of columns only beside a frame)"
        )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(
            f"data: {', '.join(f'{count} {name}' for name, count in lengths.items())}; needed: as many of each"
        )
    return dict(with_test(arrays, test))


def _next_tokens(inputs: object, name: str) -> dict[str, object]:
    """Sequences of T + 1 tokens as T inputs, and the T that follow each."""
    tokens = as_array(inputs, name)
    if tokens.dtype.kind not in "iu" or tokens.dtype == np.uint8 or tokens.ndim != 2 or tokens.shape[1] < 2:
        raise UserError(
            f"data: {name} are {tokens.dtype} {tokens.shape} and there are no targets; needed: targets, or tokens (N, T + 1)"
        )
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
