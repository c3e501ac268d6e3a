"""FastGRNN (Kusupati et al., 2018, equations 3 to 5): a gated recurrent cell whose gate and candidate share W and U.

    z = sigmoid(W x + U h + b_z)     c = tanh(W x + U h + b_h)     h' = (zeta (1 - z) + nu) * c + z * h

zeta and nu are trained scalars in (0, 1), kept as logits. The full-rank form: sparsity comes from pruning here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FastGRNN(nn.Module):
    """Sequences (B, T, features), or images (B, C, H, W) read row by row: T = H, features = C * W; logits (B, classes)."""

    def __init__(self, features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.w = nn.Linear(features, hidden, bias=False)
        self.u = nn.Linear(hidden, hidden, bias=False)
        self.gate_bias = nn.Parameter(torch.ones(hidden))
        self.candidate_bias = nn.Parameter(torch.ones(hidden))
        self.zeta = nn.Parameter(torch.tensor([1.0]))
        self.nu = nn.Parameter(torch.tensor([-4.0]))
        self.fc = nn.Linear(hidden, num_classes)
        nn.init.orthogonal_(self.u.weight)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.transpose(1, 2).flatten(start_dim=2) if x.dim() == 4 else x
        driven = self.w(steps).unbind(dim=1)
        state = torch.zeros_like(driven[0])
        zeta, nu = self.zeta.sigmoid(), self.nu.sigmoid()
        for now in driven:
            total = now + self.u(state)
            gate = torch.sigmoid(total + self.gate_bias)
            candidate = torch.tanh(total + self.candidate_bias)
            state = (zeta * (1 - gate) + nu) * candidate + gate * state
        return self.fc(state)  # type: ignore[no-any-return]


def fastgrnn(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """FastGRNN with 80 hidden units; reads images row by row, `module:function` of your own for other sequences."""
    return FastGRNN(in_channels * image_size, max(1, round(80 * width)), num_classes)
