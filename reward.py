"""The verifier: 1.0 if the last \\boxed{} of a response is the reference answer, else 0.0.

    reward(response, answer)                 one answer
    with Verifier(workers=8) as verifier:    many, in order; the trainer's way
        rewards = verifier.score(responses, answers)

`grade` decides, by letter for multiple choice and by math-verify for everything else. math-verify guards itself with
SIGALRM, which works only in a main thread and cannot interrupt a long integer power in C. So `grade`, or a function of
yours (`--reward module:function`), runs in worker processes, each answer under a hard deadline and each worker under a
memory limit: one that misses the deadline or dies is replaced, its answer scores 0 and is counted. A worker ends with
the program, however that ends: it is told by the kernel, and its input closes.
"""
import ctypes
import functools
import importlib
import json
import logging
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

LONGEST = 2000  # characters of a final answer worth parsing
START = 60.0  # seconds a worker may take to import what it needs
GRADE = "reward:grade"
# a choice is named by its letter, alone or at the head of its text, and by one letter only
CHOICE = re.compile(r"(?:(?:option|choice|answer)[\s:]*)?(?:[(\[]([A-J])[)\]]|([A-J])(?:$|\s*[.:)](?=\s|$)|(?=\s+\())"
                    r")(?!\s*(?:(?:[,;/&]|and|or)\s*)+[(\[]?[A-J]\b|\s*[(\[][A-J][)\]]).*", re.IGNORECASE | re.DOTALL)


