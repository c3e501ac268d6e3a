"""Partitioners of flwr-datasets by name: what they are given, what is refused. `findings/` runs the real ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType

import numpy as np
import pytest

from fl_sim import Experiment, UserError
from fl_sim.data import partition
from fl_sim.data.partition import Parts
from fl_sim.simulation.federation import Federation

LABELS = np.arange(60) % 3


class Rows(dict[str, np.ndarray]):
    """A data set of the shape of Hugging Face's."""

    @classmethod
    def from_dict(cls, columns: Mapping[str, np.ndarray]) -> Rows:
        return cls(columns)


class ByModuloPartitioner:
    """Deals by the column modulo the number of parts, and notes what it was made with."""

    made: Mapping[str, object]

    def __init__(self, num_partitions: int, partition_by: str, alpha: float, seed: int = 42, step: int = 1) -> None:
        type(self).made = {"partition_by": partition_by, "alpha": alpha, "seed": seed, "step": step}
        self.num_partitions, self.by, self.step = num_partitions, partition_by, step
        self.dataset = Rows()

    def load_partition(self, partition_id: int) -> Rows:
        if self.step == 0:
            raise ValueError("step is 0")
        mine = self.dataset[self.by] * self.step % self.num_partitions == partition_id
        return Rows({name: column[mine] for name, column in self.dataset.items()})


class NaturalIdPartitioner(ByModuloPartitioner):
    def __init__(self, partition_by: str) -> None:
        super().__init__(4, partition_by, 0.0)


class VerticalEvenPartitioner(ByModuloPartitioner):
    pass


class BlocksPartitioner(ByModuloPartitioner):
    """Deals in the order of the data."""

    def __init__(self, num_partitions: int) -> None:
        super().__init__(num_partitions, "index", 0.0)

    def load_partition(self, partition_id: int) -> Rows:
        size = len(self.dataset["index"]) // self.num_partitions
        return Rows({"index": self.dataset["index"][partition_id * size : (partition_id + 1) * size]})


@pytest.fixture(autouse=True)
def flower(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flwr_datasets.partitioner")
    for made in (ByModuloPartitioner, NaturalIdPartitioner, VerticalEvenPartitioner, BlocksPartitioner):
        setattr(module, made.__name__, made)
    package, datasets = ModuleType("flwr_datasets"), ModuleType("datasets")
    vars(datasets)["Dataset"] = Rows
    for name, each in (("flwr_datasets", package), ("flwr_datasets.partitioner", module), ("datasets", datasets)):
        monkeypatch.setitem(sys.modules, name, each)


def dealt(kind: str, clients: int = 3, groups: np.ndarray | None = None, **options: object) -> Parts:
    return partition(LABELS, clients, kind=kind, alpha=0.3, seed=7, groups=groups, options=options)


def test_it_gets_the_labels_and_the_configs_own_keys() -> None:
    parts = dealt("ByModuloPartitioner", step=2)
    assert [set(LABELS[part]) for part in parts] == [{0}, {2}, {1}]
    assert ByModuloPartitioner.made == {"partition_by": "label", "alpha": 0.3, "seed": 7, "step": 2}
    dealt("ByModuloPartitioner", seed=1, alpha=2.0)
    assert ByModuloPartitioner.made == {"partition_by": "label", "alpha": 2.0, "seed": 1, "step": 1}


def test_one_by_natural_id_gets_the_groups() -> None:
    groups = np.arange(60) // 15
    parts = dealt("NaturalIdPartitioner", 4, groups)
    assert [set(groups[part]) for part in parts] == [{0}, {1}, {2}, {3}]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("ByModulePartitioner", {}, r"flwr_datasets has no such partitioner; did you mean 'ByModuloPartitioner'\?"),
        (
            "ByModuloPartitioner",
            {"steps": 1},
            r"data\.partitioner\.steps: .* has no such option; did you mean 'step'\?",
        ),
        (
            "ByModuloPartitioner",
            {"partition_by": "user"},
            "partition_by = 'user'; the data have the columns index, label",
        ),
        ("ByModuloPartitioner", {"step": 0}, "it raised ValueError: step is 0"),
        ("NaturalIdPartitioner", {}, "partition_by = 'group'; the data have the columns index, label"),
        ("NaturalIdPartitioner", {"partition_by": "label"}, r"makes 4 parts; needed: data\.clients = 4, not 3"),
        (
            "VerticalEvenPartitioner",
            {},
            "deals columns, not samples; allowed: ByModuloPartitioner, NaturalIdPartitioner",
        ),
        ("iid", {"step": 1}, r"options are for partitioners of flwr_datasets; data\.partition = 'iid'"),
    ],
)
def test_a_wrong_one_is_one_line(kind: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as said:
        dealt(kind, **options)
    assert "\n" not in str(said.value)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(UserError, match=r"pip install 'fl-sim\[flwr-datasets\]'"):
        dealt("IidPartitioner")


def test_a_config_names_it_with_its_options() -> None:
    data = {"partition": "ByModuloPartitioner", "clients": 10, "partitioner": {"step": 3}}
    federation = Federation.build(Experiment(data=data, seed=5), quiet=True)
    assert [np.count_nonzero(row) for rows in federation.label_counts() for row in rows] == [1] * 10
    assert ByModuloPartitioner.made["seed"] == 5


def test_blocks_in_the_order_of_the_data_are_said(caplog: pytest.LogCaptureFixture) -> None:
    partition(LABELS, 4, kind="BlocksPartitioner")
    (line,) = caplog.messages
    assert "data.partition = 'BlocksPartitioner': deals blocks in the order of the data" in line
    caplog.clear()
    partition(LABELS, 3, kind="ByModuloPartitioner")
    assert not caplog.messages
