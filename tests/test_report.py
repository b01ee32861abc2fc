"""Statistics against brute force and hand-made numbers; what a run writes, on ready-made files."""

import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest

from common import curves, flags, report
from common.report import Score
from common.step_table import StepTable

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
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert report.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_not_the_biased_estimate():
    biased = 1 - (1 - 2 / 4) ** 2
    assert report.pass_at_k(4, 2, 2) != pytest.approx(biased)


def test_standard_error_uses_the_sample_standard_deviation():
    values = [0.0, 0.25, 1.0, 0.5]
    mean, error = report.mean_and_error(values)
    assert mean == statistics.fmean(values)
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert error != pytest.approx(statistics.pstdev(values) / 2)  # negative control


def test_a_single_value_has_no_standard_error():
    mean, error = report.mean_and_error([0.5])
    assert mean == 0.5
    assert math.isnan(error)


def test_levels_are_sorted_as_numbers_and_all_comes_last():
    results = [result(0, level=level) for level in (10, 2, 2)]
    groups = report.by_level(results)
    assert list(groups) == [2, 10, "all"]
    assert [len(group) for group in groups.values()] == [2, 1, 3]


def test_a_problem_without_level_is_only_in_all():
    results = [result(0), result(1, level="easy")]
    assert report.by_level(results) == {"easy": [results[1]], "all": results}


def test_summary_by_hand():
    results = [
        result(4, lengths=[1, 2, 3, 4], truncated=1),
        result(0, lengths=[1, 2, 3, 0]),
        result(2, lengths=[1, 2, 3, 2]),
    ]
    numbers = report.summary(results)
    accuracies = [name for name in numbers if "@" in name]
    assert accuracies == ["avg@4", "pass@1", "pass@2", "pass@3", "pass@4"]
    assert (numbers["problems"], numbers["samples"]) == (3, 4)
    assert numbers["avg@4"] == numbers["pass@1"]
    assert numbers["avg@4"].mean == pytest.approx(0.5)
    assert numbers["pass@3"].mean == pytest.approx((1 + 0 + report.pass_at_k(4, 2, 3)) / 3)
    assert numbers["pass@4"].mean == pytest.approx(2 / 3)
    assert numbers["truncated"] == 1 / 12
    assert numbers["length/mean"] == 2
    assert numbers["length/median"] == 2
    assert numbers["length/max"] == 4


def test_held_out_metrics_are_the_means_of_a_summary():
    results = [result(c, samples=2) for c in (1, 0, 2, 2)]
    metrics = report.held_out_metrics(results)
    assert metrics == {"eval/avg@2": 0.625, "eval/pass@1": 0.625, "eval/pass@2": 0.75}


def test_half_of_the_samples_right_is_not_solved():
    assert not report.is_solved(result(2))
    assert report.is_solved(result(3))


def test_exclusive_solves_count_both_directions():
    a = [result(c) for c in (4, 3, 0, 2, 4, 4)]
    b = [result(c) for c in (4, 1, 3, 3, 0, 0)]
    assert report.exclusive_solves(a, b) == (3, 2)


def test_a_comparison_is_the_first_minus_the_second():
    numbers = report.compare_results([result(4), result(3)], [result(1), result(3)])
    assert numbers["problems"] == 2
    assert (numbers["a"], numbers["b"]) == (7 / 8, 4 / 8)
    assert numbers["difference"] == 3 / 8
    assert numbers["exclusive"] == (1, 0)


def test_the_interval_of_equal_differences_is_a_point():
    assert report.bootstrap_interval(numpy.array([0.5] * 5)) == (0.5, 0.5)


def test_one_problem_has_no_interval():
    assert all(map(math.isnan, report.bootstrap_interval(numpy.array([0.5]))))


def test_the_interval_is_seeded():
    """The numbers of this seed; seed 1 would give (-0.1443, 0.3600)."""
    differences = numpy.array([0.0, 0.3, -0.5, 0.25, 0.7, 0.11, -0.06])
    expected = pytest.approx((-0.14, 0.36428571428571427), abs=1e-12)
    assert report.bootstrap_interval(differences) == expected
    assert report.bootstrap_interval(differences) == expected  # and it does so each time


def test_the_interval_has_the_width_of_the_normal_approximation():
    values = numpy.random.default_rng(1).normal(size=400)
    low, high = report.bootstrap_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)


