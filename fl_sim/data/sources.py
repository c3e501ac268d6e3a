"""Data sources: scikit-learn's digits, torchvision, parquet folders, image folders, or a user's own function.

data = load("digits")          # data.train, data.validation, data.test, data.num_classes
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import UserError
from fl_sim.data.cache import Arrays, folder
from fl_sim.data.dataset import Data, Labels
from fl_sim.data.image_folder import read_image_folder
from fl_sim.data.images import Images
from fl_sim.data.own import load_own
from fl_sim.data.parquet_folder import read_parquet_folder
from fl_sim.data.remarks import remarks

log = logging.getLogger("fl_sim")


@cache
def _digits_table() -> NDArray[np.float64]:
    """One row a digit: 64 pixels of 0 to 16, and the label. Read once a process: parsing the text takes 10 ms."""
    # The file alone: importing scikit-learn takes a second.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UserError("data.source = 'digits' needs scikit-learn")
    return np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")


def _digits(name: str) -> Arrays:
    """scikit-learn's 1,797 grey 8x8 digits (Alpaydin and Kaynak, 1998); ships with the package."""
    table = _digits_table()
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


SOURCES: Mapping[str, Callable[[str], Arrays]] = {
    "digits": _digits,
    "cifar10": _torchvision("CIFAR10"),
    "cifar100": _torchvision("CIFAR100"),
    "mnist": _torchvision("MNIST"),
    "fashionmnist": _torchvision("FashionMNIST"),
    "svhn": _torchvision("SVHN"),
}


def load(name_or_path: str, *, validation: float = 0.1, proxy: float = 0.0, quiet: bool = False) -> Data:
    """Load a data set by name, by folder, or by `module:function` (a function that returns `Data`).

    What is not read or may not be meant is logged, one line each, as warnings of the logger `fl_sim`.

    Args:
        name_or_path: a name of `SOURCES`, a parquet folder, an image folder, or an import path.
        validation: share of the training set held out, stratified.
        proxy: share of the training set that the server holds.
        quiet: log nothing, where another process or an earlier call has.

    Raises:
        UserError: no such source, or files or data that are not what they should be.
    """
    path, notes = _expanded(name_or_path), list[str]()
    if path.is_dir():
        try:
            arrays, notes = (read_image_folder if (path / "train").is_dir() else read_parquet_folder)(path)
        except OSError as error:
            raise UserError(f"data.source = {name_or_path!r}: {error}") from error
        data = _split(name_or_path, arrays, validation, proxy)
        if name_or_path in SOURCES:
            notes = ["the folder of this name is read, not the data set", *notes]
    elif name_or_path in SOURCES:
        data = _split(name_or_path, SOURCES[name_or_path](name_or_path), validation, proxy)
    elif ":" in name_or_path and not path.exists():
        data, notes = load_own(name_or_path, validation=validation, proxy=proxy)
    else:
        known = ", ".join(SOURCES)
        there = "is a file, not a folder; allowed: a folder" if path.exists() else "no such folder"
        raise UserError(f"data.source = {name_or_path!r}: {there}, and not one of {known}")
    if not quiet:
        for note in (*notes, *remarks(data)):
            log.warning("data.source = %r: %s", name_or_path, note)
    return data


def _expanded(path: str) -> Path:
    """The path with the user's home folder for `~`; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _split(name: str, arrays: Arrays, validation: float, proxy: float) -> Data:
    labels, test_labels = arrays["labels"].view(np.int64), arrays["test_labels"].view(np.int64)
    last, last_tested = int(labels.max()), int(test_labels.max())
    if last_tested > last:
        raise UserError(f"data.source = {name!r}: test samples of class {last_tested}, training samples up to {last}")
    return Data.of(
        arrays["images"].view(np.uint8),
        labels,
        test_images=arrays["test_images"].view(np.uint8),
        test_labels=test_labels,
        num_classes=last + 1,
        validation=validation,
        proxy=proxy,
    )
