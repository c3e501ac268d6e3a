"""Data sources: scikit-learn's digits and tables, torchvision, image and parquet folders, tables, or a user's own function.

data = load("digits")          # data.train, data.validation, data.test, data.num_classes
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import UserError
from fl_sim.data.arrays import Labels, Numbered
from fl_sim.data.cache import Arrays, folder
from fl_sim.data.dataset import Data
from fl_sim.data.kinds import Targets
from fl_sim.data.layouts import FILES, KEY_OF, layout_of
from fl_sim.data.own import load_own
from fl_sim.data.pictures import Images
from fl_sim.data.remarks import remarks
from fl_sim.data.sampling import TEST, with_test
from fl_sim.data.table import Columns
from fl_sim.data.text import CONTEXT, TEXTS, characters, read_text

log = logging.getLogger("fl_sim")


@cache
def _sklearn(file: str, *, delimiter: str = ",", header: int = 0) -> NDArray[np.float64]:
    """A table that ships with scikit-learn. Read once a process: parsing the text takes 10 ms."""
    # The file alone: importing scikit-learn takes a second.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UserError(f"data.source: {file} needs scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / file
    return np.loadtxt(path, delimiter=delimiter, skiprows=header)


def _breast_cancer(name: str) -> Arrays:
    """569 tumours, 30 measures of their cells, 2 classes (Wolberg, Street and Mangasarian, 1995); ships with scikit-learn."""
    table = _sklearn("breast_cancer.csv", header=1)
    return {"inputs": table[:, :-1].astype(np.float32), "targets": table[:, -1].astype(np.int64)}


def _wine(name: str) -> Arrays:
    """178 wines, 13 measures, 3 growers as classes (Forina et al., 1988); ships with scikit-learn."""
    table = _sklearn("wine_data.csv", header=1)
    return {"inputs": table[:, :-1].astype(np.float32), "targets": table[:, -1].astype(np.int64)}


def _diabetes(name: str) -> Arrays:
    """442 patients, 10 measures, progression after a year as a number (Efron et al., 2004); ships with scikit-learn."""
    inputs = _sklearn("diabetes_data_raw.csv.gz", delimiter=" ").astype(np.float32)
    return {"inputs": inputs, "targets": _sklearn("diabetes_target.csv.gz").astype(np.float32)}


def _digits(name: str) -> Arrays:
    """scikit-learn's 1,797 grey 8x8 digits (Alpaydin and Kaynak, 1998); ships with the package."""
    table = _sklearn("digits.csv.gz")
    images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = table[:, -1].astype(np.int64)
    order = numpy_generator(0, Purpose.DATA).permutation(len(labels))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return _arrays(images[train], labels[train], images[test], labels[test])


def _torchvision(dataset: str) -> Callable[[str], Arrays]:
    def source(name: str) -> Arrays:
        import torchvision

        made = getattr(torchvision.datasets, dataset)
        root = folder() / "torchvision"
        parts = ({"split": "train"}, {"split": "test"}) if dataset == "SVHN" else ({"train": True}, {"train": False})
        try:
            sets = [made(root, download=True, **part) for part in parts]
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"data.source = {name!r}: torchvision could not download it ({type(error).__name__}); give a folder"
            ) from error
        read: list[NDArray[np.generic]] = []
        for loaded in sets:
            images = np.asarray(loaded.data, dtype=np.uint8)
            if dataset != "SVHN":
                images = images[:, None] if images.ndim == 3 else np.moveaxis(images, 3, 1)
            labels = loaded.labels if dataset == "SVHN" else loaded.targets
            read += [np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)]
        return dict(zip(("images", "labels", "test_images", "test_labels"), read, strict=True))

    source.__doc__ = f"torchvision's {dataset}; downloaded where there is a network."
    return source


def _arrays(images: Images, labels: Labels, test_images: Images, test_labels: Labels) -> Arrays:
    return {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}


ARRAYS: Mapping[str, Callable[[str], Arrays]] = {
    "digits": _digits,
    "cifar10": _torchvision("CIFAR10"),
    "cifar100": _torchvision("CIFAR100"),
    "mnist": _torchvision("MNIST"),
    "fashionmnist": _torchvision("FashionMNIST"),
    "svhn": _torchvision("SVHN"),
    "breast_cancer": _breast_cancer,
    "wine": _wine,
    "diabetes": _diabetes,
}
"""Images and tables by name -> what reads them."""
SOURCES: Mapping[str, object] = {**ARRAYS, **TEXTS}
"""Every source by name -> what reads it, or what it is."""


