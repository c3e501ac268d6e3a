"""A trained model from a file: a safetensors state dict, or the folder of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fl_sim import models
from fl_sim.config import Experiment
from fl_sim.data import Data
from fl_sim.data import load as load_data
from fl_sim.training import COUNTER, load, snapshot
from fl_sim.types import Params, UserError

MODEL, CONFIG = "model.safetensors", "config.toml"


@dataclass(frozen=True)
class Saved:
    """A model with its trained parameters, in evaluation mode.

    Attributes:
        model: the model.
        shape: (channels, height, width) of its images.
        path: the file that holds them.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    path: Path

    def beside(self, what: str) -> Path:
        """A file name for what was made of this model."""
        return self.path.with_name(f"{self.path.stem}-{what}.safetensors".replace(":", "-"))


def open_saved(path: Path, *, name: str | None = None, image_size: int = 32) -> Saved:
    """The model in a run folder, or in a safetensors file whose architecture is `name`.

    Args:
        path: folder of a finished run, or a file.
        name: a model's name or `module:function`; needed for a file, unless a run's config lies beside it.
        image_size: pixels a side; of a file only.

    Raises:
        UserError: no such file, no name for its architecture, or parameters that do not fit it.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / MODEL).is_file():
        raise UserError(f"{path}: not a finished run; there is no {MODEL} in it")
    file = path / MODEL if path.is_dir() else path
    params = _read(file)
    if name is None and (folder / CONFIG).is_file():
        return _of_run(Experiment.load(folder / CONFIG), params, file)
    if name is None:
        raise UserError(f"{path}: --model is needed for a file; one of {', '.join(models.MODELS)}, or module:function")
    channels = next((v.shape[1] for v in params.values() if v.dim() == 4), 3)
    model = models.build(name, in_channels=channels, image_size=image_size, num_classes=_classes(name, params))
    return Saved(_filled(model, params, f"{file} as {name}"), (channels, image_size, image_size), file)


def _of_run(experiment: Experiment, params: Params, file: Path) -> Saved:
    data = load_data(experiment.data.source, validation=experiment.data.validation)
    channels, height, width = data.shape
    model = models.build(
        experiment.model.name,
        num_classes=data.num_classes,
        in_channels=channels,
        image_size=height,
        width=experiment.model.width,
    )
    return Saved(_filled(model, params, f"{file} as {experiment.model.name}"), (channels, height, width), file)


def data_for(saved: Saved, source: str) -> Data:
    """Load a data set whose images the model takes. Raises UserError if it has others."""
    data = load_data(source)
    if data.shape != saved.shape:
        raise UserError(f"calibration = {source!r}: images of shape {data.shape}; the model takes {saved.shape}")
    return data


def write_model(model: nn.Module, path: Path) -> Path:
    """Write a model's parameters as a safetensors state dict. Raises UserError where that is not possible."""
    from safetensors.torch import save_file

    try:
        save_file({name: value.contiguous().clone() for name, value in snapshot(model).items()}, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return path


def _read(path: Path) -> Params:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: Params = load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from error
    return {name: value.float() for name, value in tensors.items() if not name.endswith(COUNTER)}


def _classes(name: str, params: Mapping[str, Tensor]) -> int:
    """The number of outputs: that of the last bias or weight of the architecture, which is the classifier's."""
    last = list(snapshot(models.build(name)))[-1]
    if last not in params:
        raise UserError(f"model = {name!r}: the file has no parameter {last!r}")
    return int(params[last].shape[0])


def _filled(model: nn.Module, params: Params, what: str) -> nn.Module:
    expected = snapshot(model)
    for problem, names in (("lacks", expected.keys() - params.keys()), ("also has", params.keys() - expected.keys())):
        if names:
            raise UserError(f"{what}: the file {problem} {', '.join(sorted(names)[:3])}")
    try:
        return load(model, params).eval()
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
