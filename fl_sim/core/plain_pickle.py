"""Reads a pickle of plain data (dicts, lists, texts, numbers) without unpickling it: nothing is imported, nothing is called.

Some published data sets are pickles. `pickle.load` runs what the file says; this reader knows the instructions that make
data, and refuses every other by its name. Memory is bounded by the file: an instruction makes one object, or refers to one.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable

Plain = str | int | float | bool | None | list["Plain"] | dict["Plain", "Plain"]
_CONSTANTS: dict[str, Plain] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()  # noqa: SIM905
)
_IGNORED = frozenset(("PROTO", "FRAME", "STOP"))


class _Mark:
    """Where a list's or dict's items begin on the stack."""


class _Reader:
    def __init__(self) -> None:
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.at: dict[str, Callable[[object], None]] = {
            "MARK": lambda _: self.stack.append(_Mark()),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "MEMOIZE": lambda _: self.keep(len(self.memo)),
            "BINPUT": self.keep,
            "LONG_BINPUT": self.keep,
            "PUT": self.keep,
            "BINGET": self.recall,
            "LONG_BINGET": self.recall,
            "GET": self.recall,
            "DICT": lambda _: self.stack.append(self.paired({}, self.marked())),
            "LIST": lambda _: self.stack.append(self.marked()),
            "SETITEM": lambda _: self.set_items([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda _: self.set_items(self.marked()),
            "APPEND": lambda _: self.append([self.stack.pop()]),
            "APPENDS": lambda _: self.append(self.marked()),
        }

    def keep(self, number: object) -> None:
        self.memo[int(str(number))] = self.stack[-1]

    def recall(self, number: object) -> None:
        self.stack.append(self.memo[int(str(number))])

    def marked(self) -> list[object]:
        start = max(index for index, item in enumerate(self.stack) if isinstance(item, _Mark))
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def paired(self, into: object, items: list[object]) -> object:
        if not isinstance(into, dict) or len(items) % 2:
            raise ValueError("items of a dict without a dict")
        into.update(zip(items[::2], items[1::2], strict=True))
        return into

    def set_items(self, items: list[object]) -> None:
        self.paired(self.stack[-1], items)

    def append(self, items: list[object]) -> None:
        into = self.stack[-1]
        if not isinstance(into, list):
            raise ValueError("items of a list without a list")
        into.extend(items)


def read_plain_pickle(data: bytes) -> object:
    """The data of a pickle.

    Raises:
        ValueError: an instruction that does more than make plain data, or bytes that are no pickle.
    """
    reader = _Reader()
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name in _VALUES:
                reader.stack.append(argument)
            elif code.name in _CONSTANTS:
                reader.stack.append(_CONSTANTS[code.name])
            elif code.name in reader.at:
                reader.at[code.name](argument)
            elif code.name not in _IGNORED:
                raise ValueError(f"a pickle that does more than hold data ({code.name}); it is never run")
        (found,) = reader.stack
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("not a pickle of plain data") from error
    return found
