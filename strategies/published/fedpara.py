"""FedPara (Hyeon-Woo, Ye-Bin and Oh, 2022, arXiv 2108.06098): weights as the Hadamard product of two low-rank matrices.

W = (X1 Y1^T) o (X2 Y2^T): four factors of rank r travel in the place of W, whose rank may be as large as r^2.
Filters of a convolution are the rows of a matrix. Layers that would not shrink, and the last one, stay as they are.
"""

from __future__ import annotations

from torch import Tensor, nn, randn

from fl_sim.models import prunable_names
from fl_sim.models.interface import changed
from fl_sim.models.reparametrized import Reparametrized, compute
from fl_sim.models.sequence import lstm
from fl_sim.models.simple import cnn_bn

RANK = 4


class Hadamard(Reparametrized):
    """A weight computed from four factors; the weight that it takes the place of is frozen and not used.

    Factors are normal with a deviation that gives W the variance 2 / fan-in (He et al., 2015).
    """

    sparse = ("x1", "y1", "x2", "y2")

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        deviation = (2 / (columns * rank**2)) ** (1 / 8)  # of W: rank^2 deviation^8
        self.x1, self.y1 = (nn.Parameter(deviation * randn(size, rank)) for size in (rows, columns))
        self.x2, self.y2 = (nn.Parameter(deviation * randn(size, rank)) for size in (rows, columns))

    def forward(self, weight: Tensor) -> Tensor:
        first, second = self.x1 @ self.y1.T, self.x2 @ self.y2.T
        return (first * second).view(weight.shape)


def shrinks(weight: Tensor, rank: int) -> bool:
    """Whether the factors of a weight have fewer numbers than the weight."""
    return 2 * rank * (len(weight) + weight[0].numel()) < weight.numel()


def factored(model: nn.Module) -> nn.Module:
    """The model with Hadamard products of low-rank factors in the place of its wide weight matrices, the last one excepted."""
    for name in prunable_names(model)[:-1]:
        path, _, attribute = name.rpartition(".")
        layer, weight = model.get_submodule(path), model.get_parameter(name)
        if shrinks(weight, RANK):
            weight.requires_grad_(False)
            compute(layer, attribute, Hadamard(weight.detach(), RANK))
    return model


factored_cnn, factored_lstm = changed(cnn_bn, factored), changed(lstm, factored)
