"""The layers: packages import downwards only; Ray and Flower's private names each live in one module."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fl_sim._moved import MOVED, SPLIT

# From the ground up: a package may import those above it in this list, never those below it, nor one on its own line.
LAYERS = [
    {"fl_sim.core"},
    {"fl_sim.data", "fl_sim.models", "fl_sim.codecs"},
    {"fl_sim.communication", "fl_sim.gating", "fl_sim.sparsity"},
    {"fl_sim.training"},
    {"fl_sim.runtime", "clients"},
    {"fl_sim.config", "strategies"},
    {"fl_sim.report"},
    {"fl_sim.simulation"},
    {"fl_sim.bench"},
    {"fl_sim.cli"},
    {"fl_sim"},
]
FLOWERS = {"communication", "runtime", "simulation", "bench"}
"""Packages that may touch Flower."""
LOOSE = {"fl_sim/__init__.py", "fl_sim/__main__.py", "fl_sim/_moved.py"}
TESTS = sorted(Path("tests").rglob("*.py"))
FILES = [p for root in ("fl_sim", "strategies", "clients") for p in sorted(Path(root).rglob("*.py"))]


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """Everything a module imports, `if TYPE_CHECKING` blocks left out."""
    return tuple(_names_imported(path))


def _names_imported(path: Path) -> Iterator[str]:
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


def _package(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "fl_sim" and parts[1:2] not in (["_moved"], ["__main__"]) else parts[0]


def _layer(module: str) -> int | None:
    return next((level for level, names in enumerate(LAYERS) if _package(module) in names), None)


def test_every_module_has_a_layer() -> None:
    assert not [module for module in map(_module, FILES) if _layer(module) is None]
    assert len(FILES) > 300


def test_imports_point_down() -> None:
    wrong = []
    for path in FILES:
        module = _module(path)
        own = _layer(module) or 0
        for imported in _imports(path):
            level = _layer(imported)
            if level is None or imported == "fl_sim" or _package(imported) == _package(module):
                continue
            if level >= own:
                wrong.append(f"{module} (layer {own}) imports {imported} (layer {level})")
            if module.startswith("fl_sim") and imported.split(".")[0] in ("strategies", "clients"):
                wrong.append(f"{module} imports {imported} statically")
    assert not wrong


def test_no_module_lies_outside_the_packages() -> None:
    assert {str(path) for path in Path("fl_sim").glob("*.py")} == LOOSE
    assert {path.parent.name for path in Path("fl_sim").glob("*/__init__.py")} == {
        name.removeprefix("fl_sim.") for names in LAYERS for name in names if name.startswith("fl_sim.")
    }


def test_old_import_paths_lead_to_the_same_modules() -> None:
    for old, new in MOVED.items():
        found = importlib.import_module(f"fl_sim.{old}")
        home = importlib.import_module(new)
        if old in SPLIT:
            rest = importlib.import_module(SPLIT[old])
            public = {n: v for half in (rest, home) for n, v in vars(half).items() if not n.startswith("__")}
            assert {n: v for n, v in vars(found).items() if not n.startswith("__")} == public
        else:
            assert found is home, old


def test_ray_and_private_flower_have_one_home() -> None:
    public = ("flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.simulation")
    homes: dict[str, set[str]] = {"ray": set(), "private names of Flower": set()}
    touching = set()
    for module, imported in ((_module(path), name) for path in FILES for name in _imports(path)):
        root = imported.split(".")[0]
        if root == "ray":
            homes["ray"].add(module)
        if root == "flwr" and not any(imported == p or imported == p + ".strategy" for p in public):
            homes["private names of Flower"].add(module)
        if root in ("flwr", "ray") and module.startswith("fl_sim"):
            touching.add(_package(module).removeprefix("fl_sim."))
    assert homes == {
        "ray": {"fl_sim.runtime.grids.ray", "fl_sim.runtime.grids.ray_worker"},
        "private names of Flower": {"fl_sim.communication.flower_private"},
    }
    assert touching <= FLOWERS


def test_public_names_are_exact() -> None:
    import fl_sim

    for name in fl_sim.__all__:
        getattr(fl_sim, name)  # made when first asked for
    public = {
        name for name in vars(fl_sim) if not name.startswith("_") and not isinstance(getattr(fl_sim, name), type(ast))
    }
    assert public == set(fl_sim.__all__)


def test_no_pickle() -> None:
    """But for functions of the user's own program on their way to its own workers."""
    unsafe = {"pickle", "cloudpickle", "joblib", "shelve", "marshal"}
    users: dict[str, set[str]] = {}
    for module, imported in ((_module(path), name) for path in FILES for name in _imports(path)):
        users.setdefault(imported.split(".")[0] if imported != "fl_sim.runtime.by_value" else imported, set()).add(
            module
        )
    assert {name: users[name] for name in unsafe & users.keys()} == {"cloudpickle": {"fl_sim.runtime.by_value"}}
    assert users["fl_sim.runtime.by_value"] == {"fl_sim.simulation.engines", "fl_sim.simulation.client_side"}


def test_no_test_module_imports_another() -> None:
    """What two test modules need lies in tests/support, the one folder of the tests on the import path."""
    imports = {f"{path}: {imported}" for path in TESTS for imported in _imports(path)}
    assert not [
        line for line in imports if any(p == "tests" or p.startswith("test_") for p in line.split(": ")[1].split("."))
    ]


def test_tests_lie_in_folders_named_after_the_packages() -> None:
    packages = {name.removeprefix("fl_sim.") for names in LAYERS for name in names if name != "fl_sim"}
    modules = [path for path in TESTS if path.name.startswith("test_")]
    assert {path.parent.relative_to("tests").as_posix() for path in modules} == {*packages, "house"}
    helpers = set(TESTS) - set(modules) - {Path("tests/conftest.py")}
    assert {path.parent.as_posix() for path in helpers} == {"tests/support"}
    assert len({path.name for path in modules}) == len(modules), "two test modules of one name"
