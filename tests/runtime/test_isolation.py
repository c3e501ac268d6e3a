# ruff: noqa: NPY002
"""Nothing that a client or a forward pass leaves behind reaches the next client, the evaluation or another engine."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import leaking
import numpy as np
import pytest
import torch
from federation import run_tiny, same
from torch import nn

from fl_sim import Report
from fl_sim.core.process_state import restore, seeded, settings
from fl_sim.core.types import UserError
from fl_sim.models.module_state import ModuleState

WORKERS = ("engine=workers", "workers.count=2")
SHORT = ("rounds=3", "training.steps=3", "training.batch_size=16")


def _with(model: str = "small", client: str | None = None) -> tuple[str, ...]:
    return (*SHORT, f"model.name=leaking:{model}", *(() if client is None else (f"client=leaking:{client}",)))


@pytest.mark.parametrize("model", leaking.STATEFUL)
def test_a_model_that_keeps_state_is_the_same_on_both_engines(tmp_path: Path, model: str) -> None:
    same(run_tiny(tmp_path / "a", *_with(model)), run_tiny(tmp_path / "b", *_with(model), *WORKERS))


@pytest.mark.parametrize("model", ["cumulative", "counting"])
def test_clients_whose_model_keeps_state_do_not_train_together(tmp_path: Path, model: str) -> None:
    same(run_tiny(tmp_path / "a", *_with(model)), run_tiny(tmp_path / "b", *_with(model), "engine=cohort"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Report]:
    """The run of the client that leaves nothing."""
    return cache(lambda: run_tiny(tmp_path_factory.mktemp("plain"), *_with("cumulative", "plain")))


@pytest.mark.parametrize("client", leaking.LEAVING)
def test_a_client_leaves_nothing_to_the_next_nor_to_the_evaluation(
    tmp_path: Path, undisturbed: Callable[[], Report], client: str
) -> None:
    before = settings()
    left = run_tiny(tmp_path, *_with("cumulative", client))
    assert settings() == before
    plain = undisturbed()
    assert all(torch.equal(plain.params[name], left.params[name]) for name in plain.params)
    assert [row["accuracy"] for row in plain.rounds] == [row["accuracy"] for row in left.rounds]
    assert not any(row["failures"] for row in left.rounds)


@pytest.mark.parametrize(
    "client", ["half", "surgery", "no_grad", "noise_of_global_generators", "noise_without_the_model"]
)
def test_a_client_that_leaves_something_is_the_same_on_both_engines(tmp_path: Path, client: str) -> None:
    options = _with("cumulative", client)
    same(run_tiny(tmp_path / "a", *options), run_tiny(tmp_path / "b", *options, *WORKERS))


def test_clients_draw_different_global_random_numbers(tmp_path: Path) -> None:
    one, other = (run_tiny(tmp_path / s, *_with("small", "noise_without_the_model"), f"seed={s}") for s in "12")
    name = next(iter(one.params))
    assert not torch.equal(one.params[name], other.params[name])


@pytest.mark.parametrize("client", leaking.WRITING)
def test_a_client_that_writes_into_its_task_is_refused_by_name(tmp_path: Path, client: str) -> None:
    for engine in ((), WORKERS):
        with pytest.raises(UserError, match=r"changed task.params or task.mask in place"):
            run_tiny(tmp_path / str(len(engine)), *_with("small", client), "cohort.size=1", *engine)


def test_one_client_that_writes_into_the_task_does_not_reach_the_others(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *_with("small", "one_writes_into_task"))
    honest = run_tiny(tmp_path / "b", *_with("small", "one_fails"))
    assert all(torch.equal(report.params[name], honest.params[name]) for name in honest.params)


def test_a_client_that_writes_into_its_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"changed the samples of ctx.data in place"):
        run_tiny(tmp_path, *_with("small", "writes_into_images"))


def test_what_cannot_be_put_back_is_refused_before_round_1(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Iterating.numbers is of type range_iterator"):
        run_tiny(tmp_path, *_with("iterating"))


@pytest.mark.parametrize("model", ["instance_norm", "sync_norm"])
def test_any_normalisation_layer_of_pytorch_is_averaged_or_measured(tmp_path: Path, model: str) -> None:
    for way in ("average", "recalibrate", "local"):
        options = (*_with(model), f"model.statistics={way}")
        same(run_tiny(tmp_path / way, *options), run_tiny(tmp_path / (way + "w"), *options, *WORKERS))


def test_statistics_that_nobody_can_measure_are_averaged_or_refused(tmp_path: Path) -> None:
    same(run_tiny(tmp_path / "a", *_with("own_norm")), run_tiny(tmp_path / "b", *_with("own_norm"), *WORKERS))
    with pytest.raises(UserError, match=r"norm \(OwnNorm\) has statistics that cannot be measured"):
        run_tiny(tmp_path, *_with("own_norm"), "model.statistics=recalibrate")


def test_a_model_is_put_back_as_it_was_built() -> None:
    model = leaking.Appending()
    built = ModuleState(model)
    model.history.append(1.0)
    model.fc.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones(10)
    model.fc.bias.register_hook(lambda grad: grad)
    model.fc.eval()
    model.double()
    model.extra = nn.Linear(1, 1)
    model.fc.weight.label = "mine"  # type: ignore[attr-defined]
    assert not built.is_as_built()
    built.put_back()
    assert built.is_as_built()
    assert (model.history, model.fc.bias.grad, model.fc.training) == ([], None, True)
    assert model.fc.weight.dtype == torch.float32
    assert model.fc.weight.requires_grad
    assert not hasattr(model, "extra")
    assert not hasattr(model.fc.weight, "label")
    assert model.fc.bias._backward_hooks is None


def test_a_view_of_a_weight_is_not_written() -> None:
    model = leaking.Small()
    model.view = model.fc.weight.detach().view(-1)  # type: ignore[assignment]
    built = ModuleState(model)
    with torch.no_grad():
        model.fc.weight.fill_(3.0)
    built.put_back()
    assert bool((model.fc.weight == 3.0).all())


def test_settings_are_put_back(tmp_path: Path) -> None:
    before = settings()
    os.chdir(tmp_path)
    os.environ["PATH"], os.environ["FL_SIM_NEW"] = "/nowhere", "1"
    warnings.simplefilter("error")
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    torch.set_autocast_enabled("cpu", True)
    kernels = "mkldnn", "flash_sdp", "mem_efficient_sdp", "math_sdp"
    enabled = [getattr(torch._C, f"_get_{kernel}_enabled")() for kernel in kernels]
    torch._C._set_mkldnn_enabled(not enabled[0])
    torch.backends.cuda.enable_math_sdp(not enabled[3])
    nn.modules.module.register_module_full_backward_hook(lambda module, inputs, outputs: None)
    assert settings() != before
    restore(before)
    assert settings() == before
    assert torch.zeros(1).device.type == "cpu"
    assert "FL_SIM_NEW" not in os.environ
    assert [getattr(torch._C, f"_get_{kernel}_enabled")() for kernel in kernels] == enabled
    assert not nn.modules.module._global_backward_hooks
    assert nn.modules.module._global_is_full_backward_hook is None


def test_global_generators_are_seeded_for_a_block_and_then_as_before() -> None:
    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = [drawn() for _ in range(2)]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = drawn()
    with seeded(2**63 + 5):
        inside = drawn()
        np.random.seed(3)
    assert [first, drawn()] == expected
    with seeded(2**63 + 5):
        assert drawn() == inside
