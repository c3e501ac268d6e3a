"""The claims court: claims are checked data, every byte is in one part, and a page has what was run and what was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fl_sim.bench.claims.claim import folder, read_claims, task_names, tree_of
from fl_sim.bench.claims.page import page
from fl_sim.bench.claims.parts import PARTS, parts_of
from fl_sim.bench.claims.picture import draw
from fl_sim.bench.claims.rates import Search, validated
from fl_sim.bench.claims.rows import BETTER, ONE, OPEN, WORSE, front, row_of, verdict
from fl_sim.bench.claims.trial import Asked, Case, case_of, chosen, experiments, merged, method_tree
from fl_sim.cli.reproduce import reproduce
from fl_sim.config.experiment import Experiment
from fl_sim.core.errors import UserError
from fl_sim.report.groups import Spread
from fl_sim.simulation.loop import run
from fl_sim.simulation.sweep import Outcome, sweep
from strategies.published import zerofl

PUBLISHED = Path(zerofl.__file__).parent
GOOD = """
[m]
title = "M"
paper = "N, 2020"
version = "v1"
source = "https://arxiv.org/abs/2001.00001"
equations = "1"
deviations = ["none"]
"""
NUMBER = 'number = "10 times"\nratio = 10\ndirection = "up"\ncounts = ["values up"]\nformula = "a"\nsetting = "b"\n'


def test_every_method_has_a_claim_and_every_claim_a_config_that_is_valid() -> None:
    claims = read_claims()
    stems = {each.name.removesuffix(".toml") for each in (folder() / "methods").iterdir()}
    assert stems == claims.keys()
    for task in task_names():
        names = chosen([], everything=True, task=task)
        assert names
        assert len(experiments(Asked(task, names, [0], "runs/claims"))) > len(names)


def test_a_method_is_one_file_of_at_most_120_lines() -> None:
    assert all(len(each.read_text(encoding="utf-8").splitlines()) <= 120 for each in PUBLISHED.glob("*.py"))
    for each in (folder() / "methods").iterdir():
        text = each.read_text(encoding="utf-8")
        assert text.startswith("# "), each.name
        assert len(text.splitlines()) <= 120, each.name


def test_a_claim_is_read() -> None:
    claim = read_claims(GOOD + NUMBER)["m"]
    assert (claim.ratio, claim.direction, claim.counts) == (10, "up", ["values up"])
    assert read_claims(GOOD)["m"].ratio is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "colour = 1", "claims.toml: m: unknown key 'colour'"),
        (GOOD + 'titel = "x"', "did you mean 'title'?"),
        (GOOD.replace('version = "v1"\n', ""), "m: version is missing"),
        (GOOD.replace('"none"', "3"), "deviations = [3]: needed: a list of texts"),
        (GOOD.replace("https", "ftp"), "must be an address"),
        (GOOD + NUMBER.replace("10\n", "0.5\n"), "ratio = 0.5: must be at least 1"),
        (GOOD + NUMBER.replace("10\n", '"10"\n'), "ratio = '10': needed: a number"),
        (GOOD + NUMBER.replace('formula = "a"\n', ""), "formula: needed, since the claim has a number"),
        (GOOD + NUMBER.replace("values up", "value up"), "counts = 'value up': unknown; did you mean 'values up'?"),
        (GOOD + NUMBER.replace('"up"\nc', '"sideways"\nc'), "direction = 'sideways': unknown"),
        (GOOD + 'cannot = "x"', "cannot = 'x': needed: a table of texts"),
        (GOOD + 'cannot.rolls = "x"', "cannot = 'rolls': unknown; did you mean 'roles'?"),
        (GOOD + "ratio = 3", "a claim without a number has no ratio"),
        ("m = 3", "m: is a int; needed: a table"),
        ("[m", "not valid TOML"),
    ],
)
def test_a_wrong_claim_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_claims(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "everything", "task", "said"),
    [
        (["tpok"], False, "digits", "did you mean 'topk'?"),
        ([], False, "digits", "which method?"),
        (["topk"], True, "digits", "name methods, or write --all"),
        (["fedbn"], False, "roles", "cannot run on the task roles: it keeps BatchNorm"),
        (["topk"], False, "cifar", "--task 'cifar': unknown; allowed: digits, roles"),
    ],
)
def test_what_cannot_be_asked_is_one_line(names: list[str], everything: bool, task: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        chosen(names, everything=everything, task=task)


def test_a_method_has_a_table_for_one_task_alone() -> None:
    assert method_tree("heterofl", "digits")["model"] == {"statistics": "recalibrate"}
    assert "model" not in method_tree("heterofl", "roles")
    for name in read_claims():
        assert not method_tree(name, "roles").keys() & set(task_names())


def test_trees_are_merged_key_by_key() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "d": {"e": 5}}) == {
        "a": {"b": 1, "c": 4},
        "d": {"e": 5},
    }
    assert tree_of("methods", "fedpaq")["wire"] == {"uplink": {"values": "int4", "content": "difference"}}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two rounds of dense FedAvg, two methods and one smaller model."""
    asked = Asked("digits", ["topk", "stc"], [0], str(tmp_path_factory.mktemp("claims")), rounds=2)
    kept = [each for each in experiments(asked) if "-x" not in each.name or each.name.endswith("x0.0625")]
    return case_of("digits", sweep(kept, lambda experiment: run(experiment, quiet=True)))


