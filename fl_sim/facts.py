"""What a run is compared with: the plain dense model, whatever gates the method adds to it."""

from __future__ import annotations

from fl_sim import codecs
from fl_sim.federation import Federation, plain_model
from fl_sim.flops import count_macs
from fl_sim.gating import Gated
from fl_sim.models import prunable_names
from fl_sim.training import load, snapshot
from fl_sim.types import Mask, Params

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
