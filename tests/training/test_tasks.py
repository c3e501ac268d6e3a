"""Learning tasks: metrics beside their formulas, whatever the batch size, and losses that refuse other targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_sim.core.types import UserError
from fl_sim.data import Split
from fl_sim.data.kinds import Targets
from fl_sim.training import TASKS, LearningTask, evaluate, learning_task, local_sgd
from fl_sim.training.tasks import Metric

RNG = torch.Generator().manual_seed(0)


def answering(outputs: Tensor) -> tuple[nn.Module, Tensor]:
    """A model whose answers are these, and the inputs that ask for them: each its own position."""

    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(outputs)

        def forward(self, x: Tensor) -> Tensor:
            return self.table[x[:, 0].long()]

    return Answers(), torch.arange(len(outputs)).float().view(-1, 1)


def measured(name: str, outputs: Tensor, targets: Tensor, batch_size: int) -> dict[str, float]:
    model, inputs = answering(outputs)
    return evaluate(model, Split(inputs, targets), TASKS[name], batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [3, 512])
def test_regression(batch_size: int) -> None:
    outputs, targets = torch.randn(20, 1, generator=RNG), torch.randn(20, generator=RNG)
    found = measured("regression", outputs, targets, batch_size)
    error, true = (outputs[:, 0] - targets).double().numpy(), targets.double().numpy()
    assert found["loss"] == pytest.approx(np.mean(error**2))
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)))
    assert found["mae"] == pytest.approx(np.mean(np.abs(error)))
    assert found["r2"] == pytest.approx(1 - np.sum(error**2) / np.sum((true - true.mean()) ** 2))
    assert found["examples"] == 20


def test_equal_targets_have_no_explained_variance() -> None:
    assert "r2" not in measured("regression", torch.randn(4, 1), torch.full((4,), 3.0), 512)


@pytest.mark.parametrize("batch_size", [3, 512])
def test_next_token(batch_size: int) -> None:
    outputs, targets = torch.randn(5, 6, 4, generator=RNG), torch.randint(4, (5, 6), generator=RNG)
    found = measured("next_token", outputs, targets, batch_size)
    chances = outputs.softmax(dim=2).gather(2, targets[..., None]).double()
    assert found["perplexity"] == pytest.approx(math.exp(-float(chances.log().mean())), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(2) == targets).double().mean()))


@pytest.mark.parametrize("batch_size", [3, 512])
def test_multilabel(batch_size: int) -> None:
    outputs, targets = torch.randn(9, 4, generator=RNG), torch.rand(9, 4, generator=RNG) > 0.6
    found = measured("multilabel", outputs, targets, batch_size)
    said = outputs > 0
    right, wrong, missed = (int(x.sum()) for x in (said & targets, said & ~targets, ~said & targets))
    assert found["f1"] == pytest.approx(2 * right / (2 * right + wrong + missed))


def test_a_diverged_model_has_an_infinite_perplexity() -> None:
    outputs = torch.tensor([[[0.0, 2000.0]]])
    assert measured("next_token", outputs, torch.tensor([[0]]), 512)["perplexity"] == math.inf


def test_cross_entropy_refuses_numbers_which_pytorch_takes_for_probabilities() -> None:
    model, inputs = answering(torch.randn(4, 1))
    data = Split(inputs, torch.rand(4, 1))
    with pytest.raises(UserError, match=r"targets are torch.float32; needed: classes"):
        local_sgd(model, data, lr=0.1, steps=1)
    local_sgd(model, data, TASKS["regression"], lr=0.1, steps=1)


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.view_as(targets) - targets).abs().mean()


mine = LearningTask(Targets.NUMBERS, absolute)


def test_a_task_of_ones_own_is_a_criterion() -> None:
    own = learning_task(f"{__name__}:mine")
    assert own.metric == Metric("loss", higher=False)
    model, inputs = answering(torch.zeros(4, 1))
    found = evaluate(model, Split(inputs, torch.tensor([1.0, -1, 3, 0])), own, batch_size=3)
    assert found == {"loss": 1.25, "examples": 4}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("regresion", "did you mean 'regression'"),
        (f"{__name__}:absolute", "needed: fl_sim.training.tasks.LearningTask"),
    ],
)
def test_an_unknown_task_is_one_line(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        learning_task(name)
