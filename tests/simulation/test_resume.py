"""Killed, damaged and doubled runs: what a resumed run must equal, bit for bit, and what is refused."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from shutil import copytree

import pytest
import torch
from federation import run_tiny, same, tiny
from hypothesis import given
from hypothesis import strategies as st
from interruption import KillAfter, Killed

from fl_sim import Report, run
from fl_sim.config.experiment import run_folder
from fl_sim.core.types import UserError
from fl_sim.simulation import RunStopped, resume
from fl_sim.simulation.checkpoint_store import Chunk, read_manifest
from fl_sim.simulation.checkpointing import grown
from fl_sim.simulation.run_folder import claimed

METHODS = {
    "dense": ["evaluate.clients=2"],
    "topk": [
        "model.name=mlp",
        "client.target=clients.presets:topk",
        "client.density=0.1",
        "wire.error_feedback=true",
        "wire.uplink.values=int8",
        "wire.uplink.content=difference",
        "wire.record_masks=true",
    ],
    "broadcast": [
        "model.name=mlp",
        "wire.broadcast.density=0.1",
        "wire.broadcast.values=int8",
        "strategy.target=strategies.presets:gradual_magnitude",
        "strategy.density=0.3",
        "strategy.end=2",
        "evaluate.clients=2",
    ],
    "adaptive": ["client.target=clients.presets:adaptive_pruning", "gating.macs_budget=0.5", "client.density=0.3"],
    "batchnorm": ["model.trainable=batchnorm", "model.statistics=local", "evaluate.clients=2"],
    "masked": [
        "strategy.target=strategies.presets:gradual_magnitude",
        "strategy.density=0.2",
        "strategy.end=4",
        "cohort.size=2",
    ],
    "projections": [
        "client.target=clients.presets:feature_distillation",
        'client.stages=["2", "5", "8"]',
        "strategy.target=strategies.presets:fedavg",
        'strategy.distil.teacher="ensemble"',
        "strategy.distil.steps=2",
        "data.proxy=0.1",
    ],
    "momentum": [
        "model.name=mlp",
        "strategy.target=strategies.presets:fedavg",
        "strategy.momentum=0.9",
        "strategy.lr=0.5",
        'network.links={"3G"=1}',
        "network.dropout=0.2",
    ],
    "capacities": [
        "model.name=resnet8",
        "model.width=0.25",
        'capacities=[{name = "resnet8", width = 0.125, share = 0.5}]',
        "strategy.target=strategies.presets:mixed_capacities",
        "strategy.steps=2",
        "data.proxy=0.1",
        "client.target=clients.presets:topk",
        "client.density=0.3",
        "wire.error_feedback=true",
    ],
    "capacities_masked": [
        "model.name=resnet8",
        "model.width=0.25",
        'capacities=[{name = "resnet8", width = 0.125, share = 0.5}]',
        "strategy.target=strategies.presets:gradual_magnitude",
        "strategy.density=0.2",
        "strategy.end=4",
        "cohort.size=2",
    ],
}
SHORT = ("rounds=5", "training.steps=2", "training.batch_size=16")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """A method's run that nothing disturbed."""
    return cache(lambda method: run_tiny(tmp_path_factory.mktemp(method), *SHORT, *METHODS[method]))


def stopped(out: Path, options: Sequence[str], *, after: int, replies: int = 0) -> None:
    with pytest.raises(Killed):
        run(tiny(out, *SHORT, *options), KillAfter(after, replies))


@pytest.mark.parametrize(
    ("method", "after", "replies"),
    [
        ("topk", 0, 1),
        ("topk", 3, 1),
        ("topk", 5, 0),
        ("dense", 1, 1),
        ("adaptive", 2, 1),
        ("masked", 3, 0),
        ("broadcast", 2, 1),
        ("momentum", 2, 1),
        ("projections", 3, 1),
        ("capacities", 3, 1),
        ("capacities_masked", 2, 0),
    ],
)
def test_a_killed_run_ends_as_one_that_never_was(
    tmp_path: Path, whole: Callable[[str], Report], method: str, after: int, replies: int
) -> None:
    undisturbed = whole(method)
    stopped(tmp_path / "killed", METHODS[method], after=after, replies=replies)
    resumed = resume(tiny(tmp_path / "killed", *SHORT, *METHODS[method]), left := KillAfter(99))
    assert left.seen == list(range(after + 1, 6))
    same(undisturbed, resumed)
    masks = "masks.parquet"
    assert (undisturbed.folder / masks).exists() == (resumed.folder / masks).exists()
    if (undisturbed.folder / masks).exists():
        assert (undisturbed.folder / masks).read_bytes() == (resumed.folder / masks).read_bytes()
    assert len(list((resumed.folder / "checkpoint").glob("round-*.json"))) == 1


