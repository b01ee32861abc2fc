"""Check that this machine can train: short runs of the toy, on one GPU and on two.

    python -m tools.check_gpu              on the GPUs that are there; a few minutes
    python -m tools.check_gpu --ranks 1    on one of them
    python -m tools.check_gpu --cpu        the same runs on CPU ranks: a test of this program

It looks at the machine first: driver, compiler, packages, memory. Then it runs train_hpt.py with
small steps on one rank, on two, and on two that share an engine. SFT, which samples nothing, takes
one step on one rank and on two: both must have the same gradient. A line says PASS, FAIL or LEFT
OUT for each check; LIMITS has the thresholds. The end is a report in Markdown, which is also in
OUT/report.md: paste it into an issue. The exit status is 1 if a check has failed.
"""

import argparse
import csv
import dataclasses
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

from common import flags, plan, report
from common.distributed import printable

OLDEST_DRIVER = 580  # of CUDA 13.0, for which torch 2.13 and vLLM 0.32 are built for GPUs
OLDEST_GLIBC = (2, 31)
MIB = 2**20


class Limits(NamedTuple):
    """How far a number may be off."""

    kl: float  # the largest mismatch/kl
    norm: float  # relative difference between the gradient norms of one rank and of two


# A CPU computes in float32. A GPU computes in bfloat16: its limits are estimates (docs/gpu.md).
LIMITS = {"CPU": Limits(kl=1e-8, norm=1e-4), "GPU": Limits(kl=1e-2, norm=3e-2)}
BASE_ACCURACY = 0.27  # of the toy's base model on its held-out problems
ACCURACY_LIMIT = 0.12  # its standard error over the 192 problems is 0.03


@dataclasses.dataclass(frozen=True)
class Run:
    """A short run of train_hpt.py."""

    name: str
    ranks: int
    flags: tuple
    steps: int
    samples: bool = True  # whether it trains on rollouts


# Four updates at a high rate: if the sampler kept its old weights, mismatch/kl of the second step
# would be far above the limits. It grows with the square of the rate and of the number of updates.
HPT = ("--prompts-per-step", 16, "--samples-per-prompt", 4, "--minibatches-per-step", 4)
HPT += ("--warmup-steps", 0, "--lr", 1e-3)
SFT = ("--method", "sft", "--minibatches-per-step", 1)
RUNS = (
    Run("1 rank", 1, HPT, 2),
    Run("2 ranks", 2, HPT, 2),
    Run("2 ranks that share an engine", 2, (*HPT, "--tensor-parallel", 2), 2),
    Run("SFT, 1 rank", 1, SFT, 1, samples=False),
    Run("SFT, 2 ranks", 2, SFT, 1, samples=False),
)


class Check(NamedTuple):
    """What was found, and whether that is right."""

    name: str
    ok: bool | None  # None: left out, and `found` says why
    found: str
    wanted: str = ""

    @property
    def word(self) -> str:
        """PASS, FAIL or LEFT OUT."""
        return {True: "PASS", False: "FAIL", None: "LEFT OUT"}[self.ok]

    def line(self) -> str:
        """The check as a line of the terminal."""
        wanted = f"; wanted: {self.wanted}" if self.wanted and not self.ok else ""
        return f"{self.word:<8}  {self.name}: {self.found}{wanted}"


class FinishedRun(NamedTuple):
    """What a run has left behind."""

    run: Run
    seconds: float
    failure: str  # a sentence; empty if it has come to its end
    rows: list[dict]  # of metrics.jsonl
    held_out: list[dict]  # the lines of held_out.jsonl
    log: str  # the end of what it printed, if it has failed


