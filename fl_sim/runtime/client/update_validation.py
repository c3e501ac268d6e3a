"""Validation of a client's update and state, brought into the form that travels; a normal update costs microseconds.

What is clear is taken: NumPy arrays and scalars, 0-d tensors, a module, a mask of zeros and ones. Everything else is
refused in one line that names the entry and its type. `BadUpdate` counts as an answer that is no update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fl_sim.codecs import Schema
from fl_sim.communication.extra import problem
from fl_sim.communication.messages import NUM_EXAMPLES
from fl_sim.core.types import FlatMask, FlatParams, Mask, Metrics, Params, Update
from fl_sim.models.parameters import UNWRAPPED, snapshot

MOST_EXAMPLES = 2**31
"""Below this is what the server accepts."""
KEPT = {torch.float64, torch.float32, torch.float16, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32}
KEPT |= {torch.int64}
"""Types of tensors that a client may keep: those that NumPy and safetensors both know."""


class BadUpdate(ValueError):
    """A client returned something that is no update of this federation."""


def as_taken(update: object) -> object:
    """An update whose modules, arrays and masks of numbers are the tensors that a run makes of them; else as it is.

    Nothing is refused and no name is left out.
    """
    if not isinstance(update, Update):
        return update
    given: object = snapshot(update.params) if isinstance(update.params, nn.Module) else update.params
    params = _each(_tensor, "parameter", given)
    return replace(update, params=cast("Params", params), mask=cast("Mask", _each(_bools, "the mask of", update.mask)))


def _each(convert: Callable[[str, object], Tensor], what: str, given: object) -> object:
    """Every entry converted; what cannot be is left as it is."""
    if not isinstance(given, Mapping):
        return given
    made: dict[object, object] = dict(given)
    for name, value in given.items():
        with suppress(BadUpdate):
            made[name] = convert(f"{what} {name!r}", value).detach()
    return made


def checked(
    update: object, schema: Schema, known: Callable[[], Collection[str]], extra: Mapping[str, Schema] | None = None
) -> Update:
    """The update in the form that is encoded; the same object where it has that form already.

    `known` names the entries of the model: those that do not travel may be in the update, and stay with the client.
    `extra` are the schemas of the extra tensors that the client declares.

    Raises:
        BadUpdate: it is no update of this federation; says which part, and what is allowed.
    """
    if not isinstance(update, Update):
        raise BadUpdate(f"the client returned {type(update).__name__}, not an fl_sim.Update")
    if (update.extra or extra) and (wrong := problem(extra or {}, update.extra)):
        raise BadUpdate(f"{wrong}; the client's attribute extra declares them")
    count, metrics = examples(update.num_examples), numbers(update.metrics)
    params, mask = _params(update.params, schema, known), _mask(update.mask, schema)
    same = count is update.num_examples and metrics is update.metrics
    if same and params is update.params and mask is update.mask:
        return update
    return replace(update, params=params, num_examples=count, mask=mask, metrics=metrics)


def _described(value: object) -> str:
    """A value's type, and its shape or the value itself where that is short."""
    shape = getattr(value, "shape", None)
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of {value.dtype}, shape {tuple(shape or ())}"
    return "None" if value is None else f"{type(value).__name__} {repr(value)[:40]}"


def _number(value: object) -> object:
    """The Python number in a NumPy scalar, a 0-d tensor or a 0-d array; anything else as it is."""
    if value is np.ma.masked:  # its item() is 0.0
        return None
    scalar = isinstance(value, np.generic) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0)
    return cast("np.generic", value).item() if scalar else value


def examples(value: object) -> int:
    """Check a number of examples; NumPy integers and 0-d tensors become Python's. Raises BadUpdate."""
    if type(value) is not int:
        number = _number(value)
        if not isinstance(number, int) or isinstance(number, bool):
            raise BadUpdate(
                f"num_examples is {_described(value)}; needed: a whole number, for instance ctx.num_examples"
            )
        value = number
    if not 1 <= value < MOST_EXAMPLES:
        raise BadUpdate(f"num_examples must be at least 1 and below 2**31, not {value}")
    return value


def numbers(metrics: object) -> Metrics:
    if type(metrics) is dict and all(
        (type(value) is float or (type(value) is int and -(2**63) <= value < 2**63))
        and type(name) is str
        and name != NUM_EXAMPLES
        for name, value in metrics.items()
    ):
        return metrics
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise BadUpdate(f"metrics is {_described(metrics)}; needed: a dict of numbers by name")
    return {_metric_name(name): _metric(name, value) for name, value in metrics.items()}


def _metric_name(name: object) -> str:
    if not isinstance(name, str) or name == NUM_EXAMPLES:
        raise BadUpdate(f"metric name {name!r}: needed: a string other than {NUM_EXAMPLES!r}, which says the weight")
    return str(name)


def _metric(name: object, value: object) -> float:
    number = _number(value)
    if not isinstance(number, (bool, int, float)):
        raise BadUpdate(f"metric {name!r} is {_described(value)}; needed: one number")
    if isinstance(number, float) or -(2**63) <= number < 2**63:
        return number + 0
    try:
        return float(number)
    except OverflowError as error:
        raise BadUpdate(f"metric {name!r} is {_described(value)}: too large for a float") from error


