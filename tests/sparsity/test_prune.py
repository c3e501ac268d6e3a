"""One model pruned without a federation: methods, the table's numbers, files, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import cli_here
from federation import WHOLE, run_tiny
from safetensors.torch import load_file, save_file
from torch import nn

from fl_sim import codecs, count_macs
from fl_sim.core.types import UserError
from fl_sim.models import build, prunable_names
from fl_sim.sparsity.curves import gaussian_calibration
from fl_sim.sparsity.one_model import METHODS, Request, layer_rows, support
from fl_sim.training import snapshot
from fl_sim.training.model_file import open_saved

BY_DENSITY = [name for name in METHODS if name != "batchnorm"]
"""That one removes what training has switched off, whatever density is asked for: tests/test_channels.py."""
IMAGES = gaussian_calibration((1, 8, 8), 4)


def tiny_model() -> nn.Module:
    return build("cnn_bn", in_channels=1, image_size=8, width=0.5)


def bare(model: nn.Module, path: Path) -> Path:
    """A state dict that says nothing about its model."""
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_SIM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", BY_DENSITY)
def test_methods_keep_exactly_what_is_asked_and_leave_the_model_alone(method: str) -> None:
    model = tiny_model()
    before = snapshot(model)
    pruned = METHODS[method](model, Request(0.3, min_keep=5, images=IMAGES))
    after, alive = snapshot(pruned), support(pruned)
    total = sum(before[name].numel() for name in prunable_names(model))
    assert sum(int(m.count_nonzero()) for m in alive.values()) == round(0.3 * total)
    assert min(int(m.count_nonzero()) for m in alive.values()) >= 5
    assert torch.equal(snapshot(model).flat, before.flat)
    for name, value in after.items():
        kept = alive.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value[kept], before[name][kept])


@pytest.mark.parametrize("method", BY_DENSITY)
def test_pruning_again_never_revives_a_weight(method: str) -> None:
    once = METHODS["uniform"](tiny_model(), Request(0.4))
    again = METHODS[method](once, Request(0.2, images=IMAGES))
    first, second = support(once), support(again)
    assert all(not bool((second[name] & ~first[name]).any()) for name in first)
    assert sum(int(m.sum()) for m in second.values()) == round(0.2 * sum(m.numel() for m in first.values()))
    assert torch.equal(snapshot(METHODS[method](again, Request(0.5, images=IMAGES))).flat, snapshot(again).flat)


def test_rows_add_up_and_bytes_are_encoded_bytes() -> None:
    model = tiny_model()
    pruned = METHODS["global"](model, Request(0.1))
    *rows, total = layer_rows(model, pruned, (1, 8, 8))
    assert [row.layer for row in rows] == prunable_names(model)
    assert total.kept == sum(row.kept for row in rows) == round(0.1 * total.weights)
    assert total.macs == count_macs(model, (1, 8, 8))
    assert total.macs_kept == count_macs(model, (1, 8, 8), mask=support(pruned))
    params = snapshot(pruned)
    schema = codecs.Schema.of(params, prunable_names(pruned))
    data = codecs.encode(params, support(pruned), schema=schema)
    assert total.payload_bytes == len(data)
    assert all(row.payload_bytes >= 4 * row.kept for row in rows)
    decoded, _ = codecs.decode(data, schema=schema)
    assert torch.equal(schema.flat(decoded), schema.flat(params))


def test_distortion_method_needs_images() -> None:
    with pytest.raises(UserError, match="calibration images"):
        METHODS["rd"](tiny_model(), Request(0.5))


def test_a_model_survives_its_file(tmp_path: Path) -> None:
    model = build("resnet8", in_channels=2, num_classes=7, seed=3)
    saved = open_saved(bare(model, tmp_path / "m.safetensors"), name="resnet8")
    again = open_saved(saved.write(saved.model, tmp_path / "again.safetensors"))
    for found in (saved, again):
        assert found.shape == (2, 32, 32)
        assert torch.equal(snapshot(found.model).flat, snapshot(model).flat)
    with pytest.raises(UserError, match="cannot be written"):
        saved.write(saved.model, tmp_path / "none" / "m.safetensors")


def test_wrong_files_are_refused_with_one_line(tmp_path: Path) -> None:
    good = snapshot(build("resnet8"))
    save_file({n: v.clone() for n, v in good.items() if n != "conv1.weight"}, tmp_path / "lacks.safetensors")
    save_file({**{n: v.clone() for n, v in good.items()}, "x": torch.ones(1)}, tmp_path / "more.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name, words in {
        "lacks.safetensors": "lacks conv1.weight",
        "more.safetensors": "also has x",
        "text.safetensors": "not a safetensors file",
        "none.safetensors": "no such file",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            open_saved(tmp_path / name, name="resnet8")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--model is needed"):
        open_saved(bare(build("resnet8"), tmp_path / "m.safetensors"))
    with pytest.raises(UserError, match="not a finished run"):
        open_saved(tmp_path)


def test_the_command_on_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_tiny(tmp_path, *WHOLE).folder
    words = ["prune", str(folder), "--method", "rd", "--density", "0.25", "--calibration", "digits", "--levels", "5"]
    status, said = cli_here(monkeypatch, *words), capsys.readouterr()
    assert status == 0, said.err
    assert "test accuracy without retraining" in said.out
    made = load_file(folder / "model-rd-0.25.safetensors")
    alive = sum(int(made[name].count_nonzero()) for name in ("0.weight", "3.weight", "6.weight", "11.weight"))
    assert alive == round(0.25 * 23_824)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "gobal"], "did you mean 'global'"),
        (["--density", "7"], "density = 7"),
        (["--density", "0.1", "--min-keep", "1000000"], "largest feasible sparsity"),
        (["--calibration", "digits"], "the model takes (3, 32, 32)"),
        (["--images", "0", "--method", "rd"], "calibration images = 0"),
        (
            ["--density", "0.5", "--method", "batchnorm"],
            "--density: method 'batchnorm' does not use it; allowed: --threshold",
        ),
        (["--min-keep", "1", "--method", "batchnorm"], "--min-keep: method 'batchnorm' does not use it"),
        (["--threshold", "0.1"], "--threshold: method 'global' does not use it; allowed: --density, --min-keep"),
        (["--levels", "5", "--method", "lamp"], "--levels: method 'lamp' does not use it"),
        (["--images", "5", "--method", "erk"], "--images: method 'erk' does not use it"),
    ],
)
def test_wrong_input_of_the_command_is_one_line(tmp_path: Path, words: list[str], expected: str) -> None:
    from fl_sim.cli.app import parser

    path = bare(build("resnet8"), tmp_path / "m.safetensors")
    with pytest.raises(UserError) as caught:
        parser()(["prune", str(path), "--model", "resnet8", *words], standalone_mode=False)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


AUX = """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes, channels, size):
        super().__init__()
        self.stem = nn.Linear(channels * size * size, 16)
        self.head = nn.Linear(16, classes)
        self.aux = nn.Linear(16, 7)  # a further head, for training alone
    def forward(self, x):
        return self.head(self.stem(x.flatten(1)).relu())
