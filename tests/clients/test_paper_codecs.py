"""Codecs of papers: each has the law that its paper proves, and does what a few lines of NumPy do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from clients.eden_codec import Eden, lloyd_max
from clients.low_rank_codec import PowerSGD
from clients.rotation_codec import Drive, hadamard
from clients.sign_codec import SignSGD
from clients.sketch_codec import CountSketch
from clients.spectral_codec import Atomo, probabilities
from fl_sim.codecs import Codec, CorruptPayload, Schema
from fl_sim.core.types import Params, Update, UserError
from strategies.majority_vote import MajorityVote
from strategies.server_step import ServerState

Array = NDArray[np.float64]
SHAPES = {"kernel": (6, 4, 3, 3), "weight": (17, 23), "row": (9,)}


def tensors(seed: int = 0, scale: float = 0.01) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


SCHEMA = Schema.of(tensors(), SHAPES)


def sent(codec: Codec, given: Params, state: Params | None = None, seed: int = 0) -> bytes:
    copies = {name: value.clone() for name, value in given.items()}
    return codec.encode(copies, {} if state is None else state, torch.Generator().manual_seed(seed))


def through(codec: Codec, given: Params, state: Params | None = None, seed: int = 0) -> Params:
    return codec.decode(sent(codec, given, state, seed), SCHEMA)


def pairs(codec: Codec, seed: int = 0) -> Iterator[tuple[Array, Array]]:
    """(x, C(x)) of each tensor, flat."""
    given = tensors(seed)
    made = through(codec, given, seed=seed)
    for name in SHAPES:
        assert made[name].shape == given[name].shape
        yield given[name].double().flatten().numpy(), made[name].double().flatten().numpy()


def test_scaled_signs_lose_what_their_density_says() -> None:
    for x, decoded in pairs(SignSGD()):
        assert np.allclose(decoded, np.abs(x).mean() * np.sign(x))
        density = np.abs(x).sum() ** 2 / (len(x) * (x @ x))
        assert np.sum((decoded - x) ** 2) == pytest.approx((1 - density) * (x @ x))
    assert len(sent(SignSGD(), tensors())) == sum(-(-n // 8) + 4 for n in SCHEMA.numels)


def subspace(matrix: Array, q: Array) -> tuple[Array, Array]:
    """One step of algorithm 1, with Gram and Schmidt's orthogonalisation, as the paper has it."""
    p = matrix @ q
    for column in range(p.shape[1]):
        for earlier in range(column):
            p[:, column] -= (p[:, earlier] @ p[:, column]) * p[:, earlier]
        p[:, column] /= np.linalg.norm(p[:, column])
    return p @ (matrix.T @ p).T, matrix.T @ p


def test_power_sgd_is_algorithm_1_with_the_factors_of_the_last_upload() -> None:
    codec, state, given = PowerSGD(rank=3), dict[str, torch.Tensor](), tensors()
    matrices = {name: given[name].flatten(1).double().numpy() for name in ("kernel", "weight")}
    drawn = torch.Generator().manual_seed(0)
    before = {name: torch.randn(m.shape[1], 3, generator=drawn).double().numpy() for name, m in matrices.items()}
    for number in range(3):
        made = through(codec, given, state, seed=number)
        for name, matrix in matrices.items():
            expected, before[name] = subspace(matrix, before[name])
            assert np.allclose(made[name].flatten(1).numpy(), expected, atol=1e-6)
        assert torch.equal(made["row"], given["row"])


def test_power_sgd_projects_and_converges_to_the_best_factors() -> None:
    codec, state, matrix = PowerSGD(rank=2), dict[str, torch.Tensor](), tensors()["weight"]
    schema = Schema.of({"weight": matrix}, ["weight"])
    values = torch.linalg.svdvals(matrix.double()).square()
    errors = []
    for number in range(60):
        data = sent(codec, {"weight": matrix}, state, seed=number)
        assert len(data) == 4 * 2 * (17 + 23)
        error = (codec.decode(data, schema)["weight"] - matrix).double().square().sum()
        assert error == pytest.approx(float(values.sum() - state["weight"].double().square().sum()), rel=1e-4)
        errors.append(float(error))
    assert errors[0] < float(values.sum()), "contractive"
    assert errors[-1] == pytest.approx(float(values[2:].sum()), rel=1e-3), "warm start: Eckart and Young's best"
    assert errors[0] > 1.2 * errors[-1]


