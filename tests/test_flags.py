"""common/flags.py: what flags accept, which contradict, files of flags, the defaults, --help."""

import json
import math
import re
from pathlib import Path

import pytest
from programs import ROOT

from common import benchmarks, data, flags

TRAINING, EVALUATION = flags.training_parser(), flags.evaluation_parser()


def train(*words):
    return flags.parse_training_args(list(words))


def evaluate(*words):
    return flags.parse_evaluation_args(["--model", "m", "--data", "x.jsonl", *words])


@pytest.fixture
def refuse(capsys):
    """A function that asserts that a parser refuses some flags with one sentence on them."""

    def refused(parse, words, sentence):
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        assert stop.value.code == 2
        usage, last_line = capsys.readouterr().err.strip().splitlines()
        assert "error: " in last_line and sentence in last_line

    return refused


# ------------------------------------------------------------------------------- one flag at a time

NUMBERS = [  # a flag, what it accepts, what it refuses
    ("--steps", ["1", "7"], ["0", "-1", "1.5", "x", "nan", "inf", ""]),
    ("--seed", ["0", "7"], ["-1", "1.5", "x", "nan"]),
    ("--lr", ["1e-300", "7"], ["0", "-1", "x", "nan", "-inf"]),
    ("--clip-eps", ["0.2", "inf"], ["0", "-0.1", "nan"]),
    ("--sft-coef", ["0", "7.5"], ["-1e-300", "x", "nan"]),
    ("--gamma", ["0", "0.25", "1"], ["-0.1", "1.0000001", "x", "nan", "inf"]),
    ("--gpu-memory-utilization", ["1e-300", "1"], ["0", "1.0000001", "nan"]),
]


@pytest.mark.parametrize("flag, accepted, refused", NUMBERS)
def test_a_number_is_accepted_or_refused_with_its_rule(refuse, flag, accepted, refused):
    for text in accepted:
        assert getattr(train(flag, text), flag[2:].replace("-", "_")) == float(text)
    for text in refused:
        refuse(train, [f"{flag}={text}"], f"argument {flag}: must be a")


@pytest.mark.parametrize("parser", [TRAINING, EVALUATION], ids=lambda parser: parser.prog)
def test_every_number_refuses_what_is_none(parser):
    for action in parser._actions:
        if isinstance(action.default, int | float) and action.type:
            with pytest.raises(flags.argparse.ArgumentTypeError):
                action.type("nan")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--gamma", "1.5"], "argument --gamma: must be a number of at least 0 and at most 1, not"),
        (["--stpes", "3"], "unrecognized arguments: --stpes 3"),
        (["--step", "3"], "unrecognized arguments: --step 3"),  # flags are not abbreviated
        (["--method", "dpo"], "argument --method: invalid choice: 'dpo'"),
        (["--pi-old", "old"], "argument --pi-old: invalid choice: 'old'"),
        (["--columns", "question=x"], "argument --columns: must be KEY=COLUMN,... with the keys"),
        (["--columns", "prompt"], "argument --columns: must be KEY=COLUMN,..."),
        (["--columns", "prompt="], "argument --columns: must be KEY=COLUMN,..."),
        (["--out", str(ROOT)], f"--out {ROOT} exists already: name another directory"),
        (["--data", "x.jsonl"], "--model is missing"),
        (["--method", "grpo", "--samples-per-prompt", "1"], "must be at least 2"),
        (["--method", "luffy", "--samples-per-prompt", "1"], "must be at least 2"),
        (["--method", "chord"], "--method chord needs a schedule: --gate examples.gates:chord"),
        (["--method", "grpo", "--gate", "m:f"], "--gate is for hpt, hpt_... and chord"),
        (["--minibatches-per-step", "33"], "must not be above --prompts-per-step"),
        (["--resume"], "--resume needs --out"),
        (["--tensor-parallel", "2"], "--tensor-parallel must divide the number of ranks, 1"),
        (["@none.args"], "none.args"),
    ],
)
def test_wrong_flags_of_training_are_one_sentence(refuse, words, sentence):
    refuse(train, words, sentence)


def test_flags_of_training_that_go_together():
    for method in ("sft", "dft", "reinforce", "ppo", "hpt"):  # these need no group
        train("--method", method, "--samples-per-prompt", "1")
    train("--method", "luffy", "--samples-per-prompt", "2")
    train("--method", "chord", "--gate", "examples.gates:chord", "--minibatches-per-step", "32")
    args = train("--columns", "prompt=problem, answer=reward_model.ground_truth")
    assert args.columns == {"prompt": "problem", "answer": "reward_model.ground_truth"}
    assert train().columns == {} and train("--plan").plan == 0.0 and train().plan is None


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--top-p", "2"], "argument --top-p: must be a number above 0 and at most 1, not 2"),
        (["--bench", "none"], "argument --bench: invalid choice: 'none'"),
        (["--compare", "a"], "argument --compare: expected 2 arguments"),
        (["--paper", "--samples", "8"], "--paper sets --samples itself"),
        (["--data", "a/x.json", "b/x.json"], "two are named alike, of x x"),
        (["--temperature", "0"], "--temperature 0 always gives the same answer: use --samples 1"),
        (["--model", ""], "--model is missing"),
        (["--sampler", "transformers", "--tensor-parallel", "1", "--data"], "nothing to evaluate"),
    ],
)
def test_wrong_flags_of_an_evaluation_are_one_sentence(refuse, words, sentence):
    parse = (
        evaluate
        if words[-1] != "--data"
        else lambda *_: flags.parse_evaluation_args(["--model", "m"])
    )
    refuse(parse, words, sentence)


