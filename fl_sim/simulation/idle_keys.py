"""Keys of a config that change nothing beside its others. They are said before round 1: a sweep over one compares equal runs.

A key that the user left at its default is none of them. What a part of the user's own reads nobody knows, so it counts as read.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce

from torch import nn

from fl_sim.codecs import LOSSLESS
from fl_sim.config.experiment import Experiment
from fl_sim.config.target import FEDAVG
from fl_sim.models import batchnorm_names, prunable_names
from fl_sim.models.layers import map_names
from fl_sim.models.left_out import left_out, share_left_out
from fl_sim.simulation.client_side import client_of
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.training.loop import Training

log = logging.getLogger("fl_sim")
PRESETS = "strategies.presets:"
SHOW_IMAGES = ("layer_adaptive", "mixed_capacities")
"""Presets that always compute on the server's images."""
TYPED = f"{PRESETS}layer_adaptive"
"""The strategy that chooses a value type for each weight matrix and kernel."""


@dataclass(frozen=True)
class Key:
    """A key that something else must ask for.

    Attributes:
        name: of the key, with its tables.
        is_read: whether a config that sets it has what asks for it.
        goes_with: what that would be, for the user.
    """

    name: str
    is_read: Callable[[Experiment], bool]
    goes_with: str

    def value(self, experiment: Experiment) -> object:
        """What a config says; None of an option that it does not give."""
        table, _, option = self.name.partition(".")
        if table == "strategy":
            return experiment.strategy.options.get(option)
        return reduce(getattr, self.name.split("."), experiment)


def _of_preset(option: str, *values: str) -> Callable[[Experiment], bool]:
    """Whether FedAvg's option has one of these values, or the strategy is another one, which knows its own options."""
    return lambda e: e.strategy.target != FEDAVG or e.strategy.options.get(option) in values


def _partitions(*kinds: str) -> Callable[[Experiment], bool]:
    return lambda e: e.data.partition in kinds or ":" in e.data.partition


def _shows_images(experiment: Experiment) -> bool:
    """Whether the server computes on images of its own."""
    method = experiment.strategy
    return (
        not method.target.startswith(PRESETS)
        or method.target.removeprefix(PRESETS) in SHOW_IMAGES
        or "distil" in method.options
        or method.options.get("curves") == "server"
        or experiment.model.statistics == "recalibrate"
    )


IMAGES = "a method that computes on the server's images (strategy.distil, strategy.curves = 'server', layer_adaptive)"
KEYS: Sequence[Key] = (
    Key("data.alpha", _partitions("dirichlet", "quantity"), "data.partition = 'dirichlet' or 'quantity'"),
    Key("data.shards", _partitions("shards"), "data.partition = 'shards'"),
    Key("data.noise", _shows_images, IMAGES),
    Key("training.momentum", lambda e: e.training.optimizer == "sgd", "training.optimizer = 'sgd'"),
    Key("training.decay_to", lambda e: e.training.decay != "constant", "training.decay"),
    Key("training.decay_end", lambda e: e.training.decay != "constant", "training.decay"),
    Key("training.clip", lambda e: e.training.clip_norm is not None, "training.clip_norm"),
    Key("strategy.trim", _of_preset("aggregate", "trimmed"), "strategy.aggregate = 'trimmed'"),
    Key(
        "strategy.byzantine",
        _of_preset("aggregate", "krum", "multi_krum"),
        "strategy.aggregate = 'krum' or 'multi_krum'",
    ),
    Key("schedule.mixing", lambda e: e.schedule.kind == "fedasync", "schedule.kind = 'fedasync'"),
    Key("schedule.buffer", lambda e: e.schedule.kind == "fedbuff", "schedule.kind = 'fedbuff'"),
    Key("schedule.exponent", lambda e: e.schedule.staleness != "constant", "schedule.staleness other than 'constant'"),
    Key("attack.scale", lambda e: e.attack is None or e.attack.kind != "label_flip", "another kind than 'label_flip'"),
    Key("wire.record_megabytes", lambda e: e.wire.record_payloads > 0, "wire.record_payloads above 0"),
)


def tell_idle_keys(experiment: Experiment) -> None:
    """Say which keys of a config have no effect, each in a line."""
    for line in _idle(experiment):
        log.warning("%s", line)


def _idle(experiment: Experiment) -> Iterator[str]:
    default = Experiment()
    for key in KEYS:
        if key.name.startswith("attack.") and experiment.attack is None:
            continue
        value = key.value(experiment)
        usual = None if key.name.startswith(("attack.", "strategy.")) else key.value(default)
        if value != usual and not key.is_read(experiment):
            yield f"{key.name} = {value!r}: has no effect here; it goes with {key.goes_with}"
    if experiment.data.proxy and not _shows_images(experiment):
        yield (
            f"data.proxy = {experiment.data.proxy:g}: no client trains on this share, and nothing else here does; it goes with "
            f"{IMAGES}"
        )
    yield from _training(experiment)


def _training(experiment: Experiment) -> Iterator[str]:
    """`[training]` beside a client that does not ask for it."""
    if experiment.study is not None or _asks(experiment, "client") or _asks(experiment, "strategy"):
        return
    usual = Training()
    names = [each.name for each in fields(Training) if each.name != "precision"]  # which is of evaluations too
    given = [name for name in names if getattr(experiment.training, name) != getattr(usual, name)]
    if given:
        yield (
            f"[training]: {', '.join(given)}: no effect here, as client = {experiment.client.target!r} does not ask for it; a "
            "preset does, a function `(*, training) -> client`"
        )


