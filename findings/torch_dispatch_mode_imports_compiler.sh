#!/usr/bin/env bash
# PyTorch 2.14.1: the first operation under any TorchDispatchMode of one's own imports torch's compiler.
#
# A mode that only counts operations (FLOP counters, profilers, accountants of multiply-accumulates) compiles nothing. Yet
# every subclass with a `__torch_dispatch__` is wrapped when its class is made, and the wrapper imports `torch._dynamo` at the
# first operation that it sees: hundreds of modules and about a second of a CPU, in each process. A classmethod
# `_should_skip_dynamo` that returns False leaves the class unwrapped; the same counts then cost no import.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6
cat > "$place/count.py" <<'PYTHON'
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPT_OUT = sys.argv[1] == "opt-out"


class Counter(TorchDispatchMode):
    seen = 0

    if OPT_OUT:

        @classmethod
        def _should_skip_dynamo(cls):
            return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


model, image = torch.nn.Linear(4, 2), torch.zeros(1, 4)
modules, start = len(sys.modules), time.perf_counter()
with torch.no_grad(), Counter() as counter:
    model(image)
spent = time.perf_counter() - start
more = len(sys.modules) - modules
print(f"torch {torch.__version__} {sys.argv[1]}: {counter.seen} operations, {more} modules imported, {spent:.2f} s")
imported = "torch._dynamo" in sys.modules
assert counter.seen >= 1
sys.exit(imported == OPT_OUT)
PYTHON
"$place/venv/bin/python" "$place/count.py" default || { echo "changed: the compiler is not imported any more"; exit 1; }
"$place/venv/bin/python" "$place/count.py" opt-out || { echo "changed: the opt-out does not keep the compiler away"; exit 1; }
echo "as described: the default imports torch._dynamo, the opt-out does not"
# Seen with torch 2.14.1 (CPU): see the last lines of the output above; the numbers of modules and seconds differ by machine.
