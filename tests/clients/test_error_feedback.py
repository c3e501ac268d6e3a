"""Error feedback: for any client, what is sent and what is kept add up to what was wanted, and the server applies it once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny
from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

from fl_sim.codecs import Schema
from fl_sim.communication import messages as wire
from fl_sim.communication.exchange import Coding, Exchange
from fl_sim.communication.flower_private import adopt_identity
from fl_sim.communication.messages import PARTITION
from fl_sim.core.types import FlatParams, Mask, Params, Task, Update
from fl_sim.data import Split
from fl_sim.models.parameters import snapshot
from fl_sim.runtime.client.host import ClientHost
from fl_sim.runtime.client.node_state import RESIDUAL, STATE
from fl_sim.sparsity import global_topk, magnitude, topk_mask
from fl_sim.training.client import Client, ClientContext
from strategies.aggregation import coverage_mean, mean, settled, zero_fill
from strategies.robust import ClipNorm, coordinate_median
from strategies.server_step import Aggregate, ServerState, server_step

SIZE, CLIENTS, ROUNDS = 400, 5, 60
EXACT = Coding()
Choose = Callable[[Task, ClientContext, Params], Mask | None]


class Net(nn.Module):
    """400 prunable weights, and a bias that always travels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20, SIZE // 20))
        self.bias = nn.Parameter(torch.zeros(3))


def largest(density: float) -> Choose:
    """Top-k of the change with what earlier uploads left out, as `ctx.corrected` gives it."""

    def choose(task: Task, ctx: ClientContext, params: Params) -> Mask | None:
        offered = ctx.corrected({"weight": params["weight"]})
        change = magnitude({"weight": offered["weight"] - task.params["weight"]})
        return topk_mask(change, global_topk(change, density))

    return choose


def uncorrected(task: Task, ctx: ClientContext, params: Params) -> Mask | None:
    """What somebody writes who never heard of error feedback: the tenth that changed most in this round."""
    change = magnitude({"weight": params["weight"] - task.params["weight"]})
    return topk_mask(change, global_topk(change, 0.1))


def nothing_chosen(task: Task, ctx: ClientContext, params: Params) -> Mask | None:
    return None


@dataclass
class Pulled:
    """A user's own client, no `LocalClient`: pulls towards a point of its own, with noise; remembers what it wanted."""

    choose: Choose
    grid: float = 0.0
    wanted: list[Tensor] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        self.keys |= ctx.state.keys()
        weight = task.params["weight"]
        change = 0.1 * torch.randn(weight.shape, generator=ctx.rng) + 0.01 * (ctx.num_examples - 5)
        if self.grid:
            change = (change / self.grid).round() * self.grid  # every sum of such numbers is exact
        params = {"weight": weight + change, "bias": task.params["bias"] + 1.0}
        self.wanted.append((params["weight"] - weight).flatten())
        return Update(params, ctx.num_examples, self.choose(task, ctx, params))


@dataclass
class Bench:
    """One host, and the contexts of its clients; client k has k + 1 samples."""

    host: ClientHost
    contexts: list[Context]

    @classmethod
    def of(cls, client: Client, uplink: Coding = EXACT, *, feedback: bool = True) -> Bench:
        adopt_identity()
        model = Net()
        initial = snapshot(model)
        exchange = Exchange(Schema.of(initial, ["weight"]), uplink, error_feedback=feedback)
        images = torch.zeros(CLIENTS, 1, 2, 2, dtype=torch.uint8)
        data = Split(images, torch.zeros(CLIENTS, dtype=torch.int64), torch.zeros(1), torch.ones(1))

        def split_of(partition: int) -> Split:
            return data.subset(np.arange(partition + 1))

        host = ClientHost(client, model, split_of, split_of, exchange, initial, lambda seed: {})
        return cls(host, [Context(1, k, {PARTITION: k}, RecordDict(), {}) for k in range(CLIENTS)])

    @property
    def exchange(self) -> Exchange:
        return self.host.exchange

    def train(self, client: int, task: Task) -> Update:
        """What the server decodes of a client's answer."""
        data = self.exchange.encode_down(task, self.host.reference, held_mask=None, seed=0)
        asked = Message(wire.task_content(replace(task, seed=3), data), client + 1, "train")
        answer = self.host.train(asked, self.contexts[client]).content
        params, mask = self.exchange.decode_up(wire.payload(answer), task)
        return Update(params, wire.read_metrics(answer)[0], mask)

    def residual(self, client: int) -> Tensor:
        """What the client keeps, flat."""
        return torch.from_numpy(self.contexts[client].state.array_records[RESIDUAL][RESIDUAL].numpy())

    def rounds(self, aggregate: Aggregate, count: int = ROUNDS) -> Tensor:
        """Weights after so many rounds in which every client takes part."""
        state = ServerState(self.exchange.schema, self.host.reference)
        for number in range(1, count + 1):
            task = Task(number, state.params)
            state = server_step(state, [self.train(k, task) for k in range(CLIENTS)], aggregate=aggregate)
        return state.params["weight"].flatten()


