"""The same numbers as CSV, Markdown, LaTeX and a frame."""

from __future__ import annotations

import csv
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
from federation import run_tiny

from fl_sim import Report, UserError
from fl_sim.report import FORMATS, against, grouped


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    out = tmp_path_factory.mktemp("runs")
    return [run_tiny(out, "model.name=mlp", f"seed={seed}") for seed in (0, 1)]


def test_csv_holds_the_summaries_exactly(reports: list[Report]) -> None:
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](grouped(reports)))))
    assert len(rows) == 1
    accuracies = [100 * report.results.accuracy.final for report in reports]
    assert float(rows[0]["accuracy [%]"]) == pytest.approx(sum(accuracies) / 2, rel=1e-12)
    assert float(rows[0]["accuracy [%] ci95"]) == pytest.approx(
        12.7062 * abs(accuracies[0] - accuracies[1]) / 2, rel=1e-4
    )
    assert float(rows[0]["feddst [MB]"]) > 0
    assert (rows[0]["run"], rows[0]["seeds"]) == ("tiny", "0, 1")


def test_one_seed_has_no_interval(reports: list[Report]) -> None:
    row = next(csv.DictReader(io.StringIO(FORMATS["csv"](grouped(reports[:1])))))
    assert row["accuracy [%] ci95"] == ""


def test_a_run_from_before_a_key_had_its_default(reports: list[Report], tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(reports[1].folder, older)
    config = (older / "config.toml").read_text()
    (older / "config.toml").write_text(config.replace("fit = 0\n", ""))
    assert "fit = 0\n" in config
    assert [group.name for group in grouped([reports[0], Report.load(older)])] == ["tiny"]


def test_markdown_and_latex_have_equal_columns_everywhere(reports: list[Report]) -> None:
    odd = replace(reports[0], summary={**reports[0].summary, "name": r"a|b\c_100%&<x>"})
    groups = grouped([*reports, odd])
    lines = FORMATS["markdown"](groups).splitlines()
    assert len(lines) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    latex = FORMATS["latex"](groups)
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {rows[0].count("&")}
    assert r"a|b\textbackslash{}c\_100\%\&<x>" in latex
    assert not re.search(r"(?<!\\)[%#_]", latex)


def test_frames_concatenate(reports: list[Report]) -> None:
    frame = pandas.concat([report.frame() for report in reports])
    assert len(frame) == sum(len(report.rounds) for report in reports)
    assert frame.groupby("seed")["uplink_bytes"].max().tolist() == [r.summary["uplink_bytes"] for r in reports]


def test_a_loaded_report_has_the_same_frame(reports: list[Report], tmp_path: Path) -> None:
    pandas.testing.assert_frame_equal(Report.load(reports[0].folder).frame(), reports[0].frame())


def test_beside_a_baseline_seeds_are_paired(reports: list[Report], tmp_path: Path) -> None:
    topk = ("model.name=mlp", "name=topk", "client=clients.presets:topk", "wire.error_feedback=true", "rounds=4")
    sparse = [run_tiny(tmp_path, f"seed={seed}", *topk) for seed in (0, 1)]
    groups = grouped([*reports, *sparse, run_tiny(tmp_path, "seed=2", *topk)])
    columns = {measure.name: measure.spread(groups[1]) for measure in against(groups, "tiny")}
    ends = [100 * r.results.accuracy.last10_mean for r in reports]
    own = [100 * r.results.accuracy.last10_mean for r in sparse]
    assert columns["beyond"].values == pytest.approx([b - a for a, b in zip(ends, own, strict=True)])
    shares = [100 * s.results.total_bytes / r.results.total_bytes for r, s in zip(reports, sparse, strict=True)]
    assert columns["bytes"].values == pytest.approx(shares)
    reached = [
        next(
            (
                (row["uplink_bytes"] + row["downlink_bytes"]) / 1e6
                for row in s.rounds
                if row["accuracy"] >= end / 100 - 0.01
            ),
            None,
        )
        for end, s in zip(ends, sparse, strict=True)
    ]
    assert columns["to its end less a point"].values == tuple(v for v in reached if v is not None)
    assert reached != [None, None]
    # The baseline has no seed 2: nothing is made up for it.
    assert {len(columns[name].values) for name in ("beyond", "bytes")} == {2}
    assert len(columns["last ten rounds"].values) == 3
    assert {m.name: m.spread(groups[0]).mean for m in against(groups, "tiny")}["bytes"] == 100.0
    for form in FORMATS.values():  # measures beside a baseline hold its runs, which have no hash
        assert "to its end less a point" in form(groups, against(groups, "tiny"))
    with pytest.raises(UserError, match=r"--baseline 'dense': no such run; allowed: tiny, topk"):
        against(groups, "dense")
