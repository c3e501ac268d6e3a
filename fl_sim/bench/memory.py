"""Peak memory of a whole run of a large model, in units of its float32 parameters.

Three rounds: build, broadcast, clients, replies, mean, evaluation, checkpoints, model file, report. Counted is all memory above
that of the process after it has run the same federation with a small model, pages of mapped files included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from fl_sim.bench.processes import status_kb
from fl_sim.bench.workloads import NUDGE
from fl_sim.config.experiment import Experiment
from fl_sim.models.simple import cnn
from fl_sim.simulation.loop import run

CLIENTS: Mapping[str, str] = {"nudge": NUDGE, "sgd": "clients.presets:fedavg"}
"""A client that adds a number to all that it received, and one that trains with SGD."""


@dataclass(frozen=True)
class Load:
    """What is measured.

    Attributes:
        millions: parameters of the model, a `cnn` on images of CIFAR's shape, in millions.
        clients: that train in a round; from 128 on their updates are added up exactly.
        client: a name of `CLIENTS`.
        resume: whether the run is stopped after its second round, and the peak is that of going on.
    """

    millions: float = 100.0
    clients: int = 3
    client: str = "nudge"
    resume: bool = False

    def experiment(self, place: str, *, width: float, rounds: int = 3) -> Experiment:
        """The run, with a model of this width."""
        return Experiment.from_tree(
            {
                "name": "large",
                "out": place,
                "engine": "inline",
                "device": "cpu",
                "rounds": rounds,
                "client": CLIENTS[self.client],
                "data": {
                    "source": "fl_sim.bench.scale:few_images",
                    "clients": max(6, self.clients),
                    "partition": "iid",
                    "min_size": 1,
                    "validation": 0.025,
                },
                "model": {"name": "cnn", "width": width},
                "cohort": {"size": self.clients},
                "training": {"lr": 0.01, "steps": 3, "batch_size": 4, "precision": "float32"},
                "evaluate": {"every": 3},
                "checkpoint": {"every": 1},
            }
        )


def width_of(millions: float) -> float:
    """Width of a `cnn` of about so many million parameters, to a hundredth."""
    low, high = 1, 2000
    while low < high:
        middle = (low + high) // 2
        with torch.device("meta"):
            model = cnn(num_classes=10, in_channels=3, image_size=32, width=middle / 100)
        if sum(value.numel() for value in model.parameters()) < millions * 1e6:
            low = middle + 1
        else:
            high = middle
    return low / 100


def over_model(load: Load) -> dict[str, float]:
    """Parameters of the model, and the peak over their bytes, in a process of its own."""
    command = [sys.executable, "-m", "fl_sim.bench.memory", json.dumps(asdict(load))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _measure(load: Load) -> dict[str, float]:
    width = width_of(load.millions)
    with tempfile.TemporaryDirectory() as place:
        run(load.experiment(place, width=0.1), quiet=True)  # imports
        if load.resume:
            _elsewhere(load.experiment(place, width=width, rounds=2))
        before = status_kb("VmRSS")
        report = run(load.experiment(place, width=width), quiet=True, resume=load.resume)
    size = 4 * int(str(report.summary["params"]))
    return {"parameters": size // 4, "peak_over_model": (status_kb("VmHWM") - before) * 1024 / size}


def _elsewhere(experiment: Experiment) -> None:
    """Run in another process, whose memory does not count."""
    code = "import sys, json; from fl_sim import Experiment, run; run(Experiment.from_tree(json.loads(sys.argv[1])), quiet=True)"
    tree = experiment.model_dump(mode="json", exclude_unset=True)
    subprocess.run([sys.executable, "-c", code, json.dumps(tree)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(Load(**json.loads(sys.argv[1])))))
