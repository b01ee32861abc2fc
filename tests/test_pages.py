"""README.md, docs/*.md and the recipes against the program: flags, links, the table of rows."""

import re

import pytest
from programs import ROOT

from common import flags
from upge import METHODS, TABLE

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FILES = [*PAGES, *sorted((ROOT / "recipes").glob("*.args")), ROOT / "toy/toy.args"]
FLAGS = {
    name
    for parser in (flags.training_parser(), flags.evaluation_parser())
    for action in parser._actions
    for name in action.option_strings
}
FLAGS |= {
    name
    for path in (ROOT / "tools").glob("*.py")
    for name in re.findall(r'"(--[a-z-]+)"', path.read_text())
}
OF_OTHERS = {
    # torchrun
    *("--nproc_per_node", "--nnodes", "--node-rank", "--master-addr", "--max-restarts"),
    *(
        "--shutdown-timeout",
        "--rdzv-backend",
        "--rdzv-conf",
        "--rdzv-endpoint",
        "--local-addr",
        "--standalone",
    ),
    # pip, docker, gcc
    *("--no-deps", "--extra-index-url", "--gpus", "--ipc", "--version"),
}


def missing_flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text)) - FLAGS - OF_OTHERS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_flag_of_a_page_exists(path):
    assert not missing_flags(path.read_text())
    assert missing_flags("`--prompts-per-stp 3`") == {"--prompts-per-stp"}  # negative control


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https:"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        is_line = linked.suffix == ".py" and re.fullmatch(r"L\d+", anchor)
        assert not anchor or is_line or anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_program_of_a_page_exists(page):
    for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|args))`", page.read_text()):
        assert list(ROOT.glob(f"**/{path}")), path
    for name in re.findall(r"python -m ((?:tools|toy)\.[a-z_0-9]+)\b", page.read_text()):
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name


def cells_of(line):
    """The cells of a line of a table, without the bars' backslashes."""
    cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [cell.strip().replace("\\|", "|") for cell in cells]


def test_the_readmes_table_of_rows_is_upges():
    start = README.index("| row | data |")
    lines = README[start:].partition("\n\n")[0].splitlines()
    rows = {name: cells for name, *cells in map(cells_of, lines[2:])}
    wanted = {}
    for name, row in TABLE.items():
        A = f"({row.advantage}) * {row.scale}" if row.scale else row.advantage
        wanted[name] = [row.data, row.stable, row.pi_ref, A, row.normaliser]
    assert rows == wanted


def test_the_readme_names_every_method():
    start = README.index("| method | rollouts |")
    table = README[start:].partition("\n\n")[0].splitlines()[2:]
    assert {name for line in table for name in re.findall(r"`(\w+)`", cells_of(line)[0])} == {
        *METHODS
    }


def test_the_readme_points_at_the_numbers_of_main():
    lines = (ROOT / "train_hpt.py").read_text().splitlines()
    links = re.findall(r"\[(\d)\]\(train_hpt\.py#L(\d+)\)", README)
    assert [number for number, _ in links] == list("123456")
    for number, line in links:
        assert lines[int(line) - 1].strip().startswith(f"# {number}. ")
