"""MACs by hand of products that are neither dense matrices nor convolutions of images, and of what is no product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fl_sim import count_macs
from fl_sim.models.macs import layer_macs


class Applied(nn.Module):
    """A function of the inputs and one weight."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.apply_to, self.weight = apply, nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.weight)


ADJACENCY = torch.zeros(6, 6).index_put_((torch.tensor([0, 1, 5]), torch.tensor([2, 4, 0])), torch.ones(3))
"""Three of 36 places are stored where it is sparse."""
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...], int]] = {
    # function, shape of the weight, shape of one sample, MACs
    "convolution_in_time": (
        lambda x, w: torch.conv_tbc(x.transpose(0, 1), w, torch.zeros(5)),
        (3, 4, 5),
        (8, 4),
        6 * 3 * 4 * 5,
    ),
    "euclidean_distances": (torch.cdist, (7, 4), (3, 4), 3 * 7 * 4),
    "distances_of_absolute_values": (lambda x, w: torch.cdist(x, w, p=1), (7, 4), (3, 4), 0),
    "complex": (lambda x, w: (x.to(torch.complex64) @ w.to(torch.complex64)).real, (4, 5), (4,), 4 * 4 * 5),
    "sparse": (lambda x, w: torch.sparse.mm(ADJACENCY.to_sparse(), x[0] @ w), (4, 5), (6, 4), 6 * 4 * 5 + 3 * 5),
    "sparse_rows": (lambda x, w: ADJACENCY.to_sparse_csr() @ (x[0] @ w), (4, 5), (6, 4), 6 * 4 * 5 + 3 * 5),
    "sparse_behind": (lambda x, w: (x[0] @ w) @ ADJACENCY.to_sparse(), (4, 6), (5, 4), 5 * 4 * 6 + 5 * 3),
    "dot": (lambda x, w: torch.vdot(x[0], w), (4,), (4,), 4),
    "single_values": (lambda x, w: (x * w).sum(-1), (4,), (4,), 0),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", CASES)
def test_macs_by_hand(name: str) -> None:
    apply, weight, sample, macs = CASES[name]
    assert count_macs(Applied(apply, torch.ones(weight)), sample) == macs


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
def test_what_computes_a_weight_is_no_product_of_a_sample() -> None:
    """PyTorch's two ways to normalise by the spectral norm count alike: it is done once for a batch of any size."""
    old = nn.utils.spectral_norm(nn.Linear(6, 4))
    new = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
    assert count_macs(old, (6,)) == count_macs(new, (6,)) == 24
    behind = nn.Sequential(old, nn.Linear(4, 3))  # counting goes on behind it
    assert sum(layer_macs(behind, (6,)).values()) == 24 + 12