def test_the_interval_of_a_comparison_is_paired():
    """Two runs that differ by nearly the same on every problem, easy or hard."""
    rng = random.Random(0)
    base = [rng.choice((0, 60)) for _ in range(400)]
    better = [correct + rng.choice((2, 4)) for correct in base]
    a = [result(correct, samples=64) for correct in better]
    b = [result(correct, samples=64) for correct in base]
    low, high = report.compare_results(a, b)["interval"]
    paired, unpaired = 1.96 / 64 / 20, 1.96 * 30 / 64 * math.sqrt(2) / 20
    assert (high - low) / 2 == pytest.approx(paired, rel=0.1)
    assert high - low < unpaired / 5  # negative control


# -------------------------------------------------------------------------------------------- files


def test_a_directory_that_exists_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"error: --out .* cannot be made: File exists"):
        report.make_directory(tmp_path)


def test_a_directory_may_exist_if_the_caller_says_so(tmp_path):
    assert report.make_directory(tmp_path, exist_ok=True) == tmp_path


def test_a_directory_is_made_with_its_parents(tmp_path):
    assert report.make_directory(str(tmp_path / "a/b")) == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir()


def test_the_commit_is_that_of_the_repository():
    command = ["git", "-C", str(report.REPOSITORY), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    assert report.versions_and_commit()["commit"] == done.stdout.strip()


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.versions_and_commit()["commit"] is None


def test_versions_name_what_decides_a_number():
    versions = report.versions_and_commit()["versions"]
    assert {"python", "vllm", "torch", "transformers", "math-verify", "sympy"} <= versions.keys()


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":\n')
    with pytest.raises(SystemExit, match=r"error: .*rows.jsonl:3 cannot be read"):
        report.read_jsonl(path)


def test_results_are_appended_with_more_fields_in_front(tmp_path):
    path = tmp_path / "held_out.jsonl"
    report.write_results(path, [{"prompt": "a"}], step=0)
    report.write_results(path, [{"prompt": "b"}], step=2)
    assert path.read_text() == '{"step": 0, "prompt": "a"}\n{"step": 2, "prompt": "b"}\n'


def test_a_markdown_table_is_aligned():
    lines = report.markdown_table([["name", "n"], ["a", 100], ["long name", 1]])
    assert lines == [
        "| name      |   n |",
        "|-----------|----:|",
        "| a         | 100 |",
        "| long name |   1 |",
    ]


# ------------------------------------------------------------------------------------- training run


def test_metrics_that_are_not_finite_are_null_in_the_file_and_visible_in_the_line(tmp_path, capsys):
    metrics = {"step": 12, "reward/mean": 0.25, "sft/nll": math.nan, "loss/rl": -math.inf}
    report.log(tmp_path, metrics, StepTable(60))
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 12, "reward/mean": 0.25, "sft/nll": null, "loss/rl": null}\n'
    )
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[:5] == ["12/60", "0.250", "-", "-", "nan"]


def test_every_step_has_a_line_and_a_run_has_one_header(tmp_path, capsys):
    table = StepTable(2)
    for step in (0, 1, 2):
        report.log(tmp_path, {"step": step}, table)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "0/2", "1/2", "2/2"]
    assert len(report.read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_other_ranks_log_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "rank", lambda: 1)
    report.log(tmp_path, {"step": 1, "reward/mean": 0.5}, StepTable(1))
    report.log_samples(tmp_path, 1, [a_prompt()])
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def a_prompt(rewards=(1.0, 0.0), alpha=1.0, beta=0.0):
    """A stand-in for train_hpt.Prompt."""
    rollouts = [SimpleNamespace(text=f"text {i}") for i in range(len(rewards))]
    problem = {"prompt": "1+1", "answer": "2", "prompt_ids": [5], "demonstration": "two"}
    return SimpleNamespace(
        problem=problem, rollouts=rollouts, rewards=list(rewards), alpha=alpha, beta=beta
    )


def test_samples_show_the_first_rollout_of_three_prompts(tmp_path):
    report.log_samples(tmp_path, 7, [a_prompt()] * 5)
    rows = report.read_jsonl(tmp_path / "samples.jsonl")
    assert len(rows) == 3
    assert rows[0] == {
        "step": 7,
        "prompt": "1+1",
        "answer": "2",
        "response": "text 0",
        "reward": 1.0,
        "P": 0.5,
        "trained_on": "rollouts",
    }


