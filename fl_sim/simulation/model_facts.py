"""Size, density and MACs of the final model, and of the dense baseline without gates."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from fl_sim import codecs
from fl_sim.core.types import Mask, Params
from fl_sim.gating import Gated
from fl_sim.models import disabled_features, prunable_names
from fl_sim.models.macs import count_macs
from fl_sim.models.parameters import frozen, load, values
from fl_sim.models.repeatable import require_repeatable
from fl_sim.report import ModelFacts
from fl_sim.runtime.grids.allocator import give_back
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.simulation.server import GlobalModel, Server
from fl_sim.simulation.starting_model import plain_model
from fl_sim.sparsity import density
from fl_sim.sparsity.curves import calibration

log = logging.getLogger("fl_sim")
LARGE = 1 << 26
"""Bytes of a model whose memory is given back at once."""
MACS_SAMPLES = 256
"""Test samples over which a gated model's MACs are averaged."""
MACS_TEXTS = 32
"""Test samples, at equal distances, over which MACs are averaged where they depend on the tokens."""


@dataclass(frozen=True)
class DensePayloads:
    """Lengths in bytes of dense float32 payloads, to which a run's bytes are compared.

    Attributes:
        first: of the first model.
        others: (clients, length for their model) of each further capacity.
        frozen: entries of the first model that its builder froze; no payload has them.
        others_frozen: the same of each further capacity.
    """

    first: int
    others: Sequence[tuple[Sequence[int], int]] = ()
    frozen: Collection[str] = ()
    others_frozen: Sequence[Collection[str]] = ()

    def tell_frozen(self, model: str) -> None:
        """Say that what a builder froze is in no payload, so that a run's saving is not of the whole model."""
        if self.frozen:
            log.warning(
                "model.name = %r: its builder froze %d entries (%s, ...): they are in no payload, and not in the dense one either "
                "that a saving refers to; model.trainable and model.adapter are compared with the whole model",
                model,
                len(self.frozen),
                min(self.frozen),
            )


def dense_payloads(federation: Federation) -> DensePayloads:
    """Encode one dense payload of each plain model, and measure its length."""
    first, *others = federation.tracks
    size, fixed = _dense(first)
    theirs = [_dense(track) for track in others]
    sizes = [(track.members, size) for track, (size, _) in zip(others, theirs, strict=True)]
    return DensePayloads(size, sizes, fixed, [fixed for _, fixed in theirs])


def _dense(track: ModelTrack) -> tuple[int, Collection[str]]:
    """(bytes of a track's dense payload, what the model's builder froze)."""
    params, schema, fixed = _plain(track)
    if large := schema.nbytes >= LARGE:
        give_back()  # of the model
    size = len(codecs.encode(params, None, schema=schema))
    del params
    if large:
        give_back()
    return size, fixed


def _plain(track: ModelTrack) -> tuple[Params, codecs.Schema, Collection[str]]:
    """What the plain model of a track would send, and what its builder froze: no federation of it would send that."""
    model = plain_model(track.experiment, track.data, track.experiment.seed)
    if track.contents:
        require_repeatable(track.experiment.model.name, track.contents, model)
    fixed = frozenset(frozen(model))
    whole = {name: value for name, value in values(model).items() if name not in fixed}
    prunable = [name for name in prunable_names(model) if name in whole]
    statistics = whole.keys() - dict(model.named_parameters())
    schema = codecs.Schema.of(whole, prunable, buffers=statistics)
    return schema.view(schema.flat(whole)), schema, fixed


def macs(track: ModelTrack, trained: GlobalModel) -> tuple[int, int]:
    """MACs of one sample: (of the plain dense model, of the final model under its mask or as its gates leave it).

    A gated model's are the mean over test samples at the last round's keep ratio, the gates' own included. So are those of a model
    of tokens whose MACs depend on the tokens, such as one that skips padding; one log line says so.
    """
    model, tokens = load(track.model, trained.params), track.data.vocabulary is not None
    dense = count_macs(model, track.data.shape, tokens=tokens)
    if tokens and not isinstance(model, Gated):
        return _macs_of_tokens(model, track, trained, dense)
    if not isinstance(model, Gated):
        if trained.mask is None:
            return dense, dense
        return dense, count_macs(model, track.data.shape, mask=trained.mask)
    images, _ = next(track.data.test.to(track.device).batches(MACS_SAMPLES))
    plain = dense - model.gate_macs
    with track.as_in(track.experiment.rounds):
        saved = float(model.saved_macs(images).double().mean())
    return plain, round(plain - saved) + model.gate_macs


def _macs_of_tokens(model: nn.Module, track: ModelTrack, trained: GlobalModel, zeros: int) -> tuple[int, int]:
    """As `macs`, of tokens: those of zeros, which are mostly padding, unless real samples have others."""
    shape, texts = track.data.shape, calibration(track.data.test, MACS_TEXTS)
    counted = partial(count_macs, model, shape, tokens=True)
    if all(counted(sample=text) == zeros for text in (texts[0], texts[-1])):
        return zeros, zeros if trained.mask is None else counted(mask=trained.mask)

    def mean(mask: Mask | None) -> int:
        return round(sum(counted(mask=mask, sample=text) for text in texts) / len(texts))

    dense = mean(None)
    log.warning(
        "model.name = %r: MACs depend on the tokens: %s for a sample of zeros; reported is the mean over %d test samples, %s",
        track.experiment.model.name,
        f"{zeros:,}",
        len(texts),
        f"{dense:,}",
    )
    return dense, dense if trained.mask is None else mean(trained.mask)


def model_facts(federation: Federation, server: Server, dense: DensePayloads) -> ModelFacts:
    """Measure the final state of a run's first model: sizes, densities, MACs, hash of its parameters."""
    track, trained = federation.first, server.models[0]
    macs_dense, macs_left = macs(track, trained)
    model = track.complete(trained.params)
    named = dict(model.named_parameters())
    schema = track.exchange.schema
    others = zip(federation.tracks[1:], server.models[1:], dense.others_frozen, strict=True)
    return ModelFacts(
        params=sum(p.numel() for p in named.values()),
        trainable=sum(p.numel() for name, p in named.items() if p.requires_grad and name in set(schema.names)),
        disabled_features=disabled_features(model),
        prunable=_prunable(model, dense.frozen),
        density=1.0 if trained.mask is None else density(trained.mask),
        dense_payload_bytes=dense.first,
        index_dims=_index_dims(schema),
        macs_dense=macs_dense,
        macs=macs_left,
        params_hash=hashlib.sha256(schema.flat(trained.params).numpy().data).hexdigest(),
        failures=dict(server.failures),
        other_payloads=dense.others,
        other_prunable=[(t.members, _prunable(t.complete(m.params), fixed)) for t, m, fixed in others],
    )


def _prunable(model: nn.Module, fixed: Collection[str]) -> int:
    """Prunable weights of a whole model, but for what its builder froze: that is neither trained, pruned nor sent."""
    named = dict(model.named_parameters())
    names = [n for n in prunable_names(model) if n in named and n.removeprefix("net.") not in fixed]  # gates put "net."
    return sum(named[name].numel() for name in names)


def _index_dims(schema: codecs.Schema) -> float:
    count = len(schema.prunable)
    sizes = list(zip(schema.shapes[:count], schema.numels[:count], strict=True))
    return sum(len(shape) * size for shape, size in sizes) / max(1, schema.prunable_size)
