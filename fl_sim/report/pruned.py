"""Table of a pruned model, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from torch import nn

from fl_sim.data import Data
from fl_sim.sparsity.one_model import Row
from fl_sim.training.evaluation import evaluate
from fl_sim.training.tasks import Metric, task_for


def pruned_table(rows: Sequence[Row]) -> Table:
    """Build one row for each prunable tensor, and one for the whole model last."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", min_width=12)
    for name in ("weights", "kept", "density %", "MACs", "MACs %", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.layer.removesuffix(".weight"),
            f"{row.weights:,}",
            f"{row.kept:,}",
            f"{100 * row.density:.2f}",
            f"{row.macs_kept:,}",
            f"{100 * row.macs_kept / max(1, row.macs):.2f}",
            f"{row.payload_bytes:,}",
            style="bold" if row is rows[-1] else None,
        )
    return table


def _told(metric: Metric, value: float) -> str:
    return f"{100 * value:.2f} %" if metric.percent else f"{value:.4g}"


def effect(dense: nn.Module, pruned: nn.Module, data: Data | None) -> list[str]:
    """Lines on what the bytes are, and on the task's metric before and after where there is data to measure them on."""
    lines = [
        "bytes: values and mask of the tensor as encoded; all: the whole model as encoded, with what is not pruned"
    ]
    if data is not None:
        task = task_for(data.test.labels)
        metric = task.metric
        before, after = (_told(metric, evaluate(model, data.test, task)[metric.name]) for model in (dense, pruned))
        lines.append(f"test {metric.name} without retraining: {before} -> {after}")
    return lines
