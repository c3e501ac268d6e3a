"""summary.json: one schema, committed for other programs; what does not fit it is refused in one line."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from federation import run_tiny
from jsonschema import Draft202012Validator

from fl_sim import Report, UserError
from fl_sim.report.measures import MEASURES
from fl_sim.report.schema import Summary, json_schema

COMMITTED = Path("docs/summary.schema.json")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tiny(tmp_path_factory.mktemp("runs"), "model.name=mlp", "network.links.3G=1")


def test_the_committed_schema_is_the_summarys() -> None:
    """`python -m fl_sim.report.schema > docs/summary.schema.json`, which `make docs` runs."""
    assert COMMITTED.read_text() == json_schema()


def test_a_runs_summary_fits_the_committed_schema(report: Report) -> None:
    validator = Draft202012Validator(json.loads(COMMITTED.read_text()))
    summary = json.loads((report.folder / "summary.json").read_text())
    assert list(validator.iter_errors(summary)) == []
    assert list(validator.iter_errors({**summary, "total_bytes": -1}))
    assert list(summary) == list(Summary.model_fields)


def test_every_key_says_what_it_is() -> None:
    described = json.loads(json_schema())
    tables = [described, *described["$defs"].values()]
    unsaid = [
        k for t in tables for k, field in t["properties"].items() if "$ref" not in field and "description" not in field
    ]
    assert unsaid == []


def test_a_summary_as_mapping_file_and_typed_value_are_one(report: Report) -> None:
    loaded = Report.load(report.folder)
    assert loaded.summary == report.summary
    assert loaded.results == report.results
    assert report.results.model_dump() == report.summary
    assert report.summary["accuracy"]["final"] == report.results.accuracy.final
    assert {field.name for field in fields(Report)} >= {"summary", "rounds", "ledger"}


@pytest.mark.parametrize("value", [None, "x", [], {}, True, -1, 2**70, float("nan"), float("inf")], ids=str)
def test_every_number_shown_is_a_number(report: Report, value: object) -> None:
    """NaN in the page's JSON would leave every chart undrawn."""
    measured = {"uplink_bytes", "downlink_bytes", "total_bytes", "params", "rounds"}
    for key in measured:
        with pytest.raises(UserError, match=rf"summary\.json: '{key}'") as caught:
            _ = replace(report, summary={**report.summary, key: value}).results
        assert "\n" not in str(caught.value)
    assert [measure.of(report) for measure in MEASURES]
