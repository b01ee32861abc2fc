"""tools/check_gpu.py: each check on ready-made numbers, right ones and wrong ones; one real run."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from common import report
from tools import check_gpu
from tools.check_gpu import LIMITS, RUNS, Check, FinishedRun
from toy import make

HPT, TWO, SHARED, SFT, SFT_ON_TWO = RUNS
NORM = 0.0625  # of the ready-made runs
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="--cpu is for machines without a GPU")


def rows_of(run, **changes):
    """metrics.jsonl of a healthy run; `changes` are made in its last step."""
    rows = [{"step": 0, "eval/avg@1": 0.25}]
    for step in range(1, run.steps + 1):
        row = {"step": step, "optim/grad_norm": NORM, "optim/skipped": 0}
        if run.samples:
            row |= {"mismatch/kl": 1e-13, "mismatch/logp_max": 1e-6, "reward/mean": 0.25}
        rows.append(row)
    rows[-1] |= changes
    return rows


def held_out_of(run, right=2, count=8):
    """held_out.jsonl of a healthy run: `right` of `count` problems are solved before training."""
    lines = []
    for step in (0, run.steps):
        for i in range(count):
            lines.append({"step": step, "prompt": f"q{i}", "samples": 1, "correct": int(i < right)})
    return lines


def result_of(run, rows=None, held_out=None, failure="", log=""):
    return FinishedRun(run, 9.0, failure, rows or rows_of(run), held_out or held_out_of(run), log)


def failed(checks):
    return [check.name for check in checks if check.ok is False]


def checks_of(run=HPT, device="CPU", **parts):
    return check_gpu.checks_of_run(result_of(run, **parts), LIMITS[device])


# ------------------------------------------------------------------------------------------ one run


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
@pytest.mark.parametrize("device", LIMITS)
def test_a_healthy_run_passes(run, device):
    checks = checks_of(run, device)
    assert failed(checks) == [] and len(checks) == 5 + run.samples


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"mismatch/kl": 1e-7}, "mismatch/kl"),
        ({"mismatch/kl": None}, "mismatch/kl"),  # a NaN is null in the file
        ({"optim/grad_norm": None}, "gradient norms"),
        ({"optim/grad_norm": 0.0}, "gradient norms"),
        ({"optim/skipped": 1}, "skipped updates"),
        ({"step": 3}, ""),  # a step is missing
    ],
)
def test_a_sick_step_fails_one_check(changes, name):
    checks = checks_of(rows=rows_of(HPT, **changes))
    assert failed(checks) == [f"1 rank, {name}" if name else "1 rank"]


def test_a_gpu_may_differ_more_than_a_cpu():
    """bfloat16 has 3 digits; but old weights in the sampler are found there, too."""
    rows = rows_of(HPT, **{"mismatch/kl": 1e-3})
    assert failed(checks_of(device="GPU", rows=rows)) == []
    assert failed(checks_of(device="CPU", rows=rows)) == ["1 rank, mismatch/kl"]
    rows = rows_of(HPT, **{"mismatch/kl": 0.1})
    assert failed(checks_of(device="GPU", rows=rows)) == ["1 rank, mismatch/kl"]


def test_a_step_without_mismatch_passes_and_a_run_without_any_fails():
    rows = rows_of(HPT)
    del rows[-1]["mismatch/kl"]
    assert failed(checks_of(rows=rows)) == []
    del rows[-2]["mismatch/kl"]
    assert failed(checks_of(rows=rows)) == ["1 rank, mismatch/kl"]


def test_held_out_problems_are_the_same_at_each_evaluation_and_there_once():
    name, healthy = "1 rank, held-out problems", held_out_of(HPT)
    wrong = [
        healthy[:-1],  # one is missing at the end
        [*healthy, healthy[-1]],  # one is there twice
        [*healthy[:-1], healthy[-1] | {"prompt": "another"}],
        healthy[:8],  # there is no evaluation at the end
    ]
    for lines in wrong:
        assert failed(checks_of(held_out=lines)) == [name]


@pytest.mark.parametrize("right, passes", [(0, False), (2, True), (3, True), (4, False)])
def test_the_base_is_as_good_as_it_should_be(right, passes):
    found = failed(checks_of(held_out=held_out_of(HPT, right)))
    assert found == ([] if passes else ["1 rank, accuracy before"])


def test_a_run_that_failed_is_one_check_with_its_reason():
    [check] = checks_of(failure="CUDA out of memory")
    assert check == Check("1 rank", False, "CUDA out of memory", "a run that comes to its end")


@pytest.mark.parametrize(
    "log, reason",
    [
        ("one\ntrain_hpt.py: error: --steps 0\ntwo", "train_hpt.py: error: --steps 0"),
        ("[rank1]: torch.OutOfMemoryError: CUDA out of memory", "torch.OutOfMemoryError: CUDA out"),
        ("an error of no kind\nInfoErrors 3", ""),
    ],
)
def test_the_reason_is_the_first_error_of_the_log(log, reason):
    found = check_gpu.reason_in(log)
    assert found.startswith(reason) and bool(found) == bool(reason)


# ----------------------------------------------------------------------------------------- two runs


def checks_of_two(one, two, device="CPU"):
    return check_gpu.checks_of_pair([one, two], LIMITS[device])


@pytest.mark.parametrize(
    "device, factor, passes",
    [
        ("CPU", 1 + 1e-5, True),
        ("CPU", 1 + 1e-3, False),
        ("GPU", 1 + 1e-2, True),
        ("GPU", 2, False),  # as if the ranks' gradients were added where they must be averaged
        ("GPU", 1 / 2, False),
    ],
)
def test_two_ranks_have_the_gradient_of_one(device, factor, passes):
    other = result_of(SFT_ON_TWO, rows_of(SFT_ON_TWO, **{"optim/grad_norm": factor * NORM}))
    checks = checks_of_two(result_of(SFT), other, device)
    assert failed(checks) == ([] if passes else ["gradient norm of SFT, 1 rank and 2"])
    assert len(checks) == 2


def test_a_missing_gradient_norm_is_no_agreement():
    rows = rows_of(SFT_ON_TWO, **{"optim/grad_norm": None})
    assert len(failed(checks_of_two(result_of(SFT), result_of(SFT_ON_TWO, rows)))) == 1


def test_all_runs_have_the_same_held_out_problems():
    assert failed(checks_of_two(result_of(HPT), result_of(TWO))) == []
    fewer = result_of(TWO, held_out=held_out_of(TWO, count=7))
    assert failed(checks_of_two(result_of(HPT), fewer)) == ["2 ranks, held-out problems"]


def test_a_run_that_failed_is_not_compared():
    broken = result_of(SFT, failure="it died")
    assert checks_of_two(broken, result_of(SFT_ON_TWO)) == []
    assert checks_of_two(result_of(SFT), broken) == []


# ---------------------------------------------------------------------------------- its checkpoint


@pytest.fixture
def saved(tmp_path):
    """The folder of a run whose final/ is the base model."""
    folder = check_gpu.folder_of(HPT, tmp_path)
    shutil.copytree(make.BASE, folder / "final")
    return folder


def checkpoint_check(tmp_path):
    [check] = check_gpu.checks_of_checkpoint(result_of(HPT), tmp_path)
    return check


@pytest.mark.parametrize("change, passes", [(0.0, False), (1e-3, True), (float("nan"), False)])
def test_a_checkpoint_has_moved_and_is_finite(saved, tmp_path, change, passes):
    from safetensors.torch import load_file, save_file

    path = saved / "final/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += change
    if change:  # a weight that is not finite shows also where another one has moved
        weights["model.embed_tokens.weight"][0, 0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    check = checkpoint_check(tmp_path)
    assert check.ok == passes, check


def test_a_checkpoint_that_is_not_there_fails(saved, tmp_path):
    shutil.rmtree(saved / "final")
    assert checkpoint_check(tmp_path).ok is False
    assert check_gpu.checks_of_checkpoint(result_of(HPT, failure="it died"), tmp_path) == []


# -------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    "version, passes", [("580.65.06", True), ("575.57.08", False), ("?", False)]
)
def test_the_driver_is_new_enough(version, passes):
    assert check_gpu.driver_check([{"driver_version": version}]).ok == passes
    assert check_gpu.driver_check([]).ok is None


@pytest.mark.parametrize(
    "found, passes",
    [(("glibc", "2.31"), True), (("glibc", "2.4"), False), (("", ""), False)],
)
def test_the_c_library_is_new_enough(found, passes):
    assert check_gpu.glibc_check(found).ok == passes


@pytest.mark.parametrize("free, passes", [("81000", True), ("70000", False)])
def test_a_gpu_has_room_for_the_engine(free, passes):
    gpu = {"memory.total": "81559", "memory.free": free}
    assert check_gpu.memory_check(0, gpu).ok == passes


def test_a_gpu_that_shares_the_memory_of_the_host_has_no_figure():
    check = check_gpu.memory_check(0, {"memory.total": "[N/A]", "memory.free": "[N/A]"})
    assert (check.ok, check.found) == (None, "nvidia-smi does not say how much")


def test_a_compiler_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert failed(check_gpu.compiler_checks())[0] == "C compiler"
    monkeypatch.setenv("CC", "my-cc")
    assert check_gpu.compiler_checks()[0].ok


def test_versions_are_those_of_the_requirements(monkeypatch):
    assert failed(check_gpu.version_checks()) == []
    others = {"versions": {"torch": "2.13.0+cu130", "vllm": "0.31.0"}}
    monkeypatch.setattr(report, "versions_and_commit", lambda: others)
    assert failed(check_gpu.version_checks()) == ["vllm", "transformers"]


def test_what_nvidia_smi_says(monkeypatch, tmp_path):
    line = "NVIDIA H100 80GB HBM3, 580.65.06, 81559, 81000"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{line}'; echo '{line}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = check_gpu.gpus_of_machine()
    assert len(gpus) == 2 and gpus[1]["memory.free"] == "81000"
    assert check_gpu.machine(gpus).startswith("2 x NVIDIA H100 80GB HBM3, driver 580.65.06, ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_gpu.gpus_of_machine() == []


@no_gpu
def test_without_a_gpu_a_sentence_names_the_flag():
    with pytest.raises(
        SystemExit, match=r"^error: there is no GPU here: --cpu makes the same runs"
    ):
        check_gpu.main([])
    with pytest.raises(SystemExit, match=r"^error: --cpu: there is a GPU here"):
        check_gpu.check_device(True, [{}])
    check_gpu.check_device(True, [])
    check_gpu.check_device(False, [{}])


def test_what_is_left_out_says_why():
    assert [bool(check_gpu.left_out(run, 2, "GPU")) for run in RUNS] == [False] * 5
    assert [bool(check_gpu.left_out(run, 1, "GPU")) for run in RUNS] == [False] + [True] * 4
    [check] = check_gpu.left_out(TWO, 1, "GPU")
    assert check.line() == "LEFT OUT  2 ranks: it needs 2 GPUs, and --ranks or the machine has 1"
    [check] = check_gpu.left_out(HPT, 0, "GPU")
    assert check.ok is None and check.found == "torch sees no GPU"


# ------------------------------------------------------------------------------------ the program


def test_a_run_that_fails_and_one_that_is_late(tmp_path):
    wrong = check_gpu.Run("a wrong flag", 1, ("--seed", "x"), 1)
    result = check_gpu.make_run(wrong, tmp_path, 200)
    assert "error: argument --seed: must be a whole number" in result.failure
    assert "--seed" in result.log and result.rows == []
    late = check_gpu.make_run(HPT, tmp_path, 0.01)
    assert late.failure.startswith("it did not end within")


@pytest.mark.parametrize("norm, status", [(NORM, 0), (2 * NORM, 1)])
@no_gpu
def test_the_exit_status_and_the_report(tmp_path, monkeypatch, capsys, norm, status):
    def made_up(run, out, seconds):
        on_two = {"optim/grad_norm": norm} if run.ranks == 2 else {}
        return result_of(run, rows_of(run, **on_two))

    monkeypatch.setattr(check_gpu, "make_run", made_up)
    monkeypatch.setattr(check_gpu, "checks_of_checkpoint", lambda result, out: [])
    with pytest.raises(SystemExit) as stop:
        check_gpu.main(["--cpu", "--out", str(tmp_path / "out")])
    assert stop.value.code == status
    written = (tmp_path / "out/report.md").read_text()
    printed = capsys.readouterr().out
    assert written in printed
    assert written.startswith(f"### check_gpu: {'FAIL' if status else 'PASS'} on CPU ranks (")
    assert ("FAIL      gradient norm of SFT" in printed) == bool(status)
    assert len(written.split("| run ")[1].splitlines()) == 2 + len(RUNS)


def test_the_report_shows_the_log_of_a_run_that_failed():
    broken = result_of(HPT, failure="it died", log="first\n\x1b[2Jlast")
    checks = [Check("1 rank", False, "it died", "a run that comes to its end")]
    lines = check_gpu.report_lines(checks, [broken], [], "GPU")
    assert lines[0] == "### check_gpu: FAIL on GPU ranks (0 PASS, 1 FAIL, 0 LEFT OUT)"
    assert lines[-4:] == ["```", "first", r"\x1b[2Jlast", "```"]


@no_gpu
def test_one_cpu_rank_for_real(tmp_path):
    command = [sys.executable, "-m", "tools.check_gpu", "--cpu", "--ranks", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        cwd=Path(check_gpu.__file__).parents[1],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    words = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("PASS", "L"))]
    assert words.count("PASS") == 3 + 7 and words.count("LEFT") == 4
    rows = report.read_jsonl(tmp_path / "out/1-rank/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_without_a_gpu_only_the_versions_are_looked_at():
    args = Namespace(cpu=True, ranks=2)
    assert [check.name for check in check_gpu.machine_checks([], args)] == [
        "torch",
        "vllm",
        "transformers",
    ]