def last_boxed(text):
    """The content of the last \\boxed{...} of `text`, braces balanced, or None where there is none."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[starts[-1]:], re.DOTALL) if starts else ():  # an escaped brace does not count
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[starts[-1]:][: brace.start()]
    return None


def grade(response, answer):
    """1.0 if the last \\boxed{} of `response` (str) is `answer` (str or number, or a list of accepted ones), else 0.0.

    It can hang and can take all memory: `reward` and `Verifier` are the safe ways to call it.
    """
    given = last_boxed(response)
    if given is None or not given.strip() or len(given) > LONGEST:
        return 0.0
    return float(any(_equal(given, str(wanted)) for wanted in (answer if isinstance(answer, list) else [answer])))


def _equal(given, wanted):
    """Whether two final answers, the second the reference, are the same."""
    given, wanted = (_tidy(last_boxed(text) or text) for text in (given, wanted))  # some benchmarks box the reference too
    if given == wanted:
        return True
    if letter := re.fullmatch(r"\(?([A-J])\)?", _plain(wanted)):  # multiple choice
        chosen = CHOICE.fullmatch(_plain(given))
        return bool(chosen) and (chosen[1] or chosen[2]).upper() == letter[1]
    if "dots" in given + wanted:  # math-verify drops an ellipsis, and then compares what was before it
        return "".join(given.split()) == "".join(wanted.split())
    bases = [re.fullmatch(r"\d+_\{?(\d+)\}?", text) for text in (given, wanted)]
    if all(bases) and bases[0][1] != bases[1][1]:
        return False  # math-verify drops a subscript
    bare = [text.rstrip("\\% ") if text.endswith("%") else text for text in (given, wanted)]  # 62.5 for 62.5%, and the reverse
    return _math_equal(given, wanted) or bare != [given, wanted] and _math_equal(*bare)


def _math_equal(given, wanted):
    """math-verify's verdict; it looks at six decimals, so small numbers are asked for their first digits too."""
    from math_verify import parse, verify
    from sympy import Expr
    logging.disable()  # it warns, each time, that its own timeouts are off
    gold, mine = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (wanted, given))
    if not verify(gold, mine, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    if not all(isinstance(x[0], Expr) and x[0].is_number for x in (gold, mine)):
        return True
    a, b = gold[0].doit().evalf(), mine[0].doit().evalf()
    return bool(min(abs(a), abs(b)) > 1e-3 or abs(a - b) <= 1e-5 * max(abs(a), abs(b)))


def _tidy(text):
    """What math-verify 0.9 does not read, put into what it does."""
    for pattern, new in ((r"^([\s$+-]*)(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\s*[\w.+*/^-])", r"\1\2 \\times 10^{\3}"),  # 4.5e33
                         (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),  # 1\,000
                         (r"(?<=\d)\.(?=\s*($|/|\\text|\\mbox))", ""),  # 7. and -1./3
                         (r"\bnp\.(?=[a-z])", r"\\"),  # np.arcsin(10/13), in Minerva
                         ("[−–]", "-"), ("°", r"^\\circ"), ("~", " ")):
        text = re.sub(pattern, new, text.strip())
    return text


def _plain(text):
    """`text` without dollars, braces, font commands and spaces around."""
    return re.sub(r"\\(?:(?:text|math)\w*|mbox|boldsymbol|underline|bf|rm|left|right)(?![a-zA-Z])|\\[(),;! ]|[{}$*~]", "", text).strip("\\.,\n ")


class Verifier:
    """A pool of worker processes; build it before CUDA and vLLM start, use it in a `with` block.

    workers: default this rank's share of the cores, 8 at most. deadline: seconds for one answer. memory: bytes that a
    worker may take beyond its imports. function: "module:function" of (response, answer) -> a number from 0 to 1.
    `timeouts` counts the answers that missed the deadline or took their worker down. Raises SystemExit where the
    function cannot be loaded, raises, or returns something else.
    """

    def __init__(self, workers=None, deadline=5.0, memory=2**30, function=GRADE):
        workers = workers or min(8, max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.deadline, self.memory, self.function, self.timeouts = deadline, memory, function, 0
        self.idle = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(workers)  # one thread minds one worker; the kernel ends a worker with its thread
        for worker in self.threads.map(lambda _: self._start(), range(workers)):
            self.idle.put(worker)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)
        while not self.idle.empty():
            _kill(self.idle.get())

    def score(self, responses, answers):
        """Rewards (floats) in the order of `responses` (list of str), against `answers`, as many, each as `grade` takes it."""
        scores = list(self.threads.map(self._score, zip(responses, answers, strict=True)))
        self.timeouts += scores.count(None)
        return [score or 0.0 for score in scores]

    def _score(self, question):
        """The score of a (response, answer) pair, None where the worker missed the deadline or died."""
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
        """A new worker. It is a fresh interpreter, not a fork: it inherits neither CUDA nor threads nor sockets."""
        command = [sys.executable, os.path.abspath(__file__), self.function, str(self.memory), str(os.getpid())]
        for _ in range(3):  # a machine short of memory may kill one that only begins
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
            os.set_blocking(worker.stdin.fileno(), False)
            if (said := _ask(worker, None, START)) == 1.0:
                return worker
            _kill(worker)
        raise SystemExit(f"error: --reward {self.function} cannot be loaded: {said or f'its process ends, or takes {START:.0f} s to start'}")


def reward(response, answer):
    """`grade` of one response in a worker process of its own, which is kept: 0.0 where it misses 5 seconds."""
    return _own_verifier().score([response], [answer])[0]


_own_verifier = functools.cache(lambda: Verifier(workers=1))  # its worker ends with the program


def _ask(worker, question, deadline):
    """What the worker says, a number or what is wrong (str), or None where it misses the deadline (seconds) or dies."""
    end, said = time.monotonic() + deadline, b""
    left = memoryview(b"" if question is None else json.dumps(question).encode() + b"\n")
    try:
        while not said.endswith(b"\n"):
            pipe = select.poll()  # select.select knows only the first 1024 files of a program
            pipe.register(*((worker.stdin, select.POLLOUT) if left else (worker.stdout, select.POLLIN)))
            if not pipe.poll(1000 * max(0.0, end - time.monotonic())):
                return None
            if left:
                left = left[os.write(worker.stdin.fileno(), left):]
            elif chunk := os.read(worker.stdout.fileno(), 4096):
                said += chunk
            else:
                return None
    except BrokenPipeError:
        return None
    return json.loads(said)


def _kill(worker):
    if worker.returncode is None:  # after that its number may be another's
        os.killpg(worker.pid, signal.SIGKILL)  # and what a function of the user's may have started
        worker.wait()
    worker.stdin.close()
    worker.stdout.close()


def _worker(name, memory, parent):
    """Say 1.0 when ready; then a line of [response, answer] in, a line of JSON out, as `_ask` reads it, until stdin closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the program, even in a long C call
    if os.getppid() != parent:  # gone already
        return
    questions, out, nothing = os.fdopen(os.dup(0)), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0), os.dup2(nothing, 1)  # nothing that a function prints may pass for an answer
    say = lambda what: os.write(out, json.dumps(what).encode() + b"\n")
    sys.path.append(os.getcwd())
    module, _, function = name.partition(":")
    try:
        score = getattr(importlib.import_module(module), function)
        if name == GRADE and score("\\boxed{1.0}", "1") != 1.0:  # else every answer would score 0
            raise ImportError("math-verify does not work, 1.0 is not 1 by it; install requirements.txt or requirements-cpu.txt again")
    except Exception as error:  # whatever a module of the user's may raise
        say(f"{type(error).__name__}: {error}")
        return
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    say(1.0)
    for line in questions:
        response, answer = json.loads(line)
        try:
            value = float(score(response, answer))
            say(value if 0 <= value <= 1 else f"returned {value}, not a number from 0 to 1, for {response[-60:]!r}")
        except MemoryError:
            say(None)  # as a missed deadline: the worker is replaced
        except Exception as error:
            say(0.0 if name == GRADE else f"raised {type(error).__name__}: {error}, for {response[-60:]!r}")


if __name__ == "__main__":
    _worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
