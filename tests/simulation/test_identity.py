"""What makes two runs the same: code and data beside the config; nothing is overwritten unasked; runs can be extended."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import TINY, same
from PIL import Image

from fl_sim import Experiment, Report, UserError, run
from fl_sim.cli import main
from fl_sim.config.experiment import run_folder
from fl_sim.simulation import resume
from fl_sim.simulation.earlier_runs import is_stopped
from fl_sim.simulation.identity import Identity, code_of_parts, hash_of, hash_of_source
from fl_sim.simulation.sweep import sweep, told_apart
from fl_sim.simulation.user_code import code_of


@pytest.fixture(autouse=True)
def _no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes twice in a second, and not in size, is not read again where Python has cached its bytecode."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


SMALL = {
    **TINY,
    "data": {"source": "digits", "clients": 2, "partition": "iid"},
    "cohort": {"size": 1},
    "training": {"lr": 0.1, "steps": 1, "batch_size": 32},
}
CLIENT = """
import step_sizes
from fl_sim import Update, local_sgd, load, snapshot
def client(task, ctx):
    model = load(ctx.model, task.params)
    metrics = local_sgd(model, ctx.data, lr=step_sizes.LR, steps=1, rng=ctx.rng)
    return Update(params=snapshot(model), num_examples=ctx.num_examples, metrics=metrics)
"""


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


class KillAfter:
    """An observer that counts rounds, and stops the run after one of them."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.seen = number, list[int]()

    def say(self, line: str) -> None: ...

    def reply(self, answered: int, cohort: int) -> None: ...

    def round(self, row) -> None:
        self.seen.append(int(row["round"]))
        if row["round"] == self.number:
            raise Killed


def small(out: Path, *overrides: str) -> Experiment:
    return Experiment.from_tree(SMALL, [f'out="{out}"', *overrides])


def stop(experiment: Experiment, after: int) -> None:
    with pytest.raises(Killed):
        run(experiment, KillAfter(after))


