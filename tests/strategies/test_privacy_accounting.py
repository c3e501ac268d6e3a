"""The epsilon that is reported: the smaller of two bounds, and no amplification where clients keep something of their data."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from federation import run_tiny
from scipy.stats import norm

from fl_sim.codecs import Schema
from fl_sim.core.types import Params, Task, Update, UserError
from fl_sim.training.client import ClientContext
from strategies.privacy import Accountant, PrivateMean, gaussian_epsilon
from strategies.server_step import ServerState

DELTA = 1e-5


class Plain:
    """Sends float32 as it is."""

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        return b"".join(value.numpy().tobytes() for value in tensors.values())

    def decode(self, data: bytes, schema: Schema) -> Params:
        flat = torch.frombuffer(bytearray(data), dtype=torch.float32).split(list(schema.numels))
        return {n: part.view(shape) for n, part, shape in zip(schema.names, flat, schema.shapes, strict=True)}


class Keeps(Plain):
    """Keeps something of what it was given."""

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        state["last"] = torch.cat([value.flatten()[:1] for value in tensors.values()])
        return super().encode(tensors, state, rng)


class Lies(Keeps):
    """And says that it does not."""

    stateless = True


PRIVATE = ["model.name=cnn", "strategy.target=strategies.presets:private", "strategy.noise=0.7"]


def spent(epsilon: float, noise: float) -> float:
    """Delta of the Gaussian mechanism (Balle and Wang, 2018, theorem 8)."""
    first, second = norm.cdf(0.5 / noise - epsilon * noise), norm.cdf(-0.5 / noise - epsilon * noise)
    return float(first - math.exp(epsilon) * second)


@pytest.mark.parametrize("noise", [0.2, 1.0, 4.0])
def test_the_gaussian_mechanism_spends_exactly_its_delta(noise: float) -> None:
    assert spent(gaussian_epsilon(noise, DELTA), noise) == pytest.approx(DELTA, rel=1e-6)


@pytest.mark.parametrize(("noise", "least", "most"), [(1e6, 0.0, 0.0), (1e-6, 5.0e11, 5.1e11)])
def test_extreme_noise_has_a_finite_epsilon(noise: float, least: float, most: float) -> None:
    assert least <= gaussian_epsilon(noise, DELTA) <= most


def test_where_everybody_takes_part_the_composition_is_exact() -> None:
    for rounds in (1, 10, 100):
        got = Accountant(4.0, 10, 10, DELTA)(rounds)["epsilon"]
        assert spent(got, 4.0 / math.sqrt(rounds)) == pytest.approx(DELTA, rel=1e-6)
    assert Accountant(4.0, 10, 10, DELTA)(0)["epsilon"] == 0.0


def test_the_divergence_of_many_rounds_is_that_of_one_times_their_number() -> None:
    """Bit for bit what the package answers for the rounds composed at once."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    one = SampledWithoutReplacementDpEvent(40, 4, GaussianDpEvent(1.5))
    for rounds in (1, 7, 300):
        whole = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE).compose(one, rounds)
        assert Accountant(1.5, 4, 40, DELTA)(rounds)["epsilon"] == whole.get_epsilon(DELTA)


def test_the_package_means_by_noise_what_this_accountant_does() -> None:
    """Noise over the sensitivity 2S. A release that meant noise over S with REPLACE_ONE would quarter every divergence."""
    assert Accountant(1.5, 4, 40, DELTA)(300)["epsilon"] == pytest.approx(15.5409, abs=1e-4)


def test_the_smaller_bound_counts() -> None:
    few, most = (Accountant(1.0, cohort, 100, DELTA)(10)["epsilon"] for cohort in (2, 90))
    exact = gaussian_epsilon(1.0 / math.sqrt(10), DELTA)
    assert few < most <= exact
    assert Accountant(1.0, 2, 100, DELTA, amplified=False)(10)["epsilon"] == exact


