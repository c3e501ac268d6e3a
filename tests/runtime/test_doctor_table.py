"""docs/doctor.md is executed: of every mistake in its tables the doctor says what the page promises."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from clients.presets import fedavg
from fl_sim.cli import main
from fl_sim.data.partition import Request
from fl_sim.runtime.client import doctor
from fl_sim.runtime.client.doctor_behaviour_checks import fast
from fl_sim.simulation.part_doctor import CHECKS, examine_part
from fl_sim.training import Training

PAGE = Path("docs/doctor.md").read_text(encoding="utf-8")
CLIENTS = re.findall(r"^\| ([^|`]*(?:`[^`]*`[^|`]*)*) \| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
PARTS = re.findall(r"^\| `--([\w-]+)` \| .* \| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
CODE = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
NAME = "doctor_page"


@pytest.fixture(scope="module", autouse=True)
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The code of the page as a module that can be imported by its name."""
    import importlib
    import sys

    folder = tmp_path_factory.mktemp("page")
    (folder / f"{NAME}.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module(NAME)
    sys.path.remove(str(folder))
    del sys.modules[NAME]


@pytest.fixture(autouse=True)
def _untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of speed: its answer depends on what else the machine does, and it trains eight times more."""
    monkeypatch.setattr(doctor, "CHECKS", tuple(check for check in doctor.CHECKS if check is not fast))


def test_the_tables_are_whole() -> None:
    assert len(CLIENTS) == 36
    assert {kind.replace("-", "_") for kind, _, _ in PARTS} == set(CHECKS)
    assert len(PARTS) == 29


@pytest.mark.parametrize(("client", "says"), [row[1:] for row in CLIENTS], ids=[row[1] for row in CLIENTS])
def test_the_doctor_says_of_a_client_what_the_table_says(page: ModuleType, client: str, says: str) -> None:
    folder, dtype = os.getcwd(), torch.get_default_dtype()
    problems = [f.problem for f in doctor.examine(getattr(page, client)) if f.problem]
    assert any(says in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)
    assert (os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()) == (folder, dtype, True)


def test_nan_is_one_finding(page: ModuleType) -> None:
    assert len([f for f in doctor.examine(page.not_a_number) if f.problem]) == 1


def test_a_right_client_passes_and_numpy_scalars_are_numbers(page: ModuleType) -> None:
    from fl_sim import Update

    def scalars(task: object, ctx: object) -> Update:
        update = page.good(task, ctx)
        return Update(update.params, np.int64(update.num_examples), update.mask, {"loss": np.float32(1.0)})

    for client in (page.good, scalars):
        assert [f for f in doctor.examine(client) if f.problem] == []


class Counts(nn.Sequential):
    """A model that counts its forward passes where no payload looks."""

    passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes = self.passes + 1
        return super().forward(images)


def stateful(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    return Counts(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))


def test_a_model_with_a_state_of_its_own_is_found() -> None:
    problems = [
        f.problem for f in doctor.examine(fedavg(training=Training()), model=f"{__name__}:stateful") if f.problem
    ]
    assert any("the model keeps 'passes' from call to call" in problem for problem in problems), problems


@pytest.mark.parametrize(("kind", "part", "says"), PARTS, ids=[f"{kind}-{part}" for kind, part, _ in PARTS])
def test_the_doctor_says_of_a_part_what_the_table_says(kind: str, part: str, says: str) -> None:
    problems = [f.problem for f in examine_part(kind.replace("-", "_"), f"{NAME}:{part}") if f.problem]
    assert any(says in problem for problem in problems), problems


def evenly(labels: np.ndarray, request: Request) -> list[np.ndarray]:
    return np.array_split(request.rng.permutation(len(labels)), request.num_clients)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("aggregate", "strategies.aggregation:coverage_mean"),
        ("aggregate", "strategies.aggregation:zero_fill"),
        ("aggregate", "strategies.robust:coordinate_median"),
        ("allocate", "fl_sim.sparsity:erk"),
        ("partition", f"{__name__}:evenly"),
        ("codec", f"{NAME}:Right"),
    ],
)
def test_right_parts_pass(kind: str, path: str) -> None:
    assert [f for f in examine_part(kind, path) if f.problem] == []


def _doctor(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["fl-sim", "doctor", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def test_the_command_takes_parts_and_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _doctor(monkeypatch, "--aggregate", f"{NAME}:numpy_mean", "--partition", f"{__name__}:evenly") == 1
    assert "as ndarray" in capsys.readouterr().out
    (tmp_path / "t.toml").write_text(f'client = "{NAME}:good"\n[data]\npartition = "{NAME}:drops"\n')
    assert _doctor(monkeypatch, str(tmp_path / "t.toml")) == 1
    said = capsys.readouterr().out
    assert f"client {NAME}:good" in said
    assert "is in 0 parts" in said
    assert _doctor(monkeypatch) == 2
    assert "name a client, a config, or a part" in capsys.readouterr().err


TABLE = "a,b,kind\n" + "".join(f"{i % 7},{i % 5},{'pq'[i % 2]}\n" for i in range(80))


def test_a_config_that_cannot_start_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text(TABLE)
    (tmp_path / "t.toml").write_text(
        '[data]\nclients = 4\ntarget = "kind"\n[cohort]\nsize = 2\n[model]\nname = "mlp"\n'
    )
    config, table = str(tmp_path / "t.toml"), str(tmp_path / "x.csv")
    monkeypatch.setattr("fl_sim.runtime.client.doctor.examine", lambda *_, **__: [])  # the client is another test's
    assert _doctor(monkeypatch, config, "data.source=nosuch.csv") == 1
    assert "data.source = 'nosuch.csv': no such folder or file" in capsys.readouterr().out.replace("\n", " ")
    assert _doctor(monkeypatch, config, f"data.source={table}", "data.clients=70", "data.min_size=5") == 1
    assert "data.clients = 70" in capsys.readouterr().out
    assert _doctor(monkeypatch, config, f"data.source={table}") == 0
    assert _doctor(monkeypatch, config, "--data", table) == 0
    assert _doctor(monkeypatch, config, "--data", table, 'data.input=["kind"]') == 1


def test_a_model_that_comes_out_otherwise_the_second_time_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.toml").write_text('[data]\nsource = "digits"\nclients = 4\n[cohort]\nsize = 2\n')
    monkeypatch.setattr("fl_sim.runtime.client.doctor.examine", lambda *_, **__: [])  # the client is another test's
    assert _doctor(monkeypatch, str(tmp_path / "t.toml"), "model.name=worlds_apart:unseeded_buffer") == 1
    assert "built twice from one seed" in capsys.readouterr().out.replace("\n", " ")
    assert _doctor(monkeypatch, str(tmp_path / "t.toml"), "model.name=worlds_apart:buffer_by_numpy") == 0


def test_a_table_is_tried_with_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text(TABLE)
    table = str(tmp_path / "x.csv")
    assert _doctor(monkeypatch, "--data", table, "data.target=kind") == 0
    assert "Its inputs differ" in capsys.readouterr().out
    assert _doctor(monkeypatch, "--data", table) == 1
    assert "data.target is not set: x.csv has the columns a, b, kind" in capsys.readouterr().out
    assert _doctor(monkeypatch, "--data", table, "data.target=kind", "data.clients=3") == 2
    assert "data.clients=3: is not read here; allowed: task, data.input" in capsys.readouterr().err
    assert _doctor(monkeypatch, "data.target=kind") == 2
    assert "data.target=kind is an option" in capsys.readouterr().err