@pytest.mark.parametrize(
    "alpha, beta, trained_on",
    [(1, 0, "rollouts"), (0, 1, "demonstration"), (0.5, 0.5, "rollouts and demonstration")],
)
def test_samples_say_what_the_gate_chose(tmp_path, alpha, beta, trained_on):
    report.log_samples(tmp_path, 1, [a_prompt(alpha=alpha, beta=beta)])
    assert report.read_jsonl(tmp_path / "samples.jsonl")[0]["trained_on"] == trained_on


def test_samples_of_a_method_without_rollouts(tmp_path):
    report.log_samples(tmp_path, 1, [a_prompt(rewards=(), alpha=0, beta=1)])
    row = report.read_jsonl(tmp_path / "samples.jsonl")[0]
    assert row == {"step": 1, "prompt": "1+1", "answer": "2", "trained_on": "demonstration"}


def flags_of_a_run(**more):
    values = {
        "method": "hpt",
        "model": "models/base",
        "data": "train.jsonl",
        "steps": 60,
        "prompts_per_step": 32,
        "minibatches_per_step": 2,
        "tokens_per_microbatch": 2048,
        "temperature": 1.0,
        "seed": 0,
        "out": None,
        "resume": False,
        "eval_data": "held_out.jsonl",
        "eval_columns": None,
        "columns": None,
        "template": "chat",
        "reward": "reward:grade",
        "trust_remote_code": False,
        "system_prompt": flags.SYSTEM,
        "max_response_tokens": 8192,
    }
    return SimpleNamespace(**(values | more))


def print_a_plan(problems, held_out):
    report.print_plan(
        flags_of_a_run(),
        "runs/x",
        parameters=500_000_000,
        memory=["8 GB of memory"],
        tokenizer=SimpleNamespace(decode=lambda ids: "\n".join(str(i) for i in ids)),
        problems=problems,
        left_out="3 left out",
        held_out=held_out,
        held_out_left_out="none left out",
        n=8,
    )


def test_the_plan_of_a_run(capsys, monkeypatch):
    monkeypatch.setattr(report, "world_size", lambda: 2)
    print_a_plan([{"prompt_ids": [1, 2], "demo_ids": [3]}], [{}])
    assert capsys.readouterr().out == (
        "\n"
        "hpt on models/base: 500.0 M parameters, 2 ranks\n"
        "8 GB of memory\n"
        "1 problems from train.jsonl (3 left out); 1 held out (none left out)\n"
        "60 steps of 32 prompts x 8 rollouts, 2 optimizer steps each; "
        "micro-batches of 2048 tokens per rank\n"
        "writing to runs/x\n"
        "\n"
        "the first problem, as the model sees it, and its demonstration:\n"
        "'1\\n2'\n"
        "'3'\n"
        "\n"
    )


@pytest.mark.parametrize(
    "method, n, is_said",
    [("hpt", 1, True), ("hpt_off", 1, True), ("hpt", 2, False), ("sft", 0, False)],
)
def test_the_plan_says_what_one_rollout_per_prompt_means(capsys, method, n, is_said):
    assert bool(report._note_on_single_rollouts(flags_of_a_run(method=method), n)) == is_said


def test_the_plan_without_held_out_problems_and_demonstrations(capsys):
    print_a_plan([{"prompt_ids": [1, 2]}], [])
    printed = capsys.readouterr().out
    assert "500.0 M parameters, 1 rank\n" in printed
    assert "(3 left out); 0 held out\n" in printed
    assert printed.endswith("as the model sees it:\n'1\\n2'\n\n")


@pytest.fixture
def one_process(monkeypatch):
    """torch.distributed as a job of one process has it."""
    import torch.distributed as dist

    monkeypatch.setattr(dist, "broadcast_object_list", lambda message: None)


def test_a_run_has_a_directory_with_its_flags(tmp_path, one_process):
    args = flags_of_a_run(out=str(tmp_path / "run"), clip_eps=math.inf)
    assert report.open_run(args) == tmp_path / "run"
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["flags"] == vars(args)
    assert config["ranks"] == 1
    assert config.keys() == {"flags", "ranks", "versions", "commit"}


