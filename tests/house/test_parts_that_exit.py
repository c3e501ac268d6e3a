"""Parts of the user's that call `sys.exit`, or raise in a later round: one line that names the file, never a silent end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest
import torch
from command import cli_here
from federation import tiny
from torch import Tensor, nn

from fl_sim import Experiment, UserError, run
from fl_sim.codecs import Schema
from fl_sim.core.types import Params
from fl_sim.data.partition import Request
from fl_sim.simulation import RunStopped, resume
from fl_sim.training import Training

HERE = Path(__file__).stem
SMALL = ("model.name=mlp", "model.width=0.25", "training.steps=1", "cohort.size=2")
raises: dict[str, type[BaseException]] = {}
"""What `Late` raises after two rounds; nothing where it is empty."""


def partition(labels: object, request: Request) -> object:
    sys.exit(3)


def source() -> object:
    sys.exit(4)


def builder(**options: object) -> nn.Module:
    sys.exit(5)


def client(*, training: Training) -> object:
    sys.exit(7)


class Exiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        sys.exit(8)


def model(**options: object) -> nn.Module:
    return Exiting()


class Codec:
    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        return b""

    def decode(self, data: bytes, schema: Schema) -> Params:
        sys.exit(9)


class Unmade:
    def __init__(self) -> None:
        sys.exit(10)


class Late:
    """A codec of the downlink that raises in its third round."""

    rounds = 0

    def encode(self, tensors: Params, state: Params, rng: torch.Generator) -> bytes:
        Late.rounds += 1
        if raises and Late.rounds > 2 + 2:  # two messages before round 1
            raise raises["late"]("why")
        return b"".join(value.numpy().tobytes() for value in tensors.values())

    def decode(self, data: bytes, schema: Schema) -> Params:
        return dict(schema.view(torch.frombuffer(bytearray(data), dtype=torch.float32)))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("key", "part", "said"),
    [
        ("data.partition", "partition", "it raised SystemExit: 3"),
        ("data.source", "source", "it raised SystemExit: 4"),
        ("model.name", "builder", "it raised SystemExit: 5"),
        ("client", "client", "called sys.exit(7) when it was called"),
        ("model.name", "model", "it raised SystemExit: 8"),
        ("wire.codec.uplink", "Codec", "decode raised SystemExit: 9"),
        ("wire.codec.uplink", "Unmade", "called sys.exit(10) when it was called"),
    ],
)
def test_it_is_one_line_before_round_1(tmp_path: Path, key: str, part: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        run(tiny(tmp_path, *SMALL, "wire.uplink.content=difference", f"{key}={HERE}:{part}"), quiet=True)
    text = str(caught.value)
    assert f"{HERE}:{part}" in text
    assert said in text
    assert "\n" not in text


@pytest.mark.parametrize("error", [SystemExit, KeyError, ZeroDivisionError])
def test_in_a_later_round_it_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    named = import_module(HERE)  # as configs find it; pytest knows this file under another name

    def asked() -> Experiment:
        monkeypatch.setattr(named.Late, "rounds", 0)
        return tiny(
            tmp_path, *SMALL, "rounds=4", f"wire.codec.downlink={HERE}:Late", "wire.downlink.content=difference"
        )

    monkeypatch.setitem(named.raises, "late", error)
    with pytest.raises(RunStopped) as caught:
        run(asked(), quiet=True)
    assert str(caught.value).startswith(f"{error.__name__}: ")
    assert f"({HERE}.py, line " in str(caught.value)
    assert str(caught.value).endswith("2 finished rounds are kept, --resume goes on from there")
    monkeypatch.delitem(named.raises, "late")
    assert len(resume(asked(), quiet=True).rounds) == 4


def test_a_command_says_it_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it happens: here in a part that nothing catches."""

    def exits(tree: Mapping[str, object], *rest: object, **more: object) -> Experiment:
        return client(training=Training())  # type: ignore[return-value]

    monkeypatch.setattr(Experiment, "from_tree", exits)
    assert cli_here(monkeypatch, "run", "configs/quickstart.toml") == 1
    assert f"fl-sim: the run failed: SystemExit: 7 ({HERE}.py, line " in capsys.readouterr().err
