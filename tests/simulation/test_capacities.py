"""Clients of different capacity: who has which model, what travels to whom, and what the models learn of each other."""

from __future__ import annotations

import tomllib
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from federation import FOUR, run_tiny, tiny

from fl_sim import Experiment, Report, codecs
from fl_sim.bench.fidelity import divergence
from fl_sim.communication.ledger import Ledger
from fl_sim.core.types import UserError
from fl_sim.runtime.server_context import Accounting, Sampling, ServerContext
from fl_sim.simulation.capacity_groups import cohort_sizes, labels, members, variants
from fl_sim.simulation.federation import Federation
from fl_sim.training import Training, load, logits
from fl_sim.training.losses import Distillation
from fl_sim.training.model_file import read_model
from strategies.distillation import LearnFromAll
from strategies.server_step import ServerState

MODELS = ["model.name=resnet8", "model.width=0.25", "data.clients=8", "data.proxy=0.1"]
TWO = [*MODELS, 'capacities=[{name = "resnet8", width = 0.125, share = 0.5}]']
TAUGHT = ["strategy.target=strategies.presets:mixed_capacities", "strategy.steps=10"]
SMALL = "resnet8x0.125"


def small(report: Report) -> Path:
    return report.folder / f"model-{SMALL}.safetensors"


def weights(path: Path) -> list[torch.Tensor]:
    return [p.detach() for p in read_model(path).parameters()]


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


