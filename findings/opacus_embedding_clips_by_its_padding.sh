#!/usr/bin/env bash
# Opacus: nn.Embedding's padding_idx is ignored. Padding fills the gradient's norm, so that clipping leaves little of the words.
#
# opacus 1.6.0, torch 2.14.1. "The entries at padding_idx do not contribute to the gradient", PyTorch says of nn.Embedding, and
# its own gradient is zero there. The per-sample gradients of grad_sample_mode "hooks" (the default) have the row of the padding
# like any other: in texts of 5 to 19 words, padded to 128 and averaged, it has over 99.9 % of the norm, and they are clipped by
# it. With max_grad_norm = 0.01 and no noise, one step of SGD moves the words 31 times less than in mode "functorch", which has
# the gradient right, and moves the padding instead. So does "ew". Mode "ghost" takes the same wrong norms: the padding stays, the
# words are clipped as much. The noise is for the full norm, so that what is learned of words drowns in it. ModuleValidator has
# nothing to say. Averaging and recurrent models are hit; where a mask hides the padding from all that follows, its gradient is
# zero anyway.
#
# Needs Python 3.11 or later and the package index. Status 0: the behaviour is as described.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install --quiet --disable-pip-version-check 'opacus==1.6.0' 'torch==2.14.1' 'numpy==2.4.6'
cat > "$here/padding.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

TEXTS, LENGTH, WORDS, PAD = 16, 128, 50, 0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(WORDS, 8, padding_idx=PAD)
        self.out = nn.Linear(8, 2)
        for each in self.out.parameters():
            each.requires_grad = False

    def forward(self, texts):
        return self.out(self.words(texts).mean(dim=1))


torch.manual_seed(0)
texts = torch.randint(1, WORDS, (TEXTS, LENGTH))
for text, length in zip(texts, torch.randint(5, 20, (TEXTS,))):
    text[length:] = PAD
labels = torch.randint(0, 2, (TEXTS,))


def step(mode):
    model = Model()
    before = model.words.weight.detach().clone()
    private = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(texts, labels), batch_size=TEXTS),
        noise_multiplier=0.0,
        max_grad_norm=0.01,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer = private[:2]
    loss = private[2] if mode == "ghost" else nn.CrossEntropyLoss()
    loss(wrapped(texts), labels).backward()
    optimizer.step()
    moved = model.words.weight.detach() - before
    return moved[1:].norm().item(), moved[PAD].norm().item()


hooked = GradSampleModule(Model(), loss_reduction="sum")
nn.functional.cross_entropy(hooked(texts), labels, reduction="sum").backward()
weight = hooked._module.words.weight
share = (weight.grad_sample[:, PAD].norm(dim=1) / weight.grad_sample.flatten(1).norm(dim=1)).min().item()
moves = {mode: step(mode) for mode in ("functorch", "ew", "hooks", "ghost")}
print(
    "SEEN",
    len(ModuleValidator.validate(Model())),
    f"{weight.grad[PAD].norm().item():g} {share:.3f}",
    *(f"{mode} {moves['functorch'][0] / words:.0f} {padding:.3f}" for mode, (words, padding) in moves.items()),
)
PYTHON
seen=$(cd "$here" && OMP_NUM_THREADS=1 "$here/venv/bin/python" padding.py 2>/dev/null | sed -n 's/.*SEEN //p')
echo "seen: complaints of the validator; gradient of the padding in PyTorch, its share of Opacus' norms; by mode, how many" \
  "times less the words move, and how far the padding: $seen"
[ "$seen" = '0 0 0.999 functorch 1 0.000 ew 31 0.004 hooks 31 0.004 ghost 31 0.000' ]
echo "as described: the gradient's norm is that of the padding"
