"""Replay: recorded masks and payloads, encoded again, are the bytes of runs that used the other codec from the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from federation import FOUR, WHOLE, run_tiny, tiny
from interruption import KillAfter, Killed

from fl_sim import Experiment, Report, run
from fl_sim.bench.recorded import measure
from fl_sim.communication.mask_log import read_masks
from fl_sim.communication.payload_log import read_round, recorded_files
from fl_sim.communication.replay import Replayed
from fl_sim.core.types import UserError
from fl_sim.report import replayed as shown
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.replaying import asked, replay_run

ALL = "wire.record_payloads=1"
TOPK = ["client.target=clients.presets:topk", "client.density=0.1"]
PRUNED = ["strategy.target=strategies.presets:global_magnitude", "strategy.density=0.2", "rounds=4"]
DIFFERENCE = ["wire.uplink.content=difference"]


def replayed(report: Report, *overrides: str, values: str | None = None, mask: str = "fl_sim") -> Replayed:
    return replay_run(report, asked(report, overrides, values=values, mask=mask))


def sections(report: Report, direction: str) -> dict[str, int]:
    totals = report.ledger.total(by=("direction", "section"))
    return {str(section): size for (way, section), size in totals.items() if way == direction}


@pytest.mark.parametrize("method", [[], TOPK, PRUNED, ["model.trainable=head", "model.batchnorm_init=fixed"]])
def test_the_runs_own_codec_gives_the_measured_bytes(tmp_path: Path, method: list[str]) -> None:
    report = run_tiny(tmp_path, ALL, "evaluate.clients=2", *method)
    found = replayed(report)
    assert found.replayed == found.measured
    assert found.total("up") == report.summary["uplink_bytes"]
    assert found.total("down") == report.summary["downlink_bytes"]
    assert found.rounds == tuple(range(1, len(report.rounds) + 1))


@pytest.mark.parametrize("values", ["int8", "int4", "int2", "bfloat16", "float32-zstd", "top10-int8"])
@pytest.mark.parametrize("method", [[], TOPK, PRUNED], ids=["dense", "topk", "pruned"])
def test_round_1_is_that_of_a_run_with_the_codec_to_the_byte(
    tmp_path: Path, finished: Callable[..., Report], method: list[str], values: str
) -> None:
    """In the first round clients train on the same model, so that every tensor is the same."""
    options = [*method, "rounds=1"]
    recorded = finished(ALL, *options)
    other = [f"wire.uplink.values={values}", *DIFFERENCE]
    found, measured_run = replayed(recorded, *other), run_tiny(tmp_path, *options, *other)
    for direction in ("up", "down"):
        mine = {section: size for (way, section), size in found.replayed.items() if way == direction and size}
        assert mine == {section: size for section, size in sections(measured_run, direction).items() if size}


def test_rows_add_up_to_all_of_a_direction_for_any_sections() -> None:
    """A codec books its values in a section that the run did not have."""
    measured = {("up", "values"): 1000, ("up", "header"): 8, ("down", "extra/control"): 20, ("down", "header"): 8}
    after = {("up", "codec"): 100, ("up", "header"): 8, ("down", "extra/control"): 20, ("down", "header"): 8}
    columns = [list(column.cells) for column in shown(Replayed(measured, after, (1, 2))).columns]
    rows = list(zip(*columns, strict=True))
    assert ("up", "codec", "0", "100") in rows
    for direction in ("up", "down"):
        own = [[int(str(cell).replace(",", "")) for cell in row[2:]] for row in rows if row[0] == direction]
        assert [sum(cells) for cells in zip(*own[:-1], strict=True)] == own[-1]


@pytest.mark.parametrize(("up", "down"), [("int8", "int8"), ("int4", "bfloat16"), ("bfloat16", "float32-zstd")])
@pytest.mark.parametrize("method", [[], TOPK], ids=["dense", "topk"])
def test_totals_are_those_of_an_independent_run(
    tmp_path: Path, finished: Callable[..., Report], method: list[str], up: str, down: str
) -> None:
    options = [*FOUR, *method, "rounds=3", "evaluate.clients=2", "training.steps=3", "training.batch_size=32"]
    recorded = finished(ALL, *options)
    other = [f"wire.uplink.values={up}", *DIFFERENCE, f"wire.downlink.values={down}"]
    found, measured_run = replayed(recorded, *other), run_tiny(tmp_path, *options, *other)
    for direction in ("up", "down"):
        measured = sections(measured_run, direction)
        assert found.total(direction) == pytest.approx(sum(measured.values()), rel=0.005)
        for section, size in measured.items():
            # Other training chooses other coordinates and compresses a few kB of exact tensors by 1 % less or more.
            rel = 0.005 if section == "values" else 0.02
            assert found.replayed[direction, section] == pytest.approx(size, rel=rel, abs=16)


def test_a_value_type_for_both_directions(finished: Callable[..., Report]) -> None:
    report = finished(ALL, *TOPK, "rounds=1")
    both = replayed(report, "wire.uplink.values=int8", "wire.downlink.values=int8")
    assert replayed(report, values="int8") == both
    assert both.total("down") < both.total("down", replayed=False) / 3


def test_other_mask_codecs_are_encoded(finished: Callable[..., Report]) -> None:
    report = finished(ALL, *WHOLE, *TOPK, "rounds=1")
    count, sent = 23_824, 2382
    sizes = {mask: replayed(report, mask=mask).replayed["up", "mask"] for mask in ("free", "fl_sim", "bitmap", "coo")}
    assert (sizes["free"], sizes["bitmap"], sizes["coo"]) == (0, 3 * -(-count // 8), 3 * 4 * sent)
    assert 0 < sizes["fl_sim"] < sizes["bitmap"]
    int8 = replayed(report, "wire.uplink.values=int8", mask="coo").replayed
    assert int8["up", "mask"] == sizes["coo"]
    assert int8["up", "values"] < 1.1 * 4 * sent


def test_masks_alone_allow_mask_codecs_alone(finished: Callable[..., Report]) -> None:
    report, whole = (finished(keep, *TOPK, "rounds=1") for keep in ("wire.record_masks=true", ALL))
    for mask in ("fl_sim", "coo", "bitmap", "free"):
        assert replayed(report, mask=mask) == replayed(whole, mask=mask)
    with pytest.raises(UserError, match=r"values were not: only --mask can change.*record_payloads=1"):
        replayed(report, "wire.uplink.values=int8")


def test_what_was_rounded_away_is_not_made_up(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, ALL, "rounds=1", "wire.uplink.values=int8", *DIFFERENCE)
    with pytest.raises(UserError, match=r"uplink moved int8.*wire\.uplink\.values = 'float32'"):
        replayed(report, "wire.uplink.values=int4")
    exact = run_tiny(tmp_path / "exact", "rounds=1", *DIFFERENCE)
    assert replayed(report, "wire.uplink.values=float32").total("up") == sum(sections(exact, "up").values())
    down = replayed(report, "wire.downlink.values=int8")
    assert down.total("up") == report.summary["uplink_bytes"]
    assert down.total("down") < int(str(report.summary["downlink_bytes"])) / 3


def test_chosen_rounds_alone_and_within_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = run_tiny(tmp_path, "wire.record_payloads=2", "rounds=4")
    assert replayed(report).rounds == (1, 3)
    first = recorded_files(report.folder / "payloads")[0][1].stat().st_size
    limited = run_tiny(tmp_path / "limited", ALL, f"wire.record_megabytes={1.5 * first / 1e6}")
    assert replayed(limited).rounds == (1,)
    assert "round 2: its payloads would exceed wire.record_megabytes" in caplog.text


@pytest.mark.parametrize(
    ("every", "lost", "said"),
    [(1, [3], "round 3 are"), (1, [1], "round 1 are"), (1, [1, 2, 3], "round 1, 2, 3 are"), (2, [3], "round 3 are")],
)
def test_recorded_rounds_that_are_missing_are_named(tmp_path: Path, every: int, lost: list[int], said: str) -> None:
    report = run_tiny(tmp_path, f"wire.record_payloads={every}", "wire.record_masks=true", *TOPK, "rounds=3")
    for number in lost:
        (report.folder / "payloads" / f"round-{number:08d}.safetensors").unlink()
    refused = rf"the recorded payloads of {said} missing \(wire.record_payloads = {every}\)"
    with pytest.raises(UserError, match=refused):
        replayed(report, "wire.uplink.values=int8")
    with pytest.raises(UserError, match=refused):
        measure(report)


def test_recorded_masks_that_are_missing_were_recorded(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "wire.record_masks=true", *TOPK, "rounds=1")
    (report.folder / "masks.parquet").unlink()
    with pytest.raises(UserError, match=r"masks\.parquet: the recorded masks are missing"):
        replayed(report, mask="coo")


@pytest.mark.parametrize("ends", ["killed", "extended"])
def test_a_recording_that_the_limit_ended_stays_ended(tmp_path: Path, ends: str) -> None:
    """Payloads of a pruned model are small enough for the limit, which the dense first round was not."""
    whole = run_tiny(tmp_path / "probe", ALL, *PRUNED)
    sizes = [path.stat().st_size for _, path in recorded_files(whole.folder / "payloads")]
    assert max(sizes[1:]) < sizes[0] - 1000
    limit = f"wire.record_megabytes={(sizes[0] - 1000) / 1e6}"
    undisturbed = run_tiny(tmp_path / "whole", ALL, *PRUNED, limit)
    if ends == "killed":
        with pytest.raises(Killed):
            run(tiny(tmp_path / "part", ALL, *PRUNED, limit), KillAfter(3))
    else:
        run_tiny(tmp_path / "part", ALL, *PRUNED, limit, "rounds=3")
    report = run(tiny(tmp_path / "part", ALL, *PRUNED, limit), resume=True)
    assert [recorded_files(each.folder / "payloads") for each in (undisturbed, report)] == [[], []]


def test_a_sparse_broadcast_is_left_as_it_was(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, ALL, "wire.broadcast.density=0.1", "evaluate.clients=2")
    found = replayed(report, "wire.uplink.values=int8")
    assert found.total("down") == report.summary["downlink_bytes"]
    assert found.total("up") < int(str(report.summary["uplink_bytes"])) / 3
    for other in (["wire.downlink.values=int8"], DIFFERENCE):
        with pytest.raises(UserError, match="broadcast"):
            replayed(report, *other)


def test_models_of_several_capacities(tmp_path: Path) -> None:
    options = ["model.name=mlp", 'capacities=[{name = "cnn", share = 0.5}]', "rounds=1"]
    found = replayed(run_tiny(tmp_path, ALL, *options), "wire.uplink.values=int8", *DIFFERENCE)
    other = run_tiny(tmp_path / "int8", *options, "wire.uplink.values=int8", *DIFFERENCE)
    assert found.total("up") == other.summary["uplink_bytes"]
    assert found.total("down") == other.summary["downlink_bytes"]


def test_a_resumed_run_has_recorded_the_same(tmp_path: Path) -> None:
    whole = run_tiny(tmp_path / "whole", ALL, "rounds=3")
    run_tiny(tmp_path / "part", ALL, "rounds=2")
    extended = run(tiny(tmp_path / "part", ALL, "rounds=3"), resume=True)
    names = [path.name for _, path in recorded_files(whole.folder / "payloads")]
    for name in names:
        a, b = (list(read_round(report.folder / "payloads" / name)) for report in (whole, extended))
        assert a == b
    assert len(names) == 3


@pytest.mark.parametrize(
    ("recorded", "overrides", "mask", "said"),
    [
        ([], [], "coo", "record_payloads=1 for all codecs, or with wire.record_masks=true"),
        ([ALL], [], "zip", "allowed: fl_sim, coo"),
        ([ALL], ["wire.uplink.values=int9"], "fl_sim", "unknown values 'int9'"),
        ([ALL], ["rounds=5"], "fl_sim", "replay: 'rounds' cannot change after a run; allowed: wire.uplink.values"),
        ([ALL], ["wire.uplink.valuse=int8"], "fl_sim", "'wire.uplink.valuse' cannot change"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    finished: Callable[..., Report], recorded: list[str], overrides: Sequence[str], mask: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        replayed(finished(*recorded, "rounds=1"), *overrides, mask=mask)


def test_damaged_files_and_those_of_other_runs_are_one_line(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, ALL, "rounds=1")
    other = run_tiny(tmp_path / "other", ALL, "rounds=1", "seed=1")
    ((_, path),) = recorded_files(report.folder / "payloads")
    whole = path.read_bytes()
    ((_, theirs),) = recorded_files(other.folder / "payloads")
    for damaged in (b"", whole[:1000], theirs.read_bytes(), np.random.default_rng(0).bytes(500)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="payloads"):
            replayed(report, "wire.uplink.values=int8")


def test_rounds_of_recorded_masks_that_are_missing_or_strange_are_named(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, "wire.record_masks=true", *TOPK, "rounds=3")
    path = report.folder / "masks.parquet"
    whole = pq.read_table(path)
    rounds = whole["round"].to_numpy()
    for kept, said in (
        (rounds != 2, "round 2 are missing"),
        (rounds < 2, "round 2, 3 are missing"),
        (np.arange(len(rounds)) > 0, "round 1 are missing"),
    ):
        pq.write_table(whole.filter(pa.array(kept)), path)
        with pytest.raises(UserError, match=rf"masks\.parquet: recorded masks of {said}"):
            replayed(report, mask="coo")
    pq.write_table(pa.concat_tables([whole, whole.slice(0, 1)]), path)
    with pytest.raises(UserError, match=r"of round 1 are not of this run's messages"):
        replayed(report, mask="coo")
    pq.write_table(whole, path)
    assert replayed(report, mask="coo").replayed


def test_recorded_masks_that_are_damaged_are_one_line(tmp_path: Path) -> None:
    report = run_tiny(tmp_path, *TOPK, "wire.record_masks=true", "rounds=1")
    (report.folder / "masks.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"masks\.parquet"):
        replayed(report, mask="coo")
    schema = Federation.build(Experiment.load(report.folder / "config.toml")).first.exchange.schema
    with pytest.raises(UserError, match=r"masks\.parquet"):
        list(read_masks(report.folder / "masks.parquet", schema))


def report_experiment(report: Report):
    from fl_sim import Experiment

    return Experiment.load(report.folder / "config.toml")
