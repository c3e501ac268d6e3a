#!/usr/bin/env bash
# FedLab: the balanced (and unbalanced) "dirichlet" partition is IID, whatever alpha. Its indices are of a shuffled copy.
#
# fedlab 1.3.0. CIFAR10Partitioner (and CIFAR100Partitioner) with balance=True or False and partition="dirichlet" calls
# client_inner_dirichlet_partition, the scheme of the FedDyn paper. The function shuffles the labels first, deals classes by
# Dirichlet draws, and returns positions in the shuffled labels. Nobody maps them back, and the user takes them for positions in
# the data. Every sample is dealt once and the sizes are right, so that nothing looks wrong, but the labels are a random draw:
# 5,000 labels of ten classes, ten clients, alpha 0.5, and the largest class of a client has 12 % on average, as in the IID
# scheme (12 %), and also with alpha 100. With the permutation of the same seed undone it is 28 % (for alpha 100: 13 %), and
# balance=None, another scheme, has 39 %. Results "under non-IID data" are thus IID ones. The function also counts down the array of
# sizes that it was given: all are 0 afterwards. No warning is given.
#
# The files under test are loaded without the package's __init__, which asks for PyTorch.
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'numpy==2.4.6' 'pandas==2.3.3'
"$here/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps 'fedlab==1.3.0'
cat > "$here/clients.py" <<'PYTHON'
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

top = Path(importlib.util.find_spec("fedlab").submodule_search_locations[0]).parent
for name in ("fedlab", "fedlab.utils"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(top.joinpath(*name.split(".")))]
from fedlab.utils.dataset import CIFAR10Partitioner
from fedlab.utils.dataset.functional import client_inner_dirichlet_partition

CLIENTS, SEED = 10, 1
labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))


def largest(parts, labels):
    """The share of a client's largest class, averaged over clients."""
    shares = [np.bincount(labels[parts[client]]).max() / len(parts[client]) for client in range(CLIENTS)]
    return f"{np.mean(shares):.2f}"


def parts(**options):
    return CIFAR10Partitioner(labels, CLIENTS, verbose=False, seed=SEED, **options)


np.random.seed(SEED)
shuffled = labels[np.random.permutation(len(labels))]
for alpha in (0.5, 100.0):
    dealt = parts(balance=True, partition="dirichlet", dir_alpha=alpha)
    once = sorted(np.concatenate([dealt[client] for client in range(CLIENTS)])) == list(range(len(labels)))
    print(f"SEEN alpha {alpha:g}:", once, largest(dealt, labels), largest(dealt, shuffled))
print("SEEN IID:", largest(parts(balance=True, partition="iid"), labels))
print("SEEN balance=None, alpha 0.5:", largest(parts(balance=None, partition="dirichlet", dir_alpha=0.5), labels))
sizes = np.full(CLIENTS, 100)
client_inner_dirichlet_partition(labels, CLIENTS, 10, 0.5, sizes, verbose=False)
print("SEEN sizes of 100 after the call:", *set(sizes.tolist()))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" clients.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: every sample dealt once, share of a client's largest class, the same with the shuffling undone:"
echo "$seen"
[ "$seen" = 'alpha 0.5: True 0.12 0.28
alpha 100: True 0.12 0.13
IID: 0.12
balance=None, alpha 0.5: 0.39
sizes of 100 after the call: 0' ]
echo "as described: the Dirichlet partition is IID"
