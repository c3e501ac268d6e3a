"""Array bytes taken out of a content and put back, so that transports may carry them as plain buffers, never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from flwr.app import ArrayRecord, RecordDict

from fl_sim.communication.flower_private import array_of, filled
from fl_sim.communication.messages import array_records

if TYPE_CHECKING:
    from numpy.typing import NDArray

Blobs = dict[tuple[str, str], "NDArray[np.uint8]"]
"""(record, array) -> the bytes of that array."""


def split_off(content: RecordDict) -> tuple[RecordDict, Blobs]:
    """(the content without its array bytes, those bytes); the content is not changed."""
    blobs: Blobs = {}
    slim: dict[str, object] = {}
    for key, record in content.items():
        slim[key] = record
        if isinstance(record, ArrayRecord):
            bare: dict[str, object] = {}
            for name, array in record.items():
                bare[name] = array_of(b"", array.stype, dtype=array.dtype, shape=array.shape)
                blobs[key, name] = np.frombuffer(array.data, dtype=np.uint8)
            slim[key] = filled(ArrayRecord, bare)
    return filled(RecordDict, slim), blobs


def join(content: RecordDict, blobs: Mapping[tuple[str, str], bytes | memoryview]) -> RecordDict:
    """Invert `split_off`, in place."""
    records = dict(array_records(content))
    for (key, name), data in blobs.items():
        # Bytes to Flower's type, but any buffer does; a copy of a dense payload costs as much as its decoding.
        records[key][name].data = cast(bytes, data)
    return content