def per_client(wanted: list[Tensor]) -> Tensor:
    """Sum over clients of n_k times the changes that they wanted."""
    changes = torch.stack(wanted).double().view(-1, CLIENTS, SIZE).sum(dim=0)
    return (torch.arange(1, CLIENTS + 1)[:, None] * changes).sum(dim=0)


WEIGHT = sum(range(1, CLIENTS + 1))


@pytest.mark.parametrize("uplink", [Coding(), Coding("int8", "difference"), Coding("int4", "difference")])
@pytest.mark.parametrize(
    ("choose", "rounds"),
    [(largest(0.1), 30), (largest(0.02), ROUNDS), (uncorrected, 30), (nothing_chosen, 10)],
    ids=["0.1", "0.02", "uncorrected", "all"],
)
def test_applied_and_residuals_add_up_to_all_updates(choose: Choose, rounds: int, uplink: Coding) -> None:
    client = Pulled(choose)
    bench = Bench.of(client, uplink)
    applied = WEIGHT * bench.rounds(settled(mean, error_feedback=True), rounds).double()
    kept = sum((k + 1) * bench.residual(k).double() for k in range(CLIENTS))
    ideal = per_client(client.wanted)
    assert torch.allclose(applied + kept, ideal, rtol=0, atol=1e-3 * WEIGHT), (applied + kept - ideal).abs().max()
    assert float(applied.norm() / ideal.norm()) == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize("density", [0.1, 0.02])
def test_the_mean_over_those_that_sent_applies_several_times_too_much(density: float) -> None:
    client = Pulled(largest(density))
    applied = WEIGHT * Bench.of(client).rounds(coverage_mean, 30).double()
    assert float(applied.norm() / per_client(client.wanted).norm()) > 2


