"""Task header: the scalars with which the server tells a client how to read and run a task.

The header is a Flower `ConfigRecord` of its own in the message, so that `task.config` belongs to the user alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fl_sim.codecs import CorruptPayload
from fl_sim.core.types import Scalar

T = TypeVar("T", int, str, bytes, float)
NO_BASE = -1


@dataclass(frozen=True, slots=True)
class BroadcastHeader:
    """Header of a sparse broadcast: which published model a payload gives, and which one it starts from.

    Attributes:
        version: number of the published model.
        base: version that the payload's deltas change; None = the payload is the whole model.
        content: meaning of the values, a name of `fl_sim.communication.CONTENTS`.
        masks: one byte for each delta, 1 where the delta brings a new pruning mask.
        start: hash of the seeded model (8 bytes), for a client that starts from it; else empty.
    """

    version: int
    base: int | None
    content: str
    masks: bytes = b""
    start: bytes = b""

    def scalars(self) -> dict[str, Scalar]:
        """Entries of the message's record."""
        base = NO_BASE if self.base is None else self.base
        return {
            "model-version": self.version,
            "base-version": base,
            "content": self.content,
            "mask-changes": self.masks,
            "start-hash": self.start,
        }

    @classmethod
    def read(cls, entries: dict[str, object]) -> BroadcastHeader:
        """Invert `scalars`; what is read leaves `entries`."""
        version, base = _take(entries, "model-version", int), _take(entries, "base-version", int)
        texts = (
            _take(entries, "content", str),
            _take(entries, "mask-changes", bytes),
            _take(entries, "start-hash", bytes),
        )
        return cls(version, None if base == NO_BASE else base, *texts)


@dataclass(frozen=True, slots=True)
class CurveRequest:
    """Request for distortion curves of the model in the payload.

    Attributes:
        levels: points of each curve.
        summary: how a tensor's samples become one curve, as in `fl_sim.sparsity.curves.MeasureCurves`.
        batch_size: images of one forward pass.
        images: calibration images of each client.
    """

    levels: int
    summary: str
    batch_size: int
    images: int

    def scalars(self) -> dict[str, Scalar]:
        """Entries of the message's record."""
        return {"levels": self.levels, "summary": self.summary, "batch_size": self.batch_size, "images": self.images}

    @classmethod
    def read(cls, entries: dict[str, object]) -> CurveRequest:
        """Invert `scalars`; what is read leaves `entries`."""
        levels, summary = _take(entries, "levels", int), _take(entries, "summary", str)
        return cls(levels, summary, _take(entries, "batch_size", int), _take(entries, "images", int))


@dataclass(frozen=True, slots=True)
class GradientRequest:
    """Request for the largest gradients of the model in the payload, on all samples of the client.

    Attributes:
        share: of the weights that the pruning mask removes; 1 = the gradients of all weights.
    """

    share: float

    def scalars(self) -> dict[str, Scalar]:
        """Entries of the message's record."""
        return {"gradient-share": self.share}

    @classmethod
    def read(cls, entries: dict[str, object]) -> GradientRequest:
        """Invert `scalars`; what is read leaves `entries`."""
        share = _take(entries, "gradient-share", float)
        if not 0 <= share <= 1:
            raise CorruptPayload(f"the task's header asks for a share of {share} of the gradients")
        return cls(share)


Request = CurveRequest | GradientRequest


@dataclass(frozen=True, slots=True)
class TaskHeader:
    """Header of a task.

    Attributes:
        round: number of the round; the first is 1.
        seed: seed of the run, from which every party derives its own.
        broadcast: how to read the payload of a sparse broadcast; None = the payload is the whole global model.
        request: what to measure; None = train or evaluate.
    """

    round: int
    seed: int
    broadcast: BroadcastHeader | None = None
    request: Request | None = None

    def scalars(self) -> dict[str, Scalar]:
        """Entries of the message's record."""
        entries: dict[str, Scalar] = {"round": self.round, "seed": self.seed}
        for part in (self.broadcast, self.request):
            if part is not None:
                entries |= part.scalars()
        return entries

    @classmethod
    def read(cls, record: Mapping[str, object]) -> TaskHeader:
        """Invert `scalars`.

        Raises:
            CorruptPayload: an entry is missing, of another type, or not known to this version.
        """
        entries = dict(record.items())
        number, seed = _take(entries, "round", int), _take(entries, "seed", int)
        broadcast = BroadcastHeader.read(entries) if "model-version" in entries else None
        request: Request | None = CurveRequest.read(entries) if "levels" in entries else None
        if request is None and "gradient-share" in entries:
            request = GradientRequest.read(entries)
        if entries:
            raise CorruptPayload(f"the task's header has entries that are not known here: {', '.join(sorted(entries))}")
        return cls(number, seed, broadcast, request)


def _take(entries: dict[str, object], key: str, kind: type[T]) -> T:
    """Remove an entry of this very type (a bool is no int)."""
    value = entries.pop(key, None)
    if type(value) is not kind:
        raise CorruptPayload(f"the task's header needs {key!r} as {kind.__name__}, not {value!r}")
    return value
