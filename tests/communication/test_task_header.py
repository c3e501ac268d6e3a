"""Task header: the protocol's scalars have a record of their own, so that every key of `task.config` is the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation import FOUR, run_tiny, tiny
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fl_sim import ClientContext, Task, Update, UserError, snapshot
from fl_sim.codecs import CorruptPayload
from fl_sim.communication import messages as wire
from fl_sim.communication.task_header import BroadcastHeader, CurveRequest, TaskHeader
from fl_sim.simulation.engines import open_grid
from fl_sim.simulation.federation import Federation
from strategies.base import Method

HERE = __name__
SEEN: list[tuple[int, int, dict[str, object]]] = []
INTS, TEXTS, BYTES = st.integers(0, 2**62), st.text(max_size=9), st.binary(max_size=9)
BROADCASTS = st.builds(BroadcastHeader, INTS, st.none() | INTS, TEXTS, BYTES, BYTES)
REQUESTS = st.builds(CurveRequest, INTS, TEXTS, INTS, INTS)
HEADERS = st.builds(TaskHeader, INTS, INTS, st.none() | BROADCASTS, st.none() | REQUESTS)
FULL = TaskHeader(2, 3, BroadcastHeader(4, None, "difference", b"\1", b"hash"), CurveRequest(5, "mean", 6, 7))


def client(task: Task, ctx: ClientContext) -> Update:
    SEEN.append((task.round, task.seed, dict(task.config)))
    return Update(snapshot(ctx.model), ctx.num_examples, task.mask)


@given(HEADERS)
def test_a_header_comes_back_as_it_was_written(header: TaskHeader) -> None:
    record = ConfigRecord(dict(header.scalars()))
    assert TaskHeader.read(record) == header


@pytest.mark.parametrize("key", FULL.scalars())
def test_an_entry_that_is_missing_or_of_another_type_is_refused_by_name(key: str) -> None:
    entries = FULL.scalars()
    with pytest.raises(CorruptPayload, match="the task's header"):
        TaskHeader.read({k: v for k, v in entries.items() if k != key})
    for wrong in (1.5, True, None):
        with pytest.raises(CorruptPayload, match=f"needs '{key}' as"):
            TaskHeader.read({**entries, key: wrong})


def test_an_entry_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(CorruptPayload, match="not known here: momentum"):
        TaskHeader.read({**FULL.scalars(), "momentum": 1})


def test_a_message_without_a_header_is_refused() -> None:
    with pytest.raises(CorruptPayload, match="config record 'header'"):
        wire.read_header(RecordDict({"config": ConfigRecord({"round": 1, "seed": 0})}))


def test_a_list_among_the_users_scalars_is_refused_and_not_dropped() -> None:
    with pytest.raises(CorruptPayload, match=r"task.config\['sizes'\] is a list"):
        wire.read_config(RecordDict({"config": ConfigRecord({"lr": 0.1, "sizes": [1, 2]})}))
    with pytest.raises(UserError, match=r"config\['sizes'\] = \[1, 2\]: only numbers"):
        Method(config={"sizes": [1, 2]})  # type: ignore[dict-item]


@pytest.mark.parametrize("broadcast", [[], ["wire.broadcast.density=0.5"]], ids=["whole", "broadcast"])
def test_every_key_of_the_config_is_the_users(tmp_path: Path, broadcast: list[str]) -> None:
    """Names of the protocol's own entries reach the client with the user's values, and the run goes on as before."""
    SEEN.clear()
    own = {"seed": 7, "round": 99, "content": "mine", "model-version": 1, "base-version": 2, "levels": 3}
    given_ = [f"client.{key}={value}" for key, value in own.items()]
    report = run_tiny(tmp_path, *FOUR, "seed=5", f"client.target={HERE}:client", *given_, *broadcast)
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    assert {number for number, _, _ in SEEN} == {1, 2}
    assert all(seed == 5 and config == own for _, seed, config in SEEN)
    assert len(SEEN) == 8


def test_a_query_for_curves_whose_header_asks_for_none_is_an_error_reply(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path))
    first, task = federation.first, Task(1, federation.first.initial)
    data = first.exchange.encode_down(task, first.initial, held_mask=None, seed=0)
    with open_grid(federation) as grid:
        asked = Message(wire.task_content(task, data), next(iter(grid.get_node_ids())), "query.curves")
        (reply,) = grid.send_and_receive([asked])
    assert "a query for distortion curves whose header asks for none" in reply.error.reason


def test_a_task_without_options_carries_no_config_record() -> None:
    assert wire.CONFIG not in wire.task_content(Task(1, {}), b"")
    assert list(wire.task_content(Task(1, {}, config={"mu": 0.1}), b"")) == [wire.PAYLOAD, wire.HEADER, wire.CONFIG]
