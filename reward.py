r"""The verifier: 1.0 if the last \boxed{} of a response is the reference answer, else 0.0.

    reward(response, answer)                 one answer
    with Verifier(workers=8) as verifier:    many answers, in order; the trainer does this
        rewards = verifier.score(responses, answers)

`grade` decides; what counts as the same answer stands in common/answers.py and docs/verifier.md.
Mathematics that a model writes can take hours and all memory, and a signal cannot interrupt a
long computation in C. So `grade`, or a function of yours (`--reward module:function`), runs in
worker processes: each answer has a hard deadline and each worker a memory limit. A worker that
misses the deadline or dies is replaced; its answer scores 0 and is counted. A worker ends when
the program ends, however that happens: the kernel kills it, and its input closes.
"""

import ctypes
import functools
import importlib
import json
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

LONGEST = 2000  # characters of a final answer worth reading
START = 60.0  # seconds that a worker may take to import what it needs
START_ATTEMPTS = 3  # a machine short of memory may kill a worker that only begins
GRADE = "reward:grade"
ALL_LOST = 8  # the run stops where calls lose every answer, and this many in a row
MANY_LOST = 0.1  # the console says so where a call loses more than this share of its answers
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


# ------------------------------------------------------------------------------------------------
# One answer
# ------------------------------------------------------------------------------------------------


def last_boxed(text):
    r"""The content of the last \boxed{...} of `text`, braces balanced, or None without one."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    if not starts:
        return None
    text = text[starts[-1] :]
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped brace does not count
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[: brace.start()]
    return None


def grade(response, answer):
    r"""Whether the last \boxed{} of a response is the reference answer.

    It can hang and can take all memory: `reward` and `Verifier` are the safe ways to call it.

    Args:
        response: str.
        answer: str or number, or a list of accepted ones. It may be boxed itself.

    Returns:
        1.0 or 0.0.
    """
    from common.answers import same

    given = last_boxed(response)
    if given is None or not given.strip() or len(given) > LONGEST:
        return 0.0
    given = last_boxed(given) or given
    accepted = [str(wanted) for wanted in (answer if isinstance(answer, list) else [answer])]
    return float(any(same(given, last_boxed(wanted) or wanted) for wanted in accepted))


def reward(response, answer):
    """`grade` of one response in a worker process, which is kept: 0.0 where it misses 5 seconds."""
    return _own_verifier().score([response], [answer])[0]


@functools.cache
def _own_verifier():
    return Verifier(workers=1)  # its worker ends with the program


# ------------------------------------------------------------------------------------------------
# Many answers
# ------------------------------------------------------------------------------------------------


class Verifier:
    """A pool of worker processes. Build it before CUDA and vLLM start; use it in a `with` block.

    Args:
        workers: how many; by default this rank's share of the cores, 8 at most.
        deadline: seconds for one answer.
        memory: bytes that a worker may take beyond its imports.
        function: "module:function" of (response, answer) -> a number from 0 to 1.

    Raises:
        SystemExit: where the function cannot be loaded, raises, or returns something else.

    `timeouts` counts the lost answers, which missed the deadline or took their worker down.
    """

    def __init__(self, workers=None, deadline=5.0, memory=2**30, function=GRADE):
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = workers or min(8, max(1, os.cpu_count() // ranks))
        self.deadline, self.memory, self.function = deadline, memory, function
        self.timeouts = self.lost_in_a_row = 0
        self.idle = queue.SimpleQueue()
        # One thread minds one worker; the kernel ends a worker with the thread that started it.
        self.threads = ThreadPoolExecutor(workers)
        for worker in self.threads.map(lambda _: self._start(), range(workers)):
            self.idle.put(worker)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)
        while not self.idle.empty():
            _kill(self.idle.get())

    def score(self, responses, answers, each_done=lambda: None):
        """Rewards in the order of the responses.

        Args:
            responses: list of str.
            answers: list of the same length, of what `grade` takes as an answer.
            each_done: a function that is called whenever one more answer has its score.

        Returns:
            A list of floats. A lost answer has 0.0.

        Raises:
            SystemExit: where all answers of this call, or of this and the last ones, are lost, and
                there are at least ALL_LOST. Every group would look unsolved, and HPT would be SFT
                without a word.
        """
        questions = list(zip(responses, answers, strict=True))
        scores = []
        for score in self.threads.map(self._score, questions):
            scores.append(score)
            each_done()
        lost = scores.count(None)
        self.timeouts += lost
        self.lost_in_a_row = self.lost_in_a_row + lost if lost == len(scores) else 0
        if self.lost_in_a_row >= ALL_LOST:
            raise SystemExit(
                f"error: --reward {self.function} lost all of the last {self.lost_in_a_row} "
                f"answers: its process died or took more than {self.deadline:g} s at each; run the "
                "function by hand on one response"
            )
        if lost > MANY_LOST * len(scores):
            print(
                f"warning: --reward {self.function} lost {lost} of {len(scores)} answers, which "
                f"score 0: its process died or took more than {self.deadline:g} s",
                file=sys.stderr,
                flush=True,
            )
        return [score or 0.0 for score in scores]

    def _score(self, question):
        """The score of a (response, answer) pair, None where it is lost."""
        worker = self.idle.get()
        try:
            said = _ask(worker, question, self.deadline)
            if said is None:
                _kill(worker)
                worker = self._start()
        finally:
            self.idle.put(worker)
        if isinstance(said, str):
            raise SystemExit(f"error: --reward {self.function} {said}")
        return said

    def _start(self):
        """A new worker: a fresh interpreter, which inherits no CUDA, no threads, no sockets."""
        program = [sys.executable, os.path.abspath(__file__)]
        command = [*program, self.function, str(self.memory), str(os.getpid())]
        for _ in range(START_ATTEMPTS):
            worker = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
            os.set_blocking(worker.stdin.fileno(), False)
            said = _ask(worker, None, START)
            if said == 1.0:
                return worker
            _kill(worker)
        said = said or f"its process ends, or takes more than {START:.0f} s to start"
        raise SystemExit(f"error: --reward {self.function} cannot be loaded: {said}")


def _ask(worker, question, deadline):
    """What a worker says to a question; to None, what it says at its start.

    Returns:
        A number, or what is wrong (str), or None where it misses the deadline (seconds) or dies.
    """
    end, said = time.monotonic() + deadline, b""
    left = memoryview(b"" if question is None else json.dumps(question).encode() + b"\n")
    try:
        while not said.endswith(b"\n"):
            pipe = select.poll()  # select.select knows only the first 1024 files of a program
            pipe.register(
                *((worker.stdin, select.POLLOUT) if left else (worker.stdout, select.POLLIN))
            )
            if not pipe.poll(1000 * max(0.0, end - time.monotonic())):
                return None
            if left:
                left = left[os.write(worker.stdin.fileno(), left) :]
            elif chunk := os.read(worker.stdout.fileno(), 4096):
                said += chunk
            else:
                return None
    except BrokenPipeError:
        return None
    return json.loads(said)


def _kill(worker):
    """End a worker and what a function of the user's may have started."""
    if worker.returncode is None:  # after that its number may be another process's
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    worker.stdin.close()
    worker.stdout.close()


