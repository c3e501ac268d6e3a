"""The ledger: sums, parquet, and equality with the bytes of the messages that moved."""

from __future__ import annotations

import gc
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from federation import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.codecs import Description
from fl_sim.communication import messages as wire
from fl_sim.communication.flower_traffic import protocol_bytes
from fl_sim.communication.ledger import TYPES, WORDS, Ledger
from fl_sim.core.types import UserError
from fl_sim.simulation.engines import open_grid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.server import build_server
from strategies.sparse_server import SparseServer

DESCRIPTIONS = st.builds(
    Description,
    sections=st.dictionaries(st.sampled_from(WORDS["section"]), st.integers(0, 2**40)).map(
        lambda s: {**s, "header": 44}
    ),
    nnz=st.integers(0, 10**9),
    dense_bytes=st.just({"values": 400, "dense": 8}),
    entropy_bytes=st.floats(0, 1e9),
    mask_mode=st.just("whole"),
    values=st.just("float32"),
)
BOOKINGS = st.lists(
    st.fixed_dictionaries(
        {
            "round": st.integers(1, 5),
            "direction": st.sampled_from(WORDS["direction"]),
            "phase": st.sampled_from(WORDS["phase"]),
            "client": st.integers(0, 9),
            "description": DESCRIPTIONS,
            "protocol_bytes": st.integers(0, 2**40),
            "status": st.sampled_from(WORDS["status"]),
        }
    ),
    max_size=12,
)


@given(bookings=BOOKINGS)
@settings(deadline=None, max_examples=examples(60))
def test_totals_are_sums_and_survive_parquet(bookings, tmp_path_factory) -> None:
    ledger = Ledger()
    for booking in bookings:
        ledger.book(**booking)
    sizes = [sum(b["description"].sections.values()) for b in bookings]
    assert ledger.total() == {(): sum(sizes)}
    assert ledger.sent["up"] == sum(s for s, b in zip(sizes, bookings, strict=True) if b["direction"] == "up")
    assert sum(ledger.total(by=("round", "client", "section", "status")).values()) == sum(sizes)
    assert sum(ledger.total(by=("direction",), column="protocol_bytes").values()) == sum(
        b["protocol_bytes"] for b in bookings
    )
    counted = sum(n for phase in WORDS["phase"] for n in ledger.messages(phase=phase).values())
    assert counted == len(bookings)
    path = tmp_path_factory.mktemp("ledger") / "ledger.parquet"
    ledger.write(path)
    again = Ledger.read(path)
    assert again.to_table().equals(ledger.to_table())
    assert again.sent == ledger.sent
    assert again.to_table().column_names == list(TYPES)


GROUPS = st.lists(
    st.sampled_from(["round", "direction", "phase", "client", "section", "status"]), max_size=3, unique=True
)
SUMMED = ("payload_bytes", "nnz", "dense_bytes", "protocol_bytes")


@given(bookings=BOOKINGS, by=GROUPS, column=st.sampled_from(SUMMED), phase=st.sampled_from([None, *WORDS["phase"]]))
@settings(deadline=None, max_examples=examples(150))
def test_totals_equal_a_loop_over_the_rows(bookings, by: list[str], column: str, phase: str | None) -> None:
    ledger = Ledger()
    for booking in bookings:
        ledger.book(**booking)
    expected: dict[tuple[object, ...], int] = {} if by else {(): 0}
    for row in ledger.to_table().to_pylist():
        if phase in (None, row["phase"]):
            key = tuple(row[name] for name in by)
            expected[key] = expected.get(key, 0) + row[column]
    where = None if phase is None else {"phase": phase}
    assert ledger.total(by=by, column=column, where=where) == expected


@given(bookings=BOOKINGS, more=BOOKINGS, block=st.integers(1, 9), start=st.integers(0, 40))
@settings(deadline=None, max_examples=examples(60))
def test_a_ledger_in_a_file_is_one_in_memory(bookings, more, block: int, start: int) -> None:
    with tempfile.TemporaryFile() as rows:
        stored, held = Ledger(rows, block=block), Ledger()
        for some in (bookings, more):  # reading between two bookings must not move the place that is written to
            for booking in some:
                stored.book(**booking)
                held.book(**booking)
            assert stored.to_table().equals(held.to_table())
        assert stored.to_table(start=start).equals(held.to_table().slice(start))
        assert stored.messages(phase="train", start=start) == held.messages(phase="train", start=start)


