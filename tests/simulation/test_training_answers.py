"""A model that answers otherwise in training than in evaluation is refused before round 1, unless a loss is one's own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from federation import tiny
from torch import Tensor, nn
from torch.nn import functional

from fl_sim import Client, ClientContext, Task, Update, local_sgd, run
from fl_sim.core.types import UserError
from fl_sim.data.kinds import Targets
from fl_sim.data.weights import Batch
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.parts import check_built
from fl_sim.training import load, snapshot
from fl_sim.training.tasks import LearningTask

SMALL = ("rounds=1", "data.clients=2", "cohort.size=2")


class Outputs(NamedTuple):
    """As torchvision's GoogLeNet answers in training."""

    logits: Tensor
    aux: Tensor


class Aux(nn.Module):
    """A classifier with an auxiliary head, which has a BatchNorm: a batch of one sample would fail in training."""

    def __init__(self, num_classes: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.1))
        self.head, self.aux = nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> object:
        shared = self.body(images)
        main, aux = self.head(shared), self.aux(shared)
        if not self.training or self.form == "same":
            return main
        return {"named": Outputs(main, aux), "list": [main, aux], "stacked": torch.stack([main, aux], 1)}[self.form]


def both_heads(model: nn.Module, batch: Batch) -> Tensor:
    answer = model(batch[0])
    return functional.cross_entropy(answer.logits, batch[1]) + functional.cross_entropy(answer.aux, batch[1])


def own_client(task: Task, ctx: ClientContext) -> Update:
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, both_heads, lr=0.1, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples)


def of_both(outputs: object, targets: Tensor) -> Tensor:
    main = outputs.logits if isinstance(outputs, Outputs) else outputs
    assert isinstance(main, Tensor)
    return functional.cross_entropy(main, targets)


@pytest.fixture(autouse=True)
def _mine(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("own_aux_models")

    def builder(form: str) -> object:
        return lambda num_classes, in_channels, image_size: Aux(num_classes, form)

    client: Client = own_client
    vars(mine).update({form: builder(form) for form in ("same", "named", "list", "stacked")}, client=client)
    vars(mine).update(task=LearningTask(Targets.CLASSES, of_both))
    monkeypatch.setitem(sys.modules, mine.__name__, mine)


def checked(folder: Path, *options: str) -> Federation:
    federation = Federation.build(tiny(folder, *SMALL, *options))
    check_built(federation)
    return federation


@pytest.mark.parametrize("client", ["clients.presets:fedavg", "clients.presets:fedprox"])
@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("named", r"Outputs, in evaluation a tensor \(2, 10\)"),
        ("list", r"list, in evaluation a tensor \(2, 10\)"),
        ("stacked", r"\(2, 2, 10\), in evaluation \(2, 10\)"),
    ],
)
def test_another_answer_in_training_is_refused_before_round_1(
    tmp_path: Path, form: str, words: str, client: str
) -> None:
    options = ["client.mu=0.1"] if client.endswith("prox") else []
    with pytest.raises(
        UserError, match=rf"'own_aux_models:{form}': in training it answers {words}; client = .*aux_logits=False"
    ):
        checked(tmp_path, f"model.name=own_aux_models:{form}", f"client={client}", *options)


def test_the_look_leaves_no_trace_and_one_answer_is_no_remark(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    federation = checked(tmp_path, "model.name=own_aux_models:same")
    assert federation.first.training_answer == ""
    assert federation.first.built.is_as_built()
    assert not federation.first.model.get_buffer("body.2.running_mean").any()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("client=own_aux_models:client", "client = 'own_aux_models:client' has to take its loss from that"),
        ("task=own_aux_models:task", "the criterion of task = 'own_aux_models:task' gets that"),
    ],
)
def test_a_loss_of_ones_own_may_use_all_outputs_and_is_told(
    tmp_path: Path, option: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        report = run(tiny(tmp_path, *SMALL, "model.name=own_aux_models:named", option))
    assert [r.getMessage() for r in caplog.records if words in r.getMessage()]
    assert not any(report.summary["failures"].values())
