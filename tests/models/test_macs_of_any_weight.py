"""MACs by hand for layers that are no convolution, and weight matrices that masks and shares know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_tiny
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from fl_sim import count_macs
from fl_sim.models import prunable_names
from fl_sim.models.macs import ACTIVATIONS, layer_macs
from fl_sim.sparsity.curves import MeasureCurves


class First(nn.Module):
    """A layer whose first output is the result; images (B, 1, H, W) are read row by row."""

    def __init__(self, layer: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.head = layer, head or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x.flatten(0, 1) if x.dim() == 4 else x)
        made = made[0] if isinstance(made, tuple) else made
        return self.head(made[:, -1])  # type: ignore[no-any-return]


class Words(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.head(self.embed(x.long())) @ self.embed.weight))  # type: ignore[no-any-return]


class Own(nn.Module):
    """Matrices of its own: used in pieces, transposed, in an einsum, as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.heads = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(2, 4, 5))
        self.scale = nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        pieces = functional.linear(x, self.w[:2]), functional.linear(x, self.w[2:]), x @ self.w.t().clone()
        return torch.einsum("bd,hdk->bhk", x, self.heads), pieces  # type: ignore[return-value]


T, D = 16, 64
ENCODER = 3 * D * D * T + 2 * T * T * D + D * D * T + 2 * D * 128 * T
CASES = {
    "LSTM of the digits": (lambda: First(nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)), (8, 8), 41_280),
    "LSTM, two layers, both ways": (
        lambda: First(nn.LSTM(8, 32, 2, batch_first=True, bidirectional=True)),
        (8, 8),
        2 * 8 * 4 * 32 * (8 + 32) + 2 * 8 * 4 * 32 * (64 + 32),
    ),
    "GRU": (lambda: First(nn.GRU(8, 32, batch_first=True)), (8, 8), 8 * 3 * 32 * (8 + 32)),
    "RNN": (lambda: First(nn.RNN(8, 32, batch_first=True)), (8, 8), 8 * 32 * (8 + 32)),
    "encoder layer": (lambda: First(nn.TransformerEncoderLayer(D, 4, 128, batch_first=True)), (T, D), ENCODER),
    "embedding, tied head": (Words, (3,), 2 * 3 * 50 * 16 + 3 * 50 * 16),
    "own matrices": (Own, (4,), 2 * 24 + 40),
    "bilinear": (lambda: nn.Sequential(nn.Linear(4, 4), Twice(nn.Bilinear(4, 4, 3))), (4,), 16 + 48),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 8, 3), (4, 8, 8), 4 * 8 * 9 * 64),
    "grouped, one-dimensional convolution": (lambda: nn.Conv1d(4, 8, 3, groups=2), (4, 10), 8 * 2 * 3 * 8),
    "computed weight": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), (3, 8, 8), 108 * 36),
}


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)  # type: ignore[no-any-return]


def test_weights_that_hooks_compute_keep_their_layers_name() -> None:
    conv = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        prune.random_unstructured(conv, "weight", 0.5)
    assert layer_macs(nn.Sequential(conv), (3, 8, 8)) == {"0.weight": 108 * 36}


@pytest.mark.parametrize("name", CASES)
def test_macs_by_hand(name: str) -> None:
    make, shape, macs = CASES[name]
    model = make()
    before = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(model, shape) == macs
    model.requires_grad_(False)
    assert count_macs(model, shape) == macs
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_attention_of_three_different_inputs_uses_its_weight_in_pieces() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(D, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x, x[:, :5], x[:, :5].clone())[0]  # type: ignore[no-any-return]

    mask = {"a.in_proj_weight": torch.zeros(3 * D, D, dtype=torch.bool)}
    mask["a.in_proj_weight"][:D] = True
    found = layer_macs(Cross(), (T, D))
    assert found == {
        "a.in_proj_weight": D * D * (T + 5 + 5),
        ACTIVATIONS: 2 * T * 5 * D,
        "a.out_proj.weight": D * D * T,
    }
    assert layer_macs(Cross(), (T, D), mask=mask)["a.in_proj_weight"] == D * D * T


@pytest.mark.parametrize(
    "layer", [nn.LSTM(8, 32, batch_first=True), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)]
)
def test_a_mask_takes_its_share_of_every_matrix(layer: nn.Module) -> None:
    model = First(layer)
    masks = {name: torch.arange(model.get_parameter(name).numel()) % 4 == 0 for name in prunable_names(model)}
    mask = {name: alive.view(model.get_parameter(name).shape) for name, alive in masks.items()}
    dense, left = layer_macs(model, (8, 8)), layer_macs(model, (8, 8), mask=mask)
    assert set(dense) - {ACTIVATIONS} == set(mask)
    assert all(left[name] == macs // (1 if name == ACTIVATIONS else 4) for name, macs in dense.items())


def test_what_counts_as_a_weight_matrix() -> None:
    assert prunable_names(Own()) == ["w", "heads"]
    assert prunable_names(First(nn.LSTM(1, 4))) == ["layer.weight_ih_l0", "layer.weight_hh_l0"]
    assert prunable_names(nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm((3, 4)), nn.GroupNorm(1, 3))) == ["0.weight"]
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert prunable_names(encoder) == names
    found = prunable_names(Words())
    assert (found.count("embed.weight"), found.count("head.weight")) == (1, 0), "shared: one matrix, the first name"


def rows(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    return First(nn.LSTM(image_size, 32, batch_first=True), nn.Linear(32, num_classes))


def test_sent_and_alive_are_shares_of_what_an_upload_really_is(tmp_path: Path) -> None:
    topk = ["client.target=clients.presets:topk", "client.density=0.01", f"model.name={__name__}:rows"]
    report = run_tiny(tmp_path, *topk)
    summary = report.summary
    assert summary["density"]["uplink_mean"] == pytest.approx(0.01, abs=1e-3)  # type: ignore[index, call-overload]
    whole = 4 * summary["params"] * 8  # type: ignore[operator]
    # Biases travel whole, 266 of 5,706 parameters; the mask costs about a bit for each hundredth.
    assert summary["uplink_bytes"] < 0.12 * whole
    assert summary["macs"] == {"dense": 41_280, "mean": 41_280}


def test_distortion_is_measured_for_recurrent_and_attention_weights() -> None:
    images = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    for layer in (nn.LSTM(8, 16, batch_first=True), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)):
        model = First(layer).eval()
        curves = MeasureCurves(levels=3)(model, images)
        assert set(curves) == set(prunable_names(model))
        assert all(max(row) > 0 for row in curves.values())


def test_batchnorm_that_needs_several_samples_counts_as_one_that_does_not() -> None:
    """Of two and three samples the difference is one: PyTorch refuses a batch of one without statistics."""
    models = [
        nn.Sequential(
            nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.BatchNorm1d(144, track_running_stats=kept), nn.Linear(144, 10)
        )
        for norm, kept in ((nn.BatchNorm2d(4), True), (nn.BatchNorm2d(4, track_running_stats=False), False))
    ]
    usual, other = (count_macs(model, (1, 8, 8)) for model in models)
    assert usual == other == 4 * 9 * 36 + 144 * 10
