"""Claims of papers as data: `claims.toml`, and the method of each as a config in `methods/`.

    claims = read_claims()
    claims["stc"].ratio, claims["stc"].direction

A method is added by one table in `claims.toml` and one file `methods/NAME.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import get_type_hints

from fl_sim.bench.claims.parts import PARTS
from fl_sim.core.lookup import find, nearest
from fl_sim.core.types import UserError

DIRECTIONS: Mapping[str, str] = {"up": "uplink", "down": "downlink", "both": "both directions"}
"""Direction that a claim counts -> its words."""
FILE = "claims.toml"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says of the bytes of its method, and what of the method is different here.

    Attributes:
        title: of the method. paper: authors, year.
        version: the version of the paper that has the number.
        source: address of the paper.
        number: the number as the paper words it; empty = the paper claims nothing of bytes.
        ratio: how many times fewer bytes that is; None where `number` is empty.
        direction: which direction the paper counts: up, down, both.
        counts: the parts of our bytes that the paper's formula counts (`fl_sim.bench.claims.parts.PARTS`).
        formula: how the paper gets at the number. setting: data, model and clients of the paper.
        equations: equations or algorithm of the paper that the method's file stands for.
        deviations: what differs from the paper.
        cannot: task -> why the method cannot run on it.
    """

    title: str
    paper: str
    version: str
    source: str
    equations: str
    deviations: list[str]
    number: str = ""
    ratio: float | None = None
    direction: str = "up"
    counts: list[str] | None = None
    formula: str = ""
    setting: str = ""
    cannot: dict[str, str] | None = None

    def __post_init__(self) -> None:
        find("direction", self.direction, DIRECTIONS)
        for part in self.counts or ():
            find("counts", part, PARTS)
        for task in self.cannot or ():
            find("cannot", task, dict.fromkeys(task_names()))
        needed = {"ratio": self.ratio, "formula": self.formula, "setting": self.setting, "counts": self.counts}
        if self.number and (missing := [key for key, value in needed.items() if not value]):
            raise UserError(f"{missing[0]}: needed, since the claim has a number")
        if not self.number and self.ratio is not None:
            raise UserError(f"ratio = {self.ratio}: a claim without a number has no ratio")
        if self.ratio is not None and not self.ratio >= 1:
            raise UserError(f"ratio = {self.ratio}: must be at least 1: how many times fewer bytes")
        if not self.source.startswith("https://"):
            raise UserError(f"source = {self.source!r}: must be an address, https://...")


def folder() -> Traversable:
    """The folder of this package, with its TOML files."""
    return files("fl_sim.bench.claims")


def read_claims(text: str | None = None) -> dict[str, Claim]:
    """The claims by the name of their method; `text` in the place of the package's own file.

    Raises:
        UserError: not TOML, an unknown key, a value of another type, or a claim without what it needs.
    """
    given = (folder() / FILE).read_text(encoding="utf-8") if text is None else text
    try:
        tree = tomllib.loads(given)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{FILE}: not valid TOML: {error}") from error
    return {name: _claim(name, table) for name, table in tree.items()}


def _claim(name: str, table: object) -> Claim:
    where = f"{FILE}: {name}"
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: is a {type(table).__name__}; needed: a table, [{name}]")
    known = {field.name: field for field in fields(Claim)}
    types = get_type_hints(Claim)
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, list(known))}")
        if not _fits(value, types[key]):
            raise UserError(f"{where}: {key} = {value!r}: needed: {_words(types[key])}")
    required = [key for key, field in known.items() if field.default is MISSING]
    if missing := [key for key in required if key not in table]:
        raise UserError(f"{where}: {missing[0]} is missing")
    try:
        return Claim(**table)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _fits(value: object, kind: object) -> bool:
    if kind is str:
        return isinstance(value, str)
    if kind == float | None:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == dict[str, str] | None:
        return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _words(kind: object) -> str:
    known = {str: "a text", float | None: "a number", dict[str, str] | None: "a table of texts"}
    return known.get(kind, "a list of texts")  # type: ignore[call-overload, no-any-return]


def cannot(task: str) -> dict[str, str]:
    """Methods that cannot run on a task, and why."""
    return {name: why for name, claim in read_claims().items() if (why := (claim.cannot or {}).get(task))}


def tree_of(kind: str, name: str) -> dict[str, object]:
    """The config of a task (`kind` = "tasks"), or what a method ("methods") changes of it."""
    return tomllib.loads((folder() / kind / f"{name}.toml").read_text(encoding="utf-8"))


def task_names() -> Sequence[str]:
    """Names of the tasks."""
    return sorted(each.name.removesuffix(".toml") for each in (folder() / "tasks").iterdir())
