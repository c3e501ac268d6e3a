"""The layer table: imports point down only, Ray and Flower's private names each live in one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = [
    {
        "fl_sim.types",
        "fl_sim.errors",
        "fl_sim.seeding",
        "fl_sim.lookup",
        "fl_sim.files",
        "fl_sim.parquet",
        "fl_sim.kernels",
    },
    {"fl_sim.sparsity", "fl_sim.losses", "fl_sim.fidelity", "fl_sim.codecs"},
    {
        "fl_sim.training",
        "fl_sim.descent",
        "fl_sim.batched",
        "fl_sim.models",
        "fl_sim.data",
        "fl_sim.gating",
        "fl_sim.flops",
        "fl_sim.features",
        "fl_sim.precision",
        "fl_sim.prefix",
        "fl_sim.curves",
        "fl_sim.curve_cache",
        "fl_sim.layer_adaptive",
        "fl_sim.prune",
        "fl_sim.recalibration",
        "fl_sim.channels",
    },
    {
        "fl_sim.wire",
        "fl_sim.holdings",
        "fl_sim.broadcast",
        "fl_sim.published",
        "fl_sim.measuring",
        "fl_sim.runtime",
        "fl_sim.ledger",
        "fl_sim.network",
        "fl_sim.estimates",
        "fl_sim.replay",
        "fl_sim.checkpoint",
        "fl_sim.model_file",
    },
    {"strategies", "clients"},
    {
        "fl_sim.config",
        "fl_sim.tree",
        "fl_sim.report",
        "fl_sim.simulation",
        "fl_sim.capacities",
        "fl_sim.auto",
        "fl_sim.federation",
        "fl_sim.facts",
        "fl_sim.observer",
        "fl_sim.method",
        "fl_sim.session",
        "fl_sim.resume",
        "fl_sim.folder",
        "fl_sim.progress",
        "fl_sim.catalogue",
        "fl_sim.bench",
        "fl_sim.sweep",
        "fl_sim.study",
        "fl_sim.doctor",
        "fl_sim.examination",
        "fl_sim.reference",
        "fl_sim.flower_run",
        "fl_sim.trackers",
        "fl_sim.cli",
        "fl_sim.commands",
        "fl_sim",
    },
]
FILES = [p for root in ("fl_sim", "strategies", "clients") for p in sorted(Path(root).rglob("*.py"))]


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> Iterator[str]:
    """Everything a module imports, `if TYPE_CHECKING` blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            if node.module == "fl_sim":
                yield from (f"fl_sim.{alias.name}" for alias in node.names)


def _layer(module: str) -> int | None:
    best = max(
        (
            (len(name), level)
            for level, names in enumerate(LAYERS)
            for name in names
            if f"{module}.".startswith(f"{name}.")
        ),
        default=None,
    )
    return None if best is None else best[1]


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_imports_point_down(path: Path) -> None:
    module = _module(path)
    own = _layer(module)
    assert own is not None, f"{module} has no layer"
    for imported in _imports(path):
        level = _layer(imported)
        if level is None or imported == "fl_sim":
            continue
        assert level <= own, f"{module} (layer {own}) imports {imported} (layer {level})"
        if level == own == 4:
            assert imported.split(".")[0] == module.split(".")[0], f"{module} imports {imported}"
        if module.startswith("fl_sim"):
            assert imported.split(".")[0] not in ("strategies", "clients"), f"{module} imports {imported} statically"


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_ray_and_private_flower_have_one_home(path: Path) -> None:
    public = ("flwr.app", "flwr.serverapp", "flwr.clientapp")
    module = _module(path)
    for imported in _imports(path):
        root = imported.split(".")[0]
        if root == "ray":
            assert module == "fl_sim.runtime.ray"
        if root == "flwr" and not any(imported == p or imported == p + ".strategy" for p in public):
            assert module == "fl_sim.runtime.flower_compat", f"{module} imports {imported}"
        if root in ("flwr", "ray") and module.startswith("fl_sim"):
            assert _layer(module) in (3, 5), f"{module} touches {root}"


def test_public_names_are_exact() -> None:
    import fl_sim

    for name in fl_sim.__all__:
        getattr(fl_sim, name)  # made when first asked for
    public = {
        name for name in vars(fl_sim) if not name.startswith("_") and not isinstance(getattr(fl_sim, name), type(ast))
    }
    assert public == set(fl_sim.__all__)


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_no_pickle(path: Path) -> None:
    for imported in _imports(path):
        assert imported.split(".")[0] not in ("pickle", "cloudpickle", "joblib", "shelve", "marshal")
