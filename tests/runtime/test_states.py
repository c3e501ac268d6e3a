"""What clients keep lies in a file: it comes back bit for bit, equal records lie there once, memory stays flat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.numpy import save

from fl_sim.communication.messages import PARTITION
from fl_sim.runtime.state.blob_file import Heap
from fl_sim.runtime.state.client_states import ClientStates
from fl_sim.runtime.state.contexts import Contexts

NODES = range(1000, 2000)


def record(*values: np.ndarray) -> ArrayRecord:
    return ArrayRecord({f"v{i}": Array(value) for i, value in enumerate(values)})


def model(number: int) -> ArrayRecord:
    """50,000 parameters."""
    return record(np.full(50_000, number, dtype=np.float32))


def values(states: ClientStates, node: int, key: str = "kept") -> list[np.ndarray]:
    return [array.numpy() for array in states[node].state.array_records[key].values()]


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1e3


def test_what_was_kept_comes_back_whoever_was_asked_for_since(tmp_path: Path) -> None:
    states = ClientStates(NODES, tmp_path)
    kept = [np.array(-0.0), np.array([np.nan, 1e-45], dtype=np.float32), np.arange(3), np.array([True, False])]
    states[1000].state["kept"] = record(*kept)
    assert states[1001].state.keys() == set()
    assert states[1001].node_config[PARTITION] == 1
    for before, after in zip(kept, values(states, 1000), strict=True):
        assert (after.dtype, after.shape, after.tobytes()) == (before.dtype, before.shape, before.tobytes())
    del states[1000].state["kept"]
    assert states[1001].state.keys() == set()
    assert states[1000].state.keys() == set()
    assert states.kept() == {}
    assert not list(tmp_path.iterdir()), "the file has no name"


KEPT = {
    "b": np.arange(3, dtype=np.int8),
    "a": np.array([[1.5, -0.0, np.nan]], np.float32),
    "z": np.array(2.0),
    "é": np.zeros((0, 4), np.int64),
    "turned": np.arange(6).reshape(2, 3).T,
    "large and turned": np.arange(20_000).reshape(2, -1).T,
    "foreign": np.arange(3, dtype=">i4"),
}


@pytest.mark.parametrize("names", ["b a z", "é turned", "large and turned", "foreign b", ""])
def test_a_record_lies_there_as_safetensors_writes_it(names: str, tmp_path: Path) -> None:
    arrays = {name: KEPT[name] for name in KEPT if name == names or name in names.split()}
    states = ClientStates(NODES, tmp_path)
    for change in (np.copy, np.flip, np.copy):  # from the second time on its header is known
        some = {name: np.asarray(change(array)) for name, array in arrays.items()}
        states[1000].state["kept"] = ArrayRecord({name: Array(array) for name, array in some.items()})
        (blob,) = states.kept()[0].values()
        assert states.blob(blob) == save({name: array.copy(order="C") for name, array in some.items()})
        states[1001].state["kept"] = ArrayRecord()
        for name, array in states[1000].state.array_records["kept"].items():
            np.testing.assert_array_equal(array.numpy(), some[name])


def test_a_node_is_made_when_it_is_asked_for_and_no_other_is_known(tmp_path: Path) -> None:
    for contexts in (Contexts(range(1000, 1003)), ClientStates(range(1000, 1003), tmp_path)):
        assert list(contexts) == [1000, 1001, 1002]
        assert contexts[1002].node_config == {PARTITION: 2, "num-partitions": 3}
        for stranger in (999, 1003):
            with pytest.raises(KeyError):
                contexts[stranger]


def test_a_context_that_comes_from_a_worker_replaces_the_old_one(tmp_path: Path) -> None:
    states = ClientStates(NODES, tmp_path)
    old = states[1005]
    old.state["kept"] = model(1)
    new = ClientStates(NODES, tmp_path)[1005]
    new.state["kept"] = model(2)
    states[1005] = new
    assert values(states, 1005)[0][0] == 2


def test_memory_stays_flat_and_space_is_used_again(tmp_path: Path) -> None:
    states = ClientStates(NODES, tmp_path)
    states[NODES[0]].state["kept"] = model(0)
    before = anonymous_mb()
    for round_number in (1, 2):
        for node in NODES:
            states[node].state["kept"] = model(node * round_number)
    assert anonymous_mb() - before < 20, "1,000 clients keep 200 MB"
    assert states.size < 1.1 * 4 * 50_000 * len(NODES)
    assert all(values(states, node)[0][-1] == 2 * node for node in NODES[::97])


def test_equal_records_are_kept_once(tmp_path: Path) -> None:
    states, shared = ClientStates(NODES, tmp_path), model(7)
    for node in NODES[:50]:
        states[node].state["kept"] = shared
    assert len({name for records in states.kept().values() for name in records.values()}) == 1
    size = states.size
    for node in NODES[1:50]:
        states[node].state["kept"] = model(8)
    assert states.size <= 2 * size
    assert values(states, NODES[0])[0][0] == 7


def test_a_restored_record_is_the_one_that_was_kept(tmp_path: Path) -> None:
    states, again = ClientStates(NODES, tmp_path), ClientStates(NODES, tmp_path)
    states[1003].state["kept"] = model(5)
    name = states.kept()[3]["kept"]
    assert again.restore(3, "kept", states.blob(name)) == name
    assert values(again, 1003)[0].tobytes() == values(states, 1003)[0].tobytes()
    assert again.kept() == states.kept()
    with pytest.raises(KeyError):
        again.restore(len(NODES), "kept", states.blob(name))
    with pytest.raises(SafetensorError):
        again.restore(4, "kept", b"nonsense")


def test_a_blob_goes_with_its_last_user(tmp_path: Path) -> None:
    heap = Heap(tmp_path)
    first, other = heap.put(b"abcd"), heap.put(b"efgh")
    assert heap.put(b"abcd") == first
    heap.drop(first)
    assert heap.get(first) == b"abcd"
    heap.drop(first)
    assert first not in heap
    assert (heap.get(heap.put(b"ijkl")), heap.get(other), heap.size) == (b"ijkl", b"efgh", 8)
