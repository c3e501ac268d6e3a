"""What each process builds by itself, as short hashes: data, labels, split, partition, initial model, the user's code.

    require_same(servers, fingerprint(...), "a worker process")     # before round 1

A data source that numbers its classes by the order of a set, or a split that nobody seeded, is another one in each process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fl_sim.communication.exchange import Exchange, Frozen
from fl_sim.core.types import Params, UserError
from fl_sim.data import Data, Split
from fl_sim.data.parts import Parts

World = Mapping[str, str]
"""What -> hash, in the order of `HINTS`; of the code, a hash for each file, as JSON."""

HINTS: Mapping[str, str] = {
    "data": "every process must read the same files",
    "labels": "number the classes in a fixed order, for instance sorted(set(names))",
    "split": "let it depend on a fixed seed alone",
    "partition": "let it depend on the labels and a fixed seed alone",
    "model": "draw initial weights and constant tensors from the global generators, which are seeded when the model is built",
    "code": "the code of the client, model, data source or partition changed",
}
WHOLE_BYTES = 1 << 28
"""Images up to this size are read whole, at memory speed; of larger sets only their size and `SAMPLED` images."""
SAMPLED = 2048
WORDS = (np.uint64, np.uint32, np.uint16, np.uint8)


def fingerprint(
    data: Data,
    partitions: Parts,
    models: Sequence[tuple[Params, Exchange, str]],
    code: Mapping[str, Mapping[str, str]],
) -> World:
    """Hash what a process has built.

    Args:
        data, partitions: the samples, and the positions of each client's samples in the training set.
        models: of each model the seeded parameters that travel, the exchange, with the hash of those that do not, and a hash of
            what else it holds, such as constant buffers.
        code: part -> file -> hash, of the user's parts that clients run.
    """
    splits = [split for split in (data.train, data.validation, data.test, data.proxy) if split is not None]
    images, labels = _whatever_the_order(splits)
    return {
        "data": _hash([str((sum(map(len, splits)), data.shape)).encode(), images]),
        "labels": _hash([str(data.num_classes).encode(), labels]),
        "split": _hash([part for split in splits for part in _ordered(split)]),
        "partition": xxhash.xxh3_64_hexdigest(_lengths_and_positions(partitions).data),
        "model": _hash([part for model in models for part in _model(*model)]),
        "code": json.dumps(code, sort_keys=True),
    }


def _lengths_and_positions(partitions: Parts) -> NDArray[np.int64]:
    """Each client's positions after their size in bytes, one client after the other."""
    words = np.empty(len(partitions) + len(partitions.positions), dtype="<i8")
    at = partitions.starts[:-1] + np.arange(len(partitions))
    words[at] = 8 * partitions.sizes
    rest = np.ones(len(words), dtype=bool)
    rest[at] = False
    words[rest] = partitions.positions
    return words


def _model(initial: Params, exchange: Exchange, further: str) -> Iterator[bytes]:
    yield from (Frozen.digest_of(initial), exchange.schema.hash, further.encode())
    yield b"" if exchange.frozen is None else exchange.frozen.encode()
    if exchange.extra:
        yield exchange.extra.hash


def require_same(expected: World, found: World, who: str, whose: str = "the server") -> None:
    """Complain of a process that built another world than the one it is to work with; a part that either lacks is passed.

    Args:
        expected, found: what there should be, what there is.
        who, whose: the processes that `found` and `expected` are of, for the message.

    Raises:
        UserError: names what differs, and how that is avoided.
    """
    differing = [name for name in HINTS if expected.get(name, found.get(name)) != found.get(name, expected.get(name))]
    if differing:
        files = _files(expected["code"], found["code"]) if "code" in differing else []
        named = f" ({', '.join(files)})" if files else ""
        raise UserError(
            f"{who} has other {', '.join(differing)}{named} than {whose}, from the same config; {HINTS[differing[0]]}"
        )


def _files(expected: str, found: str) -> list[str]:
    """The files whose code differs, each with the config key of its part, and with its path where this process loaded it."""
    before, after = _by_file(expected), _by_file(found)
    differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [f"{part}: {_path_of(file)}" for part, file in differing]


def _by_file(code: str) -> dict[tuple[str, str], str]:
    """(config key of a part, file) -> hash."""
    try:
        return {(part, file): digest for part, files in json.loads(code).items() for file, digest in files.items()}
    except (ValueError, AttributeError, RecursionError):
        return {}  # of a checkpoint that somebody changed


def _path_of(file: str) -> str:
    """Where this process found `helpers/losses.py`; the name itself where it has not imported it."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return str(getattr(sys.modules.get(name), "__file__", None) or file)


def _whatever_the_order(splits: Sequence[Split]) -> tuple[bytes, bytes]:
    """Sums over all samples that neither their order nor the split changes: of images, and of images with their labels.

    Of what is too large to be read, labels are counted and images are passed over.
    """
    counts = np.bincount(np.concatenate([_codes(split) for split in splits]))
    if sum(len(split) * split.shape.numel() for split in splits) > WHOLE_BYTES:
        return b"", counts.tobytes()
    images = labelled = 0
    for split in (each for each in splits if len(each)):
        sums = _sums(split)
        images += int(sums.sum(dtype=np.uint64))
        labelled += int((sums * (_codes(split) + 1).astype(np.uint64)).sum(dtype=np.uint64))
    return str(images % 2**64).encode(), str(labelled % 2**64).encode() + counts.tobytes()


def _codes(split: Split) -> NDArray[np.int64]:
    """A number for each sample, of its target: the class + 1, or a checksum of 16 bits."""
    labels = split.labels.cpu().numpy()
    if labels.ndim == 1 and labels.dtype == np.int64:
        return labels + 1
    rows = np.ascontiguousarray(labels).reshape(len(labels), -1).view(np.uint8).astype(np.int64)
    codes: NDArray[np.int64] = (rows * (1 + np.arange(rows.shape[1]))).sum(axis=1) % (1 << 16)
    return codes


def _sums(split: Split) -> NDArray[np.uint64]:
    """One number for each image: the sum of its bytes, several at a time, modulo 2**64."""
    images = split.images.cpu().numpy()
    rows = np.ascontiguousarray(images).reshape(len(images), -1).view(np.uint8)
    word = next(kind for kind in WORDS if rows.shape[1] % np.dtype(kind).itemsize == 0)
    sums: NDArray[np.uint64] = rows.view(word).sum(axis=1, dtype=np.uint64)
    return sums


def _ordered(split: Split) -> Iterator[bytes]:
    """A split's labels in their order, a sample of its images, and how those are normalised."""
    chosen = np.unique(np.linspace(0, len(split) - 1, min(len(split), SAMPLED)).astype(np.int64))
    yield str(len(split)).encode()
    if len(split):
        yield _bytes(split.subset(chosen).images)
    yield _bytes(split.labels)
    yield from (_bytes(each) for each in (split.mean, split.std, split.groups, split.weights) if each is not None)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _hash(parts: Sequence[bytes]) -> str:
    check = xxhash.xxh3_64()
    for part in parts:
        check.update(len(part).to_bytes(8, "little") + part)
    return check.hexdigest()
