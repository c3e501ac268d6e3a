"""Runs on different data stand in one table with a line that says so, and are no pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import cli_here
from summaries import summary

from fl_sim import Experiment, Report, run
from fl_sim.communication.ledger import Ledger
from fl_sim.report.against import against
from fl_sim.report.export import FORMATS
from fl_sim.report.groups import Group
from fl_sim.report.headline import headline
from fl_sim.report.measures import paired
from fl_sim.report.same_data import other_data
from fl_sim.report.schema import Origin
from fl_sim.report.small_models import small_models


def group(name: str, digest: str | None, tested: tuple[str, str] | None = None, **data: object) -> Group:
    """A run of one seed on the data with this hash, these of test targets and inputs, and these keys of `[data]`."""
    report = Report(Path(name), summary(name=name), [], Ledger(), {})
    report.__dict__["config"] = {"data": {"source": "digits", **data}}  # read from the folder otherwise
    report.__dict__["origin"] = (
        None
        if digest is None
        else Origin(
            code={}, data=digest, test={} if tested is None else dict(zip(("targets", "inputs"), tested, strict=True))
        )
    )
    return Group(name, (report,))


FIRST = group("first", "aaaaaaaaaaaa", ("labels", "pixels"))
SAID = (
    "on different data: first (digits, hash aaaaaaaa); other (data/x.csv, hash bbbbbbbb). Differences between them mean"
)


TESTS = ("validation alone", "validation and inputs", "resized", "resized and targets")


@pytest.mark.parametrize(
    ("second", "same"),
    [
        (group("other", "bbbb", source="data/x.csv"), False),
        (group("other", "bbbb"), False),  # the file has changed
        (group("other", "bbbb", test=0.5), False),
        (group("other", "bbbb", validation=0.3), True),
        (group("other", "bbbb", class_weights="balanced"), True),
        (group("other", "bbbb", ("labels", "pixels"), validation=0.3), True),
        (group("other", "bbbb", ("labels", "others"), validation=0.3), False),
        (group("other", "bbbb", ("labels", "others"), resize=16), True),
        (group("other", "bbbb", ("others", "others"), resize=16), False),
        (group("other", "aaaaaaaaaaaa", source="./digits"), True),
        (group("other", None, source="data/x.csv"), True),  # not recorded
    ],
    ids=["source", "content", "test share", "validation", "class weights", *TESTS, "another spelling", "no hash"],
)
def test_which_runs_are_on_the_same_data(second: Group, same: bool) -> None:
    assert (other_data([*FIRST.reports, *second.reports]) == "") is same
    assert paired(FIRST, second).values == ((0.0,) if same else ())


def test_runs_on_different_data_are_named_and_no_pairs() -> None:
    other = group("other", "bbbbbbbbbbbb", source="data/x.csv")
    groups = [FIRST, other]
    assert other_data([*FIRST.reports, *other.reports]).startswith(SAID)
    for form in ("markdown", "latex"):
        assert SAID[1:] in FORMATS[form](groups)
        assert "ifferent data" not in FORMATS[form]([FIRST])
    beyond = next(measure for measure in against(groups, "first") if measure.name == "beyond")
    assert (beyond.text(FIRST), beyond.spread(other).mean) == ("0.00", None)
    assert headline(groups) == headline([FIRST])


def test_a_smaller_model_of_other_data_is_not_set_beside() -> None:
    sparse = group("sparse", "aaaaaaaaaaaa")
    sparse.reports[0].summary.update(saving=0.5, params=1_000_000)
    beside = []
    for digest in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        small = group("small", digest)
        small.reports[0].summary.update(saving=0.0, params=1000)
        beside += [one.measured for one in small_models([sparse, small])]
    assert [None if one is None else one.name for one in beside] == ["small", None]


def test_the_command_says_it_in_one_line(
    finished: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = finished().folder
    shutil.copytree(first, tmp_path / "changed")
    identity = json.loads((first / "identity.json").read_text())
    (tmp_path / "changed" / "identity.json").write_text(json.dumps({**identity, "data": "0" * 32}))
    page = tmp_path / "page.html"
    config = (first / "config.toml").read_text()
    (tmp_path / "changed" / "config.toml").write_text(config.replace("lr = ", "lr = 1", 1))
    assert cli_here(monkeypatch, "compare", str(first), str(tmp_path / "changed"), "--html", str(page)) == 0
    said = capsys.readouterr().err.strip()
    assert said.startswith("fl-sim: on different data: ")
    assert said.count("\n") == 0
    assert '<p class="warning" role="note">On different data: ' in page.read_text()


def test_a_file_that_changed_together_with_the_validation_share_is_other_data(tmp_path: Path) -> None:
    file, sizes, runs = tmp_path / "rows.csv", [], []
    for name, share, offset in (("first", 0.1, 0), ("share", 0.2, 0), ("file", 0.2, 1)):
        rows = [f"{i % 7},{(i + offset) % 5},{'yes' if i % 3 else 'no'}" for i in range(200)]
        file.write_text("\n".join(["a,b,answer", *rows]))
        data = {"source": str(file), "target": "answer", "validation": share, "clients": 2, "partition": "iid"}
        tree = {"name": name, "out": str(tmp_path / name), "rounds": 1, "model": {"name": "mlp"}, "data": data}
        tree |= {"task": "classification", "cohort": {"size": 2}, "training": {"steps": 1}}
        runs.append(run(Experiment.from_tree(tree), quiet=True))
        sizes.append(len(runs[-1].origin.test))
    first, share, changed = runs
    assert sizes == [2, 2, 2]
    assert other_data([first, share]) == ""
    assert "on different data" in other_data([first, changed])
