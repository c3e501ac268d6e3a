"""Tries parts of a user's own other than clients, and says in plain words what is wrong: `fl-sim doctor --aggregate mine:f`.

Rules of the server see the first model of a small federation on the digits; partitions see the digits' labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fl_sim import data, models
from fl_sim.codecs import Schema
from fl_sim.config.codecs import codec_path
from fl_sim.config.toml import Json
from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.core.lookup import imported, takes
from fl_sim.core.types import Mask, Params, Update
from fl_sim.data import Data
from fl_sim.data.kinds import Targets
from fl_sim.data.own import is_own
from fl_sim.data.table import Columns
from fl_sim.models.parameters import snapshot
from fl_sim.runtime.client.doctor import Finding
from fl_sim.simulation import codec_doctor
from fl_sim.simulation.codec_doctor import Tried
from fl_sim.simulation.parts import RULES

CLIENTS, SEED = 8, 3


@dataclass(frozen=True)
class Part:
    """A user's part, and the small federation that it is tried in; of a table, its columns and the kind of its targets."""

    key: str
    path: str
    model: str = "cnn_bn"
    options: Mapping[str, Json] = field(default_factory=dict)
    columns: Columns | None = None
    targets: Targets = Targets.CLASSES

    @property
    def call(self) -> Callable[..., object]:
        """The user's function."""
        return cast("Callable[..., object]", imported(f"{self.key} = ", self.path))

    def load(self, *, quiet: bool = True) -> Data:
        """The data of a source."""
        return data.load(self.path, quiet=quiet, columns=self.columns, targets=self.targets)

    @cached_property
    def schema(self) -> Schema:
        """Names and shapes of the model."""
        built = models.build(self.model, in_channels=1, image_size=8)
        return Schema.of(snapshot(built), models.prunable_names(built))

    @property
    def start(self) -> Params:
        """The first model's parameters: a copy at every call."""
        built = models.build(self.model, in_channels=1, image_size=8)
        return self.schema.view(self.schema.flat(snapshot(built)).clone())

    @property
    def prunable(self) -> Params:
        """The prunable ones of them."""
        start = self.start
        return {name: start[name] for name in self.schema.prunable}

    def server_rule(self, name: str) -> Callable[..., object]:
        """A function of `strategies.trials`."""
        return cast("Callable[..., object]", imported("", f"strategies.trials:{name}"))


Check = Callable[[Part], str]


def _usable(part: Part) -> str:
    """It can be called, and its result can be used."""
    names, keywords = RULES[part.key]
    takes("signature", part.call, *names, **keywords)
    part.server_rule("attempt")({part.key: part.call}, part.schema, part.start)
    return ""


def _aggregate(part: Part, updates: Iterator[Update] | None = None, start: Params | None = None) -> Params:
    start = part.start if start is None else start
    given = iter([Update(part.start, 10), Update(part.start, 10)]) if updates is None else updates
    state = part.server_rule("state_of")(part.schema, start)
    return cast("Params", part.call(state, given))


def _agrees(part: Part) -> str:
    """From equal updates it makes the same."""
    trained = {name: value + 0.5 for name, value in part.start.items()}
    made = _aggregate(part, iter([Update(dict(trained), 10), Update(dict(trained), 10)]))
    wrong = [
        n for n, v in trained.items() if "running_var" not in n and not torch.allclose(made[n].float(), v, atol=1e-4)
    ]
    return f"two clients that both return {wrong[0]!r} + 0.5 gave something else" if wrong else ""


def _sparse(part: Part) -> str:
    """It minds what sparse updates did not send."""
    start = part.start
    mask = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in part.prunable.items()}
    held = {name: torch.zeros_like(v) if name in mask else v for name, v in start.items()}
    made = _aggregate(part, iter([Update(dict(held), 10, mask), Update(dict(held), 10, mask)]), start)
    lost = [name for name in mask if not torch.allclose(made[name], start[name], atol=1e-5)]
    hint = "update.mask says what was sent; right only where clients send everything"
    return f"weights that no client sent changed ({lost[0]}): {hint}" if lost else ""


def _once(part: Part) -> str:
    """It reads its updates once."""
    count = 0

    class Updates:
        def __iter__(self) -> Iterator[Update]:
            nonlocal count
            count += 1
            return iter([Update(part.start, 10), Update(part.start, 10)])

    _aggregate(part, cast("Iterator[Update]", Updates()))
    return f"it went through updates {count} times: they come once; keep them in a list" if count > 1 else ""


def _leaves_state(part: Part) -> str:
    """It leaves the server's parameters as they were."""
    start = part.start
    before = {name: value.clone() for name, value in start.items()}
    _aggregate(part, start=start)
    changed = [name for name, value in before.items() if not torch.equal(value, start[name])]
    return f"it changed state.params in place: {changed[0]}" if changed else ""


def _repeats(part: Part) -> str:
    """Called again with the same it gives the same."""
    pair = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - what a part must not use is what is varied here
            pair.append(_called(part))
    return (
        ""
        if _equal(*pair)
        else "another result at the second call: draw from the generator that it is given, or a seeded one"
    )


