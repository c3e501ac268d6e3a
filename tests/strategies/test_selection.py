"""Client selection: who takes part, what asking costs, and what a rule of one's own may return."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from softmax_federation import SIZES, experiment, joined, loss

from fl_sim import Report, UserError, run
from fl_sim.simulation.federation import Federation
from strategies.selection import PowerOfChoice, Request, by_size, checked, drawn

HERE = Path(__file__).stem


def cohort(report: Report, number: int, phase: str) -> list[int]:
    rows = report.ledger.to_table().to_pydict()
    found = zip(rows["client"], rows["round"], rows["phase"], strict=True)
    return sorted({client for client, at, kind in found if at == number and kind == phase})


def request(rng: np.random.Generator, count: int, losses: object = None) -> Request:
    return Request(1, np.arange(4), np.array(SIZES), count, rng, losses)  # type: ignore[arg-type]


def test_power_of_choice_takes_the_candidates_with_the_largest_loss_and_books_the_question(tmp_path: Path) -> None:
    options = ("strategy=strategies.presets:power_of_choice", "strategy.candidates=4", "cohort.size=2", "rounds=1")
    asked = experiment(tmp_path, *options)
    report, first = run(asked, quiet=True), joined(Federation.build(asked, quiet=True).first.start)
    by_loss = sorted(range(4), key=lambda client: -loss(first, client))
    assert cohort(report, 1, "query") == [0, 1, 2, 3]
    assert cohort(report, 1, "train") == sorted(by_loss[:2])
    moved = report.ledger.total(by=("direction", "phase"))
    assert moved["down", "query"] == 2 * moved["down", "train"], (
        "four candidates, two of which are sent the model again"
    )
    assert 0 < moved["up", "query"] < 4 * 64
    dense = report.results.dense_total_bytes
    assert report.results.saving == pytest.approx(1 - sum(moved.values()) / dense), (
        "questions count as what was measured"
    )


def test_the_clock_waits_for_the_slowest_answer_to_a_question(tmp_path: Path) -> None:
    """Both ways over the client's own link, before the round of those that were chosen."""
    options = ('network.links={"3G" = 1, "Wi-Fi" = 1}', "network.speed_spread=3", "rounds=1")
    power = ("strategy=strategies.presets:power_of_choice", "strategy.candidates=4", "cohort.size=2")
    asked = experiment(tmp_path, *options, *power)
    report = run(asked, quiet=True)
    moved = report.ledger.total(by=("phase", "direction", "client"))

    def seconds(phase: str, client: int, samples: float) -> float:
        down, up = (moved[phase, direction, client] for direction in ("down", "up"))
        return asked.network.seconds(client=client, seed=asked.seed, down_bytes=down, up_bytes=up, samples=samples)

    waited = max(seconds("query", client, 0) for client in range(4))
    trained = max(seconds("train", client, 2 * SIZES[client]) for client in cohort(report, 1, "train"))
    assert report.rounds[0]["simulated_s"] == pytest.approx(waited + trained)


def test_candidates_are_drawn_by_size_and_a_client_that_does_not_answer_is_passed_over() -> None:
    rng = np.random.default_rng(0)
    shares = np.bincount([by_size(request(rng, 1))[0] for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(shares, np.array(SIZES) / sum(SIZES), atol=0.03)
    rule = PowerOfChoice(4)
    assert rule(request(rng, 2, lambda clients: {c: float(c % 2) for c in clients})) == [1, 3]
    assert rule(request(rng, 2, lambda clients: {c: 0.0 for c in clients if c != 0})) == [1, 2]
    with pytest.raises(UserError, match=r"strategy\.candidates = 4: must be at least the clients of a round, 5"):
        rule(request(rng, 5))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([0, 7], "returned 7, which is no client; needed: 1 to 3 distinct clients"),
        ([1, 1], "returned 1 clients in 2 entries"),
        ([], "returned 0 clients in 0 entries"),
        ([0, 1, 2, 3], "returned 4 clients in 4 entries"),
        (None, "returned NoneType; needed: a list of clients"),
    ],
)
def test_what_is_no_cohort_is_one_line(found: object, said: str) -> None:
    with pytest.raises(UserError, match=f"^strategy: the selection rule {said}"):
        checked(found, request(np.random.default_rng(0), 3))


def last_ones(request: Request) -> list[int]:
    """A rule of one's own."""
    return [int(client) for client in request.clients[-request.count + 1 :]]


def test_a_rule_that_raises_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^strategy: the selection rule raised ZeroDivisionError: "):
        drawn(lambda request: [1 // 0], request(np.random.default_rng(0), 3))


def test_a_rule_of_one_s_own_is_named_in_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    report = run(experiment(tmp_path, f"strategy.select={HERE}:last_ones", "rounds=1"), quiet=True)
    assert cohort(report, 1, "train") == [2, 3]
