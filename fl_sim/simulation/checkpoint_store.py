"""Checkpoints on disk: objects named by the SHA-256 of their bytes, and one small manifest a checkpoint.

    checkpoint/objects/<sha256>     safetensors (tensors), parquet (ledger, recorded masks), JSON lines (rounds) or a pack
    checkpoint/round-00000012.json  {"sha256": of the manifest's text, "manifest": which objects, and the scalars}

An object is written once however many checkpoints, clients or rounds name it, so a checkpoint costs what changed since
the last one. Everything is written beside, flushed to the device and renamed, objects before the manifest that names
them: whenever the power goes, the newest manifest on disk is complete. The previous one is kept. Nothing is pickled;
every byte is checked against its name or its sum before it is used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import safe_open

from fl_sim.core.files import flush, open_plain, read_plain, write_atomically
from fl_sim.core.types import Params

log = logging.getLogger("fl_sim")
KEPT = 2
"""Checkpoints on disk: the newest, and the one before for the day the newest is damaged."""
OBJECTS = "objects"
BLOCK = 1 << 20
"""Bytes of an object that are read at a time to compare it with its name."""
LEAD = 8
"""Objects that are flushed at once: a device takes the flushes of several threads together."""
_MANIFEST = re.compile(r"^round-\d{8}\.json$")

ObjectName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""Only this names a file, so a manifest cannot reach outside its folder."""

