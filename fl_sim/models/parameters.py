"""Parameters of a model: `entries` says which travel, `snapshot` and `load` copy them.

Each tensor has one name, the first under which the model holds it: layers that share a weight share one entry. An overridden
`state_dict`, its hooks and extra state play no part.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fl_sim.core.types import FlatParams, Params, UserError
from fl_sim.models.memory_overlap import is_expanded, overlapping

COUNTER = "num_batches_tracked"
FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Dtypes whose every value float32 holds exactly: what travels is float32."""
RUNNING = "running_"
"""How the names of running statistics begin, in PyTorch's layers and in those written like them."""
UNWRAPPED = "take ctx.model itself, not what torch.compile, DataParallel or AveragedModel made around it"
"""Where names have a prefix that the model's do not have."""
CONSTANT = "_fl_sim_constant_buffers"
"""The attribute of a module that names its buffers which training leaves alone; see `models.own`."""


def entries(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and statistics that federations know, not copied, in state-dict order.

    These are parameters of floating point, frozen or not, and persistent buffers of floating point that training changes.
    All else stays as the model's builder made it: `num_batches_tracked`, integers, constant tables and masks.

    Raises:
        UserError: a parameter to be trained, or a running statistic, has a dtype that float32 does not hold.
    """
    return _collected(model, every=False)[0]


def constants(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a state dict that are no entries, of any dtype, not copied: buffers that training leaves alone, such as tables,
    masks and projections, and frozen parameters of other dtypes. Every process builds them alike."""
    known = entries(model)
    return {name: tensor for name, tensor in tensors(model).items() if name not in known}


def values(model: nn.Module) -> dict[str, Tensor]:
    """Detached float32 values of `entries` on the CPU; those that are float32 there already are not copied."""
    return {name: entry.detach().float().cpu() for name, entry in entries(model).items()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of any dtype, not copied, in state-dict order; `num_batches_tracked` is left out."""
    return _collected(model, every=True)[0]


Found = tuple[dict[str, Tensor], set[int], list[nn.Module]]
"""Tensors by name, their identities, and the modules that compute something before they run."""


def _collected(model: nn.Module, *, every: bool) -> Found:
    found: Found = {}, set(), []
    _collect(model, "", found, every=every)
    return found


def _collect(module: nn.Module, prefix: str, into: Found, *, every: bool) -> None:
    """Add a module's tensors to those found, each once."""
    found, seen, hooked = into
    if module._forward_pre_hooks:
        hooked.append(module)
    for name, value in module._parameters.items():
        if value is not None and id(value) not in seen:
            if every or value.dtype in FLOATS:
                seen.add(id(value))
                found[prefix + name] = value
            elif value.requires_grad:
                raise UserError(_other_dtype(prefix + name, value))
    if module._buffers:
        apart = {COUNTER, *module._non_persistent_buffers_set}
        constant = module.__dict__.get(CONSTANT, ())
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in apart and id(buffer) not in seen:
                if every or (buffer.dtype in FLOATS and name not in constant):
                    seen.add(id(buffer))
                    found[prefix + name] = buffer
                elif name.startswith(RUNNING) and buffer.dtype.is_floating_point:
                    raise UserError(_other_dtype(prefix + name, buffer))
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", into, every=every)


def _other_dtype(name: str, value: Tensor) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    return f"model entry {name!r} is {dtype}; allowed where training changes it: float32, float16, bfloat16"


def snapshot(model: nn.Module, names: Iterable[str] | None = None) -> FlatParams:
    """Copy a model's parameters and buffers to the CPU, detached, as views of one float32 buffer; all, or those in `names`.

    `snapshot(model, task.params)` has the order in which updates are encoded, and spares the encoder a copy of the model.

    Raises:
        UserError: an entry that float32 does not hold exactly.
    """
    own = entries(model)
    copied = {name: own[name].detach().cpu() for name in (own if names is None else names)}
    packed = FlatParams.pack(copied)
    if packed.flat.dtype != torch.float32:  # every entry is of half precision
        packed = FlatParams.pack({name: value.float() for name, value in copied.items()})
    return packed


def frozen(model: nn.Module) -> Params:
    """Detached CPU copies of the parameters that require no gradient, in their own dtypes."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if not p.requires_grad}


def load(model: nn.Module, params: Params) -> nn.Module:
    """Copy parameters into a resident model, in place, and return it. Names that `params` lacks keep their values.

    Raises:
        ValueError: a name that the model does not have, or another shape.
    """
    own, _, hooked = _collected(model, every=True)
    for name, value in params.items():
        if name not in own:
            raise ValueError(_unknown(model, name))
        if own[name].shape != value.shape:
            raise ValueError(f"{name!r} has shape {tuple(value.shape)}, the model's has {tuple(own[name].shape)}")
    if params:  # the copy refuses empty lists
        with torch.no_grad():
            torch._foreach_copy_([own[name] for name in params], list(params.values()))
    for module in hooked:
        _forget_computed(module)
    return model


def _forget_computed(module: nn.Module) -> None:
    """Cut the weights that `weight_norm`, `spectral_norm` and `torch.nn.utils.prune` compute before each forward pass off
    from the graph or inference mode in which they were computed: a model with such tensors cannot be copied."""
    for name in computed_by_hooks(module):
        computed = module.__dict__.get(name)
        if isinstance(computed, Tensor) and (computed.grad_fn is not None or computed.is_inference()):
            module.__dict__[name] = computed.detach().clone()


def computed_by_hooks(module: nn.Module) -> list[str]:
    """Names of the attributes that PyTorch's hooks compute before each forward pass: the hooks know the names."""
    hooks: Iterable[object] = module._forward_pre_hooks.values()
    names = [getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in hooks]
    return [name for name in names if isinstance(name, str) and isinstance(vars(module).get(name), Tensor)]


def computes_weights(module: nn.Module) -> bool:
    """Whether hooks compute weights of this module before each forward pass."""
    return bool(computed_by_hooks(module))


def canonical(model: nn.Module) -> dict[str, str]:
    """Map every name of every parameter to its entry's name: of tied parameters the first one."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _unknown(model: nn.Module, name: str) -> str:
    same = canonical(model).get(name)
    return f"the model has no entry {name!r}" + ("" if same is None else f": it is shared, and its name is {same!r}")


def check_dtypes(model: nn.Module, what: str) -> dict[str, Tensor]:
    """Return the entries of a model. Raises UserError, which begins with `what`, where float32 does not hold one of them."""
    try:
        return entries(model)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def check_entries(model: nn.Module, what: str) -> None:
    """Refuse a model whose entries cannot travel as they are.

    Args:
        model: the model.
        what: begins the message.

    Raises:
        UserError: an entry that training changes is of a dtype that float32 does not hold, or holds NaN or infinity; a
            parameter whose values share memory, with each other or with another entry.
    """
    for name, value in check_dtypes(model, what).items():
        changes = value.requires_grad or not isinstance(value, nn.Parameter)
        if changes and not bool(torch.isfinite(value).all()):
            raise UserError(f"{what}: model entry {name!r} holds NaN or infinity, which is never sent")
    own = tensors(model)
    for name, value in own.items():
        if value.layout == torch.strided and value.numel() and is_expanded(value):
            raise UserError(f"{what}: {name!r} is expanded: several of its values are one place in memory; clone it")
    for one, other in overlapping(own):
        raise UserError(
            f"{what}: {one!r} and {other!r} lie in the same memory but are two tensors; let both layers hold one "
            "torch.nn.Parameter, or clone one"
        )


def unit_singular_vectors(model: nn.Module) -> nn.Module:
    """Scale the singular vectors that `spectral_norm` keeps to length 1, in place, and return the model.

    The mean of unit vectors is shorter than 1, and evaluation divides the weight by u^T W v (Miyato et al., 2018,
    algorithm 1) as they are: the norm would be too small and the weight too large. In training a power iteration makes
    them unit vectors before they are used.
    """
    vectors = [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dim() == 1 and _is_singular(module, name)
    ]
    with torch.no_grad():
        for vector in vectors:
            vector.copy_(torch.nn.functional.normalize(vector, dim=0))
    return model


def _is_singular(module: nn.Module, name: str) -> bool:
    """Whether a buffer is u or v of one of PyTorch's two ways to normalise by the spectral norm."""
    if type(module).__name__ == "_SpectralNorm":
        return name in ("_u", "_v")
    hooks: Iterable[object] = module._forward_pre_hooks.values()
    normalised = [str(getattr(hook, "name", "")) for hook in hooks if type(hook).__name__ == "SpectralNorm"]
    return name in {f"{weight}_{vector}" for weight in normalised for vector in "uv"}
