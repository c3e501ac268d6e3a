"""Grids of runs: every combination, nothing twice, failures survived."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from federation import TINY, same
from rich.console import Console

from fl_sim import Experiment, Report, UserError, run
from fl_sim.cli import main
from fl_sim.report import comparison
from fl_sim.simulation import resume
from fl_sim.simulation.parallel_runs import ParallelRuns
from fl_sim.simulation.sweep import alternatives, integers, plan, sorted_out, sweep


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(Experiment.from_tree(TINY, ["rounds=1", f'out="{tmp_path / "runs"}"']).to_toml())
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1,2", ["a=1", "a=2"]),
        ("a=1", ["a=1"]),
        ("a.b=[1,2],[3]", ["a.b=[1,2]", "a.b=[3]"]),
        ('a="x,y", z', ['a="x,y"', "a=z"]),
        ("client={target='m:f',mu=0.1},m:g", ["client={target='m:f',mu=0.1}", "client=m:g"]),
    ],
)
def test_commas_outside_brackets_and_quotes_separate(text: str, values: list[str]) -> None:
    assert alternatives(text) == values


@pytest.mark.parametrize("text", ["a", "=1", "a=1,,2", "a=", "a='x,y", 'a="x,y', "a=it's,b"])
def test_wrong_alternatives_are_the_users_error(text: str) -> None:
    with pytest.raises(UserError):
        alternatives(text)


def test_seeds_among_the_overrides_are_refused_and_not_overwritten(config: Path) -> None:
    with pytest.raises(UserError, match=r"^seed=3,4: a sweep runs under the seeds of --seeds; write --seeds 3,4$"):
        plan(config, ["data.alpha=0.1,1.0", "seed=3,4"], seeds=[0, 1, 2])


def test_two_lists_for_one_key_are_refused_and_not_run_twice(config: Path) -> None:
    """The last would have counted alone, under as many names as the first has values."""
    with pytest.raises(UserError, match=r"^rounds=3: rounds is there already; write its values once, as rounds=A,B$"):
        plan(config, ["rounds=1,2", "data.alpha=0.1", "rounds=3"], seeds=[0])
    with pytest.raises(UserError, match=r"^rounds=1,2: rounds is there already"):
        plan(config, ["rounds=3", "rounds=1,2"], seeds=[0])
    (one,) = plan(config, ["rounds=3", "rounds=2"], seeds=[0])
    assert one.rounds == 2


def test_configs_come_first_then_overrides(config: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a=b.toml"
    odd.write_text("")
    words = [str(config), str(odd), "rounds=1", "data.alpha=0.1,1.0"]
    assert sorted_out(words) == ([config, odd], ["rounds=1", "data.alpha=0.1,1.0"])
    for wrong, said in (
        (["rounds=1"], "which experiment"),
        ([str(config), "rounds=1", "rounds"], "configs come first"),
    ):
        with pytest.raises(UserError, match=said):
            sorted_out(wrong)


def test_several_configs_end_in_one_table_and_one_page(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the last line names the page, and the folder of the tests may be a long one
    other, page = tmp_path / "other.toml", Path("both.html")
    other.write_text(config.read_text().replace('"tiny"', '"slower"').replace("lr = 0.1", "lr = 0.01"))
    words = ["sweep", str(config), str(other), "data.clients=5", "cohort.size=2", "--seeds", "0,1", "--html", str(page)]
    monkeypatch.setattr("sys.argv", ["fl-sim", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    done = [line for line in said.splitlines() if "done, accuracy" in line]
    for number, (line, seed) in enumerate(zip(done, "0101", strict=True), start=1):
        rest = f"; {4 - number} left, about 0:00:" if number < 4 else ""
        assert re.match(rf"{number}/4  \S+  seed {seed}  done, accuracy [\d.]+ %{rest}", line)
        assert rest or line.endswith("%")
    assert all(re.match(r"\d/4  \S+  seed [01]  round ", line) for line in said.splitlines() if "  round " in line)
    (table,) = re.findall(r"over seeds.*", said, re.DOTALL)
    assert [line.split()[:2] for line in table.splitlines()[1:] if " ± " in line] == [["tiny", "2"], ["slower", "2"]]
    assert max(map(len, table.splitlines())) <= 80
    text = page.read_text()
    assert "tiny" in text
    assert "slower" in text


def test_every_combination_under_every_seed(config: Path) -> None:
    made = plan(config, ["data.alpha=0.5,1.0", "training.lr=0.1,0.2,0.3"], seeds=[0, 7])
    assert len({experiment.id for experiment in made}) == len(made) == 12
    assert {(e.data.alpha, e.training.lr, e.seed) for e in made} == {
        (alpha, lr, seed) for alpha in (0.5, 1.0) for lr in (0.1, 0.2, 0.3) for seed in (0, 7)
    }
    with pytest.raises(UserError, match="integers"):
        integers("--seeds", "0,x")


def test_runs_of_one_name_are_told_apart_by_what_differs(config: Path) -> None:
    reports = [run(experiment) for experiment in plan(config, ["data.alpha=0.5,1.0"], seeds=[0])]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(comparison(reports))
    shown = console.export_text()
    assert shown.index("data.alpha=0.5") < shown.index("data.alpha=1.0")


def test_finished_runs_are_skipped_and_failures_survived(config: Path) -> None:
    started: list[int] = []

    def runner(experiment: Experiment) -> Report:
        started.append(experiment.seed)
        if experiment.seed == 1:
            raise RuntimeError("by design")
        return run(experiment)

    experiments = plan(config, [], seeds=[0, 1, 2])
    first = list(sweep(experiments, runner))
    assert [outcome.reason for outcome in first] == ["", "by design", ""]
    second = list(sweep(experiments, runner))
    assert [outcome.skipped for outcome in second] == [True, False, True]
    assert started == [0, 1, 2, 1]
    assert second[0].report is not None
    assert second[0].report.summary == first[0].report.summary


def test_runs_of_other_processes_keep_the_order_and_a_refused_one_stops_no_other(config: Path, tmp_path: Path) -> None:
    """With one process, as each takes seconds to start; `--jobs 2` has two of them."""
    good, bad = plan(config, [], seeds=[0, 1]), plan(config, ["data.clients=5000"], seeds=[0])
    (again,) = plan(config, ["engine=workers", "workers.count=1"], seeds=[1])
    asked = [good[1], *bad, good[0], again]
    with ParallelRuns(asked, jobs=1) as runs:
        first = list(sweep(asked, runs, there=runs.were_there))
    assert [each.experiment for each in first] == asked
    assert [each.skipped for each in first] == [False, False, False, True]
    assert ["data.clients" in each.reason for each in first] == [False, True, False, False]
    assert first[2].report is not None
    assert first[0].report is not None
    assert first[0].report.results.engine == "inline", "of two that are the same experiment the first is run"
    same(first[2].report, run(good[0].model_copy(update={"out": str(tmp_path / "alone")})))
    with ParallelRuns(good, jobs=1) as runs:
        assert all(map(runs.were_there, good))


def test_an_unfinished_folder_is_run_again(config: Path) -> None:
    (experiment,) = plan(config, [], seeds=[0])
    report = run(experiment)
    (report.folder / "summary.json").unlink()
    (outcome,) = sweep([experiment], resume)
    assert (outcome.skipped, outcome.reason) == (False, "")


def test_the_command_ends_in_a_table_and_status_1_if_any_failed(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["fl-sim", "sweep", str(config), "data.clients=6,5000", "--seeds", "0,1"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert said.err.count("failed: data.clients") == 2
    assert "2 of 4 runs failed" in said.err
    assert " ± " in said.out
    monkeypatch.setattr("sys.argv", ["fl-sim", "sweep", str(config), "--seeds", "0,1"])
    with pytest.raises(SystemExit) as again:
        main()
    assert again.value.code == 0
    assert capsys.readouterr().out.count("already there") == 2
