#!/usr/bin/env bash
# PyTorch: FlopCounterMode counts the backward pass of a convolution in g groups as 1 + g times the forward pass, instead of 2.
#
# torch 2.14.1, CPU. The backward pass of a convolution is two products of the forward pass's size, one for the gradient of the
# input and one for that of the weight, and the counter says so for a plain convolution. Where there are groups, the gradient of
# the weight is counted as if there were none: 5 forward passes for 4 groups, 17 for a depthwise convolution of 16 channels,
# 1,025 for one of 1,024. The same function written as 16 convolutions counts 2. An inverted residual as in MobileNetV2 (32
# channels, expanded six times) counts 25.5 instead of 2. Forward counts are right. The cost of training on devices, and what
# depthwise models save of it, come out wrong. A pull request of May 2026 (pytorch/pytorch 183405) has a correction; the release
# does not.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.14.1' 'numpy==2.4.6'
cat > "$here/groups.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def counted(step):
    with FlopCounterMode(display=False) as counter:
        result = step()
    return counter.get_total_flops(), result


def backward_over_forward(model, channels, side=8):
    images = torch.randn(2, channels, side, side, requires_grad=True)
    forward, out = counted(lambda: model(images))
    backward, _ = counted(lambda: out.sum().backward())
    return forward, backward / forward


def grouped(channels, groups):
    return nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)


seen = []
for channels, groups in ((16, 1), (16, 4), (16, 16), (1024, 1024)):
    forward, ratio = backward_over_forward(grouped(channels, groups), channels)
    assert forward == 2 * 2 * 64 * channels * (channels // groups) * 9  # 2 FLOPs, 2 images, 64 places, a 3 x 3 kernel
    seen.append(ratio)
whole = grouped(16, 16)  # the same function, each group a convolution of its own
alone = [nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(16)]
for place, each in enumerate(alone):
    each.weight.data.copy_(whole.weight.data[place : place + 1])


def apart(images):
    return torch.cat([each(images[:, i : i + 1]) for i, each in enumerate(alone)], 1)


images = torch.randn(2, 16, 8, 8)
assert torch.allclose(whole(images), apart(images), atol=1e-5)
seen.append(backward_over_forward(apart, 16)[1])
block = nn.Sequential(
    nn.Conv2d(32, 192, 1, bias=False), nn.ReLU6(), grouped(192, 192), nn.ReLU6(), nn.Conv2d(192, 32, 1, bias=False)
)
seen.append(backward_over_forward(block, 32)[1])
print("SEEN", *(f"{ratio:.1f}" for ratio in seen))
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" groups.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: backward over forward for 1, 4, 16 and 1,024 groups; 16 groups as 16 convolutions; an inverted residual: $seen"
[ "$seen" = '2.0 5.0 17.0 1025.0 2.0 25.5' ]
echo "as described: the backward pass of g groups counts as 1 + g forward passes"
