"""A chart of the clients' labels reads some rows of a large partition.json, and complains of a damaged one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from fl_sim.core.types import UserError
from fl_sim.report import Report
from fl_sim.report.charts import every_nth
from fl_sim.report.label_sample import LARGE, LabelSample


def report_of(folder: Path, text: str) -> Report:
    (folder / "partition.json").write_text(text)
    return Report(folder, {}, [], cast("object", SimpleNamespace()), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("clients", [3, 200, LARGE // 8])
def test_rows_of_evenly_spaced_clients(tmp_path: Path, clients: int) -> None:
    counts = [[client % 7, client % 11, 5] for client in range(clients)]
    sample = LabelSample.of(report_of(tmp_path, json.dumps(counts)))
    assert sample is not None
    assert (sample.clients, sample.kept) == (clients, every_nth(clients))
    assert sample.rows == [counts[client] for client in sample.kept]


@pytest.mark.parametrize("text", ["[[1, x], [" + "2], [" * LARGE + "3]]", "{" + " " * LARGE])
def test_a_large_file_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"damaged run folder: partition\.json"):
        LabelSample.of(report_of(tmp_path, text))


def test_a_run_without_a_partition_has_none(tmp_path: Path) -> None:
    report = report_of(tmp_path, "[]")
    assert LabelSample.of(report) is None
