"""`fl-sim advise`: a table, three files that load, and one line where the input is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import cli_here

from fl_sim import Experiment

TINY = ["mlp", "rounds=3", "data.clients=6", "cohort.size=4", "training.batch_size=64"]


def test_the_files_can_be_loaded_and_are_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command = ["advise", *TINY, "--budget", "400kB", "--out", str(tmp_path)]
    assert cli_here(monkeypatch, *command) == 0
    said = capsys.readouterr().out
    files = sorted(tmp_path.iterdir(), key=lambda path: path.stem[-1])
    assert [file.name for file in files] == ["mlp-rounded-1.toml", "mlp-sparse-2.toml", "mlp-pruned-3.toml"]
    assert all(str(file) in said for file in files)
    assert "No accuracy is predicted" in said
    for file in files:
        experiment, head = Experiment.load(file), file.read_text().splitlines()[:2]
        assert (experiment.rounds, experiment.model.name, experiment.data.clients) == (3, "mlp", 6)
        assert head[0].startswith("# fl-sim advise, 0.4 MB: 0.")
        assert head[1].removeprefix("# ").removesuffix(".") in said
    assert cli_here(monkeypatch, *command, "--quiet") == 0  # says the same: nothing to overwrite
    assert capsys.readouterr().out.split() == list(map(str, files))
    files[0].write_text("mine")
    assert cli_here(monkeypatch, *command) == 2
    assert "exists and says something else" in capsys.readouterr().err
    assert files[0].read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["mlp"], "--budget is missing"),
        (["mlp", "--budget", "50"], "--budget '50': allowed"),
        (["configs/none.toml", "--budget", "5MB"], "none.toml"),
        (["mpl", "--budget", "5MB"], "did you mean 'mlp'"),
        (["mlp", "ronds=3", "--budget", "5MB"], "did you mean 'rounds'"),
        ([*TINY, "rounds=1", "--budget", "1kB"], "one round with the smallest value types moves"),
        (["configs/kd_capacity.toml", "--budget", "5MB"], "study"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_here(monkeypatch, "advise", *words, "--out", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.startswith("fl-sim: ")
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
