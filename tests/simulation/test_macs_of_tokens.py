"""MACs of models of tokens: on texts where they depend on the text, as one of zeros where they do not."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fl_sim import count_macs
from fl_sim.data import Data
from fl_sim.models import build_for
from fl_sim.models.interface import Interface

WORDS, TOKENS, CLASSES = 8, 20, 3
STEP, HEAD = 3 * (4 + 6) * 6, 6 * CLASSES
"""MACs of one word in a GRU of 6 units on embeddings of 4, and of the head."""


def texts() -> Data:
    """Texts of two to eight words, padded with zeros."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 300)
    found = rng.integers(1, TOKENS, (300, WORDS))
    found[np.arange(WORDS)[None] >= rng.integers(2, WORDS + 1, 300)[:, None]] = 0
    return Data.of(found, labels, num_classes=CLASSES, vocabulary=TOKENS)


class Packed(nn.Module):
    """A recurrent classifier that skips padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 4, padding_idx=0)
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][-1])  # type: ignore[no-any-return]


def packed(*, num_classes: int, vocabulary: int, input_shape: tuple[int, ...]) -> nn.Module:
    return Packed()


SMALL = (f"data.source={__name__}:texts", "rounds=2", "data.partition=iid", "data.clients=3", "cohort.size=2")
MASKED = ("strategy.target=strategies.presets:global_magnitude", "strategy.density=0.5", "strategy.at=1")


def mean_length() -> float:
    """Of 32 test samples at equal distances."""
    test = texts().test
    tokens = torch.stack([next(test.batches(len(test)))[0][i * len(test) // 32] for i in range(32)])
    return float((tokens != 0).sum(1).double().mean())


@pytest.mark.parametrize("engine", ["inline", "workers"])
def test_a_model_that_skips_padding_is_counted_on_texts(
    tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        report = run_tiny(tmp_path, *SMALL, f"model.name={__name__}:packed", f"engine={engine}")
    wanted = round(mean_length() * STEP + HEAD)
    assert 4 * STEP < wanted < 6 * STEP
    assert report.summary["macs"] == {"dense": wanted, "mean": wanted}
    (said,) = [r.getMessage() for r in caplog.records if "MACs" in r.getMessage()]
    assert said.endswith(
        f"{STEP + HEAD:,} for a sample of zeros; reported is the mean over 32 test samples, {wanted:,}"
    )


def test_its_macs_under_a_mask_are_of_the_same_texts(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *SMALL, *MASKED, f"model.name={__name__}:packed")
    alive = {name: int(value.count_nonzero()) for name, value in report.params.items()}
    step = alive["gru.weight_ih_l0"] + alive["gru.weight_hh_l0"]
    assert step < STEP
    assert report.summary["macs"]["mean"] == round(mean_length() * step + alive["head.weight"])


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_models_that_take_all_tokens_alike_are_counted_as_ever(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fl_sim"):
        report = run_tiny(tmp_path, *SMALL, f"model.name={name}", "model.width=0.25")
    model = build_for(name, Interface((WORDS,), CLASSES, TOKENS), width=0.25)
    assert report.summary["macs"]["dense"] == count_macs(model, (WORDS,), tokens=True)
    assert "MACs" not in caplog.text


def test_a_sample_takes_the_place_of_zeros() -> None:
    text = torch.tensor([3, 1, 4, 0, 0, 0, 0, 0])
    assert count_macs(Packed(), (WORDS,), tokens=True) == STEP + HEAD
    assert count_macs(Packed(), (WORDS,), tokens=True, sample=text) == 3 * STEP + HEAD
