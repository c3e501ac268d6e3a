"""Lists of names in help texts and documentation are those of the registries; `fl-sim list` shows every registry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import get_args

import click
import pytest

from fl_sim import codecs
from fl_sim.bench import engine, soak
from fl_sim.bench.peer_run import PEERS
from fl_sim.bench.peer_table import CONTESTS
from fl_sim.cli.app import parser
from fl_sim.communication.estimates import ESTIMATES
from fl_sim.communication.exchange import Coding
from fl_sim.communication.replay import MASKS
from fl_sim.config.catalogue import ENGINES, catalogue
from fl_sim.config.experiment import Engine
from fl_sim.config.reference import documented
from fl_sim.gating import SALIENCES
from fl_sim.report import FORMATS
from fl_sim.report.trackers import TRACKERS
from fl_sim.simulation import engines
from fl_sim.sparsity.one_model import METHODS
from fl_sim.training.precision import PRECISIONS


def words(text: str) -> set[str]:
    """Names in a text: what stands between commas, spaces, colons and brackets."""
    return set(re.split(r"[\s,;:().]+", text))


def helped(command: Sequence[str], option: str) -> str:
    found: click.Command = parser()
    for name in command:
        found = found.commands[name]  # type: ignore[attr-defined]
    return next(p.help for p in found.params if p.name == option)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        (["run"], "engine", [*engines.ENGINES, "auto"]),
        (["run"], "track", TRACKERS),
        (["compare"], "as_text", FORMATS),
        (["replay"], "values", codecs.VALUES),
        (["replay"], "mask", MASKS),
        (["prune"], "method", METHODS),
        (["bench", "engine"], "only", [*engine.PARTS, *engine.OPTIONAL]),
        (["bench", "engine"], "peers", PEERS),
        (["bench", "engine"], "work", CONTESTS),
        (["bench", "density"], "precision", PRECISIONS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and len(value) < 3 else None,
)
def test_options_name_all_that_is_allowed(command: list[str], option: str, names: Iterable[str]) -> None:
    assert set(names) - words(helped(command, option)) == set()


def test_soak_runs_on_engines_that_exist() -> None:
    assert set(soak.ENGINES) <= set(engines.ENGINES)
    assert set(engine.ENGINES) <= set(engines.ENGINES)


def test_the_reference_names_all_value_types_and_engines() -> None:
    assert set(codecs.VALUES) - words(documented(Coding)["values"]) == set()
    assert set(get_args(Engine)) == ENGINES.keys() == set(engines.ENGINES) | {"auto", "flower"}


def test_lists_are_the_registries(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entries = catalogue()
    for title, registry in (
        ("engines", ENGINES),
        ("saliences", SALIENCES),
        ("prune-methods", METHODS),
        ("mask-codecs", MASKS),
        ("estimates", ESTIMATES),
        ("values", codecs.VALUES),
    ):
        assert list(entries[title]) == list(registry)
        assert all(entries[title].values()), title
        if title != "values":  # a class of coders serves several types
            assert len(set(entries[title].values())) == len(registry), f"{title}: two names with one description"
    monkeypatch.setattr("sys.argv", ["fl-sim", "list", "trackers"])
    with pytest.raises(SystemExit):
        parser()()
    assert set(TRACKERS) <= words(capsys.readouterr().out)
