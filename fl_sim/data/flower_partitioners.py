"""Partitioners of Flower's `flwr-datasets` by their class names, over the labels and groups of any data.

parts = flower_parts("PathologicalPartitioner", {"num_classes_per_partition": 2}, labels, request)
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.core.lookup import nearest

log = logging.getLogger("fl_sim")
SUFFIX = "Partitioner"
INDEX, LABEL, GROUP = "index", "label", "group"
"""Columns of the data set that a partitioner gets."""
COLUMNS_APART = "Vertical"
"""Partitioners that give each client some of the columns."""


class _Partitioner(Protocol):
    dataset: object

    @property
    def num_partitions(self) -> int: ...

    def load_partition(self, partition_id: int) -> Mapping[str, object]: ...


class Asked(Protocol):
    """What a partition is asked for: `fl_sim.data.partition.Request`."""

    @property
    def num_clients(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def min_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def groups(self) -> NDArray[np.int64] | None: ...


def is_flowers(kind: str) -> bool:
    """Whether a partition is named as a class of `flwr-datasets`."""
    return ":" not in kind and kind.endswith(SUFFIX) and kind != SUFFIX


def flower_parts(
    kind: str, options: Mapping[str, object], labels: NDArray[np.generic], request: Asked
) -> list[NDArray[np.int64]]:
    """Positions of each client's samples, as a partitioner of `flwr-datasets` deals them.

    `num_partitions`, `alpha`, `min_partition_size`, `seed` and `partition_by` ("label", or "group" of partitioners by natural
    id) are the config's own where `options` does not name them.

    Args:
        kind: name of a class of `flwr_datasets.partitioner`.
        options: keyword arguments of it.
        labels: classes or numbers (N,), the column "label"; left out where a sample has several.
        request: what the config asks for; its groups are the column "group".

    Raises:
        UserError: the extra is not installed, no such partitioner, options that it does not take, or it raised.
    """
    where = f"data.partition = {kind!r}"
    make = _found(where, kind)
    takes = inspect.signature(make).parameters
    by = GROUP if "NaturalId" in kind else LABEL
    own = {
        "num_partitions": request.num_clients,
        "alpha": request.alpha,
        "min_partition_size": request.min_size,
        "seed": request.seed,
        "partition_by": by,
    }
    if unknown := [name for name in options if name not in takes]:
        raise UserError(f"data.partitioner.{unknown[0]}: {kind} has no such option{nearest(unknown[0], list(takes))}")
    arguments = {name: value for name, value in own.items() if name in takes}
    arguments |= {name: _array(value) for name, value in options.items()}
    columns: dict[str, object] = {INDEX: np.arange(len(labels))}
    columns |= {LABEL: labels} if labels.ndim == 1 else {}
    columns |= {} if request.groups is None else {GROUP: request.groups}
    if (asked := arguments.get("partition_by")) is not None and asked not in columns:
        raise UserError(f"{where}: partition_by = {asked!r}; the data have the columns {', '.join(columns)}")
    if missing := [n for n, p in takes.items() if p.default is p.empty and n not in arguments]:
        raise UserError(f"{where}: needs data.partitioner.{missing[0]}")
    try:
        partitioner = make(**arguments)
        partitioner.dataset = cast("Any", importlib.import_module("datasets")).Dataset.from_dict(columns)
        count = partitioner.num_partitions
        if count != request.num_clients:
            raise UserError(f"{where}: makes {count} parts; needed: data.clients = {count}, not {request.num_clients}")
        parts = [np.asarray(partitioner.load_partition(number)[INDEX], dtype=np.int64) for number in range(count)]
    except UserError:
        raise
    except USERS_OWN as error:  # whatever a partitioner of another package raises
        raise UserError(f"{where}: it raised {error_line(error)}") from error
    if count > 1 and all((np.diff(part) == 1).all() for part in parts):
        log.warning(
            "%s: deals blocks in the order of the data, which it does not shuffle: clients are alike only if that order is "
            "random; data.partition = 'iid' and 'quantity' shuffle",
            where,
        )
    return parts


def _array(value: object) -> object:
    """A list of lists as an array, as DistributionPartitioner needs it; anything else as it is."""
    nested = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(row, (list, tuple)) for row in value)
    return np.array(value) if nested else value


def _found(where: str, kind: str) -> Callable[..., _Partitioner]:
    try:
        module = importlib.import_module("flwr_datasets.partitioner")
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {error}; pip install 'fl-sim[flwr-datasets]'") from error
    names = [name for name in vars(module) if name.endswith(SUFFIX) and name != SUFFIX]
    if kind not in names:
        raise UserError(f"{where}: flwr_datasets has no such partitioner{nearest(kind, names)}")
    if kind.startswith(COLUMNS_APART):
        raise UserError(
            f"{where}: deals columns, not samples; allowed: {', '.join(n for n in names if COLUMNS_APART not in n)}"
        )
    return cast("Callable[..., _Partitioner]", getattr(module, kind))