def main(argv: list[str] | None = None) -> None:
    """Look at the machine, make the runs, print the checks and the report."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_gpu",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=flags.HelpFormatter,
    )
    parser.add_argument("--cpu", action="store_true", help="run on CPU ranks, without a GPU")
    parser.add_argument(
        "--ranks",
        type=int,
        choices=(1, 2),
        default=2,
        help="at most so many GPUs, or CPU ranks (%(default)s)",
    )
    flags.number(parser, "--minutes", flags.POSITIVE, 20.0, "that a run may take")
    flags.text(parser, "--out", "DIR", "a new directory (runs/check_gpu-TIME)")
    args = parser.parse_args(argv)
    gpus = gpus_of_machine()
    check_device(args.cpu, gpus)
    out = report.make_directory(args.out or f"runs/check_gpu-{time.strftime('%Y%m%d-%H%M%S')}")

    device = "CPU" if args.cpu else "GPU"
    checks = machine_checks(gpus, args)
    for check in checks:
        report.say(check.line())
    available = args.ranks if args.cpu else min(args.ranks, gpus_that_torch_sees())
    results = []
    for run in RUNS:
        more = left_out(run, available, device)
        if not more:
            results.append(make_run(run, out, args.minutes * 60))
            more = checks_of_run(results[-1], LIMITS[device])
            more += checks_of_checkpoint(results[-1], out)
            more += checks_of_pair(results, LIMITS[device])
        for check in more:
            report.say(check.line())
        checks += more
    text = "\n".join(report_lines(checks, results, gpus, device))
    (out / "report.md").write_text(text + "\n")
    report.say(f"\n{text}\n\n{out / 'report.md'} holds this report; the runs are beside it")
    raise SystemExit(1 if any(check.ok is False for check in checks) else 0)


# ---------------------------------------------------------------------------------- the machine


def gpus_of_machine() -> list[dict]:
    """What nvidia-smi says of each GPU that CUDA_VISIBLE_DEVICES leaves; [] without any.

    torch is not asked, since a driver that is too old keeps it from seeing a GPU.
    """
    columns = ("name", "driver_version", "memory.total", "memory.free")
    command = ["nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return []
    command += ["-i", visible] if visible else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(columns, row)) for row in rows if len(row) == len(columns)]


def gpus_that_torch_sees() -> int:
    """How many GPUs torch can use; no memory is taken on them."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_device(cpu: bool, gpus: list[dict]) -> None:
    """Raise SystemExit with one sentence if --cpu is missing, or given where there is a GPU."""
    there = len(gpus) or gpus_that_torch_sees()
    if cpu and there:
        raise SystemExit(
            "error: --cpu: there is a GPU here, which the runs would use: leave --cpu out"
        )
    if not cpu and not there:
        raise SystemExit("error: there is no GPU here: --cpu makes the same runs on CPU ranks")


def machine_checks(gpus: list[dict], args) -> list[Check]:
    """What the machine must have before anything can run."""
    checks = version_checks()
    if args.cpu:
        return checks
    checks += [driver_check(gpus), *compiler_checks(), glibc_check(platform.libc_ver())]
    checks += cuda_checks()
    return checks + [memory_check(i, gpu) for i, gpu in enumerate(gpus[: args.ranks])]


def version_checks() -> list[Check]:
    """torch, vLLM and transformers are the versions of requirements.txt."""
    pinned = (report.REPOSITORY / "requirements.txt").read_text()
    found = report.versions_and_commit()["versions"]
    checks = []
    for name in ("torch", "vllm", "transformers"):
        wanted = re.search(rf"^{name}==(\S+)", pinned, re.MULTILINE)[1]
        version = found.get(name, "not installed")
        checks.append(Check(name, version.split("+")[0] == wanted, version, wanted))
    return checks


def driver_check(gpus: list[dict]) -> Check:
    """The driver is new enough for the CUDA that torch and vLLM were built for."""
    wanted = f"{OLDEST_DRIVER} or later, for CUDA 13.0"
    if not gpus:
        return Check("driver", None, "nvidia-smi names no GPU, but torch sees one")
    version = gpus[0]["driver_version"]
    major = version.split(".")[0]
    return Check("driver", major.isdigit() and int(major) >= OLDEST_DRIVER, version, wanted)


