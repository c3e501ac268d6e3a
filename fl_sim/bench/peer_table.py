"""Other federated libraries beside the engines and the limit: client fits a second on the same work, each alone, in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch

from fl_sim.bench import peer_folder, peer_run, workloads
from fl_sim.bench.bare import Bare, spread
from fl_sim.bench.contest import federation_rounds, opened, seconds
from fl_sim.bench.peer_folder import Settings
from fl_sim.bench.peer_run import Installed
from fl_sim.bench.workloads import Workload
from fl_sim.communication.ledger import Ledger
from fl_sim.config.experiment import Experiment
from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.server import build_server

TOLERANCE = 1e-3
"""A peer's parameters after one round differ from ours by so much of the largest change of a parameter, at most."""
WARMUP = 3
PICKED = "as picked"


@dataclass(frozen=True)
class Contest:
    """A workload on which peers are measured.

    Attributes:
        work: what all do.
        ours: engines and precisions, the one that peers are compared with first; `PICKED` = what the probe picks here.
        rounds: timed in a turn, after `WARMUP`.
        held: clients that a peer's federation has.
    """

    work: Workload
    ours: tuple[tuple[str, str], ...]
    rounds: int
    held: int


WORKERS = (("workers", PICKED), ("workers", "float32"))
CONTESTS: Mapping[str, Contest] = {
    "b0": Contest(replace(workloads.B0, clients=998), WORKERS, rounds=10, held=200),
    "small": Contest(replace(workloads.B0_SMALL, clients=998), WORKERS, rounds=60, held=200),
    "mlp": Contest(
        workloads.TINY_MLP,
        (("inline", "float32"), ("workers", "float32"), ("cohort", "float32")),
        rounds=10,
        held=256,
    ),
}
"""998 clients have 50 samples each, so that means with and without weights are the same."""


@dataclass(frozen=True)
class Row:
    """Client fits a second of a contestant: median and quartiles over its turns.

    Attributes:
        over_limit: its median over the limit's fastest turn.
        ours_over: speed of the first engine of ours over it, median over the turns, with quartiles.
    """

    work: str
    contestant: str
    turns: int
    fits_per_s: float
    q1: float
    q3: float
    over_limit: float
    ours_over: float
    ours_over_q1: float
    ours_over_q3: float


Turn = Callable[[], float]
"""Starts a contestant, times its rounds and ends it; seconds of a round."""


