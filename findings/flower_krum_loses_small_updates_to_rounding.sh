#!/usr/bin/env bash
# Flower: Krum chooses attackers where updates are small beside the model: its distances are rounding errors, some negative.
#
# flwr 1.41.0, Krum, MultiKrum and Bulyan of flwr.serverapp. The squared distance of two clients' models is computed as |x|^2 +
# |y|^2 - 2 x.y, in float32, on whole models and not on updates. A model of norm 113, as torchvision's ResNet-18 has it at its
# initialisation, has |x|^2 = 12,800, and float32 numbers are 0.001 apart there. Clients that take ten steps at learning rate
# 0.0003 with gradients of norm 1 move by 0.003: an honest pair in random directions is 0.000018 apart. Here three attackers of
# ten move ten times as far as the seven honest clients, so that their distances are fifty times as large. Distances in float64
# choose an honest client in each of 20 rounds, and so does Krum of flwr.server in the same package, which subtracts first. Krum
# of flwr.serverapp chooses an attacker in 13 of the 20, without a warning (the number depends on how the machine adds up).
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'flwr==1.41.0'
cat > "$here/choose.py" <<'PYTHON'
import logging

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import Krum as OlderKrum
from flwr.serverapp.strategy import Krum
from flwr.serverapp.strategy.multikrum import compute_distances
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
CLIENTS, BAD, WEIGHTS, ROUNDS = 10, 3, 1_000_000, 20
CLOSEST = CLIENTS - BAD - 2


def vector(rng, norm):
    drawn = rng.standard_normal(WEIGHTS)
    return drawn * (norm / np.linalg.norm(drawn))


def newer(models):
    contents = [
        RecordDict({"arrays": ArrayRecord({"w": Array(m)}), "metrics": MetricRecord({"num-examples": 1})}) for m in models
    ]
    arrays, _ = Krum(num_malicious_nodes=BAD).aggregate_train(1, [Message(c, 0, "train") for c in contents])
    return arrays["w"].numpy()


def older(models):
    fits = [(None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters([m]), 1, {})) for m in models]
    return parameters_to_ndarrays(OlderKrum(num_malicious_clients=BAD).aggregate_fit(1, fits, [])[0])[0]


def double(models):
    wide = models.astype(np.float64)
    apart = np.array([((wide - one) ** 2).sum(axis=1) for one in wide])
    return models[np.argmin(np.sort(apart, axis=1)[:, 1 : 1 + CLOSEST].sum(axis=1))]


attacked, negative = {rule: 0 for rule in (newer, older, double)}, 0
for number in range(ROUNDS):
    rng = np.random.default_rng(number)
    start = vector(rng, 113)
    models = np.stack([start + vector(rng, 0.03 if i < BAD else 0.003) for i in range(CLIENTS)]).astype(np.float32)
    negative += (compute_distances([ArrayRecord({"w": Array(m)}) for m in models]) < 0).any()
    for rule in attacked:
        attacked[rule] += any(np.array_equal(rule(models), bad) for bad in models[:BAD])
print("SEEN", *attacked.values(), negative)
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" choose.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: of 20 rounds, attackers chosen by flwr.serverapp, flwr.server, float64; rounds with negative distances: $seen"
read -r new old exact negative <<< "$seen"
[ "$new" -ge 1 ]
[ "$negative" -ge 1 ]
[ "$old $exact" = '0 0' ]
echo "as described: Krum of flwr.serverapp chooses attackers that the distances tell apart"