def rounds_run(start: Callable[[KillAfter], object]) -> list[int]:
    start(seen := KillAfter())
    return seen.seen


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a client in one file, whose step size is in another."""
    place = tmp_path / "parts"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    (place / "own_client.py").write_text(CLIENT)
    (place / "step_sizes.py").write_text("LR = 0.1\n")
    yield place
    for name in ("own_client", "step_sizes"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("file", "text"),
    [("own_client.py", CLIENT.replace("steps=1", "steps=2")), ("step_sizes.py", "LR = 0.2\n")],
)
def test_results_of_other_code_are_not_already_there(tmp_path: Path, parts: Path, file: str, text: str) -> None:
    experiment = small(tmp_path, "client=own_client:client")
    first = run(experiment)
    assert [o.skipped for o in sweep([experiment], run)] == [True]
    (parts / file).write_text(text)
    (outcome,) = sweep([experiment], run)
    assert outcome.report is None
    assert f"the code of client ({file}) changed; --fresh" in outcome.reason
    for start in (run, resume):
        with pytest.raises(UserError, match=rf"the code of client \({file}\) changed"):
            start(experiment)
    assert Report.load(first.folder).summary == first.summary
    for name in ("own_client", "step_sizes"):
        sys.modules.pop(name)
    again = run(experiment, fresh=True)
    assert again.summary["params_sha256"] != first.summary["params_sha256"]
    assert [o.skipped for o in sweep([experiment], run)] == [True]


def test_comments_and_layout_change_nothing(tmp_path: Path, parts: Path) -> None:
    experiment = small(tmp_path, "client=own_client:client")
    run(experiment)
    (parts / "step_sizes.py").write_text("# what I tried first\n\n\nLR   =   0.1\n")
    assert rounds_run(lambda seen: run(experiment, seen)) == []


def test_a_stopped_run_does_not_go_on_with_other_code(tmp_path: Path, parts: Path) -> None:
    experiment = small(tmp_path, "client=own_client:client")
    stop(experiment, after=1)
    (parts / "step_sizes.py").write_text("LR = 0.2\n")
    with pytest.raises(UserError, match=r"cannot go on.*step_sizes\.py.*starts over"):
        resume(experiment)
    assert is_stopped(experiment)
    (parts / "step_sizes.py").write_text("LR = 0.1\n")
    assert rounds_run(lambda seen: resume(experiment, seen)) == [2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strategy", "strategy={target='strategies.presets:fedavg', aggregator='rules:mean'}"),
        ("data.partition", "data.partition=rules:mean"),
        ("data.source", "data.source=rules:mean"),
        ("model.name", "model.name=rules:mean"),
        ("capacities", "capacities=[{name='rules:mean', share=0.5}]"),
    ],
)
def test_every_part_that_a_config_names_counts(
    tmp_path: Path, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rules.py").write_text("def mean(): return 1\n")
    experiment = small(tmp_path, value)
    before = Identity.of(code_of_parts(experiment), "")
    (tmp_path / "rules.py").write_text("def mean(): return 2\n")
    (changed,) = before.changes(Identity.of(code_of_parts(experiment), ""), "digits")
    assert changed.startswith(f"the code of {key}")
    assert "rules.py" in changed


def test_packages_relative_and_circular_imports_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "lab" / "losses"
    package.mkdir(parents=True)
    (tmp_path / "lab" / "__init__.py").write_text("")
    (tmp_path / "lab" / "client.py").write_text("import numpy, fl_sim\ndef f():\n    from .losses import hinge\n")
    (package / "__init__.py").write_text("from . import hinge\nfrom ..client import f\n")
    (package / "hinge.py").write_text("X = 1\n")
    assert list(code_of("lab.client:f")) == [
        "lab/__init__.py",
        "lab/client.py",
        "lab/losses/__init__.py",
        "lab/losses/hinge.py",
    ]


def test_an_installed_module_hides_one_of_the_users_behind_it_and_is_seen_as_soon_as_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python takes the first of its path; the list of a folder of packages is kept only while the folder is as it was."""
    packages, mine = tmp_path / "env" / "site-packages", tmp_path / "mine"
    for folder in (packages, mine):
        folder.mkdir(parents=True)
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sys.path", [str(packages), str(mine), *sys.path[2:]])
    (mine / "lab_of_two.py").write_text("import helper_one, helper_two\ndef f(task, ctx): ...\n")
    for name in ("helper_one.py", "helper_two.py"):
        (mine / name).write_text("x = 1\n")
    (packages / "helper_one.py").write_text("x = 2\n")
    assert [*code_of("lab_of_two:f")] == ["helper_two.py", "lab_of_two.py"]
    (packages / "helper_two.py").write_text("x = 2\n")
    os.utime(packages, ns=(0, packages.stat().st_mtime_ns + 10**9))
    assert [*code_of("lab_of_two:f")] == ["lab_of_two.py"]


def test_what_is_installed_is_known_by_its_version() -> None:
    assert code_of("torch.nn:Linear") == code_of("json:dumps") == code_of("no_such_module:f") == {}


def test_a_function_of_a_notebook_counts_with_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    def cells(*texts: str) -> dict[str, str]:
        notebook = ModuleType("notebook_cells")
        monkeypatch.setitem(sys.modules, "notebook_cells", notebook)
        for text in texts:
            exec(text, notebook.__dict__)
        return dict(code_of("notebook_cells:f"))

    first = cells("LR = 0.1\nother = 3", "def g(x): return x * LR\ndef f(x): return g(x)")
    assert list(first) == ["notebook_cells:f"]
    assert cells("\n\nLR = 0.1\nother = 4", "def g(x): return x * LR\ndef f(x): return g(x)") == first
    assert cells("LR = 0.2", "def g(x): return x * LR\ndef f(x): return g(x)") != first
    assert cells("LR = 0.1", "def g(x): return x + LR\ndef f(x): return g(x)") != first
    model = "import torch\nclass B:\n  n = {}\nclass f(B):\n  def __init__(self): self.m = torch\n  def __call__(self): return {}"
    kept = cells(model.format(1, "{'a', 'b', 'c'}"))
    assert cells("# as it was", model.format(1, "{'c', 'b', 'a'}")) == kept
    assert cells(model.format(2, "{'a', 'b', 'c'}")) != kept
    assert cells(model.format(1, "{'a', 'b', 'd'}")) != kept
    wrapped = "def w(g):\n  def inner(x): return g(x)\n  return inner\n@w\ndef f(x): return x + {}"
    assert cells(wrapped.format(1)) != cells(wrapped.format(2))


def images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 6)):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{number}.png")