def measure(asked: Mapping[str, str], works: Sequence[str], *, turns: int) -> list[Row]:
    """Measure the peers (name -> Python) on those of the workloads that they can run.

    Raises:
        UserError: no such workload, or a peer that is not installed.
        RuntimeError: a peer failed, or its parameters are not those that the same steps give here.
    """
    for work in works:
        if work not in CONTESTS:
            raise UserError(f"--work {work!r}: allowed: {', '.join(CONTESTS)}")
    peers = [peer_run.installed(name, python) for name, python in asked.items()]
    for one in peers:
        if not set(one.peer.works) & set(works):
            raise UserError(f"--with {one.name} --work {','.join(works)}: it runs {', '.join(one.peer.works)}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    for work in works:
        if able := [one for one in peers if work in one.peer.works]:
            rows += _contest(work, CONTESTS[work], able, turns)
    return rows


def notes(asked: Mapping[str, str]) -> list[str]:
    """Versions of the peers, how they are used, and what they do not do."""
    found = [peer_run.installed(name, python) for name, python in asked.items()]
    told = [", ".join(f"{package} {version}" for package, version in one.versions.items()) for one in found]
    return [
        *(f"{one.name} ({versions}): {one.peer.note}" for one, versions in zip(found, told, strict=True)),
        f"each peer trained one round first; its parameters are ours within {TOLERANCE:g} of their largest change",
        "fl-sim encodes, checks and books every update, and draws each client's order of samples; peers train in the given order",
        "limit: bare SGD steps in two processes, the fastest of its turns; ours_over: the first fl-sim row's speed over a row's",
    ]


def _contest(name: str, contest: Contest, peers: Sequence[Installed], turns: int) -> list[Row]:
    work = contest.work
    with tempfile.TemporaryDirectory() as place:
        check, timed = Path(place) / "check", Path(place) / "timed"
        for one in peers:
            require_same(one, contest, check)
        settings = settings_of(contest, clients=contest.held, warmup=WARMUP, rounds=contest.rounds, dropout=True)
        peer_folder.write(timed, _federation(work), settings)
        contestants: dict[str, Turn] = {"limit": _turn(partial(spread, Bare.of(work), 2), contest.rounds)}
        for engine, precision in contest.ours:
            chosen = _picked(work) if precision == PICKED else precision
            label = f"fl-sim {engine} {chosen}" + (f" ({PICKED})" if precision == PICKED else "")
            contestants[label] = _turn(partial(federation_rounds, work.on(engine, precision=chosen)), contest.rounds)
        contestants |= {one.name: partial(_peers_turn, one, timed, settings) for one in peers}
        taken: dict[str, list[float]] = {label: [] for label in contestants}
        for _ in range(turns):
            for label, turn in contestants.items():
                taken[label].append(turn())
    return _rows(name, work.cohort, taken)


def _rows(name: str, cohort: int, taken: Mapping[str, Sequence[float]]) -> list[Row]:
    """Rows from the seconds of a round in every turn; the first is the limit, the second what others are compared with."""
    limit, ours = list(taken.values())[:2]
    rows = []
    for label, times in taken.items():
        low, middle, high = quantiles([cohort / one for one in times], n=4, method="inclusive")
        first, half, third = quantiles(
            [one / other for one, other in zip(times, ours, strict=True)], n=4, method="inclusive"
        )
        over_limit = min(limit) / median(times)
        rows.append(Row(name, label, len(times), middle, low, high, over_limit, half, first, third))
    return rows


def settings_of(contest: Contest, *, clients: int, warmup: int, rounds: int, dropout: bool) -> Settings:
    """What peers are told of a workload."""
    work = contest.work
    assert work.steps is not None
    layers = peer_folder.layers_of(_federation(work).first.model)
    return Settings(layers, clients, work.cohort, work.batch, work.steps, 0.1, 2, warmup, rounds, dropout)


def require_same(one: Installed, contest: Contest, place: Path) -> float:
    """Have a peer train one round of clients whose steps can be compared, without dropout, and compare its parameters with ours.

    Ours come out of a whole round of the inline engine, float32, everything encoded, decoded and booked.

    Returns:
        The largest difference of a parameter, over the largest change of one.

    Raises:
        RuntimeError: it is above `TOLERANCE`, or parameters are missing.
    """
    settings = settings_of(contest, clients=contest.work.cohort, warmup=0, rounds=1, dropout=False)
    work = replace(contest.work, clients=settings.clients, client=workloads.IN_ORDER)
    federation, after = _one_round(work.on("inline"))
    peer_folder.write(place, federation, settings)
    peer_run.run(one, place, settings)
    answer = peer_folder.read(place / peer_folder.ANSWER)
    return difference(one.name, peer_folder.read(place / peer_folder.INITIAL), after, answer)


def difference(
    name: str, before: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> float:
    """Largest difference of a parameter after a round, over the largest change of one.

    Raises:
        RuntimeError: it is above `TOLERANCE`, or parameters are missing or of other shapes.
    """
    if {n: v.shape for n, v in ours.items()} != {n: v.shape for n, v in theirs.items()}:
        raise RuntimeError(f"{name}: its parameters are {', '.join(theirs)}, not {', '.join(ours)}")
    change = max(float(np.abs(value - before[n]).max()) for n, value in ours.items())
    apart = max(float(np.abs(value - theirs[n]).max()) for n, value in ours.items()) / change
    if not apart <= TOLERANCE:
        raise RuntimeError(
            f"{name}: after one round its parameters differ from ours by {apart:.2g} of the largest change of one; allowed: "
            f"{TOLERANCE:g}. It did not do the same work, so it is not timed"
        )
    return apart


def _one_round(experiment: Experiment) -> tuple[Federation, dict[str, np.ndarray]]:
    with opened(experiment) as (federation, grid):
        server = build_server(federation, Ledger())
        server.round(grid, {}, lambda answered, cohort: None)
        return federation, {name: value.numpy().copy() for name, value in server.models[0].params.items()}


def _federation(work: Workload) -> Federation:
    return Federation.build(work.on("inline"), quiet=True)


def _picked(work: Workload) -> str:
    """Precision that `precision = "auto"` chooses on this machine."""
    return Federation.build(work.on("inline", precision="auto"), quiet=True).experiment.training.precision


def _turn(start: Callable[[], AbstractContextManager[Callable[[], None]]], rounds: int) -> Turn:
    def turn() -> float:
        with start() as one_round:
            seconds(one_round, WARMUP)
            return seconds(one_round, rounds) / rounds

    return turn


def _peers_turn(one: Installed, place: Path, settings: Settings) -> float:
    times = peer_run.run(one, place, settings)
    return sum(times) / len(times)
