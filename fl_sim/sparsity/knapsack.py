"""Multiple-choice knapsack, exact: one level per layer, least total distortion under a rate budget.

The rate is whatever is bought: kept weights (arXiv 2308.10438, where the program runs over weights), or measured bytes,
when the levels are codecs.

How it is both exact and fast. A Lagrange multiplier gives a lower bound and, by rounding, a solution; they are close,
because one budget couples many layers. A level whose own penalty exceeds the difference is part of no better solution
and is struck out; so is a partial choice whose bound is worse than the solution. What remains goes through a dynamic
program over the rates that are really reached, layer by layer. In the worst case nothing is struck out, and that
program is the textbook one: linear in layers, levels and budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.types import UserError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
STATES = 1 << 19
TABLE = 1 << 24
UNITS = 200_000


class Layer(NamedTuple):
    """Levels worth considering, by rising rate and strictly falling distortion, and their indices in the input."""

    rates: Ints
    distortions: Floats
    levels: Ints

    def only(self, kept: Ints | slice) -> Layer:
        return Layer(self.rates[kept], self.distortions[kept], self.levels[kept])


class States(NamedTuple):
    """Sums over some layers, by rising rate and strictly falling distortion; the last layer's position in each."""

    rates: Ints
    distortions: Floats
    last: NDArray[np.uint16]

    def only(self, kept: NDArray[np.bool_] | Ints) -> States:
        return States(self.rates[kept], self.distortions[kept], self.last[kept])


class Bound(NamedTuple):
    """A feasible choice (position in each layer, and its distortion) and the multiplier that shows how good it is."""

    chosen: list[int]
    distortion: float
    price: float


class TooManyStates(Exception):
    """The dynamic program would outgrow its memory."""


