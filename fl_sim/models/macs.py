"""Multiply-accumulates (MACs) of one sample: of all products with weights and of products of activations; 1 MAC = 2 FLOPs.

Counted are the convolutions, matrix products and bilinear forms that a forward pass really runs, whatever module or
function asks for them: convolutions, linear layers, attention, recurrent layers, matrices of one's own, Euclidean distances.
A product of complex numbers is four, and of a sparse matrix only its stored values count. Looking a row up in an embedding is
no product; norms, activation functions, products of single values and sums are left out. So is what computes a weight before
the pass, as spectral norms do: it is done once for a batch of any size.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fl_sim.core.types import Mask
from fl_sim.models.layers import prunable_names
from fl_sim.models.memory_overlap import strided_parts
from fl_sim.models.parameters import computes_weights

ACTIVATIONS = "products of activations"
"""The entry of products that no weight takes part in, such as those of queries and keys."""
aten = torch.ops.aten
Args = tuple[object, ...]
Product = tuple[int, tuple[Tensor, ...]]
"""(MACs, the factors, of which one may be a weight)."""


def count_macs(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    mask: Mask | None = None,
    tokens: bool = False,
    sample: Tensor | None = None,
) -> int:
    """MACs of a forward pass over one sample of `input_shape`, zeros, for instance (C, H, W); `tokens` are int64.

    A `sample` takes the place of the zeros, where a model does more for some samples than for others. With `mask`, only alive
    weights count, each as often as it is used: nnz * H_out * W_out for a convolution, nnz for a linear layer. The model is left
    untouched.
    """
    return sum(layer_macs(model, input_shape, mask=mask, tokens=tokens, sample=sample).values())


def layer_macs(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    mask: Mask | None = None,
    tokens: bool = False,
    sample: Tensor | None = None,
) -> dict[str, int]:
    """Name of the weight -> MACs, in the order in which they run; as `count_macs`, which is the sum.

    A weight that several layers share has one entry, with the MACs of all its uses. What no weight takes part in is the
    entry `ACTIVATIONS`.
    """
    one = torch.zeros(input_shape, dtype=torch.int64 if tokens else None) if sample is None else sample.cpu()
    try:
        return _counted(model, one, mask, 1)
    except ValueError:  # BatchNorm without statistics needs several samples; of two and three the difference is one
        fewer, more = (_counted(model, one, mask, samples) for samples in (2, 3))
        return {name: count - fewer[name] for name, count in more.items()}


def _counted(model: nn.Module, sample: Tensor, mask: Mask | None, times: int) -> dict[str, int]:
    """MACs by weight of a pass over so many times the same sample."""
    probe = copy.deepcopy(model).cpu().eval()
    _part(probe)
    counter = _Counter(_named(probe, prunable_names(model)), mask or {})
    for path, module in probe.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # those take no hooks, and compute no weights by them
            if computes_weights(module):
                module.register_forward_pre_hook(counter.pause, prepend=True)
            module.register_forward_pre_hook(partial(counter.enter, path))
    with torch.no_grad(), parametrize.cached(), _composed():
        for path, module in probe.named_modules():
            counter.learn(path, _computed(module))
        with counter:
            probe(sample.repeat(times, *[1] * sample.dim()))
    return counter.macs


def _part(model: nn.Module) -> None:
    """Give each tensor memory of its own, by which it is known, where it shares some."""
    tensors = [*model.parameters(), *model.buffers()]
    holders = Counter(map(_address, tensors))
    for tensor in tensors:
        if holders[_address(tensor)] > 1:
            tensor.data = tensor.data.clone()


def _computed(module: nn.Module) -> dict[str, object]:
    """Weights that a module's parametrizations compute from other tensors; once, where `parametrize.cached` holds."""
    if not parametrize.is_parametrized(module):
        return {}
    return {name: getattr(module, name) for name in cast(nn.ModuleDict, module.parametrizations)}


@contextmanager
def _composed() -> Iterator[None]:
    """Let attention run as the matrix products that it is made of, not as one operation whose products nobody sees."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _named(model: nn.Module, preferred: Collection[str]) -> dict[int, tuple[str, Tensor]]:
    """Address -> name and tensor of each parameter and buffer; of several names the first, or one that is preferred."""
    named: dict[int, tuple[str, Tensor]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        known = named.get(_address(tensor))
        if known is None or (name in preferred and known[0] not in preferred):
            named[_address(tensor)] = name, tensor
    return named


def _address(tensor: Tensor) -> int:
    return strided_parts(tensor)[-1].untyped_storage().data_ptr()


class _Counter(TorchDispatchMode):
    """Adds up the MACs of the products that run while it is entered.

    Attributes:
        weights: address -> name and tensor; the tensors are held so that no other is made at the same address.
        macs: name of the weight -> MACs so far.
    """

    def __init__(self, weights: dict[int, tuple[str, Tensor]], mask: Mask) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights, self.mask = weights, mask
        self.macs: dict[str, int] = {}
        self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep PyTorch from importing its compiler at the first operation, which takes a second; nothing compiles here."""
        return False

    def learn(self, path: str, tensors: Mapping[str, object]) -> None:
        """Tell weights by their address that are no parameters."""
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                self.weights[_address(value)] = f"{path}.{name}".removeprefix("."), value

    def pause(self, module: nn.Module, inputs: object) -> None:
        """A module's hooks are about to compute its weight."""
        self._paused = True

    def enter(self, path: str, module: nn.Module, inputs: object) -> None:
        """A module is called, after the hooks by which `torch.nn.utils.prune` computes its weight."""
        self._paused = False
        self.learn(path, vars(module))

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        output = func(*args, **(kwargs or {}))
        operation = getattr(func, "overloadpacket", None)
        if operation in COPIES and (known := self._weight(cast(Tensor, args[0]))) is not None:
            made = cast(Tensor, output)
            if made.numel() == known[1].numel():
                self.weights[_address(made)] = known[0], made
        for macs, factors in () if self._paused else PRODUCTS.get(operation, _none)(args, output):
            self._book(4 * macs if all(map(torch.is_complex, factors)) else macs, factors)
        return output

    def _weight(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        return self.weights.get(_address(tensor))

    def _book(self, macs: int, factors: tuple[Tensor, ...]) -> None:
        name = ACTIVATIONS
        for factor in factors:
            if (known := self._weight(factor)) is not None:
                name = known[0]
                if name in self.mask:
                    macs = macs // max(1, factor.numel()) * _alive(factor, known[1], self.mask[name])
                break
        self.macs[name] = self.macs.get(name, 0) + macs


def _alive(part: Tensor, weight: Tensor, mask: Tensor) -> int:
    """Ones of the mask where `part` looks at the weight: a layer may use a weight in pieces, or transposed."""
    if part.numel() == weight.numel():
        return int(mask.count_nonzero())
    laid = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bool).copy_(mask)
    return int(laid.as_strided(part.shape, part.stride(), part.storage_offset()).count_nonzero())


