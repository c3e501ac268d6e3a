"""Inspection of a user's own model when it is built: constant buffers, and modes that training does not keep."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.core.process_changes import observed
from fl_sim.models.content import digest_of
from fl_sim.models.interface import Interface
from fl_sim.models.layers import HEAD
from fl_sim.models.memory_overlap import is_expanded
from fl_sim.models.module_state import ModuleState
from fl_sim.models.parameters import CONSTANT, COUNTER, FLOATS, RUNNING

REMARKS = "_fl_sim_remarks"
"""The attribute of a user's own model that holds what its user should know of it, in lines."""


def remarks_of(model: nn.Module) -> list[str]:
    """What `prepare` found worth saying of a user's own model; nothing of others."""
    return list(model.__dict__.get(REMARKS, ()))


TRAINING_ANSWER = "_fl_sim_training_answer"
"""The attribute of a user's own model that says what it answers in training, where evaluation has another form of answer."""


def training_answer_of(model: nn.Module) -> str:
    """What `prepare` saw a user's own model answer in training that is not of the needed form; empty for all others."""
    return str(model.__dict__.get(TRAINING_ANSWER, ""))


def prepare(
    name: str, model: nn.Module, interface: Interface, samples: int = 2, *, evaluating: Sequence[str] = ()
) -> None:
    """Run two training passes on a copy of the model, look at what they leave, and mark the buffers that they left alone as
    constant.

    Between the two the trained weights move, as in training: a moving average of weights stays as it is while they do.
    Constant buffers do not travel: every process builds them alike. Those that share their memory with nothing else but are
    expanded get memory of their own, so that they can be written to.

    Args:
        name: the model's name, for messages.
        model: a user's own, changed in its marks alone.
        interface: what it takes.
        samples: of a batch.
        evaluating: `evaluating_modules` as the builder left them.

    Raises:
        UserError: the model cannot be copied; a training pass fails, changes the process, makes, replaces, frees or freezes
            a parameter, or changes a frozen parameter or a floating-point buffer that float32 does not hold.
    """
    candidates = {path: _candidates(module) for path, module in model.named_modules()}
    probe = _copied(name, model).train()
    built, before = ModuleState(probe), _parameters(probe)
    try:
        with torch.enable_grad(), observed() as changed:
            inputs = interface.random(samples)  # zeros would leave a running mean of zero alone
            answer = probe(inputs)
            _nudge(probe)
            probe(inputs)
    except USERS_OWN as error:  # the user's own, whatever it is
        shape = (samples, *interface.input_shape)
        raise UserError(
            f"model.name = {name!r}: in training, on {interface.called} of {shape}, it raised {error_line(error)}"
        ) from error
    _check_leftovers(f"model.name = {name!r}: its forward pass", changed, before, _parameters(probe))
    _check_frozen(f"model.name = {name!r}: its forward pass", model, probe)
    for path, names in candidates.items():
        module, after = model.get_submodule(path), probe.get_submodule(path)._buffers
        constant = {n for n in names if _same(module._buffers[n], after.get(n))}
        for buffer in sorted(names - constant):
            value = module._buffers[buffer]
            if value is not None and value.dtype.is_floating_point and value.dtype not in FLOATS:
                dtype = str(value.dtype).removeprefix("torch.")
                raise UserError(
                    f"model.name = {name!r}: training changes buffer {f'{path}.{buffer}'.removeprefix('.')!r}, which is "
                    f"{dtype}; allowed: float32, float16, bfloat16"
                )
        for buffer in constant:
            value = module._buffers[buffer]
            if value is not None and value.layout == torch.strided and 0 in value.stride():
                module._buffers[buffer] = value.clone(memory_format=torch.contiguous_format)
        if constant:
            module.__dict__[CONSTANT] = frozenset(constant)
    if said := _unlike(answer, interface.answer(samples)):
        model.__dict__[TRAINING_ANSWER] = said
    unused = _without_part(probe, answer)
    model.__dict__[REMARKS] = [
        *([_of_modes(evaluating)] if evaluating else []),
        *([_of_unused(unused, samples)] if unused else []),
    ]
    built.put_back()  # what the copy shares with the model, such as attributes of its class


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[nn.Linear, object]]]:
    """Context manager: the linear layers that run meanwhile, in their order, with what they put out."""
    seen: list[tuple[nn.Linear, object]] = []

    def ran(module: nn.Module, inputs: object, output: object) -> None:
        seen.append((cast(nn.Linear, module), output))

    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, torch.jit.ScriptModule)]
    hooks = [module.register_forward_hook(ran) for module in linear]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def mark_head(ran: Sequence[tuple[nn.Linear, object]], answer: object) -> None:
    """Mark the linear layer whose output is the answer, or else the last one that ran, as a model's head (`layers.HEAD`)."""
    if ran:
        answering = [layer for layer, output in ran if _is_same_memory(output, answer)]
        (answering or [layer for layer, _ in ran])[-1].__dict__[HEAD] = True


