"""Small models with weights that are not simply "one float32 parameter with a name of its own"."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fl_sim import ClientContext, Task, Update, load, snapshot

PIXELS, HIDDEN = 64, 16
"""Of digits: 8 * 8 grey pixels."""


class Net(nn.Module):
    """Flatten, a hidden layer, whatever a model has in the middle, a head."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS, HIDDEN)
        self.middle = nn.Identity() if middle is None else middle
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.middle(torch.relu(self.first(x.flatten(1))))))


class Middle(nn.Module):
    """A layer that adds its buffers or parameters to what passes."""

    def __init__(
        self, buffers: Mapping[str, Tensor] | None = None, parameters: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        super().__init__()
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value)
        for name, parameter in (parameters or {}).items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        for value in (*self.buffers(), *self.parameters()):
            finite = (
                torch.where(torch.isfinite(value), value, torch.zeros_like(value)) if value.numel() else value.sum()
            )
            x = x + (finite.real if finite.is_complex() else finite).to(x.dtype).sum() * 1e-12
        return x


def two_layers(share: Callable[[nn.Linear, nn.Linear], None]) -> nn.Module:
    """Two square layers that have something in common."""
    a, b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    share(a, b)
    return Net(nn.Sequential(a, nn.ReLU(), b))


def _tie(a: nn.Linear, b: nn.Linear) -> None:
    b.weight = a.weight


def _tie_frozen(a: nn.Linear, b: nn.Linear) -> None:
    b.weight = a.weight.requires_grad_(False)


def _tie_data(a: nn.Linear, b: nn.Linear) -> None:
    b.weight = nn.Parameter(a.weight.data)


def _tie_part(a: nn.Linear, b: nn.Linear) -> None:
    b.bias = nn.Parameter(a.weight.data[1])


def shared_module() -> nn.Module:
    layer = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN))
    return Net(nn.Sequential(layer, nn.ReLU(), layer))


class AutoEncoder(Net):
    """Its decoder is its encoder's weight, transposed at each use, and an embedding is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, HIDDEN)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.flatten(1)))
        back = nn.functional.linear(hidden, self.first.weight.t())
        return cast(Tensor, self.head(torch.relu(self.first(back)) + self.embedding(x.flatten(1)[:, 0].long())))


def with_first(change: Callable[[nn.Linear], object]) -> nn.Module:
    """A model whose middle layer something was done to."""
    layer = nn.Linear(HIDDEN, HIDDEN)
    made = change(layer)
    return Net(made if isinstance(made, nn.Module) else layer)


def pruned() -> nn.Module:
    model = Net(nn.Linear(HIDDEN, HIDDEN))
    prune.l1_unstructured(model.first, "weight", amount=0.5)
    prune.random_unstructured(model.middle, "bias", amount=0.25)
    return model


class OwnStateDict(Net):
    """Saves itself in its own way."""

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:  # type: ignore[override]
        return {"all": {n: p.detach().clone() for n, p in self.named_parameters()}, "version": 3}


def hooked_state_dict() -> nn.Module:
    model = Net(nn.Linear(HIDDEN, HIDDEN))

    def rename(module: nn.Module, state: dict[str, object], prefix: str, metadata: object) -> None:
        for name in list(state):
            state[f"module.{name}"] = state.pop(name)

    model._register_state_dict_hook(rename)
    return model


class ExtraState(Middle):
    """Has state that is no tensor."""

    def get_extra_state(self) -> dict[str, object]:
        return {"calls": 3, "words": ["a", "b"]}

    def set_extra_state(self, state: object) -> None:
        assert state == self.get_extra_state()


class Lists(nn.Module):
    """Parameters in lists and dicts, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(HIDDEN)) for _ in range(3)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.zeros(HIDDEN)), "b": self.scales[0]})

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scales[0] * self.scales[1] * self.scales[2] + self.shifts["a"] * self.shifts["b"]


class Precise(nn.Module):
    """A layer that computes in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = nn.Linear(HIDDEN, HIDDEN).to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.inner(x.to(self.dtype))).float()


class Half(Net):
    """All of it in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16()).float()


class OwnNorm(nn.Module):
    """A normalisation layer with statistics under names of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(HIDDEN, dtype=dtype))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        center = cast(Tensor, self.center)
        if self.training:
            with torch.no_grad():
                center.lerp_(x.mean(0).to(center.dtype), 0.1)
                cast(Tensor, self.steps).add_(1)
        return x - center.to(x.dtype)


class Running(nn.BatchNorm1d):
    """Statistics of double precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double()).to(x.dtype)


def frozen_backbone() -> nn.Module:
    model = Net(nn.Linear(HIDDEN, HIDDEN))
    model.first.requires_grad_(False)
    model.middle.requires_grad_(False)
    return model


def all_frozen() -> nn.Module:
    return Net().requires_grad_(False)


