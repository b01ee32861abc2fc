"""tools/compare.py: its tables on ready-made runs, its command lines, and one tiny real run."""

import json
import subprocess
from pathlib import Path

import pytest

from common import flags, report
from tools import compare

HELD_OUT = [("1+1", 1), ("11111+11111", 5), ("111111+111111", 6)]  # (prompt, level)


def write_run(folder, evaluations, steps, number_of_steps=30, model="base"):
    """A finished run: evaluations is {step: right responses of 4, problem by problem}."""
    (folder / "final").mkdir(parents=True)
    (folder / "final/config.json").write_text("{}")
    config = {"flags": {"steps": number_of_steps, "model": model}}
    (folder / "config.json").write_text(json.dumps(config))
    for step, correct in evaluations.items():
        results = []
        for (prompt, level), count in zip(HELD_OUT, correct, strict=True):
            results.append({"prompt": prompt, "level": level, "samples": 4, "correct": count})
        report.write_results(folder / "held_out.jsonl", results, step=step)
    report.append_jsonl(folder / "metrics.jsonl", [{"step": 0, "eval/pass@1": 0.1}])
    for step, metrics in enumerate(steps, 1):
        report.append_jsonl(folder / "metrics.jsonl", [{"step": step} | metrics])


def step(rollouts=0, demo_tokens=0, seconds=1.0, reward=0.0, **more):
    """The metrics of a step that the comparison reads."""
    return {
        "data/rollouts": rollouts,
        "data/demo_tokens": demo_tokens,
        "time/step": seconds,
        "reward/mean": reward,
    } | more


RESULT = {"prompt": "q", "level": 5, "samples": 4, "correct": 1}


@pytest.fixture
def comparison(tmp_path):
    """Three seeds of SFT, two of GRPO and HPT, one of SFT -> GRPO; longer sums, many samples."""
    comparison = compare.Comparison(compare.TOY, tmp_path, steps=30, samples=4)
    base = (4, 0, 0)
    runs = {
        ("SFT", 0): ((4, 1, 0), (4, 2, 2), [step(demo_tokens=100, seconds=2)] * 2),
        ("SFT", 1): ((4, 1, 0), (4, 2, 2), [step(demo_tokens=100, seconds=2)] * 2),
        ("SFT", 2): ((4, 1, 0), (4, 2, 2), [step(demo_tokens=100, seconds=9)] * 2),
        ("GRPO", 0): ((4, 0, 0), (4, 3, 0), [step(rollouts=10, seconds=5)] * 2),
        ("GRPO", 1): ((4, 0, 0), (4, 0, 3), [step(rollouts=10, seconds=7)] * 2),
        ("SFT -> GRPO", 0): ((4, 4, 0), (4, 4, 4), [step(rollouts=10, seconds=6)] * 2),
        ("HPT", 0): ((4, 2, 2), (4, 4, 4), [step(rollouts=10, demo_tokens=7, seconds=5)] * 2),
        ("HPT", 1): ((4, 2, 0), (0, 4, 4), [step(rollouts=10, demo_tokens=8, seconds=5)] * 2),
    }
    for (label, seed), (halfway, after, steps) in runs.items():
        evaluations = {0: base, 15: halfway, 30: after}
        write_run(comparison.directory(label, seed), evaluations, steps)
    first = step(**{"hpt/sft_frac": 1.0})
    longer = {
        ("GRPO, longer sums", 0): ((0, 0, 0), [step(), step()]),
        ("HPT, longer sums", 0): ((2, 2, 2), [first, step(reward=0.6, **{"hpt/sft_frac": 0.2})]),
        ("HPT, longer sums", 1): ((2, 2, 2), [first, step(reward=0.8, **{"hpt/sft_frac": 0.4})]),
    }
    for (label, seed), (after, steps) in longer.items():
        evaluations = {0: (0, 0, 0), 60: after}
        write_run(comparison.directory(label, seed), evaluations, steps, number_of_steps=60)
    for label, correct in (("base", 1), ("HPT", 4)):
        results = [RESULT | {"correct": correct}]
        comparison.pass_directory(label).mkdir()
        report.write_results(comparison.pass_directory(label) / "results.jsonl", results)
    return comparison


