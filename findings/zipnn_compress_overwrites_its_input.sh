#!/usr/bin/env bash
# ZipNN: compressing a float32 or bfloat16 tensor overwrites it. The model in memory is destroyed, and the next copy is wrong.
#
# zipnn 0.5.4, torch 2.14.1. "Lossless", and so it is: the first payload decodes to the weights bit for bit. But `compress`
# rotates the bits of its input in place, a torch tensor's memory or even an immutable `bytes` object's, and leaves it so: a
# weight of 1.5 is 2.55e38 afterwards. A server that compresses its model once for each of three clients gives the second and
# third other models, and trains on from garbage. No error, no warning, nothing in the README. float16 tensors and NumPy arrays
# are left as they were. The usual check, decompress(compress(x)) == x, fails although the payload is right, because x is what
# changed. A measurement of compressed sizes has to hand over a copy.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'zipnn==0.5.4' 'torch==2.14.1' 'numpy==2.4.6'
cat > "$here/three.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from zipnn import ZipNN


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def changes(dtype):
    tensor = torch.linspace(-1, 1, 1000).to(dtype)
    before = bits(tensor).clone()
    ZipNN(input_format="torch").compress(tensor)
    return not torch.equal(bits(tensor), before)


torch.manual_seed(0)
model = torch.nn.Linear(100, 100)
sent = model.weight.detach().clone()
payloads = [ZipNN(input_format="torch").compress(model.weight.detach()) for _ in range(3)]
decoded = [torch.equal(bits(ZipNN(input_format="torch").decompress(payload)), bits(sent)) for payload in payloads]

one = torch.full((4,), 1.5)
ZipNN(input_format="torch").compress(one)
raw = torch.full((4,), 1.5).numpy().tobytes()
kept = bytes(bytearray(raw))
ZipNN(input_format="byte", bytearray_dtype="float32").compress(raw)
changed = [changes(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
print("SEEN", *decoded, torch.equal(model.weight, sent), f"{one[0].item():.3g}", raw == kept, *changed)
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" three.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: three payloads of one weight decode to it; the weight is as before; 1.5 became; bytes are as before;" \
  "float32, bfloat16, float16 changed: $seen"
[ "$seen" = 'True False False False 2.55e+38 False True True False' ]
echo "as described: compress destroys the float32 and bfloat16 tensors that it is given"
