"""Rate-distortion pruning in a federation: who measures, what it costs, that parts equal the whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import FOUR, run_tiny, tiny

from fl_sim.codecs import CorruptPayload
from fl_sim.communication.ledger import Ledger
from fl_sim.core.seeding import Purpose
from fl_sim.core.types import UserError
from fl_sim.simulation.engines import open_grid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.loop import RunStopped
from fl_sim.simulation.server import build_server
from fl_sim.sparsity import OneShot
from fl_sim.sparsity import curve_messages as measuring
from fl_sim.sparsity.curves import MeasureCurves, calibration, pooled
from fl_sim.training import load
from strategies.calibration import FromServer, PruneByDistortion
from strategies.presets import rate_distortion
from strategies.queries import Query
from strategies.sparse_server import SparseServer

PRUNING = ["strategy.target=strategies.presets:rate_distortion", "strategy.density=0.2", "strategy.levels=6"]
SERVER = [*PRUNING, "strategy.curves=server"]


def queries(ledger: Ledger) -> Mapping[tuple[str | int | float, ...], int]:
    return ledger.total(by=("direction", "section"), where={"phase": "query"})


def test_curves_of_clients_pool_to_those_of_all_their_images(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, *FOUR, *PRUNING)
    federation = Federation.build(experiment)
    ledger, measure = Ledger(), MeasureCurves(levels=6)
    server = build_server(federation, ledger).models[0]
    assert isinstance(server, SparseServer)
    with open_grid(federation) as grid:
        answers = Query(grid, server.receiver, server.round_log).curves(server.state, measure, 9)
    cohort = server.cohorts.draw(0, Purpose.CALIBRATION, 4, np.arange(6))
    images = torch.cat([calibration(federation.data.train.subset(federation.partitions[p]), 9) for p in cohort])
    counts = [count for _, count in answers]
    assert sum(counts) == len(images) <= 4 * 9
    whole = measure(load(federation.first.model, server.params), images)
    together = pooled([curves for curves, _ in answers], counts)
    for name, curve in whole.items():
        assert together[name] == pytest.approx(curve, rel=1e-5, abs=1e-9)
    sections = queries(ledger)
    assert sections["up", "auxiliary"] == 4 * len(whole) * 6 * 4
    assert sections["down", "values"] == 4 * 4 * federation.first.exchange.schema.prunable_size


def test_a_federation_is_pruned_by_what_its_clients_measured(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *FOUR, *PRUNING, "rounds=3", "strategy.min_keep=10")
    total = sum(report.params[name].numel() for name in ("0.weight", "3.weight", "6.weight", "11.weight"))
    assert report.summary["density"]["prunable"] == round(0.2 * total) / total
    assert all(int(report.params[n].count_nonzero()) >= 10 for n in ("0.weight", "3.weight", "6.weight", "11.weight"))
    assert [row["density"] for row in report.rounds] == pytest.approx([0.2, 0.2, 0.2], abs=1e-3)
    by_phase = report.ledger.total(by=("phase",))
    measured = by_phase["train",] + by_phase["query",]
    assert report.summary["saving"] == pytest.approx(1 - measured / report.summary["dense_total_bytes"])
    # One event: the query goes to a cohort once, and no later round asks again.
    assert report.ledger.messages(phase="query") == {"down": 4, "up": 4}


def test_steps_reach_the_density_and_masks_are_nested(tmp_path: Path) -> None:
    options = ["rounds=4", "strategy.amount=0.5", "strategy.every=1", "wire.record_masks=true"]
    report = run_tiny(tmp_path, *FOUR, *PRUNING, *options)
    assert [row["density"] for row in report.rounds] == pytest.approx([0.5, 0.25, 0.2, 0.2], abs=1e-3)
    assert report.ledger.messages(phase="query") == {"down": 12, "up": 12}
    layers = [key for key in report.rounds[0] if key.startswith("density/")]
    for earlier, later in zip(report.rounds, report.rounds[1:], strict=False):
        assert all(later[key] <= earlier[key] + 1e-4 for key in layers)


def test_a_new_mask_travels_once_and_values_alone_afterwards(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *PRUNING, "rounds=4", "cohort.size=6")
    masks = report.ledger.total(by=("round", "direction"), where={"section": "mask"})
    assert {key: count > 0 for key, count in masks.items() if count} == {(2, "down"): True}


@pytest.mark.parametrize("images", ["data.proxy=0.1", "data.noise=16"])
def test_the_server_measures_without_a_byte(tmp_path: Path, images: str) -> None:
    report = run_tiny(tmp_path, *SERVER, images)
    assert report.summary["density"]["prunable"] == pytest.approx(0.2, abs=1e-4)
    assert queries(report.ledger) == {}


def test_the_server_needs_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.proxy"):
        run_tiny(tmp_path, *SERVER)


def test_unknown_sources_are_refused() -> None:
    with pytest.raises(UserError, match="clients, server"):
        rate_distortion(curves="client")
    with pytest.raises(UserError, match="levels = 1"):
        rate_distortion(levels=1)


def test_no_curve_is_measured_where_nothing_is_due(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *PRUNING, "strategy.at=5")
    assert report.summary["density"]["prunable"] == 1.0
    assert queries(report.ledger) == {}


def test_a_method_prints_and_compares() -> None:
    first, second = (PruneByDistortion(OneShot(1, 0.5), FromServer(MeasureCurves(), 3)) for _ in range(2))
    assert first == second
    assert "OneShot(at=1, density=0.5)" in repr(first)


def test_answers_survive_the_wire_and_bad_ones_are_refused() -> None:
    curves = {"a": [0.0, 0.25, 1.5], "b": [0.0, 2.0, 3.0]}
    schema = measuring.answer_schema(list(curves), 3)
    data = measuring.encode_curves(curves)
    assert measuring.decode_curves(data, schema) == curves
    other = measuring.answer_schema(list(curves), 4)
    for bad, expected in ((data[:-1], schema), (data, other), (b"", schema)):
        with pytest.raises(CorruptPayload):
            measuring.decode_curves(bad, expected)
    with pytest.raises(CorruptPayload, match="below zero"):
        measuring.decode_curves(measuring.encode_curves({"a": [0, -1, 0], "b": [0, 0, 0]}), schema)


def test_answers_that_are_no_curves_are_booked_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = measuring.encode_curves, []

    def sometimes(curves: Mapping[str, list[float]]) -> bytes:
        calls.append(1)
        return b"nonsense" if len(calls) == 2 else encode(curves)

    monkeypatch.setattr(measuring, "encode_curves", sometimes)
    report = run_tiny(tmp_path, *PRUNING)
    assert report.summary["failures"]["rejected"] == 1
    assert report.ledger.total(by=("status",), where={"phase": "query", "direction": "up"})["rejected",] == 8
    assert report.summary["density"]["prunable"] == pytest.approx(0.2, abs=1e-4)


def test_the_first_reason_is_told_where_no_client_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "encode_curves", lambda curves: b"nonsense")
    with pytest.raises(
        RunStopped, match=r"none of 3 clients answered a query for curves: client \d: rejected curves: "
    ):
        run_tiny(tmp_path, *PRUNING)


@pytest.mark.slow
def test_ray_measures_the_same(tmp_path: Path) -> None:
    inline, ray = (run_tiny(tmp_path / e, *PRUNING, f"engine={e}") for e in ("inline", "ray"))
    assert inline.summary["params_sha256"] == ray.summary["params_sha256"]
    assert queries(inline.ledger) == queries(ray.ledger)
