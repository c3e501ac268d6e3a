"""Runs that start from given weights, and pruning before the first round."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from federation import FOUR, TINY, WHOLE, run_tiny, same, tiny
from interruption import KillAfter, Killed
from safetensors.torch import save_file

from fl_sim import Experiment, codecs, run
from fl_sim.core.types import Params, UserError
from fl_sim.models import build, merged, prunable_names
from fl_sim.simulation import resume
from fl_sim.simulation.federation import Federation
from fl_sim.sparsity import keep_zeros
from fl_sim.sparsity.one_model import METHODS, Request
from fl_sim.training import snapshot
from fl_sim.training.model_file import open_saved, read, read_model
from strategies.presets import global_magnitude

STILL = "training.lr=1e-30"
"""A step that changes no weight; BatchNorm statistics follow the data."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return run_tiny(tmp_path_factory.mktemp("trained"), *WHOLE).folder


def given(path: Path) -> str:
    return f'model.weights="{path}"'


def test_the_server_starts_from_the_file_and_the_clients_know_only_the_seed(trained: Path, tmp_path: Path) -> None:
    warm, seeded = (
        Federation.build(tiny(tmp_path, given(trained))).first,
        Federation.build(tiny(tmp_path, *WHOLE)).first,
    )
    stored = read(trained).params
    assert all(torch.equal(value, stored[name]) for name, value in warm.start.items())
    assert torch.equal(warm.initial.flat, seeded.initial.flat)
    assert torch.equal(seeded.start.flat, seeded.initial.flat)
    report = run(tiny(tmp_path, given(trained), STILL))
    assert report.params is not None
    assert all(torch.equal(report.params[name], stored[name]) for name in prunable_names(warm.model))


def test_given_weights_are_sent_and_booked_like_any_others(trained: Path, tmp_path: Path) -> None:
    for wire in ("wire.downlink.content=parameters", "wire.downlink.content=difference", "wire.broadcast.density=0.1"):
        warm, seeded = (run_tiny(tmp_path, *extra, wire, "rounds=1") for extra in ([given(trained)], WHOLE))
        assert warm.summary["downlink_bytes"] >= 0.9 * warm.results.dense_total_bytes / 2
        assert warm.results.uplink_bytes == seeded.results.uplink_bytes


def test_a_run_is_named_by_the_content_of_its_weights(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copy(trained / "model.safetensors", tmp_path / "elsewhere.safetensors")
    other = tmp_path / "other.safetensors"
    saved = open_saved(trained)
    saved.write(METHODS["global"](saved.model, Request(0.5)), other)
    ids = {tiny(tmp_path, given(path)).id for path in (trained, trained / "model.safetensors", copy)}
    assert len(ids) == 1
    assert len(ids | {tiny(tmp_path).id, tiny(tmp_path, given(other)).id}) == 3


def test_what_is_frozen_and_comes_from_a_file_is_sent_once_to_each_client(trained: Path, tmp_path: Path) -> None:
    trains = ["model.trainable=batchnorm", "rounds=1"]
    report, seeded = run_tiny(tmp_path, *FOUR, given(trained), *trains), run_tiny(tmp_path, *FOUR, *trains)
    made, stored = read(report.folder).params, read(trained).params
    frozen = [name for name in stored if name not in (report.params or {})]
    assert frozen
    assert all(torch.equal(made[name], stored[name]) for name in frozen)
    assert report.summary["failures"] == seeded.summary["failures"]
    fixed = {name: stored[name] for name in frozen}
    size = len(codecs.encode(fixed, None, schema=codecs.Schema.of(fixed, [])))
    assert report.results.total_bytes - seeded.results.total_bytes == 4 * size


def test_heads_that_clients_keep_start_from_the_file_and_are_sent_once(trained: Path, tmp_path: Path) -> None:
    keeps = ["model.personal=head", "evaluate.clients=6", "data.clients=6", "cohort.size=6", "rounds=2"]
    report, seeded = run_tiny(tmp_path, given(trained), *keeps), run_tiny(tmp_path, *keeps)
    stored = read(trained).params
    head = {name: stored[name] for name in ("11.weight", "11.bias")}
    assert all(torch.equal(read(report.folder).params[name], value) for name, value in head.items())
    size = 16 + len(codecs.encode(head, None, schema=codecs.Schema.of(head, [])))
    assert report.results.total_bytes - seeded.results.total_bytes == 6 * size


def test_gates_are_put_on_a_model_that_was_trained_without(trained: Path, tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, given(trained), "gating.keep=0.5"))
    stored = read(trained).params
    assert all(torch.equal(federation.first.start[f"net.{name}"], value) for name, value in stored.items())
    gates = [name for name in federation.first.start if name.startswith("net.gates.")]
    assert gates
    assert all(torch.equal(federation.first.start[name], federation.first.initial[name]) for name in gates)