def aux_net(*, num_classes=10, in_channels=1, image_size=8, width=1.0):
    return Net(num_classes, in_channels, image_size)
"""


def test_a_run_of_ones_own_model_is_pruned_by_its_own_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grey images of 8 pixels, and a last parameter that is no classifier: nothing of it can be guessed from shapes."""
    (tmp_path / "own_aux.py").write_text(AUX)
    monkeypatch.syspath_prepend(tmp_path)
    folder = run_tiny(tmp_path, "model.name=own_aux:aux_net", "rounds=1").folder
    with pytest.raises(UserError, match=r"its model is 'own_aux:aux_net'.*add --model own_aux:aux_net") as caught:
        open_saved(folder)
    assert "\n" not in str(caught.value)
    saved = open_saved(folder, name="own_aux:aux_net")
    assert (saved.shape, saved.described["num_classes"]) == ((1, 8, 8), 10)
    trained = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved.model.state_dict()[name], value) for name, value in trained.items())
    again = open_saved(saved.write(saved.model, tmp_path / "again.safetensors"), name="own_aux:aux_net")
    assert again.shape == (1, 8, 8)
    with pytest.raises(UserError, match=r"stem\.weight"):
        open_saved(folder, name="own_aux:aux_net", image_size=16)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_of_a_bare_state_dict_without_a_convolution_are_found(tmp_path: Path, channels: int) -> None:
    model = build("mlp", in_channels=channels, image_size=8, num_classes=4)
    saved = open_saved(bare(model, tmp_path / "m.safetensors"), name="mlp", image_size=8)
    assert (saved.shape, saved.described["num_classes"]) == ((channels, 8, 8), 4)
