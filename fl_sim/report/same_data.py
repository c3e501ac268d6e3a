"""Whether runs were measured on the same data: differences between runs on different data say nothing of their methods.

other_data(reports)     # "on different data: a-12345678 (digits, hash 0123abcd); b-12345678 (...). ...", or "" where there is one
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fl_sim.report.groups import resolved
from fl_sim.report.summary import Report

NAMED = ("task", "data.source", "data.target", "data.test", "data.context")
"""Config keys that say what is predicted, and on which test samples."""
INPUTS = ("input", "resize")
"""Keys of `[data]` that change what a model gets of a sample."""
PREPARED = (*INPUTS, "group", "weight", "class_weights", "validation", "proxy")
"""Keys of `[data]` that change the data's hash and leave the test samples what they are."""
SHOWN = 3
"""Run folders named of each data."""


def same_data(first: Report, second: Report) -> bool:
    """Whether two runs have the same test samples, by the hashes in their folders; true where a folder keeps none.

    Where hashes of all data differ, a key of `PREPARED` may be why; then those of the test samples alone decide. Where no
    such key differs, the files or the code of the source have changed. Older folders hash no test samples.

    Raises:
        UserError: a run folder is damaged.
    """
    if first.origin is None or second.origin is None or first.origin.data == second.origin.data:
        return True
    one, other = resolved(first), resolved(second)
    if any(one.get(key) != other.get(key) for key in NAMED):
        return False
    differing = {key for key in PREPARED if one.get(f"data.{key}") != other.get(f"data.{key}")}
    compared = ("targets",) if differing.intersection(INPUTS) else ("targets", "inputs")
    tests = first.origin.test, second.origin.test
    return bool(differing) and (not all(tests) or all(tests[0].get(each) == tests[1].get(each) for each in compared))


def other_data(reports: Iterable[Report]) -> str:
    """One line: which runs are on which data, where not all are on the same; else empty.

    Raises:
        UserError: a run folder is damaged.
    """
    kinds: list[list[Report]] = []
    for report in reports:
        for kind in kinds:
            if same_data(kind[0], report):
                kind.append(report)
                break
        else:
            kinds.append([report])
    if len(kinds) < 2:
        return ""
    return (
        f"on different data: {'; '.join(map(_named, kinds))}. Differences between them mean nothing, and they are not paired "
        "by seed"
    )


def _named(reports: Sequence[Report]) -> str:
    names = [report.folder.name for report in reports]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    first = reports[0]
    source, digest = (
        resolved(first).get("data.source"),
        "" if first.origin is None else f", hash {first.origin.data[:8]}",
    )
    return f"{', '.join(names[:SHOWN])}{more} ({source}{digest})"