def evaluating_norm() -> nn.Module:
    model = Net(nn.BatchNorm1d(HIDDEN))
    model.middle.eval()
    return model


def double_by_default() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return Net()


def with_nan() -> nn.Module:
    model = Net()
    with torch.no_grad():
        model.first.weight[0, 0] = torch.nan
    return model


def transposed() -> nn.Module:
    model = Net()
    model.first.weight = nn.Parameter(torch.randn(PIXELS, HIDDEN).mul(0.1).t())
    return model


def expanded_bias() -> nn.Module:
    model = Net()
    model.first.bias = nn.Parameter(torch.zeros(1).expand(HIDDEN))
    return model


def overlapping_rows() -> nn.Module:
    model = Net()
    rows, columns = model.first.weight.shape
    model.first.weight = nn.Parameter(torch.randn(rows + columns).as_strided((rows, columns), (1, 1)))
    return model


def aliased_buffer() -> nn.Module:
    model = Net()
    model.register_buffer("start", model.first.weight.data)
    return model


class Replacing(nn.Module):
    """Keeps a mean in a buffer that each pass replaces, rather than writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * cast(Tensor, self.mean) + 0.1 * x.detach().mean(0)
        return x - cast(Tensor, self.mean)


class Averaged(Net):
    """Evaluates with a moving average of its head's weights, which training keeps in a buffer or in a frozen parameter."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        start = self.head.weight.detach().clone()
        if frozen:
            self.mean = nn.Parameter(start, requires_grad=False)
        else:
            self.register_buffer("mean", start)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.flatten(1)))
        if not self.training:
            return nn.functional.linear(hidden, cast(Tensor, self.mean), self.head.bias)
        with torch.no_grad():
            cast(Tensor, self.mean).lerp_(self.head.weight, 0.1)
        return cast(Tensor, self.head(hidden))


class Does(nn.Module):
    """Does something to itself or to the process in each pass."""

    def __init__(self, act: Callable[[nn.Linear], object]) -> None:
        super().__init__()
        self.inner, self.act = nn.Linear(HIDDEN, HIDDEN), act

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.training:
            self.act(self.inner)
        return cast(Tensor, out)


def _grow(layer: nn.Linear) -> None:
    layer.extra = nn.Linear(2, 2)


def _rebuild(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 0.9)


def _drop(layer: nn.Linear) -> None:
    layer.bias = None


def locked() -> nn.Module:
    model = Net()
    model.lock = threading.Lock()
    return model


