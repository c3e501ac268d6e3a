"""Checks of the parts that users write, once and before round 1: what is wrong with one is a single line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from fl_sim.communication.exchange import OwnCoding
from fl_sim.config.experiment import Experiment
from fl_sim.config.stop import Stop
from fl_sim.core.given import MAIN
from fl_sim.core.lookup import imported, takes
from fl_sim.core.types import UserError
from fl_sim.gating.cut_places import places_of
from fl_sim.models import batchnorm_names
from fl_sim.models.layers import sparse_gradient_names
from fl_sim.simulation.batch_checks import check_batches
from fl_sim.simulation.client_side import client_of
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.idle_keys import tell_idle_keys
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.simulation.own_codecs import codings_of, try_codecs
from fl_sim.simulation.task_trial import try_task
from fl_sim.simulation.training_answers import check_training_answer
from fl_sim.training.client import ANYTHING, BATCHNORM, KEEPS, NOTHING, PARTS, Client
from fl_sim.training.loop import Training
from fl_sim.training.tasks import learning_task

log = logging.getLogger("fl_sim")


def check(experiment: Experiment) -> None:
    """Complain of a part that cannot work, before anything is loaded or started.

    Raises:
        UserError: names the part, and what is allowed.
    """
    _importable(experiment)
    if experiment.stop == Stop():
        log.warning(
            "[stop] is empty: the run ends after its last round; keys: a metric of the task, mb, seconds, patience"
        )
    elif experiment.stop is not None:
        try:
            experiment.stop.require_metrics(experiment.learning)
        except ValueError as error:
            raise UserError(str(error)) from error
    _tell_coarse(experiment)
    _client(experiment)
    codings_of(experiment)
    _rules(experiment)
    tell_idle_keys(experiment)


def _tell_coarse(experiment: Experiment) -> None:
    """Say where whole parameters travel as signs or three values, or through a codec, which leaves little of a model."""
    for direction in ("uplink", "downlink"):
        coding = getattr(experiment.wire, direction)
        codec = None if experiment.wire.codec is None else getattr(experiment.wire.codec, direction)
        of_a_change = direction == "downlink" and experiment.wire.broadcast is not None
        if codec is not None and coding.content == "parameters" and not of_a_change:
            log.warning(
                "wire.codec.%s = %r: codes the parameters themselves; usual: wire.%s.content = 'difference'",
                direction,
                codec.target,
                direction,
            )
        if coding.content == "parameters" and (coding.values == "sign" or coding.values.endswith("ternary")):
            log.warning(
                "wire.%s.values = %r: the parameters themselves travel so coarsely; usual: wire.%s.content = 'difference'",
                direction,
                coding.values,
                direction,
            )


def _importable(experiment: Experiment) -> None:
    if experiment.engine != "flower":
        return
    for key, text in _texts(experiment.model_dump(mode="json")):
        if text.startswith(f"{MAIN}:"):
            where = f"{key.removesuffix('.target')} = {text!r}: engine = {experiment.engine!r}"
            why = "runs clients in other processes, which cannot see what the running script or notebook defines"
            raise UserError(f"{where} {why}; save it to a file mine.py and name it mine:{text.partition(':')[2]}")


def _texts(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{path}{key}.")
        elif isinstance(value, str):
            yield path + key, value


def check_built(federation: Federation) -> None:
    """Try the client's needs and the user's rules of the server once, on the model and data of the run.

    Raises:
        UserError: names the part, what it did, and what is allowed.
    """
    for track in federation.tracks:
        _fits(track)
        try_codecs(track.exchange, track.initial)
        check_training_answer(track)
        try_task(track)
    check_batches(federation)
    experiment = federation.experiment
    if (
        experiment.data.partition == "natural"
        and federation.held is None
        and (experiment.evaluate.clients or experiment.evaluate.fit)
    ):
        federation.own_tests  # noqa: B018 - a client without a test sample is said before round 1
    own = {key: imported("", path) for key in RULES if (path := _own_rule(experiment, key)) is not None}
    if own:
        attempt = cast("Callable[..., None]", imported("", "strategies.trials:attempt"))
        attempt(own, federation.first.exchange.schema, federation.first.start)


def _fits(track: ModelTrack) -> None:
    """Check that one model has what the client needs of it; that it takes the data's images is checked where it is built."""
    client = client_of(track)
    _keeps(track, client)
    if isinstance(track.exchange.uplink, OwnCoding) and getattr(client, "sends_all", True) is False:
        raise UserError(
            f"wire.codec.uplink = {track.exchange.uplink.name!r}: codes whole tensors, and client = "
            f"{track.experiment.client.target!r} chooses what it sends; allowed: a client that sends everything, such as fedavg"
        )
    learning, tokens = learning_task(track.experiment.task), getattr(client, "token_scores", False)
    if getattr(client, "class_scores", False) and not (learning.class_scores or (tokens and learning.token_scores)):
        allowed = "'classification' or 'next_token'" if tokens else "'classification'"
        raise UserError(
            f"client = {track.experiment.client.target!r}: its loss compares scores of classes; allowed: task = "
            f"{allowed}, not {track.experiment.task!r}"
        )
    _takes_gradients(track, client)
    if track.experiment.training.cut_channels:
        _cuts(track)
    if track.data.train.weights is not None:
        _weighs(client, track.experiment.client.target)
    require = getattr(client, "require", None)
    if require is not None:
        with _aside(track.model) as model:
            require(model, track.data.train.example(1, _device(model)))


