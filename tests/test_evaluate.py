"""evaluate.py: measuring and continuing with a stand-in for the engine, then the real program."""

import contextlib
import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
from common import data, flags, report
from common.distributed import derive_seed
from rollout import Rollout
from toy import make

REPOSITORY = Path(__file__).resolve().parents[1]
LOCAL_BENCHMARKS = REPOSITORY.parent / "shared/data/benchmarks"
TOY_SUMS = REPOSITORY / "toy/held_out.jsonl"


# ---------------------------------------------------------------------------------------- measuring


class StandInSampler:
    """Answers at once, and in reverse order; the text of a response follows from the seed."""

    tensor_parallel = 1

    def __init__(self, *_, stop_after=None, **__):
        self.stop_after = stop_after  # as many problems as it does before it is interrupted
        self.calls = []  # (prompt, seed, n)

    def stream(self, prompts, seeds, n):
        for i in reversed(range(len(prompts))):
            if self.stop_after is not None and len(self.calls) == self.stop_after:
                raise KeyboardInterrupt
            self.calls.append((prompts[i], seeds[i], n))
            rng = random.Random(seeds[i])
            yield (
                i,
                [Rollout([0] * rng.randint(1, 9), [], j == 0, str(rng.random())) for j in range(n)],
            )

    def close(self):
        import torch.distributed as dist

        dist.destroy_process_group()