def load(
    name_or_path: str,
    *,
    validation: float = 0.1,
    proxy: float = 0.0,
    quiet: bool = False,
    columns: Columns | None = None,
    targets: Targets = Targets.CLASSES,
) -> Data:
    """Load a data set by name, by path, or by `module:function` (a function that returns `Data`).

    What is not read or may not be meant is logged, one line each, as warnings of the logger `fl_sim`.

    Args:
        name_or_path: a name of `SOURCES`, a parquet folder or an image folder, a table, or an import path.
        validation: share of the training set held out, stratified.
        proxy: share of the training set that the server holds.
        quiet: log nothing, where another process or an earlier call has.
        columns: what is read of a table.
        targets: kind of targets that a table's target columns are read as.

    Raises:
        UserError: no such source, or files or data that are not what they should be.
    """
    columns = columns or Columns()
    path, notes = _expanded(name_or_path), list[str]()
    where = f"data.source = {name_or_path!r}"
    embedded = name_or_path in SOURCES and not path.is_dir()
    try:
        layout = None if embedded else layout_of(path, columns)
        if layout is None and not embedded and (path.exists() or ":" not in name_or_path):
            raise _no_source(where, path)
        may: Collection[str] = layout.keys if layout is not None else ()
        if embedded:
            may = ("data.context",) if name_or_path in TEXTS else ("data.test",)
        if wrong := [key for key in columns.asked if key not in may]:
            kind = KEY_OF.get(wrong[0], "tables (CSV or parquet files)")
            raise UserError(f"{wrong[0]} is for {kind}; {where} is none")
        if layout is not None:
            arrays, notes = layout.read(path, columns, targets)
            notes = ["the folder of this name is read, not the data set"] * (name_or_path in SOURCES) + notes
        elif embedded and name_or_path in TEXTS:
            arrays, notes = read_text(name_or_path, columns.context or CONTEXT)
            arrays = {**arrays, "vocabulary": np.array(len(characters(name_or_path)))}
        elif embedded:
            arrays = ARRAYS[name_or_path](name_or_path)
        else:
            arrays = {}
    except OSError as error:
        raise UserError(f"{where}: {error}") from error
    if arrays:
        if path.is_dir() and not {"test_images", "test_inputs"} & arrays.keys():
            share = TEST if columns.test is None else columns.test
            notes.append(f"no test files: {share:g} of the samples test (data.test)")
        data, said = _split(name_or_path, arrays, columns.test, validation, proxy)
        notes += said
    else:
        data, notes = load_own(name_or_path, validation=validation, proxy=proxy)
    if not quiet:
        for note in (*notes, *remarks(data)):
            log.warning("data.source = %r: %s", name_or_path, note)
    return data


def _no_source(where: str, path: Path) -> UserError:
    there = "is a file, not a folder or a table" if path.exists() else "no such folder or file"
    return UserError(f"{where}: {there}; allowed: a folder, a file {', '.join(FILES)}, or one of {', '.join(SOURCES)}")


def _expanded(path: str) -> Path:
    """The path with the user's home folder for `~`; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _split(name: str, arrays: Arrays, test: float | None, validation: float, proxy: float) -> tuple[Data, list[str]]:
    """Data of the arrays of a source, and notes on what became of them. Numbers are normalised, targets too."""
    named = {NAMES.get(key, key): array for key, array in arrays.items()}
    vocabulary = int(known) if (known := named.pop("vocabulary", None)) is not None else None
    names = named.pop("group_names", None)
    notes = list[str]()
    if vocabulary is None and named["inputs"].dtype.kind in "iu" and named["inputs"].dtype != np.uint8:
        vocabulary = 1 + max(int(named[key].max()) for key in named if key.removeprefix("test_") == "inputs")
        notes.append(f"integer inputs are taken for tokens, {vocabulary} of them; a table of numbers is floating-point")
    parts = cast("Arrays", with_test(named, test))  # inputs of a large file are rows of it, which `Data.of` takes
    if np.issubdtype(parts["targets"].dtype, np.floating):
        notes += _standardise(parts)
    elif vocabulary is None and parts["targets"].dtype.kind in "iu":
        last, last_tested = int(parts["targets"].max()), int(parts["test_targets"].max())
        if last_tested > last:
            raise UserError(
                f"data.source = {name!r}: test samples of class {last_tested}, training samples up to {last}"
            )
    numbers = np.issubdtype(named["inputs"].dtype, np.floating)
    data = Data.of(
        parts["inputs"],
        parts["targets"],
        test_inputs=parts["test_inputs"],
        test_targets=parts["test_targets"],
        groups=_groups(parts.get("groups"), names),
        test_groups=_groups(parts.get("test_groups"), names),
        weights=parts.get("weights"),
        vocabulary=vocabulary,
        standardise=numbers,
        validation=validation,
        proxy=proxy,
    )
    return data, notes


def _groups(groups: NDArray[np.generic] | None, names: NDArray[np.generic] | None) -> object:
    """Groups as `Data.of` takes them: what names them, or numbers with their names."""
    if groups is None or names is None:
        return groups
    return Numbered(cast(Labels, groups), tuple(map(str, names)))


NAMES = {"images": "inputs", "labels": "targets", "test_images": "test_inputs", "test_labels": "test_targets"}
"""Arrays of image sources -> those of all sources."""


def _standardise(parts: Arrays) -> list[str]:
    """Give the targets mean 0 and deviation 1, in place in `parts`, as the training set has them; says so."""
    targets = parts["targets"].astype(np.float64)
    same = targets.min(axis=0) == targets.max(axis=0)
    mean, std = np.where(same, targets[0], targets.mean(axis=0)), np.where(same, 1.0, targets.std(axis=0))
    for name in ("targets", "test_targets"):
        parts[name] = ((parts[name] - mean) / std).astype(np.float32)
    told = [", ".join(f"{one:g}" for one in np.atleast_1d(value)[:5]) for value in (mean, std)]
    return [f"targets are standardised: mean {told[0]}, deviation {told[1]}; errors are in deviations"]