@given(bookings=BOOKINGS, cut=st.integers(0, 12), column=st.sampled_from(SUMMED))
@settings(deadline=None, max_examples=examples(60))
def test_sums_of_what_came_since_add_up(bookings, cut: int, column: str) -> None:
    ledger = Ledger()
    for booking in bookings[:cut]:
        ledger.book(**booking)
    start, before = len(ledger), ledger.total(by=("phase", "section"), column=column)
    for booking in bookings[cut:]:
        ledger.book(**booking)
    since = ledger.total(by=("phase", "section"), column=column, start=start)
    whole = ledger.total(by=("phase", "section"), column=column)
    assert whole == {key: before.get(key, 0) + since.get(key, 0) for key in {*before, *since}}


@given(bookings=BOOKINGS)
@settings(deadline=None, max_examples=examples(60))
def test_rows_say_what_was_booked(bookings) -> None:
    ledger = Ledger()
    for booking in bookings:
        ledger.book(**booking)
    for phase in WORDS["phase"]:
        of_phase = [b for b in bookings if b["phase"] == phase]
        for booking, rows in zip(of_phase, ledger.by_message(phase=phase), strict=True):
            described = booking["description"]
            assert {name: row["payload_bytes"] for name, row in rows.items()} == described.sections
            assert list(rows)[-1] == "header"
            assert all(row[key] == booking[key] for row in rows.values() for key in ("round", "direction", "client"))
            assert all(row["dense_bytes"] == described.dense_bytes.get(name, 0) for name, row in rows.items())
            assert all(
                (row["nnz"] == described.nnz) if name == "values" else row["nnz"] == 0 for name, row in rows.items()
            )
            floors = {name: row["entropy_bytes"] for name, row in rows.items() if row["entropy_bytes"]}
            assert floors == ({"mask": described.entropy_bytes} if "mask" in rows and described.entropy_bytes else {})
            assert sum(row["protocol_bytes"] for row in rows.values()) == booking["protocol_bytes"]


@given(bookings=BOOKINGS, cut=st.integers(0, 12), more=BOOKINGS)
@settings(deadline=None, max_examples=examples(40))
def test_parts_make_the_whole_and_can_be_continued(bookings, cut: int, more, tmp_path_factory) -> None:
    folder, ledger = tmp_path_factory.mktemp("parts"), Ledger()
    for booking in bookings[:cut]:
        ledger.book(**booking)
    written = len(ledger)
    ledger.write(folder / "0.parquet")
    for booking in bookings[cut:]:
        ledger.book(**booking)
    ledger.write(folder / "1.parquet", start=written)
    again = Ledger.read(folder / "0.parquet", folder / "1.parquet")
    for one in (ledger, again):
        for booking in more:
            one.book(**booking)
    assert again.to_table().equals(ledger.to_table())
    assert again.sent == ledger.sent


def test_a_table_in_hand_does_not_stop_booking() -> None:
    ledger = Ledger()
    booking = {"round": 1, "direction": "up", "phase": "train", "client": 0, "protocol_bytes": 3}
    ledger.book(**booking, description=Description.opaque(9))
    table, column = ledger.to_table(), ledger.column("round")
    for _ in range(1000):
        ledger.book(**booking, description=Description.opaque(9))
    assert (table.num_rows, len(column), len(ledger)) == (1, 1, 1001)


def test_a_ledger_of_many_clients_stays_out_of_memory(tmp_path: Path) -> None:
    """1,000 clients, 10 rounds: 36 bytes a row in the file, and row groups on disk that are read back in pieces."""
    described = Description({"mask": 5, "values": 40, "dense": 8, "header": 44}, 10, {"values": 400}, 4.5, "whole", "x")
    with (tmp_path / "rows").open("w+b") as rows:
        ledger = Ledger(rows)
        tracemalloc.start()
        for round in range(10):
            for client in range(1000):
                ledger.book(
                    round=round, direction="up", phase="train", client=client, description=described, protocol_bytes=99
                )
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        _check_many(ledger, tmp_path)
    assert held < 50_000
    assert (tmp_path / "rows").stat().st_size == 36 * 40_000


