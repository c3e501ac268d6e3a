#!/usr/bin/env bash
# NVIDIA FLARE: the AdaQuant filters turn tensors whose values lie within 0.0002 of one another into NaN.
#
# nvflare 2.9.0, ModelQuantizer("adaquant") and ModelDequantizer, both filters of message quantization. The number of levels is
# n = sqrt(range * bits * ln 4 / 0.01), at least 1, and is then rounded to 2^ceil(log2 n) - 1: for n = 1 that is 0, no level at
# all. All values become 0, and the receiver computes 0 / 0. A range of 0 has a case of its own, so that tensors that have changed
# a little are hit: below a range of 0.000225 in float32, of 0.00045 in 16 bits. Fine-tuning with Adam at rate 0.00001, ten steps,
# gives such updates by design: of the weight difference (WEIGHT_DIFF) that the client sends, every value of every tensor arrives
# as NaN, and of whole weights (WEIGHTS) those of the LayerNorm, 1 and 0 before the training. No error and no warning. The
# filters' float16 hands over the same tensors well.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'nvflare==2.9.0' 'torch==2.14.1' 'numpy==2.4.6' \
  'bitsandbytes==0.50.2'
cat > "$here/updates.py" <<'PYTHON'
import logging
import warnings

warnings.simplefilter("ignore")
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer
from torch import nn

logging.disable(logging.CRITICAL)


def received(kind, tensors, quantization):
    sent = DXO(data_kind=kind, data={name: tensor.clone() for name, tensor in tensors.items()})
    sent = ModelQuantizer(quantization).process_dxo(sent, Shareable(), FLContext())
    return ModelDequantizer().process_dxo(sent, Shareable(), FLContext()).data


def nans(tensors):
    return [int(tensor.isnan().sum()) for tensor in tensors.values()]


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 50), nn.LayerNorm(50), nn.ReLU(), nn.Linear(50, 2))
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
samples, labels = torch.randn(200, 20), torch.randint(0, 2, (200,))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
for _ in range(10):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(samples), labels).backward()
    optimizer.step()
after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
moved = {name: after[name] - before[name] for name in after}
print("SEEN sizes", *(tensor.numel() for tensor in after.values()))
for quantization in ("adaquant", "float16"):
    print(f"SEEN {quantization}, NaN of the difference:", *nans(received(DataKind.WEIGHT_DIFF, moved, quantization)))
    print(f"SEEN {quantization}, NaN of the weights:", *nans(received(DataKind.WEIGHTS, after, quantization)))
for spread in (2.3e-4, 2.2e-4):
    one = {"one": torch.linspace(0, spread, 100)}
    print(f"SEEN adaquant, NaN of 100 values from 0 to {spread}:", *nans(received(DataKind.WEIGHTS, one, "adaquant")))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" updates.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen, by tensor:"
echo "$seen"
[ "$seen" = 'sizes 1000 50 50 50 100 2
adaquant, NaN of the difference: 1000 50 50 50 100 2
adaquant, NaN of the weights: 0 0 50 50 0 0
float16, NaN of the difference: 0 0 0 0 0 0
float16, NaN of the weights: 0 0 0 0 0 0
adaquant, NaN of 100 values from 0 to 0.00023: 0
adaquant, NaN of 100 values from 0 to 0.00022: 100' ]
echo "as described: AdaQuant hands small ranges over as NaN"