def one_pixel(folder: Path) -> None:
    path = folder / "train" / "cat" / "7.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[3, 3] ^= 1
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    "change",
    [
        one_pixel,
        lambda folder: os.replace(folder / "train" / "cat" / "3.png", folder / "train" / "dog" / "3a.png"),
        lambda folder: os.unlink(folder / "test" / "dog" / "5.png"),
    ],
    ids=["pixel", "label", "test"],
)
def test_results_of_other_data_are_not_already_there(tmp_path: Path, change: Callable[[Path], None]) -> None:
    images(folder := tmp_path / "pets")
    experiment = small(tmp_path / "runs", f'data.source="{folder}"')
    run(experiment)
    os.utime(folder / "train" / "cat" / "7.png")
    assert [o.skipped for o in sweep([experiment], run)] == [True]
    change(folder)
    (outcome,) = sweep([experiment], run)
    assert "the data (data.source = " in outcome.reason
    with pytest.raises(UserError, match="is finished, but since then the data"):
        run(experiment)
    stop(experiment.model_copy(update={"rounds": 3}), after=1)
    os.unlink(folder / "test" / "cat" / "2.png")
    with pytest.raises(UserError, match="cannot go on: since it began the data"):
        resume(experiment.model_copy(update={"rounds": 3}))


def test_other_versions_are_said_and_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = run(small(tmp_path))
    path = report.folder / "identity.json"
    kept = json.loads(path.read_text())
    kept["versions"]["PyTorch"] = "1.0"
    path.write_text(json.dumps(kept))
    with caplog.at_level(logging.WARNING, "fl_sim"):
        assert [o.skipped for o in sweep([small(tmp_path)], run)] == [True]
    assert "computed by other versions: PyTorch 1.0, now " in caplog.text


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"code": {"client": 1}, "data": "", "versions": {}}'])
def test_a_damaged_identity_is_one_line(tmp_path: Path, text: str) -> None:
    report = run(small(tmp_path))
    (report.folder / "identity.json").write_text(text)
    with pytest.raises(UserError, match=r"identity\.json: damaged"):
        run(small(tmp_path))


def test_without_an_identity_it_is_said_that_nothing_was_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = run(small(tmp_path))
    (report.folder / "identity.json").unlink()
    with caplog.at_level(logging.WARNING, "fl_sim"):
        run(small(tmp_path))
    assert "nothing tells whether its code and data were today's" in caplog.text


def test_large_images_are_hashed_in_part_and_labels_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_sim.data import Data

    def data(image: int, label: int) -> Data:
        pixels, labels = np.zeros((100, 1, 4, 4), np.uint8), np.arange(100) % 2
        pixels[image], labels[label] = 255, 1 - labels[label]
        return Data.of(pixels, labels, test_inputs=pixels, test_targets=labels, num_classes=2)

    assert len({hash_of(data(i, j)) for i in (1, 7) for j in (0, 9)}) == 4
    monkeypatch.setattr("fl_sim.simulation.identity.MOST", 160)
    assert hash_of(data(1, 0)) == hash_of(data(7, 0)) != hash_of(data(7, 9))


SUMMED = """
import torch
from fl_sim.data import Data
def data():
    images = torch.arange(300 * 8 * 8 * 8).reshape(300, 8, 8, 8).mul_(2654435761).remainder_(251).float()
    images = images * images.sin().mean()
    labels = torch.arange(300) % 2
    return Data.of(images, labels, test_inputs=images, test_targets=labels, num_classes=2)
"""