def min_distortion(
    rates: Sequence[Sequence[int]],
    distortions: Sequence[Sequence[float]],
    budget: int,
    *,
    minimum: Sequence[int] | None = None,
    unit: int | None = None,
) -> list[int]:
    """The level of every layer that minimises the sum of distortions with a sum of rates of at most `budget`.

    Of choices with equal distortion, one with the least rate. Exact up to the rounding of float64 sums, unless rates
    are counted in units. Then they are rounded up, so that the budget still holds, and the result is at least as good
    as the optimum for `budget - (L + 1) * (unit - 1)`, L being the number of layers.

    Args:
        rates: non-negative integers, [layer][level]; layers may have different numbers of levels, at most 65,536.
        distortions: same shape, finite or inf (a forbidden level).
        budget: of the sum of rates.
        minimum: lowest level index allowed in each layer; pruning in steps passes the levels of the step before.
        unit: count rates in units of this size; 1 is exact at any price. None is 1 too, unless more than 2^19 partial
            choices would have to be kept, which no budget below that needs; then it is ceil(budget / 200,000).

    Raises:
        UserError (a ValueError): no choice fits the budget, or malformed tables.
    """
    if unit is not None and unit < 1:
        raise UserError(f"unit = {unit}: must be at least 1")
    layers = _layers(rates, distortions, budget, minimum)
    bound = _bound(layers, budget)
    try:
        exact = unit in (None, 1)
        limit = STATES if unit is None else budget + 1
        chosen = _solve(layers, bound, budget, limit) if exact else _in_units(layers, bound, budget, unit or 1)
    except TooManyStates:
        chosen = _in_units(layers, bound, budget, -(-budget // UNITS))
    return [int(layer.levels[i]) for layer, i in zip(layers, chosen, strict=True)]


def _layers(
    rates: Sequence[Sequence[int]],
    distortions: Sequence[Sequence[float]],
    budget: int,
    minimum: Sequence[int] | None,
) -> list[Layer]:
    lowest = [0] * len(rates) if minimum is None else minimum
    if not len(rates) == len(distortions) == len(lowest):
        raise UserError(f"{len(rates)} layers of rates, {len(distortions)} of distortions, {len(lowest)} of minima")
    layers = [
        _layer(number, np.asarray(rates[number]), np.asarray(distortions[number], dtype=np.float64), lowest[number])
        for number in range(len(rates))
    ]
    least = sum(int(layer.rates[0]) for layer in layers)
    if least > budget:
        raise UserError(f"budget = {budget}: the smallest allowed rates already sum to {least}")
    return [layer.only(layer.rates <= budget - least + layer.rates[0]) for layer in layers]


def _layer(number: int, rates: Ints, distortions: Floats, lowest: int) -> Layer:
    if rates.shape != distortions.shape or rates.ndim != 1:
        raise UserError(f"layer {number}: rates of shape {rates.shape}, distortions of {distortions.shape}; must agree")
    if rates.size and not (np.issubdtype(rates.dtype, np.integer) and rates.min() >= 0):
        raise UserError(f"layer {number}: rates must be non-negative integers")
    if np.isnan(distortions).any() or (distortions == -np.inf).any():
        raise UserError(f"layer {number}: distortions must not be NaN or -inf")
    levels = np.flatnonzero((np.arange(len(rates)) >= lowest) & np.isfinite(distortions))
    if not len(levels):
        raise UserError(f"layer {number}: no level from {lowest} on has a finite distortion")
    levels = levels[np.lexsort((distortions[levels], rates[levels]))]
    levels = levels[_improving(distortions[levels])]
    return Layer(rates[levels].astype(np.int64), distortions[levels], levels)


def _improving(values: Floats) -> NDArray[np.bool_]:
    """Mark values that are lower than all before them."""
    kept = np.ones(len(values), dtype=bool)
    kept[1:] = values[1:] < np.minimum.accumulate(values)[:-1]
    return kept


def _hull(layer: Layer) -> Iterator[tuple[float, int, int]]:
    """(gain per unit of rate, from, to): the steps of the lower convex hull, gains falling."""
    i = 0
    while i + 1 < len(layer.rates):
        gains = (layer.distortions[i] - layer.distortions[i + 1 :]) / (layer.rates[i + 1 :] - layer.rates[i])
        step = int(np.argmax(gains)) + 1
        yield float(gains[step - 1]), i, i + step
        i += step


def _bound(layers: list[Layer], budget: int) -> Bound:
    """Take the steps of all hulls, steepest first, until one does not fit: the linear relaxation, rounded down."""
    steps = [(gain, number, i, j) for number, layer in enumerate(layers) for gain, i, j in _hull(layer)]
    chosen, price = [0] * len(layers), 0.0
    left = budget - sum(int(layer.rates[0]) for layer in layers)
    for gain, number, start, end in sorted(steps, key=lambda step: -step[0]):
        cost = int(layers[number].rates[end] - layers[number].rates[start])
        if chosen[number] == start and cost <= left:
            chosen[number], left = end, left - cost
        else:
            price = max(price, gain)
    _spend(layers, chosen, left)
    return Bound(chosen, sum(float(layer.distortions[i]) for layer, i in zip(layers, chosen, strict=True)), price)


def _spend(layers: list[Layer], chosen: list[int], left: int) -> None:
    """Spend what is left, in place, by the best single move again and again; a move may lead off the hull."""
    while layers:
        moves = []
        for number, layer in enumerate(layers):
            now = chosen[number]
            best = int(np.searchsorted(layer.rates, layer.rates[now] + left, side="right")) - 1
            moves.append((float(layer.distortions[now] - layer.distortions[best]), number, best))
        gain, number, best = max(moves)
        if gain <= 0:
            return
        left -= int(layers[number].rates[best] - layers[number].rates[chosen[number]])
        chosen[number] = best


def _solve(layers: list[Layer], bound: Bound, budget: int, limit: int) -> list[int]:
    """The dynamic program, over what the bound leaves; at most `limit` states a layer."""
    penalised = [layer.distortions + bound.price * layer.rates for layer in layers]
    # rest[i]: what layers i and later cost at least, the price of their rates included.
    rest = np.cumsum([0.0, *(p.min() for p in reversed(penalised))])[::-1]
    rounding = 1e-12 * (bound.price * budget + sum(float(np.abs(layer.distortions).max()) for layer in layers))
    worst = bound.distortion + bound.price * budget + rounding
    kept = [np.flatnonzero(p - p.min() <= worst - rest[0]) for p in penalised]
    narrow = [layer.only(k) for layer, k in zip(layers, kept, strict=True)]
    states, trace = States(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.uint16)), []
    for number, layer in enumerate(narrow):
        states = _merge(states, layer, budget - sum(int(later.rates[0]) for later in narrow[number + 1 :]))
        states = states.only(states.distortions + bound.price * states.rates + rest[number + 1] <= worst)
        if len(states.rates) > limit:
            raise TooManyStates
        trace.append((states.rates.astype(np.uint32) if budget < 1 << 32 else states.rates, states.last))
    return [int(k[i]) for k, i in zip(kept, _traced(narrow, trace), strict=True)]


def _traced(layers: list[Layer], trace: Sequence[tuple[NDArray[np.integer], NDArray[np.uint16]]]) -> list[int]:
    """The positions that lead to the last state, which has the least distortion."""
    chosen: list[int] = []
    rate = int(trace[-1][0][-1]) if trace else 0
    for layer, (rates, last) in zip(reversed(layers), reversed(trace), strict=True):
        chosen.append(int(last[np.searchsorted(rates, rate)]))
        rate -= int(layer.rates[chosen[-1]])
    return chosen[::-1]


def _merge(states: States, layer: Layer, room: int) -> States:
    """Every sum of a state and a level within `room`, without the dominated ones."""
    candidates = len(states.rates) * len(layer.rates)
    least = int(states.rates[0] + layer.rates[0])
    span = min(room, int(states.rates[-1] + layer.rates[-1])) - least + 1
    # Sorting a candidate costs about as much as twelve cells of a table.
    if candidates <= max(4096, span // 12):
        return _sorted_merge(states, layer, room)
    if span > TABLE:
        raise TooManyStates
    return _table_merge(states, layer, least, span)


def _sorted_merge(states: States, layer: Layer, room: int) -> States:
    rates = (states.rates[:, None] + layer.rates).ravel()
    distortions = (states.distortions[:, None] + layer.distortions).ravel()
    last = np.tile(np.arange(len(layer.rates), dtype=np.uint16), len(states.rates))
    made = States(rates, distortions, last).only(rates <= room)
    made = made.only(np.lexsort((made.distortions, made.rates)))
    return made.only(_improving(made.distortions))


def _table_merge(states: States, layer: Layer, least: int, span: int) -> States:
    table, last = np.full(span, np.inf), np.zeros(span, np.uint16)
    for position, (rate, distortion) in enumerate(zip(layer.rates, layer.distortions, strict=True)):
        cells = states.rates + (rate - least)
        cells = cells[: np.searchsorted(cells, span)]
        offered = states.distortions[: len(cells)] + distortion
        better = offered < table[cells]
        table[cells[better]] = offered[better]
        last[cells[better]] = position
    kept = np.flatnonzero(_improving(table))
    return States(kept + least, table[kept], last[kept])


def _in_units(layers: list[Layer], bound: Bound, budget: int, unit: int) -> list[int]:
    """The optimum when every rate is rounded up to whole units; the bound's own choice where that is better."""
    coarse = []
    for layer in layers:
        rates = -(-layer.rates // unit)
        best = np.flatnonzero(np.append(rates[1:] > rates[:-1], True))
        coarse.append(Layer(rates[best], layer.distortions[best], best))
    units = budget // unit
    if sum(int(layer.rates[0]) for layer in coarse) > units:
        return bound.chosen
    positions = _solve(coarse, _bound(coarse, units), units, limit=units + 1)
    chosen = [int(layer.levels[i]) for layer, i in zip(coarse, positions, strict=True)]
    value = sum(float(layer.distortions[i]) for layer, i in zip(layers, chosen, strict=True))
    return chosen if value <= bound.distortion else bound.chosen
