"""Running a model again from one layer on: what comes before it is returned from memory.

    with resumed(model, "layer3.0.conv1.weight", images) as (output, again):
        ...                     # change that parameter, and no other
        changed = again()       # bit for bit `model(images)`

It needs no knowledge of the model's structure. The outermost modules that do not own the parameter, and that are called
before any module that does, return what they returned the first time; all other code runs. Where the parameter is used
without a call of its module, everything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Forward = Callable[..., object]


@dataclass
class Entry:
    """A module call before the parameter's layer: the output to return again, or None where the call has to run.

    `copy` was made where later code changes the output in place; every repetition then gets a copy of its own.
    """

    output: Tensor | None
    copy: Tensor | None = None
    version: int = 0

    def settle(self) -> None:
        """Keep the copy if the output has changed since, and the output itself if not."""
        if self.output is not None and self.output._version == self.version:
            self.copy = None

    def value(self) -> Tensor | None:
        """Output of the call in this pass."""
        return self.output if self.copy is None else self.copy.clone()


@dataclass
class Tape:
    """The calls of one pass, in order; `at` is the position of a repetition."""

    entries: list[Entry] = field(default_factory=list)
    recording: bool = True
    passed: bool = False
    inside: bool = False
    at: int = 0

    def call(self, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """A module that does not own the parameter is called."""
        if self.passed or self.inside:
            return forward(*args, **kwargs)
        self.inside = True
        try:
            return (self._record if self.recording else self._repeat)(forward, args, kwargs)
        finally:
            self.inside = False

    def _record(self, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        inputs = _tensors((*args, *kwargs.values()))
        before = [value._version for value in inputs]
        output = forward(*args, **kwargs)
        # What changes its input in place has an effect besides its output, and runs every time.
        plain = isinstance(output, Tensor) and before == [value._version for value in inputs]
        if plain and isinstance(output, Tensor):
            self.entries.append(Entry(output, output.clone(), output._version))
        else:
            self.entries.append(Entry(None))
        return output

    def _repeat(self, forward: Forward, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        entry = self.entries[self.at]
        self.at += 1
        known = entry.value()
        return forward(*args, **kwargs) if known is None else known


def _tensors(values: Iterable[object]) -> list[Tensor]:
    """The tensors among arguments, and those in lists of them (a DenseNet passes lists)."""
    found = []
    for value in values:
        found += [value] if isinstance(value, Tensor) else _tensors(value) if isinstance(value, (list, tuple)) else []
    return found


@contextmanager
def resumed(model: nn.Module, name: str, images: Tensor) -> Iterator[tuple[Tensor, Callable[[], Tensor]]]:
    """(the model's output for `images`, a function that computes it again after the parameter `name` has changed).

    The model must be deterministic (evaluation mode); no gradients are recorded. Memory: the kept outputs.
    """
    parameter = model.get_parameter(name)
    owners = [m for m in model.modules() if any(p is parameter for p in m.parameters())]
    direct = [m for m in owners if any(p is parameter for p in m.parameters(recurse=False))]
    known = {id(m) for m in owners}
    heads = {id(m): m for owner in owners for m in owner.children() if id(m) not in known}
    tape = Tape()
    with ExitStack() as stack, torch.no_grad():
        for module in direct:
            stack.enter_context(_wrapped(module, _marking(tape)))
        for module in heads.values():
            stack.enter_context(_wrapped(module, _taped(tape)))
        output = model(images)
        for entry in tape.entries:
            entry.settle()
        tape.recording, uncalled = False, not tape.passed

        def again() -> Tensor:
            tape.passed, tape.at = uncalled, 0
            return model(images)  # type: ignore[no-any-return]

        yield output, again


def _marking(tape: Tape) -> Callable[[Forward], Forward]:
    def wrap(forward: Forward) -> Forward:
        def call(*args: object, **kwargs: object) -> object:
            tape.passed = True
            return forward(*args, **kwargs)

        return call

    return wrap


def _taped(tape: Tape) -> Callable[[Forward], Forward]:
    def wrap(forward: Forward) -> Forward:
        return lambda *args, **kwargs: tape.call(forward, args, kwargs)

    return wrap


@contextmanager
def _wrapped(module: nn.Module, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """Replace one module's `forward` for the block."""
    own = module.__dict__.get("forward")
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
