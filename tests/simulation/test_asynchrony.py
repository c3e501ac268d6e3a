"""Federations without rounds: equal to FedAvg where nothing is stale, and the same on every engine and after every kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import FOUR, TINY, same
from interruption import KillAfter, Killed

from fl_sim import Experiment, Report, UserError, run
from fl_sim.simulation import RunStopped

SMALL = {
    **TINY,
    "rounds": 6,
    "data": {"source": "digits", "clients": 12, "partition": "dirichlet", "alpha": 0.5},
    "model": {"name": "mlp", "width": 0.25},
    "training": {"lr": 0.1, "steps": 3, "batch_size": 32},  # long enough for a deadline to be missed
    "network": {"links": {"3G": 1, "4G": 1}, "speed_spread": 1.0, "dropout": 0.1},
}
KINDS: dict[str, tuple[str, ...]] = {
    "fedbuff": ("schedule.buffer=4", "schedule.concurrency=6"),
    "fedasync": ("schedule.staleness=hinge", "schedule.max_staleness=3"),
    "deadline": ("network.deadline_s=0.4",),
    "sparse": (
        "schedule.kind=fedbuff",
        "schedule.buffer=3",
        "strategy.target=strategies.presets:gradual_magnitude",
        "strategy.density=0.2",
        "strategy.end=5",
        "client.target=clients.presets:topk",
        "client.density=0.5",
        "wire.error_feedback=true",
        "wire.uplink.content=difference",
    ),
}


def experiment(out: Path, *overrides: str) -> Experiment:
    return Experiment.from_tree(SMALL, [f'out="{out}"', *overrides])


def of_kind(out: Path, kind: str, *more: str) -> Experiment:
    return experiment(out, f"schedule.kind={kind if kind != 'sparse' else 'fedbuff'}", *KINDS[kind], *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    out = tmp_path_factory.mktemp("whole")
    return {kind: run(of_kind(out, kind)) for kind in KINDS}


def test_fedbuff_without_staleness_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    alike = (*FOUR, "network.dropout=0", "client.target=clients.presets:topk", "wire.error_feedback=true")
    rounds = run(experiment(tmp_path, *alike))
    steps = run(experiment(tmp_path, *alike, "schedule.kind=fedbuff", "schedule.buffer=4", "schedule.max_staleness=0"))
    assert all(torch.equal(rounds.params[name], steps.params[name]) for name in rounds.params)
    assert rounds.ledger.to_table().equals(steps.ledger.to_table())
    added = {"seconds", "staleness", "staleness_max", "stale_masks", "in_flight"}
    for row, step in zip(rounds.rounds, steps.rounds, strict=True):
        assert {k: v for k, v in row.items() if k not in added} == {k: v for k, v in step.items() if k not in added}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_says(whole: dict[str, Report], kind: str) -> None:
    report = whole[kind]
    times = [row["simulated_s"] for row in report.rounds]
    assert times == sorted(times)
    assert report.summary["simulated_s"] == times[-1]
    stale = [row["staleness_max"] for row in report.rounds]
    assert max(stale) > 0
    assert stale[0] == 0
    assert all(row["in_flight"] <= (6 if kind == "fedbuff" else 4) for row in report.rounds)
    if kind == "fedasync":
        assert max(stale) <= 3
        assert {row["clients"] for row in report.rounds} == {1}
    if kind == "sparse":
        assert sum(row["stale_masks"] for row in report.rounds) > 0


@pytest.mark.parametrize(
    ("kind", "killed"), [("fedbuff", 2), ("fedasync", 4), ("deadline", 3), ("sparse", 1), ("sparse", 3)]
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, whole: dict[str, Report], kind: str, killed: int) -> None:
    asked = of_kind(tmp_path, kind)
    with pytest.raises(Killed):
        run(asked, KillAfter(killed, replies=1))
    same(run(asked, resume=True), whole[kind])


def test_checkpoints_change_nothing(tmp_path: Path, whole: dict[str, Report]) -> None:
    """A checkpoint runs the clients that are on their way earlier than they would have run."""
    same(run(of_kind(tmp_path, "sparse", "checkpoint.every=0")), whole["sparse"])


@pytest.mark.parametrize(("kind", "workers"), [("fedbuff", 2), ("sparse", 3)])
def test_any_number_of_workers_gives_the_same(
    tmp_path: Path, whole: dict[str, Report], kind: str, workers: int
) -> None:
    same(run(of_kind(tmp_path, kind, "engine=workers", f"workers.count={workers}")), whole[kind])


def test_clients_of_several_rounds_are_no_batch(tmp_path: Path) -> None:
    """The cohort engine trains clients with one learning rate, which rises from step to step here."""
    kind = ("schedule.kind=fedbuff", "schedule.buffer=3", "schedule.concurrency=6", "network.dropout=0")
    rises = ("training.warmup=5", "checkpoint.every=0")
    inline = run(experiment(tmp_path / "inline", *kind, *rises))
    batched = run(experiment(tmp_path / "cohort", *kind, *rises, "engine=cohort"))
    assert inline.ledger.to_table().equals(batched.ledger.to_table())
    assert inline.rounds[-1]["staleness_max"] > 0
    assert all(torch.allclose(inline.params[name], batched.params[name], atol=1e-5) for name in inline.params)


def test_a_byte_budget_holds_between_steps_too(tmp_path: Path, whole: dict[str, Report]) -> None:
    row = whole["fedbuff"].rounds[2]
    budget = (row["uplink_bytes"] + row["downlink_bytes"]) / 1e6
    stopped = run(of_kind(tmp_path, "fedbuff", f"stop.mb={budget}"))
    assert stopped.summary["rounds"] == 3
    assert stopped.summary["total_bytes"] == round(budget * 1e6)


def _trace(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(("client,start_s,end_s", *lines)) + "\n")
    return f"schedule.availability={path}"


def test_clients_that_leave_are_lost_and_those_away_get_no_task(tmp_path: Path) -> None:
    """Half of the clients come after 100 s; client 0 is there too short to answer."""
    lines = [f"{c},0,0.05" if c == 0 else f"{c},{100 if c >= 6 else 0},{100 if c < 6 else 200}" for c in range(12)]
    kind = ("schedule.kind=fedbuff", "schedule.buffer=5", "schedule.concurrency=12", "network.dropout=0", "rounds=2")
    report = run(experiment(tmp_path, *kind, _trace(tmp_path, *lines)))
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 1}
    rows = report.ledger.to_table().to_pylist()
    assert {row["client"] for row in rows if row["direction"] == "down" and row["round"] == 1} == set(range(6))
    assert 0 not in {row["client"] for row in rows if row["direction"] == "up"}
    assert report.rounds[0]["simulated_s"] < 100


def test_a_trace_counts_by_its_content(tmp_path: Path) -> None:
    asked = experiment(tmp_path, "schedule.kind=fedbuff", _trace(tmp_path, "0,0,5"))
    before = asked.id
    _trace(tmp_path, "0,0,6")
    assert asked.id != before
    with pytest.raises(UserError, match=r"schedule\.devices = 'none.csv': No such file"):
        _ = experiment(tmp_path, "schedule.kind=fedbuff", "schedule.devices=none.csv").id


def test_the_server_waits_until_somebody_is_reachable(tmp_path: Path) -> None:
    lines = [f"{c},50,{60 if c else 1000}" for c in range(12)]
    kind = ("schedule.kind=fedasync", "network.dropout=0", "rounds=2")
    report = run(experiment(tmp_path, *kind, _trace(tmp_path, *lines)))
    assert 50 < report.rounds[0]["simulated_s"] < 60


def test_nobody_left_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twelve clients cannot fill a buffer of twenty: a client gets each version once."""
    kind = ("schedule.kind=fedbuff", "schedule.buffer=20", "rounds=1", "network.dropout=0")
    report = run(experiment(tmp_path, *kind))
    assert report.rounds[0]["clients"] == 12
    assert "a step of 12 instead of 20 updates" in caplog.text