@pytest.mark.parametrize("text", ["", "[1]\n", '{"foo": 1}\n'])
def test_a_run_without_results_is_not_finished(comparison, text):
    (comparison.directory("SFT", 0) / "held_out.jsonl").write_text(text)
    table = cells(compare.write_report(comparison, seeds=3))[0]
    assert [row[1] for row in table if row[0] == "SFT"] == ["2"]


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("SFT", '{"foo": 1}\n{"step": 30}\n', "held_out.jsonl:1: no result of a problem"),
        ("pass", "", "results.jsonl is empty"),
        ("pass", '{"samples": 4}\n', "results.jsonl:1: no result of a problem"),
    ],
)
def test_a_broken_file_is_named(comparison, name, text, sentence):
    folder = comparison.directory("SFT", 0)
    file = folder / "held_out.jsonl"
    if name == "pass":
        file = comparison.pass_directory("HPT") / "results.jsonl"
    file.write_text(text)
    with pytest.raises(SystemExit, match=sentence):
        compare.write_report(comparison, seeds=3)


def cells(text):
    """The tables of a Markdown text: lists of rows, each row a list of cells."""
    tables = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
            tables.append(rows[:1] + rows[2:])
    return tables


def test_the_main_table_by_hand(comparison):
    table = cells(compare.write_report(comparison, seeds=3))[0]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert list(rows) == ["SFT", "GRPO", "SFT -> GRPO", "HPT"]
    base, costs = "33.3 ± 0.0", ["0.00", "0", "200", "4"]  # no step has a gated share
    assert rows["SFT"] == ["3", base, "41.7 ± 0.0", "66.7 ± 0.0", "50.0 ± 0.0", *costs]
    costs = ["0.00", "20", "0", "12"]
    assert rows["GRPO"] == ["2", base, "33.3 ± 0.0", "58.3 ± 0.0", "37.5 ± 0.0", *costs]
    costs = ["0.00", "20", "15", "10"]
    assert rows["HPT"] == ["2", base, "58.3 ± 11.8", "83.3 ± 23.6", "100.0 ± 0.0", *costs]


def test_an_arm_with_a_parent_costs_both(comparison):
    table = cells(compare.write_report(comparison, seeds=3))[0]
    row = next(row for row in table if row[0] == "SFT -> GRPO")
    assert row[-3:] == ["20", "200", "16"]  # 4 seconds of SFT and 12 of GRPO


def test_only_the_seeds_asked_for_are_reported(comparison):
    table = cells(compare.write_report(comparison, seeds=1))[0]
    assert {row[0]: row[1] for row in table[1:]}["HPT"] == "1"


def test_longer_sums_have_a_table_of_their_own(comparison):
    table = cells(compare.write_report(comparison, seeds=3))[1]
    costs = ["0", "0", "2"]
    none = "0.0 ± 0.0"
    assert table[1:] == [
        ["GRPO, longer sums", "1", "0.0", "0.0", "0.0", "", "0.00", *costs],
        ["HPT, longer sums", "2", none, "50.0 ± 0.0", "50.0 ± 0.0", "0.65", "0.35", *costs],
    ]