class StandInVerifier:
    """Gives each response the reward that `grade(text, answer)` says."""

    timeouts = 0

    def __init__(self, grade):
        self.grade = grade

    def score(self, texts, answers, each_done=None):
        return [self.grade(text, answer) for text, answer in zip(texts, answers, strict=True)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def numbered_problems(count=5):
    return [{"prompt": f"q{i}", "answer": f"a{i}", "prompt_ids": [i]} for i in range(count)]


def measure(grade=lambda text, answer: 1.0, count=5, sampler=None, samples=2, seed=0, **more):
    sampler = sampler or StandInSampler()
    verifier = StandInVerifier(grade)
    problems = numbered_problems(count)
    return evaluate.measure(sampler, verifier, problems, samples=samples, seed=seed, **more)


def test_results_are_in_the_order_of_the_problems():
    assert [r["prompt"] for r in measure()] == ["q0", "q1", "q2", "q3", "q4"]


def test_only_a_reward_of_exactly_1_counts_as_right():
    rewards = iter([1.0, 0.5, 0.0, 0.999, 1, 1.0])
    results = measure(lambda text, answer: next(rewards), count=2, samples=3)
    assert [r["correct"] for r in results] == [1, 2]


def test_each_response_is_graded_against_the_answer_to_its_own_problem():
    graded = []
    measure(lambda text, answer: graded.append((text, answer)), count=3)
    expected = []
    for i in range(3):
        rng = random.Random(derive_seed(0, "evaluate", i))
        rng.randint(1, 9)
        expected.append((str(rng.random()), f"a{i}"))
    assert graded[::2] == expected


def test_a_result_counts_tokens_and_truncated_responses():
    responses = [
        {"text": "", "tokens": 7, "truncated": True},
        {"text": "", "tokens": 3, "truncated": False},
        {"text": "", "tokens": 4, "truncated": False},
    ]
    result = measure(count=1, samples=3, recorded={0: responses})[0]
    assert (result["samples"], result["lengths"], result["truncated"]) == (3, [7, 3, 4], 1)


def test_the_level_of_a_problem_is_kept():
    problems = [
        {"prompt": "q", "answer": "a", "prompt_ids": [0], "level": 3},
        *numbered_problems(1),
    ]
    verifier = StandInVerifier(lambda text, answer: 0.0)
    results = evaluate.measure(StandInSampler(), verifier, problems, samples=1, seed=0)
    assert [r["level"] for r in results] == [3, None]


def test_the_seed_of_a_problem_depends_on_the_seed_and_its_index_alone():
    sampler = StandInSampler()
    recorded = {1: [{"text": "", "tokens": 1, "truncated": False}]}
    measure(sampler=sampler, count=3, seed=8, recorded=recorded, samples=1)
    seeds = {prompt[0]: seed for prompt, seed, n in sampler.calls}
    assert seeds == {i: derive_seed(8, "evaluate", i) for i in (0, 2)}


def test_recorded_problems_are_not_sampled_again():
    sampler, recorded = StandInSampler(), {}
    whole = measure(record=recorded.__setitem__)
    again = measure(sampler=sampler, recorded=recorded)
    assert sampler.calls == []
    assert again == whole


def test_only_new_problems_are_recorded():
    recorded = {1: [{"text": "", "tokens": 1, "truncated": False}]}
    new = {}
    measure(count=3, samples=1, recorded=recorded, record=new.__setitem__)
    assert new.keys() == {0, 2}
    assert new[0][0].keys() == {"text", "tokens", "truncated"}


def test_without_a_sampler_recorded_problems_are_scored():
    recorded = {}
    whole = measure(record=recorded.__setitem__)
    verifier = StandInVerifier(lambda text, answer: 1.0)
    problems = numbered_problems()
    again = evaluate.measure(None, verifier, problems, samples=2, seed=0, recorded=recorded)
    assert again == whole


# ---------------------------------------------------- an evaluation with stand-ins, in this process


@pytest.fixture
def sums(tmp_path):
    """Two files of toy sums, the second with levels."""
    rows = report.read_jsonl(TOY_SUMS)
    without_level = [{"prompt": r["prompt"], "answer": r["answer"]} for r in rows[::16]]
    (tmp_path / "amc23.json").write_text(json.dumps(without_level))
    report.append_jsonl(tmp_path / "mine.jsonl", rows[1::8])
    return [str(tmp_path / "amc23.json"), str(tmp_path / "mine.jsonl")]


@pytest.fixture
def run_here(sums, monkeypatch, tmp_path):
    """A function that runs evaluate.main with stand-ins and returns the sampler, or None.

    It takes more flags, and `stop_after`, the number of problems until an interruption.
    """
    import torch.distributed as dist

    environment = dict(os.environ)
    samplers = []

    def run(*more_flags, out=tmp_path / "out", stop_after=None):
        samplers.clear()

        def start(*_, **__):
            samplers.append(StandInSampler(stop_after=stop_after))
            return samplers[-1]

        monkeypatch.setattr(evaluate, "Sampler", start)
        command = ["--model", str(make.BASE), "--samples", "2", "--max-response-tokens", "112"]
        command += ["--data", *sums, "--out", str(out), *map(str, more_flags)]
        interrupted = pytest.raises(KeyboardInterrupt) if stop_after else contextlib.nullcontext()
        try:
            with interrupted:
                evaluate.main(flags.parse_evaluation_args(command))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.environ.clear()
            os.environ.update(environment)
        return samplers[0] if samplers else None

    def verifier(function):
        return StandInVerifier(lambda text, answer: float(float(text) < 0.4))

    monkeypatch.setattr(evaluate.reward, "Verifier", verifier)
    return run


def responses_in(out):
    """{(benchmark, index): responses} of all readable lines of an evaluation's generations."""
    found = {}
    for path in out.glob("generations.*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                assert (row["benchmark"], row["index"]) not in found
                found[row["benchmark"], row["index"]] = row["responses"]
    return found


def test_every_problem_is_sampled_with_the_samples_of_the_flag(run_here, tmp_path):
    sampler = run_here()
    assert len(sampler.calls) == 12 + 24
    assert {n for _, _, n in sampler.calls} == {2}
    assert len(responses_in(tmp_path / "out")) == 12 + 24


def test_an_interrupted_evaluation_ends_with_the_same_table(run_here, tmp_path):
    run_here(out=tmp_path / "whole")
    run_here(stop_after=5)
    run_here(stop_after=9)
    sampler = run_here()
    assert len(sampler.calls) == 12 + 24 - 5 - 9
    for name in ("table.md", "results.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert responses_in(tmp_path / "out") == responses_in(tmp_path / "whole")


def test_what_was_sampled_is_kept_and_not_sampled_again(run_here, tmp_path):
    """A response that was changed by hand stays changed, and changes the table."""
    run_here(out=tmp_path / "whole")
    run_here(stop_after=5)
    path = tmp_path / "out/generations.0.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    row["responses"] = [{"text": "0.0", "tokens": 77, "truncated": True}] * 2
    path.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    run_here()
    changed = report.read_jsonl(tmp_path / "out/results.jsonl")
    whole = report.read_jsonl(tmp_path / "whole/results.jsonl")
    differing = [i for i, (a, b) in enumerate(zip(changed, whole, strict=True)) if a != b]
    assert differing == [row["index"]]
    assert changed[row["index"]]["lengths"] == [77, 77]


def test_a_line_that_was_cut_off_is_sampled_again(run_here, tmp_path):
    run_here(out=tmp_path / "whole")
    run_here(stop_after=5)
    path = tmp_path / "out/generations.0.jsonl"
    path.write_text(path.read_text()[:-20])
    sampler = run_here()
    assert len(sampler.calls) == 12 + 24 - 4
    assert responses_in(tmp_path / "out") == responses_in(tmp_path / "whole")
    assert (tmp_path / "out/table.md").read_text() == (tmp_path / "whole/table.md").read_text()


def test_the_responses_of_all_ranks_are_read(run_here, tmp_path):
    run_here(stop_after=5)
    path = tmp_path / "out/generations.0.jsonl"
    path.rename(tmp_path / "out/generations.3.jsonl")
    assert len(run_here().calls) == 12 + 24 - 5


def test_a_finished_evaluation_starts_no_engine(run_here, tmp_path, capsys):
    run_here()
    first = capsys.readouterr().out
    assert run_here() is None
    assert capsys.readouterr().out == first


def test_timeouts_of_each_benchmark_stand_in_the_table(run_here, monkeypatch, tmp_path):
    class Slow(StandInVerifier):
        def score(self, texts, answers, each_done=None):
            self.timeouts += 3 if len(texts) == 24 else 1
            return super().score(texts, answers)

    monkeypatch.setattr(evaluate.reward, "Verifier", lambda function: Slow(lambda *_: 0.0))
    run_here()
    numbers = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert (numbers["amc23"]["timeouts"], numbers["mine"]["timeouts"]) == (3, 1)


def test_the_engine_has_the_settings_of_the_flags(monkeypatch):
    monkeypatch.setattr(evaluate, "Sampler", lambda *args, **settings: (args, settings))
    line = ["--model", "m", "--data", "x.jsonl", "--temperature", "0.7", "--top-p", "0.9"]
    line += ["--max-response-tokens", "77", "--seed", "5", "--tensor-parallel", "2"]
    line += ["--gpu-memory-utilization", "0.8", "--rope-theta", "40000"]
    (model,), settings = evaluate.start_sampler(flags.parse_evaluation_args(line), 33, [1, 7])
    override = settings.pop("config_overrides")
    assert model == "m"
    assert settings == {
        "max_prompt_tokens": 33,
        "max_response_tokens": 77,
        "temperature": 0.7,
        "top_p": 0.9,
        "tensor_parallel": 2,
        "end_token_ids": [1, 7],
        "gpu_memory_utilization": 0.8,
        "trust_remote_code": False,
        "seed": 5,
    }
    assert override.keywords == {"rope_theta": 40000, "max_position_embeddings": None}


def test_paper_takes_32_samples_of_amc_and_1_of_others(sums):
    args = flags.parse_evaluation_args(["--model", str(make.BASE), "--paper", "--data", *sums])
    _, tokenizer = data.load_config_and_tokenizer(args.model)
    test_sets = evaluate.load_test_sets(args, tokenizer)
    assert [(test.name, test.samples) for test in test_sets] == [("amc23", 32), ("mine", 1)]


@pytest.mark.parametrize(
    "more_flags, sentence",
    [
        (["--seed", 1], "holds an evaluation with another seed, 0, not 1"),
        (["--samples", 3], "another benchmarks, .*2 samples each.*3 samples each"),
        (["--top-p", 0.5], "another top_p, 0.95, not 0.5"),
        (["--model", "MODEL"], "another model"),
    ],
)
def test_other_settings_are_refused_and_named(run_here, tmp_path, more_flags, sentence):
    run_here()
    if "MODEL" in more_flags:
        model = tmp_path / "model"
        model.symlink_to(make.BASE)
        more_flags = ["--model", model]
    with pytest.raises(SystemExit, match=f"error: --out .*{sentence}.*: name another directory"):
        run_here(*more_flags)


def test_other_problems_under_the_same_name_are_refused(run_here, sums):
    run_here()
    text = Path(sums[0]).read_text()
    Path(sums[0]).write_text(text.replace('"answer": "', '"answer": "1', 1))
    with pytest.raises(SystemExit, match="holds an evaluation with another benchmarks"):
        run_here()


def test_a_directory_of_something_else_is_refused(run_here, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="exists and holds no evaluation"):
        run_here()
    assert not list((tmp_path / "out").iterdir())


def test_responses_of_unknown_settings_are_refused(run_here, tmp_path):
    run_here()
    (tmp_path / "out/settings.json").write_text("")
    with pytest.raises(SystemExit, match=r"settings.json is broken"):
        run_here()


def test_two_evaluations_in_one_directory_are_refused(run_here, tmp_path):
    run_here()
    table = (tmp_path / "out/table.md").read_text()
    with open(tmp_path / "out/settings.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another evaluation is writing there"):
            run_here()
    assert (tmp_path / "out/table.md").read_text() == table
    assert run_here() is None  # the lock is gone


def test_other_weights_have_another_digest(tmp_path):
    first = evaluate.weights_digest(make.BASE)
    for file in Path(make.BASE).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert evaluate.weights_digest(tmp_path) == first
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert evaluate.weights_digest(tmp_path) != first


def copy_of_base(folder):
    """Copy the toy's base model into a folder and return the folder."""
    folder.mkdir()
    for file in Path(make.BASE).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("whole", [2**30, 0])  # 0: as if the model were large
def test_a_change_in_any_tensor_changes_the_digest(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(evaluate, "WHOLE", whole)
    folder = copy_of_base(tmp_path / "model")
    first = evaluate.weights_digest(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    tensors.pop("__metadata__")
    assert len(tensors) > 10
    for tensor in tensors.values():
        begin, end = tensor["data_offsets"]
        for place in (begin, end - 1):
            changed = bytearray(content)
            changed[8 + length + place] ^= 1
            path.write_bytes(changed)
            assert evaluate.weights_digest(folder) != first
    path.write_bytes(content)
    assert evaluate.weights_digest(folder) == first


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "pytorch_model-00001-of-00002.bin",
    ],
)
def test_another_file_of_the_model_changes_the_digest(tmp_path, name):
    folder = copy_of_base(tmp_path / "model")
    path = folder / name
    path.write_bytes(b"x" * 3 * 2**20)
    first = evaluate.weights_digest(folder)
    path.write_bytes(b"y" + b"x" * (3 * 2**20 - 1))
    assert evaluate.weights_digest(folder) != first


def test_notes_beside_a_model_do_not_change_its_digest(tmp_path):
    folder = copy_of_base(tmp_path / "model")
    first = evaluate.weights_digest(folder)
    (folder / "README.md").write_text("mine")
    assert evaluate.weights_digest(folder) == first


def test_a_large_tensor_is_read_in_blocks(tmp_path, monkeypatch):
    """A change anywhere would take long to find; the blocks are few, and lie all over it."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.setattr(evaluate, "WHOLE", 0)
    save_file({"w": torch.zeros(2**25, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    reads = []

    class Digest:
        def update(self, content):
            reads.append(len(content))

    with open(tmp_path / "model.safetensors", "rb") as file:
        evaluate.hash_tensors(file, Digest())
    assert len(reads) == 1 + evaluate.BLOCKS
    assert sum(reads[1:]) == evaluate.BLOCKS * evaluate.BLOCK


def test_ranks_of_one_engine_record_and_count_once(monkeypatch):
    """Four ranks, two per engine: ranks 0 and 2 record and count, 1 and 3 do not."""
    recording = []
    for rank in range(4):
        monkeypatch.setattr(evaluate.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(evaluate.distributed, "total_over_ranks", lambda counts: counts)
        verifier = StandInVerifier(lambda text, answer: 0.0)
        verifier.score = lambda texts, answers, v=verifier, **_: _time_out(v, texts)
        sampler = StandInSampler()
        sampler.tensor_parallel = 2
        lines = SimpleNamespace(write=lambda line, rank=rank: recording.append(rank))
        test = evaluate.TestSet("x", numbered_problems(1), 1)
        _, timeouts = evaluate.measure_test_set(test, sampler, verifier, 0, {}, lines)
        assert timeouts == (1 if rank in (0, 2) else 0)
    assert recording == [0, 2]


def _time_out(verifier, texts):
    verifier.timeouts += 1
    return [0.0] * len(texts)


# ---------------------------------------------------------------------------------------- comparing


def write_evaluation(folder, correct, samples=4, levels=None, file="results.jsonl", **more):
    """Results of an evaluation, problem by problem."""
    folder.mkdir(exist_ok=True)
    results = []
    for i, c in enumerate(correct):
        level = levels[i] if levels else None
        results.append({"prompt": f"q{i}", "level": level, "samples": samples, "correct": c})
    report.write_results(folder / file, results, **more)
    return str(folder)


@pytest.fixture
def two_evaluations(tmp_path):
    levels = [1, 1, 2, 2, 3, 3]
    a = write_evaluation(tmp_path / "a", [4, 3, 0, 2, 4, 4], levels=levels, benchmark="x")
    b = write_evaluation(tmp_path / "b", [4, 1, 3, 3, 0, 0], levels=levels, benchmark="x")
    return a, b, tmp_path / "out"


def test_the_numbers_of_a_comparison_by_hand(two_evaluations):
    a, b, out = two_evaluations
    evaluate.compare(a, b, out)
    numbers = json.loads((out / "comparison.json").read_text())["results"]
    assert numbers["x"]["a"] == pytest.approx(17 / 24)
    assert numbers["x"]["difference"] == pytest.approx((17 - 11) / 24)
    exclusive = {label: part["exclusive"] for label, part in numbers.items()}
    assert exclusive == {
        "x, level 1": [1, 0],
        "x, level 2": [0, 2],
        "x, level 3": [2, 0],
        "x": [3, 2],
    }
    assert numbers["x, level 3"]["interval"] == [1.0, 1.0]


def test_the_table_of_a_comparison_by_hand(two_evaluations, capsys):
    a, b, out = two_evaluations
    evaluate.compare(a, b, out)
    lines = (out / "comparison.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert [row[:5] for row in rows[2:]] == [
        ["x, level 1", "2", "87.5", "62.5", "+25.0"],
        ["x, level 2", "2", "25.0", "75.0", "-50.0"],
        ["x, level 3", "2", "100.0", "0.0", "+100.0"],
        ["x", "6", "70.8", "45.8", "+25.0"],
    ]
    assert [row[6] for row in rows[2:]] == ["+1/-0", "+0/-2", "+2/-0", "+3/-2"]
    assert rows[4][5] == "[+100.0, +100.0]"
    assert "\n".join(lines) in capsys.readouterr().out


def test_a_comparison_of_one_problem_has_no_interval(tmp_path, capsys):
    write_evaluation(tmp_path / "a", [4])
    write_evaluation(tmp_path / "b", [1])
    evaluate.compare(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out"))
    assert "n/a" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out/comparison.json").read_text())["results"]
    assert [part["interval"] for part in numbers.values()] == [[None, None]]


def test_a_comparison_draws_pass_at_k(two_evaluations):
    a, b, out = two_evaluations
    evaluate.compare(a, b, out)
    assert (out / "pass.png").read_bytes()[:4] == b"\x89PNG"


def test_a_comparison_of_single_samples_draws_nothing(tmp_path, capsys):
    a = write_evaluation(tmp_path / "a", [1, 0], samples=1)
    evaluate.compare(a, a, tmp_path / "out")
    assert not (tmp_path / "out/pass.png").exists()
    assert "pass.png" not in capsys.readouterr().out


def test_the_last_evaluation_of_a_training_run_is_compared(tmp_path):
    a = write_evaluation(tmp_path / "a", [0, 0], file="held_out.jsonl", step=0)
    write_evaluation(tmp_path / "a", [4, 2], file="held_out.jsonl", step=9)
    b = write_evaluation(tmp_path / "b", [1, 2])
    evaluate.compare(a, b, tmp_path / "out")
    numbers = json.loads((tmp_path / "out/comparison.json").read_text())["results"]
    assert numbers["held out"]["a"] == 6 / 8
    assert "- step: 9 in A, None in B\n" in (tmp_path / "out/comparison.md").read_text()


def test_settings_that_differ_are_listed(tmp_path):
    for name, temperature in (("a", 0.6), ("b", 1.0)):
        write_evaluation(tmp_path / name, [1, 2])
        settings = {"model": name, "temperature": temperature, "top_p": 0.95}
        report.write_json(tmp_path / name / "results.json", {"settings": settings})
    evaluate.compare(str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "out")
    head = (tmp_path / "out/comparison.md").read_text().split("\n\n")[0]
    assert head.splitlines()[2:] == ["- temperature: 0.6 in A, 1.0 in B"]


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("longer", r"held out is not the same problems in .*a \(2 of them\) and in .*longer \(3\)"),
        ("other", "no benchmark in common: .*a has held out; .*other has other"),
        ("none", r"none: no results.jsonl \(of evaluate.py, finished\) and no held_out.jsonl"),
        ("empty", "empty/results.jsonl is empty"),
        ("cut", "is not the same problems"),  # half a line at the end is none
        ("foreign", r"foreign/results.jsonl:2: no result of a problem"),
        ("list", r"list/results.jsonl:1: no result of a problem"),
        ("no samples", r"no samples/results.jsonl:2: no result of a problem"),
        ("words", r"words/results.jsonl:1: no result of a problem"),
        ("settings", r"settings/results.json: broken, or of another program"),
    ],
)
def test_what_cannot_be_compared(tmp_path, name, sentence):
    a = write_evaluation(tmp_path / "a", [1, 2])
    write_evaluation(tmp_path / "longer", [1, 2, 3])
    write_evaluation(tmp_path / "other", [1, 2], benchmark="other")
    write_evaluation(tmp_path / "empty", [])
    write_evaluation(tmp_path / "cut", [1, 2])
    path = tmp_path / "cut/results.jsonl"
    path.write_text(path.read_text()[:-9])
    write_evaluation(tmp_path / "foreign", [1])
    report.append_jsonl(tmp_path / "foreign/results.jsonl", [{"benchmark": "x", "score": 1}])
    write_evaluation(tmp_path / "list", [])
    report.append_jsonl(tmp_path / "list/results.jsonl", [[1, 2]])
    result = {"prompt": "q", "level": None, "samples": 0, "correct": 0}
    write_evaluation(tmp_path / "no samples", [1])
    report.append_jsonl(tmp_path / "no samples/results.jsonl", [result])
    write_evaluation(tmp_path / "words", [])
    report.append_jsonl(tmp_path / "words/results.jsonl", [result | {"samples": "many"}])
    write_evaluation(tmp_path / "settings", [1, 2])
    (tmp_path / "settings/results.json").write_text('{"other": 1}')
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        evaluate.compare(a, str(tmp_path / name), tmp_path / "out")


# ------------------------------------------------------------------------ the real program and vLLM


def command(model, files, out, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    line = [*launcher, "evaluate.py", "--model", model, "--samples", 4]
    line += ["--max-response-tokens", 112, "--data", *files, "--out", out]
    return [str(word) for word in line]


def run(line):
    """Run a command; return what it printed."""
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """40 toy sums in two files, the second with levels."""
    folder = tmp_path_factory.mktemp("sums")
    rows = report.read_jsonl(TOY_SUMS)
    without_level = [{"prompt": r["prompt"], "answer": r["answer"]} for r in rows[::12]]
    (folder / "amc23.json").write_text(json.dumps(without_level))
    report.append_jsonl(folder / "mine.jsonl", rows[1::8])
    return [folder / "amc23.json", folder / "mine.jsonl"]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """An evaluation that was not interrupted: (directory, what it printed)."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(command(make.BASE, files, out))


def test_every_setting_stands_above_the_table(whole):
    above = whole[1].split("| benchmark")[0]
    for setting in (
        "temperature: 0.6",
        "top_p: 0.95",
        "max_response_tokens: 112",
        "seed: 0",
        "weights: ",
        "amc23 16 problems",
        "4 samples each",
        "system_prompt: Please reason",
        "vllm 0.32.0",
        "math-verify 0.9.0",
        "device: ",
    ):
        assert setting in above, setting


def test_the_numbers_follow_from_the_responses(whole, files):
    """The written responses, graded by hand, give the written results."""
    out, _ = whole
    rows = report.read_jsonl(out / "results.jsonl")
    assert [row["benchmark"] for row in rows] == ["amc23"] * 16 + ["mine"] * 24
    generations = responses_in(out)
    problems = data.load_problems(files[0]) + data.load_problems(files[1])
    assert len(generations) == len(problems) == len(rows)
    for i, (row, problem) in enumerate(zip(rows, problems, strict=True)):
        index = i if row["benchmark"] == "amc23" else i - 16
        responses = generations[row["benchmark"], index]
        assert row["prompt"] == problem["prompt"]
        assert row["lengths"] == [response["tokens"] for response in responses]
        right = [r["text"].endswith(f"\\boxed{{{problem['answer']}}}") for r in responses]
        assert row["correct"] == sum(right)


def test_more_samples_solve_more_problems(whole):
    numbers = json.loads((whole[0] / "results.json").read_text())["results"]
    assert numbers.keys() == {"amc23", "mine", "mean"}
    assert numbers["mine"]["levels"].keys() == set("123456")
    assert 0 < numbers["amc23"]["avg@4"][0] < numbers["amc23"]["pass@4"][0] < 1


def test_killed_and_continued_on_two_ranks_it_ends_with_the_same_table(whole, files, tmp_path):
    out = tmp_path / "out"
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    program = subprocess.Popen(command(make.BASE, files, out), cwd=REPOSITORY, **silent)
    path = out / "generations.0.jsonl"
    while not path.exists() or path.read_text().count("\n") < 4:
        assert program.poll() is None
        time.sleep(0.01)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    text = path.read_text()
    kept = text.count("\n")
    assert 4 <= kept < 40
    assert not (out / "table.md").exists()
    path.write_text(text + '{"benchmark": "mine", "index": 3, "respon')  # as a kill may leave it
    run(command(make.BASE, files, out, ranks=2))
    for name in ("table.md", "results.jsonl"):
        assert (out / name).read_text() == (whole[0] / name).read_text()
    assert responses_in(out) == responses_in(whole[0])
    by_rank_1 = (out / "generations.1.jsonl").read_text().count("\n")
    assert 0 < by_rank_1 < 40 - kept  # the two engines shared what was missing


def chain(folder):
    """A Qwen2 whose next token depends on the last one alone, saved in `folder`.

    Whatever is asked, it boxes a digit or one of the letters A to D.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make.tokenizer()
    choices = list("0123456789ABCD")
    after = {"\n": ["\\"], "\\": ["boxed"], "boxed": ["{"], "{": choices, "}": ["<eos>"]}
    after |= {choice: ["}"] for choice in choices}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        # Only the weights of the norms remain, so that no layer adds to the embedding.
        for parameter in model.parameters():
            parameter.fill_(parameter.ndim == 1)
        model.model.embed_tokens.weight[:, 63] = 1
        for state, (text, following) in enumerate(after.items()):
            token = tokenizer.encode(text)[0]
            model.model.embed_tokens.weight[token] = torch.eye(64)[state]
            for next_text in following:
                # The norm turns the embedding's 1 into 8, so the logit is 24.
                model.lm_head.weight[tokenizer.encode(next_text)[0], state] = 3.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_weights_that_are_not_numbers_are_no_score_of_0(files, tmp_path):
    from safetensors.torch import load_file, save_file

    model = chain(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = command(model, files[:1], tmp_path / "out")
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert f"error: --model {model}: its weights are not finite numbers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not LOCAL_BENCHMARKS.exists(), reason="needs local copies of the benchmarks")
def test_the_paper_protocol_on_local_benchmarks(tmp_path):
    """From start to table. One answer in 14 is right where it is a digit or a letter."""
    benchmarks = sorted(LOCAL_BENCHMARKS.glob("*.json"))
    line = [sys.executable, "evaluate.py", "--model", chain(tmp_path / "model"), "--paper"]
    line += ["--data", *benchmarks, "--out", tmp_path / "out"]
    printed = run([str(word) for word in line])
    numbers = json.loads((tmp_path / "out/results.json").read_text())["results"]
    mean = numbers.pop("mean")
    assert len(mean["benchmarks"]) == 6
    assert sum(part["problems"] for part in numbers.values()) == 1744
    assert {name for name, part in numbers.items() if part["samples"] == 32} == {
        "aime24",
        "aime25",
        "amc23",
    }
    assert {part["samples"] for part in numbers.values()} == {1, 32}
    assert 0 < numbers["gpqa"]["avg@1"][0] < 0.2
    assert 0 < numbers["amc23"]["avg@32"][0] < 0.1
    assert all(f"| {name}" in printed for name in (*numbers, "mean of 6"))
