"""A model of one round on a cluster: seconds, bytes across each link, memory of a node, and what bounds the round.

Nothing is measured here: `Costs` comes from a short run (`fl_sim.bench.cluster_costs`). A round lasts

    begin + sending + max(compute, folding, receiving) + one fold + end

since workers compute, the driver folds, and the head's link takes replies in at the same time. The driver is one thread. Nodes are
equal and so are their workers; each node but the head fetches a broadcast once, from the head. Where workers add up updates, one
sum of each other node crosses in the place of its clients' uploads, in a long round more. The last ones come once all have
computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fl_sim.runtime.grids.running_sums import hand_in_after
from fl_sim.runtime.grids.scheduling import Limits


@dataclass(frozen=True)
class Costs:
    """What a short run measured, in seconds and bytes; payloads are those of the ledger.

    Attributes:
        fit_s: of a worker for one client: decode the broadcast, train, encode the upload.
        longest_s: the same of the slowest client.
        task_s: of a worker for a task without clients.
        begin_s: of the driver before the first reply: sample the cohort, encode the broadcast.
        fold_s: of the driver for one reply: check, decode, fold, book.
        send_s: of the driver for one task.
        end_s: of the driver after the last reply: aggregate, evaluate (divided by `evaluate.every`), write.
        start_s: from the program's first step to its first worker.
        down_bytes, up_bytes: payload of one broadcast, and of one upload.
        broadcasts: different ones in a round; 0 = each client gets its own.
        state_bytes: what a client keeps between rounds; it travels to the worker and back.
        driver_bytes, worker_bytes: peak memory of the program, and of a worker.
        samples_bytes: samples of one client, which every process holds.
        client_bytes: of the program for each client, beside its samples.
        client_s: of the start for each client.
        clients: in the short run's federation.
        clients_per_task: `ray.clients_per_task`.
        is_timed: whether clients have a time limit.
        sums_bytes: of a sum of updates; 0 = the server needs each of them.
        folded_s: of a worker for a client whose update it adds up: `fit_s`, check, decode, add.
        receipt_s: of the driver for such a client.
        add_s: of the driver for a sum, and of a worker for a sum of its neighbour.
    """

    fit_s: float
    longest_s: float
    task_s: float
    begin_s: float
    fold_s: float
    send_s: float
    end_s: float
    start_s: float
    down_bytes: float
    up_bytes: float
    broadcasts: int
    state_bytes: float
    driver_bytes: float
    worker_bytes: float
    samples_bytes: float
    client_bytes: float
    client_s: float
    clients: int
    clients_per_task: int | None = None
    is_timed: bool = False
    sums_bytes: float = 0.0
    folded_s: float = 0.0
    receipt_s: float = 0.0
    add_s: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Equal nodes, the head among them.

    Attributes:
        nodes: their number.
        workers: on each node.
        mbps: rate of a node's link in 10^6 bits a second, each way.
    """

    nodes: int
    workers: int
    mbps: float


@dataclass(frozen=True)
class Round:
    """A round on a cluster: seconds of each part, and bytes across the links.

    Attributes:
        nodes: of the cluster.
        seconds: of the whole round.
        compute_s: of the busiest worker.
        driver_s: of the driver, all of it.
        link_s: of the head's link: what leaves, then what arrives.
        node_down, node_up: bytes to and from each node but the head; 0 where there is none.
        head_down, head_up: bytes that leave the head and arrive there.
    """

    nodes: int
    seconds: float
    compute_s: float
    driver_s: float
    link_s: float
    node_down: float
    node_up: float
    head_down: float
    head_up: float

    @property
    def bound(self) -> str:
        """The part that takes longest: compute, driver or link."""
        parts: Mapping[str, float] = {"compute": self.compute_s, "driver": self.driver_s, "link": self.link_s}
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class Memory:
    """What a number of clients takes, each with as many samples as in the short run.

    Attributes:
        clients: in the federation.
        driver_bytes: of the program, on the head.
        node_bytes: of a node's workers.
        states_bytes: of the head's disk for what clients keep between rounds, once all have taken part.
        start_s: from the program's first step to its first worker.
    """

    clients: int
    driver_bytes: float
    node_bytes: float
    states_bytes: float
    start_s: float


