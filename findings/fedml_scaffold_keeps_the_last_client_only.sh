#!/usr/bin/env bash
# FedML: SCAFFOLD throws away the updates of all clients but the last one of the list.
#
# fedml 0.9.6, FedMLAggOperator with federated_optimizer "SCAFFOLD", as the simulation (ScaffoldTrainer) calls it. The updates are
# added up, weighted by samples, for each tensor. The line after the sum then assigns the last client's own update to the result
# (`total_weights_delta[k] = weights_delta[k]`), and that of its control variate, divided by all clients, likewise. In the paper
# (arXiv 1910.06378) the model moves by the mean of the updates, and the control variate by their sum through the number of all
# clients. Three clients of 100, 100 and 200 samples send updates 1, 2 and 9 and changes of control 10, 20 and 90: the model
# moves by 9 instead of 5.25 (weighted; 4 in the plain mean), and by 1 if the list is turned round; the control variate by 30 and
# 3.33 instead of 40. Of a hundred clients, 99 train for nothing. FedAvg of the same function is right. No error and no warning.
#
# The file under test is loaded without the package's __init__, which asks for sixty other packages; NumPy's arrays stand for
# tensors, since the function only multiplies and adds.
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps 'fedml==0.9.6' 'numpy==2.4.6'
cat > "$here/rounds.py" <<'PYTHON'
import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np

top = Path(importlib.util.find_spec("fedml").submodule_search_locations[0]).parent
for name in ("fedml", "fedml.core", "fedml.ml", "fedml.ml.aggregator"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(top.joinpath(*name.split(".")))]
from fedml.ml.aggregator.agg_operator import FedMLAggOperator

CLIENTS = (100, 1.0, 10.0), (100, 2.0, 20.0), (200, 9.0, 90.0)


def scaffold(clients):
    args = SimpleNamespace(federated_optimizer="SCAFFOLD", client_num_in_total=len(clients))
    sent = [(samples, {"w": np.array([update])}, {"w": np.array([control])}) for samples, update, control in clients]
    return [f"{moved['w'].item():.4g}" for moved in FedMLAggOperator.agg(args, sent)]


def fedavg(clients):
    args = SimpleNamespace(federated_optimizer="FedAvg")
    sent = [(samples, {"w": np.array([model])}) for samples, model, _ in clients]
    return f"{FedMLAggOperator.agg(args, sent)['w'].item():.4g}"


print("SEEN", *scaffold(CLIENTS), *scaffold(CLIENTS[::-1]), fedavg(CLIENTS), fedavg(CLIENTS[::-1]))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" rounds.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: SCAFFOLD's step of model and control variate, the same with the clients in reverse, FedAvg in both orders: $seen"
[ "$seen" = '9 30 1 3.333 5.25 5.25' ]
echo "as described: SCAFFOLD takes the last client's update for all"