def test_a_run_without_out_is_named_by_method_model_seed_and_time(
    tmp_path, one_process, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name = report.open_run(flags_of_a_run(seed=3)).name
    assert name.startswith("hpt-base-seed3-20")


def test_runs_that_begin_in_the_same_second_have_directories_of_their_own(
    tmp_path, one_process, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report.time, "strftime", lambda form: "NOW")
    names = [report.open_run(flags_of_a_run(seed=3)).name for _ in range(3)]
    first = "hpt-base-seed3-NOW"
    assert names == [first, f"{first}-2", f"{first}-3"]
    assert all((tmp_path / "runs" / name / "config.json").is_file() for name in names)


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    assert "commit" in report.versions_and_commit()
    monkeypatch.setenv("PATH", str(tmp_path))  # an empty folder
    assert report.versions_and_commit()["commit"] is None


@pytest.fixture
def finished_run(tmp_path):
    """A directory as six steps of training leave it, with evaluations at 0, 3 and 6."""
    rewards, gated = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7], [1.0, 0.75, 0.5, 0.5, 0.25, 0.0]
    rows = [{"step": 0, "eval/pass@1": 0.3}]
    for step, (reward, share) in enumerate(zip(rewards, gated), 1):
        rows.append({"step": step, "hpt/sft_frac": share, "reward/mean": reward})
    write_lines(tmp_path / "metrics.jsonl", rows)
    for step, correct in ((0, (4, 2, 0)), (3, (0, 0, 0)), (6, (4, 4, 2))):
        results = [result(c, level=level) for c, level in zip(correct, (1, 1, 2), strict=True)]
        report.write_results(tmp_path / "held_out.jsonl", results, step=step)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_the_closing_table_compares_the_first_and_the_last_evaluation(finished_run, capsys):
    report.closing_table(finished_run, flags_of_a_run(temperature=1.0))
    printed = capsys.readouterr().out
    assert printed.startswith(
        "\nheld-out accuracy, %, mean of 4 samples at temperature 1, "
        "+- one standard error over problems\n"
        "   level  problems         before          after\n"
        "       1         2    75.0 +-25.0   100.0 +- 0.0\n"
        "       2         1     0.0 +- nan    50.0 +- nan\n"
        "     all         3    50.0 +-28.9    83.3 +-16.7\n"
        "\n"
    )


def test_the_end_says_in_sentences_what_has_changed(finished_run, capsys):
    report.closing_table(finished_run, flags_of_a_run())
    sentences = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert sentences == [
        "Held-out accuracy did not clearly change: it went from 50.0 +- 28.9 % to 83.3 +- 16.7 %.",
        "From the first 3 steps to the last 3, the mean reward went from 0.100 to 0.500, "
        "and the gated share from 0.750 to 0.250.",
    ]


def evaluations(before, after):
    """Lines of held_out.jsonl; a number is how many of 4 samples are right."""
    rows = [result(correct) | {"step": 0} for correct in before]
    return rows + [result(correct) | {"step": 9} for correct in after]


@pytest.mark.parametrize(
    "before, after, verb",
    [
        ([0, 0, 4, 4], [1, 1, 4, 4], "did not clearly change: it went"),  # 1.7 of its errors
        ([0, 0, 4, 3], [1, 1, 4, 4], "rose"),  # 3 of its errors, though less than either one's
        ([1, 1, 4, 4], [0, 0, 4, 3], "fell"),
        ([2, 3], [2, 3], "did not clearly change: it went"),
        ([0], [4], "did not clearly change: it went"),  # one problem has no error
    ],
)
def test_a_change_is_called_one_if_it_is_more_than_two_of_its_errors(before, after, verb):
    sentence = report._accuracy_sentence(evaluations(before, after))
    assert sentence.startswith(f"Held-out accuracy {verb} from ")


@pytest.mark.parametrize("steps, words", [(1, None), (2, "From the first step to the last, ")])
def test_a_short_run_has_a_first_and_a_last_step_or_no_trend(steps, words):
    metrics = {"reward/mean": [(step, step / 4) for step in range(1, steps + 1)]}
    found = report._trend_sentences(metrics)
    assert found == ([f"{words}the mean reward went from 0.250 to 0.500."] if words else [])


def test_the_trend_of_a_method_without_rollouts_is_its_loss():
    metrics = {"sft/nll": [(step, 1 / step) for step in (1, 2, 4, 5)], "hpt/offline_ratio": []}
    assert report._trend_sentences(metrics) == [
        "From the first 2 steps to the last 2, "
        "the loss per token of the demonstrations went from 0.750 to 0.225."
    ]


def test_the_closing_table_lists_the_files_that_exist(finished_run, capsys):
    report.closing_table(finished_run, flags_of_a_run())
    listed = capsys.readouterr().out.split(f"written to {finished_run}:\n")[1].split("\n\n")[0]
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == ["metrics.jsonl", "held_out.jsonl", "curves.png", "config.json"]
    assert (finished_run / "curves.png").read_bytes()[:8] == PNG


