"""Builds the seeded model of an experiment, and chooses which of its entries travel."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from torch import nn

from fl_sim import codecs, models
from fl_sim.communication.exchange import Exchange, Frozen
from fl_sim.communication.extra import NO_EXTRA, Extra
from fl_sim.config.experiment import Experiment
from fl_sim.core.seeding import Purpose, derive
from fl_sim.core.types import Params, UserError
from fl_sim.data import Data
from fl_sim.data.kinds import Targets
from fl_sim.gating import Gating
from fl_sim.models.parameters import constants, entries, frozen, load, snapshot, values
from fl_sim.simulation.own_codecs import codings_of
from fl_sim.training.model_file import Stored, read
from fl_sim.training.recalibration import measurable
from fl_sim.training.starting_weights import entries_for


def plain_model(experiment: Experiment, data: Data, seed: int) -> nn.Module:
    """Build the architecture of an experiment from `seed` alone, on the CPU, without gates and with nothing frozen.

    Raises:
        UserError: unknown model, or one that does not take the inputs of the data.
    """
    section = experiment.model
    return models.build_for(section.name, interface_of(data), width=section.width, seed=seed)


def interface_of(data: Data) -> models.Interface:
    """What a model of these data takes, and what it has to answer."""
    each_token = data.targets is Targets.TOKENS
    return models.Interface(data.shape, data.num_classes, data.vocabulary, each_token)


def read_weights(experiment: Experiment) -> Stored | None:
    """Read the model file that an experiment starts from (`model.weights`); None without one.

    Raises:
        UserError: no such file, or no model in it.
    """
    path = experiment.model.weights
    return None if path is None else read(Path(path))


def make_model(
    experiment: Experiment,
    data: Data,
    seed: int,
    weights: Stored | None = None,
    look: Callable[[nn.Module], object] = lambda plain: None,
) -> tuple[nn.Module, Gating | None]:
    """Build the model of an experiment as its method trains it, and its gating as this model settles it.

    Frozen parameters require no gradient. Of given weights only entries that never travel are filled in. `look` sees the plain
    model before anything is done to it.

    Raises:
        UserError: unknown model or initialisation, `model.trainable` selects nothing, adapters with gates, statistics
            that cannot be measured anew, or given weights that do not fit.
    """
    section, gating = experiment.model, experiment.gating
    if section.adapter is not None and gating is not None:
        raise UserError("model.adapter: not with [gating]; allowed: a model without gates")
    model = plain_model(experiment, data, seed)
    look(model)
    batchnorm_only = "batchnorm" in section.trainable.split("+")
    init = section.batchnorm_init or ("uniform" if batchnorm_only else None)
    if init is not None:
        models.initialise(model, init, seed=derive(seed, Purpose.MODEL))
    if gating is not None:
        gated = gating.wrap(model, seed=derive(seed, Purpose.GATES))
        gating = gating.settled(gated, data.shape)
        gated.set_keep(gating.keep)
        model = gated
    if section.adapter is None:
        models.freeze(model, section.trainable, seed=derive(seed, Purpose.MODEL, 1))
    else:
        models.adapt(model, section.adapter, seed=derive(seed, Purpose.MODEL, 1))
    if section.statistics != "average":
        measurable(model)
    travelling = _travelling(experiment, model)
    if weights is not None:
        load(model, {n: p for n, p in entries_for(model, weights).items() if n not in travelling})
    return model, gating


def _travelling(experiment: Experiment, model: nn.Module) -> list[str]:
    """Names of the entries that payloads carry: trainable parameters that no client keeps, and averaged statistics."""
    named = dict(model.named_parameters())
    averaged = experiment.model.statistics == "average"
    own = set(models.personal_names(model, experiment.model.personal))
    return [n for n in entries(model) if (named[n].requires_grad and n not in own if n in named else averaged)]


def make_exchange(
    experiment: Experiment, model: nn.Module, given: Collection[str] = (), extra: Extra = NO_EXTRA
) -> Exchange:
    """Choose what travels: trainable parameters that no client keeps for itself, averaged BatchNorm statistics, and the
    extra tensors that the client declares.

    Entries that never travel but come from a file (`given`) are sent to each client once, at its first contact; so are constant
    buffers for which the file has other values than the builder.
    """
    params, fixed, named = values(model), frozen(model), dict(model.named_parameters())
    statistics = [name for name in params if name not in named]
    travelling = {n: params[n] for n in _travelling(experiment, model)}
    prunable = [name for name in models.prunable_names(model) if name in travelling]
    schema = codecs.Schema.of(travelling, prunable, buffers=[name for name in statistics if name in travelling])
    kept = statistics if experiment.model.statistics == "local" else []
    exchange = Exchange(
        schema,
        *codings_of(experiment),
        experiment.wire.error_feedback,
        personal=(*models.personal_names(model, experiment.model.personal), *kept),
        extra=extra.of(schema),
    )
    others = _constants(model, given)
    base = {name: value for name, value in {**untravelled(model, exchange), **others}.items() if name in given}
    if not fixed and not base:
        return exchange
    base_schema = codecs.Schema.of(base, [], buffers=[]) if base else None
    encoded = b"" if base_schema is None else codecs.encode(base, None, schema=base_schema)
    frozen_weights = Frozen(experiment.seed, Frozen.digest_of({**fixed, **others}), encoded)
    return replace(exchange, frozen=frozen_weights, base=base_schema)


def _constants(model: nn.Module, names: Collection[str]) -> Params:
    """Those of a model's constants that are no frozen parameters and have one of these names."""
    fixed = dict(model.named_parameters())
    return {name: value.detach() for name, value in constants(model).items() if name in names and name not in fixed}


def untravelled(model: nn.Module, exchange: Exchange) -> Params:
    """What a client holds of a model and no payload of a round carries: frozen weights, a file's constants, personal entries."""
    others = _constants(model, () if exchange.base is None else exchange.base.names)
    own = snapshot(model, exchange.personal) if exchange.personal else {}
    return {**frozen(model), **others, **own}
