"""Settings that `fl-sim advise` chooses from, and what their messages weigh: encoded from recorded rounds, then multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fl_sim.communication.exchange import Coding
from fl_sim.config.experiment import Experiment
from fl_sim.config.target import FEDAVG, FEDAVG_CLIENT
from fl_sim.core.types import Mask, Params, UserError
from fl_sim.models.modes import evaluating
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.recorded_rounds import Encoder, RecordedRound
from fl_sim.sparsity import OneShot, PruneTo, RateDistortion, global_topk_mask, magnitude
from fl_sim.sparsity.curve_messages import encode_curves
from fl_sim.sparsity.curves import Curves, MeasureCurves, calibration

SAMPLES = 64
"""Samples on which changes of the outputs and distortion curves are measured."""
TOPK, PRUNING = "clients.presets:topk", "strategies.presets:rate_distortion"
EXACT = Coding()


@dataclass(frozen=True)
class Setting:
    """What a proposal changes in a config.

    Attributes:
        kind: what is given up.
        rounds: of the run.
        down, up: encoding of each direction.
        share: of the prunable weights that a client uploads.
        density: share of the prunable weights that stays after the first round.
    """

    kind: str
    rounds: int
    down: Coding = EXACT
    up: Coding = EXACT
    share: float = 1.0
    density: float = 1.0

    @property
    def overrides(self) -> list[str]:
        """The setting as `key=value` of a config."""
        ways = (("uplink", self.up), ("downlink", self.down))
        wire = [f'wire.{way}={{values="{coding.values}", content="{coding.content}"}}' for way, coding in ways]
        topk = f'client={{target="{TOPK}", density={self.share}}}'
        pruned = f'strategy={{target="{PRUNING}", density={self.density}, at=1}}'
        return [
            f"rounds={self.rounds}",
            *wire,
            *([topk, "wire.error_feedback=true"] if self.share < 1 else []),
            *([pruned] if self.density < 1 else []),
        ]


@dataclass(frozen=True)
class Predicted:
    """Bytes of a whole run."""

    up: float
    down: float
    others: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.up + self.down + self.others


@dataclass
class Sizes:
    """Sizes of a federation's messages under any setting.

    Attributes:
        federation: of the short run.
        first, last: its first and last recorded round.
    """

    federation: Federation
    first: RecordedRound
    last: RecordedRound
    _masks: dict[float, Mask] = field(default_factory=dict)
    _sizes: dict[tuple[int, Setting], float] = field(default_factory=dict)

    @cached_property
    def encoder(self) -> Encoder:
        """Of the federation's messages."""
        return Encoder(self.federation.first, self.federation.experiment.seed)

    @cached_property
    def samples(self) -> Tensor:
        """Validation samples, or training samples where there are none."""
        data = self.federation.data
        split = data.validation if len(data.validation) else data.train
        return calibration(split.to(self.federation.first.device), SAMPLES)

    @cached_property
    def curves(self) -> Curves:
        """Distortion curves of the last recorded model."""
        track = self.federation.first
        track.built.put_back()
        return MeasureCurves()(track.complete(self.last.sent), self.samples, track.exchange.schema.prunable)

    def mask(self, density: float) -> Mask:
        """The mask that rate-distortion pruning makes of the last recorded model."""
        if density not in self._masks:
            weights = {name: self.last.sent[name] for name in self.federation.first.exchange.schema.prunable}
            found = PruneTo(OneShot(1, density), RateDistortion(self.curves))(1, None, weights, None)
            assert found is not None
            self._masks[density] = found
        return self._masks[density]

    def of(self, setting: Setting) -> Predicted:
        """Bytes of a run with this setting.

        Round 1 counts as the first recorded one, all later ones as the last.
        """
        first, last, more = self.first, self.last, setting.rounds - 1
        up = self._upload(first, setting) * first.uploads
        if setting.density < 1:
            down = self._pruned_downloads(setting)
            up += self._upload(last, setting, self.mask(setting.density)) * last.uploads * more
            up += len(encode_curves(self.curves)) * self.federation.experiment.cohort.size
        else:
            down = self._downloads(first, setting.down) + self._downloads(last, setting.down) * more
            up += self._upload(last, setting) * last.uploads * more
        frozen = self.federation.first.exchange.frozen
        contacts = 0.0 if frozen is None else frozen.size * self._reached(setting.rounds, setting.rounds)
        return Predicted(up, down, first.others + last.others * more + contacts)

    def _reached(self, rounds: int, evaluations: int) -> float:
        """Expected number of clients that are drawn at least once in so many rounds and evaluations."""
        experiment = self.federation.experiment
        clients, evaluate = experiment.data.clients, min(experiment.evaluate.clients, experiment.data.clients)
        absent = (1 - experiment.cohort.size / clients) ** rounds * (1 - evaluate / clients) ** evaluations
        return clients * (1 - absent)

    def _downloads(self, each: RecordedRound, coding: Coding) -> float:
        sent, after = (len(self.encoder.download(params, each.number, coding)) for params in (each.sent, each.after))
        return sent * each.tasks + after * each.evaluations

    def _pruned_downloads(self, setting: Setting) -> float:
        """Dense tasks and a question for curves in the first round; then masks at first contacts, and values alone."""
        encoder, first, last, mask = self.encoder, self.first, self.last, self.mask(setting.density)
        more, cohort = setting.rounds - 1, self.federation.experiment.cohort.size
        dense = len(encoder.download(last.sent, last.number, setting.down))
        new, held = (
            len(encoder.download(last.sent, last.number, setting.down, sent_mask=mask, held_mask=holds))
            for holds in (None, mask)
        )
        pruned = last.tasks * more + first.evaluations + last.evaluations * more
        return dense * (first.tasks + cohort) + held * pruned + (new - held) * self._reached(more, setting.rounds)

    def _upload(self, each: RecordedRound, setting: Setting, mask: Mask | None = None) -> float:
        """Mean size of an upload; it depends on neither the downlink nor the number of rounds, so it is encoded once."""
        key = (
            each.number,
            Setting("", 1, up=setting.up, share=setting.share, density=1.0 if mask is None else setting.density),
        )
        if key not in self._sizes:
            sizes = [len(data) for data in self._uploads(each, setting, mask)]
            self._sizes[key] = sum(sizes) / len(sizes)
        return self._sizes[key]

    def _uploads(self, each: RecordedRound, setting: Setting, mask: Mask | None) -> list[bytes]:
        def choose(received: Params, trained: Params) -> Mask | None:
            return mask if setting.share == 1 else largest_changes(received, trained, setting.share, self._prunable)

        return list(self.encoder.uploads(each, setting.up, choose, held_mask=mask))

    @property
    def _prunable(self) -> tuple[str, ...]:
        return tuple(self.federation.first.exchange.schema.prunable)

    def change(self, setting: Setting) -> float:
        """How far one round under this setting moves the outputs: |f - f0| / |f0| over the samples, f0 without loss."""
        mask = None if setting.density == 1 else self.mask(setting.density)
        uploads = self._uploads(self.last, setting, mask)
        params = self.encoder.after(self.last, setting.down, uploads, setting.up, mask=mask)
        reference = self._reference
        return float((self._outputs(params) - reference).norm() / reference.norm().clamp(min=1e-30))

    @cached_property
    def _reference(self) -> Tensor:
        lossless = Setting("", 1)
        return self._outputs(
            self.encoder.after(self.last, EXACT, self._uploads(self.last, lossless, None), lossless.up)
        )

    def _outputs(self, params: Params) -> Tensor:
        track = self.federation.first
        track.built.put_back()
        model = track.complete(params)
        with evaluating(model), torch.no_grad():
            return model(self.samples).double().cpu()  # type: ignore[no-any-return]

    def carried(self, share: float) -> float:
        """Share of the updates' squared length that their largest changes hold."""
        kept = whole = 0.0
        for params in self.last.updates.values():
            chosen = largest_changes(self.last.sent, params, share, self._prunable)
            for name in self._prunable:
                change = (params[name] - self.last.sent[name]).double().square()
                whole, kept = whole + float(change.sum()), kept + float(change[chosen[name]].sum())
        return kept / whole if whole else 1.0