def test_the_last_lines_are_commands(finished_run, capsys):
    report.closing_table(finished_run, flags_of_a_run())
    last = capsys.readouterr().out.split("next:\n")[1].splitlines()
    assert 2 <= len(last) <= 3 and f"--model {finished_run / 'final'}" in last[0]


def test_curves_that_cannot_be_drawn_are_a_warning(finished_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    report.closing_table(finished_run, flags_of_a_run())
    printed = capsys.readouterr()
    assert printed.err == (
        "warning: no curves.png: curves need matplotlib: pip install matplotlib\n"
    )
    assert "\nnext:\n" in printed.out


def test_other_ranks_print_no_closing_table(finished_run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    report.closing_table(finished_run, flags_of_a_run())
    assert capsys.readouterr().out == ""
    assert not (finished_run / "curves.png").exists()


def test_a_run_without_held_out_problems_closes_with_its_files(tmp_path, capsys):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "hpt/offline_ratio": 0.25}])
    report.closing_table(tmp_path, flags_of_a_run())
    printed = capsys.readouterr().out
    assert printed.startswith(f"\nwritten to {tmp_path}:\n  metrics.jsonl ")
    assert "held-out" not in printed and "Held-out" not in printed


# ------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "no metrics.jsonl there"),
        ("", "no step in it yet"),
        ("[1]\n", "metrics.jsonl:1: no metrics of a step"),
        ('{"step": "1"}\n', "metrics.jsonl:1: no metrics of a step"),
        ('{"step": 1}\n{"step": 2, "x": "high"}\n', "metrics.jsonl:2: x is no number"),
        ('{"step": 1, "x": [1]}\n', "metrics.jsonl:1: x is no number"),
        ('{"step": 1}\n{\n', "metrics.jsonl:2 cannot be read"),
    ],
)
def test_a_directory_without_readable_metrics(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=sentence):
        report.read_metrics(tmp_path)


def test_metrics_are_read_as_points_and_null_is_left_out(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "x": 0.5}, {"step": 2, "x": None}])
    assert report.read_metrics(tmp_path) == {"step": [(1, 1), (2, 2)], "x": [(1, 0.5)]}


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


def test_curves_are_drawn_for_the_metrics_that_a_run_has(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "_draw_panel", lambda axis, name, *rest: drawn.append(name))
    runs = {"a": [{"reward/mean": [(1, 0.5)]}], "b": [{"sft/nll": [(1, 2.0)], "step": [(1, 1)]}]}
    curves.plot(runs, tmp_path / "a.png")
    assert drawn == ["reward/mean", "sft/nll"]
    assert (tmp_path / "a.png").read_bytes()[:8] == PNG


def test_a_figure_that_cannot_be_written(tmp_path):
    with pytest.raises(SystemExit, match=r"a.xyz cannot be written"):
        curves.plot({"a": [{"reward/mean": [(1, 0.5)]}]}, tmp_path / "a.xyz")


def test_runs_with_the_same_name_are_labelled_by_their_paths():
    from tools import plot

    assert plot.labels(["x/a", "y/a", "y/b"]) == [("x/a", "x/a"), ("y/a", "y/a"), ("b", "y/b")]