def test_flags_of_an_evaluation_that_go_together():
    assert evaluate("--temperature", "0", "--samples", "1").temperature == 0
    assert evaluate().samples == 8
    assert flags.parse_evaluation_args(["--compare", "a", "b"]).compare == ["a", "b"]


def test_paper_is_one_flag():
    args = flags.parse_evaluation_args(["--model", "m", "--paper"])
    assert args.bench == list(benchmarks.BENCHMARKS)
    assert (args.temperature, args.top_p, args.max_response_tokens) == (0.6, 0.95, 8192)
    assert (args.system_prompt, args.template) == (data.SYSTEM, "chat")
    assert evaluate("--paper", "--bench", "amc").bench == ["amc"]


# ----------------------------------------------------------------------------------- files of flags


def write(path, text):
    path.write_text(text)
    return f"@{path}"


def test_a_file_stands_for_the_flags_in_it_and_later_flags_win(tmp_path):
    text = "# a comment\n\n--model {repo}/toy/base --steps 3  # two flags\n"
    text += "--system-prompt 'Put it in \\boxed{}, # and stop.'\n"
    file = write(tmp_path / "a.args", text)
    args = train(file, "--seed", "9")
    assert (Path(args.model), args.steps, args.seed) == (ROOT / "toy/base", 3, 9)
    assert args.system_prompt == "Put it in \\boxed{}, # and stop."
    assert train(file, "--steps", "4").steps == 4 and train("--steps", "4", file).steps == 3


def test_a_wrong_flag_in_a_file_is_named(refuse, tmp_path):
    file = write(tmp_path / "a.args", "--model m\n--steps 0\n")
    refuse(train, [file], "argument --steps: must be a whole number of at least 1, not 0")


# ------------------------------------------------------------------------------------- the defaults


def test_segments_that_expand_crash_engines_that_ranks_share(monkeypatch, capsys):
    words = ["--model", "m", "--tensor-parallel", "2"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert flags.parse_training_args(words).tensor_parallel == 2
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert flags.parse_training_args(words[:2]).tensor_parallel == 1
    with pytest.raises(SystemExit):
        flags.parse_training_args(words)
    assert "expandable_segments:True end in a crash" in capsys.readouterr().err


def test_the_toy_is_its_flags_and_otherwise_the_defaults():
    wanted = vars(TRAINING.parse_args([f"@{ROOT}/toy/toy.args"]))
    assert vars(train()) == wanted
    assert (wanted["steps"], wanted["prompts_per_step"], wanted["lr"]) == (36, 32, 2.5e-4)
    args = train("--steps", "3", "--eval-data", "x.jsonl")
    assert (args.steps, args.eval_data, args.lr) == (3, "x.jsonl", 2.5e-4)


@pytest.mark.parametrize("words", [["--model", "m"], ["--model=m"]])
def test_a_model_of_your_own_is_not_trained_with_the_flags_of_the_toy(words):
    assert vars(train(*words)) == vars(TRAINING.parse_args([])) | {"model": "m"}


def test_the_defaults_are_the_run_of_the_paper():
    args = train("--model", "m")
    assert args.data == "Elliott/Openr1-Math-46k-8192"
    assert (args.max_prompt_tokens, args.max_response_tokens) == (1024, 8192)
    assert (args.prompts_per_step, args.samples_per_prompt, args.temperature) == (128, 8, 1.0)
    assert (args.steps, args.minibatches_per_step, args.lr) == (500, 2, 5e-6)
    assert (args.weight_decay, args.max_grad_norm, args.warmup_steps) == (0.01, 1.0, 0)
    assert (args.method, args.gate, args.gamma, args.sft_coef) == ("hpt", None, 0.0, 0.05)
    assert (args.clip_eps, args.pi_old, args.entropy_coef) == (None, "trainer", 0.0)


def test_the_flags_can_be_written_as_json():
    args = train("--clip-eps", "inf")
    assert json.loads(json.dumps(vars(args))) == vars(args) and args.clip_eps == math.inf


# -------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("parser", [TRAINING, EVALUATION], ids=lambda parser: parser.prog)
def test_every_flag_has_a_help_that_ends_in_the_default(parser):
    assert parser.format_help()  # argparse fills in the defaults, and can fail to
    for action in parser._actions[1:]:
        text = parser._get_formatter()._expand_help(action)
        assert text, action.dest
        if type(action.default) in (int, float):
            [*_, shown] = re.findall(r"\(([\d.e-]+)\)", text)
            assert float(shown) == action.default, action.dest
        elif isinstance(action.default, str) and action.dest != "system_prompt":
            assert f"({action.default})" in text or action.choices, action.dest
