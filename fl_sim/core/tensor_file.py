"""Files of tensors in the safetensors format, written and read one tensor at a time.

The library's own functions hold all tensors once or twice more while they write and read. The format: the length of a JSON
header (8 bytes, little-endian), the header, padded by spaces to a multiple of 8, and the tensors' bytes, the widest types
first and then by name (https://github.com/huggingface/safetensors#format). The bytes are those that the library writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMES: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""PyTorch's names of the types that a file may hold, in the order that the library gives them; it puts the last first."""
DTYPES: Mapping[torch.dtype, str] = {getattr(torch, name): NAMES[name] for name in NAMES if hasattr(torch, name)}
"""Those of the installed PyTorch: 2.6 has no float8_e8m0fnu."""
RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}


@dataclass(frozen=True)
class TensorFile:
    """A file's bytes, as parts that are made while they are iterated over, as often as one likes.

    Attributes:
        tensors: by name, of any layout and device.
        metadata: texts that the header holds.

    Raises:
        ValueError: a tensor of another type than `DTYPES`.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.tensors.items():
            if value.dtype not in DTYPES:
                raise ValueError(f"{name!r} is {value.dtype}, which a file of tensors does not hold here")

    def __iter__(self) -> Iterator[bytes | memoryview]:
        order = sorted(self.tensors, key=lambda name: (-RANK[self.tensors[name].dtype], name))
        yield self._header(order)
        for name in order:
            value = self.tensors[name].detach().cpu().contiguous().reshape(-1)
            yield value.view(torch.uint8).numpy().data

    def _header(self, order: list[str]) -> bytes:
        header: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        at = 0
        for name in order:
            value = self.tensors[name]
            size = value.numel() * value.element_size()
            header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