def test_the_parts_hold_every_byte_once(case: Case) -> None:
    for group in case.groups:
        for report in group.reports:
            parts = parts_of(report.ledger)
            assert list(parts) == list(PARTS)
            assert sum(parts.values()) == report.ledger.total()[()] == report.results.total_bytes
    stc = parts_of(case.methods["stc"][1].reports[0].ledger)
    assert (
        stc["first contact"] + stc["masks down"]
        == case.methods["stc"][1].reports[0].ledger.total(where={"direction": "down", "section": "mask"})[()]
        + case.methods["stc"][1].reports[0].ledger.total(where={"direction": "down", "section": "auxiliary"})[()]
    )


def test_a_row_has_the_ratios_of_its_ledgers(case: Case) -> None:
    row = row_of(case, "topk")
    dense, own = case.dense.reports[0], row.group.reports[0]
    up = own.ledger.total(where={"direction": "up", "section": "values"})[()]
    assert row.formula.mean == pytest.approx(dense.results.uplink_bytes / up)
    assert row.direction.mean == pytest.approx(dense.results.uplink_bytes / own.results.uplink_bytes)
    assert row.total.mean == pytest.approx(dense.results.total_bytes / own.results.total_bytes)
    assert row.formula.mean > row.direction.mean > row.total.mean > 1  # type: ignore[operator]
    assert row.reason.startswith("values down 9")
    assert row.small is not None
    assert row.small.name == "dense-x0.0625"


def test_a_verdict_needs_an_interval_that_excludes_0(case: Case) -> None:
    row = row_of(case, "topk")
    assert verdict(row, higher=True) == ONE
    above, around = Spread.of([3.0, 3.1, 3.2]), Spread.of([-3.0, 3.1, 3.2])
    assert verdict(replace(row, beyond_small=above), higher=True) == BETTER
    assert verdict(replace(row, beyond_small=above), higher=False) == WORSE
    assert verdict(replace(row, beyond_small=around), higher=True) == OPEN


def test_the_front_has_what_no_other_run_beats(case: Case) -> None:
    kept = front(case.groups)
    sizes = [group.reports[0].results.total_bytes for group in kept]
    scores = [group.reports[0].results.score.last10_mean for group in kept]
    assert sizes == sorted(sizes)
    assert scores == sorted(scores, key=float)
    assert "topk" not in [group.name for group in kept] or case.dense.name not in [group.name for group in kept[:1]]


