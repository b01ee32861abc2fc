"""The layout of the project: imports go downwards, public functions are explained, none is long."""

import ast
import re

import pytest
from programs import ROOT

from common import flags
from upge import METHODS

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
LONGEST_MODULE, LONGEST_FUNCTION, MOST_FLAGS = 420, 80, 54
KINDS = ast.FunctionDef | ast.AsyncFunctionDef


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


def functions_of(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, KINDS)]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_downwards(path):
    own = module_name(path)
    for name in imported(path):
        floor, own_floor = name.split(".")[0], own.split(".")[0]
        same_folder = floor == own_floor and floor in ("common", "toy")
        assert same_folder or FLOORS[floor] < FLOORS[own_floor], name


def test_common_has_no_circle():
    graph = {module_name(p): imported(p) for p in SOURCES if p.parent.name == "common"}
    assert not [name for name in graph["common.distributed"] if "common" in name]  # its ground
    while graph:
        leaves = {name for name, needs in graph.items() if not set(needs) & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_upge_needs_torch_alone():
    names = list(ast.walk(ast.parse((ROOT / "upge.py").read_text())))
    modules = {a.name.split(".")[0] for n in names if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module.split(".")[0] for n in names if isinstance(n, ast.ImportFrom)}
    assert modules <= {"math", "collections", "typing", "torch"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_modules_public_functions_and_classes_are_explained(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in sum((owner.body for owner in classes), tree.body):  # methods, too
        if isinstance(node, KINDS | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_function_and_no_module_of_common_is_too_long(path):
    for node in functions_of(path):
        length = node.end_lineno - node.lineno + 1
        assert length <= LONGEST_FUNCTION, f"{node.name} is too long"
    assert path.parent.name != "common" or len(path.read_text().splitlines()) <= LONGEST_MODULE


def test_the_programs_have_few_flags_and_methods_are_those_of_upge():
    """A wish is answered in the README's "Left out on purpose", before it gets a flag."""
    actions = {}
    for parser in (flags.evaluation_parser(), flags.training_parser()):
        actions |= {action.dest: action for action in parser._actions}
    assert len(actions) <= MOST_FLAGS
    assert list(actions["method"].choices) == list(METHODS)


def test_main_of_training_comes_first_and_its_steps_are_those_of_the_docstring():
    """A reader meets Algorithm 1 before any function that it calls."""
    path = ROOT / "train_hpt.py"
    first = min(functions_of(path), key=lambda node: node.lineno)
    assert first.name == "main" and first.lineno <= 60
    docstring = ast.get_docstring(ast.parse(path.read_text()), clean=False)
    lines = path.read_text().splitlines()[first.lineno : first.end_lineno]
    listed = re.findall(r"^    (\d)\. ", docstring, re.MULTILINE)
    headings = re.findall(r"^ +# (\d)\. ", "\n".join(lines), re.MULTILINE)
    assert listed == headings == list("123456")