def test_every_client_has_one_model_and_the_config_survives_its_toml(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, *FOUR, *TWO)
    parts = members(experiment)
    assert sorted(sum(parts, ())) == list(range(8))
    assert [len(part) for part in parts] == [4, 4]
    assert members(tiny(tmp_path, *FOUR, *TWO, "seed=1")) != parts
    assert cohort_sizes(experiment) == [2, 2]
    assert [(v.model.name, v.model.width) for v in variants(experiment)] == [("resnet8", 0.25), ("resnet8", 0.125)]
    assert labels(experiment) == ["resnet8x0.25", SMALL]
    again = Experiment.from_tree(tomllib.loads(experiment.to_toml()))
    assert again == experiment
    assert again.id == experiment.id != tiny(tmp_path, *FOUR, *MODELS).id


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('capacities=[{name = "resnet8", share = 0.01}]', "each model needs at least 1"),
        ('capacities=[{name = "resnet8", share = 0.5}, {name = "resnet14", share = 0.5}]', "each model needs"),
        ('capacities=[{name = "resnet9"}]', "'resnet9'"),
        ('capacities=[{nmae = "resnet8"}]', "capacities"),
        ("wire.record_masks=true", r"wire\.record_masks: not with capacities"),
        ("data.proxy=0.0", r"set data\.proxy"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run_tiny(tmp_path, *TWO, *TAUGHT, override)


def test_what_an_upload_carries_is_a_share_of_its_clients_own_model(tmp_path: Path) -> None:
    assert run_tiny(tmp_path, *FOUR, *TWO).results.density.uplink_mean == 1.0
    sparse = ["client.target=clients.presets:topk", "client.density=0.1"]
    assert run_tiny(tmp_path, *FOUR, *TWO, *sparse).results.density.uplink_mean == pytest.approx(0.1, rel=0.01)


def test_nothing_of_one_model_travels_to_the_clients_of_another(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *FOUR, *TWO)
    experiment = tiny(tmp_path, *FOUR, *TWO)
    for track, clients in zip(Federation.build(experiment).tracks, members(experiment), strict=True):
        payload = len(codecs.encode(track.initial, None, schema=track.exchange.schema))
        rows = [r for r in report.ledger.to_table().to_pylist() if r["client"] in clients]
        assert sum(r["payload_bytes"] for r in rows) == 2 * 2 * 2 * payload
    assert report.summary["saving"] == 0.0
    assert [row["clients"] for row in report.rounds] == [4, 4]
    assert {"accuracy", f"accuracy/{SMALL}", f"train_loss/{SMALL}"} <= report.rounds[-1].keys()


def test_a_round_takes_as_long_as_the_slowest_client_of_any_model(tmp_path: Path) -> None:
    """The large model of some clients takes longer than the small one of others."""
    linked = ("network.links={3G=1}", "rounds=2")
    report = run_tiny(tmp_path, *TWO, *linked)
    large = run_tiny(tmp_path, *MODELS, *linked)
    assert [row["simulated_s"] for row in report.rounds] == [row["simulated_s"] for row in large.rounds]
    assert not [name for name in report.rounds[0] if name.startswith("simulated_s/")]


def test_models_apart_are_two_federations(tmp_path: Path) -> None:
    """The first model's clients train as they would alone; the other model does not know of them."""
    two = run_tiny(tmp_path / "two", *TWO)
    other = run_tiny(tmp_path / "other", *MODELS, 'capacities=[{name = "mlp", share = 0.5}]')
    assert two.summary["params_sha256"] == other.summary["params_sha256"]


def test_models_learn_from_each_other_at_no_byte(tmp_path: Path) -> None:
    apart, taught = run_tiny(tmp_path / "apart", *TWO), run_tiny(tmp_path / "taught", *TWO, *TAUGHT)
    assert taught.ledger.to_table().equals(apart.ledger.to_table())
    assert taught.summary["params_sha256"] != apart.summary["params_sha256"]
    assert not same(small(taught), small(apart))
    proxy = Federation.build(tiny(tmp_path, *TWO)).proxy()
    assert proxy is not None
    gaps = []
    for report in (apart, taught):
        large, less = (logits(read_model(path), proxy) for path in (report.folder / "model.safetensors", small(report)))
        gaps.append(divergence(less, large))
    assert gaps[1] < gaps[0]


def test_clients_of_each_capacity_distil_from_the_model_they_received(tmp_path: Path) -> None:
    """At no byte; the first round has no teacher, so that the second tells the two runs apart."""
    wish = ["client.target=clients.presets:distillation", "client.alpha=0.5"]
    plain, taught = run_tiny(tmp_path / "plain", *TWO), run_tiny(tmp_path / "taught", *TWO, *wish)
    assert taught.ledger.to_table().select(["payload_bytes"]) == plain.ledger.to_table().select(["payload_bytes"])
    for label in ("", f"/{SMALL}"):
        losses = [[row[f"train_loss{label}"] for row in report.rounds] for report in (plain, taught)]
        assert losses[0][0] == losses[1][0]
        assert losses[0][1] != losses[1][1]


@dataclass(frozen=True)
class Watched(Distillation):
    """Keeps what it is told of the teacher."""

    told: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.told.append(teacher)
        return super().__call__(student, teacher, labels)


def test_the_teacher_is_the_mean_of_all_models(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, *TWO))
    tracks, proxy = federation.tracks, federation.proxy()
    assert proxy is not None
    expected = torch.stack([logits(track.model, proxy) for track in tracks]).mean(dim=0)
    contexts = [
        ServerContext(
            exchange=track.exchange,
            initial=track.initial,
            model=partial(load, deepcopy(track.model)),
            sampling=Sampling(cohort_size=2, seed=0),
            accounting=Accounting(Ledger()),
            proxy=proxy,
        )
        for track in tracks
    ]
    watched = Watched()
    states = [ServerState(track.exchange.schema, track.initial) for track in tracks]
    training = Training(lr=0.01, steps=-(-len(proxy) // 32), batch_size=32)
    results = LearnFromAll(watched, training)(list(zip(contexts, states, strict=True)))
    told = torch.cat(watched.told)
    assert told.shape == (2 * len(proxy), 10)
    # One pass over the data for each model, in an order of its own.
    for half in told.split(len(proxy)):
        torch.testing.assert_close(half.sort(dim=0).values, expected.sort(dim=0).values)
    for params, state in zip(results, states, strict=True):
        assert params.keys() == state.params.keys()
        assert any(not torch.equal(params[name], state.params[name]) for name in params)


def test_masks_are_each_models_own(tmp_path: Path) -> None:
    pruning = ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2", "strategy.distil.steps=5"]
    report = run_tiny(tmp_path, *TWO, *pruning, "rounds=3")
    for path in (report.folder / "model.safetensors", small(report)):
        model = read_model(path)
        prunable = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1])
        assert float((prunable != 0).float().mean()) == pytest.approx(0.2, abs=0.01)
