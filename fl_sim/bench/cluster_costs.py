"""The short run behind a plan: an experiment's first rounds on one Ray worker of this machine, timed part by part.

The driver's seconds are those of its thread on a processor, so that they do not contain what it waited for. A second, synthetic
federation tells what each further client costs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from fl_sim.bench.cluster_folding import of_folding
from fl_sim.bench.cluster_model import Costs
from fl_sim.bench.processes import status_kb
from fl_sim.bench.workloads import ECHO
from fl_sim.communication.flower_private import RUN_ID, identified
from fl_sim.communication.ledger import Ledger
from fl_sim.communication.messages import array_bytes
from fl_sim.config.experiment import Experiment
from fl_sim.core.observer import SILENT, Observer
from fl_sim.core.types import UserError
from fl_sim.runtime.grids.costs import Costs as SecondsOfClients
from fl_sim.runtime.grids.ray import RayGrid
from fl_sim.runtime.state.client_states import ClientStates
from fl_sim.simulation.engines import open_grid
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.identity import Identity, hash_of
from fl_sim.simulation.loop import run, serve
from fl_sim.simulation.parts import check, check_built
from fl_sim.simulation.run_folder import claimed

COHORT, ROUNDS = 8, 5
"""Of the short run, where the experiment has as many. Round 1 warms up and does not count; rounds 2, 4 and 5 are evaluated."""
EMPTY_TASKS = 200
FEW, MANY = 10_000, 1_000_000
"""Clients of the two synthetic federations whose difference is the cost of a client."""


@dataclass(frozen=True)
class Measured:
    """The costs, and what the short run itself took, which the model can be held against.

    Attributes:
        costs: for the model.
        cohort: clients of the short run's rounds.
        seconds: median of the short run's rounds, one worker.
    """

    costs: Costs
    cohort: int
    seconds: float


@dataclass
class _Watch:
    """An observer that notes the driver's seconds at each reply and at the end of each round."""

    shown: Observer
    grid: RayGrid
    evaluated: str
    parts: list[Mapping[str, float]] = field(default_factory=list)
    _at: list[float] = field(default_factory=lambda: [time.thread_time()])
    _spent: float = 0.0
    _contents: int = 0

    def say(self, line: str) -> None:
        self.shown.say(line)

    def reply(self, answered: int, cohort: int) -> None:
        self._at.append(time.thread_time())
        self.shown.reply(answered, cohort)

    def round(self, row: Mapping[str, float]) -> None:
        start, *replies, end = *self._at, time.thread_time()
        fold = (replies[-1] - replies[0]) / max(1, len(replies) - 1)
        self.parts.append(
            {
                "begin": max(0.0, replies[0] - start - fold),
                "fold": fold,
                "evaluated" if self.evaluated in row else "end": end - replies[-1],
                "fit": (self.grid.costs.spent - self._spent) / len(replies),
                "contents": self.grid.contents - self._contents,
                "seconds": row["seconds"],
            }
        )
        if len(self.parts) == 1:
            self.grid.costs = SecondsOfClients(self.grid.costs.sizes)  # how long clients took to warm up says nothing
        self._spent, self._contents = self.grid.costs.spent, self.grid.contents
        self.shown.round(row)
        self._at = [time.thread_time()]

    def median(self, part: str) -> float:
        """Of the rounds that count; 0 where none of them has the part."""
        return statistics.median([each[part] for each in self.parts[1:] if part in each] or [0.0])


def measure(experiment: Experiment, observer: Observer) -> Measured:
    """Run the first rounds on one Ray worker of this machine.

    Raises:
        UserError: the experiment cannot run, or has no rounds.
    """
    if not experiment.schedule.in_rounds:
        raise UserError(f"schedule.kind = {experiment.schedule.kind!r}: has no rounds; a plan needs rounds")
    with tempfile.TemporaryDirectory() as place:
        short = _short(experiment, place)
        check(short)
        with claimed(short) as folder, identified(RUN_ID):
            began = time.perf_counter()
            federation = Federation.build(short)
            check_built(federation)
            identity = Identity.of(federation.code, hash_of(federation.data))
            with open_grid(federation) as opened:
                grid = cast(RayGrid, opened)
                start_s = time.perf_counter() - began
                watch = _Watch(observer, grid, federation.experiment.learning.metric.name)
                report = serve(federation, grid, folder, identity, watch)
                costs = _costs(experiment, federation, watch, report.ledger, start_s)
    return Measured(costs, short.cohort.size, watch.median("seconds"))