def test_power_sgd_finds_its_way_back_from_a_change_of_nothing() -> None:
    codec, state, schema = PowerSGD(rank=2), dict[str, torch.Tensor](), SCHEMA
    nothing = {name: torch.zeros_like(value) for name, value in tensors().items()}
    assert not any(value.any() for value in codec.decode(sent(codec, nothing, state), schema).values())
    assert through(codec, tensors(), state)["weight"].any()


def hadamard_matrix(size: int) -> Array:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def test_drive_is_algorithm_1() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(3))
    schema = Schema.of({"x": x}, ["x"])
    matrix = hadamard_matrix(64)
    assert np.allclose(hadamard(x).numpy(), matrix @ x.double().numpy(), atol=1e-5)
    data = sent(Drive(), {"x": x}, seed=5)
    draw = torch.Generator().manual_seed(int.from_bytes(data[:8], "little"))
    rotation = matrix * (torch.randint(0, 2, (64,), generator=draw).double().numpy() * 2 - 1)
    rotated = rotation @ x.double().numpy()
    expected = rotation.T @ (np.sign(rotated) * (rotated @ rotated) / np.abs(rotated).sum())
    assert np.allclose(Drive().decode(data, schema)["x"].numpy(), expected, atol=1e-5)
    assert len(data) == 8 + 4 + 64 // 8


def test_drive_keeps_the_norm_and_is_unbiased_over_rotations() -> None:
    x = torch.cat([value.flatten() for value in tensors().values()])
    schema, codec = Schema.of({"x": x}, ["x"]), Drive()
    total, errors = torch.zeros_like(x), []
    for seed in range(400):
        decoded = codec.decode(sent(codec, {"x": x}, seed=seed), schema)["x"]
        assert float(decoded @ x) == pytest.approx(float(x @ x), rel=1e-4)
        total += decoded
        errors.append(float((decoded - x).square().sum() / x.square().sum()))
    # Of 616 values filled up to 1,024 bits; pi / 2 - 1 where a rotation is uniform and nothing is filled up.
    assert np.mean(errors) == pytest.approx((np.pi / 2 - 1) * 616 / 1024, rel=0.1)
    assert float((total / 400 - x).norm() / x.norm()) < 3 * np.sqrt(np.mean(errors) / 400)


def test_drive_with_the_least_error_loses_what_its_rotation_says() -> None:
    for seed in range(3):
        x = tensors(seed)["weight"].flatten()[:256].clone()
        schema, codec = Schema.of({"x": x}, ["x"]), Drive(unbiased=False)
        data = sent(codec, {"x": x}, seed=seed)
        decoded = codec.decode(data, schema)["x"]
        scale = np.frombuffer(data, "<f4", count=1, offset=8)[0]
        left = float(x.square().sum()) - 256 * float(scale) ** 2
        assert float((decoded - x).square().sum()) == pytest.approx(left, rel=1e-3)
        assert 0 < left < float(x.square().sum())


SCALED: dict[str, Callable[[], Codec]] = {
    "sign": SignSGD,
    "powersgd": lambda: PowerSGD(rank=2),
    "drive": Drive,
    "drive, least error": lambda: Drive(unbiased=False),
    "eden": lambda: Eden(bits=2),
    "eden, least error": lambda: Eden(bits=2, unbiased=False),
    "sketch": CountSketch,
    "atomo": Atomo,
}


@pytest.mark.parametrize("codec", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("exponent", [-100, -72, 62, 100])
def test_what_is_decoded_grows_with_what_is_sent(codec: Callable[[], Codec], exponent: int) -> None:
    factor = 2.0**exponent  # exact in float32
    plain = through(codec(), tensors(scale=1.0))
    scaled = through(codec(), {name: value * factor for name, value in tensors(scale=1.0).items()})
    for name, value in plain.items():
        assert np.allclose(scaled[name].double() / factor, value.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codec", [Drive(), Drive(unbiased=False), Eden(bits=2), Eden(bits=2, unbiased=False)])
def test_a_rotated_value_among_zeros_is_exact_up_to_the_end_of_float32(codec: Codec) -> None:
    given = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for value in (3e38, 1e-38):
        given["weight"].view(-1)[7] = value
        made = through(codec, given)["weight"].view(-1)
        assert float(made[7]) == pytest.approx(value, rel=1e-3)
        assert float(made.double().norm()) == pytest.approx(value, rel=1e-3)
    given["weight"].view(-1)[7] = 1e-45  # the smallest float32 is nothing once it is spread over a block
    assert not through(codec, given)["weight"].any()


def lloyd(bits: int) -> tuple[Array, float]:
    """(levels, squared error) of Lloyd's method I for N(0, 1), on a fine grid."""
    grid = np.linspace(-9, 9, 180_001)
    weight = np.exp(-(grid**2) / 2)
    levels = np.linspace(-2, 2, 1 << bits)
    for _ in range(400 * bits):
        places = np.searchsorted(grid, (levels[1:] + levels[:-1]) / 2)
        starts = np.concatenate([[0], places])
        levels = np.add.reduceat(grid * weight, starts) / np.add.reduceat(weight, starts)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)]
    return levels, float(np.sum((grid - nearest) ** 2 * weight) / weight.sum())


PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Least squared error of so many bits (Max, 1960, table I)."""


@pytest.mark.parametrize("bits", PUBLISHED)
def test_eden_has_the_levels_of_lloyd_and_max_and_their_error(bits: int) -> None:
    levels, error = lloyd(bits)
    assert np.allclose(lloyd_max(bits), levels, atol=2e-3)
    assert error == pytest.approx(PUBLISHED[bits], rel=1e-3)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1)) ** 3
    schema, codec = Schema.of({"x": x}, ["x"]), Eden(bits=bits)
    total, errors = torch.zeros_like(x), []
    for seed in range(60):
        decoded = codec.decode(sent(codec, {"x": x}, seed=seed), schema)["x"]
        assert float(decoded @ x) == pytest.approx(float(x @ x), rel=1e-4)
        total += decoded
        errors.append(float((decoded - x).square().sum() / x.square().sum()))
    assert np.mean(errors) == pytest.approx(error / (1 - error), rel=0.03), "its limit as d grows"
    expected = np.sqrt(np.mean(errors) / 60)
    assert float((total / 60 - x).norm() / x.norm()) == pytest.approx(expected, rel=0.1), "unbiased over rotations"
    assert len(sent(codec, {"x": x})) < 4096 * bits / 8 + 60


def test_levels_of_eden_are_the_means_of_their_cells_up_to_eight_bits() -> None:
    for bits in (3, 8):
        levels = lloyd_max(bits).astype(np.float64)
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        means = [norm.expect(lb=low, ub=high, conditional=True) for low, high in itertools.pairwise(edges)]
        assert np.allclose(levels, means, atol=1e-6)


def test_eden_at_one_bit_decodes_what_drive_does() -> None:
    for unbiased in (True, False):
        drive, eden = (
            through(codec, tensors()) for codec in (Drive(unbiased=unbiased), Eden(bits=1, unbiased=unbiased))
        )
        assert all(torch.allclose(drive[name], eden[name], rtol=1e-4, atol=1e-7) for name in SHAPES)


def test_eden_with_the_least_error_projects() -> None:
    x = torch.cat([value.flatten() for value in tensors().values()])
    schema = Schema.of({"x": x}, ["x"])
    least, plain = (
        codec.decode(sent(codec, {"x": x}), schema)["x"] for codec in (Eden(bits=2, unbiased=False), Eden(bits=2))
    )
    left, lost = (float((made - x).square().sum() / x.square().sum()) for made in (least, plain))
    assert 0 < left < lost < 1
    cosine = float(plain @ x / plain.norm() / x.norm())
    assert left >= 1 - cosine**2 - 1e-4, "no multiple of the levels is nearer, but for the zeros filled in"


def test_eden_takes_tiny_values_and_refuses_those_whose_sums_overflow() -> None:
    tiny = {name: 1e-30 * value for name, value in tensors().items()}
    made = through(Eden(), tiny)
    assert all(torch.allclose(made[name] * 1e30, tiny[name] * 1e30, atol=0.01) for name in SHAPES)
    assert all(bool(value.isfinite().all()) for value in through(Eden(), tensors(scale=1e-42)).values())
    with pytest.raises(UserError, match="beyond the range"):
        sent(Eden(), {name: torch.full_like(value, 3e38) for name, value in tensors().items()})


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="from 1 to 8"):
        Eden(bits=bits)


def test_several_blocks_and_odd_sizes_come_back_in_their_places() -> None:
    values = {"a": torch.ones(5000), "b": -torch.ones(3, 3)}
    schema = Schema.of(values, values)
    mean = sum(Drive().decode(sent(Drive(), values, seed=s), schema)["a"].mean() for s in range(20)) / 20
    assert float(mean) == pytest.approx(1.0, abs=0.1)
    assert Drive().decode(sent(Drive(), values), schema)["b"].shape == (3, 3)


def test_a_sketch_is_the_table_of_its_hash_functions() -> None:
    x, codec = torch.randn(100, generator=torch.Generator().manual_seed(1)), CountSketch(rows=3, share=0.3, density=0.1)
    schema = Schema.of({"x": x}, ["x"])
    data = sent(codec, {"x": x}, seed=4)
    assert len(data) == codec.size(schema) == 8 + 4 + 4 * 3 * 10
    draw, table, said = torch.Generator().manual_seed(int.from_bytes(data[:8], "little")), np.zeros((3, 10)), []
    for row in table:
        buckets, signs = (
            torch.randint(10, (100,), generator=draw).numpy(),
            torch.randint(2, (100,), generator=draw) * 2 - 1,
        )
        for bucket, sign, value in zip(buckets, signs.tolist(), x.tolist(), strict=True):
            row[bucket] += sign * value
        said.append(row[buckets] * signs.numpy())
    assert np.allclose(np.frombuffer(data, "<f4", offset=12).reshape(3, 10), table, atol=1e-5)
    found = np.median(said, axis=0)
    found[np.argsort(-np.abs(found), kind="stable")[10:]] = 0
    expected = (found @ x.double().numpy()) / (found @ found) * found
    assert np.allclose(codec.decode(data, schema)["x"].numpy(), expected, atol=1e-5)


def test_a_sketch_finds_the_heavy_hitters() -> None:
    """10 of 5,000 values are 1, ten times the norm over the root of 1,000 columns; the others are 0.01."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy((0.01 * rng.normal(size=5000)).astype(np.float32))
    heavy = torch.from_numpy(rng.choice(5000, 10, replace=False))
    x[heavy] = torch.from_numpy(rng.choice([-1.0, 1.0], 10).astype(np.float32))
    schema, codec = Schema.of({"x": x}, ["x"]), CountSketch(rows=5, share=1.0, density=10 / 5000)
    for seed in range(5):
        made = codec.decode(sent(codec, {"x": x}, seed=seed), schema)["x"]
        assert set(made.nonzero().flatten().tolist()) == set(heavy.tolist())
        assert torch.allclose(made[heavy], x[heavy], atol=0.15)


