"""The rules of the house: imports point down, there are no cycles, and one name has one meaning."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flax_qformer"
LEVELS = (
    {"errors", "version", "progress", "compilation"},
    {"parallel"},
    {"models"},
    {"checkpoints", "convert", "data", "processing"},
    {"training", "planning"},
    {"commands"},
)
"""From the bottom up: a module imports from its own level and those below."""

PLATFORM = {"default_backend", "device_kind", "platform", "platform_dependent", "__version_info__", "__version__"}
"""Attributes that tell which machine or which JAX runs the program."""


def modules() -> dict[str, Path]:
    """The modules of the package by name, `flax_qformer` left out; those of `convert` are behind a link."""
    paths = [path for folder in (ROOT, ROOT / "convert") for path in folder.rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths if "assets" not in path.parts
    }


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def level(module: str) -> int:
    top = module.split(".")[0]
    found = [number for number, names in enumerate(LEVELS) if top in names]
    return found[0] if found else len(LEVELS)  # `__init__` and `__main__` stand above all


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, also within functions."""
    for node in ast.walk(TREES[module]):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] != "flax_qformer":
                continue
            target = ".".join(parts[1:])
            yield target if target in MODULES else f"{target}.__init__".lstrip(".")
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} has a relative import"


def test_imports_point_down() -> None:
    upward = [(name, other) for name in MODULES for other in imports(name) if level(other) > level(name)]
    assert not upward


def test_there_are_no_cycles() -> None:
    TopologicalSorter({name: set(imports(name)) for name in MODULES}).prepare()


def test_only_two_modules_ask_which_platform_runs() -> None:
    allowed = {"compilation", "models.kernels"}
    asking = {
        (name, node.attr)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in PLATFORM and name not in allowed
        if isinstance(node.value, ast.Name | ast.Call | ast.Subscript) and "jax" in ast.unparse(node.value)
    }
    assert not asking


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("__init__")])
def test_a_package_only_exports_names_again(name: str) -> None:
    docstring, *rest = TREES[name].body
    assert isinstance(docstring, ast.Expr)
    for node in rest:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert isinstance(node, ast.ImportFrom) or is_all, ast.unparse(node)


def test_a_class_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