def test_plot_draws_runs_into_one_file(tmp_path, capsys):
    from tools import plot

    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}])
    plot.main([str(tmp_path), "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes()[:8] == PNG
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}\n"
    for out in (tmp_path, "curves"):  # of neither the name would be that of the picture
        with pytest.raises(SystemExit):
            plot.main([str(tmp_path), "--out", str(out)])
        assert "name a file that ends in .png" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- evaluation


def scores_of(**scores):
    """Summaries of benchmarks, as far as their means need them."""
    return {name: {"all": {"pass@1": Score(*score)}} for name, score in scores.items()}


def test_the_mean_of_benchmarks_adds_their_errors_in_squares():
    means = report.means_over_benchmarks(scores_of(a=(0.2, 0.03), b=(0.6, 0.04)))
    assert means["mean"]["avg@n"].mean == pytest.approx(0.4)
    assert means["mean"]["avg@n"].error == pytest.approx(0.05 / 2)
    wrong = (math.hypot(0.03, 0.04) / math.sqrt(2), (0.03 + 0.04) / 2)  # negative controls
    for error in wrong:
        assert means["mean"]["avg@n"].error != pytest.approx(error)


def test_benchmarks_out_of_distribution_have_a_mean_of_their_own():
    summaries = scores_of(amc=(0.2, 0), ARC_C=(0.9, 0), math=(0.4, 0), gpqa=(0.7, 0))
    means = report.means_over_benchmarks(summaries)
    assert means["mean"]["benchmarks"] == ["amc", "math"]
    assert means["mean"]["avg@n"].mean == pytest.approx(0.3)
    assert means["mean, out of distribution"]["benchmarks"] == ["ARC_C", "gpqa"]
    assert means["mean, out of distribution"]["avg@n"].mean == pytest.approx(0.8)


def test_a_name_that_only_resembles_arc_c_is_not_out_of_distribution():
    means = report.means_over_benchmarks(scores_of(arcade=(0.2, 0), math=(0.4, 0)))
    assert means["mean"]["benchmarks"] == ["arcade", "math"]


def test_a_single_benchmark_has_no_mean():
    assert report.means_over_benchmarks(scores_of(math=(0.2, 0), gpqa=(0.4, 0))) == {}


RESULTS = {
    "amc23": [
        result(2, samples=2, lengths=[10, 20], truncated=1, prompt="a"),
        result(1, samples=2, lengths=[30, 40], prompt="b"),
    ],
    "mine": [
        result(1, samples=1, level=1, lengths=[5], prompt="c"),
        result(0, samples=1, level=2, lengths=[6], prompt="d"),
        result(0, samples=1, level=2, lengths=[6], prompt="e"),
    ],
}


@pytest.fixture
def table(tmp_path, capsys):
    """(directory, what was printed) of a ready-made evaluation."""
    settings = {"model": "m", "rope_theta": None, "versions": {"vllm": "1", "torch": "2"}}
    report.evaluation_table(tmp_path, settings, RESULTS, {"amc23": 3, "mine": 0})
    return tmp_path, capsys.readouterr().out


def test_the_rows_of_an_evaluation_by_hand(table):
    _, printed = table
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    head = ["benchmark", "problems", "n", "avg@n, %", "pass@2, %", "truncated, %", "tokens"]
    assert rows == [
        [*head, "timeouts"],
        ["amc23", "2", "2", "75.0 ± 25.0", "100.0 ± 0.0", "25.0", "25.0", "3"],
        ["mine, level 1", "1", "1", "100.0 ± nan", "", "0.0", "5.0", ""],
        ["mine, level 2", "2", "1", "0.0 ± 0.0", "", "0.0", "6.0", ""],
        ["mine", "3", "1", "33.3 ± 33.3", "", "0.0", "5.7", "0"],
        ["mean of 2", "", "", "54.2 ± 20.8", "", "", "", ""],
    ]


def test_the_settings_stand_above_the_table(table):
    _, printed = table
    above = printed.split("| benchmark")[0]
    assert "- model: m\n- versions: vllm 1; torch 2\n" in above  # rope_theta has no value


def test_the_table_in_the_file_is_the_printed_one(table):
    out, printed = table
    assert (out / "table.md").read_text() in printed


def test_results_json_holds_the_numbers_of_the_table(table):
    out, _ = table
    written = json.loads((out / "results.json").read_text())
    assert written.keys() == {"settings", "commit", "results"}
    numbers = written["results"]
    assert numbers.keys() == {"amc23", "mine", "mean"}
    assert numbers["amc23"]["avg@2"] == [0.75, 0.25]
    assert numbers["amc23"]["timeouts"] == 3
    assert numbers["mine"]["levels"].keys() == {"1", "2"}
    assert numbers["mean"]["benchmarks"] == ["amc23", "mine"]


def test_results_json_has_null_for_an_error_that_does_not_exist(table):
    out, _ = table
    text = (out / "results.json").read_text()
    numbers = json.loads(text, parse_constant=lambda name: pytest.fail(name))["results"]
    assert numbers["mine"]["levels"]["1"]["avg@1"] == [1.0, None]


def test_results_jsonl_holds_every_problem_once_after_a_second_report(table):
    out, _ = table
    report.evaluation_table(out, {}, RESULTS, {"amc23": 0, "mine": 0})
    rows = report.read_jsonl(out / "results.jsonl")
    assert [(row["benchmark"], row["prompt"]) for row in rows] == [
        ("amc23", "a"),
        ("amc23", "b"),
        ("mine", "c"),
        ("mine", "d"),
        ("mine", "e"),
    ]
    assert rows[0] == {"benchmark": "amc23"} | RESULTS["amc23"][0]
