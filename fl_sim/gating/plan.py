"""The config's `[gating]` table: which gates a federation's model has, and how many channels they keep in which round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Self

import torch
from torch import nn

from fl_sim.core.lookup import find
from fl_sim.core.schedules import Cubic
from fl_sim.core.types import UserError
from fl_sim.gating.gates import SALIENCES, Masking, at_temperature, backward_only, both_ways
from fl_sim.gating.model import Gated, Keep, gate

LEAST = 1e-6
"""A share of channels; below, one minus a schedule's progress is no number any more."""
MASKINGS: Mapping[str, Masking] = {"both_ways": both_ways, "backward_only": backward_only}


@dataclass(frozen=True, kw_only=True)
class Gating:
    """Per-sample channel gates behind the BatchNorm of inner convolutions.

    Attributes:
        salience: score that ranks the channels of a sample: "gate" (learned), "gate_relu" (as published), "activation",
            "taylor" or "weight"; `fl-sim list saliences` describes them.
        keep: keep ratio, the share of the channels that stay on for each sample, above 0 and at most 1: one number, or a
            table by module path or pattern. A table gates only the layers that it names: `{ "*.conv1" = 0.5 }`.
        macs_budget: share of the plain model's MACs, the gates' own included. It replaces `keep` by the largest ratio
            within the budget, the same for all gated layers. Unset = `keep` counts.
        start: last round in which all channels are on; from here to round `end` the ratio falls to its final value, on the
            cubic schedule of Zhu and Gupta (2017).
        end: first round with the final ratio; start and end both 0 = a constant ratio.
        masking: "both_ways" (off channels are zero), or "backward_only" (only their gradients are masked).
        temperature: divides the logits of the learned gates (`salience = "gate"` alone), from 0.001 to 1000: above 1 the
            factors of the channels that are on are nearer to 1, below 1 nearer to 0 and 2.
    """

    salience: str = "gate"
    keep: float | dict[str, float] = 0.5
    macs_budget: float | None = None
    start: int = 0
    end: int = 0
    masking: str = "both_ways"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        at_temperature(find("gating.salience", self.salience, SALIENCES), self.temperature)
        find("gating.masking", self.masking, MASKINGS)
        given = self.keep if isinstance(self.keep, dict) else {"": self.keep}
        for path, ratio in given.items():
            if not LEAST <= ratio <= 1:
                raise UserError(
                    f"gating.keep{path and f'[{path!r}]'} = {ratio}: must be at least {LEAST:g} and at most 1"
                )
        if not 0 <= self.start <= self.end:
            raise UserError(
                f"gating: start = {self.start}, end = {self.end}: rounds, not before 0, the end not before the start"
            )

    def described(self) -> dict[str, object]:
        """What `Gating(**described)` is made of. A temperature of 1 is not named: earlier versions read the files without it."""
        described = asdict(self)
        if self.temperature == 1:
            del described["temperature"]
        return described

    def wrap(self, model: nn.Module, *, seed: int) -> Gated:
        """The gated model; its ratio is `keep`, whatever the budget and the round.

        Raises:
            UserError: nothing to gate, or a path in `keep` that no gated convolution has.
        """
        masking = find("gating.masking", self.masking, MASKINGS)
        return gate(model, self.keep, self.salience, seed, masking=masking, temperature=self.temperature)

    def settled(self, model: Gated, input_shape: tuple[int, ...]) -> Self:
        """Resolve `macs_budget` to the `keep` ratio that it means for this model.

        Raises:
            UserError: the budget is below what one channel a layer takes.
        """
        if self.macs_budget is None:
            return self
        ratio = ratio_within(model, input_shape, self.macs_budget)
        keep = dict.fromkeys(self.keep, ratio) if isinstance(self.keep, dict) else ratio
        return replace(self, keep=keep, macs_budget=None)

    def at(self, number: int) -> Keep:
        """Keep ratio in this round."""
        if isinstance(self.keep, dict):
            return {path: Cubic(self.start, self.end, ratio)(number) for path, ratio in self.keep.items()}
        return Cubic(self.start, self.end, self.keep)(number)


@contextmanager
def keeping(model: Gated, keep: Keep) -> Iterator[Gated]:
    """Context manager in which a gated model has another keep ratio."""
    before = model.keep
    model.set_keep(keep)
    try:
        yield model
    finally:
        model.set_keep(before)


def ratio_within(model: Gated, input_shape: tuple[int, ...], budget: float) -> float:
    """The largest ratio, to 1/256, at which a sample's MACs (gates included) are within `budget` of the plain model's.

    Every sample keeps equally many channels, so one image of zeros tells the MACs of all; but in depthwise convolutions
    they depend on which channels, and the budget holds about.

    Raises:
        UserError: no ratio is small enough, or the budget is none.
    """
    if not budget > 0:
        raise UserError(f"gating.macs_budget = {budget}: must be above 0")
    image = torch.zeros(1, *input_shape, device=next(model.parameters()).device)

    dense = model.dense_macs(image)

    def share(ratio: float) -> float:
        with keeping(model, ratio):
            return (dense - int(model.saved_macs(image)) + model.gate_macs) / dense

    if share(1.0) <= budget:
        return 1.0
    low, high = 1, 256
    if share(low / 256) > budget:
        raise UserError(f"gating.macs_budget = {budget}: the least this model takes is {share(low / 256):.3f}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle / 256) <= budget else (low, middle)
    return low / 256
