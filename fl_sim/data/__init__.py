"""Data: sources decoded once to uint8, deterministic partitions, splits that yield normalised batches."""

from fl_sim.data.dataset import Data
from fl_sim.data.partition import PARTITIONS, label_counts, matching, partition
from fl_sim.data.sources import SOURCES, load
from fl_sim.data.split import CropFlip, Split

__all__ = ["PARTITIONS", "SOURCES", "CropFlip", "Data", "Split", "label_counts", "load", "matching", "partition"]
