"""FedExP against ten lines that know nothing of ours, and as a configured strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_tiny

from fl_sim import Update, UserError
from fl_sim.codecs import Schema
from fl_sim.core.types import Params
from strategies.presets import fedexp
from strategies.server_step import ServerState


def reference(old: Params, clients: list[Params], counts: list[int], epsilon: float) -> Params:
    """Algorithm 1 of the paper on concatenated vectors, with the examples as weights; statistics are averaged."""
    shares = [count / sum(counts) for count in counts]
    flat = [torch.cat([client[n].double().flatten() for n in ("weight", "bias")]) for client in clients]
    before = torch.cat([old[n].double().flatten() for n in ("weight", "bias")])
    changes = [client - before for client in flat]
    mean = sum(share * change for share, change in zip(shares, changes, strict=True))
    spread = sum(share * change.square().sum() for share, change in zip(shares, changes, strict=True))
    eta = max(1.0, float(spread / (2 * (mean.square().sum() + epsilon))))
    new = before + eta * mean
    statistics = sum(s * c["norm.running_mean"].double() for s, c in zip(shares, clients, strict=True))
    return {"weight": new[:6].view(2, 3), "bias": new[6:], "norm.running_mean": statistics}


def params(rng: torch.Generator) -> Params:
    return {
        "weight": torch.randn(2, 3, generator=rng),
        "bias": torch.randn(2, generator=rng),
        "norm.running_mean": torch.randn(2, generator=rng),
        "norm.running_var": torch.rand(2, generator=rng) + 0.5,
    }


@pytest.mark.parametrize("counts", [[3, 10, 7, 1], [5, 4, 6, 5, 5, 3, 5, 5, 7, 5, 5, 5]], ids=["few", "many"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_the_step_is_that_of_the_paper(spread: float, counts: list[int]) -> None:
    rng = torch.Generator().manual_seed(0)
    old = params(rng)
    schema = Schema.of(old, ["weight"])
    clients = [
        {n: value + spread * torch.randn(value.shape, generator=rng) for n, value in old.items()} for _ in counts
    ]
    updates = [Update(client, count) for client, count in zip(clients, counts, strict=True)]
    method = fedexp(epsilon=0.001)
    found = method.aggregate(ServerState(schema, schema.view(schema.flat(old))), iter(updates))
    for name, value in reference(old, clients, counts, 0.001).items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)
    if len(counts) > 4 and spread >= 1:  # many clients that pull apart: the step is longer than their mean
        mean = sum(c * client["weight"].double() for c, client in zip(counts, clients, strict=True)) / sum(counts)
        assert (found["weight"] - old["weight"]).norm() > 1.5 * (mean - old["weight"]).norm()


def test_clients_that_agree_make_fedavg() -> None:
    """One client has the mean change itself: eta would be 1/2, so it is 1."""
    rng = torch.Generator().manual_seed(1)
    old, new = params(rng), params(rng)
    schema = Schema.of(old, ["weight"])
    found = fedexp().aggregate(ServerState(schema, schema.view(schema.flat(old))), [Update(new, 5)])
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[name], new[name], rtol=1e-5, atol=1e-6)


def test_it_runs_from_a_config_and_a_wrong_option_is_one_line(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "strategy.target=strategies.presets:fedexp", "rounds=3")
    assert report.summary["params_sha256"] != run_tiny(tmp_path / "plain", "rounds=3").summary["params_sha256"]
    with pytest.raises(UserError, match=r"strategy\.epsilon = -1"):
        run_tiny(tmp_path, "strategy.target=strategies.presets:fedexp", "strategy.epsilon=-1.0")
