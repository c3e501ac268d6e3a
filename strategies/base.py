"""Flower's Strategy hooks over the pure server step.

`SparseStrategy` runs under `strategy.start(grid, ...)` on any Grid: ours, Flower's simulation, a SuperLink. It samples
cohorts by partition from the seed, encodes one payload per distinct mask a client holds, decodes the replies one at a
time in partition order, and books every payload that moved. The method itself is a `Method`: a composition of functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_sim import codecs, measuring, wire
from fl_sim.broadcast import Parcel, Published
from fl_sim.checkpoint import ServerSnapshot
from fl_sim.codecs import CorruptPayload, Description
from fl_sim.curves import Curves, MeasureCurves
from fl_sim.runtime.app import PARTITION
from fl_sim.runtime.flower_compat import CLIENT_ANSWERED_NONSENSE, CLIENT_APP_CRASHED, CLIENT_APP_OVERDUE
from fl_sim.runtime.protocol import protocol_bytes
from fl_sim.runtime.setup import Setup
from fl_sim.seeding import Purpose, derive, numpy_generator
from fl_sim.sparsity import layer_densities
from fl_sim.types import Mask, MaskRule, Params, Scalar, Task, Update, UserError
from strategies.aggregation import coverage_mean
from strategies.calibration import Calibrate
from strategies.capacities import Capacities
from strategies.distillation import Teach, Unite, apart, untaught
from strategies.downlink import Downlink, as_configured
from strategies.server_step import Aggregate, Optimise, ServerState, accept, server_step

log = logging.getLogger("fl_sim")
ERRORS = {CLIENT_APP_CRASHED: "lost", CLIENT_APP_OVERDUE: "late"}
"""Kind of failure by Flower's error code; every other code is a client that raised."""
PHASES = {MessageType.TRAIN: "train", MessageType.EVALUATE: "evaluate"}


Account = Callable[[int], Mapping[str, float]]
"""Rounds finished -> numbers of a method's own for the round's log, for instance the privacy spent."""


def nothing(rounds: int) -> Mapping[str, float]:
    """No numbers of its own."""
    return {}


@dataclass(frozen=True)
class Method:
    """What a server does with a round's updates, as a composition; `config` travels to the clients as scalars.

    `calibrate` makes the mask rule anew after each round, from measurements; it takes the place of `adjust_mask`.
    """

    aggregate: Aggregate = coverage_mean
    adjust_mask: MaskRule | None = None
    optimise: Optimise = accept
    teach: Teach = untaught
    unite: Unite = apart
    calibrate: Calibrate | None = None
    downlink: Downlink = as_configured
    account: Account = nothing
    config: Mapping[str, Scalar] = field(default_factory=dict)

    def strategy(self, setup: Setup, *others: Setup) -> SparseStrategy | Capacities:
        """The Flower strategy of one run of this method; `others` are the surroundings of the other capacities."""
        parts = [SparseStrategy(self, each) for each in (setup, *others)]
        return Capacities(parts, self.unite) if others else parts[0]


class RoundFailed(RuntimeError):
    """Too few clients of a cohort returned a usable update."""


@dataclass(frozen=True)
class Failure:
    """One client of one round that returned nothing usable, and why."""

    client: int
    kind: str
    reason: str


@dataclass
class RoundLog:
    """What happened in the round in progress: weighted training metrics and failures."""

    replies: int = 0
    faults: int = 0
    nonsense: int = 0
    weight: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    down_bytes: dict[int, int] = field(default_factory=dict)
    finished_s: list[float] = field(default_factory=list)
    chosen: list[dict[str, float]] = field(default_factory=list)

    def add(self, count: int, metrics: Mapping[str, float]) -> None:
        """Count a usable reply; metrics are averaged with the number of examples as weight."""
        self.replies += 1
        self.weight += count
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + count * value

    @property
    def metrics(self) -> dict[str, float]:
        """Example-weighted means of the clients' metrics."""
        return {name: total / self.weight for name, total in self.sums.items()}

    @property
    def sent(self) -> dict[str, float]:
        """Layer -> share of its coordinates in the updates that chose their own; empty where none did."""
        names = self.chosen[0] if self.chosen else {}
        return {name: sum(shares[name] for shares in self.chosen) / len(self.chosen) for name in names}


