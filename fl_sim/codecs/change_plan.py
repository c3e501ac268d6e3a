"""Plans of float32 changes: what both ends need beside the symbols of `exact_delta_coding`, made of what several clients change."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs.errors import CorruptPayload
from fl_sim.codecs.symbol_coding import Bytes
from fl_sim.core.kernels.change_reference import BINS, COARSE, FINITE, FIRST, Keys, Words
from fl_sim.core.kernels.coding import change_contexts

PIECE = 1 << 16
HEAD = struct.Struct("<BHB")
FINEST, OCTAVE = 4, 16
"""Largest detail; keys of an octave."""
BIAS = 1023 - 127
"""Exponent of a float64 over that of the same float32, as stored."""
SCALES, ENOUGH = 16, 8192
"""Most scales with tables of their own, and the changes that are worth one."""
ABOVE = 8
"""Octaves above the typical change of a tensor in which there are bins, if there are changes as large."""
SAMPLE = 1 << 11
"""Values of a tensor that are looked at to make a plan."""
FRACTION = 1 << 16
"""Parts of a bit in which costs are added up, so that sums do not depend on the order of additions."""

Integers = NDArray[np.int64]
NOBODY: Bytes = np.zeros(0, dtype=np.uint8)
"""No scale has a table of its own."""


class Plan(NamedTuple):
    """What both ends need beside the symbols: bits below the octave, bins below a tensor's scale, and the scales."""

    detail: int
    below: int
    own: Bytes
    scales: Bytes

    def written(self) -> bytes:
        """The plan as bytes."""
        return HEAD.pack(self.detail, self.below, len(self.own)) + self.own.tobytes() + self.scales.tobytes()

    @property
    def shift(self) -> int:
        """Bits of a key that a bin leaves out."""
        return FINEST - self.detail

    def pieces(self, tensors: list[slice]) -> Iterator[tuple[int, slice]]:
        """(first bin, slice) of each piece."""
        last = (FINITE >> self.shift) - BINS - FIRST
        for scale, tensor in zip(self.scales.tolist(), tensors, strict=True):
            first = min(last, max(0, ((scale + BIAS) << self.detail) - self.below))
            for piece in pieces_of([tensor]):
                yield first, piece

    @property
    def kinds(self) -> int:
        """Number of contexts."""
        return COARSE + 1 + len(self.own)


def contexts_of(plans: Sequence[Plan], base: Words, tensors: list[slice]) -> Bytes:
    """The context of each change of several clients, one after the other, given the bits of what all of them change."""
    ranks = np.full((len(plans), 256), COARSE, dtype=np.uint8)
    for plan, table_of in zip(plans, ranks, strict=True):
        if len(plan.own):
            table_of[plan.own] = COARSE + 1 + np.arange(len(plan.own))
    scales = np.stack([plan.scales for plan in plans])
    contexts = np.empty(len(plans) * len(base), dtype=np.uint8)
    change_contexts(
        np.tile(base, len(plans)) if len(plans) > 1 else base,
        np.tile(sizes_of(tensors), len(plans)),
        scales.reshape(-1),
        ranks[np.arange(len(plans))[:, np.newaxis], scales].reshape(-1),
        contexts,
    )
    return contexts


def sizes_of(tensors: list[slice]) -> Integers:
    """Values of each tensor."""
    return np.array([tensor.stop - tensor.start for tensor in tensors], dtype=np.int64)


def pieces_of(tensors: list[slice]) -> Iterator[slice]:
    """Parts of tensors that stay in the cache from one loop to the next."""
    for tensor in tensors:
        for start in range(tensor.start, tensor.stop, PIECE):
            yield slice(start, min(tensor.stop, start + PIECE))


def read(data: memoryview, tensors: int) -> Plan:
    """Invert `Plan.written` for so many tensors. Raises CorruptPayload."""
    if len(data) < HEAD.size:
        raise CorruptPayload("changes are cut off")
    detail, below, tables = HEAD.unpack_from(data)
    scales = np.frombuffer(data[HEAD.size : HEAD.size + tables + tensors], dtype=np.uint8)
    if detail > FINEST or tables > SCALES or len(scales) < tables + tensors:
        raise CorruptPayload("bins of changes that do not exist, too many tables, or changes that are cut off")
    return Plan(detail, below, scales[:tables], scales[tables:])


