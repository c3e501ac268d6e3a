"""Models in safetensors files: what `fl-sim run` and `fl-sim prune` leave behind, and any state dict of a known architecture.

    saved = open_saved(Path("runs/quickstart-1a2b3c4d"))       # a run folder, or a file
    teacher = read_model(saved.path)                           # frozen

The metadata of a file of ours holds the keyword arguments of `fl_sim.models.build`, so a teacher may have another
architecture than its student. Nothing is unpickled, and what a file names is built only if it is a model of this package.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fl_sim import models
from fl_sim.core.errors import in_one_line
from fl_sim.core.files import require_place, write_atomically
from fl_sim.core.tensor_file import DTYPES, TensorFile
from fl_sim.core.types import Params, UserError
from fl_sim.data import Data
from fl_sim.data import load as load_data
from fl_sim.gating import Gating
from fl_sim.models.channels import shrink
from fl_sim.models.parameters import COUNTER, FLOATS, constants, load, snapshot

log = logging.getLogger("fl_sim")
FILE = "model.safetensors"
MODEL = "fl_sim.model"
"""The metadata's key: a JSON object, an `Architecture`."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before every name of a state dict: DataParallel, torch.compile, training frameworks."""
MOST_PARAMETERS = 200_000_000
"""Of a model that is built for a file, and a hundred times what the file holds: channels may have been removed."""
NOTHING: Mapping[str, Tensor] = {}
Count = Annotated[int, Field(ge=1, le=1 << 16)]


class Architecture(BaseModel):
    """Arguments of `fl_sim.models.build`, and the gates where there are some; a file may say anything.

    Models of other inputs than images have an `input_shape` instead of channels and size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
    name: str
    num_classes: Count = 10
    in_channels: Count = 3
    image_size: Annotated[int, Field(ge=1, le=1 << 11)] = 32
    width: Annotated[float, Field(gt=0, le=100)] = 1.0
    input_shape: list[Count] | None = None
    vocabulary: Count | None = None
    each_token: bool = False
    gating: dict[str, JsonValue] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0

    @property
    def interface(self) -> models.Interface:
        """What the model takes and answers."""
        shape = tuple(self.input_shape or (self.in_channels, self.image_size, self.image_size))
        return models.Interface(shape, self.num_classes, self.vocabulary, self.each_token)

    def build(self, held: int) -> nn.Module:
        """The model for a file that holds so many numbers.

        Raises:
            UserError: no such model.
            ValueError: it would be far larger than the file.
        """
        asked = self.interface
        if self.name in models.MODELS:
            with torch.device("meta"):
                size = sum(p.numel() for p in models.build_for(self.name, asked, width=self.width).parameters())
            if size > (most := max(MOST_PARAMETERS, 100 * held)):
                raise ValueError(f"a model of {size} parameters for a file of {held}; allowed: {most}")
        model = models.build_for(self.name, asked, width=self.width, seed=self.seed)
        return model if self.gating is None else Gating(**self.gating).wrap(model, seed=0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stored:
    """A file as it is: nothing is built.

    Attributes:
        path: the file.
        params: its entries, those of floating point as float32, counters of batches left out.
        described: what its metadata say of the model; empty where they say nothing.
    """

    path: Path
    params: Params
    described: Mapping[str, object]


@dataclass(frozen=True)
class Saved:
    """A model with its trained parameters, in evaluation mode.

    Attributes:
        model: the model.
        described: the arguments of `fl_sim.models.build` that make it.
        path: the file that holds its parameters.
    """

    model: nn.Module
    described: Mapping[str, object]
    path: Path

    @property
    def interface(self) -> models.Interface:
        """What the model takes and answers."""
        return Architecture.model_validate(dict(self.described)).interface

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its inputs: (channels, height, width) of images."""
        return self.interface.input_shape

    @property
    def tokens(self) -> bool:
        """Whether its inputs are tokens, not numbers."""
        return self.interface.vocabulary is not None

    def require_target(self, path: Path) -> None:
        """Complain of a path for `write` that would replace this model's own file, or that is no file.

        Raises:
            UserError: so it is.
        """
        require_place(path)
        if path.exists() and path.samefile(self.path):
            raise UserError(f"{path}: the model itself, which would be lost; allowed: another file")

    def write(self, model: nn.Module, path: Path) -> Path:
        """Save another model of this architecture. Raises UserError where the path cannot be written."""
        try:
            write_model(path, snapshot(model), self.described, constants(model))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error}") from error
        return path


def described_by(interface: models.Interface) -> dict[str, object]:
    """The keys of an `Architecture` that say what a model takes and answers."""
    outputs = {"num_classes": interface.num_classes}
    if interface.called == "images" and interface == interface.square:
        return {**outputs, "in_channels": interface.input_shape[0], "image_size": interface.input_shape[1]}
    tokens = {} if interface.vocabulary is None else {"vocabulary": interface.vocabulary}
    return {**outputs, "input_shape": list(interface.input_shape), **tokens, "each_token": interface.each_token}


