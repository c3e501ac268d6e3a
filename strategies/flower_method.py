"""Flower's own strategies as server algorithms, over our payloads: `[strategy] target = "flwr.serverapp.strategy:FedAdam"`.

Of a strategy, `configure_train` is called for what it remembers, and `aggregate_train` for what it computes. Cohorts, payloads
and the ledger are ours. Two things differ from a ServerApp of Flower: BatchNorm statistics take the clients' weighted mean and
are never shown to the strategy, and a coordinate that a client did not send counts as unchanged by it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isclose
from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_sim.codecs import Schema
from fl_sim.communication.extra import parameters
from fl_sim.communication.messages import NUM_EXAMPLES
from fl_sim.core.errors import USERS_OWN, error_line
from fl_sim.core.types import Params, Update, UserError
from strategies.base import Method
from strategies.flower_memory import Keeper, layers
from strategies.round_log import RoundLog
from strategies.server_step import ServerState, with_statistics
from strategies.sums import Sums

OURS = ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
"""Options of Flower's strategies in whose place `[cohort]` and `[evaluate]` stand."""
MOST_ASKED = 5
"""How often a strategy may ask which nodes there are; Flower's own ask twice."""
UNCALLED = ("start", "configure_evaluate", "aggregate_evaluate", "summary", "evaluate_metrics_aggr_fn")
"""What a ServerApp of Flower calls of a strategy and a run here does not."""
log = logging.getLogger("fl_sim")


@dataclass
class _Nodes:
    """A Grid of as many nodes as a strategy waits for; what it would send to them is dropped.

    Raises:
        UserError: the strategy asks again and again, as it does where it waits for more.
    """

    count: int
    _asked: int = 0

    def get_node_ids(self) -> Iterable[int]:
        self._asked += 1
        if self._asked > MOST_ASKED:
            raise UserError(f"strategy: its configure_train waits for more than {self.count} clients, and nobody joins")
        return range(1, self.count + 1)


def method_of(strategy: Strategy, target: str, options: Mapping[str, object]) -> Method:
    """The method of a run whose config names a strategy of Flower.

    Raises:
        UserError: an option of the strategy that has no effect here.
    """
    if idle := [key for key in options if key in OURS]:
        raise UserError(f"strategy.{idle[0]}: has no effect on {target!r}; needed: cohort.size, evaluate.clients")
    if uncalled := [name for name in UNCALLED if _is_own(strategy, name)]:
        told = ", ".join(uncalled)
        log.warning("strategy %r: not called here, as rounds and evaluation are the run's: its %s", target, told)
    rule = FlowerRule(strategy, target)
    return Method(aggregate=rule.aggregate, optimise=rule.optimise, account=rule.own)


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower logs lines in every round, which our log says too."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


@dataclass
class OwnMetrics:
    """Metrics that a strategy's `aggregate_train` returned for the last round, without those that the log has already.

    They do not depend on cohorts that are drawn anew, so that they go with every schedule.
    """

    holds_always = True
    target: str
    _found: dict[str, float] = field(default_factory=dict)
    _model: Schema | None = None
    _told: set[str] = field(default_factory=set)

    def __call__(self, rounds: int) -> Mapping[str, float]:
        return self._found

    def keep(self, found: object, means: Mapping[str, float], model: Schema) -> None:
        """Take what it returned; numbers that are `means`, the clients' weighted means, stand in the log as `train_...`."""
        if found is not None and not isinstance(found, Mapping):
            self._tell(f"its metrics are a {type(found).__name__}; the log takes a MetricRecord, and not these")
        given = {n: value for n, value in found.items() if n != NUM_EXAMPLES} if isinstance(found, Mapping) else {}
        numbers = {name: float(value) for name, value in given.items() if isinstance(value, (int, float))}
        own = {f"strategy_{n}": v for n, v in numbers.items() if n not in means or not isclose(v, means[n])}
        if lists := sorted(given.keys() - numbers.keys()):
            kind = type(given[lists[0]]).__name__
            self._tell(f"its metric {lists[0]!r} is a {kind}; the log takes numbers, and not this one")
        self._model = self._model or model
        if own and self._model != model:  # the log asks once, after all of them
            self._tell("its own metrics are not in the log, because the models of several capacities share it")
            own = {}
        self._found = own

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("strategy %r: %s", self.target, what)


