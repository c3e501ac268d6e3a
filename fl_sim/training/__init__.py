"""Local training: the loop, losses, optimizers, precision, and the contract of a client.

model = load(ctx.model, task.params)
metrics = local_sgd(model, ctx.data, lr=0.1, epochs=2, mask=task.mask, rng=ctx.rng)
params = snapshot(model)
"""

from fl_sim.models.parameters import entries, load, snapshot
from fl_sim.training.client import Client, ClientContext
from fl_sim.training.evaluation import evaluate, logits
from fl_sim.training.loop import CLIPS, OPTIMIZERS, SCHEDULES, Training, TrainingDiverged, local_sgd
from fl_sim.training.tasks import TASKS, LearningTask, Metric, learning_task

__all__ = [
    "CLIPS",
    "OPTIMIZERS",
    "SCHEDULES",
    "TASKS",
    "Client",
    "ClientContext",
    "LearningTask",
    "Metric",
    "Training",
    "TrainingDiverged",
    "entries",
    "evaluate",
    "learning_task",
    "load",
    "local_sgd",
    "logits",
    "snapshot",
]