@pytest.mark.parametrize("source", ["digits", "summed_source:data"])
def test_the_hash_does_not_depend_on_how_many_threads_summed_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Federations compute on one thread; a look at a finished run is taken on as many as PyTorch has."""
    (tmp_path / "summed_source.py").write_text(SUMMED)
    monkeypatch.syspath_prepend(str(tmp_path))
    experiment, before = (
        Experiment.from_tree({**SMALL, "data": {**SMALL["data"], "source": source}}),
        torch.get_num_threads(),
    )
    try:
        hashes = [torch.set_num_threads(count) or hash_of_source(experiment) for count in (1, 2, 3, 4)]
    finally:
        torch.set_num_threads(before)
    assert len(set(hashes)) == 1


def test_a_finished_run_is_read_whichever_engine_computed_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = run(small(tmp_path))
    with caplog.at_level(logging.WARNING, "fl_sim"):
        again = run(small(tmp_path, "engine=workers", "workers.count=1"), seen := KillAfter())
    assert seen.seen == []
    assert "already there (computed by inline); --fresh" in caplog.text
    same(first, again)
    assert rounds_run(lambda seen: run(small(tmp_path), seen, fresh=True)) == [1, 2]


def test_rounds_of_a_stopped_run_are_never_lost_unasked(tmp_path: Path) -> None:
    experiment = small(tmp_path, "rounds=3")
    stop(experiment, after=2)
    with pytest.raises(UserError, match=r"2 finished rounds are kept; --resume .* goes on, --fresh .* starts over"):
        run(experiment)
    with pytest.raises(UserError, match="give one of them"):
        run(experiment, resume=True, fresh=True)
    stop_again = KillAfter(1)
    with pytest.raises(Killed):
        run(experiment, stop_again, fresh=True)
    assert rounds_run(lambda seen: resume(experiment, seen)) == [2, 3]


def test_a_stopped_run_without_checkpoints_starts_over_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiment = small(tmp_path, "checkpoint.every=0")
    stop(experiment, after=1)
    with caplog.at_level(logging.WARNING, "fl_sim"):
        assert rounds_run(lambda seen: run(experiment, seen)) == [1, 2]
    assert "a stopped run that kept no checkpoints is started over" in caplog.text


@pytest.mark.parametrize("ends", ["finished", "stopped"])
def test_more_rounds_go_on_from_the_last(tmp_path: Path, ends: str, caplog: pytest.LogCaptureFixture) -> None:
    options = ["client={target='clients.presets:topk', density=0.1}", "wire.error_feedback=true", "cohort.size=2"]
    undisturbed = run(small(tmp_path / "whole", *options, "rounds=4"))
    shorter, longer = small(tmp_path / "runs", *options), small(tmp_path / "runs", *options, "rounds=4")
    before = run(shorter).summary if ends == "finished" else stop(shorter, after=2)
    with caplog.at_level(logging.WARNING, "fl_sim"):
        extended = resume(longer, seen := KillAfter())
    assert seen.seen == [3, 4]
    assert f"going on from round 2 of {run_folder(shorter)}" in caplog.text
    same(undisturbed, extended)
    if ends == "finished":
        assert Report.load(run_folder(shorter)).summary == before
    else:
        assert rounds_run(lambda seen: resume(shorter, seen)) == []


def test_only_runs_that_differ_in_fewer_rounds_are_gone_on_from(
    tmp_path: Path, parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(small(tmp_path, "training.lr=0.2"))
    run(small(tmp_path, "rounds=6", "client=own_client:client"))
    run(small(tmp_path, "rounds=1", "client=own_client:client"))
    with caplog.at_level(logging.WARNING, "fl_sim"):
        assert rounds_run(lambda seen: resume(small(tmp_path, "rounds=3"), seen)) == [1, 2, 3]
    assert "nothing to resume, starting at round 1" in caplog.text
    (parts / "step_sizes.py").write_text("LR = 0.3\n")
    with pytest.raises(UserError, match=r"cannot go on.*step_sizes\.py"):
        resume(small(tmp_path, "rounds=4", "client=own_client:client"))


def test_a_finished_run_keeps_one_checkpoint(tmp_path: Path) -> None:
    report = run(small(tmp_path, "rounds=3"))
    kept = report.folder / "checkpoint"
    assert [path.name for path in kept.glob("round-*.json")] == ["round-00000003.json"]


def test_lines_of_a_sweep_name_the_seed_and_what_differs(tmp_path: Path) -> None:
    grid = [small(tmp_path, f"seed={seed}", f"data.alpha={alpha}") for alpha in (0.1, 1.0) for seed in (0, 1)]
    assert told_apart(grid) == [f"seed {seed}  data.alpha={alpha}" for alpha in (0.1, 1.0) for seed in (0, 1)]


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["fl-sim", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_commands_say_what_is_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tmp_path / "small.toml"
    config.write_text(small(tmp_path / "runs").to_toml())
    assert command(monkeypatch, "run", str(config)) == 0
    assert "round 2/2" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING, "fl_sim"):
        assert command(monkeypatch, "run", str(config)) == 0
    assert "already there (computed by inline)" in caplog.text
    said = capsys.readouterr().out
    assert "round 2/2" not in said
    assert "report.html" in said
    assert command(monkeypatch, "run", str(config), "--fresh") == 0
    assert "round 2/2" in capsys.readouterr().out
    assert command(monkeypatch, "sweep", str(config), "--seeds", "0,1") == 0
    said = capsys.readouterr().out
    assert "seed 0  already there (computed by inline)" in said
    assert "seed 1  done" in said
    assert command(monkeypatch, "sweep", str(config), "--seeds", "0", "--fresh") == 0
    assert "seed 0  done" in capsys.readouterr().out


def repaired(path: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest and put its checksum right."""
    manifest = json.loads(json.loads(path.read_text())["manifest"])
    change(manifest)
    text = json.dumps(manifest)
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}))


