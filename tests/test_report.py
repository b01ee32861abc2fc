"""Statistics against brute force and hand-made numbers; what a run writes, on ready-made files."""

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from common import closing, curves, metrics, report
from tools import plot

ROOT = report.REPOSITORY
PNG = b"\x89PNG\r\n\x1a\n"


def result(correct, samples=4, level=None, prompt="q", lengths=None, truncated=0):
    """A result as evaluate.measure makes it."""
    return {
        "prompt": prompt,
        "level": level,
        "samples": samples,
        "correct": correct,
        "lengths": lengths or [1] * samples,
        "truncated": truncated,
        "responses": ["r"] * samples,
    }


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert report.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    biased = 1 - (1 - 2 / 4) ** 2  # negative control
    assert report.pass_at_k(4, 2, 2) != pytest.approx(biased)


def test_standard_error_uses_the_sample_standard_deviation():
    values = [0.0, 0.25, 1.0, 0.5]
    mean, error = report.mean_and_error(values)
    assert mean == statistics.fmean(values)
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert error != pytest.approx(statistics.pstdev(values) / 2)  # negative control
    assert math.isnan(report.mean_and_error([0.5]).error)


def test_levels_are_sorted_as_numbers_and_all_comes_last():
    results = [result(0, level=level) for level in (10, 2, 2, 2.5, "easy", None)]
    groups = report.by_level(results)
    assert list(groups) == [2, 2.5, 10, "easy", "all"]
    assert [len(group) for group in groups.values()] == [2, 1, 1, 1, 6]


def test_summary_by_hand():
    results = [
        result(4, lengths=[1, 2, 3, 4], truncated=1),
        result(0, lengths=[1, 2, 3, 0]),
        result(2, lengths=[1, 2, 3, 2]),
    ]
    numbers = report.summary(results)
    accuracies = [name for name in numbers if "@" in name]
    assert accuracies == ["avg@4", "pass@1", "pass@2", "pass@3", "pass@4"]
    assert numbers["avg@4"] == numbers["pass@1"]
    assert numbers["avg@4"].mean == pytest.approx(0.5)
    assert numbers["pass@3"].mean == pytest.approx((1 + 0 + report.pass_at_k(4, 2, 3)) / 3)
    assert numbers["pass@4"].mean == pytest.approx(2 / 3)
    assert (numbers["problems"], numbers["samples"]) == (3, 4)
    assert (numbers["truncated"], numbers["length"]) == (1 / 12, 2)


def test_held_out_metrics_are_the_means_of_a_summary():
    results = [result(c, samples=2) for c in (1, 0, 2, 2)]
    assert report.held_out_metrics(results) == {
        "eval/avg@2": 0.625,
        "eval/pass@1": 0.625,
        "eval/pass@2": 0.75,
    }


def test_the_error_of_a_difference_is_paired():
    """Two runs that differ by nearly the same on every problem, easy or hard."""
    rng = random.Random(0)
    base = [rng.choice((0, 60)) for _ in range(400)]
    better = [correct + rng.choice((2, 4)) for correct in base]
    a, b = ([result(c, samples=64) for c in counts] for counts in (better, base))
    scores = report.compare_results(a, b)
    assert scores["difference"].mean == pytest.approx(scores["a"].mean - scores["b"].mean)
    assert scores["difference"].error == pytest.approx(1 / 64 / 20, rel=0.1)
    unpaired = math.hypot(scores["a"].error, scores["b"].error)  # negative control
    assert scores["difference"].error < unpaired / 5


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "text, line",
    [('{"step": 1}\n{"step":\n', 2), ('{"step": 1}\n[1]\n', 2), ('{"x": 1}\n', 1)],
)
def test_a_file_or_a_row_that_cannot_be_read_is_named(tmp_path, text, line):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(SystemExit, match=r"error: .*metrics.jsonl: no such file"):
        report.read_metrics(tmp_path)
    path.write_text(text)
    with pytest.raises(SystemExit, match=rf"error: .*metrics.jsonl:{line} cannot be read: "):
        report.read_metrics(tmp_path)
    path.write_text('{"step": 1}\n{"st')  # a program was killed while it wrote a line
    assert report.read_metrics(tmp_path) == {"step": [(1, 1)]}


