"""Flower's own strategies over our payloads: their equations, their memory, and what of them cannot work here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import same
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as Clipping
from flwr.serverapp.strategy import FedAdam, FedAvg, FedYogi
from interruption import KillAfter, Killed
from softmax_federation import Array, experiment, joined, weighted

from fl_sim import Report, Update, UserError, run
from fl_sim.codecs import Schema
from fl_sim.communication.flower_private import RUN_ID, identified
from fl_sim.core.types import Params
from fl_sim.simulation import resume
from fl_sim.simulation.federation import Federation
from strategies.flower_method import FlowerRule
from strategies.server_step import ServerState

FLOWER = "strategy.target=flwr.serverapp.strategy:"


def cohorts(report: Report) -> list[list[int]]:
    rows, clients = report.ledger.column("round"), report.ledger.column("client")
    return [sorted(set(clients[rows == number].tolist())) for number in range(1, 5)]


def test_fedadam_of_flower_is_adam_with_bias_correction_over_our_payloads(tmp_path: Path) -> None:
    asked = experiment(tmp_path, f"{FLOWER}FedAdam", "strategy.eta=0.05", "strategy.beta_2=0.9")
    report, w = run(asked, quiet=True), joined(Federation.build(asked, quiet=True).first.start)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for number, cohort in enumerate(cohorts(report), start=1):
        delta: Array = weighted(w, cohort) - w
        m, v = 0.9 * m + 0.1 * delta, 0.9 * v + 0.1 * delta**2
        rate = 0.05 * np.sqrt(1 - 0.9 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        w = w + rate * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(joined(report.params), w, atol=2e-5)
    assert report.ledger.sent == run(experiment(tmp_path / "fedavg"), quiet=True).ledger.sent, "FedAvg's bytes"


@pytest.mark.parametrize("name", ["FedAvgM", "FedYogi"])
def test_what_a_strategy_remembers_is_saved_and_resumed(name: str, tmp_path: Path) -> None:
    options = (f"{FLOWER}{name}", *(["strategy.server_momentum=0.9"] if name == "FedAvgM" else []))
    whole = run(experiment(tmp_path / "whole", *options), quiet=True)
    with pytest.raises(Killed):
        run(experiment(tmp_path / "parts", *options), KillAfter(2, 1))
    same(whole, resume(experiment(tmp_path / "parts", *options), quiet=True))


def test_two_models_share_a_strategy_and_none_of_its_memory() -> None:
    rule = FlowerRule(FedYogi(), "flwr.serverapp.strategy:FedYogi")

    def moved(size: int) -> list[torch.Tensor]:
        schema = Schema.of({"w": torch.zeros(size)}, ["w"])
        state, seen = ServerState(schema, schema.view(torch.zeros(size))), []
        for _ in range(2):
            update = Update(schema.view(torch.linspace(0.1, 1.0, size)), 3)
            params, memory = rule.optimise(state, rule.aggregate(state, iter([update])))
            state = ServerState(schema, params, state.round + 1, memory=memory)
            seen.append(params["w"].clone())
        return seen

    with identified(RUN_ID):
        alone, _, again = moved(2), moved(3), moved(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("FedAvg", "strategy.fraction_train=0.5"), r"strategy\.fraction_train: has no effect .* needed: cohort\.size"),
        (("FedProx", "strategy.proximal_mu=0.1"), "tells its clients 'proximal-mu', which clients here do not read"),
        (("FedAdam", "strategy.gamma=0.1"), "has no option 'gamma'"),
        (("FedXgbBagging",), "round 1: it raised"),
    ],
)
def test_what_cannot_work_is_one_line(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        run(experiment(tmp_path, FLOWER + options[0], *options[1:]), quiet=True)
    assert "\n" not in str(caught.value)


def clipped() -> Clipping:
    """Without noise, and a norm that no change reaches: FedAvg."""
    return Clipping(FedAvg(), 0.0, 1e6, 3)


def clipped_adam() -> Clipping:
    return Clipping(FedAdam(), 0.0, 1e6, 3)


class Waiting(FedAvg):
    """Waits for more clients than it says."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        while len(list(grid.get_node_ids())) < 100:
            pass
        return super().configure_train(server_round, arrays, config, grid)


