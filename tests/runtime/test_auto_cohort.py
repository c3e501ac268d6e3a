"""`engine = "auto"` and tiny models: a rule of size chooses the cohort engine, which the run says, records and keeps to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from federation import run_tiny, same, tiny

from fl_sim import Report, run
from fl_sim.core.observer import Observer
from fl_sim.simulation import engines
from fl_sim.simulation.engines import settled, settled_by_model
from fl_sim.simulation.federation import Federation

MANY = ["data.clients=40", "data.partition=iid", "cohort.size=32"]
AUTO = ["engine=auto", "device=cpu", "model.name=mlp", *MANY]


def chosen(tmp_path: Path, *options: str, before: str | None = None) -> tuple[str, str]:
    """The engine that auto comes to, and what is said."""
    experiment, why = settled(tiny(tmp_path, *AUTO, *options))
    assert why is not None
    federation, said = settled_by_model(Federation.build(experiment), why, before=before)
    return federation.experiment.engine, said


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_tiny_models_train_together_whatever_the_cores(tmp_path: Path, cores: int) -> None:
    engine, said = chosen(tmp_path, f"workers.count={cores}")
    assert engine == "cohort"
    # 64 inputs, 64 hidden units, 10 classes: 64 * 65 + 64 * 10 + 10 parameters, (64 * 64 + 64 * 10) products times 8 samples
    assert said.startswith("engine: cohort (4,810 parameters, 37,888 multiply-accumulates a step, 32 clients a round:")


@pytest.mark.parametrize(
    "options",
    [
        ["cohort.size=31"],
        ["model.width=2.1"],
        ["training.batch_size=212"],
        ["client.target=clients.presets:fedprox", "client.mu=0.1"],
        ["training.optimizer=adamw", "training.lr=0.001"],
        ["faults.timeout_s=10"],
    ],
    ids=["few clients", "parameters", "products", "another loss", "another optimizer", "time limit"],
)
def test_all_else_is_as_before(tmp_path: Path, options: list[str]) -> None:
    engine, said = chosen(tmp_path, "workers.count=1", *options)
    assert (engine, said) == ("inline", "engine: inline (one core)")


def test_the_limits_are_those_that_the_cases_above_pass(tmp_path: Path) -> None:
    assert chosen(tmp_path, "model.width=2", "workers.count=1")[0] == "cohort"  # 9,610 parameters
    assert chosen(tmp_path, "training.batch_size=211", "workers.count=1")[0] == "cohort"  # 999,296 products


class Said(Observer):
    """Remembers lines; may stop the run after a round."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.lines: list[str] = []
        self.stop_after = stop_after

    def say(self, line: str) -> None:
        self.lines.append(line)

    def round(self, row: dict[str, float]) -> None:  # type: ignore[override]
        if row["round"] == self.stop_after:
            raise KeyboardInterrupt


def test_a_run_says_and_records_the_engine_and_repeats_its_bits(tmp_path: Path) -> None:
    said = Said()
    first = run(tiny(tmp_path / "first", *AUTO), said)
    assert [line for line in said.lines if line.startswith("engine: cohort (")] == said.lines[:1]
    assert first.summary["engine"] == "cohort"
    assert 'engine = "cohort"' in (first.folder / "config.toml").read_text()
    same(first, run_tiny(tmp_path / "second", *AUTO))
    inline = run_tiny(tmp_path / "inline", *AUTO, "engine=inline")
    assert inline.summary["engine"] == "inline"
    for name, value in inline.params.items():
        torch.testing.assert_close(first.params[name], value, atol=1e-5, rtol=1e-5)


def stopped(tmp_path: Path, *options: str) -> Callable[..., Report]:
    """Stop a run after its first round; returns a function that resumes it."""
    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path, *AUTO, *options), Said(stop_after=1))
    return lambda *others: run(tiny(tmp_path, *AUTO, *options, *others), resume=True)


def test_a_resumed_run_keeps_to_its_engine_whatever_the_rule_says_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_tiny(tmp_path / "whole", *AUTO)
    resume_cohort = stopped(tmp_path / "cohort")
    resume_inline = stopped(tmp_path / "inline", "engine=inline")
    assert resume_inline("engine=auto").summary["engine"] != "cohort"
    monkeypatch.setattr(engines, "MOST_PARAMETERS", 0)
    same(whole, resume_cohort())


def test_going_on_with_another_kind_of_engine_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resume = stopped(tmp_path)
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        resume("engine=inline")
    assert sum("inline goes on with rounds of cohort" in record.message for record in caplog.records) == 1
