"""What configs and docstrings say of numbers, as numbers."""

from __future__ import annotations

import numpy as np
import payloads
import pytest
import torch

from fl_sim import Experiment
from fl_sim.codecs import Schema, describe, encode
from fl_sim.codecs.bits import floor_bits
from fl_sim.data.partition import partition
from fl_sim.sparsity import Iterative


def test_rate_distortion_config_has_the_papers_training_and_ends_at_its_density() -> None:
    experiment = Experiment.load("configs/central_rate_distortion.toml")
    assert (experiment.training.optimizer, experiment.training.weight_decay) == ("adamw", 0.01)
    options = experiment.strategy.options
    schedule = Iterative(int(options["at"]), 1, float(options["amount"]), float(options["density"]))  # type: ignore[arg-type]
    assert schedule(13) > 0.045
    assert schedule(14) == schedule(experiment.rounds) == 0.045
    assert pytest.approx(0.8**14, abs=1e-4) == 0.044


def test_the_floor_of_a_mask_by_rows_is_below_that_of_independent_bits() -> None:
    shapes = payloads.resnet_shapes(8)
    mask, params = payloads.channels(shapes, 0.5), payloads.params_of(shapes)
    schema = Schema.of(params, shapes)
    described = describe(encode(params, mask, schema=schema), schema=schema)
    assert described.mask_mode == "rows"
    independent = sum(floor_bits(int(m.sum()), m.numel()) for m in mask.values()) / 8
    assert described.entropy_bytes < 0.1 * independent


def test_alpha_is_the_concentration_of_an_entry_over_clients() -> None:
    """The variance of a client's share of a class is that of Dirichlet(alpha) over the clients."""
    clients, alpha, labels = 10, 0.5, np.repeat(np.arange(200), 500)
    parts = partition(labels, clients, kind="dirichlet", alpha=alpha, seed=0, min_size=1)
    counts = torch.tensor(np.array([np.bincount(labels[part], minlength=200) for part in parts]) / 500)
    expected = (clients - 1) / clients**2 / (clients * alpha + 1)
    # Clients with an even share get no more of the last classes, so that the first ones alone are free draws.
    assert float(counts[:, :100].var()) == pytest.approx(expected, rel=0.2)
