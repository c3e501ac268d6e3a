"""What belongs to a whole process and a client may leave behind: PyTorch's modes, the working folder, the environment.

    before = settings()
    ...                     # a client
    restore(before)

Random numbers: `seeded(seed)` gives a client global generators of its own, and the process its own ones back.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TextIO

import numpy as np
import torch
from torch import overrides
from torch.nn.modules import module
from torch.optim import optimizer
from torch.utils import _python_dispatch


@dataclass(frozen=True)
class Setting:
    """One thing of a process: how it is read (in a microsecond or two) and how it is put back."""

    read: Callable[[], object]
    write: Callable[..., object]


def _default_device() -> torch.device | None:
    """The default device where one was set; to ask for it costs microseconds, so the mode behind it is asked first."""
    return torch.get_default_device() if torch._C._len_torch_function_stack() else None


_GUARDS: list[torch.inference_mode] = []
"""Blocks entered for good: PyTorch leaves one as soon as nobody refers to it."""


def _set_inference_mode(enabled: bool) -> None:
    """Enter the mode that was: the block that a client never left is out of reach."""
    _GUARDS.append(torch.inference_mode(enabled))
    _GUARDS[-1].__enter__()


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _set_autocast(modes: tuple[bool, bool]) -> None:
    for device, enabled in zip(("cpu", "cuda"), modes, strict=True):
        torch.set_autocast_enabled(device, enabled)


def _cudnn() -> tuple[bool, bool, bool]:
    return torch._C._get_cudnn_enabled(), torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()


def _set_cudnn(flags: tuple[bool, bool, bool]) -> None:
    torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags


def entered_modes() -> tuple[int, int]:
    """Numbers of dispatch modes and function modes that were entered; the default device is a function mode of its own."""
    functions = torch._C._len_torch_function_stack()
    if functions and getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is not None:
        functions -= 1
    return torch._C._len_torch_dispatch_stack(), functions


def _leave_modes(before: tuple[int, int]) -> None:
    """Leave the modes that were entered since; the default device lies below all others."""
    while entered_modes()[0] > before[0]:
        _python_dispatch._pop_mode()
    while entered_modes()[1] > before[1]:
        overrides._pop_mode()


def _kernels() -> tuple[bool, bool, bool, bool]:
    """Which kernels PyTorch may choose, each with a rounding of its own: oneDNN, and three of attention."""
    c = torch._C
    return (
        c._get_mkldnn_enabled(),
        c._get_flash_sdp_enabled(),
        c._get_mem_efficient_sdp_enabled(),
        c._get_math_sdp_enabled(),
    )


def _set_kernels(enabled: tuple[bool, bool, bool, bool]) -> None:
    torch._C._set_mkldnn_enabled(enabled[0])
    torch.backends.cuda.enable_flash_sdp(enabled[1])
    torch.backends.cuda.enable_mem_efficient_sdp(enabled[2])
    torch.backends.cuda.enable_math_sdp(enabled[3])


_HOOKS: tuple[dict[int, object], ...] = tuple(
    value
    for owner in (module, optimizer)
    for name, value in vars(owner).items()
    if name.startswith("_global_") and isinstance(value, dict)
)
"""PyTorch's hooks that every module or optimizer of the process runs."""


def global_hooks() -> tuple[list[dict[int, object]], bool | None] | None:
    """The hooks of all modules and optimizers, and their kind; None where there are none, which is the rule."""
    return ([dict(hooks) for hooks in _HOOKS], module._global_is_full_backward_hook) if any(_HOOKS) else None


def _set_hooks(before: tuple[list[dict[int, object]], bool | None] | None) -> None:
    hooks, module._global_is_full_backward_hook = before or ([{} for _ in _HOOKS], None)
    for now, then in zip(_HOOKS, hooks, strict=True):
        now.clear()
        now.update(then)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _set_folder(path: str | None) -> None:
    if path is not None:
        os.chdir(path)


def _environment() -> dict[object, object]:
    """The variables as the operating system has them; decoding them all takes longer than a small client."""
    return dict(os.environ._data)  # type: ignore[attr-defined]


