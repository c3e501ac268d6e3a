"""docs/codecs.md: its codec and its configs run as printed, and its table says how many bytes the codecs of papers take."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from federation import TINY

from fl_sim import Experiment, Report, run
from fl_sim.config.codecs import CODECS
from fl_sim.simulation.codec_doctor import Tried
from fl_sim.simulation.part_doctor import Part

PAGE = Path("docs/codecs.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
OWN, EDEN, VOTE, BOTH_WAYS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
SIZES = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \| [^|]* \|$", PAGE, re.MULTILINE))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_codecs.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def outcome(text: str, *, rounds: int = 1) -> Report:
    return run(Experiment.from_tree({**TINY, **tomllib.loads(text), "rounds": rounds}), quiet=True)


def test_the_codec_of_the_page_runs() -> None:
    report = outcome(OWN)
    assert report.summary["failures"] == {"raised": 0, "rejected": 0, "late": 0, "lost": 0}
    assert report.ledger.total(where={"section": "codec"}) == {(): 3 * (23_824 + 4 * 4)}


def test_eden_over_fedavg_is_two_lines() -> None:
    report = outcome(EDEN)
    assert report.summary["failures"]["rejected"] == 0
    assert report.ledger.total(where={"section": "codec"})[()] == pytest.approx(3 * 5920, rel=0.01)


def test_the_vote_is_a_bit_each_way() -> None:
    report = outcome(VOTE)
    up, dense = (report.ledger.total(by=("direction",), column=name) for name in ("payload_bytes", "dense_bytes"))
    assert up["up",] < 0.06 * dense["up",]
    assert report.summary["failures"]["rejected"] == 0


def test_both_ways_codes_are_of_changes() -> None:
    report = outcome(BOTH_WAYS, rounds=2)
    coded = report.ledger.total(by=("round", "direction"), where={"section": "codec"})
    assert coded == {(1, "up"): 3 * 5016, (2, "up"): 3 * 5016, (2, "down"): 3 * 5016}, "the seeded model is not sent"


def test_the_table_has_every_codec_and_its_bytes() -> None:
    assert SIZES.keys() == CODECS.keys()
    schema = Part("codec", "").schema
    for name, path in CODECS.items():
        tried = Tried.of(path, {}, schema)
        assert f"{len(tried.encode(tried.message())):,}" == SIZES[name], name
        module = import_module(path.partition(":")[0])
        assert len(inspect.getsource(module).splitlines()) <= 120, name
