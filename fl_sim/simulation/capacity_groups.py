"""Clients of different capacity: which model each client has, as experiments that differ in `[model]` alone.

[[capacities]]          # besides [model], which the other clients have
name = "resnet8"
width = 0.5
share = 0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fl_sim.config.experiment import Experiment
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import UserError

Members = Sequence[int]
"""Partitions in ascending order."""


@dataclass(frozen=True)
class CapacityGroup:
    """Clients that have the same model.

    Attributes:
        experiment: the experiment with this model in `[model]`.
        label: name of the model.
        members: partitions of the clients.
        cohort_size: of them, clients in a round.
    """

    experiment: Experiment
    label: str
    members: Members
    cohort_size: int


def groups(experiment: Experiment) -> list[CapacityGroup]:
    """The clients of an experiment by model, `[model]` first; one group without `[[capacities]]`.

    Raises:
        UserError: a model without a client, or one that no client of a cohort has.
    """
    columns = variants(experiment), labels(experiment), members(experiment), cohort_sizes(experiment)
    return [CapacityGroup(*row) for row in zip(*columns, strict=True)]


def variants(experiment: Experiment) -> list[Experiment]:
    """The experiment with each of its models, `[model]` first; only that one can start from given weights."""
    changed = [{"name": c.name, "width": c.width, "weights": None} for c in experiment.capacities]
    models = [experiment.model.model_copy(update=keys) for keys in changed]
    return [experiment.model_copy(update={"model": model}) for model in [experiment.model, *models]]


def labels(experiment: Experiment) -> list[str]:
    """A word for each model: its name, with its width where that is not 1; numbered where two are the same."""
    plain = [v.model.name + ("" if v.model.width == 1 else f"x{v.model.width:g}") for v in variants(experiment)]
    return [word if word not in plain[:n] else f"{word}-{n + 1}" for n, word in enumerate(plain)]


def members(experiment: Experiment) -> list[Members]:
    """The clients of each model: disjoint, all of them, drawn from the seed.

    Raises:
        UserError: a model without a client.
    """
    count = experiment.data.clients
    if not experiment.capacities:
        return [range(count)]
    order = numpy_generator(experiment.seed, Purpose.CAPACITY).permutation(count).tolist()
    sizes = [round(capacity.share * count) for capacity in experiment.capacities]
    return _cut(order, [count - sum(sizes), *sizes], "data.clients")


def cohort_sizes(experiment: Experiment) -> list[int]:
    """Clients of each model in a round.

    Raises:
        UserError: a model that no client of a cohort has.
    """
    size = experiment.cohort.size
    sizes = [round(capacity.share * size) for capacity in experiment.capacities]
    return [len(part) for part in _cut(list(range(size)), [size - sum(sizes), *sizes], "cohort.size")]


def _cut(order: list[int], sizes: list[int], key: str) -> list[Members]:
    if min(sizes) < 1:
        raise UserError(f"capacities: shares of {key} = {len(order)} give {sizes} clients; each model needs at least 1")
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return [tuple(sorted(order[end - size : end])) for size, end in zip(sizes, ends, strict=True)]
