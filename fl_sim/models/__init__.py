"""Models by name, and the only place that knows layer types.

model = build("resnet20", num_classes=10, in_channels=3, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fl_sim.core.errors import UserError, told
from fl_sim.core.lookup import accepts, find
from fl_sim.core.process_state import seeded
from fl_sim.models.fastgrnn import fastgrnn
from fl_sim.models.layers import BATCHNORM, batchnorm_names, disabled_features, head_names, prunable_names, stage_names
from fl_sim.models.mobilenet import mobilenet_v1
from fl_sim.models.module_state import ModuleState
from fl_sim.models.own import detach_computed, evaluating_modules, prepare, say_modes
from fl_sim.models.parameters import check_dtypes, check_entries
from fl_sim.models.resnet import cifar_resnet
from fl_sim.models.simple import cnn, cnn_bn, mlp
from fl_sim.models.torchvision import densenet121, imagenet_stem, resnet18, resnet34, resnet50, vgg16
from fl_sim.models.trainable import BATCHNORM_INITS, SELECTORS, freeze, initialise, merged
from fl_sim.models.wide_resnet import wide_resnet

__all__ = [
    "BATCHNORM",
    "BATCHNORM_INITS",
    "MODELS",
    "SELECTORS",
    "Builder",
    "batchnorm_names",
    "build",
    "check",
    "disabled_features",
    "freeze",
    "head_names",
    "initialise",
    "merged",
    "prunable_names",
    "stage_names",
]

Builder = Callable[..., nn.Module]
"""Takes keyword arguments num_classes, in_channels, image_size (pixels a side) and width (channel multiplier)."""

MODELS: Mapping[str, Builder] = {
    "cnn": cnn,
    "cnn_bn": cnn_bn,
    "mlp": mlp,
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
    """Build a model on the CPU, initialised from `seed` alone; global generators are left as they were.

    Args:
        name: a name of `MODELS`, or `module:function` of your own with the same keyword arguments.
        num_classes: outputs.
        in_channels: channels of the images.
        seed: initialisation.
        image_size: pixels a side.
        width: channel multiplier, 1 = as published.

    Raises:
        UserError: unknown name, or a function of one's own that makes no such model.
    """
    dtype = torch.get_default_dtype()
    try:  # a builder, or its module, may set another default dtype: that would be everybody's
        builder = find("model.name", name, MODELS)
        asked = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "width": width}
        accepts(f"model.name = {name!r}", builder, **asked)
        with seeded(seed):
            model = builder(**asked)
            if name not in MODELS:
                torch.set_default_dtype(dtype)
                _look_over(name, model, (2, in_channels, image_size, image_size), num_classes)
            return model
    finally:
        torch.set_default_dtype(dtype)


def _look_over(name: str, model: nn.Module, images: tuple[int, ...], num_classes: int) -> None:
    """Find out of a user's own model which buffers are constant, and refuse what cannot be run."""
    what = f"model.name = {name!r}"
    if isinstance(model, nn.Module):
        detach_computed(model)
        check_dtypes(model, what)
        if evaluating := evaluating_modules(model):
            say_modes(name, evaluating)
    check(name, model, images, num_classes)
    prepare(name, model, images)
    check_entries(model, what)


def check(name: str, model: nn.Module, images: tuple[int, ...], num_classes: int) -> None:
    """Complain of a model that does not take images of this shape, or answers with other than a logit for each class.

    Raises:
        UserError: names the model, the images and what it did.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name = {name!r}: returned {type(model).__name__}, not a torch.nn.Module")
    lazy = any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers()))
    built = None if lazy else ModuleState(model)  # the first forward pass makes the tensors of lazy modules
    with torch.no_grad():
        try:
            logits = model.eval()(torch.zeros(images))
        except Exception as error:  # the user's own, whatever it is
            _, _, height, width = images
            hint = "" if height == width else f"; it was built for {height} x {height} pixels: images must be square"
            raise UserError(
                f"model.name = {name!r}: on images of shape {images} it raised {told(error)}{hint}"
            ) from error
        finally:
            model.train() if built is None else built.put_back()
    if getattr(logits, "shape", None) != (images[0], num_classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(
            f"model.name = {name!r}: answers {got} to {images[0]} images; needed: {(images[0], num_classes)}"
        )
