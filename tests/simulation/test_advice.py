"""`fl-sim advise`: predictions are lengths of encoded messages, and a run moves what was predicted."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from federation import run_tiny, tiny

from fl_sim import Experiment, Report, UserError, run
from fl_sim.communication.exchange import Coding
from fl_sim.communication.payload_log import FOLDER
from fl_sim.communication.replay import Recoding
from fl_sim.core.observer import SILENT
from fl_sim.simulation.advice import RESERVE, Advice, _Search, advise, budget_of, changed
from fl_sim.simulation.advised_settings import Setting, Sizes
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.recorded_rounds import first_and_last
from fl_sim.simulation.replaying import replay_run

BUDGET = 600_000
BF16, INT8 = Coding("bfloat16"), Coding("int8", "difference")


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sizes, Path]:
    """Of a recorded run of two rounds, in which clients evaluate too."""
    report = run_tiny(tmp_path_factory.mktemp("runs"), "model.name=mlp", "wire.record_payloads=1", "evaluate.clients=2")
    federation = Federation.build(Experiment.from_tree(report.config), quiet=True)
    return Sizes(
        federation, *first_and_last(report.folder / FOLDER, report.ledger, federation.first.exchange.schema)
    ), report.folder


@pytest.fixture(scope="module")
def advice(tmp_path_factory: pytest.TempPathFactory) -> Advice:
    return advise(tiny(tmp_path_factory.mktemp("runs"), "model.name=mlp", "rounds=6"), BUDGET, SILENT)


@pytest.mark.parametrize(("down", "up"), [(Coding(), Coding()), (BF16, INT8), (Coding("int8"), Coding("int4"))])
def test_sizes_of_the_recorded_rounds_are_those_of_a_replay(
    sizes: tuple[Sizes, Path], down: Coding, up: Coding
) -> None:
    predicted = sizes[0].of(Setting("rounded", 2, down, up))
    found = replay_run(Report.load(sizes[1]), Recoding(up, down))
    answers = predicted.others  # of clients that evaluated; they travel up
    assert (predicted.down, predicted.up + answers) == (found.total("down"), pytest.approx(found.total("up")))


def test_a_run_moves_what_was_predicted_within_three_percent(advice: Advice) -> None:
    assert [each.setting.kind for each in advice.proposals] == ["rounded", "sparse", "pruned"]
    for each in advice.proposals:
        assert each.predicted.total <= BUDGET * (1 - RESERVE)
        moved = run(each.experiment, quiet=True).results
        assert each.predicted.total == pytest.approx(moved.total_bytes, rel=0.03)
        # Of a pruned model only the first contacts are an expectation.
        share = 0.005 if each.setting.kind == "pruned" else 0.03
        assert each.predicted.down == pytest.approx(moved.downlink_bytes, rel=share)
        assert moved.total_bytes <= BUDGET


def test_the_config_as_it_is_is_predicted_too(advice: Advice, sizes: tuple[Sizes, Path]) -> None:
    one = sizes[0].of(Setting("as it is", 1))
    assert advice.as_it_is.total > BUDGET
    # Dense messages of one length, with two clients that evaluate beside the three that train.
    assert (one.down / 5, one.up / 3) == pytest.approx((advice.as_it_is.down / 18,) * 2, rel=1e-3)


def test_a_proposal_is_the_config_with_the_keys_of_its_setting_changed(advice: Advice) -> None:
    rounded, sparse, pruned = (each.experiment for each in advice.proposals)
    assert (rounded.client, rounded.strategy) == (Experiment().client, Experiment().strategy)
    assert (sparse.client.options["density"], sparse.wire.error_feedback) == (advice.proposals[1].setting.share, True)
    assert pruned.strategy.options["density"] == advice.proposals[2].setting.density
    for each in (rounded, sparse, pruned):
        tree = each.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        assert Experiment.from_tree(tree) == each
        assert each.data == tiny(Path()).data


def test_less_is_proposed_where_less_fits(sizes: tuple[Sizes, Path]) -> None:
    """A larger share, a larger density and more rounds never weigh less."""
    base = Setting("", 5)
    for smaller, larger in (
        (replace(base, share=0.1), replace(base, share=0.3)),
        (replace(base, density=0.1), replace(base, density=0.3)),
        (base, replace(base, rounds=6)),
        (replace(base, down=BF16, up=INT8), base),
    ):
        assert sizes[0].of(smaller).total < sizes[0].of(larger).total
    assert sizes[0].change(base) == 0
    assert sizes[0].change(replace(base, up=INT8)) < sizes[0].change(replace(base, up=Coding("int2", "difference")))


def test_a_small_budget_gets_fewer_rounds_and_one_below_a_round_is_refused(tmp_path: Path) -> None:
    experiment = tiny(tmp_path, "model.name=linear", "rounds=4")
    least = advise(experiment, 10**9, SILENT).as_it_is.total
    found = advise(experiment, int(least / 3), SILENT)
    assert {each.setting.kind for each in found.proposals} >= {"shorter"}
    assert all(each.experiment.rounds < 4 for each in found.proposals if each.setting.kind == "shorter")
    with pytest.raises(UserError, match=r"--budget 0.0003MB: one round .* needed: at least 0\.\d+MB"):
        advise(experiment, 300, SILENT)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("strategy=strategies.presets:global_magnitude", "chooses itself what is sent"),
        ("wire.broadcast={density=0.1}", "wire.broadcast"),
        ('capacities=[{name="mlp"}]', "capacities"),
        ("stop.mb=3", "stop"),
        ('schedule={kind="fedbuff"}', "schedule.kind"),
        ("client=clients.presets:topk", "uploads a part of its weights in round 1"),
    ],
)
def test_what_cannot_be_predicted_is_refused(override: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        advise(tiny(tmp_path, "model.name=mlp", "network.links.4G=1", override), BUDGET, SILENT)


def test_a_kind_that_the_run_would_refuse_is_left_out_with_its_reason(tmp_path: Path) -> None:
    adapted = tiny(tmp_path, "model.name=mlp", "model.adapter={rank=2}", "rounds=2")
    found = advise(adapted, 10**9, SILENT)
    assert [each.setting.kind for each in found.proposals] == ["rounded", "sparse", "rounded"]
    assert [each.reason.startswith("the next best: ") for each in found.proposals] == [False, False, True]
    assert found.proposals[0].change <= found.proposals[2].change
    (reason,) = found.left_out
    assert reason.startswith("pruned: model.adapter: not with a strategy that prunes")


def test_payloads_beyond_the_disk_that_is_allowed_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_sim.simulation.advice.RECORDED_MEGABYTES", 0.01)
    with pytest.raises(UserError, match="too large to be recorded"):
        advise(tiny(tmp_path, "model.name=mlp"), BUDGET, SILENT)


def test_a_config_keeps_its_own_client_and_says_so(tmp_path: Path) -> None:
    found = advise(tiny(tmp_path, "model.name=mlp", "rounds=3", "client=clients.presets:fedprox"), BUDGET, SILENT)
    assert "sparse" not in {each.setting.kind for each in found.proposals}
    assert any("would replace client = 'clients.presets:fedprox'" in line for line in found.left_out)
    assert all(each.experiment.client.target.endswith("fedprox") for each in found.proposals)


@pytest.mark.parametrize(("text", "size"), [("50MB", 50_000_000), ("1.5 GB", 1_500_000_000), ("800kB", 800_000)])
def test_budgets(text: str, size: int) -> None:
    assert budget_of(text) == size


@pytest.mark.parametrize("text", ["", "50", "MB", "-1MB", "0MB", "1e9MB", "5 MiB", "nanMB", "9" * 40 + "TB"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--budget .*allowed: a number above 0 and B, kB, MB, GB, TB"):
        budget_of(text)


def test_changed_keeps_everything_else(tmp_path: Path) -> None:
    before = tiny(tmp_path, "data.alpha=0.3")
    assert changed(before, "rounds=9") == before.model_copy(update={"rounds": 9})
    assert tomllib.loads(changed(before).to_toml()) == tomllib.loads(before.to_toml())


def test_a_single_round_is_proposed_only_where_no_more_fit(sizes: tuple[Sizes, Path]) -> None:
    experiment = Experiment.from_tree({"rounds": 10})
    one = sizes[0].of(Setting("shorter", 1, Coding(), Coding())).total
    enough, scarce = (
        [s.rounds for s in _Search(experiment, sizes[0], room).shorter()] for room in (1.5 * one, 0.4 * one)
    )
    assert len(enough) == 2
    assert min(enough) > 1
    assert scarce[0] == 1
