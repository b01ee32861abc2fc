"""The verifier: what counts as right, and its real worker processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mutants import mutants

import reward
from reward import Verifier, last_boxed, same

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared/data"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")


def read_pairs():
    """[(given, reference, 1.0 or 0.0)] of answers.txt."""
    pairs = []
    for line in (HERE / "answers.txt").read_text().splitlines():
        for sign, score in (("   ===   ", 1.0), ("   =/=   ", 0.0)):
            if sign in line:
                pairs.append((*line.split(sign), score))
    return pairs


PAIRS = read_pairs()


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2) as v:
        yield v


def boxed(text):
    return f"so \\boxed{{{text}}}"


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def outlive(pids):
    """Those of the processes that are still there after 30 seconds."""
    deadline = time.monotonic() + 30
    while pids and time.monotonic() < deadline:
        time.sleep(0.1)
        pids = [pid for pid in pids if is_alive(pid)]
    return pids


# ------------------------------------------------------------------------------------------------
# What counts as right
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, content",
    [
        ("\\boxed{1} no, \\boxed {\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{1} and \\boxed{2", None),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{4}. As I said, \\boxed is", "4"),
        ("\\boxed{a\\\\b}", "a\\\\b"),
        ("\\boxed{" + "{" * 100_000, None),
        ("nothing", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_answers_right_and_wrong_in_order(verifier):
    pairs = list(PAIRS)
    random.Random(0).shuffle(pairs)
    given, wanted, right = map(list, zip(*pairs))
    scores = verifier.score([boxed(text) for text in given], wanted)
    assert len(pairs) > 200 and verifier.timeouts == 0
    assert [pair for pair, score in zip(pairs, scores) if score != pair[2]] == []
    unboxed = verifier.score(given, wanted)
    assert [s for text, s in zip(given, unboxed) if s and "\\boxed" not in text] == []


@pytest.mark.parametrize(
    "given, accepted, right",
    [
        ("7", ["4", "7"], 1.0),
        ("\\frac12", ["4", "0.5"], 1.0),
        ("4", [4, 7], 1.0),
        ("4", 4, 1.0),
        ("5", "\\boxed{5}", 1.0),
        ("1\n,2", "1, 2", 1.0),
        ("8", ["4", 7], 0.0),
        ("4.2", 4, 0.0),
        (" ", "4", 0.0),
        ("", "\\text{}", 0.0),
    ],
)
def test_several_accepted_answers_and_numbers(given, accepted, right):
    assert reward.grade(boxed(given), accepted) == right


def passing(references):
    """The mutants of references that pass, with their references; and how many there are."""
    tried = [(text, reference) for reference in references for text in mutants(reference)]
    return [pair for pair in tried if same(*pair)], len(tried)


def test_no_changed_reference_passes():
    """One digit, sign, relation, letter or word of a reference of answers.txt is changed."""
    strict = [reference for _, reference, right in PAIRS if right and "." not in reference]
    found, count = passing(sorted(set(strict)))
    assert found == [] and count > 500


def test_the_mutants_find_a_verifier_that_drops_what_it_does_not_know(monkeypatch):
    """The negative control: no unit and no word is kept, and names are forgiven."""
    monkeypatch.setattr(reward, "value_and_unit", lambda text: (reward.UNIT.sub("", text), ""))
    monkeypatch.setattr(reward, "name_and_value", lambda item: (None, item.split("=")[-1]))
    found, _ = passing(["5\\text{ m}", "x=5", "28\\%", "n\\text{ is odd}"])
    assert len(found) > 4


def test_the_same_text_is_not_read(monkeypatch):
    monkeypatch.setattr(reward, "read", lambda text: pytest.fail(f"{text} was read"))
    for given, wanted in [("x+1", "x+1"), ("\\dfrac12", "\\frac{1}{2}"), ("C. 5 m", "C")]:
        assert same(given, wanted)


def test_random_strings_score_nothing(verifier):
    """Strings that mean nothing neither raise, hang nor score; with the answer behind, they do."""
    pieces = (
        "\\frac \\sqrt \\pi \\pm \\log \\circ \\in \\cup \\infty \\text{ \\boxed{ \\ { } ( [ ] ) |"
    )
    pieces = [*pieces.split(), *"^_,+-*/=<!.%$'xneid0139AC &é√∞中\n\0\ud800²", "th", "cm", "or"]
    rng = random.Random(0)
    strings = ["".join(rng.choices(pieces, k=rng.randrange(1, 40))) for _ in range(300)]
    answers = ["271828", r"\frac{271}{828}", r"\text{Navin}", "(2,71)", r"[2,71)"] * 60
    assert verifier.score([boxed(text) for text in strings], answers) == [0.0] * 300
    right = [f"{boxed(text)}\n{boxed(answer)}" for text, answer in zip(strings, answers)]
    assert verifier.score(right, answers) == [1.0] * 300
    assert verifier.timeouts == 0


HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}",
    "factorial": r"\boxed{100000000!}",
    "factorials": r"\boxed{((((5!)!)!)!)!}",
    "product": r"\boxed{\prod_{i=1}^{10000000} i}",
    "expansion": r"\boxed{(x+y+z+a+b+c)^{90000}}",
    "roots": r"\boxed{" + r"\sqrt{2+" * 50 + "x" + "}" * 50 + "}",
    "nested braces": "\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    "a thousand braces": "\\boxed{" + "{" * 900 + "1" + "}" * 900 + "}",
    "parentheses": "\\boxed{" + "(" * 500 + ")" * 500 + "}",
    "nested pairs": "\\boxed{" + "(1," * 400 + "1" + ")" * 400 + "}",
    "a long list": "\\boxed{" + ",".join(map(str, range(400))) + "}",
    "1 MB": "\\boxed{" + "1+" * 500_000 + "1}",
    "1 MB of boxes": "\\boxed{" * 150_000,
    "half a character": "\\boxed{\ud800 4}",
    "unfinished thought": "<think> so it must be \\boxed{3",
}


def test_hostile_answers_are_not_computed():
    """None of them costs its deadline, and the answers around them are right."""
    with Verifier(workers=2, deadline=30.0) as v:
        responses = [r for text in HOSTILE.values() for r in (text, boxed("3.0"))]
        for reference, right in (("3", 1.0), (r"(x+y+z+a+b+c)^{90001}", 0.0)):
            scores = v.score(responses, [reference] * len(responses))
            assert scores == [0.0, right] * len(HOSTILE)
        assert v.timeouts == 0


# ------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------

MINE = """
import os, subprocess, sys, time

