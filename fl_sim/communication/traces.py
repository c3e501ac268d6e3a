"""Traces of real devices for the virtual clock: when each client is reachable, and how fast its device and link are.

Two files, each in one of three forms, which are told apart by their first byte:

    availability  CSV   client,start_s,end_s
                  JSON  {"period_s": 86400, "clients": {"0": [[0, 3600], [7200, 9000]]}}
    devices       CSV   client,samples_per_s,down_mbps,up_mbps,latency_ms
                  JSON  {"clients": {"0": {"samples_per_s": 200, "down_mbps": 9, "up_mbps": 9, "latency_ms": 85}}}
    both          FedScale's `client_behave_trace` and `client_device_capacity`, pickles of a dict or the same as JSON

Availability repeats after `period_s`, of a CSV after its last `end_s`. In our forms every client has its line; of FedScale's,
client k has entry k of the file, and entries are used again where there are fewer than clients, as FedScale does.
"""

from __future__ import annotations

import bisect
import csv
import hashlib
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from fl_sim.communication.virtual_clock import Link
from fl_sim.core.plain_pickle import read_plain_pickle
from fl_sim.core.types import UserError

MOST_BYTES = 1 << 30
"""Of a trace; FedScale's have some hundred megabytes."""
MOST_INTERVALS = 10_000_000
TRAINING = 3.0
"""Time of a training step over that of the forward pass that FedScale's capacity gives (its `augmentation_factor`)."""
log = logging.getLogger("fl_sim")
T = TypeVar("T")
Interval = tuple[float, float]


@dataclass(frozen=True)
class Device:
    """A client's link, and the training samples that it takes a second."""

    link: Link
    samples_per_s: float


@dataclass(frozen=True)
class Availability:
    """When each client is reachable: sorted intervals in virtual seconds, repeated after its period."""

    periods: Sequence[float]
    intervals: Sequence[Sequence[Interval]]

    def until(self, client: int, now: float) -> float | None:
        """Until when the client stays reachable; None where it is not reachable now, infinity where it always stays."""
        own, period = self.intervals[client], self.periods[client]
        phase = now % period
        place = bisect.bisect_right(own, (phase, math.inf)) - 1
        if place < 0 or phase >= own[place][1]:
            return None
        end, base = own[place][1], now - phase
        if end < period or own[0][0] > 0:
            return base + end
        return math.inf if own[0][1] == period else base + period + own[0][1]

    def next_start(self, client: int, now: float) -> float:
        """When the client is reachable next: `now` where it is; infinity where it never is."""
        if self.until(client, now) is not None:
            return now
        own, period = self.intervals[client], self.periods[client]
        if not own:
            return math.inf
        phase = now % period
        place = bisect.bisect_left(own, (phase, -math.inf))
        ahead = own[place][0] if place < len(own) else own[0][0] + period
        start = now - phase + ahead
        return start if start > now else math.nextafter(now, math.inf)


def read_availability(path: Path, clients: int) -> Availability:
    """Read when each of `clients` clients is reachable.

    Raises:
        UserError: one line that names the file, the place in it and what is allowed.
    """
    where = f"schedule.availability = {str(path)!r}"
    tree = _tree(path, where, ("client", "start_s", "end_s"))
    if isinstance(tree, list):
        listed: dict[object, list[object]] = {}
        for row in tree:
            listed.setdefault(row[0].strip(), []).append(row[1:])
        period = max((_number(where, "end_s", row[2]) for row in tree), default=0.0)
        own: list[object] = _of_clients(where, dict[object, object](listed), clients)
    elif "clients" in tree:
        period = _number(where, "period_s", tree.get("period_s"))
        own = _of_clients(where, _mapping(where, tree["clients"]), clients)
    else:
        return _fedscale_behaviour(where, tree, clients)
    if not period > 0:
        raise UserError(f"{where}: period_s = {period:g}: must be above 0")
    return Availability([period] * clients, [_sorted(where, client, spans, period) for client, spans in enumerate(own)])


def read_devices(path: Path, clients: int) -> Sequence[Device]:
    """Read link and speed of each of `clients` clients; raises as `read_availability` does."""
    where, names = f"schedule.devices = {str(path)!r}", ("samples_per_s", "down_mbps", "up_mbps", "latency_ms")
    tree = _tree(path, where, ("client", *names))
    if isinstance(tree, list):
        own: Sequence[object] = _of_clients(
            where, {row[0].strip(): dict(zip(names, row[1:], strict=True)) for row in tree}, clients
        )
        if len({row[0].strip() for row in tree}) < len(tree):
            raise UserError(f"{where}: a client has two lines")
    elif "clients" in tree:
        own = _of_clients(where, _mapping(where, tree["clients"]), clients)
    else:
        every = list(tree.items())
        return [_fedscale_device(where, *every[client % len(every)]) for client in range(clients)]
    return [_device(where, client, _mapping(where, entry), names) for client, entry in enumerate(own)]


def trace_hash(key: str, path: Path) -> str:
    """SHA-256 of a trace, as hexadecimal digits. Raises UserError where `key` of the config names no file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{key} = {str(path)!r}: {error.strerror or error}") from error


def _tree(path: Path, where: str, header: Sequence[str]) -> list[list[str]] | Mapping[object, object]:
    """Rows of a CSV file, or the mapping of the other forms; never empty."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        if data[:1] == b"\x80":
            found = read_plain_pickle(data)
        else:
            text = data.decode("utf-8-sig")  # spreadsheets write a byte order mark
            json_like = text.lstrip()[:1] == "{"
            found = json.loads(text, object_pairs_hook=_once) if json_like else _rows(text, header)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    if not isinstance(found, (list, dict)) or not found:
        raise UserError(f"{where}: an empty trace; needed: a line for each client")
    return found


