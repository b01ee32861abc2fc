"""Pages of docs/ against the program: gpu.md's table and thresholds, flags and links of the others.

docs/gpu.md's table is what --plan says, its thresholds are those of tools/check_gpu.py.
"""

import functools
import re

import pytest
import test_plan
import test_recipes

from common import flags, plan
from common.report import REPOSITORY
from tools import check_gpu

PAGE = (REPOSITORY / "docs/gpu.md").read_text()
MODELS = {  # name in the table: (its config, the recipe whose flags it has)
    "Qwen2.5-Math-1.5B": (test_recipes.config_of, "qwen2.5-math-1.5b"),
    "Qwen2.5-Math-7B": (test_recipes.config_of, "qwen2.5-math-7b"),
    "Llama-3.1-8B": (test_recipes.config_of, "llama-3.1-8b"),
    "Qwen2.5-32B": (lambda recipe: test_plan.config_of("32B"), "qwen2.5-math-7b"),
}
SIZES = (24, 40, 80, 141)  # GB of the table's last columns
count_parameters = plan.count_parameters  # before a test replaces it


@functools.cache
def counted(name):
    """The parameters of a model, which take a second to count."""
    make, recipe = MODELS[name]
    return count_parameters(make(recipe))


@pytest.fixture
def plan_of(monkeypatch):
    """plan_of(model, GPUs, GB, *flags): the plan of a run on one machine of 4 TB."""

    def planned(name, gpus, gigabytes, *words):
        make, recipe = MODELS[name]
        monkeypatch.setenv("WORLD_SIZE", str(gpus))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus))
        monkeypatch.setattr(plan, "host_memory", lambda: 4e12)
        monkeypatch.setattr(plan, "count_parameters", lambda *_: counted(name))
        args = flags.parse_training_args([f"@{test_recipes.RECIPES / recipe}.args", *words])
        return plan.memory_plan(args, make(recipe), False, gigabytes)

    return planned


LINES = [line for line in PAGE.splitlines() if line.startswith(tuple(f"| {m} " for m in MODELS))]
SMALL = ("--tokens-per-microbatch", "9216")


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_table_is_what_the_plan_says(line, plan_of):
    name, gpus, *cells = [cell.strip() for cell in line.strip("|").split("|")]
    whole, small = plan_of(name, int(gpus), 80), plan_of(name, int(gpus), 80, *SMALL)
    figures = [whole.resident, whole.peak, small.peak, whole.loading]
    assert [f"{figure / plan.GB:.1f}" for figure in figures] == cells[:4]
    for gigabytes, cell in zip(SIZES, cells[4:], strict=True):
        whole, small = (
            plan_of(name, int(gpus), gigabytes),
            plan_of(name, int(gpus), gigabytes, *SMALL),
        )
        says = f"9,216: {small.concurrent}" if not small.problems() else "no"
        assert cell == (str(whole.concurrent) if not whole.problems() else says)


def test_the_table_has_every_model_on_1_2_and_8_gpus():
    assert len(LINES) == 3 * len(MODELS)


def test_engines_that_are_shared_have_room_for_more(plan_of):
    shared = plan_of("Qwen2.5-32B", 8, 141, "--tensor-parallel", "2")
    text = " ".join(PAGE.split())
    assert f"GPUs of 141 GB: {shared.concurrent} responses per engine" in text


def test_the_thresholds_are_those_of_the_program():
    cells = dict(re.findall(r"^\| (.+?) \| (.+) \|$", PAGE, re.MULTILINE))
    of = check_gpu.LIMITS
    kl = cells["`mismatch/kl` in each step that trains on rollouts"]
    assert kl == "1e-2 (an estimate) | 1e-8" and (of["GPU"].kl, of["CPU"].kl) == (1e-2, 1e-8)
    norm = cells["gradient norm of SFT, one rank and two"]
    assert norm == "3% (an estimate) | 0.01%" and (of["GPU"].norm, of["CPU"].norm) == (3e-2, 1e-4)
    accuracy = cells["accuracy of the base model on them"].split(" | ")[0]
    assert accuracy == f"{check_gpu.BASE_ACCURACY} ± {check_gpu.ACCURACY_LIMIT}"
    assert f"R{check_gpu.OLDEST_DRIVER} or later" in cells["driver"]
    assert cells["C library"].startswith(f"glibc {'.'.join(map(str, check_gpu.OLDEST_GLIBC))}")


# ------------------------------------------------------------------------------- flags and links

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FLAGS = {
    name
    for parser in (flags.training_parser(), flags.evaluation_parser())
    for action in parser._actions
    for name in action.option_strings
}
FLAGS |= {
    name
    for path in (REPOSITORY / "tools").glob("*.py")
    for name in re.findall(r'"(--[a-z-]+)"', path.read_text())
}
OF_OTHERS = {
    # torchrun
    *("--nproc_per_node", "--nnodes", "--node-rank", "--master-addr", "--max-restarts"),
    *("--shutdown-timeout", "--rdzv-backend", "--rdzv-conf", "--local-addr"),
    # pip, docker, gcc
    *("--no-deps", "--extra-index-url", "--gpus", "--ipc", "--version"),
}


def missing_flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text)) - FLAGS - OF_OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_a_page_exists(page):
    assert not missing_flags(page.read_text())
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
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_every_file_and_name_of_the_questions_exists():
    text = (REPOSITORY / "docs/faq.md").read_text()
    for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|txt))`", text):
        assert (REPOSITORY / path).exists(), path
    sources = "".join(path.read_text() for path in REPOSITORY.glob("*.py"))
    for name in ("hpt_gate", "apply_gate", "sequences_of_prompt", "build_sequences", "check_vllm"):
        assert f"`{name}`" in text or f".{name}`" in text
        assert f"def {name}(" in sources
