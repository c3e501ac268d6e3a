"""A run's config.toml: written by tomli-w, loaded back to an equal experiment, or refused before the run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hostile import JSON, QUICK, one_line
from hypothesis import given
from hypothesis import strategies as st

from fl_sim import Experiment, UserError


@QUICK
@given(value=JSON, name=st.text(max_size=8))
def test_a_written_config_loads_to_an_equal_experiment(value: object, name: str) -> None:
    tree = {
        "client": {"target": "mine:client", "x": value, name: 1},
        "strategy": {"target": "mine:s", "table": {name: value}},
    }
    experiment = one_line(lambda: Experiment.from_tree(tree))
    if isinstance(experiment, Experiment):
        again = Experiment.from_tree(tomllib.loads(experiment.to_toml().encode().decode()))
        assert again == experiment
        assert again.id == experiment.id


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"x": None}, "client: option 'x' is null"),
        ({"x": {"y": None}}, "client: option 'x' is null"),
        ({"x": [1, None]}, r"client\.x: null in a list"),
        ({"x": "\ud800"}, r"client\.x: '\\ud800' is not Unicode"),
        ({"\udfff": 1}, r"client: '\\udfff' is not Unicode"),
    ],
)
def test_what_toml_cannot_say_is_refused_and_not_left_out(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Experiment.from_tree({"client": {"target": "mine:client", **options}})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.input=[a,y]", """data.input = '[a,y]': needed: a list; write 'data.input=["a", "y"]'"""),
        ("data.input=a", """data.input = 'a': needed: a list; write 'data.input=["a"]'"""),
        ("evaluate.metrics=top5, auc", """needed: a list; write 'evaluate.metrics=["top5", "auc"]'"""),
        ("evaluate.metrics=3", "evaluate.metrics = 3: needed: a list"),
    ],
)
def test_a_list_without_quotes_is_told_how_it_is_written(override: str, words: str) -> None:
    with pytest.raises(UserError) as said:
        Experiment.from_tree({}, [override])
    assert str(said.value).endswith(words)


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    """Some editors of Windows write one."""
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b"rounds = 7\n")
    assert Experiment.load(path).rounds == 7