def share(response, answer):
    return len(response) / len(answer)

def takes_memory(response, answer):
    return len(bytearray(int(answer))) >= 0

def hangs(response, answer):
    time.sleep(30 if response == "hangs" else 0)
    return 1

def breaks(response, answer):
    return 1 / 0

def dies(response, answer):
    if response == "dies":
        os._exit(1)
    return 1

def starts_another(response, answer):
    print(sys.stdin.read(), 1)
    child = subprocess.Popen(["sleep", "1000"])
    open(answer, "w").write(str(child.pid))
    return hangs(response, answer)

def adds(response, answer):
    open(answer, "w")
    return sum(range(10**15))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module above in the working directory."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)


def test_a_reward_of_ones_own(mine):
    with Verifier(workers=1, function="mine:share") as v:
        assert v.score(["a", "ab", "", "abcd"], ["abcd"] * 4) == [0.25, 0.5, 0.0, 1.0]
        assert v.score([], []) == []
        with pytest.raises(ValueError, match="shorter"):
            v.score(["a", "b"], ["1"])
        sentence = "--reward mine:share returned 2.0, not a number from 0 to 1"
        with pytest.raises(SystemExit, match=sentence):
            v.score(["abab"], ["ab"])
    sentence = "^error: --reward mine:breaks raised ZeroDivisionError: division by zero, for 'a'$"
    with (
        Verifier(workers=1, function="mine:breaks") as v,
        pytest.raises(SystemExit, match=sentence),
    ):
        v.score(["a"] * 5, ["b"] * 5)


@pytest.mark.parametrize("name", ["none:f", "mine:none", "mine"])
def test_a_reward_that_cannot_be_loaded(mine, name):
    with pytest.raises(SystemExit, match=f"^error: --reward {name} .*cannot be loaded: "):
        Verifier(workers=1, function=name)


def test_a_worker_has_a_memory_limit(mine):
    with Verifier(workers=1, memory=2**28, function="mine:takes_memory") as v:
        answers = [str(2**27), str(2**29), str(2**27)]
        assert v.score(["", "", ""], answers) == [1.0, 0.0, 1.0] and v.timeouts == 1


def test_an_answer_has_a_deadline_and_its_children_end(mine):
    with Verifier(workers=1, deadline=2.0, function="mine:starts_another") as v:
        assert v.score(["hangs", "", "hangs"], ["late", "soon", "last"]) == [0.0, 1.0, 0.0]
        assert v.timeouts == 2
    assert not outlive([int(Path(name).read_text()) for name in ("late", "soon", "last")])