@pytest.mark.parametrize(
    ("clients", "cohort", "noise", "rounds"),
    [(20, 5, 1.0, 30), (100, 10, 0.5, 20), (50, 45, 1.0, 20), (100, 1, 3.0, 300)],
)
def test_sampling_never_hides_what_two_federations_really_cost(
    clients: int, cohort: int, noise: float, rounds: int
) -> None:
    """Everybody sends -S, and in one of two federations one client S: the sum is N(0) or, where that client is drawn, N(1), in
    units of the sensitivity. Convolved numerically, that is what these two cost exactly: a bound from below."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    one = from_gaussian_mechanism(noise, sampling_prob=cohort / clients, value_discretization_interval=5e-3)
    least = one.self_compose(rounds).get_epsilon_for_delta(DELTA)
    assert least < Accountant(noise, cohort, clients, DELTA)(rounds)["epsilon"] < 2.2 * least


def forgetful(task: Task, ctx: ClientContext) -> Update:
    return Update(task.params, ctx.num_examples)


forgetful.stateless = True  # type: ignore[attr-defined]


def unknown(task: Task, ctx: ClientContext) -> Update:
    return Update(task.params, ctx.num_examples)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], None),
        (["client.target=clients.presets:topk", "client.density=0.1"], None),
        ([f"client.target={__name__}:forgetful"], None),
        ([f"client.target={__name__}:unknown"], "stateless"),
        (["client.target=clients.presets:topk", "wire.error_feedback=true"], "wire.error_feedback = true"),
        (["model.name=cnn_bn", "model.statistics=local"], "model.statistics = 'local'"),
        (["wire.codec.uplink=drive", "wire.uplink.content=difference"], None),
        (["wire.codec.uplink=powersgd", "wire.uplink.content=difference"], "wire.codec.uplink = "),
        (
            [f"wire.codec.uplink={__name__}:Keeps"],
            f"wire.codec.uplink = '{__name__}:Keeps', which does not say stateless",
        ),
        (["model.name=resnet8", "client.target=clients.presets:feature_distillation"], "feature_distillation"),
    ],
)
def test_what_clients_keep_costs_the_amplification_and_is_said(
    options: list[str], told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        report = run_tiny(tmp_path, *PRIVATE, "cohort.size=2", "rounds=1", "training.steps=1", *options)
    lines = [record.getMessage() for record in caplog.records if "amplification" in record.getMessage()]
    exact = gaussian_epsilon(0.7, DELTA)
    if told is None:
        assert not lines
        assert report.rounds[0]["epsilon"] < 0.95 * exact
    else:
        assert len(lines) == 1
        assert told in lines[0]
        assert report.rounds[0]["epsilon"] == exact


def test_a_codec_that_keeps_something_and_says_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encode keeps 'last' in its state, and says stateless = True"):
        run_tiny(tmp_path, f"wire.codec.uplink={__name__}:Lies")


def test_capacities_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^capacities: not with this strategy, whose guarantee is for one model"):
        run_tiny(tmp_path, *PRIVATE, "capacities=[{name='cnn', width=0.5, share=0.5}]")


def test_an_attack_is_said_to_be_beside_epsilon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_tiny(tmp_path, *PRIVATE, "rounds=1", "training.steps=1", "attack.kind=colluding", "attack.share=0.5")
    assert "an epsilon is that of the clients that do not attack" in caplog.text
    caplog.clear()
    run_tiny(tmp_path / "plain", "rounds=1", "training.steps=1", "attack.kind=colluding", "attack.share=0.5")
    assert "epsilon" not in caplog.text


@pytest.mark.parametrize("client", ["fedavg", "shared_random", "topk"])
def test_clients_that_send_others_than_the_shared_coordinates_are_refused(client: str, tmp_path: Path) -> None:
    named = [f"client.target=clients.presets:{client}", *([] if client == "fedavg" else ["client.density=0.3"])]
    asked = [*PRIVATE, "rounds=1", "training.steps=1", *named]
    said = (
        r"strategy.shared_density = 0.1: a client sent other coordinates .* needed: client.target = '.*:shared_random'"
    )
    with pytest.raises(UserError, match=said):
        run_tiny(tmp_path, *asked, "strategy.shared_density=0.1")
    if client == "shared_random":
        run_tiny(tmp_path / "right", *asked, "strategy.shared_density=0.3")


def test_a_residual_of_any_size_moves_the_released_sum_by_at_most_the_sensitivity() -> None:
    """What error feedback adds to a message is clipped with it: the composition of Gaussian mechanisms needs no more."""
    schema = Schema.of({"w": torch.zeros(8, 8)}, ["w"])
    state = ServerState(schema, schema.view(torch.zeros(64)))
    mean = PrivateMean(clip=0.5, noise=1.0, cohort=3, seed=0)

    def released(residual: torch.Tensor) -> torch.Tensor:
        others = [Update(schema.view(torch.full((64,), value)), 1) for value in (0.01, -0.3)]
        return mean(state, [*others, Update(schema.view(torch.full((64,), 0.02) + residual), 1)])["w"]

    draw = torch.Generator().manual_seed(1)
    for size in (0.1, 10.0, 1e6):
        one, other = (size * torch.randn(64, generator=draw) for _ in range(2))
        moved = float(torch.linalg.vector_norm(released(one) - released(other)))
        assert moved <= 2 * 0.5 / 3 * (1 + 1e-5)
    assert float(torch.linalg.vector_norm(released(one) - released(-one))) == pytest.approx(2 * 0.5 / 3, rel=1e-4)