def _is_flat(tensors: FlatParams | FlatMask, names: tuple[str, ...], size: int, dtype: torch.dtype) -> bool:
    return tensors.names == names and tensors.flat.numel() == size and tensors.flat.dtype == dtype


def _params(params: object, schema: Schema, known: Callable[[], Collection[str]]) -> Params:
    if isinstance(params, FlatParams) and _is_flat(params, schema.names, schema.size, torch.float32):
        return params
    if isinstance(params, nn.Module):
        params = snapshot(params)
    if not isinstance(params, Mapping):
        needed = "a dict of tensors by name, as fl_sim.snapshot(model) returns"
        raise BadUpdate(f"params is a {type(params).__name__}; needed: {needed}")
    if len(params) > len(schema.names) and (unknown := params.keys() - set(schema.names) - set(known())):
        first = min(map(repr, unknown))
        raise BadUpdate(f"the update has a parameter {first} that the model does not have; metrics are for numbers")
    found = {}
    for name, shape in zip(schema.names, schema.shapes, strict=True):
        value = params.get(name)
        if value is None:
            wrapped = any(str(other).endswith(f".{name}") for other in params)
            hint = UNWRAPPED if wrapped else "return fl_sim.snapshot(model)"
            raise BadUpdate(f"the update lacks parameter {name!r}; {hint}")
        found[name] = value = _tensor(f"parameter {name!r}", value)
        if value.shape != shape:
            raise BadUpdate(f"parameter {name!r} has shape {tuple(value.shape)}, not {tuple(shape)}")
        if value.dtype.is_complex or value.layout is not torch.strided:
            raise BadUpdate(f"parameter {name!r} is {value.dtype}, {value.layout}; needed: real, dense numbers")
    return found


def _tensor(where: str, value: object) -> Tensor:
    """A tensor, or a NumPy array as one; no copy where there need be none."""
    if isinstance(value, Tensor):
        return value
    if np.ma.is_masked(value):
        raise BadUpdate(f"{where} is {_described(value)} with masked values, which would show; fill them in")
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
        own = np.ascontiguousarray(value).reshape(value.shape)
        own = own.astype(own.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(own if own.flags.writeable else own.copy())
    raise BadUpdate(f"{where} is {_described(value)}; needed: a tensor")


def _mask(mask: object, schema: Schema) -> Mask | None:
    if mask is None:
        return None
    if isinstance(mask, FlatMask) and _is_flat(mask, schema.prunable, schema.prunable_size, torch.bool):
        return mask
    if not isinstance(mask, Mapping):
        raise BadUpdate(
            f"mask is {_described(mask)}; needed: a dict of bool tensors by name, or None to send everything"
        )
    if unknown := mask.keys() - set(schema.prunable):
        raise BadUpdate(f"mask of {min(map(repr, unknown))}, which is not prunable")
    found = {name: _bools(f"the mask of {name!r}", part) for name, part in mask.items()}
    for name, shape in zip(schema.prunable, schema.shapes, strict=False):
        if name in found and found[name].shape != shape:
            raise BadUpdate(f"the mask of {name!r} has shape {tuple(found[name].shape)}, not {tuple(shape)}")
    return cast("Mask", mask) if all(found[name] is mask[name] for name in found) else found


def _bools(where: str, value: object) -> Tensor:
    part = _tensor(where, value)
    if part.dtype == torch.bool:
        return part
    alive = part != 0
    if not bool((alive == part).all()):
        raise BadUpdate(f"{where} is {_described(value)} and holds other numbers than 0 and 1; needed: bool")
    return alive


def kept(state: object, where: str = "ctx.state") -> dict[str, Tensor]:
    """Convert a client's state to tensors; NumPy arrays and numbers come back as tensors in its next round.

    Raises:
        BadUpdate: an entry is neither; names it.
    """
    if not isinstance(state, Mapping):
        raise BadUpdate(f"{where} is {_described(state)}; needed: the dict that it was, with tensors by name")
    return {_state_name(name, where): _state(f"{where}[{name!r}]", value) for name, value in state.items()}


def _state_name(name: object, where: str) -> str:
    if not isinstance(name, str):
        raise BadUpdate(f"{where} has the key {name!r}; needed: strings")
    return name


def _state(where: str, value: object) -> Tensor:
    if isinstance(value, (bool, int, float)):
        try:
            value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        except (OverflowError, RuntimeError, ValueError) as error:
            raise BadUpdate(f"{where} is {_described(value)}, beyond 64 bits") from error
    try:
        tensor = _tensor(where, value)
    except BadUpdate as error:
        raise BadUpdate(f"{where} is {_described(value)}; allowed: tensors, NumPy arrays and numbers") from error
    if tensor.dtype not in KEPT or tensor.layout is not torch.strided:
        raise BadUpdate(
            f"{where} is {tensor.dtype}, {tensor.layout}, which is not kept; allowed: for instance x.float()"
        )
    return tensor
