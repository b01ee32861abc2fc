"""common/flags.py: what each flag accepts, files of flags, the shipped files, and --help."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import upge
from common import data, flags
from toy import make

REPOSITORY = Path(__file__).resolve().parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def train(*words):
    return flags.parse_training_args(list(words))


def evaluate(*words):
    return flags.parse_evaluation_args(["--model", "m", "--data", "x.jsonl", *words])


@pytest.fixture
def refuse(capsys):
    """A function that asserts that a parser refuses some flags with a sentence on them."""

    def refused(parse, words, sentence):
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        assert stop.value.code == 2
        last_line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "error: " in last_line
        assert sentence in last_line

    return refused


# ------------------------------------------------------------------------------- one flag at a time

# What each type of number accepts and refuses, at its bounds and elsewhere.
NUMBERS = {
    flags.COUNT: (["1", "7"], ["0", "-1", "1.5", "x", "nan", "inf", ""]),
    flags.COUNT_OR_0: (["0", "7"], ["-1", "1.5", "x", "nan", "inf"]),
    flags.SEED: (["0", "4294967295"], ["-1", "4294967296", "0.5", "nan", "inf"]),
    flags.POSITIVE: (["1e-300", "7"], ["0", "-1", "x", "nan", "inf", "-inf", "1e400"]),
    flags.POSITIVE_OR_INF: (["1e-300", "7", "inf"], ["0", "-1", "x", "nan", "-inf"]),
    flags.POSITIVE_OR_0: (["0", "7.5"], ["-1e-300", "x", "nan", "inf", "-inf"]),
    flags.SHARE: (["0", "0.25", "1"], ["-0.1", "1.0000001", "x", "nan", "inf"]),
    flags.SHARE_ABOVE_0: (["1e-300", "1"], ["0", "1.0000001", "x", "nan", "inf"]),
}
TRAINING_NUMBERS = {
    flags.COUNT: [
        "--max-position-embeddings",
        "--max-prompt-tokens",
        "--max-response-tokens",
        "--prompts-per-step",
        "--samples-per-prompt",
        "--tensor-parallel",
        "--steps",
        "--minibatches-per-step",
        "--replicas",
        "--tokens-per-microbatch",
        "--eval-samples",
    ],
    flags.COUNT_OR_0: [
        "--warmup-steps",
        "--eval-every",
        "--probe-gradients",
        "--save-every",
        "--keep",
        "--max-skipped",
        "--chord-steps",
    ],
    flags.SEED: ["--seed"],
    flags.POSITIVE: ["--rope-theta", "--temperature", "--tis-cap", "--lr", "--critic-lr"],
    flags.POSITIVE_OR_INF: ["--clip-eps", "--max-grad-norm", "--value-clip"],
    flags.POSITIVE_OR_0: ["--plan", "--sft-coef", "--entropy-coef", "--weight-decay"],
    flags.SHARE: ["--gamma", "--gae-gamma", "--gae-lambda", "--chord-mu"],
    flags.SHARE_ABOVE_0: ["--gpu-memory-utilization"],
}
EVALUATION_NUMBERS = {
    flags.COUNT: [
        "--max-position-embeddings",
        "--max-response-tokens",
        "--samples",
        "--tensor-parallel",
    ],
    flags.SEED: ["--seed"],
    flags.POSITIVE: ["--rope-theta"],
    flags.POSITIVE_OR_0: ["--temperature"],
    flags.SHARE_ABOVE_0: ["--top-p", "--gpu-memory-utilization"],
}


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.rule)
def test_a_type_of_number_accepts_what_its_rule_says(kind):
    accepted, refused = NUMBERS[kind]
    for text in accepted:
        assert kind(text) == float(text)
    for text in refused:
        with pytest.raises(flags.argparse.ArgumentTypeError, match=f"{kind.rule[:9]}.*, not"):
            kind(text)


@pytest.mark.parametrize(
    "parser, numbers",
    [
        (flags.training_parser(), TRAINING_NUMBERS),
        (flags.evaluation_parser(), EVALUATION_NUMBERS),
    ],
    ids=["train_hpt.py", "evaluate.py"],
)
def test_every_number_has_its_type(parser, numbers):
    types = {}
    for action in parser._actions:
        if isinstance(action.type, flags.Number):
            types.setdefault(action.type, []).append(action.option_strings[0])
    assert {kind: sorted(names) for kind, names in types.items()} == {
        kind: sorted(names) for kind, names in numbers.items()
    }


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--steps", "0"], "argument --steps: must be a whole number of at least 1, not 0"),
        (["--gamma", "1.5"], "argument --gamma: must be a number from 0 to 1, not 1.5"),
        (["--gamma", "nan"], "argument --gamma: must be a number from 0 to 1, not nan"),
        (["--clip-eps", "-0.1"], "argument --clip-eps: must be a number above 0, or inf, not -0.1"),
        (["--lr", "inf"], "argument --lr: must be a number above 0, not inf"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0 to 2**32 - 1, not -1"),
        (["--stpes", "3"], "unrecognized arguments: --stpes 3"),
        (["--step", "3"], "unrecognized arguments: --step 3"),  # flags are not abbreviated
        (["--method", "dpo"], "argument --method: invalid choice: 'dpo'"),
        (["--pi-old", "old"], "argument --pi-old: invalid choice: 'old'"),
        (["--out", "."], "argument --out: . exists already: name another directory"),
        (
            ["--out", "pyproject.toml/x"],
            "pyproject.toml is no directory that can be written to",
        ),
        (["--critic", "x", "--method", "ppo"], "argument --critic: x is no model directory"),
    ],
)
def test_a_wrong_flag_of_training_is_one_sentence(refuse, monkeypatch, words, sentence):
    monkeypatch.chdir(REPOSITORY)
    refuse(train, words, sentence)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--top-p", "2"], "argument --top-p: must be a number above 0 and at most 1, not 2"),
        (["--tensor-parallel", "0"], "argument --tensor-parallel: must be a whole number of at"),
        (["--bench", "none"], "argument --bench: invalid choice: 'none'"),
        (["--compare", "a"], "argument --compare: expected 2 arguments"),
    ],
)
def test_a_wrong_flag_of_an_evaluation_is_one_sentence(refuse, words, sentence):
    refuse(evaluate, words, sentence)


def test_flags_that_are_right_are_accepted():
    args = train("--gamma", "0.25", "--clip-eps", "inf", "--steps", "3", "--pi-old", "tis")
    assert (args.gamma, args.clip_eps, args.steps, args.pi_old) == (0.25, math.inf, 3, "tis")


def test_columns_are_keys_and_names():
    args = train("--columns", "prompt=problem, answer=reward_model.ground_truth")
    assert args.columns == {"prompt": "problem", "answer": "reward_model.ground_truth"}
    assert train().columns is None
    assert evaluate("--columns", "prompt=question").columns == {"prompt": "question"}


# ------------------------------------------------------------------------------------ several flags


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--data", "x.jsonl"], "--data needs a --model; without one the toy trains on its own"),
        (["--method", "luffy", "--samples-per-prompt", "1"], "must be at least 2, not 1"),
        (["--method", "srft", "--samples-per-prompt", "1"], "must be at least 2, not 1"),
        *[
            (["--method", method, "--samples-per-prompt", "1"], "would train on nothing")
            for method in ("grpo", "dr_grpo", "rloo", "dapo", "cispo", "gspo")
        ],
        (["--columns", "question=x"], "argument --columns: must be KEY=COLUMN,... with the keys"),
        (["--columns", "prompt"], "argument --columns: must be KEY=COLUMN,..."),
        (["--columns", "prompt="], "argument --columns: must be KEY=COLUMN,..."),
        (["--columns", "prompt=a,prompt=b"], "names a column for prompt twice"),
        (["--eval-columns", "x=y"], "argument --eval-columns: must be KEY=COLUMN,..."),
        (["--critic", str(make.BASE)], "--critic is for --method ppo, not hpt"),
        (
            ["--method", "chord", "--chord-mu", "0.9", "0.05"],
            "--chord-mu 0.9 0.05 says that mu falls, but --chord-steps gives it no steps to fall",
        ),
        (
            ["--minibatches-per-step", "5", "--prompts-per-step", "4"],
            "--minibatches-per-step 5 needs at least as many --prompts-per-step, not 4",
        ),
    ],
)
def test_flags_of_training_that_contradict(refuse, words, sentence):
    refuse(train, words, sentence)


def test_flags_of_training_that_just_go_together():
    train("--method", "luffy", "--samples-per-prompt", "2")
    train("--method", "hpt", "--samples-per-prompt", "1")
    train("--method", "grpo", "--samples-per-prompt", "2")
    for method in ("sft", "dft", "reinforce", "ppo"):  # these need no group
        train("--method", method, "--samples-per-prompt", "1")
    train("--method", "ppo", "--critic", str(make.BASE))
    train("--minibatches-per-step", "4", "--prompts-per-step", "4")
    falling = ["--chord-mu", "0.9", "0.05"]
    train("--method", "chord", *falling, "--chord-steps", "0", "1")
    train("--method", "hpt", *falling)  # another method does not read them


def test_without_out_the_directory_runs_must_be_writable(refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train()  # negative control: it does not exist, and can be made
    (tmp_path / "runs").write_text("no directory")
    refuse(train, [], "the directory runs/ cannot be made or written to")
    train("--out", "elsewhere")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--paper", "--temperature", "1"], "--paper sets --temperature itself"),
        (["--paper", "--top-p", "1"], "--paper sets --top-p itself"),
        (["--paper", "--max-response-tokens", "9"], "--paper sets --max-response-tokens itself"),
        (["--paper", "--system-prompt", ""], "--paper sets --system-prompt itself"),
        (["--paper", "--samples", "8"], "--paper sets --samples itself"),
        (["--data", "a/x.json", "b/x.json"], "two are named alike, of x x"),
        (["--data", "a/amc.json", "--bench", "amc"], "two are named alike, of amc amc"),
        (["--temperature", "0"], "--temperature 0 always gives the same answer: use --samples 1"),
        (["--compare", "a", "b"], "--compare takes two directories"),
    ],
)
def test_flags_of_an_evaluation_that_contradict(refuse, words, sentence):
    refuse(evaluate, words, sentence)


def test_flags_of_an_evaluation_that_go_together():
    assert evaluate("--temperature", "0", "--samples", "1").temperature == 0
    assert flags.parse_evaluation_args(["--compare", "a", "b"]).compare == ["a", "b"]


def test_an_evaluation_needs_a_model_and_problems(refuse):
    def parse(*words):
        return flags.parse_evaluation_args(list(words))

    refuse(parse, ["--data", "x.jsonl"], "--model is missing")
    refuse(parse, ["--model", "m"], "nothing to evaluate on")


def test_paper_is_one_flag():
    args = flags.parse_evaluation_args(["--model", "m", "--paper"])
    assert args.bench == list(data.BENCHMARKS)
    assert (args.temperature, args.top_p, args.max_response_tokens) == (0.6, 0.95, 8192)
    assert (args.system_prompt, args.template) == (data.SYSTEM, "chat")


def test_paper_on_named_problems_takes_these_only():
    args = evaluate("--paper", "--bench", "amc")
    assert (args.bench, args.data) == (["amc"], ["x.jsonl"])


def test_an_evaluation_takes_8_samples():
    assert evaluate().samples == 8
    assert evaluate("--samples", "3").samples == 3


# --------------------------------------------------------------------------------- names of upge.py


def test_methods_are_those_of_upge():
    assert list(upge.METHODS) == flags.METHODS
    grouped = [name for name, method in upge.METHODS.items() if method.combine == "group"]
    assert grouped == flags.GROUP_METHODS


def test_methods_that_compare_rollouts_are_those_of_upge():
    """Those in which no row can learn from the rollouts of a prompt if there is one of them."""
    import torch

    found = []
    for name, method in upge.METHODS.items():
        if method.rollouts and not method.demonstration and not upge.TABLE[method.rollouts].critic:
            advantage = upge.TABLE[method.rollouts].advantage
            if not any(advantage(torch.tensor([[r]])).any() for r in (0.0, 0.5, 1.0)):
                found.append(name)
    assert sorted(found) == sorted(flags.COMPARING_METHODS)


def test_choices_are_those_of_upge():
    choices = {action.dest: action.choices for action in flags.training_parser()._actions}
    assert list(choices["gate"]) == list(upge.GATES)
    assert list(choices["pi_old"]) == list(upge.PI_OLD)


# ----------------------------------------------------------------------------------- files of flags


def write(path, text):
    path.write_text(text)
    return f"@{path}"


def test_a_file_stands_for_the_flags_in_it(tmp_path):
    file = write(tmp_path / "a.args", "# a comment\n\n--model m --steps 3  # two flags\n--seed 4\n")
    args = train(file)
    assert (args.model, args.steps, args.seed) == ("m", 3, 4)


def test_flags_after_a_file_replace_its_own_and_flags_before_it_do_not(tmp_path):
    file = write(tmp_path / "a.args", "--model m\n--steps 3\n")
    assert train(file, "--steps", "9").steps == 9
    assert train("--steps", "9", file).steps == 3


def test_the_later_of_two_files_wins(tmp_path):
    first = write(tmp_path / "a.args", "--model m\n--steps 3\n--seed 1\n")
    second = write(tmp_path / "b.args", "--steps 4\n")
    args = train(first, second)
    assert (args.steps, args.seed) == (4, 1)


def test_words_in_a_file_are_quoted_as_in_a_shell(tmp_path):
    text = "--model 'my model'\n--system-prompt 'Put it in \\boxed{}, # and stop.'\n"
    args = train(write(tmp_path / "a.args", text))
    assert (args.model, args.system_prompt) == ("my model", "Put it in \\boxed{}, # and stop.")


def test_repo_in_a_file_is_the_folder_of_the_repository(tmp_path):
    args = train(write(tmp_path / "a.args", "--model {repo}/toy/base\n"))
    assert Path(args.model) == REPOSITORY / "toy/base"


def test_an_evaluation_reads_files_too(tmp_path):
    file = write(tmp_path / "a.args", "--model m\n--data x.jsonl y.jsonl\n--samples 3\n")
    args = flags.parse_evaluation_args([file])
    assert (args.data, args.samples) == (["x.jsonl", "y.jsonl"], 3)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("--stpes 3", "a.args:2: unrecognized arguments: --stpes 3"),
        ("--steps 0", "a.args:2: argument --steps: must be a whole number of at least 1, not 0"),
        ("--steps", "a.args:2: argument --steps: expected one argument"),
        ("steps 3", "a.args:2: unrecognized arguments: steps 3"),
        ("--system-prompt 'a", "a.args:2: No closing quotation: --system-prompt 'a"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(refuse, tmp_path, line, sentence):
    refuse(train, [write(tmp_path / "a.args", f"--model m\n{line}\n--seed 1\n")], sentence)


@pytest.mark.parametrize(
    "content",
    [
        "--model m\n--system-prompt 'Löse'\n".encode("latin-1"),
        "--model m\n--system-prompt 'Löse'\n".encode("utf-16")[2:],
    ],
)
def test_a_file_in_another_encoding_is_refused(refuse, tmp_path, content):
    (tmp_path / "a.args").write_bytes(content)
    refuse(train, [f"@{tmp_path}/a.args"], "a.args:2: this is not UTF-8: save the file in that")


def test_a_file_in_utf8_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "a.args").write_bytes("--model m\n--system-prompt Löse\n".encode("utf-8-sig"))
    args = train(f"@{tmp_path}/a.args")
    assert (args.model, args.system_prompt) == ("m", "Löse")


@pytest.mark.parametrize("name", ["model", "data", "eval-data", "out", "wandb"])
def test_an_empty_name_is_refused(refuse, name):
    refuse(train, ["--model", "m", f"--{name}", ""], f"--{name} is empty: give it a value")
    if name in ("data", "out"):
        refuse(evaluate, [f"--{name}", ""], f"--{name} is empty: give it a value")


def test_an_empty_system_prompt_is_none():
    assert train("--model", "m", "--system-prompt", "").system_prompt == ""


def test_an_error_behind_a_file_does_not_name_the_file(refuse, tmp_path):
    file = write(tmp_path / "a.args", "--model m\n")
    refuse(train, [file, "--steps", "0"], "train_hpt.py: error: argument --steps: must be")


@pytest.mark.parametrize("name, reason", [("none.args", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(refuse, tmp_path, name, reason):
    refuse(train, [f"@{tmp_path / name}"], f"@{tmp_path / name} cannot be read: {reason}")


def test_a_file_without_a_model_is_refused(refuse, tmp_path):
    refuse(train, [write(tmp_path / "a.args", "--seed 1\n")], "--model is missing")


# -------------------------------------------------------------------------------- the shipped files

TOY_FLAGS = {
    "max_prompt_tokens": 16,
    "max_response_tokens": 112,
    "prompts_per_step": 32,
    "steps": 36,
    "eval_every": 18,
    "eval_samples": 2,
    "lr": 2.5e-4,
    "critic_lr": 1e-3,
    "warmup_steps": 5,
    "tokens_per_microbatch": 2048,
    "gradient_checkpointing": False,
}
TOY_FILES = {
    "model": REPOSITORY / "toy/base",
    "data": REPOSITORY / "toy/train.jsonl",
    "eval_data": REPOSITORY / "toy/held_out.jsonl",
}


def defaults():
    """The value of every flag of training that is not given."""
    return vars(flags.training_parser().parse_args([]))


def test_the_toy_is_its_flags_and_otherwise_the_defaults():
    args = vars(train())
    assert {name: Path(args.pop(name)) for name in TOY_FILES} == TOY_FILES
    expected = defaults() | TOY_FLAGS
    for name in TOY_FILES:
        del expected[name]
    assert args == expected


def test_the_toy_can_be_changed_flag_by_flag():
    args = train("--steps", "3", "--eval-data", "x.jsonl")
    assert (args.steps, args.eval_data, args.lr) == (3, "x.jsonl", 2.5e-4)


@pytest.mark.parametrize("words", [["--model", "m"], ["--model=m"]])
def test_a_model_of_your_own_is_not_trained_with_the_flags_of_the_toy(words):
    assert vars(train(*words)) == defaults() | {"model": "m"}


def test_the_defaults_are_the_run_of_the_paper():
    args = train("--model", "m")
    assert args.data == "Elliott/Openr1-Math-46k-8192"
    assert (args.max_prompt_tokens, args.max_response_tokens) == (1024, 8192)
    assert (args.prompts_per_step, args.samples_per_prompt, args.temperature) == (128, 8, 1.0)
    assert (args.steps, args.minibatches_per_step, args.lr) == (500, 2, 5e-6)
    assert (args.weight_decay, args.max_grad_norm, args.warmup_steps) == (0.01, 1.0, 0)
    assert (args.method, args.gate, args.gamma, args.sft_coef) == ("hpt", "switch", 0.0, 0.05)
    assert (args.clip_eps, args.pi_old, args.entropy_coef) == (None, "trainer", 0.0)
    assert (args.chord_mu, args.chord_steps) == ([0.1, 0.1], [0, 0])


def test_the_flags_can_be_written_as_json():
    args = train("--clip-eps", "inf")
    assert json.loads(json.dumps(vars(args))) == vars(args)


# -------------------------------------------------------------------------- the programs themselves


@pytest.mark.parametrize("program, flag", [("train_hpt.py", "--gamma"), ("evaluate.py", "--paper")])
def test_help_takes_less_than_a_second(program, flag):
    seconds = []
    for _ in range(3):  # the machine may be busy
        started = time.perf_counter()
        command = [sys.executable, REPOSITORY / program, "--help"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        assert flag in shown.stdout
    assert min(seconds) < 1


def help_lines(parser, monkeypatch):
    """{first name of a flag: its line or lines of --help}, on a terminal of 120 columns."""
    monkeypatch.setenv("COLUMNS", "120")
    lines, flag = {}, None
    for line in parser.format_help().splitlines():
        if line.startswith("  --"):
            flag = re.split("[ ,]", line.strip())[0]
            lines[flag] = [line]
        elif flag and line.startswith(" " * 10):
            lines[flag].append(line)
    return lines


@pytest.mark.parametrize("parser", [flags.training_parser(), flags.evaluation_parser()])
def test_help_has_one_line_per_flag(parser, monkeypatch):
    lines = help_lines(parser, monkeypatch)
    lines.pop("--gradient-checkpointing", None)  # its two names fill a line
    assert len(lines) > 15
    for flag in lines:
        assert len(lines[flag]) == 1
        assert len(lines[flag][0].split()) > 2  # there is a text


@pytest.mark.parametrize("parser", [flags.training_parser(), flags.evaluation_parser()])
def test_help_ends_in_the_default(parser, monkeypatch):
    lines = help_lines(parser, monkeypatch)
    for action in parser._actions:
        if action.default not in (None, [], False, flags.argparse.SUPPRESS, data.SYSTEM):
            several = isinstance(action.default, list)
            default = " ".join(map(str, action.default)) if several else action.default
            assert lines[action.option_strings[0]][-1].endswith(f"({default})")


def test_a_recipe_through_torchrun():
    command = [*TORCHRUN, "--nproc_per_node=1", "train_hpt.py", "@recipes/llama-3.1-8b.args"]
    refused = subprocess.run(
        [*command, "--lr", "0"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "train_hpt.py: error: argument --lr: must be a number above 0, not 0" in refused.stderr
