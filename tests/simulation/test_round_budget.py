"""A byte budget of a round: every round's bytes fit, whatever is sent, and one that cannot hold is refused with the smallest."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from federation import run_tiny, same
from hypothesis import given
from hypothesis import strategies as st

from fl_sim import Report, codecs
from fl_sim.codecs import Schema
from fl_sim.communication.byte_budget import ByteBudget
from fl_sim.core.types import UserError
from fl_sim.runtime.budget_coding import BudgetCoding
from fl_sim.simulation.replaying import asked, replay_run
from fl_sim.simulation.round_budget import UNBIASED
from fl_sim.sparsity.bit_allocation import SLACK, TYPES, rounding_errors

DIFFERENCE = ["wire.uplink.content=difference"]
TOPK = ["client.target=clients.presets:topk", "client.density=0.1", "wire.error_feedback=true"]
PRUNED = ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2", "rounds=4"]
HEAD = ["model.trainable=head", "model.batchnorm_init=fixed"]


def budgeted(folder: Path, megabytes: float, *options: str) -> Report:
    return run_tiny(folder, f"wire.budget.megabytes={megabytes}", *DIFFERENCE, *options)


def by_round(report: Report) -> list[int]:
    return list(report.ledger.total(by=("round",)).values())


@pytest.mark.parametrize(
    ("megabytes", "options"),
    [
        (0.05, []),
        (0.03, ["wire.error_feedback=true"]),
        (0.05, ["evaluate.clients=2"]),
        (0.03, TOPK),
        (0.08, PRUNED),
        (0.01, HEAD),
        (0.05, ["wire.budget.downlink=0.3", "engine=cohort"]),
    ],
    ids=["dense", "feedback", "evaluate", "topk", "pruned", "head", "cohort"],
)
def test_every_round_fits(tmp_path: Path, megabytes: float, options: list[str]) -> None:
    report = budgeted(tmp_path, megabytes, *options)
    sizes = by_round(report)
    assert max(sizes) <= 1e6 * megabytes
    assert not any(report.summary["failures"].values())
    if options not in (TOPK, PRUNED, HEAD):  # which need less
        assert min(sizes) > 0.9 * 1e6 * megabytes


def test_workers_send_what_inline_sends(tmp_path: Path) -> None:
    options = ["wire.error_feedback=true", "rounds=1"]
    same(
        budgeted(tmp_path, 0.05, *options),
        budgeted(tmp_path / "w", 0.05, *options, "engine=workers", "workers.count=1"),
    )


def test_a_budget_above_what_is_needed_loses_nothing_of_the_model(
    tmp_path: Path, finished: Callable[..., Report]
) -> None:
    plain, free = finished(*DIFFERENCE), budgeted(tmp_path, 100.0)
    assert by_round(free)[0] <= by_round(plain)[0]
    assert free.results.score.final == plain.results.score.final


def test_a_budget_that_cannot_hold_is_refused_with_the_smallest_that_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        UserError, match=r"wire.budget.megabytes = 0.001: leaves 150 bytes to each of 3 tasks"
    ) as caught:
        budgeted(tmp_path, 0.001)
    found = re.search(
        r"smallest budget: ([\d.]+), or ([\d.]+) with wire.budget.downlink = ([\d.]+)$", str(caught.value)
    )
    assert found is not None
    plain, best, share = found.groups()
    assert float(best) < float(plain)
    options = [
        "rounds=12",
        "evaluate.every=12",
        "wire.error_feedback=false",
    ]  # biases and statistics have moved by then
    for megabytes, others in ((plain, []), (best, [f"wire.budget.downlink={share}"])):
        report = budgeted(tmp_path, float(megabytes), *options, *others)
        assert max(by_round(report)) <= 1e6 * float(megabytes)
        with pytest.raises(UserError, match="smallest budget"):
            budgeted(tmp_path, float(megabytes) - 0.0003, *options, *others)
    assert f"wire.budget: {plain} MB a round: " in caplog.text


def test_an_upload_that_cannot_fit_is_said(tmp_path: Path) -> None:
    """Clients that choose what they send have no known size before they trained."""
    with pytest.raises(RuntimeError, match="leaves 1,667 bytes to a payload of the uplink, and the smallest has"):
        budgeted(tmp_path, 0.01, *TOPK[:1], "client.density=0.5")


@given(
    megabytes=st.floats(1e-4, 1e3),
    share=st.floats(0.01, 0.99),
    tasks=st.integers(1, 1000),
    uploads=st.integers(1, 1000),
)
def test_a_split_fits_the_budget_and_the_least_fits_its_payloads(
    megabytes: float, share: float, tasks: int, uploads: int
) -> None:
    split = ByteBudget(megabytes, share).split(tasks, uploads)
    if split.down:
        assert tasks * (split.down + 16) + uploads * split.up <= 1e6 * megabytes
    down, up = split.down + 1, split.up + 1
    for chosen in (share, split.best_share(down, up)):
        enough = ByteBudget(split.least(down, up, chosen), chosen).split(tasks, uploads)
        assert enough.down >= down
        assert enough.up >= up


def test_the_types_are_those_of_the_least_squared_error() -> None:
    """Against every choice of two types, under many limits; one tensor has long tails, whose absolute errors are small."""
    drawn = torch.Generator().manual_seed(1)
    params = {"a": torch.randn(40, 50, generator=drawn) ** 5, "b": 30 * torch.randn(40, 50, generator=drawn)}
    schema = Schema.of(params, params)

    def lost(payload: bytes) -> float:
        decoded = codecs.decode(payload, schema=schema)[0]
        return sum(float((decoded[name] - params[name]).double().square().sum()) for name in params)

    choices = [
        codecs.encode(params, None, schema=schema, values=types, seed=3) for types in product(UNBIASED, repeat=2)
    ]
    errors = [(len(each), lost(each)) for each in choices]
    # What is predicted of a tensor is its squared error under the noise that the payload is rounded with.
    tried = rounding_errors([params[name].reshape(-1).numpy() for name in schema.prunable], UNBIASED, 3)
    predicted = [first[1] + second[1] for first, second in product(*tried)]
    assert [error for _, error in errors] == pytest.approx(predicted, rel=1e-9)
    for limit in range(min(size for size, _ in errors) + 4 * SLACK, 17_000, 400):
        coding = BudgetCoding(limit=limit, types=UNBIASED, way="uplink")
        data = coding.encode(params, None, params, schema=schema, held_mask=None, seed=3)
        assert len(data) <= limit
        assert lost(data) <= min(error for size, error in errors if size <= limit - 2 * SLACK or size == len(data))
    exact = codecs.decode(data, schema=schema)[0]
    assert all(torch.equal(exact[name], params[name]) for name in params)


def test_without_error_feedback_uploads_lose_nothing_for_good() -> None:
    assert {"sign", "top10-int8", "top25-int8", "top10-ternary", "top1-ternary"} == set(TYPES) - set(UNBIASED)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["wire.uplink.values=int8"], "uplink.values = 'int8': not beside budget"),
        (["wire.codec.uplink=drive"], "codec: not beside budget"),
        (["wire.broadcast.density=0.1"], "broadcast: not beside budget"),
        (["wire.uplink.content=parameters"], "needed: 'difference'"),
        (["wire.budget.downlink=1.0"], "must be above 0 and below 1"),
        (["wire.budget.megabytes=-1"], "must be above 0"),
        (["schedule.kind=fedasync", "network.links={3G=1}"], "allowed: 'rounds'"),
        (["capacities=[{name='mlp', share=0.5}]"], "one model only"),
        (
            ["strategy.target=strategies.presets:layer_adaptive", "strategy.kilobytes=20", "data.noise=8"],
            "chooses the value",
        ),
        (["strategy.target=strategies.presets:scaffold", "client.target=clients.presets:scaffold"], "extra tensors"),
        (["strategy.target=strategies.presets:power_of_choice", "strategy.candidates=4"], "asks clients questions"),
    ],
)
def test_what_no_budget_can_hold_is_refused(tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        budgeted(tmp_path, 1.0, *options)


def test_a_replay_encodes_a_run_under_a_budget_and_refuses_what_was_rounded(tmp_path: Path) -> None:
    recorded = run_tiny(tmp_path, "wire.record_payloads=1", "rounds=1")
    other = ["wire.budget.megabytes=0.05", *DIFFERENCE]
    found = replay_run(recorded, asked(recorded, other))
    measured = budgeted(tmp_path, 0.05, "rounds=1")
    assert found.total("down") == measured.summary["downlink_bytes"]
    assert found.total("up") <= 25_000
    under = budgeted(tmp_path, 0.05, "rounds=2", "wire.record_payloads=1")
    same = replay_run(under, asked(under))
    assert same.replayed == same.measured
    with pytest.raises(UserError, match="rounded away was not recorded"):
        replay_run(under, asked(under, ["wire.budget.megabytes=0.1"]))