def _keeps(track: ModelTrack, client: Client) -> None:
    """Check that clients keep what the client's method needs, and that somebody measures the models that it makes."""
    asked, keeps = track.experiment, getattr(client, "keeps", ANYTHING)
    met = {
        ANYTHING: True,
        PARTS: bool(track.own),
        BATCHNORM: asked.model.statistics == "local" and track.own.keys() >= set(batchnorm_names(track.model)),
        NOTHING: not track.exchange.personal,
    }
    if not met.get(keeps, True):  # a user's client may use the word for something else
        raise UserError(f"client = {asked.client.target!r}: needs {KEEPS[keeps]}")
    if getattr(client, "before_evaluation", None) is not None and not asked.evaluate.clients:
        raise UserError(
            f"client = {asked.client.target!r}: clients alone can measure their own models; needed: evaluate.clients above 0"
        )


def _takes_gradients(track: ModelTrack, client: Client) -> None:
    """Check that the optimizer takes the gradients of the model; of a client's own training nobody knows."""
    training = getattr(client, "training", None)
    if not isinstance(training, Training) or not (sparse := sparse_gradient_names(track.model)):
        return
    if training.optimizer != "sgd" or training.weight_decay:
        asked = f"optimizer = {training.optimizer!r}" if training.optimizer != "sgd" else "weight_decay"
        raise UserError(
            f"model.name = {track.experiment.model.name!r}: gradients of {sparse[0]} are sparse (sparse = True), which "
            f"training.{asked} cannot use; allowed: sparse = False, or training.optimizer = 'sgd' without weight_decay"
        )


def _cuts(track: ModelTrack) -> None:
    """Check that channels can be cut out of the model, and say where a pruning mask alone will do that."""
    if track.experiment.model.adapter is not None:
        raise UserError("training.cut_channels: not with model.adapter; allowed with models whose convolutions train")
    places_of(track.model)  # complains where nothing can be cut
    if track.gating is None:
        log.warning(
            "training.cut_channels: the model has no gates, so that only channels are cut that a pruning mask removes whole"
        )


def _weighs(client: object, target: str) -> None:
    """Check that a client's loss uses the weights of samples; of a function of the user's nobody knows."""
    known = getattr(client, "weighs", None)
    if known is False:
        raise UserError(
            f"client = {target!r}: its loss does not use weights of samples (data.weight, data.class_weights); allowed: a client "
            "with the task's loss, such as fedavg, fedprox or topk"
        )
    if known is None:
        log.warning(
            "client = %r: weights of samples count where it trains with ctx.loss, or asks batch.weights itself", target
        )


def _client(experiment: Experiment) -> None:
    where = f"client = {experiment.client.target!r}"
    client = experiment.client.build({"training": experiment.local_training, "gating": experiment.gating}, "client")
    if not callable(client):
        raise UserError(f"{where}: made a {type(client).__name__}, which cannot be called with (task, ctx)")
    takes(where, client, "task", "ctx")


def _rules(experiment: Experiment) -> None:
    for key, (names, keywords) in RULES.items():
        if (path := _own_rule(experiment, key)) is not None:
            where = f"strategy.{key} = "
            takes(f"{where}{path!r}", cast("Callable[..., object]", imported(where, path)), *names, **keywords)


def _own_rule(experiment: Experiment, key: str) -> str | None:
    """The import path that an option of the strategy names; None where it names nothing of the user's."""
    path = experiment.strategy.options.get(key)
    return path if isinstance(path, str) and ":" in path else None


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def _aside(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode, for a forward pass that leaves modes and the global generator as they were."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield model.eval()
        finally:
            for module, mode in modes.items():
                module.training = mode


RULES: Mapping[str, tuple[Sequence[str], Mapping[str, object]]] = {
    "aggregate": (("state", "updates"), {}),
    "mask_rule": (("round", "mask", "params", "grads"), {}),
    "allocate": (("scores", "density"), {"min_keep": 0}),
    "select": (("request",), {}),
}
"""Option of a strategy that names a rule of the user's -> what the rule is called with."""
