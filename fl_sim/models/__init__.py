"""Models by name, and the only place that knows layer types.

model = build("resnet20", num_classes=10, in_channels=3, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fl_sim.core.errors import USERS_OWN, UserError, error_line
from fl_sim.core.lookup import accepts, find
from fl_sim.core.process_state import seeded, unchanged_settings
from fl_sim.models.adapters import Adapter, adapt
from fl_sim.models.computed import detach_computed
from fl_sim.models.fastgrnn import fastgrnn
from fl_sim.models.hugging_face import answering
from fl_sim.models.interface import Interface, arguments
from fl_sim.models.layers import BATCHNORM, batchnorm_names, disabled_features, head_names, prunable_names, stage_names
from fl_sim.models.mobilenet import mobilenet_v1
from fl_sim.models.module_state import ModuleState
from fl_sim.models.own import evaluating_modules, mark_head, prepare, watched
from fl_sim.models.parameters import check_dtypes, check_entries
from fl_sim.models.reparametrized import merged, named_in_file
from fl_sim.models.resnet import cifar_resnet
from fl_sim.models.sequence import lstm, transformer
from fl_sim.models.simple import cnn, cnn_bn, linear, mlp
from fl_sim.models.torchvision import densenet121, imagenet_stem, resnet18, resnet34, resnet50, vgg16
from fl_sim.models.trainable import BATCHNORM_INITS, PERSONAL, SELECTORS, freeze, initialise, personal_names
from fl_sim.models.wide_resnet import wide_resnet

__all__ = [
    "BATCHNORM",
    "BATCHNORM_INITS",
    "MODELS",
    "PERSONAL",
    "SELECTORS",
    "Adapter",
    "Builder",
    "Interface",
    "adapt",
    "batchnorm_names",
    "build",
    "build_for",
    "check",
    "disabled_features",
    "freeze",
    "head_names",
    "initialise",
    "merged",
    "named_in_file",
    "personal_names",
    "prunable_names",
    "stage_names",
]

Builder = Callable[..., nn.Module]
"""Takes keyword arguments: num_classes, width (channel multiplier), and in_channels and image_size (pixels a side) of images,
or input_shape, and vocabulary where inputs are tokens."""

MODELS: Mapping[str, Builder] = {
    "cnn": cnn,
    "cnn_bn": cnn_bn,
    "linear": linear,
    "mlp": mlp,
    "lstm": lstm,
    "transformer": transformer,
    **{f"resnet{depth}": cifar_resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110, 218, 434, 866)},
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    **{f"wrn-{depth}-{factor}": wide_resnet(depth, factor) for depth, factor in ((16, 8), (22, 8), (28, 8), (28, 10))},
    "vgg16": vgg16,
    "densenet121": densenet121,
    "mobilenet_v1": mobilenet_v1,
    "fastgrnn": fastgrnn,
    **{f"{name}_imagenet_stem": imagenet_stem(name) for name in ("resnet18", "resnet34", "resnet50")},
}


def build(
    name: str, *, num_classes: int = 10, in_channels: int = 3, seed: int = 0, image_size: int = 32, width: float = 1.0
) -> nn.Module:
    """Build a model for square images; see `build_for`.

    Args:
        name: a name of `MODELS`, or `module:function` of your own.
        num_classes: outputs.
        in_channels: channels of the images.
        seed: initialisation.
        image_size: pixels a side.
        width: channel multiplier, 1 = as published.

    Raises:
        UserError: unknown name, or a function of one's own that makes no such model.
    """
    return build_for(name, Interface((in_channels, image_size, image_size), num_classes), seed=seed, width=width)


def build_for(name: str, interface: Interface, *, seed: int = 0, width: float = 1.0) -> nn.Module:
    """Build a model on the CPU, initialised from `seed` alone; global generators are left as they were.

    Args:
        name: a name of `MODELS`, or `module:function` of your own.
        interface: what the model takes, and what it has to answer.
        seed: initialisation.
        width: channel multiplier, 1 = as published.

    Raises:
        UserError: unknown name, a model for other inputs, or a function of one's own that makes no such model.
    """
    dtype = torch.get_default_dtype()
    try:  # a builder, or its module, may set another default dtype: that would be everybody's
        builder = find("model.name", name, MODELS)
        asked = arguments(name, builder, interface, width)
        accepts(f"model.name = {name!r}", builder, **asked)
        with seeded(seed):
            model = builder(**asked) if name in MODELS else _built(name, builder, asked)
            if name not in MODELS:
                torch.set_default_dtype(dtype)
                _look_over(name, model, interface.square if "image_size" in asked else interface)
        if "image_size" in asked and interface != interface.square:  # builders are told one side: some models take any
            check(name, model, interface)
        return model
    finally:
        torch.set_default_dtype(dtype)


def _built(name: str, builder: Callable[..., nn.Module], asked: Mapping[str, object]) -> nn.Module:
    """Call a builder of the user's; it leaves the process as it was."""
    try:
        with unchanged_settings():
            return cast(nn.Module, answering(builder(**asked)))  # what is none is refused later
    except UserError:
        raise
    except USERS_OWN as error:
        raise UserError(f"model.name = {name!r}: it raised {error_line(error)}") from error


def _look_over(name: str, model: nn.Module, interface: Interface) -> None:
    """Find out of a user's own model which buffers are constant, and refuse what cannot be run."""
    what = f"model.name = {name!r}"
    if isinstance(model, torch.jit.ScriptModule):  # it has neither `get_parameter` nor `requires_grad_`
        raise UserError(f"{what}: returned a script of torch.jit; needed: a module, of which parts may be scripts")
    if isinstance(model, nn.Module):
        detach_computed(model)
        check_dtypes(model, what)
    evaluating = evaluating_modules(model) if isinstance(model, nn.Module) else ()
    check(name, model, interface)
    prepare(name, model, interface, evaluating=evaluating)
    check_entries(model, what)


def check(name: str, model: nn.Module, interface: Interface, samples: int = 2) -> None:
    """Complain of a model that does not take such inputs, or answers with other outputs than the targets need.

    Raises:
        UserError: names the model, the inputs and what it did.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name = {name!r}: returned {type(model).__name__}, not a torch.nn.Module")
    lazy = any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers()))
    built = None if lazy else ModuleState(model)  # the first forward pass makes the tensors of lazy modules
    shape, needed, called = (samples, *interface.input_shape), interface.answer(samples), interface.called
    with torch.no_grad(), watched(model) as ran:
        try:
            logits = model.eval()(interface.example(samples))
        except USERS_OWN as error:  # the user's own, whatever it is
            height, width = shape[-2:] if called == "images" else (0, 0)
            hint = "" if height == width else f"; it was built for {height} x {height} pixels: images must be square"
            raise UserError(
                f"model.name = {name!r}: on {called} of shape {shape} it raised {error_line(error)}{hint}"
            ) from error
        finally:
            model.train() if built is None else built.put_back()
    if getattr(logits, "shape", None) != needed:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"model.name = {name!r}: answers {got} to {samples} {called}; needed: {needed}")
    if name not in MODELS:
        mark_head(ran, logits)
