"""What a live page is sent: what is new since it asked last, and nothing where nothing is; and what that costs a run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_sim.cli import live_state
from fl_sim.cli.live_state import Watch
from fl_sim.cli.watch_cost import _intervals

ROW = {"round": 1, "uplink_bytes": 5, "downlink_bytes": 7, "accuracy": 0.5, "loss": 1.0}


def started(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("rounds = 9\n")
    (folder / "rounds.jsonl").write_text(json.dumps(ROW) + "\n")


def asked(watch: Watch, since: int) -> tuple[int, set[str], set[str]]:
    """Version, names of all runs, names of those that are sent."""
    state: Any = watch.state(since)
    return state["version"], set(state["names"]), {run["name"] for run in state["runs"]}


def test_a_page_is_sent_what_changed_since_it_asked_last(tmp_path: Path) -> None:
    for name in ("a", "b"):
        started(tmp_path / name)
    watch = Watch([tmp_path])
    first, names, sent = asked(watch, 0)
    assert first > 0
    assert names == sent == {"a", "b"}
    assert asked(watch, first) == (first, {"a", "b"}, set())
    with (tmp_path / "a" / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(ROW | {"round": 2}) + "\n")
    second, _, sent = asked(watch, first)
    assert sent == {"a"}
    assert second > first
    assert asked(watch, 0)[2] == {"a", "b"}  # a page that was opened late, or loaded again
    assert asked(watch, first)[2] == {"a"}  # another page, which has not asked since
    started(tmp_path / "c")
    third, names, sent = asked(watch, second)
    assert (names, sent) == ({"a", "b", "c"}, {"c"})
    (tmp_path / "b" / "config.toml").unlink()
    fourth, names, sent = asked(watch, third)
    assert (names, sent) == ({"a", "c"}, set())
    assert fourth > third  # else the page would not look at the names
    assert asked(watch, 10**12)[2] == {"a", "c"}  # a version that this server never named


def test_a_run_that_gets_a_longer_name_is_sent_again(tmp_path: Path) -> None:
    started(tmp_path / "x" / "tiny")
    watch = Watch([tmp_path / "x", tmp_path / "y"])
    version, names, _ = asked(watch, 0)
    assert names == {"tiny"}
    started(tmp_path / "y" / "tiny")
    assert asked(watch, version)[1:] == ({"x/tiny", "y/tiny"}, {"x/tiny", "y/tiny"})


def test_an_ended_process_is_news_although_no_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(tmp_path / "a")
    (tmp_path / "a" / "live.json").write_text(json.dumps({"pid": 5, "rounds": 9, "round": 1}))
    alive = [True]
    monkeypatch.setattr(live_state, "_alive", lambda pid: pid == 5 and alive[0])
    watch = Watch([tmp_path])
    for expected in ("running", "stopped"):
        version = int(str(watch.state()["version"]))
        (run,) = watch.state()["runs"]  # type: ignore[misc]
        assert run["status"] == expected
        alive[0] = False
    assert asked(watch, version) == (version, {"a"}, set())


def test_files_that_did_not_change_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        started(tmp_path / f"run{number}")
    watch = Watch([tmp_path])
    for _ in range(2):
        watch.state()

    def refuse(path: Path) -> bytes:
        raise AssertionError(path)

    for name in ("read_plain", "open_plain"):
        monkeypatch.setattr(live_state, name, refuse)
    assert len(watch.state()["runs"]) == 5  # type: ignore[arg-type]


def test_a_curve_longer_than_a_piece_comes_in_parts_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(tmp_path / "a")
    (tmp_path / "a" / "rounds.jsonl").write_text("".join(json.dumps(ROW | {"round": n}) + "\n" for n in range(1, 41)))
    monkeypatch.setattr(live_state, "PIECE", 1000)
    watch = Watch([tmp_path])
    for _ in range(10):
        (run,) = watch.state()["runs"]  # type: ignore[misc]
    assert run["round"] == 40


def test_the_cost_of_a_page_is_found_below_what_disturbs_single_blocks_and_whole_runs() -> None:
    rng = np.random.default_rng(0)
    logs = []
    for run in range(8):
        swap = np.where(np.arange(9) % 2, -1, 1)[:, None]
        disturbed = rng.normal(0, 0.02, (9, 2)) + np.where(rng.random((9, 2)) < 0.1, 0.5, 0.0) * rng.choice([-1, 1], 1)
        logs.append((np.log(1.05) + swap * 0.2 * (run - 4) + disturbed)[1:])
    found = _intervals(logs)
    assert found["pairs_of_blocks"] == 32
    for name in ("seconds", "processor"):
        assert found[f"{name}_ratio_low"] < 1.05 < found[f"{name}_ratio_high"]
        assert found[f"{name}_ratio_high"] - found[f"{name}_ratio_low"] < 0.05


def test_the_page_of_a_killed_run_ends_too(tmp_path: Path) -> None:
    """The run is a shell that prints its own number, starts the server, and is killed."""
    watch = f"{shlex.quote(sys.executable)} -m fl_sim.cli watch {shlex.quote(str(tmp_path))} --parent $$ & wait"
    with subprocess.Popen(["sh", "-c", watch], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("watch: http://127.0.0.1:")
        run.kill()
        assert run.stdout.read() == ""  # until nobody holds the pipe any more, the server included
