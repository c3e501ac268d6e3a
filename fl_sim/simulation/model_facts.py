"""What a model is when its run is over, and what it is compared with: the plain dense one, whatever gates it has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fl_sim import codecs
from fl_sim.core.types import Mask, Params
from fl_sim.gating import Gated
from fl_sim.models import disabled_features, prunable_names
from fl_sim.models.macs import count_macs
from fl_sim.models.parameters import load, snapshot
from fl_sim.report import ModelFacts
from fl_sim.simulation.federation import Federation, plain_model
from fl_sim.simulation.strategy import ServerStrategy
from fl_sim.sparsity import density

MACS_SAMPLES = 256
"""Test samples over which a gated model's MACs are averaged."""


def plain_payload_bytes(federation: Federation) -> int:
    """Length of one dense float32 payload of the plain model, really encoded."""
    model = plain_model(federation.experiment, federation.data, federation.experiment.seed)
    whole = snapshot(model)
    return len(codecs.encode(whole, None, schema=codecs.Schema.of(whole, prunable_names(model))))


def macs(federation: Federation, params: Params, mask: Mask | None) -> tuple[int, int]:
    """MACs of one sample: of the plain dense model; and of the final one, under its mask or as its gates leave it.

    A gated model's are the mean over test samples at the last round's keep ratio, the gates' own included.
    """
    model = load(federation.model, params)
    dense = count_macs(model, federation.data.shape)
    if not isinstance(model, Gated):
        return dense, count_macs(model, federation.data.shape, mask=mask)
    images, _ = next(federation.data.test.to(federation.device).batches(MACS_SAMPLES))
    with federation.as_in(federation.experiment.rounds):
        return dense - model.gate_macs, round(float(model.count_macs(images).double().mean())) + model.gate_macs


def of_model(
    federation: Federation,
    strategy: ServerStrategy,
    payload_bytes: int,
    other_payloads: Sequence[tuple[Sequence[int], int]] = (),
) -> ModelFacts:
    """The facts of the strategy's (first) model: sizes, densities, MACs, hash.

    `payload_bytes` is the length of a dense payload; `other_payloads` has (clients, the same) of each further capacity.
    """
    macs_dense, macs_left = macs(federation, strategy.params, strategy.mask)
    model = federation.complete(strategy.params)
    named = dict(model.named_parameters())
    return ModelFacts(
        params=sum(p.numel() for p in named.values()),
        trainable=sum(p.numel() for p in named.values() if p.requires_grad),
        disabled_features=disabled_features(model),
        prunable=sum(model.get_parameter(name).numel() for name in prunable_names(model) if name in named),
        density=1.0 if strategy.mask is None else density(strategy.mask),
        dense_payload_bytes=payload_bytes,
        index_dims=_index_dims(federation.exchange.schema),
        macs_dense=macs_dense,
        macs=macs_left,
        params_hash=hashlib.sha256(federation.exchange.schema.flat(strategy.params).numpy().tobytes()).hexdigest(),
        failures=dict(strategy.failures),
        other_payloads=other_payloads,
    )


def _index_dims(schema: codecs.Schema) -> float:
    count = len(schema.prunable)
    sizes = list(zip(schema.shapes[:count], schema.numels[:count], strict=True))
    return sum(len(shape) * size for shape, size in sizes) / max(1, schema.prunable_size)
