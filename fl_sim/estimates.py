"""What published code would have claimed for the same traffic, each under its own name, beside the measurement.

    estimates = estimate(ledger, index_dims=3.9)      # {"values_only": bytes, "feddst": bytes, ...}

The formulas are those of the public repositories named below, applied to the messages that really moved. They are shown
to reproduce a paper's number and to see its optimism; nothing of ours is computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fl_sim.ledger import Ledger

FLOAT, INT32, INT64 = 4.0, 4.0, 8.0


@dataclass(frozen=True)
class Traffic:
    """One message of the training phase, as the formulas see it.

    Attributes:
        up: from the client.
        prunable: prunable weights of the model.
        sent: prunable values sent.
        other: parameters that are never pruned (biases, BatchNorm).
        buffers: BatchNorm statistics.
        mask_moved: a mask travelled with it.
        first: the first message to this client.
        index_dims: dimensions of a weight tensor, averaged over prunable weights (4 for convolutions).
    """

    up: bool
    prunable: int
    sent: int
    other: int
    buffers: int
    mask_moved: bool
    first: bool
    index_dims: float

    @property
    def dense(self) -> float:
        """Bytes of everything as float32."""
        return FLOAT * (self.prunable + self.other + self.buffers)


Estimate = Callable[[Traffic], float]


def values_only(t: Traffic) -> float:
    """Most papers: retained weights and the other parameters as float32; no mask, no index, no buffers."""
    return FLOAT * (t.sent + t.other)


def dense(t: Traffic) -> float:
    """Flower, LEAF, FedScale: one dense model each way, whatever was pruned."""
    return t.dense


def dispfl(t: Traffic) -> float:
    """DisPFL (`model_trainer.py`): non-zero entries of the state dict, as float32; masks that differ are not counted."""
    return FLOAT * (t.sent + t.other + t.buffers)


def feddip(t: Traffic) -> float:
    """FedDIP (`comm_costs_in_mb`): 32 d n / 2^20 called MB: mebibits, 8 times the bytes; all parameters taken as pruned."""
    density = t.sent / t.prunable if t.prunable else 1.0
    return 32 * density * (t.prunable + t.other) / 2**20 * 1e6


def feddst(t: Traffic) -> float:
    """FedDST (`dst.py`): values; a moved mask costs n bits down but only d n bits up; a client's first download is free."""
    if t.first and not t.up:
        return 0.0
    mask_bits = (t.sent if t.up else t.prunable) if t.mask_moved else 0
    return FLOAT * (t.sent + t.other) + mask_bits / 8


def flsim_coo(t: Traffic) -> float:
    """FLSim (`sparse_mask_channel.py`): uplink 4 + 8 ndim bytes a retained value (int64 indices per dimension); downlink dense."""
    return t.sent * (FLOAT + INT64 * t.index_dims) + FLOAT * (t.other + t.buffers) if t.up else t.dense


def flsim_bitmask(t: Traffic) -> float:
    """FLSim (`sparse_mask_channel.py`): uplink one bit a weight and the values; downlink dense."""
    return t.prunable / 8 + FLOAT * (t.sent + t.other + t.buffers) if t.up else t.dense


def dasha(t: Traffic) -> float:
    """Flower's DASHA baseline (`compressors.py`): 32-bit index and value each, uplink only; the wire carries int64."""
    return (INT32 + FLOAT) * t.sent if t.up else 0.0


def fl_pytorch(t: Traffic) -> float:
    """fl_pytorch (`compressors.py`): uplink values only, "we don't need to send indices": right for a shared seed alone."""
    return FLOAT * t.sent if t.up else 0.0


def coo_int32(t: Traffic) -> float:
    """Coordinates as int32 beside each value, both ways, everything else dense."""
    indices = 0.0 if t.sent == t.prunable else INT32 * t.sent
    return indices + FLOAT * (t.sent + t.other + t.buffers)


def bitmap(t: Traffic) -> float:
    """One bit a prunable weight in every sparse message, both ways, whether the receiver holds the mask or not."""
    bits = 0.0 if t.sent == t.prunable else t.prunable / 8
    return bits + FLOAT * (t.sent + t.other + t.buffers)


ESTIMATES: Mapping[str, Estimate] = {
    f.__name__: f
    for f in (
        values_only,
        dense,
        dispfl,
        feddip,
        feddst,
        flsim_coo,
        flsim_bitmask,
        dasha,
        fl_pytorch,
        coo_int32,
        bitmap,
    )
}


def traffic(ledger: Ledger, *, index_dims: float) -> Iterator[Traffic]:
    """The training messages of a ledger, in order."""
    seen: set[object] = set()
    for rows in ledger.by_message(phase="train"):
        head = rows["header"]
        first = head["client"] not in seen
        seen.add(head["client"])
        yield Traffic(
            up=head["direction"] == "up",
            prunable=_floats(rows, "values"),
            sent=int(rows.get("values", {}).get("nnz", 0)),
            other=_floats(rows, "dense"),
            buffers=_floats(rows, "buffers"),
            mask_moved="mask" in rows,
            first=first,
            index_dims=index_dims,
        )


def _floats(rows: Mapping[str, Mapping[str, int | float | str]], section: str) -> int:
    return int(rows.get(section, {}).get("dense_bytes", 0)) // 4


def estimate(ledger: Ledger, *, index_dims: float) -> dict[str, int]:
    """Name -> bytes claimed for all training messages."""
    totals = dict.fromkeys(ESTIMATES, 0.0)
    for message in traffic(ledger, index_dims=index_dims):
        for name, formula in ESTIMATES.items():
            totals[name] += formula(message)
    return {name: round(total) for name, total in totals.items()}