def _is_same_memory(one: object, other: object) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return one.numel() == other.numel() and one.data_ptr() == other.data_ptr()


def _unlike(answer: object, needed: tuple[int, ...]) -> str:
    """What an answer is, beside what it should be; empty where it is a tensor of the needed shape."""
    if isinstance(answer, Tensor):
        return "" if tuple(answer.shape) == needed else f"{tuple(answer.shape)}, in evaluation {needed}"
    return f"{type(answer).__name__}, in evaluation a tensor {needed}"


def _without_part(model: nn.Module, answer: object) -> list[str]:
    """Names of the trained parameters on which an answer does not depend.

    None where it depends on no parameter at all, or on a function with a backward pass of its own, such as a checkpoint's: what
    that one uses is not seen.
    """
    waiting = [tensor.grad_fn for tensor in _tensors_in(answer)]
    seen: set[object] = set()
    used: set[int] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return []
        if node is not None and node not in seen:
            seen.add(node)
            used.add(id(getattr(node, "variable", None)))  # the graph's leaves are the parameters
            waiting.extend(before for before, _ in node.next_functions)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unused = [name for name, parameter in trained.items() if id(parameter) not in used]
    return unused if len(unused) < len(trained) else []


def _tensors_in(answer: object) -> Iterator[Tensor]:
    """The tensors of what a model puts out in training: one, or a tuple, list or mapping of some."""
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, Mapping):
        for each in answer.values():
            yield from _tensors_in(each)
    elif isinstance(answer, (tuple, list)):
        for each in answer:
            yield from _tensors_in(each)


def _of_unused(parameters: Sequence[str], samples: int) -> str:
    more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
    return (
        f"in a trial on {samples} samples its answer did not depend on {parameters[0]!r}{more}; such parameters are sent all the "
        "same: freeze them (requires_grad_(False)) or leave them out, unless other samples or a loss of your own use them"
    )


def _copied(name: str, model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except USERS_OWN as error:  # whatever a part of the user's model says
        hint = "keep what cannot be copied, such as a lock or a file, outside of the model"
        raise UserError(f"model.name = {name!r}: cannot be copied: {error_line(error)}; {hint}") from error


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Every name of every parameter, with the object itself and whether it is trained."""
    return {name: (p, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}


def _check_leftovers(
    what: str,
    changed: list[str],
    before: dict[str, tuple[nn.Parameter, bool]],
    after: dict[str, tuple[nn.Parameter, bool]],
) -> None:
    """Complain of a forward pass that changes the process, or which parameters there are: nobody would train or send those."""
    if changed:
        raise UserError(f"{what} changes {changed[0]} for all that runs after it")
    for name in [*before, *after]:
        then, now = before.get(name), after.get(name)
        if then is None:
            raise UserError(
                f"{what} makes the parameter {name!r}; make it in __init__, or use a lazy module of torch.nn"
            )
        if now is None or now[0] is not then[0]:
            does = "removes" if now is None else "replaces"
            raise UserError(
                f"{what} {does} the parameter {name!r}, which is trained and sent; change its values in place"
            )
        if now[1] != then[1]:
            raise UserError(f"{what} {'frees' if now[1] else 'freezes'} {name!r}; do that in __init__")


def _nudge(model: nn.Module) -> None:
    """Move every trained weight a little, as an optimizer's step does; what cannot be written to is refused elsewhere."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.layout == torch.strided and not is_expanded(parameter):
                parameter.add_(0.01)


def _check_frozen(what: str, model: nn.Module, probe: nn.Module) -> None:
    """Complain of a forward pass that changes frozen parameters: they do not travel, and every client would fail for it."""
    for name, parameter in model.named_parameters():
        frozen = not parameter.requires_grad and parameter.dtype in FLOATS
        if frozen and not _same(parameter, probe.get_parameter(name)):
            raise UserError(
                f"{what} changes {name!r}, which is frozen and does not travel; keep what a pass changes, such as a moving "
                "average of weights, in buffers (register_buffer), which are sent and averaged"
            )


def _candidates(module: nn.Module) -> set[str]:
    """Names of a module's own buffers that are saved and are neither running statistics nor counters."""
    own = {name for name, value in module._buffers.items() if value is not None and name != COUNTER}
    return {name for name in own if name not in module._non_persistent_buffers_set and not name.startswith(RUNNING)}


def _same(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether a buffer has the bits that it had."""
    if before is None or after is None or before.shape != after.shape or before.dtype != after.dtype:
        return before is after
    return digest_of(before) == digest_of(after)


def _of_modes(modules: Sequence[str]) -> str:
    more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
    return (
        f"its builder put {modules[0]!r}{more} into evaluation mode; clients train in training mode, so BatchNorm uses each "
        "batch's statistics and dropout draws there"
    )


def evaluating_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the BatchNorm, dropout and other leaf modules that are in evaluation mode."""
    return tuple(n for n, m in model.named_modules() if n and not m.training and not list(m.children()))
