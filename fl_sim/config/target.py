"""Parts named in a config by import path, with their options: the client and the strategy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fl_sim.config.toml import Json, has_null
from fl_sim.core.attribute_reads import reads
from fl_sim.core.given import path_of
from fl_sim.core.lookup import imported, nearest, typed
from fl_sim.core.types import UserError
from fl_sim.training.client import DECLARED

GIVEN = 2
"""Positional arguments that a client function is called with: task and context."""


class Target(BaseModel):
    """Something named by import path, with its keyword arguments: `"module:name"` or `{ target = "...", key = ... }`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    target: Annotated[str, BeforeValidator(path_of)] = Field(
        description="import path, `module:name`; `fl-sim list` shows those of the project"
    )

    @model_validator(mode="after")
    def _options_have_values(self) -> Self:
        """A null option would be lost in config.toml, and the run that is loaded from there would be another one."""
        if empty := [key for key, value in self.options.items() if has_null(value)]:
            raise ValueError(f"option {empty[0]!r} is null: TOML has no null; leave it out for its default")
        return self

    @property
    def options(self) -> dict[str, Json]:
        """The keyword arguments."""
        return dict(self.model_extra or {})

    def resolve(self) -> Callable[..., object]:
        """Import the object that the path names.

        Raises:
            UserError: no such module or name.
        """
        return cast("Callable[..., object]", imported("", self.target))

    def build(self, given: Mapping[str, object], key: str = "") -> object:
        """Build the object that the path names.

        A preset (all parameters keyword-only) or a class is called with the options, and with those entries of `given`
        that it has parameters for. Any other function, such as a client `(task, ctx)`, is used as it is: an option that
        the function has a parameter for, such as `lr` of `(task, ctx, lr=0.05)`, is passed at every call. Numbers and
        texts also travel in `task.config`. `key` is the table's key in the config, for messages.

        Raises:
            UserError: an option that the object needs and that is not given, that it does not take, that has a wrong type, or
                that could never reach it.
        """
        found = self.resolve()
        try:
            parameters = inspect.signature(found).parameters
        except ValueError as error:
            raise UserError(f"{self.target!r}: is built in and does not say what it takes; write a function") from error
        if _is_plain(found, parameters):
            return self._with_options(found, parameters)
        if unknown := [option for option in self.options if option not in parameters]:
            raise UserError(f"{self.target!r} has no option {unknown[0]!r}{nearest(unknown[0], list(parameters))}")
        typed(repr(self.target), found, self.options)
        wanted = {k: v for k, v in given.items() if k in parameters}
        if missing := [name for name in _required(parameters) if name not in wanted and name not in self.options]:
            raise UserError(f"{self.target!r} needs {', '.join(f'{key}.{name}' if key else name for name in missing)}")
        try:
            return found(**{**wanted, **self.options})
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.target!r}: {error}") from error
        except SystemExit as error:
            raise UserError(f"{self.target!r} called sys.exit({error.code!r}) when it was called") from error

    def routes(self) -> dict[str, str]:
        """Option -> how it reaches a plain function: `its parameter` or `task.config`; none of a preset or a class.

        Raises:
            UserError: no such module or name.
        """
        found = self.resolve()
        parameters = inspect.signature(found).parameters
        if not _is_plain(found, parameters):
            return {}
        named = _named(parameters)
        return {key: "its parameter" if key in named else f"task.config[{key!r}]" for key in self.options}

    def _with_options(
        self, found: Callable[..., object], parameters: Mapping[str, inspect.Parameter]
    ) -> Callable[..., object]:
        """A function that is given its options by name, at every call."""
        named = _named(parameters)
        mine = {key: value for key, value in self.options.items() if key in named}
        typed(repr(self.target), found, mine)
        for key, value in self.options.items():
            if key in mine:
                continue
            if not isinstance(value, (bool, int, float, str)):
                hint = f"only numbers and texts travel in task.config; give the function a parameter {key!r}"
                raise UserError(f"{self.target!r}: option {key} = {value!r}: {hint}")
            self._require_a_reader(key, found, named)
        return _declaring(partial(found, **mine), found) if mine else found

    def _require_a_reader(self, key: str, found: Callable[..., object], parameters: Sequence[str]) -> None:
        """Complain of an option that goes into `task.config`, and that no code of the function reads there."""
        read = reads(found, "config")
        if key in read.keys | read.words if read.any else key in read.keys:
            return
        known = [*parameters, *sorted(read.keys)]
        near = get_close_matches(key, known, n=1, cutoff=0.6)
        if read.any and not near:  # task.config as a whole is used: nobody can know
            return
        ways = f"the function has no parameter {key!r}, and its code never reads task.config[{key!r}]"
        hint = f"did you mean {near[0]!r}?" if near else f"it reads {', '.join(known) or 'no option'}"
        raise UserError(f"{self.target!r}: option {key} = {self.options[key]!r} would reach nothing: {ways}; {hint}")


def _is_plain(found: Callable[..., object], parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether something is a function that is used as it is, neither a preset nor a class."""
    return not inspect.isclass(found) and any(p.kind is not p.KEYWORD_ONLY for p in parameters.values())


def _declaring(function: partial[object], found: Callable[..., object]) -> Callable[..., object]:
    """A function with its options, which says of itself what the function does: `partial` drops attributes."""
    for name in DECLARED:
        if hasattr(found, name):
            setattr(function, name, getattr(found, name))
    return function


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Parameters that can be given by name and have no default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in parameters.items() if p.kind in kinds and p.default is p.empty]


def _named(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Parameters of a plain function, behind task and context, that can be given by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in parameters.items() if p.kind in kinds][GIVEN:]


def or_preset(default: str) -> BeforeValidator:
    """A bare import path or function is a target, and a table of options without one is about the default."""

    def complete(value: object) -> object:
        named = path_of(value)
        given = {"target": named} if isinstance(named, str) else named
        return {"target": default, **given} if isinstance(given, dict) else given

    return BeforeValidator(complete)


FEDAVG_CLIENT, FEDAVG = "clients.presets:fedavg", "strategies.presets:fedavg"
