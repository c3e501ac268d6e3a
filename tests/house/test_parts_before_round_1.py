"""A user's part that cannot work is one line before round 1, and an option that nothing would read is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from federation import WHOLE, tiny
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from fl_sim import ClientContext, Experiment, Task, Update, UserError, load, local_sgd, run, snapshot
from fl_sim.cli import main
from fl_sim.core.types import Params
from fl_sim.data import load as load_data
from fl_sim.simulation.federation import Federation
from fl_sim.simulation.parts import check, check_built
from strategies.server_step import ServerState

HERE = __name__
SEEN: list[object] = []


def client(task: Task, ctx: ClientContext, lr: float = 0.05, *, layers: tuple[int, ...] = ()) -> Update:
    SEEN.append((lr, layers, task.config.get("lr")))
    model = load(ctx.model, task.params)
    local_sgd(model, ctx.data, lr=lr, mask=task.mask, rng=ctx.rng)
    return Update(snapshot(model), ctx.num_examples, task.mask)


class WithRate:
    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, task: Task, ctx: ClientContext) -> Update:
        return client(task, ctx, self.lr)


class Uncallable:
    pass


def decorated(**kwargs: object) -> None:
    """What a decorator without `*args` leaves."""


def wrapped(*args: object, **kwargs: object) -> Update:
    return client(*args, **kwargs)  # type: ignore[arg-type]


def only_task(task: Task) -> None: ...


def one_argument(updates: object) -> None: ...


def as_numpy(state: object, updates: object) -> object:
    return {name: value.numpy() for name, value in state.params.items()}  # type: ignore[attr-defined]


def stranger(state: object, updates: object) -> object:
    return {**state.params, "nobody": torch.ones(1)}  # type: ignore[attr-defined]


def raises(state: object, updates: object) -> object:
    return {name: update.weights for update in updates for name in "ab"}  # type: ignore[attr-defined]


def only_params(params: object) -> None: ...


def first_name_only(round: int, mask: object, params: dict[str, torch.Tensor], grads: object) -> object:
    return {name: torch.ones_like(value, dtype=torch.bool) for name, value in list(params.items())[:1]}


def divides(round: int, mask: object, params: object, grads: object) -> object:
    return round / 0


def no_names(round: int, mask: object, params: dict[str, torch.Tensor], grads: object) -> object:
    return {}


def only_scores(scores: object) -> None: ...


def floats(scores: dict[str, torch.Tensor], density: float, *, min_keep: int) -> dict[str, float]:
    return {name: density * score.numel() for name, score in scores.items()}


def too_many(scores: dict[str, torch.Tensor], density: float, *, min_keep: int) -> dict[str, int]:
    return {name: score.numel() + 1 for name, score in scores.items()}


def expanded(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))
    model[1].bias = nn.Parameter(torch.zeros(1).expand(num_classes))
    return model


def oblong() -> object:
    from fl_sim.data import Data

    images, labels = torch.zeros(80, 1, 8, 12, dtype=torch.uint8).numpy(), (torch.arange(80) % 2).numpy()
    return Data.of(images, labels, test_inputs=images, test_targets=labels, num_classes=2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"client={HERE}:decorated"], "too many positional arguments; it is called with (task, ctx)"),
        ([f"client={HERE}:only_task"], "it is called with (task, ctx) and takes (task: 'Task')"),
        ([f"client={HERE}:Uncallable"], "made a Uncallable, which cannot be called with (task, ctx)"),
        ([f"client={HERE}:WithRate"], "needs client.lr"),
        ([f"client.target={HERE}:WithRate", "client.rate=0.1"], "has no option 'rate'"),
        ([f"client.target={HERE}:client", "client.sizes=[1,2]"], "give the function a parameter 'sizes'"),
        ([f"client.target={HERE}:client", "client.a.b=1"], "option a = {'b': 1}: only numbers and texts"),
        ([f"client.target={HERE}:client", "client.lr=fast"], "lr = 'fast': input should be a valid number"),
        ([f"strategy.aggregate={HERE}:one_argument"], "is called with (state, updates) and takes (updates: 'object')"),
        ([f"strategy.mask_rule={HERE}:only_params"], "is called with (round, mask, params, grads) and takes (params"),
        (
            ["strategy.target=strategies.presets:global_magnitude", f"strategy.allocate={HERE}:only_scores"],
            "is called with (scores, density, min_keep=0) and takes (scores",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_is_loaded(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        check(tiny(tmp_path, *overrides))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"strategy.aggregate={HERE}:as_numpy"], "as ndarray; needed: torch tensors"),
        ([f"strategy.aggregate={HERE}:stranger"], "returned names that the model lacks: nobody"),
        ([f"strategy.aggregate={HERE}:raises"], "on two updates of the first model it raised AttributeError"),
        (
            ["strategy.target=strategies.presets:global_magnitude", f"strategy.allocate={HERE}:floats"],
            "(float); needed: an integer from 0 to",
        ),
        (
            ["strategy.target=strategies.presets:gradual_magnitude", f"strategy.allocate={HERE}:too_many"],
            "(int); needed: an integer from 0 to",
        ),
        ([f"strategy.mask_rule={HERE}:first_name_only"], "the mask rule returned no mask of '3.weight'"),
        ([f"strategy.mask_rule={HERE}:divides"], "on the first model it raised ZeroDivisionError: division by zero ("),
        ([f"strategy.mask_rule={HERE}:no_names"], "the mask rule returned no mask of '0.weight'"),
        ([f"model.name={HERE}:expanded"], "'1.bias' is expanded: several of its values are one place in memory"),
        ([f"data.source={HERE}:oblong", "model.name=cnn"], "it was built for 8 x 8 pixels: images must be square"),
        ([f"data.source={HERE}:oblong", "model.name=cnn"], "on images of shape (2, 1, 8, 12) it raised"),
        (
            ["client=clients.presets:feature_distillation", "model.name=resnet8", 'capacities=[{name="mlp"}]'],
            "has no layer1",
        ),
        (["client=clients.presets:feature_distillation", "model.name=mlp"], "has no layer1, layer2"),
        (
            ["client.target=clients.presets:feature_distillation", "client.stages=['x']", "model.name=resnet8"],
            "stages: no submodule 'x'",
        ),
        (
            ["client.target=clients.presets:feature_distillation", "client.stages=['1']", "model.name=mlp"],
            "stages: '1' gives (1, 64); needed: (N, channels, height, width)",
        ),
    ],
)
def test_what_does_not_fit_the_model_or_the_data_is_refused_before_round_1(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        run(tiny(tmp_path, *overrides))
    assert said in str(refused.value)
    assert not list(tmp_path.glob("*/rounds.jsonl"))


def test_options_of_a_function_are_its_keyword_arguments(tmp_path: Path) -> None:
    SEEN.clear()
    options = [f"client.target={HERE}:client", "client.lr=0.5", "client.layers=[1, 2]", "rounds=1"]
    run(tiny(tmp_path, *options))
    assert set(map(str, SEEN)) == {"(0.5, [1, 2], 0.5)"}
    SEEN.clear()
    run(tiny(tmp_path, f"client.target={HERE}:WithRate", "client.lr=0.25", "rounds=1"))
    assert {seen[0] for seen in SEEN} == {0.25}  # type: ignore[index]
    check(tiny(tmp_path, f"client={HERE}:wrapped"))


def test_the_checks_leave_the_model_and_the_generator_as_they_were(tmp_path: Path) -> None:
    federation = Federation.build(tiny(tmp_path))
    before, drawn = snapshot(federation.first.model), torch.get_rng_state()
    check_built(federation)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(federation.first.model).items())
    assert all(module.training for module in federation.first.model.modules())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_split_is_a_map_style_dataset() -> None:
    split = load_data("digits").train.subset(torch.arange(3, 40, 2).numpy())
    images, labels = next(split.batches(len(split)))
    got, said = next(iter(DataLoader(split, batch_size=len(split))))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, images)
    assert torch.equal(said, labels)
    assert [label for _, label in split] == labels.tolist()
    with pytest.raises(IndexError):
        split[len(split)]


@pytest.mark.parametrize("text", ["nan", "2024", "true", "1e5", "[1]"])
def test_text_needs_no_toml_quotes(text: str) -> None:
    experiment = Experiment.from_tree({}, [f"out={text}", f"data.source={text}", "rounds=3"])
    assert (experiment.out, experiment.data.source, experiment.rounds) == (text, text, 3)
    assert Experiment.from_tree({}, [f'out="{text}"']).out == text


def test_a_value_where_a_table_stands_is_said() -> None:
    with pytest.raises(UserError, match=r"model = 'resnet8': is a table with keys name, .*; write model.name=resnet8"):
        Experiment.from_tree({}, ["model=resnet8"])
    with pytest.raises(UserError, match=r"training = 3: is a table with keys .*; write training\.\w+=\.\.\."):
        Experiment.from_tree({}, ["training=3"])
    with pytest.raises(UserError, match="strategy = 5: is an import path, module:name"):
        Experiment.from_tree({}, ["strategy=5"])
    assert Experiment.from_tree({}, ["client=clients.presets:fedprox"]).client.target == "clients.presets:fedprox"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_read_over(tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Federation.build(tiny(tmp_path, *WHOLE)).first.model
    save_file({prefix + name: value + 1 for name, value in snapshot(model).items()}, tmp_path / "w.safetensors")
    start = Federation.build(tiny(tmp_path, f"model.weights={tmp_path / 'w.safetensors'}")).first.start
    assert all(torch.equal(start[name], value + 1) for name, value in snapshot(model).items())
    assert f"read without their prefix {prefix!r}" in caplog.text


def test_a_pickled_file_is_told_how_to_convert(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"pickled files are not read. Convert it once: torch.load"):
        Federation.build(tiny(tmp_path, f"model.weights={tmp_path / 'w.pth'}"))


def test_a_clients_error_is_short_said_once_and_names_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad_client.py").write_text("def f(task, ctx):\n    raise ValueError('x' * 100_000)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "t.toml").write_text("[data]\nclients = 6\n[cohort]\nsize = 5\n")
    monkeypatch.setattr(
        "sys.argv", ["fl-sim", "run", str(tmp_path / "t.toml"), "client=bad_client:f", f"out={tmp_path}"]
    )
    monkeypatch.setattr("logging.root.handlers", [])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "(bad_client.py, line 2)" in said
    assert "4 more like it" in said
    assert len(said) < 1500


def test_the_version_and_the_help_of_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in ((["--version"], "fl-sim 0.1"), (["sweep", "--help"], "A config with a [study]")):
        monkeypatch.setattr("sys.argv", ["fl-sim", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out


def by_loss(state: ServerState, updates: Iterable[Update]) -> Params:
    """A mean in which a client counts by its loss."""
    read = [(update.metrics["loss"], update.params) for update in updates]
    whole = sum(loss for loss, _ in read)
    return {n: sum(loss / whole * p[n] for loss, p in read) for n in state.params}  # type: ignore[misc]


def test_a_rule_that_reads_what_clients_report_is_tried_with_metrics(tmp_path: Path) -> None:
    report = run(tiny(tmp_path, f"strategy.aggregate={HERE}:by_loss", "rounds=1"))
    assert report.summary["rounds"] == 1