def write_model(
    path: Path, params: Params, described: Mapping[str, object], held: Mapping[str, Tensor] = NOTHING
) -> None:
    """Save parameters with the arguments of `fl_sim.models.build` that make their model.

    Args:
        path: the file.
        params: the entries.
        described: an `Architecture`.
        held: what else the model holds (`fl_sim.models.parameters.constants`), saved in its own dtype. What a file of tensors
            cannot hold is left out: it is built again from the description.

    Raises:
        OSError: the disk is full or not writable; what was at `path` is still there.
    """
    further = {name: value for name, value in held.items() if value.layout == torch.strided and value.dtype in DTYPES}
    write_atomically(path, TensorFile({**params, **further}, {MODEL: json.dumps(dict(described))}))


def require(path: Path) -> Path:
    """The file that a path means: itself, or the model of the run whose folder it is.

    Raises:
        UserError: there is none.
    """
    if path.is_dir() and not (path / FILE).is_file():
        raise UserError(f"{path}: not a finished run; there is no {FILE} in it")
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"model file {str(path)!r}: no such file; allowed: a model.safetensors that `fl-sim run` wrote")
    return file


def content_hash(path: Path) -> str:
    """SHA-256 of a model file, as hexadecimal digits. Raises UserError where there is none."""
    return hashlib.sha256(require(path).read_bytes()).hexdigest()


def read(path: Path) -> Stored:
    """Read a model from a run folder or a safetensors file.

    Raises:
        UserError: no such file, or another kind of file.
    """
    file = require(path)
    try:
        with safe_open(file, framework="pt") as stored:
            told = json.loads((stored.metadata() or {}).get(MODEL, "{}"))
            params = {name: _widened(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a safetensors file: {error}{_conversion(file)}") from error
    described = told if isinstance(told, dict) else {}
    return Stored(file, {name: value for name, value in params.items() if not name.endswith(COUNTER)}, described)


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in FLOATS else value  # integers and float64 stay exact


def _conversion(file: Path) -> str:
    """The end of an error message: how to convert a file that PyTorch pickled; empty for other files."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if file.suffix not in (".pt", ".pth", ".bin", ".ckpt") and start[:2] not in (b"PK", b"\x80\x02"):
        return ""
    steps = f"torch.load({file.name!r}, weights_only=True), then safetensors.torch.save_file(state_dict, 'weights.safetensors')"
    return f"; PyTorch's pickled files are not read. Convert it once: {steps}"


def unwrapped(found: Params, own: Iterable[str], where: str) -> Params:
    """The file's entries without the prefix that a wrapper put before all of them, where the model's names lack it.

    `DataParallel` writes `module.`, `torch.compile` `_orig_mod.`, and training frameworks `model.`; what is left out is said.
    So is a prefix that all names of the model have and the file lacks, as of the model that a wrapper holds.
    """
    names, prefix = set(own), ""
    ours = next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None)
    if ours is not None and not names & set(found) and names & {ours + name for name in found}:
        log.warning("%s: its names are read with the prefix %r of this run's model", where, ours)
        return {ours + name: value for name, value in found.items()}
    while not names & {name.removeprefix(prefix) for name in found}:
        more = next((p for p in PREFIXES if found and all(name.startswith(prefix + p) for name in found)), None)
        if more is None:
            return found
        prefix += more
    if prefix:
        log.warning("%s: its names are read without their prefix %r", where, prefix)
    return {name.removeprefix(prefix): value for name, value in found.items()}


def open_saved(path: Path, *, name: str | None = None, image_size: int | None = None) -> Saved:
    """The model in a run folder or a safetensors file.

    A file of ours says what its model takes. An architecture of the user's own is imported only if `name` asks for it.

    Args:
        path: folder of a finished run, or a file.
        name: the architecture, a model's name or `module:function`; None = the one that the file says.
        image_size: pixels a side; None = what the file says, 32 where it says nothing.

    Raises:
        UserError: no such file, no name for its architecture, or parameters that do not fit it.
    """
    stored = read(path)
    if image_size is not None and stored.described and (name is None or "input_shape" in stored.described):
        raise UserError(
            f"--image-size = {image_size}: {stored.path} says itself what its model takes; allowed: with --model, for images"
        )
    if name is None and not stored.described:
        raise UserError(f"{stored.path}: --model is needed; one of {', '.join(models.MODELS)}, or module:function")
    if name is None:
        return Saved(_filled(_described_model(stored), stored, str(stored.path)), stored.described, stored.path)
    size = {} if image_size is None else {"image_size": image_size}
    told = {**stored.described, "name": name, **size} if stored.described else _guessed(stored, name, image_size or 32)
    return Saved(_filled(_built(stored, told), stored, f"{stored.path} as {name}"), told, stored.path)


def read_model(path: Path) -> nn.Module:
    """The model of a file that says which one it is, on the CPU, frozen in evaluation mode.

    Raises:
        UserError: no such file, not a safetensors file with a description, or parameters that do not fit it.
    """
    stored = read(path)
    return _filled(_described_model(stored), stored, str(stored.path)).requires_grad_(False)


def data_for(saved: Saved, source: str) -> Data:
    """Load a data set whose samples the model takes. Raises UserError if it has others."""
    data, taken = load_data(source), saved.interface
    if (data.vocabulary is None) != (taken.vocabulary is None):
        kinds = ("numbers", "tokens") if data.vocabulary is None else ("tokens", "numbers")
        raise UserError(f"calibration = {source!r}: inputs are {kinds[0]}; the model takes {kinds[1]}")
    if data.shape != taken.input_shape:
        raise UserError(
            f"calibration = {source!r}: {taken.called} of shape {data.shape}; the model takes {taken.input_shape}"
        )
    if (data.vocabulary or 0) > (taken.vocabulary or 0):
        raise UserError(
            f"calibration = {source!r}: a vocabulary of {data.vocabulary} tokens; the model takes {taken.vocabulary}"
        )
    return data


def _described_model(stored: Stored) -> nn.Module:
    """The architecture that the file's metadata name; only those of this package are built."""
    name = stored.described.get("name")
    if isinstance(name, str) and ":" in name:
        raise UserError(
            f"model file {str(stored.path)!r}: its model is {name!r}, code that is imported only when you ask for it: "
            f"add --model {name}"
        )
    if not isinstance(name, str) or name not in models.MODELS:
        raise UserError(f"model file {str(stored.path)!r}: its metadata name no model of this package, but {name!r}")
    return _built(stored, stored.described)


def _built(stored: Stored, described: Mapping[str, object]) -> nn.Module:
    """Build the model of a description, unless it is far larger than the file."""
    held = sum(value.numel() for value in stored.params.values())
    try:
        return Architecture.model_validate(described).build(held)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))} = {first['input']!r:.60}: {first['msg']}"
        raise UserError(f"model file {str(stored.path)!r}: {in_one_line(ValueError(reason))}") from error
    except (TypeError, ValueError, OverflowError, RuntimeError, MemoryError) as error:  # any numbers may stand there
        raise UserError(f"model file {str(stored.path)!r}: {in_one_line(error)}") from error


