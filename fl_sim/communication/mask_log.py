"""Price a finished run's recorded masks under other codecs, without training again.

A run with `wire.record_masks = true` leaves `masks.parquet`: one row a training message with the packed bits of the mask
it sent (null where everything or a held mask was sent). Replay prices every message of the ledger: masks are really
encoded where a codec is ours; values are priced at their type's width, because they were not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fl_sim.codecs import Schema, describe, encode
from fl_sim.communication.ledger import Ledger
from fl_sim.core.parquet import read_table, write_table
from fl_sim.core.types import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Bits = NDArray[np.bool_]
WIDTHS: Mapping[str, float] = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0 + 4.0 / 4096}
"""Bytes a value, int8 with its float32 scale per 4,096 values; entropy coding would only lower the last three."""


@dataclass
class MaskRecorder:
    """Collects the masks that messages carried, as packed bits."""

    rows: list[tuple[int, str, int, bytes | None]]

    def add(self, *, round: int, direction: str, client: int, mask: Bits | None) -> None:
        """Record one message."""
        self.rows.append((round, direction, client, None if mask is None else np.packbits(mask).tobytes()))

    def extend(self, path: Path) -> None:
        """Append the rows of a file that `write` wrote.

        Raises:
            UserError: no such file, or not recorded masks.
        """
        import pyarrow as pa

        try:
            schema = self.to_table().schema
            table = read_table(path, schema.names).cast(schema)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
        self.rows.extend((r["round"], r["direction"], r["client"], r["mask"]) for r in table.to_pylist())

    def to_table(self, *, start: int = 0) -> pa.Table:
        """Convert to an Arrow table, from row `start` on."""
        import pyarrow as pa

        schema = pa.schema(
            [("round", pa.int64()), ("direction", pa.string()), ("client", pa.int64()), ("mask", pa.binary())]
        )
        rows = self.rows[start:]
        return pa.table({name: [row[i] for row in rows] for i, name in enumerate(schema.names)}, schema=schema)

    def write(self, path: Path) -> None:
        """Write a parquet file atomically."""
        write_table(self.to_table(), path)


def read_masks(path: Path, schema: Schema) -> Iterator[tuple[str, Bits | None]]:
    """(direction, mask) of the recorded messages.

    Raises:
        UserError: the run recorded no masks, or the file is damaged.
    """
    import pyarrow as pa

    size = -(-schema.prunable_size // 8)
    try:
        kept = pa.schema([("direction", pa.string()), ("mask", pa.binary())])
        table = read_table(path, kept.names)
        if sorted(table.column_names) != kept.names:
            raise ValueError(f"has of the columns direction and mask only {table.column_names}")
        rows = table.select(kept.names).cast(kept).to_pylist()
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: no masks were recorded; run it with wire.record_masks=true") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    for row in rows:
        packed = row["mask"]
        if row["direction"] not in ("up", "down"):
            raise UserError(f"{path}: direction {row['direction']!r}; allowed: up, down")
        if packed is not None and len(packed) != size:
            raise UserError(f"{path}: a mask of {len(packed)} bytes; the model's have {size}")
        bits = None if packed is None else np.unpackbits(np.frombuffer(packed, np.uint8), count=schema.prunable_size)
        yield str(row["direction"]), None if bits is None else bits.view(np.bool_)


def _whole(mask: Bits, schema: Schema) -> float:
    """Our own coder, really run."""
    zeros = schema.view(torch.zeros(schema.size))
    data = encode(zeros, schema.view_mask(torch.from_numpy(mask)), schema=schema)
    return float(describe(data, schema=schema).sections.get("mask", 0))


def _coo(mask: Bits, schema: Schema) -> float:
    """int32 positions."""
    return 4.0 * int(np.count_nonzero(mask))


def _bitmap(mask: Bits, schema: Schema) -> float:
    """Size of a plain bitmap: one bit a weight."""
    return float(-(-len(mask) // 8))


def _free(mask: Bits, schema: Schema) -> float:
    """Not counted at all, as in many papers."""
    return 0.0


MASKS: Mapping[str, Callable[[Bits, Schema], float]] = {"fl_sim": _whole, "coo": _coo, "bitmap": _bitmap, "free": _free}


def replay(
    ledger: Ledger, masks: Iterator[tuple[str, Bits | None]], schema: Schema, *, values: str, mask: str
) -> dict[str, float]:
    """Direction -> bytes of the training messages under another value type and mask codec; everything else as it was.

    Raises:
        UserError: unknown names, or masks that do not belong to the ledger.
    """
    for what, name, allowed in (("--values", values, list(WIDTHS)), ("--mask", mask, list(MASKS))):
        if name not in allowed:
            raise UserError(f"{what} {name!r}: allowed: {', '.join(allowed)}")
    recorded = list(masks)
    moved = ledger.messages(phase="train")
    if {d: sum(1 for other, _ in recorded if other == d) for d in moved} != moved:
        raise UserError(f"{len(recorded)} recorded masks do not belong to a ledger with messages {moved}")
    price: dict[str, float] = {"down": 0.0, "up": 0.0}
    for column, width in (("payload_bytes", 1.0), ("nnz", WIDTHS[values])):
        for (direction, phase, section), total in ledger.total(
            by=("direction", "phase", "section"), column=column
        ).items():
            replaced = column == "payload_bytes" and section in ("mask", "values")
            if phase == "train" and not replaced:
                price[str(direction)] += width * total
    for direction, bits in recorded:
        price[direction] += 0.0 if bits is None else MASKS[mask](bits, schema)
    return price
