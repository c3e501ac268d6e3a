"""Hostile files: configs, checkpoints, data, run folders. Each reader returns what it promises or says one line, never more."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from federation import run_tiny, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fl_sim import Experiment, Report, run
from fl_sim.checkpoint import Damaged, Manifest, read_manifest
from fl_sim.data import load as load_data
from fl_sim.federation import Federation
from fl_sim.files import write_atomically
from fl_sim.folder import run_folder
from fl_sim.ledger import Ledger
from fl_sim.model_file import read_model, write_model
from fl_sim.observer import Silent
from fl_sim.parquet import read_table
from fl_sim.report import comparison, estimates, floors, grouped, per_run, write_page
from fl_sim.report.page import page
from fl_sim.session import Session
from fl_sim.simulation import open_grid, resume
from fl_sim.types import UserError

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
LONG = settings(deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
LENGTHS = pytest.mark.parametrize("length", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)], ids=["quick", "long"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just("x" * 70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SEEDS = st.integers(0, 2**32 - 1)


def mutate(data: bytes, seed: int) -> bytes:
    """One to four edits: a flipped bit, another byte, a cut, an insertion, a repeated piece."""
    rng, edited = np.random.default_rng(seed), bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, kind = int(rng.integers(0, len(edited) + 1)), rng.integers(0, 5)
        if kind == 0 and at < len(edited):
            edited[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and at < len(edited):
            edited[at] = int(rng.choice([0, 0x7F, 0x80, 0xFF, 0x22, 0x7B]))
        elif kind == 2:
            del edited[at : at + int(rng.integers(1, 64))]
        elif kind == 3:
            edited[at:at] = rng.bytes(int(rng.integers(1, 16)))
        else:
            edited[at:at] = edited[at : at + int(rng.integers(1, 64))]
    return bytes(edited)


def replaced(tree: object, value: object, seed: int) -> object:
    """A copy of a JSON tree with one node, drawn by the seed, replaced."""
    rng = np.random.default_rng(seed)
    copy = json.loads(json.dumps(tree))
    node = copy
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return copy
        key = keys[int(rng.integers(len(keys)))]
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.4:
            node[key] = value
            return copy
        node = node[key]


def one_line(action: Callable[[], object], *allowed: type[Exception]) -> object:
    """The action's result, or None where it refuses in one line."""
    try:
        return action()
    except (UserError, *allowed) as error:
        said = str(error)
    assert "\n" not in said
    return None


# -- configs -----------------------------------------------------------------------------------------------------------

CONFIG = Path("configs/quickstart_topk.toml").read_bytes()
RESOLVED = Experiment.load("configs/quickstart_topk.toml").model_dump(mode="json", exclude_none=True)


