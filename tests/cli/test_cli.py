"""The command line: exit status 0, 1, 2; one clear line where the input is wrong."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from command import cli, cli_here
from rich.console import Console
from rich.table import Table

from fl_sim.cli import screen

FAILING = """
from fl_sim import Update
def broken(task, ctx):
    raise ValueError("by design")
def empty(task, ctx):
    return 3
def partial(task, ctx):
    return Update(params={}, num_examples=1)
"""


QUICK = ["configs/quickstart.toml", "rounds=1", "evaluate.every=1", "training.steps=1"]


def test_run_and_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The run in a process of its own, as a user starts it; what it wrote is compared in this one."""
    done = cli("run", *QUICK, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "round 1/1" in done.stdout
    assert "saving %" in done.stdout
    folder = next(tmp_path.iterdir())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["engine"] == "inline"
    assert "<h1>fl-sim</h1>" in (folder / "report.html").read_text()
    page = tmp_path / "both.html"
    monkeypatch.setenv("COLUMNS", "200")
    assert cli_here(monkeypatch, "compare", str(folder), str(folder), "--html", str(page)) == 0
    assert capsys.readouterr().out.count("quickstart ") == 2
    assert page.stat().st_size > 5e5


def test_quiet_prints_errors_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli_here(monkeypatch, "run", *QUICK, "--out", str(tmp_path), "--quiet") == 0
    assert tuple(capfd.readouterr()) == ("", "")
    assert (next(tmp_path.iterdir()) / "summary.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "configs/none.toml"], "none.toml"),
        (["run", "configs/quickstart.toml", "data.clinets=3"], "did you mean 'clients'"),
        (["run", "configs/quickstart.toml", "rounds=x"], "rounds"),
        (["run", "configs/quickstart.toml", "model.name=resnet21"], "did you mean"),
        (["run", "configs/quickstart.toml", "data.clients=3000"], "data.clients = 3000"),
        (["run", "configs/quickstart.toml", "data.source=nowhere"], "no such folder"),
        (["run", "configs/quickstart.toml", "client.target=nowhere:x"], "nowhere"),
        (
            [
                "run",
                "configs/quickstart.toml",
                "strategy.target=strategies.presets:global_magnitude",
                "strategy.density=7",
            ],
            "density = 7",
        ),
        (["run", "configs/quickstart.toml", "device=cuda:77"], "device"),
        (["run", "configs/quickstart.toml", "--engine", "rya"], "inline"),
        (["run", "configs/quickstart.toml", "--engine", "flower"], "flwr run"),
        (["compare", "configs"], "not a finished run"),
        (["report", "configs"], "not a finished run"),
        (["run", "configs/quickstart.toml", "training.lr=fast"], "training.lr"),
        (["run", "configs/quickstart.toml", "cohort.size=21"], "more than data.clients = 20"),
        (["run", "configs/quickstart.toml", "rounds"], "key=value"),
        (["sweep", "configs/quickstart.toml", "data.alfa=1,2"], "did you mean 'alpha'"),
        (["sweep", "configs/quickstart.toml", "--seeds", "one"], "--seeds"),
        (["doctor", "clients.presets:fedavgg"], "did you mean 'fedavg'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", str(tmp_path)] if words[0] in ("run", "sweep") else []
    status = cli_here(monkeypatch, *words, *out)
    said = capsys.readouterr().err
    assert status == 2, said
    assert expected in said
    assert len(said.strip().splitlines()) == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [("broken", 1, "by design"), ("empty", 2, "returned int, not an fl_sim.Update"), ("partial", 2, "lacks parameter")],
)
def test_a_failed_run_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    status: int,
    reason: str,
) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    (tmp_path / "configs").symlink_to(Path("configs").resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert cli_here(monkeypatch, "run", *QUICK, f"client.target=mine:{name}") == status
    said = capsys.readouterr().err
    assert reason in said.splitlines()[-1]
    assert "Traceback" not in said


def test_list_names_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli_here(monkeypatch, "list") == 0
    said = capsys.readouterr().out
    for name in (
        "clients.presets:topk",
        "strategies.presets:global_magnitude",
        "resnet32",
        "digits",
        "dirichlet",
        "int8",
    ):
        assert name in said


@pytest.mark.parametrize("module", ["fl_sim", "fl_sim.cli"])
def test_the_package_is_a_program(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module, "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("fl-sim 0.")


def test_a_table_is_whole_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("run", box=None)
    for heading in ("accuracy %", "M MACs", "saving %"):
        table.add_column(heading, no_wrap=True)
    table.add_row("a long name of training.momentum=0.123456", "25.63 ± 10.62", "1234567.125", "100.00")
    for width in (10, 40, 80):
        monkeypatch.setattr(screen, "console", Console(width=width))
        screen.show(table)
        text = capsys.readouterr().out
        assert all(word in text for word in ("accuracy %", "M MACs", "saving %", "10.62", "1234567.125"))
        assert "training.momentum=0.123456" in text  # of a pipe; a narrow terminal breaks it


@pytest.mark.parametrize("page", ["", "none/page.html"])
@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_a_page_that_cannot_be_written_is_said_before_anything_is_computed(
    command: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first config and the first run are wrong too, and are not looked at."""
    assert cli_here(monkeypatch, command, str(tmp_path / "none"), "--html", str(tmp_path / page)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fl-sim: {tmp_path / page}: ")
    assert said.endswith("; needed: a file\n")


@pytest.mark.parametrize("words", [["advise", "mpl", "--budget", "5MB"], ["reproduce", "tpk"], ["sweep", "none.toml"]])
@pytest.mark.parametrize("below", ["", "runs"])
def test_a_file_in_the_place_of_a_folder_is_said_before_anything_is_computed(
    words: list[str], below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    assert cli_here(monkeypatch, *words, "--out", str(out)) == 2
    found = f"{tmp_path / 'file'} is a file" if below else "a file"
    assert capsys.readouterr().err == f"fl-sim: {out}: {found}; needed: a folder\n"
