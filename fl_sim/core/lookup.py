"""Names that users write: an entry of a table, or `module:name` of their own."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TypeVar, cast, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from fl_sim.core.errors import UserError, error_line
from fl_sim.core.own_packages import hidden

T = TypeVar("T")


def find(key: str, name: str, table: Mapping[str, T]) -> T:
    """The entry `name` of `table`, or the object behind an import path; `key` is the config key for the message.

    Raises:
        UserError: neither; names the nearest entry and all of them.
    """
    if name in table:
        return table[name]
    if ":" in name:
        return cast(T, imported(f"{key} = ", name))
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"{key} = {name!r}: unknown; {hint}allowed: {', '.join(table)}, or module:name")


def imported(where: str, path: str) -> object:
    """Import a callable by its path, `module:name`; `where` starts the error message.

    Raises:
        UserError: no such module, a module that cannot be imported, no such name in it, or not a function.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise UserError(f"{where}{path!r} is no import path; write 'module:name'")
    loaded = _loaded(f"{where}{path!r}", module)
    found: object = getattr(loaded, name, None)
    if found is None:
        hint = _hint(module) or _inside(loaded, name)
        raise UserError(f"{where}{path!r}: {module!r} has no callable {name!r}{hint}")
    if not callable(found):
        raise UserError(f"{where}{path!r} is of type {type(found).__name__}; needed: a function")
    return found


def _loaded(where: str, module: str) -> ModuleType:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # argparse prints its usage before it exits
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {error}; looked for here and among what is installed{_hint(module)}") from error
    except SystemExit as error:
        last = said.getvalue().strip().rpartition("\n")[2]
        said = io.StringIO()
        reason = f"importing {module} called sys.exit({error.code!r})" + (f" after it said {last!r}" if last else "")
        guard = "what only a script does belongs under `if __name__ == '__main__':`"
        raise UserError(f"{where}: {reason}; {guard}") from error
    except Exception as error:  # the user's own module, whatever it raises
        raise UserError(
            f"{where}: importing {module} raised {error_line(error)}{_hint(module.partition('.')[0])}"
        ) from error
    finally:
        sys.stderr.write(said.getvalue())


def _hint(module: str) -> str:
    """The end of an error message: which file of the user's has the name of a module of fl-sim's; empty where none has."""
    file = hidden(module)
    return "" if file is None else f"; fl-sim has a module {module!r} of its own, so {file} is not seen: rename it"


def _inside(module: ModuleType, name: str) -> str:
    """The end of an error message: the callables of a module; of a package that has none, its modules."""
    public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    parts = [part.name for part in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    if public or not parts:
        return nearest(name, public)
    return f"; it is a package, and its functions are in {', '.join(f'{module.__name__}.{part}' for part in parts)}"


def nearest(word: str, allowed: Sequence[str]) -> str:
    """The end of an error message: the likeliest of what is allowed, or all of it."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(allowed) or 'none'}"


def typed(where: str, function: Callable[..., object], options: Mapping[str, object]) -> None:
    """Check the types of options against the annotations of a function's parameters.

    Annotations that cannot be checked against a value of a config are skipped.

    Raises:
        UserError: names the option, its value and what is allowed.
    """
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return
    for name in options.keys() & hints.keys():
        try:
            TypeAdapter(hints[name]).validate_json(json.dumps(options[name]), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            key, value = ".".join(map(str, (name, *first["loc"]))), repr(first["input"])[:60]
            raise UserError(f"{where}: {key} = {value}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
        except PydanticUserError:
            continue


def takes(where: str, function: Callable[..., object], *names: str, **keywords: object) -> None:
    """Complain of a user's function that cannot be called with these positional arguments, and these keyword arguments.

    Raises:
        UserError: it cannot; names what it is called with, and what it takes.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # built in: it says nothing of itself
        return
    try:
        signature.bind(*names, **keywords)
    except TypeError as error:
        called = ", ".join([*names, *(f"{key}={value!r}" for key, value in keywords.items())])
        raise UserError(f"{where}: {error}; it is called with ({called}) and takes {signature}") from error


def accepts(where: str, function: object, **arguments: object) -> None:
    """Complain of a function of the user's that cannot be called with these keyword arguments.

    Raises:
        UserError: it cannot; names what it is called with.
    """
    try:
        signature = inspect.signature(cast("type", function))
    except ValueError:  # built in: it says nothing of itself
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"{where}: {error}; it is called with {', '.join(arguments)}") from error
