"""The k highest of several tensors together, exactly, in linear time and constant extra memory.

Non-negative IEEE 754 numbers are ordered like their bit patterns read as integers. So the k-th highest value is found
digit by digit, as in a radix sort: histogram the leading 11 bits, choose the digit in which the k-th value lies, look
at the next bits of the values in that digit only. No tensor is sorted, joined or copied as a whole, the result does
not depend on the chunks, and the same code runs on any device. Up to `FEW` values on the CPU are joined first, which takes less
time and gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.core.types import UserError

CHUNK = 1 << 18
RADIX = 11
FEW = 1 << 20
"""Values on the CPU that are joined: a copy of them is a few MB, and the passes of a radix sort over each of many tensors take
longer."""
SORTED = 1 << 14
"""Values that one partial sort takes less time for than a pass of a radix sort. Of more, where most are equal as after pruning,
it takes many times as long."""
# Bits below the sign.
WIDTHS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen part of one tensor: everything above `threshold`, and the first `ties` coordinates equal to it."""

    threshold: float
    ties: int
    count: int


def select(tensors: Sequence[Tensor], k: int, *, floors: Sequence[int] | None = None) -> list[int]:
    """Count how many of the k highest values each tensor holds; ties go to the earlier tensor.

    With `floors`, each tensor holds at least its floor, and among all such choices the sum of the chosen values is the
    largest. Why one threshold t still suffices: raise it until the tensors, each with its floor or with what it has at
    t and above, whichever is more, hold k. Every chosen value below t is then forced by a floor.

    Args:
        tensors: non-negative scores, any shapes; float32 or float64 are compared as they are, half precision as
            float32, everything else as float64. All on one device.
        k: how many to choose, from the sum of the floors to the number of values.
        floors: at least so many of each tensor, at most its size; none by default.

    Raises:
        UserError: a negative score or NaN.
        ValueError: `k` outside its range.
    """
    sizes = np.array([t.numel() for t in tensors], dtype=np.int64)
    least = np.zeros_like(sizes) if floors is None else np.asarray(floors, dtype=np.int64)
    if not least.sum() <= k <= sizes.sum():
        raise ValueError(f"cannot choose {k} of {sizes.sum()} values when {least.sum()} are fixed")
    if not tensors:
        return []
    _, above, equal = _kth(tensors, k, least)
    chosen = np.maximum(least, above)
    for i, more in enumerate(np.maximum(least, above + equal) - chosen):
        chosen[i] += min(int(more), k - int(chosen.sum()))
    return [int(count) for count in chosen]


def top(tensor: Tensor, k: int) -> Selection:
    """The k highest of one tensor; ties go to the lower flat index. Raises what `select` raises."""
    if not 0 <= k <= tensor.numel():
        raise ValueError(f"cannot choose {k} of {tensor.numel()} values")
    if k in (0, tensor.numel()):
        return Selection(float("inf") if k == 0 else -1.0, 0, k)
    threshold, above, _ = _kth([tensor], k, np.zeros(1, dtype=np.int64))
    return Selection(threshold, k - int(above[0]), k)


def are_few(tensors: Sequence[Tensor]) -> bool:
    """Whether it is faster to join them."""
    return sum(map(Tensor.numel, tensors)) <= FEW and all(t.is_cpu for t in tensors)


def top_of_few(tensors: Sequence[Tensor], k: int) -> Tensor:
    """Where the k highest of some tensors on the CPU are, one 1-D bool tensor; ties go to the earlier one and the lower flat
    index. Raises as `top`."""
    dtype = common_dtype(tensors)
    values = np.concatenate([_values(tensor, dtype) for tensor in tensors]) if tensors else np.zeros(0)
    if not k:
        return torch.zeros(len(values), dtype=torch.bool)
    threshold = _highest(values, k)
    chosen = values >= threshold
    if np.count_nonzero(chosen) > k:
        tied = values == threshold
        chosen ^= tied
        chosen[np.flatnonzero(tied)[: k - np.count_nonzero(chosen)]] = True
    return torch.from_numpy(chosen)