def test_the_page_says_what_is_there_and_what_is_missing(case: Case) -> None:
    failed = Case(case.task, case.dense, case.methods, case.small, [("set, seed 1", "no disk")])
    text = page(failed, command="fl-sim reproduce topk", code="code 12", missing=["fedbn"], picture="digits.svg")
    assert "cannot run here" not in text
    for line in ("- set, seed 1: failed: no disk", "- fedbn: not run", "https://aclanthology.org/D17-1045/", "code 12"):
        assert line in text
    other = page(replace(failed, task="roles"), command="c", code="d", missing=[], picture="roles.svg")
    assert "- fedbn: cannot run here: it keeps BatchNorm with the client, and an LSTM has none" in other
    tables = [line for line in text.splitlines() if line.startswith("| topk |")]
    assert len(tables) == 3
    picture = draw(case)
    assert picture.count("<circle") == 4
    assert ">topk<" in picture


def test_validation_chooses_the_rate_of_every_arm_and_the_smaller_of_two_equal_ones(tmp_path: Path) -> None:
    asked = Asked("digits", ["fedpm"], [0], str(tmp_path), rounds=1)
    search = Search(asked, [1.0, 0.5, 3.0])
    dense = [each for each in search.experiments if search.arm[each.name, each.id] == "dense"]
    assert [each.training.lr for each in dense] == [0.05, 0.1, 0.3]
    assert {each.seed for each in search.experiments} == {10}
    reports = [run(each, quiet=True) for each in dense]
    scores = [0.5, 0.7, 0.7]
    for report, score in zip(reports, scores, strict=True):
        report.rounds[-1]["validation_accuracy"] = score  # type: ignore[index]
    others = [each for each in search.experiments if each not in dense and each.training.lr != 0.3]
    ended = [Outcome(each, report) for each, report in zip(dense, reports, strict=True)]
    rates = search.chosen([*ended, *(Outcome(each, reports[0]) for each in others)])
    assert rates["dense"] == 0.1
    planned = experiments(asked, rates)
    assert [each.training.lr for each in planned[:2]] == [0.1, rates["fedpm"]]
    with pytest.raises(RuntimeError, match="no learning rate for fedpm"):
        search.chosen(ended)


def test_of_errors_the_smaller_one_is_better(tmp_path: Path) -> None:
    report = run(Experiment.load("configs/table_numbers.toml", ["rounds=1", f'out="{tmp_path}"']), quiet=True)
    assert validated(report) == -report.rounds[-1]["validation_rmse"] < 0


@pytest.mark.parametrize(("factors", "seeds", "said"), [([0.0, 1.0], [0], "above 0"), ([1.0], [0, 10], "--seeds: 10")])
def test_what_cannot_choose_a_rate_is_refused(factors: list[float], seeds: list[int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Search(Asked("digits", [], seeds, "runs/claims"), factors)


def test_without_dense_fedavg_there_is_no_court() -> None:
    with pytest.raises(RuntimeError, match="dense FedAvg on digits did not finish"):
        case_of("digits", [])


def test_runs_that_are_finished_are_not_run_again(case: Case) -> None:
    folder_of_runs = Path(case.dense.reports[0].folder).parent
    asked = Asked("digits", [], [0], str(folder_of_runs), rounds=2)
    first = next(iter(sweep(experiments(asked)[:1], lambda experiment: pytest.fail("run again"))))
    assert first.skipped


def test_the_list_has_every_claim_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    reproduce(listed=True, seeds="0", task="digits")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(read_claims())
    assert all("https://" in line for line in lines)
    (topk,) = [line for line in lines if line.startswith("topk ")]
    assert "(x 100, uplink)" in topk


@pytest.mark.slow
def test_the_command_writes_its_page_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("done in", "already there"):
        reproduce(["topk"], seeds="0", task="digits", out=tmp_path, rounds=1)
        lines = capsys.readouterr().out.splitlines()
        assert sum(word in line for line in lines) == len(lines) - 1 == 16
    page_text = (tmp_path / "claims_digits.md").read_text(encoding="utf-8")
    assert "- stc: not run" in page_text
    assert (tmp_path / "claims_digits.svg").exists()