def _guessed(stored: Stored, name: str, image_size: int) -> dict[str, object]:
    """What a bare state dict's shapes say of its model: channels of the first convolution, outputs of the head.

    Without a convolution the model takes colour images, or grey ones where more parameters fit with those.
    """
    convolution = next((v for v in stored.params.values() if v.dim() == 4), None)
    found: dict[int, tuple[int, int]] = {}  # channels -> (parameters that fit, outputs)
    for channels in (3, 1) if convolution is None else (int(convolution.shape[1]),):
        try:
            built = models.build(name, in_channels=channels, image_size=image_size)
        except UserError as error:  # a model of one's own need not take colours
            refusal = error
            continue
        own = snapshot(built)
        params = unwrapped(dict(stored.params), own, f"--model {name}")
        last = (models.head_names(built) or list(own))[-1]
        if last not in params:
            raise UserError(f"--model {name}: the file has no parameter {last!r}")
        fitting = sum(own[each].shape == params[each].shape for each in own if each in params)
        found[channels] = fitting, int(params[last].shape[0])
    if not found:
        raise refusal
    channels = max(found, key=lambda each: found[each][0])
    return {"name": name, "num_classes": found[channels][1], "in_channels": channels, "image_size": image_size}


def _filled(model: nn.Module, stored: Stored, what: str) -> nn.Module:
    """The model with the file's parameters, in evaluation mode; made small first if channels were removed from it."""
    own = snapshot(model)
    params = unwrapped(stored.params, own, what)
    try:
        if any(name in own and value.shape != own[name].shape for name, value in params.items()):
            shrink(model, {name: value.shape for name, value in params.items()})
        _check_names(snapshot(model), params, constants(model), what)
        return load(model, params).eval()
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def _check_names(expected: Iterable[str], found: Iterable[str], optional: Iterable[str], what: str) -> None:
    lacks, further = set(expected) - set(found), set(found) - set(expected) - set(optional)
    for problem, names in (("lacks", lacks), ("also has", further)):
        if names:
            raise UserError(f"{what}: the file {problem} {', '.join(sorted(names)[:3])}")
