"""The head of a user's own model is the layer that answers, wherever it is registered; what takes no part is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fl_sim.models import build_for, head_names
from fl_sim.models.interface import Interface
from fl_sim.simulation.federation import Federation
from fl_sim.training.model_file import open_saved

SMALL = ("rounds=1", "training.steps=1", "data.clients=4", "cohort.size=2")
DIGITS = Interface((1, 8, 8), 10)


def _body() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())


class HeadFirst(nn.Module):
    """The classifier is registered before the body."""

    def __init__(self, beside: int = 0) -> None:
        super().__init__()
        self.classifier, self.body = nn.Linear(32, 10), _body()
        self.projector = nn.Linear(32, beside) if beside else None

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))  # type: ignore[no-any-return]


class Excited(nn.Module):
    """A gate over channels is registered behind the classifier; one more layer runs last, and is not the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)
        self.excite, self.decoder = nn.Linear(8, 8), nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x).relu()
        hidden = hidden * self.excite(hidden.mean((2, 3))).sigmoid()[:, :, None, None]
        answer = self.classifier(hidden.mean((2, 3)))
        self.decoder(hidden.mean((2, 3)))
        return answer  # type: ignore[no-any-return]


class LogSoftmax(HeadFirst):
    """The answer is made from what the classifier puts out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


def head_first(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return HeadFirst()


def with_a_projector(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return HeadFirst(beside=16)


def excited(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return Excited()


def log_softmax(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return LogSoftmax()


@pytest.mark.parametrize("name", ["head_first", "with_a_projector", "excited", "log_softmax"])
def test_the_head_is_the_layer_that_answers(name: str) -> None:
    model = build_for(f"{__name__}:{name}", DIGITS)
    assert head_names(model) == ["classifier.weight", "classifier.bias"]


def test_the_body_travels_where_clients_keep_the_head_and_the_head_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = f"model.name={__name__}:head_first"
    personal = ("model.personal=head", "client=clients.presets:fedper", "evaluate.clients=2")
    federation = Federation.build(tiny(tmp_path, *SMALL, named, *personal))
    assert federation.first.exchange.schema.names == ("body.1.weight", "body.1.bias")
    assert "its head is 'classifier'" in caplog.text
    report = run_tiny(tmp_path, *SMALL, named, "model.trainable=head")
    assert report.ledger.total(by=("direction", "section"))["up", "values"] == 2 * 4 * 320


def sized(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    model = HeadFirst()
    model.classifier = nn.Linear(32, num_classes)
    return model


def test_a_bare_files_classes_are_those_of_the_layer_that_answers(tmp_path: Path) -> None:
    save_file(sized(num_classes=7, in_channels=1, image_size=8).state_dict(), tmp_path / "bare.safetensors")
    opened = open_saved(tmp_path / "bare.safetensors", name=f"{__name__}:sized", image_size=8)
    assert opened.described["num_classes"] == 7
    assert opened.model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


def test_contrast_compares_what_goes_into_the_layer_that_answers(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *SMALL, f"model.name={__name__}:with_a_projector", "client=clients.presets:moon")
    assert not any(report.summary["failures"].values())


def test_parameters_on_which_no_answer_depends_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Federation.build(tiny(tmp_path, *SMALL, f"model.name={__name__}:with_a_projector"))
    assert "its answer did not depend on 'projector.weight' and 1 more; such parameters are sent all" in caplog.text
    caplog.clear()
    Federation.build(tiny(tmp_path, *SMALL, f"model.name={__name__}:head_first"))
    assert "depend" not in caplog.text


def checkpointed(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    class Checkpointed(HeadFirst):
        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(checkpoint(self.body, x.requires_grad_(), use_reentrant=True))  # type: ignore[no-any-return]

    return Checkpointed()


def test_what_a_backward_pass_of_its_own_hides_is_not_said_to_be_unused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Federation.build(tiny(tmp_path, *SMALL, f"model.name={__name__}:checkpointed"))
    assert "depend" not in caplog.text


class Graph(nn.Module):
    """A layer over a fixed sparse adjacency, which is a buffer or an attribute."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        adjacency = torch.eye(64).roll(1, 0).to_sparse()
        if buffer:
            self.register_buffer("adjacency", adjacency)
        else:
            self.adjacency = adjacency
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.sparse.mm(self.adjacency, x.flatten(1).t()).t())  # type: ignore[no-any-return]


def graph(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return Graph(buffer=True)


def graph_attribute(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return Graph(buffer=False)


@pytest.mark.parametrize("name", ["graph", "graph_attribute"])
def test_a_model_may_hold_a_sparse_tensor(tmp_path: Path, name: str) -> None:
    """Its 64 stored values meet one sample each; rolling the pixels is a permutation of a linear layer's weights."""
    report = run_tiny(tmp_path, *SMALL, f"model.name={__name__}:{name}", "evaluate.every=1")
    assert report.summary["macs"]["dense"] == 640 + 64
    assert not any(report.summary["failures"].values())


@pytest.mark.parametrize("strategy", ["rate_distortion", "layer_adaptive"])
def test_what_is_measured_of_a_model_with_a_sparse_tensor(tmp_path: Path, strategy: str) -> None:
    options = {"rate_distortion": ("density=0.5", "at=1"), "layer_adaptive": ("kilobytes=2",)}[strategy]
    asked = (f"strategy.target=strategies.presets:{strategy}", *(f"strategy.{option}" for option in options))
    report = run_tiny(tmp_path, *SMALL, *asked, "data.noise=16", f"model.name={__name__}:graph")
    assert not any(report.summary["failures"].values())
    assert report.summary["total_bytes"] > 0
