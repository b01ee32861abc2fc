"""The commands that a run ends with: the programs take them, and they say what they should."""

import shlex
from pathlib import Path

import pytest

from common import flags, next_runs

OUT = Path("runs/x")


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """In the folder of the repository, under torchrun with one rank."""
    monkeypatch.chdir(flags.REPOSITORY)
    started(monkeypatch, 1, 1)


def started(monkeypatch, ranks, here):
    environment = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": str(ranks)}
    environment["LOCAL_WORLD_SIZE"] = str(here)
    monkeypatch.setattr(next_runs, "ENVIRONMENT", environment)


def commands(*words):
    """{what it is for: the words of the command} after a run with these words."""
    lines = next_runs.next_commands(OUT, flags.parse_training_args(list(words)), list(words))
    assert len(lines) <= 3
    return {line[:22].strip(): shlex.split(line[22:]) for line in lines}


MINE = ["--model", "my model", "--data", "a.jsonl"]


def test_after_the_toy():
    found = commands()
    assert list(found) == ["pass@k of the result", "beside another run"]
    evaluation = "python evaluate.py --model runs/x/final --data toy/held_out.jsonl"
    assert found["pass@k of the result"] == [*evaluation.split(), "--max-response-tokens", "112"]
    assert found["beside another run"] == ["python", "-m", "tools.plot", "runs/x", "OTHER_RUN"]


def test_an_evaluation_has_what_the_training_had():
    more = [
        "--eval-data",
        "b.jsonl",
        "--template",
        "plain",
        "--system-prompt",
        "say it",
        "--reward",
    ]
    more += ["m:f", "--trust-remote-code", "--columns", "prompt=q,answer=a"]
    _, program, *words = commands(*MINE, *more)["pass@k of the result"]
    args = flags.parse_evaluation_args(words)
    assert program == "evaluate.py" and args.model == "runs/x/final" and args.data == ["b.jsonl"]
    assert (args.template, args.system_prompt, args.reward) == ("plain", "say it", "m:f")
    assert args.columns == {"prompt": "q", "answer": "a"} and args.trust_remote_code
    own = commands(*MINE, *more, "--eval-columns", "prompt=x")["pass@k of the result"]
    assert flags.parse_evaluation_args(own[2:]).columns == {"prompt": "x"}


def test_without_held_out_problems_the_evaluation_is_the_papers():
    words = commands(*MINE, "--max-response-tokens", "99", "--template", "plain")
    args = flags.parse_evaluation_args(words["pass@k of the result"][2:])
    assert args.paper and args.bench and args.template == "plain"


@pytest.mark.parametrize(
    "steps", [["--steps", "7"], ["--steps=7"], ["--resume", "--steps", "3", "--steps", "7"]]
)
def test_a_run_in_a_directory_of_its_own_can_go_on(steps, tmp_path):
    words = [*MINE, "--out", str(tmp_path / "run"), "--lr", "1e-3", *steps]
    torchrun, program, *more = commands(*words)["twice as many steps"]
    assert (torchrun, program) == ("torchrun", "train_hpt.py")
    args = flags.parse_training_args(more)
    assert (args.steps, args.resume, args.out) == (14, True, str(tmp_path / "run"))
    assert (args.model, args.lr) == ("my model", 1e-3)
    assert sum(word.startswith("--steps") for word in more) == more.count("--resume") == 1


@pytest.mark.parametrize("method", ["sft", "dft"])
def test_after_sft_comes_grpo(method, tmp_path):
    words = [*MINE, "--method", method, "--out", str(tmp_path / "run")]
    _, _, *more = commands(*words)["SFT -> GRPO"]
    args = flags.parse_training_args(more)
    assert (args.method, args.model, args.data) == ("grpo", "runs/x/final", "a.jsonl")
    assert args.out == str(tmp_path / "run") + "-grpo"


def test_after_sft_on_the_toy_grpo_has_the_toys_problems():
    toy = flags.parse_training_args([])
    for words in (["--method", "sft"], ["@toy/toy.args", "--method", "sft"]):
        more = commands(*words)["SFT -> GRPO"]
        args = flags.parse_training_args(more[2:])
        assert more[2] == "@toy/toy.args" and args.data == toy.data and args.steps == toy.steps
        assert (args.method, args.model, args.out) == ("grpo", "runs/x/final", None)


@pytest.mark.parametrize(
    "ranks, here, text",
    [
        (1, 1, "torchrun train_hpt.py"),
        (8, 8, "torchrun --nproc_per_node=8 train_hpt.py"),
        (16, 8, "torchrun --nnodes=2 ... train_hpt.py"),
    ],
)
def test_the_launcher_is_the_one_that_was_used(monkeypatch, ranks, here, text):
    started(monkeypatch, ranks, here)
    assert next_runs.launcher() == text
    monkeypatch.setattr(next_runs, "ENVIRONMENT", {})
    assert next_runs.launcher() == "python train_hpt.py"


def test_commands_from_another_folder_find_the_programs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    repository = str(flags.REPOSITORY)
    found = commands()
    assert found["pass@k of the result"][1] == f"{repository}/evaluate.py"
    assert found["beside another run"][:2] == [f"PYTHONPATH={repository}", "python"]


def test_words_are_left_out_with_their_values():
    words = ["--a", "1", "--b", "--c=2", "--a=3", "d"]
    assert next_runs.without(words, "--a") == ["--b", "--c=2", "d"]
    assert next_runs.without(words, "--c", "--b") == ["--a", "1", "--a=3", "d"]
