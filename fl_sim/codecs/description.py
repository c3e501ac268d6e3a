"""Description of a payload: its sections and their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Description:
    """Sections of a payload in bytes, with the entropy floor of its mask.

    Attributes:
        sections: bytes of mask, values, dense, buffers, auxiliary and header, which sum to the payload's length, and of what
            `plus` added.
        nnz: prunable values sent.
        dense_bytes: bytes of the same tensors sent complete, in their own dtypes, by section.
        entropy_bytes: log2 C(n, k) over the coded mask segments, in bytes; 0 where no mask travels. It is the floor of the
            mode that was chosen: in mode `rows` of flags and mixed rows, below the floor of a tensor's independent bits.
        mask_mode, values: names of how mask and values are coded.
    """

    sections: dict[str, int]
    nnz: int
    dense_bytes: dict[str, int]
    entropy_bytes: float
    mask_mode: str
    values: str

    @classmethod
    def opaque(cls, size: int) -> Description:
        """Bytes that are no payload, booked as header."""
        return cls({"header": size}, 0, {}, 0.0, "none", "none")

    @classmethod
    def of_several(cls, parts: Sequence[Description], *, framing: int) -> Description:
        """Payloads that travel as one message about the same tensors; `framing` bytes around them are booked as header."""
        names = dict.fromkeys(name for part in parts for name in (*part.sections, *part.dense_bytes))
        sections = {name: sum(part.sections.get(name, 0) for part in parts) for name in names}
        sections["header"] = sections.get("header", 0) + framing
        dense = {
            name: max(part.dense_bytes.get(name, 0) for part in parts) for name in names if name in parts[0].dense_bytes
        }
        first = parts[0]
        return cls(
            {name: size for name, size in sections.items() if size or dense.get(name)},
            sum(part.nnz for part in parts),
            dense,
            sum(part.entropy_bytes for part in parts),
            first.mask_mode,
            first.values,
        )

    def plus(self, section: str, size: int) -> Description:
        """Add `size` bytes of another array of the message to a section; the dense baseline stays as it is."""
        return replace(self, sections={**self.sections, section: self.sections.get(section, 0) + size})
