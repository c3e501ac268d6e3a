"""Partitions of a training set over clients: disjoint and complete unless overlap is asked for, deterministic.

parts = partition(labels, 100, kind="dirichlet", alpha=0.5, seed=0)      # 100 sorted int64 index arrays
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_sim.core.errors import USERS_OWN, error_line, in_one_line
from fl_sim.core.lookup import find
from fl_sim.core.process_state import unchanged_settings
from fl_sim.core.seeding import Purpose, numpy_generator
from fl_sim.core.types import UserError
from fl_sim.data.flower_partitioners import flower_parts, is_flowers
from fl_sim.data.parts import Parts

Labels = NDArray[np.int64]
ATTEMPTS = 1000


@dataclass(frozen=True)
class Request:
    """Request to a partitioner: its parameters, the generator to draw from, and the group of each sample if there are groups."""

    num_clients: int
    alpha: float
    shards: int
    min_size: int
    rng: np.random.Generator
    groups: Labels | None = None
    seed: int = 0


Partition = Callable[[Labels, Request], Parts]


def iid(labels: Labels, request: Request) -> Parts:
    """Shuffled and dealt evenly."""
    order = request.rng.permutation(len(labels))
    return Parts.owned(_dealt_in_turn(order, _even(len(labels), request.num_clients)), request.num_clients)


def _even(samples: int, count: int) -> Labels:
    """Sizes of `count` parts that differ by 1 at most, the larger ones first."""
    return samples // count + (np.arange(count) < samples % count).astype(np.int64)


def _dealt_in_turn(order: Labels, sizes: Labels) -> Labels:
    """The client of each sample, if the first client gets the first of `order`, and so on."""
    owner = np.empty(len(order), dtype=np.int64)
    owner[order] = np.repeat(np.arange(len(sizes)), sizes)
    return owner


def dirichlet(labels: Labels, request: Request) -> Parts:
    """Label skew: each class is spread over the clients by a Dirichlet(alpha) draw (Yurochkin et al., 2019).

    The alpha of NIID-Bench (Li et al., 2022), the concentration of each entry. Hsu et al. (2019) draw the classes of each
    client, from Dirichlet(alpha p): with K equally frequent classes their alpha is K times the concentration of an entry.

    Recipe of the published code of arXiv 2106.06921: a client that already holds its even share gets nothing more of
    a class; everything is drawn again until every client has `min_size` samples.
    """
    n, rng = request.num_clients, request.rng
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    owner = np.empty(len(labels), dtype=np.int64)
    for _ in range(ATTEMPTS):
        sizes = np.zeros(n, dtype=np.int64)
        for members in classes:
            shares = rng.dirichlet(np.full(n, request.alpha)) * (sizes < len(labels) / n)
            if shares.sum() == 0:
                shares = np.ones(n)
            cuts = (np.cumsum(shares / shares.sum())[:-1] * len(members)).astype(np.int64)
            dealt = np.diff(cuts, prepend=0, append=len(members))
            owner[rng.permutation(members)] = np.repeat(np.arange(n), dealt)
            sizes += dealt
        if sizes.min() >= request.min_size:
            return Parts.owned(owner, n)
    raise UserError(
        f"data.partition = 'dirichlet': no draw of {ATTEMPTS} gave each of {n} clients {request.min_size} of "
        f"{len(labels)} samples at alpha = {request.alpha}; raise data.alpha, or lower data.clients or data.min_size"
    )


def shards(labels: Labels, request: Request) -> Parts:
    """Pathological skew: samples sorted by label, cut into shards, `shards` of them per client (McMahan et al., 2017)."""
    order = np.lexsort((request.rng.permutation(len(labels)), labels))
    count = request.num_clients * request.shards
    holder = np.empty(count, dtype=np.int64)
    holder[request.rng.permutation(count)] = np.arange(count) // request.shards
    return Parts.owned(holder[_dealt_in_turn(order, _even(len(labels), count))], request.num_clients)


def quantity(labels: Labels, request: Request) -> Parts:
    """Quantity skew: sizes by a Dirichlet(alpha) draw over what `min_size` leaves, labels iid (Li et al., 2022)."""
    n, spare = request.num_clients, len(labels) - request.num_clients * request.min_size
    shares = request.rng.dirichlet(np.full(n, request.alpha))
    cuts = np.floor(np.cumsum(shares)[:-1] * spare + np.arange(1, n) * request.min_size).astype(np.int64)
    sizes = np.diff(cuts, prepend=0, append=len(labels))
    return Parts.owned(_dealt_in_turn(request.rng.permutation(len(labels)), sizes), n)


def natural(labels: Labels, request: Request) -> Parts:
    """By group (writer, user, site): one client a group, in order, or whole groups dealt at random where there are more."""
    if request.groups is None:
        raise UserError("data.partition = 'natural': the data have no groups; set data.group, or give Data.of groups")
    n = request.num_clients
    names, group = np.unique(request.groups, return_inverse=True)
    if len(names) < n:
        raise UserError(
            f"data.partition = 'natural': {len(names)} groups for data.clients = {n}; allowed: at most one client a group"
        )
    if len(names) == n:
        return Parts.owned(group.astype(np.int64), n)
    return Parts.owned(_dealt_in_turn(request.rng.permutation(len(names)), _even(len(names), n))[group], n)


PARTITIONS: Mapping[str, Partition] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "natural": natural,
}
BY_CLASS = ("dirichlet", "shards")
"""Partitions that need a class for each sample."""


def partition(
    labels: Labels,
    num_clients: int,
    *,
    kind: str = "dirichlet",
    alpha: float = 0.5,
    seed: int = 0,
    shards: int = 2,
    min_size: int | None = None,
    groups: Labels | None = None,
    overlap: bool = False,
    options: Mapping[str, object] | None = None,
) -> Parts:
    """Spread samples over clients.

    Args:
        labels: targets, (N,) or (N, ...); classes, int64 (N,), for the partitions `BY_CLASS`.
        num_clients: number of parts.
        kind: a name of `PARTITIONS`, a partitioner of `flwr_datasets` by its class name, or `module:function` of your own.
        alpha: Dirichlet concentration; smaller is more skewed.
        seed: determines the result.
        shards: shards per client, for "shards".
        min_size: fewest samples of a part; by default 10, or a tenth of an even share where that is less, at least 1. A
            natural partition is as it is: by default 1.
        groups: int64 (N,), the group of each sample, for "natural" and for partitions of your own.
        overlap: whether a partition of your own may give a sample to several clients, or to none.
        options: of a partitioner of `flwr_datasets`: its keyword arguments.

    Returns:
        `num_clients` sorted index arrays (int64), disjoint and covering all samples unless `overlap`.

    Raises:
        UserError: unknown kind, more clients than samples, or a minimum that cannot be met.
    """
    if min_size is None:
        min_size = 1 if kind == "natural" else max(1, min(10, len(labels) // num_clients // 10))
    if num_clients * min_size > len(labels):
        asked = f"data.clients = {num_clients} with data.min_size = {min_size} samples each"
        raise UserError(f"{asked}: there are {len(labels)}")
    if kind in BY_CLASS and (labels.ndim != 1 or labels.dtype != np.int64):
        raise UserError(
            f"data.partition = {kind!r}: is by class, and targets are {labels.dtype} {labels.shape}; allowed: "
            f"{', '.join(name for name in PARTITIONS if name not in BY_CLASS)}, or module:function"
        )
    if overlap and kind in PARTITIONS:
        raise UserError(
            f"data.overlap = true: {kind!r} never overlaps; allowed: a partition of your own, module:function"
        )
    request = Request(num_clients, alpha, shards, min_size, numpy_generator(seed, Purpose.DATA), groups, seed)
    if kind in PARTITIONS and not options:
        parts = PARTITIONS[kind](labels, request)
    else:
        made = _dealt(kind, labels, request, options or {})
        parts = _checked(kind, made, len(labels), num_clients, overlap=overlap)
    smallest = int(parts.sizes.min())
    if smallest < min_size:
        raise UserError(f"data.partition = {kind!r}: a client got {smallest} samples, fewer than min_size = {min_size}")
    return parts


def _dealt(kind: str, labels: Labels, request: Request, options: Mapping[str, object]) -> object:
    """What the rule of this name returns."""
    if is_flowers(kind):
        return flower_parts(kind, options, labels, request)
    if options:
        raise UserError(f"data.partitioner: options are for partitioners of flwr_datasets; data.partition = {kind!r}")
    return _of_ones_own(kind, find("data.partition", kind, PARTITIONS), labels, request)


def _of_ones_own(kind: str, rule: Callable[..., object], labels: Labels, request: Request) -> object:
    """Call a user's partitioner with a copy of the labels, which it may sort in place.

    Raises:
        UserError: it cannot be called so, or it raised.
    """
    where = f"data.partition = {kind!r}"
    try:
        inspect.signature(rule).bind(labels, request)
    except TypeError as error:
        raise UserError(f"{where}: {error}; it is called with (labels, request)") from error
    except ValueError:  # built in: it says nothing of itself
        pass
    try:
        with unchanged_settings():
            return rule(labels.copy(), request)
    except UserError:
        raise
    except USERS_OWN as error:  # the user's own function, whatever it raises
        raise UserError(f"{where}: it raised {error_line(error)}") from error


def _checked(kind: str, parts: object, samples: int, num_clients: int, *, overlap: bool) -> Parts:
    """The parts sorted, if there are as many as clients, and each sample is in one of them or may be in any number."""
    where = f"data.partition = {kind!r}"
    if not isinstance(parts, (Sequence, np.ndarray)) or len(parts) != num_clients:
        got = f"{len(parts)} parts" if isinstance(parts, (Sequence, np.ndarray)) else type(parts).__name__
        raise UserError(f"{where}: returned {got}; needed: a list of {num_clients} index arrays, one a client")
    arrays = [_positions(where, number, part) for number, part in enumerate(parts)]
    taken = np.concatenate(arrays)
    beyond = taken[(taken < 0) | (taken >= samples)]
    if len(beyond):
        raise UserError(f"{where}: a part holds position {beyond[0]}; there are {samples} samples")
    if overlap:
        return Parts.of(arrays)
    times = np.bincount(taken, minlength=samples)
    if (times != 1).any():
        first = int(np.flatnonzero(times != 1)[0])
        raise UserError(
            f"{where}: sample {first} is in {times[first]} parts; needed: each of {samples} in exactly one, or data.overlap = true"
        )
    return Parts.of(arrays)


def _positions(where: str, number: int, part: object) -> NDArray[np.int64]:
    """Check one client's positions and sort them: an array, a tensor or a list of integers."""
    if np.ma.is_masked(part):
        raise UserError(f"{where}: part {number} holds masked positions; leave them out: part.compressed()")
    try:
        array = np.asarray(part)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors of a GPU
        raise UserError(f"{where}: part {number} is no array: {in_one_line(error)}") from error
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        found = f"{array.dtype} {array.shape}"
        raise UserError(f"{where}: part {number} is {found}; needed: the positions of a client's samples, integers")
    return np.sort(array.astype(np.int64))


def label_counts(labels: Labels, parts: Parts, num_classes: int) -> NDArray[np.int64]:
    """Samples per client and class, int64 (clients, classes)."""
    cells = parts.owner * num_classes + labels[parts.positions]
    return np.bincount(cells, minlength=len(parts) * num_classes).reshape(len(parts), num_classes)


def matching(labels: Labels, like: Labels, *, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions in `labels` whose classes come in the proportions of `like`: a client's share of a common test set.

    Targets that are no classes have no kind: any samples are drawn.

    Args:
        labels, like: int64; the labels to choose from and those to imitate.
        size: samples wanted; fewer come back where a class runs out or shares round down.
        rng: which samples of a class.
    """
    if labels.ndim != 1 or labels.dtype != np.int64:
        return np.sort(rng.permutation(len(labels))[:size]).astype(np.int64)
    shares = np.bincount(like, minlength=int(labels.max()) + 1) / len(like)
    parts = []
    for label in np.flatnonzero(shares[: int(labels.max()) + 1]):
        members = np.flatnonzero(labels == label)
        parts.append(rng.permutation(members)[: math.ceil(shares[label] * size)])
    return np.sort(np.concatenate(parts)).astype(np.int64)
