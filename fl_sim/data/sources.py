"""Where images come from: scikit-learn's digits, parquet folders, image folders, torchvision; and the one split.

data = load("digits")          # data.train, data.validation, data.test, data.num_classes
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fl_sim.core.lookup import accepts, imported
from fl_sim.core.parquet import read_table
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import UserError
from fl_sim.data.cache import Arrays, cached, content_key, folder
from fl_sim.data.images import Images, decode
from fl_sim.data.split import Split

if TYPE_CHECKING:
    import pyarrow as pa

Labels = NDArray[np.int64]
MOST_CLASSES = 1 << 16
"""A label above is a damaged file, not a class: models have an output for each."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm")


@dataclass(frozen=True)
class Data:
    """One data set, split once. The validation set may choose; the test set is only measured on.

    Attributes:
        proxy: a part of the training set held by the server, disjoint from all others; None unless asked for.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int
    proxy: Split | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.shape
        return channels, height, width

    @classmethod
    def of(
        cls,
        images: Images,
        labels: Labels,
        *,
        test_images: Images,
        test_labels: Labels,
        num_classes: int,
        validation: float = 0.1,
        proxy: float = 0.0,
    ) -> Data:
        """Split training images (N, C, H, W) into train, validation and proxy, stratified by label; seed 0 always.

        Raises:
            UserError: images that are not uint8 (N, C, H, W), or labels that are not one class for each.
        """
        _whole_numbers(images, labels, num_classes, "")
        _whole_numbers(test_images, test_labels, num_classes, "test_")
        rng = numpy_generator(0, Purpose.DATA)
        held, server, rest = [], [], []
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            first, second = round(validation * len(members)), round((validation + proxy) * len(members))
            held.append(members[:first])
            server.append(members[first:second])
            rest.append(members[second:])
        chosen = [np.sort(np.concatenate(part)) for part in (rest, held, server)]
        # Decoded images are memory-mapped copy-on-write: the one copy is the training part, resident anyway.
        train = torch.from_numpy(images[chosen[0]])
        level = (
            train.float().div_(255) if len(train) <= 5000 else train[:: max(1, len(train) // 5000)].float().div_(255)
        )
        mean, std = level.mean(dim=(0, 2, 3)), level.std(dim=(0, 2, 3)).clamp_(min=1e-3)

        def split(some: Images, of_them: Labels) -> Split:
            return Split(torch.from_numpy(some), torch.from_numpy(of_them.astype(np.int64)), mean, std)

        parts = [split(images[part], labels[part]) for part in chosen[1:]]
        return cls(
            Split(train, torch.from_numpy(labels[chosen[0]].astype(np.int64)), mean, std),
            parts[0],
            split(test_images, test_labels),
            num_classes,
            parts[1] if proxy > 0 else None,
        )


def _whole_numbers(images: Images, labels: Labels, num_classes: int, name: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(
            f"data: {name}images are {images.dtype} {images.shape}; needed: uint8 (N, channels, height, width)"
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"data: {name}labels are {labels.dtype} {labels.shape}; needed: an integer for each of {len(images)}"
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"data: {name}labels must be there, from 0 to {num_classes - 1}")


def _digits(name: str) -> Arrays:
    """scikit-learn's 1,797 grey 8x8 digits (Alpaydin and Kaynak, 1998); ships with the package."""
    # The file alone: importing scikit-learn takes a second.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UserError("data.source = 'digits' needs scikit-learn")
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = table[:, -1].astype(np.int64)
    order = numpy_generator(0, Purpose.DATA).permutation(len(labels))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return _arrays(images[train], labels[train], images[test], labels[test])


def _parquet(name: str) -> Arrays:
    """A folder of parquet files in the Hugging Face layout: train-*, test-*; columns img or image, label."""
    files = sorted(Path(name).glob("*.parquet"))
    parts = {part: [f for f in files if f.name.startswith(part)] for part in ("train", "test")}
    for part, found in parts.items():
        if not found:
            raise UserError(f"data.source = {name!r}: no file {part}-*.parquet in this folder")
    return cached(
        content_key("parquet/1", files), lambda: _arrays(*_read_parquet(parts["train"]), *_read_parquet(parts["test"]))
    )


