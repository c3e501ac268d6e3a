"""A grid of runs: every combination of values, under every seed; what is finished is not run again.

plan("configs/quickstart.toml", ["data.alpha=0.1,1.0", "rounds=5"], seeds=[0, 1, 2])      # 6 experiments
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fl_sim.config.experiment import Experiment
from fl_sim.core.errors import in_one_line
from fl_sim.core.types import UserError
from fl_sim.report import Report
from fl_sim.report.groups import flat
from fl_sim.simulation.earlier_runs import finished, is_finished
from fl_sim.simulation.identity import hash_of_source

OPENING, CLOSING = "[{", "]}"
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Outcome:
    """Outcome of one run of a grid.

    Attributes:
        experiment: what was asked.
        report: its results; None if it failed.
        reason: why it failed; empty if it did not.
        skipped: the results were there before.
    """

    experiment: Experiment
    report: Report | None
    reason: str = ""
    skipped: bool = False


def alternatives(override: str) -> list[str]:
    """`key=a,b` -> `key=a`, `key=b`; commas within quotes, brackets and braces belong to a value.

    Raises:
        UserError: no `=`, a value missing, or a quote that is not closed.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"sweep {override!r}: write key=value or key=a,b,c, for instance data.alpha=0.1,1.0")
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += 0 if quote else (character in OPENING) - (character in CLOSING)
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    if quote:
        raise UserError(f"sweep {override!r}: a quote {quote} is not closed")
    if not all(value.strip() for value in values):
        raise UserError(f"sweep {override!r}: a value is missing")
    return [f"{key}={value.strip()}" for value in values]


def sorted_out(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(configs, overrides): an override has a `=`, and its key is no file.

    Raises:
        UserError: no config, or one after an override, which looks like a forgotten key.
    """
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    configs = [word for word in words if word not in overrides]
    if not configs:
        raise UserError("sweep: which experiment? write a config first, for instance configs/quickstart.toml")
    if misplaced := [word for word in words[len(configs) :] if word in configs]:
        raise UserError(f"sweep {misplaced[0]!r}: configs come first, then key=value or key=a,b,c")
    return [Path(config) for config in configs], overrides


def integers(name: str, text: str) -> list[int]:
    """Comma-separated integers; `name` starts the error message.

    Raises:
        UserError: something else.
    """
    return _parts(name, text, int, "integers, separated by commas, for instance 0,1,2")


def decimals(name: str, text: str) -> list[float]:
    """Comma-separated numbers; as `integers`."""
    return _parts(name, text, float, "numbers, separated by commas, for instance 0.1,0.05")


def _parts(name: str, text: str, kind: Callable[[str], Number], allowed: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{name} {text!r}: write {allowed}") from error


def plan(path: str | Path, overrides: Sequence[str], *, seeds: Sequence[int]) -> list[Experiment]:
    """Every combination of the overrides' alternatives, under every seed; all are validated before any runs.

    Raises:
        UserError: wrong input in any of them; an override of `seed`, whose values would be overwritten by `seeds`, or a list
            of values for a key that is there twice, of which the last alone would count. Of two single ones the last counts, as
            in a run.
    """
    given: dict[str, int] = {}
    for text in overrides:
        key, _, values = text.partition("=")
        if key.strip() == "seed":
            raise UserError(f"{text}: a sweep runs under the seeds of --seeds; write --seeds {values}")
        count = len(alternatives(text))
        if max(count, given.get(key.strip(), 0)) > 1 and key.strip() in given:
            raise UserError(f"{text}: {key.strip()} is there already; write its values once, as {key.strip()}=A,B")
        given[key.strip()] = count
    grid = itertools.product(*map(alternatives, overrides))
    return [Experiment.load(path, [*choice, f"seed={seed}"]) for choice in grid for seed in seeds]


def sweep(
    experiments: Sequence[Experiment],
    run: Callable[[Experiment], Report],
    *,
    there: Callable[[Experiment], bool] = is_finished,
) -> Iterator[Outcome]:
    """Run what is not finished; a failed run is an outcome like another, and the next one starts.

    A finished run whose code or data have changed since fails, and its reason says what changed.

    Args:
        experiments: what to run.
        run: runs one of them.
        there: whether results are there, so that nothing is to be run.
    """
    hashes: dict[str, str] = {}

    def hash_data(experiment: Experiment) -> str:
        section = experiment.data
        key = str((section.source, section.columns, experiment.task, section.validation, section.proxy))
        if key not in hashes:
            hashes[key] = hash_of_source(experiment)
        return hashes[key]

    for experiment in experiments:
        try:
            if there(experiment):
                yield Outcome(experiment, finished(experiment, hash_data), skipped=True)
            else:
                yield Outcome(experiment, run(experiment))
        except (UserError, RuntimeError, OSError, MemoryError) as error:
            yield Outcome(experiment, None, reason=in_one_line(error))


def told_apart(experiments: Sequence[Experiment]) -> list[str]:
    """For each experiment of a grid, its seed and the keys in which others of its name differ: `seed 0  data.alpha=0.1`."""
    trees = [dict(flat(experiment.model_dump(mode="json", exclude={"seed", "out"}))) for experiment in experiments]
    lines = []
    for own, experiment in zip(trees, experiments, strict=True):
        others = [tree for tree in trees if tree["name"] == own["name"]]
        keys = sorted({key for tree in others for key in tree if any(tree.get(key) != o.get(key) for o in others)})
        lines.append("  ".join([f"seed {experiment.seed}", *(f"{key}={own.get(key, 'unset')}" for key in keys)]))
    return lines