def test_a_worker_that_dies_is_replaced_and_the_order_stays(mine):
    responses = ["dies" if i % 10 == 3 else str(i) for i in range(40)]
    with Verifier(workers=2, function="mine:dies") as v:
        assert v.score(responses, [""] * 40) == [float(r != "dies") for r in responses]
        assert v.timeouts == 4


def test_a_function_that_loses_every_answer_ends_the_run(mine, monkeypatch):
    monkeypatch.setattr(reward, "ALL_LOST", 3)
    with Verifier(workers=1, function="mine:dies") as v:  # a rank with few answers in each step
        assert v.score(["dies"] * 2, [""] * 2) == [0.0] * 2
        assert v.score(["dies", "lives"], ["", ""]) == [0.0, 1.0]  # it counts from here again
        assert v.score(["dies"] * 2, [""] * 2) == [0.0] * 2
        sentence = "^error: --reward mine:dies lost all of the last 3 answers: its process died"
        with pytest.raises(SystemExit, match=sentence):
            v.score(["dies"], [""])


def test_a_math_verify_that_does_not_work_is_no_reward_of_0(tmp_path, monkeypatch):
    (tmp_path / "latex2sympy2_extended.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="cannot be loaded: ImportError: "):
        Verifier(workers=1)


def test_one_answer_by_itself():
    code = r"""
from reward import reward
print(reward("\\boxed{0.5}", "1/2"), reward("1/2", "1/2"), reward("\\boxed{2}", ["3", "2"]))
"""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.stdout == "1.0 0.0 1.0\n"


def test_no_worker_outlives_the_program_in_a_long_computation_in_c(mine):
    """Such a worker does not look at its input, so that only the kernel's signal ends it."""
    code = """
import os, reward, threading, time
verifier = reward.Verifier(2, deadline=1000.0, function="mine:adds")
workers = [verifier.idle.get() for _ in range(2)]
for worker in workers:
    verifier.idle.put(worker)
threading.Thread(target=verifier.score, args=(["a", "b"], ["one", "two"]), daemon=True).start()
while not (os.path.exists("one") and os.path.exists("two")):
    time.sleep(0.05)
print(*[worker.pid for worker in workers], flush=True)
time.sleep(1000)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    pids = [int(pid) for pid in program.stdout.readline().split()]
    try:
        assert len(pids) == 2 and all(map(is_alive, pids))
        program.kill()
        program.wait()
        assert outlive(pids) == []
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------
# Real problems
# ------------------------------------------------------------------------------------------------


def read_rows(name):
    return [json.loads(line) for line in (SHARED / name).read_text().splitlines()]


def judge(verifier, rows):
    """(wrong answers that pass, right answers that are refused) of rows with "reward"."""
    answers = [row["answer"] for row in rows]
    scores = verifier.score([boxed(row["boxed"]) for row in rows], answers)
    judged = list(zip(rows, scores))
    passed = [row for row, score in judged if score and not row["reward"]]
    return passed, [row for row, score in judged if row["reward"] and not score]


def read_benchmarks():
    """The reference answers of all benchmarks, unboxed."""
    answers = []
    for path in sorted((SHARED / "benchmarks").glob("*.json")):
        answers += [row["answer"] for row in json.loads(path.read_text())]
    return [last_boxed(answer) or answer for answer in answers]


@needs_data
def test_pairs_that_were_once_judged_wrongly(verifier):
    assert judge(verifier, read_rows("answer_pairs.jsonl")) == ([], [])


@needs_data
def test_demonstrations_and_references_are_right(verifier):
    rows, own = read_rows("math_demos.jsonl"), read_benchmarks()
    scores = verifier.score([r["demonstration"] for r in rows], [r["answer"] for r in rows])
    assert scores == [1.0] * 300
    assert verifier.score(list(map(boxed, own)), own) == [1.0] * 1744


@needs_data
@pytest.mark.slow
def test_answers_of_real_models(verifier):
    rows = read_rows("real_pairs.jsonl")
    passed, refused = judge(verifier, rows)
    assert passed == [] and len(refused) <= 0.05 * sum(row["reward"] for row in rows)


@needs_data
@pytest.mark.slow
def test_no_changed_answer_of_the_benchmarks_passes(verifier):
    tried = [(text, reference) for reference in read_benchmarks() for text in mutants(reference)]
    given, wanted = zip(*tried)
    scores = verifier.score(list(map(boxed, given)), wanted)
    assert len(tried) > 10_000
    assert [pair for pair, score in zip(tried, scores) if score] == []