def _short(experiment: Experiment, place: str) -> Experiment:
    """The experiment on one worker, with one client in a task, a small cohort and few rounds."""
    rounds, cohort = min(ROUNDS, experiment.rounds), min(COHORT, experiment.cohort.size)
    if rounds < 2:
        raise UserError(f"rounds = {experiment.rounds}: a plan needs 2 rounds at least, of which the first warms up")
    wire, budget = experiment.wire, experiment.wire.budget
    if budget is not None:  # each payload keeps its bytes
        whole = experiment.cohort.size + experiment.evaluate.clients
        share = (cohort + experiment.evaluate.clients) / whole
        wire = wire.model_copy(update={"budget": replace(budget, megabytes=budget.megabytes * share)})
    return experiment.model_copy(
        update={
            "wire": wire,
            "engine": "ray",
            "out": place,
            "rounds": rounds,
            "cohort": experiment.cohort.model_copy(update={"size": cohort}),
            "evaluate": experiment.evaluate.model_copy(update={"every": 2}),
            "ray": replace(experiment.ray, workers=1, address=None, clients_per_task=1),
        }
    )


def _costs(experiment: Experiment, federation: Federation, watch: _Watch, ledger: Ledger, start_s: float) -> Costs:
    task_s, send_s = _of_a_task(watch.grid)
    client_bytes, client_s = of_a_client()
    end_s, contents = watch.median("end"), watch.median("contents")
    fit_s, fold_s = watch.median("fit"), max(0.0, watch.median("fold") - send_s)
    longest_s = max(fit_s, watch.grid.costs.longest)
    folding = of_folding(experiment, federation, watch.grid, ledger)
    return Costs(
        fit_s=fit_s,
        longest_s=longest_s,
        task_s=task_s,
        begin_s=watch.median("begin"),
        fold_s=fold_s,
        send_s=send_s,
        end_s=end_s + max(0.0, watch.median("evaluated") - end_s) / experiment.evaluate.every,
        start_s=start_s,
        **_payloads(ledger),
        broadcasts=0 if 1 < contents >= federation.experiment.cohort.size else int(contents),
        state_bytes=_state(watch.grid),
        driver_bytes=1024 * status_kb("VmHWM"),
        worker_bytes=max(watch.grid.peak_bytes()),
        samples_bytes=_samples(federation),
        client_bytes=client_bytes,
        client_s=client_s,
        clients=len(federation.partitions),
        **folding._asdict(),
        clients_per_task=experiment.ray.clients_per_task,
        is_timed=experiment.faults.timeout_s is not None,
    )


def _samples(federation: Federation) -> float:
    """Mean bytes of a client's samples, with their positions, of which the last says where the next client's begin."""
    train = federation.data.train
    tensors = (train.stored, train.labels, train.groups, train.weights)
    each = sum(tensor.nbytes / len(tensor) for tensor in tensors if tensor is not None)
    return 8 + (each + 8) * len(federation.partitions.positions) / len(federation.partitions)


def _payloads(ledger: Ledger) -> Mapping[str, float]:
    """Mean bytes of a client's messages each way, of all phases: what else clients are asked travels as well."""
    sizes, counts = ledger.total(by=("direction",)), ledger.messages(phase="train")
    return {f"{way}_bytes": sizes[(way,)] / counts[way] for way in ("down", "up")}


def _state(grid: RayGrid) -> float:
    """Mean bytes of what clients keep between rounds, of those that have taken part."""
    kept = cast(ClientStates, grid.contexts).kept()
    sizes = [array_bytes(grid.contexts[grid.contexts.nodes[partition]].state) for partition in kept]
    return statistics.fmean(sizes) if sizes else 0.0


def _of_a_task(grid: RayGrid) -> tuple[float, float]:
    """Seconds of a worker, and of the driver, for a task without clients, of which two wait at a worker as in a round."""
    (worker,) = grid.workers()
    grid.announce({})
    grid.submit(worker, ())
    began, busy = time.perf_counter(), time.thread_time()
    for _ in range(EMPTY_TASKS):
        grid.submit(worker, ())
        while not grid.finished(None):
            pass
    spent = time.perf_counter() - began, time.thread_time() - busy
    while not grid.finished(None):
        pass
    return spent[0] / EMPTY_TASKS, spent[1] / EMPTY_TASKS


def of_a_client() -> tuple[float, float]:
    """Bytes and seconds of the program for each client, beside its samples: two sizes are run, in a fresh process."""
    command = [sys.executable, "-m", "fl_sim.bench.cluster_costs"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    size, seconds = json.loads(done.stdout)
    return float(size), float(seconds)


def _of_a_client() -> tuple[float, float]:
    peaks, seconds = [], []
    for clients in (FEW, FEW, MANY):  # the first warms up
        began = time.thread_time()
        with tempfile.TemporaryDirectory() as place:
            run(_synthetic(clients, place), SILENT)
        seconds.append(time.thread_time() - began)
        peaks.append(1024 * status_kb("VmHWM"))
    more = MANY - FEW
    return max(0.0, peaks[2] - peaks[1]) / more, max(0.0, seconds[2] - seconds[1]) / more


def _synthetic(clients: int, place: str) -> Experiment:
    data = {"source": "fl_sim.bench.scale:tiny_samples", "clients": clients, "partition": "iid", "min_size": 1}
    tree = {"client": ECHO, "data": data | {"validation": 0.001}, "model": {"name": "mlp", "width": 0.05}}
    return Experiment.from_tree(tree | {"out": place, "rounds": 1})


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_of_a_client()))
