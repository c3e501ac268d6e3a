"""Tensors that share memory: of one tensor several values in one place, or two tensors with a byte in common.

A sparse tensor is several strided ones: its positions and its values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


def strided_parts(value: Tensor) -> tuple[Tensor, ...]:
    """What a tensor's memory consists of: itself, or positions and values of a sparse one, in a fixed order."""
    if value.layout == torch.strided:
        return (value,)
    value = value.detach()
    if value.layout == torch.sparse_coo:
        return (value._indices(), value._values())
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (value.crow_indices(), value.col_indices(), value.values())
    return (value.ccol_indices(), value.row_indices(), value.values())


def addresses(value: Tensor) -> set[int]:
    """Where a tensor's memory begins; of a sparse one, of each of its parts that is not empty."""
    return {part.untyped_storage().data_ptr() for part in strided_parts(value) if part.numel()}


@dataclass(frozen=True, order=True)
class Span:
    """Where a tensor lies: its first byte, the byte behind its last, its name."""

    start: int
    stop: int
    name: str
    value: Tensor = field(compare=False)

    @classmethod
    def of(cls, name: str, value: Tensor) -> Span:
        """The span of a strided tensor that is not empty."""
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        return cls(value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size(), name, value)

    @property
    def is_solid(self) -> bool:
        """Whether the tensor takes all bytes of it."""
        return self.stop - self.start == self.value.numel() * self.value.element_size()


def is_expanded(value: Tensor) -> bool:
    """Whether two indices lead to one place: by a stride of 0, or by one within another dimension's reach."""
    reach = 0
    for size, stride in sorted(zip(value.shape, value.stride(), strict=True), key=lambda extent: extent[1]):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def overlapping(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names of tensors that have a byte in common. Views of one table may interleave without that."""
    before: list[Span] = []
    parts = [(name, part) for name, value in tensors.items() for part in strided_parts(value) if part.numel()]
    for span in sorted(Span.of(name, part) for name, part in parts):
        before = [other for other in before if other.stop > span.start]
        yield from ((other.name, span.name) for other in before if _meet(other, span))
        before.append(span)


def _meet(one: Span, other: Span) -> bool:
    """Whether two tensors whose spans overlap have a byte in common."""
    if one.is_solid and other.is_solid:
        return True
    start = min(one.start, other.start)
    unit = math.gcd(one.value.element_size(), other.value.element_size(), other.start - one.start)
    taken = torch.zeros((max(one.stop, other.stop) - start) // unit, dtype=torch.bool)
    first, second = (_view(taken, span, span.start - start, unit) for span in (one, other))
    first.fill_(True)
    return bool(second.any())


def _view(taken: Tensor, span: Span, offset: int, unit: int) -> Tensor:
    """The entries of `taken`, one for each `unit` bytes, that a tensor lies on."""
    width = span.value.element_size() // unit
    strides = (*(stride * width for stride in span.value.stride()), 1)
    return taken.as_strided((*span.value.shape, width), strides, offset // unit)