def as_object(path: Path, data: bytes) -> str:
    name = hashlib.sha256(data).hexdigest()
    (path.parent / "objects" / name).write_bytes(data)
    return name


def rows_of(path: Path, manifest: dict, change: Callable[[dict], object]) -> None:
    """Change the rows of the rounds so far."""
    (part,) = manifest["rounds"]
    rows = [json.loads(line) for line in (path.parent / "objects" / part["name"]).read_text().splitlines()]
    for row in rows:
        change(row)
    part["name"] = as_object(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda path, m: m.update(round=1),
        lambda path, m: m.update(round=1 << 62),
        lambda path, m: m.update(round=1 << 80),
        lambda path, m: m.update(messages=1 << 70),
        lambda path, m: m.update(wall_s=-1),
        lambda path, m: m["models"][0].update(simulated_s=-1),
        lambda path, m: m["models"][0].update(answered=[77]),
        lambda path, m: m["models"][0]["failures"].update(lost=-1),
        lambda path, m: rows_of(path, m, lambda row: row.pop("validation_accuracy")),
        lambda path, m: rows_of(path, m, lambda row: row.update(round=1)),
        lambda path, m: rows_of(path, m, lambda row: row.update(accuracy="high")),
        lambda path, m: rows_of(path, m, lambda row: row.update(uplink_bytes=1)),
        lambda path, m: m["rounds"][0].update(name=as_object(path, b"[1]\n[2]\n")),
        lambda path, m: m["models"][0].update(tensors=as_object(path, b"\xff" * 64)),
    ],
)
def test_checkpoints_that_no_run_wrote_are_one_line(tmp_path: Path, change: Callable[[Path, dict], object]) -> None:
    experiment = small(tmp_path, "rounds=4")
    stop(experiment, after=2)
    for path in (run_folder(experiment) / "checkpoint").glob("round-*.json"):
        repaired(path, lambda manifest, path=path: change(path, manifest))
    with pytest.raises(UserError, match=r"is not of this experiment|no checkpoint can be read"):
        resume(experiment)


@pytest.mark.parametrize("name", ["model.safetensors", "identity.json", "summary.json", "rounds.jsonl"])
def test_a_pipe_in_a_finished_folder_is_not_waited_for(tmp_path: Path, name: str) -> None:
    report = run(small(tmp_path, "rounds=1"))
    (report.folder / name).unlink()
    os.mkfifo(report.folder / name)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        run(small(tmp_path, "rounds=1"))


def test_flowers_runtimes_overwrite_nothing_unasked(tmp_path: Path) -> None:
    from flwr.app import Context, RecordDict

    from fl_sim.runtime.client.host import client_app
    from fl_sim.runtime.grids.inline import InlineGrid
    from fl_sim.simulation import flower_app
    from fl_sim.simulation.client_side import hosts_of

    config = tmp_path / "small.toml"
    config.write_text(small(tmp_path / "runs").to_toml())
    asked = Experiment.load(config)
    experiment = asked.model_copy(update={"name": f"{asked.name}-flower"})

    def start(**more: bool) -> None:
        federation = flower_app._federation(str(config), "")
        grid = InlineGrid(client_app(hosts_of(federation)), len(federation.partitions))
        given: dict[str, str | bool] = {"config": str(config), "overrides": "", **more}
        flower_app.main(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=given))

    stop(experiment, after=1)
    with pytest.raises(UserError, match="1 finished rounds are kept"):
        start()
    resume(experiment)
    with pytest.raises(UserError, match="already there; the run config's fresh = true runs it again"):
        start(fresh=False)
    start(fresh=True)
    assert Report.load(run_folder(experiment)).summary["engine"] == "flower"