def test_metrics_are_read_as_points_and_null_is_left_out(tmp_path):
    report.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "x": 0.5}, {"step": 2, "x": None}])
    assert report.read_metrics(tmp_path) == {"step": [(1, 1), (2, 2)], "x": [(1, 0.5)]}


def test_logs_are_cut_to_a_step(tmp_path):
    for name in report.LOGS:
        report.append_jsonl(tmp_path / name, [{"step": s, "x": 0.1} for s in (0, 1, 1, 2)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "x"')  # a kill
    report.append_jsonl(tmp_path / "mine.jsonl", [{"x": 1}])  # no file of the run
    report.cut_logs(tmp_path, 1)
    for name in report.LOGS:
        assert [row["step"] for row in report.read_jsonl(tmp_path / name)] == [0, 1, 1]
        assert (tmp_path / name).read_text().endswith("\n")
    report.cut_logs(tmp_path, -1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine.jsonl", *(f"{name}.old" for name in report.LOGS)}


def test_a_markdown_table_is_aligned_and_has_no_control_characters():
    assert report.markdown_table([["name", "n"], ["a|\x1b[31m", 100], ["long", 1]]) == [
        "| name        |   n |",
        "| ----------- | --: |",
        "| a\\|\\x1b[31m | 100 |",
        "| long        |   1 |",
    ]


# ------------------------------------------------------------------------------------ training runs


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """torch.distributed as a run of one process has it; no line was printed, no copy is open."""
    monkeypatch.setattr(report.dist, "broadcast_object_list", lambda message: None)
    monkeypatch.setattr(report, "_lines", itertools.count())
    monkeypatch.setattr(report, "_copies", [])
    monkeypatch.delenv("RANK", raising=False)


def flags_of_a_run(**more):
    values = {"method": "hpt", "model": "models/base", "data": "train.jsonl", "steps": 60}
    values |= {"prompts_per_step": 32, "minibatches_per_step": 2, "tokens_per_microbatch": 2048}
    values |= {"temperature": 1.0, "seed": 3, "out": None, "resume": False, "clip_eps": math.inf}
    values |= {"template": "chat", "date": "2026-11-29"}
    return SimpleNamespace(**(values | {"tensorboard": False, "wandb": None} | more))


def test_a_run_has_a_directory_with_its_flags(tmp_path, monkeypatch):
    args = flags_of_a_run(out=str(tmp_path / "a/run"))
    assert report.open_run(args) == tmp_path / "a/run"
    text = (tmp_path / "a/run/config.json").read_text()
    config = json.loads(text)
    assert config.keys() == {"flags", "ranks", "versions", "commit"}
    assert config["flags"] == vars(args) and config["ranks"] == 1
    assert {"python", "torch", "transformers", "sympy"} <= config["versions"].keys()
    with pytest.raises(SystemExit, match=r"error: --out .*run cannot be made: File exists"):
        report.open_run(args)
    report.open_run(flags_of_a_run(out=str(tmp_path / "a/run"), resume=True, seed=9))
    assert (tmp_path / "a/run/config.json").read_text() == text
    monkeypatch.chdir(tmp_path)
    assert report.open_run(flags_of_a_run()).name.startswith("hpt-base-seed3-20")


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.versions_and_commit()["commit"] is None


def test_the_plan_shows_the_first_problem_without_control_characters(capsys):
    report.print_plan(
        flags_of_a_run(),
        "runs/x",
        parameters=500_000_000,
        memory_lines=["8 GB of memory"],
        tokenizer=SimpleNamespace(decode=lambda ids: f"\x1b{ids}", chat_template=""),
        problems=[{"prompt_ids": [1, 2], "demo_ids": [3]}],
        left_out="3 left out",
        held_out=[],
        n=8,
    )
    printed = capsys.readouterr().out
    assert "hpt on models/base: 500.0 M parameters, 1 rank\n8 GB of memory\n" in printed
    assert "1 problems from train.jsonl, 0 held out (3 left out)\n" in printed
    assert printed.endswith("'\\x1b[1, 2]'\n'\\x1b[3]'\n\n")


STEP = {
    "step": 7,
    "reward/mean": 0.07421875,
    "hpt/sft_frac": 0.65625,
    "hpt/offline_ratio": 0.193,
    "sft/nll": 0.0664,
    "response_length/mean": 49.41,
    "policy/entropy": math.nan,
    "mismatch/kl": 8.03e-14,
    "optim/grad_norm": 0.0143,
    "perf/rollout_tokens_per_sec": 4210.4,
    "perf/train_tokens_per_sec": 9000.0,
    "time/step": 3.25,
}


def test_a_line_by_hand_and_null_in_the_file(tmp_path, capsys):
    report.log(tmp_path, STEP, 36)
    header, line = capsys.readouterr().out.splitlines()
    assert header == (
        "     step  reward  gated  offline    nll  length  entropy  mismatch     grad   tok/s"
        "     sec"
    )
    assert line == (
        "     7/36   0.074  0.656    0.193  0.066    49.4      nan   8.0e-14    0.014    4210"
        "     3.2"
    )
    assert len(line) == len(header)
    [row] = report.read_jsonl(tmp_path / "metrics.jsonl")
    assert row == STEP | {"policy/entropy": None} and list(row) == list(STEP)


def test_what_is_not_there_at_every_step_stands_at_the_end():
    def behind(**values):
        more = {name.replace("_", "/", 1): value for name, value in values.items()}
        return metrics.step_line(STEP | more, 36)[len(metrics.HEADER) :]

    assert behind(optim_skipped=0, critic_skipped=0) == ""
    assert behind(optim_skipped=1, critic_skipped=2) == "  3 skipped"
    assert behind(perf_train_tokens_per_sec=0) == "  nothing to train on"
    assert behind(**{"eval/pass@1": 0.98765}) == "  HELD-OUT ACCURACY 0.988"
    sft = metrics.step_line({"step": 1, "perf/train_tokens_per_sec": 123.4}, 36)
    assert sft.split() == ["1/36", *["-"] * 8, "123", "-"]


def test_the_header_comes_again_every_20_lines_and_other_ranks_print_none(
    tmp_path, capsys, monkeypatch
):
    for step in range(41):
        report.log(tmp_path, {"step": step}, 40)
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if "reward" in line] == [0, 21, 42]
    monkeypatch.setattr(report, "rank", lambda: 1)
    report.log(tmp_path, {"step": 1}, 40)
    assert (
        capsys.readouterr().out == "" and len(report.read_jsonl(tmp_path / "metrics.jsonl")) == 41
    )


def test_copies_have_the_names_and_values_of_metrics_jsonl(tmp_path, monkeypatch):
    """The packages are stand-ins. A resumed run goes on in the same run of W&B."""
    scalars, sent, started = [], [], []
    writer = SimpleNamespace(add_scalar=lambda *point: scalars.append(point), flush=lambda: None)
    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = lambda folder: writer

    def init(**settings):
        started.append((settings["id"], settings["resume"]))
        return SimpleNamespace(id="abc", log=lambda row, step: sent.append((row, step)))

    wandb = ModuleType("wandb")
    wandb.init, wandb.Settings = init, SimpleNamespace
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = flags_of_a_run(tensorboard=True, wandb="project")
    report.begin_copies(tmp_path, args)
    report.log(tmp_path, {"step": 4, "x": 0.5, "y": math.nan}, 9)
    assert scalars == [("step", 4, 4), ("x", 0.5, 4)]
    assert sent == [({"step": 4, "x": 0.5}, 4)]
    report.begin_copies(tmp_path, args)
    assert started == [(None, "allow"), ("abc", "allow")]


def test_samples_say_what_the_gate_chose(tmp_path):
    prompt = SimpleNamespace(
        problem={"prompt": "1+1", "answer": "2", "prompt_ids": [5], "demonstration": "two"},
        rollouts=[SimpleNamespace(text="text 0"), SimpleNamespace(text="text 1")],
        rewards=[1.0, 0.0],
        alpha=0.5,
        beta=0.5,
    )
    without_rollouts = {"rollouts": [], "rewards": [], "alpha": 0.0}
    sft = SimpleNamespace(**vars(prompt) | without_rollouts)
    report.log_samples(tmp_path, 7, [prompt, sft, prompt, prompt])
    rows = report.read_jsonl(tmp_path / "samples.jsonl")
    asked = {"step": 7, "prompt": "1+1", "answer": "2"}
    answered = {"response": "text 0", "reward": 1.0, "P": 0.5}
    assert rows[0] == asked | answered | {"trained_on": "rollouts and demonstration"}
    assert rows[1] == asked | {"trained_on": "demonstration"} and len(rows) == 3


def test_the_closing_table_compares_the_first_and_the_last_evaluation(
    tmp_path, capsys, monkeypatch
):
    report.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}])
    for step, correct in ((0, (4, 2, 0)), (3, (0, 0, 0)), (6, (4, 4, 2))):
        results = [result(c, level=level) for c, level in zip(correct, (1, 1, 2), strict=True)]
        report.write_results(tmp_path / "held_out.jsonl", results, step=step)
    monkeypatch.setenv("RANK", "1")
    closing.closing_report(tmp_path, flags_of_a_run())
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    closing.closing_report(tmp_path, flags_of_a_run())
    assert capsys.readouterr().out == (
        "\nheld-out accuracy at temperature 1, ± one standard error:\n"
        "| level | problems |   before, % |    after, % |\n"
        "| ----- | -------: | ----------: | ----------: |\n"
        "| 1     |        2 | 75.0 ± 25.0 | 100.0 ± 0.0 |\n"
        "| 2     |        1 |         0.0 |        50.0 |\n"
        "| all   |        3 | 50.0 ± 28.9 | 83.3 ± 16.7 |\n"
        "\n"
        "Held-out accuracy did not clearly change: it went from 50.0 ± 28.9 % to 83.3 ± 16.7 %.\n"
        "\n"
        "held-out questions, and the first response to each before and after:\n"
        + 3
        * "  q\n    before: r\n    after:  r\n"
        + "\n"
        f"written to {tmp_path}: curves.png, held_out.jsonl, metrics.jsonl\n"
    )
    assert (tmp_path / "curves.png").read_bytes()[:8] == PNG


