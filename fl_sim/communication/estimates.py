"""Communication formulas of published code, applied to the same traffic, beside the measurement.

    estimates = estimate(ledger, index_dims=3.9)      # {"values_only": bytes, "feddst": bytes, ...}

The formulas are those of the public repositories named below, applied to the messages that really moved. They are shown
to reproduce a paper's number and to see its optimism; nothing of ours is computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fl_sim.communication.ledger import CODES, Ledger

FLOAT, INT32, INT64 = 4.0, 4.0, 8.0


@dataclass(frozen=True)
class Traffic:
    """A message of the training phase, in the quantities that the formulas use.

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

    @property
    def kept(self) -> float:
        """Bytes as float32 of what is sent when only values count."""
        return FLOAT * (self.sent + self.other + self.buffers)

    @property
    def density(self) -> float:
        """Share of the prunable weights sent; 1 where none are prunable."""
        return self.sent / self.prunable if self.prunable else 1.0


Estimate = Callable[[Traffic], float]


def values_only(t: Traffic) -> float:
    """Most papers: retained weights and the other parameters as float32; no mask, no index, no buffers."""
    return FLOAT * (t.sent + t.other)


def dense(t: Traffic) -> float:
    """Flower, LEAF, FedScale: one dense model each way, whatever was pruned."""
    return t.dense


def dispfl(t: Traffic) -> float:
    """DisPFL (`model_trainer.py`): non-zero entries of the state dict, as float32; masks that differ are not counted."""
    return t.kept


def feddip(t: Traffic) -> float:
    """FedDIP (`comm_costs_in_mb`): 32 d n / 2^20 called MB: mebibits, 8 times the bytes; all parameters taken as pruned."""
    return 32 * t.density * (t.prunable + t.other) / 2**20 * 1e6


def feddst(t: Traffic) -> float:
    """FedDST (`dst.py`): values; a moved mask costs n bits down but only d n bits up; a client's first values are free.

    The released code compares the received mask with a tensor that it has just overwritten with it, so that the n bits
    down, which its formula has and which are counted here, were never added.
    """
    values = 0.0 if t.first and not t.up else FLOAT * (t.sent + t.other)
    mask_bits = (t.sent if t.up else t.prunable) if t.mask_moved else 0
    return values + mask_bits / 8


def feddst_prunefl(t: Traffic) -> float:
    """PruneFL as in FedDST's comparison (`prunefl.py`): as `feddst`, and a gradient of every weight with a new mask up."""
    return feddst(t) + (FLOAT * t.prunable if t.up and t.mask_moved else 0.0)


def ssfl(t: Traffic) -> float:
    """SSFL for Flower (`comm_stats.py`): uplink values, and masks down as one byte a weight; no downlink of the model."""
    return t.kept if t.up else float(t.prunable if t.mask_moved else 0)


def flsim_coo(t: Traffic) -> float:
    """FLSim (`sparse_mask_channel.py`): uplink 4 + 8 ndim bytes a retained value (int64 indices per dimension); downlink dense.

    Its density is the configured one and holds for every tensor, biases and BatchNorm too.
    """
    if not t.up or t.sent == t.prunable:
        return t.dense
    return t.sent * (FLOAT + INT64 * t.index_dims) + t.density * (t.other + t.buffers) * (FLOAT + INT64)


def flsim_bitmask(t: Traffic) -> float:
    """FLSim (`sparse_mask_channel.py`): uplink one bit for every number and the retained values; downlink dense."""
    if not t.up or t.sent == t.prunable:
        return t.dense
    return t.dense / 32 + t.density * t.dense


def dasha(t: Traffic) -> float:
    """Flower's DASHA baseline (`compressors.py`): 32-bit index and value each, uplink only; the wire carries int64."""
    return (INT32 + FLOAT) * t.sent if t.up else 0.0


def fl_pytorch(t: Traffic) -> float:
    """fl_pytorch (`compressors.py`): uplink values only, "we don't need to send indices": right for a shared seed alone."""
    return FLOAT * t.sent if t.up else 0.0


def coo_int32(t: Traffic) -> float:
    """Coordinates as int32 beside each value, both ways, everything else dense."""
    return t.kept + (0.0 if t.sent == t.prunable else INT32 * t.sent)


