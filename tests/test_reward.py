"""The verifier: what counts as right, and its real worker processes."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mutants import mutants

from common.answers import equal, same
from common.latex import NotUnderstood, Reader, clean, tokenize
from reward import Verifier, last_boxed

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared/data"
DEMOS = SHARED / "math_demos.jsonl"
PAIRS = SHARED / "answer_pairs.jsonl"
BENCHMARKS = SHARED / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the benchmarks")


def read_table():
    """[(given, reference, 1.0 or 0.0)] of answers.txt."""
    rows = []
    for line in (HERE / "answers.txt").read_text().splitlines():
        for sign, score in (("   ===   ", 1.0), ("   =/=   ", 0.0)):
            if sign in line:
                rows.append((*line.split(sign), score))
    return rows


TABLE = read_table()
TABLE += [  # several accepted answers, numbers, and what a line of a file cannot hold
    ("C\\ ", "C", 1.0),
    ("7", ["4", "7"], 1.0),
    (r"\frac12", ["4", "0.5"], 1.0),
    ("4", 4, 1.0),
    ("4", [4, 7], 1.0),
    ("8", ["4", "7"], 0.0),
    ("8", [4, 7], 0.0),
    ("4.2", 4, 0.0),
    ("", "4", 0.0),
    (" ", "4", 0.0),
    ("", r"\text{}", 0.0),
    ("1\n,2", "1, 2", 1.0),
]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, deadline=3.0) as v:
        yield v


def boxed(text):
    return f"so \\boxed{{{text}}}"


def children():
    """{pid: command line} of this process's children, zombies among them."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid():
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def outlive(pids):
    """Those of the processes that are still there after ten seconds."""
    deadline = time.monotonic() + 10
    while pids and time.monotonic() < deadline:
        time.sleep(0.1)
        pids = [pid for pid in pids if is_alive(pid)]
    return pids


def write_module(directory, monkeypatch, name, code):
    """A module of the user's in the working directory."""
    (directory / f"{name}.py").write_text(code)
    monkeypatch.chdir(directory)


