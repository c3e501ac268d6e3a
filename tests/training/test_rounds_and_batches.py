"""Learning rate over rounds, left-out batches and gradient accumulation: as a formula says, and alike on every engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fl_sim import Experiment, Report, UserError, run
from fl_sim.data import Data, Split
from fl_sim.training import Training, snapshot

ROWS = torch.randn(33, 4, generator=torch.Generator().manual_seed(0))
DATA = Split(ROWS, (ROWS[:, 0] > 0).long())


def net(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.ReLU(), nn.Linear(6, 2))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"warmup": 3}, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 50: 1.0}),
        ({"decay": "linear", "decay_to": 0.5, "decay_end": 11}, {1: 1.0, 6: 0.75, 11: 0.5, 99: 0.5}),
        ({"decay": "exponential", "decay_to": 0.01, "decay_end": 3}, {1: 1.0, 2: 0.1, 3: 0.01}),
        ({"decay": "cosine", "decay_to": 0.2, "decay_end": 5, "warmup": 2}, {1: 1 / 3, 3: 1.0, 4: 0.6, 5: 0.2, 9: 0.2}),
        ({"decay": "cubic", "decay_to": 0.5, "decay_end": 3}, {1: 1.0, 2: 1 - 0.5 * (1 - 0.125), 3: 0.5}),
    ],
)
def test_the_rate_of_a_round_is_the_formula(options: dict[str, object], rates: dict[int, float]) -> None:
    training = Training(lr=2.0, **options)  # type: ignore[arg-type]
    assert {number: training.at(number).lr / 2 for number in rates} == pytest.approx(rates)
    assert not training.at(1).changes
    with pytest.raises(UserError, match=r"depend on the round: training\.at\(task\.round\)"):
        training.fit(net(), DATA)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": "cosin"}, "training.decay = 'cosin': allowed: constant, linear, cubic"),
        ({"decay_to": 0.0}, "decay_to = 0.0 above 0 and at most 1"),
        ({"warmup": -1}, "warmup = -1 must be at least 0"),
        ({"warmup": 5, "decay_end": 5}, "decay_end = 5: must be after the warm-up of 5 rounds"),
        ({"accumulate": 0}, "training.accumulate = 0: must be positive"),
    ],
)
def test_what_is_no_such_training_is_one_line(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as said:
        Training(**options)  # type: ignore[arg-type]
    assert words in str(said.value)


def test_a_step_of_accumulated_batches_is_that_of_one_large_batch() -> None:
    few, large = net(), net()
    options = Training(lr=0.5, batch_size=32, momentum=0.9, clip_norm=0.1, epochs=3)
    metrics = replace(options, batch_size=8, accumulate=4).fit(few, DATA, rng=rng())
    assert metrics == pytest.approx(options.fit(large, DATA, rng=rng()))
    assert metrics["steps"] == 6  # 33 samples: a step of 32 and one of 1, three times
    for name, value in snapshot(few).items():
        torch.testing.assert_close(value, snapshot(large)[name])


def test_drop_last_leaves_the_smaller_batch_out_unless_it_is_the_only_one() -> None:
    options = Training(batch_size=8, epochs=2, drop_last=True)
    assert options.fit(net(), DATA, rng=rng())["examples"] == 64
    assert replace(options, accumulate=3).fit(net(), DATA, rng=rng())["steps"] == 4
    assert replace(options, batch_size=40).fit(net(), DATA, rng=rng())["examples"] == 66
    kept, whole = net(), net()
    options.fit(kept, DATA.subset(np.arange(32)))
    replace(options, drop_last=False).fit(whole, DATA.subset(np.arange(32)))
    assert all(torch.equal(value, snapshot(whole)[name]) for name, value in snapshot(kept).items())


def test_a_last_batch_of_one_is_left_out_where_batchnorm_cannot_train_on_it() -> None:
    options = Training(batch_size=8)
    model = net(norm=True)
    assert options.fit(model, DATA, rng=rng())["examples"] == 32
    assert all(module.training for module in model.modules())
    assert not model[1]._forward_pre_hooks
    assert options.fit(net(), DATA, rng=rng())["examples"] == 33
    wide = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 2))  # four values a channel
    assert options.fit(wide, replace(DATA, stored=ROWS[:, None]), rng=rng())["examples"] == 33


def rows(sizes: Sequence[int] = (33, 40, 20, 17)) -> Data:
    """Groups of these sizes."""
    drawn = np.random.default_rng(0).normal(size=(sum(sizes), 4)).astype(np.float32)
    classes, groups = (drawn[:, 0] > 0).astype(np.int64), np.repeat(np.arange(len(sizes)), sizes)
    return Data.of(drawn, classes, test_inputs=drawn, test_targets=classes, groups=groups, validation=0)


def one_alone() -> Data:
    return rows((33, 1))


def with_norm(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Linear(input_shape[0], 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, num_classes))


def federated(out: Path, *overrides: str, resume: bool = False) -> Report:
    tree: dict[str, object] = {
        "rounds": 3,
        "data": {"source": f"{__name__}:rows", "partition": "natural", "clients": 4, "validation": 0},
        "model": {"name": f"{__name__}:with_norm"},
        "cohort": {"size": 3},
        "training": {"batch_size": 8, "warmup": 1, "decay": "cosine", "momentum": 0.9},
        "workers": {"count": 2},
    }
    return run(Experiment.from_tree(tree, [f'out="{out}"', *overrides]), resume=resume)


def test_inline_workers_and_cohort_train_alike_and_say_what_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        inline = federated(tmp_path / "inline")
    said = [r.getMessage() for r in caplog.records if "one sample" in r.getMessage()]
    assert len(said) == 1
    assert "2 of 4 clients leave that sample of each epoch out" in said[0]
    caplog.clear()
    workers = federated(tmp_path / "workers", "engine=workers")
    assert workers.summary["params_sha256"] == inline.summary["params_sha256"]
    cohort = federated(tmp_path / "cohort", "engine=cohort")
    assert not [r for r in caplog.records if "client by client" in r.getMessage()]
    for name, value in inline.params.items():
        torch.testing.assert_close(cohort.params[name], value, atol=1e-5, rtol=1e-5)
    constant = federated(tmp_path / "constant", "training.decay=constant")
    assert constant.summary["params_sha256"] != inline.summary["params_sha256"]
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        several = ["training.accumulate=2", "training.drop_last=true", "training.batch_size=18"]
        inline, cohort = (federated(tmp_path / f"{e}2", *several, f"engine={e}") for e in ("inline", "cohort"))
    assert cohort.summary["params_sha256"] == inline.summary["params_sha256"]
    lines = [record.getMessage() for record in caplog.records]
    assert sum("client by client here: training.accumulate" in line for line in lines) == 1
    assert (
        sum("drop_last: 1 of 4 clients have fewer samples than training.batch_size = 18" in line for line in lines) == 2
    )


@pytest.mark.slow
def test_ray_leaves_a_last_batch_of_one_out_alike(tmp_path: Path) -> None:
    inline = federated(tmp_path / "inline")
    ray = federated(tmp_path / "ray", "engine=ray", "ray.workers=2")
    assert ray.summary["params_sha256"] == inline.summary["params_sha256"]


def test_a_decay_over_all_rounds_is_not_continued_with_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    federated(tmp_path, "rounds=1")
    with caplog.at_level(logging.WARNING, logger="fl_sim"):
        longer = federated(tmp_path, "rounds=2", resume=True)
    assert [r.getMessage().partition(": ")[2] for r in caplog.records if "spread" in r.getMessage()] == [
        "the same but for its rounds, over which training.decay is spread; set training.decay_end"
    ]
    assert longer.summary["params_sha256"] == federated(tmp_path / "again", "rounds=2").summary["params_sha256"]


def test_a_client_of_one_sample_is_refused_before_round_1(tmp_path: Path) -> None:
    said = r"BatchNorm cannot train on a single sample, and 1 of 2 clients have no more; needed: data.min_size = 2, or"
    with pytest.raises(UserError, match=said):
        federated(tmp_path, f"data.source={__name__}:one_alone", "data.clients=2", "cohort.size=2")