def test_killed_twice_with_checkpoints_every_other_round(tmp_path: Path, whole: Callable[[str], Report]) -> None:
    options = [*METHODS["topk"], "checkpoint.every=2"]
    stopped(tmp_path / "killed", options, after=3)
    experiment = tiny(tmp_path / "killed", *SHORT, *options)
    with pytest.raises(Killed):
        resume(experiment, KillAfter(1, 2))
    same(whole("topk"), resume(experiment))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its third round; each test damages a copy."""
    stopped(out := tmp_path_factory.mktemp("killed"), METHODS["topk"], after=3)
    return out


@pytest.mark.parametrize("what", ["manifest", "object", "missing", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_previous_one_used(
    tmp_path: Path, killed: Path, what: str, whole: Callable[[str], Report], caplog: pytest.LogCaptureFixture
) -> None:
    copytree(killed, tmp_path, dirs_exist_ok=True)
    experiment = tiny(tmp_path, *SHORT, *METHODS["topk"])
    store = run_folder(experiment) / "checkpoint"
    previous, newest = sorted(store.glob("round-*.json"))
    only_newest = store / "objects" / min(read_manifest(newest).objects - read_manifest(previous).objects)
    {
        "manifest": lambda: damage(newest),
        "object": lambda: damage(only_newest),
        "missing": only_newest.unlink,
        "empty": lambda: newest.write_bytes(b""),
    }[what]()
    with caplog.at_level(logging.WARNING, "fl_sim"):
        resumed = resume(experiment, left := KillAfter(99))
    assert "damaged" in caplog.text
    assert left.seen == [3, 4, 5]
    same(whole("topk"), resumed)


def test_damaged_beyond_use_is_said_in_one_line(tmp_path: Path) -> None:
    stopped(tmp_path, METHODS["dense"], after=2)
    experiment = tiny(tmp_path, *SHORT, *METHODS["dense"])
    for path in (run_folder(experiment) / "checkpoint").glob("round-*.json"):
        damage(path)
    with pytest.raises(UserError, match="--fresh"):
        resume(experiment)


def test_resuming_a_finished_run_reads_it_and_a_fresh_run_starts_over(tmp_path: Path) -> None:
    first = run_tiny(tmp_path)
    again = resume(tiny(tmp_path), left := KillAfter(99))
    assert left.seen == []
    assert again.summary == first.summary
    assert all(torch.equal(first.params[n], again.params[n]) for n in first.params)
    run(tiny(tmp_path), left := KillAfter(99), fresh=True)
    assert left.seen == [1, 2]


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    with claimed(experiment), pytest.raises(UserError, match="another run"):
        run(experiment)
    run(experiment)


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    experiment = tiny(tmp_path)
    if (child := os.fork()) == 0:
        with claimed(experiment):
            (tmp_path / "held").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert (os.WIFSIGNALED(status) and os.WTERMSIG(status)) == signal.SIGKILL
    assert (tmp_path / "held").exists()
    with claimed(experiment):
        pass


def test_an_unwritable_checkpoint_stops_the_run_and_keeps_what_was_finished(
    tmp_path: Path, whole: Callable[[str], Report]
) -> None:
    """A full disk looks the same: the operating system refuses a write."""
    experiment = tiny(tmp_path, *SHORT, *METHODS["dense"])

    class Sabotage(KillAfter):
        def round(self, row) -> None:
            super().round(row)
            if len(self.seen) == 2:  # a file where the next temporary file must go
                (run_folder(experiment) / "checkpoint" / "round-00000003.json.tmp").mkdir()

    with pytest.raises(RunStopped, match=r"2 finished rounds are kept, --resume"):
        run(experiment, Sabotage(99))
    (run_folder(experiment) / "checkpoint" / "round-00000003.json.tmp").rmdir()
    same(whole("dense"), resume(experiment))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_parts_of_a_log_stay_few(steps: list[int]) -> None:
    chunks: list[Chunk] = []
    length = written = 0
    for step in steps:
        length += step
        kept, start = grown(chunks, length)
        assert start == (kept[-1].stop if kept else 0)
        assert kept == chunks[: len(kept)]
        chunks = [*kept, Chunk(name="0" * 64, stop=length)]
        written += length - start
    assert len(chunks) <= length.bit_length() + 1
    assert written <= length * (length.bit_length() + 1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_what_a_checkpoint_writes_of_a_log_is_bounded_however_long_it_is(steps: list[int]) -> None:
    chunks: list[Chunk] = []
    for length in accumulate(steps):
        kept, start = grown(chunks, length, full=64)
        assert kept == chunks[: len(kept)]
        assert length - start < 64 + 64
        chunks = [*kept, Chunk(name="0" * 64, stop=length)]


def test_interrupting_prints_how_to_go_on(tmp_path: Path) -> None:
    words = ["run", "configs/quickstart.toml", "rounds=60", "evaluate.every=1", "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "fl_sim.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not any(tmp_path.glob("*/checkpoint/round-*.json")):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume" in said
    assert "Traceback" not in said


@dataclass
class SwallowsAnInterrupt:
    """An observer in which Ctrl-C meets a bare `except:`, as it may in any callback from which Python raises nothing."""

    seen: list[int] = field(default_factory=list)

    def reply(self, answered: int, cohort: int) -> None:
        if len(self.seen) == 1 and answered == 1:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def round(self, row) -> None:
        self.seen.append(int(row["round"]))


@pytest.fixture
def pythons_own_handler() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_own_handler")
def test_an_interrupt_that_somebody_swallowed_stops_the_run_after_the_round(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path, *SHORT), observer := SwallowsAnInterrupt())
    assert observer.seen == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resume(tiny(tmp_path, *SHORT), left := KillAfter(99))
    assert left.seen == [3, 4, 5]


def test_a_handler_of_the_callers_own_stays(tmp_path: Path) -> None:
    rings: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: rings.append(number))
    try:
        run(tiny(tmp_path, *SHORT), observer := SwallowsAnInterrupt())
    finally:
        signal.signal(signal.SIGINT, before)
    assert observer.seen == [1, 2, 3, 4, 5]
    assert rings == [signal.SIGINT]