def test_held_out_questions_are_shown_with_an_answer_before_and_after_on_a_line_each():
    def rows(text):
        return [result(1, prompt=f"q{i}\n") | {"responses": [f"{text} {i}", "?"]} for i in range(7)]

    before, after = rows("\x1b[31m " + 60 * "so " + "\\boxed{}"), rows("\tnow")
    title, *lines = closing.answers(before, after).strip().split("\n")
    assert lines[::3] == ["  q0", "  q3", "  q6"]
    assert lines[2::3] == ["    after:  now 0", "    after:  now 3", "    after:  now 6"]
    assert all(len(line) <= 100 and line.isprintable() for line in lines)
    assert lines[1].startswith("    before: ") and lines[1].endswith(" so so \\boxed{} 0")
    assert len(closing.answers(before[:1], after[:1]).strip().split("\n")) == 4


@pytest.mark.parametrize(
    "damage, sentence",
    [
        ("other problems", "The held-out problems have changed since step 0"),
        ("half a line in the middle", "warning: the closing table or a picture is left out"),
        ("no metrics", "warning: the closing table or a picture is left out"),
    ],
)
def test_the_last_thing_of_a_run_never_fails_it(tmp_path, capsys, damage, sentence):
    report.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}])
    for step, prompt in ((0, "a"), (6, "b" if damage == "other problems" else "a")):
        rows = [result(1) | {"prompt": prompt}]
        report.write_results(tmp_path / "held_out.jsonl", rows, step=step)
    if damage == "half a line in the middle":
        with open(tmp_path / "held_out.jsonl", "a") as file:
            file.write('{"step": 3\n{"step": 6}\n')
    if damage == "no metrics":
        (tmp_path / "metrics.jsonl").unlink()
    closing.closing_report(tmp_path, flags_of_a_run())
    out = capsys.readouterr().out
    assert sentence in out and f"written to {tmp_path}" in out