@dataclass
class FlowerRule:
    """Aggregation by a strategy of Flower; what it remembers is the memory of the server, so that it is saved and resumed."""

    strategy: Strategy
    target: str
    _memory: Params = field(default_factory=dict)
    own: OwnMetrics = field(init=False)
    _keeper: Keeper = field(init=False)

    def __post_init__(self) -> None:
        self.own = OwnMetrics(self.target)
        self._keeper = Keeper(self.strategy, f"strategy = {self.target!r}")

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> Params:
        """Aggregate the updates of a round by the strategy.

        Raises:
            UserError: the strategy raised, needs clients of its own, or the run was resumed without all that it keeps.
        """
        schema, shown = state.schema, parameters(state.schema)
        old = schema.flat(state.params)
        statistics, replies, clients = Sums.zeros(schema, state.scratch), [], RoundLog()
        for update in updates:
            statistics.add(update)
            clients.add(update.num_examples, update.metrics)
            values = schema.flat(update.params)
            if update.mask is not None:
                values = values.clone()
                sent = schema.flat_mask(update.mask)
                values[: len(sent)] = torch.where(sent, values[: len(sent)], old[: len(sent)])
            replies.append(_reply(schema.view(values), shown.names, update))
        if not replies:
            self._memory = state.memory
            self.own.keep(None, {}, schema)
            return state.params
        given = _record({name: state.params[name] for name in shown.names})
        self._keeper.give(state.memory)
        try:
            with _quiet():
                found, metrics = self._called(state.round + 1, given, replies)
        except USERS_OWN as error:  # Flower's or the user's own, whatever it is
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"strategy = {self.target!r}: round {state.round + 1}: it raised {error_line(error)}"
            ) from error
        self._memory = self._keeper.take()
        self.own.keep(metrics, clients.metrics, schema)
        made = self._parameters(found, {name: state.params[name] for name in shown.names})
        averaged = statistics.divided(
            lambda _, total, __: torch.from_numpy(total).div_(statistics.weight), between=False
        )
        return with_statistics(schema, schema.flat({**averaged, **made}), averaged)

    def optimise(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        """Take what `aggregate` made, with what the strategy remembers now."""
        return aggregated, self._memory

    def _parameters(self, found: object, old: Params) -> Params:
        """What the strategy returned, as float32.

        Raises:
            UserError: an array with another name, shape or kind of dtype than the model's.
        """
        if not isinstance(found, ArrayRecord) or set(found) != set(old):
            raise UserError(f"strategy = {self.target!r}: it returned no parameters by the model's names")
        made: Params = {}
        for name, before in old.items():
            needed = f"needed: float32 of shape {tuple(before.shape)}"
            try:
                values = found[name].numpy()
            except USERS_OWN as error:  # data that are no array of NumPy
                said = f"it returned {name!r}, which cannot be read: {error_line(error)}"
                raise UserError(f"strategy = {self.target!r}: {said}; {needed}") from error
            # Flower's own return float64 where a rate of theirs is one.
            if values.shape != before.shape or values.dtype.kind != "f":
                said = f"it returned {name!r} as {values.dtype} of shape {values.shape}"
                raise UserError(f"strategy = {self.target!r}: {said}; {needed}")
            made[name] = torch.from_numpy(np.array(values, dtype=np.float32))
        return made

    def _called(
        self, number: int, given: ArrayRecord, replies: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        config, nodes = ConfigRecord(), _Nodes(max(map(_awaited, layers(self.strategy))))
        tasks = list(self.strategy.configure_train(number, given, config, cast(Grid, nodes)))
        told = [config, *(each for task in tasks for each in task.content.config_records.values())]
        if foreign := sorted(set().union(*told) - {"server-round"}):
            raise UserError(
                f"strategy = {self.target!r}: tells its clients {foreign[0]!r}, which clients here do not read; needed: a "
                "client with that option, for instance clients.presets:fedprox with client.mu"
            )
        if (reached := len({task.metadata.dst_node_id for task in tasks})) != nodes.count:
            raise UserError(
                f"strategy = {self.target!r}: its configure_train sends tasks to {reached} of {nodes.count} clients, and has no "
                "say in that here; needed: cohort.size, strategy.select of strategies.presets:fedavg"
            )
        if any(not _is_given(sent, given) for task in tasks for sent in task.content.array_records.values()):
            raise UserError(
                f"strategy = {self.target!r}: its configure_train sends other arrays than the global parameters, which clients "
                "here would not get"
            )
        return self.strategy.aggregate_train(number, replies)


def _is_own(strategy: Strategy, name: str) -> bool:
    """Whether somebody else than Flower wrote this function of a strategy, or of one that it wraps."""
    found = [getattr(each, name, None) for each in layers(strategy)]
    return any(each is not None and not str(getattr(each, "__module__", "")).startswith("flwr.") for each in found)


def _awaited(strategy: Strategy) -> int:
    """Nodes that a strategy waits for."""
    return max(int(getattr(strategy, key, 1)) for key in OURS if key.startswith("min_"))


def _is_given(sent: ArrayRecord, given: ArrayRecord) -> bool:
    return sent is given or (sent.keys() == given.keys() and all(sent[n].data == given[n].data for n in given))


def _record(params: Params) -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy().copy()) for name, value in params.items()})


def _reply(params: Params, names: Iterable[str], update: Update) -> Message:
    """An update as the reply that Flower's strategies read."""
    arrays = _record({name: params[name] for name in names})
    metrics = MetricRecord({**update.metrics, NUM_EXAMPLES: update.num_examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), 0, MessageType.TRAIN)