Count = Annotated[int, Field(ge=0, le=1 << 53)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Parts = bytes | Iterable[bytes | memoryview]
"""An object's bytes, whole or in parts that can be iterated over twice."""
Put = Callable[[Parts], str]


class Damaged(ValueError):
    """A checkpoint that is incomplete or whose bytes are not those that were written."""


class Record(BaseModel):
    """A part of a checkpoint that is JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Chunk(Record):
    """Chunk of a log that only grows.

    Attributes:
        name: the object that holds the chunk.
        stop: number of the log's entries up to the end of the chunk.
    """

    name: ObjectName
    stop: Count


class FlightRecord(Record):
    """A `FlightSnapshot`; `reply` is the object that holds its bytes."""

    client: Count
    version: Count
    order: Count
    sent_s: Seconds
    down_bytes: Count
    message_id: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}$")]
    reply: ObjectName
    holds: Count = 0


class ServerRecord(Record):
    """The server's side of one model: a `ServerSnapshot` without its round.

    Attributes:
        tensors: the object that holds parameters, pruning mask, optimizer memory and the sparse broadcast.
        held: object of a pruning mask -> clients that hold the mask.
        answered, simulated_s, failures: as in `ServerSnapshot`.
        holders: client -> version, `ServerSnapshot.client_versions`; -1 = unknown, as after a failure.
        flights: updates under way. bases: version -> object of the parameters and mask that some of them started from.
        dispatched: tasks sent so far, where there are flights.
    """

    tensors: ObjectName
    held: dict[ObjectName, list[Count]]
    answered: list[Count]
    holders: dict[Count, Annotated[int, Field(ge=-1, le=1 << 53)]]
    simulated_s: Seconds
    failures: dict[str, Count]
    flights: list[FlightRecord] = Field(default_factory=list)
    bases: dict[Count, ObjectName] = Field(default_factory=dict)
    dispatched: Count = 0

    @property
    def objects(self) -> set[str]:
        """Every object that it names."""
        return {self.tensors, *self.held, *self.bases.values(), *(flight.reply for flight in self.flights)}


class Manifest(Record):
    """Manifest of a checkpoint: scalars, and the names of the objects that hold the rest.

    Attributes:
        experiment: id of the experiment. precision: the settled precision, which a probe of the machine may have chosen.
        engine: the engine that computed the rounds, which a rule may have chosen; empty = not recorded.
        world: hashes of data, labels, split, partition, initial models and the user's code.
        round: rounds finished. messages: messages numbered so far (the numbers' lengths are part of Flower's traffic).
        training_s, wall_s: seconds spent so far.
        models: the server's side of each model, in the order of the config.
        clients: partition -> record of its kept state -> object, where the record is large.
        packs: objects that hold the others, the oldest first (`fl_sim.simulation.checkpoint_states`).
        ledger, rounds, masks: chunks of the three logs, in order.
    """

    format: Literal["fl_sim.checkpoint/2"] = "fl_sim.checkpoint/2"
    experiment: str
    precision: str
    engine: str = ""
    world: dict[str, str] = Field(default_factory=dict)
    round: Count
    messages: Count
    training_s: Seconds
    wall_s: Seconds
    models: list[ServerRecord]
    clients: dict[Count, dict[str, ObjectName]]
    packs: list[ObjectName] = Field(default_factory=list)
    ledger: list[Chunk]
    rounds: list[Chunk]
    masks: list[Chunk]

    @property
    def objects(self) -> set[str]:
        """Every object that this checkpoint needs."""
        chunks = [chunk.name for log_ in (self.ledger, self.rounds, self.masks) for chunk in log_]
        kept = [name for records in self.clients.values() for name in records.values()]
        servers = [name for model in self.models for name in model.objects]
        return {*servers, *chunks, *kept, *self.packs}


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._objects = folder, folder / OBJECTS
        # Objects that this process wrote or checked; one that merely lies there may be damaged and is written again.
        self._known: set[str] = set()
        self._kept: list[Manifest] = []

    def path(self, name: str) -> Path:
        """Path of an object."""
        return self._objects / name

    @contextmanager
    def writing(self) -> Iterator[Put]:
        """A function that stores bytes and returns their name; when the block ends, all of them are on the device.

        Raises:
            OSError: the disk is full or not writable.
        """
        writes: deque[Future[None]] = deque()

        def put(data: Parts) -> str:
            name = _named(data)
            if name not in self._known:
                self._known.add(name)
                writes.append(pool.submit(write_atomically, self.path(name), data))
                if len(writes) > LEAD:
                    writes.popleft().result()
            return name

        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(LEAD) as pool:
                yield put
                for write in writes:
                    write.result()
        except OSError:
            self._known.clear()
            raise

    def get(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            Damaged: it is missing, or its bytes are not those that were stored.
        """
        self._require_whole(name)
        return read_plain(self.path(name))

    def opened(self, name: str) -> BinaryIO:
        """The file of an object, for reading; raises as `get` does."""
        self._require_whole(name)
        return open_plain(self.path(name))

    def tensors(self, name: str) -> Params:
        """The tensors of an object, read from its file one after the other.

        Raises:
            Damaged: it is missing, or its bytes are not those that were stored.
            SafetensorError: they are no tensors.
        """
        self._require_whole(name)
        with safe_open(self.path(name), framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118, it is no dict

    def _require_whole(self, name: str) -> None:
        """Compare an object with its name, piece by piece. Raises Damaged."""
        try:
            with open_plain(self.path(name)) as stream:
                found = _named(iter(lambda: stream.read(BLOCK), b""))
        except OSError as error:
            raise Damaged(f"object {name[:12]}: {error.strerror or error}") from error
        if found != name:
            raise Damaged(f"object {name[:12]}: wrong checksum")
        self._known.add(name)

    def commit(self, manifest: Manifest) -> None:
        """Make a manifest, whose objects were all put, the newest checkpoint; drop those before the previous one.

        Raises:
            OSError: the disk is full or not writable; the checkpoints before are untouched.
        """
        text = manifest.model_dump_json()
        whole = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text})
        flush(self._objects)
        write_atomically(self._place(manifest), whole.encode())
        flush(self.folder)
        self._kept = [*self._kept, manifest][-KEPT:]
        self._drop_others()

    def _place(self, manifest: Manifest) -> Path:
        return self.folder / f"round-{manifest.round:08}.json"

    def _drop_others(self) -> None:
        """Delete what neither kept checkpoint names."""
        places = {self._place(manifest).name for manifest in self._kept}
        needed = set().union(*(manifest.objects for manifest in self._kept))
        for folder, wanted in ((self.folder, {*places, OBJECTS}), (self._objects, needed)):
            for entry in os.scandir(folder):
                if entry.name not in wanted:
                    os.unlink(entry.path)
        self._known &= needed

    def keep_newest(self) -> None:
        """Drop all checkpoints but the newest that is whole.

        Raises:
            OSError: the disk is not writable.
        """
        if newest := (self._kept or list(itertools.islice(self.manifests(), 1)))[-1:]:
            self._kept = newest
            self._drop_others()

    def check(self, manifest: Manifest) -> None:
        """Read every object of a checkpoint.

        Raises:
            Damaged: one is missing or not what was stored.
        """
        for name in sorted(manifest.objects):
            self._require_whole(name)

    def resume_from(self, manifest: Manifest) -> None:
        """The run goes on from this checkpoint: it is the one to keep beside the next."""
        self._kept = [manifest]

    def manifests(self) -> Iterator[Manifest]:
        """The checkpoints on disk whose manifest is whole, newest first; a damaged one is logged and passed over."""
        for name in reversed(self._places()):
            try:
                yield read_manifest(self.folder / name)
            except Damaged as error:
                log.warning("checkpoint %s is damaged (%s); trying the one before", self.folder / name, error)

    def any(self) -> bool:
        """Whether a checkpoint was ever finished here, damaged or not."""
        return bool(self._places())

    def _places(self) -> list[str]:
        names = [entry.name for entry in os.scandir(self.folder)] if self.folder.is_dir() else []
        return sorted(filter(_MANIFEST.match, names))


def _named(data: Parts) -> str:
    """The name of an object: SHA-256 of its bytes, as hexadecimal digits."""
    check = hashlib.sha256()
    for part in (data,) if isinstance(data, bytes) else data:
        check.update(part)
    return check.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and check one manifest.

    Raises:
        Damaged: anything is wrong with it.
    """
    try:
        whole = json.loads(read_plain(path))
        if not isinstance(whole, dict) or not isinstance(text := whole.get("manifest"), str):
            raise Damaged("no manifest")
        if hashlib.sha256(text.encode()).hexdigest() != whole.get("sha256"):
            raise Damaged("wrong checksum")
        return Manifest.model_validate_json(text)
    except OSError as error:
        raise Damaged(error.strerror or str(error)) from error
    except ValidationError as error:
        raise Damaged(what_is_wrong(error)) from error
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, Damaged) else Damaged("not JSON") from error


def what_is_wrong(error: ValidationError) -> str:
    """The first thing that is wrong with a record, in one line; pydantic's own text has four."""
    first = error.errors()[0]
    return f"{first['loc']}: {first['msg']}" if first["loc"] else first["msg"]
