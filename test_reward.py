"""The verifier with real math-verify in its real worker processes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reward import Verifier, _ask, last_boxed

DEMOS = Path(__file__).parent.parent / "shared/data/math_demos.jsonl"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, deadline=3.0) as v:
        yield v


@pytest.mark.parametrize("text, boxed", [
    ("so \\boxed{4}", "4"), ("\\boxed{1} no, \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."), ("nothing", None), ("\\boxed{1", None), ("\\boxed", None),
    ("\\boxed{" + "{" * 100_000, None), ("", None)])
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


def test_right_and_wrong_in_order(verifier):
    pairs = [("\\boxed{0.5}", "\\frac12", 1), ("\\boxed{\\frac{2}{4}}", "0.5", 1), ("\\boxed{5}", "4", 0), ("4", "4", 0),
             ("\\boxed{x+1}", "1+x", 1), ("\\boxed{(1,2)}", "(2,1)", 0), ("\\boxed{7}", "\\boxed{7}", 1), ("\\boxed{}", "4", 0),
             ("\\boxed{4} then \\boxed{5}", "4", 0), ("\\boxed{12}", "1 2", 0)] * 20
    assert verifier.score([p[0] for p in pairs], [p[1] for p in pairs]) == [p[2] for p in pairs]


def test_a_hanging_answer_costs_its_deadline_and_no_other(verifier):
    before, started = verifier.timeouts, time.monotonic()
    responses = ["\\boxed{1}", "\\boxed{9^{9^{9^9}}}", "\\boxed{1.0}", "\\boxed{9^{9^{9^9}}}"] + ["\\boxed{2.0}"] * 20
    assert verifier.score(responses, ["1", "3", "1", "3"] + ["2"] * 20) == [1, 0, 1, 0] + [1] * 20
    assert verifier.timeouts == before + 2
    assert time.monotonic() - started < 30


def test_a_killed_worker_is_replaced(verifier):
    worker = verifier.idle.get()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    verifier.idle.put(worker)
    before = verifier.timeouts
    scores = verifier.score(["\\boxed{1.0}"] * 8, ["1"] * 8)
    assert sum(scores) == 7 and verifier.timeouts == before + 1
    assert verifier.score(["\\boxed{1.0}"] * 8, ["1"] * 8) == [1.0] * 8


def test_a_math_verify_that_does_not_work_is_no_reward_of_0(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match="math-verify is installed but does not work"):
        Verifier(workers=1)


def test_no_worker_outlives_the_program():
    code = "import reward, time, os\nv = reward.Verifier(2)\nv.score(['\\\\boxed{2.0}'], ['2'])\n" \
           "print(*[v.idle.get().pid for _ in range(2)], flush=True)\ntime.sleep(60)"
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    program.kill()
    program.wait()
    deadline = time.monotonic() + 10
    alive = pids
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"]
        time.sleep(0.1)
    assert not alive


@pytest.mark.skipif(not DEMOS.exists(), reason="needs the MATH demonstrations")
def test_every_demonstration_is_right_and_no_other_answer(verifier):
    rows = [json.loads(line) for line in DEMOS.read_text().splitlines()]
    demonstrations, answers = [r["demonstration"] for r in rows], [r["answer"] for r in rows]
    assert verifier.score(demonstrations, answers) == [1.0] * 300
    worker = verifier.idle.get()  # by math-verify itself too, where `score` need only compare texts
    assert [_ask(worker, last_boxed(d), a, 5.0) for d, a in zip(demonstrations, answers)] == ["1"] * 300
    verifier.idle.put(worker)
    others = answers[1:] + answers[:1]
    accepted = [(a, b) for a, b, right in zip(answers, others, verifier.score(demonstrations, others)) if right]
    assert accepted == [("5", "x=5"), ("7", "7")]  # an equation in one unknown is its value