def test_a_run_goes_on_without_its_console(tmp_path):
    """`torchrun train_hpt.py | head`: the second line finds a pipe that nobody reads."""
    program = "from common import report; [report.say('x' * 9) for _ in range(9)]; print('end')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writing, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "before, after, verb",
    [
        ([0, 0, 4, 4], [1, 1, 4, 4], "did not clearly change: it went"),  # 1.7 of its errors
        ([0, 0, 4, 3], [1, 1, 4, 4], "rose"),  # 3 of its errors, though less than either one's
        ([1, 1, 4, 4], [0, 0, 4, 3], "fell"),
        ([0], [4], "did not clearly change: it went"),  # one problem has no error
    ],
)
def test_a_change_is_called_one_if_it_is_more_than_two_of_its_errors(before, after, verb):
    sentence = closing.accuracy_sentence([result(c) for c in before], [result(c) for c in after])
    assert sentence.startswith(f"Held-out accuracy {verb} from ")


# ------------------------------------------------------------------------------------------- curves


def test_a_line_is_the_mean_over_seeds_and_a_band_reaches_from_the_lowest_to_the_highest():
    from matplotlib import pyplot

    _, axis = pyplot.subplots()
    runs = {"one": [{"x": [(1, 5.0)]}], "two": [{"x": [(1, 1.0), (2, 2.0)]}, {"x": [(1, 3.0)]}]}
    curves._draw_panel(axis, "x", "title", runs)
    one, two = axis.lines
    assert list(one.get_ydata()) == [5.0] and list(two.get_ydata()) == [2.0, 2.0]
    assert one.get_color() != two.get_color()
    [band] = axis.collections  # a single run has none
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1.0, 3.0)
    pyplot.close("all")


