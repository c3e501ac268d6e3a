"""Server of a run: the protocols that a `[strategy]` target fulfils, and how it is built."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar, cast

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from fl_sim.communication.exchange import OwnCoding
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.mask_log import MaskRecorder
from fl_sim.communication.payload_log import PayloadRecorder
from fl_sim.communication.traces import read_availability, read_devices
from fl_sim.core.lookup import imported
from fl_sim.core.types import Mask, Params, Scalar, UserError
from fl_sim.models.module_state import ModuleState
from fl_sim.models.parameters import load
from fl_sim.runtime.server_context import Accounting, Sampling, ServerContext, ServerSnapshot
from fl_sim.simulation.client_side import client_of
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.idle_keys import tell_lost_extra, tell_without_effect
from fl_sim.simulation.model_track import ModelTrack
from fl_sim.simulation.round_budget import require_budget

T = TypeVar("T")
log = logging.getLogger("fl_sim")


class GlobalModel(Protocol):
    """The server's side of one model, which can be read, saved and restored."""

    @property
    def params(self) -> Params:
        """Global parameters."""

    @property
    def mask(self) -> Mask | None:
        """Global mask, or None while the model is dense."""

    def saved(self) -> ServerSnapshot:
        """Take a snapshot of everything that the next round depends on."""

    def restore(self, saved: ServerSnapshot) -> None:
        """Continue after the round of a snapshot."""


class Server(Protocol):
    """The server of one run (`strategies.federated_server.FederatedServer`)."""

    @property
    def models(self) -> Sequence[GlobalModel]:
        """The models of the federation, in the order of its tracks."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the last round, with `clients` and `failures`."""

    @property
    def failures(self) -> Mapping[str, int]:
        """Failed client tasks so far, by kind: raised, rejected, late, lost."""

    def round(self, grid: Grid, options: Mapping[str, Scalar], on_reply: Callable[[int, int], None]) -> None:
        """Run one round: sample, encode, send, decode, aggregate, prune."""


class ServerMethod(Protocol):
    """Protocol of a `[strategy]` target's result (`strategies.base.Method`)."""

    def server(self, context: ServerContext, *others: ServerContext) -> Server:
        """Build the server of one run; `others` are the contexts of further models, one for each capacity."""


def build_server(
    federation: Federation,
    ledger: Ledger,
    recorder: MaskRecorder | None = None,
    payloads: PayloadRecorder | None = None,
    scratch: Path | None = None,
) -> Server:
    """Build the server that the config's `[strategy]` names; it books into `ledger`, and large sums lie in `scratch`.

    Raises:
        UserError: the target makes something else, or several capacities are asked for what one model alone can have.
    """
    experiment = federation.experiment
    rounds = experiment.schedule.in_rounds
    run = {
        "seed": experiment.seed,
        "num_clients": len(federation.partitions),
        "cohort_size": min(track.cohort_size for track in federation.tracks) if rounds else experiment.step_size,
        "kept": kept_by_clients(federation),
        "training": experiment.local_training,
    }
    method = experiment.strategy.build(run, "strategy")
    if isinstance(method, Strategy):
        adapted = cast("Callable[..., object]", imported("", "strategies.flower_method:method_of"))
        method = adapted(method, experiment.strategy.target, experiment.strategy.options)
    if not hasattr(method, "server"):
        raise UserError(f"strategy {experiment.strategy.target!r} made a {type(method).__name__}, not a Method")
    if experiment.attack is not None and getattr(method, "counts_cohorts", False):
        log.warning("attack: an epsilon is that of the clients that do not attack; attackers may pool their data")
    if experiment.model.adapter is not None and _prunes(method):
        raise UserError(
            f"model.adapter: not with a strategy that prunes, {experiment.strategy.target!r}: B starts at zero, so that a mask "
            "would keep it there; allowed: fedavg, and uploads of client = 'clients.presets:topk'"
        )
    if experiment.wire.budget is not None:
        sends_all = getattr(client_of(federation.first), "sends_all", True) is not False
        first = federation.first
        require_budget(
            experiment, first.exchange, first.initial, first.start, prunes=_prunes(method), sends_all=sends_all
        )
    tell_without_effect(federation, prunes=_prunes(method))
    tell_lost_extra(federation)
    if len(federation.tracks) > 1 and experiment.wire.record_masks:
        raise UserError("wire.record_masks: not with capacities; allowed with one model only")
    accounting = Accounting(ledger, experiment.network, recorder, payloads)
    contexts = [_context(federation, track, accounting, scratch) for track in federation.tracks]
    return cast(ServerMethod, method).server(*contexts)


def _prunes(method: object) -> bool:
    """Whether a server algorithm decides a global mask."""
    return any(getattr(method, slot, None) is not None for slot in ("adjust_mask", "calibrate"))


def kept_by_clients(federation: Federation) -> tuple[str, ...]:
    """Settings by which a client may keep something of its data between rounds, for privacy accounting.

    A client or a codec that keeps nothing says so: an attribute `stateless = True` of what the config names.
    """
    target, exchange = federation.experiment.client, federation.first.exchange
    uplink = exchange.uplink
    codec = uplink.codec if isinstance(uplink, OwnCoding) else None
    may = {
        "wire.error_feedback = true": exchange.error_feedback,
        "model.statistics = 'local'": federation.experiment.model.statistics == "local",
        f"model.personal = {federation.experiment.model.personal!r}": federation.experiment.model.personal is not None,
        f"wire.codec.uplink = {getattr(uplink, 'name', '')!r}, which does not say stateless = True": codec is not None
        and not getattr(codec, "stateless", False),
        f"client = {target.target!r}, which does not say stateless = True": not getattr(
            target.resolve(), "stateless", False
        ),
    }
    return tuple(setting for setting, does in may.items() if does)


def _context(federation: Federation, track: ModelTrack, accounting: Accounting, scratch: Path | None) -> ServerContext:
    experiment = federation.experiment
    return ServerContext(
        exchange=track.exchange,
        initial=track.initial,
        model=_servers_own(track),
        sampling=Sampling(
            cohort_size=track.cohort_size,
            seed=experiment.seed,
            members=track.members,
            evaluate_size=experiment.evaluate.clients,
            faults=experiment.faults,
            world=federation.world,
            sizes=federation.sizes,
        ),
        accounting=accounting,
        start=track.start,
        proxy=federation.proxy(),
        precision=experiment.training.precision,
        broadcast=experiment.wire.broadcast,
        label=track.label,
        schedule=experiment.schedule,
        availability=_traced(read_availability, experiment.schedule.availability, federation),
        devices=_traced(read_devices, experiment.schedule.devices, federation),
        scratch=scratch,
    )


def _traced(read: Callable[[Path, int], T], file: str | None, federation: Federation) -> T | None:
    """What a trace says of the federation's clients; None without one."""
    return None if file is None else read(Path(file), len(federation.partitions))


def _servers_own(track: ModelTrack) -> Callable[[Params], nn.Module]:
    @cache
    def own() -> ModuleState:
        track.built.put_back()
        return ModuleState(copy.deepcopy(track.model), track.built.elsewhere)

    def under(params: Params) -> nn.Module:
        own().put_back()
        return track.settled(load(own().model, {**track.own, **params} if track.own else params))

    return under