# ------------------------------------------------------------------------------------------------
# The worker's side
# ------------------------------------------------------------------------------------------------


def _worker(name, memory, parent):
    """Say 1.0 when ready; then answer each line [response, answer] with a line of JSON.

    Args:
        name: "module:function".
        memory: bytes that it may take beyond its imports.
        parent: the process that started it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)  # works in a long C call too
    if os.getppid() != parent:  # the parent has gone already
        return
    questions, out = os.fdopen(os.dup(0)), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # nothing that a function prints may pass for an answer
    sys.path.append(os.getcwd())
    try:
        score = _load(name)
    except Exception as error:  # whatever a module of the user's may raise
        _say(out, f"{type(error).__name__}: {error}")
        return
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    _say(out, 1.0)
    for line in questions:
        response, answer = json.loads(line)
        try:
            value = float(score(response, answer))
            wrong = f"returned {value}, not a number from 0 to 1, for {response[-60:]!r}"
            _say(out, value if 0 <= value <= 1 else wrong)
        except MemoryError:
            _say(out, None)  # as a missed deadline: the worker is replaced
        except Exception as error:
            raised = f"raised {type(error).__name__}: {error}, for {response[-60:]!r}"
            _say(out, 0.0 if name == GRADE else raised)


def _load(name):
    """The function of that name. A math-verify that does not work would score 0 everywhere."""
    module, _, function = name.partition(":")
    score = getattr(importlib.import_module(module), function)
    if name == GRADE and score("\\boxed{\\sin^2 x+\\cos^2 x}", "1") != 1.0:
        raise ImportError(
            "math-verify does not work, sin^2 x + cos^2 x is not 1 by it; install requirements.txt "
            "or requirements-cpu.txt again"
        )
    return score


def _say(out, what):
    os.write(out, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    _worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
