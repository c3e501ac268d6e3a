"""Whole federations on the inline engine: identities that must hold exactly, and what a run leaves behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from federation import TINY, run_tiny, tiny
from grids import Shuffled, inline_is

from clients.presets import fedavg
from fl_sim import Experiment, Report, codecs, run
from fl_sim.communication.ledger import Ledger
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import Task, Update, UserError
from fl_sim.models.macs import count_macs
from fl_sim.runtime.grids.inline import InlineGrid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.server import build_server
from fl_sim.training import Training, load, snapshot
from fl_sim.training.client import Client, ClientContext


def equal(a: Report, b: Report) -> bool:
    return a.params.keys() == b.params.keys() and all(torch.equal(a.params[n], b.params[n]) for n in a.params)


def test_a_run_leaves_its_folder_and_summary(finished: Callable[..., Report]) -> None:
    report = finished()
    again = Report.load(report.folder)
    assert again.summary == json.loads(json.dumps(report.summary))
    assert [row["round"] for row in again.rounds] == [1, 2]
    assert again.ledger.total() == report.ledger.total()
    contract = (
        "name id seed engine rounds num_clients accuracy uplink_bytes downlink_bytes total_bytes dense_total_bytes saving "
        "bytes_to_accuracy density macs params wall_s client_fits_per_s failures versions"
    )
    assert set(contract.split()) <= set(report.summary)
    assert Experiment.load(report.folder / "config.toml").id == report.summary["id"]


def test_dense_ledger_is_rounds_times_cohort_times_payload(tmp_path: Path, finished: Callable[..., Report]) -> None:
    report = finished()
    federation = Federation.build(tiny(tmp_path))
    payload = len(codecs.encode(federation.first.initial, None, schema=federation.first.exchange.schema))
    assert report.summary["uplink_bytes"] == report.summary["downlink_bytes"] == 2 * 3 * payload
    assert report.summary["saving"] == 0.0


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path, finished: Callable[..., Report]) -> None:
    first, second = finished(), run_tiny(tmp_path / "b")
    assert equal(first, second)
    assert first.ledger.to_table().equals(second.ledger.to_table())
    assert not equal(first, run_tiny(tmp_path / "c", "seed=1"))


threads: list[str] = []
"""Names of the threads in which `noting` trained."""


def noting(*, training: Training) -> Client:
    """FedAvg's client, which notes the thread it runs in."""
    plain = fedavg(training=training)

    def train(task: Task, ctx: ClientContext) -> Update:
        threads.append(threading.current_thread().name)
        return plain(task, ctx)

    return train


