"""A Flower app as a folder: its `pyproject.toml` names ServerApp, ClientApp and run config, as `flwr run` reads it."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.runtime.apps.grid import Scalar

A = TypeVar("A")
FILE = "pyproject.toml"
_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_QUOTED = re.compile(r"""("[^"]*"|'[^']*')""")


@dataclass(frozen=True)
class Project:
    """A Flower app that was read and not imported yet.

    Attributes:
        path: its folder.
        name: `[project] name`.
        server, client: `[tool.flwr.app.components]`, as `module:attribute`.
        config: `[tool.flwr.app.config]`, tables flattened with dots.
        clients: nodes of a federation that the file names; None where it names none.
    """

    path: Path
    name: str
    server: str
    client: str
    config: Mapping[str, Scalar]
    clients: int | None

    @classmethod
    def read(cls, path: Path) -> Project:
        """Read an app's folder, or its `pyproject.toml`.

        Raises:
            UserError: no such file, no TOML, or no Flower app.
        """
        file = path / FILE if path.is_dir() else path
        try:
            found = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or error}; a Flower app is a folder with a {FILE}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {error}") from error
        flower = _table(found, "tool.flwr", file)
        parts = _table(flower, "app.components", file)
        server, client = (_reference(parts.get(name), name, file) for name in ("serverapp", "clientapp"))
        config = _table(flower, "app.config", file, missing={})
        folder, project = file.parent.resolve(), _table(found, "project", file, missing={})
        return cls(
            folder,
            str(project.get("name", folder.name)),
            server,
            client,
            dict(_flat(config, f"{file}: [tool.flwr.app.config]")),
            _federation(flower),
        )

    def configured(self, words: str) -> Mapping[str, Scalar]:
        """The run config with overrides, as `--run-config` gives them: `key=value` pairs, or the path of a TOML file.

        Raises:
            UserError: no TOML, an open quote, a key that is given twice or that the app's config lacks, or a value of another type.
        """
        config = dict(self.config)
        for key, value in pairs(words, "--run-config").items():
            if key not in config:
                allowed = ", ".join(config) or "none: [tool.flwr.app.config] is empty"
                raise UserError(f"--run-config: {key}: the app has no such key; allowed: {allowed}")
            if isinstance(config[key], float) and type(value) is int:
                value = float(value)
            if type(value) is not type(config[key]):
                raise UserError(
                    f"--run-config: {key} = {value!r} is of type {type(value).__name__}; "
                    f"the app's {config[key]!r} is of type {type(config[key]).__name__}"
                )
            config[key] = value
        return config

    def load(self) -> tuple[ServerApp, ClientApp]:
        """Import both apps; the folder comes first on `sys.path` from here on, as processes of clients need it too.

        Raises:
            UserError: an import that fails, or an attribute that is no such app.
        """
        sys.path[:] = [str(self.path), *(p for p in sys.path if p != str(self.path))]
        return self._imported("serverapp", self.server, ServerApp), self._imported("clientapp", self.client, ClientApp)

    def _imported(self, key: str, path: str, kind: type[A]) -> A:
        module, attribute = path.split(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except USERS_OWN as error:
            raise UserError(f"{self.path / FILE}: {key} = {path!r}: {error_line(error)}") from error
        if not isinstance(found, kind):
            raise UserError(f"{self.path / FILE}: {key} = {path!r} is a {type(found).__name__}, not a {kind.__name__}")
        return found


def pairs(words: str, where: str) -> Mapping[str, Scalar]:
    """`key=value` pairs with TOML values, separated by spaces; or the content of a TOML file, if that is what it names."""
    text = words.strip()
    if text.endswith(".toml"):
        try:
            return dict(_flat(tomllib.loads(Path(text).read_text(encoding="utf-8")), where))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: {text}: {error}") from error
    if rest := _WORD.sub("", text).strip():
        raise UserError(f"{where}: {text!r}: a quote {rest[0]} is not closed")
    found: dict[str, Scalar] = {}
    for word in _WORD.findall(text):
        try:
            own = dict(_flat(tomllib.loads(word), where))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{where}: {word!r} is no key=value with a TOML value; strings need quotes") from error
        if "#" in _QUOTED.sub("", word):
            raise UserError(f"{where}: {word!r}: what stands behind # is a comment in TOML; put it in quotes")
        if twice := own.keys() & found.keys():
            raise UserError(f"{where}: {min(twice)} is given twice")
        found |= own
    return found


def _flat(table: Mapping[str, object], where: str, prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, where, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{prefix}{key}", value
        else:
            raise UserError(f"{where}: {prefix}{key} is a {type(value).__name__}; allowed: bool, int, float, str")


def _reference(value: object, name: str, file: Path) -> str:
    if not isinstance(value, str) or value.count(":") != 1:
        raise UserError(f'{file}: [tool.flwr.app.components] needs {name} = "module:attribute"')
    return value


def _table(
    outer: Mapping[str, object], path: str, file: Path, *, missing: dict[str, object] | None = None
) -> dict[str, object]:
    inner: object = outer
    for key in path.split("."):
        inner = inner.get(key) if isinstance(inner, dict) else None
    if inner is None and missing is not None:
        return missing
    if not isinstance(inner, dict):
        raise UserError(f"{file}: no table [{f'tool.flwr.{path}' if path.startswith('app') else path}]: no Flower app")
    return cast(dict[str, object], inner)


def _federation(flower: Mapping[str, object]) -> int | None:
    """`num-supernodes` of the default federation, where the file names one."""
    federations = flower.get("federations")
    if not isinstance(federations, dict):
        return None
    chosen = federations.get(str(federations.get("default", "local-simulation")))
    options = chosen.get("options") if isinstance(chosen, dict) else None
    count = options.get("num-supernodes") if isinstance(options, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None
