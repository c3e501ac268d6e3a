"""An option of a plain client function reaches its parameter or `task.config`; one that would reach nothing is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from federation import tiny

from fl_sim import ClientContext, Task, UserError, run
from fl_sim.cli import main
from fl_sim.config.target import Target

HERE = __name__


def no_config(task: Task, ctx: ClientContext, lr: float = 0.1) -> object:
    return lr


def reads_mu(task: Task, ctx: ClientContext) -> object:
    return task.config["mu"], task.config.get("power", 2)


def looks_first(task: Task, ctx: ClientContext) -> object:
    return 1 if "warmup" in task.config else 0


def far(task: Task) -> object:
    return task.config["depth"]


def reads_far_away(task: Task, ctx: ClientContext) -> object:
    return [far(task) for _ in range(2)]


def traced(function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)
    def call(*args: object, **options: object) -> object:
        return function(*args, **options)

    return call


@traced
def decorated(task: Task, ctx: ClientContext, *, mu: float = 0.0) -> object:
    return lambda: task.config["inner"]


class Trainer:
    def train(self, task: Task) -> object:
        return task.config["kept"]


TRAINER = Trainer()


def through_an_object(task: Task, ctx: ClientContext) -> object:
    return TRAINER.train(task)


def takes_all(task: Task, ctx: ClientContext, lr: float = 0.1) -> object:
    return {**task.config}


def asks_for_a_list(task: Task, ctx: ClientContext) -> object:
    return [task.config[name] for name in ("alpha", "beta")]


def by_name(task: Task, ctx: ClientContext) -> object:
    return getattr(task, "config")  # noqa: B009 - what a user may write


READ = [
    ("no_config", "lr"),
    ("reads_mu", "mu"),
    ("reads_mu", "power"),
    ("looks_first", "warmup"),
    ("reads_far_away", "depth"),
    ("decorated", "mu"),
    ("decorated", "inner"),
    ("through_an_object", "kept"),
    ("takes_all", "anything"),
    ("takes_all", "lr"),
    ("asks_for_a_list", "beta"),
    ("by_name", "anything"),
]
UNREAD = [
    ("no_config", "lrr", "did you mean 'lr'?"),
    ("no_config", "epochs", "it reads lr"),
    ("reads_mu", "mv", "its code never reads task.config['mv']"),
    ("reads_mu", "pwer", "did you mean 'power'?"),
    ("looks_first", "warm_up", "did you mean 'warmup'?"),
    ("reads_far_away", "dpeth", "did you mean 'depth'?"),
    ("decorated", "iner", "did you mean 'inner'?"),
    ("through_an_object", "epochs", "it reads kept"),
    ("takes_all", "lrr", "did you mean 'lr'?"),
]


@pytest.mark.parametrize(("name", "option"), READ)
def test_an_option_that_something_reads_is_taken(name: str, option: str) -> None:
    assert callable(Target.model_validate({"target": f"{HERE}:{name}", option: 0.5}).build({}))


@pytest.mark.parametrize(("name", "option", "said"), UNREAD)
def test_an_option_that_would_reach_nothing_is_refused(name: str, option: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        Target.model_validate({"target": f"{HERE}:{name}", option: 0.5}).build({})
    assert f"option {option} = 0.5 would reach nothing" in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_doctor_says_how_each_option_arrives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fl-sim", "doctor", f"{HERE}:takes_all", "lr=0.5", "mu=1"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "option lr arrives as its parameter\noption mu arrives as task.config['mu']\n" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["strategy=strategies.presets:layer_adaptive"],
            "'strategies.presets:layer_adaptive' needs strategy.kilobytes",
        ),
        ([f"client={HERE}:needs_two"], f"'{HERE}:needs_two' needs client.mu, client.tau"),
        ([f"client={HERE}:needs_two", "client.lr=0.2"], f"'{HERE}:needs_two' needs client.mu, client.tau"),
        (
            [f"wire.codec.uplink={HERE}:NeedsRank"],
            f"wire.codec.uplink: '{HERE}:NeedsRank' needs wire.codec.uplink.rank",
        ),
    ],
)
def test_an_option_that_is_needed_is_named_by_its_key(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        run(tiny(tmp_path, *overrides))
    assert str(refused.value) == said


def needs_two(*, mu: float, tau: float, lr: float = 0.1) -> object:
    """A preset with options that have no default."""
    return None


class NeedsRank:
    """A codec whose option has no default."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