def test_slow_clients_with_large_replies_run_beside_the_fold(
    tmp_path: Path, finished: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second round on, when their time is known, and with the same result."""
    for least_s, second in ((1e9, "MainThread"), (1e-9, "fl_sim-clients")):
        inline_is(monkeypatch, partial(InlineGrid, overlap_bytes=1, overlap_s=least_s))
        threads.clear()
        assert equal(finished(), run_tiny(tmp_path / second, f'client.target="{__name__}:noting"'))
        assert threads[-6:] == ["MainThread"] * 3 + [second] * 3  # those before were the trial's


def test_one_client_federation_is_plain_sgd(tmp_path: Path) -> None:
    overrides = ["data.clients=1", "data.partition=iid", "cohort.size=1", "rounds=3"]
    report = run_tiny(tmp_path, *overrides)
    experiment = tiny(tmp_path, *overrides)
    federation = Federation.build(experiment)
    data = federation.data.train.subset(federation.partitions[0])
    model, params = federation.first.model, dict(federation.first.initial)
    for number in (1, 2, 3):
        load(model, params)
        experiment.training.fit(model, data, rng=generator(experiment.seed, number, 0, Purpose.CLIENT))
        params = snapshot(model)
    for name, value in params.items():
        assert torch.equal(report.params[name], value), name


def test_sparse_updates_send_less_and_say_so(tmp_path: Path, finished: Callable[..., Report]) -> None:
    dense = finished()
    sparse = run_tiny(tmp_path / "sparse", "client.target=clients.presets:topk", "client.density=0.1")
    assert sparse.summary["uplink_bytes"] < 0.35 * dense.summary["uplink_bytes"]
    assert sparse.summary["density"]["uplink_mean"] == pytest.approx(0.1, abs=1e-3)
    assert sparse.summary["downlink_bytes"] == dense.summary["downlink_bytes"]
    assert 0 < sparse.summary["saving"] < 0.5


def test_topk_of_everything_is_fedavg(tmp_path: Path, finished: Callable[..., Report]) -> None:
    dense = finished()
    full = run_tiny(tmp_path / "full", "client.target=clients.presets:topk", "client.density=1.0")
    assert equal(dense, full)


def test_fedprox_without_weight_is_fedavg(tmp_path: Path, finished: Callable[..., Report]) -> None:
    steps, client = "training.steps=2", "client.target=clients.presets:fedprox"  # the first step is at the global model
    proximal = run_tiny(tmp_path / "prox", steps, client, "client.mu=0.0")
    assert equal(finished(steps), proximal)
    assert not equal(proximal, run_tiny(tmp_path / "mu", steps, client, "client.mu=1.0"))


def test_error_feedback_changes_what_is_sent_next(tmp_path: Path) -> None:
    options = ["client.target=clients.presets:topk", "client.density=0.05", "cohort.size=6"]
    without = run_tiny(tmp_path / "without", *options)
    with_feedback = run_tiny(tmp_path / "with", *options, "wire.error_feedback=true")
    assert not equal(without, with_feedback)
    assert without.summary["uplink_bytes"] == pytest.approx(with_feedback.summary["uplink_bytes"], rel=0.05)


def test_static_mask_is_sent_once_and_then_values_only(tmp_path: Path) -> None:
    report = run_tiny(
        tmp_path,
        "strategy.target=strategies.presets:global_magnitude",
        "strategy.density=0.2",
        "rounds=4",
        "cohort.size=6",
    )
    masks = report.ledger.total(by=("round", "direction", "section"))
    assert masks.get((1, "down", "mask"), 0) == 0
    assert masks[2, "down", "mask"] > 0
    assert masks.get((3, "down", "mask"), 0) == masks.get((2, "up", "mask"), 0) == 0
    assert masks[3, "down", "values"] == masks[2, "up", "values"]
    assert report.summary["density"]["prunable"] == pytest.approx(0.2, abs=1e-3)
    track = Federation.build(tiny(tmp_path)).first
    alive = {name: report.params[name] != 0 for name in track.exchange.schema.prunable}
    assert sum(int(each.sum()) for each in alive.values()) <= 0.2 * track.exchange.schema.prunable_size + 1
    shape = track.data.shape
    assert report.summary["macs"] == {
        "dense": count_macs(track.model, shape),
        "mean": count_macs(track.model, shape, mask=alive),
    }


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.float64)])
def test_the_server_changes_parameters_of_its_own(tmp_path: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    """Clients of this process know the first parameters; a rule may change the global ones in place."""
    federation = Federation.build(tiny(tmp_path))
    server, initial = build_server(federation, Ledger()), federation.first.initial
    before = {name: value.clone() for name, value in initial.items()}
    for value in server.models[0].params.values():
        value.add_(1)
    assert all(torch.equal(initial[name], value) for name, value in before.items())
    params = {name: torch.zeros(2, dtype=dtype) for name, dtype in zip("ab", dtypes, strict=True)}
    copy = codecs.Schema.of(params, []).copied(params)
    copy["a"].add_(1)
    assert params["a"].tolist() == [0, 0]


def test_gradual_pruning_sends_differences_of_nested_masks(tmp_path: Path) -> None:
    options = ["strategy.target=strategies.presets:gradual_magnitude", "strategy.density=0.1", "strategy.end=4"]
    report = run_tiny(tmp_path, *options, "strategy.allocate=erk", "rounds=6", "cohort.size=6")
    densities = [row["density"] for row in report.rounds]
    assert densities == sorted(densities, reverse=True)
    assert densities[3:] == [pytest.approx(0.1, abs=1e-3)] * 3
    masks = report.ledger.total(by=("round", "direction", "section"))
    assert 0 < masks[4, "down", "mask"] < masks[3, "down", "mask"]
    assert masks.get((6, "down", "mask"), 0) == 0


def test_a_client_that_missed_the_mask_is_charged_for_it(tmp_path: Path) -> None:
    report = run_tiny(
        tmp_path,
        "strategy.target=strategies.presets:global_magnitude",
        "strategy.density=0.2",
        "rounds=6",
        "cohort.size=2",
    )
    rows = report.ledger.to_table().to_pylist()
    seen: set[int] = set()
    for number in range(2, 7):
        for row in rows:
            if row["round"] == number and row["direction"] == "down" and row["section"] == "values":
                mask = [
                    r
                    for r in rows
                    if (r["round"], r["client"], r["direction"], r["section"])
                    == (number, row["client"], "down", "mask")
                ]
                assert (sum(r["payload_bytes"] for r in mask) > 0) == (row["client"] not in seen)
                seen.add(row["client"])


def failing(task: Task, ctx: ClientContext) -> Update:
    """Partition-dependent failures: some raise, some return nonsense, the rest echo."""
    if ctx.num_examples < 150:
        raise ValueError("out of order")
    if ctx.num_examples < 200:
        return Update({}, ctx.num_examples)
    return Update(dict(task.params), ctx.num_examples)


def test_failed_clients_cost_their_downlink_and_the_round_goes_on(tmp_path: Path) -> None:
    report = run(
        Experiment.from_tree({**TINY, "client": f"{__name__}:failing"}, [f'out="{tmp_path}"', "cohort.size=6"])
    )
    failed = report.summary["failures"]["raised"]
    assert 0 < failed < 12
    messages = report.ledger.messages(phase="train")
    assert messages["down"] == 12
    assert messages["up"] == 12 - failed


def always_failing(task: Task, ctx: ClientContext) -> Update:
    """No round can be made of this."""
    raise ValueError("never")


def test_a_round_without_any_update_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"none of 3 clients.*never"):
        run(Experiment.from_tree({**TINY, "client": f"{__name__}:always_failing"}, [f'out="{tmp_path}"']))


def test_clients_evaluate_when_asked(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "evaluate.clients=3")
    assert report.ledger.messages(phase="evaluate") == {"down": 6, "up": 6}
    assert all(0 < row["clients_accuracy"] < 1 and row["clients_examples"] > 0 for row in report.rounds)
    assert report.summary["total_bytes"] > report.summary["dense_total_bytes"]


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_lossy_differences_train(tmp_path: Path, finished: Callable[..., Report], values: str) -> None:
    report = run_tiny(
        tmp_path,
        "rounds=8",
        f"wire.uplink.values={values}",
        "wire.uplink.content=difference",
        "wire.error_feedback=true",
    )
    dense = finished("rounds=8")
    assert report.summary["uplink_bytes"] < 0.6 * dense.summary["uplink_bytes"]
    assert abs(report.summary["accuracy"]["final"] - dense.summary["accuracy"]["final"]) < 0.05


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.clients=5000", "clients"),
        ("data.validation=1e-9", "0 for validation"),
        ("data.noise=4000000000000000000", "data.noise"),
        ("model.width=1e300", "model.width"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run_tiny(tmp_path, override)


def test_the_order_of_replies_does_not_matter_to_clients_that_keep_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["client.target=clients.presets:topk", "wire.error_feedback=true"]
    in_order = run_tiny(tmp_path / "a", *options)
    inline_is(monkeypatch, Shuffled)
    shuffled = run_tiny(tmp_path / "b", *options)
    assert equal(in_order, shuffled)
    assert in_order.summary["params_sha256"] == shuffled.summary["params_sha256"]
    assert in_order.ledger.to_table().equals(shuffled.ledger.to_table())