def _check_many(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.total(by=("round",), column="entropy_bytes") == {(r,): 4500.0 for r in range(10)}
    pq.write_table(ledger.to_table(), tmp_path / "ledger.parquet", row_group_size=777)
    assert Ledger.read(tmp_path / "ledger.parquet").to_table().equals(ledger.to_table())


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger.parquet").write_bytes(content)
    with pytest.raises(UserError, match="ledger"):
        Ledger.read(tmp_path / "ledger.parquet")


def test_the_file_of_a_ledger_that_was_read_is_closed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that only the garbage collector finds, as the ledger of a report in a notebook."""
    Ledger().write(tmp_path / "ledger.parquet")
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        ledger = Ledger.read(tmp_path / "ledger.parquet")
        file = ledger._rows
        ledger.itself = ledger  # type: ignore[attr-defined]
        del ledger
        gc.collect()
    assert file.closed
    del file
    gc.collect()
    assert not [one for one in unraisable if "SpooledTemporaryFile" in str(one)]


def test_foreign_tables_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "ledger.parquet")
    with pytest.raises(UserError, match="columns"):
        Ledger.read(tmp_path / "ledger.parquet")
    table = Ledger().to_table()
    row = {
        n: pa.array(["sideways"] if n == "direction" else [WORDS[n][0]] if n in WORDS else [1])
        for n in table.column_names
    }
    pq.write_table(pa.table(row), tmp_path / "ledger.parquet")
    with pytest.raises(UserError, match="sideways"):
        Ledger.read(tmp_path / "ledger.parquet")


@pytest.mark.parametrize("bad", [pa.array([None], pa.int64()), pa.array([1.5]), pa.array([2**40])])
def test_damaged_numbers_are_refused(tmp_path: Path, bad: pa.Array) -> None:
    ledger = Ledger()
    ledger.book(round=1, direction="up", phase="train", client=0, description=Description.opaque(9), protocol_bytes=3)
    table = ledger.to_table()
    pq.write_table(table.set_column(0, "round", bad), tmp_path / "ledger.parquet")
    with pytest.raises(UserError, match="column 'round'") as error:
        Ledger.read(tmp_path / "ledger.parquet")
    assert "\n" not in str(error.value)


def test_unknown_columns_and_words_are_named() -> None:
    with pytest.raises(ValueError, match="roundd"):
        Ledger().total(by=("roundd",))
    with pytest.raises(ValueError, match="evaluate"):
        Ledger().total(where={"phase": "training"})
    with pytest.raises(ValueError, match="payload_bytes"):
        Ledger().column("bytes")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "client.target=clients.presets:topk",
            "client.density=0.1",
            "wire.uplink.values=int8",
            "wire.uplink.content=difference",
        ],
        ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2"],
    ],
)
def test_the_ledger_equals_the_bytes_of_the_messages(tmp_path: Path, overrides: list[str]) -> None:
    """Listen on the grid itself, on what really goes in and out, over three rounds."""
    experiment = tiny(tmp_path, *overrides)
    federation, ledger, moved = Federation.build(experiment), Ledger(), {"down": 0, "up": 0}
    counted: dict[tuple[str], int] = {("down",): 0, ("up",): 0}
    with open_grid(federation) as grid:
        (server,) = build_server(federation, ledger).models
        assert isinstance(server, SparseServer)
        for _ in range(3):
            sent = server.configure_train(grid, {})
            messages = sent.messages
            moved["down"] += sum(wire.array_bytes(m.content) for m in messages)
            counted["down",] += sum(protocol_bytes(m, direction="down") for m in messages)
            replies = list(grid.send_and_receive(messages))
            moved["up"] += sum(wire.array_bytes(m.content) for m in replies)
            counted["up",] += sum(protocol_bytes(m, direction="up") for m in replies)
            server.aggregate_train(grid, sent, replies, lambda answered, cohort: None)
    assert ledger.sent == moved
    assert ledger.total() == {(): moved["down"] + moved["up"]}
    assert ledger.total(by=("direction",), column="protocol_bytes") == counted