class Tells(FedAvg):
    """Changes what each task says."""

    def change(self, task: Message) -> None:
        task.content["config"] = ConfigRecord({"lr": 0.5})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        for task in super().configure_train(server_round, arrays, config, grid):
            self.change(task)
            yield task


class Halves(Tells):
    """Sends half of every value."""

    def change(self, task: Message) -> None:
        task.content["arrays"] = ArrayRecord([0.5 * array.numpy() for array in task.content["arrays"].values()])  # type: ignore[union-attr]


class Reshapes(FedAvg):
    """Returns what `change` makes of each aggregated array."""

    change: Callable[[Array], object]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        made, metrics = super().aggregate_train(server_round, replies)
        found = {name: type(self).change(each.numpy()) for name, each in (made or {}).items()}
        return ArrayRecord({n: v if isinstance(v, FlowerArray) else FlowerArray(v) for n, v in found.items()}), metrics


RETURNED: dict[str, tuple[Callable[[Array], object], str]] = {
    "transposed": (lambda v: v.T, r"it returned 'w' as float32 of shape \(3, 2\)"),
    "flat": (np.ravel, r"it returned 'w' as float32 of shape \(6,\)"),
    "one": (lambda v: np.ones(1, np.float32), r"it returned 'w' as float32 of shape \(1,\)"),
    "complex": (lambda v: v + 1j, r"it returned 'w' as complex\d+ of shape \(2, 3\)"),
    "int": (lambda v: v.astype(np.int32), r"it returned 'w' as int32 of shape \(2, 3\)"),
    "text": (lambda v: v.astype("U"), r"it returned 'w' as <U\d+ of shape \(2, 3\)"),
    "bytes": (
        lambda v: FlowerArray("float32", v.shape, "numpy.ndarray", b"1"),
        "it returned 'w', which cannot be read",
    ),
    "foreign": (
        lambda v: FlowerArray("float32", v.shape, "own", b"1"),
        "it returned 'w', which cannot be read: TypeError",
    ),
}


def returned(change: Callable[[Array], object]) -> Params:
    rule = FlowerRule(type("Made", (Reshapes,), {"change": staticmethod(change)})(), "Made")
    schema = Schema.of({"w": torch.zeros(2, 3)}, ["w"])
    state = ServerState(schema, schema.view(torch.zeros(6)))
    with identified(RUN_ID):
        return rule.aggregate(state, iter([Update(schema.view(torch.arange(6.0)), 3)]))


