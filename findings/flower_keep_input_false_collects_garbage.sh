#!/usr/bin/env bash
# Flower: `ArrayRecord.to_numpy_ndarrays(keep_input=False)` runs a full garbage collection of the process in every call.
#
# flwr 1.41.0. The argument is there to save memory. A call on a record of a single array of three numbers runs one full
# collection, whose time depends on all objects of the process and not on the record: a million small live objects make the
# call more than a hundred times as slow as with keep_input=True. A client that takes its model out of each message in
# this way pays that for each message (about a quarter of a second where PyTorch is imported).
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'flwr==1.41.0'
cat > "$here/collects.py" <<'PYTHON'
import gc
import json
import time

import numpy as np
from flwr.app import ArrayRecord

CALLS = 10
full = []
gc.callbacks.append(lambda phase, info: full.append(info["generation"]) if phase == "start" else None)
alive = [[i] for i in range(1_000_000)]
gc.collect()


def seconds(keep_input):
    records = [ArrayRecord([np.zeros(3)]) for _ in range(CALLS)]
    full.clear()
    start = time.perf_counter()
    for record in records:
        record.to_numpy_ndarrays(keep_input=keep_input)
    return (time.perf_counter() - start) / CALLS, full.count(2)


kept, without = seconds(True)
taken, collections = seconds(False)
print(json.dumps({"full collections": [without, collections], "slower": taken > 100 * kept}))
PYTHON
seen=$("$here/venv/bin/python" "$here/collects.py")
echo "seen: $seen"
[ "$seen" = '{"full collections": [0, 10], "slower": true}' ]
echo "as described: keep_input=False collects the garbage of the whole process in every call"