def test_a_sketch_of_everything_is_unbiased_and_one_of_the_largest_contractive() -> None:
    x = torch.cat([value.flatten() for value in tensors().values()])
    schema, codec = Schema.of({"x": x}, ["x"]), CountSketch(rows=3, share=0.9, density=1.0)
    total, errors = torch.zeros_like(x), []
    for seed in range(2000):
        decoded = codec.decode(sent(codec, {"x": x}, seed=seed), schema)["x"]
        total += decoded
        errors.append(float((decoded - x).square().sum() / x.square().sum()))
    bound = 3 * np.sqrt(np.mean(errors) / 2000)
    assert bound < 0.2
    assert float((total / 2000 - x).norm() / x.norm()) < bound
    # A row errs by ||x||^2 / columns at each value; the median of three by 0.45 of that where errors are normal.
    assert np.mean(errors) == pytest.approx(0.45 * 616 / 185, rel=0.25)
    largest = CountSketch(density=0.05)
    for seed in range(20):
        decoded = largest.decode(sent(largest, {"x": x}, seed=seed), schema)["x"].double()
        left = float((decoded - x).square().sum())
        assert left == pytest.approx(float(x.double().square().sum() - decoded.square().sum()), rel=1e-4), (
            "a projection"
        )
        assert left < float(x.square().sum())


def test_atomo_draws_in_proportion_and_never_the_same_budget_twice() -> None:
    """Algorithm 1 by hand: 8 is sure of 2 because 8 * 2 > 12; the others share one."""
    p = probabilities(torch.tensor([8.0, 2.0, 1.0, 1.0]), 2)
    assert p.tolist() == [1.0, 0.5, 0.25, 0.25]
    assert probabilities(torch.tensor([1.0, 1.0, 1.0, 1.0]), 2).tolist() == [0.5] * 4
    assert probabilities(torch.tensor([3.0, 1.0, 0.0]), 2).tolist() == [1.0, 1.0, 0.0]
    assert probabilities(torch.zeros(3), 2).tolist() == [0.0] * 3
    assert probabilities(torch.tensor([3.0, 2.0]), 5).tolist() == [1.0, 1.0]


