"""Personalised methods: laws that tie each to FedAvg, and references of twenty lines that know none of the package's loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from federation import run_tiny, same, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clients.personal import OWN
from clients.presets import ditto, fedrep, fine_tuned
from fl_sim import Report, UserError, run
from fl_sim.core.types import Params, Task
from fl_sim.models import build
from fl_sim.models.parameters import load, snapshot
from fl_sim.simulation.client_side import host_of
from fl_sim.simulation.federation import Federation
from fl_sim.training import Training
from fl_sim.training.client import Client, ClientContext

WHOLE = ("model.name=mlp", "cohort.size=6", "evaluate.clients=6", "training.batch_size=4096", "training.steps=1")
"""All clients, one step of all their samples a round: nothing is drawn, so that a reference needs no generator."""


def step(
    model: nn.Module, batch: tuple[Tensor, Tensor], lr: float, names: Callable[[str], bool] = lambda name: True
) -> None:
    """One step of gradient descent on the named parameters."""
    chosen = [p for name, p in model.named_parameters() if names(name)]
    grads = torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), chosen)
    with torch.no_grad():
        for parameter, grad in zip(chosen, grads, strict=True):
            parameter -= lr * grad


def samples(federation: Federation, client: int) -> tuple[Tensor, Tensor]:
    split = federation.data.train.subset(federation.partitions[client])
    return next(split.batches(len(split)))


def accuracies(federation: Federation, models: list[nn.Module]) -> tuple[float, float]:
    """Of each client's model on its own test samples: (mean weighted by samples, worst client's)."""
    host, right, total = host_of(federation, federation.first), [], []
    for client, model in enumerate(models):
        split = host.test_of(client)
        inputs, labels = next(split.batches(len(split)))
        right.append(int((model(inputs).argmax(1) == labels).sum()))
        total.append(len(labels))
    return sum(right) / sum(total), min(r / t for r, t in zip(right, total, strict=True))


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_tiny(tmp_path_factory.mktemp("fedavg"), *WHOLE)


def head(name: str) -> bool:
    return name.startswith("3.")


def test_fedrep_is_the_papers_algorithm(tmp_path: Path) -> None:
    """First the head, then the representation; the server averages representations by samples."""
    asked = (*WHOLE, "model.personal=head", "client=clients.presets:fedrep", "client.head_steps=2")
    report, federation = run_tiny(tmp_path, *asked), Federation.build(tiny(tmp_path, *asked), quiet=True)
    own = [build("mlp", in_channels=1, image_size=8) for _ in range(6)]
    sizes = torch.tensor([len(p) for p in federation.partitions]) / sum(map(len, federation.partitions))
    for _ in range(2):
        for client, model in enumerate(own):
            for _ in range(2):
                step(model, samples(federation, client), 0.1, head)
            step(model, samples(federation, client), 0.1, lambda name: not head(name))
        mean = {
            n: sum(s * dict(m.named_parameters())[n].detach() for s, m in zip(sizes, own, strict=True))
            for n in report.params
        }
        for model in own:
            load(model, mean)  # type: ignore[arg-type]
    assert set(report.params) == {"1.weight", "1.bias"}
    assert all(torch.allclose(report.params[n], mean[n], atol=1e-5) for n in report.params)  # type: ignore[arg-type]
    found, worst = accuracies(federation, own)
    assert report.rounds[-1]["clients_accuracy"] == pytest.approx(found, abs=2e-3)
    assert report.results.clients is not None
    assert report.results.clients.worst == pytest.approx(worst, abs=1e-2)
    assert report.results.clients.mean == report.rounds[-1]["clients_accuracy"]


def test_fedper_is_fedavg_with_a_head_that_is_kept(tmp_path: Path) -> None:
    one, other = (
        run_tiny(tmp_path, *WHOLE, "model.personal=head", *more) for more in ([], ["client=clients.presets:fedper"])
    )
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert one.rounds[-1]["clients_accuracy"] == other.rounds[-1]["clients_accuracy"]


def test_fedbn_keeps_batchnorm_whole(tmp_path: Path) -> None:
    keeps = ("model.personal=batchnorm", "model.statistics=local", "evaluate.clients=4", "client=clients.presets:fedbn")
    report = run_tiny(tmp_path, *keeps, "training.steps=2")
    assert set(report.params) == {"0.weight", "3.weight", "6.weight", "11.weight", "11.bias"}
    assert not report.ledger.total(where={"section": "buffers"})[()]


@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_dittos_personal_model_is_the_papers_step(mu: float, tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path, *WHOLE), quiet=True)
    client = ditto(training=Training(lr=0.1, steps=1, batch_size=4096), mu=mu, personal_steps=3)
    split = federation.data.train.subset(federation.partitions[0])
    ctx = ClientContext(build("mlp", in_channels=1, image_size=8), split, torch.Generator())
    own = build("mlp", in_channels=1, image_size=8, seed=1)
    for number in (1, 2):
        received = snapshot(build("mlp", in_channels=1, image_size=8, seed=number))
        update = client(Task(number, received, None), ctx)
        assert all(torch.equal(value, update.params[name]) for name, value in snapshot(ctx.model).items())
        trained = load(build("mlp", in_channels=1, image_size=8), received)
        step(trained, samples(federation, 0), 0.1)
        assert all(torch.allclose(value, update.params[n], atol=1e-6) for n, value in trained.named_parameters())
        for _ in range(3):
            drift = {n: p.detach() - received[n] for n, p in own.named_parameters()}
            step(own, samples(federation, 0), 0.1)
            with torch.no_grad():
                for name, parameter in own.named_parameters():
                    parameter -= 0.1 * mu * drift[name]
        kept: Params = {name: ctx.state[OWN + name] for name in received}
        assert all(torch.allclose(value, kept[n], atol=1e-5) for n, value in own.named_parameters())
    client.before_evaluation(Task(3, received, None), ctx)  # type: ignore[attr-defined]
    assert all(torch.equal(value, kept[name]) for name, value in snapshot(ctx.model).items())


def test_what_clients_do_for_themselves_changes_nothing_of_what_they_send(fedavg: Report, tmp_path: Path) -> None:
    for method in (["client=clients.presets:ditto"], ["client=clients.presets:fine_tuned", "client.tune_steps=5"]):
        report = run_tiny(tmp_path, *WHOLE, *method)
        assert all(torch.equal(report.params[name], fedavg.params[name]) for name in fedavg.params)
        assert report.results.total_bytes == fedavg.results.total_bytes
        assert report.rounds[-1]["accuracy"] == fedavg.rounds[-1]["accuracy"]
        assert report.rounds[-1]["clients_accuracy"] > fedavg.rounds[-1]["clients_accuracy"]


def test_fine_tuning_is_measured_and_not_kept(fedavg: Report, tmp_path: Path) -> None:
    asked = (*WHOLE, "client=clients.presets:fine_tuned", "client.tune_steps=2")
    report, federation = run_tiny(tmp_path, *asked), Federation.build(tiny(tmp_path, *asked), quiet=True)
    own = [load(build("mlp", in_channels=1, image_size=8), fedavg.params) for _ in range(6)]
    for client, model in enumerate(own):
        for _ in range(2):
            step(model, samples(federation, client), 0.1)
    found, worst = accuracies(federation, own)
    assert report.rounds[-1]["clients_accuracy"] == pytest.approx(found, abs=2e-3)
    assert report.rounds[-1]["clients_accuracy_min"] == pytest.approx(worst, abs=1e-2)


RATES = {"warmup": 1, "decay": "linear", "decay_to": 0.5, "decay_end": 4}
"""Of a rate of 0.2: 0.1 in round 1, 0.2 in round 2, 0.1 from round 4 on."""


def own_of(client: Client, number: int) -> Params:
    """What a client sends of a round, keeps, and evaluates after it."""
    federation = Federation.build(tiny(Path(), *WHOLE), quiet=True)
    split = federation.data.train.subset(federation.partitions[0])
    model = build("mlp", in_channels=1, image_size=8)
    personal = [name for name, _ in model.named_parameters() if head(name)]
    ctx = ClientContext(model, split, torch.Generator().manual_seed(0), personal=personal)
    task = Task(number, snapshot(model), None)
    update = client(task, ctx)
    found = {f"sent {name}": value.clone() for name, value in update.params.items()} | dict(ctx.state)
    if (personalise := getattr(client, "before_evaluation", None)) is not None:
        personalise(task, replace(ctx, rng=torch.Generator().manual_seed(0)))
    return found | {f"evaluated {name}": value.clone() for name, value in snapshot(model).items()}


@pytest.mark.parametrize("preset", [fedrep, fine_tuned, ditto])
@pytest.mark.parametrize(("number", "rate"), [(1, 0.1), (2, 0.2), (4, 0.1)])
def test_everything_that_a_client_trains_has_the_rate_of_the_round(
    preset: Callable[..., Client], number: int, rate: float
) -> None:
    changing, fixed = (Training(batch_size=16, lr=lr, **rates) for lr, rates in ((0.2, RATES), (rate, {})))  # type: ignore[arg-type]
    found, wanted = own_of(preset(training=changing), number), own_of(preset(training=fixed), number)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


SCAFFOLD = ("client.target=clients.presets:scaffold", "strategy=strategies.presets:scaffold")
HEAD = ("client.target=clients.presets:fedrep", "model.personal=head", "evaluate.clients=1")
PASSES: Mapping[str, tuple[int, Sequence[str]]] = {
    "FedAvg": (2, ()),
    "FedRep": (5, (*HEAD, "client.head_epochs=3")),
    "Ditto": (5, ("client.target=clients.presets:ditto", "client.personal_epochs=3", "evaluate.clients=1")),
    "fine-tuning": (2, ("client.target=clients.presets:fine_tuned", "client.tune_epochs=3", "evaluate.clients=1")),
    "SCAFFOLD I": (3, (*SCAFFOLD, "client.option=1")),
    "SCAFFOLD II": (2, SCAFFOLD),
    "threshold": (2, ("client.target=clients.presets:weight_threshold", "model.name=cnn_bn")),
}
"""Passes with gradients over a client's samples in a round of two epochs; fine-tuning is part of the evaluation."""


