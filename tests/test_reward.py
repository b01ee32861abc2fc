"""The verifier with real math-verify in its real worker processes."""
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

import reward
from reward import Verifier, last_boxed

HERE = Path(__file__).parent
DEMOS = HERE.parent / "shared/data/math_demos.jsonl"
BENCHMARKS = HERE.parent / "shared/data/benchmarks"

# (given, reference): from MATH-500, Minerva, OlympiadBench and GPQA, and (#) from the issues of huggingface/Math-Verify
RIGHT = [
    ("0.5", r"\frac12"), (r"\frac{2}{4}", "0.5"), ("x+1", "1+x"), ("7", r"\boxed{7}"), (r"\boxed{7}", "7"), ("7.", "7"), ("+7", "7"),
    # numbers: fractions, decimals, mixed numbers, powers of ten, thousands
    ("1/2", "0.5"), (r"\frac{-1}{2}", r"-\frac{1}{2}"), ("0.333333", r"\frac{1}{3}"), (r"\frac95", r"1\frac{4}{5}"), ("137.5", r"137 \frac{1}{2}"),
    (r"4\frac{2}{3}", r"\frac{14}{3}"), ("0.35625", ".35625"), (r"6.72 \times 10^{-5}", ".0000672"), ("142", "142.0"), (r"-\frac13", "-1./3"),
    (r"4.5 \times 10^{33}", "4.5e33"), (r"10^{-8}", "1e-8"), (r"1.77\cdot 10^{-6}", "1.77e-6"), ("1.770e-6", "1.77e-6"),
    ("10080", r"10,\!080"), ("10,080", r"10,\!080"), ("11111111100", r"11,\! 111,\! 111,\! 100"), ("58500", "58,500"), (r"1\,000", "1000"),
    ("1{,}000", "1000"), (r"\sqrt{117}", r"3\sqrt{13}"), (r"\frac{(2n)!}{(n!)^2}", r"\binom{2n}{n}"), (r"-5i+6", "6 - 5i"),
    (r"\ln(2)+\frac{i\pi}{3}", r"\ln 2 + i\pi / 3"), (r"\arcsin(10/13)", "np.arcsin(10/13)"), (r"\frac{\cos x}{\sin x}", r"\cot x"),
    (r"\text{13}", "13"),  # 37
    ("3x+2e-3", "2e+3x-3"), ("−5", "-5"), ("4.5e33 \\text{ erg}", "4.5e33"),
    # percentages
    (r"62.5\%", "62.5%"), ("0.625", "62.5%"), ("62.5", "62.5%"), ("28", r"28\%"), (r"28\%", "0.28"), ("28 percent", r"28\%"),  # 61
    ("28 pct", r"28\%"), (r"12.5\%", "12.5"),
    # units
    ("864", r"864 \mbox{ inches}^2"), (r"864\text{ square inches}", r"864 \mbox{ inches}^2"), ("15", r"15\mbox{ cm}^2"), ("5.4", r"5.4 \text{ cents}"),
    (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"), ("90", r"90^\circ"), (r"76 \text{ degrees}", r"76^\circ"), ("18.9", r"\$18.90"),
    (r"\$32,348.00", r"\$32,\!348"), ("18.8", r"$18.8^{\circ}$"), ("52", "52_8"), ("52_{8}", "52_8"),
    ("90°", r"90^\circ"), (r"5~\text{cm}", "5"), (r"2.\text{ cm}", "2"),
    # sets, lists, tuples, intervals, matrices
    ("-2,1", "1,-2"), (r"\{1,-2\}", "1,-2"), (r"x=1 \text{ or } x=-2", "1,-2"), (r"1 \text{ and } -2", "1,-2"), ("3,5,7", "3, 5, 7"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"), (r"-2, 1-\sqrt5, 1+\sqrt5", r"\{1\pm\sqrt{5},-2\}"), ("84, 69", "$69$,$84$"),
    (r"2, -6-4\sqrt2", r"$a=2$, $a=-6-4 \sqrt{2}$"), ("221,8", "$221,$8$"), (r"(2+\sqrt2,1+\sqrt2)", r"$\quad(2+\sqrt{2}, 1+\sqrt{2})$"),
    ("[-2,7]", r"x \in [-2,7]"), (r"-2 \le x \le 7", "[-2,7]"), (r"3<x\le4", "(3,4]"), (r"[2,\infty)", r"k \geqslant 2"),
    (r"\{1\}\cup(-\infty,0)", r"$(-\infty, 0) \cup\{1\}$."), ("(1,4.5)", r"(1,\frac{9}{2})"),  # 2
    (r"\begin{bmatrix} -\frac13 \\ \frac23 \\ \frac53 \end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}"),
    # equations and functions
    ("5", "x=5"), ("x=5", "5"), ("2x+3", "y = 2x + 3"), ("2x-y+3=0", "y = 2x + 3"), ("2x", "f(x)=2 x"), ("SRMC=MR", "MR=SRMC"),
    ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0"), (r"y = -\frac{1}{2}x + \frac{3}{4}", "2x+4y-3=0"),  # 26
    ("-34x-45y+20z-100=0", "34x+45y-20z+100=0"), (r"\frac{x}{7}+\frac{2}{7}", r"\frac{x+2}{7}"), (r"\tan^2(y)+1", r"\sec^2(y)"),  # 2
    # text and multiple choice
    ("Evelyn", r"\text{Evelyn}"), (r"\textbf{Evelyn}", r"\text{Evelyn}"), ("C", r"\text{(C)}"), (r"\text{C}", r"\text{(C)}"), ("(C)", "C"),
    (r"\text{C. 12 m}", "C"), ("C) 12 m", "C"), (r"\mathbf{(C)}", "C"), ("c", "C"), ("Option C", "C"), ("(C) 12 m", "C"), (r"$\text{C}$", "C"),
    ("{C}", "C"), ("[C]", "C"), (r"\left(C\right)", "C"), (r"\left(\text{C}\right)", "C"), (r"\textrm{(C)}", "C"), (r"\(C\)", "C"), (r"\,C", "C"), ("C\\ ", "C"),
    (r"C\text{ (12 m)}", "C"), (r"\textbf{\text{(C)}}", "C"), (r"{\bf C}", "C"), ("**C**", "C"), ("C", r"\mathrm{~C}"), ("(C) A and B only", "C"),
    ("C. vitamins A and D", "C"), ("(C) (1, 2)", "C"),
    # several accepted answers
    ("7", ["4", "7"]), (r"\frac12", ["4", "0.5"]), ("4", ["4"]), ("4", 4), ("4", [4, 7]),
]
WRONG = [
    ("5", "4"), ("", "4"), (" ", "4"), ("(1,2)", "(2,1)"), ("12", "1 2"), (r"\frac{1}{2}", r"-\frac{1}{2}"), ("0.33", r"\frac{1}{3}"),
    (r"0.\overline{3}", r"0.\overline{6}"), (r"0.\overline{3}", "0"), (r"0.\dot{3}", "0"), (r"0. \overline{36}", r"0. \overline{63}"), (r"2e-3", "2e-2"),
    ("4.67", r"\frac{14}{3}"), (r"\frac45", r"1\frac{4}{5}"), (".0000673", ".0000672"), ("5.89e-7", "1e-8"), ("0", "1e-8"), ("7.25e-11", "2.26e-10"),
    ("4.6e33", "4.5e33"), (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),  # 14
    ("n=1, 2, 3", "n=2, 3, 4"), ("D = (0, 1.5)", "D = (0, 1)"), ("21, 36, and 82", r"19, 46, \text{ and } 82"), ("2021", r"\pm 2021"), ("1:00", "12:00"),
    (r"1, 3, 5, \ldots, 2n-1", r"1, 2, \ldots, n"), (r"1 + \frac{1}{\mathrm{e}}", r"1 - \frac{1}{\mathrm{e}}"), (r"1:4:9:\ldots", r"1:2:3:\ldots"),
    (r"\frac{1}{3 \cdot 2^{2006}}", r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}"),
    ("3x+4y+14=0", "3x-1y+13=0"),  # 60
    (r"\frac{x^2}{16}+\frac{y^2}{12}=1", r"\frac{x^2}{4}+\frac{y^2}{3}=1"),  # 40
    (r"\frac{100!}{2^{49}}", r"\frac{100!}{2^{50}}"), ("2^{1010}", "2^{1009}"), ("27%", "28%"), ("225", r"15\mbox{ cm}^2"), ("53_8", "52_8"), ("52_9", "52_8"),
    ("4,5", "4"), ("4 or 5", "4"), (r"4 \text{ or } 5", "4"), (r"\{4,5\}", "4"), ("1", "1,-2"), ("3, 2, 1", "2, 3"), ("2400, 1350", "2400, 1350, 864"),
    ("34", "3,4"), ("3.4", "3,4"), (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"), ("[1,2]", "(1,2)"), ("[1,2]", "[1,2)"), ("k>2", r"k \geqslant 2"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}"), ("x", "f(x)=2 x"), ("q - p", "p - q"),
    ("6+5i", "6 - 5i"), ("y+1", "x+1"), (r"\beta", r"\alpha"), ("I(1)", "I(0)"), (r"-\infty", r"\infty"), (r"\text{nan}", "0"), (r"\frac{0}{0}", "0"),
    (r"\frac{1}{0}", r"\frac{1}{2}"), ("7!", "7"), ("x", "7"), (r"\text{west}", r"\text{east}"), (r"\text{Evelin}", r"\text{Evelyn}"), (r"\text{odd}", r"\text{even}"),
    ("D", "C"), (r"\text{(D)}", "C"), ("A cat", "A"), ("The answer is A", "A"), ("Vitamin C", "C"), ("B or C", "C"), ("ABCD", "A"), ("A, B", "A"),
    ("(A), (B)", "A"), ("(A) and (B)", "A"), (r"(A) \text{ or } (B)", "A"), ("(A)(B)", "A"), ("A. and B.", "A"), ("A) or B)", "A"), ("A:B:C", "A"), ("C.V.", "C"),
    ("12 m", "C"), ("CO_2", "C"), (r"C_6H_{12}", "C"), ("8", ["4", "7"]), ("8", [4, 7]), ("4.2", 4),
]
KNOWN = [  # where math-verify 0.9 is more lenient, or less, than one may wish: (given, reference, what it says)
    ("4=5", "5", 1), ("(1,-2)", "1,-2", 1), (r"\{4\}", "4", 1), ("M", "m", 1), ("-2", "-2,-2", 1), ("1,5", "5,1", 1), ("28%", "28", 1),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{1/n}", 0),  # 64
    (r"\frac{\pi}{2}", r"90^\circ", 0), (r"\text{an ellipse}", r"\text{ellipse}", 0), (r"\text{five}", "5", 0),
    ("2e-3", "2e - 3", 0), ("2 1/3", "7/3", 0), (r"0.\overline{3}", r"\frac13", 0), ("√2", r"\sqrt2", 0), (r"x<3 \text{ or } x>5", r"(-\infty,3)\cup(5,\infty)", 0),
    (r"2\pi r", r"2\pi r h", 1), (r"204 \text{ million}", "204", 1), (r"\neq 204", "204", 1), ("BAC", "ABC", 1), (r"x \equiv 3 \pmod 5", r"x \equiv 2 \pmod 5", 1),
    (r"x'+\frac{r}{V}x=rc", r"x^{\prime}+\frac{r}{V} x-r c=0", 0),
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


def outlive(pids):
    """Those of the processes that are still there after ten seconds."""
    deadline = time.monotonic() + 10
    while pids and time.monotonic() < deadline:
        time.sleep(0.1)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended between two looks
            pids = [pid for pid in pids if Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"]
    return pids


@pytest.mark.parametrize("text, content", [
    ("so \\boxed{4}", "4"), ("\\boxed{1} no, \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("\\boxed {4}", "4"),
    ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."), ("nothing", None), ("\\boxed{1", None), ("\\boxed", None), ("\\boxed{1} and \\boxed{2", None),
    ("\\boxed{\\boxed{4}}", "4"), ("\\boxed{4}. As I said, \\boxed is", "4"), ("\\boxed{a\\\\b}", "a\\\\b"), ("\\boxed{" + "{" * 100_000, None), ("", None)])
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_real_answers_right_and_wrong_in_order(verifier):
    table = [(g, a, 1) for g, a in RIGHT] + [(g, a, 0) for g, a in WRONG] + KNOWN
    random.Random(0).shuffle(table)
    scores = verifier.score([boxed(g) for g, _, _ in table], [a for _, a, _ in table])
    assert [(g, a, s) for (g, a, want), s in zip(table, scores) if s != want] == []
    assert verifier.score([g for g, _, _ in table], [a for _, a, _ in table]) == [float(g.startswith("\\boxed") and want) for g, _, want in table]  # no box, no reward


def test_random_strings_score_nothing():
    """1,200 strings, none of which raises, hangs or scores; negative control: with the right answer at the end each scores."""
    rng = random.Random(0)
    pieces = [r"\frac", r"\sqrt", "{", "}", "{", "}", "(", ")", "[", "]", "^", "_", ",", "+", "-", "*", "/", "=", "<", r"\le", r"\in", "x", "n", "e", "i", r"\pi",
              "0", "1", "3", "9", "%", "$", r"\text{", r"\{", r"\}", r"\cup", r"\infty", r"\sum", r"\int", r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\",
              r"\boxed{", "!", ".", " ", "\n", "\\", "A", "C", "or", r"\pm", r"\log", "\0", "\ud800", "é", "π", "√", "∞", "中", "\u202e", "'"]
    strings = ["".join(rng.choices(pieces, k=rng.randrange(1, 40))) for _ in range(800)]
    strings += ["".join(chr(rng.randrange(0x3000)) for _ in range(rng.randrange(1, 200))) for _ in range(400)]
    responses = [rng.choice(["{}", "\\boxed{{{}}}", "\\boxed{{{}", "so \\boxed{{{}}} I think"]).format(s) for s in strings]
    answers = ["271828", r"\frac{271}{828}", "D", r"\text{Navin}", "(2,71)", r"[2,71)", r"\begin{pmatrix} 2 \\ 7 \end{pmatrix}"]
    with Verifier(workers=2, deadline=1.0) as quick:
        started = time.monotonic()
        assert quick.score(responses, [answers[i % 7] for i in range(1200)]) == [0.0] * 1200
        assert quick.timeouts <= 30 and time.monotonic() - started < 60
        assert quick.score([r + "\n\\boxed{" + answers[i % 7] + "}" for i, r in enumerate(responses)], [answers[i % 7] for i in range(1200)]) == [1.0] * 1200


HOSTILE = {"tower": r"\boxed{9^{9^{9^9}}}", "memory": r"\boxed{10^{10^{10}}}", "factorial": r"\boxed{100000000!}",
           "product": r"\boxed{\prod_{i=1}^{10000000} i}", "nested braces": "\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
           "unclosed braces": "\\boxed{" + "{" * 100_000, "a thousand braces": "\\boxed{" + "{" * 900 + "1" + "}" * 900 + "}",
           "parentheses": "\\boxed{" + "(" * 500 + ")" * 500 + "}", "1 MB": "\\boxed{" + "1+" * 500_000 + "1}", "1 MB of boxes": "\\boxed{" * 150_000,
           "half a character": "\\boxed{\ud800 4}", "NUL": "\\boxed{\0}", "bytes that are no text": b"\\boxed{\xff\xfe4}".decode(errors="surrogateescape"),
           "unfinished thought": "<think> so it must be \\boxed{3", "asked for, not given": "Put it in \\boxed{}."}


def test_hostile_answers_cost_their_deadline_and_nobody_notices():
    """The trainer's memory and process table stay as they are, and the answers around are right."""
    with Verifier(workers=2, deadline=2.0) as quick:
        pages = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        memory, processes, started = pages(), sorted(children().values()), time.monotonic()
        responses = [r for text in HOSTILE.values() for r in (text, r"\boxed{3.0}")] * 2
        assert quick.score(responses, ["3"] * len(responses)) == [0.0, 1.0] * len(HOSTILE) * 2
        assert 2 * 3 <= quick.timeouts <= 2 * 7, quick.timeouts  # at least the tower, the factorial, the product
        assert time.monotonic() - started < 2.0 * 14 + 20
        assert sorted(children().values()) == processes and len(processes) >= 2
        assert pages() - memory < 30e6


def test_workers_have_a_memory_limit_each(tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text("def take(response, answer):\n    return len(bytearray(int(answer))) >= 0\n")
    monkeypatch.chdir(tmp_path)
    with Verifier(workers=1, memory=2**28, function="greedy:take") as v:
        assert v.score(["", "", ""], [str(2**27), str(2**29), str(2**27)]) == [1.0, 0.0, 1.0] and v.timeouts == 1


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import time\ndef share(response, answer):\n    return len(response) / len(answer)\n"
                                      "def hangs(response, answer):\n    time.sleep(60)\ndef breaks(response, answer):\n    return 1 / 0\n"
                                      "def runs(response, answer):\n    import subprocess, sys\n    print(sys.stdin.read(), 1)\n"
                                      "    child = subprocess.Popen(['sleep', '1000'])\n    open(answer, 'w').write(str(child.pid))\n    time.sleep(float(response))\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    with Verifier(function="mine:share") as v:
        assert v.score(["a", "ab", "", "abcd"], ["abcd"] * 4) == [0.25, 0.5, 0.0, 1.0]
        with pytest.raises(SystemExit, match="--reward mine:share returned 2.0, not a number from 0 to 1"):
            v.score(["abab"], ["ab"])
    with Verifier(function="mine:breaks") as v, pytest.raises(SystemExit, match="--reward mine:breaks raised ZeroDivisionError"):
        v.score(["a"] * 5, ["b"] * 5)
    with Verifier(workers=1, deadline=0.5, function="mine:hangs") as v:
        assert v.score(["a"], ["b"]) == [0.0] and v.timeouts == 1
    with Verifier(workers=1, deadline=1.0, function="mine:runs") as v:  # it reads, prints, and starts a process
        assert v.score(["60", "0"], ["late", "soon"]) == [0.0, 1.0]
    assert not outlive([Path(name).read_text() for name in ("late", "soon")])
    for name in ("none:f", "mine:none", "mine"):
        with pytest.raises(SystemExit, match=f"--reward {name} cannot be loaded"):
            Verifier(function=name)


def test_order_and_count_while_workers_are_killed():
    others = children().keys()
    with Verifier(workers=3, deadline=5.0) as v:
        over, killed = threading.Event(), []
        def kill():
            seen = set()
            while not over.wait(1.0):
                workers = children().keys() - others
                for pid in list(workers & seen)[:1]:  # one that had a second to start
                    killed.append(pid)
                    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                        os.kill(pid, signal.SIGKILL)
                seen = workers
        killer = threading.Thread(target=kill)
        killer.start()
        responses = [boxed(f"{i} + x") for i in range(3000)]
        try:
            scores = v.score(responses, [f"x + {i if i % 3 else i + 1}" for i in range(3000)])
        finally:
            over.set()
            killer.join()
        assert len(scores) == 3000 and all(s == 0 for s in scores[::3])  # a wrong answer never scores, whoever is killed
        assert sum(scores) >= 2000 - v.timeouts and 1 <= v.timeouts <= len(killed)
        before, again = v.timeouts, v.score(responses[:30], [f"x + {i}" for i in range(30)])
        assert again.count(0.0) == v.timeouts - before <= 1


def test_one_answer_by_itself():
    code = "from reward import reward\nprint(reward('\\\\boxed{0.5}', '1/2'), reward('\\\\boxed{9^{9^{9^9}}}', '3'), reward('1/2', '1/2'), reward('\\\\boxed{2}', ['3', '2']))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60).stdout == "1.0 0.0 0.0 1.0\n"


def test_an_answer_for_each_response(verifier):
    with pytest.raises(ValueError, match="shorter"):
        verifier.score(["a", "b"], ["1"])
    assert verifier.score([], []) == []


def test_a_math_verify_that_does_not_work_is_no_reward_of_0(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="cannot be loaded: ImportError: broken"):
        Verifier(workers=1)
    (tmp_path / "math_verify.py").write_text("parse = lambda *a, **k: []\nverify = lambda *a, **k: False")
    with pytest.raises(SystemExit, match="math-verify does not work, 1.0 is not 1 by it"):
        Verifier(workers=1)


def test_no_worker_outlives_the_program():
    code = "import reward, time, os\nv = reward.Verifier(2)\nv.score(['\\\\boxed{2.0}'], ['2'])\n" \
           "print(*[v.idle.get().pid for _ in range(2)], flush=True)\ntime.sleep(60)"
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=HERE)
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    program.kill()
    program.wait()
    assert not outlive(pids)


def test_a_thousand_long_responses_take_seconds():
    """1,024 responses of 32,000 characters, which is 8,192 tokens, half of them wrong."""
    filler = "so x + y = \\frac{1}{2} and \\boxed{0} is not it. " * 680
    with Verifier(workers=2) as v:
        started = time.monotonic()
        assert v.score([filler + boxed(f"\\frac{{{i}}}{{7}}") for i in range(1024)], [f"{i + i % 2}/7" for i in range(1024)]) == [1.0, 0.0] * 512
        assert time.monotonic() - started < 30  # the whole test took 1.6 on two cores


def by_math_verify(given, wanted):
    """A plug-in: as the verifier decides, but never because the texts are the same."""
    return reward._math_equal(*(reward._tidy(last_boxed(text) or text) for text in (given, wanted)))


@pytest.mark.skipif(not DEMOS.exists(), reason="needs the MATH demonstrations")
def test_every_demonstration_is_right_and_no_other_answer(verifier):
    rows = [json.loads(line) for line in DEMOS.read_text().splitlines()]
    demonstrations, answers = [r["demonstration"] for r in rows], [r["answer"] for r in rows]
    assert verifier.score(demonstrations, answers) == [1.0] * 300
    others = answers[1:] + answers[:1]
    accepted = [(a, b) for a, b, right in zip(answers, others, verifier.score(demonstrations, others)) if right]
    assert accepted == [("5", "x=5"), ("7", "7")]  # an equation in one unknown is its value


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the benchmarks")
def test_all_rows_of_the_benchmarks_accept_their_own_answer_and_reject_the_next_rows(verifier, monkeypatch):
    answers = {path.stem: [row["answer"] for row in json.loads(path.read_text())] for path in sorted(BENCHMARKS.glob("*.json"))}
    assert sum(map(len, answers.values())) == 1744
    own = [a for group in answers.values() for a in group]
    others = [a for group in answers.values() for a in group[1:] + group[:1]]
    responses = [boxed(last_boxed(a) or a) for a in own]
    assert [a for a, score in zip(own, verifier.score(responses, own)) if score != 1.0] == []
    plain = lambda a: last_boxed(a) or a
    differ = [(r, a, b) for r, a, b in zip(responses, own, others) if plain(a) != plain(b)]
    accepted = [(a, b) for (_, a, b), score in zip(differ, verifier.score([r for r, _, _ in differ], [b for _, _, b in differ])) if score]
    assert accepted == [("5", "x=5")]
    monkeypatch.chdir(HERE)
    with Verifier(function="test_reward:by_math_verify") as v:  # by math-verify itself, where `score` need only compare texts
        assert [a for a, score in zip(own, v.score(own, own)) if score != 1.0] == []
