"""Tries a user's own server rules once, on the first model of a run, so that a wrong one is one line before round 1."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Integral
from typing import cast

import torch
from torch import Tensor, nn

from fl_sim.codecs import Schema
from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.core.types import MaskRule, Params, Update, UserError
from fl_sim.models.module_state import ModuleState
from fl_sim.runtime.client.kept_between_calls import RULE, UNREADABLE, Watch, homes
from fl_sim.sparsity import magnitude
from strategies.server_step import ServerState, masked, server_step

log = logging.getLogger("fl_sim")


def state_of(schema: Schema, start: Params) -> ServerState:
    """The server before round 1."""
    return ServerState(schema, start)


def attempt(rules: Mapping[str, object], schema: Schema, start: Params) -> None:
    """Call each rule once and look at what it returns.

    Args:
        rules: option of the strategy ("aggregate", "allocate", "mask_rule") -> the user's function.
        schema: names and shapes of what the federation exchanges.
        start: the first global parameters; copied, never handed out.

    Raises:
        UserError: names the option, what its rule did, and what is needed.
    """
    for key, rule in rules.items():
        if key in TRIED:
            with unchanged_settings(), seeded(0), _put_back(f"strategy.{key}", rule):
                TRIED[key](f"strategy.{key}", cast("Callable[..., object]", rule), schema, start)


class _Holder(nn.Module):
    """Something of a user's, as `ModuleState` takes it."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.places = [held]


class _Before:
    """A rule, and the globals of the modules that it lies in, as they were.

    An object whose state is out of reach, such as an iterator, is left as it is.
    """

    def __init__(self, rule: object) -> None:
        self.names = [(vars(sys.modules[home]), dict(vars(sys.modules[home]))) for home in sorted(homes(rule))]
        self.states: list[ModuleState] = []
        held = (value for _, saved in self.names for name, value in saved.items() if not name.startswith("__"))
        for each in (rule, *held):
            with suppress(UserError, *UNREADABLE):
                self.states.append(ModuleState(_Holder(each)))

    def put_back(self) -> None:
        for present, saved in self.names:
            for name in present.keys() - saved.keys():
                del present[name]
            present.update(saved)
        for state in self.states:
            with suppress(*UNREADABLE), torch.inference_mode():  # which also writes to tensors that were made in it
                state.put_back()


@contextmanager
def _put_back(where: str, rule: object) -> Iterator[None]:
    """Context manager for a trial: what the rule keeps in its module or on itself is as before, so that no round finds it.

    What cannot be put back is said. Nothing is touched where the trial left nothing.
    """
    first, second = (Watch.of(rule, role=RULE) for _ in range(2))
    if first is None or second is None:  # this package's own rules keep nothing
        yield
        return
    before = _Before(rule)
    for watch in (first, second):
        watch.called()
    try:
        yield
    finally:
        if first.called():
            before.put_back()
        if left := second.called():
            log.warning("%s: its trial before round 1 cannot be taken back: %s", where, left)


def one() -> float:
    """A metric of a trial."""
    return 1.0


def _try_aggregate(where: str, rule: Callable[..., object], schema: Schema, start: Params) -> None:
    """Two clients send the first model."""
    state = ServerState(schema, schema.view(schema.flat(start).clone()))
    # A rule may read whatever its clients report: every metric is 1.
    updates = (Update(schema.view(schema.flat(start).clone()), 10, metrics=defaultdict(one)) for _ in range(2))
    try:
        made = rule(state, updates)
    except USERS_OWN as error:  # the user's own, whatever it is
        raise UserError(f"{where}: on two updates of the first model it raised {error_line(error)}") from error
    if not isinstance(made, Mapping):
        raise UserError(f"{where}: the aggregation rule returned {type(made).__name__}, not parameters by name")
    for name, value in made.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: returned {name!r} as {type(value).__name__}; needed: torch tensors")
    if unknown := sorted(made.keys() - set(schema.names)):
        raise UserError(f"{where}: returned names that the model lacks: {', '.join(unknown[:3])}")
    try:
        server_step(state, [], aggregate=lambda state, updates: cast("Params", made))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _try_allocate(where: str, rule: Callable[..., object], schema: Schema, start: Params) -> None:
    """Half of the first model's weights."""
    scores = magnitude({name: start[name] for name in schema.prunable})
    try:
        kept = rule(scores, 0.5, min_keep=0)
    except USERS_OWN as error:  # the user's own, whatever it is
        raise UserError(f"{where}: at density 0.5 it raised {error_line(error)}") from error
    if not isinstance(kept, Mapping) or kept.keys() != scores.keys():
        got = f"counts of {', '.join(map(str, list(kept)[:3]))}" if isinstance(kept, Mapping) else type(kept).__name__
        raise UserError(f"{where}: returned {got}; needed: weights kept of each of {', '.join(list(scores)[:3])}")
    for name, count in kept.items():
        if isinstance(count, bool) or not isinstance(count, Integral) or not 0 <= int(count) <= scores[name].numel():
            allowed = f"an integer from 0 to {scores[name].numel()}"
            raise UserError(f"{where}: keeps {count!r} of {name!r} ({type(count).__name__}); needed: {allowed}")


def _try_mask_rule(where: str, rule: Callable[..., object], schema: Schema, start: Params) -> None:
    """The first model after round 0, as every run asks before its first round."""
    state = ServerState(schema, schema.view(schema.flat(start).clone()))
    try:
        masked(state, None, adjust_mask=cast("MaskRule", rule), calibrate=None)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except USERS_OWN as error:  # the user's own, whatever it is
        raised = error.__cause__ or error  # `masked` names the rule, as in a run
        raise UserError(f"{where}: on the first model it raised {error_line(raised)}") from error


TRIED: Mapping[str, Callable[[str, Callable[..., object], Schema, Params], None]] = {
    "aggregate": _try_aggregate,
    "allocate": _try_allocate,
    "mask_rule": _try_mask_rule,
}
"""Option of a strategy -> a trial of its rule on the first model."""
