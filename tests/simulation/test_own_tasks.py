"""A task of the user's own is tried before round 1: what is wrong with it is one line that names it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from federation import tiny
from torch import Tensor, nn
from torch.nn import functional

from fl_sim import ClientContext, Task, Update
from fl_sim.core.types import UserError
from fl_sim.data.kinds import Targets
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.parts import check_built
from fl_sim.training.tasks import LearningTask, Metric


def fine(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def no_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def detached(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor(fine(outputs, targets).item())


def no_tensor(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5  # type: ignore[return-value]


def raising(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.nope  # type: ignore[no-any-return, attr-defined]


def no_count(outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    return {"loss": outputs.sum()}


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def pairwise(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of outputs (B, 1) and targets (B,), as somebody writes who does not know their shapes."""
    return functional.mse_loss(outputs, targets)


def paired(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs.squeeze(1), targets)


def zero_head(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A model that answers zero to all samples at first."""
    head = nn.Linear(input_shape[0], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def ranked(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of the batch as a whole, as contrastive ones are."""
    far = (outputs[:, None] - outputs[None]).pow(2).sum(-1)
    return torch.where(targets[:, None] == targets[None], far, 1 / (1 + far)).logsumexp(dim=(0, 1))


def own_loss(task: Task, ctx: ClientContext) -> Update:
    raise NotImplementedError


def task(criterion: object, **more: object) -> LearningTask:
    return LearningTask(Targets.CLASSES, criterion, **more)  # type: ignore[arg-type]


WRONG = {
    "no_mean": (
        task(no_mean),
        r"returned float32 \(32,\) \(test_own_tasks.py, line \d+\); needed: the mean loss, a scalar",
    ),
    "detached": (task(detached), r"loss has no gradient by the outputs \(test_own_tasks.py, line \d+\); needed: "),
    "summed": (task(summed), "its criterion is a sum over the samples, .*; needed: the mean loss"),
    "no_tensor": (task(no_tensor), "its criterion returned float"),
    "raising": (task(raising), r"criterion raised AttributeError: .*nope.* \(test_own_tasks.py, line \d+\)"),
    "no_count": (task(fine, sums=no_count), "in an evaluation it raised KeyError: 'count'.*; needed: scalars by name"),
    "no_metric": (task(fine, metric=Metric("f2", True)), "its metric 'f2' is not among what an evaluation gives: loss"),
}


@pytest.fixture(autouse=True)
def _mine(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("own_tasks")
    vars(mine).update(
        {name: wrong for name, (wrong, _) in WRONG.items()}, fine=task(fine), ranked=task(ranked), own_loss=own_loss
    )
    numbers = {"pairwise": pairwise, "paired": paired}
    vars(mine).update(
        {name: LearningTask(Targets.NUMBERS, each) for name, each in numbers.items()}, zero_head=zero_head
    )
    monkeypatch.setitem(sys.modules, mine.__name__, mine)


def built(folder: Path, *options: str) -> Federation:
    federation = Federation.build(tiny(folder, *options))
    check_built(federation)
    return federation


@pytest.mark.parametrize("name", WRONG)
def test_a_task_that_cannot_work_is_refused_by_its_key(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"^task = 'own_tasks:{name}': .*{WRONG[name][1]}"):
        built(tmp_path, f"task=own_tasks:{name}")


@pytest.mark.parametrize("name", ["fine", "ranked"])
def test_a_task_that_works_leaves_the_model_as_it_was(tmp_path: Path, name: str) -> None:
    before = torch.random.get_rng_state()
    federation = built(tmp_path, f"task=own_tasks:{name}")
    assert federation.first.built.is_as_built()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_client_with_a_loss_of_its_own_needs_no_gradient_of_the_task(tmp_path: Path) -> None:
    built(tmp_path, "task=own_tasks:detached", "client=own_tasks:own_loss")


NUMBERS = ("data.source=diabetes", "data.partition=iid", "model.name=own_tasks:zero_head")


def test_a_criterion_that_sets_each_output_beside_all_targets_is_refused(tmp_path: Path) -> None:
    said = (
        r"outputs float32 \(32, 1\) and targets float32 \(32,\) its criterion compares the outputs of each sample with"
    )
    with pytest.raises(UserError, match=said):
        built(tmp_path, "task=own_tasks:pairwise", *NUMBERS)
    built(tmp_path, "task=own_tasks:paired", *NUMBERS)