@pytest.mark.parametrize("choose", [largest(0.1), uncorrected], ids=["0.1", "uncorrected"])
def test_sent_and_kept_equal_wanted_and_kept_before_bit_for_bit(choose: Choose) -> None:
    client = Pulled(choose, grid=2.0**-12)
    bench = Bench.of(client)
    params = FlatParams.pack({"weight": torch.zeros(20, SIZE // 20), "bias": torch.zeros(3)})
    before = torch.zeros(SIZE)
    for number in range(1, ROUNDS + 1):
        update = bench.train(3, Task(number, params))
        arrived = bench.exchange.reconstructed(update.params, update.mask, params)["weight"]
        sent, kept = (arrived - params["weight"]).flatten(), bench.residual(3)
        assert torch.equal(sent + kept, client.wanted[-1] + before)
        assert int((sent != 0).sum()) <= 0.1 * SIZE
        before = kept


def test_a_small_residual_is_not_rounded_away_in_a_large_parameter() -> None:
    def steady(task: Task, ctx: ClientContext) -> Update:
        first = task.params["weight"] + torch.tensor(2.0**-13)
        return Update({**task.params, "weight": first}, 1, {"weight": torch.zeros(20, SIZE // 20, dtype=torch.bool)})

    bench = Bench.of(steady)
    params = FlatParams.pack({"weight": torch.full((20, SIZE // 20), 1000.0), "bias": torch.zeros(3)})
    for number in range(1, 101):
        bench.train(0, Task(number, params))
    assert torch.equal(bench.residual(0), torch.full((SIZE,), 100 * 2.0**-13))


def test_the_residual_is_the_hosts_own_and_a_client_cannot_see_or_change_it() -> None:
    def meddler(task: Task, ctx: ClientContext) -> Update:
        offered = ctx.corrected({"weight": task.params["weight"].clone()})["weight"]
        offered.fill_(77.0)
        ctx.state["residual.weight"] = torch.ones(3)
        ctx.state["own"] = torch.ones(2)
        nothing = torch.zeros(20, SIZE // 20, dtype=torch.bool)
        return Update({**task.params, "weight": task.params["weight"] + 1.0}, 1, {"weight": nothing})

    bench = Bench.of(meddler)
    params = bench.host.reference
    for number in (1, 2, 3):
        bench.train(0, Task(number, params))
    assert torch.equal(bench.residual(0), torch.full((SIZE,), 3.0))
    assert set(bench.contexts[0].state.array_records[STATE]) == {"residual.weight", "own"}
    client = Pulled(largest(0.1))
    other = Bench.of(client)
    other.rounds(zero_fill, 3)
    assert client.keys == set()


def test_without_error_feedback_nothing_is_kept_and_nothing_corrected() -> None:
    client = Pulled(largest(0.1))
    bench = Bench.of(client, feedback=False)
    bench.rounds(coverage_mean, 3)
    assert all(not context.state for context in bench.contexts)


def test_an_update_that_is_refused_does_not_spoil_what_is_kept() -> None:
    broken = [False]

    def sometimes(task: Task, ctx: ClientContext) -> Update:
        value = torch.nan if broken[0] else 1.0
        weight = task.params["weight"] + torch.full((20, SIZE // 20), value)
        return Update({**task.params, "weight": weight}, 1, {"weight": torch.zeros(20, SIZE // 20, dtype=torch.bool)})

    bench = Bench.of(sometimes)
    bench.train(0, Task(1, bench.host.reference))
    broken[0] = True
    with pytest.raises(ValueError, match="never sent"):
        bench.train(0, Task(2, bench.host.reference))
    assert torch.equal(bench.residual(0), torch.ones(SIZE))


def test_what_the_global_mask_prunes_is_not_offered_again() -> None:
    def all_but_nothing_sent(task: Task, ctx: ClientContext) -> Update:
        nothing = torch.zeros(20, SIZE // 20, dtype=torch.bool)
        return Update({**task.params, "weight": task.params["weight"] + 1.0}, 1, {"weight": nothing})

    bench = Bench.of(all_but_nothing_sent)
    params = bench.host.reference
    bench.train(0, Task(1, params))
    alive = torch.zeros(20, SIZE // 20, dtype=torch.bool)
    alive[:3] = True
    bench.train(0, Task(2, params, {"weight": alive}))
    assert torch.equal(bench.residual(0), 2.0 * alive.flatten())


def test_the_default_mean_of_a_run_conserves_with_error_feedback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    topk = ("model.name=mlp", "client.target=clients.presets:topk", "client.density=0.1", "wire.error_feedback=true")

    def params(name: str, *overrides: str) -> str:
        return str(run_tiny(tmp_path / name, *topk, *overrides).summary["params_sha256"])

    default = params("default")
    assert "error_feedback" not in caplog.text
    assert default == params("named", "strategy.aggregate=zero_fill")
    assert "error_feedback" not in caplog.text
    assert default != params("coverage", "strategy.aggregate=coverage")
    assert "wire.error_feedback with the aggregation rule coverage_mean" in caplog.text
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert params("off", "wire.error_feedback=false") == params(
        "off-coverage", "wire.error_feedback=false", "strategy.aggregate=coverage"
    )


def test_rules_around_the_default_take_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    assert settled(mean, error_feedback=False) is coverage_mean
    assert settled(mean, error_feedback=True) is zero_fill
    assert settled(ClipNorm(1.0, ClipNorm(2.0)), error_feedback=False) == ClipNorm(1.0, ClipNorm(2.0, coverage_mean))
    assert not caplog.records
    assert settled(ClipNorm(1.0), error_feedback=True) == ClipNorm(1.0, zero_fill)
    assert settled(coordinate_median, error_feedback=True) is coordinate_median
    assert [record.args for record in caplog.records] == [("ClipNorm",), ("coordinate_median",)]
