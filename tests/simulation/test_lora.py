"""LoRA federations: the bytes of a round are the adapters' encoding, the base travels once where a file holds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federation import run_tiny, same, tiny
from interruption import KillAfter, Killed
from safetensors.torch import load_file, save_file

from fl_sim import Report, UserError, codecs, run
from fl_sim.models import build
from fl_sim.models.parameters import snapshot
from fl_sim.simulation.federation import Federation

LORA = ("model.adapter.rank=2", "model.adapter.train=head", "model.statistics=local", "training.steps=2")
MESSAGES = 2 * 3
"""Of one direction: two rounds, three clients."""


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Adapters beside a base that the seed makes."""
    return run_tiny(tmp_path_factory.mktemp("seeded"), *LORA)


@pytest.fixture(scope="module")
def base(seeded: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of other weights than the seed's, with another head."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    params = {n: v.clone() for n, v in snapshot(build("cnn_bn", in_channels=1, image_size=8, seed=9)).items()}
    params["11.weight"], params["11.bias"] = torch.ones(3, 64), torch.ones(3)
    save_file(params, path)
    return path


@pytest.fixture(scope="module")
def given(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Adapters beside a base that a file holds."""
    return run_tiny(tmp_path_factory.mktemp("given"), *LORA, f'model.weights="{base}"')


def test_a_round_costs_what_the_encoded_adapters_cost(seeded: Report) -> None:
    adapters = {name: value for name, value in seeded.params.items() if ".lora_" in name}
    assert set(seeded.params) - set(adapters) == {"11.weight", "11.bias"}
    shapes = {"0": (16, 9), "3": (32, 144), "6": (64, 288)}
    assert sum(v.numel() for v in adapters.values()) == 2 * sum(rows + columns for rows, columns in shapes.values())
    matrices = [*adapters, "11.weight"]
    encoded = len(codecs.encode(seeded.params, None, schema=codecs.Schema.of(seeded.params, matrices)))
    sent = seeded.ledger.total(by=("direction",))
    told = 16 * len({row["client"] for row in seeded.ledger.to_table().to_pylist()})
    assert sent == {("up",): MESSAGES * encoded, ("down",): MESSAGES * encoded + told}
    assert seeded.results.trainable_params == sum(v.numel() for v in seeded.params.values())
    values = seeded.ledger.total(where={"section": "values", "direction": "up"})
    assert values[()] == MESSAGES * 4 * sum(seeded.params[name].numel() for name in matrices)


def test_a_base_of_a_file_is_sent_once_to_each_client(seeded: Report, given: Report, base: Path) -> None:
    untravelled = {n: v for n, v in load_file(base).items() if not n.startswith("11.")}
    size = len(codecs.encode(untravelled, None, schema=codecs.Schema.of(untravelled, [], buffers=[])))
    rows = [row for row in given.ledger.to_table().to_pylist() if row["section"] == "auxiliary"]
    assert [row["payload_bytes"] for row in rows] == [16 + size] * len(rows)
    assert (
        len({row["client"] for row in rows})
        == len(rows)
        == len({r["client"] for r in given.ledger.to_table().to_pylist()})
    )
    assert given.results.uplink_bytes == seeded.results.uplink_bytes
    assert given.results.downlink_bytes - seeded.results.downlink_bytes == len(rows) * size


def test_the_saved_model_is_the_base_with_what_was_learnt(given: Report, base: Path) -> None:
    saved, before = load_file(given.folder / "model.safetensors"), load_file(base)
    assert saved.keys() == before.keys()
    assert not torch.equal(saved["11.weight"][:3], before["11.weight"])
    learnt = [(n, saved[f"{n}.weight"] - before[f"{n}.weight"]) for n in ("0", "3", "6")]
    for layer, change in learnt:
        assert torch.linalg.matrix_rank(change.flatten(1), rtol=1e-3) == 2
        a, b = (given.params[f"{layer}.parametrizations.weight.0.lora_{part}"] for part in "ab")
        assert torch.allclose(change.flatten(1), b @ a, atol=1e-6)
    assert all(torch.equal(saved[name], before[name]) for name in ("1.weight", "4.bias", "7.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["workers", "ray"])
def test_every_engine_agrees(given: Report, base: Path, engine: str, tmp_path: Path) -> None:
    same(
        given,
        run_tiny(tmp_path, *LORA, f'model.weights="{base}"', f"engine={engine}", "workers.count=2", "ray.workers=2"),
    )


def test_the_cohort_engine_agrees_up_to_rounding(seeded: Report, tmp_path: Path) -> None:
    other = run_tiny(tmp_path, *LORA, "engine=cohort")
    assert all(torch.allclose(seeded.params[name], other.params[name], atol=1e-4) for name in seeded.params)
    assert seeded.results.total_bytes == other.results.total_bytes


def test_a_stopped_run_goes_on_without_a_second_base(given: Report, base: Path, tmp_path: Path) -> None:
    experiment = tiny(tmp_path, *LORA, f'model.weights="{base}"')
    with pytest.raises(Killed):
        run(experiment, KillAfter(1))
    same(given, run(experiment, resume=True))


def test_adapters_travel_sparse_and_in_small_types(seeded: Report, tmp_path: Path) -> None:
    coding = ("wire.uplink.values=int8", "wire.uplink.content=difference")
    report = run_tiny(tmp_path, *LORA, *coding, "client.target=clients.presets:topk", "client.density=0.5")
    values = [r.ledger.total(where={"section": "values", "direction": "up"})[()] for r in (seeded, report)]
    assert values[1] < values[0] / 7
    assert report.summary["failures"] == seeded.summary["failures"]


def test_the_identity_knows_adapter_and_base(base: Path, tmp_path: Path) -> None:
    asked = [(), LORA, (*LORA, "model.adapter.alpha=4"), (*LORA, f'model.weights="{base}"')]
    assert len({tiny(tmp_path, *each).id for each in asked}) == 4
    hashes = {Federation.build(tiny(tmp_path, *each), quiet=True).first.exchange.frozen for each in asked}
    assert len(hashes) == 3  # alpha changes no frozen weight


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.trainable=head"], "model: trainable = 'head': adapters are what is trained"),
        (["gating.keep=0.5"], "model.adapter: not with [gating]"),
        (["strategy=strategies.presets:global_magnitude"], "model.adapter: not with a strategy that prunes"),
        (["strategy=strategies.presets:pruned"], "model.adapter: not with a strategy that prunes"),
        (["strategy=strategies.presets:rate_distortion"], "model.adapter: not with a strategy that prunes"),
        (['model.adapter.targets=["nothing"]'], "'nothing' selects no weight"),
        (["model.adapter.rank=16"], "model.adapter.rank = 16: '0.weight' has shape (16, 1, 3, 3)"),
    ],
)
def test_what_adapters_do_not_go_with_is_one_line(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tiny(tmp_path, *LORA, *overrides))
    assert words in str(caught.value)
