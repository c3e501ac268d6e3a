#!/usr/bin/env bash
# Opacus: gradients of convolutions with padding_mode "circular", "reflect" or "replicate" are those of zero padding.
#
# opacus 1.6.0, torch 2.14.1. The forward pass pads as the layer says. The per-sample gradients of Conv1d, Conv2d and Conv3d
# unfold the input once more, and pad with zeros whatever the mode. In a 3 x 3 convolution of 4 x 4 maps, as in the last stage of
# a ResNet for 32 x 32 images, the weight's gradient is wrong by half of its norm for normal inputs, and by a third for positive
# ones, as they come out of a ReLU: another model is learned than the one that was written down. `force_functorch=True` has it
# right. No error, no warning, and ModuleValidator has nothing to say.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'opacus==1.6.0' 'torch==2.14.1' 'numpy==2.4.6'
cat > "$here/pads.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

MODES = ("zeros", "circular", "reflect", "replicate")
LABEL = torch.tensor([3])


class Net(nn.Module):
    def __init__(self, padding_mode):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode=padding_mode)
        self.out = nn.Linear(16, 10)

    def forward(self, maps):
        return self.out(torch.relu(self.conv(maps)).mean(dim=(2, 3)))


def wrong(padding_mode, maps, **how):
    model = Net(padding_mode)
    assert not ModuleValidator.validate(model)
    hooked = GradSampleModule(model, loss_reduction="sum", **how)
    nn.functional.cross_entropy(hooked(maps), LABEL).backward()
    weight = model.conv.weight
    return ((weight.grad_sample[0] - weight.grad).norm() / weight.grad.norm()).item()


torch.manual_seed(1)
normal, positive = torch.randn(1, 16, 4, 4), 4 * torch.rand(1, 16, 4, 4)
print("SEEN normal inputs", *(f"{wrong(mode, normal):.2f}" for mode in MODES))
print("SEEN positive inputs", *(f"{wrong(mode, positive):.2f}" for mode in MODES))
print("SEEN positive inputs, functorch", *(f"{wrong(mode, positive, force_functorch=True):.2f}" for mode in MODES))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" pads.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen, for padding with zeros, circular, reflect, replicate:"
echo "$seen"
[ "$seen" = 'normal inputs 0.00 0.50 0.49 0.52
positive inputs 0.00 0.33 0.35 0.34
positive inputs, functorch 0.00 0.00 0.00 0.00' ]
echo "as described: the gradient is that of zero padding"
