#!/usr/bin/env bash
# Flower: adaptive clipping moves the clipping norm away from its quantile, to zero or without bound, and never towards it.
#
# flwr 1.41.0, DifferentialPrivacyServerSideAdaptiveClipping. In algorithm 1 of its source (Andrew et al., 2021, arXiv
# 1905.03871) the norm C is multiplied by exp(-lr (b - quantile)), where b is the share of updates that were within C. Flower
# puts the share of updates that were *clipped* in the place of b, so that the sign of the feedback is turned. Twenty clients
# send updates of norms 1 to 2, target 0.5 (the default), no noise, 50 rounds. From C = 0.1 (the default), where all are
# clipped, C falls to 0.00067, and training stands still; from C = 2, where none is, it grows to 297, and with it the noise. The
# paper's rule ends at 1.49 and 1.51, near the median 1.5, from both. The client-side variant and the two of flwr.server share
# the rule. The older DPFedAvgAdaptive of the same package has the paper's: its client tells "not clipped". No warning is given.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'flwr==1.41.0'
cat > "$here/norms.py" <<'PYTHON'
import logging
import math

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
NORMS = np.linspace(1, 2, 20)
ROUNDS, QUANTILE, LR = 50, 0.5, 0.2


class Nodes:
    def get_node_ids(self):
        return range(len(NORMS))


def model(value):
    return ArrayRecord({"w": Array(np.full(4, float(value)))})


def flower(norm):
    strategy = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(), 0.0, len(NORMS), initial_clipping_norm=norm, target_clipped_quantile=QUANTILE, clip_norm_lr=LR
    )
    for number in range(1, ROUNDS + 1):
        list(strategy.configure_train(number, model(0), ConfigRecord(), Nodes()))
        contents = [RecordDict({"arrays": model(n / 2), "metrics": MetricRecord({"num-examples": 1})}) for n in NORMS]
        strategy.aggregate_train(number, [Message(content, 0, "train") for content in contents])
    return strategy.clipping_norm


def paper(norm):
    for _ in range(ROUNDS):
        norm *= math.exp(-LR * (float(np.mean(norm >= NORMS)) - QUANTILE))
    return norm


print("SEEN", *(f"{rule(start):.2g}" for start in (0.1, 2.0) for rule in (flower, paper)))
PYTHON
seen=$(cd "$here" && "$here/venv/bin/python" norms.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: clipping norm after 50 rounds from 0.1 (Flower, the paper's rule) and from 2 (the same): $seen"
[ "$seen" = '0.00067 1.5 3e+02 1.5' ]
echo "as described: the clipping norm flees the quantile that it should find"
