"""Codecs on the recorded updates of a run: bytes beside the floor of each, and speeds, with other packages where installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from fl_sim.bench.contest import quickest
from fl_sim.codecs import VALUES, decode, describe, encode, is_relative
from fl_sim.codecs.bits import floor_bits
from fl_sim.codecs.integer_coding import BLOCK, Rounded, Signs
from fl_sim.communication.payload_log import FOLDER, recorded_files, require_recorded
from fl_sim.communication.recorded_updates import RecordedUpdate, recorded_updates
from fl_sim.config.experiment import Experiment
from fl_sim.core.types import FlatMask, UserError
from fl_sim.report import Report
from fl_sim.simulation.federation import Federation
from fl_sim.sparsity import global_topk, magnitude, topk_mask

Floats = NDArray[np.float32]
DENSITIES = (0.01, 0.05)
LOSSLESS = ("float32-zstd", "float32-delta")
INTEGERS = tuple(name for name, coder in VALUES.items() if isinstance(coder, Rounded | Signs))


@dataclass(frozen=True)
class Row:
    """One codec on all updates of some recorded rounds; MB/s count the dense model, 4 bytes a coordinate.

    Attributes:
        rounds: recorded rounds.
        what: what is coded: the whole model, integers of the change, masks of its largest values.
        codec: how.
        against: what `ratio` is divided by: raw float32, order-0 entropy, entropy of independent bits of each tensor.
        ratio: bytes over that, mean over updates.
    """

    rounds: str
    what: str
    codec: str
    against: str
    ratio: float
    encode_mbps: float
    decode_mbps: float


def measure(run: Report, *, repeats: int = 3) -> list[Row]:
    """Every codec on the first and on the last recorded rounds of a run, on one thread.

    Raises:
        UserError: a run without recorded updates of all weights, as float32.
    """
    torch.set_num_threads(1)
    experiment = Experiment.from_tree(run.config, where=f"config {run.folder / 'config.toml'}")
    require_recorded(run.folder / FOLDER, experiment.wire.record_payloads, run.ledger)
    files = [number for number, _ in recorded_files(run.folder / FOLDER)]
    if not files or experiment.wire.broadcast is not None or experiment.capacities:
        raise UserError(f"{run.folder}: needs wire.record_payloads = 1, one model and no broadcast")
    track = Federation.build(experiment, precision=run.results.precision, quiet=True).first
    half = max(1, len(files) // 2)
    rows = []
    for rounds in (files[:half], files[half:]):
        updates = list(recorded_updates(run.folder / FOLDER, track.exchange, track.initial, rounds))
        if updates:
            rows += list(_rows(updates, repeats))
    return rows


def _rows(updates: Sequence[RecordedUpdate], repeats: int) -> Iterator[Row]:
    numbers = [update.round for update in updates]
    rounds = f"{min(numbers)} to {max(numbers)}"
    for name in LOSSLESS:
        yield _row(rounds, "model", name, "raw", [_ours(update, name, repeats) for update in updates])
    for name, coder in others().items():
        yield _row(
            rounds, "model", name, "raw", [_other(update.sent.flat.numpy(), coder, repeats) for update in updates]
        )
        if name in ORDERED:
            found = [_other(steps(update), coder, repeats) for update in updates]
            yield _row(rounds, "model", f"{name}, given the received model", "raw", found)
    for name in INTEGERS:
        yield _row(rounds, "change", name, "entropy", [_integers(update, name, repeats) for update in updates])
    for density in DENSITIES:
        for contexts, name in ((False, "fast"), (True, "smallest")):
            tried = [_mask(update, density, contexts, repeats) for update in updates]
            yield _row(rounds, f"mask {density:.0%}", name, "independent bits", tried)


Tried = tuple[float, float, float]
"""Ratio, seconds of encoding and of decoding a megabyte of dense model."""


def _row(rounds: str, what: str, codec: str, against: str, tried: Sequence[Tried]) -> Row:
    ratio, writing, reading = (fmean(part) for part in zip(*tried, strict=True))
    return Row(rounds, what, codec, against, ratio, 1 / writing, 1 / reading)


def _ours(update: RecordedUpdate, values: str, repeats: int) -> Tried:
    schema, base = update.schema, update.received if is_relative(values) else None
    write = partial(encode, update.sent, None, schema=schema, values=values, base=base)
    data = write()
    megabytes = 4 * schema.size / 1e6
    reading = quickest(lambda: decode(data, schema=schema, base=base), repeats)
    return len(data) / (4 * schema.size), quickest(write, repeats) / megabytes, reading / megabytes


def _change(update: RecordedUpdate) -> torch.Tensor:
    return update.sent.flat - update.received.flat


def _integers(update: RecordedUpdate, values: str, repeats: int) -> Tried:
    schema = update.schema
    change = schema.view(_change(update))
    write = partial(encode, change, None, schema=schema, values=values)
    data = write()
    got, megabytes = decode(data, schema=schema)[0], 4 * schema.size / 1e6
    coder, whole = VALUES[values], []
    for name in schema.names:
        for part, sent in zip(got[name].reshape(-1).split(BLOCK), change[name].reshape(-1).split(BLOCK), strict=True):
            unit = sent.abs().max() / coder.top if isinstance(coder, Rounded) else part.abs().max()
            whole.append((part / unit.clamp(min=1e-45)).round().numpy())
    counts = np.unique(np.concatenate(whole), return_counts=True)[1]
    entropy = float(-(counts * np.log2(counts / counts.sum())).sum()) / 8
    size = describe(data, schema=schema).sections["values"]
    reading = quickest(lambda: decode(data, schema=schema), repeats)
    return size / entropy, quickest(write, repeats) / megabytes, reading / megabytes


def _mask(update: RecordedUpdate, density: float, contexts: bool, repeats: int) -> Tried:
    schema = update.schema
    change = magnitude(schema.view(_change(update)))
    mask = FlatMask.pack(topk_mask(change, global_topk(change, density)))
    write = partial(encode, update.sent, mask, schema=schema, contexts=contexts)
    data, megabytes = write(), 4 * schema.size / 1e6
    floor = sum(floor_bits(int(part.count_nonzero()), part.numel()) for part in mask.values()) / 8
    size = describe(data, schema=schema).sections["mask"]
    reading = quickest(lambda: decode(data, schema=schema), repeats)
    return size / floor, quickest(write, repeats) / megabytes, reading / megabytes


# -- other packages ----------------------------------------------------------------------------------------------------

Numbers = Floats | NDArray[np.int32]
Coder = tuple[Callable[[Numbers], bytes], Callable[[bytes], object]]
ORDERED = ("pcodec",)
"""Packages that code integers by their size, so that `steps` can tell them of the received model."""


def steps(update: RecordedUpdate) -> NDArray[np.int32]:
    """How many float32 values lie between what was received and what was sent, modulo 2^32: exact for whoever holds the former."""
    places = (model.flat.numpy().view(np.int32) for model in (update.sent, update.received))
    sent, received = (place ^ (place >> 31 & 0x7FFFFFFF) for place in places)
    change: NDArray[np.int32] = sent - received
    return change


def _other(values: Numbers, coder: Coder, repeats: int) -> Tried:
    write, read = coder
    data, megabytes = write(values), values.nbytes / 1e6
    writing, reading = quickest(lambda: write(values), repeats), quickest(lambda: read(data), repeats)
    return len(data) / values.nbytes, writing / megabytes, reading / megabytes


def others() -> dict[str, Coder]:
    """Lossless codecs of other packages, those that are installed."""
    found: dict[str, Coder] = {
        "zstd -3": (lambda values: zstandard.compress(values.tobytes(), 3), zstandard.decompress),
    }
    for package, make in OTHERS.items():
        try:
            found |= make(importlib.import_module(package))
        except ImportError:
            continue
    return found


def _blosc2(package: object) -> dict[str, Coder]:
    pack, unpack = package.compress2, package.decompress2  # type: ignore[attr-defined]
    return {"blosc2": (lambda values: bytes(pack(values, typesize=4)), unpack)}


def _pcodec(package: object) -> dict[str, Coder]:
    pco = package.standalone  # type: ignore[attr-defined]
    config = package.ChunkConfig()  # type: ignore[attr-defined]
    return {"pcodec": (lambda values: bytes(pco.simple_compress(values, config)), pco.simple_decompress)}


def _fpzip(package: object) -> dict[str, Coder]:
    pack, unpack = package.compress, package.decompress  # type: ignore[attr-defined]
    return {"fpzip": (lambda values: bytes(pack(values.reshape(1, 1, 1, -1), precision=0)), unpack)}


def _zipnn(package: object) -> dict[str, Coder]:
    zipper = package.ZipNN(bytearray_dtype="float32", input_format="byte")  # type: ignore[attr-defined]
    return {"zipnn": (lambda values: bytes(zipper.compress(bytearray(values.tobytes()))), zipper.decompress)}


OTHERS: Mapping[str, Callable[[object], dict[str, Coder]]] = {
    "blosc2": _blosc2,
    "pcodec": _pcodec,
    "fpzip": _fpzip,
    "zipnn": _zipnn,
}