@pytest.mark.parametrize("name", RETURNED)
def test_arrays_of_another_shape_or_dtype_are_refused_by_name(name: str) -> None:
    change, said = RETURNED[name]
    with pytest.raises(UserError, match=f"strategy = 'Made': {said}.*; needed: float32 of shape \\(2, 3\\)$") as caught:
        returned(change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_another_width_of_float_is_taken(dtype: str) -> None:
    assert torch.equal(returned(lambda v: v.astype(dtype))["w"], torch.arange(6.0).reshape(2, 3))


def test_a_strategy_that_wraps_another_waits_for_no_more_clients_than_that(tmp_path: Path) -> None:
    wrapped = run(experiment(tmp_path / "wrapped", f"strategy.target={__name__}:clipped"), quiet=True)
    alone = run(experiment(tmp_path / "alone", f"{FLOWER}FedAvg"), quiet=True)
    np.testing.assert_allclose(joined(wrapped.params), joined(alone.params), atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("flwr.serverapp.strategy:FedXgbCyclic", "its configure_train sends tasks to 1 of 2 clients, and has no say"),
        (f"{__name__}:Waiting", "its configure_train waits for more than 2 clients"),
        (f"{__name__}:Tells", "tells its clients 'lr', which clients here do not read"),
        (f"{__name__}:Halves", "its configure_train sends other arrays than the global parameters"),
    ],
)
def test_what_a_strategy_would_send_and_does_not_here_is_refused(strategy: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        run(experiment(tmp_path, f"strategy.target={strategy}"), quiet=True)


def test_a_strategy_whose_wrapped_one_keeps_something_runs_and_is_not_resumed(tmp_path: Path) -> None:
    asked = f"strategy.target={__name__}:clipped_adam"
    assert len(run(experiment(tmp_path / "whole", asked), quiet=True).rounds) > 2
    with pytest.raises(Killed):
        run(experiment(tmp_path / "parts", asked), KillAfter(2, 1))
    with pytest.raises(UserError, match="does not hold: it cannot be resumed; needed: --fresh"):
        resume(experiment(tmp_path / "parts", asked), quiet=True)


class Measures(FedAvg):
    """Returns metrics of its own beside those of the clients, and has an evaluation of its own."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        made, found = super().aggregate_train(server_round, replies)
        assert found is not None
        own = {"twice": 2.0 * server_round, "kept": 3, "all": [1.0, 2.0]}
        return made, MetricRecord({**found, **own})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        raise NotImplementedError

    def summary(self) -> None:
        raise NotImplementedError


class Largest(FedAvg):
    """The clients' metrics are aggregated otherwise."""

    def __init__(self) -> None:
        super().__init__(train_metrics_aggr_fn=largest)


def largest(records: list[RecordDict], weighted_by: str) -> MetricRecord:
    return MetricRecord({"loss": max(float(str(record["metrics"]["loss"])) for record in records)})


def test_a_strategys_own_metrics_are_in_the_log_and_those_of_clients_only_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(experiment(tmp_path / "plain", f"{FLOWER}FedAvg"), quiet=True).rounds
    rows = run(experiment(tmp_path / "own", f"strategy.target={__name__}:Measures"), quiet=True).rounds
    assert [row["strategy_twice"] for row in rows] == [2.0 * row["round"] for row in rows]
    assert {row["strategy_kept"] for row in rows} == {3.0}
    assert set(rows[0]) - set(plain[0]) == {"strategy_twice", "strategy_kept"}, "the clients' means stand there already"
    said = [each.getMessage() for each in caplog.records if "Measures" in each.getMessage()]
    assert sum("its metric 'all' is a list" in line for line in said) == 1
    assert (
        sum(
            "not called here, as rounds and evaluation are the run's: its aggregate_evaluate, summary" in line
            for line in said
        )
        == 1
    )
    assert not any("not called here" in each.getMessage() for each in caplog.records if "FedAvg" in each.getMessage())


def test_a_metric_that_a_strategy_aggregates_otherwise_stands_beside_the_mean(tmp_path: Path) -> None:
    rows = run(experiment(tmp_path, f"strategy.target={__name__}:Largest"), quiet=True).rounds
    assert all(row["strategy_loss"] > row["train_loss"] for row in rows)


def test_metrics_of_a_strategy_that_two_models_share_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    rule = FlowerRule(Measures(), "Measures")
    with identified(RUN_ID):
        for size in (2, 3):
            schema = Schema.of({"w": torch.zeros(size)}, ["w"])
            state = ServerState(schema, schema.view(torch.zeros(size)))
            rule.aggregate(state, iter([Update(schema.view(torch.ones(size)), 3, metrics={"loss": 1.0})]))
    assert rule.own(1) == {}
    assert "the models of several capacities share it" in caplog.text


def test_metrics_are_those_of_the_last_round_and_a_mapping(caplog: pytest.LogCaptureFixture) -> None:
    rule, schema = FlowerRule(Measures(), "Measures"), Schema.of({"w": torch.zeros(2)}, ["w"])
    state = ServerState(schema, schema.view(torch.zeros(2)))
    with identified(RUN_ID):
        rule.aggregate(state, iter([Update(schema.view(torch.ones(2)), 3, metrics={"loss": 1.0})]))
    assert rule.own(1) == {"strategy_twice": 2.0, "strategy_kept": 3.0}
    rule.aggregate(state, iter([]))
    assert rule.own(2) == {}, "nobody answered: nothing was computed"
    rule.own.keep([1.0], {}, schema)
    assert "its metrics are a list; the log takes a MetricRecord" in caplog.text


def test_a_strategy_with_metrics_of_its_own_runs_without_rounds(tmp_path: Path) -> None:
    asked = experiment(
        tmp_path,
        f"strategy.target={__name__}:Measures",
        "schedule.kind=fedbuff",
        "schedule.buffer=2",
        "network.links.4G=1",
    )
    assert all(row["strategy_twice"] > 0 for row in run(asked, quiet=True).rounds)
