"""Selection and masks against a stable sort, with ties, odd dtypes and chunk boundaries; mask operations as laws."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples
from torch import Tensor

from fl_sim.core.types import UserError
from fl_sim.sparsity import (
    apply_mask,
    density,
    global_topk,
    global_topk_mask,
    intersect,
    prune_and_grow,
    selection,
    topk_mask,
)
from fl_sim.sparsity.selection import CHUNK, FEW, SORTED, select

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


WAYS = {"by digits": (0, SORTED), "joined, by digits": (FEW, 0), "joined, sorted": (FEW, FEW)}


@pytest.fixture(autouse=True, scope="module", params=WAYS.values(), ids=WAYS)
def _few(request: pytest.FixtureRequest) -> Iterator[None]:
    few, sorted_at_once = request.param
    with mock.patch.object(selection, "FEW", few), mock.patch.object(selection, "SORTED", sorted_at_once):
        yield


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_sorting(values: Tensor, k: int) -> Tensor:
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[torch.sort(values.reshape(-1).double(), descending=True, stable=True).indices[:k]] = True
    return chosen.reshape(values.shape)


@st.composite
def tied(draw: st.DrawFn) -> Tensor:
    size, levels = draw(st.integers(1, 60)), draw(st.integers(1, 8))
    drawn = torch.randint(0, levels, (size,), generator=rng(draw(st.integers(0, 9999))))
    return drawn.to(draw(st.sampled_from(DTYPES)))


@given(values=tied(), data=st.data())
@settings(deadline=None, max_examples=examples(300))
def test_topk_is_a_stable_sort_in_every_dtype(values: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, values.numel()))
    mask = topk_mask({"w": values}, {"w": k})["w"]
    assert mask.dtype == torch.bool
    assert torch.equal(mask, by_sorting(values, k))


@given(numbers=st.lists(st.floats(0, width=32) | st.just(-0.0), min_size=1, max_size=40), data=st.data())
@settings(deadline=None, max_examples=examples(300))
def test_any_non_negative_float_is_ranked_by_value(numbers: list[float], data: st.DataObject) -> None:
    """Subnormals, infinities and both zeros, which are equal, included."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    values, k = torch.tensor(numbers, dtype=dtype), data.draw(st.integers(0, len(numbers)))
    assert torch.equal(topk_mask({"w": values}, {"w": k})["w"], by_sorting(values, k))


@pytest.mark.parametrize("kept", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_ties_reach_over_chunks_from_the_first_index(kept: int) -> None:
    mask = topk_mask({"w": torch.ones(2 * CHUNK + 5)}, {"w": kept})["w"]
    assert int(mask.sum()) == kept
    assert bool(mask[:kept].all())


def test_a_large_tensor_with_float64_differences_below_float32() -> None:
    values = 1.0 + 1e-12 * torch.randperm(CHUNK + 1000, generator=rng()).double()
    mask = topk_mask({"w": values}, {"w": 777})["w"]
    assert torch.equal(mask, by_sorting(values, 777))


def test_layout_and_shape_do_not_matter() -> None:
    base = torch.randint(0, 9, (12, 10), generator=rng()).float()
    for view in (base.t(), base[:, ::2], base[::3].t(), torch.ones(1).expand(4, 5), base[0, 0]):
        k = view.numel() // 2
        mask = topk_mask({"w": view}, {"w": k})["w"]
        assert mask.shape == view.shape
        assert torch.equal(mask, by_sorting(view.contiguous(), k))
    assert topk_mask({"w": torch.empty(0, 3)}, {"w": 0})["w"].shape == (0, 3)


@given(seed=st.integers(0, 999), data=st.data())
@settings(deadline=None, max_examples=examples(200))
def test_counts_over_tensors_with_floors(seed: int, data: st.DataObject) -> None:
    """Each tensor's floor first, then a stable sort of everything that is left."""
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    tensors = [torch.randint(0, 4, (n,), generator=rng(seed + i)).float() for i, n in enumerate(sizes)]
    floors = [data.draw(st.integers(0, n)) for n in sizes]
    k = data.draw(st.integers(sum(floors), sum(sizes)))
    rest = sorted(
        (-value, order, i)
        for order, t in enumerate(tensors)
        for i, value in enumerate(sorted(t.tolist(), reverse=True)[floors[order] :])
    )
    expected = list(floors)
    for _, order, _ in rest[: k - sum(floors)]:
        expected[order] += 1
    assert select(tensors, k, floors=floors) == expected


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [1.0, -1e-30], [-float("inf"), 2.0]])
def test_what_is_no_score_is_refused(bad: list[float]) -> None:
    with pytest.raises(UserError, match="non-negative"):
        topk_mask({"w": torch.tensor(bad)}, {"w": 1})


def test_wrong_counts_are_named() -> None:
    for keep in ({"w": 4}, {"w": -1}, {}):
        with pytest.raises(UserError, match=r"'w'.*0 to 3"):
            topk_mask({"w": torch.ones(3)}, keep)


def test_mask_operations() -> None:
    first = {"a": torch.tensor([True, True, False]), "b": torch.tensor([False])}
    second = {"a": torch.tensor([True, False, False]), "b": torch.tensor([True])}
    both = intersect(first, second)
    assert [m.tolist() for m in both.values()] == [[True, False, False], [False]]
    assert density(first) == 0.5
    assert density({}) == 0.0
    with pytest.raises(UserError, match="'b'"):
        intersect(first, {"a": second["a"]})
    params = {"a": torch.tensor([1.0, float("inf"), float("nan")]), "bias": torch.ones(1)}
    once = apply_mask(params, {"a": first["a"]})
    assert once["a"].tolist() == [1.0, float("inf"), 0.0]  # Selected, not multiplied: NaN * 0 would stay NaN.
    assert torch.equal(apply_mask(once, {"a": first["a"]})["a"], once["a"])


@given(seed=st.integers(0, 999), alive=st.integers(0, 12), fraction=st.floats(0, 1))
@settings(deadline=None, max_examples=examples(200))
def test_exchange_against_sorting_with_ties(seed: int, alive: int, fraction: float) -> None:
    drop, grow = (torch.randint(0, 3, (12,), generator=rng(seed + i)).float() for i in range(2))
    mask = by_sorting(torch.rand(12, generator=rng(seed + 2)), alive)
    new = prune_and_grow({"w": mask}, {"w": drop}, {"w": grow}, fraction)["w"]
    count = min(int(fraction * alive), 12 - alive)
    kept = sorted((-drop[i].item(), i) for i in range(12) if mask[i])[: alive - count]
    grown = sorted((-grow[i].item(), i) for i in range(12) if not mask[i])[:count]
    assert sorted(i for _, i in kept + grown) == new.nonzero().flatten().tolist()
    assert int((new ^ mask).sum()) == 2 * count


def test_an_exchange_of_more_than_everything_is_refused() -> None:
    mask = {"w": torch.tensor([True, False])}
    with pytest.raises(UserError, match=r"fraction = 1\.5"):
        prune_and_grow(mask, {"w": torch.ones(2)}, {"w": torch.ones(2)}, 1.5)


@given(first=tied(), second=tied(), density=st.floats(0, 1))
@settings(deadline=None)
def test_the_highest_of_all_tensors_are_those_that_each_keeps_of_its_own(
    first: Tensor, second: Tensor, density: float
) -> None:
    scores = {"a": first.reshape(1, -1), "b": torch.empty(0, 2), "c": second}
    expected = topk_mask(scores, global_topk(scores, density))
    found = global_topk_mask(scores, density)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
