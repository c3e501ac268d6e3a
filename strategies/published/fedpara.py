"""FedPara (Hyeon-Woo, Ye-Bin and Oh, 2022, arXiv 2108.06098): weights as the Hadamard product of two low-rank matrices.

W = (X1 Y1^T) o (X2 Y2^T): four factors of rank r travel in the place of W, whose rank may be as large as r^2.
Filters of a convolution are the rows of a matrix. Layers that would not shrink, and the last one, stay as they are.
"""

from __future__ import annotations

from torch import Tensor, nn, randn
from torch.nn.utils import parametrize

from fl_sim.models.layers import CONVOLUTION
from fl_sim.models.reparametrized import Reparametrized
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


def factored_cnn(*, num_classes: int, in_channels: int, image_size: int, width: float = 1.0) -> nn.Module:
    """`cnn_bn` whose wide layers are Hadamard products of low-rank factors."""
    model = cnn_bn(num_classes=num_classes, in_channels=in_channels, image_size=image_size, width=width)
    for layer in list(model.modules()):
        if isinstance(layer, CONVOLUTION) and shrinks(layer.weight, RANK):
            layer.weight.requires_grad_(False)
            parametrize.register_parametrization(layer, "weight", Hadamard(layer.weight.detach(), RANK))
    return model
