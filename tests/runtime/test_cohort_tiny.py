"""Tiny models on the cohort engine: updates without the resident model, recurrent layers, and batches gathered for all clients."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from federation import run_tiny
from torch import Tensor, nn

from clients.local import LocalClient, TopK
from fl_sim.core.seeding import generator
from fl_sim.core.types import Mask, Params, Task, Update
from fl_sim.data import Split, load
from fl_sim.training import Training
from fl_sim.training.client import ClientContext
from fl_sim.training.draws import Draws, EachAlone, Gathered, draws
from fl_sim.training.recurrent import Unrolled, unrolled

TOPK = ["client.target=clients.presets:topk", "client.density=0.2"]
METHODS: dict[str, tuple[list[str], float]] = {
    "dense": ([], 1e-5),
    "logistic": (["model.name=linear", "training={lr=0.1, momentum=0.9, batch_size=32, epochs=2}"], 1e-5),
    "top-k": (TOPK, 1e-5),
    "error feedback": ([*TOPK, "wire.error_feedback=true", "rounds=2"], 1e-5),
    "masked": (["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2", "rounds=2"], 1e-5),
    "frozen": (["model.name=resnet8", "model.trainable=batchnorm", "rounds=2"], 1e-5),
    "cnn": (["model.name=fl_sim.bench.tiny:small_cnn"], 1e-5),
    "gru": (["model.name=fl_sim.bench.tiny:small_gru"], 1e-5),
    # A value at the border of two integers may round to either: one of 255 steps of the largest change.
    "int8": (["wire.uplink.values=int8", "wire.uplink.content=difference"], 1e-3),
}


@pytest.mark.parametrize("method", METHODS)
def test_updates_without_the_resident_model_equal_those_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    chosen, atol = METHODS[method]
    options = ["rounds=1", "model.name=mlp", *chosen]
    inline = run_tiny(tmp_path / "inline", *options)

    def refuse(self: LocalClient, task: Task, ctx: ClientContext) -> Update:
        raise AssertionError("a client ran on the resident model")

    monkeypatch.setattr(LocalClient, "__call__", refuse)
    cohort = run_tiny(tmp_path / "cohort", *options, "engine=cohort")
    assert not caplog.records, "it fell back"
    for name, value in inline.params.items():
        torch.testing.assert_close(cohort.params[name], value, atol=atol, rtol=1e-5)
    assert cohort.rounds[0]["loss"] == pytest.approx(inline.rounds[0]["loss"], rel=1e-5)
    if method != "int8":  # its bytes depend on the integers
        assert cohort.ledger.total(by=("direction", "section")) == inline.ledger.total(by=("direction", "section"))


@pytest.mark.parametrize(
    "options",
    [["model.statistics=local", "evaluate.clients=6"], ["evaluate.fit=20"]],
    ids=["personal entries", "measured after training"],
)
def test_what_needs_the_model_after_training_gets_it(tmp_path: Path, options: list[str]) -> None:
    inline = run_tiny(tmp_path / "inline", "cohort.size=6", *options)
    cohort = run_tiny(tmp_path / "cohort", "cohort.size=6", *options, "engine=cohort")
    for row, other in zip(inline.rounds, cohort.rounds, strict=True):
        assert row.keys() == other.keys()
        numbers = {key: value for key, value in row.items() if key != "seconds"}
        assert {key: other[key] for key in numbers} == pytest.approx(numbers, rel=1e-3)


class Norm(LocalClient):
    """Reports a number of the model."""

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        update = super().__call__(task, ctx)
        return replace(update, metrics={**update.metrics, "norm": float(ctx.model[1].weight.norm())})  # type: ignore[index]


class Nothing(TopK):
    """Sends no weight."""

    def __call__(self, task: Task, params: Params) -> Mask | None:
        return {name: torch.zeros_like(value, dtype=torch.bool) for name, value in params.items()}


def norm(*, training: Training) -> LocalClient:
    """A client with a `__call__` of its own."""
    return Norm(training)


def nothing(*, training: Training) -> LocalClient:
    """A client with an upload of its own."""
    return LocalClient(training, upload=Nothing(0.5))


@pytest.mark.parametrize("client", ["norm", "nothing"])
def test_what_a_user_overrides_is_called(tmp_path: Path, client: str) -> None:
    options = ["model.name=mlp", f"client.target={__name__}:{client}"]
    assert not getattr(sys.modules[__name__], client)(training=Training()).reads_parameters_alone
    inline = run_tiny(tmp_path / "inline", *options)
    cohort = run_tiny(tmp_path / "cohort", *options, "engine=cohort")
    for row, other in zip(inline.rounds, cohort.rounds, strict=True):
        assert ("train_norm" in row) == (client == "norm")
        assert other.get("train_norm", 0.0) == pytest.approx(row.get("train_norm", 0.0), rel=1e-5)
    assert cohort.ledger.total(by=("section",)) == inline.ledger.total(by=("section",))


class First(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
        out, last = self.layer(x, state)
        return [out, *(last if isinstance(last, tuple) else [last])]


BOTH_WAYS = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.mark.parametrize("options", [{}, BOTH_WAYS, {"bias": False}], ids=["plain", "both ways", "no bias"])
@pytest.mark.parametrize(
    "kind",
    [nn.GRU, nn.LSTM, nn.RNN, lambda *a, **o: nn.RNN(*a, nonlinearity="relu", **o)],
    ids=["gru", "lstm", "rnn", "relu"],
)
@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
def test_unrolled_layers_give_outputs_states_and_gradients_of_the_layers(
    kind: type[nn.RNNBase], options: dict[str, bool], given: bool
) -> None:
    rng = generator(3)
    model = First(kind(5, 7, **options)).double()
    x = torch.randn(4, 6, 5, generator=rng, dtype=torch.float64)
    batch, layers = (4, 4) if options is BOTH_WAYS else (6, 1)
    parts = [torch.randn(layers, batch, 7, generator=rng, dtype=torch.float64) for _ in range(2)]
    state = None if not given else tuple(parts) if kind is nn.LSTM else parts[0]
    expected = model(x, state)
    gradients = torch.autograd.grad(sum(value.sum() for value in expected), list(model.parameters()))
    with unrolled(model):
        assert isinstance(model.layer, Unrolled)
        found = model(x, state)
        own = torch.autograd.grad(sum(value.sum() for value in found), list(model.parameters()))
    assert isinstance(model.layer, nn.RNNBase), "the layer is back"
    for value, other in zip([*found, *own], [*expected, *gradients], strict=True):
        torch.testing.assert_close(value, other)


def test_layers_that_cannot_be_unrolled_stay() -> None:
    class Own(nn.GRU):
        """A layer of the user's own."""

    for layer in (nn.GRU(3, 3, num_layers=2, dropout=0.5), nn.LSTM(4, 4, proj_size=2), Own(3, 3)):
        model = First(layer)
        with unrolled(model):
            assert model.layer is layer


