"""`fl-sim flower PATH`: what is read from an app's pyproject.toml, its report page, and wrong input in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fl_sim import UserError
from fl_sim.cli import main
from fl_sim.communication.ledger import Ledger
from fl_sim.runtime.apps.project import Project, pairs

TOML = """
[project]
name = "sums"
[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"
[tool.flwr.app.config]
num-server-rounds = 2
step = 0.5
words = "two words"
model.deep = true
[tool.flwr.federations]
default = "local"
[tool.flwr.federations.local]
options.num-supernodes = 3
"""
SERVER = """
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    rounds = context.run_config["num-server-rounds"]
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(10)]), num_rounds=rounds)
"""
CLIENT = """
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    partition, step = context.node_config["partition-id"], context.run_config["step"]
    if context.node_config.get("file", "").endswith("-1.csv"):
        raise ValueError("<b>no such file</b>")
    arrays = [array + step for array in message.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"num-examples": 1, "loss": float(arrays[0][0])})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an app, whose package has a name of its own so that no other test has imported it."""
    package = f"sums_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / "app"
    (folder / package).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(TOML.format(package=package))
    (folder / package / "server_app.py").write_text(SERVER)
    (folder / package / "client_app.py").write_text(CLIENT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def fl_sim(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fl-sim", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def test_an_apps_folder_is_read(app: Path) -> None:
    project = Project.read(app)
    assert (project.name, project.clients) == ("sums", 3)
    assert project.config == {"num-server-rounds": 2, "step": 0.5, "words": "two words", "model.deep": True}
    changed = project.configured("step=1 words='a b' model.deep=false")
    assert changed == {"num-server-rounds": 2, "step": 1.0, "words": "a b", "model.deep": False}
    assert type(changed["step"]) is float
    assert Project.read(app / "pyproject.toml") == project


@pytest.mark.parametrize("engine", ["inline", "workers", pytest.param("ray", marks=pytest.mark.slow)])
def test_the_command_runs_it(app: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--engine", engine]
    options += ["--run-config", "num-server-rounds=3 step=1", "--node-config", "file='d-{partition}.csv'"]
    assert fl_sim("flower", app, "--out", tmp_path / "runs", *options) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    ledger = Ledger.read(folder / "ledger.parquet")
    assert ledger.messages(phase="train") == {"down": 9, "up": 6}
    printed, page = capsys.readouterr().out, (folder / "report.html").read_text()
    assert "client 1: ValueError: <b>no such file</b>" in printed
    assert "&lt;b&gt;no such file" in page
    assert "<b>" not in page
    assert "<td>3</td>" in page, "the loss of the last round"
    assert f"{ledger.total(by=('direction',), where={'section': 'dense'})['up',]:,}" in page


@pytest.mark.parametrize(
    ("change", "words", "match"),
    [
        (("", ""), ["--run-config", "rounds=3"], "rounds: the app has no such key; allowed: num-server-rounds"),
        (("", ""), ["--run-config", "step='1'"], "step = '1' is of type str; the app's 0.5 is of type float"),
        (("", ""), ["--run-config", "words=bare"], "'words=bare' is no key=value"),
        (("", ""), ["--run-config", "nowhere.toml"], "nowhere.toml"),
        (("", ""), ["--engine", "rya"], "engine = 'rya': unknown; did you mean 'ray'?"),
        (("", ""), ["--clients", "-1"], "num_clients = -1"),
        (("", ""), ["--clients", "0"], "num_clients = 0"),
        (("", ""), ["--out", "/dev/null/runs"], "--out /dev/null/runs: no folder can be made there: Not a directory"),
        (("", ""), ["--out", "x/" + "y" * 300], "(302 characters): no folder can be made there: File name too long"),
        (("[tool.flwr.app.components]", "[tool.other]"), [], r"no table [tool.flwr.app.components]"),
        (("server_app:app", "server_app"), [], "needs serverapp"),
        (("server_app:app", "server_app:main"), [], "is a function, not a ServerApp"),
        (("client_app:app", "nowhere:app"), [], "ModuleNotFoundError"),
        (("[project]", "[project"), [], "pyproject.toml"),
        (('words = "two words"', "words = [1]"), [], "words is a list; allowed: bool, int, float, str"),
    ],
)
def test_wrong_input_is_one_line(
    app: Path, change: tuple[str, str], words: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = app / "pyproject.toml"
    file.write_text(file.read_text().replace(*change, 1) if change[0] else file.read_text())
    assert fl_sim("flower", app, "--out", app / "runs", *words) == 2
    said = capsys.readouterr().err
    assert match in said
    assert said.count("\n") == 1
    assert not (app / "runs").exists()


@pytest.mark.parametrize("name", ["x" * 300, "\u00fc\u8054" * 60, "../../..", "a/b", "", "a\0b", "a\nb"])
def test_any_name_of_an_app_has_a_folder_in_out(
    app: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = app / "pyproject.toml"
    file.write_text(file.read_text().replace('"sums"', json.dumps(name)))
    assert fl_sim("flower", app, "--out", tmp_path / "deep" / "runs", "--run-config", "num-server-rounds=1") == 0
    (folder,) = (tmp_path / "deep" / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["ledger.parquet", "report.html"]
    assert str(folder / "report.html") in capsys.readouterr().out


def test_an_error_whose_text_is_no_unicode_costs_neither_page_nor_ledger(app: Path, tmp_path: Path) -> None:
    client = next(app.glob("*/client_app.py"))
    client.write_text(client.read_text().replace("<b>no such file</b>", "no such file: \\udcff"))
    assert fl_sim("flower", app, "--out", tmp_path / "runs", "--node-config", "file='d-{partition}.csv'") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert r"no such file: \udcff" in (folder / "report.html").read_text()


def test_a_folder_that_is_no_app_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a Flower app is a folder with a pyproject\.toml"):
        Project.read(tmp_path)


def test_pairs_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("a = 1\n[b]\nc = 'x'\n")
    assert pairs(str(file), "--run-config") == pairs("a=1 b.c='x'", "--run-config") == {"a": 1, "b.c": "x"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ('a=1"', 'a quote " is not closed'),
        ("a=1 b='x", "a quote ' is not closed"),
        ('a="x""', 'a quote " is not closed'),
        ('a=1 "', 'a quote " is not closed'),
        ("a='it's'", "a quote ' is not closed"),
        ("a=1 #b", "'#b': what stands behind # is a comment"),
        ("a=1#b", "'a=1#b': what stands behind # is a comment"),
        ("a=1 b=2 a=3", "a is given twice"),
        ("a.b=1 a={b=2}", "a.b is given twice"),
    ],
)
def test_nothing_of_a_run_config_is_dropped(words: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        pairs(words, "--run-config")
    assert said in str(refused.value)
    assert pairs("a='#' b=\"it's\"", "--run-config") == {"a": "#", "b": "it's"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('[project]\nname = "sums"', "project = 3", "no table [project]"),
        ('default = "local"', 'default = ["local"]', None),
        ("num-supernodes = 3", "num-supernodes = true", None),
    ],
)
def test_tables_of_another_type_are_one_line_or_name_no_nodes(
    tmp_path: Path, old: str, new: str, words: str | None
) -> None:
    assert old in TOML
    (tmp_path / "pyproject.toml").write_text(TOML.replace(old, new).format(package="odd"))
    if words is None:
        assert Project.read(tmp_path).clients is None
    else:
        with pytest.raises(UserError) as caught:
            Project.read(tmp_path)
        assert words in str(caught.value)
