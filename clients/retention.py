"""Retention: the share of a round's training that a client keeps, the rows of the channels that mattered for its data.

The union of per-sample masks over a round is nearly dense, so what saves bytes is a ranking of the channels. A channel's
filters, BatchNorm entries and gate rows are retained together; everything else of a gated layer goes back to the
received values, so that a sparse payload tells the server exactly what the client holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_sim.core.types import Mask, Params, Task, Update, UserError
from fl_sim.data import Split
from fl_sim.gating import Gated, Gating, Keep, keeping
from fl_sim.gating.graph import kept_channels, top_channels
from fl_sim.models.computed import copied, materialized
from fl_sim.models.parameters import load
from fl_sim.training.client import Around, Client, ClientContext
from fl_sim.training.evaluation import evaluate

KEEP = "gating.keep"
"""A client's own keep ratio, kept between its rounds."""
Ratio = Callable[[Task, ClientContext], Keep]
"""(task, context) -> share of the channels that is on for a sample in this round's training."""
ChannelScore = Callable[[Task, ClientContext], Mapping[str, Tensor]]
"""(task, context after training) -> gated convolution -> score of each channel (C,)."""


def gated(ctx: ClientContext) -> Gated:
    """The client's model.

    Raises:
        UserError: it has no gates.
    """
    if not isinstance(ctx.model, Gated):
        raise UserError("this client needs a gated model: add a [gating] table to the config")
    return ctx.model


@dataclass(frozen=True)
class Planned:
    """The federation's ratio of this round."""

    plan: Gating

    def __call__(self, task: Task, ctx: ClientContext) -> Keep:
        return self.plan.at(task.round)


@dataclass(frozen=True)
class Profile:
    """Heterogeneous devices: each client draws its own ratio once, in its first round, and stays with it."""

    ratios: tuple[float, ...]

    def __call__(self, task: Task, ctx: ClientContext) -> Keep:
        if KEEP not in ctx.state:
            drawn = int(torch.randint(len(self.ratios), (), generator=ctx.rng))
            ctx.state[KEEP] = torch.tensor(self.ratios[drawn], dtype=torch.float64)
        return float(ctx.state[KEEP])


@dataclass(frozen=True)
class Gates:
    """The gates' part of a round: this ratio while training, and counters that start at zero."""

    ratio: Ratio

    @property
    def alike(self) -> bool:
        """Whether all clients of a round have the same ratio."""
        return isinstance(self.ratio, Planned)

    @contextmanager
    def __call__(self, task: Task, ctx: ClientContext) -> Iterator[None]:
        model = gated(ctx)
        model.reset()
        with keeping(model, self.ratio(task, ctx)):
            yield


def salience(task: Task, ctx: ClientContext) -> Mapping[str, Tensor]:
    """Sum a channel's scores over the round's samples that had it on."""
    return {conv: use.salience for conv, use in gated(ctx).use().items()}


def frequency(task: Task, ctx: ClientContext) -> Mapping[str, Tensor]:
    """Share of the round's samples that had the channel on."""
    return {conv: use.active for conv, use in gated(ctx).use().items()}


def at_random(task: Task, ctx: ClientContext) -> Mapping[str, Tensor]:
    """Control: as many channels, whichever."""
    return {conv: torch.rand(gate.channels, generator=ctx.rng) for conv, gate in gated(ctx).gates.items()}


def change_magnitude(task: Task, ctx: ClientContext) -> Mapping[str, Tensor]:
    """Control: the largest filters of the received model, the same for all clients and samples."""
    model = gated(ctx)
    weights = {**dict(model.named_parameters()), **task.params}  # frozen filters are the model's, and never travel
    return {conv: _filters(model, conv, weights).detach().abs().flatten(1).sum(dim=1) for conv in model.gates}


def _filters(model: Gated, conv: str, weights: Params) -> Tensor:
    """A convolution's filters with these parameters; as computed from them where it does that (weight norm, pruning)."""
    start = f"net.{conv}."
    if f"{start}weight" in weights:
        return weights[f"{start}weight"]
    own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
    layer = copied(model.net.get_submodule(conv)).eval()
    return materialized(load(layer, own)).get_parameter("weight")


Extent = Callable[[Gated, Params, Mapping[str, Tensor]], Mask]
"""(model, received parameters, gated convolution -> channels retained, bool (C,)) -> retained mask by parameter name."""


