"""Configs: what is refused, and with which single line; what survives a round trip."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from clients.presets import fedrep
from fl_sim.config import Experiment
from fl_sim.core.types import UserError
from fl_sim.training import Training

CONFIGS = sorted(Path("configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_survive_their_own_toml(path: Path) -> None:
    experiment = Experiment.load(path)
    again = Experiment.from_tree(tomllib.loads(experiment.to_toml()))
    assert again == experiment
    assert again.id == experiment.id


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rouns=3", ["'rouns'", "'rounds'"]),
        ("data.clinets=3", ["'data.clinets'", "'clients'"]),
        ("training.learning_rate=3", ["'training.learning_rate'"]),
        ("wire.uplink.value=3", ["value", "'values'"]),
        ("rounds=many", ["rounds", "'many'", "integer"]),
        ("rounds=0", ["rounds", "greater than or equal to 1"]),
        ("cohort.size=50", ["cohort.size = 50", "data.clients = 20"]),
        ("engine=rya", ["engine", "'inline'", "'ray'"]),
        ("wire.uplink.values=int7", ["'int7'", "float32", "int8"]),
        ("name=../x", ["name", "../x"]),
        ("rounds", ["key=value"]),
        ("rounds.a=3", ["'rounds'", "not a table"]),
        ("rounds=3 # of 30", ["'rounds=3 # of 30'", "behind # would be dropped"]),
        ("data.alpha=[1] #2", ["behind # would be dropped"]),
        ("name='x' #2", ["behind # would be dropped"]),
        ("rounds=3\nseed=5", ["several lines"]),
        ("client.mode='fast", ["begins with a quote"]),
        ('out="runs', ["begins with a quote"]),
        ('client.mode=""fast"', ["begins with a quote"]),
    ],
)
def test_wrong_input_is_one_line_with_what_and_where(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Experiment.load("configs/quickstart.toml", [override])
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("text", "value"), [("a#b", "a#b"), ("it's", "it's"), ("'#'", "#"), (r'"a\"#b"', 'a"#b'), ('"it\'s"', "it's")]
)
def test_a_hash_or_a_quote_inside_of_a_text_stays(text: str, value: str) -> None:
    assert Experiment.from_tree({}, [f"client.mode={text}"]).client.options == {"mode": value}


def test_missing_file_and_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Experiment.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UserError, match="not valid TOML"):
        Experiment.load(tmp_path / "bad.toml")


def test_id_depends_on_what_determines_the_result_only() -> None:
    base = Experiment.load("configs/quickstart.toml")
    assert Experiment.load("configs/quickstart.toml", ["engine=ray", "out=elsewhere", "name=other"]).id == base.id
    assert Experiment.load("configs/quickstart.toml", ["seed=1"]).id != base.id
    assert Experiment.load("configs/quickstart.toml", ["client.target=clients.presets:topk"]).id != base.id


def test_epochs_or_steps_not_both() -> None:
    """An override of the one takes the place of the other in the file; two in one place are refused: one would not count."""
    tree = {"training": {"epochs": 5}, "client": {"target": "clients.presets:fedrep", "head_epochs": 3}}
    changed = Experiment.from_tree(tree, ["training.steps=7", "client.head_steps=2"])
    assert (changed.training.epochs, changed.training.steps) == (1, 7)
    assert changed.client.options == {"head_steps": 2}
    assert Experiment.from_tree(changed.model_dump(mode="json"), ["training.epochs=4"]).training == Training(epochs=4)
    for overrides in (["training.epochs=2", "training.steps=3"], ["training.steps=3", "training.epochs=2"]):
        with pytest.raises(UserError, match=r"training\.epochs = 2 and training\.steps = 3: steps alone would count"):
            Experiment.from_tree(tree, overrides)
    with pytest.raises(UserError, match=r"client\.head_epochs = 3 and client\.head_steps = 2: steps alone would count"):
        fedrep(training=Training(), head_epochs=3, head_steps=2)


def test_override_of_a_client_given_as_a_path() -> None:
    experiment = Experiment.from_tree({"client": "clients.presets:topk"}, ["client.density=0.25"])
    assert experiment.client.options == {"density": 0.25}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("clients.presets:topkk", ["topkk", "'topk'"]),
        ("clients.nowhere:x", ["clients.nowhere"]),
        ("clients.presets", ["module:name"]),
    ],
)
def test_unknown_targets_are_named(target: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Experiment.from_tree({"client": target}).client.build({})
    for word in words:
        assert word in str(caught.value)


def test_unknown_option_of_a_preset_is_named() -> None:
    experiment = Experiment.from_tree({"client": {"target": "clients.presets:topk", "densty": 0.1}})
    with pytest.raises(UserError, match="did you mean 'density'"):
        experiment.client.build({"training": experiment.training})


DEEP = "x = " + "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        "seed = 2020-01-01",
        "[training]\nlr = nan",
        "[data]\nalpha = inf",
        "rounds = 0xfffffffffffffffffff",
        f"rounds = {'9' * 5000}",
        f"rounds = 0x{'f' * 5000}",
        f"name = '{'x' * 100_000}'",
        f"{'x' * 100_000} = 1",
        DEEP,
        f"# {'x' * 1_000_001}",
        "client = { target = 'clients.presets:fedavg', when = 2020-01-01 }",
    ],
    ids=lambda text: text[:30],
)
def test_what_no_config_holds_is_refused_in_a_short_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        Experiment.load(tmp_path / "x.toml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("override", ["seed=2020-01-01", "training.lr=nan", "data.alpha=-inf", f"rounds={'9' * 5000}"])
def test_overrides_too(override: str) -> None:
    with pytest.raises(UserError) as caught:
        Experiment.load("configs/quickstart.toml", [override])
    assert len(str(caught.value)) < 400


def test_a_config_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(UserError, match="more than 1,000,000 bytes"):
        Experiment.load("/dev/zero")