def _none(args: Args, output: object) -> list[Product]:
    """Of operations that multiply no matrices."""
    return []


def _matmul(args: Args, output: object, *, first: int = 0) -> list[Product]:
    """Of (..., m, k) and (..., k, n), or of a matrix and a vector: k for each entry of the output.

    A value that a sparse matrix stores meets each column of the other one once.
    """
    left, right = cast(Tensor, args[first]), cast(Tensor, args[first + 1])
    if left.layout != torch.strided:
        return [(_stored(left) * (right.numel() // right.shape[0]), (right, left))]
    if right.layout != torch.strided:
        return [(_stored(right) * (left.numel() // left.shape[-1]), (right, left))]
    return [(cast(Tensor, output).numel() * left.shape[-1], (right, left))]


def _stored(matrix: Tensor) -> int:
    return strided_parts(matrix)[-1].numel()


def _sampled(args: Args, output: object) -> list[Product]:
    """Of two matrices, at the stored places of a third, sparse one."""
    left, right = cast(Tensor, args[1]), cast(Tensor, args[2])
    return [(_stored(cast(Tensor, output)) * left.shape[-1], (right, left))]


def _distances(args: Args, output: object) -> list[Product]:
    """Of rows to rows: the square of each difference where they are Euclidean; other distances multiply nothing."""
    left, right = cast(Tensor, args[0]), cast(Tensor, args[1])
    return [(cast(Tensor, output).numel() * left.shape[-1], (right, left))] if args[2] == 2.0 else []


def _convolution_in_time(args: Args, output: object) -> list[Product]:
    """Of (time, batch, channels) with weights (kernel, channels in, channels out): every weight at every output position."""
    weight, made = cast(Tensor, args[1]), cast(Tensor, output)
    return [(weight.numel() * made.shape[:2].numel(), (weight,))]


def _batch_sum(args: Args, output: object) -> list[Product]:
    """Of (b, m, k) and (b, k, n), summed over b."""
    left, right = cast(Tensor, args[1]), cast(Tensor, args[2])
    return [(left.numel() * right.shape[-1], (right, left))]


def _convolution(args: Args, output: object) -> list[Product]:
    """Every weight at every position: of the output, or of the input where the convolution is transposed."""
    source, weight, transposed = cast(Tensor, args[0]), cast(Tensor, args[1]), bool(args[6])
    positions = source if transposed else cast(Tensor, output)
    return [(weight.numel() * positions.numel() // positions.shape[1], (weight,))]


def _recurrent(args: Args, output: object) -> list[Product]:
    """Products of one layer and direction of an LSTM on (T, B, features): both weights at every step."""
    steps = cast(Tensor, args[0]).shape[:2].numel()
    return [(steps * weight.numel(), (weight,)) for weight in (cast(Tensor, args[1]), cast(Tensor, args[2]))]


def _bilinear(args: Args, output: object) -> list[Product]:
    """x' W y for each output feature: every weight once a row."""
    weight = cast(Tensor, args[1])
    return [(weight.numel() * cast(Tensor, args[0]).shape[0], (weight,))]


COPIES = frozenset({aten.clone, aten._to_copy})
PRODUCTS: Mapping[object, Callable[[Args, object], list[Product]]] = {
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.mv: _matmul,
    aten.dot: _matmul,
    aten.addmm: partial(_matmul, first=1),
    aten.baddbmm: partial(_matmul, first=1),
    aten.addmv: partial(_matmul, first=1),
    aten.addbmm: _batch_sum,
    aten.vdot: _matmul,
    aten._int_mm: _matmul,
    aten._scaled_mm: _matmul,
    aten._grouped_mm: _matmul,
    aten._sparse_addmm: partial(_matmul, first=1),
    aten.sparse_sampled_addmm: _sampled,
    aten._cdist_forward: _distances,
    aten.convolution: _convolution,
    aten.conv_tbc: _convolution_in_time,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._trilinear: _bilinear,
}
