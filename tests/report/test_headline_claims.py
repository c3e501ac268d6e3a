"""The sentence on top of a page claims no more than its numbers, which are those of `compare --baseline`."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import run_tiny
from summaries import summary

from fl_sim.communication.ledger import Ledger
from fl_sim.report import Report, against
from fl_sim.report.groups import Group
from fl_sim.report.headline import headline


def group(name: str, by_seed: dict[int, float], megabytes: float, folder: Path) -> Group:
    """Runs of one name with these accuracies, in percent, over the last ten rounds; `final` says the opposite."""
    made = []
    for seed, accuracy in by_seed.items():
        told = summary(
            name=name,
            seed=seed,
            accuracy={"final": 1 - accuracy / 100, "last10_mean": accuracy / 100, "best_by_validation": 0.0},
            total_bytes=round(megabytes * 1e6),
            saving=1 - megabytes / 100,
        )
        made.append(Report(folder, told, [], Ledger(), {}))
    return Group(name, tuple(made))


DENSE = {0: 80.0, 1: 70.0, 2: 75.0}
CASES = {
    "noise": ({0: 86.0, 1: 64.0, 2: 76.0}, "no difference in test accuracy shows: +0.33 ± "),
    "gain": ({0: 81.0, 1: 71.1, 2: 75.9}, "gained 1.00 ± 0.25 points of test accuracy over 3 seeds"),
    "loss": ({0: 79.5, 1: 69.4, 2: 74.6}, "lost 0.50 ± 0.25 points of test accuracy over 3 seeds"),
    "one seed in common": (
        {0: 79.5, 7: 99.0},
        "differs by -0.50 points, which one common seed cannot tell from chance",
    ),
    "no seed in common": ({7: 99.0, 8: 98.0}, "no seed is common to both"),
    "equal": (DENSE, "no difference in test accuracy shows: +0.00 ± 0.00 points"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gain_or_loss_is_claimed_only_beyond_its_interval(name: str, tmp_path: Path) -> None:
    by_seed, expected = CASES[name]
    groups = [group("dense", DENSE, 100, tmp_path), group("sparse", by_seed, 10, tmp_path)]
    text = headline(groups)
    assert expected in text
    assert ("gained" in text) == (name == "gain")
    assert ("lost" in text) == (name == "loss")
    assert "last ten rounds" in text


@pytest.mark.parametrize(
    ("megabytes", "said"), [(40, ", 60.0 % less than the"), (100, ", as much as the"), (101, ", 1.0 % more than the")]
)
def test_a_run_alone_is_beside_its_own_messages(megabytes: float, said: str, tmp_path: Path) -> None:
    text = headline([group("alone", DENSE, megabytes, tmp_path)])
    assert f"{said} same messages sent dense, and reached 75.00 ± " in text
    assert text.endswith("shows beside a dense run.") == (megabytes < 100)


def test_the_headline_has_the_number_of_compare(tmp_path: Path) -> None:
    runs = [
        run_tiny(tmp_path, "model.name=mlp", f"seed={seed}", *extra)
        for extra in ((), ("name=topk", "client=clients.presets:topk", "client.density=0.05"))
        for seed in (0, 1)
    ]
    groups = [Group("dense", tuple(runs[:2])), Group("topk", tuple(runs[2:]))]
    (beyond,) = (m for m in against(groups, "dense") if m.name == "beyond")
    change = beyond.spread(groups[1])
    assert change.mean is not None
    assert f"{abs(change.mean):.2f} ± {change.ci:.2f} points" in headline(groups)


def test_the_best_round_is_named_by_what_chose_it(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "rounds=3", "training.lr=2.0")
    accuracy = report.summary["accuracy"]
    assert isinstance(accuracy, dict)
    assert set(accuracy) == {"final", "last10_mean", "best_by_validation"}
    chosen = max(report.rounds, key=lambda row: row["validation_accuracy"])
    assert accuracy["best_by_validation"] == chosen["accuracy"]
