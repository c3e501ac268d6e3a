"""Models whose weights nobody drew, for tests of names, shapes and counts: most of building a ResNet is drawing them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from torch import Tensor, nn

DRAWS = ("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_", "uniform_", "normal_")


def _left(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor


@contextmanager
def unfilled() -> Iterator[None]:
    """What is built inside has whatever values its memory had."""
    with ExitStack() as patches:
        for name in DRAWS:
            patches.enter_context(mock.patch.object(nn.init, name, _left))
        yield
