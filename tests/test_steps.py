"""Steps without variety: all prompts gated or none, no signal, an empty response, all cut short."""

import json
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_training import RecordingVerifier, TokenSampler, made_up_inputs

import train_hpt
from common import flags
from rollout import Rollout
from test_upge import spawn, tiny_lm

FLAGS = """
    --steps 2 --prompts-per-step 4 --samples-per-prompt 3 --minibatches-per-step 2
    --max-prompt-tokens 3 --max-response-tokens 8 --weight-decay 0 --lr 1e-2 --critic-lr 1e-2
    --data made-up.jsonl
"""
END = 1


def whole(j):
    return Rollout([3 + j, 9, END], [-3.0] * 3, False, "some text")


def empty(j):
    """The first of a group is an end-of-sequence token alone."""
    return whole(j) if j else Rollout([END], [-3.0], False, "")


def cut(j):
    return Rollout([3 + j] * 8, [-3.0] * 8, True, "some text")


KINDS = {  # what a response is, its reward (of the first in a group, of others), methods
    "all gated": (whole, (0.0, 0.0), ["hpt", "hpt_mix", "hpt_off"]),
    "none gated": (whole, (1.0, 1.0), ["hpt", "hpt_mix"]),
    "no signal": (whole, (0.5, 0.5), ["grpo", "dapo", "rloo"]),
    "one empty": (empty, (0.0, 1.0), ["hpt", "grpo", "gspo", "luffy", "ppo"]),
    "all cut": (cut, (0.0, 0.0), ["hpt", "dapo", "ppo"]),
    "all cut, one right": (cut, (1.0, 0.0), ["dapo", "cispo", "srft"]),
}
RUNS = [(kind, method) for kind, (_, _, methods) in KINDS.items() for method in methods]


def run_all(rank, folder):
    """In a process of its own: two steps of `main` for each of RUNS."""
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    tiny_lm().save_pretrained(folder / "base")
    for kind, method in RUNS:
        response, (first, other), _ = KINDS[kind]

        class Sampler(TokenSampler):
            def generate(self, prompts, seeds, n, label=None):
                return [[response(j) for j in range(n)] for _ in seeds]

            def load(self, named_tensors):
                torch.save(dict(named_tensors), folder / f"{kind} {method}.pt")

        class Verifier(RecordingVerifier):
            def score(self, responses, answers, each_done=None):
                n = 2 if method in flags.GROUP_METHODS else 3
                scores = [other if i % n else first for i in range(4 * n)]
                return scores + [1.0] * (len(responses) - 4 * n)  # of the demonstrations

        words = ["--model", str(folder / "base"), "--method", method]
        args = flags.parse_training_args(
            [*FLAGS.split(), *words, "--out", str(folder / f"{kind} {method}")]
        )
        with (
            mock.patch("rollout.Sampler", Sampler),
            mock.patch("reward.Verifier", Verifier),
            mock.patch("train_hpt.load_inputs", without_evaluation),
            mock.patch("train_hpt.print_plan"),
        ):
            train_hpt.main(args)
        dist.destroy_process_group()


def without_evaluation(args, method):
    return made_up_inputs(args, method)._replace(held_out=[])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(kind, method): (the two lines of metrics.jsonl, how far the weights went)}."""
    folder = tmp_path_factory.mktemp("steps")
    spawn(run_all, folder)
    found, base = {}, dict(tiny_lm().named_parameters())
    for kind, method in RUNS:
        lines = (folder / f"{kind} {method}/metrics.jsonl").read_text().splitlines()
        weights = torch.load(folder / f"{kind} {method}.pt")
        moved = max((weights[name] - base[name]).abs().max().item() for name in base)
        found[kind, method] = list(map(json.loads, lines)), moved
    return found


@pytest.mark.parametrize("kind, method", RUNS)
def test_a_step_without_variety_is_a_step(runs, kind, method):
    rows, moved = runs[kind, method]
    assert len(rows) == 2
    for row in rows:
        assert row["optim/skipped"] == 0 and row["optim/grad_norm"] is not None
    assert moved < 0.1  # so it is no nan either


@pytest.mark.parametrize("method", ["hpt", "hpt_mix", "hpt_off"])
def test_a_step_in_which_all_prompts_are_gated_trains_on_demonstrations(runs, method):
    rows, moved = runs["all gated", method]
    assert all(row["hpt/sft_frac"] == 1 and row["hpt/offline_ratio"] == 1 for row in rows)
    assert moved > 1e-3


@pytest.mark.parametrize(
    "kind, method",
    [("none gated", "hpt"), ("no signal", "grpo"), ("no signal", "dapo"), ("all cut", "dapo")],
)
def test_a_step_without_signal_has_a_gradient_of_0_and_changes_nothing(runs, kind, method):
    rows, moved = runs[kind, method]
    assert all(row["optim/grad_norm"] == 0 for row in rows) and moved == 0


@pytest.mark.parametrize("method", ["hpt", "grpo", "gspo", "luffy", "ppo"])
def test_an_empty_response_is_its_end_of_sequence_token(runs, method):
    rows, moved = runs["one empty", method]
    n = 2 if method == "luffy" else 3
    mean = (1 + 3 * (n - 1)) / n
    assert all(row["response_length/mean"] == pytest.approx(mean) for row in rows) and moved > 1e-3


@pytest.mark.parametrize("method", ["dapo", "cispo", "srft"])
def test_responses_that_are_cut_are_trained_on(runs, method):
    rows, moved = runs["all cut, one right", method]
    assert all(row["response_length/clip_ratio"] == 1 for row in rows) and moved > 1e-3
