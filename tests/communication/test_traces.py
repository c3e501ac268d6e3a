"""Traces of availability and devices: what they mean, FedScale's formats, and files that are wrong."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import examples

from fl_sim.communication.traces import Availability, read_availability, read_devices
from fl_sim.communication.virtual_clock import Link
from fl_sim.core.plain_pickle import read_plain_pickle
from fl_sim.core.types import UserError

HEADER = "client,start_s,end_s\n"
BEHAVIOUR = {
    17: {"duration": 50, "inactive": [60, 200], "finish_time": 180, "active": [10, 100], "model": "CPH1801"},
    3: {"duration": 9, "inactive": [40], "finish_time": 100, "active": [0], "model": "x"},
}
CAPACITY = {432802: {"computation": 162.0, "communication": 5648.0}, 7: {"computation": 10.0, "communication": 1000.0}}


def _file(tmp_path: Path, content: str | bytes | object) -> Path:
    path = tmp_path / "trace"
    data = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_our_forms_say_the_same(tmp_path: Path) -> None:
    csv = read_availability(_file(tmp_path, "client,start_s,end_s\n1,0,50\n0,60,100\n0,10,20\n"), 2)
    tree = {"period_s": 100, "clients": {"0": [[10, 20], [60, 100]], "1": [[0, 50]]}}
    assert csv == read_availability(_file(tmp_path, tree), 2)
    assert [csv.until(0, now) for now in (9.9, 10, 19, 20, 75, 115, 199)] == [None, 20, 20, None, 100, 120, 200]
    assert [csv.next_start(0, now) for now in (0, 15, 20, 100.0, 205)] == [10, 15, 60, 110, 210]


def test_an_interval_goes_on_into_the_next_period() -> None:
    trace = Availability([10.0, 10.0], [[(0.0, 2.0), (8.0, 10.0)], [(0.0, 10.0)]])
    assert trace.until(0, 9.0) == 12.0
    assert trace.until(1, 3.0) == math.inf
    assert Availability([10.0], [[]]).next_start(0, 3.0) == math.inf


@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=12, unique=True).filter(lambda edges: len(edges) % 2 == 0),
    st.floats(0, 1e7),
)
def test_the_next_start_is_a_time_at_which_the_client_is_there(edges: list[int], now: float) -> None:
    marks = sorted(map(float, edges))
    trace = Availability([100.0], [list(zip(marks[::2], marks[1::2], strict=True))])
    start = trace.next_start(0, now)
    assert start >= now
    assert trace.until(0, start + 1e-6) is not None
    until = trace.until(0, now)
    assert until is None or until > now


def test_intervals_that_touch_are_one(tmp_path: Path) -> None:
    """A client that is there from 0 to 5 and from 5 to 8 does not leave at 5."""
    trace = read_availability(_file(tmp_path, HEADER + "0,5,8\n0,0,5\n1,5,10\n1,0,5\n"), 2)
    assert trace.intervals == [[(0, 8)], [(0, 10)]]
    assert (trace.until(0, 2.0), trace.until(1, 2.0)) == (8, math.inf)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, mark: bytes) -> None:
    rows = _file(tmp_path, mark + HEADER.encode() + b"0,0,5\n")
    assert read_availability(rows, 1).intervals == [[(0, 5)]]
    tree = _file(tmp_path, mark + b'{"period_s": 5, "clients": {"0": [[0, 5]]}}')
    assert read_availability(tree, 1).intervals == [[(0, 5)]]


def test_spaces_around_a_client_make_no_other_client(tmp_path: Path) -> None:
    trace = read_availability(_file(tmp_path, HEADER + "0,0,5\n 0,7,9\n"), 1)
    assert trace.intervals == [[(0, 5), (7, 9)]]


def test_devices(tmp_path: Path) -> None:
    csv = _file(tmp_path, "client,samples_per_s,down_mbps,up_mbps,latency_ms\n0,200,9,4.5,85\n")
    (device,) = read_devices(csv, 1)
    assert (device.link, device.samples_per_s) == (Link(9, 4.5, 85), 200)
    tree = {"clients": {"0": {"samples_per_s": 200, "down_mbps": 9, "up_mbps": 4.5, "latency_ms": 85}}}
    assert read_devices(_file(tmp_path, tree), 1) == [device]


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
def test_fedscales_formats(tmp_path: Path, protocol: int | None) -> None:
    def written(value: object) -> Path:
        return _file(tmp_path, value if protocol is None else pickle.dumps(value, protocol))

    trace = read_availability(written(BEHAVIOUR), 3)  # the third client has the first entry again
    assert trace.periods == [180, 100, 180]
    assert trace.intervals == [[(10, 60), (100, 180)], [(0, 40)], [(10, 60), (100, 180)]]
    first, second, third = read_devices(written(CAPACITY), 3)
    assert first == third
    assert first.link == Link(5.648, 5.648, 0.0)
    assert second.samples_per_s == pytest.approx(1000 / (3 * 10))


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize("value", [Runs(), {"a": Runs()}, {1, 2}, (1, 2), b"x"])
def test_a_pickle_that_does_more_than_hold_data_is_never_run(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="it is never run"):
        read_plain_pickle(pickle.dumps(value))
    assert capsys.readouterr().out == ""


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(LEAVES, lambda below: st.lists(below) | st.dictionaries(st.text(), below), max_leaves=8))
@settings(max_examples=examples(30))
def test_plain_data_are_read_as_they_were(value: object) -> None:
    for protocol in (2, 4):
        assert read_plain_pickle(pickle.dumps(value, protocol)) == value


@given(st.binary(max_size=60), st.integers(0, 200))
def test_damaged_pickles_are_refused(noise: bytes, place: int) -> None:
    good = bytearray(pickle.dumps(CAPACITY, 4))
    good[place % len(good) : place % len(good) + len(noise)] = noise
    with contextlib.suppress(ValueError):
        read_plain_pickle(bytes(good))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "first line ''; needed: client,start_s,end_s"),
        (HEADER, "an empty trace"),
        ("{}", "an empty trace"),
        (HEADER + "0,-5,10\n1,0,5\n", "client 0: start = '-5': must be a number of at least 0"),
        (HEADER + "0,5,nan\n1,0,5\n", "end_s = 'nan'"),
        (HEADER + "0,9,5\n1,0,5\n", "client 0: from 9 to 5 s; needed: start < end"),
        (HEADER + "0,0,5\n0,4,9\n1,0,5\n", "client 0: intervals overlap at 4 s"),
        (HEADER + "0,0,5\n2,0,5\n", "unknown client '2'; the federation has 0 to 1"),
        (HEADER + "0,0,5\nx,0,5\n", "unknown client 'x'"),
        (HEADER + "0,0,5\n", "nothing on client 1 (1 of 2 clients are missing)"),
        (HEADER + "0,0,5\n1,0,5\n01,6,9\n", "client 1 stands there twice, once as '01'"),
        ('{"period_s": 9, "clients": {"0": [[0, 1]], "1": [], "0": [[2, 3]]}}', "'0' stands there twice"),
        (HEADER + "0,0\n", "line 2 has 2 cells"),
        ({"clients": {"0": [[0, 1]], "1": [[0, 1]]}}, "period_s = 'None'"),
        ({"period_s": 0, "clients": {"0": [[0, 1]], "1": [[0, 1]]}}, "period_s = 0: must be above 0"),
        ({"period_s": 9, "clients": {"0": [[0]], "1": []}}, "an interval is a start and an end"),
        ({"period_s": 9, "clients": {"0": 5, "1": []}}, "client 0: no list of intervals"),
        ({"5": {"active": [-3], "inactive": [9], "finish_time": 99}}, "entry 5: active = '-3'"),
        ({"5": {"active": [3, 4, 5], "inactive": [9], "finish_time": 99}}, "lists active and inactive of equal length"),
        ({"5": {"active": [3], "inactive": [9]}}, "entry 5: finish_time = 'None'"),
        ('{"a": ', "Expecting value"),
        (b"\x80\x04\x95", "trace"),
        (b"\x80\x04cos\nsystem\n.", "a pickle that does more than hold data (GLOBAL); it is never run"),
        (b"\xff\xfe", "decode"),
    ],
)
def test_a_wrong_trace_is_one_line(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_availability(_file(tmp_path, content), 2)
    assert said in str(error.value)
    assert str(error.value).startswith("schedule.availability = ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"clients": {"0": {"samples_per_s": 1, "down_mbps": 1, "up_mbps": 1}}}, "client 0: 'latency_ms'; needed:"),
        ({"clients": {"0": {"samples_per_s": 0, "down_mbps": 1, "up_mbps": 1, "latency_ms": 1}}}, "must be above 0"),
        (
            {"clients": {"0": {"samples_per_s": -1, "down_mbps": 1, "up_mbps": 1, "latency_ms": 1}}},
            "samples_per_s = '-1'",
        ),
        ({"7": {"computation": 0, "communication": 5}}, "computation and communication must be above 0"),
        ({"7": {"communication": 5}}, "entry 7: computation = 'None'"),
        ({"7": 5}, "an empty trace, or no table of clients"),
        ("client,samples_per_s,down_mbps,up_mbps,latency_ms\n0,1,1,1,1\n0,1,1,1,1\n", "a client has two lines"),
        ("client,samples_per_s,down_mbps,up_mbps,latency_ms\n0,1,1,1,1\n 0,1,1,1,1\n", "a client has two lines"),
        ("client,samples_per_s,down_mbps,up_mbps,latency_ms\n0,1,1,1,1\n00,2,1,1,1\n", "client 0 stands there twice"),
    ],
)
def test_wrong_devices_are_one_line(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_devices(_file(tmp_path, content), 1)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_availability(tmp_path / "none", 1)
