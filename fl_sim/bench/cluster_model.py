"""A model of one round on a cluster: seconds, bytes across each link, memory of a node, and what bounds the round.

Nothing is measured here: `Costs` comes from a short run (`fl_sim.bench.cluster_costs`). A round lasts

    begin + sending + max(compute, folding, receiving) + one fold + end

since workers compute, the driver folds, and the head's link takes replies in at the same time. The driver is one thread. Nodes are
equal and so are their workers; each node but the head fetches a broadcast once, from the head. Where workers add up the updates
of blocks, a block's sums cross in the place of its clients' uploads, and its clients cost what was measured of one block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fl_sim.runtime.grids.pool import CLIENTS, DEPTH, TASK_BYTES, TASK_S, TASKS
from fl_sim.runtime.grids.scheduling import whole


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
        block: clients of a block whose updates a worker may add up, in the config's cohort.
        sums_bytes: of a block's sums; 0 = the server needs each update.
        folded_s: of a worker for a client of a block: `fit_s`, check, decode, add.
        receipt_s: of the driver for a client whose update was added up elsewhere.
        add_s: of the driver for a block's sums.
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
    block: int = 0
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
    blocks = blocks_of(costs, workers, cohort)
    folded = sum(blocks)
    single = cohort - folded
    tasks = len(blocks) + (tasks_of(costs, workers, single) if single else 0)
    away = cohort / cluster.nodes
    blocks_away = _blocks_away(costs, blocks, cluster)
    coming = single * costs.up_bytes / cluster.nodes + blocks_away * costs.sums_bytes / max(1, others)
    down, up = (0.0, 0.0) if not others else (_fetched(costs, away), coming + away * costs.state_bytes)
    per_second = cluster.mbps * 1e6 / 8
    sending_s, receiving_s = others * down / per_second, others * up / per_second
    on_head_s = (len(blocks) - blocks_away) * max(blocks, default=0) * costs.folded_s / cluster.workers
    busy_s = max(_busy_s(costs, blocks, workers, single), on_head_s, costs.longest_s)
    compute_s = busy_s + math.ceil(tasks / workers) * costs.task_s
    folding_s = single * costs.fold_s + folded * costs.receipt_s + len(blocks) * costs.add_s + tasks * costs.send_s
    at_once_s = max(compute_s, folding_s, receiving_s)
    return Round(
        nodes=cluster.nodes,
        seconds=costs.begin_s + sending_s + at_once_s + costs.fold_s + costs.end_s,
        compute_s=compute_s,
        driver_s=costs.begin_s + folding_s + costs.end_s,
        link_s=sending_s + receiving_s,
        node_down=down,
        node_up=up,
        head_down=others * down,
        head_up=others * up,
    )


def _busy_s(costs: Costs, blocks: Sequence[int], workers: int, single: int) -> float:
    """Seconds of the busiest worker for its clients: single ones fill up what blocks leave."""
    if not blocks:
        return math.ceil(single / workers) * costs.fit_s
    most = math.ceil(len(blocks) / workers) * max(blocks) * costs.folded_s
    return max(most, (sum(blocks) * costs.folded_s + single * costs.fit_s) / workers)


def _blocks_away(costs: Costs, blocks: Sequence[int], cluster: Cluster) -> float:
    """Blocks that are added up on other nodes than the head, whose own workers take more while sums wait for the link."""
    if not blocks:
        return 0.0
    share = len(blocks) * (cluster.nodes - 1) / cluster.nodes
    crossing_s, own_s = 8 * costs.sums_bytes / (cluster.mbps * 1e6), max(blocks) * costs.folded_s / cluster.workers
    return min(share, max(DEPTH * (cluster.nodes - 1) * cluster.workers, len(blocks) * own_s / (own_s + crossing_s)))


def blocks_of(costs: Costs, workers: int, cohort: int) -> list[int]:
    """Clients of each block whose updates a worker adds up; the updates of all other clients come to the driver."""
    if not 0 < costs.sums_bytes <= costs.block * costs.up_bytes or costs.block >= cohort:
        return []
    sizes = [min(costs.block, cohort - start) for start in range(0, cohort, costs.block)]
    dealt = whole(sizes, workers=workers, seconds=costs.folded_s, nbytes=costs.down_bytes)
    return [sizes[position] for position in dealt]


def tasks_of(costs: Costs, workers: int, cohort: int) -> int:
    """Tasks that the engine cuts a round into: enough for all workers, none too short, large or long."""
    each = max(1.0, min(TASKS, cohort * costs.fit_s / (workers * TASK_S)))
    most = max(1.0, min(CLIENTS, TASK_BYTES / max(1.0, costs.down_bytes)))
    return min(cohort, max(workers * int(each), math.ceil(cohort / int(most))))


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
