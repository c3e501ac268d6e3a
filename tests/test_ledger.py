"""The ledger: sums, parquet, and equality with the bytes of the messages that moved."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from federation import tiny
from flwr.app import ArrayRecord, ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_sim import wire
from fl_sim.codecs import Description
from fl_sim.ledger import TYPES, WORDS, Ledger
from fl_sim.simulation import Federation, build_strategy, open_grid
from fl_sim.types import UserError

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
@settings(deadline=None, max_examples=60)
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


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger.parquet").write_bytes(content)
    with pytest.raises(UserError, match="ledger"):
        Ledger.read(tmp_path / "ledger.parquet")


def test_foreign_tables_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "ledger.parquet")
    with pytest.raises(UserError, match="columns"):
        Ledger.read(tmp_path / "ledger.parquet")
    table = Ledger().to_table()
    row = {
        n: pa.array(["sideways"] if n == "direction" else ["train"] if n in WORDS else [1]) for n in table.column_names
    }
    pq.write_table(pa.table(row), tmp_path / "ledger.parquet")
    with pytest.raises(UserError, match="sideways"):
        Ledger.read(tmp_path / "ledger.parquet")


def test_unknown_columns_are_named() -> None:
    with pytest.raises(ValueError, match="roundd"):
        Ledger().total(by=("roundd",))


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
    with open_grid(experiment, federation) as grid:
        strategy = build_strategy(federation, ledger)
        for number in (1, 2, 3):
            messages = list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
            moved["down"] += sum(wire.array_bytes(m.content) for m in messages)
            replies = list(grid.send_and_receive(messages))
            moved["up"] += sum(wire.array_bytes(m.content) for m in replies)
            strategy.aggregate_train(number, replies)
    assert ledger.sent == moved
    assert ledger.total() == {(): moved["down"] + moved["up"]}
