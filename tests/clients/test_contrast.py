"""MOON's client against equations 3 and 4, written down once more."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from clients.presets import moon
from fl_sim import UserError, snapshot
from fl_sim.core.types import Task
from fl_sim.data import Split
from fl_sim.training.client import ClientContext
from fl_sim.training.loop import Training

MU, TEMPERATURE, LR = 2.0, 0.5, 0.2
INPUTS, TARGETS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(hidden=nn.Linear(5, 4), act=nn.Tanh(), out=nn.Linear(4, 3)))


def reference(received: nn.Module, previous: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    """A client's round of equation 4 with whole-batch steps."""
    model = network(9)
    model.load_state_dict(received.state_dict())

    def z(net: nn.Module) -> torch.Tensor:
        return torch.tanh(net.hidden(INPUTS))

    def sim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    for _ in range(steps):
        near = torch.exp(sim(z(model), z(received).detach()) / TEMPERATURE)
        far = torch.exp(sim(z(model), z(previous).detach()) / TEMPERATURE)
        value = functional.cross_entropy(model(INPUTS), TARGETS) - MU * torch.log(near / (near + far)).mean()
        gradients = torch.autograd.grad(value, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= LR * gradient
    return model.state_dict()


def test_moon_takes_the_steps_of_its_equations_in_the_first_round_and_in_a_later_one() -> None:
    client = moon(training=Training(lr=LR, epochs=2, batch_size=100), mu=MU, temperature=TEMPERATURE)
    data, state = Split(INPUTS, TARGETS), dict[str, torch.Tensor]()
    previous = network(1)
    for number, received in enumerate((network(1), network(2)), start=1):
        context = ClientContext(network(3), data, torch.Generator().manual_seed(0), state)
        update = client(Task(number, snapshot(received)), context)
        expected = reference(received, previous, steps=2)
        for name, value in expected.items():
            torch.testing.assert_close(update.params[name], value, atol=1e-5, rtol=0)
        assert update.extra == {}
        previous.load_state_dict(expected)


def test_moon_needs_a_linear_layer() -> None:
    with pytest.raises(UserError, match="has no linear layer"):
        moon(training=Training()).require(nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 8, 8))