@pytest.mark.parametrize("method", PASSES)
def test_the_clock_counts_every_sample_that_a_client_trained_on(method: str, tmp_path: Path) -> None:
    passes, options = PASSES[method]
    clock = ("network.links.Wi-Fi=1", "network.samples_per_s=10", "cohort.size=1", "rounds=1")
    asked = tiny(tmp_path, "model.name=mlp", *clock, "training={lr=0.1, epochs=2, batch_size=16}", *options)
    row, ledger = run(asked).rounds[0], run(asked).ledger
    chosen = set(ledger.to_table().filter(pc.field("phase") == "train")["client"].to_pylist()).pop()
    size = len(Federation.build(asked, quiet=True).partitions[chosen])
    assert row["train_examples"] == passes * size
    assert row["train_steps"] == 2 * -(-size // 16), "steps are those of what the server aggregates"
    assert row["simulated_s"] == pytest.approx(passes * size / 10, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["workers", "ray", "cohort"])
def test_every_engine_keeps_personal_models_alike(engine: str, tmp_path: Path) -> None:
    asked = (
        "client=clients.presets:ditto",
        "evaluate.clients=4",
        "rounds=3",
        "training.steps=2",
        "client.personal_steps=1",
    )
    one = run_tiny(tmp_path / "inline", *asked)
    same(one, run_tiny(tmp_path / engine, *asked, f"engine={engine}", "workers.count=2", "ray.workers=2"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["client=clients.presets:fedper"], "'clients.presets:fedper': needs model.personal, for instance 'head'"),
        (["client=clients.presets:fedrep"], "needs model.personal"),
        (["client=clients.presets:fedbn"], "needs model.personal = 'batchnorm' and model.statistics = 'local'"),
        (
            ["client=clients.presets:fedbn", "model.personal=batchnorm", "evaluate.clients=2"],
            "and model.statistics = 'local'",
        ),
        (["client=clients.presets:ditto"], "needed: evaluate.clients above 0"),
        (["client=clients.presets:fine_tuned"], "needed: evaluate.clients above 0"),
        (["client=clients.presets:ditto", "model.personal=head", "evaluate.clients=2"], "needs no model.personal"),
        (["client=clients.presets:ditto", "client.mu=-1"], "client.mu = -1"),
        (["client=clients.presets:fedrep", "client.head_epochs=0"], "client.head_epochs = 0: must be at least 1"),
    ],
)
def test_what_a_method_needs_is_said_before_round_1(overrides: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tiny(tmp_path, *overrides))
    assert words in str(caught.value)