def test_plot_draws_the_metrics_that_runs_have_and_names_runs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "_draw_panel", lambda axis, name, title, runs: drawn.append(name))
    for name in ("x/a", "y/a"):
        (tmp_path / name).mkdir(parents=True)
        report.append_jsonl(tmp_path / name / "metrics.jsonl", [{"step": 1, "sft/nll": 0.5}])
    named = []
    original = curves.plot
    monkeypatch.setattr(curves, "plot", lambda runs, out: named.append(list(runs)))
    plot.main([str(tmp_path / "x/a")])
    plot.main([str(tmp_path / "x/a"), str(tmp_path / "y/a")])
    assert named == [["a"], [str(tmp_path / "x/a"), str(tmp_path / "y/a")]]
    original({"a": [report.read_metrics(tmp_path / "x/a")]}, tmp_path / "a.png")
    assert drawn == ["sft/nll"] and (tmp_path / "a.png").read_bytes()[:8] == PNG


def test_the_gates_picture_has_a_row_per_level_and_a_column_per_step(tmp_path, monkeypatch):
    from matplotlib import pyplot

    def prompt(level, beta):
        return SimpleNamespace(problem={"level": level} if level else {}, beta=beta)

    report.log_gate(tmp_path, 1, [prompt(10, 1.0), prompt(2, 0.0), prompt(10, 0.0)])
    report.log_gate(tmp_path, 2, [prompt(2, 0.25)])
    rows = report.read_jsonl(tmp_path / "gate.jsonl")
    assert rows[0] == {"step": 1, "levels": [[2, 1, 0.0], [10, 2, 0.5], ["all", 3, 1 / 3]]}

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    path = tmp_path / "gate.png"
    curves.plot_gate(rows, [(1, 0.4), (2, 0.1)], path)
    above, below, _ = drawn[0].axes
    assert path.read_bytes()[:8] == PNG
    assert [tick.get_text() for tick in above.get_yticklabels()] == ["2", "10"]
    cells = above.images[0].get_array()
    assert cells.filled(-1).tolist() == [[0.0, 0.25], [0.5, -1]]
    assert below.lines[0].get_ydata().tolist() == [0.4, 0.1]

    report.cut_logs(tmp_path, 1)
    assert report.read_jsonl(tmp_path / "gate.jsonl") == rows[:1]
    report.log_gate(tmp_path, 3, [prompt(None, 1.0)])
    curves.plot_gate(report.read_jsonl(tmp_path / "gate.jsonl")[1:], [(3, 1.0)], path)
    assert [tick.get_text() for tick in drawn[1].axes[0].get_yticklabels()] == ["all"]
    monkeypatch.undo()
    pyplot.close("all")
