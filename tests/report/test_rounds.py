"""Rounds as columns: the same rows as the file has, and curves the same as a loop over the rows gives."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from federation import run_tiny
from hypothesis import given
from hypothesis import strategies as st

from fl_sim import Report, UserError
from fl_sim.report.groups import Group, Spread
from fl_sim.report.numbers import Column, at_clock, at_megabytes, curve, densities
from fl_sim.report.rounds import Rounds
from fl_sim.report.summary import LINES, bytes_of_run
from fl_sim.report.summary_numbers import bytes_to
from fl_sim.report.times import time_to_accuracy

Row = Mapping[str, float]
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False))
ROWS = st.lists(st.dictionaries(st.sampled_from("abcd"), NUMBERS))


@given(ROWS)
def test_rows_come_back_as_they_were(rows: list[Row]) -> None:
    columns = Rounds(rows)
    assert len(columns) == len(rows)
    assert columns == rows
    assert [{k: type(v) for k, v in row.items()} for row in columns] == [
        {k: type(v) for k, v in row.items()} for row in rows
    ]
    assert columns[1:] == rows[1:]
    assert columns.names == list(dict.fromkeys(name for row in rows for name in row))
    for place in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            columns[place]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tiny(tmp_path_factory.mktemp("run"), "model.name=mlp", "rounds=2")


def rows_of(seed: int, count: int = 9) -> list[Row]:
    """Evaluated every other round, with a clock now and then, once diverged, and one round twice, as in a damaged file."""
    numbers = [*range(1, count), count - 2]
    rows = []
    for place, number in enumerate(numbers):
        row: dict[str, float] = {"round": number, "uplink_bytes": 10 * place, "downlink_bytes": 7 * place + seed}
        if place % 2:
            row["accuracy"] = math.nan if place == 3 else (place * 0.09 + seed * 0.001) % 1
        if place % 3:
            row["simulated_s"] = place * 1.5
        rows.append(row)
    return rows


def drawn(reports: Sequence[Report], name: str) -> dict[str, list[float]]:
    """By a loop over rows and rounds: megabytes and the column, where every seed has it."""
    found = [{row["round"]: 100 * row[name] for row in report.rounds if name in row} for report in reports]
    places = [
        {row["round"]: (row["uplink_bytes"] + row["downlink_bytes"]) / 1e6 for row in report.rounds}
        for report in reports
    ]
    common = sorted(set.intersection(*map(set, found)))
    y = [Spread.of(each[number] for each in found) for number in common]
    reach = [spread.ci or 0.0 for spread in y]
    means = [spread.mean or 0.0 for spread in y]
    return {
        "x": [Spread.of(each[number] for each in places).mean or 0.0 for number in common],
        "y": means,
        "low": [mean - ci for mean, ci in zip(means, reach, strict=True)] if len(reports) > 1 else [],
        "high": [mean + ci for mean, ci in zip(means, reach, strict=True)] if len(reports) > 1 else [],
    }


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_curve_is_that_of_a_loop_over_the_rows(seeds: int, run: Report) -> None:
    reports = [replace(run, rounds=rows_of(seed, 9 - seed)) for seed in range(seeds)]
    made = curve(Group("x", tuple(reports)), at_megabytes, Column("accuracy", scale=100.0))
    for name, expected in drawn(reports, "accuracy").items():
        assert list(getattr(made, name)) == pytest.approx(expected, rel=1e-15, nan_ok=True)
    assert len(made.x) > 2


def test_levels_are_reached_where_a_loop_over_the_rows_says(run: Report) -> None:
    report = replace(run, rounds=[row for row in rows_of(0) if row.get("accuracy") == row.get("accuracy")])
    evaluated = [row for row in report.rounds if "accuracy" in row]
    for level in (0.0, 0.1, 0.27, 0.6, 0.9):
        assert bytes_of_run(report, level) == bytes_to(evaluated, level)
    assert list(at_clock(report).rounds) == sorted({row["round"] for row in report.rounds if "simulated_s" in row})


def test_a_column_less_another_needs_both(run: Report) -> None:
    rows = [{"round": 1, "a": 2.0, "b": 0.5}, {"round": 2, "a": 3.0}, {"round": 3, "b": 1.0}]
    found = Column("a", "b", 10.0)(Rounds(rows))
    assert (found.rounds.tolist(), found.values.tolist()) == ([1.0], [15.0])
    assert Column("c", "b")(Rounds(rows)).rounds.tolist() == []


def test_what_a_folder_holds_is_what_the_run_returned(run: Report) -> None:
    loaded = Report.load(run.folder)
    assert loaded.rounds == run.rounds
    assert densities(loaded, "density") == densities(run, "density")
    headings, rows = time_to_accuracy([Group("x", (loaded,))])
    assert all(len(row) == len(headings) for row in rows)


@pytest.mark.parametrize("place", [1, LINES + 1])
@pytest.mark.parametrize("wrong", [{"round": "one"}, {"round": 10**400}, {"loss": True}, {"loss": 10**400}])
def test_a_damaged_line_is_refused_wherever_it_is(place: int, wrong: object, run: Report, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for file in ("summary.json", "ledger.parquet", "config.toml"):
        (folder / file).write_bytes((run.folder / file).read_bytes())
    lines = [json.dumps({**run.rounds[0], "round": number}) for number in range(1, LINES + 3)]
    assert isinstance(wrong, dict)
    lines[place] = json.dumps({**run.rounds[0], **wrong})
    (folder / "rounds.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"damaged run folder: rounds\.jsonl") as refused:
        Report.load(folder)
    assert "\n" not in str(refused.value)
