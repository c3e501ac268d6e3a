#!/usr/bin/env bash
# Flower Datasets: InnerDirichletPartitioner gives the highest class to nobody where labels do not count from 0.
#
# flwr-datasets 0.6.1. Where C classes occur, it looks for the labels 0 to C - 1. EMNIST's letters are labelled 1 to 26: there
# is no class 0 to deal, and z has no place in any partition. Labels 0 to 9 without a 4 lose the 9 likewise. Here 26 classes of
# 100 samples, ten partitions of 200: the partitions have the sizes that were asked for, 25 classes are dealt, and of the same
# letters labelled 0 to 25 all 26. The only warning is about sizes, the same in both cases. DirichletPartitioner and
# ShardPartitioner of the same package deal all 26. A classifier that is trained on these partitions never sees a z, and is
# tested on it.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'flwr-datasets==0.6.1' 'datasets==4.8.5' 'numpy==2.4.6'
cat > "$here/letters.py" <<'PYTHON'
import warnings

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, InnerDirichletPartitioner, ShardPartitioner

CLIENTS, SIZE = 10, 200
from_one = np.repeat(np.arange(1, 27), 100)
gap = np.repeat([0, 1, 2, 3, 5, 6, 7, 8, 9], 300)


def missing(partitioner, labels):
    """Classes that no partition has, and the warnings on the way, by number."""
    partitioner.dataset = Dataset.from_dict({"label": labels})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        parts = [partitioner.load_partition(number)["label"] for number in range(CLIENTS)]
    if isinstance(partitioner, InnerDirichletPartitioner):
        assert [len(part) for part in parts] == [SIZE] * CLIENTS
    dealt = set().union(*(set(part) for part in parts))
    return sorted(set(labels.tolist()) - dealt), len({str(each.message) for each in said})


def inner():
    return InnerDirichletPartitioner([SIZE] * CLIENTS, "label", alpha=1.0)


seen = [missing(inner(), labels) for labels in (from_one, from_one - 1, gap)]
others = DirichletPartitioner(CLIENTS, "label", alpha=1.0), ShardPartitioner(CLIENTS, "label", 2)
seen += [missing(other, from_one)[0] for other in others]
print("SEEN", *seen)
PYTHON
seen=$(cd "$here" && "$here/venv/bin/python" letters.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: classes in no partition and number of warnings, labels 1 to 26, 0 to 25, 0 to 9 without 4; two others, 1 to 26: $seen"
[ "$seen" = '([26], 1) ([], 1) ([9], 1) [] []' ]
echo "as described: the highest class is in no partition"
