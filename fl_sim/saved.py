"""A trained model from a file: the folder of a finished run, a file that a run wrote, or any safetensors state dict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fl_sim import model_file, models
from fl_sim.data import Data
from fl_sim.data import load as load_data
from fl_sim.training import COUNTER, snapshot
from fl_sim.types import Params, UserError

FILE = "model.safetensors"
Described = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Saved:
    """A model with its trained parameters, in evaluation mode.

    Attributes:
        model: the model.
        described: the arguments of `fl_sim.models.build` that make it.
        path: the file that holds its parameters.
    """

    model: nn.Module
    described: Described
    path: Path

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of its images."""
        size = int(self.described["image_size"])
        return int(self.described["in_channels"]), size, size

    def write(self, model: nn.Module, path: Path) -> Path:
        """Save another model of this architecture. Raises UserError where the path cannot be written."""
        try:
            model_file.write_model(path, snapshot(model), self.described)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written: {error}") from error
        return path


def open_saved(path: Path, *, name: str | None = None, image_size: int = 32) -> Saved:
    """The model in a run folder or a safetensors file.

    Args:
        path: folder of a finished run, or a file.
        name: the architecture, a model's name or `module:function`; needed where the file does not say it.
        image_size: pixels a side; only with `name`.

    Raises:
        UserError: no such file, no name for its architecture, or parameters that do not fit it.
    """
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: not a finished run; there is no {FILE} in it")
    params, told = _read(file)
    if name is None and not told:
        raise UserError(f"{file}: --model is needed; one of {', '.join(models.MODELS)}, or module:function")
    if name is None:
        return Saved(model_file.read_model(file), told, file)
    channels = next((v.shape[1] for v in params.values() if v.dim() == 4), 3)
    shape = {"num_classes": _classes(name, params), "in_channels": channels, "image_size": image_size}
    model = _filled(models.build(name, **shape), params, f"{file} as {name}")
    return Saved(model, {"name": name, **shape}, file)


def data_for(saved: Saved, source: str) -> Data:
    """Load a data set whose images the model takes. Raises UserError if it has others."""
    data = load_data(source)
    if data.shape != saved.shape:
        raise UserError(f"calibration = {source!r}: images of shape {data.shape}; the model takes {saved.shape}")
    return data


def _read(file: Path) -> tuple[Params, Described]:
    """(parameters as float32, the description in the file's metadata or an empty one)."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with safe_open(file, framework="pt") as stored:
            told = json.loads((stored.metadata() or {}).get(model_file.MODEL, "{}"))
            params = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error
    return {name: value for name, value in params.items() if not name.endswith(COUNTER)}, told


def _classes(name: str, params: Mapping[str, Tensor]) -> int:
    """The number of outputs: that of the last parameter of the architecture, which is the classifier's."""
    last = list(snapshot(models.build(name)))[-1]
    if last not in params:
        raise UserError(f"--model {name}: the file has no parameter {last!r}")
    return int(params[last].shape[0])


def _filled(model: nn.Module, params: Params, what: str) -> nn.Module:
    expected = snapshot(model)
    for problem, names in (("lacks", expected.keys() - params.keys()), ("also has", params.keys() - expected.keys())):
        if names:
            raise UserError(f"{what}: the file {problem} {', '.join(sorted(names)[:3])}")
    try:
        return model_file.fill(model, params).eval()
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
