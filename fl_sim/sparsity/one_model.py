"""Prune one model without a federation, by the server's rules, with a table of what each layer keeps.

pruned = METHODS["global"](model, Request(density=0.1))
rows = layer_rows(model, pruned, (3, 32, 32))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fl_sim import codecs
from fl_sim.core.types import Mask, UserError
from fl_sim.models import batchnorm_names, prunable_names
from fl_sim.models.channels import remove_disabled
from fl_sim.models.macs import layer_macs
from fl_sim.models.parameters import load, snapshot
from fl_sim.sparsity import (
    Allocate,
    Constant,
    PruneTo,
    Random,
    RateDistortion,
    Score,
    apply_mask,
    erk,
    global_topk,
    lamp,
    magnitude,
    uniform,
)
from fl_sim.sparsity.curve_cache import cached_curves
from fl_sim.sparsity.curves import MeasureCurves, Progress, no_progress


@dataclass(frozen=True)
class Request:
    """Request to a pruning method.

    Attributes:
        density: share of the prunable weights that stay, 0..1.
        min_keep: weights that every tensor keeps at least.
        threshold: |gamma| below which a channel counts as disabled, for the method "batchnorm".
        images: calibration images or token sequences, (N, ...) as the model takes them; None where there are none.
        measure: how distortion curves are measured.
        progress: called with (curves measured, curves in all).
    """

    density: float
    min_keep: int = 0
    threshold: float = 0.01
    images: Tensor | None = field(default=None, repr=False, compare=False)
    measure: MeasureCurves = field(default_factory=MeasureCurves)
    progress: Progress = no_progress


PruneModel = Callable[[nn.Module, Request], nn.Module]
"""(model, request) -> another model: pruned weights are 0.0, or tensors are smaller where a method removes channels."""


@dataclass(frozen=True)
class ByScore:
    """Weights of the highest scores stay, as many in each tensor as `allocate` says; zeros of the model stay zeros."""

    allocate: Allocate
    score: Score = magnitude

    def __call__(self, model: nn.Module, request: Request) -> nn.Module:
        params = snapshot(model)
        weights = {name: params[name] for name in prunable_names(model)}
        alive = support(model)
        rule = PruneTo(Constant(request.density), self.allocate, self.score, request.min_keep)
        mask = rule(1, None if all(bool(m.all()) for m in alive.values()) else alive, weights, None)
        return load(copy.deepcopy(model), apply_mask(params, mask or {}))


def by_distortion(model: nn.Module, request: Request) -> nn.Module:
    """Rate-distortion pruning in one shot (arXiv 2308.10438): curves measured on the request's images, from disk if known."""
    if request.images is None:
        raise UserError(
            "method 'rd' measures distortion: it needs calibration images or tokens (--calibration DATA); only for a model of "
            "numbers can they be drawn"
        )
    curves = cached_curves(request.measure, model, request.images, progress=request.progress)
    return ByScore(RateDistortion(curves))(model, request)


def by_batchnorm(model: nn.Module, request: Request) -> nn.Module:
    """Remove the channels that BatchNorm has disabled, whatever density is asked for; tensors become smaller.

    Raises:
        UserError: the threshold is none, the model has no BatchNorm, or its graph depends on its data.
    """
    if not 0 <= request.threshold < math.inf:
        raise UserError(f"threshold = {request.threshold}: must be a number of at least 0")
    if not batchnorm_names(model):
        raise UserError(
            "method 'batchnorm' removes channels that BatchNorm has disabled, and this model has no BatchNorm; allowed: a "
            "method that prunes weights, such as global"
        )
    return remove_disabled(model, request.threshold)


METHODS: Mapping[str, PruneModel] = {
    "global": ByScore(global_topk),
    "rd": by_distortion,
    "lamp": ByScore(lamp),
    "erk": ByScore(erk),
    "uniform": ByScore(uniform),
    "random": ByScore(global_topk, Random()),
    "batchnorm": by_batchnorm,
}
USED: Mapping[str, Collection[str]] = {
    **dict.fromkeys(METHODS, ("density", "min-keep")),
    "rd": ("density", "min-keep", "images", "levels"),
    "batchnorm": ("threshold",),
}
"""Method -> the options of `fl-sim prune` that it uses; one of the user's may use any."""


def require_used(method: str, given: Collection[str]) -> None:
    """Complain of the options that somebody gave and the method ignores. Raises UserError."""
    used = USED.get(method, given)
    if unused := [option for option in given if option not in used]:
        raise UserError(
            f"--{unused[0]}: method {method!r} does not use it; allowed: {', '.join(f'--{option}' for option in used)}"
        )


def support(model: nn.Module) -> Mask:
    """Mask of the prunable weights that are not zero."""
    return {name: model.get_parameter(name).detach().cpu() != 0 for name in prunable_names(model)}


@dataclass(frozen=True)
class Row:
    """A row of the table: one prunable tensor, or all of them together.

    Attributes:
        layer: its name.
        weights, kept: before and after, as numbers of weights.
        macs, macs_kept: multiply-accumulates of one sample, before and after.
        payload_bytes: encoded values and mask of the tensor alone; for all together the whole encoded model, with
            everything that is not pruned.
    """

    layer: str
    weights: int
    kept: int
    macs: int
    macs_kept: int
    payload_bytes: int

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return self.kept / max(1, self.weights)


def layer_rows(dense: nn.Module, pruned: nn.Module, input_shape: tuple[int, ...], *, tokens: bool = False) -> list[Row]:
    """A row for each prunable tensor of `dense`, and a last one, "all", for the whole model.

    Bytes are the lengths of payloads that were really encoded, float32 values and entropy-coded masks. MACs are those of one
    sample of zeros, which are int64 where inputs are `tokens`.
    """
    alive, params = support(pruned), snapshot(pruned)
    before = layer_macs(dense, input_shape, tokens=tokens)
    after = layer_macs(pruned, input_shape, mask=alive, tokens=tokens)
    rows = [
        Row(
            name,
            dense.get_parameter(name).numel(),
            int(alive[name].count_nonzero()) if name in alive else 0,
            before.get(name, 0),
            after.get(name, 0),
            _tensor_bytes(name, params[name], alive[name]) if name in alive else 0,
        )
        for name in prunable_names(dense)
    ]
    schema = codecs.Schema.of(params, list(alive))
    whole = len(codecs.encode(params, alive, schema=schema))
    weights, kept = sum(row.weights for row in rows), sum(row.kept for row in rows)
    return [*rows, Row("all", weights, kept, sum(before.values()), sum(after.values()), whole)]


def _tensor_bytes(name: str, value: Tensor, alive: Tensor) -> int:
    schema = codecs.Schema.of({name: value}, [name])
    data = codecs.encode({name: value}, {name: alive}, schema=schema)
    sections = codecs.describe(data, schema=schema).sections
    return sections.get("values", 0) + sections.get("mask", 0)
