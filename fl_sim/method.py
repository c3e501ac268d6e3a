"""What a `[strategy]` target is to this package: something that makes a Flower strategy whose models can be read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Protocol, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import nn

from fl_sim import capacities
from fl_sim.federation import Federation
from fl_sim.ledger import Ledger
from fl_sim.replay import MaskRecorder
from fl_sim.resume import Restorable
from fl_sim.runtime.setup import Setup, unseen
from fl_sim.training import load
from fl_sim.types import Mask, Params, UserError


class ServerMethod(Protocol):
    """What a `[strategy]` target must make: something that builds a Flower strategy (`strategies.base.Method`)."""

    def strategy(self, setup: Setup, *others: Setup) -> ServerStrategy:
        """The strategy of one run; `others` are the surroundings of the other capacities."""


class GlobalModel(Restorable, Protocol):
    """A model that a strategy trains, whose side of the server can be saved and restored."""

    @property
    def params(self) -> Params:
        """Global parameters."""

    @property
    def mask(self) -> Mask | None:
        """Global mask."""


class ServerStrategy(Protocol):
    """A Flower strategy whose models and current round can be read."""

    @property
    def params(self) -> Params:
        """Global parameters."""

    @property
    def mask(self) -> Mask | None:
        """Global mask."""

    @property
    def parts(self) -> Sequence[GlobalModel]:
        """The models of this federation, the first of which `params` and `mask` show."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Training metrics of the last round, with `clients` and `failures`."""

    @property
    def failures(self) -> Mapping[str, int]:
        """Failed client tasks so far, by kind: raised, rejected, late, lost."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of a round."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies of a round."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = ...,
        timeout: float = ...,
        train_config: ConfigRecord | None = ...,
        evaluate_config: ConfigRecord | None = ...,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = ...,
    ) -> Result:
        """Flower's round loop."""


def build_strategy(
    federation: Federation,
    ledger: Ledger,
    *,
    others: Sequence[Federation] = (),
    recorder: MaskRecorder | None = None,
    on_reply: Callable[[int, int], None] = unseen,
) -> ServerStrategy:
    """The Flower strategy that the config's `[strategy]` names; `others` are the federations of further capacities.

    Raises:
        UserError: the target makes something else, or several capacities are asked for what one model alone can have.
    """
    experiment = federation.experiment
    run = {
        "seed": experiment.seed,
        "num_clients": len(federation.parts),
        "cohort_size": experiment.cohort.size,
        "kept": kept_by_clients(federation),
    }
    method = experiment.strategy.build(run)
    if not hasattr(method, "strategy"):
        raise UserError(f"strategy {experiment.strategy.target!r} made a {type(method).__name__}, not a Method")
    alone = {"network.links": experiment.network.links, "wire.record_masks": experiment.wire.record_masks}
    if others and (refused := [key for key, value in alone.items() if value]):
        raise UserError(f"{refused[0]}: not with capacities; allowed with one model only")
    setups = [
        Setup(
            each.exchange,
            each.initial,
            ledger,
            cohort_size=size,
            seed=experiment.seed,
            model=_servers_own(each),
            start=each.start,
            precision=experiment.training.precision,
            proxy=each.proxy(),
            members=members,
            label=label,
            broadcast=experiment.wire.broadcast,
            evaluate_size=experiment.evaluate.clients,
            network=experiment.network,
            faults=experiment.faults,
            recorder=recorder,
            on_reply=on_reply,
        )
        for each, size, members, label in zip(
            [federation, *others],
            capacities.cohort_sizes(experiment),
            capacities.members(experiment),
            capacities.labels(experiment),
            strict=True,
        )
    ]
    return cast(ServerMethod, method).strategy(*setups)


def kept_by_clients(federation: Federation) -> tuple[str, ...]:
    """The settings by which a client may keep something of its data between rounds.

    A client does not where it says so itself: an attribute `stateless = True` of what the config's `client` names.
    """
    target = federation.experiment.client
    may = {
        "wire.error_feedback = true": federation.exchange.error_feedback,
        "model.statistics = 'local'": bool(federation.exchange.personal),
        f"client = {target.target!r}, which does not say stateless = True": not getattr(
            target.resolve(), "stateless", False
        ),
    }
    return tuple(setting for setting, does in may.items() if does)


def _servers_own(federation: Federation) -> Callable[[Params], nn.Module]:
    @cache
    def own() -> nn.Module:
        return copy.deepcopy(federation.model).to(federation.device)

    return lambda params: federation.settled(load(own(), params))