def _called(part: Part) -> object:
    if part.key == "aggregate":
        return _aggregate(part)
    if part.key == "allocate":
        return part.call({name: value.abs() for name, value in part.prunable.items()}, 0.5, min_keep=0)
    if part.key == "partition":
        return _parts(part)
    if part.key == "data":
        loaded = part.load()
        return [loaded.train.images, loaded.train.labels, loaded.test.images, loaded.test.labels]
    return _masks(part)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _masks(part: Part) -> list[object]:
    """Masks of a mask rule in rounds 0 to 3, each given to the next call."""
    made: list[object] = []
    for number in range(4):
        grads = None if number == 0 else {name: 0.1 * value for name, value in part.prunable.items()}
        made.append(part.call(number, made[-1] if made else None, part.prunable, grads))
    return made


def _fits(part: Part) -> str:
    """It can be called, and its masks fit the model."""
    names, keywords = RULES[part.key]
    takes("signature", part.call, *names, **keywords)
    for number, mask in enumerate(_masks(part)):
        if mask is None:
            continue
        if not isinstance(mask, Mapping):
            return (
                f"round {number}: it returned {type(mask).__name__}; needed: bool tensors by name, or None while dense"
            )
        for name, value in mask.items():
            if not isinstance(value, Tensor) or value.dtype != torch.bool:
                return f"round {number}: {name!r} is no tensor of bool"
        if missing := [name for name in part.prunable if name not in mask]:
            return f"round {number}: no mask of {missing[0]!r}; needed: one of every prunable tensor"
        try:
            part.schema.flat_mask(cast("Mask", mask))
        except ValueError as error:
            return f"round {number}: {error}"
    return ""


def _keeps_some(part: Part) -> str:
    """It leaves weights alive."""
    dead = [
        n for n, m in enumerate(_masks(part)) if isinstance(m, Mapping) and not any(bool(v.any()) for v in m.values())
    ]
    return f"round {dead[0]}: no weight is alive" if dead else ""


def _parts(part: Part) -> list[object]:
    labels = data.load("digits").train.labels.numpy()
    return list(data.partition(labels, CLIENTS, kind=part.path, seed=SEED))


def _covers(part: Part) -> str:
    """It spreads all samples over all clients."""
    _parts(part)
    return ""


def _loads(part: Part) -> str:
    """It loads, with samples to train, to validate and to test on."""
    loaded = part.load(quiet=False)
    sizes = {"train": len(loaded.train), "validation": len(loaded.validation), "test": len(loaded.test)}
    empty = [name for name, size in sizes.items() if not size]
    return f"no {empty[0]} samples; a run needs some" if empty else ""


def _varies(part: Part) -> str:
    """Its inputs differ, and their targets too."""
    loaded = part.load()
    inputs, targets = loaded.train.images, loaded.train.labels
    if len(torch.unique(targets)) < 2:
        return "all training samples have one target"
    return "all training inputs are equal" if bool((inputs == inputs[0]).all()) else ""


def _of_codec(check: Callable[[Tried], str]) -> Check:
    """A check of a codec as one of a part."""

    @wraps(check)
    def checked(part: Part) -> str:
        return check(Tried.of(part.path, part.options, part.schema))

    return checked


CHECKS: Mapping[str, tuple[Check, ...]] = {
    "aggregate": (_usable, _agrees, _sparse, _once, _leaves_state, _repeats),
    "mask_rule": (_fits, _keeps_some, _repeats),
    "allocate": (_usable, _repeats),
    "partition": (_covers, _repeats),
    "data": (_loads, _varies, _repeats),
    "codec": tuple(map(_of_codec, codec_doctor.CHECKS)),
}
"""Kind of part -> its checks, the first of which the others need."""


def examine_part(
    key: str,
    path: str,
    options: Mapping[str, Json] | None = None,
    *,
    columns: Columns | None = None,
    targets: Targets = Targets.CLASSES,
) -> list[Finding]:
    """Try a part; one finding a check, in order, and only the first where that finds something.

    Args:
        key: a kind, one of `CHECKS`.
        path: `module:function`; of a codec, a class or its name; of data, also a name, file or folder.
        options: of a codec, the further keys of its table.
        columns, targets: of data that are a table.

    Raises:
        UserError: no such function.
    """
    found = str(codec_path(path)) if key == "codec" else path
    part = Part(key, found, options=options or {}, columns=columns, targets=targets)
    if key != "data" or is_own(path):
        part.call  # noqa: B018 - wrong paths are said as everywhere
    findings: list[Finding] = []
    for check in CHECKS[key]:
        try:
            problem = check(part)
        except UserError as error:
            problem = str(error)
        except USERS_OWN as error:  # the user's own, whatever it is: this is what a doctor is for
            problem = f"it raised {error_line(error)}"
        findings.append(Finding((check.__doc__ or "").rstrip("."), problem))
        if problem and check is CHECKS[key][0]:
            break
    return findings
