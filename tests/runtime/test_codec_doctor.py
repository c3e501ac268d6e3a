"""The doctor tries codecs: our own pass, and options of a config's table reach them."""

from __future__ import annotations

import pytest
from command import cli_here
from typer.testing import CliRunner

from fl_sim.cli.app import app
from fl_sim.config.codecs import CODECS
from fl_sim.core.types import UserError
from fl_sim.simulation.part_doctor import examine_part


@pytest.mark.parametrize("name", CODECS)
def test_codecs_that_come_with_fl_sim_pass(name: str) -> None:
    assert [finding for finding in examine_part("codec", name) if finding.problem] == []


def test_options_reach_a_codec() -> None:
    (only,) = examine_part("codec", "powersgd", {"rank": 0})
    assert "rank = 0: must be at least 1" in only.problem
    (large,) = (f for f in examine_part("codec", "powersgd", {"rank": 1000}) if f.problem)
    assert "as float32" in large.problem
    with pytest.raises(UserError, match="no such codec"):
        examine_part("codec", "powersg")


@pytest.mark.parametrize("bits", [1, 8])
def test_eden_passes_with_few_and_many_bits(bits: int) -> None:
    assert [finding for finding in examine_part("codec", "eden", {"bits": bits}) if finding.problem] == []


def test_the_command_takes_options_of_a_codec() -> None:
    tried = CliRunner().invoke(app, ["doctor", "--codec", "eden", "bits=9"])
    assert tried.exit_code == 1
    assert "bits = 9: must be a whole number from 1 to 8" in tried.output


def test_an_unknown_codec_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["edn"], ["edn", "bits=2"]):
        assert cli_here(monkeypatch, "doctor", "--codec", *words) == 2
        said = capsys.readouterr().err
        assert said.startswith("fl-sim: ")
        assert "codec 'edn': no such codec; did you mean 'eden'?" in said
        assert len(said.splitlines()) == 1
