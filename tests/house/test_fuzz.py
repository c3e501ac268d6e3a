"""Hostile files: configs, checkpoints, run folders, models. Each reader returns what it promises or says one line, never more."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny
from hostile import JSON, LENGTHS, SEEDS, mutate, one_line, replaced
from hypothesis import given, settings

from fl_sim import Experiment, Report, run
from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import run_folder
from fl_sim.core.files import write_atomically
from fl_sim.core.observer import Silent
from fl_sim.core.types import UserError
from fl_sim.report import beside, comparison, estimates, floors, grouped, over_seeds, per_run, write_page
from fl_sim.report.page import card, page
from fl_sim.runtime.state.client_states import ClientStates
from fl_sim.simulation import resume
from fl_sim.simulation.checkpoint_store import Damaged, Manifest, read_manifest
from fl_sim.simulation.checkpointing import CheckpointHook
from fl_sim.simulation.engines import open_grid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.run_folder import claimed
from fl_sim.simulation.server import build_server
from fl_sim.training.model_file import read_model, write_model

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


def restored(experiment: Experiment) -> CheckpointHook:
    """The state of a stopped run, read as `run(..., resume=True)` does."""
    federation, ledger = Federation.build(experiment), Ledger()
    with claimed(experiment) as folder, open_grid(federation) as grid:
        hook = CheckpointHook(folder, federation, build_server(federation, ledger), ledger, [], None)
        grid.contexts = states = ClientStates(grid.contexts.nodes, folder.path)
        hook.attach(grid, states)
        hook.restore()
    return hook


@LENGTHS
def test_checkpoints_whose_sums_are_right(stopped: Experiment, length: settings) -> None:
    """An attacker can compute checksums: a manifest or an object that is nonsense must be refused all the same."""
    place = run_folder(stopped) / "checkpoint"
    path = next(place.glob("round-*.json"))
    before = path.read_bytes()
    manifest = json.loads(json.loads(before)["manifest"])
    objects = {p.name: p.read_bytes() for p in (place / "objects").iterdir()}

    def restore() -> object:
        return restored(stopped)

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


# -- run folders -------------------------------------------------------------------------------------------------------


@LENGTHS
def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: settings) -> None:
    """Of imported runs: reading, every table of `fl-sim report`, and its page without the megabytes that draw the charts."""
    monkeypatch.setattr("fl_sim.report.page.plotly", str)
    folder = run_tiny(tmp_path, "model.name=mlp").folder
    names = ("summary.json", "rounds.jsonl", "ledger.parquet", "config.toml", "partition.json")
    files = {name: (folder / name).read_bytes() for name in names}
    summary = json.loads(files["summary.json"])
    rows = [json.loads(line) for line in files["rounds.jsonl"].splitlines()]
    counts = json.loads(files["partition.json"])

    def show() -> object:
        loaded = Report.load(folder)
        groups = grouped([loaded])
        tables = [comparison([loaded]), per_run(loaded), estimates(loaded), over_seeds(groups)]
        return [*tables, beside(groups, groups[0].name), floors(loaded), page(groups), repr(loaded), card(loaded)]

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
    with pytest.raises(UserError):
        restored(stopped)
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
        (report.folder / name).unlink(missing_ok=True)
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
