"""The layout of the project: imports go downwards, public functions are explained, none is long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for p in ROOT.glob("**/*.py") if not {".venv", "runs"} & set(p.parts))
SOURCES = [p for p in FILES if not p.name.startswith("test_") and p.parent.name != "tests"]
FLOORS = {  # a module imports only from floors below its own; common/ has an order of its own
    "upge": 0,
    "common": 1,
    "rollout": 2,
    "reward": 2,
    "toy": 2,
    "evaluate": 3,
    "train_hpt": 4,
    "tools": 5,
}


def imported(path):
    """The project's own modules that a file imports, as dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "common":
            names += [f"common.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return [name for name in names if name.split(".")[0] in FLOORS]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_downwards(path):
    own = module_name(path)
    for name in imported(path):
        both_common = own.startswith("common.") and name.startswith("common.")
        assert both_common or FLOORS[name.split(".")[0]] < FLOORS[own.split(".")[0]], name


def test_common_has_no_circle():
    graph = {module_name(p): imported(p) for p in SOURCES if p.parent.name == "common"}
    while graph:
        leaves = {name for name, needs in graph.items() if not set(needs) & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_upge_needs_torch_alone():
    names = list(ast.walk(ast.parse((ROOT / "upge.py").read_text())))
    modules = {a.name.split(".")[0] for n in names if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module.split(".")[0] for n in names if isinstance(n, ast.ImportFrom)}
    assert modules == {"math", "collections", "typing", "torch"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_public_functions_are_explained_and_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"