class SparseStrategy(Strategy):
    """Federated rounds with sparse, encoded, booked updates, under `method`, surrounded by `setup`."""

    def __init__(self, method: Method, setup: Setup) -> None:
        self.method, self.setup, self.exchange = method, setup, setup.exchange
        self.state = ServerState(setup.exchange.schema, setup.initial)
        self.network = setup.network if setup.network.links else None
        self.simulated_s = 0.0
        self.holdings = wire.Holdings()
        self.round_log = RoundLog()
        self.failures = {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
        self._nodes: dict[int, int] = {}
        self._partition_of: dict[int, int] = {}
        self._cohort: list[int] = []
        self._evaluated: dict[str, float] = {}
        self._grid: Grid | None = None
        self.published = None if setup.broadcast is None else Published(setup.broadcast, setup.exchange, setup.seed)

    @property
    def params(self) -> Params:
        """Global parameters, in schema order."""
        return self.state.params

    @property
    def mask(self) -> Mask | None:
        """Global mask, or None while the model is dense."""
        return self.state.mask

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last round: example-weighted training metrics, layers' shares sent, usable replies, failures."""
        means = {f"train_{name}": value for name, value in self.round_log.metrics.items()}
        means |= {f"clients_{name}": value for name, value in self._evaluated.items()}
        clock = {"simulated_s": self.simulated_s} if self.network is not None else {}
        sent = {f"sent/{name}": round(share, 4) for name, share in self.round_log.sent.items()}
        own = self.method.account(self.state.round)
        counts = {"clients": self.round_log.replies, "failures": len(self.round_log.failures)}
        return {**means, **clock, **sent, **own, **counts}

    # -- what survives the process -------------------------------------------------------------------------------------

    def saved(self) -> ServerSnapshot:
        """What the next round depends on."""
        state = self.state
        return ServerSnapshot(
            state.round,
            state.params,
            state.mask,
            state.memory,
            self.holdings.known(),
            self.holdings.answered,
            self.simulated_s,
            dict(self.failures),
            {} if self.published is None else dict(self.published.kept()),
            {} if self.published is None else dict(self.published.holders),
        )

    def restore(self, saved: ServerSnapshot) -> None:
        """Go on where `saved` was taken."""
        self.state = ServerState(self.exchange.schema, saved.params, saved.round, saved.mask, saved.memory)
        self.simulated_s, self.failures = saved.simulated_s, dict(saved.failures)
        self.holdings = wire.Holdings()
        for client in saved.answered:
            self.holdings.learned(client, saved.held.get(client))
        if self.published is not None:
            self.published.restore(saved.published, saved.holders)

    # -- who takes part ------------------------------------------------------------------------------------------------

    def nodes(self, grid: Grid) -> Mapping[int, int]:
        """Partition -> node id, in partition order. Our Grids know it; other runtimes are asked once, by a query."""
        if not self._nodes:
            known = getattr(grid, "partitions", None)
            found = known if known is not None else self._ask(grid)
            if self.setup.members is not None:
                members = set(self.setup.members)
                found = {node: partition for node, partition in found.items() if partition in members}
            self._nodes = {partition: node for node, partition in sorted(found.items(), key=lambda pair: pair[1])}
            self._partition_of = dict(found)
        return self._nodes

    def _ask(self, grid: Grid) -> dict[int, int]:
        messages = [
            Message(RecordDict(), node, MessageType.QUERY, group_id="0") for node in sorted(grid.get_node_ids())
        ]
        replies = [reply for reply in grid.send_and_receive(messages, timeout=60) if reply.has_content()]
        return {r.metadata.src_node_id: int(str(r.content.config_records[wire.CONFIG][PARTITION])) for r in replies}

    def draw(self, number: int, purpose: Purpose, size: int, partitions: Sequence[int]) -> list[int]:
        """Partitions drawn for a round: a function of (seed, round, purpose) alone, sorted."""
        rng = numpy_generator(self.setup.seed, number, purpose)
        chosen = rng.choice(list(partitions), size=min(size, len(partitions)), replace=False)
        return sorted(int(partition) for partition in chosen)

    @property
    def expected(self) -> list[int]:
        """Nodes of the current cohort, in the order of its messages."""
        return [self._nodes[partition] for partition in self._cohort]

    @property
    def parts(self) -> list[SparseStrategy]:
        """The strategies of the models of this federation: there is one."""
        return [self]

    # -- training ------------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = self.nodes(grid)
        self._grid = grid
        number = self.state.round + 1
        self._cohort = self.draw(number, Purpose.COHORT, self.setup.cohort_size, list(nodes))
        self.round_log = RoundLog()
        scalars = {
            **self.method.config,
            **{k: v for k, v in config.items() if isinstance(v, (bool, int, float, str, bytes))},
        }
        task = Task(number, self.state.params, self.state.mask, scalars)
        return self._messages(task, [(p, nodes[p]) for p in self._cohort], MessageType.TRAIN)

    def _messages(self, task: Task, recipients: list[tuple[int, int]], kind: str) -> list[Message]:
        """One message per recipient; recipients that hold the same share one payload."""
        prepared: dict[tuple[int, wire.Frozen | None], tuple[RecordDict, Description]] = {}
        schema, parcel_for = self.exchange.schema, self._parcels(task, kind)
        messages = []
        for client, node in recipients:
            held = self.holdings.held(client) if task.mask is not None else None
            frozen = None if self.holdings.has_frozen(client) else self.exchange.frozen
            parcel = parcel_for(client, held)
            key = id(parcel), frozen
            if key not in prepared:
                described = codecs.describe(parcel.data, schema=schema, held=held if parcel.base is None else None)
                if frozen is not None:
                    described = described.with_auxiliary(len(frozen.encode()))
                told = replace(task, config={**task.config, **(parcel.told if parcel.version >= 0 else {})})
                content = wire.task_content(told, bytes(parcel.data), seed=self.setup.seed, frozen=frozen)
                prepared[key] = content, described
            content, described = prepared[key]
            message = Message(content, node, kind, group_id=str(task.round))
            self.setup.ledger.book(
                round=task.round,
                direction="down",
                phase=PHASES.get(kind, "query"),
                client=client,
                description=described,
                protocol_bytes=protocol_bytes(message, direction="down"),
            )
            self.round_log.down_bytes[client] = sum(described.sections.values())
            if kind == MessageType.TRAIN:
                self._record(task.round, "down", client, described, parcel.mask)
            messages.append(message)
        return messages

    def _parcels(self, task: Task, kind: str) -> Callable[[int, Mask | None], Parcel]:
        """(client, mask that it holds) -> what it is sent; equal parcels are one object."""
        if self.published is not None and kind in PHASES:
            behind = task.round - 1 if kind == MessageType.TRAIN else task.round
            self.published.publish(behind, task.params, task.mask)
            return self.published.parcel
        seed = derive(self.setup.seed, task.round, Purpose.ENCODING)
        types = self.method.downlink(self.setup, task, seed)
        made: dict[bytes, Parcel] = {}

        def parcel(client: int, held: Mask | None) -> Parcel:
            key = b"" if held is None else codecs.mask_hash(held)
            if key not in made:
                coding, schema = self.exchange.downlink, self.exchange.schema
                data = coding.encode(
                    task.params, task.mask, self.setup.initial, schema=schema, held=held, seed=seed, types=types
                )
                made[key] = Parcel(data, -1, None, coding, task.mask)
            return made[key]

        return parcel

    @property
    def sent(self) -> Params:
        """The parameters that this round's clients start from."""
        return self.state.params if self.published is None else self.published.params

    def _optimise(self, state: ServerState, aggregated: Params) -> tuple[Params, Params]:
        """The method's step, from what the clients started from; what was not published is still to come."""
        params, memory = self.method.optimise(state, aggregated)
        if self.published is None:
            return params, memory
        flat = state.schema.flat
        owed = flat(self.state.params) - flat(self.sent)
        owed[state.schema.prunable_size :] = 0.0
        return state.schema.view(flat(params) + owed), memory

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arriving = self._updates(self.state.round + 1, replies)
        start = replace(self.state, params=self.sent)
        updates, refine = self.method.teach(self.setup, start, arriving)
        calibrate = self.method.calibrate
        self.state = server_step(
            start,
            updates,
            aggregate=self.method.aggregate,
            adjust_mask=self.method.adjust_mask,
            calibrate=None if calibrate is None else partial(calibrate, self.setup, self.ask),
            optimise=self._optimise,
            refine=refine,
        )
        if not all(bool(torch.isfinite(value).all()) for value in self.state.params.values()):
            raise RoundFailed(
                f"round {self.state.round}: the aggregate overflows; strategy.clip bounds what clients can do"
            )
        return ArrayRecord(), MetricRecord({**self.round_log.metrics})

    def _updates(self, number: int, replies: Iterable[Message]) -> Iterator[Update]:
        """Decode replies into updates in partition order; book each; leave out what failed."""
        for answered, (client, reply) in enumerate(_in_order(replies, self._cohort, self._partition_of), start=1):
            try:
                update = self._update(number, client, reply)
            except _Unusable as problem:
                self._failed(number, client, problem)
            else:
                self.holdings.learned(client, self.state.mask)
                if self.published is not None:
                    self.published.learned(client)
                self.round_log.add(update.num_examples, update.metrics)
                yield update
            self.setup.on_reply(answered, len(self._cohort))
        if self.network is not None:
            missing = self.round_log.replies < len(self._cohort)
            self.simulated_s += self.network.round_s(self.round_log.finished_s, missing=missing)
        self._require_enough(number)

    def _require_enough(self, number: int) -> None:
        """Stop where a round has no update, or more faults than the run puts up with."""
        cohort, allowed = len(self._cohort), self.setup.faults.max_share
        first = self.round_log.failures[0].reason if self.round_log.failures else "no client answered in time"
        if self.round_log.replies == 0:
            # What no client at all gets right is wrong with the client that the config names.
            kind = UserError if self.round_log.nonsense == cohort else RoundFailed
            raise kind(f"round {number}: none of {cohort} clients returned an update: {first}")
        if self.round_log.faults > allowed * cohort:
            share = f"{self.round_log.faults} of {cohort} clients failed, faults.max_share allows {allowed:g}"
            raise RoundFailed(f"round {number}: {share}: {first}")

    def _failed(self, number: int, client: int, problem: _Unusable) -> None:
        self.holdings.forget(client)
        if self.published is not None:
            self.published.forget(client)
        self.failures[problem.kind] += 1
        self.round_log.faults += problem.is_fault
        self.round_log.nonsense += problem.is_nonsense
        self.round_log.failures.append(Failure(client, problem.kind, str(problem)))
        log.warning("round %d: %s", number, problem)

    def _update(self, number: int, client: int, reply: Message) -> Update:
        """Decode and book one reply.

        Raises:
            _Unusable: the client failed, dropped out or was late, or its bytes are no update of this federation.
        """
        if self.network is not None and self.network.drops(client=client, round=number, seed=self.setup.seed):
            raise _Unusable("lost", f"client {client}: dropped out of the simulated network", is_fault=False)
        _require_content(client, reply)
        schema, held = self.exchange.schema, self.state.mask
        size = wire.array_bytes(reply.content)
        described = codecs.Description.opaque(size)
        try:
            data = wire.payload(reply.content)
            described = codecs.describe(data, schema=schema, held=held)
            count, metrics = wire.read_metrics(reply.content)
            params, mask = self.exchange.uplink.decode(data, self.sent, schema=schema, held=held)
        except CorruptPayload as error:
            self._book_up(number, client, reply, described, phase="train", status="rejected")
            raise _Unusable("rejected", f"client {client}: rejected update: {error}") from error
        late = self._is_late(client, described, samples=metrics.get("examples", count))
        self._book_up(number, client, reply, described, phase="train", status="late" if late else "ok")
        self._record(number, "up", client, described, mask)
        if late:
            raise _Unusable("late", f"client {client}: later than the deadline", is_fault=False)
        if mask is not None and described.mask_mode != "held":
            self.round_log.chosen.append(layer_densities(mask))
        return Update(params, count, mask, metrics)

    def _record(
        self, number: int, direction: str, client: int, described: codecs.Description, mask: Mask | None
    ) -> None:
        if self.setup.recorder is not None:
            travelled = mask if described.mask_mode not in ("none", "held") else None
            bits = None if travelled is None else self.exchange.schema.flat_mask(travelled).numpy()
            self.setup.recorder.add(round=number, direction=direction, client=client, mask=bits)

    def _is_late(self, client: int, described: codecs.Description, *, samples: float) -> bool:
        """Ask the clock, where there is one."""
        if self.network is None:
            return False
        seconds = self.network.seconds(
            client=client,
            seed=self.setup.seed,
            down_bytes=self.round_log.down_bytes[client],
            up_bytes=sum(described.sections.values()),
            samples=samples,
        )
        late = self.network.is_late(seconds)
        if not late:
            self.round_log.finished_s.append(seconds)
        return late

    def _book_up(
        self, number: int, client: int, reply: Message, described: codecs.Description, *, phase: str, status: str
    ) -> None:
        self.setup.ledger.book(
            round=number,
            direction="up",
            phase=phase,
            client=client,
            description=described,
            protocol_bytes=protocol_bytes(reply, direction="up"),
            status=status,
        )

    # -- measurements on clients ---------------------------------------------------------------------------------------

    def ask(self, state: ServerState, measure: MeasureCurves, images: int) -> list[tuple[Curves, int]]:
        """Distortion curves of `state` from a cohort of clients, each with the number of images behind it.

        Both ways are booked in the phase `query`; the virtual clock does not run, and nobody is late or drops out.

        Raises:
            RoundFailed: no client answered.
        """
        assert self._grid is not None
        nodes, schema = self.nodes(self._grid), measuring.answer_schema(state.schema.prunable, measure.levels)
        cohort = self.draw(state.round, Purpose.CALIBRATION, self.setup.cohort_size, list(nodes))
        task = Task(state.round, state.params, state.mask, measuring.question(measure, images))
        messages = self._messages(task, [(p, nodes[p]) for p in cohort], f"{MessageType.QUERY}.{measuring.ACTION}")
        replies = self._grid.send_and_receive(messages)
        answers = []
        for client, reply in _in_order(replies, cohort, self._partition_of):
            try:
                answers.append(self._answer(state.round, client, reply, schema))
            except _Unusable as problem:
                self._failed(state.round, client, problem)
            else:
                self.holdings.learned(client, state.mask)
        if not answers:
            raise RoundFailed(f"round {state.round}: none of {len(cohort)} clients measured distortion curves")
        return answers

    def _answer(self, number: int, client: int, reply: Message, schema: codecs.Schema) -> tuple[Curves, int]:
        _require_content(client, reply)
        described = codecs.Description.opaque(wire.array_bytes(reply.content))
        try:
            data = wire.payload(reply.content)
            described = codecs.describe(data, schema=schema)
            answer = measuring.decode_curves(data, schema), wire.read_metrics(reply.content)[0]
        except CorruptPayload as error:
            self._book_up(number, client, reply, described, phase="query", status="rejected")
            raise _Unusable("rejected", f"client {client}: rejected curves: {error}") from error
        self._book_up(number, client, reply, described, phase="query", status="ok")
        return answer

    # -- evaluation on clients -----------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.setup.evaluate_size == 0:
            return []
        nodes = self.nodes(grid)
        self._cohort = self.draw(self.state.round, Purpose.EVALUATION, self.setup.evaluate_size, list(nodes))
        task = Task(self.state.round, self.state.params, self.state.mask)
        return self._messages(task, [(p, nodes[p]) for p in self._cohort], MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        evaluated = RoundLog()
        for client, reply in _in_order(replies, self._cohort, self._partition_of):
            if reply.has_error():
                log.warning("round %d: evaluation: %s", self.state.round, reply.error.reason)
                continue
            count, metrics = wire.read_metrics(reply.content)
            self._book_up(self.state.round, client, reply, codecs.Description.opaque(0), phase="evaluate", status="ok")
            evaluated.add(count, metrics)
        self._evaluated = evaluated.metrics if evaluated.replies else {}
        return MetricRecord({**evaluated.metrics}) if evaluated.replies else None

    def summary(self) -> None:
        log.info("%s: %d clients a round", type(self).__name__, self.setup.cohort_size)


class _Unusable(Exception):
    """A reply that the round goes on without; `kind` is raised, rejected, late or lost. What is simulated is no fault."""

    def __init__(self, kind: str, reason: str, *, is_fault: bool = True, is_nonsense: bool = False) -> None:
        super().__init__(reason)
        self.kind, self.is_fault, self.is_nonsense = kind, is_fault, is_nonsense


def _require_content(client: int, reply: Message) -> None:
    """Raises _Unusable where a client or its process failed."""
    if reply.has_error():
        code, reason = reply.error.code, reply.error.reason or f"client {client}: no reason"
        raise _Unusable(ERRORS.get(code, "raised"), reason, is_nonsense=code == CLIENT_ANSWERED_NONSENSE)


def _in_order(
    replies: Iterable[Message], cohort: Sequence[int], partition_of: Mapping[int, int]
) -> Iterator[tuple[int, Message]]:
    """(partition, reply) in the cohort's order. Early replies wait; our Grids send none early, others may send all."""
    waiting: dict[int, Message] = {}
    due = iter(cohort)
    head = next(due, None)
    for reply in replies:
        waiting[partition_of[reply.metadata.src_node_id]] = reply
        while head is not None and head in waiting:
            yield head, waiting.pop(head)
            head = next(due, None)
    # Whoever is still missing never answered: go on with the rest, still in order.
    yield from sorted(waiting.items())