def test_accuracy_by_level(comparison):
    table = cells(compare.write_report(comparison, seeds=3))[2]
    assert table[0] == ["held out, by level, %", "1", "5", "6"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["SFT"] == ["100", "50", "50"]
    assert rows["HPT"] == ["50", "100", "100"]  # the mean of 100 and 0 at level 1


def test_pass_at_k_by_hand(comparison):
    table = cells(compare.write_report(comparison, seeds=3))[3]
    assert table == [
        ["pass@k on hard problems, seed 0, %", "1", "2", "4"],
        ["base", "25.0", "50.0", "100.0"],
        ["HPT", "100.0", "100.0", "100.0"],
    ]


def test_exclusive_solves_of_hard_problems(comparison):
    table = cells(compare.write_report(comparison, seeds=3))[4]
    assert table[1:] == [["HPT and base", "1", "0"]]


def test_exclusive_solves_are_counted_by_seed(comparison):
    sentence = compare.write_report(comparison, seeds=3).splitlines()[-1]
    assert sentence.startswith("Of 3 held-out problems, solved by HPT and not by GRPO")
    assert "by seed: +1/-0, +1/-1; as a yardstick" in sentence
    assert sentence.endswith("by GRPO and not by GRPO with the next seed, and the reverse: +1/-1")


def test_the_report_is_written_with_its_figures(comparison):
    text = compare.write_report(comparison, seeds=3)
    assert (comparison.folder / "comparison.md").read_text() == text + "\n"
    for name in ("comparison.png", "pass.png"):
        assert (comparison.folder / name).read_bytes()[:4] == b"\x89PNG"


def test_without_a_finished_run_there_is_no_report(tmp_path):
    with pytest.raises(SystemExit, match="error: no finished run in"):
        compare.main(["--report", "--out", str(tmp_path)])


# ---------------------------------------------------------------------------------- command lines


def training_flags(comparison, label, seed=0):
    """The flags of train_hpt.py that an arm's command line gives."""
    command = [str(word) for word in comparison.training_command(label, seed)]
    script = command.index(str(report.REPOSITORY / "train_hpt.py"))
    return flags.parse_training_args(command[script + 1 :])


EVERY_ARM = [(name, label) for name, task in compare.TASKS.items() for label in task.arms]


@pytest.mark.parametrize("name, label", EVERY_ARM)
def test_every_arm_is_a_command_that_the_program_takes(tmp_path, name, label):
    comparison = compare.Comparison(compare.TASKS[name], tmp_path, steps=30, samples=4)
    args = training_flags(comparison, label, seed=2)
    arm = comparison.task.arms[label]
    assert (args.method, args.seed, args.steps) == (arm.method, 2, round(30 * arm.length))
    assert args.eval_every == (args.steps // 2 if name == "toy" else 0)
    assert args.out == str(comparison.directory(label, 2))


def test_flags_of_an_arm_come_after_those_of_the_task(tmp_path):
    comparison = compare.Comparison(compare.TOY, tmp_path, steps=30, samples=4)
    assert training_flags(comparison, "HPT, gamma 1/8").gamma == 1 / 8
    words = compare.Comparison(compare.WORD_PROBLEMS, tmp_path, 20, 4, model="somewhere")
    assert training_flags(words, "HPT, c_sft 0.3").sft_coef == 0.3
    assert training_flags(words, "HPT").model == "somewhere"
    assert training_flags(words, "GRPO, warm").model.endswith("sft-a-few-steps-seed0/final")


def test_arms_start_from_the_base_and_train_on_the_toy(tmp_path):
    args = training_flags(compare.Comparison(compare.TOY, tmp_path, steps=30, samples=4), "HPT")
    assert Path(args.model).samefile(compare.make.BASE)
    assert Path(args.data).samefile(report.REPOSITORY / "toy/train.jsonl")
    assert (args.steps, args.lr) == (30, 1e-4)


def test_an_arm_with_a_parent_starts_from_its_model_of_the_same_seed(tmp_path):
    comparison = compare.Comparison(compare.TOY, tmp_path, steps=30, samples=4)
    args = training_flags(comparison, "SFT -> GRPO", seed=1)
    assert args.model == str(comparison.directory("SFT", 1) / "final")


def test_longer_sums_have_flags_of_their_own(tmp_path):
    args = training_flags(
        compare.Comparison(compare.TOY, tmp_path, steps=30, samples=4), "HPT, longer sums"
    )
    assert args.data == str(tmp_path / "longer.jsonl")
    assert args.eval_data == str(tmp_path / "longer_held_out.jsonl")
    assert (args.steps, args.lr, args.max_prompt_tokens) == (60, 5e-4, 24)


def test_the_hard_problems_are_sampled_as_training_samples(tmp_path):
    comparison = compare.Comparison(compare.TOY, tmp_path, steps=30, samples=64)
    command = [str(word) for word in comparison.sampling_command("HPT", "model")]
    script = command.index(str(report.REPOSITORY / "evaluate.py"))
    args = flags.parse_evaluation_args(command[script + 1 :])
    assert (args.samples, args.temperature, args.top_p) == (64, 1.0, 1.0)
    assert args.max_response_tokens == 112
    assert args.data == [str(tmp_path / "hard_held_out.jsonl")]


def test_directories_of_all_runs_differ(tmp_path):
    comparison = compare.Comparison(compare.TOY, tmp_path, steps=30, samples=4)
    arms = comparison.task.arms
    names = {comparison.directory(label, seed).name for label in arms for seed in (0, 1)}
    assert len(names) == 2 * len(arms)
    assert "sft-then-grpo-seed0" in names
    assert "hpt-gamma-1_8-seed1" in names


def test_the_problems_of_the_comparison(tmp_path):
    compare.Comparison(compare.TOY, tmp_path, steps=30, samples=4).write_problems()
    hard = report.read_jsonl(tmp_path / "hard_held_out.jsonl")
    shipped = report.read_jsonl(report.REPOSITORY / "toy/held_out.jsonl")
    assert hard == [row for row in shipped if row["level"] in (5, 6)]
    assert len(report.read_jsonl(tmp_path / "longer.jsonl")) == 500
    assert {row["level"] for row in report.read_jsonl(tmp_path / "longer_held_out.jsonl")} == {7}


def test_an_arm_needs_its_parent(capsys):
    with pytest.raises(SystemExit):
        compare.parse_args(["--only", "SFT -> GRPO"])
    assert "--only also needs SFT, whose final model SFT -> GRPO starts" in capsys.readouterr().err


# --------------------------------------------------------------------------------- what is running


@pytest.fixture
def commands(monkeypatch):
    """The commands that the comparison would run; each leaves what a finished run leaves."""
    done = []

    def call(command, log):
        words = [str(word) for word in command]
        done.append(words)
        out = Path(words[words.index("--out") + 1])
        if "--method" in words:
            model = words[words.index("--model") + 1] if "--model" in words else "base"
            write_run(out, {0: (1, 1, 1), 30: (2, 2, 2)}, [step(rollouts=1)], model=model)
        else:
            out.mkdir()
            samples = int(words[words.index("--samples") + 1])
            report.write_results(out / "results.jsonl", [RESULT | {"samples": samples}])

    monkeypatch.setattr(compare, "call", call)
    return done


def names(commands):
    return [Path(words[words.index("--out") + 1]).name for words in commands]


FLAGS = ["--only", "SFT -> GRPO", "SFT", "HPT, gamma 1/8", "--seeds", "2", "--jobs", "1", "--out"]


def test_parents_run_first_and_seed_0_of_the_main_arms_is_sampled(commands, tmp_path):
    compare.main([*FLAGS, str(tmp_path)])
    assert names(commands) == [
        "base-seed0.pass",
        "sft-seed0",
        "sft-seed0.pass",
        "hpt-gamma-1_8-seed0",
        "sft-seed1",
        "hpt-gamma-1_8-seed1",
        "sft-then-grpo-seed0",
        "sft-then-grpo-seed0.pass",
        "sft-then-grpo-seed1",
    ]


def test_only_seed_0_of_a_main_arm_is_sampled_for_pass_at_k(commands, tmp_path):
    compare.Comparison(compare.TOY, tmp_path, steps=30, samples=4).run(("SFT", 1))
    assert names(commands) == ["sft-seed1"]


def test_finished_runs_are_kept(commands, tmp_path, capsys):
    compare.main([*FLAGS, str(tmp_path)])
    commands.clear()
    capsys.readouterr()
    compare.main([*FLAGS, str(tmp_path)])
    assert commands == []
    assert capsys.readouterr().out.count("(was there)") == 6


def test_a_run_that_was_stopped_starts_anew_and_is_kept_aside(commands, tmp_path):
    compare.main([*FLAGS, str(tmp_path)])
    commands.clear()
    (tmp_path / "sft-seed1/final/config.json").unlink()
    compare.main([*FLAGS, str(tmp_path)])
    assert names(commands) == ["sft-seed1"]
    assert len(list(tmp_path.glob("sft-seed1.stopped*/metrics.jsonl"))) == 1


def test_runs_of_another_length_are_refused(commands, tmp_path):
    compare.main([*FLAGS, str(tmp_path)])
    with pytest.raises(SystemExit, match="sft-seed0 had --steps 30, not 40: name another --out"):
        compare.main([*FLAGS, str(tmp_path), "--steps", "40"])


def test_runs_from_another_base_are_refused(commands, tmp_path):
    words = [*FLAGS, str(tmp_path / "out"), "--model"]
    compare.main([*words, str(tmp_path / "a")])
    compare.main([*words, str(tmp_path / "a")])  # negative control
    with pytest.raises(SystemExit, match=r"sft-seed0 had --model .*a, not .*b: name another"):
        compare.main([*words, str(tmp_path / "b")])


def test_samples_of_another_number_are_refused(commands, tmp_path):
    words = [*FLAGS, str(tmp_path), "--samples"]
    compare.main([*words, "4"])
    compare.main([*words, "4"])  # negative control
    with pytest.raises(SystemExit, match=r"base-seed0.pass had --samples 4, not 8: remove it"):
        compare.main([*words, "8"])


def test_report_shows_every_run(capsys):
    with pytest.raises(SystemExit):
        compare.parse_args(["--report", "--only", "SFT"])
    assert "--report shows every run that is there" in capsys.readouterr().err


def test_report_trains_nothing(commands, tmp_path):
    compare.main([*FLAGS, str(tmp_path)])
    commands.clear()
    (tmp_path / "sft-seed1/final/config.json").unlink()
    compare.main(["--report", "--seeds", "2", "--out", str(tmp_path)])
    assert commands == []


def test_a_run_that_fails_names_its_log(tmp_path):
    log = tmp_path / "x.log"
    with pytest.raises(SystemExit, match=r"error: a run failed, its output is in .*x.log"):
        compare.call([compare.sys.executable, "-c", "print(7); exit(1)"], log)
    assert log.read_text().splitlines()[-1] == "7"


def test_a_tiny_comparison_with_the_real_programs(tmp_path):
    """One arm that is not a main one, for one step: two engines are started."""
    command = [compare.sys.executable, "-m", "tools.compare", "--only", "HPT, gamma 1/8"]
    command += ["--seeds", "1", "--steps", "1", "--samples", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=report.REPOSITORY, capture_output=True, text=True)
    logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    table = (tmp_path / "comparison.md").read_text()
    assert table in done.stdout + "\n"
    rows = cells(table)[0]
    assert [row[0] for row in rows] == ["from the base", "HPT, gamma 1/8"]
    assert rows[1][-3] == "256"  # 32 prompts x 8 rollouts
    assert 15 < float(rows[1][2]) < 35  # the base's accuracy, 25%
    config = json.loads((tmp_path / "hpt-gamma-1_8-seed0/config.json").read_text())
    assert config["flags"]["gamma"] == 1 / 8