@LENGTHS
def test_configs(tmp_path: Path, length: settings) -> None:
    path = tmp_path / "config.toml"

    @length
    @given(seed=SEEDS, value=JSON)
    def bytes_and_trees(seed: int, value: object) -> None:
        path.write_bytes(mutate(CONFIG, seed))
        for action in (
            lambda: Experiment.load(path),
            lambda: Experiment.from_tree(replaced(RESOLVED, value, seed)),
            lambda: Experiment.load("configs/quickstart.toml", [f"data.alpha={value}"]),
        ):
            read = one_line(action)
            if isinstance(read, Experiment):
                assert len(read.id) == 8
                assert "/" not in run_folder(read).name
                assert run_folder(read).name not in ("", ".", "..")

    bytes_and_trees()


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Stop(Silent):
    def round(self, row: Mapping[str, float]) -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A run that stopped after its first round, with client state, a mask and recorded masks."""
    options = [
        "client.target=clients.presets:topk",
        "wire.error_feedback=true",
        "wire.record_masks=true",
        "strategy.target=strategies.presets:global_magnitude",
        "model.name=mlp",
    ]
    experiment = tiny(tmp_path_factory.mktemp("stopped"), *options)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, Stop())
    return experiment


def signed(path: Path, text: str) -> None:
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}))


def store_object(place: Path, data: bytes) -> str:
    name = hashlib.sha256(data).hexdigest()
    (place / "objects" / name).write_bytes(data)
    return name


@LENGTHS
def test_checkpoints_whose_sums_are_right(stopped: Experiment, length: settings) -> None:
    """An attacker can compute checksums: a manifest or an object that is nonsense must be refused all the same."""
    place = run_folder(stopped) / "checkpoint"
    path = next(place.glob("round-*.json"))
    before = path.read_bytes()
    manifest = json.loads(json.loads(before)["manifest"])
    federation = Federation.build(stopped)
    objects = {p.name: p.read_bytes() for p in (place / "objects").iterdir()}

    def restore() -> object:
        with open_grid(stopped, federation) as grid:
            session = Session(stopped, federation, run_folder(stopped), Ledger())
            session.restore(grid)
            return session

    @length
    @given(seed=SEEDS, value=JSON)
    def trees(seed: int, value: object) -> None:
        signed(path, json.dumps(replaced(manifest, value, seed)))
        one_line(restore)

    @length
    @given(seed=SEEDS)
    def contents(seed: int) -> None:
        name = sorted(objects)[seed % len(objects)]
        hostile = store_object(place, mutate(objects[name], seed))
        signed(path, json.dumps(manifest).replace(name, hostile))
        one_line(restore)
        if hostile not in objects:
            (place / "objects" / hostile).unlink()

    @length
    @given(seed=SEEDS)
    def raw(seed: int) -> None:
        path.write_bytes(mutate(before, seed))
        read = one_line(lambda: read_manifest(path), Damaged)
        assert read is None or isinstance(read, Manifest)

    for attack in (trees, contents, raw):
        attack()
    path.write_bytes(before)
    assert restore() is not None


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a" * 63 + "/", "A" * 64, ""])
def test_a_manifest_names_nothing_outside_its_folder(stopped: Experiment, tmp_path: Path, name: str) -> None:
    place = run_folder(stopped) / "checkpoint"
    manifest = json.loads(json.loads(next(place.glob("round-*.json")).read_bytes())["manifest"])
    signed(tmp_path / "round-00000001.json", json.dumps({**manifest, "server": name}))
    with pytest.raises(Damaged):
        read_manifest(tmp_path / "round-00000001.json")


# -- data files --------------------------------------------------------------------------------------------------------


def _png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), number % 256, dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def _table(**columns: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


IMAGES = [{"bytes": _png(i), "path": None} for i in range(40)]
LABELS = [i % 4 for i in range(40)]
PARQUET = _table(img=pa.array(IMAGES), label=pa.array(LABELS))
LAYOUTS: Mapping[str, Callable[[], bytes]] = {
    "no bytes field": lambda: _table(img=pa.array([{"path": "x"}] * 40), label=pa.array(LABELS)),
    "numbers for images": lambda: _table(img=pa.array(LABELS), label=pa.array(LABELS)),
    "words for images": lambda: _table(img=pa.array(["x"] * 40), label=pa.array(LABELS)),
    "no image": lambda: _table(img=pa.array([None] * 40, pa.binary()), label=pa.array(LABELS)),
    "words for labels": lambda: _table(img=pa.array(IMAGES), label=pa.array(["cat"] * 40)),
    "missing labels": lambda: _table(img=pa.array(IMAGES), label=pa.array([None, *LABELS[1:]])),
    "negative labels": lambda: _table(img=pa.array(IMAGES), label=pa.array([-1] * 40)),
    "an enormous label": lambda: _table(img=pa.array(IMAGES), label=pa.array([2**62, *LABELS[1:]])),
    "fractions for labels": lambda: _table(img=pa.array(IMAGES), label=pa.array([0.5] * 40)),
    "lists for labels": lambda: _table(img=pa.array(IMAGES), label=pa.array([[1]] * 40)),
    "nothing": lambda: _table(img=pa.array([], pa.binary()), label=pa.array([], pa.int64())),
    "a broken image": lambda: _table(
        img=pa.array([{"bytes": _png(0)[:-30], "path": None}, *IMAGES[1:]]), label=pa.array(LABELS)
    ),
    "a large image": lambda: _table(img=pa.array([{"bytes": _large(), "path": None}] * 40), label=pa.array(LABELS)),
    "a bomb": lambda: _table(img=pa.array([{"bytes": _bomb(), "path": None}, *IMAGES[1:]]), label=pa.array(LABELS)),
}


def _bomb() -> bytes:
    """A PNG that declares 2^31 - 1 times 2^31 - 1 pixels."""
    import zlib

    data = bytearray(_png(0))
    data[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _large() -> bytes:
    """A PNG of some kilobytes that holds nine million black pixels."""
    stream = io.BytesIO()
    Image.new("L", (3000, 3000)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test-0.parquet").write_bytes(PARQUET)
    return tmp_path / "data"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_of_another_layout_is_refused_in_one_line(data_folder: Path, layout: str) -> None:
    (data_folder / "train-0.parquet").write_bytes(LAYOUTS[layout]())
    with pytest.raises(UserError) as caught:
        load_data(str(data_folder))
    assert "\n" not in str(caught.value)


@LENGTHS
def test_parquet_data(data_folder: Path, length: settings) -> None:
    plain = _table(img=pa.array([image["bytes"] for image in IMAGES]), label=pa.array(LABELS))

    @length
    @given(seed=SEEDS)
    def files(seed: int) -> None:
        (data_folder / "train-0.parquet").write_bytes(mutate((PARQUET, plain)[seed % 2], seed))
        data = one_line(lambda: load_data(str(data_folder)))
        if data is not None:
            assert data.shape == (1, 8, 8)
            assert 0 <= int(data.train.labels.min()) <= int(data.train.labels.max()) < data.num_classes

    files()


# -- run folders -------------------------------------------------------------------------------------------------------


@LENGTHS
def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: settings) -> None:
    """Of imported runs: reading, every table of `fl-sim report`, and its page without the megabytes that draw the charts."""
    monkeypatch.setattr("fl_sim.report.page._plotly", str)
    folder = run_tiny(tmp_path, "model.name=mlp").folder
    names = ("summary.json", "rounds.jsonl", "ledger.parquet", "config.toml", "partition.json")
    files = {name: (folder / name).read_bytes() for name in names}
    summary = json.loads(files["summary.json"])
    rows = [json.loads(line) for line in files["rounds.jsonl"].splitlines()]
    counts = json.loads(files["partition.json"])

    def show() -> object:
        loaded = Report.load(folder)
        return [comparison([loaded]), per_run(loaded), estimates(loaded), floors(loaded), page(grouped([loaded]))]

    def attacked(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        one_line(show)
        (folder / name).write_bytes(files[name])

    @length
    @given(seed=SEEDS, value=JSON)
    def anything(seed: int, value: object) -> None:
        for name, data in files.items():
            attacked(name, mutate(data, seed))
        attacked("summary.json", json.dumps(replaced(summary, value, seed)).encode())
        hostile = [replaced(rows[0], value, seed), rows[1]]
        attacked("rounds.jsonl", "\n".join(map(json.dumps, hostile)).encode())
        attacked("partition.json", json.dumps(replaced(counts, value, seed)).encode())

    anything()
    deep = b"[" * 100_000 + b"]" * 100_000
    for name in ("summary.json", "rounds.jsonl", "partition.json"):
        attacked(name, deep)
    assert show()


def test_nothing_is_unpickled(stopped: Experiment, tmp_path: Path) -> None:
    """A pickle where a tensor file is due is refused and not run."""
    target = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (target,)

    stream = io.BytesIO()
    torch.save(Payload(), stream)
    place = run_folder(stopped) / "checkpoint"
    path = next(place.glob("round-*.json"))
    before = path.read_bytes()
    manifest = json.loads(json.loads(before)["manifest"])
    signed(path, json.dumps({**manifest, "server": store_object(place, stream.getvalue())}))
    federation = Federation.build(stopped)
    with open_grid(stopped, federation) as grid, pytest.raises(UserError):
        Session(stopped, federation, run_folder(stopped), Ledger()).restore(grid)
    path.write_bytes(before)
    assert not target.exists()


# -- where files lead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["checkpoint", "checkpoint/objects"])
def test_checkpoints_that_lead_elsewhere_are_refused(tmp_path: Path, place: str) -> None:
    """They delete what they do not know."""
    experiment, precious = tiny(tmp_path), tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("words")
    hostile = run_folder(experiment) / place
    hostile.parent.mkdir(parents=True)
    hostile.symlink_to(precious)
    for action in (run, resume):
        with pytest.raises(UserError, match="is a link"):
            action(experiment)
    assert (precious / "thesis.tex").read_text() == "words"


def test_a_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    report, victim = run_tiny(tmp_path, "model.name=mlp", "rounds=1"), tmp_path / "victim"
    victim.write_text("mine")
    for name in ("report.html", "report.html.tmp"):
        (report.folder / name).symlink_to(victim)
    write_page([report], report.folder / "report.html")
    assert victim.read_text() == "mine"
    assert "<html" in (report.folder / "report.html").read_text()


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"page")
    assert os.read(reader, 10) == b"page"
    assert pipe.is_fifo()
    os.close(reader)


def test_pipes_and_control_characters_in_a_run_folder_are_refused(tmp_path: Path) -> None:
    folder = run_tiny(tmp_path, "model.name=mlp", "rounds=1").folder
    summary = (folder / "summary.json").read_text()
    for text, words in (
        (summary.replace('"tiny"', '"\\u001b]0;pwned\\u0007"'), "control characters"),
        (summary.replace('"tiny"', '"' + "x" * 1000 + '"'), "at most 400"),
    ):
        (folder / "summary.json").write_text(text)
        with pytest.raises(UserError, match=words):
            Report.load(folder)
    (folder / "summary.json").write_text(summary)
    for name in ("summary.json", "rounds.jsonl", "ledger.parquet"):
        before = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match="not a plain file"):
            Report.load(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(before)


def test_rows_without_news_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_sim.parquet.FREE_ROWS", 1000)
    path, table = tmp_path / "bomb.parquet", pa.table({"label": pa.array(np.zeros(3_000_000, np.int64))})
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"3000000 rows in \d+ bytes"):
        read_table(path, ["label"])
    (tmp_path / "train-0.parquet").write_bytes(path.read_bytes())
    (tmp_path / "test-0.parquet").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="rows in"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    "described", [{"width": 1e300}, {"width": "x"}, {"num_classes": -1}, {"seed": 2**80}, {"x": 1}]
)
def test_a_model_file_that_describes_nonsense_is_refused_in_one_line(
    tmp_path: Path, described: dict[str, object]
) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, {"a": torch.ones(2)}, {"name": "mlp", **described})
    with pytest.raises(UserError) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)
