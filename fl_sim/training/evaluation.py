"""Evaluation of a model on samples: loss, metrics, logits.

metrics = evaluate(model, data)   # {"loss": ..., "accuracy": ..., "examples": ...}
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_sim.core.types import Metrics, UserError
from fl_sim.data import Split
from fl_sim.data.kinds import described, target_kind
from fl_sim.training.precision import PRECISIONS
from fl_sim.training.tasks import CLASSIFICATION, LearningTask


def logits(model: nn.Module, data: Split, *, batch_size: int = 512, precision: str = "float32") -> Tensor:
    """Logits (N, K), float32, in the order of the data; the model is left in evaluation mode."""
    chosen = PRECISIONS[precision]
    chosen.place(model.eval())
    with torch.no_grad(), chosen.context(next(model.parameters()).device):
        return torch.cat([model(images).float() for images, _ in data.batches(batch_size, layout=chosen.layout)])


def evaluate(
    model: nn.Module,
    data: Split,
    task: LearningTask = CLASSIFICATION,
    *,
    batch_size: int = 512,
    precision: str = "float32",
) -> Metrics:
    """Mean loss and metrics of a task in evaluation mode, on the model's device; the mode is restored.

    Returns:
        `loss`, the task's metrics such as `accuracy` (0..1), and `examples`, the number of samples.

    Raises:
        UserError: no samples, or targets that are not of the task.
    """
    if not len(data):
        raise UserError("evaluate: no samples; needed: at least one")
    if target_kind(data.labels) is not task.targets:
        raise UserError(f"evaluate: targets are {described(data.labels)}; the task needs {task.targets.value}")
    was_training, chosen = model.training, PRECISIONS[precision]
    model.eval()
    chosen.place(model)
    device = next(model.parameters()).device
    totals: dict[str, Tensor] = {}
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(), chosen.context(device):
        for inputs, targets in data.batches(batch_size, layout=chosen.layout):
            outputs = model(inputs).float()
            if task.further:
                kept.append((outputs, targets))
            for name, value in task.added(outputs, targets).items():
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)).to(value.device) + value
    model.train(was_training)
    sums = {name: float(total) for name, total in totals.items()}
    return {"loss": sums["loss"] / sums["count"], **task.metrics(sums), **task.measured(kept), "examples": len(data)}
