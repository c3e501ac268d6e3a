"""The additivity table: where distortions must add up they do, and its statistics are the textbook's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from fl_sim.bench.additivity import joint_distortion, rows, spearman
from fl_sim.models import build
from fl_sim.sparsity.curves import MeasureCurves
from fl_sim.sparsity.rate_distortion import kept_weights
from fl_sim.training import snapshot


def test_one_layer_alone_is_predicted_exactly() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(9, 3, 2, 2)
    for row in rows(model, images, levels=11, allocations=8, sparsities=(0.3, 0.6)):
        assert row.joint == pytest.approx(row.predicted, rel=1e-6)
        assert (row.slope, row.r2) == pytest.approx((1, 1))


def test_joint_distortion_of_a_single_pruned_layer_is_its_curve() -> None:
    model, images = build("cnn_bn", in_channels=1, image_size=8), torch.randn(5, 1, 8, 8)
    before = snapshot(model).flat.clone()
    curve = MeasureCurves(levels=5)(model, images, ["3.weight"])["3.weight"]
    sizes = kept_weights(model.get_parameter("3.weight").numel(), 5)
    assert [joint_distortion(model, images, {"3.weight": kept}) for kept in sizes] == pytest.approx(curve)
    assert torch.equal(snapshot(model).flat, before)
    assert model.training


def test_small_changes_add_up_better_than_large_ones() -> None:
    model, images = build("cnn_bn", in_channels=1, image_size=8), torch.randn(16, 1, 8, 8)
    low, high, both = rows(model, images, levels=21, allocations=12, sparsities=(0.15, 0.9))
    assert [low.sparsity, high.sparsity, both.sparsity] == ["0.15", "0.9", "all"]
    assert abs(np.log(low.joint / low.predicted)) < abs(np.log(high.joint / high.predicted))
    assert low.achieved < high.achieved
    assert both.spearman > 0.8


def test_statistics_equal_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        first = rng.integers(0, 6, 15).astype(float)
        second = first + rng.integers(0, 4, 15)
        assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert spearman(np.arange(9.0), np.exp(np.arange(9.0))) == pytest.approx(1.0)
