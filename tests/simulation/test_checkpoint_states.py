"""What clients keep, in checkpoints: few files however many clients change, and the last state of each comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fl_sim.runtime.state.client_states import ClientStates
from fl_sim.simulation.checkpoint_states import LARGE, KeptStates, _unpacked
from fl_sim.simulation.checkpoint_store import Checkpoints, Manifest
from fl_sim.simulation.checkpointing import UNREADABLE

CLIENTS = 300
NODES = range(1000, 1000 + CLIENTS)


def record(number: int, size: int = 4) -> ArrayRecord:
    return ArrayRecord({"v": Array(np.full(size, number, np.int32))})


def saved(store: Checkpoints, kept: KeptStates, states: ClientStates, number: int) -> Manifest:
    with store.writing() as put:
        clients, packs = kept.put(put, states)
        manifest = Manifest(
            experiment="x",
            precision="float32",
            round=number,
            messages=0,
            training_s=0,
            wall_s=0,
            models=[],
            clients=clients,
            packs=packs,
            ledger=[],
            rounds=[],
            masks=[],
        )
    store.commit(manifest)
    return manifest


def restored(folder: Path, place: Path) -> tuple[KeptStates, ClientStates]:
    store, states, kept = Checkpoints(folder), ClientStates(NODES, place), KeptStates()
    manifest = next(store.manifests())
    store.check(manifest)
    kept.restore(store, manifest, states)
    return kept, states


def content(states: ClientStates) -> dict[int, dict[str, bytes]]:
    return {c: {key: states.blob(name) for key, name in found.items()} for c, found in states.kept().items()}


def change(states: ClientStates, rng: np.random.Generator, number: int) -> None:
    """Some clients keep something else, some of it large, and some keep a thing no more."""
    for client in rng.choice(CLIENTS, int(rng.integers(0, 60)), replace=False).tolist():
        state = states[NODES[client]].state
        kind = int(rng.integers(0, 5))
        if kind == 0 and state:
            del state[next(iter(state))]
        elif kind == 1:
            state["large"] = record(number % 3, LARGE // 4)
        else:
            state[f"small{kind}"] = record(number * (kind - 1))


def test_the_last_state_comes_back_from_few_files(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "checkpoint"
    store, states, kept = Checkpoints(folder), ClientStates(NODES, tmp_path), KeptStates()
    for number in range(1, 41):
        change(states, rng, number)
        manifest = saved(store, kept, states, number)
        large = {name for records in manifest.clients.values() for name in records.values()}
        assert len(manifest.packs) <= 1 + np.log2(CLIENTS)
        assert len(large) <= 3, "equal records are one file"
        assert len(list((folder / "objects").iterdir())) <= 2 * (len(manifest.packs) + 3)
        if number % 10 == 0:  # goes on as a resumed run does
            before = content(states)
            kept, states = restored(folder, tmp_path)
            assert content(states) == before
            assert len(before) > 20
            store = Checkpoints(folder)
            store.resume_from(manifest)


def test_what_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    store, states, kept = Checkpoints(tmp_path / "checkpoint"), ClientStates(NODES, tmp_path), KeptStates()
    for node in NODES:
        states[node].state["kept"] = record(node)
    (first,) = saved(store, kept, states, 1).packs
    states[NODES[7]].state["kept"] = record(0)
    whole, part = saved(store, kept, states, 2).packs
    assert whole == first
    assert store.path(part).stat().st_size < 300
    assert saved(store, kept, states, 3).packs == [whole, part]
    kept, again = restored(tmp_path / "checkpoint", tmp_path)
    assert content(again) == content(states)
    assert kept.put(lambda data: pytest.fail("it is there"), again) == ({}, [whole, part])


def test_no_file_for_clients_that_keep_nothing_small(tmp_path: Path) -> None:
    store, states, kept = Checkpoints(tmp_path / "checkpoint"), ClientStates(NODES, tmp_path), KeptStates()
    states[NODES[0]].state["kept"] = record(0, LARGE)
    manifest = saved(store, kept, states, 1)
    assert (len(manifest.clients), manifest.packs) == (1, [])


@pytest.mark.parametrize(
    ("index", "records", "length"),
    [
        ({"clients": {"0": {"kept": 0}}, "sizes": [1 << 50]}, b"", None),
        ({"clients": {"0": {"kept": 1}}, "sizes": [4]}, b"abcd", None),
        ({"clients": {"0": {"kept": 0}}, "sizes": [4]}, b"abcd", None),
        ({"clients": {str(CLIENTS): {}}, "sizes": []}, b"", None),
        ({"clients": {"0": {"kept": -1}}, "sizes": []}, b"", None),
        ({"clients": {}, "sizes": []}, b"", 1 << 60),
        ({"clients": {}}, b"", None),
    ],
)
def test_a_pack_that_no_run_wrote_is_refused(index: object, records: bytes, length: int | None, tmp_path: Path) -> None:
    text = json.dumps(index).encode()
    store = Checkpoints(tmp_path / "checkpoint")
    states, kept = ClientStates(NODES, tmp_path), KeptStates()
    manifest = saved(store, kept, states, 1)
    with store.writing() as put:
        name = put((len(text) if length is None else length).to_bytes(8, "little") + text + records)
    with pytest.raises(UNREADABLE):
        kept.restore(store, manifest.model_copy(update={"packs": [name]}), states)


@pytest.mark.parametrize(
    ("index", "said"),
    [(b'{"clients": 0x', "Invalid JSON"), (b'{"clients": 7, "sizes": []}', r"\('clients',\): Input should be")],
)
def test_an_index_that_is_none_is_refused_in_one_line(tmp_path: Path, index: bytes, said: str) -> None:
    pack = tmp_path / "pack"
    pack.write_bytes(len(index).to_bytes(8, "little") + index)
    with pack.open("rb") as stream, pytest.raises(ValueError, match=said) as refused:
        _unpacked(stream, [], ClientStates(NODES, tmp_path))
    assert "\n" not in str(refused.value)