def round_on(costs: Costs, cluster: Cluster, cohort: int) -> Round:
    """Predict a round of `cohort` clients."""
    others, workers = cluster.nodes - 1, cluster.nodes * cluster.workers
    folds = is_folded(costs, workers, cohort)
    each_s, reply_s = (costs.folded_s, costs.receipt_s) if folds else (costs.fit_s, costs.fold_s)
    tasks, away = tasks_of(costs, workers, cohort), cohort / cluster.nodes
    compute_s = max(math.ceil(cohort / workers) * each_s, costs.longest_s) + math.ceil(tasks / workers) * costs.task_s
    folding_s = cohort * reply_s + tasks * costs.send_s
    times = 1 + int(compute_s / hand_in_after(costs.sums_bytes)) if folds else 0
    sum_up = costs.sums_bytes * min(1.0, away)
    coming = (0.0 if folds else away * costs.up_bytes) + away * costs.state_bytes
    down, up = (_fetched(costs, away), coming + times * sum_up) if others else (0.0, 0.0)
    per_second = cluster.mbps * 1e6 / 8
    sending_s, receiving_s = others * down / per_second, others * up / per_second
    ending_s, adding_s = _sums_s(costs, cluster, others * sum_up / per_second) if folds else (0.0, 0.0)
    beside_s = others * (up - min(times, 1) * sum_up) / per_second
    return Round(
        nodes=cluster.nodes,
        seconds=costs.begin_s + sending_s + max(compute_s, folding_s, beside_s) + reply_s + ending_s + costs.end_s,
        compute_s=compute_s,
        driver_s=costs.begin_s + folding_s + adding_s + costs.end_s,
        link_s=sending_s + receiving_s,
        node_down=down,
        node_up=up,
        head_down=others * down,
        head_up=others * up,
    )


def _sums_s(costs: Costs, cluster: Cluster, crossing_s: float) -> tuple[float, float]:
    """Seconds from the last client until its sum is added, and of the driver: for each worker of the head, and each other node.

    On another node, a worker adds up those of its neighbours first.
    """
    adding_s = (cluster.workers + cluster.nodes - 1) * costs.add_s
    joining_s = cluster.workers * costs.add_s if cluster.nodes > 1 else 0.0
    return joining_s + max(crossing_s, adding_s), adding_s


def is_folded(costs: Costs, workers: int, cohort: int) -> bool:
    """Whether workers add up updates: those that each has in a round are larger than the sum."""
    return 0 < costs.sums_bytes <= cohort / workers * costs.up_bytes


def tasks_of(costs: Costs, workers: int, cohort: int) -> int:
    """Tasks that the engine cuts a round into."""
    may_fold = costs.sums_bytes > 0
    limits = Limits(costs.clients_per_task, max(1.0, costs.down_bytes), may_fold, costs.is_timed)
    seconds = cohort * (costs.folded_s if may_fold else costs.fit_s)
    asked = limits.tasks(cohort, workers=workers, seconds=seconds)
    return min(cohort, max(asked, math.ceil(cohort / limits.most(cohort))))


def _fetched(costs: Costs, clients: float) -> float:
    """Bytes to a node that has so many clients of a round: broadcasts once each, and what clients keep."""
    return min(costs.broadcasts or clients, clients) * costs.down_bytes + clients * costs.state_bytes


def memory_of(costs: Costs, cluster: Cluster, clients: int) -> Memory:
    """Predict what a federation of `clients` takes: every worker holds all samples and their partition."""
    more = clients - costs.clients
    samples = max(0.0, more * costs.samples_bytes)
    return Memory(
        clients=clients,
        driver_bytes=costs.driver_bytes + samples + max(0.0, more * costs.client_bytes),
        node_bytes=cluster.workers * (costs.worker_bytes + samples),
        states_bytes=clients * costs.state_bytes,
        start_s=costs.start_s + max(0, more) * costs.client_s,
    )