def test_a_pruned_model_goes_on_under_its_mask_and_teaches(trained: Path, tmp_path: Path) -> None:
    saved = open_saved(trained)
    path = saved.write(METHODS["lamp"](saved.model, Request(0.1)), tmp_path / "small.safetensors")
    report = run_tiny(tmp_path, given(path), "strategy=strategies.presets:pruned")
    stored = read(path).params
    assert report.params is not None
    for name in prunable_names(saved.model):
        assert torch.equal(report.params[name] != 0, stored[name] != 0)
    assert report.results.density.prunable == pytest.approx(0.1, abs=1e-4)
    assert report.results.uplink_bytes < 0.3 * report.results.dense_total_bytes / 2
    teacher = snapshot(read_model(path))
    assert all(torch.equal(teacher[name], value) for name, value in stored.items())


def test_a_model_without_zeros_is_trained_as_it_is(trained: Path) -> None:
    weights = {"w": torch.tensor([1.0, -2.0])}
    assert keep_zeros(0, None, weights, None) is None
    assert keep_zeros(5, None, {"w": torch.zeros(2)}, None) is None
    mask = keep_zeros(0, None, {"w": torch.tensor([0.0, -2.0])}, None)
    assert mask is not None
    assert mask["w"].tolist() == [False, True]
    assert keep_zeros(1, mask, weights, None) is mask


@pytest.mark.parametrize(
    "method",
    [
        ["strategy.target=strategies.presets:global_magnitude"],
        ["strategy.target=strategies.presets:rate_distortion", "strategy.images=4", "strategy.levels=5"],
    ],
)
def test_pruning_before_the_first_round_makes_every_upload_sparse(
    trained: Path, tmp_path: Path, method: list[str]
) -> None:
    start = [given(trained), *method, "strategy.density=0.1", "rounds=1"]
    early, late = run_tiny(tmp_path, *start, "strategy.at=0"), run_tiny(tmp_path, *start, "strategy.at=1")
    assert [row["density"] for row in early.rounds] == pytest.approx([0.1], abs=1e-4)
    assert early.results.uplink_bytes < 0.3 * late.results.uplink_bytes
    asked = early.ledger.total(by=("round",), where={"phase": "query"})
    assert [number for (number,) in asked] == ([0] if "rate_distortion" in method[0] else [])
    assert (
        early.results.total_bytes == sum(early.ledger.sent.values()) == sum(early.ledger.total(by=("round",)).values())
    )


def test_one_shot_pruning_of_given_weights_is_that_of_the_command(trained: Path, tmp_path: Path) -> None:
    report = run_tiny(
        tmp_path, given(trained), STILL, "strategy.target=strategies.presets:global_magnitude", "strategy.at=0"
    )
    saved = open_saved(trained)
    expected = snapshot(METHODS["global"](saved.model, Request(0.1)))
    assert report.params is not None
    assert all(torch.equal(report.params[name], expected[name]) for name in prunable_names(saved.model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p | {"11.weight": torch.ones(3, 64), "11.bias": torch.ones(3)}, [
            "'11.weight' has shape (3, 64) in the file, (10, 64) in this run's model, '11.bias' has shape (3,) in the file, "
            "(10,) in this run's model: not loaded, so that they start from the seed"
        ]),
        (lambda p: {n: v for n, v in p.items() if not n.startswith("11.")}, [
            "the file lacks 11.weight, 11.bias: they start from the seed"
        ]),
        (lambda p: {f"old.{n}" if n.startswith(("1.", "11.")) else n: v for n, v in p.items()}, [
            "the file lacks 1.weight, 1.bias, 1.running_mean, 1.running_var and 2 more: they start from the seed",
            "the file also has old.1.bias, old.1.running_mean, old.1.running_var, old.1.weight and 2 more: not used",
        ]),
        (lambda p: p, []),
    ],
    ids=["another head", "no head", "other names", "all of it"],
)  # fmt: skip
def test_what_fits_is_loaded_and_what_does_not_is_said(
    change: Callable[[Params], Params], said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = {n: v.clone() for n, v in snapshot(build("cnn_bn", in_channels=1, image_size=8, seed=9)).items()}
    save_file(params := dict(change(built)), path := tmp_path / "given.safetensors")
    track = Federation.build(tiny(tmp_path, given(path))).first
    assert [record.getMessage() for record in caplog.records] == [f"model.weights: {path}: {line}" for line in said]
    for name, value in track.start.items():
        fits = name in params and params[name].shape == value.shape
        assert torch.equal(value, params[name] if fits else track.initial[name])


def test_random_weights_of_a_file_are_trained_from_where_they_are(trained: Path, tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, given(trained), "model.trainable=random"), quiet=True).first
    whole = merged(snapshot(federation.complete(federation.start)), model=federation.model)
    assert all(torch.equal(whole[name], value) for name, value in read(trained).params.items())