def coo_int64(t: Traffic) -> float:
    """Coordinates as int64 beside each value (FedLab's top-k, and what DASHA's arrays really hold), everything else dense."""
    return t.kept + (0.0 if t.sent == t.prunable else INT64 * t.sent)


def bitmap(t: Traffic) -> float:
    """Count one bit a prunable weight in every sparse message, both ways, whether the receiver holds the mask or not."""
    return t.kept + (0.0 if t.sent == t.prunable else t.prunable / 8)


def entropy(t: Traffic) -> float:
    """32 d + H(d) bits a prunable weight: the floor for a mask without structure that the receiver does not hold."""
    d = t.density
    bits = -d * math.log2(d) - (1 - d) * math.log2(1 - d) if 0 < d < 1 else 0.0
    return t.kept + bits * t.prunable / 8


ESTIMATES: Mapping[str, Estimate] = {
    f.__name__: f
    for f in (
        values_only,
        dense,
        dispfl,
        feddip,
        feddst,
        feddst_prunefl,
        ssfl,
        flsim_coo,
        flsim_bitmask,
        dasha,
        fl_pytorch,
        coo_int32,
        coo_int64,
        bitmap,
        entropy,
    )
}

SOURCES: Mapping[str, str] = {
    "dense": "https://github.com/adap/flower",
    "dispfl": "https://github.com/rong-dai/DisPFL",
    "feddip": "https://github.com/EricLoong/feddip",
    "feddst": "https://github.com/bibikar/feddst/blob/main/dst.py",
    "feddst_prunefl": "https://github.com/bibikar/feddst/blob/main/prunefl.py",
    "ssfl": "https://github.com/adap/flower/pull/7900",
    "flsim_coo": "https://github.com/facebookresearch/FLSim/blob/main/flsim/channels/sparse_mask_channel.py",
    "flsim_bitmask": "https://github.com/facebookresearch/FLSim/blob/main/flsim/channels/sparse_mask_channel.py",
    "dasha": "https://github.com/adap/flower/tree/main/baselines/dasha",
    "fl_pytorch": "https://github.com/burlachenkok/flpytorch/blob/main/fl_pytorch/utils/compressors.py",
    "coo_int64": "https://github.com/SMILELab-FL/FedLab",
}
"""Where a formula was published; the others are plain counts that no single repository owns."""


def traffic(ledger: Ledger, *, index_dims: float) -> dict[Traffic, int]:
    """The training messages of a ledger -> how many of each; messages of equal size are one entry."""
    section = ledger.column("section")
    ends = section == CODES["section"]["header"]
    message = np.cumsum(ends) - ends  # a header is its message's last row
    clients, down = ledger.column("client")[ends], ledger.column("direction")[ends] == CODES["direction"]["down"]

    def at(name: str, column: str) -> np.ndarray:
        rows = section == CODES["section"][name]
        found = np.zeros(len(clients), dtype=np.int64)
        found[message[rows]] = ledger.column(column)[rows] if column else 1
        return found

    facts = np.stack(
        [
            ~down,
            at("values", "dense_bytes") // 4,
            at("values", "nnz"),
            at("dense", "dense_bytes") // 4,
            at("buffers", "dense_bytes") // 4,
            at("mask", ""),
            np.zeros(len(clients), dtype=np.int64),
        ],
        axis=1,
    )
    facts = facts[train := ledger.column("phase")[ends] == CODES["phase"]["train"]]
    facts[np.unique(clients[train], return_index=True)[1], -1] = 1
    distinct, counts = np.unique(facts, axis=0, return_counts=True)
    return {
        Traffic(bool(up), prunable, sent, other, buffers, bool(mask), bool(first), index_dims): count
        for (up, prunable, sent, other, buffers, mask, first), count in zip(
            distinct.tolist(), counts.tolist(), strict=True
        )
    }


def estimate(ledger: Ledger, *, index_dims: float) -> dict[str, int]:
    """Name -> bytes claimed for all training messages."""
    messages = traffic(ledger, index_dims=index_dims)
    return {name: round(sum(formula(t) * n for t, n in messages.items())) for name, formula in ESTIMATES.items()}
