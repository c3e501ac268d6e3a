#!/usr/bin/env bash
# Flower: FedXgbBagging keeps one tree of each reply and drops the rest: of several classes it learns only the first.
#
# flwr 1.42.0 (1.41.0 too), xgboost 3.2.0. As the tutorial has it, a client boosts the global model for local-epochs rounds and
# sends "the last N=num_local_round trees" for bagging. From the second reply on, the strategy appends as many trees as
# num_parallel_tree says, which is 1 unless one trains forests, and gives them all to class 0. A model of K classes has K trees a
# round: four clients in ten rounds send 120 trees for three classes, and the model has 42, 40 of them for class 0. Classes 1 and
# 2 have the tree of the first reply of all, for ever: on points of three rings the middle one is never predicted, and accuracy is
# 0.66, where bagging all 120 gives 0.89. Binary models lose trees with more than one local epoch: 156 of 200 with five, accuracy
# 0.61 instead of 0.71. No error and no warning; the docs name no such limit. With two classes and one local epoch, as in the
# examples, nothing is lost.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'flwr==1.42.0' 'xgboost-cpu==3.2.0' 'numpy==2.4.6'
cat > "$here/trees.py" <<'PYTHON'
import json
import logging

import numpy as np
import xgboost
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedXgbBagging
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
CLIENTS, ROUNDS, SAMPLES = 4, 10, 500


class Nodes:
    def get_node_ids(self):
        return range(CLIENTS)


def points(seed, count, classes):
    at = np.random.default_rng(seed).uniform(-1, 1, (count, 2))
    squares = np.floor(4 * at).sum(axis=1)
    rings = np.floor(3 * np.hypot(*at.T))
    return at, (squares if classes == 2 else rings).astype(int) % classes


def trees(model):
    return json.loads(model)["learner"]["gradient_booster"]["model"]


def record(model):
    return ArrayRecord([np.frombuffer(model, dtype=np.uint8)])


class Flower:
    def __init__(self):
        self.strategy, self.round = FedXgbBagging(), 0

    def __call__(self, model, replies):
        self.round += 1
        list(self.strategy.configure_train(self.round, record(model), ConfigRecord(), Nodes()))
        contents = [RecordDict({"arrays": record(r), "metrics": MetricRecord({"num-examples": SAMPLES})}) for r in replies]
        arrays, _ = self.strategy.aggregate_train(self.round, [Message(content, 0, "train") for content in contents])
        return arrays["0"].numpy().tobytes()


class Everything:
    def __call__(self, model, replies):
        whole, *more = [json.loads(each) for each in ([model] if model else []) + replies]
        ours = whole["learner"]["gradient_booster"]["model"]
        for reply in more:
            theirs = reply["learner"]["gradient_booster"]["model"]
            start = len(ours["trees"])
            ours["trees"] += [{**tree, "id": start + place} for place, tree in enumerate(theirs["trees"])]
            ours["tree_info"] += theirs["tree_info"]
            ours["iteration_indptr"] += [start + end for end in theirs["iteration_indptr"][1:]]
        ours["gbtree_model_param"]["num_trees"] = str(len(ours["trees"]))
        return json.dumps(whole).encode()


def run(rule, classes, epochs):
    params = {"max_depth": 4, "eta": 0.1, "nthread": 1, "objective": "binary:logistic"}
    if classes > 2:
        params.update(objective="multi:softprob", num_class=classes)
    sets = [xgboost.DMatrix(at, label=label) for at, label in (points(i, SAMPLES, classes) for i in range(CLIENTS))]
    model, sent = b"", 0
    for _ in range(ROUNDS):
        replies = []
        for one in sets:
            booster = xgboost.Booster(params, [one])
            if model:
                booster.load_model(bytearray(model))
            known = booster.num_boosted_rounds()
            for epoch in range(epochs):
                booster.update(one, known + epoch)
            replies.append(bytes(booster[known : known + epochs].save_raw("json")))
            sent += len(trees(replies[-1])["trees"])
        model = rule(model, replies)
    booster = xgboost.Booster(params)
    booster.load_model(bytearray(model))
    at, label = points(99, 4000, classes)
    told = booster.predict(xgboost.DMatrix(at))
    told = told.argmax(axis=1) if classes > 2 else told > 0.5
    recall = min((told[label == each] == each).mean() for each in range(classes))
    return sent, np.bincount(trees(model)["tree_info"]).tolist(), round(float((told == label).mean()), 2), round(float(recall), 2)


for classes, epochs in ((2, 1), (2, 5), (3, 1)):
    for rule in (Flower(), Everything()):
        print("SEEN", json.dumps([classes, epochs, type(rule).__name__, *run(rule, classes, epochs)]))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" trees.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: classes, local epochs, rule, trees sent, trees kept by class, accuracy, recall of the worst class:"
echo "$seen"
"$here/venv/bin/python" - "$seen" <<'PYTHON'
import json
import sys

two, two_all, five, five_all, three, three_all = map(json.loads, sys.argv[1].splitlines())
assert two[3:5] == two_all[3:5] == [40, [40]] and two[5] == two_all[5]
assert five[3:5] == [200, [44]] and five_all[3:5] == [200, [200]] and five[5] + 0.05 < five_all[5]
assert three[3:5] == [120, [40, 1, 1]] and three_all[3:5] == [120, [40, 40, 40]]
assert three[5] + 0.1 < three_all[5] and three[6] < 0.1 and three_all[6] > 0.7
PYTHON
echo "as described: one tree of each reply is kept, for class 0"
