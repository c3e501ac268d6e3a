"""The slots of a server algorithm: the functions that `Method` composes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fl_sim.communication.exchange import OwnCoding
from fl_sim.communication.extra import problem
from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.types import MaskRule, Params, Scalar, UserError
from fl_sim.runtime.budget_coding import BudgetCoding
from fl_sim.runtime.server_context import ServerContext
from strategies.aggregation import mean
from strategies.calibration import Calibrate
from strategies.distillation import CoupleModels, ServerDistillation, no_distillation, no_exchange
from strategies.downlink_types import Downlink, configured_types
from strategies.selection import Select, uniform
from strategies.server_step import Aggregate, Optimise, ServerState, replace_params

SendExtra = Callable[[ServerState], Mapping[str, Params]]
"""State before a round -> the extra tensors of its tasks, by the names that the client declares."""


def send_nothing(state: ServerState) -> Mapping[str, Params]:
    """Send no extra tensors."""
    return {}


RoundMetrics = Callable[[int], Mapping[str, float]]
"""Rounds finished -> numbers of the algorithm's own for the round's log, for instance the privacy spent."""


def no_metrics(rounds: int) -> Mapping[str, float]:
    """Add no numbers of its own."""
    return {}


@dataclass(frozen=True)
class Slots:
    """Functions that process a round's updates; each has a default.

    Attributes:
        aggregate: (state, updates) -> parameters; the default is a weighted mean that fits the run's error feedback.
        adjust_mask: decides the next global pruning mask; None = dense.
        optimise: server optimizer, from the aggregate to the next parameters.
        distil: distillation on the server after aggregation.
        couple_models: couples the models of a federation with several capacities.
        calibrate: makes the mask rule anew after each round, from measurements; it takes the place of `adjust_mask`.
        downlink: chooses the value type of each tensor that is sent.
        account: further numbers for the round's log. Those that do not depend on cohorts drawn anew from the clients of one model
            have an attribute `holds_always = True`; without it, asynchronous schedules and capacities are refused.
        select: chooses the clients of a round.
        send: extra tensors of the tasks.
        takes: names of the extra tensors of the updates that this algorithm uses; a client that sends others, or lacks one,
            is refused before round 1.
        config: numbers, texts and bytes that travel to the clients in `task.config`; an option of the config's `client`
            table takes the place of the one with its name.
    """

    aggregate: Aggregate = mean
    adjust_mask: MaskRule | None = None
    optimise: Optimise = replace_params
    distil: ServerDistillation = no_distillation
    couple_models: CoupleModels = no_exchange
    calibrate: Calibrate | None = None
    downlink: Downlink = configured_types
    account: RoundMetrics = no_metrics
    select: Select = uniform
    send: SendExtra = send_nothing
    takes: Sequence[str] = ()
    config: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def counts_cohorts(self) -> bool:
        """Whether it has numbers of its own that hold for cohorts drawn anew from one model's clients, such as an epsilon."""
        return self.account is not no_metrics and not getattr(self.account, "holds_always", False)

    def __post_init__(self) -> None:
        for key, value in self.config.items():
            if not isinstance(value, Scalar):
                raise UserError(
                    f"strategy: config[{key!r}] = {value!r}: only numbers, texts and bytes travel to clients"
                )


def require_one_model(slots: Slots) -> None:
    """Check before round 1, where a run has several models, that the algorithm's guarantee is not for one cohort.

    Raises:
        UserError: it has numbers of its own, such as an epsilon, which are for one model and its cohorts.
    """
    if slots.counts_cohorts:
        raise UserError(
            "capacities: not with this strategy, whose guarantee is for one model and its cohorts; remove capacities"
        )


def require_whole_tensors(slots: Slots, context: ServerContext) -> None:
    """Check before round 1 that nothing sparse meets a codec of the user's own, which codes whole tensors.

    Raises:
        UserError: the method prunes, or chooses a value type for each tensor.
    """
    for way in ("uplink", "downlink"):
        coding = getattr(context.exchange, way)
        if not isinstance(coding, OwnCoding):
            continue
        where = f"wire.codec.{way} = {coding.name!r}: codes whole tensors"
        if slots.adjust_mask is not None or slots.calibrate is not None:
            raise UserError(f"{where}, and this strategy prunes; allowed: strategies without a mask rule")
        if way == "downlink" and slots.downlink is not configured_types:
            raise UserError(f"{where}, and this strategy chooses a value type for each; remove one")


def require_nothing_beside_a_budget(slots: Slots, context: ServerContext) -> None:
    """Check before round 1 that a byte budget of a round (`wire.budget`) holds all that this strategy sends.

    Raises:
        UserError: the method chooses value types itself, or measures on clients.
    """
    if not isinstance(context.exchange.downlink, BudgetCoding):
        return
    if slots.downlink is not configured_types:
        raise UserError("wire.budget: this strategy chooses the value types of the downlink itself; remove one")
    if slots.calibrate is not None:
        raise UserError("wire.budget: this strategy measures on clients, whose messages no budget holds; remove one")


def require_extra(slots: Slots, state: ServerState, context: ServerContext) -> None:
    """Check before round 1 that server and client mean the same extra tensors.

    Raises:
        UserError: a name or a shape that the two do not share.
    """
    extra = context.exchange.extra
    try:
        sent = slots.send(state)
    except USERS_OWN as error:  # the user's own, whatever it is
        raise UserError(f"strategy: what gives the extra tensors of a task raised {error_line(error)}") from error
    if wrong := problem(extra.down, sent):
        raise UserError(f"strategy: what it sends is not what the client declares (client.extra.down): {wrong}")
    if set(slots.takes) != extra.up.keys():
        given = f"the client declares {', '.join(extra.up) or 'none'} (client.extra.up)"
        raise UserError(f"strategy: takes the extra tensors {', '.join(slots.takes) or 'none'} of updates; {given}")
