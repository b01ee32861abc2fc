"""evaluate.py: measuring with stand-ins for engine and verifier, its tables, the real program."""

import math
import random
import subprocess
import sys

import pytest

import evaluate
from common import distributed, flags, report
from common.report import REPOSITORY, Score
from rollout import Rollout
from toy import make

TOY_SUMS = REPOSITORY / "toy/held_out.jsonl"


# ---------------------------------------------------------------------------------------- measuring


class StandInSampler:
    """The text of a response follows from the seed and from its place among the n."""

    tensor_parallel = 1

    def __init__(self):
        self.calls = []  # (prompt, seed, n)

    def generate(self, prompts, seeds, n, with_logp=True):
        assert not with_logp
        self.calls += [(prompt, seed, n) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [self.group(seed, n) for seed in seeds]

    def group(self, seed, n):
        rng = random.Random(seed)
        return [Rollout([0] * rng.randint(1, 9), None, j == 0, f"{rng.random()}") for j in range(n)]

    def close(self):
        pass


class StandInVerifier:
    """Gives each response the reward that `grade(text, answer)` says, and gives up each third."""

    def __init__(self, grade=lambda text, answer: float(float(text) < 0.4)):
        self.grade, self.timeouts = grade, 0

    def score(self, texts, answers):
        self.timeouts += len(texts) // 3
        return [self.grade(text, answer) for text, answer in zip(texts, answers, strict=True)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def problems(count=5):
    return [{"prompt": f"q{i}", "answer": f"a{i}", "prompt_ids": [i]} for i in range(count)]


def measure(*grade, count=5, n=2, seed=0, sampler=None):
    verifier = StandInVerifier(*grade)
    return evaluate.measure(sampler or StandInSampler(), verifier, problems(count), n, seed)


def test_a_result_by_hand():
    sampler = StandInSampler()
    first, second = measure(lambda text, answer: 1.0, count=2, n=3, seed=8, sampler=sampler)
    seeds = [distributed.derive_seed(8, "evaluate", i) for i in range(2)]
    assert sampler.calls == [([0], seeds[0], 3), ([1], seeds[1], 3)]
    group = sampler.group(seeds[1], 3)
    assert second == {
        "prompt": "q1",
        "level": None,
        "samples": 3,
        "correct": 3,
        "lengths": [len(r.ids) for r in group],
        "truncated": 1,
        "responses": [r.text for r in group],
    }
    assert first["responses"] != second["responses"]  # negative control: the seeds differ


def test_only_a_reward_of_exactly_1_counts_as_right():
    rewards = iter([1.0, 0.5, 0.0, 0.999, 1, 1.0])
    results = measure(lambda text, answer: next(rewards), count=2, n=3)
    assert [r["correct"] for r in results] == [1, 2]


def test_each_response_is_graded_against_the_answer_to_its_own_problem():
    graded = []
    results = measure(lambda text, answer: graded.append((text, answer)), count=3)
    expected = [(text, f"a{i}") for i, r in enumerate(results) for text in r["responses"]]
    assert graded == expected


def test_results_do_not_depend_on_the_number_of_ranks(monkeypatch):
    """share_work as three ranks would do it."""
    alone = measure()

    def shared(items, work, ranks_per_engine=1):
        results = [None] * len(items)
        for rank in range(3):
            results[rank::3] = work(items[rank::3])
        return results

    monkeypatch.setattr(distributed, "share_work", shared)
    assert measure() == alone
    assert measure(seed=1) != alone  # negative control


# ------------------------------------------------------------- an evaluation, with what it leaves


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """A function that runs evaluate.main with stand-ins; it returns the directory."""
    loaded = {
        "amc23": problems(3),
        "mine": [p | {"level": i % 2} for i, p in enumerate(problems())],
    }

    def load(args, source, tokenizer):
        return loaded[str(source).removesuffix(".jsonl")], "1 left out"

    monkeypatch.setattr(evaluate.model, "load_config_and_tokenizer", lambda args: (None, None))
    monkeypatch.setattr(evaluate.data, "load_problems", load)
    monkeypatch.setattr(evaluate.data, "source_name", lambda source: source.removesuffix(".jsonl"))
    monkeypatch.setattr(evaluate.model, "check_context", lambda *_: None)
    monkeypatch.setattr(evaluate.model, "end_token_ids", lambda *_: [0])
    monkeypatch.setattr(evaluate.reward, "Verifier", lambda function: StandInVerifier())
    monkeypatch.setattr(evaluate.rollout, "build", lambda args, **_: StandInSampler())
    monkeypatch.setattr(distributed, "init_process_group", lambda: None)
    monkeypatch.setattr(distributed, "total_over_ranks", lambda counts: counts)

    def run(*more):
        command = ["--model", "m", "--data", "amc23.jsonl", "mine.jsonl", *more]
        evaluate.main(flags.parse_evaluation_args([*command, "--out", str(tmp_path / "out")]))
        return tmp_path / "out"

    return run


def test_an_evaluation_leaves_a_file_per_benchmark_and_its_table(run_here, capsys):
    out = run_here("--samples", "4", "--temperature", "0.5")
    assert {path.name for path in out.iterdir()} == {"amc23.jsonl", "mine.jsonl", "table.md"}
    rows = report.read_results(out / "mine.jsonl")
    assert rows == evaluate.measure(
        StandInSampler(),
        StandInVerifier(),
        [p | {"level": i % 2} for i, p in enumerate(problems())],
        4,
        0,
    )
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    above, below = text.split("| benchmark")
    for setting in ("model: m", "temperature: 0.5", "top_p: 0.95", "seed: 0", "amc23: 1 left out"):
        assert f"- {setting}\n" in above
    assert "rope_theta" not in above and "- sympy: " in above
    assert "The verifier gave up 10 responses" in below  # 12 // 3 + 20 // 3


def test_paper_takes_32_samples_of_amc_and_1_of_others(run_here):
    out = run_here("--paper")
    samples = {
        name: report.read_results(out / f"{name}.jsonl")[0]["samples"] for name in ("amc23", "mine")
    }
    assert samples == {"amc23": 32, "mine": 1}
    assert "- samples:" not in (out / "table.md").read_text()  # the table says them


# ---------------------------------------------------------------------------------------- the table


def result(correct, samples=4, level=None, prompt="q", lengths=(1,), truncated=0):
    """A result as `measure` makes it."""
    return {
        "prompt": prompt,
        "level": level,
        "samples": samples,
        "correct": correct,
        "lengths": list(lengths) * (samples // len(lengths)),
        "truncated": truncated,
    }


def test_the_rows_of_a_table_by_hand():
    results = {
        "amc23": [
            result(2, samples=2, lengths=[10, 20], truncated=1),
            result(1, samples=2, lengths=[30, 40]),
        ],
        "mine": [
            result(1, samples=1, level=1, lengths=[5]),
            result(0, samples=1, level=2, lengths=[6]),
            result(0, samples=1, level=2, lengths=[6]),
        ],
    }
    assert evaluate.table(results) == [
        ["benchmark", "problems", "n", "avg@n, %", "pass@2, %", "truncated, %", "tokens"],
        ["amc23", 2, 2, "75.0 ± 25.0", "100.0 ± 0.0", "25.0", "25.0"],
        ["mine, level 1", 1, 1, "100.0", "", "0.0", "5.0"],
        ["mine, level 2", 2, 1, "0.0 ± 0.0", "", "0.0", "6.0"],
        ["mine", 3, 1, "33.3 ± 33.3", "", "0.0", "5.7"],
        ["mean of 2", "", "", "54.2 ± 20.8", "", "", ""],
    ]


def test_benchmarks_out_of_distribution_have_a_mean_of_their_own():
    names = {"amc": 1, "arcade": 2, "ARC_C": 4, "gpqa": 3}
    rows = evaluate.table({name: [result(correct)] for name, correct in names.items()})
    assert [row[0] for row in rows[5:]] == ["mean of 2", "mean, out of distribution of 2"]
    assert [row[3].split()[0] for row in rows[5:]] == ["37.5", "87.5"]
    assert len(evaluate.table({"amc": [result(1)], "gpqa": [result(1)]})) == 3  # no mean of one


def test_the_mean_of_benchmarks_adds_their_errors_in_squares():
    mean, error = evaluate.mean_of_scores([Score(0.2, 0.03), Score(0.6, 0.04)])
    assert (mean, error) == (pytest.approx(0.4), pytest.approx(0.05 / 2))
    for wrong in (math.hypot(0.03, 0.04) / math.sqrt(2), (0.03 + 0.04) / 2):  # negative controls
        assert error != pytest.approx(wrong)


# ---------------------------------------------------------------------------------------- comparing


def write_results(path, counts, **more):
    """Results of as many problems as there are counts of right responses, of 4 each."""
    path.parent.mkdir(exist_ok=True)
    rows = [result(c, prompt=f"q{i}") for i, c in enumerate(counts)]
    report.write_results(path, rows, **more)
    return str(path.parent)


def test_a_comparison_by_hand(tmp_path, capsys):
    a = write_results(tmp_path / "a/x.jsonl", [4, 3, 0, 2, 4, 4])
    write_results(tmp_path / "a/only_a.jsonl", [1])
    b = write_results(tmp_path / "b/x.jsonl", [4, 1, 3, 3, 0, 0])
    evaluate.compare(a, b)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"- A: {a}", f"- B: {b}"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    difference = report.mean_and_error([0, 0.5, -0.75, -0.25, 1, 1]).percent()
    assert rows[2:] == [["x", "6", "70.8 ± 16.4", "45.8 ± 17.6", difference, "3", "2"]]


def test_half_of_the_samples_right_is_not_solved():
    a, b = [result(c) for c in (3, 2, 4)], [result(c) for c in (2, 3, 4)]
    assert evaluate.exclusive_solves(a, b) == (1, 1)


def test_the_last_evaluation_of_a_training_run_is_compared(tmp_path):
    run = write_results(tmp_path / "run/held_out.jsonl", [0, 0], step=0)
    write_results(tmp_path / "run/held_out.jsonl", [4, 2], step=9)
    report.append_jsonl(tmp_path / "run/metrics.jsonl", [{"step": 1}])
    (tmp_path / "run/config.json").write_text("{}")
    [(name, rows)] = evaluate.read_evaluation(run).items()
    assert (name, [row["correct"] for row in rows]) == ("held_out", [4, 2])
    of_an_evaluation = write_results(tmp_path / "e/held_out.jsonl", [0, 0])
    assert len(evaluate.read_evaluation(of_an_evaluation)["held_out"]) == 2


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("longer/x", "x is not the same problems in both"),
        ("other/y", r"no benchmark is in both: \['x'\] and \['y'\]"),
        ("foreign/x", "x.jsonl:1 cannot be read: no prompt, level, samples, correct"),
        ("none/../nothing", "holds no results \\(a run has some with --eval-data\\)"),
    ],
)
def test_what_cannot_be_compared(tmp_path, name, sentence):
    a = write_results(tmp_path / "a/x.jsonl", [1, 2])
    write_results(tmp_path / "longer/x.jsonl", [1, 2, 3])
    write_results(tmp_path / "other/y.jsonl", [1, 2])
    (tmp_path / "foreign").mkdir()
    report.append_jsonl(tmp_path / "foreign/x.jsonl", [{"benchmark": "x", "score": 1}])
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        evaluate.compare(a, str(tmp_path / name.split("/")[0]))


# --------------------------------------------------------------------------------- the real program


@pytest.mark.slow
def test_one_rank_and_two_give_the_same_results_which_follow_from_the_responses(tmp_path):
    rows = report.read_jsonl(TOY_SUMS)[::8]
    report.append_jsonl(tmp_path / "sums.jsonl", rows)
    for ranks in (1, 2):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line += [f"--nproc_per_node={ranks}", "evaluate.py", "--model", make.BASE, "--samples", 4]
        line += ["--max-response-tokens", 112, "--data", tmp_path / "sums.jsonl"]
        line += ["--out", tmp_path / f"{ranks}"]
        done = subprocess.run(
            [*map(str, line)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = report.read_results(tmp_path / "1/sums.jsonl")
    assert report.read_results(tmp_path / "2/sums.jsonl") == results
    for result, row in zip(results, rows, strict=True):
        right = [text.endswith(f"\\boxed{{{row['answer']}}}") for text in result["responses"]]
        assert (result["prompt"], result["correct"]) == (row["prompt"], sum(right))
    assert 0 < sum(r["correct"] for r in results) < 4 * len(results)