def rows(model: Gated, received: Params, kept: Mapping[str, Tensor]) -> Mask:
    """Retain a channel's filters, its BatchNorm entries and its gate's rows, as far as they travel: frozen ones do not."""
    retained_mask = {}
    for conv, names in model.groups.items():
        for name in (name for name in names if name in received):
            shape = received[name].shape
            retained_mask[name] = kept[conv].view(-1, *(1,) * (len(shape) - 1)).expand(shape)
    return retained_mask


def rows_and_columns(model: Gated, received: Params, kept: Mapping[str, Tensor]) -> Mask:
    """Retain rows, less the columns of the next convolutions that read channels which are not retained."""
    retained_mask = rows(model, received, kept)
    for conv, names in model.readers.items():
        for name in (name for name in names if name in received):
            columns = kept[conv].view(1, -1, 1, 1).expand(received[name].shape)
            retained_mask[name] = retained_mask[name] & columns if name in retained_mask else columns
    return retained_mask


EXTENTS: Mapping[str, Extent] = {"rows": rows, "rows_and_columns": rows_and_columns}


@dataclass(frozen=True)
class RetainChannels:
    """Retain the round(keep_up * C) channels of each gated layer, at least one, that score highest, and all other layers.

    Equal scores: lowest index first.
    """

    keep_up: float
    score: ChannelScore = salience
    extent: Extent = rows

    def __post_init__(self) -> None:
        if not 0 < self.keep_up <= 1:
            raise UserError(f"client.keep_up = {self.keep_up}: must be above 0 and at most 1")

    def __call__(self, task: Task, ctx: ClientContext) -> Mask:
        kept = {
            conv: top_channels(scores[None].cpu(), kept_channels(self.keep_up, len(scores)))[0]
            for conv, scores in self.score(task, ctx).items()
        }
        return self.extent(gated(ctx), task.params, kept)


def retain_active(task: Task, ctx: ClientContext) -> Mask:
    """Retain every channel that was on for any sample of the round: a control, since the union is nearly all channels."""
    kept = {conv: (use.active > 0).cpu() for conv, use in gated(ctx).use().items()}
    return rows(gated(ctx), task.params, kept)


@dataclass(frozen=True)
class FollowGap(Around):
    """A client that prunes as it over-fits: the gap between validation and training loss on its data moves its ratio.

    A tenth of the client's samples (`holdout`) is not trained on; the weight of the update counts all samples. After
    training, in evaluation mode: a gap above `limit` lowers the ratio of the client's next round by `step`, to `least` at
    the lowest; a smaller one raises it. The first round is dense.

    Attributes:
        client: what trains; its ratio is `own_ratio`.
        limit: largest tolerated gap, in nats.
    """

    client: Client
    limit: float = 0.1
    step: float = 0.1
    least: float = 0.5
    holdout: float = 0.1

    def __post_init__(self) -> None:
        for key in ("step", "least", "holdout"):
            if not 0 < getattr(self, key) < 1:
                raise UserError(f"client.{key} = {getattr(self, key)}: must be above 0 and below 1")

    def trained_on(self, samples: int) -> int:
        """How many of a client's samples are not held out."""
        return samples - self._held_out(samples)

    def _held_out(self, samples: int) -> int:
        return max(1, int(self.holdout * samples))

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        train, held = self._split(ctx.data)
        update = self.client(task, replace(ctx, data=train))
        ratio = float(ctx.state.get(KEEP, torch.ones(())))
        with keeping(gated(ctx), ratio) as model:
            losses = [evaluate(model, part, ctx.loss)["loss"] for part in (held, train)]
        gap = losses[0] - losses[1]
        moved = ratio - self.step if gap > self.limit else ratio + self.step
        ctx.state[KEEP] = torch.tensor(min(1.0, max(self.least, moved)), dtype=torch.float64)
        metrics = {**update.metrics, "gap": gap, "keep": ratio}
        return replace(update, num_examples=ctx.num_examples, metrics=metrics)

    def _split(self, data: Split) -> tuple[Split, Split]:
        """(trained on, held out): the same samples in every round."""
        count = self._held_out(len(data))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).numpy()
        return data.subset(order[count:]).augmented(data.augment), data.subset(order[:count]).augmented(None)


def own_ratio(task: Task, ctx: ClientContext) -> Keep:
    """The ratio that the client keeps for itself; dense while it has none."""
    return float(ctx.state.get(KEEP, torch.ones(())))


def ratio_of(plan: Gating, profile: Sequence[float]) -> Ratio:
    """The federation's plan, or each client's draw from a profile where one is given."""
    for ratio in profile:
        if not 0 < ratio <= 1:
            raise UserError(f"client.profile: {ratio}: must be above 0 and at most 1")
    return Profile(tuple(profile)) if profile else Planned(plan)