def _rows(text: str, header: Sequence[str]) -> list[list[str]]:
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    first = [cell.strip() for cell in lines[0]] if lines else []
    if first != list(header):
        raise ValueError(f"first line {','.join(first)[:60]!r}; needed: {','.join(header)}")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ValueError(f"line {number} has {len(line)} cells; needed: {','.join(header)}")
    return lines[1:]


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; `json` keeps the last of two entries of one name and says nothing."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:40]!r} stands there twice")
        found[name] = value
    return found


def _mapping(where: str, value: object) -> Mapping[object, object]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where}: an empty trace, or no table of clients")
    return value


def _of_clients(where: str, entries: Mapping[object, T], clients: int) -> list[T]:
    """The entries in the order of the clients, each of whom has one."""
    found: dict[int, T] = {}
    for name, entry in entries.items():
        text = str(name).strip()
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < clients):
            raise UserError(f"{where}: unknown client {text[:40]!r}; the federation has 0 to {clients - 1}")
        if int(text) in found:
            raise UserError(f"{where}: client {int(text)} stands there twice, once as {text!r}")
        found[int(text)] = entry
    if missing := [client for client in range(clients) if client not in found]:
        raise UserError(f"{where}: nothing on client {missing[0]} ({len(missing)} of {clients} clients are missing)")
    return [found[client] for client in range(clients)]


def _number(where: str, name: str, value: object, least: float = 0.0) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(cast("str", value))
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number < math.inf:
        raise UserError(f"{where}: {name} = {str(value)[:40]!r}: must be a number of at least {least:g}")
    return number


def _sorted(where: str, client: int, spans: object, period: float) -> list[Interval]:
    """The intervals of a client, checked and in order; those that touch are one, since the client does not leave between them."""
    if not isinstance(spans, (list, tuple)):
        raise UserError(f"{where}: client {client}: no list of intervals")
    own: list[Interval] = []
    for span in spans:
        if not isinstance(span, (list, tuple)) or len(span) != 2:
            raise UserError(f"{where}: client {client}: an interval is a start and an end in seconds")
        start, end = (
            _number(where, f"client {client}: {name}", v) for name, v in zip(("start", "end"), span, strict=True)
        )
        if not start < end <= period:
            raise UserError(
                f"{where}: client {client}: from {start:g} to {end:g} s; needed: start < end <= period {period:g}"
            )
        own.append((start, end))
    own.sort()
    joined: list[Interval] = []
    for start, end in own:
        if joined and start < joined[-1][1]:
            raise UserError(f"{where}: client {client}: intervals overlap at {start:g} s")
        if joined and start == joined[-1][1]:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _device(where: str, client: int, entry: Mapping[object, object], names: Sequence[str]) -> Device:
    if wrong := set(map(str, entry)) ^ set(names):
        raise UserError(f"{where}: client {client}: {sorted(wrong)[0]!r}; needed: {', '.join(names)}")
    samples, down, up, latency = (_number(where, f"client {client}: {name}", entry[name]) for name in names)
    if not min(samples, down, up) > 0:
        raise UserError(f"{where}: client {client}: {', '.join(names[:3])} must be above 0")
    return Device(Link(down, up, latency), samples)


def _fedscale_device(where: str, name: object, value: object) -> Device:
    """FedScale's capacity: `computation` in ms of a forward pass for one sample, `communication` in kbit/s both ways."""
    entry = _mapping(where, value)
    forward, rate = (
        _number(where, f"entry {str(name)[:40]}: {key}", entry.get(key)) for key in ("computation", "communication")
    )
    if not min(forward, rate) > 0:
        raise UserError(f"{where}: entry {str(name)[:40]}: computation and communication must be above 0")
    return Device(Link(rate / 1e3, rate / 1e3, 0.0), 1e3 / (TRAINING * forward))


def _fedscale_behaviour(where: str, tree: Mapping[object, object], clients: int) -> Availability:
    """FedScale's behaviour: reachable from `active[i]` to `inactive[i]`, repeated after `finish_time`."""
    every, periods, found, odd = list(tree.items())[:clients], list[float](), list[list[Interval]](), 0
    total = 0
    for name, value in every:
        entry, at = _mapping(where, value), f"entry {str(name)[:40]}"
        periods.append(period := _number(where, f"{at}: finish_time", entry.get("finish_time"), least=1.0))
        starts, ends = entry.get("active"), entry.get("inactive")
        if not isinstance(starts, list) or not isinstance(ends, list) or abs(len(starts) - len(ends)) > 1:
            raise UserError(f"{where}: {at}: needed: lists active and inactive of equal length")
        pairs = [
            (_number(where, f"{at}: active", start), min(period, _number(where, f"{at}: inactive", end)))
            for start, end in zip(starts, ends, strict=False)
        ]
        good = [(start, end) for start, end in pairs if start < end]
        odd += len(pairs) - len(good)
        found.append(_sorted(where, len(found), good, period))
        if (total := total + len(pairs)) > MOST_INTERVALS:
            raise UserError(f"{where}: {at}: more than {MOST_INTERVALS:,} intervals")
    if odd:
        log.warning("%s: %d intervals that end before they begin are left out", where, odd)
    count = len(every)
    return Availability([periods[c % count] for c in range(clients)], [found[c % count] for c in range(clients)])
