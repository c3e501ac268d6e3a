"""Schema of a payload: names, shapes and dtypes in a fixed order. A payload never tells how much to allocate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from fl_sim.codecs.sections import KINDS
from fl_sim.core.types import FlatMask, FlatParams, Mask, Params

STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Schema:
    """Tensors that one federation exchanges, in the order in which they are encoded: by kind, then as given.

    Attributes:
        names, shapes, dtypes: one entry a tensor.
        kinds: "prunable" (may be sparse), "dense" (always complete), "buffers" (BatchNorm statistics), "auxiliary".
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    kinds: tuple[str, ...]

    @classmethod
    def of(
        cls,
        params: Params,
        prunable: Iterable[str],
        *,
        buffers: Iterable[str] | None = None,
        auxiliary: Iterable[str] = (),
    ) -> Schema:
        """The schema of `params`. `buffers` defaults to the names of BatchNorm running statistics.

        Raises:
            ValueError: a listed name that `params` does not have.
        """
        statistics = [n for n in params if n.endswith(STATISTICS)] if buffers is None else list(buffers)
        listed = {"prunable": list(prunable), "buffers": statistics, "auxiliary": list(auxiliary)}
        kind_of = {name: kind for kind, names in listed.items() for name in names}
        if unknown := kind_of.keys() - params.keys():
            raise ValueError(f"no such parameters: {', '.join(sorted(unknown))}")
        order = sorted(params, key=lambda name: KINDS.index(kind_of.get(name, "dense")))
        return cls(
            tuple(order),
            tuple(params[n].shape for n in order),
            tuple(params[n].dtype for n in order),
            tuple(kind_of.get(n, "dense") for n in order),
        )

    @cached_property
    def hash(self) -> bytes:
        """Eight bytes over names, shapes, dtypes, kinds and their order."""
        text = repr(
            [
                (n, tuple(s), str(d), k)
                for n, s, d, k in zip(self.names, self.shapes, self.dtypes, self.kinds, strict=True)
            ]
        )
        return xxhash.xxh3_64_digest(text.encode())

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each tensor."""
        return tuple(shape.numel() for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """Elements of all tensors."""
        return sum(self.numels)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, each in its own dtype."""
        return sum(self.section_bytes.values())

    @cached_property
    def section_bytes(self) -> dict[str, int]:
        """Kind -> bytes of its tensors."""
        totals = dict.fromkeys(KINDS, 0)
        for kind, count, dtype in zip(self.kinds, self.numels, self.dtypes, strict=True):
            totals[kind] += count * dtype.itemsize
        return totals

    @cached_property
    def prunable(self) -> tuple[str, ...]:
        """Names of the tensors that may be sparse."""
        return tuple(n for n, k in zip(self.names, self.kinds, strict=True) if k == "prunable")

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of the BatchNorm statistics."""
        return tuple(n for n, k in zip(self.names, self.kinds, strict=True) if k == "buffers")

    @cached_property
    def prunable_size(self) -> int:
        """Elements of the prunable tensors; they come first."""
        return sum(self.numels[: len(self.prunable)])

    @cached_property
    def mask_layout(self) -> tuple[tuple[int, int, int], ...]:
        """(rows, elements, elements of a kernel) of each prunable tensor; rows = output channels."""
        shapes = self.shapes[: len(self.prunable)]
        return tuple((shape[0] if len(shape) else 1, shape.numel(), shape[2:].numel()) for shape in shapes)

    @cached_property
    def prunable_part(self) -> Schema:
        """The prunable tensors alone."""
        return self._part(0, len(self.prunable))

    @cached_property
    def other_part(self) -> Schema:
        """Names of the tensors that are not prunable."""
        return self._part(len(self.prunable), len(self.names))

    def _part(self, start: int, stop: int) -> Schema:
        part = slice(start, stop)
        return Schema(self.names[part], self.shapes[part], self.dtypes[part], self.kinds[part])

    @cached_property
    def is_flat(self) -> bool:
        """Whether all tensors are float32, so that one buffer holds them."""
        return all(dtype == torch.float32 for dtype in self.dtypes)

    def flat(self, params: Params) -> Tensor:
        """Flatten tensors to one contiguous float32 vector in schema order; no copy when they already are one.

        Raises:
            KeyError: a tensor is missing. ValueError: the schema has other dtypes, or the sizes do not match.
        """
        if not self.is_flat:
            raise ValueError("a schema with other dtypes than float32 has no flat form")
        if isinstance(params, FlatParams) and params.names == self.names and params.whole:
            flat = params.flat
            if flat.dtype != torch.float32 or not flat.is_contiguous():
                flat = flat.float().contiguous()
        else:
            flat = (
                torch.cat([params[n].detach().reshape(-1).float().cpu() for n in self.names])
                if self.names
                else torch.empty(0)
            )
        if flat.numel() != self.size:
            raise ValueError(f"{flat.numel()} values, the schema has {self.size}")
        return flat

    def view(self, flat: Tensor) -> FlatParams:
        """Cut a flat vector into the schema's tensors, without copying."""
        return FlatParams.view(flat, self.names, self.shapes)

    def copied(self, params: Params) -> Params:
        """A copy of the schema's tensors in memory of its own."""
        if self.is_flat:
            return self.view(self.flat(params).clone())
        return {name: params[name].clone() for name in self.names}

    def flat_mask(self, mask: Mask) -> Tensor:
        """A mask as one bool vector over the prunable tensors; a tensor without a mask is alive."""
        if isinstance(mask, FlatMask) and mask.names == self.prunable and mask.whole:
            return mask.flat.contiguous()
        parts = []
        for name, shape in zip(self.prunable, self.shapes, strict=False):
            part = mask.get(name)
            if part is not None and part.shape != shape:
                raise ValueError(f"mask of {name!r} has shape {tuple(part.shape)}, the parameter {tuple(shape)}")
            parts.append(
                torch.ones(shape.numel(), dtype=torch.bool) if part is None else part.detach().reshape(-1).cpu()
            )
        if unknown := mask.keys() - set(self.prunable):
            raise ValueError(f"mask of names that are not prunable: {', '.join(sorted(unknown))}")
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.bool)

    def view_mask(self, flat: Tensor) -> FlatMask:
        """Cut a bool vector into masks of the prunable tensors, without copying."""
        return FlatMask.view(flat, self.prunable, self.shapes[: len(self.prunable)])