def parts(sizes: list[int]) -> list[Split]:
    """Clients of so many digits each."""
    train, begin = load("digits").train, 0
    made = []
    for size in sizes:
        made.append(train.subset(torch.arange(begin, begin + size).numpy()))
        begin += size
    return made


def test_gathered_batches_are_those_of_each_client_alone() -> None:
    """Ragged last batches, passes that end at different steps, a client of one sample, clients that end early."""
    data, training = parts([23, 10, 1, 17, 8]), Training(batch_size=8)
    samples = [23, 8, 1, 16, 8]
    rngs = [[generator(5, i) for i in range(len(data))] for _ in range(2)]
    gathered = draws(data, rngs[0], samples, training)
    assert isinstance(gathered, Gathered)
    alone: Draws = EachAlone(data, rngs[1], samples, training)
    for count in (5, 5, 5, 4, 4, 2, 2, 1):
        ours, theirs = list(gathered.next(count)), list(alone.next(count))
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert str(one.rows) == str(other.rows)
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.targets, other.targets)
    for one, other in zip(*rngs, strict=True):
        assert torch.equal(one.get_state(), other.get_state())


def test_weighted_samples_and_inputs_of_their_own_are_not_gathered() -> None:
    one, other = parts([9, 9])
    rngs, training = [generator(1), generator(2)], Training(batch_size=8)
    assert isinstance(draws([one, one], rngs, [9, 9], training), Gathered)
    apart = Split(other.images, other.labels, other.mean, other.std)
    weighted = Split(one.stored, one.labels, one.mean, one.std, positions=one.positions, weights=torch.ones(9))
    for second in (apart, weighted):
        assert isinstance(draws([one, second], rngs, [9, 9], training), EachAlone)
