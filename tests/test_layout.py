"""The rules of the house: imports point down, there are no cycles, and one name has one meaning."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flax_qformer"
LEVELS = (
    {"errors", "version", "progress", "compilation", "json_files"},
    {"parallel"},
    {"models"},
    {"diffusion"},
    {"convert"},
    {"processing", "checkpoints"},
    {"diffusion.pipeline", "diffusion.control", "diffusion.subjects"},
    {"data"},
    {"training"},
    {"planning"},
    {"commands"},
    {"__init__", "__main__"},
)
"""From the bottom up: a module imports from its own level and those below. A module's own row precedes its folder's."""

PLATFORM = {"default_backend", "device_kind", "compute_capability", "platform", "platform_dependent"}
"""Attributes that depend on the machine that runs the program."""


def modules() -> dict[str, Path]:
    """The package's modules by name, without `flax_qformer`; those of `convert` are behind a link."""
    paths = [path for folder in (ROOT, ROOT / "convert") for path in folder.rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths if "assets" not in path.parts
    }


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def level(module: str) -> int:
    top = module.split(".")[0]
    rows = {name: number for number, names in enumerate(LEVELS) for name in names}
    return rows.get(module, rows[top])


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, also inside functions."""
    for node in ast.walk(TREES[module]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            # An imported name can itself be a module of the package.
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            target = name.removeprefix("flax_qformer").lstrip(".")
            if name.split(".")[0] == "flax_qformer":
                yield from ({target, f"{target}.__init__".lstrip(".")} & MODULES.keys())
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} has a relative import"


def test_imports_point_down() -> None:
    upward = [(name, other) for name in MODULES for other in imports(name) if level(other) > level(name)]
    assert not upward


def test_there_are_no_cycles() -> None:
    TopologicalSorter({name: set(imports(name)) for name in MODULES}).prepare()


def test_only_two_modules_check_the_platform() -> None:
    allowed = {"compilation", "models.kernels"}
    asking = {
        (name, node.attr)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and name not in allowed
        if node.attr in PLATFORM or ast.unparse(node).startswith("jax.__version")
    }
    asking |= {
        (name, alias.name)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and name not in allowed
        for alias in node.names
        if alias.name in PLATFORM
    }
    assert not asking


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("__init__")])
def test_init_files_only_reexport(name: str) -> None:
    docstring, *rest = TREES[name].body
    assert isinstance(docstring, ast.Expr)
    for node in rest:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert isinstance(node, ast.ImportFrom) or is_all, ast.unparse(node)


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert {name: owners for name, owners in places.items() if len(owners) > 1} == {}
