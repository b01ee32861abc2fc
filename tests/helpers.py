"""What several test files share: small models, a made-up step, processes of their own."""

import os
import sys
import time
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

# The models here are tiny. More threads only wait for each other, for minutes on a busy machine.
torch.set_num_threads(1)


class Step(NamedTuple):
    """Made-up data of a step: N prompts, n rollouts of each, one demonstration of each."""

    prompts: list[list[int]]
    rollouts: list[list[list[int]]]
    demos: list[list[int]]
    rewards: Tensor  # (N, n)


def made_up_step(gated: int, num_prompts: int = 6, n: int = 4) -> Step:
    """A step of ragged lengths. All rollouts of the first `gated` prompts are wrong."""
    generator = torch.Generator().manual_seed(4)

    def tokens(length):
        return torch.randint(3, 32, (length,), generator=generator).tolist()

    prompts, rollouts, demos, rewards = [], [], [], []
    for q in range(num_prompts):
        prompts.append(tokens(2 + q))
        demos.append(tokens(5 + 3 * q))
        lengths = torch.randint(1, 20, (n,), generator=generator).tolist()
        rollouts.append([tokens(length) for length in lengths])
        some_right = [1.0, 0.0, float(q % 2), 0.0][:n]
        rewards.append([0.0] * n if q < gated else some_right)
    return Step(prompts, rollouts, demos, torch.tensor(rewards, dtype=torch.double))


def tiny_lm():
    """A causal language model of 32 tokens in float64, with the same weights at every call."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).double()


def tiny_critic():
    """A value model of the same shape, in float64."""
    from transformers import Qwen2ForTokenClassification

    config = tiny_lm().config
    config.num_labels, config.classifier_dropout = 1, 0.0
    torch.manual_seed(7)
    return Qwen2ForTokenClassification(config).double()


def read(lm, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n,) of a response and its mean entropy, with plain transformers."""
    logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    return logp.gather(-1, torch.tensor(response)[:, None])[:, 0], entropy


def flat_gradient(model) -> Tensor:
    """The gradients of all parameters, one after the other."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def error(got: Tensor, wanted: Tensor) -> float:
    """The relative error in norm."""
    return ((got - wanted).norm() / wanted.norm()).item()


def _call(rank, function, args):
    """Call it, and end at once: threads of torch can abort the exit of an interpreter."""
    function(rank, *args)
    sys.stdout.flush()
    os._exit(0)


def spawn(function, *args, processes: int = 1, seconds: float = 300) -> None:
    """Run function(rank, *args) in processes of their own; the test fails if they take too long."""
    work = (function, args)
    context = torch.multiprocessing.spawn(_call, work, nprocs=processes, join=False)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{function.__name__} did not end in {seconds} s")
