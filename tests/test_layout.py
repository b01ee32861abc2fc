"""The layout of the project: imports go downwards, public functions are explained, none is long."""

import ast
import re
from pathlib import Path

import pytest

from common import flags
from upge import GATES, METHODS, PI_OLD

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
    "examples": 5,
}


def imported(path):
    """The project's own modules that a file imports, as dotted names."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            if node.module == "common":
                names += [f"common.{alias.name}" for alias in node.names]
            else:
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


def test_common_distributed_is_the_ground_of_common():
    """Every other module of common/ may import it, so it imports none of them."""
    assert not [name for name in imported(ROOT / "common/distributed.py") if "common" in name]


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


def functions_of(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_public_functions_and_classes_are_explained(path):
    classes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]
    for node in functions_of(path) + classes:
        if not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_is_explained(path):
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_function_has_more_than_80_lines(path):
    for node in functions_of(path):
        assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name} is too long"


def test_main_of_training_comes_first():
    """A reader meets Algorithm 1 within the first 60 lines, before any function that it calls."""
    first = min(functions_of(ROOT / "train_hpt.py"), key=lambda node: node.lineno)
    assert first.name == "main" and first.lineno <= 60


def test_the_steps_of_main_are_those_of_the_docstring():
    text = (ROOT / "train_hpt.py").read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    [main] = [node for node in functions_of(ROOT / "train_hpt.py") if node.name == "main"]
    lines = text.splitlines()[main.lineno : main.end_lineno]
    listed = re.findall(r"^    (\d)\. ", docstring, re.MULTILINE)
    headings = re.findall(r"^ +# (\d)\. ", "\n".join(lines), re.MULTILINE)
    assert listed == headings == list("123456")


def test_methods_on_the_command_line_are_those_of_upge():
    """flags.py has the names again, since upge.py imports torch, which is slow."""
    assert list(METHODS) == flags.METHODS
    grouped = [name for name, method in METHODS.items() if method.combine == "group"]
    assert grouped == flags.GROUP_METHODS


@pytest.mark.parametrize("flag, known", [("--gate", GATES), ("--pi-old", PI_OLD)])
def test_other_choices_on_the_command_line_are_those_of_upge(flag, known):
    [action] = [a for a in flags.training_parser()._actions if flag in a.option_strings]
    assert list(action.choices) == list(known)