def top_of_rows(scores: Tensor, k: int) -> Tensor | None:
    """`top_of_few` of each row of float32 scores on the CPU, bool of the same shape; None where it takes less time, or is not
    allowed, row by row: rows of many values, or a score that is negative or NaN."""
    values = scores.numpy()
    if not 0 < k <= values.shape[1] <= SORTED or not np.minimum.reduce(values, axis=None) >= 0:
        return None
    bits = values.view(np.int32) & 0x7FFFFFFF  # -0.0 counts as 0.0
    place = values.shape[1] - k
    threshold = np.partition(bits, place, axis=1)[:, place, np.newaxis]
    chosen = bits >= threshold
    for i in np.flatnonzero(np.count_nonzero(chosen, axis=1) > k):
        tied = bits[i] == threshold[i]
        chosen[i] ^= tied
        chosen[i, np.flatnonzero(tied)[: k - np.count_nonzero(chosen[i])]] = True
    return torch.from_numpy(chosen)


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which values are compared: it holds all of them exactly, except integers beyond 2^53."""
    dtypes = {tensor.dtype for tensor in tensors}
    if any(dtype == torch.float64 or not dtype.is_floating_point for dtype in dtypes):
        return torch.float64
    return torch.float32


def _kth(
    tensors: Sequence[Tensor], k: int, floors: NDArray[np.int64]
) -> tuple[float, NDArray[np.int64], NDArray[np.int64]]:
    """(threshold, values above it in each tensor, values equal to it in each tensor)."""
    dtype = common_dtype(tensors)
    if k and not floors.any() and are_few(tensors):
        return _kth_of_few([_values(t, dtype) for t in tensors], k)
    integer, width = WIDTHS[dtype]
    prefix, above, equal = 0, np.zeros_like(floors), np.zeros_like(floors)
    while width:
        digit = min(RADIX, width)
        width -= digit
        counts = np.stack([_histogram(t, dtype, prefix, (width, digit)) for t in tensors])
        # at_least[l, d]: values of tensor l that share the prefix and have digit d or a higher one, and those above it.
        at_least = above[:, None] + counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        held = np.maximum(floors[:, None], at_least).sum(axis=0)
        chosen = int(np.flatnonzero(held >= k)[-1])
        equal = counts[:, chosen]
        above = at_least[:, chosen] - equal
        prefix = prefix << digit | chosen
    return float(torch.tensor(prefix, dtype=integer).view(dtype)), above, equal


def _kth_of_few(parts: Sequence[NDArray[np.float64]], k: int) -> tuple[float, NDArray[np.int64], NDArray[np.int64]]:
    """`_kth` without floors, of tensors on the CPU."""
    threshold = _highest(np.concatenate(parts), k)
    above, equal = (
        np.array([np.count_nonzero(test(part, threshold)) for part in parts]) for test in (np.greater, np.equal)
    )
    return float(threshold), above, equal


def _values(tensor: Tensor, dtype: torch.dtype) -> NDArray[np.float64]:
    value = tensor.detach()
    if value.dtype != dtype or not value.is_cpu:
        value = value.to("cpu", dtype)
    return value.reshape(-1).numpy()


def _highest(values: NDArray[np.float64], k: int) -> np.float64:
    """The k-th highest value: digit by digit while many share the digits before, then by one partial sort."""
    _require_scores(bool(np.minimum.reduce(values) >= 0))
    width = 8 * values.itemsize - 1
    bits = values.view(f"i{values.itemsize}")
    while width and len(bits) > SORTED:
        digit = min(RADIX, width)
        width -= digit
        digits = bits >> width & ((1 << digit) - 1)  # without the sign: -0.0 counts as 0.0
        counts = np.bincount(digits, minlength=1 << digit)
        at_least = counts[::-1].cumsum()[::-1]
        chosen = int(np.flatnonzero(at_least >= k)[-1])
        k -= int(at_least[chosen] - counts[chosen])
        bits = bits[digits == chosen]
    ordered = bits.copy()
    if width:
        ordered.partition(len(bits) - k)
    found: np.float64 = ordered.view(values.dtype)[len(bits) - k]  # all are equal where no digit is left
    return found


def _require_scores(all_are: bool) -> None:
    if not all_are:
        raise UserError("scores must be non-negative, and none may be NaN")


def _histogram(tensor: Tensor, dtype: torch.dtype, prefix: int, place: tuple[int, int]) -> NDArray[np.int64]:
    """Counts of the `digit` bits above bit `shift`, over the values whose higher bits equal `prefix`."""
    shift, digit = place
    integer, width = WIDTHS[dtype]
    rest = width - shift - digit
    counts = torch.zeros(1 << digit, dtype=torch.int64, device=tensor.device)
    for chunk in _chunks(tensor):
        values = chunk.to(dtype)
        if not rest:
            _require_scores(bool(values.min() >= 0))
        bits = values.view(integer)
        if rest:
            bits = bits[(bits >> (shift + digit)).bitwise_and_((1 << rest) - 1) == prefix]
        # The mask also drops the sign: -0.0 counts as 0.0.
        counts += torch.bincount((bits >> shift).bitwise_and_((1 << digit) - 1), minlength=1 << digit)
    result: NDArray[np.int64] = counts.cpu().numpy()
    return result


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.detach().reshape(-1).split(CHUNK)) if tensor.numel() else iter(())