def test_wrong_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    save_file(dict(snapshot(build("resnet8"))), tmp_path / "other.safetensors")
    broken = {n: v.clone() for n, v in snapshot(build("cnn_bn", in_channels=1, image_size=8)).items()}
    broken["0.weight"][0] = torch.nan
    save_file(broken, tmp_path / "nan.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name, words in {
        "other.safetensors": "lacks",
        "nan.safetensors": "'0.weight' holds NaN",
        "text.safetensors": "not a safetensors file",
        "none.safetensors": "no such file",
        "": "not a finished run",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            run(Experiment.from_tree(TINY, [f'out="{tmp_path}"', given(tmp_path / name)]))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"strategy\.at = 0"):
        global_magnitude(at=0, distil={})


PROJECTED = ("model.name=worlds_apart:buffer_by_numpy", "training.steps=1")
"""A model on a fixed random projection, which is a buffer that training leaves alone: another one for each seed."""


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_a_saved_model_has_the_constants_that_its_seed_drew(tmp_path: Path, kind: str) -> None:
    report = run_tiny(tmp_path, f"model.name=worlds_apart:{kind}_by_numpy", "training.steps=1", "seed=3")
    federation = Federation.build(tiny(tmp_path, f"model.name=worlds_apart:{kind}_by_numpy", "seed=3"))
    opened = open_saved(report.folder, name=f"worlds_apart:{kind}_by_numpy").model
    assert torch.equal(opened.projection, federation.first.model.projection)
    images, labels = next(federation.data.test.batches(1000))
    right = (opened(images).argmax(1) == labels).float().mean().item()
    assert right == pytest.approx(report.summary["accuracy"]["final"], abs=1e-6)


def test_constants_of_a_file_take_the_place_of_the_builders_and_are_sent_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_tiny(tmp_path / "first", *PROJECTED, "seed=3")
    again = run_tiny(tmp_path / "again", *PROJECTED, *FOUR, "seed=0", "rounds=1", given(first.folder))
    alone = run_tiny(tmp_path / "alone", *PROJECTED, *FOUR, "seed=0", "rounds=1")
    Federation.build(tiny(tmp_path, *PROJECTED, "seed=0", given(first.folder)))
    assert "other values than the builder in projection: the file's are used, and sent once" in caplog.text
    stored = read(again.folder).params
    assert torch.equal(stored["projection"], read(first.folder).params["projection"])
    assert not torch.equal(stored["projection"], read(alone.folder).params["projection"])
    sent = {"projection": stored["projection"]}
    size = len(codecs.encode(sent, None, schema=codecs.Schema.of(sent, [])))
    told = again.results.total_bytes - alone.results.total_bytes
    assert told == 4 * (size + 16)  # the hash that proves it, too


@pytest.mark.parametrize("engine", ["inline", "workers", "cohort"])
def test_clients_that_got_a_files_constants_before_a_kill_have_them_in_the_resumed_run(
    tmp_path: Path, engine: str
) -> None:
    first = run_tiny(tmp_path / "first", *PROJECTED, "seed=3")
    options = (*PROJECTED, *FOUR, given(first.folder), "rounds=2", "checkpoint.every=1", f"engine={engine}")
    whole = run_tiny(tmp_path / "whole", *options)
    with pytest.raises(Killed):
        run(tiny(tmp_path / "parts", *options), KillAfter(1, 1))
    resumed = resume(tiny(tmp_path / "parts", *options))
    same(whole, resumed)
    assert not any(resumed.summary["failures"].values())


def test_constants_of_a_file_that_are_the_builders_cost_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_tiny(tmp_path / "first", *PROJECTED)
    Federation.build(tiny(tmp_path, *PROJECTED, given(first.folder)))
    assert "projection" not in caplog.text
    again = run_tiny(tmp_path / "again", *PROJECTED, "rounds=1", given(first.folder))
    alone = run_tiny(tmp_path / "alone", *PROJECTED, "rounds=1")
    assert again.results.total_bytes == alone.results.total_bytes


def test_a_frozen_part_of_half_precision_that_comes_from_a_file_is_recognised(tmp_path: Path) -> None:
    options = ("model.name=worlds_apart:half_frozen", "training.steps=1", "rounds=1")
    first = run_tiny(tmp_path / "first", *options, "seed=3")
    again = run_tiny(tmp_path / "again", *options, "seed=0", given(first.folder))
    assert not any(again.summary["failures"].values())
    assert torch.equal(read(again.folder).params["1.weight"], read(first.folder).params["1.weight"])
