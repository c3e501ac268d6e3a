"""Every shipped config ends in the same bits on every engine, and after a kill in its middle.

Three short rounds of each: a few steps a client, small data. Configs of CIFAR-10 run on 400 drawn images of its shape. The
cluster's three nodes are network namespaces, where those are allowed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from federation import same
from interruption import KillAfter, Killed
from numpy.typing import NDArray
from PIL import Image
from ray_nodes import Nodes, cluster, finished, read, why_not

from fl_sim import Experiment, Report, run

CONFIGS = sorted(Path("configs").glob("*.toml"))
SHORT = (
    "rounds=3",
    "evaluate.every=3",
    "data.validation=0.1",
    "training.steps=2",
    "training.batch_size=16",
    "training.precision=float32",
)
PRUNING = {"at": "1", "start": "1", "end": "2", "steps": "2", "images": "8", "levels": "6"}
"""Options of a strategy that would put off what it does, or make it long."""
Way = Callable[[Path, Path, Path], Report]
"""(config, data of the shape of CIFAR-10, folder) -> the run."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet folder of 400 training and 40 test images of the shape of CIFAR-10, from a fixed seed."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("drawn")
    for part, count in (("train", 400), ("test", 40)):
        images = [_png(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        labels = [number % 10 for number in range(count)]
        pq.write_table(pa.table({"img": images, "label": labels}), folder / f"{part}-0.parquet")
    return folder


def _png(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def shortened(path: Path, data: Path, out: Path, *overrides: str) -> Experiment:
    """The config with less of everything."""
    asked = Experiment.load(path)
    clients = min(asked.data.clients, 8)
    few = [f"data.clients={clients}", f"cohort.size={min(asked.cohort.size, clients, 4)}"]
    at_work = [] if asked.schedule.concurrency is None else ["schedule.concurrency=3", "schedule.buffer=2"]
    curves = {"images", "levels"} if str(asked.strategy.target).endswith(":rate_distortion") else set()
    pruning = [f"strategy.{key}={PRUNING[key]}" for key in asked.strategy.options.keys() & PRUNING.keys() | curves]
    taught = ["strategy.distil.steps=10"] if "distil" in asked.strategy.options else []
    source = [] if asked.data.source != "cifar10" else [f'data.source="{data}"']
    return Experiment.load(path, [*SHORT, *few, *at_work, *pruning, *taught, *source, f'out="{out}"', *overrides])


def killed_and_resumed(path: Path, data: Path, out: Path) -> Report:
    experiment = shortened(path, data, out)
    with pytest.raises(Killed):
        run(experiment, KillAfter(1, replies=1))
    return run(experiment, resume=True)


def on(*engine: str) -> Way:
    return lambda path, data, out: run(shortened(path, data, out, *engine))


WAYS: Mapping[str, Way] = {
    "one worker": on("engine=workers", "workers.count=1"),
    "three workers": on("engine=workers", "workers.count=3"),
    "ray": on("engine=ray", "ray.workers=2"),
    "killed and resumed": killed_and_resumed,
}


@pytest.fixture(scope="module")
def inline(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Report]:
    return cache(lambda path: run(shortened(path, drawn, tmp_path_factory.mktemp("inline"))))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_ends_in_the_same_bits(
    path: Path, way: str, drawn: Path, tmp_path: Path, inline: Callable[[Path], Report]
) -> None:
    same(inline(path), WAYS[way](path, drawn, tmp_path))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with cluster(3) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_ends_in_the_same_bits_on_three_nodes(
    path: Path, drawn: Path, tmp_path: Path, inline: Callable[[Path], Report], nodes: Nodes
) -> None:
    config = tmp_path / path.name
    config.write_text(shortened(path, drawn, tmp_path / "runs").to_toml())
    program = nodes.run(0, config)
    expected = inline(path)  # the nodes start their workers meanwhile
    nodes.ended(program)
    same(read(expected.folder), finished(tmp_path / "runs"))
