"""A run folder of which something was lost is refused in one line, and never shown as a whole run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from federation import run_tiny

from fl_sim.core.types import UserError
from fl_sim.report import Report, explanation
from fl_sim.report.experiment_facts import facts
from fl_sim.report.label_sample import LARGE, LabelSample
from fl_sim.simulation.replaying import asked


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("whole"), "model.name=mlp", "wire.record_payloads=1").folder


def explained(report: Report) -> object:
    return explanation(report)


def told(report: Report) -> object:
    return facts(report)


def replayed(report: Report) -> object:
    return asked(report, ["wire.uplink.values=int8"])


def counted(report: Report) -> object:
    return report.label_counts


def sampled(report: Report) -> object:
    return LabelSample.of(report)


def without(text: str, table: str) -> str:
    """A config without one table."""
    start = text.index(f"[{table}]")
    return text[:start] + text[text.index("\n[", start) + 1 :]


READERS = (explained, told, replayed)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("cut", "missing"),
    [
        (lambda text: "", "name"),
        (lambda text: without(text, "model"), "model.name"),
        (lambda text: without(text, "data"), "data.source"),
        (lambda text: without(text, "wire"), "wire.error_feedback"),
        (lambda text: text[: text.index("[model]")] + "[model]\n" + text[text.index("[cohort]") :], "model.name"),
    ],
    ids=["empty", "model", "data", "wire", "keys of model"],
)
def test_a_config_that_lost_something_is_refused(
    tmp_path: Path, whole: Path, read: Callable[[Report], object], cut: Callable[[str], str], missing: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    config = folder / "config.toml"
    config.write_text(cut(config.read_text()))
    with pytest.raises(UserError, match=f"damaged run folder: config.toml: without {missing}, which every run writes$"):
        read(Report.load(folder))


@pytest.mark.parametrize("kept", [0, 1])
def test_rounds_that_were_cut_are_said(tmp_path: Path, whole: Path, kept: int) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    (folder / "rounds.jsonl").write_text("".join(lines[:kept]))
    with pytest.raises(UserError, match=f"damaged run folder: rounds.jsonl: {kept} rounds, of 2 in summary.json$"):
        Report.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "read", "said"),
    [
        ("partition.json", "null", counted, "null"),
        ("partition.json", "", counted, "Expecting value"),
        ("partition.json", "[]", counted, "0 clients, of 6 in summary.json$"),
        ("partition.json", "[[1, 2], [3, 4]]", counted, "2 clients, of 6 in summary.json$"),
        ("partition.json", f"[{'[1, 2], ' * LARGE}[3, 4]]", sampled, f"{LARGE + 1} clients, of 6 in summary.json$"),
        ("identity.json", "null", explained, "null"),
        ("identity.json", "{}", explained, "'code': Field required"),
    ],
)
def test_a_json_file_that_lost_something_is_refused(
    tmp_path: Path, whole: Path, file: str, content: str, read: Callable[[Report], object], said: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=f"damaged run folder: {file}: {said}"):
        read(Report.load(folder))