class Unused(Net):
    """Has a layer that no forward pass takes."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 3)


def scripted() -> nn.Module:
    return Net(torch.jit.script(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN))))


def scripted_whole() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 10)))  # type: ignore[no-any-return]


CAUSAL = torch.full((4, 4), -torch.inf).triu(1)
TABLE = torch.sin(torch.arange(32.0)).view(4, 8)
EXACT = torch.tensor([1234567891, -(2**62) - 1])
RUNS: Mapping[str, Callable[[], nn.Module]] = {
    "tied": lambda: two_layers(_tie),
    "tied_frozen": lambda: two_layers(_tie_frozen),
    "shared_module": shared_module,
    "auto_encoder": AutoEncoder,
    "weight_norm_old": lambda: with_first(weight_norm),
    "weight_norm": lambda: with_first(parametrizations.weight_norm),
    "spectral_norm_old": lambda: with_first(spectral_norm),
    "spectral_norm": lambda: with_first(parametrizations.spectral_norm),
    "orthogonal": lambda: with_first(parametrizations.orthogonal),
    "pruned": pruned,
    "own_state_dict": OwnStateDict,
    "hooked_state_dict": hooked_state_dict,
    "extra_state": lambda: Net(ExtraState()),
    "lists": lambda: Net(Lists()),
    "zero_d_and_empty": lambda: Net(
        Middle(parameters={"scale": nn.Parameter(torch.tensor(2.0)), "none": nn.Parameter(torch.zeros(0, 3))})
    ),
    "integer_buffer": lambda: Net(Middle({"exact": EXACT.clone()})),
    "bool_buffer": lambda: Net(Middle({"alive": torch.tensor([True, False])})),
    "double_buffer": lambda: Net(Middle({"table": TABLE.double() / 3})),
    "complex_buffer": lambda: Net(Middle({"roots": torch.exp(1j * torch.arange(4.0))})),
    "integer_parameter": lambda: Net(Middle(parameters={"exact": nn.Parameter(EXACT.clone(), requires_grad=False)})),
    "bool_parameter": lambda: Net(
        Middle(parameters={"alive": nn.Parameter(torch.tensor([True, False]), requires_grad=False)})
    ),
    "double_frozen": lambda: Net(Precise(torch.float64).requires_grad_(False)),
    "complex_frozen": lambda: Net(
        Middle(parameters={"roots": nn.Parameter(torch.exp(1j * torch.arange(4.0)), requires_grad=False)})
    ),
    "half_frozen": lambda: Net(Precise(torch.bfloat16).requires_grad_(False)),
    "half_layer": lambda: Net(Precise(torch.bfloat16)),
    "half": Half,
    "causal": lambda: Net(Middle({"mask": CAUSAL.clone()})),
    "table": lambda: Net(Middle({"positions": TABLE.clone()})),
    "expanded_buffer": lambda: Net(Middle({"positions": torch.arange(4.0).expand(8, 4)})),
    "own_norm": lambda: Net(OwnNorm()),
    "instance_norm": lambda: Net(
        nn.Sequential(
            nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Flatten()
        )
    ),
    "norm_without_statistics": lambda: Net(nn.BatchNorm1d(HIDDEN, track_running_stats=False)),
    "replaced_buffer": lambda: Net(Replacing()),
    "averaged": Averaged,
    "frozen_backbone": frozen_backbone,
    "evaluating_norm": evaluating_norm,
    "transposed": transposed,
    "lazy": lambda: Net(nn.LazyLinear(HIDDEN)),
    "unused": Unused,
    "scripted": scripted,
    "lstm": lambda: Net(nn.Sequential(nn.Unflatten(1, (1, HIDDEN)), Last())),
}
REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "double_by_default": (double_by_default, "'first.weight' is float64; allowed where training changes it: float32"),
    "double_layer": (lambda: Net(Precise(torch.float64)), "'middle.inner.weight' is float64"),
    "complex_parameter": (
        lambda: Net(Middle(parameters={"roots": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})),
        "'middle.roots' is complex64",
    ),
    "double_statistics": (lambda: Net(Running(HIDDEN).double()), "'middle.weight' is float64"),
    "double_running": (
        lambda: Net(Running(HIDDEN, affine=False).double()),
        "'middle.running_mean' is float64",
    ),
    "double_own_norm": (
        lambda: Net(OwnNorm(torch.float64)),
        "training changes buffer 'middle.center', which is float64",
    ),
    "two_parameters_in_one_memory": (
        lambda: two_layers(_tie_data),
        "'middle.0.weight' and 'middle.2.weight' lie in the same memory",
    ),
    "a_row_of_another": (
        lambda: two_layers(_tie_part),
        "'middle.0.weight' and 'middle.2.bias' lie in the same memory",
    ),
    "expanded_bias": (expanded_bias, "'first.bias' is expanded"),
    "overlapping_rows": (overlapping_rows, "'first.weight' is expanded"),
    "aliased_buffer": (aliased_buffer, "lie in the same memory"),
    "nan": (with_nan, "'first.weight' holds NaN or infinity"),
    "averaged_frozen": (
        lambda: Averaged(frozen=True),
        "its forward pass changes 'mean', which is frozen and does not travel; keep what a pass changes",
    ),
    "grows": (lambda: Net(Does(_grow)), "its forward pass makes the parameter 'middle.inner.extra.weight'"),
    "rebuilds": (lambda: Net(Does(_rebuild)), "its forward pass replaces the parameter 'middle.inner.weight'"),
    "drops": (lambda: Net(Does(_drop)), "its forward pass removes the parameter 'middle.inner.bias'"),
    "freezes": (
        lambda: Net(Does(lambda layer: layer.requires_grad_(False))),
        "its forward pass freezes 'middle.inner.weight'",
    ),
    "changes_the_default": (
        lambda: Net(Does(lambda layer: torch.set_default_dtype(torch.float64))),
        "its forward pass changes the default dtype (torch.set_default_dtype) for all that runs after it",
    ),
    "changes_the_folder": (
        lambda: Net(Does(lambda layer: os.chdir("/"))),
        "its forward pass changes the working folder",
    ),
    "locked": (locked, "cannot be copied: TypeError: cannot pickle '_thread.lock' object"),
    "scripted_whole": (
        scripted_whole,
        "returned a script of torch.jit; needed: a module, of which parts may be scripts",
    ),
    "all_frozen": (all_frozen, "model.trainable = 'all': the model's builder froze all that 'all' selects"),
}


class Last(nn.Module):
    """The last state of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.lstm(x)[0][:, -1])


def looks_at_integers(task: Task, ctx: ClientContext) -> Update:
    """A client that trains nothing, of a model with `EXACT` integers, and complains where they differ."""
    middle = cast(Net, ctx.model).middle
    assert torch.equal(cast(Tensor, middle.exact), EXACT)
    return Update(snapshot(load(ctx.model, task.params), task.params), ctx.num_examples)


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """The builder of a name in `RUNS` or `REFUSED`, after "build_", as `model.name` names it."""
    name = name.removeprefix("build_")
    if name not in RUNS and name not in REFUSED:
        raise AttributeError(name)
    make = RUNS[name] if name in RUNS else REFUSED[name][0]

    def build(*, num_classes: int, in_channels: int, image_size: int, width: float) -> nn.Module:
        return make()

    return build
