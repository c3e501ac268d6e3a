"""Positions of all clients in one array behave as a list of arrays, and cost what one array costs."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fl_sim.core.numbered import Numbered
from fl_sim.data import label_counts, partition
from fl_sim.data.parts import Parts

LISTS = st.lists(st.lists(st.integers(0, 1000), max_size=5), max_size=12)


@example([[1, 2], [3], [4, 5]], 1, 3, 1)
@given(LISTS, st.integers(-15, 15), st.integers(-15, 15), st.sampled_from([1, 2, -1]))
def test_parts_are_a_sequence_of_arrays(lists: list[list[int]], low: int, high: int, step: int) -> None:
    arrays = [np.array(each, dtype=np.int64) for each in lists]
    parts = Parts.of(arrays)
    assert len(parts) == len(lists)
    assert [part.tolist() for part in parts] == lists
    assert parts.sizes.tolist() == [len(each) for each in lists]
    assert [part.tolist() for part in parts[low:high:step]] == lists[low:high:step]
    assert parts.owner.tolist() == [client for client, each in enumerate(lists) for _ in each]
    for client in range(-len(lists), len(lists)):
        assert parts[client].tolist() == lists[client]
    with pytest.raises(IndexError):
        parts[len(lists)]


@given(st.lists(st.integers(0, 6), max_size=40))
def test_samples_go_to_their_owner_in_ascending_order(owner: list[int]) -> None:
    parts = Parts.owned(np.array(owner, dtype=np.int64), 7)
    assert [part.tolist() for part in parts] == [
        [i for i, who in enumerate(owner) if who == client] for client in range(7)
    ]


def test_labels_are_counted_by_client_and_class() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 500)
    parts = partition(labels, 20)
    assert label_counts(labels, parts, 4).tolist() == [
        np.bincount(labels[part], minlength=4).tolist() for part in parts
    ]


@given(st.integers(0, 9), st.integers(0, 2000))
def test_a_numbered_mapping_is_a_dict_of_two_ranges(count: int, first: int) -> None:
    numbered = Numbered(range(first, first + count), range(count))
    table = dict(zip(range(first, first + count), range(count), strict=True))
    assert dict(numbered) == table
    assert dict(numbered.inverse) == {value: key for key, value in table.items()}
    assert [key in numbered for key in range(first - 2, first + count + 2)] == [
        key in table for key in range(first - 2, first + count + 2)
    ]
    with pytest.raises(KeyError):
        numbered[first - 1]


@pytest.mark.slow
def test_a_million_clients_are_dealt_in_seconds() -> None:
    start = time.process_time()
    parts = partition(np.random.default_rng(0).integers(0, 10, 2_000_000), 1_000_000, kind="iid")
    assert len(parts) == 1_000_000
    assert time.process_time() - start < 5
