"""The runs of a court: dense FedAvg, smaller dense models, and each method, on a task under several seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fl_sim.bench.claims.claim import Claim, cannot, read_claims, task_names, tree_of
from fl_sim.config.experiment import Experiment
from fl_sim.core.lookup import find, nearest
from fl_sim.core.types import UserError
from fl_sim.report import Report
from fl_sim.report.groups import Group
from fl_sim.simulation.sweep import Outcome

DENSE, SMALL = "dense", "dense-x"
WIDTHS = "widths"
"""Key of a task's file: the widths of its smaller dense models."""


@dataclass(frozen=True)
class Asked:
    """What a court is asked to run.

    Attributes:
        task: name of the task.
        methods: names of methods that are defined for it.
        seeds: seeds of every run.
        out: folder of the runs.
        rounds: in the place of the task's; None = the task's.
    """

    task: str
    methods: Sequence[str]
    seeds: Sequence[int]
    out: str
    rounds: int | None = None


def chosen(names: Sequence[str], *, everything: bool, task: str) -> list[str]:
    """The methods that are asked for, of those that the task has.

    Raises:
        UserError: an unknown name or task, a method that is not defined for the task, or none at all.
    """
    claims = read_claims()
    if task not in task_names():
        raise UserError(f"--task {task!r}: unknown; allowed: {', '.join(task_names())}")
    without = cannot(task)
    defined = [name for name in claims if name not in without]
    if everything:
        if names:
            raise UserError(f"reproduce {names[0]} --all: name methods, or write --all")
        return defined
    if not names:
        raise UserError("reproduce: which method? write names, or --all; --list shows them")
    for name in names:
        if name not in claims:
            raise UserError(f"reproduce {name!r}: unknown method{nearest(name, list(claims))}; --list shows all")
        if name not in defined:
            raise UserError(f"reproduce {name!r}: cannot run on the task {task}: {without[name]}")
    return list(dict.fromkeys(names))


def arms(asked: Asked) -> dict[str, dict[str, object]]:
    """Name -> config tree of every arm in the order in which it is worth having: dense, then methods, then smaller models."""
    base = tree_of("tasks", asked.task)
    widths = base.pop(WIDTHS, [])
    trees = {DENSE: base} | {name: merged(base, method_tree(name, asked.task)) for name in asked.methods}
    for width in widths if isinstance(widths, list) else []:
        trees[f"{SMALL}{width:g}"] = merged(base, {"model": {"width": width}})
    return trees


def method_tree(name: str, task: str) -> dict[str, object]:
    """What a method changes of a task's config: its file, whose tables of a task's name are for that task alone."""
    tree = tree_of("methods", name)
    own = {each: tree.pop(each, {}) for each in task_names()}[task]
    return merged(tree, own) if isinstance(own, Mapping) else tree


def experiments(asked: Asked, rates: Mapping[str, float] | None = None) -> list[Experiment]:
    """Every run, validated; `rates` has local learning rates by arm in the place of the config's."""
    made = []
    for name, tree in arms(asked).items():
        for seed in asked.seeds:
            rate = [] if rates is None else [f"training.lr={rates[name]!r}"]
            made.append(experiment_of(asked, name, tree, [f"name={asked.task}-{name}", f"seed={seed}", *rate]))
    return made


def experiment_of(asked: Asked, name: str, tree: Mapping[str, object], own: Sequence[str]) -> Experiment:
    """One run of an arm under overrides of its own."""
    rounds = [] if asked.rounds is None else [f"rounds={asked.rounds}"]
    return Experiment.from_tree(tree, [f'out="{asked.out}"', *rounds, *own], where=f"method {name}")


def merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """A tree with another laid over it; tables are merged key by key."""
    made = dict(base)
    for key, value in over.items():
        below = made.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        made[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return made


@dataclass(frozen=True)
class Case:
    """The finished runs of one task.

    Attributes:
        task: its name.
        dense: dense FedAvg.
        methods: name -> claim and its runs.
        small: smaller dense models, the largest first.
        failed: (name of a run with its seed, why it failed).
    """

    task: str
    dense: Group
    methods: Mapping[str, tuple[Claim, Group]]
    small: Sequence[Group]
    failed: Sequence[tuple[str, str]]

    @property
    def groups(self) -> list[Group]:
        """All runs."""
        return [self.dense, *(group for _, group in self.methods.values()), *self.small]


def case_of(task: str, outcomes: Iterable[Outcome]) -> Case:
    """Sort outcomes by method.

    Raises:
        RuntimeError: dense FedAvg, beside which everything stands, did not finish.
    """
    by_name: dict[str, list[Report]] = {}
    failed = []
    for outcome in outcomes:
        name = outcome.experiment.name.removeprefix(f"{task}-")
        if outcome.report is None:
            failed.append((f"{name}, seed {outcome.experiment.seed}", outcome.reason))
        else:
            by_name.setdefault(name, []).append(outcome.report)
    groups = {name: Group(name, tuple(sorted(r, key=lambda x: x.results.seed))) for name, r in by_name.items()}
    if DENSE not in groups:
        raise RuntimeError(f"dense FedAvg on {task} did not finish: {failed[0][1] if failed else 'no run'}")
    claims = read_claims()
    methods = {name: (find("method", name, claims), group) for name, group in groups.items() if name in claims}
    small = [group for name, group in groups.items() if name.startswith(SMALL)]
    return Case(task, groups[DENSE], methods, small, failed)