def plans_of(keys: Keys, tensors: list[slice]) -> list[Plan]:
    """What suits the changes of several clients, whose keys are the rows of (clients, values), by a sample of each tensor."""
    steps = 1 + sizes_of(tensors) // SAMPLE
    drawn = [keys[:, tensor][:, ::step] for tensor, step in zip(tensors, steps.tolist(), strict=True)]
    lengths = np.array([part.shape[1] for part in drawn])
    sample = np.concatenate(drawn, axis=1).astype(np.int64)
    sample[sample >= FINITE] = 0  # as what has not changed
    seen, sums = _by_tensor((sample > 0).astype(np.int64), lengths), _by_tensor(sample, lengths)
    scales = np.clip(np.rint(sums / np.maximum(1, OCTAVE * seen)).astype(np.int64) - BIAS, 0, 255)
    changed = seen * steps
    sizes = changed.sum(axis=1)
    own = [_own(*each) if size >= ENOUGH else NOBODY for *each, size in zip(scales, changed, sizes, strict=True)]
    details = _details(sample, sizes, np.array([1 + len(each) for each in own]))
    typical = np.repeat(OCTAVE * (scales + BIAS), lengths, axis=1)
    largest = np.where(sample > 0, sample - typical, -OCTAVE).max(axis=1)
    above = np.clip(largest + OCTAVE, 0, ABOVE * OCTAVE) >> (FINEST - details)
    below = np.where(sizes > 0, BINS - 1 - above, 0)
    return list(map(Plan, details.tolist(), below.tolist(), own, scales.astype(np.uint8)))


def _by_tensor(numbers: Integers, lengths: Integers) -> Integers:
    """Sums over each tensor, (clients, tensors)."""
    sums, some = np.zeros((len(numbers), len(lengths)), dtype=np.int64), lengths > 0
    sums[:, some] = np.add.reduceat(numbers, (np.cumsum(lengths) - lengths)[some], axis=1)
    return sums


def _own(scales: Integers, changed: Integers) -> Bytes:
    """The scales with tables of their own: those of the most changes, where these are enough."""
    sizes = np.bincount(scales, weights=changed, minlength=256)
    most = np.argsort(-sizes, kind="stable")[: min(SCALES, np.count_nonzero(sizes >= ENOUGH))]
    return np.sort(most).astype(np.uint8)


def _details(sample: Integers, sizes: Integers, tables: Integers) -> Integers:
    """The detail at which each client's changes, so many, and their tables take least; 0 where nothing changed."""
    counts = [_histograms(sample)]
    while len(counts) <= FINEST:  # keys of half the detail: pairs of neighbours together
        counts.append(counts[-1].reshape(len(sample), -1, 2).sum(axis=2))
    every, width = np.concatenate(counts, axis=1), counts[0].shape[1]
    starts = [2 * width - (2 * width >> detail) for detail in range(FINEST + 1)]
    weighed = np.rint(FRACTION * every * np.log2(np.maximum(1, every))).astype(np.int64)
    used, total = np.add.reduceat((every > 0).astype(np.int64), starts, axis=1), counts[0].sum(axis=1)[:, np.newaxis]
    seen = np.maximum(1, total)
    whole = np.rint(FRACTION * total * np.log2(seen)).astype(np.int64)
    bits = (whole - np.add.reduceat(weighed, starts, axis=1)) / FRACTION - np.arange(FINEST, -1, -1) * total
    costs = bits * sizes[:, np.newaxis] / seen + 8.0 * tables[:, np.newaxis] * used
    best: Integers = FINEST - np.argmin(costs, axis=1)
    return np.where(total[:, 0] > 0, best, 0)


def _histograms(sample: Integers) -> Integers:
    """How often each key but 0 occurs, (clients, keys from some octave on)."""
    there = sample > 0
    lowest = np.where(there, sample, FINITE).min(axis=1) & -OCTAVE
    places = np.where(there, sample - lowest[:, np.newaxis], 0)
    width = OCTAVE + (int(places.max()) & -OCTAVE)
    places += width * np.arange(len(sample))[:, np.newaxis]
    return np.bincount(places[there], minlength=width * len(sample)).reshape(len(sample), width)
