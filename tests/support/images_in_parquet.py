"""Forty small images in a parquet file."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), number % 256, dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def table_bytes(**columns: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


IMAGES = [{"bytes": png(i), "path": None} for i in range(40)]
LABELS = [i % 4 for i in range(40)]
PARQUET = table_bytes(img=pa.array(IMAGES), label=pa.array(LABELS))