def test_atomo_is_unbiased_with_the_variance_of_its_probabilities() -> None:
    matrix, codec = tensors()["weight"], Atomo(rank=3)
    schema = Schema.of({"weight": matrix}, ["weight"])
    sigma = torch.linalg.svdvals(matrix)
    p = probabilities(sigma, 3).double()
    assert float(p.sum()) == pytest.approx(3)
    total, errors, counts = torch.zeros_like(matrix), [], []
    for seed in range(1500):
        data = sent(codec, {"weight": matrix}, seed=seed)
        counts.append((len(data) - 2) / (4 * (17 + 23)))
        decoded = codec.decode(data, schema)["weight"]
        total += decoded
        errors.append(float((decoded - matrix).square().sum()))
    assert np.mean(counts) == pytest.approx(3, abs=0.15)
    expected = float((sigma.double().square() * (1 / p - 1)).sum())
    assert np.mean(errors) == pytest.approx(expected, rel=0.1)
    assert float((total / 1500 - matrix).norm()) < 3 * np.sqrt(expected / 1500)


@pytest.mark.parametrize("codec", [Atomo(rank=2), Atomo(rank=2, unbiased=False)], ids=["drawn", "largest"])
def test_atomo_is_exact_for_matrices_of_its_rank(codec: Atomo) -> None:
    rng = torch.Generator().manual_seed(2)
    given = tensors()
    for name in ("kernel", "weight"):
        rows, columns = given[name].flatten(1).shape
        made = torch.randn(rows, 2, generator=rng) @ torch.randn(2, columns, generator=rng)
        given[name] = made.view(given[name].shape)
    for seed in range(3):
        made = through(codec, given, seed=seed)
        assert all(torch.allclose(made[name], given[name], atol=1e-4) for name in SHAPES)
        assert torch.equal(made["row"], given["row"])


def test_atomo_without_drawing_is_the_best_of_its_rank() -> None:
    codec, matrix = Atomo(rank=2, unbiased=False), tensors()["weight"]
    schema = Schema.of({"weight": matrix}, ["weight"])
    data = sent(codec, {"weight": matrix})
    assert len(data) == 2 + 4 * 2 * (17 + 23)
    left = (codec.decode(data, schema)["weight"] - matrix).double().square().sum()
    assert float(left) == pytest.approx(float(torch.linalg.svdvals(matrix.double())[2:].square().sum()), rel=1e-4)


CODECS = {
    "signsgd": SignSGD(),
    "powersgd": PowerSGD(),
    "drive": Drive(),
    "drive, biased": Drive(unbiased=False),
    "eden": Eden(),
    "eden, 1 bit": Eden(bits=1),
    "eden, 8 bits, biased": Eden(bits=8, unbiased=False),
    "sketch": CountSketch(),
    "sketch, unbiased": CountSketch(density=1.0),
    "atomo": Atomo(),
    "atomo, biased": Atomo(unbiased=False),
}


@pytest.mark.parametrize("name", CODECS)
def test_other_bytes_are_refused_or_finite(name: str) -> None:
    codec, rng = CODECS[name], np.random.default_rng(1)
    data = sent(codec, tensors())
    for wrong in (b"", data[:-1], data + b"\0", bytes(3)):
        with pytest.raises(CorruptPayload):
            codec.decode(wrong, SCHEMA)
    for _ in range(200):
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        try:
            made = codec.decode(bytes(changed), SCHEMA)
        except CorruptPayload:
            continue
        assert {name: value.shape for name, value in made.items()} == dict(
            zip(SCHEMA.names, SCHEMA.shapes, strict=True)
        )


@pytest.mark.parametrize("name", CODECS)
def test_zeros_are_zeros(name: str) -> None:
    made = through(CODECS[name], {key: torch.zeros(shape) for key, shape in SHAPES.items()})
    assert not any(value.any() for value in made.values())


def test_a_majority_votes_coordinate_by_coordinate() -> None:
    old = {"weight": torch.tensor([[0.0, 1.0, -1.0, 0.5]]), "bn.running_mean": torch.tensor([2.0])}
    old["bn.running_var"] = torch.tensor([1.0])
    schema = Schema.of(old, ["weight"])
    moves = torch.tensor([[1.0, 1.0, 5.0, 0.0], [2.0, -1.0, -1.0, 1.0], [0.1, -9.0, 0.0, -1.0]])
    updates = [
        Update({**old, "weight": old["weight"] + move, "bn.running_mean": torch.tensor([float(k)])}, count)
        for k, (move, count) in enumerate(zip(moves, (100, 1, 1), strict=True))
    ]
    made = MajorityVote(0.25)(ServerState(schema, schema.view(schema.flat(old))), iter(updates))
    assert made["weight"].tolist() == [[0.25, 0.75, -1.0, 0.5]], "one vote each; ties and what nobody moved stay"
    assert float(made["bn.running_mean"]) == pytest.approx(3 / 102), "statistics are no votes"
