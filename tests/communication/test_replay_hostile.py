"""Replay of a run folder that somebody else made: one line, and no waiting."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import cli_here
from federation import run_tiny

from fl_sim import Experiment, Report
from fl_sim.communication.mask_log import read_masks
from fl_sim.core.types import UserError
from fl_sim.simulation.federation import Federation


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Report:
    options = ["client.target=clients.presets:topk", "wire.record_masks=true", "rounds=1"]
    return run_tiny(tmp_path_factory.mktemp("recorded"), *options)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"direction": ["up"], "mask": [1]}, "int64"),
        ({"direction": ["up"], "mask": [1.5]}, "double"),
        ({"direction": ["up"], "mask": [True]}, "bool"),
        ({"direction": ["up"], "mask": ["x"]}, "a mask of 1 bytes"),
        ({"direction": [1], "mask": [None]}, "direction '1'"),
        ({"direction": [None], "mask": [None]}, "direction None"),
        ({"direction": ["across"], "mask": [None]}, "direction 'across'"),
        ({"round": [None]}, "a mask without a round"),
        ({"client": [None]}, "a mask without a round or a client"),
        ({"round": ["x"]}, "x"),
        *(
            ({lacking: None}, "of the columns round, direction, client, mask only")
            for lacking in ("round", "direction", "client", "mask")
        ),
    ],
)
def test_other_columns_are_one_line(
    tmp_path: Path, recorded: Report, columns: dict[str, list[object] | None], said: str
) -> None:
    path = tmp_path / "masks.parquet"
    whole = {"round": [1], "direction": ["up"], "client": [0], "mask": [None], **columns}
    pq.write_table(pa.table({name: values for name, values in whole.items() if values is not None}), path)
    schema = Federation.build(Experiment.load(recorded.folder / "config.toml")).first.exchange.schema
    with pytest.raises(UserError, match=rf"masks\.parquet: .*{said}"):
        list(read_masks(path, schema))


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_the_config_is_not_waited_for(
    recorded: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded.folder / "config.toml"
    text = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    status, said = cli_here(monkeypatch, "replay", str(recorded.folder)), capsys.readouterr().err
    path.unlink()
    path.write_bytes(text)
    assert status == 2
    assert "config.toml" in said
    assert "not a plain file" in said
    assert len(said.splitlines()) == 1