def largest_changes(received: Params, trained: Params, share: float, prunable: tuple[str, ...]) -> Mask:
    """The mask of `clients.presets:topk`: the `share` of the prunable weights that changed most, over all layers."""
    change = magnitude({name: trained[name] - received[name] for name in prunable})
    return global_topk_mask(change, share)


def require_plain(experiment: Experiment) -> None:
    """Refuse what a few rounds say nothing of.

    Raises:
        UserError: the method or the broadcast chooses by itself what is sent, or there are several models.
    """
    refused: Mapping[str, bool] = {
        f"strategy = {experiment.strategy.target!r} chooses itself what is sent; needed: {FEDAVG}": (
            experiment.strategy.target != FEDAVG or "mask_rule" in experiment.strategy.options
        ),
        "wire.broadcast: its sizes depend on which clients were absent; needed: none": experiment.wire.broadcast
        is not None,
        "wire.budget: chooses the value types itself; needed: none": experiment.wire.budget is not None,
        f"schedule.kind = {experiment.schedule.kind!r}: has no rounds; needed: rounds": not experiment.schedule.in_rounds,
        "capacities: not with several models; needed: one": bool(experiment.capacities),
        "study: has no federation": experiment.study is not None,
        "stop: nobody knows in which round it ends a run; needed: none": experiment.stop is not None,
        "gating: the share of channels changes with the rounds; needed: none": experiment.gating is not None,
    }
    for reason, holds in refused.items():
        if holds:
            raise UserError(f"advise: {reason}")


def left_out(experiment: Experiment, prunable: int) -> dict[str, str]:
    """Kind -> why this config, in which so many prunable weights travel, cannot have it."""
    client, strategy, rounds = experiment.client, experiment.strategy, experiment.rounds
    if not prunable:
        return dict.fromkeys(("sparse", "pruned"), "no weight matrix travels, of which a part could be left out")
    reasons = {}
    if client.target != FEDAVG_CLIENT or client.options:
        reasons["sparse"] = f"sparse uploads would replace client = {client.target!r} and its options"
    if strategy.options:
        reasons["pruned"] = f"pruning would replace the options of strategy = {strategy.target!r}"
    if rounds < 2:
        reasons["pruned"] = "pruning starts after the first round, which is the last"
    return reasons