# ------------------------------------------------------------------------------------------------
# What counts as right
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, content",
    [
        ("so \\boxed{4}", "4"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed {4}", "4"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("nothing", None),
        ("\\boxed{1", None),
        ("\\boxed", None),
        ("\\boxed{1} and \\boxed{2", None),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{4}. As I said, \\boxed is", "4"),
        ("\\boxed{a\\\\b}", "a\\\\b"),
        ("\\boxed{" + "{" * 100_000, None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_answers_right_and_wrong_in_order(verifier):
    table = list(TABLE)
    random.Random(0).shuffle(table)
    given, wanted, _ = zip(*table)
    scores = verifier.score([boxed(text) for text in given], wanted)
    assert len(table) > 600 and verifier.timeouts == 0
    assert [row for row, score in zip(table, scores) if score != row[2]] == []
    unboxed = verifier.score(given, wanted)
    assert [s for text, s in zip(given, unboxed) if s and "\\boxed" not in text] == []


def passing(references):
    """[(changed text, reference)] of all mutants of the references that pass, and how many are."""
    count, found = 0, []
    for reference in references:
        for text in mutants(reference):
            count += 1
            if same(text, reference):
                found.append((text, reference))
    return found, count


REFERENCES = [
    line for line in (HERE / "references.txt").read_text().splitlines() if not line.startswith("#")
]
UNREAD = [  # those that can only be compared as text
    r"3:4",
    r"x \equiv 3 \pmod 7",
    r"5 \bmod 3",
    r"a \mid 6",
    r"\sum_{k=1}^{n} k^2",
    r"\int_0^1 x^3 dx",
    r"\lim_{x\to 2} x",
    r"1, 3, 5, \ldots",
    r"2 \parallel 3",
    r"p \implies q",
    r"\{x \mid x>1\}",
    r"\nabla f",
]


def test_no_changed_reference_answer_passes():
    """One digit, sign, relation, letter or word of a reference is changed."""
    assert [text for text in REFERENCES if not same(text, text)] == []
    found, count = passing(REFERENCES)
    assert found == []
    assert len(REFERENCES) > 150 and count > 1000


def test_what_is_read_equals_itself():
    """The second way to be right, where the texts are the same and the first would hide it."""
    unread = []
    for reference in REFERENCES:
        try:
            read = Reader(tokenize(clean(reference))).answer()
            assert equal(read, read), reference
        except NotUnderstood:
            unread.append(reference)
    assert unread == UNREAD


PIECES = [
    *(
        "\\frac",
        "\\sqrt",
        "\\overline",
        "\\pi",
        "\\pm",
        "\\log",
        "\\sum",
        "\\int",
        "\\dot",
        "\\circ",
    ),
    *("{", "}", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "\\left", "\\right", "\\lfloor", "|"),
    *(
        "^",
        "_",
        ",",
        "+",
        "-",
        "*",
        "/",
        "=",
        "<",
        "\\le",
        "\\in",
        "\\cup",
        "!",
        ".",
        "%",
        "$",
        "'",
    ),
    *(
        "x",
        "n",
        "e",
        "i",
        "d",
        "0",
        "1",
        "3",
        "9",
        "A",
        "C",
        "th",
        "cm",
        "or",
        "\\text{",
        "\\boxed{",
    ),
    *("\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\", "\\infty", "é", "π", "√", "∞", "中"),
    *(" ", "\n", "\0", "\ud800", "\u202e", "²"),
]


def test_random_strings_score_nothing():
    """Strings that mean nothing neither raise, hang nor score; with the answer behind, they do."""
    rng = random.Random(0)
    strings = ["".join(rng.choices(PIECES, k=rng.randrange(1, 40))) for _ in range(800)]
    for _ in range(400):
        length = rng.randrange(1, 200)
        strings.append("".join(chr(rng.randrange(0x3000)) for _ in range(length)))
    forms = ["{}", "\\boxed{{{}}}", "\\boxed{{{}", "so \\boxed{{{}}} I think"]
    responses = [rng.choice(forms).format(string) for string in strings]
    answers = ["271828", r"\frac{271}{828}", "D", r"\text{Navin}", "(2,71)", r"[2,71)"]
    answers = [answers[i % 6] for i in range(1200)]
    with Verifier(workers=2, deadline=1.0) as quick:
        started = time.monotonic()
        assert quick.score(responses, answers) == [0.0] * 1200
        assert quick.timeouts <= 30 and time.monotonic() - started < 60
        right = [f"{r}\n{boxed(a)}" for r, a in zip(responses, answers)]
        assert quick.score(right, answers) == [1.0] * 1200


HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}",
    "memory": r"\boxed{10^{10^{10}}}",
    "factorial": r"\boxed{100000000!}",
    "factorials": r"\boxed{((((5!)!)!)!)!}",
    "product": r"\boxed{\prod_{i=1}^{10000000} i}",
    "binomial": r"\boxed{\binom{1000000000}{500000000}}",
    "expansion": r"\boxed{(x+y+z+a+b+c)^{90000}}",
    "tower of roots": r"\boxed{" + r"\sqrt{2+" * 50 + "x" + "}" * 50 + "}",
    "nested braces": "\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    "unclosed braces": "\\boxed{" + "{" * 100_000,
    "a thousand braces": "\\boxed{" + "{" * 900 + "1" + "}" * 900 + "}",
    "parentheses": "\\boxed{" + "(" * 500 + ")" * 500 + "}",
    "nested pairs": "\\boxed{" + "(1," * 400 + "1" + ")" * 400 + "}",
    "a long list": "\\boxed{" + ",".join(map(str, range(400))) + "}",
    "1 MB": "\\boxed{" + "1+" * 500_000 + "1}",
    "1 MB of boxes": "\\boxed{" * 150_000,
    "half a character": "\\boxed{\ud800 4}",
    "NUL": "\\boxed{\0}",
    "bytes that are no text": b"\\boxed{\xff\xfe4}".decode(errors="surrogateescape"),
    "unfinished thought": "<think> so it must be \\boxed{3",
    "asked for, not given": "Put it in \\boxed{}.",
}


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_hostile_answers_cost_their_deadline_and_nobody_notices():
    """The trainer's memory and process table stay as they are; the answers around are right."""
    with Verifier(workers=2, deadline=2.0) as quick:
        memory, processes = resident(), sorted(children().values())
        started = time.monotonic()
        responses = [r for text in HOSTILE.values() for r in (text, r"\boxed{3.0}")]
        for reference in ("3", "x", "1, 2, 3", r"(x+y+z+a+b+c)^{90001}"):
            right = 1.0 if reference == "3" else 0.0
            scores = quick.score(responses, [reference] * len(responses))
            assert scores == [0.0, right] * len(HOSTILE)
        assert quick.timeouts <= 3  # too large powers and factorials are refused, not computed
        assert time.monotonic() - started < 2.0 * quick.timeouts + 20
        assert sorted(children().values()) == processes and len(processes) >= 2
        assert resident() - memory < 30e6


def test_a_thousand_long_responses_take_seconds():
    """1,024 responses of 32,000 characters, which is 8,192 tokens, half of them wrong."""
    filler = "so x + y = \\frac{1}{2} and \\boxed{0} is not it. " * 680
    responses = [filler + boxed(f"\\frac{{{i}}}{{7}}") for i in range(1024)]
    with Verifier(workers=2) as v:
        started = time.monotonic()
        done = []
        answers = [f"{i + i % 2}/7" for i in range(1024)]
        scores = v.score(responses, answers, each_done=lambda: done.append(1))
        assert scores == [1.0, 0.0] * 512 and len(done) == 1024
        assert time.monotonic() - started < 30  # two cores need about a second


# ------------------------------------------------------------------------------------------------
# Worker processes
# ------------------------------------------------------------------------------------------------


def test_workers_have_a_memory_limit_each(tmp_path, monkeypatch):
    code = "def take(response, answer):\n    return len(bytearray(int(answer))) >= 0\n"
    write_module(tmp_path, monkeypatch, "greedy", code)
    with Verifier(workers=1, memory=2**28, function="greedy:take") as v:
        answers = [str(2**27), str(2**29), str(2**27)]
        assert v.score(["", "", ""], answers) == [1.0, 0.0, 1.0] and v.timeouts == 1


MINE = """
import os, subprocess, sys, time

def share(response, answer):
    return len(response) / len(answer)

def hangs(response, answer):
    time.sleep(60)

def breaks(response, answer):
    return 1 / 0

def dies(response, answer):
    if response == "dies":
        os._exit(1)
    return 1

def runs(response, answer):
    print(sys.stdin.read(), 1)
    child = subprocess.Popen(["sleep", "1000"])
    open(answer, "w").write(str(child.pid))
    time.sleep(float(response))
    return 1
"""


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "mine", MINE)
    with Verifier(function="mine:share") as v:
        assert v.score(["a", "ab", "", "abcd"], ["abcd"] * 4) == [0.25, 0.5, 0.0, 1.0]
        sentence = "--reward mine:share returned 2.0, not a number from 0 to 1"
        with pytest.raises(SystemExit, match=sentence):
            v.score(["abab"], ["ab"])
    sentence = "--reward mine:breaks raised ZeroDivisionError"
    with Verifier(function="mine:breaks") as v, pytest.raises(SystemExit, match=sentence):
        v.score(["a"] * 5, ["b"] * 5)
    with Verifier(workers=1, deadline=1.0, function="mine:runs") as v:
        assert v.score(["60", "0"], ["late", "soon"]) == [0.0, 1.0]
    assert not outlive([int(Path(name).read_text()) for name in ("late", "soon")])
    for name in ("none:f", "mine:none", "mine"):
        with pytest.raises(SystemExit, match=f"--reward {name} cannot be loaded"):
            Verifier(function=name)


def test_the_deadline_is_the_one_that_was_set(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "mine", MINE)
    with Verifier(workers=1, deadline=0.5, function="mine:hangs") as v:
        started = time.monotonic()
        assert v.score(["a", "b"], ["b", "b"]) == [0.0, 0.0] and v.timeouts == 2
        assert 1.0 <= time.monotonic() - started < 8.0  # the default would take 10 seconds


def test_a_function_that_loses_every_answer_stops_the_run(tmp_path, monkeypatch, capfd):
    write_module(tmp_path, monkeypatch, "mine", MINE)
    sentence = r"error: --reward mine:dies lost all of the last 8 answers: its process died"
    with Verifier(function="mine:dies") as v, pytest.raises(SystemExit, match=sentence):
        v.score(["dies"] * 8, [""] * 8)
    with Verifier(workers=2, function="mine:dies") as v:  # a rank with few answers in each step
        assert v.score(["dies"] * 5, [""] * 5) == [0.0] * 5
        assert v.score(["dies", "lives"], ["", ""]) == [0.0, 1.0]  # it counts from here again
        assert v.score(["dies"] * 5, [""] * 5) == [0.0] * 5
        with pytest.raises(SystemExit, match="the last 10 answers"):
            v.score(["dies"] * 5, [""] * 5)
        assert v.timeouts == 16
    capfd.readouterr()
    with Verifier(workers=2, function="mine:dies") as v:
        assert sum(v.score(["dies"] * 2 + ["lives"] * 18, [""] * 20)) == 18
        assert "warning" not in capfd.readouterr().err  # a tenth is not many
        assert sum(v.score(["dies"] * 3 + ["lives"] * 17, [""] * 20)) == 17
        said = capfd.readouterr().err
        assert said.count("warning: --reward mine:dies lost 3 of 20 answers") == 1


def test_a_worker_that_dies_at_its_start_is_started_again(tmp_path, monkeypatch):
    code = "import os\nif not os.path.exists('began'):\n    open('began', 'w')\n    os._exit(1)\n"
    write_module(
        tmp_path, monkeypatch, "shaky", code + "def one(response, answer):\n    return 1\n"
    )
    with Verifier(workers=1, function="shaky:one") as v:
        assert v.score(["a"], ["b"]) == [1.0]


def test_order_and_count_while_workers_are_killed(tmp_path, monkeypatch):
    """Only a worker that has answered is killed, so that a slow start is no failure."""
    code = """
import os, reward

def grade(response, answer):
    open(f"worker{os.getpid()}", "w")
    return reward.grade(response, answer)
"""
    write_module(tmp_path, monkeypatch, "telling", code)
    over, killed = threading.Event(), []

    def kill_one_by_one():
        while not over.wait(0.2):
            for path in tmp_path.glob("worker*"):
                path.unlink()
                killed.append(int(path.name.removeprefix("worker")))
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(killed[-1], signal.SIGKILL)
                break

    responses = [boxed(f"{i} + x") for i in range(3000)]
    with Verifier(workers=3, deadline=20.0, function="telling:grade") as v:
        killer = threading.Thread(target=kill_one_by_one)
        killer.start()
        try:
            scores = v.score(responses, [f"x + {i if i % 3 else i + 1}" for i in range(3000)])
        finally:
            over.set()
            killer.join()
        assert len(scores) == 3000
        assert all(score == 0 for score in scores[::3])  # a wrong answer never scores
        assert sum(scores) >= 2000 - v.timeouts and 1 <= v.timeouts <= len(killed)
        before = v.timeouts
        again = v.score(responses[:30], [f"x + {i}" for i in range(30)])
        assert again.count(0.0) == v.timeouts - before <= 1


def test_one_answer_by_itself():
    code = r"""
from reward import reward
print(reward("\\boxed{0.5}", "1/2"), reward("\\boxed{9^{9^{9^9}}}", "3"), reward("1/2", "1/2"))
print(reward("\\boxed{2}", ["3", "2"]))
"""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.stdout == "1.0 0.0 0.0\n1.0\n"


def test_an_answer_for_each_response(verifier):
    with pytest.raises(ValueError, match="shorter"):
        verifier.score(["a", "b"], ["1"])
    assert verifier.score([], []) == []


def test_a_math_verify_that_does_not_work_is_no_reward_of_0(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="cannot be loaded: ImportError: broken"):
        Verifier(workers=1)
    (tmp_path / "math_verify.py").write_text("def verify(*args, **kwargs):\n    return False\n")
    with pytest.raises(SystemExit, match="math-verify does not work"):
        Verifier(workers=1)


def stop_program_with_workers(code, cwd):
    """Start a program that prints its workers' numbers, kill it, and say which workers stay."""
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    pids = [int(pid) for pid in program.stdout.readline().split()]
    try:
        assert len(pids) == 2 and all(map(is_alive, pids))
        program.kill()
        program.wait()
        return outlive(pids)
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_no_worker_outlives_the_program():
    code = r"""
import reward, time
verifier = reward.Verifier(2)
verifier.score(["\\boxed{2.0}"], ["2"])
print(*[verifier.idle.get().pid for _ in range(2)], flush=True)
time.sleep(60)
"""
    assert stop_program_with_workers(code, ROOT) == []


def test_no_worker_outlives_the_program_in_a_long_computation_in_c(tmp_path):
    """Such a worker does not look at its input, so that only the kernel's signal ends it."""
    (tmp_path / "endless.py").write_text(
        "def adds(response, answer):\n    open(answer, 'w')\n    return sum(range(10**15))\n"
    )
    code = """
import os, reward, threading, time
verifier = reward.Verifier(2, deadline=1000.0, function="endless:adds")
workers = [verifier.idle.get() for _ in range(2)]
for worker in workers:
    verifier.idle.put(worker)
threading.Thread(target=verifier.score, args=(["a", "b"], ["one", "two"]), daemon=True).start()
while not (os.path.exists("one") and os.path.exists("two")):
    time.sleep(0.05)
print(*[worker.pid for worker in workers], flush=True)
time.sleep(60)
"""
    assert stop_program_with_workers(code, tmp_path) == []


# ------------------------------------------------------------------------------------------------
# Real problems
# ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PAIRS.exists(), reason="needs the pairs")
def test_pairs_that_were_once_judged_wrongly(verifier):
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    scores = verifier.score([boxed(r["boxed"]) for r in rows], [r["answer"] for r in rows])
    assert [row for row, score in zip(rows, scores) if score != row["reward"]] == []


@pytest.mark.skipif(not DEMOS.exists(), reason="needs the MATH demonstrations")
def test_every_demonstration_is_right_and_no_other_answer(verifier):
    rows = [json.loads(line) for line in DEMOS.read_text().splitlines()]
    demonstrations, answers = [r["demonstration"] for r in rows], [r["answer"] for r in rows]
    assert verifier.score(demonstrations, answers) == [1.0] * 300
    others = answers[1:] + answers[:1]
    scores = verifier.score(demonstrations, others)
    accepted = [(a, b) for a, b, right in zip(answers, others, scores) if right]
    assert accepted == [("5", "x=5"), ("7", "7")]  # an equation in one unknown is its value


def read_benchmarks():
    """{benchmark: its reference answers, unboxed}."""
    found = {}
    for path in sorted(BENCHMARKS.glob("*.json")):
        answers = [row["answer"] for row in json.loads(path.read_text())]
        found[path.stem] = [last_boxed(answer) or answer for answer in answers]
    return found


@needs_benchmarks
def test_reference_answers_accept_themselves_and_reject_the_next_rows(verifier):
    groups = read_benchmarks().values()
    own = [answer for group in groups for answer in group]
    others = [answer for group in groups for answer in group[1:] + group[:1]]
    assert len(own) == 1744
    assert verifier.score(list(map(boxed, own)), own) == [1.0] * 1744
    differ = [(a, b) for a, b in zip(own, others) if a != b]
    scores = verifier.score([boxed(a) for a, _ in differ], [b for _, b in differ])
    assert [pair for pair, score in zip(differ, scores) if score] == [("5", "x=5")]


@needs_benchmarks
def test_reference_answers_are_understood_and_equal_themselves():
    unread = []
    for answer in {answer for group in read_benchmarks().values() for answer in group}:
        try:
            read = Reader(tokenize(clean(answer))).answer()
            assert equal(read, read), answer
        except NotUnderstood:
            unread.append(answer)
    assert unread == ["$t(0,4]$"]


@needs_benchmarks
def test_no_changed_answer_of_the_benchmarks_passes():
    found, count = passing([answer for group in read_benchmarks().values() for answer in group])
    assert found == [] and count > 10_000
