"""The reference page is complete and up to date, and the config that `init` writes runs."""

from __future__ import annotations

import inspect
import pkgutil
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import clients
import strategies
from fl_sim import Experiment
from fl_sim.cli import main
from fl_sim.config.catalogue import KEYS, catalogue, functions
from fl_sim.config.reference import page, tables, template
from strategies.distillation import server_distillation


def test_the_page_is_up_to_date() -> None:
    assert Path("docs/config.md").read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_key_says_what_it_means() -> None:
    silent = [f"{table.path}.{key.name}".lstrip(".") for table in tables() for key in table.keys if not key.meaning]
    assert silent == []
    assert all(table.meaning for table in tables())


def test_every_option_of_a_preset_says_what_it_means() -> None:
    rows = re.findall(r"^\| (\S+) \| ([^|]*) \| ([^|]*) \| (.*) \|$", page(), re.MULTILINE)
    assert [name for name, _, _, meaning in rows if not meaning.strip()] == []
    options = {name: meaning for name, *_, meaning in rows}
    assert options["`kilobytes`"].endswith("; needed")  # no default, and no part of a run
    assert not {"`training`", "`num_clients`", "`kept`"} & options.keys()


def test_the_table_of_server_distillation_is_listed() -> None:
    table = page().split("## `[strategy.distil]`")[1].split("\n## ")[0]
    keys = inspect.signature(server_distillation).parameters
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(keys)


def test_every_key_of_a_resolved_config_is_listed() -> None:
    def walk(tree: dict[str, object], path: str) -> set[str]:
        return {
            name
            for key, value in tree.items()
            for name in (walk(value, f"{path}{key}.") if isinstance(value, dict) and key != "links" else {path + key})
        }

    listed = {f"{table.path}.{key.name}".lstrip(".") for table in tables() for key in table.keys}
    resolved = walk(tomllib.loads(Experiment().to_toml()), "")
    assert resolved <= listed | {"network.links"}


def test_the_template_is_the_default_experiment() -> None:
    assert Experiment.from_tree(tomllib.loads(template())) == Experiment()


def test_comments_in_the_template_are_short_and_say_once_what_unset_means() -> None:
    lines = template().splitlines()
    assert max(map(len, lines)) <= 140
    assert not [line for line in lines if line.lower().count("unset") > 1]


def test_every_default_in_the_template_can_be_switched_on() -> None:
    lines = [re.sub(r"^#(?=[\w\[])", "", line) for line in template().splitlines() if not line.endswith(" =")]
    tree = tomllib.loads("\n".join(lines))
    codec = tree["wire"].pop("codec")  # not beside a broadcast of changed weights
    assert Experiment.from_tree({"wire": {"codec": codec}}).wire.codec is not None
    budget = {"budget": tree["wire"].pop("budget"), "uplink": {"content": "difference"}}  # chooses what others name
    assert Experiment.from_tree({"wire": budget}).wire.budget is not None
    switched = Experiment.from_tree(tree)
    wire = switched.wire.model_copy(update={"broadcast": None})
    model = switched.model.model_copy(update={"adapter": None})
    off = {"gating": None, "study": None, "stop": None, "attack": None, "wire": wire, "model": model}
    assert switched.model_copy(update=off) == Experiment()


def test_every_name_has_its_line_and_key() -> None:
    entries = catalogue()
    assert entries.keys() == KEYS.keys()
    assert [f"{title}: {name}" for title, lines in entries.items() for name, line in lines.items() if not line] == []


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["fl-sim", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


@pytest.mark.parametrize("package", [clients, strategies])
def test_every_preset_is_in_the_lists(package: ModuleType) -> None:
    """A preset takes keyword arguments only, and makes a client or a method."""
    listed = catalogue()[package.__name__]
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for path, function in functions(module.name).items():
            signature = inspect.signature(function)
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            if kinds <= {inspect.Parameter.KEYWORD_ONLY} and signature.return_annotation in ("Client", "Method"):
                assert path in listed


def test_init_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    assert _run(monkeypatch, "init", str(path)) == 0
    assert Experiment.load(path) == Experiment()
    path.write_text("kept")
    assert _run(monkeypatch, "init", str(path)) == 2
    assert path.read_text() == "kept"
    assert _run(monkeypatch, "init", str(tmp_path / "no" / "such" / "x.toml")) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_list_takes_one_kind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "list", "models") == 0
    said = capsys.readouterr().out
    assert "resnet20" in said
    assert "dirichlet" not in said
    assert _run(monkeypatch, "list", "modles") == 2
    assert "did you mean 'models'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "sweep", "report", "compare", "replay", "doctor", "init", "list"])
def test_help_has_an_example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, command, "--help") == 0
    assert f"Example: fl-sim {command}" in capsys.readouterr().out
