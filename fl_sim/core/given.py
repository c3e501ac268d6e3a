"""Functions and classes given as Python objects, where a config has an import path."""

from __future__ import annotations

import inspect
import sys

MAIN = "__main__"
"""Module name of the running script or notebook."""


def path_of(given: object) -> object:
    """The import path, `module:name`, of a function or class; anything else as it is.

    Raises:
        ValueError: it is not what its module has under its name: made inside another function, a lambda, or wrapped.
    """
    if isinstance(given, str) or not callable(given):
        return given
    name, module = getattr(given, "__qualname__", None), getattr(given, "__module__", None)
    if (inspect.isroutine(given) or inspect.isclass(given)) and getattr(
        sys.modules.get(str(module)), str(name), None
    ) is given:
        return f"{module}:{name}"
    raise ValueError(
        f"{name or type(given).__name__!r} has no name at the top of its module; needed: a function made with `def`, or a class, "
        "of a script, notebook or file, not inside of a function"
    )
