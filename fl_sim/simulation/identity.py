"""Identity of a run beside its config: the code of the user's parts, and the data. Kept as `identity.json` in its folder.

The config, and the content of given weights, name the folder. Two runs of one config are the same run only where their
code and data are the same too.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fl_sim.config.experiment import Experiment
from fl_sim.core.files import read_plain
from fl_sim.core.process_state import seeded
from fl_sim.core.threads import one_thread
from fl_sim.core.types import UserError
from fl_sim.data import Data
from fl_sim.data import load as load_data
from fl_sim.simulation.user_code import code_of, own_code
from fl_sim.training.tasks import learning_task

IDENTITY = "identity.json"
MOST = 1 << 30
"""Bytes of images up to which all are hashed; of more, evenly spaced images."""
BLOCK = 1 << 24
"""Bytes hashed at once."""
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Identity(BaseModel):
    """Hashes of everything that determines a run's results and is not in its config.

    Attributes:
        code: config key of a part -> file -> hash (`user_code.code_of`).
        data: hash of images, labels and splits.
        test: hashes of the test samples alone, by `test_hashes`, by which runs are compared; empty in older folders.
        versions: of fl-sim, Python, PyTorch and NumPy. Others may change the last bits, so a difference is only said.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["fl_sim.identity/1"] = "fl_sim.identity/1"
    code: dict[str, dict[str, str]]
    data: str
    test: dict[str, str] = {}
    versions: dict[str, str]

    @classmethod
    def of(cls, code: dict[str, dict[str, str]], data: str, test: dict[str, str] | None = None) -> Identity:
        """The identity of an experiment now, from `code_of_parts` of it and the hashes of its data and test samples."""
        versions = {
            "fl-sim": f"{version('fl-sim')} (code {own_code()})",
            "Python": platform.python_version(),
            "PyTorch": torch.__version__,
            "NumPy": np.__version__,
        }
        return cls(code=code, data=data, test=test or {}, versions=versions)

    def changes(self, now: Identity, source: str) -> list[str]:
        """List what differs now, in the config's words; `source` is the config's `data.source`."""
        changed = []
        for key in sorted(self.code.keys() | now.code.keys()):
            before, after = self.code.get(key, {}), now.code.get(key, {})
            files = sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
            if files:
                changed.append(f"the code of {key} ({', '.join(files)})")
        return changed + ([f"the data (data.source = {source!r})"] if self.data != now.data else [])

    def other_versions(self, now: Identity) -> str:
        """List the packages whose versions differ, as `PyTorch 2.5.0, now 2.6.0`; empty where none does."""
        names = [name for name in now.versions if self.versions.get(name) != now.versions[name]]
        return "; ".join(f"{name} {self.versions.get(name, 'unknown')}, now {now.versions[name]}" for name in names)


def code_of_parts(experiment: Experiment) -> dict[str, dict[str, str]]:
    """Config key -> file -> hash, for every part of the user's that an experiment names."""
    parts = {key: dict(code_of(target)) for key, target in parts_of(experiment)}
    return {key: code for key, code in parts.items() if code}


def parts_of(experiment: Experiment) -> list[tuple[str, str]]:
    """(config key, import path) of every part that an experiment names."""
    return list(_targets(experiment.model_dump(mode="json")))


def recorded(folder: Path) -> Identity | None:
    """The identity that a run folder keeps; None where it keeps none.

    Raises:
        UserError: it is damaged.
    """
    try:
        return Identity.model_validate_json(read_plain(folder / IDENTITY))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise UserError(f"{folder / IDENTITY}: damaged: {reason}") from error


def hash_of_source(experiment: Experiment) -> str:
    """Load the data of an experiment and hash them.

    Raises:
        UserError: they cannot be loaded.
    """
    return hash_of(load_data_of(experiment, quiet=True))


@one_thread()
def load_data_of(experiment: Experiment, *, quiet: bool) -> Data:
    """Load the data of an experiment; a source of the user's draws and sums the same in every process.

    Raises:
        UserError: they cannot be loaded.
    """
    section = experiment.data
    with seeded(0):
        data = load_data(
            section.source,
            validation=section.validation,
            proxy=section.proxy,
            quiet=quiet,
            columns=section.columns,
            targets=learning_task(experiment.task).targets,
        )
    return data if section.class_weights is None else data.with_class_weights(section.class_weights)


def hash_of(data: Data) -> str:
    """Hash images (all of them up to `MOST` bytes), labels and splits."""
    digest, stored = xxhash.xxh3_128(str(data.num_classes).encode()), set[int]()
    if data.vocabulary is not None or data.groups:
        digest.update(str((data.vocabulary, data.groups)).encode())
    for split in (data.train, data.validation, data.test, data.proxy):
        if split is None:
            digest.update(b"none")
            continue
        own = (split.labels, split.mean, split.std, split.positions)
        for tensor in (*own, *(each for each in (split.groups, split.weights) if each is not None)):
            _update(digest, tensor)
        if split.stored.data_ptr() not in stored:
            _update(digest, split.stored)
            stored.add(split.stored.data_ptr())
    return digest.hexdigest()


def test_hashes(data: Data) -> dict[str, str]:
    """Hashes of the test samples in their order: `targets`, and `inputs` as stored (of up to `MOST` bytes)."""
    split, found = data.test, {"targets": xxhash.xxh3_128(), "inputs": xxhash.xxh3_128()}
    _update(found["targets"], split.labels)
    row = split.stored[:1].nbytes
    for start in range(0, len(split), rows := max(1, BLOCK // max(1, row))):
        if start * row >= MOST:
            break
        places = slice(start, min(start + rows, len(split)))
        _update(found["inputs"], split.stored[places if split.positions is None else split.positions[places]])
    return {name: digest.hexdigest() for name, digest in found.items()}


def _update(digest: xxhash.xxh3_128, tensor: Tensor | None) -> None:
    if tensor is None:
        digest.update(b"none")
        return
    array: NDArray[np.generic] = tensor.detach().cpu().numpy()
    digest.update(f"{array.dtype} {array.shape}".encode())
    if not array.nbytes:
        return
    row = array.nbytes // len(array)
    taken = array[:: -(-array.nbytes // MOST)]
    rows = max(1, BLOCK // max(1, row))
    for start in range(0, len(taken), rows):
        digest.update(np.ascontiguousarray(taken[start : start + rows]).data)


def _targets(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, str]]:
    """(config key, import path) of every part that a config names; a `target` has the key of its table."""
    for key, value in tree.items():
        here = path.removesuffix(".") if key == "target" and path else path + key
        values = value if isinstance(value, (list, tuple)) else [value]
        for number, each in enumerate(values):
            place = f"{here}[{number}]" if isinstance(value, (list, tuple)) else here
            if isinstance(each, Mapping):
                yield from _targets(each, f"{place}.")
            elif isinstance(each, str) and IMPORT_PATH.fullmatch(each):
                yield place, each