def _read_parquet(files: Sequence[Path]) -> tuple[Images, Labels]:
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        # Compressed images hardly shrink.
        parts = [read_table(path, ["img", "image", "label"], rows_per_byte=1, bytes_per_byte=10) for path in files]
        table = pa.concat_tables(parts)
        names = table.column_names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"data.source: unreadable parquet file: {str(error).splitlines()[0]}") from error
    column = next((c for c in ("img", "image") if c in names), None)
    if column is None or "label" not in names:
        raise UserError(f"data.source: parquet files with no column but {names}; needed: img or image, and label")
    encoded = table[column]
    if pa.types.is_struct(encoded.type) and encoded.type.get_field_index("bytes") >= 0:
        encoded = pc.struct_field(encoded, "bytes")
    if not pa.types.is_binary(encoded.type) and not pa.types.is_large_binary(encoded.type):
        raise UserError(f"data.source: parquet column {column!r} holds {encoded.type}; needed: compressed images")
    return decode(encoded.to_pylist(), stored=sum(path.stat().st_size for path in files)), _labels(table["label"])


def _labels(column: pa.ChunkedArray) -> Labels:
    """The classes 0, 1, ... of a parquet file."""
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise UserError(f"data.source: parquet column 'label' holds {column.type}; needed: integers, none missing")
    labels: Labels = column.to_numpy().astype(np.int64)
    if not len(labels) or labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise UserError(f"data.source: parquet column 'label': needed are classes from 0 to {MOST_CLASSES - 1}")
    return labels


def _image_folder(name: str) -> Arrays:
    """A folder with train/<class>/ and test/<class>/ sub-folders of images."""
    root = Path(name)
    classes = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    found: dict[str, list[tuple[Path, int]]] = {
        part: [
            (path, number)
            for number, label in enumerate(classes)
            for path in sorted((root / part / label).glob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        for part in ("train", "test")
    }
    for part, files in found.items():
        if not files:
            raise UserError(f"data.source = {name!r}: no images in {part}/<class>/; allowed: {', '.join(SUFFIXES)}")

    def read_all() -> Arrays:
        return _arrays(*_read_images(found["train"]), *_read_images(found["test"]))

    return cached(
        content_key("folder/1 " + " ".join(classes), [p for files in found.values() for p, _ in files]), read_all
    )


def _read_images(files: Sequence[tuple[Path, int]]) -> tuple[Images, Labels]:
    encoded = [path.read_bytes() for path, _ in files]
    return decode(encoded, stored=sum(map(len, encoded))), np.array([label for _, label in files], dtype=np.int64)


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


def load(name_or_path: str, *, validation: float = 0.1, proxy: float = 0.0) -> Data:
    """Load a data set by name, by folder, or by `module:function` (a function that returns `Data`).

    Args:
        name_or_path: a name of `SOURCES`, a parquet folder, an image folder, or an import path.
        validation: share of the training set held out, stratified.
        proxy: share of the training set that the server holds.

    Raises:
        UserError: no such source, or files that are not what they should be.
    """
    path = Path(name_or_path)
    if path.is_dir():
        arrays = (_image_folder if (path / "train").is_dir() else _parquet)(name_or_path)
    elif name_or_path in SOURCES:
        arrays = SOURCES[name_or_path](name_or_path)
    elif ":" in name_or_path:
        return _own(name_or_path)
    else:
        raise UserError(f"data.source = {name_or_path!r}: no such folder, and not one of {', '.join(SOURCES)}")
    images, labels = arrays["images"].view(np.uint8), arrays["labels"].view(np.int64)
    return Data.of(
        images,
        labels,
        test_images=arrays["test_images"].view(np.uint8),
        test_labels=arrays["test_labels"].view(np.int64),
        num_classes=int(labels.max()) + 1,
        validation=validation,
        proxy=proxy,
    )


def _own(path: str) -> Data:
    make = cast("Callable[[], object]", imported("data.source = ", path))
    accepts(f"data.source = {path!r}", make)
    made = make()
    if not isinstance(made, Data):
        raise UserError(f"data.source = {path!r}: returned {type(made).__name__}, not fl_sim.data.Data")
    return made
