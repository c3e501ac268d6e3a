"""What a live page shows of run folders: read from their files as these grow, without a part in the run."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from threading import Lock
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from fl_sim.core.files import open_plain, read_plain

T = TypeVar("T")
Tree = Mapping[str, object]
POINTS = 300
"""Points of a run's curve that the page gets."""
RUNS = 60
"""Runs that a page shows, the newest."""
COLUMNS = ("round", "uplink_bytes", "downlink_bytes", "failures", "saved_bytes", "density")
METRIC, PERCENT = "accuracy", True
"""What a run measures whose live.json does not say."""
PIECE = 1 << 22
"""Bytes of rounds.jsonl that are read at a time."""
FILES = ("rounds.jsonl", "live.json", "summary.json", "config.toml")
"""What a run folder's view is made of: where none of them changed, nothing is read."""
Stamp = tuple[int, int, int] | None


@dataclass
class RunView:
    """A run folder, and its rounds so far: `update` and `refresh` read only what is new.

    Attributes:
        folder: the run's.
        metric: the column of rounds.jsonl that is drawn.
        percent: whether the metric is a share, which readers see in percent.
        rows: of each round, its number, the metric, and the further `COLUMNS`.
        told: the run as JSON, as it was last.
        changed: the version of the page's state in which `told` last changed.
    """

    folder: Path
    metric: str = METRIC
    percent: bool = PERCENT
    rows: list[tuple[float | None, ...]] = field(default_factory=list)
    told: Tree = field(default_factory=dict)
    changed: int = 0
    _read: int = 0
    _inode: int = 0
    _pid: object = None
    _seen: object = None

    def update(self, name: str, version: int) -> bool:
        """Tell the run anew under this name; whether that differs from what was told before."""
        now = [_stamp(self.folder / file) for file in FILES], _alive(self._pid), self._read, name
        if now == self._seen:
            return False
        self._seen = now
        self.refresh()
        told = self.shown() | {"name": name}
        if told == self.told:
            return False
        self.told, self.changed = told, version
        return True

    def refresh(self) -> None:
        """Take the lines that rounds.jsonl has gained; all of them where it was started anew."""
        path = self.folder / "rounds.jsonl"
        try:
            with open_plain(path) as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._read:
                    self._inode, self._read, self.rows = found.st_ino, 0, []
                    live = _json(self.folder / "live.json")
                    name, percent = live.get("metric"), live.get("percent")
                    self.metric, self.percent = (name, percent is True) if isinstance(name, str) else (METRIC, PERCENT)
                file.seek(self._read)
                data = file.read(PIECE)
        except OSError:
            return  # not yet, or not any more
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        self.rows += [row for line in whole.splitlines() if (row := _row(line, self.metric)) is not None]

    def shown(self) -> dict[str, object]:
        """The run as JSON."""
        live = _json(self.folder / "live.json")
        rounds, self._pid = live.get("rounds"), live.get("pid")
        finished = (self.folder / "summary.json").exists()
        running = not finished and "ended" not in live and _alive(self._pid)
        words = {(True, False): "finished", (False, True): "running"}
        status = words.get((finished, running), "stopped" if live else "not started" if not self.rows else "stopped")
        total = rounds if isinstance(rounds, int) else _rounds_of(self.folder)
        last = self.rows[-1] if self.rows else (0, None, 0, 0, 0, None, None)
        measured = [row for row in self.rows if row[1] is not None]
        step = max(1, -(-len(measured) // POINTS))
        return {
            "name": self.folder.name,
            "status": status,
            "round": last[0],
            "rounds": total,
            "eta": _left(self.folder / "live.json", live, total) if running else None,
            "answered": _typed(live.get("answered"), _COUNT, 0),
            "cohort": _typed(live.get("cohort"), _COUNT, 0),
            "up": last[2],
            "down": last[3],
            "failed": last[4],
            "saved": measured[-1][5] if measured else None,
            "alive": last[6],
            "sections": _typed(live.get("sections"), _SECTIONS, {}),
            "clients": _typed(live.get("clients"), _CLIENTS, []),
            "states": _typed(live.get("states"), _SECTIONS, {}),
            "failures": _typed(live.get("failures"), _FAILURES, []),
            "messages": _typed(live.get("messages"), _MESSAGES, []),
            "metric": self.metric,
            "percent": self.percent,
            "curve": [row[:4] for row in (*measured[:-1:step], *measured[-1:])],
        }


@dataclass
class Watch:
    """The runs under some places: run folders, and folders that hold them, whose later runs appear as they start."""

    places: Sequence[Path]
    _views: dict[Path, RunView] = field(default_factory=dict)
    _resolved: dict[Path, Path] = field(default_factory=dict)
    _version: int = 0
    _listed: object = None
    _one_at_a_time: Lock = field(default_factory=Lock)

    def state(self, since: int = 0) -> dict[str, object]:
        """All runs' names, the newest first, and the runs that changed after version `since` of the state as JSON.

        Several pages may ask at once. `version` is that of this answer; it is `since` where nothing changed.
        """
        with self._one_at_a_time:
            return self._state(since)

    def _state(self, since: int) -> dict[str, object]:
        folders = self._runs()
        shown = folders[:RUNS]
        names, left_out = _told_apart(shown), len(folders) - len(shown)
        views = [self._views.setdefault(folder, RunView(folder)) for folder in shown]
        version = self._version + 1
        news = [view.update(name, version) for view, name in zip(views, names, strict=True)]
        if any(news) or (names, left_out) != self._listed:
            self._version, self._listed = version, (names, left_out)
        runs = [view.told for view in views if view.changed > since or since > self._version]
        return {"version": self._version, "left_out": left_out, "names": names, "runs": runs}

    def _runs(self) -> list[Path]:
        """The run folders, the newest first; each path is resolved once only, for a folder may hold thousands of runs."""
        below = [child for place in self.places if place.is_dir() and not _is_run(place) for child in place.iterdir()]
        ages = {path: age for path in {*self.places, *below} if (age := _age(path / "config.toml")) is not None}
        found = {self._resolved.setdefault(path, path.resolve()): age for path, age in ages.items()}
        return sorted(found, key=lambda path: found[path], reverse=True)


def _told_apart(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, and those above it as far as runs of one name need them: `first/quickstart-bc58d0c5`."""
    names = [folder.name for folder in folders]
    for depth in range(2, max((len(folder.parts) for folder in folders), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        if not twice:
            break
        names = [
            os.path.join(*folder.parts[-depth:]) if name in twice else name
            for folder, name in zip(folders, names, strict=True)
        ]
    return names


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file()


def _age(path: Path) -> float | None:
    """When a file was written; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime if S_ISREG(found.st_mode) else None


def _stamp(path: Path) -> Stamp:
    """What differs once a file was written or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _row(line: bytes, metric: str) -> tuple[float | None, ...] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("round"), int):
        return None
    names = (COLUMNS[0], metric, *COLUMNS[1:])
    return tuple(value if isinstance(value := row.get(name), (int, float)) else None for name in names)


_COUNT: TypeAdapter[int] = TypeAdapter(int)
_SECTIONS: TypeAdapter[dict[str, int]] = TypeAdapter(dict[str, int])
_CLIENTS: TypeAdapter[list[tuple[int, str]]] = TypeAdapter(list[tuple[int, str]])
_FAILURES: TypeAdapter[list[tuple[int, int]]] = TypeAdapter(list[tuple[int, int]])
_MESSAGES: TypeAdapter[list[str]] = TypeAdapter(list[str])


def _typed(value: object, kind: TypeAdapter[T], otherwise: T) -> T:
    """A value of a file that anybody may have written; `otherwise` where it is of another type, so that the page goes on."""
    try:
        return kind.validate_python(value)
    except ValidationError:
        return otherwise


def _json(path: Path) -> Tree:
    try:
        tree = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError):
        return {}  # the run has not written it
    return tree if isinstance(tree, dict) else {}


def _rounds_of(folder: Path) -> int | None:
    try:
        rounds = tomllib.loads(read_plain(folder / "config.toml").decode()).get("rounds")
    except (OSError, ValueError, RecursionError):
        return None
    return rounds if isinstance(rounds, int) else None


def _alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True


def _left(path: Path, live: Tree, total: int | None) -> float | None:
    """Seconds until the last round when live.json was written, at the pace since this process started the run."""
    started, before, now_at = live.get("started"), live.get("done_before"), live.get("round")
    written = _age(path)
    if not isinstance(started, float) or not isinstance(before, int) or not isinstance(now_at, int):
        return None
    if total is None or written is None:
        return None
    return (written - started) / max(1, now_at - before) * max(0, total - now_at)