def _asks(experiment: Experiment, part: str) -> bool:
    """Whether a client or a strategy is made by a preset with a parameter `training`."""
    found = getattr(experiment, part).resolve()
    parameters = inspect.signature(found).parameters
    plain = not inspect.isclass(found) and any(p.kind is not p.KEYWORD_ONLY for p in parameters.values())
    return "training" in parameters and not plain


def tell_without_effect(federation: Federation, *, prunes: bool) -> None:
    """Say what is asked of prunable weights where none travel, and of masks or residuals where there are none.

    Args:
        federation: built.
        prunes: whether the strategy decides a mask.
    """
    for track in federation.tracks:
        for line in _of_model(track, prunes):
            log.warning("%s", line)


def tell_lost_extra(federation: Federation) -> None:
    """Say where clients that keep their part of what the server sums up, as in SCAFFOLD and FedDyn, get out of step with it."""
    experiment, exchange = federation.experiment, federation.first.exchange
    if not exchange.extra or getattr(experiment.client.resolve(), "stateless", False):
        return
    network, schedule = experiment.network, experiment.schedule
    loses = {
        "network.dropout": bool(network.dropout),
        "network.deadline_s": network.deadline_s is not None and schedule.in_rounds,
        "schedule.max_staleness": bool(schedule.max_staleness),
        f"wire.uplink.values = {exchange.uplink.values!r}, which rounds": exchange.uplink.values not in LOSSLESS,
    }
    for what in (what for what, does in loses.items() if does):
        log.warning(
            "%s: what of an update does not reach the server its client keeps: both drift apart (SCAFFOLD's c is then not the mean "
            "of the c_i, nor FedDyn's h that of the gradients)",
            what,
        )


def _of_model(track: ModelTrack, prunes: bool) -> Iterator[str]:
    experiment, exchange = track.experiment, track.exchange
    wire, chooses = experiment.wire, getattr(client_of(track), "sends_all", None)
    yield from _of_weights(track, prunes, chooses=chooses is False)
    if exchange.schema.prunable_size and chooses is True and not prunes and wire.broadcast is None:
        if wire.uplink.masks != "fast":
            yield f"wire.uplink.masks = {wire.uplink.masks!r}: has no effect here, as uploads have no mask"
        if wire.error_feedback and wire.codec is None and wire.budget is None and exchange.uplink.is_exact:
            yield "wire.error_feedback = true: has no effect here, as uploads leave nothing out"
    if experiment.model.batchnorm_init is not None:
        yield from _of_initialisation(f"model.batchnorm_init = {experiment.model.batchnorm_init!r}", track.model)


def _of_initialisation(what: str, model: nn.Module) -> Iterator[str]:
    """What `models.initialise` does not find in a model, or leaves as the builder made it."""
    if not batchnorm_names(model):
        yield (
            f"{what}: has little effect here, as the model has no BatchNorm with gamma and beta: its weights are drawn from "
            "Kaiming's normal distribution, and nothing else"
        )
    matrices = prunable_names(model)
    computed = left_out(model, [name for name, _ in model.named_parameters()], matrices)
    # Adapters are parametrizations, and start as their own rule says.
    others = [name for name in matrices if name not in map_names(model) and ".parametrizations." not in name]
    if stay := [*computed, *others]:
        more = f" and {len(stay) - 1} more" if len(stay) > 1 else ""
        yield (
            f"{what}: draws the weights of convolutions and linear layers that are parameters of their own; {stay[0]}{more} "
            f"stay as the model was built ({len(computed)} computed from other tensors)"
        )


def _of_weights(track: ModelTrack, prunes: bool, *, chooses: bool) -> Iterator[str]:
    """What is asked of weight matrices, where none travels or the model computes some of them from other tensors."""
    experiment, schema = track.experiment, track.exchange.schema
    computed = left_out(track.model, schema.names, schema.prunable)
    if schema.prunable_size and not computed:
        return
    wire = experiment.wire
    asked = {
        f"strategy = {experiment.strategy.target!r}": prunes or experiment.strategy.target == TYPED,
        f"client = {experiment.client.target!r}, which chooses weights": chooses,
        "wire.budget": wire.budget is not None,
        "wire.broadcast.density": wire.broadcast is not None and wire.broadcast.density < 1,
        "wire.codec": wire.codec is not None,
    }
    rounds = [
        f"wire.{way}.values = {coding.values!r}"
        for way, coding in (("uplink", wire.uplink), ("downlink", wire.downlink))
        if coding.values not in LOSSLESS
    ]
    given = [what for what, is_asked in asked.items() if is_asked]
    out = share_left_out(computed, schema.prunable_size, "are sent whole and without loss")
    if schema.prunable_size:
        if given or rounds:
            yield f"{'; '.join([*given, *rounds])}: {out}"
        return
    reason = f": {out}" if computed else f" (model.trainable = {experiment.model.trainable!r})"
    for what in given:
        yield f"{what}: has no effect here, as it is about weight matrices and kernels, and none travels{reason}"
    for what in rounds:  # all else in a payload is then coded without loss, see `codecs.tensor_coding`
        yield (
            f"{what}: rounds nothing here, and compresses what is sent without loss, as it is about weight matrices and kernels, "
            f"and none travels{reason}"
        )
