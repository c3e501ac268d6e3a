"""Choices of the pruning presets in a federation, and the central settings of the papers."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import WHOLE, run_tiny

from clients.presets import fedavg
from fl_sim import Experiment, run
from fl_sim.core.types import UserError
from fl_sim.training import Training
from strategies.presets import global_magnitude, gradual_magnitude

WEIGHTS = ("0.weight", "3.weight", "6.weight", "11.weight")
GLOBAL = ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.1", "rounds=1"]


def kept(out: Path, *overrides: str) -> list[int]:
    report = run_tiny(out, *WHOLE, *GLOBAL, *overrides)
    return [int(report.params[name].count_nonzero()) for name in WEIGHTS]


def test_allocations_keep_the_same_number_in_different_places(tmp_path: Path) -> None:
    found = {
        name: kept(tmp_path / name, f"strategy.allocate={name}") for name in ("global", "uniform", "lamp", "random")
    }
    assert {sum(counts) for counts in found.values()} == {2382}
    assert found["uniform"] == pytest.approx([14.4, 460.8, 1843.2, 64], abs=1)
    assert len({tuple(counts) for counts in found.values()}) == 4


@pytest.mark.parametrize("mode", ["exact", "published"])
def test_the_minimum_threshold_is_a_percentage_of_all_weights(tmp_path: Path, mode: str) -> None:
    counts = kept(tmp_path, "strategy.min_threshold=0.5", f"strategy.mt_mode={mode}")
    assert sum(counts) == 2382
    assert all(count >= min(size, 119) for count, size in zip(counts, (144, 4608, 18432, 640), strict=True))


@pytest.mark.parametrize(("schedule", "halfway"), [("cubic", 0.2125), ("linear", 0.55), ("exponential", 0.1**0.5)])
def test_gradual_pruning_follows_the_schedule_that_it_names(tmp_path: Path, schedule: str, halfway: float) -> None:
    method = ["strategy.target=strategies.presets:gradual_magnitude", f"strategy.schedule={schedule}"]
    report = run_tiny(tmp_path, *method, "strategy.end=3", "rounds=3")
    assert [row["density"] for row in report.rounds] == pytest.approx([1, halfway, 0.1], abs=1e-4)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(UserError, match=r"strategy\.schedule"):
        gradual_magnitude(schedule="cosine")
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        global_magnitude(allocate="unifrm")
    with pytest.raises(UserError, match="only for allocate = 'global'"):
        gradual_magnitude(allocate="erk", min_threshold=0.05)
    with pytest.raises(UserError, match="exact, published"):
        global_magnitude(mt_mode="repo")
    with pytest.raises(UserError, match="label_smoothing = 2"):
        fedavg(training=Training(), label_smoothing=2.0)


def test_label_smoothing_changes_the_training_and_none_is_the_plain_loss(tmp_path: Path) -> None:
    plain, none, some = (
        run_tiny(tmp_path / name, "rounds=1", *extra).summary["params_sha256"]
        for name, extra in (
            ("plain", []),
            ("none", ["client.target=clients.presets:fedavg", "client.label_smoothing=0.0"]),
            ("some", ["client.target=clients.presets:fedavg", "client.label_smoothing=0.1"]),
        )
    )
    assert plain == none != some


SMALL = ["data.source=digits", "model.name=cnn_bn", "training.steps=2", "training.precision=float32"]


@pytest.mark.parametrize(
    ("config", "extra", "density"),
    [
        ("central_global_magnitude", [], 0.045),
        ("central_rate_distortion", ["rounds=2", "strategy.levels=4", "strategy.images=8"], 0.64),
        ("cifar10_density", ["rounds=3", "strategy.start=1", "strategy.end=2", "cohort.size=2"], 0.1),
        ("cifar10_density_rd", ["rounds=2", "strategy.at=2", "strategy.levels=4", "cohort.size=2"], 0.8),
    ],
)
def test_the_shipped_configs_prune(tmp_path: Path, config: str, extra: list[str], density: float) -> None:
    report = run(Experiment.load(f"configs/{config}.toml", [f'out="{tmp_path}"', *SMALL, *extra]))
    assert report.summary["density"]["prunable"] == pytest.approx(density, abs=1e-3)
    assert report.summary["failures"]["raised"] == 0


def test_a_persistent_sparse_model_moves_its_mask_at_the_price_of_a_difference(tmp_path: Path) -> None:
    asked = ["strategy.target=strategies.presets:prune_and_grow", "strategy.density=0.2", "strategy.every=2"]
    gates = ["client.target=clients.presets:adaptive_pruning", "gating.salience=activation"]
    report = run_tiny(tmp_path / "moving", *asked, *gates, "rounds=6", "cohort.size=6")
    fixed = run_tiny(tmp_path / "fixed", *asked, *gates, "rounds=6", "cohort.size=6", "strategy.every=100")
    assert all(row["density"] == pytest.approx(0.2, abs=1e-3) for row in report.rounds)
    masks = report.ledger.total(by=("round", "direction"), where={"section": "mask"})
    # The first mask is whole; exchanges after rounds 2 and 4 cost less; clients that hold the mask are sent none.
    assert [masks.get((n, "down"), 0) > 0 for n in range(1, 7)] == [False, True, True, False, True, False]
    assert masks[3, "down"] < masks[2, "down"]
    assert fixed.ledger.total(by=("round", "direction"), where={"section": "mask"}).get((3, "down"), 0) == 0
    down = report.ledger.total(by=("round",), where={"direction": "down", "section": "values"})
    assert down[(3,)] < 0.21 * down[(1,)]
    assert report.summary["failures"]["raised"] == 0
