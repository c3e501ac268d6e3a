#!/usr/bin/env bash
# Flower: FedAdam and FedYogi differ from each other and from their paper: FedAdam alone corrects the bias of its moments, with
# the exponent of the next round.
#
# flwr 1.41.0. Both name arXiv 2003.00295v5, whose algorithm 2 has no bias correction. FedYogi steps eta m / (sqrt(v) + tau), as
# there. FedAdam multiplies eta by sqrt(1 - beta_2^(round + 1)) / (1 - beta_1^(round + 1)); Kingma and Ba (2015), whom its code
# cites, have the exponent t, 1 in the first step. From one array 0 and one reply 1, after round 1 with eta = 1 and tau = 0.001,
# m = 0.1 and v = 0.01, so that the paper's step is 0.1 / 0.101 = 0.9901. FedAdam's is 0.7351 (exponent 2); exponent 1 would
# give 0.9901. A comparison with other implementations at equal eta compares different steps in the first rounds.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'flwr==1.41.0'
cat > "$here/step.py" <<'PYTHON'
import logging

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedYogi
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


class Nodes:
    def get_node_ids(self):
        return range(2)


def one(value):
    return ArrayRecord({"w": Array(np.full(1, value))})


def step(strategy):
    list(strategy.configure_train(1, one(0.0), ConfigRecord(), Nodes()))
    content = RecordDict({"arrays": one(1.0), "metrics": MetricRecord({"num-examples": 1})})
    arrays, _ = strategy.aggregate_train(1, [Message(content, 0, "train")])
    return float(arrays["w"].numpy()[0])


print("SEEN", *(f"{step(kind(eta=1.0, beta_1=0.9, beta_2=0.99, tau=1e-3)):.4f}" for kind in (FedAdam, FedYogi)))
PYTHON
seen=$(cd "$here" && "$here/venv/bin/python" step.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: FedAdam and FedYogi step $seen"
[ "$seen" = '0.7351 0.9901' ]
echo "as described: FedAdam corrects its bias with the exponent round + 1, FedYogi not at all"