def _set_environment(before: dict[bytes, bytes]) -> None:
    wanted = {os.fsdecode(name): os.fsdecode(value) for name, value in before.items()}
    for name in [name for name in os.environ if name not in wanted]:
        del os.environ[name]
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})


def _set_filters(before: list[tuple[object, ...]]) -> None:
    with warnings.catch_warnings():  # leaving the block tells the interpreter that the filters changed
        pass
    warnings.filters[:] = before  # type: ignore[index]


def _set_path(before: list[str]) -> None:
    sys.path[:] = before


def interpreter() -> tuple[object, ...]:
    """What Python itself is set to: garbage collection, recursion limit, logging that is off for all, the two streams."""
    return gc.isenabled(), sys.getrecursionlimit(), logging.root.manager.disable, sys.stdout, sys.stderr


def _set_interpreter(before: tuple[bool, int, int, TextIO, TextIO]) -> None:
    collects, depth, disabled, sys.stdout, sys.stderr = before
    (gc.enable if collects else gc.disable)()
    sys.setrecursionlimit(depth)
    logging.disable(disabled)


SETTINGS: tuple[Setting, ...] = (
    Setting(entered_modes, _leave_modes),  # first: a mode sees what is called to put the others back
    Setting(torch.is_inference_mode_enabled, _set_inference_mode),  # before gradients: it decides on them too
    Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    Setting(torch.get_default_dtype, torch.set_default_dtype),
    Setting(_default_device, torch.set_default_device),
    Setting(torch.get_num_threads, torch.set_num_threads),
    Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    Setting(_deterministic, lambda modes: torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])),
    Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    Setting(_autocast, _set_autocast),
    Setting(_cudnn, _set_cudnn),
    Setting(_kernels, _set_kernels),
    Setting(global_hooks, _set_hooks),
    Setting(np.geterr, lambda before: np.seterr(**before)),
    Setting(_folder, _set_folder),
    Setting(_environment, _set_environment),
    Setting(lambda: list(warnings.filters), _set_filters),
    Setting(lambda: list(sys.path), _set_path),
    Setting(interpreter, _set_interpreter),
)
READ = [setting.read for setting in SETTINGS]


def settings() -> list[object]:
    """The present settings of this process."""
    return [read() for read in READ]


def restore(before: list[object]) -> None:
    """Put the settings back; what did not change is left alone."""
    if entered_modes() != before[0]:
        _leave_modes(before[0])  # type: ignore[arg-type]
    if settings() != before:
        for setting, value in zip(SETTINGS, before, strict=True):
            if setting.read() != value:
                setting.write(value)


@contextmanager
def unchanged_settings() -> Iterator[None]:
    """Context manager that restores the process's settings after the block."""
    before = settings()
    try:
        yield
    finally:
        restore(before)


def generators() -> list[object]:
    """The states of the global generators, in a form that compares."""
    kind, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    torchs = [generator.get_state().numpy().tobytes() for generator in _torchs()]
    return [torchs, random.getstate(), kind, np.asarray(words).tobytes(), rest]


def _torchs() -> list[torch.Generator]:
    """PyTorch's global generators; those of CUDA where it has started."""
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]


@cache
def _spare() -> np.random.MT19937:
    """The bit generator that NumPy's global functions draw from while a client runs; to make one takes as long as a copy."""
    return np.random.MT19937(0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global generators of PyTorch, NumPy and Python seeded for the block (0 <= seed < 2**64), then as they were before."""
    torchs = _torchs()
    before = [generator.get_state() for generator in torchs], random.getstate(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        for generator in torchs:
            generator.manual_seed(seed)
        random.seed(seed)
        # Another bit generator in its place: to copy a state of NumPy's out and back takes a hundred microseconds.
        np.random.set_bit_generator(_spare())  # type: ignore[attr-defined]
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield
    finally:
        for generator, state in zip(torchs, before[0], strict=True):
            generator.set_state(state)
        random.setstate(before[1])
        np.random.set_bit_generator(before[2])  # type: ignore[attr-defined]
