"""Flower's objects as made without its constructors: equal, attribute by attribute, to those that the constructors make."""

from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fl_sim.communication.flower_private import adopt_identity, array_of, filled, renewed, reply_to, set_message_id
from fl_sim.communication.messages import content

adopt_identity()
METADATA_OF_NOW = ("_created_at", "_ttl")
UNKNOWN_IS_DIRTY = {"_is_dirty": True}
"""An attribute that Flower adds when it is first asked for."""


def task(*, task_id: int | None = None) -> Message:
    made = Message(
        content(b"model", config={"round": 3}), 1007, "train.lora", group_id="3", ttl=60.0, dst_task_id=task_id
    )
    set_message_id(made, "41")
    return made


def metadata(message: Message) -> dict[str, object]:
    return {name: value for name, value in vars(message.metadata).items() if name not in METADATA_OF_NOW}


@pytest.mark.parametrize("data", [b"", b"x" * 300])
def test_an_array(data: bytes) -> None:
    ours = array_of(data, "fl_sim.update/1")
    theirs = Array("uint8", (len(data),), "fl_sim.update/1", data)
    assert vars(ours) | UNKNOWN_IS_DIRTY == vars(theirs)
    assert ours.is_dirty
    assert vars(array_of(data, "s", dtype="f", shape=(2, 3))).items() <= vars(Array("f", (2, 3), "s", data)).items()
    assert ours.object_id == theirs.object_id


@pytest.mark.parametrize(
    ("kind", "items"),
    [
        (ArrayRecord, {"p": Array("uint8", (1,), "s", b"x")}),
        (ConfigRecord, {"round": 1, "name": "a"}),
        (MetricRecord, {"loss": 0.5, "num-examples": 3}),
        (RecordDict, {"metrics": MetricRecord({"loss": 0.5})}),
    ],
)
def test_a_record(kind: type[RecordDict], items: dict[str, object]) -> None:
    ours, theirs = filled(kind, dict(items)), kind(items)  # type: ignore[arg-type]
    assert vars(ours).keys() | UNKNOWN_IS_DIRTY.keys() == vars(theirs).keys() | UNKNOWN_IS_DIRTY.keys()
    assert ours == theirs
    assert ours.object_id == theirs.object_id
    with pytest.raises(TypeError):
        ours["new"] = object()  # type: ignore[assignment]  # what comes later is checked as ever


@pytest.mark.parametrize("task_id", [None, 9])
def test_a_reply(task_id: int | None) -> None:
    asked = task(task_id=task_id)
    answer = content(b"update", metrics={"loss": 0.5})
    ours, theirs = reply_to(asked, answer), Message(answer, reply_to=asked)
    assert vars(ours).keys() == vars(theirs).keys()
    assert vars(ours.metadata).keys() == vars(theirs.metadata).keys()
    assert metadata(ours) == metadata(theirs)
    assert ours.content is answer
    assert ours.has_content()
    assert not ours.has_error()
    assert ours.metadata.created_at == pytest.approx(theirs.metadata.created_at, abs=5)
    lives = ours.metadata.created_at + ours.metadata.ttl
    assert lives == pytest.approx(asked.metadata.created_at + asked.metadata.ttl)


def test_a_copy_shares_no_metadata() -> None:
    first = task()
    second = renewed(first, content(b"other"))
    assert metadata(second) == metadata(first)
    second.metadata.dst_node_id = 1008
    set_message_id(second, "42")
    assert (first.metadata.dst_node_id, first.metadata.message_id) == (1007, "41")
    assert first.content != second.content
    assert second.metadata.created_at >= first.metadata.created_at
