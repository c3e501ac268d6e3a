"""Measured curves on disk, under the hash of everything they were measured from: JSON beside the decoded data."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import xxhash
from torch import Tensor, nn

from fl_sim.data.cache import folder
from fl_sim.models import prunable_names
from fl_sim.models.content import add_content
from fl_sim.sparsity.curves import MeasureCurves, Progress, no_progress

VERSION = "curves/3"


def cached_curves(
    measure: MeasureCurves,
    model: nn.Module,
    images: Tensor,
    names: Iterable[str] | None = None,
    *,
    progress: Progress = no_progress,
) -> dict[str, list[float]]:
    """Measure distortion curves, or read them from the cache on disk where the same were measured before."""
    chosen = prunable_names(model) if names is None else list(names)
    place = folder() / "curves" / f"{content_key(measure, model, images, chosen)}.json"
    found = _read(place, chosen, measure.levels)
    if found is None:
        found = measure(model, images, chosen, progress=progress)
        _write(place, found)
    return found


def content_key(measure: MeasureCurves, model: nn.Module, images: Tensor, names: Iterable[str]) -> str:
    """32 hex digits of the measurement's options, the model's structure and state, the images and the names."""
    digest = xxhash.xxh3_128(repr((VERSION, measure, str(model), list(names))).encode())
    add_content({**model.state_dict(), "": images}, digest)
    return digest.hexdigest()


def _read(place: Path, names: Iterable[str], levels: int) -> dict[str, list[float]] | None:
    """None where an entry is missing or damaged: it is measured anew."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        curves = {name: [float(value) for value in found[name]] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return curves if all(len(curve) == levels for curve in curves.values()) else None


def _write(place: Path, curves: dict[str, list[float]]) -> None:
    """Written beside and renamed, so that two processes may measure at once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=place.parent, suffix=".part", delete=False, encoding="utf-8") as stream:
        json.dump(curves, stream)
    os.replace(stream.name, place)
