#!/usr/bin/env bash
# pfl-research: BatchNorm's running statistics are not averaged over users. The saved model depends on the order of users.
#
# pfl 0.6.0, torch 2.14.1. PyTorchModel takes named_parameters() for the model. Buffers stay in the one resident module, where
# every user's training moves them on from where the user before left them; nothing resets or averages them, and save() writes
# them. Three users with means 1, 10 and 100 leave a running mean of 0.1 * 100 + 0.09 * 10 + 0.081 * 1 = 10.981 in this order,
# and of 9.1 in the reverse one, while the averaged parameters of both orders are equal. The mean over users, as FedAvg takes
# it of all else, would be 3.7 in both. Evaluation uses these statistics. (With several processes they also depend on which of
# them saves.) No warning is given.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'pfl[pytorch]==0.6.0' 'torch==2.14.1' 'numpy==2.4.6'
cat > "$here/users.py" <<'PYTHON'
import sys

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn

MEANS = {"a": 1.0, "b": 10.0, "c": 100.0}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(1), nn.Linear(1, 1)

    def loss(self, x, y):
        self.train()
        return ((self.out(self.norm(x)) - y) ** 2).mean()

    def metrics(self, x, y):
        return {"users": Weighted(1, 1)}


def user(name):
    return PyTorchTensorDataset((MEANS[name] + torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]), torch.zeros(4, 1)))


def after_a_round(order):
    np.random.seed(0)
    torch.manual_seed(0)
    net = Net()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    users = FederatedDataset(user, get_user_sampler("minimize_reuse", list(order)))
    FederatedAveraging().run(
        NNAlgorithmParams(central_num_iterations=1, evaluation_frequency=1, train_cohort_size=3, val_cohort_size=None),
        SimulatedBackend(users, None),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.1, local_batch_size=4),
        send_metrics_to_platform=False,
    )
    model.save(sys.argv[1])
    saved = torch.load(sys.argv[1] + "/checkpoint.pt")
    return saved["norm.running_mean"].item(), torch.cat([p.detach().flatten() for p in net.parameters()])


(one, ours), (other, theirs) = after_a_round("abc"), after_a_round("cba")
apart = float((ours - theirs).abs().max())
print("SEEN", f"{one:.3f} {other:.3f}", "equal" if apart < 1e-5 else "unequal")
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" users.py "$here/saved" 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: running mean after a round, users in this order and reversed, and their parameters: $seen"
[ "$seen" = '10.981 9.100 equal' ]
echo "as described: the saved running means depend on the order of users, and the parameters do not"
