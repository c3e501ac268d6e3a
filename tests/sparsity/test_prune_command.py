"""`fl-sim prune` on models of tokens, with gates and without BatchNorm: pruned, or refused in one line that says what is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command import cli_here
from federation import run_tiny
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fl_sim import models
from fl_sim.core.types import UserError
from fl_sim.data import Data
from fl_sim.models import prunable_names
from fl_sim.sparsity.one_model import METHODS, USED, Request, layer_rows
from fl_sim.training.model_file import open_saved

LENGTH, TOKENS = 9, 10
BY_WEIGHT = [name for name in METHODS if name != "batchnorm"]


def sentences() -> Data:
    """Counting from some digit on."""
    starts = np.random.default_rng(0).integers(0, TOKENS, 60)
    return Data.of((starts[:, None] + np.arange(LENGTH + 1)) % TOKENS)


def labelled() -> Data:
    """Texts of two to eight words, padded with zeros, whose first word is their class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    texts = rng.integers(4, TOKENS, (90, 8))
    texts[:, 0] = 1 + labels
    texts[np.arange(8)[None] >= rng.integers(2, 9, 90)[:, None]] = 0
    return Data.of(texts, labels, num_classes=3, vocabulary=TOKENS)


def wider() -> Data:
    """More tokens than those of `sentences`."""
    return Data.of(np.arange(200).reshape(20, 10) % 17)


class Packed(nn.Module):
    """A recurrent classifier that skips padding."""

    def __init__(self, vocabulary: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 4, padding_idx=0)
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][-1])  # type: ignore[no-any-return]


def packed(*, num_classes: int, vocabulary: int, input_shape: tuple[int, ...]) -> nn.Module:
    return Packed(vocabulary, num_classes)


SENTENCES = (f"data.source={__name__}:sentences", "task=next_token")
RUNS = {
    "transformer": (*SENTENCES, "model.name=transformer", "model.width=0.5"),
    "lstm": (*SENTENCES, "model.name=lstm", "model.width=0.25"),
    "own": (f"data.source={__name__}:labelled", f"model.name={__name__}:packed"),
}
SOURCES = {"transformer": "sentences", "lstm": "sentences", "own": "labelled"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("runs")
    options = ("rounds=1", "data.partition=iid", "data.clients=3", "cohort.size=2")
    return {name: run_tiny(out / name, *more, *options).folder for name, more in RUNS.items()}


def named(run: str) -> list[str]:
    return ["--model", f"{__name__}:packed"] if run == "own" else []


@pytest.mark.parametrize("method", BY_WEIGHT)
@pytest.mark.parametrize("run", RUNS)
def test_models_of_tokens_are_pruned(
    folders: dict[str, Path], run: str, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--calibration", f"{__name__}:{SOURCES[run]}", "--levels", "4"] if method == "rd" else []
    words = ["prune", str(folders[run]), "--method", method, "--density", "0.3", *named(run), *more]
    status, said = cli_here(monkeypatch, *words), capsys.readouterr()
    assert status == 0, said.err
    assert ("without retraining" in said.out) == (method == "rd")
    made = load_file(folders[run] / f"model-{method}-0.3.safetensors")
    saved = open_saved(folders[run], name=f"{__name__}:packed" if run == "own" else None)
    names = prunable_names(saved.model)
    alive, whole = (sum(int(f(made[name])) for name in names) for f in (torch.count_nonzero, torch.numel))
    assert alive == round(0.3 * whole)


def test_macs_of_a_pruned_model_of_tokens(folders: dict[str, Path]) -> None:
    """At density 1: 3 (4 + 6) 6 for the one step of an empty text, and the head."""
    saved = open_saved(folders["own"], name=f"{__name__}:packed")
    *rows, total = layer_rows(saved.model, saved.model, saved.shape, tokens=saved.tokens)
    assert {row.layer: row.macs for row in rows} == {
        "embed.weight": 0,
        "gru.weight_ih_l0": 3 * 4 * 6,
        "gru.weight_hh_l0": 3 * 6 * 6,
        "head.weight": 6 * 3,
    }
    assert total.macs == total.macs_kept == 198


@pytest.mark.parametrize(
    ("run", "words", "expected"),
    [
        ("transformer", ["--method", "rd"], "it needs calibration images or tokens (--calibration DATA)"),
        (
            "transformer",
            ["--method", "batchnorm"],
            "this model has no BatchNorm; allowed: a method that prunes weights",
        ),
        (
            "transformer",
            ["--calibration", "digits"],
            "calibration = 'digits': inputs are numbers; the model takes tokens",
        ),
        ("transformer", ["--calibration", f"{__name__}:labelled"], "tokens of shape (8,); the model takes (9,)"),
        ("transformer", ["--calibration", f"{__name__}:wider"], "a vocabulary of 17 tokens; the model takes 10"),
        ("transformer", ["--image-size", "8"], "--image-size = 8: "),
        ("own", ["--method", "rd", "--model", f"{__name__}:packed"], "it needs calibration images or tokens"),
        ("own", ["--image-size", "8", "--model", f"{__name__}:packed"], "allowed: with --model, for images"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    folders: dict[str, Path],
    run: str,
    words: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli_here(monkeypatch, "prune", str(folders[run]), *words) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


def test_channels_of_a_gated_run_are_not_cut_and_of_another_are_by_their_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gated = run_tiny(tmp_path / "gated", "rounds=1", "gating.keep=0.5").folder
    assert cli_here(monkeypatch, "prune", str(gated), "--method", "batchnorm") == 2
    assert "method 'batchnorm': cuts channels out of models without gates" in capsys.readouterr().err
    plain = run_tiny(tmp_path / "plain", "rounds=1").folder
    assert cli_here(monkeypatch, "prune", str(plain), "--method", "batchnorm", "--threshold", "0.02") == 0
    assert (plain / "model-batchnorm-0.02.safetensors").is_file()


def test_every_method_says_which_options_it_uses() -> None:
    assert USED.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "a folder; needed: a file"),
        ("none/made.safetensors", "its folder does not exist; needed: a file"),
        ("model.safetensors", "the model itself, which would be lost; allowed: another file"),
        ("link.safetensors", "the model itself, which would be lost; allowed: another file"),
    ],
)
def test_the_model_is_not_replaced_by_what_is_left_of_it(
    folders: dict[str, Path], out: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders["lstm"]
    if out == "link.safetensors":
        (folder / out).symlink_to(folder / "model.safetensors")
    before = (folder / "model.safetensors").read_bytes()
    status = cli_here(monkeypatch, "prune", str(folder), "--out", str(folder / out))
    assert (status, capsys.readouterr()) == (2, ("", f"fl-sim: {folder / out}: {said}\n"))
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("threshold", ["nan", "-1", "inf"])
def test_a_threshold_is_a_number_of_at_least_0(threshold: str) -> None:
    with pytest.raises(UserError, match="must be a number of at least 0"):
        METHODS["batchnorm"](models.build("cnn_bn"), Request(0.1, threshold=float(threshold)))