def test_clients_that_all_fail_stop_the_run(tmp_path: Path) -> None:
    kind = ("schedule.kind=fedbuff", "schedule.buffer=2", "training.lr=1e30")
    with pytest.raises((RunStopped, UserError), match="round 1"):
        run(experiment(tmp_path, *kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedbuff", "sparse"])
def test_ray_gives_the_same(tmp_path: Path, whole: dict[str, Report], kind: str) -> None:
    same(run(of_kind(tmp_path, kind, "engine=ray", "ray.workers=2")), whole[kind])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["schedule.kind=fedbuf"], "schedule.kind = 'fedbuf': unknown; allowed: rounds, fedbuff, fedasync, deadline"),
        (["schedule.kind=fedbuff", "schedule.staleness=old"], "schedule.staleness = 'old': unknown"),
        (["schedule.kind=fedbuff", "schedule.buffer=0"], "schedule.buffer = 0: must be at least 1"),
        (["schedule.kind=fedasync", "schedule.mixing=0"], "schedule.mixing = 0.0: must be above 0 and at most 1"),
        (["schedule.buffer=3"], "schedule: rounds have no further keys"),
        (["schedule.kind=deadline"], "needs network.deadline_s"),
        (["schedule.kind=fedbuff", "network.deadline_s=3"], "network.deadline_s: not with schedule.kind = 'fedbuff'"),
        (["schedule.kind=fedbuff", "network={}"], "needs a virtual clock: network.links or schedule.devices"),
        (
            ["schedule.kind=fedbuff", "evaluate.clients=10"],
            "evaluate.clients = 10: clients that train are not asked to evaluate, which leaves 9 of data.clients = 12",
        ),
        (
            ["schedule.kind=fedbuff", "wire.record_payloads=1"],
            "wire.record_payloads: not with schedule.kind = 'fedbuff'",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line(tmp_path: Path, keys: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        experiment(tmp_path, *keys)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "clients"), [("fedasync", 1), ("fedbuff", 3)])
def test_a_robust_rule_counts_the_updates_of_a_step(tmp_path: Path, kind: str, clients: int) -> None:
    krum = ("strategy.aggregate=krum", "strategy.byzantine=0.34", f"schedule.kind={kind}", "schedule.buffer=3")
    with pytest.raises(UserError, match=f"Krum withstands . bad of {clients} clients .*schedule.buffer"):
        run(experiment(tmp_path, *krum))


def test_a_strategy_that_counts_rounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"schedule\.kind = .fedbuff.: not with this strategy, whose guarantee is for"):
        run(experiment(tmp_path, "schedule.kind=fedbuff", "strategy.target=strategies.presets:private"))
