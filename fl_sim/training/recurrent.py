"""PyTorch's recurrent layers step by step in plain operations: `torch.func.vmap` has no rule for the whole layers.

    with unrolled(model):
        vmap(...)

The formulas are those of the documentation of `torch.nn.GRU`, `LSTM` and `RNN`; results differ from the layers' by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

State = tuple[Tensor, ...]
"""What a cell hands on, (B, hidden) each; the first is also its output."""
Cell = Callable[[Tensor, Callable[[Tensor], Tensor], State], State]
"""(input part (B, gates * hidden), recurrent part as a function of the output, state) -> next state."""


def _gru(driven: Tensor, recurrent: Callable[[Tensor], Tensor], state: State) -> State:
    (before,) = state
    from_input, from_state = driven.chunk(3, dim=-1), recurrent(before).chunk(3, dim=-1)
    reset = torch.sigmoid(from_input[0] + from_state[0])
    update = torch.sigmoid(from_input[1] + from_state[1])
    new = torch.tanh(from_input[2] + reset * from_state[2])
    return (new + update * (before - new),)


def _lstm(driven: Tensor, recurrent: Callable[[Tensor], Tensor], state: State) -> State:
    before, cell = state
    entering, forget, new, out = (driven + recurrent(before)).chunk(4, dim=-1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(entering) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(cell), cell


def _rnn_tanh(driven: Tensor, recurrent: Callable[[Tensor], Tensor], state: State) -> State:
    return (torch.tanh(driven + recurrent(state[0])),)


def _rnn_relu(driven: Tensor, recurrent: Callable[[Tensor], Tensor], state: State) -> State:
    return (torch.relu(driven + recurrent(state[0])),)


CELLS: dict[str, tuple[Cell, int]] = {
    "GRU": (_gru, 1),
    "LSTM": (_lstm, 2),
    "RNN_TANH": (_rnn_tanh, 1),
    "RNN_RELU": (_rnn_relu, 1),
}
"""Mode of a layer -> its cell, and the number of tensors in its state."""


KINDS = (nn.GRU, nn.LSTM, nn.RNN)


class Unrolled(nn.Module):
    """Stands in the place of a recurrent layer and has its parameters, under their names."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        self.mode, self.input_size, self.hidden_size = layer.mode, layer.input_size, layer.hidden_size
        self.num_layers, self.bias, self.batch_first = layer.num_layers, layer.bias, layer.batch_first
        self.bidirectional = layer.bidirectional
        self.train(layer.training)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no block of memory to arrange."""

    def forward(self, x: Tensor, hx: Tensor | State | None = None) -> tuple[Tensor, Tensor | State]:
        """See the layers' own; inputs are (B, T, features), or (T, B, features) where the batch is not first.

        Raises:
            ValueError: another number of dimensions.
        """
        if x.dim() != 3:
            raise ValueError(f"a recurrent layer that is unrolled takes three dimensions, not {x.dim()}")
        steps = x.transpose(0, 1) if self.batch_first else x
        cell, parts = CELLS[self.mode]
        ways = 2 if self.bidirectional else 1
        zeros = steps.new_zeros(self.num_layers * ways, steps.shape[1], self.hidden_size)
        given: State = (zeros,) * parts if hx is None else hx if isinstance(hx, tuple) else (hx,)
        ends: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for way in range(ways):
                at = layer * ways + way
                output, end = self._run(cell, layer, way == 1, steps, tuple(part[at] for part in given))
                outputs.append(output)
                ends.append(end)
            steps = torch.cat(outputs, dim=-1) if ways == 2 else outputs[0]
        last = tuple(torch.stack([end[part] for end in ends]) for part in range(parts))
        return (steps.transpose(0, 1) if self.batch_first else steps), (last if parts > 1 else last[0])

    def _run(self, cell: Cell, layer: int, backwards: bool, steps: Tensor, state: State) -> tuple[Tensor, State]:
        """One layer in one direction over steps (T, B, features): outputs (T, B, hidden), and the last state."""
        suffix = f"_l{layer}{'_reverse' if backwards else ''}"
        own = self._parameters
        weight, recurrent_bias = own[f"weight_hh{suffix}"], own.get(f"bias_hh{suffix}")
        assert weight is not None

        def recurrent(output: Tensor) -> Tensor:
            return linear(output, weight, recurrent_bias)

        into = own[f"weight_ih{suffix}"]
        assert into is not None
        driven = linear(steps, into, own.get(f"bias_ih{suffix}")).unbind()
        outputs = []
        for now in reversed(driven) if backwards else driven:
            state = cell(now, recurrent, state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state


@contextmanager
def unrolled(model: nn.Module) -> Iterator[None]:
    """Put `Unrolled` in the place of the model's GRU, LSTM and RNN layers for the block. Layers with dropout between them,
    with projections, or of a class of the user's own stay."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.RNNBase) and type(child) in KINDS and not child.dropout and not child.proj_size
    ]
    stand_ins = {id(layer): Unrolled(layer) for _, _, layer in places}
    try:
        for parent, name, layer in places:
            parent._modules[name] = stand_ins[id(layer)]
        yield
    finally:
        for parent, name, layer in places:
            parent._modules[name] = layer
