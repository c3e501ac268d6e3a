"""Data set, split once: training, validation, test, and the server's proxy samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.core.threads import one_thread
from fl_sim.core.types import UserError
from fl_sim.data.arrays import Array, Rows, as_groups, as_inputs, as_targets, check_classes, let_go, stays_whole
from fl_sim.data.kinds import Inputs, Targets, described, input_kind, target_kind
from fl_sim.data.sampling import strata, stratified, whole_parts
from fl_sim.data.split import Split
from fl_sim.data.weights import as_weights, by_class, combined

Labels = NDArray[np.int64]
BLOCK = 1 << 21
"""Numbers of an array that stays whole that are copied at once, to measure their mean and deviation."""
AT_ONCE = 1 << 16
"""Rows of a mapped file that are read before its memory is let go."""
STATISTICS = 5000
"""Images over which the mean and deviation of each channel are measured."""


@dataclass(frozen=True)
class Data:
    """Data set, split once. The validation set may choose hyper-parameters; the test set only measures.

    Attributes:
        num_classes: outputs that a model needs: classes, tokens of the vocabulary, labels, or numbers.
        proxy: a part of the training set held by the server, disjoint from all others; None unless asked for.
        vocabulary: tokens that inputs are made of; None where inputs are no tokens.
        groups: names of the groups, by their number in `Split.groups`; empty where there are none.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    proxy: Split | None = None
    vocabulary: int | None = None
    groups: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: (channels, height, width) of an image, (features,) of a row, (T,) of tokens."""
        return tuple(self.train.shape)

    @property
    def targets(self) -> Targets | None:
        """The kind of targets; None where they are of no kind that `fl_sim.data.kinds` knows."""
        return target_kind(self.train.labels)

    def with_class_weights(self, asked: str | Sequence[float]) -> Data:
        """Weigh training samples by their class, on top of weights of their own: see `fl_sim.data.weights.by_class`.

        Raises:
            UserError: targets that are no classes, or not a number above 0 for each class.
        """
        if self.targets is not Targets.CLASSES:
            raise UserError(f"data.class_weights: targets are {described(self.train.labels)}; needed: classes")
        factors = by_class(self.train.labels.numpy(), self.num_classes, asked)
        return replace(self, train=replace(self.train, weights=combined(self.train.weights, factors)))

    @classmethod
    def of(
        cls,
        inputs: object,
        targets: object = None,
        *,
        test_inputs: object = None,
        test_targets: object = None,
        test: float | None = None,
        num_classes: int | None = None,
        vocabulary: int | None = None,
        groups: object = None,
        test_groups: object = None,
        weights: object = None,
        standardise: bool = False,
        validation: float = 0.1,
        proxy: float = 0.0,
    ) -> Data:
        """Split samples into train, validation, test and proxy, stratified by group, else by class; seed 0 always.

        Arrays, tensors on the CPU and nested lists are taken, and data frames (pandas, polars, Arrow), of which `targets`,
        `groups` and `weights` may name columns. Inputs: uint8 images (N, C, H, W), which are normalised by
        the mean and deviation of each channel; floating-point tables and signals (N, ...); integer tokens (N, ...). Targets:
        an integer each is a class, integers in the shape of token inputs are next tokens, bool (N, K) are several labels
        each, floating-point (N,) or (N, K) are numbers.

        Args:
            inputs, targets: of the training set; tokens without targets (N, T + 1) are sequences whose next tokens are learnt;
                a map-style `torch.utils.data.Dataset` of pairs has its own targets.
            test_inputs, test_targets: of the test set; None = a share of the samples tests.
            test: that share; None = 0.2.
            num_classes: of integer targets; None = as many as the training targets have.
            vocabulary: number of tokens, which inputs that are tokens need unless their targets are next tokens.
            groups, test_groups: an integer or name for each sample: its writer, user or site.
            weights: a number above 0 for each training sample, how much it counts in the loss; evaluation counts all alike.
            standardise: give numbers mean 0 and deviation 1, feature by feature (axis 1), as the training part has them.
            validation, proxy: shares of the training samples.

        Raises:
            UserError: other arrays, one shape in training and another in test, missing or infinite numbers, a class or token
                beyond what there is, or shares that leave nothing to train on.
        """
        if not (validation >= 0 and proxy >= 0 and validation + proxy < 1):
            raise UserError(f"data: validation = {validation}, proxy = {proxy}; needed: shares of 1 that leave some")
        parts = whole_parts(
            {"inputs": inputs, "targets": targets, "groups": groups, "weights": weights},
            {"inputs": test_inputs, "targets": test_targets, "groups": test_groups},
            test,
        )
        groups, test_groups, weights = (parts.get(name) for name in ("groups", "test_groups", "weights"))
        whole, rows, tested_whole, tested_rows = _inputs(parts["inputs"], parts["test_inputs"])
        made, tested = _as_many(whole, rows), _as_many(tested_whole, tested_rows)
        if made.shape[1:] != tested.shape[1:] or made.dtype != tested.dtype:
            both = f"inputs are {made.dtype} {made.shape[1:]} each, test_inputs {tested.dtype} {tested.shape[1:]}"
            raise UserError(f"data: {both}; needed: one shape and dtype")
        asked = num_classes if num_classes is not None else vocabulary
        wanted, wanted_tested = (
            as_targets(parts["targets"], made, "targets", asked),
            as_targets(parts["test_targets"], tested, "test_targets", asked),
        )
        if wanted.dtype != wanted_tested.dtype or wanted.shape[1:] != wanted_tested.shape[1:]:
            both = (
                f"targets are {wanted.dtype} {wanted.shape}, test_targets {wanted_tested.dtype} {wanted_tested.shape}"
            )
            raise UserError(f"data: {both}; needed: one kind")
        outputs = _outputs(wanted, wanted_tested, num_classes, vocabulary)
        tokens = _vocabulary(whole, tested_whole, wanted, vocabulary, outputs)
        names, of_each, of_tested = as_groups(groups, test_groups, len(made), len(tested))
        counted = None if weights is None else as_weights(weights, len(made))
        chosen = stratified(strata(wanted, of_each), validation, proxy)
        train = _stored(whole, rows, chosen[0])
        mean, std = _statistics(*train, whole, standardise=standardise)

        def split(some: tuple[Tensor, Tensor | None], theirs: Array, whose: Labels | None) -> Split:
            groups = None if whose is None else torch.from_numpy(whose)
            return Split(some[0], torch.from_numpy(theirs), mean, std, positions=some[1], groups=groups)

        def part(number: int) -> Split:
            some = train if number == 0 else _stored(whole, rows, chosen[number])
            return split(some, wanted[chosen[number]], None if of_each is None else of_each[chosen[number]])

        held = part(2) if proxy > 0 else None
        trained = part(0)
        if counted is not None:
            trained = replace(trained, weights=torch.from_numpy(as_weights(counted[chosen[0]], len(chosen[0]))))
        tests = split(_stored(tested_whole, tested_rows, None), wanted_tested, of_tested)
        return cls(trained, part(1), tests, outputs, held, tokens, names)


def _inputs(train: object, tested: object) -> tuple[Array, Labels | None, Array, Labels | None]:
    """(whole training inputs, rows of them; the same of the test set): rows are None where all are meant."""
    if isinstance(train, Rows) and isinstance(tested, Rows) and train.whole is tested.whole:
        whole = as_inputs(train.whole, "inputs")
        return whole, train.at, whole, tested.at
    return as_inputs(train, "inputs"), None, as_inputs(tested, "test_inputs"), None


def _as_many(whole: Array, rows: Labels | None) -> Array:
    """What stands for some rows of an array where only their number, shape and dtype are asked for."""
    return whole if rows is None else np.broadcast_to(whole[:1], (len(rows), *whole.shape[1:]))


def _stored(whole: Array, rows: Labels | None, chosen: Labels | None) -> tuple[Tensor, Tensor | None]:
    """Inputs of a part, and where in them its samples are: those that stay whole are not copied."""
    at = chosen if rows is None else rows if chosen is None else rows[chosen]
    if at is None:
        return torch.from_numpy(whole), None
    if stays_whole(whole):
        return torch.from_numpy(whole), torch.from_numpy(at)
    return torch.from_numpy(whole[at]), None


def _outputs(targets: Array, tested: Array, num_classes: int | None, vocabulary: int | None) -> int:
    """How many outputs a model needs, if no class is beyond them."""
    kind = target_kind(torch.from_numpy(targets[:0]))
    if kind is Targets.LABELS or kind is Targets.NUMBERS:
        outputs = int(targets.shape[1]) if targets.ndim == 2 else 1
        if num_classes not in (None, outputs):
            raise UserError(f"data: num_classes = {num_classes}, but targets are {targets.dtype} {targets.shape}")
        return outputs
    known = num_classes if kind is Targets.CLASSES or num_classes is not None else vocabulary
    if known is None and not targets.size:
        raise UserError("data: no targets; needed: some, or num_classes")
    outputs = int(targets.max()) + 1 if known is None else known
    check_classes("data", outputs)
    for name, some in (("", targets), ("test_", tested)):
        if kind is Targets.TOKENS:
            _require_within(f"{name}targets", some, outputs)
        elif some.size and not 0 <= int(some.min()) <= int(some.max()) < outputs:
            hint = "; numbers to predict are floating-point" if num_classes is None else ""
            found = f"found {some.min()} to {some.max()}{hint}"
            raise UserError(f"data: {name}targets: classes go from 0 to {outputs - 1}; {found}")
    return int(outputs)


def _require_within(name: str, tokens: Array, vocabulary: int) -> None:
    """Complain of the first token that is beyond the vocabulary. Raises UserError."""
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        wrong = np.argwhere((numbers := cast(Labels, tokens)) != numbers.clip(0, vocabulary - 1))[0]
        raise UserError(
            f"data: {name}: token {tokens[tuple(wrong)]} in sample {wrong[0]} (from 0) is beyond the vocabulary of {vocabulary}; "
            f"allowed: 0 to {vocabulary - 1}"
        )


def _vocabulary(inputs: Array, tested: Array, targets: Array, vocabulary: int | None, outputs: int) -> int | None:
    """The number of tokens that inputs are made of, if all are among them; None for inputs that are no tokens."""
    if inputs.dtype != np.int64:
        if vocabulary is not None:
            raise UserError(f"data: vocabulary = {vocabulary}, but inputs are {inputs.dtype}; needed: integers")
        return None
    if vocabulary is None and targets.ndim != 2:
        raise UserError(
            "data: inputs are tokens (integers) and vocabulary is not given; needed: the number of tokens; images are uint8"
        )
    known = outputs if vocabulary is None else vocabulary
    check_classes("data", known, "vocabulary")
    for name, some in (("", inputs), ("test_", tested)):
        _require_within(f"{name}inputs", some, known)
    return int(known)


@one_thread()
def _statistics(
    stored: Tensor, positions: Tensor | None, whole: Array, *, standardise: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Mean and deviation of each channel of images, or of each feature of numbers where that is asked for.

    They are part of the data's hash, which a run and the look at a finished one must find alike.
    """
    kind = input_kind(stored)
    count = len(stored) if positions is None else len(positions)
    if kind is Inputs.IMAGES:
        step = 1 if count <= STATISTICS else max(1, count // STATISTICS)
        few = stored[::step] if positions is None else stored[positions[::step]]
        level = few.float().div_(255)
        return level.mean(dim=(0, 2, 3)), level.std(dim=(0, 2, 3)).clamp_(min=1e-3)
    if not standardise:
        return None, None
    if kind is Inputs.TOKENS:
        raise UserError("data: standardise = True, but inputs are tokens; allowed: numbers")
    if positions is None:
        return _spread(stored)
    width = max(1, BLOCK * stored.shape[1] // (count * stored.shape[1:].numel()))
    some = [_spread(_chosen_rows(block, positions, whole)) for block in stored.split(width, dim=1)]
    return torch.cat([mean for mean, _ in some]), torch.cat([std for _, std in some])


def _chosen_rows(stored: Tensor, positions: Tensor, whole: Array) -> Tensor:
    """`stored[positions]` of some features of an array; positions ascend."""
    rows = torch.empty(len(positions), *stored.shape[1:])
    for start in range(0, len(stored), AT_ONCE):
        low, high = torch.searchsorted(positions, torch.tensor([start, start + AT_ONCE])).tolist()
        if low < high:
            torch.index_select(stored, 0, positions[low:high], out=rows[low:high])
            let_go(whole)
    return rows


def _spread(train: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature."""
    axes = (0, *range(2, train.dim()))
    lowest, highest, std = train.amin(dim=axes), train.amax(dim=axes), train.std(dim=axes)
    same = lowest == highest
    # A feature that is always the same becomes 0: rounding must leave neither a mean beside it nor a deviation.
    return torch.where(same, lowest, train.mean(dim=axes)), torch.where(same, 1.0, std)
