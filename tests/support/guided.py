"""Coverage-guided fuzzing of every reader; needs atheris (`pip install atheris`), which the tests do not.

    PYTHONPATH=. python tests/support/guided.py payload -max_total_time=60
    PYTHONPATH=. python tests/support/guided.py all 60

An input that makes a reader raise anything but its own error, or take more than 2 GB, is written to a file crash-*.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fl_sim"]):
    import payloads
    import xxhash
    from federation import run_tiny
    from images_in_parquet import PARQUET

    from fl_sim import Experiment, Report
    from fl_sim.codecs import CorruptPayload
    from fl_sim.codecs.payload_format import CHECK
    from fl_sim.communication.ledger import Ledger
    from fl_sim.communication.mask_log import MaskRecorder
    from fl_sim.core.types import UserError
    from fl_sim.data.parquet_folder import choose_columns, read_parquet
    from fl_sim.report import comparison, estimates, floors, per_run
    from fl_sim.simulation.checkpoint_store import Damaged, read_manifest

Target = tuple[Callable[[bytes], object], list[bytes]]
"""(reads hostile bytes, valid ones to start from)"""


def refusing(read: Callable[[bytes], object], *allowed: type[Exception]) -> Callable[[bytes], None]:
    def attempt(data: bytes) -> None:
        try:
            read(data)
        except allowed as error:
            if "\n" in str(error):
                raise AssertionError("more than one line") from error

    return attempt


def payload_target(place: Path) -> Target:
    """The first byte chooses the codec; the checksum is made right, or nothing behind it would ever be reached."""
    cases = [make() for make in payloads.CASES.values()]

    def read(data: bytes) -> object:
        case = cases[data[0] % len(cases)] if data else cases[0]
        body = data[1:]
        whole = body + CHECK.pack(xxhash.xxh3_64_intdigest(body) & 0xFFFFFFFF)
        return case.decode(whole)

    starts = [bytes([i]) + case.encode()[: -CHECK.size] for i, case in enumerate(cases)]
    return refusing(read, CorruptPayload), [start for start in starts if len(start) < 4000]


def config_target(place: Path) -> Target:
    path = place / "x.toml"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        experiment = Experiment.load(path)
        assert Experiment.from_tree(tomllib.loads(experiment.to_toml())) == experiment
        return experiment

    return refusing(read, UserError), [*(p.read_bytes() for p in sorted(Path("configs").glob("*.toml")))]


def checkpoint_target(place: Path) -> Target:
    path, name = place / "round-00000001.json", "0" * 64
    manifest = {"experiment": "x", "precision": "float32", "round": 1, "messages": 4, "training_s": 1.0, "wall_s": 2.0}
    manifest |= {
        "simulated_s": 0.0,
        "failures": {},
        "server": name,
        "held": {name: [1]},
        "answered": [1],
        "holders": {},
    }
    manifest |= {"clients": {"1": {"a": name}}, "ledger": [{"name": name, "stop": 3}], "rounds": [], "masks": []}

    def read(data: bytes) -> object:
        text = data.decode(errors="replace")
        sums = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}
        path.write_text(json.dumps(sums))
        return read_manifest(path)

    return refusing(read, Damaged), [json.dumps(manifest).encode()]


def parquet_target(place: Path) -> Target:
    path = place / "train-0.parquet"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return read_parquet(place, [path], choose_columns(place, [path]))

    return refusing(read, UserError), [PARQUET]


def folder_target(place: Path) -> Target:
    """The first byte chooses the file."""
    folder = run_tiny(place, "model.name=mlp", "wire.record_masks=true").folder
    names = ["summary.json", "rounds.jsonl", "ledger.parquet", "masks.parquet"]
    files = {name: (folder / name).read_bytes() for name in names}

    def read(data: bytes) -> object:
        name = names[data[0] % len(names)] if data else names[0]
        (folder / name).write_bytes(data[1:])
        try:
            if name == "masks.parquet":
                return MaskRecorder([]).extend(folder / name)
            if name == "ledger.parquet":
                return Ledger.read(folder / name)
            loaded = Report.load(folder)
            return [comparison([loaded]), per_run(loaded), estimates(loaded), floors(loaded)]
        finally:
            (folder / name).write_bytes(files[name])

    return refusing(read, UserError), [bytes([i]) + files[name] for i, name in enumerate(names)]


TARGETS: Mapping[str, Callable[[Path], Target]] = {
    "payload": payload_target,
    "config": config_target,
    "checkpoint": checkpoint_target,
    "parquet": parquet_target,
    "folder": folder_target,
}


def main(name: str, *options: str) -> None:
    if name == "all":
        for each in TARGETS:
            subprocess.run([sys.executable, __file__, each, f"-max_total_time={options[0]}"], check=True)
        return
    place = Path(tempfile.mkdtemp())
    attempt, starts = TARGETS[name](place)
    corpus = place / "corpus"
    corpus.mkdir()
    for start in starts:
        attempt(start)
        (corpus / hashlib.sha256(start).hexdigest()).write_bytes(start)
    longest = 2 * max(map(len, starts))
    atheris.Setup(
        [sys.argv[0], *options, f"-max_len={longest}", "-rss_limit_mb=2048", "-print_final_stats=1", str(corpus)],
        attempt,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