def compiler_checks() -> list[Check]:
    """Triton compiles C when it first runs: it looks for CC, gcc and clang, and for Python.h."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return [
        Check("C compiler", compiler is not None, compiler or "none", "gcc or clang, for Triton"),
        Check(
            "Python.h",
            header.is_file(),
            str(header) if header.is_file() else f"{header} is missing",
            "the headers of Python, for Triton: say apt install python3-dev",
        ),
    ]


def glibc_check(found: tuple[str, str]) -> Check:
    """The C library is new enough. found: as platform.libc_ver() gives it."""
    library, version = found
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    ok = library == "glibc" and numbers >= OLDEST_GLIBC
    wanted = f"glibc {'.'.join(map(str, OLDEST_GLIBC))} or later"
    return Check("C library", ok, f"{library} {version}".strip() or "unknown", wanted)


def cuda_checks() -> list[Check]:
    """torch is a build for CUDA, sees a GPU, and has NCCL."""
    import torch

    cuda = torch.version.cuda
    about = f"CUDA {cuda}" if cuda else "a build for CPUs"
    checks = [Check("torch's CUDA", bool(cuda), about, "pip install -r requirements.txt")]
    count = gpus_that_torch_sees()
    checks.append(Check("GPUs that torch sees", count > 0, str(count), "at least 1"))
    has_nccl = bool(cuda) and torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"
    checks.append(Check("NCCL", has_nccl, version, "a torch with NCCL"))
    return checks


def memory_check(number: int, gpu: dict) -> Check:
    """A GPU has as much free memory as the engine takes by default."""
    name = f"free memory of GPU {number}"
    figures = [gpu[f"memory.{kind}"] for kind in ("total", "free")]
    if not all(re.fullmatch(r"\d+", figure) for figure in figures):  # shared with the host
        return Check(name, None, "nvidia-smi does not say how much")
    total, free = (float(figure) * MIB / plan.GB for figure in figures)
    needed = plan.USABLE * total - plan.CONTEXT / plan.GB
    return Check(
        name,
        free >= needed,
        f"{free:.1f} of {total:.1f} GB",
        f"{needed:.1f} GB: end what else is running there",
    )


# ------------------------------------------------------------------------------------- the runs


def left_out(run: Run, available: int, device: str) -> list[Check]:
    """A check that says why a run is left out; [] if it is not.

    available: how many GPUs or CPU ranks may be used.
    """
    needed = run.ranks if run.samples else 2  # SFT is there to be compared
    if needed <= available:
        return []
    if available == 0:
        return [Check(run.name, None, "torch sees no GPU")]
    kind = "GPUs" if device == "GPU" else "ranks"
    return [Check(run.name, None, f"it needs {needed} {kind}, and --ranks or the machine has 1")]


def make_run(run: Run, out: Path, seconds: float) -> FinishedRun:
    """Make a run under torchrun, in a folder of its own, and read what it leaves."""
    folder = folder_of(run, out)
    print(f"\nrunning: {run.name} ...", flush=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.ranks}"]
    more = ["--steps", run.steps, "--eval-every", 0, "--eval-samples", 1, "--out", folder]
    program = report.REPOSITORY / "train_hpt.py"
    command = list(map(str, [sys.executable, *launcher, program, *run.flags, *more]))
    log, begin = Path(f"{folder}.log"), time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:  # it is late, or this program was interrupted
                os.killpg(process.pid, signal.SIGKILL)  # the ranks of torchrun die with it
                process.wait()
    taken, text = time.monotonic() - begin, log.read_text(errors="replace")
    failure = ""
    if status is None:
        failure = f"it did not end within {seconds / 60:g} minutes"
    elif status:
        failure = reason_in(text) or f"it ended with status {status}"
    # torchrun adds a traceback of its own below what the ranks have printed.
    end = text.partition("torch/distributed/elastic")[0][-3000:] if failure else ""
    rows, held_out = files_of(folder)
    return FinishedRun(run, taken, failure, rows, held_out, end)


def folder_of(run: Run, out: Path) -> Path:
    """The directory of a run."""
    return out / re.sub(r"\W+", "-", run.name.lower())


def files_of(folder: Path) -> tuple[list[dict], list[dict]]:
    """The rows of metrics.jsonl and of held_out.jsonl; [] where a file is missing."""
    found = []
    for name in ("metrics.jsonl", "held_out.jsonl"):
        path = folder / name
        found.append(report.read_jsonl(path) if path.exists() else [])
    return found[0], found[1]


def reason_in(log: str) -> str:
    """The first line of a log that names an error, without the rank before it; "" without any."""
    for line in log.splitlines():
        if re.search(r"\berror: |\w(Error|Exception): ", line):
            return re.sub(r"^\[rank\d+\]: *", "", line.strip())
    return ""


# ----------------------------------------------------------------------------------- the checks


def checks_of_run(result: FinishedRun, limits: Limits) -> list[Check]:
    """What must hold in every run."""
    run, name = result.run, result.run.name
    if result.failure:
        return [Check(name, False, result.failure, "a run that comes to its end")]
    steps = [row for row in result.rows if row["step"] > 0]
    numbers = [row["step"] for row in result.rows]
    wanted = list(range(run.steps + 1))
    found = f"steps {' '.join(map(str, numbers))} in {result.seconds:.0f} s"
    checks = [Check(name, numbers == wanted, found, f"steps {' '.join(map(str, wanted))}")]
    if run.samples:
        checks.append(mismatch_check(name, steps, limits))
    norms = [row.get("optim/grad_norm") for row in steps]
    ok = bool(norms) and all(norm is not None and 0 < norm < math.inf for norm in norms)
    shown = ", ".join("not finite" if norm is None else f"{norm:.4g}" for norm in norms)
    checks.append(Check(f"{name}, gradient norms", ok, shown or "none", "finite and above 0"))
    skipped = sum(row.get("optim/skipped", 0) for row in steps)
    checks.append(Check(f"{name}, skipped updates", skipped == 0, str(skipped), "0"))
    checks += held_out_checks(name, result.held_out, run.steps)
    return checks


def mismatch_check(name: str, steps: list[dict], limits: Limits) -> Check:
    """Sampler and trainer give the same tokens nearly the same probability, in every step.

    A step in which each prompt trains on its demonstration has no mismatch.
    """
    rows = [row for row in steps if "mismatch/kl" in row]
    values = [row["mismatch/kl"] for row in rows]
    ok = bool(values) and all(value is not None and value <= limits.kl for value in values)
    shown = ", ".join("not finite" if value is None else f"{value:.2e}" for value in values)
    largest = [row["mismatch/logp_max"] for row in rows if row.get("mismatch/logp_max") is not None]
    more = f" (largest difference of a log-probability: {max(largest):.2g})" if largest else ""
    wanted = f"at most {limits.kl:g} in each step; more means old weights, or another distribution"
    return Check(f"{name}, mismatch/kl", ok, (shown or "none") + more, wanted)


def held_out_checks(name: str, held_out: list[dict], last_step: int) -> list[Check]:
    """Both evaluations have the same problems, each once; the base is as good as it should be."""
    prompts = {}
    for row in held_out:
        prompts.setdefault(row["step"], []).append(row["prompt"])
    each_once = all(len(set(texts)) == len(texts) for texts in prompts.values())
    same = len({frozenset(texts) for texts in prompts.values()}) == 1
    ok = sorted(prompts) == [0, last_step] and each_once and same
    found = "; ".join(f"step {step}: {len(texts)}" for step, texts in prompts.items()) or "none"
    wanted = f"the same problems, each once, at step 0 and at step {last_step}"
    checks = [Check(f"{name}, held-out problems", ok, found, wanted)]
    first = [report.accuracy(row) for row in held_out if row["step"] == 0]
    if first:
        accuracy = statistics.fmean(first)
        near = abs(accuracy - BASE_ACCURACY) <= ACCURACY_LIMIT
        wanted = f"{BASE_ACCURACY} +- {ACCURACY_LIMIT}, that of the base model"
        checks.append(Check(f"{name}, accuracy before", near, f"{accuracy:.3f}", wanted))
    return checks


def checks_of_checkpoint(result: FinishedRun, out: Path) -> list[Check]:
    """The model that a run saved loads in transformers, is finite, and differs from its base."""
    if result.failure:
        return []
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, folder = f"{result.run.name}, checkpoint", folder_of(result.run, out) / "final"
    wanted = "a model that transformers loads, with finite weights that training has moved"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a broken checkpoint makes the libraries raise
        return [Check(name, False, str(error).partition("\n")[0], wanted)]
    base = AutoModelForCausalLM.from_pretrained(flags.TOY_ARGS.parent / "base", dtype=torch.float32)
    moved = []
    for one, other in zip(model.parameters(), base.parameters(), strict=True):
        moved.append(float((one - other).detach().abs().max()))
    count = sum(parameter.numel() for parameter in model.parameters())
    finite = all(map(math.isfinite, moved))
    found = f"{count:,} weights, moved by {max(moved):.2g} at most"
    found = found if finite else "a weight is not finite"
    return [Check(name, finite and max(moved) > 0, found, wanted)]


def checks_of_pair(results: list[FinishedRun], limits: Limits) -> list[Check]:
    """What the last run must share with an earlier one; [] if there is none to compare with."""
    *earlier, last = results
    before = [r for r in earlier if r.run.flags == last.run.flags and not r.failure]
    checks = []
    if last.failure:
        return checks
    if earlier and not earlier[0].failure:
        same = problems_of(earlier[0]) == problems_of(last)
        found = "those of" if same else "not those of"
        name = f"{last.run.name}, held-out problems"
        checks.append(Check(name, same, f"{found} the run on {earlier[0].run.name}", "the same"))
    if before and not last.run.samples:
        checks.append(gradient_check(before[0], last, limits))
    return checks


def problems_of(result: FinishedRun) -> set[str]:
    """The held-out problems of a run."""
    return {row["prompt"] for row in result.held_out}


def gradient_check(one: FinishedRun, two: FinishedRun, limits: Limits) -> Check:
    """The sum over two ranks is the gradient of one. SFT has no samples that could differ."""
    norms = [[row.get("optim/grad_norm") for row in r.rows if row["step"] > 0] for r in (one, two)]
    name, wanted = "gradient norm of SFT, 1 rank and 2", f"a difference of at most {limits.norm:g}"
    if not norms[0] or len(norms[0]) != len(norms[1]) or None in norms[0] + norms[1]:
        return Check(name, False, "not finite, or missing", wanted)
    differences = [abs(a - b) / max(a, b, 1e-300) for a, b in zip(*norms)]
    found = (
        f"{norms[0][0]:.6g} and {norms[1][0]:.6g}, a relative difference of {max(differences):.1e}"
    )
    return Check(name, max(differences) <= limits.norm, found, wanted)


# ----------------------------------------------------------------------------------- the report


def report_lines(
    checks: list[Check], results: list[FinishedRun], gpus: list, device: str
) -> list[str]:
    """The report, as lines of Markdown."""
    words = [check.word for check in checks]
    verdict = "FAIL" if "FAIL" in words else "PASS"
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("PASS", "FAIL", "LEFT OUT"))
    known = report.versions_and_commit()
    versions = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    lines = [f"### check_gpu: {verdict} on {device} ranks ({counts})", ""]
    lines += [f"- machine: {machine(gpus)}"]
    lines += [f"- versions: {versions}", f"- commit: {known['commit']}", ""]
    rows = [["check", "result", "found", "wanted"]]
    rows += [[check.name, check.word, check.found, check.wanted] for check in checks]
    lines += report.markdown_table(rows)
    if results:
        lines += ["", *report.markdown_table(figures(results))]
    for result in results:
        if result.log:
            lines += ["", f"The end of the log of {result.run.name}:", "", "```"]
            lines += [printable(line) for line in result.log.splitlines()[-25:]] + ["```"]
    return lines


def machine(gpus: list[dict]) -> str:
    """The machine in words."""
    names = {gpu["name"] for gpu in gpus}
    cards = [f"{len([g for g in gpus if g['name'] == name])} x {name}" for name in sorted(names)]
    drivers = sorted({f"driver {gpu['driver_version']}" for gpu in gpus})
    processor = f"{os.cpu_count()} cores, {plan.host_memory() / plan.GB:.0f} GB of memory"
    return ", ".join([*cards, *drivers, processor, " ".join(platform.libc_ver())])


def figures(results: list[FinishedRun]) -> list[list]:
    """A table of what the runs have measured in their last step; the first row is the head."""
    columns = {
        "reward": "reward/mean",
        "mismatch/kl": "mismatch/kl",
        "gradient norm": "optim/grad_norm",
        "sampled tokens/s": "perf/rollout_tokens_per_sec",
        "trained tokens/s": "perf/train_tokens_per_sec",
        "GB of GPU memory": "perf/max_memory_gb",
    }
    rows = [["run", "seconds", *columns]]
    for result in results:
        last = result.rows[-1] if result.rows else {}
        values = [last.get(name) for name in columns.values()]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        rows.append([result.run.name, f"{result.seconds:.0f}", *cells])
    return rows


if __name__ == "__main__":
    main()
