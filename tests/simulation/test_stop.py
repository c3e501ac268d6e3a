"""When a run stops: at a metric, a budget of bytes or of virtual seconds, or when nothing improves any more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from federation import run_tiny, same, tiny
from hypothesis import given
from hypothesis import strategies as st
from interruption import KillAfter, Killed

from fl_sim import Report, UserError, run
from fl_sim.simulation.parts import check
from fl_sim.simulation.stopping import Stopping

SMALL = ("model.name=mlp", "model.width=0.25", "training.steps=2", "training.epochs=1", "network.links.4G=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tiny(tmp_path_factory.mktemp("whole"), *SMALL, "rounds=5")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tiny(tmp_path_factory.mktemp("three"), *SMALL, "rounds=3", "evaluate.every=2")


def _moved(report: Report, rounds: int) -> int:
    row = report.rounds[rounds - 1]
    return int(row["uplink_bytes"] + row["downlink_bytes"])


def _equal(stopped: Report, three: Report) -> None:
    """The model, ledger and rows of a run of three rounds; only the summary says that it stopped."""
    assert stopped.summary["rounds"] == 3
    plain = {**stopped.summary, "stopped": None, "id": three.summary["id"]}
    same(Report(stopped.folder, plain, stopped.rounds, stopped.ledger, stopped.params), three)
    lines = [json.loads(line) for line in (stopped.folder / "rounds.jsonl").read_text().splitlines()]
    assert lines == stopped.rounds
    assert "accuracy" in lines[-1]


@pytest.mark.parametrize("spare", [0, 1000])
def test_a_byte_budget_is_never_exceeded_and_used_to_the_last_round_that_fits(
    tmp_path: Path, whole: Report, three: Report, spare: int
) -> None:
    budget = (_moved(whole, 3) + spare) / 1e6
    stopped = run_tiny(tmp_path, *SMALL, "rounds=5", "evaluate.every=2", f"stop.mb={budget}")
    _equal(stopped, three)
    assert stopped.summary["total_bytes"] <= budget * 1e6
    wanted = f"after round 3: round 4 would have made it {_moved(whole, 4) / 1e6:.3f} MB, stop.mb = {budget:g}"
    assert stopped.summary["stopped"] == wanted
    assert wanted in (stopped.folder / "report.html").read_text()


def test_virtual_seconds_end_a_run_with_the_round_that_reaches_them(
    tmp_path: Path, whole: Report, three: Report
) -> None:
    between = (whole.rounds[1]["simulated_s"] + whole.rounds[2]["simulated_s"]) / 2
    stopped = run_tiny(tmp_path, *SMALL, "rounds=5", "evaluate.every=2", f"stop.seconds={between}")
    _equal(stopped, three)
    assert "on the virtual clock, stop.seconds" in str(stopped.summary["stopped"])


def test_a_stopped_run_that_was_killed_stops_where_it_would_have(tmp_path: Path, whole: Report, three: Report) -> None:
    budget = _moved(whole, 3) / 1e6
    experiment = tiny(tmp_path, *SMALL, "rounds=5", "evaluate.every=2", f"stop.mb={budget}")
    with pytest.raises(Killed):  # in the round that is undone
        run(experiment, KillAfter(3, replies=2))
    _equal(run(experiment, resume=True), three)


def test_an_accuracy_is_that_of_the_validation_set(tmp_path: Path, whole: Report) -> None:
    reached = whole.rounds[1]["validation_accuracy"]
    wanted = next(row["round"] for row in whole.rounds if row["validation_accuracy"] >= reached)
    said: list[str] = []

    class Hears(KillAfter):
        def say(self, line: str) -> None:
            said.append(line)

    stopped = run(tiny(tmp_path, *SMALL, "rounds=5", f"stop.accuracy={reached}"), Hears(99))
    assert stopped.summary["rounds"] == wanted
    assert said == [f"stopped {stopped.summary['stopped']}"]
    assert f"validation accuracy {reached:.4g}" in said[0]


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=12), st.integers(1, 4))
def test_patience_is_a_number_of_evaluations_without_a_new_best(values: list[float], patience: int) -> None:
    stopping = Stopping(tiny(Path("runs"), f"stop.patience={patience}"))
    expected = next(
        (
            n
            for n in range(patience, len(values) + 1)
            if max([v for v in values[n - patience : n] if v == v], default=-1)
            <= max([v for v in values[: n - patience] if v == v], default=-1)
        ),
        None,
    )
    for number, value in enumerate(values, start=1):
        stopping.round({"round": number, "accuracy": 0.0, "validation_accuracy": value})
        stopping.round({"round": number})  # not evaluated
        assert (stopping.reason is not None) == (expected is not None and number >= expected)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["stop.acuracy=0.8"], "unknown key 'stop.acuracy'; did you mean 'accuracy'?"),
        (["stop.rmse=0.8"], "unknown key 'stop.rmse'"),
        (["stop.accuracy=80"], "stop.accuracy = 80: a share, not percent; allowed: 0 to 1"),
        (["stop.mb=0"], "stop.mb = 0: input should be greater than 0"),
        (["stop.patience=0"], "stop.patience = 0"),
        (["stop.accuracy=high"], "stop.accuracy = 'high'"),
        (["stop.seconds=5"], "stop.seconds: without network.links there is no virtual clock"),
        (["stop=5"], "write stop.mb="),
    ],
)
def test_a_stop_that_cannot_come_is_one_line(tmp_path: Path, keys: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        tiny(tmp_path, *keys)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_budget_that_no_round_fits_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stop.mb = 0.001: the first round alone would move 0.\d+ MB"):
        run_tiny(tmp_path, *SMALL, "stop.mb=0.001")


def test_lower_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    stopping = Stopping(tiny(tmp_path, "stop.loss=0.5"))
    stopping.round({"round": 1, "validation_loss": 0.6})
    assert stopping.reason is None
    stopping.round({"round": 2, "validation_loss": 0.5})
    assert stopping.reason == "after round 2: validation loss 0.5, stop.loss = 0.5"


def test_an_empty_table_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(tiny(tmp_path, "stop={}"))
    assert "[stop] is empty" in caplog.text
