"""tools/compare.py: its table on ready-made runs, its command lines, and one tiny real run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import flags, report
from tools import compare

EVERY_ARM = [(name, label) for name, task in compare.TASKS.items() for label in task.arms]


def write_run(out, before, after, *steps):
    """A finished run: its accuracies, and the metrics of its steps."""
    (out / "final").mkdir(parents=True)
    rows = [{"step": 0, "eval/pass@1": before}]
    rows += [{"step": i, "time/step": 2.0} | metrics for i, metrics in enumerate(steps, 1)]
    rows[-1]["eval/pass@1"] = after
    report.append_jsonl(out / "metrics.jsonl", rows)
    held_out = [{"prompt": "1+1", "level": 1, "samples": 4, "correct": round(4 * after)}]
    held_out.append({"prompt": "2+2", "level": 2, "samples": 4, "correct": round(4 * after)})
    report.write_results(out / "held_out.jsonl", held_out, step=len(steps))
    (out / "config.json").write_text("{}")


@pytest.fixture
def folder(tmp_path):
    """Two seeds of SFT, one of SFT -> GRPO, one of HPT that is not finished."""
    seconds = {"time/rollout": 0.5, "time/train": 1.5, "perf/train_tokens_per_sec": 4e6}
    sft = {"data/rollouts": 0, "data/demo_tokens": 100} | seconds
    write_run(compare.directory(tmp_path, "SFT", 0), 0.25, 0.5, sft, sft)
    write_run(compare.directory(tmp_path, "SFT", 1), 0.25, 0.75, sft, sft)
    grpo = {"data/rollouts": 8, "data/demo_tokens": 0, "reward/mean": 0.5, "hpt/sft_frac": 0.25}
    grpo |= {"perf/rollout_tokens_per_sec": 6e6, "time/rollout": 0.5}
    grpo |= {"perf/train_tokens_per_sec": 1e6, "time/train": 2.0}
    write_run(compare.directory(tmp_path, "SFT -> GRPO", 0), 0.5, 1.0, grpo)
    write_run(compare.directory(tmp_path, "HPT", 0), 0.25, 1.0, grpo)
    (compare.directory(tmp_path, "HPT", 0) / "final").rmdir()
    return tmp_path


def cells(text):
    """The rows of each table, without the line under its head."""
    tables = [part.splitlines() for part in text.strip().split("\n\n")]
    return [
        [[cell.strip() for cell in line.split("|")[1:-1]] for i, line in enumerate(lines) if i != 1]
        for lines in tables
    ]


def test_the_tables_by_hand(folder, capsys):
    """An arm that starts from another one's model costs both."""
    compare.main(["--report", "--against", "SFT", "--out", str(folder)])
    text = (folder / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    arms, levels, differences = cells(text)
    million = ["200", "0.00", "12.00", "72.00", "4"]
    assert arms[1] == ["SFT", "2", "2", "25.0 ± 0.0", "62.5 ± 17.7", "", "", *million]
    million = ["200", "3.00", "14.00", "90.00", "6"]
    assert arms[2] == ["SFT -> GRPO", "1", "1", "50.0", "100.0", "0.25", "0.50", *million]
    assert levels == [
        ["held out, % at level", "1", "2", "all"],
        ["SFT", *["62.5 ± 17.7"] * 3],
        ["SFT -> GRPO", "100.0", "100.0", "100.0"],
    ]
    assert differences[1:] == [["SFT -> GRPO", "1", "+50.0", "+50.0 to +50.0"]]
    assert (folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_the_interval_has_the_spread_of_seeds_and_of_problems():
    rng = np.random.default_rng(1)
    of_problem, of_seed = rng.normal(0, 3, (1, 400)), rng.normal(0, 1, (50, 1))
    mean, low, high = compare.bootstrap(2 + of_problem + of_seed)
    assert mean == pytest.approx(2 + of_problem.mean() + of_seed.mean())
    error = np.hypot(of_problem.std() / 400**0.5, of_seed.std() / 50**0.5)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.06)
    assert np.ptp(compare.bootstrap(np.full((3, 4), 0.5))) == 0


def test_the_norms_of_the_probes_by_hand():
    def probe(step, rl, sft):
        return {"probe/rl_norm": [(step, rl)], "probe/sft_norm": [(step, sft)]}

    both = {name: probe(1, 1.0, 2.0)[name] + probe(2, 3.0, 4.0)[name] for name in probe(1, 1, 1)}
    both["probe/sft_norm"].insert(0, (0, 9.0))  # no rollout had a signal in this step
    assert compare.norm_row("HPT", [both, probe(5, 5.0, 6.0), {}]) == [
        *("HPT", "3.0000", "4.0000"),
        *("3.0000", "4.0000"),
    ]
    assert compare.norm_row("SFT", [{}]) == []


def test_without_a_finished_run_there_is_no_report(folder):
    with pytest.raises(SystemExit, match=r"error: no run in .* is finished"):
        compare.main(["--report", "--only", "HPT", "--out", str(folder)])


@pytest.fixture
def commands(monkeypatch):
    """The directories of the runs that would be trained; each is finished at once."""
    trained = []

    def run(words, log):
        out = Path(words[words.index("--out") + 1])
        trained.append(out.name)
        write_run(out, 0.25, 0.5, {"data/rollouts": 1, "data/demo_tokens": 1})

    monkeypatch.setattr(compare, "run", run)
    return trained


def test_what_is_missing_is_run_parents_first(folder, commands):
    compare.main(["--only", "SFT -> GRPO", "--seeds", "0", "1", "--out", str(folder)])
    assert commands == ["sft-then-grpo-seed1"]  # all others are finished
    compare.main(["--only", "SFT -> GRPO", "--seeds", "1", "2", "--out", str(folder)])
    assert commands[1:] == ["sft-seed2", "sft-then-grpo-seed2"]


def test_longer_sums_are_written_first(commands, tmp_path):
    words = ["--only", "SFT", "HPT", "--seeds", "7", "--out", str(tmp_path)]
    compare.main(["--task", "longer-sums", *words])
    assert commands == ["sft-seed7", "hpt-seed7"]
    assert len(report.read_jsonl(tmp_path / "train.jsonl")) == 700
    rows = report.read_jsonl(tmp_path / "held_out.jsonl")
    assert {row["level"] for row in rows} == set(range(3, 10))


def parsed(task, label, *more):
    """The flags of train_hpt.py that an arm's command line gives."""
    args = compare.parse_args(["--task", task, *more])
    words = compare.command(args, Path("/no/such folder"), label, 2)
    script = words.index(str(report.REPOSITORY / "train_hpt.py"))
    return flags.parse_training_args(words[script + 1 :])


@pytest.mark.parametrize("task, label", EVERY_ARM)
def test_every_arm_is_a_command_that_the_program_takes(task, label):
    args = parsed(task, label)
    arms = compare.TASKS[task].arms
    assert f"--method {args.method}" in arms[label].flags
    assert (args.seed, args.resume) == (2, True)
    assert args.out == str(compare.directory(Path("/no/such folder"), label, 2))
    labels = list(arms)
    parent = arms[label].parent
    assert parent is None or labels.index(parent) < labels.index(label)


def test_flags_of_an_arm_come_after_those_of_the_task_and_of_the_recipe():
    assert (parsed("toy", "HPT").steps, parsed("toy", "HPT").lr) == (30, 1e-4)
    assert parsed("toy", "HPT, gamma 1/8", "--steps", "3").steps == 3
    assert parsed("toy", "SFT -> GRPO").model == "/no/such folder/sft-seed2/final"
    words = ("word-problems", "SFT 10 -> HPT 10", "--model", "mine")
    assert parsed(*words).model == "/no/such folder/sft-10-steps-seed2/final"
    assert parsed("word-problems", "HPT", *words[2:]).model == "mine"
    assert (parsed(*words).lr, parsed("word-problems", "HPT").lr) == (1e-5, 5e-5)
    assert parsed("longer-sums", "HPT").data == "/no/such folder/train.jsonl"


def test_directories_of_all_runs_differ(tmp_path):
    for task in compare.TASKS.values():
        names = {compare.directory(tmp_path, label, seed) for label in task.arms for seed in (0, 1)}
        assert len(names) == 2 * len(task.arms)


def test_a_run_that_fails_names_its_log(tmp_path):
    with pytest.raises(SystemExit, match=r"error: a run failed, its output is in .*x.log"):
        compare.run([sys.executable, "-c", "print(7); exit(1)"], tmp_path / "x.log")
    assert (tmp_path / "x.log").read_text().splitlines()[-1] == "7"


@pytest.mark.slow
def test_a_tiny_comparison_with_the_real_program(tmp_path):
    command = [sys.executable, "-m", "tools.compare", "--only", "HPT", "--seeds", "0"]
    command += ["--steps", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=report.REPOSITORY, capture_output=True, text=True)
    logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    row = (tmp_path / "comparison.md").read_text().splitlines()[2]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:3] == ["HPT", "1", "1"] and float(cells[8]) > 0
    assert 15 < float(cells[3]) < 35  # the base's accuracy is 25 %
