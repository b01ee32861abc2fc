"""Measures against brute force, benchmarks by name, the comparison of two evaluations, and evaluate.py itself with real vLLM."""
import fcntl
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks
import data
import evaluate
import tables
import toy
from evaluate import by_level, mean_and_error, mean_pass_at_k, pass_at_k, summary

HERE = Path(__file__).parent
LOCAL = HERE.parent / "shared/data/benchmarks"


# ------------------------------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    assert 1 - (1 - 2 / 4) ** 2 != pytest.approx(pass_at_k(4, 2, 2))  # negative control: the biased plug-in estimate


def test_mean_and_standard_error_over_problems():
    values = [0.0, 0.25, 1.0, 0.5]
    mean, error = mean_and_error(values)
    assert mean == statistics.fmean(values) and error == pytest.approx(statistics.stdev(values) / 2)
    assert mean_and_error([0.5])[0] == 0.5 and math.isnan(mean_and_error([0.5])[1])


def test_summary_and_levels():
    results = [{"level": level, "correct": c, "samples": 4, "lengths": [1, 2, 3, c], "truncated": c // 4} for level, c in ((2, 4), (10, 0), (2, 2))]
    assert list(by_level(results)) == [2, 10, "all"] and len(by_level(results)["all"]) == 3
    scores = summary(results)
    assert [name for name in scores if "@" in name] == ["avg@4", "pass@1", "pass@2", "pass@3", "pass@4"]
    assert scores["avg@4"][0] == pytest.approx(0.5) == scores["pass@1"][0] and scores["pass@4"][0] == pytest.approx(2 / 3)
    assert scores["truncated"] == 1 / 12 and scores["length/mean"] == 24 / 12 and scores["length/max"] == 4 and scores["length/median"] == 2
    assert mean_pass_at_k(results, 3)[0] == pytest.approx((1 + 0 + pass_at_k(4, 2, 3)) / 3)


# ---------------------------------------------------------------------------------------------------------- benchmarks

def test_benchmarks_from_the_hub_by_name(tmp_path, monkeypatch):
    """Local data sets with the hub's columns, read by the real `datasets`."""
    datasets = pytest.importorskip("datasets")
    gpqa = {"Question": "Which?", "Correct Answer": "right\n", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2", "Incorrect Answer 3": "w3"}
    rows = {"aime24": ("train", {"id": 60, "problem": "P", "answer": "204"}), "amc": ("train", {"problem": "P", "answer": 142.0}),
            "math500": ("test", {"problem": "P", "solution": "S", "answer": "p - q", "subject": "Algebra", "level": 3}),
            "minerva": ("test", {"question": "P", "answer": "4.5e33"}), "olympiad": ("test", {"question": "P", "final_answer": ["$2$", "$3$"]}),
            "arc_c": ("test", {"question": "Q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"}),
            "gpqa": ("train", gpqa)}
    for name, (split, row) in rows.items():
        config, folder = benchmarks.BENCHMARKS[name].config or "default", tmp_path / name
        folder.mkdir()
        datasets.Dataset.from_list([row]).to_parquet(folder / "rows.parquet")
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: rows.parquet\n---\n")
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, benchmarks.BENCHMARKS[name]._replace(hub=str(folder)))
    got = {name: benchmarks.load(name) for name in rows}
    assert got["aime24"] == [{"prompt": "P", "answer": "204"}] and got["amc"] == [{"prompt": "P", "answer": "142"}]
    assert got["math500"] == [{"prompt": "P", "answer": "p - q", "level": 3}] and got["olympiad"][0]["answer"] == "$2$, $3$"
    assert got["arc_c"] == [{"prompt": "Q\n\nA. a\nB. b\nC. c", "answer": "B"}]
    question, letter = got["gpqa"][0]["prompt"], got["gpqa"][0]["answer"]
    assert f"{letter}. right" in question.splitlines() and sorted(line[3:] for line in question.splitlines()[2:]) == ["right", "w1", "w2", "w3"]
    assert [line[:3] for line in question.splitlines()] == ["Whi", "", "A. ", "B. ", "C. ", "D. "]
    assert got["gpqa"] == benchmarks.load("gpqa")
    monkeypatch.setitem(benchmarks.BENCHMARKS, "aime24", benchmarks.BENCHMARKS["aime24"]._replace(question="Problem"))
    with pytest.raises(SystemExit, match=r"--bench aime24: row 1 of .* \(KeyError: 'Problem'\); it has: id, problem, answer"):
        benchmarks.load("aime24")
    assert {letter for i in range(40) for letter in benchmarks._problem("gpqa", benchmarks.BENCHMARKS["gpqa"], gpqa | {"Question": str(i)})["answer"]} == set("ABCD")


def test_paper_is_one_flag():
    args = evaluate.parse_args(["--model", "m", "--paper"])
    assert args.bench == list(benchmarks.BENCHMARKS) and (args.temperature, args.top_p, args.max_response_tokens) == (0.6, 0.95, 8192)
    assert args.system_prompt == data.SYSTEM and args.template == "chat"
    files = {"aime24": 32, "aime25": 32, "amc23": 32, "amc": 32, "math500": 1, "minerva": 1, "olympiadbench": 1, "arc_c": 1, "gpqa": 1, "mine": 1, "AIME_2024": 32, "AMC": 32}
    assert {name: benchmarks.paper_samples(name) for name in files} == files


@pytest.mark.parametrize("flags, sentence", [
    (["--paper", "--temperature", "1"], "--paper sets --temperature itself"), ([], "nothing to evaluate on"),
    (["--data", "a/x.json", "b/x.json"], "two are named alike"), (["--compare", "a", "b"], "--compare takes two directories"),
    (["--paper", "--seed", "-1"], "--seed must be from 0"), (["--paper", "--rope-theta", "0"], "--rope-theta must be above 0"), (["--bench", "none"], "invalid choice: 'none'")])
def test_bad_flags(capsys, flags, sentence):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--model", "m", *flags])
    assert sentence in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- compare

def write_results(folder, correct, samples=4, levels=None, file="results.jsonl", **more):
    folder.mkdir(exist_ok=True)
    evaluate.write(folder / file, [{"prompt": f"q{i}", "level": levels and levels[i], "samples": samples, "correct": c} for i, c in enumerate(correct)], **more)


def test_a_comparison_by_hand(tmp_path, capsys):
    a, b, levels = [4, 3, 0, 2, 4, 4], [4, 1, 3, 3, 0, 0], [1, 1, 2, 2, 3, 3]
    write_results(tmp_path / "a", a, levels=levels, benchmark="x")
    write_results(tmp_path / "b", b, levels=levels, benchmark="x")
    tables.compare(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out"))
    got = json.loads((tmp_path / "out/comparison.json").read_text())["results"]
    assert got["x"]["a"] == pytest.approx(17 / 24) and got["x"]["difference"] == pytest.approx((17 - 11) / 24)
    assert got["x"]["exclusive"] == [3, 2]  # q1, q4, q5 against q2, q3; half of the samples is no solve
    assert got["x, level 1"]["exclusive"] == [1, 0] and got["x, level 2"]["exclusive"] == [0, 2] and got["x, level 3"]["exclusive"] == [2, 0]
    assert got["x, level 3"]["interval"] == [1.0, 1.0]
    printed = capsys.readouterr().out
    assert "+3/-2" in printed and "+25.0" in printed
    assert (tmp_path / "out/pass.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "out/comparison.md").read_text().count("|\n") == 2 + 4


def test_the_interval_is_paired(tmp_path):
    """Two runs that differ by a constant: paired, the interval is narrow, where that of independent means would be wide."""
    rng = random.Random(0)
    b = [rng.choice((0, 60)) for _ in range(400)]
    write_results(tmp_path / "a", [c + rng.choice((2, 4)) for c in b], samples=64)
    write_results(tmp_path / "b", b, samples=64)
    tables.compare(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out"))
    got = json.loads((tmp_path / "out/comparison.json").read_text())["results"]["held out"]
    low, high = got["interval"]
    paired, unpaired = 1.96 / 64 / 20, 1.96 * 30 / 64 * math.sqrt(2) / 20
    assert low < got["difference"] < high and (high - low) / 2 == pytest.approx(paired, rel=0.1) and high - low < unpaired / 5


def test_what_cannot_be_compared(tmp_path):
    write_results(tmp_path / "a", [1, 2])
    write_results(tmp_path / "b", [1, 2, 3])
    write_results(tmp_path / "c", [1, 2], benchmark="other")
    write_results(tmp_path / "empty", [])
    write_results(tmp_path / "cut", [1, 2])
    (tmp_path / "cut/results.jsonl").write_text((tmp_path / "cut/results.jsonl").read_text()[:-9])
    for other, sentence in (("b", "held out is not the same problems"), ("c", "no benchmark in common"), ("none", "no results.jsonl"),
                            ("empty", "results.jsonl is empty"), ("cut", "results.jsonl or results.json is broken")):
        with pytest.raises(SystemExit, match=f"--compare.*{sentence}"):
            tables.compare(str(tmp_path / "a"), str(tmp_path / other), str(tmp_path / "out"))
    write_results(tmp_path / "d", [0, 0], file="held_out.jsonl", step=0)  # a training run: its last evaluation counts
    write_results(tmp_path / "d", [4, 2], file="held_out.jsonl", step=9)
    (tmp_path / "d/config.json").write_text(json.dumps({"flags": {"lr": 1, "steps": 9}}))
    tables.compare(str(tmp_path / "d"), str(tmp_path / "a"), str(tmp_path / "out"))
    assert "- step: 9 in A, None in B\n" in (tmp_path / "out/comparison.md").read_text()
    assert json.loads((tmp_path / "out/comparison.json").read_text())["results"]["held out"]["a"] == 6 / 8


# ----------------------------------------------------------------------------------------------------- the real program

def chain(folder):
    """A Qwen2 whose next token depends on the last one alone: whatever is asked, it boxes a digit or one of four letters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    tokenizer = toy.tokenizer()
    after = {"\n": ["\\"], "\\": ["boxed"], "boxed": ["{"], "{": list("0123456789ABCD"), "}": ["<eos>"]} | dict.fromkeys("0123456789ABCD", ["}"])
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=16384, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))
    token = lambda text: tokenizer.encode(text)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(parameter.ndim == 1)  # nothing but the norms' ones is left: no layer adds to the embedding
        model.model.embed_tokens.weight[:, 63] = 1
        for state, (text, following) in enumerate(after.items()):
            model.model.embed_tokens.weight[token(text)] = torch.eye(64)[state]
            for next_text in following:
                model.lm_head.weight[token(next_text), state] = 3.0  # times 8, which the norm makes of a one
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not LOCAL.exists(), reason="needs the benchmarks' local copies")
def test_the_paper_protocol_on_all_local_benchmarks(tmp_path):
    """From start to table; of the answers one in 14 is right where it is a digit or a letter."""
    done = subprocess.run([sys.executable, "evaluate.py", "--model", str(chain(tmp_path / "model")), "--paper", "--data", *map(str, sorted(LOCAL.glob("*.json"))),
                           "--out", str(tmp_path / "out")], cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    written = json.loads((tmp_path / "out/results.json").read_text())["results"]
    problems = {name: (part["problems"], part["samples"]) for name, part in written.items() if name != "mean"}
    assert sum(count for count, _ in problems.values()) == 1744
    assert {name for name, (_, n) in problems.items() if n == 32} == {"aime24", "aime25", "amc23"} and {n for _, n in problems.values()} == {1, 32}
    assert 0 < written["gpqa"]["avg@1"][0] < 0.2 and 0 < written["amc23"]["avg@32"][0] < 0.1
    assert all(f"| {name}" in done.stdout for name in written)


@pytest.fixture(scope="module")
def model():
    return toy.BASE


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Toy sums in two files, one with levels."""
    folder, rows = tmp_path_factory.mktemp("problems"), toy.problems()[1]
    (folder / "amc23.json").write_text(json.dumps([{"prompt": r["prompt"], "answer": r["answer"]} for r in rows[::4]]))
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1::2]))
    return [folder / "amc23.json", folder / "mine.jsonl"]


def command(model, problems, out, ranks=1):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [str(x) for x in (sys.executable, *launcher, "evaluate.py", "--model", model, "--samples", 4, "--max-response-tokens", 112, "--data", *problems, "--out", out)]


def run(*args, **more):
    done = subprocess.run(command(*args, **more), cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole(model, problems, tmp_path_factory):
    """An uninterrupted evaluation: (directory, what it printed)."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(model, problems, out)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_an_evaluation_prints_and_writes(whole, problems):
    out, printed = whole
    assert (out / "table.md").read_text() in printed
    above = printed.split("| benchmark")[0]
    for setting in ("temperature: 0.6", "top_p: 0.95", "max_response_tokens: 112", "seed: 0", "weights: ", "amc23 48 problems", "4 samples each",
                    "system_prompt: Please reason", "vllm 0.32.0", "math-verify 0.9.0", "device: "):
        assert setting in above, setting
    written = json.loads((out / "results.json").read_text())["results"]
    assert set(written) == {"amc23", "mine", "mean"} and all(f"pass@{k}" in written["amc23"] for k in (1, 2, 3, 4)) and set(written["mine"]["levels"]) == set("123456")
    rows = read(out / "results.jsonl")
    by_name = {name: [r for r in rows if r["benchmark"] == name] for name in ("amc23", "mine")}
    assert [len(part) for part in by_name.values()] == [48, 96]
    assert written["amc23"]["avg@4"][0] == pytest.approx(sum(r["correct"] for r in by_name["amc23"]) / 48 / 4)
    assert 0 < written["amc23"]["avg@4"][0] < written["amc23"]["pass@4"][0] < 1
    generations = read(out / "generations.jsonl")
    assert [(g["benchmark"], g["index"]) for g in generations] == [("amc23", i) for i in range(48)] + [("mine", i) for i in range(96)]
    assert [sum(r["tokens"] for r in g["responses"]) for g in generations] == [sum(r["lengths"]) for r in rows]
    answers = [row["answer"] for row in data.load_problems(problems[0]) + data.load_problems(problems[1])]
    for g, r, answer in zip(generations, rows, answers):
        assert sum(response["text"].endswith(f"\\boxed{{{answer}}}") for response in g["responses"]) == r["correct"]
    assert not list(out.glob("*.part*"))


def test_killed_in_the_middle_it_finishes_with_the_same_table(whole, model, problems, tmp_path):
    out = tmp_path / "out"
    program = subprocess.Popen(command(model, problems, out), cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (parts := list(out.glob("*.part"))) or parts[0].read_text().count("\n") < 20:
        assert program.poll() is None
        time.sleep(0.01)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    text = parts[0].read_text()
    kept = [json.loads(line) for line in text.split("\n")[:-1]]
    assert 20 <= len(kept) < 144 and not (out / "table.md").exists()
    lines = text.splitlines(keepends=True)  # two lines cut by a kill, one of them with a later run's line behind it
    parts[0].write_text("".join(lines[:5]) + '{"benchmark": "mine", "ind' + "".join(lines[5:]) + '{"benchmark": "mine", "index": 3, "respon')
    run(model, problems, out, ranks=2)
    for name in ("table.md", "results.jsonl"):
        assert (out / name).read_text() == (whole[0] / name).read_text()
    assert {(g["benchmark"], g["index"]): g for g in read(out / "generations.jsonl")} == {(g["benchmark"], g["index"]): g for g in read(whole[0] / "generations.jsonl")}


def test_what_is_there_is_not_sampled_again(whole, model, problems, tmp_path):
    """Negative control of the test above: a generation that was changed stays so, and changes the table."""
    out = tmp_path / "out"
    out.mkdir()
    lines = (whole[0] / "generations.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    first["responses"] = [{"text": "\\boxed{x}", "tokens": 7, "truncated": True}] * 4
    (out / "generations.jsonl").write_text(json.dumps(first) + "\n" + "".join(lines[1:-5]))
    (out / "settings.json").write_text((whole[0] / "settings.json").read_text())
    run(model, problems, out)
    assert read(out / "results.jsonl")[0]["lengths"] == [7] * 4 and read(out / "results.jsonl")[1:] == read(whole[0] / "results.jsonl")[1:]
    assert (out / "table.md").read_text() != (whole[0] / "table.md").read_text()


def test_a_single_problem_has_no_standard_error(tmp_path, capsys):
    result = {"prompt": "q", "level": None, "samples": 2, "correct": 1, "lengths": [3, 5], "truncated": 0}
    tables.report(tmp_path, {}, {"x": [result], "y": [result]}, {"x": 0, "y": 0})
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))["results"]
    assert written["x"]["avg@2"] == [0.5, None] and "50.0 ± nan" in capsys.readouterr().out


def test_weights_that_are_not_numbers_are_no_score_of_0(problems, tmp_path):
    from safetensors.torch import load_file, save_file
    model = chain(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(command(model, problems[:1], tmp_path / "out"), cwd=HERE, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "error: the model's probabilities are not numbers (nan)" in done.stderr and "Traceback" not in done.stderr


def test_a_directory_holds_one_evaluation(whole, model, problems, tmp_path):
    def fails(sentence, *more):
        done = subprocess.run([*command(model, problems, whole[0]), *map(str, more)], cwd=HERE, capture_output=True, text=True)
        assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    table = (whole[0] / "table.md").read_text()
    fails("holds an evaluation with another seed, 0, not 1", "--seed", 1)
    fails("holds no evaluation", "--out", HERE / "toy_base")
    (tmp_path / "settings.json").touch()
    (tmp_path / "generations.jsonl").write_text((whole[0] / "generations.jsonl").read_text())  # of unknown settings
    fails("settings.json is broken", "--out", tmp_path)
    with open(whole[0] / "settings.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fails("another evaluation is writing there")
    assert (whole[0] / "table.md").read_text() == table
