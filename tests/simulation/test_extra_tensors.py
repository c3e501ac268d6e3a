"""Extra tensors in whole runs: booked, charged, equal on every engine, refused before round 1 where the ends differ."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from federation import same
from softmax_federation import experiment

from clients.presets import fedavg as fedavg_client
from fl_sim import ClientContext, Report, Task, Update, UserError, run
from fl_sim.communication.extra import Extra, Fixed, parameters
from fl_sim.simulation.replaying import asked, replay_run
from fl_sim.sparsity import GlobalMagnitude, OneShot, PruneTo
from fl_sim.training.loop import Training
from strategies.base import Method
from strategies.server_step import ServerState

HERE = Path(__file__).stem
SCAFFOLD = ("client=clients.presets:scaffold", "strategy=strategies.presets:scaffold")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    return cache(lambda *options: run(experiment(tmp_path_factory.mktemp("run"), *options), quiet=True))


def sections(report: Report) -> dict[tuple[object, ...], int]:
    return report.ledger.total(by=("direction", "section"))


def test_scaffold_costs_one_more_model_each_way_and_the_dense_baseline_stays_fedavg(
    made: Callable[..., Report],
) -> None:
    report, plain = made(*SCAFFOLD), made()
    booked = sections(report)
    usual = {key: size for key, size in booked.items() if key[1] != "extra/control"}
    assert usual == sections(plain)
    assert booked["up", "extra/control"] == plain.summary["uplink_bytes"], (
        "without statistics c is as large as the model"
    )
    assert booked["down", "extra/control"] == plain.summary["downlink_bytes"]
    assert report.summary["dense_total_bytes"] == plain.summary["dense_total_bytes"]
    assert report.summary["saving"] == pytest.approx(plain.summary["saving"] - 1)
    assert report.ledger.total(column="dense_bytes") == plain.ledger.total(column="dense_bytes")
    assert sum(size for (_, part), size in report.flows.parts.items() if part == "extra") == sum(booked.values()) // 2


def test_what_was_booked_is_read_back_and_a_section_of_nobody_s_is_refused(made: Callable[..., Report]) -> None:
    report = made(*SCAFFOLD)
    again = Report.load(report.folder)
    assert again.ledger.to_table().equals(report.ledger.to_table())
    assert sections(again) == sections(report)
    assert report.ledger.total(where={"section": "extra/control"}) == {
        (): sum(size for (_, section), size in sections(report).items() if section == "extra/control")
    }
    with pytest.raises(ValueError, match="no such section: 'extra/other'"):
        report.ledger.total(where={"section": "extra/other"})


SLOW = [pytest.param(engine, marks=pytest.mark.slow) for engine in ("workers", "ray")]


@pytest.mark.parametrize("engine", ["cohort", *SLOW])
def test_engines_agree(engine: str, made: Callable[..., Report], tmp_path: Path) -> None:
    same(made(*SCAFFOLD), run(experiment(tmp_path, *SCAFFOLD, f"engine={engine}"), quiet=True))


def test_a_replay_counts_extra_tensors_as_measured(made: Callable[..., Report]) -> None:
    report = made(*SCAFFOLD, "wire.record_payloads=1")
    found = replay_run(report, asked(report, ["wire.uplink.values=int8"]))
    assert found.replayed["up", "extra/control"] == sections(report)["up", "extra/control"]
    assert found.replayed["up", "values"] != found.measured["up", "values"], "what was recorded is encoded again"


@pytest.mark.parametrize(
    ("client", "strategy", "said"),
    [
        ("clients.presets:scaffold", "strategies.presets:fedavg", "'control' are missing"),
        (
            "clients.presets:fedavg",
            "strategies.presets:scaffold",
            "extra tensors 'control' are not declared; declared are none",
        ),
        (
            "clients.presets:fedavg",
            "strategies.presets:fednova",
            "takes .* steps of updates; the client declares none",
        ),
        (
            "clients.presets:qfedavg",
            "strategies.presets:fednova",
            "takes .* steps of updates; the client declares loss",
        ),
        ("clients.presets:feddyn", "strategies.presets:fedavg", "'alpha' are missing"),
    ],
)
def test_ends_that_differ_are_one_line_before_round_1(client: str, strategy: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^strategy: .*{said}"):
        run(experiment(tmp_path, f"client={client}", f"strategy={strategy}"), quiet=True)
    assert not list(tmp_path.rglob("rounds.jsonl"))


@pytest.mark.parametrize("key", ["momentum=0.9", "optimizer=adamw", "schedule=cosine", "clip_norm=1.0"])
def test_training_that_option_2_cannot_divide_by_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"clients.presets:scaffold: training.{key.split('=')[0]} = .* formula divides"):
        run(experiment(tmp_path, *SCAFFOLD, f"training.{key}"), quiet=True)


# -- clients and methods of one's own ----------------------------------------------------------------------------------


def sends(tensors: Callable[[Task, ClientContext], object]) -> Callable[[Task, ClientContext], Update]:
    def client(task: Task, ctx: ClientContext) -> Update:
        update = fedavg_client(training=Training(lr=0.3))(task, ctx)
        return Update(update.params, update.num_examples, update.mask, extra={"norms": tensors(task, ctx)})  # type: ignore[dict-item]

    client.extra = Extra(down={"all": parameters}, up={"norms": Fixed({"n": (2,)})})  # type: ignore[attr-defined]
    return client


def _grown(task: Task, ctx: ClientContext) -> object:
    return {"n": torch.zeros(2 if task.round < 3 else 3)}


def _sometimes_nan(task: Task, ctx: ClientContext) -> object:
    return {"n": torch.full((2,), torch.nan if len(ctx.data) == 24 else 1.0)}


right, grown, nan = (sends(tensors) for tensors in (lambda task, ctx: {"n": torch.ones(2)}, _grown, _sometimes_nan))


def method(*, of_round_3: float = 1.0, name: str = "all") -> Method:
    def send(state: ServerState) -> dict[str, dict[str, torch.Tensor]]:
        scale = of_round_3 if state.round == 2 else 1.0
        return {name if state.round else "all": {n: v * scale for n, v in state.params.items()}}

    return Method(send=send, takes=("norms",))


def pruning() -> Method:
    rule = PruneTo(OneShot(2, 0.5), GlobalMagnitude(0.0, "exact"))
    return Method(send=lambda state: {"all": state.params}, takes=("norms",), adjust_mask=rule)


def test_a_schema_that_changes_between_rounds_is_one_line_and_the_rounds_before_are_kept(tmp_path: Path) -> None:
    line = r"round 3: none of 3 clients returned an update: .*extra tensors 'norms': 'n' has shape \(3,\); declared is \(2,\)"
    with pytest.raises(UserError, match=line) as caught:
        run(experiment(tmp_path, f"client={HERE}:grown", f"strategy={HERE}:method"), quiet=True)
    assert "\n" not in str(caught.value)
    (rounds,) = tmp_path.rglob("rounds.jsonl")
    assert len(rounds.read_text().splitlines()) == 2
    assert list(tmp_path.rglob("round-00000002.json")), "the checkpoint of round 2"


FEDBUFF = ("schedule.kind=fedbuff", "schedule.buffer=2", "network.links={3G=1, 4G=1}", "network.speed_spread=2")


def test_without_rounds_too(tmp_path: Path) -> None:
    """Tasks of the first two versions are answered as declared; those of the third are not."""
    options = (f"client={HERE}:grown", f"strategy={HERE}:method", *FEDBUFF, "rounds=9")
    with pytest.raises(
        UserError, match=r"round \d: none of \d clients returned an update: .*declared is \(2,\)"
    ) as caught:
        run(experiment(tmp_path, *options), quiet=True)
    assert "\n" not in str(caught.value)
    (rounds,) = tmp_path.rglob("rounds.jsonl")
    assert len(rounds.read_text().splitlines()) >= 2
    assert list(tmp_path.rglob("round-0000000*.json"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "{target = '%s:method', of_round_3 = 1e39}",
            r"round 3: strategy: extra tensors 'all': parameter 'weight' holds NaN",
        ),
        ("{target = '%s:method', name = 'other'}", r"round 2: strategy: extra tensors 'other' are not declared"),
    ],
)
def test_a_server_that_sends_something_else_later_is_one_line(options: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        run(experiment(tmp_path, f"client={HERE}:right", f"strategy={options % HERE}"), quiet=True)
    assert list(tmp_path.rglob("round-00000001.json"))


def test_nan_in_one_client_s_extra_is_that_client_s_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = (f"client={HERE}:nan", f"strategy={HERE}:method", "faults.max_share=0.5", "cohort.size=4")
    with caplog.at_level(logging.WARNING):
        report = run(experiment(tmp_path, *options), quiet=True)
    assert [row["failures"] for row in report.rounds] == [1] * 4
    assert "extra tensors 'norms': parameter 'n' holds NaN or infinity" in caplog.text


def test_extra_tensors_follow_the_pruning_mask_and_the_value_type(made: Callable[..., Report]) -> None:
    report = made(f"client={HERE}:right", f"strategy={HERE}:pruning", "wire.downlink.values=float16")
    by_round = report.ledger.total(by=("round",), where={"section": "extra/all"})
    assert by_round[1,] == by_round[2,] > by_round[3,] == by_round[4,]
    header = by_round[1,] / 3 - 2 * 9  # three recipients of nine weights in half precision; the biases are compressed
    assert 0 < header < 80
