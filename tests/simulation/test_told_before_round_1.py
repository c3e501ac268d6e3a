"""What is allowed but surely not meant is said, and a refusal names what stands in the way, not the next refusal."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from federation import TINY, tiny
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fl_sim import Experiment
from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.parts import check, check_built
from fl_sim.training import precision
from fl_sim.training.precision import PRECISIONS

BUFFERED = ("schedule.kind=fedbuff", "network.links.4G=1")


@pytest.mark.parametrize("values", ["sign", "top1-ternary"])
def test_parameters_that_travel_as_signs_are_said(
    values: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        check(tiny(tmp_path, f"wire.uplink.values={values}", "wire.uplink.content=difference"))
        check(tiny(tmp_path, "wire.uplink.values=int8"))
        assert "coarsely" not in caplog.text
        check(tiny(tmp_path, f"wire.uplink.values={values}"))
    assert f"wire.uplink.values = '{values}': the parameters themselves travel so coarsely" in caplog.text


def test_personal_models_without_rounds_need_clients_that_measure_and_no_more(tmp_path: Path) -> None:
    fine_tuned = [*BUFFERED, "client=clients.presets:fine_tuned"]
    with pytest.raises(UserError, match=r"fine_tuned'.*needed: evaluate.clients above 0"):
        check_built(Federation.build(tiny(tmp_path, *fine_tuned), quiet=True))
    check_built(Federation.build(tiny(tmp_path, *fine_tuned, "evaluate.clients=2"), quiet=True))
    Experiment.from_tree(TINY, [*BUFFERED, "model.personal=head", "evaluate.clients=2"])


class Pixels(nn.Module):
    """A model over brightness as a word."""

    def __init__(self, num_classes: int, *, sparse: bool = True) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(17, 4, sparse=sparse), nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        words = self.words((images.clamp(0, 1) * 16).long().flatten(1))
        return self.out(words.flatten(1))


@pytest.mark.parametrize(
    ("override", "asked"), [("optimizer=adamw", "optimizer = 'adamw'"), ("weight_decay=0.01", "weight_decay")]
)
def test_sparse_gradients_are_refused_where_the_optimizer_cannot_use_them(
    override: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sparse_words", module := ModuleType("sparse_words"))
    module.__dict__.update(sparse=Pixels, dense=partial(Pixels, sparse=False))
    for ok in (("sparse", "momentum=0.9"), ("dense", override)):
        check_built(
            Federation.build(tiny(tmp_path, f"model.name=sparse_words:{ok[0]}", f"training.{ok[1]}"), quiet=True)
        )
    with pytest.raises(UserError, match=rf"gradients of words\.weight are sparse .*training\.{asked} cannot use"):
        check_built(
            Federation.build(tiny(tmp_path, "model.name=sparse_words:sparse", f"training.{override}"), quiet=True)
        )


@pytest.mark.parametrize(("slower", "said"), [(2.1, "2.1 times that of"), (1.4, "")])
def test_a_precision_that_the_processor_emulates_is_said(
    slower: float, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"float32": 0.01, "bfloat16": 0.01 * slower}
    names = {each: name for name, each in PRECISIONS.items()}
    monkeypatch.setattr(precision, "training_seconds", lambda model, asked, batch: clock[names[asked]])
    with caplog.at_level(logging.WARNING, "fl_sim"):
        Federation.build(tiny(tmp_path, "training.precision=bfloat16", "model.name=cnn"), quiet=True)
        assert "bfloat16" not in caplog.text
        Federation.build(tiny(tmp_path, "training.precision=bfloat16", "model.name=cnn"))
    assert said in caplog.text
    assert ("bfloat16" in caplog.text) == bool(said)


class Normalised(nn.Module):
    """Two layers, of which the first has its weight from a direction and a length."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(64, 8))
        self.out = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(torch.relu(self.first(images.flatten(1))))


def test_layers_that_get_no_adapter_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "normalised", module := ModuleType("normalised"))
    module.Normalised = Normalised  # type: ignore[attr-defined]
    model = ["model.name=normalised:Normalised", "model.adapter.rank=2"]
    with caplog.at_level(logging.WARNING, "fl_sim"):
        Federation.build(tiny(tmp_path, *model, 'model.adapter.targets=["out"]'))
        Federation.build(tiny(tmp_path, *model, "model.adapter.train=first.*"))
        assert "adapter" not in caplog.text
        Federation.build(tiny(tmp_path, *model))
    assert "model.adapter: first: frozen, and without adapters" in caplog.text
