"""Recorded masks: what a run's training messages chose, kept for `fl-sim replay` and for analysis.

A run with `wire.record_masks = true` leaves `masks.parquet`: one row a training message with the packed bits of the mask
it sent (null where everything or a held mask was sent). Values are not kept: `wire.record_payloads` keeps them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fl_sim.codecs import Schema
from fl_sim.core.parquet import read_table, write_table
from fl_sim.core.types import UserError

if TYPE_CHECKING:
    import pyarrow as pa

Bits = NDArray[np.bool_]


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


@dataclass(frozen=True)
class RecordedMask:
    """What one training message chose; `bits` is None where everything or a held mask was sent."""

    round: int
    direction: str
    client: int
    bits: Bits | None


def read_masks(path: Path, schema: Schema) -> Iterator[RecordedMask]:
    """The recorded messages, in the order in which they were booked.

    Raises:
        UserError: the run recorded no masks, or the file is damaged.
    """
    import pyarrow as pa

    size = -(-schema.prunable_size // 8)
    try:
        kept = MaskRecorder([]).to_table().schema
        table = read_table(path, kept.names)
        if sorted(table.column_names) != sorted(kept.names):
            raise ValueError(f"has of the columns {', '.join(kept.names)} only {table.column_names}")
        rows = table.select(kept.names).cast(kept).to_pylist()
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent}: nothing to replay was recorded; run it with wire.record_payloads=1 for all codecs, or "
            "with wire.record_masks=true for mask codecs alone"
        ) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    for row in rows:
        packed = row["mask"]
        if row["direction"] not in ("up", "down"):
            raise UserError(f"{path}: direction {row['direction']!r}; allowed: up, down")
        if row["round"] is None or row["client"] is None:
            raise UserError(f"{path}: a mask without a round or a client")
        if packed is not None and len(packed) != size:
            raise UserError(f"{path}: a mask of {len(packed)} bytes; the model's have {size}")
        bits = None if packed is None else np.unpackbits(np.frombuffer(packed, np.uint8), count=schema.prunable_size)
        yield RecordedMask(row["round"], row["direction"], row["client"], None if bits is None else bits.view(np.bool_))
