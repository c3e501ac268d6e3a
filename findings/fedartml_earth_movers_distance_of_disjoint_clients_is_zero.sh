#!/usr/bin/env bash
# FedArtML: its earth mover's distance is 0, "identical", for clients that have no class in common, and higher for like ones.
#
# fedartml 0.1.34, scipy 1.17.1. The library measures how far clients' label distributions are apart, and create_clients returns
# Jensen-Shannon, Hellinger and "earth-movers" for each split. The last hands two clients' lists of shares to scipy's
# wasserstein_distance(u_values, v_values), whose arguments are positions of samples. Each share is thus a sample, and which class
# it is of is lost: shares (1, 0, 0) and (0, 1, 0) are the same samples in another order, at distance 0. Ten clients with one class
# each are as far apart as can be: the other two distances are 1, and this one is 0. For a random split of the same labels the
# two are 0.13 and 0.15, and this one is 0.10, so that IID data count as farther apart than disjoint ones. Scipy's distance of the
# labels themselves, one unit for each class that a sample is moved by, is 0.38 and 3.67. A cost of its own for other ways from
# class to class would not help: no earth mover's distance is 0 for distributions that differ. No warning is given.
#
# The files under test are loaded without the package's __init__, which asks for plots.
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'numpy==2.4.6' 'pandas==2.3.3' 'scipy==1.17.1'
"$here/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps 'fedartml==0.1.34'
cat > "$here/distances.py" <<'PYTHON'
import importlib.util
import sys
import types
import warnings
from itertools import combinations

warnings.simplefilter("ignore")
import numpy as np

places = importlib.util.find_spec("fedartml").submodule_search_locations
sys.modules["fedartml"] = types.ModuleType("fedartml")
sys.modules["fedartml"].__path__ = list(places)
from fedartml.fl_split_as_federated_data import SplitAsFederatedData
from fedartml.function_base import earth_movers_distance
from scipy.stats import wasserstein_distance

CLASSES = 10
rng = np.random.default_rng(0)
labels = rng.permutation(np.repeat(np.arange(CLASSES), 100)).tolist()
features = rng.normal(size=(len(labels), 4)).tolist()


def split(percent):
    """The library's three distances and the mean over pairs of clients of the mass times the classes it is moved."""
    clients, _, _, distances = SplitAsFederatedData(random_state=0).create_clients(
        features, labels, num_clients=CLASSES, method="percent_noniid", percent_noniid=percent
    )
    parts = [[label for _, label in client] for client in clients["without_class_completion"].values()]
    moved = np.mean([wasserstein_distance(one, other) for one, other in combinations(parts, 2)])
    told = distances["without_class_completion"]
    return [told[name] for name in ("jensen-shannon", "hellinger", "earth-movers")] + [moved]


print("SEEN three clients of one class each:", f"{earth_movers_distance(np.eye(3)):.2f}")
for percent in (0, 50, 100):
    print(f"SEEN {percent} % by class:", *(f"{value:.2f}" for value in split(percent)))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" distances.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: Jensen-Shannon, Hellinger and earth mover's distance as the library has them, and the last one by classes:"
echo "$seen"
[ "$seen" = 'three clients of one class each: 0.00
0 % by class: 0.13 0.15 0.10 0.38
50 % by class: 0.53 0.54 0.11 2.05
100 % by class: 1.00 1.00 0.00 3.67' ]
echo "as described: the earth mover's distance of clients without a common class is 0"
