"""The verifier: 1.0 if the last \\boxed{} of a response equals the reference answer by math-verify, else 0.0.

math-verify guards itself with SIGALRM, which works only in a main thread and cannot interrupt a long integer power in
C. So it runs in worker processes of its own, each answer under a hard deadline: a worker that misses it is killed and
replaced, the answer scores 0 and is counted. A worker ends with the program, however that ends: it is told by the
kernel, and its input closes.
"""
import ctypes
import importlib.util
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

LONGEST = 2000  # characters of a final answer worth parsing
START = 60.0  # seconds a worker may take to import math-verify


def last_boxed(text):
    """The content of the last \\boxed{...} of `text`, braces balanced, or None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, i = 0, start + len("\\boxed")
    while i < len(text):
        if text[i] == "\\":
            i += 1  # an escaped brace does not count
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start + len("\\boxed{") : i]
        i += 1
    return None


class Verifier:
    """A pool of math-verify processes; build it before CUDA and vLLM start, use it in a `with` block.

    deadline: seconds for one answer. `timeouts` counts the answers that missed it or took their worker down.
    """

    def __init__(self, workers=2, deadline=5.0):
        if importlib.util.find_spec("math_verify") is None:
            raise SystemExit("error: math-verify is not installed: pip install -r requirements.txt")
        self.deadline, self.timeouts = deadline, 0
        self.idle = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(workers)  # one thread minds one worker
        for _ in range(workers):
            self.idle.put(self._start())
        first = self.idle.get()
        if _ask(first, "1.0", "1", deadline) != "1":  # else every answer would score 0
            raise SystemExit("error: math-verify is installed but does not work: 1.0 is not 1 by it, see its message above; "
                             "install requirements.txt or requirements-cpu.txt again")
        self.idle.put(first)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown()
        while not self.idle.empty():
            _kill(self.idle.get())

    def score(self, responses, answers):
        """Rewards, 0.0 or 1.0 in the order of `responses` (list of str), against `answers` (list of str)."""
        return list(self.threads.map(self._score, responses, answers))

    def _score(self, response, answer):
        given = last_boxed(response)
        wanted = (last_boxed(answer) or answer).strip()  # some benchmarks box the reference too
        if given is None or not given.strip() or len(given) > LONGEST:
            return 0.0
        if given.strip() == wanted:
            return 1.0  # the same text is the same answer
        worker = self.idle.get()
        try:
            said = _ask(worker, given, wanted, self.deadline)
            if said not in ("0", "1"):
                self.timeouts += 1
                _kill(worker)
                worker = self._start()
            return float(said == "1")
        finally:
            self.idle.put(worker)

    def _start(self):
        """A new worker. It is a fresh interpreter, not a fork: it inherits neither CUDA nor threads nor sockets."""
        return subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, bufsize=0, start_new_session=True)


def _ask(worker, given, wanted, deadline):
    """ "1", "0", or "" where the worker missed the deadline (seconds) or died. """
    try:
        worker.stdin.write(json.dumps([given, wanted]).encode() + b"\n")
    except BrokenPipeError:
        return ""
    for limit in (START, deadline):  # it says "!" when it takes up the answer, which a new worker does late
        if not select.select([worker.stdout], [], [], limit)[0]:
            return ""
        said = worker.stdout.read(1).decode()
        if said != "!":
            return said
    return ""


def _kill(worker):
    worker.kill()
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()


def _worker():
    """Answer [given, wanted] lines on stdin with "!" and then "1" or "0" on stdout, until stdin closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the program, even in a long C call
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints may pass for an answer
    from math_verify import parse, verify

    logging.disable()  # it warns, each time, that its own timeouts are off
    for line in sys.stdin:
        os.write(out, b"!")
        given, wanted = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line))
        os.write(out, b"01"[(right := verify(wanted, given, timeout_seconds=None)) : right + 1])


if __name__ == "__main__":
    _worker()
