"""Published methods, each against a law of its paper or a reference of a few lines that shares none of its code."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import run_tiny
from flwr.app import Message
from torch.func import functional_call
from torch.nn import Linear, Sequential

from clients.transformed import Seen
from fl_sim import codecs
from fl_sim.bench.claims.claim import read_claims, tree_of
from fl_sim.bench.claims.trial import chosen, merged, method_tree
from fl_sim.codecs import Schema
from fl_sim.communication import messages as wire
from fl_sim.config.experiment import Experiment
from fl_sim.core.types import FlatParams, Params, Task, Update, UserError
from fl_sim.data import Split
from fl_sim.models.parameters import load, snapshot
from fl_sim.models.reparametrized import merged as merged_entries
from fl_sim.models.sequence import TokenLSTM
from fl_sim.models.simple import cnn_bn
from fl_sim.report import Report
from fl_sim.simulation.loop import run
from fl_sim.sparsity.curves import Curves, MeasureCurves
from fl_sim.training.client import ClientContext
from fl_sim.training.loop import Training
from strategies.aggregation import coverage_mean
from strategies.booking import Booking
from strategies.published import (
    fedcode,
    feddst,
    fedkseed,
    fedluar,
    fedmef,
    fedpara,
    fedpm,
    fetchsgd,
    lotteryfl,
    nested,
    saliency,
    sparsyfed,
    zerofl,
)
from strategies.server_step import Arrived, ServerState

SHAPES = {"a": (4, 3), "b": (4, 4), "c": (2, 4)}
OWN = (
    "zerofl",
    "heterofl",
    "fjord",
    "fedluar",
    "fedpm",
    "fedkseed",
    "feddst",
    "ssfl",
    "prunefl",
    "fedpara",
    "fetchsgd",
)


def weights(seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def state_of(params: Params, *, number: int = 0, memory: Params | None = None) -> ServerState:
    schema = Schema.of(params, list(params))
    return ServerState(schema, FlatParams.pack({n: params[n] for n in schema.names}), number, memory=memory or {})


class Told:
    """What a cohort answers, in the place of the clients; counts the questions."""

    def __init__(self, *answers: tuple[Params, int]) -> None:
        self.answers, self.shares = answers, list[float]()

    def __call__(self, state: ServerState, measure: MeasureCurves, images: int) -> list[tuple[Curves, int]]:
        raise AssertionError

    def gradients(self, state: ServerState, share: float) -> list[tuple[Params, int]]:
        self.shares.append(share)
        return list(self.answers)


def counted(name: str, out: Path, task: str = "digits") -> tuple[Report, int]:
    """A tiny run of a method, and the bytes of the arrays in its messages, counted apart from the ledger."""
    sizes: list[int] = []
    book = Booking.book

    def counting(self, way, number, client, message: Message, *rest, **more) -> None:
        sizes.append(wire.array_bytes(message.content))
        book(self, way, number, client, message, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Booking, "book", counting)
        return _run(name, out, task=task), sum(sizes)


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Report, int]]:
    """Method -> `counted`."""
    return {name: counted(name, tmp_path_factory.mktemp(name)) for name in OWN}


def _run(name: str, out: Path, *overrides: str, task: str = "digits") -> Report:
    tree = tree_of("tasks", task)
    del tree["widths"]
    small = [f'out="{out}"', "rounds=2", "data.clients=4", "cohort.size=2", "training.steps=2", "evaluate.every=2"]
    quick = {"feddst": ["strategy.every=1"], "prunefl": ["strategy.every=1"], "fedkseed": ["client.zo_steps=3"]}
    own = [*small, *quick.get(name, []), *overrides]
    return run(Experiment.from_tree(merged(tree, method_tree(name, task)), own), quiet=True)


@pytest.mark.parametrize("name", OWN)
def test_the_ledger_is_the_sum_of_the_messages(messages: dict[str, tuple[Report, int]], name: str) -> None:
    report, size = messages[name]
    assert report.ledger.total()[()] == report.results.total_bytes == size


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(read_claims().keys() - set(OWN)))
def test_the_ledger_is_the_sum_of_the_messages_for_composed_methods(name: str, tmp_path: Path) -> None:
    report, size = counted(name, tmp_path)
    assert report.ledger.total()[()] == report.results.total_bytes >= size
    evaluated = report.ledger.total(where={"phase": "evaluate"})[()]
    assert report.ledger.total()[()] - evaluated <= size


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen([], everything=True, task="roles"))
def test_the_ledger_is_the_sum_of_the_messages_on_the_roles(name: str, tmp_path: Path) -> None:
    report, size = counted(name, tmp_path, task="roles")
    assert report.ledger.total()[()] == report.results.total_bytes == size


# -- ZeroFL ------------------------------------------------------------------------------------------------------------


def test_zerofl_runs_and_sends_the_largest_share_of_each_layer() -> None:
    params, kept = weights(1), zerofl.Largest(0.5).of(weights(1))
    for name, value in params.items():
        order = np.argsort(-np.abs(value.numpy()).ravel())[: value.numel() // 2]
        assert set(np.flatnonzero(kept[name].numpy()).tolist()) == set(order.tolist())


def test_zerofl_gives_every_weight_the_gradient_of_the_sparse_pass() -> None:
    params = {name: value.requires_grad_() for name, value in weights(2).items()}
    sparse = zerofl.Largest(0.25).transform(Task(1, {}), None)(params)  # type: ignore[arg-type]
    kept = zerofl.Largest(0.25).of(params)
    for name, value in sparse.items():
        assert torch.equal(value, torch.where(kept[name], params[name], 0.0))
    sum((value * (number + 2)).sum() for number, value in enumerate(sparse.values())).backward()  # type: ignore[union-attr]
    assert [float(value.grad.unique()) for value in params.values()] == [2.0, 3.0, 4.0]  # type: ignore[union-attr]


def test_zerofl_averages_sparse_models_with_their_zeros() -> None:
    first, second = weights(3), weights(4)
    masks = [zerofl.Largest(0.5).of(each) for each in (first, second)]
    mean = zerofl.sparse_mean(state_of(weights(5)), [Update(first, 10, masks[0]), Update(second, 30, masks[1])])
    for name in SHAPES:
        expected = 0.25 * first[name] * masks[0][name] + 0.75 * second[name] * masks[1][name]
        assert torch.allclose(mean[name], expected, atol=1e-6)
    with pytest.raises(UserError, match="sparsity = 1 must be from 0 to below 1"):
        zerofl.client(training=None, sparsity=1)  # type: ignore[arg-type]


# -- HeteroFL and FjORD ------------------------------------------------------------------------------------------------


def test_a_nested_sub_model_is_a_narrower_network() -> None:
    whole = cnn_bn(num_classes=10, in_channels=1, image_size=8)
    narrow = cnn_bn(num_classes=10, in_channels=1, image_size=8, width=0.5)
    with torch.no_grad():
        for name, value in whole.named_parameters():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
        for name, value in narrow.state_dict().items():
            place = tuple(slice(size) for size in value.shape)
            value.copy_(whole.state_dict()[name][place])
    cut = nested.Nested((0.5,), drawn=False).loss(Task(1, {}), _context(0))
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for model in (whole, narrow):
        model.eval()
    assert torch.allclose(Seen(whole, cut)(images), narrow(images), atol=1e-5)


def test_heterofl_takes_the_mean_over_the_clients_that_have_a_weight() -> None:
    start, sent = weights(0), [weights(seed) for seed in (1, 2, 3)]
    ratios, counts = (1.0, 0.5, 0.25), (10, 20, 30)
    updates = [
        Update(p, n, nested.nested_mask(p, r, dict.fromkeys(SHAPES, 1)))
        for p, n, r in zip(sent, counts, ratios, strict=True)
    ]
    mean = coverage_mean(state_of(start), updates)
    for name, (rows, columns) in SHAPES.items():
        for i, j in itertools.product(range(rows), range(columns)):
            total = have = 0.0
            for p, n, r in zip(sent, counts, ratios, strict=True):
                inside = (name == "c" or i < np.ceil(r * rows)) and (name == "a" or j < np.ceil(r * columns))
                total, have = total + inside * n * float(p[name][i, j]), have + inside * n
            assert float(mean[name][i, j]) == pytest.approx(total / have, abs=1e-5)


def test_fjord_draws_widths_up_to_the_clients_own_and_heterofl_takes_its_own() -> None:
    for drawn, expected in ((True, {1, 2, 4}), (False, {4})):
        rule = nested.Nested((1.0, 0.5, 0.25), drawn=drawn)
        cut = rule.loss(Task(1, {}), _context(0))
        whole = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        assert {int(cut(whole)["b"].sum() ** 0.5) for _ in range(40)} == expected
        narrow = rule.loss(Task(1, {}), _context(2))
        assert {int(narrow(whole)["b"].sum() ** 0.5) for _ in range(10)} == {1}
    with pytest.raises(UserError, match="must be above 0"):
        nested.Nested((1.0, 0.0), drawn=True)


def _context(client: int, model: torch.nn.Module | None = None) -> object:
    class Context:
        seed = 7

    found = Context()
    found.client, found.model = client, model or torch.nn.Identity()  # type: ignore[attr-defined]
    return found


def test_a_nested_sub_model_of_a_recurrent_network_is_a_narrower_one() -> None:
    torch.manual_seed(0)
    whole, narrow = TokenLSTM(11, 11, 6, each_token=True), TokenLSTM(11, 11, 3, each_token=True)
    narrow.embedding, narrow.lstm = torch.nn.Embedding(11, 4), torch.nn.LSTM(4, 3, num_layers=2, batch_first=True)
    with torch.no_grad():
        for name, value in narrow.named_parameters():
            gates = whole.get_parameter(name).unflatten(0, (4 if name.startswith("lstm") else 1, -1))
            value.copy_(
                gates[(slice(None), *(slice(n) for n in (len(value) // len(gates), *value.shape[1:])))].flatten(0, 1)
            )
    cut = nested.Nested((0.5,), drawn=False).loss(Task(1, {}), _context(0, whole))
    tokens = torch.arange(20).view(2, 10) % 11
    assert torch.allclose(Seen(whole, cut)(tokens), narrow(tokens), atol=1e-6)


# -- FedLUAR -----------------------------------------------------------------------------------------------------------


def test_fedluar_uses_the_last_change_of_a_recycled_layer_again() -> None:
    rule, current = fedluar.Recycling(1, seed=3), state_of(weights(0))
    kept: dict[str, torch.Tensor] = {}
    for number in range(4):
        recycled = {n for n in SHAPES if float(rule.send(current)["recycled"][n])}
        assert len(recycled) == (number > 0)
        arrived = {n: current.params[n] + 0.1 * v for n, v in weights(number + 10).items()}
        new, memory = rule(current, arrived)
        for name in SHAPES:
            expected = kept[name] if name in recycled else arrived[name] - current.params[name]
            assert torch.allclose(new[name], current.params[name] + expected, atol=1e-6)
            kept[name] = expected
        current = ServerState(current.schema, new, number + 1, memory=memory)


def test_fedluar_draws_layers_with_small_changes_more_often() -> None:
    rule = fedluar.Recycling(1, seed=0)
    drawn = [next(iter(rule.drawn({"a": 0.1, "b": 0.3, "c": 0.6}, number))) for number in range(3000)]
    shares = {name: drawn.count(name) / 3000 for name in "abc"}
    inverse = {"a": 10.0, "b": 10 / 3, "c": 10 / 6}
    for name, share in shares.items():
        assert share == pytest.approx(inverse[name] / sum(inverse.values()), abs=0.03)


def test_fedluar_clients_send_whole_layers_but_those_recycled(messages: dict[str, tuple[Report, int]]) -> None:
    task = Task(1, {}, extra={"recycled": {"a": torch.zeros(1), "b": torch.ones(1), "c": torch.zeros(1)}})
    sent = fedluar.upload(task, weights(0))
    assert sent is not None
    assert [bool(sent[n].all()) for n in SHAPES] == [True, False, True]
    assert not sent["b"].any()
    report, _ = messages["fedluar"]
    assert report.ledger.total(where={"section": "extra/recycled"})[()] > 0


def test_fedluar_without_recycled_layers_is_fedavg(tmp_path: Path) -> None:
    own = ["client=strategies.published.fedluar:client", "strategy=strategies.published.fedluar:server"]
    plain = run_tiny(tmp_path / "fedavg")
    none = run_tiny(tmp_path / "none", *own, "strategy.recycled=0")
    assert all(torch.allclose(none.params[name], plain.params[name], atol=1e-6) for name in plain.params)


# -- FedPM -------------------------------------------------------------------------------------------------------------


def test_fedpm_keeps_the_share_of_clients_whose_mask_has_a_weight() -> None:
    name = f"x.parametrizations.weight{fedpm.ENDING}"
    masks = [torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[1.0, -1.0, -1.0]]), torch.tensor([[1.0, -1.0, -1.0]])]
    start = state_of({name: torch.zeros(1, 3)})
    mean = coverage_mean(start, [Update({name: each}, 10) for each in masks])
    new, _ = fedpm.scores(start, mean)
    expected = [1 - fedpm.EDGE, 1 / 3, fedpm.EDGE]
    assert torch.sigmoid(new[name]).flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_fedpm_sends_at_most_a_bit_for_each_weight(messages: dict[str, tuple[Report, int]]) -> None:
    report, _ = messages["fedpm"]
    bits = 8 * report.ledger.total(where={"direction": "up", "section": "values"})[()]
    weights_sent = report.ledger.total(where={"direction": "up", "section": "values"}, column="nnz")[()]
    assert bits / weights_sent < 1.05  # tables of the coder included
    schema = Schema.of({"m": torch.zeros(40, 100)}, ["m"])
    mask = {"m": 2.0 * (torch.arange(4000).view(40, 100) % 3 == 0) - 1}
    assert torch.equal(
        codecs.decode(codecs.encode(mask, None, schema=schema, values="int2"), schema=schema)[0]["m"], mask["m"]
    )


def test_fedpm_trains_scores_through_the_mask() -> None:
    part = fedpm.RandomWeight(torch.tensor([[0.3, -0.2]]))
    part.score.data = torch.tensor([[2.0, -1.0]])
    (part(torch.tensor([[0.3, -0.2]])) * torch.tensor([[5.0, 7.0]])).sum().backward()
    theta = torch.sigmoid(part.score.detach())
    expected = torch.tensor([[5.0, -7.0]]) * part.size * theta * (1 - theta)
    assert torch.allclose(part.score.grad, expected)  # type: ignore[arg-type]
    assert torch.allclose(part.eval()(torch.tensor([[0.3, -0.2]])), torch.tensor([[part.size, 0.0]]))


def test_fedpm_leaves_every_random_weight_as_it_was(messages: dict[str, tuple[Report, int]]) -> None:
    report, _ = messages["fedpm"]
    names = [name for name in report.params if name.endswith(fedpm.ENDING)]
    assert len(names) == 4
    assert not [name for name in report.params if name.endswith("original")]


# -- FedKSeed ----------------------------------------------------------------------------------------------------------


def test_fedkseed_moves_the_model_along_the_directions_of_its_seeds() -> None:
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model = fedkseed.OfSeeds(inner, seeds=4)
    model.coefficients.data = torch.tensor([0.5, 0.0, -2.0, 0.0])
    draw = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 2)]
    moved = torch.cat([p.flatten() for p in inner.parameters()]) + 0.5 * draw[0] - 2.0 * draw[1]
    x = torch.ones(1, 3)
    expected = functional_call(inner, {"0.weight": moved[:6].view(2, 3), "0.bias": moved[6:]}, (x,))
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_fedkseed_steps_by_the_directional_derivative() -> None:
    torch.manual_seed(0)
    model = fedkseed.OfSeeds(torch.nn.Sequential(torch.nn.Linear(3, 2)), seeds=4)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    torch.nn.functional.cross_entropy(model(x), y).backward()
    derivative = model.coefficients.grad.clone()  # type: ignore[union-attr]
    context = _Context(model, x, y)
    training = fedkseed.Training(lr=0.1, batch_size=6)
    fedkseed.ZerothOrder(1e-3, 1)(training, Task(1, {}), context, context.loss)  # type: ignore[arg-type]
    moved = model.coefficients.detach().nonzero().flatten()
    assert len(moved) == 1
    assert float(model.coefficients.detach()[moved]) == pytest.approx(-0.1 * float(derivative[moved]), rel=0.02)


def test_fedkseed_counts_the_samples_of_small_batches() -> None:
    """Six samples in batches of four: 4, 2, 4."""
    model = fedkseed.OfSeeds(torch.nn.Sequential(torch.nn.Linear(3, 2)), seeds=4)
    context = _Context(model, torch.ones(6, 3), torch.zeros(6, dtype=torch.int64))
    training = fedkseed.Training(lr=0.1, batch_size=4)
    found = fedkseed.ZerothOrder(1e-3, 3)(training, Task(1, {}), context, context.loss)  # type: ignore[arg-type]
    assert (found["steps"], found["examples"]) == (3, 10)


class _Context:
    def __init__(self, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        self.model, self.data, self.rng = model, Split(x, y), torch.Generator().manual_seed(1)
        self.loss = lambda seen, batch: torch.nn.functional.cross_entropy(seen(batch[0]), batch[1])


def test_fedkseed_sends_as_much_for_a_wider_model(messages: dict[str, tuple[Report, int]], tmp_path: Path) -> None:
    wide = _run("fedkseed", tmp_path, "model.width=2.0")
    assert wide.results.params > 2 * messages["fedkseed"][0].results.params
    assert wide.results.uplink_bytes == messages["fedkseed"][0].results.uplink_bytes
    assert wide.results.downlink_bytes == messages["fedkseed"][0].results.downlink_bytes


# -- FedPara -----------------------------------------------------------------------------------------------------------


def test_fedpara_is_a_product_of_two_low_rank_matrices_of_a_larger_rank() -> None:
    torch.manual_seed(0)
    part = fedpara.Hadamard(torch.empty(32, 4, 3, 3), 3)
    made = part(torch.empty(32, 4, 3, 3)).detach().view(32, 36).numpy()
    factors = {name: value.detach().numpy() for name, value in part.named_parameters()}
    for i, j in ((0, 0), (5, 17), (31, 35)):
        first, second = factors["x1"][i] @ factors["y1"][j], factors["x2"][i] @ factors["y2"][j]
        assert made[i, j] == pytest.approx(first * second, rel=1e-5)
    assert np.linalg.matrix_rank(made) == 9
    wide = fedpara.Hadamard(torch.empty(400, 500), 8)
    assert float(wide(torch.empty(400, 500)).detach().var()) == pytest.approx(2 / 500, rel=0.3)


def test_computed_weights_of_a_recurrent_network_are_in_its_forward_pass() -> None:
    tokens = torch.arange(20).view(2, 10) % 11
    for change in (fedpara.factored, fedpm.masked):
        torch.manual_seed(0)
        model = change(TokenLSTM(11, 11, 64, each_token=True)).eval()
        plain = TokenLSTM(11, 11, 64, each_token=True)
        plain.load_state_dict(dict(merged_entries(snapshot(model), model=model)))
        assert torch.allclose(model(tokens), plain(tokens), atol=1e-5)
        model(tokens).sum().backward()
        own = [p for n, p in model.named_parameters() if ".lstm." in f".{n}" and ".0." in n]
        assert len(own) >= 4
        assert all(p.grad is not None and p.grad.any() for p in own)


def test_fedpara_sends_factors_and_what_stays(messages: dict[str, tuple[Report, int]]) -> None:
    report, _ = messages["fedpara"]
    sent = sum(value.numel() for value in report.params.values())
    factors = sum(2 * 4 * (rows + columns) for rows, columns in ((32, 144), (64, 288)))
    assert sent == factors + 144 + 640 + 10 + 2 * 2 * 112  # first convolution, head and its bias, BatchNorm
    assert not [name for name in report.params if name.endswith("original")]


# -- masks by gradients that clients are asked for ----------------------------------------------------------------------


def test_feddst_drops_the_smallest_and_grows_the_largest_gradients() -> None:
    params = {"a": torch.tensor([[0.5, -0.1, 0.0, 0.0], [2.0, 0.3, 0.0, 0.0]])}
    mask = {"a": params["a"] != 0}
    gradients = {"a": torch.tensor([[9.0, 9.0, 0.1, -0.4], [9.0, 9.0, 0.3, 0.2]])}
    state = ServerState(Schema.of(params, ["a"]), FlatParams.pack(params), 1, mask)
    told = Told((gradients, 3), ({"a": torch.zeros(2, 4)}, 1))
    rule = feddst.GrowByGradient(density=0.5, fraction=0.6, every=1, end=1000, share=0.5)
    new = rule(None, told, state)(1, mask, params, None)  # type: ignore[arg-type]
    assert new is not None
    assert new["a"].tolist() == [[True, False, False, True], [True, False, True, False]]
    assert told.shares == [0.5]
    quiet = feddst.GrowByGradient(density=0.5, fraction=0.5, every=2, end=1000, share=0.5)
    assert quiet(None, told, state)(1, mask, params, None) is mask  # type: ignore[arg-type]
    assert told.shares == [0.5]


def test_what_clients_answer_is_booked_both_ways_and_keeps_the_density(
    messages: dict[str, tuple[Report, int]],
) -> None:
    for name in ("feddst", "ssfl", "prunefl"):
        asked = messages[name][0].ledger.total(by=("direction",), where={"phase": "query"})
        assert asked["up",] > 0
        assert asked["down",] > 0
    assert messages["feddst"][0].results.density.prunable == pytest.approx(0.2, abs=1e-3)
    assert messages["ssfl"][0].results.density.prunable == pytest.approx(0.5, abs=1e-3)


def test_ssfl_keeps_the_most_salient_and_asks_once() -> None:
    params, gradients = weights(1), [(weights(2), 10), (weights(3), 30)]
    told, state = Told(*gradients), state_of(params)
    rule = saliency.SalientAtStart(0.25)
    mask = rule(None, told, state)(0, None, params, None)  # type: ignore[arg-type]
    mean = {n: 0.25 * gradients[0][0][n] + 0.75 * gradients[1][0][n] for n in SHAPES}
    flat = np.concatenate([np.abs((params[n] * mean[n]).numpy()).ravel() for n in SHAPES])
    assert mask is not None
    chosen = np.concatenate([mask[n].numpy().ravel() for n in SHAPES])
    assert set(np.flatnonzero(chosen).tolist()) == set(np.argsort(-flat)[: round(0.25 * len(flat))].tolist())
    later = rule(None, told, ServerState(state.schema, state.params, 1, mask))  # type: ignore[arg-type]
    assert later(1, mask, params, None) is mask
    assert told.shares == [1.0]


def test_prunefl_keeps_the_set_with_the_most_decrease_for_its_time() -> None:
    gradients = {"a": torch.tensor([[3.0, 0.2, -1.0]]), "b": torch.tensor([[0.9, 0.05]])}
    squares = [9.0, 0.04, 1.0, 0.81, 0.0025]
    for overhead in (0.1, 1.0, 4.0):
        sets = [s for k in range(1, 6) for s in itertools.combinations(range(5), k)]
        best = max(sets, key=lambda s, c=5 * overhead: sum(squares[i] for i in s) / (c + len(s)))
        mask = saliency.MostForTheTime(1, overhead).chosen(gradients)
        assert tuple(np.flatnonzero(torch.cat([m.flatten() for m in mask.values()]).numpy()).tolist()) == best


def test_a_transformed_model_keeps_its_own_statistics() -> None:
    model = cnn_bn(num_classes=2, in_channels=1, image_size=8)
    before = {n: v.clone() for n, v in snapshot(model).items() if n.endswith("running_mean")}
    Seen(model, lambda params: {n: 0.5 * v for n, v in params.items()})(torch.ones(4, 1, 8, 8))
    changed: Sequence[str] = [n for n, v in before.items() if not torch.equal(v, snapshot(model)[n])]
    assert changed


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("fedkseed", "model.name=cnn_bn", "selects no parameter of this model"),
        ("fedkseed", "model.trainable=all", "model.trainable = 'coefficients'"),
        ("fedkseed", "client.eps=0", "eps = 0 must be above 0"),
        ("fedpm", "model.name=cnn_bn", "selects no parameter of this model"),
        ("fedpm", "model.trainable=batchnorm", "no score of a mask is trained"),
        ("heterofl", "client.ratios=[1.5]", "must be above 0 and at most 1"),
        ("fedluar", "strategy.recycled=4", "must be below 4, the model's layers"),
        ("fedluar", "strategy.recycled=-1", "must be at least 0"),
        ("zerofl", "client.mask_ratio=1.0", "mask_ratio = 1.0 from 0 to sparsity"),
        ("feddst", "strategy.share=0", "strategy.share = 0: must be above 0"),
        ("feddst", "strategy.every=0", "every = 0"),
        ("feddst", "strategy.density=2", "density"),
        ("ssfl", "strategy.density=-1", "density"),
        ("prunefl", "strategy.overhead=0", "overhead = 0 above 0"),
    ],
)
def test_what_a_method_cannot_do_is_said_before_round_1(name: str, override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _run(name, tmp_path, override)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/rounds.jsonl"))


@pytest.mark.parametrize("layer", [torch.nn.MultiheadAttention(4, 2), torch.nn.LSTM(2, 3, bidirectional=True)])
def test_nested_sub_models_refuse_what_is_not_nested_by_rows(layer: torch.nn.Module) -> None:
    with pytest.raises(UserError, match=r"'0\..*' is of none"):
        nested.heterofl(training=fedkseed.Training()).require(torch.nn.Sequential(layer), torch.zeros(1))  # type: ignore[attr-defined]


# -- FetchSGD ----------------------------------------------------------------------------------------------------------


def test_a_sketch_is_linear_and_tells_a_few_large_values() -> None:
    rng = torch.Generator().manual_seed(0)
    first, second = torch.randn(2000, generator=rng), torch.randn(2000, generator=rng)
    both = fetchsgd.sketch(2 * first - second)
    assert torch.allclose(both, 2 * fetchsgd.sketch(first) - fetchsgd.sketch(second), atol=1e-4)
    few = torch.zeros(2000).index_fill_(0, torch.tensor([3, 700, 1999]), -5.0)
    table = fetchsgd.sketch(few)
    said = fetchsgd.unsketch(table, 2000)
    assert said[few != 0].tolist() == [-5.0] * 3
    for row, bucket in ((0, 0), (4, 7)):  # by hand
        buckets, signs = fetchsgd.hashes(2000)
        inside = buckets[row] == bucket
        assert float(table[row, bucket]) == float((signs[row] * few)[inside].sum())


def test_fetchsgd_steps_along_what_its_sketches_say() -> None:
    wide = [{"a": torch.randn(40, 60, generator=torch.Generator().manual_seed(n))} for n in range(8)]
    state, rule = state_of(wide[0]), fetchsgd.Unsketched(0.01, lr=0.5, momentum=0.5)
    part = state.schema.prunable_part
    momentum = error = torch.zeros_like(fetchsgd.sketch(torch.zeros(part.size)))
    for number in range(3):
        changes = [part.flat(wide[2 * number + client]) for client in (1, 2)]
        summed = sum(fetchsgd.sketch(each).double().flatten() for each in changes)
        arrived = Arrived(2, 2, {fetchsgd.NAME: summed})  # type: ignore[dict-item]
        new, memory = rule(replace(state, arrived=arrived), state.params)
        momentum = 0.5 * momentum + fetchsgd.sketch((changes[0] + changes[1]) / 2)
        error = error + 0.5 * momentum
        said = fetchsgd.unsketch(error, part.size)
        step = part.flat(new) - part.flat(state.params)
        moved = step.nonzero().flatten()
        assert len(moved) == int(np.ceil(0.01 * part.size))
        assert torch.allclose(step[moved], said[moved], atol=1e-5)
        assert float(said[moved].abs().min()) >= float(said[step == 0].abs().max())
        buckets, _ = fetchsgd.hashes(part.size)
        for table, kept in ((momentum, memory["momentum"]), (error, memory["error"])):
            for row in range(fetchsgd.ROWS):
                table[row, buckets[row, moved]] = 0.0
            assert torch.allclose(kept, table, atol=1e-5)
        state = ServerState(state.schema, part.view(part.flat(new)), number + 1, memory=memory)


def test_fetchsgd_sends_its_sketch_and_no_weight(messages: dict[str, tuple[Report, int]]) -> None:
    report, _ = messages["fetchsgd"]
    assert report.ledger.total(where={"direction": "up", "section": "values"})[()] == 0
    sent = report.ledger.total(where={"direction": "up", "section": "extra/sketch"})[()]
    weights_of_the_model = 144 + 4608 + 18432 + 640
    assert sent == pytest.approx(4 * 4 * fetchsgd.SHARE * weights_of_the_model, rel=0.02)  # 4 uploads of float32


# -- LotteryFL ---------------------------------------------------------------------------------------------------------


def test_a_ticket_shrinks_by_magnitude_down_to_its_share_and_goes_back_to_the_first_weights() -> None:
    task, context = _client_of(Sequential(Linear(6, 20), Linear(20, 3)))
    ticket = lotteryfl.Ticket(threshold=0.0, rate=0.5, share=0.6)
    first = {name: task.params[name].clone() for name in ("0.weight", "1.weight")}
    sizes = []
    for number in range(4):
        weights = {
            name: torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
            for name, value in first.items()
        }
        before = {name: context.state.get(lotteryfl.KEPT + name, torch.ones_like(v)) > 0 for name, v in first.items()}
        mask, start = ticket(Task(number + 1, {**task.params, **(weights if number else first)}), context)
        sizes.append(sum(int(kept.sum()) for kept in mask.values()))
        for name, kept in mask.items():
            assert not (kept & ~before[name]).any()
        if sizes[-1] < 180 and len(set(sizes)) == len(sizes):
            assert all(torch.equal(start[name], first[name] * kept) for name, kept in mask.items())
        else:
            assert all(torch.equal(start[name], weights[name] * kept) for name, kept in mask.items())
    assert sizes == [90, 72, 72, 72]
    flat = torch.cat([first[name].abs().flatten() for name in first])
    kept = torch.cat([(context.state[lotteryfl.KEPT + name] > 0).flatten() for name in first])
    assert kept.sum() == 72
    assert set(kept.nonzero().flatten().tolist()) <= set(flat.topk(90).indices.tolist())


def test_a_client_below_the_threshold_trains_all_and_one_above_it_its_ticket_alone() -> None:
    for threshold, expected in ((1.0, 180), (0.0, 144)):
        task, context = _client_of(Sequential(Linear(6, 20), Linear(20, 3)))
        update = lotteryfl.client(training=Training(lr=0.1), threshold=threshold)(task, context)  # type: ignore[arg-type]
        assert update.mask is not None
        assert sum(int(kept.sum()) for kept in update.mask.values()) == expected
        for name, kept in update.mask.items():
            assert (update.params[name] != task.params[name])[kept].float().mean() > 0.5
            assert not update.params[name][~kept].any()


# -- SparsyFed ---------------------------------------------------------------------------------------------------------


def test_sparsyfed_keeps_the_largest_weights_and_sends_what_changed() -> None:
    task, context = _client_of(Sequential(Linear(6, 20), Linear(20, 3)))
    for name in ("0.weight", "1.weight"):
        task.params[name].view(-1)[::3] = 0.0
    update = sparsyfed.client(training=Training(lr=0.1), density=0.2, beta=1.5)(task, context)  # type: ignore[arg-type]
    assert update.mask is not None
    assert sum(int((update.params[name] != 0).sum()) for name in update.mask) == 36
    for name, sent in update.mask.items():
        assert torch.equal(sent, (task.params[name] != 0) | (update.params[name] != 0))
        assert not update.params[name][task.params[name] == 0].any()  # the gradient of a power is zero at zero


def test_one_step_of_powers_is_the_chain_rule_and_an_exponent_of_one_is_plain_training() -> None:
    made = {}
    for beta in (1.0, 2.0):
        task, context = _client_of(Sequential(Linear(6, 3, bias=False)))
        made[beta] = sparsyfed.client(training=Training(lr=0.1, steps=1, batch_size=30), density=1.0, beta=beta)(
            task, context
        )  # type: ignore[arg-type]
    w = task.params["0.weight"]
    gradient = (w - made[1.0].params["0.weight"]) / 0.1
    phi = w.sign() * w.abs().sqrt()
    moved = phi - 0.1 * gradient * 2 * phi.abs()
    assert torch.allclose(made[2.0].params["0.weight"], moved * moved.abs(), atol=1e-6)


def test_fedmef_presses_the_smallest_living_weights_more_as_the_exchange_comes() -> None:
    for number, pressure in ((1, 0.25), (2, 0.5), (5, 0.25)):
        task, context = _client_of(Sequential(Linear(6, 20), Linear(20, 3)))
        mask = {
            name: torch.arange(task.params[name].numel()).view_as(task.params[name]) % 2 == 0
            for name in ("0.weight", "1.weight")
        }
        masked = Task(number, {**task.params, **{n: task.params[n] * m for n, m in mask.items()}}, mask)
        load(context.model, masked.params)
        rule = fedmef.Extrusion(strength=1.0, fraction=0.5, every=4)
        batch = next(iter(context.data.batches(30, rng=None)))
        added = float(rule(masked, context)(context.model, batch) - context.loss(context.model, batch))
        expected = 0.0
        for name, alive in mask.items():
            living = np.sort(np.abs(masked.params[name][alive].numpy()))
            expected += float((living[: round(0.5 * len(living))] ** 2).sum())
        assert added == pytest.approx(pressure / 2 * expected, rel=1e-4)


def test_centres_are_those_of_k_means_and_lose_no_more_than_they_did() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    book = fedcode.clustered(values, torch.zeros(fedcode.CENTRES))
    assert torch.equal(book, book.sort().values)
    own = fedcode.nearest(values, book)
    assert torch.equal(own, (values[:, None] - book).abs().argmin(dim=1))
    again = fedcode.clustered(values, book)
    lost = [(values - b[fedcode.nearest(values, b)]).square().sum() for b in (book, again)]
    assert lost[1] <= lost[0] < 0.003 * values.square().sum()
    means = torch.stack([values[fedcode.nearest(values, again) == k].mean() for k in range(fedcode.CENTRES)])
    assert (means - again).abs().max() < 0.05


def test_fedcode_moves_weights_with_their_centres_and_asks_for_them_seldom() -> None:
    rule, start = fedcode.Codebook(start=1, request=3), state_of(weights(0))
    part = start.schema.prunable_part
    assert [rule.asks(number) for number in range(1, 8)] == [True, False, True, False, False, True, False]
    new, memory = rule(replace(start, arrived=Arrived(2, 2)), weights(1))
    assert set(part.flat(new).tolist()) <= set(memory["codebook"].tolist())
    state = ServerState(start.schema, new, 1, memory=memory)
    books = [memory["codebook"] * 2 + 1, memory["codebook"] * 4 + 3]
    arrived = Arrived(2, 2, {"codebook": (books[0] + books[1]).double()})
    moved, kept = rule(replace(state, arrived=arrived), state.params)
    assert torch.allclose(part.flat(moved), 3 * part.flat(new) + 2, atol=1e-5)
    assert torch.allclose(kept["codebook"], 3 * memory["codebook"] + 2, atol=1e-5)
    assert not float(rule.send(state)["asked"]["asked"])


def _client_of(model: Sequential) -> tuple[Task, ClientContext]:
    """A task and a client with 30 samples of three classes, the same each time."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    data = Split(torch.randn(30, 6, generator=rng), torch.arange(30) % 3)
    return Task(1, dict(snapshot(model))), ClientContext(model, data, torch.Generator().manual_seed(1))
