"""The cohort engine on the CPU: the same results as one client after the other, up to rounding."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny
from torch import nn

from fl_sim import models
from fl_sim.bench.cohort import Grid, measure
from fl_sim.core.seeding import generator
from fl_sim.core.types import UserError
from fl_sim.data import CropFlip, Split, load
from fl_sim.models.parameters import entries
from fl_sim.simulation import RunStopped
from fl_sim.training import Training, snapshot
from fl_sim.training.batchable import fitting
from fl_sim.training.batched import Member, fit

METHODS = {
    "dense": [],
    "sgd": [
        "training.momentum=0.9",
        "training.nesterov=true",
        "training.weight_decay=0.001",
        "training.schedule=cosine",
        "data.augment=crop_flip",
        "training.lr=0.05",
        "cohort.chunk=3",
    ],
    "masked": ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2", "training.momentum=0.9"],
    "batchnorm": ["model.name=resnet8", "model.trainable=batchnorm", "training.steps=2"],
    "gated": [
        "client.target=clients.presets:adaptive_pruning",
        "gating.macs_budget=0.5",
        "client.keep_up=0.5",
        "training.momentum=0.9",
    ],
    "gated_by_filters": [
        "client.target=clients.presets:adaptive_pruning",
        "gating.salience=weight",
        "gating.end=3",
        "cohort.chunk=2",
    ],
    "gated_by_activation": ["client.target=clients.presets:active_channels", "gating.salience=activation"],
    "local_statistics": ["model.trainable=batchnorm", "model.statistics=local", "evaluate.clients=2"],
}


@pytest.mark.parametrize("method", METHODS)
def test_equals_inline_up_to_rounding(tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str) -> None:
    options = ["rounds=1", *METHODS[method]]
    inline = run_tiny(tmp_path / "inline", *options)
    cohort = run_tiny(tmp_path / "cohort", *options, "engine=cohort")
    assert not caplog.records, "it fell back"
    assert cohort.params.keys() == inline.params.keys()
    for name, value in inline.params.items():
        torch.testing.assert_close(cohort.params[name], value, atol=1e-5, rtol=1e-5)
    assert cohort.ledger.total(by=("direction",)) == inline.ledger.total(by=("direction",))
    assert [row["clients"] for row in cohort.rounds] == [3]
    assert cohort.rounds[0]["loss"] == pytest.approx(inline.rounds[0]["loss"], rel=1e-5)


def split(rows: range) -> Split:
    return load("digits").train.subset(np.array(rows)).augmented(CropFlip(padding=1))


@pytest.mark.parametrize("options", [Training(epochs=2, batch_size=8, momentum=0.5), Training(steps=5, batch_size=7)])
def test_ragged_clients_draw_and_end_as_alone(options: Training) -> None:
    """Different sizes, last batches and masks; generators end in the same state."""
    parts = [split(range(20)), split(range(20, 53)), split(range(53, 56)), split(range(60, 76))]
    model = models.build("cnn_bn", num_classes=10, in_channels=1, image_size=8)
    start = snapshot(model)
    masks = [None, *({"0.weight": torch.rand(16, 1, 3, 3, generator=generator(i)) < 0.5} for i in range(3))]
    generators = [generator(7, i) for i in range(4)]
    starts = [{name: value.detach().clone() for name, value in entries(model).items()} for _ in parts]
    members = [Member(*parts_of) for parts_of in zip(parts, masks, generators, strict=True)]
    together = fit(model, starts, members, options)
    for i, (part, mask) in enumerate(zip(parts, masks, strict=True)):
        alone, rng = models.build("cnn_bn", num_classes=10, in_channels=1, image_size=8), generator(7, i)
        alone.load_state_dict({**alone.state_dict(), **start})
        metrics = options.fit(alone, part, mask=mask, rng=rng)
        assert torch.equal(rng.get_state(), generators[i].get_state())
        assert together[i].metrics == pytest.approx(metrics, rel=1e-5)
        for name, value in snapshot(alone).items():
            torch.testing.assert_close(together[i].entries[name], value, atol=1e-5, rtol=1e-5)
        if mask is not None:
            assert not together[i].entries["0.weight"][~mask["0.weight"]].any()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["client.target=clients.presets:fedprox", "client.mu=0.1"], "more than local SGD"),
        (["model.name=cnn"], "dropout"),
        (["training.optimizer=adamw", "training.lr=0.001"], "adamw"),
        (["client.target=clients.presets:adaptive_pruning", "gating.masking=backward_only"], "gradients alone"),
        (["client.target=clients.presets:adaptive_pruning", "gating.salience=taylor"], "gradients alone"),
        (
            ["client.target=clients.presets:adaptive_pruning", "client.profile=[0.5, 0.75]", "gating.keep=0.5"],
            "more than",
        ),
        (["client.target=clients.presets:gap_pruning", "gating.keep=0.5"], "more than local SGD"),
    ],
)
def test_what_cannot_be_batched_runs_as_inline_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: list[str], why: str
) -> None:
    options = [*options, "training.steps=2"]
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        cohort = run_tiny(tmp_path / "cohort", *options, "engine=cohort")
    assert [why in record.message for record in caplog.records] == [True]
    assert cohort.summary["params_sha256"] == run_tiny(tmp_path / "inline", *options).summary["params_sha256"]


def test_a_diverging_client_is_told_as_inline(tmp_path: Path) -> None:
    for engine in ("inline", "cohort"):
        with pytest.raises(
            RunStopped, match=r"client \d: TrainingDiverged: the training loss became nan within \d steps"
        ):
            run_tiny(tmp_path / engine, "training.lr=1e30", "training.steps=2", "rounds=1", f"engine={engine}")


def test_how_many_fit_falls_with_the_size_of_the_model() -> None:
    sizes = [
        models.build(name, num_classes=10, in_channels=1, image_size=8) for name in ("cnn_bn", "resnet8", "resnet20")
    ]
    counts = [fitting(model, split(range(20)), Training(batch_size=32)) for model in sizes]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1


def test_steps_of_a_recurrent_layer_take_memory_too() -> None:
    class Rows(nn.Module):
        """Eight rows through a GRU."""

        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(8, 400, batch_first=True)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.gru(images[:, 0])[0][:, -1]

    model, training = Rows(), Training(batch_size=20)
    parameters = sum(p.numel() for p in model.parameters())
    assert fitting(model, split(range(20)), training) == 10**9 // (4 * (4 * parameters + 2 * 12 * 20 * 8 * 400))


def test_on_a_cpu_no_more_train_together_than_pays() -> None:
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert fitting(tiny, split(range(20)), Training(batch_size=1)) == 512


def test_the_bench_runs_and_says_when_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = measure("cpu", Grid(["cnn_bn"], [2], [2]))
    assert row.cohort == 2
    assert row.ratio > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU here"):
        measure("cuda", Grid(["cnn_bn"], [2], [2]))
