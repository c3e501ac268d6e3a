"""Keeps the import paths from before the packages: `import fl_sim.wire` gives `fl_sim.communication.messages`.

The old and the new name are one module object, so that a class has one identity. New code uses the new names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED: Mapping[str, str] = {
    "auto": "fl_sim.simulation.engines",
    "batched": "fl_sim.training.batched",
    "bench.commands": "fl_sim.cli.bench",
    "broadcast": "fl_sim.communication.sparse_broadcast",
    "capacities": "fl_sim.simulation.capacity_groups",
    "catalogue": "fl_sim.config.catalogue",
    "channels": "fl_sim.models.channels",
    "checkpoint": "fl_sim.simulation.checkpoint_store",
    "commands": "fl_sim.cli",
    "commands.results": "fl_sim.cli.results",
    "commands.screen": "fl_sim.cli.screen",
    "commands.tools": "fl_sim.cli.tools",
    "commands.training": "fl_sim.cli.run",
    "curve_cache": "fl_sim.sparsity.curve_cache",
    "curves": "fl_sim.sparsity.curves",
    "descent": "fl_sim.training.optimizers",
    "doctor": "fl_sim.runtime.client.doctor",
    "errors": "fl_sim.core.errors",
    "estimates": "fl_sim.communication.estimates",
    "examination": "fl_sim.runtime.client.trial",
    "facts": "fl_sim.simulation.model_facts",
    "features": "fl_sim.training.feature_loss",
    "federation": "fl_sim.simulation.federation",
    "fidelity": "fl_sim.bench.fidelity",
    "files": "fl_sim.core.files",
    "flops": "fl_sim.models.macs",
    "flower_app": "fl_sim.simulation.flower_app",
    "flower_run": "fl_sim.runtime.flower_run",
    "folder": "fl_sim.simulation.run_folder",
    "gating.macs": "fl_sim.gating.active_macs",
    "holdings": "strategies.held_masks",
    "kernels": "fl_sim.core.kernels",
    "layer_adaptive": "fl_sim.sparsity.bit_allocation",
    "ledger": "fl_sim.communication.ledger",
    "lookup": "fl_sim.core.lookup",
    "losses": "fl_sim.training.losses",
    "measuring": "fl_sim.sparsity.curve_messages",
    "method": "fl_sim.simulation.server",
    "model_file": "fl_sim.training.model_file",
    "network": "fl_sim.communication.virtual_clock",
    "observer": "fl_sim.core.observer",
    "parquet": "fl_sim.core.parquet",
    "precision": "fl_sim.training.precision",
    "prefix": "fl_sim.models.partial_forward",
    "progress": "fl_sim.report.progress",
    "prune": "fl_sim.sparsity.one_model",
    "published": "strategies.published_model",
    "recalibration": "fl_sim.training.recalibration",
    "reference": "fl_sim.config.reference",
    "replay": "fl_sim.communication.replay",
    "resume": "fl_sim.simulation.checkpointing",
    "runtime.app": "fl_sim.runtime.client.host",
    "runtime.booked": "fl_sim.runtime.apps.booking",
    "runtime.cohort": "fl_sim.runtime.grids.cohort",
    "runtime.contexts": "fl_sim.runtime.state.contexts",
    "runtime.faults": "fl_sim.runtime.grids.faults",
    "runtime.flower_compat": "fl_sim.communication.flower_private",
    "runtime.forking": "fl_sim.runtime.grids.forkserver",
    "runtime.heap": "fl_sim.runtime.state.blob_file",
    "runtime.inline": "fl_sim.runtime.grids.inline",
    "runtime.local": "fl_sim.runtime.grids.base",
    "runtime.memory": "fl_sim.runtime.grids.allocator",
    "runtime.own_fit": "fl_sim.runtime.client.over_fitting",
    "runtime.packing": "fl_sim.runtime.grids.scheduling",
    "runtime.parts": "fl_sim.runtime.state.buffers",
    "runtime.pooled": "fl_sim.runtime.grids.pool",
    "runtime.protocol": "fl_sim.communication.flower_traffic",
    "runtime.ray": "fl_sim.runtime.grids.ray",
    "runtime.resident": "fl_sim.runtime.client.fixed_weights",
    "runtime.setup": "fl_sim.runtime.server_context",
    "runtime.shared": "fl_sim.runtime.state.shared_memory",
    "runtime.states": "fl_sim.runtime.state.client_states",
    "runtime.worker": "fl_sim.runtime.grids.worker",
    "runtime.workers": "fl_sim.runtime.grids.workers",
    "seeding": "fl_sim.core.seeding",
    "session": "fl_sim.simulation.loop",
    "sparsity.distortion": "fl_sim.sparsity.knapsack",
    "sparsity.schedules": "fl_sim.core.schedules",
    "sparsity.shared": "fl_sim.sparsity.shared_mask",
    "study": "fl_sim.bench.capacity_study",
    "sweep": "fl_sim.simulation.sweep",
    "trackers": "fl_sim.report.trackers",
    "tree": "fl_sim.config.toml",
    "types": "fl_sim.core.types",
    "wire": "fl_sim.communication.messages",
}
"""Old name below `fl_sim` -> the module that holds its contents now."""
SPLIT: Mapping[str, str] = {
    "types": "fl_sim.training.client",
    "curves": "fl_sim.models.modes",
    "wire": "fl_sim.communication.exchange",
}
"""Old name -> the module that holds the rest of its contents."""


class _Alias(Loader):
    """Gives the module of the new name; one that was split shows both halves."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> None:
        """Start from an empty module; `exec_module` puts the real one in its place."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name under the old one."""
        found = importlib.import_module(MOVED[self.name])
        if self.name not in SPLIT:
            sys.modules[module.__name__] = found
            return
        rest = importlib.import_module(SPLIT[self.name])
        module.__dict__.update({n: v for half in (rest, found) for n, v in vars(half).items() if n[:2] != "__"})


class Finder(MetaPathFinder):
    """Finds modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix("fl_sim.")
        return ModuleSpec(fullname, _Alias(name)) if fullname != name and name in MOVED else None


def install() -> None:
    """Install the finder of old module names.

    It comes before all other finders: Python would import a submodule of an old package from its path a second time.
    """
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
