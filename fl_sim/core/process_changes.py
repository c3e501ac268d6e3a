"""What a block of a user's code changes in the process, by names that its author knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from fl_sim.core.process_state import entered_modes, global_hooks, interpreter, unchanged_settings

PROCESS: Mapping[str, Callable[[], object]] = {
    "the working folder (os.chdir)": os.getcwd,
    "the grad mode (torch.set_grad_enabled)": torch.is_grad_enabled,
    "the default dtype (torch.set_default_dtype)": torch.get_default_dtype,
    "the number of threads (torch.set_num_threads)": torch.get_num_threads,
    "how NumPy reports floating-point errors (np.seterr)": np.geterr,
    "a PyTorch mode (__enter__ of a TorchDispatchMode or TorchFunctionMode)": entered_modes,
    "what Python itself is set to (gc, sys.setrecursionlimit, logging.disable, sys.stdout)": interpreter,
    "the hooks of all modules or optimizers (register_module_forward_hook, for instance)": global_hooks,
}
"""What of a process a client or a model must leave as it was -> how it is read."""


@contextmanager
def observed() -> Iterator[list[str]]:
    """Names of what the block changes in the process, in a list that is filled at its end; everything is put back."""
    before = {name: read() for name, read in PROCESS.items()}
    changed: list[str] = []
    with unchanged_settings():
        try:
            yield changed
        finally:
            changed += [name for name, read in PROCESS.items() if read() != before[name]]
