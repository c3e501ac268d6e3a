"""Distillation on the server: on whose data, who teaches, under the mask, at no byte on the wire."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from federation import run_tiny, tiny
from safetensors.torch import save_file

from clients.distillation import TeacherFile
from clients.presets import distillation, feature_distillation
from fl_sim import Report
from fl_sim.communication.ledger import Ledger
from fl_sim.core.seeding import Purpose, generator
from fl_sim.core.types import FlatParams, Task, Update, UserError
from fl_sim.models import build
from fl_sim.runtime.server_context import Accounting, Sampling, ServerContext
from fl_sim.simulation.federation import Federation
from fl_sim.training import Training, load, logits, snapshot
from fl_sim.training.model_file import read_model, write_model
from strategies.distillation import Lab, ensemble, server_distillation
from strategies.server_step import ServerState

PROXY = "data.proxy=0.1"
PRUNING = ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.05"]
STEPS = "strategy.distil.steps=20"
AVERAGING = ["strategy.target=strategies.presets:fedavg", 'strategy.distil.teacher="ensemble"']


def same(a: Report, b: Report) -> bool:
    return bool(a.summary["params_sha256"] == b.summary["params_sha256"])


def lab(tmp_path: Path, *overrides: str) -> tuple[Federation, Lab]:
    federation = Federation.build(tiny(tmp_path, *overrides))
    proxy = federation.proxy()
    assert proxy is not None
    context = ServerContext(
        exchange=federation.first.exchange,
        initial=federation.first.initial,
        model=partial(load, federation.first.model),
        sampling=Sampling(cohort_size=4, seed=0),
        accounting=Accounting(Ledger()),
        proxy=proxy,
    )
    return federation, Lab(context, proxy, ServerState(federation.first.exchange.schema, federation.first.initial))


def test_the_proxy_is_disjoint_from_clients_validation_and_test(tmp_path: Path) -> None:
    plain, held = (Federation.build(tiny(tmp_path, *options)) for options in ([], [PROXY]))
    assert held.data.proxy is not None
    assert torch.equal(held.data.validation.images, plain.data.validation.images)
    assert torch.equal(held.data.test.images, plain.data.test.images)
    assert len(held.data.train) + len(held.data.proxy) == len(plain.data.train)
    assert sum(len(part) for part in held.partitions) == len(held.data.train)
    both = torch.cat([held.data.train.images, held.data.proxy.images]).flatten(1).tolist()
    assert sorted(both) == sorted(plain.data.train.images.flatten(1).tolist())


def test_distilling_needs_data_on_the_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.proxy"):
        run_tiny(tmp_path, *PRUNING, STEPS)


@pytest.mark.parametrize("proxy", [PROXY, "data.noise=100"])
def test_after_pruning_masked_weights_stay_zero_and_no_byte_is_added(tmp_path: Path, proxy: str) -> None:
    options = [*PRUNING, proxy, "strategy.at=2", "rounds=2"]  # Pruned last, so that nothing masks the result again.
    without = run_tiny(tmp_path / "without", *options)
    taught, again = (run_tiny(tmp_path / name, *options, STEPS) for name in ("a", "b"))
    assert same(taught, again)
    assert not same(taught, without)
    assert taught.summary["density"] == without.summary["density"]
    schema = Federation.build(tiny(tmp_path)).first.exchange.schema
    alive = sum(int((taught.params[name] != 0).sum()) for name in schema.prunable)
    assert alive <= round(0.05 * schema.prunable_size)
    assert taught.ledger.total(by=("round", "section")) == without.ledger.total(by=("round", "section"))


def test_what_is_left_of_a_pruned_model_learns_from_the_whole(tmp_path: Path) -> None:
    """Pruned at the end of the last round: the difference of the two runs is the distillation alone."""
    options = ["data.proxy=0.2", "rounds=3", "data.partition=iid", "training.steps=7"]
    pruning = [*PRUNING, "strategy.density=0.2", "strategy.at=3", *options]
    before = run_tiny(tmp_path / "before", *pruning)
    after = run_tiny(tmp_path / "after", *pruning, "strategy.distil.steps=60", "strategy.distil.alpha=1.0")
    dense = run_tiny(tmp_path / "dense", *options)
    _, bench = lab(tmp_path, "data.proxy=0.2")
    wanted = bench.logits(dict(dense.params)).log_softmax(1)
    gaps = []
    for run in (before, after):
        own = bench.logits(dict(run.params)).log_softmax(1)
        gaps.append(float(torch.nn.functional.kl_div(own, wanted, reduction="batchmean", log_target=True)))
    assert gaps[1] < 0.5 * gaps[0]


def test_the_aggregate_has_nothing_to_teach_itself(tmp_path: Path) -> None:
    taught = run_tiny(tmp_path / "taught", "strategy.target=strategies.presets:fedavg", STEPS, PROXY)
    assert same(taught, run_tiny(tmp_path / "plain", PROXY))


def test_the_ensemble_is_the_mean_of_the_clients_logits(tmp_path: Path) -> None:
    federation, bench = lab(tmp_path, PROXY)
    schema = federation.first.exchange.schema
    rng = generator(1, Purpose.CLIENT)
    updates = [
        Update(
            schema.view(federation.first.initial.flat + 0.05 * torch.randn(schema.size, generator=rng).abs()),
            10 * (k + 1),
        )
        for k in range(3)
    ]
    mask = {n: torch.rand(federation.first.initial[n].shape, generator=rng) < 0.5 for n in schema.prunable}
    updates[2] = Update(updates[2].params, 7, mask)
    arriving, asked = ensemble(bench, iter(updates))
    assert list(arriving) == updates
    known = [dict(update.params) for update in updates]
    for name, alive in mask.items():
        known[2][name] = torch.where(alive, known[2][name], federation.first.initial[name])
    expected = torch.stack([bench.logits(params) for params in known]).mean(0)
    torch.testing.assert_close(asked(federation.first.initial), expected)


def test_an_ensemble_teaches_every_round(tmp_path: Path) -> None:
    plain = run_tiny(tmp_path / "plain", PROXY)
    taught = run_tiny(tmp_path / "taught", *AVERAGING, STEPS, PROXY)
    assert not same(plain, taught)
    assert taught.ledger.to_table().equals(plain.ledger.to_table())


def test_unlabelled_images_take_the_teachers_first_choice(tmp_path: Path) -> None:
    """So labels alone (alpha = 0) already move a model towards its teacher; another draw of noise is another run."""
    options = [*PRUNING, STEPS, "strategy.distil.alpha=0.0"]
    first, more = (run_tiny(tmp_path / str(count), *options, f"data.noise={count}") for count in (50, 60))
    assert not same(first, more)
    split = Federation.build(tiny(tmp_path, "data.noise=500")).proxy()
    assert split is not None
    assert set(split.labels.tolist()) == {-1}
    batch, _ = next(split.batches(500))
    assert batch.shape == (500, 1, 8, 8)
    assert abs(float(batch.mean())) < 0.2


# -- model files -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_file_that_teaches_another_architecture(
    tmp_path: Path, finished: Callable[..., Report]
) -> None:
    path = finished().folder / "model.safetensors"
    small = ["model.name=resnet8", "model.width=0.25", "rounds=1"]
    on_clients = ["client.target=clients.presets:distillation", f'client.teacher="{path}"']
    on_server = ["strategy.target=strategies.presets:fedavg", STEPS, f'strategy.distil.teacher="{path}"']
    plain = run_tiny(tmp_path / "plain", *small, PROXY)
    for name, options in (("clients", on_clients), ("server", on_server)):
        taught = run_tiny(tmp_path / name, *small, PROXY, *options)
        assert taught.summary["failures"]["raised"] == 0
        assert not same(plain, taught)


def test_a_model_file_gives_back_its_model(tmp_path: Path) -> None:
    model = build("resnet8", in_channels=1, width=0.5, seed=3)
    path = tmp_path / "m.safetensors"
    write_model(path, snapshot(model), {"name": "resnet8", "in_channels": 1, "width": 0.5})
    read = read_model(path)
    images = torch.randn(3, 1, 8, 8, generator=generator(0, Purpose.DATA))
    with torch.no_grad():
        assert torch.equal(read(images), model.eval()(images))
    assert not any(p.requires_grad for p in read.parameters())
    assert not read.training


def test_missing_and_wrong_model_files_are_refused_in_one_line(tmp_path: Path) -> None:
    for make in (distillation, feature_distillation):
        with pytest.raises(UserError, match="no such file"):
            make(training=Training(), teacher=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="no such file"):
        server_distillation(teacher="ensembel")
    (tmp_path / "noise.safetensors").write_bytes(b"not a model at all")
    weights = {"w": torch.zeros(2)}
    save_file(weights, tmp_path / "plain.safetensors")
    write_model(tmp_path / "unfit.safetensors", weights, {"name": "resnet8"})
    write_model(tmp_path / "lacking.safetensors", {}, {"name": "resnet8"})
    write_model(tmp_path / "foreign.safetensors", {}, {"name": "os:getcwd"})
    for name in ("noise", "plain", "unfit", "lacking", "foreign"):
        with pytest.raises(UserError, match=rf"{name}\.safetensors") as caught:
            read_model(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


def test_a_client_keeps_one_teacher_for_all_its_rounds(tmp_path: Path) -> None:
    federation, _ = lab(tmp_path, PROXY)
    path = tmp_path / "m.safetensors"
    write_model(path, federation.first.initial, federation.first.described)
    teacher = TeacherFile(path)
    task = Task(1, FlatParams.pack(dict(federation.first.initial)))

    class Context:
        data = federation.data.train

    first, second = (teacher(task, Context()) for _ in range(2))  # type: ignore[arg-type]
    assert first is second
    assert torch.equal(
        logits(first, federation.data.test),
        logits(load(federation.first.model, federation.first.initial), federation.data.test),
    )
