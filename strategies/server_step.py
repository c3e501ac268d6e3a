"""The pure server step: updates in, next state out.

    state = server_step(state, updates, aggregate=coverage_mean)

`aggregate` turns the updates of one round into parameters; `optimise` (FedOpt; Reddi et al., 2021, algorithm 1) moves
the old parameters towards them; `adjust_mask` decides the next global mask from the result; `refine` may train it.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fl_sim.codecs import Schema
from fl_sim.core.deferred import Deferred
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.core.types import FlatMask, FlatParams, Grads, Mask, MaskRule, Params, Update, UserError
from fl_sim.runtime.client.update_validation import KEPT
from fl_sim.sparsity import apply_mask
from strategies.reading import ReadOnce, Stream, naming
from strategies.sums import Summed


@dataclass(slots=True)
class Arrived:
    """What arrived in a round beside the parameters.

    Attributes:
        members: clients of the federation that train this model.
        clients: of them, those that sent a usable update.
        sums: name of extra tensors -> their sum over these clients, flat, float64.
    """

    members: int = 0
    clients: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, update: Update) -> Update:
        """Count an update, or those that it stands for, and pass it on."""
        self.clients += update.clients if isinstance(update, Summed) else 1
        for name, tensors in update.extra.items():
            flat = (tensors if isinstance(tensors, FlatParams) else FlatParams.pack(tensors)).flat.double()
            self.sums[name] = flat if name not in self.sums else self.sums[name].add_(flat)
        return update


@dataclass(frozen=True, slots=True)
class ServerState:
    """Server state between rounds.

    Attributes:
        schema: names, shapes, order of what the federation exchanges.
        params: global parameters, flat float32 in schema order.
        round: rounds finished.
        mask: global mask over the prunable names, or None while the model is dense.
        memory: what the optimiser keeps between rounds: tensors by name, of any shape and dtype; checkpoints save them. An
            entry named as a prunable parameter, and of its shape, is under the mask.
        arrived: what the clients of the round sent, for the optimiser; it is not kept.
        scratch: folder for running sums that are too large for memory; None = they lie in memory.
        exact: whether a mean adds up the updates of the round exactly, as in a large cohort.
    """

    schema: Schema
    params: Params
    round: int = 0
    mask: Mask | None = None
    memory: Params = field(default_factory=dict)
    arrived: Arrived = field(default_factory=Arrived)
    scratch: Path | None = None
    exact: bool = False


Aggregate = Callable[[ServerState, Iterable[Update]], Params]
"""(state, updates) -> parameters. `updates` come one at a time and are read once. `state` is a copy: it may be changed."""
Optimise = Callable[[ServerState, Params], tuple[Params, Params]]
"""(state, aggregated parameters) -> (new parameters, new memory)."""
Refine = Callable[[ServerState, Params], Params]
"""(new state, its parameters before the mask was applied) -> parameters, zero where the mask is."""


SEEDING = 1024
"""Parameters from whose values, and the round, the global generators of a rule are seeded: another experiment has others."""
log = logging.getLogger("fl_sim")


def replace_params(state: ServerState, aggregated: Params) -> tuple[Params, Params]:
    """Plain FedAvg: the aggregate is the next model."""
    return aggregated, {}


def no_refinement(new: ServerState, dense: Params) -> Params:
    """Do nothing after aggregation and pruning."""
    return new.params


@dataclass(frozen=True)
class Momentum:
    """Server learning rate and momentum (FedAvgM; Hsu et al., 2019): v = beta v + (old - mean); new = old - lr v.

    BatchNorm statistics are estimates, not parameters: they take the aggregate as it is.
    """

    lr: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0 or not 0 <= self.beta < 1:
            allowed = "must be positive, and at least 0 and below 1"
            raise UserError(f"strategy: lr = {self.lr} and momentum = {self.beta} {allowed}")

    def __call__(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        flat = state.schema.flat
        velocity = flat(state.params) - flat(aggregated)
        if state.memory:
            velocity += self.beta * flat(state.memory)
        new = with_statistics(state.schema, flat(state.params) - self.lr * velocity, aggregated)
        return new, state.schema.view(velocity)


def with_statistics(schema: Schema, flat: Tensor, aggregated: Params) -> FlatParams:
    """Flat parameters, in place, with the BatchNorm statistics of the aggregate: an optimiser never sees those."""
    new = schema.view(flat)
    for name in schema.buffers:
        new[name].copy_(aggregated[name])
    return new


def server_step(
    state: ServerState,
    updates: Iterable[Update],
    *,
    aggregate: Aggregate,
    adjust_mask: MaskRule | None = None,
    calibrate: Callable[[ServerState], MaskRule] | None = None,
    optimise: Optimise = replace_params,
    refine: Refine = no_refinement,
    members: int = 0,
) -> ServerState:
    """Run one round on the server. `updates` may be a stream: it is consumed once, in order; nothing is mutated.

    `adjust_mask` receives the round just finished, the current mask, the prunable parameters and the pseudo-gradient
    `old - new` of the prunable parameters. `calibrate` takes its place: it makes the rule from the aggregated state, whose
    mask is still the old one. `refine` has the last word on the parameters. What any of them changes in the process, such as
    the grad mode, is put back, and global generators are seeded for them.
    """
    with _apart(state):
        return _stepped(state, updates, aggregate, adjust_mask, calibrate, optimise, refine, members)


@contextmanager
def _apart(state: ServerState) -> Iterator[None]:
    """Context manager for rules: they leave the process as it was, and global generators give the same on every engine.

    Raises:
        RuntimeError: a rule called `sys.exit`.
    """
    drawn = state.schema.flat(state.params)[:SEEDING].cpu().numpy().tobytes()
    try:
        with unchanged_settings(), seeded(zlib.crc32(drawn, state.round)):
            yield
    except SystemExit as error:
        raise RuntimeError(f"a rule of the server called sys.exit({error.code!r})") from error


def _stepped(
    state: ServerState,
    updates: Iterable[Update],
    aggregate: Aggregate,
    adjust_mask: MaskRule | None,
    calibrate: Callable[[ServerState], MaskRule] | None,
    optimise: Optimise,
    refine: Refine,
    members: int,
) -> ServerState:
    arrived, stream = Arrived(members), Stream(updates)
    once = ReadOnce(map(arrived.add, stream))
    with naming(f"round {state.round + 1}: the aggregation rule (strategy.aggregate)", stream):
        made = aggregate(_lent(state), once)
    aggregated_params = _parameters(state.schema, made)
    once.finish()
    with naming(f"round {state.round + 1}: the server optimizer"):
        optimised, memory = optimise(replace(state, arrived=arrived), aggregated_params)
    params = _parameters(state.schema, optimised, "the server optimizer")
    aggregated = replace(state, round=state.round + 1, params=params, memory=_memory(memory))
    decides = adjust_mask is not None or calibrate is not None
    pseudo = {name: state.params[name] - params[name] for name in state.schema.prunable} if decides else None
    new = masked(aggregated, pseudo, adjust_mask=adjust_mask, calibrate=calibrate)
    return replace(new, params=refine(new, params))


def masked(
    state: ServerState,
    grads: Grads | None,
    *,
    adjust_mask: MaskRule | None,
    calibrate: Callable[[ServerState], MaskRule] | None,
) -> ServerState:
    """`state`, whose mask is still the old one, under the mask that the rule decides.

    Before the first round it is asked as after a round 0, without gradients: that may prune the initial model.
    """
    mask = state.mask
    if calibrate is not None:
        adjust_mask = calibrate(replace(state, params=_masked(state.schema, state.params, mask)))
    if adjust_mask is not None:
        with _apart(state):
            mask = _decided(state, grads, adjust_mask)
    memory = state.memory
    if memory and mask is not None:
        memory = {**memory, **apply_mask({n: v for n, v in memory.items() if _laid_out(n, v, mask)}, mask)}
    return replace(state, params=_masked(state.schema, state.params, mask), mask=mask, memory=memory)


def _laid_out(name: str, value: Tensor, mask: Mask) -> bool:
    return name in mask and value.shape == mask[name].shape


def _memory(memory: Params) -> Params:
    """Check what an optimiser keeps. Its order is that of a checkpoint, whatever the order in which it was made."""
    if isinstance(memory, FlatParams) and memory.flat.dtype == torch.float32:
        return memory
    if not isinstance(memory, Mapping):
        raise UserError(f"the server optimizer keeps a {type(memory).__name__}; needed: tensors by name")
    for name, value in memory.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.dtype not in KEPT:
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"the server optimizer keeps {name!r} as {kind}; needed: tensors by name, for instance float32"
            )
    return dict(sorted(memory.items()))


def _lent(state: ServerState) -> ServerState:
    """A copy of a state: a rule that adds into `state.params` in place would change what momentum starts from.

    The parameters are copied when they are first asked for: a mean of whole updates never does.
    """
    schema, params = state.schema, state.params
    flat = isinstance(params, FlatParams) and params.names == schema.names
    own = Deferred.of(lambda: schema.flat(params).clone(), schema.names, schema.shapes) if flat else _cloned(params)
    return replace(state, params=own, mask=_lent_mask(schema, state.mask), memory=_cloned(state.memory))


def _lent_mask(schema: Schema, mask: Mask | None) -> Mask | None:
    if isinstance(mask, FlatMask) and mask.names == schema.prunable:
        return schema.view_mask(mask.flat.clone())
    return None if mask is None else _cloned(mask)


def _cloned(tensors: Params) -> Params:
    return {name: value.clone() for name, value in tensors.items()}


def _decided(state: ServerState, grads: Grads | None, adjust_mask: MaskRule) -> Mask | None:
    """The mask that a rule decides; the state's own object where it stays the same.

    The rule may change the mask that it is given, which is a copy: clients hold the other. Parameters are not its own.
    """
    schema, mask = state.schema, state.mask
    prunable = {name: state.params[name] for name in schema.prunable}
    before = [value._version for value in prunable.values()]
    with naming(f"round {state.round}: the mask rule (strategy.mask_rule)"):
        decided = adjust_mask(state.round, _lent_mask(schema, mask), prunable, grads)
    new = _mask(schema, decided)
    if before != [state.params[name]._version for name in schema.prunable]:
        raise UserError("the mask rule changed the parameters in place; it decides the mask alone: clone() them first")
    same = mask is not None and new is not None and torch.equal(schema.flat_mask(mask), schema.flat_mask(new))
    if not same and new is not None and schema.prunable_size and not bool(schema.flat_mask(new).any()):
        log.warning("round %d: the mask leaves no weight alive", state.round)
    return mask if same else new


def _masked(schema: Schema, params: Params, mask: Mask | None) -> Params:
    return params if mask is None else schema.view(schema.flat(apply_mask(params, mask)))


def _parameters(schema: Schema, aggregated: Params, who: str = "the aggregation rule") -> Params:
    """Check that a rule returned parameters of this model; they are float32 from here on, as in a payload and a checkpoint."""
    flat = aggregated.flat.dtype if isinstance(aggregated, FlatParams) and aggregated.names == schema.names else None
    if flat == torch.float32:
        return aggregated
    if not isinstance(aggregated, Mapping):
        raise UserError(f"{who} returned {type(aggregated).__name__}, not parameters by name")
    for name, shape in zip(schema.names, schema.shapes, strict=True):
        if name not in aggregated:
            raise UserError(f"{who} returned no parameter {name!r}; start from state.params")
        if (got := getattr(aggregated[name], "shape", None)) != shape:
            raise UserError(f"{who} returned {name!r} of shape {got}; needed: {tuple(shape)}")
    if len(aggregated) > len(schema.names):
        unknown = min(map(repr, aggregated.keys() - set(schema.names)))
        raise UserError(f"{who} returned {unknown}, which the model lacks")
    return schema.view(schema.flat(aggregated))


def _mask(schema: Schema, mask: Mask | None) -> Mask | None:
    """Check that a mask rule returned a mask of this model."""
    if mask is None or (isinstance(mask, FlatMask) and mask.names == schema.prunable):
        return mask
    if not isinstance(mask, Mapping):
        raise UserError(f"the mask rule returned {type(mask).__name__}; needed: a mask by name, or None while dense")
    wrong = [name for name, part in mask.items() if getattr(part, "dtype", None) != torch.bool]
    if wrong:
        raise UserError(f"the mask rule returned {wrong[0]!r} that is no tensor of bool")
    try:
        schema.flat_mask(mask)
    except ValueError as error:
        raise UserError(f"the mask rule: {error}") from error
    if missing := [name for name in schema.prunable if name not in mask]:
        hint = "return a mask of every prunable tensor, all True where all weights stay"
        raise UserError(f"the mask rule returned no mask of {missing[0]!r}; {hint}")
    return mask
