"""PPO's critic in a step: values and GAE before the first update, and the value loss."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common import distributed
from common.batches import MicroBatch
from upge import gae

VALUE_CLIP = 0.2


@torch.no_grad()
def value_pass(
    critic, minibatches: list[list[MicroBatch]], gamma: float, lam: float, counts
) -> None:
    """Replace the rewards in `advantage` by whitened GAE, and set `value` and `returns`.

    Args:
        critic: model.Critic, with the weights before the first update.
        minibatches: this rank's micro-batches of each mini-batch of the step.
        gamma, lam: of GAE.
        counts: metrics.Counts.
    """
    micro_batches = [m for part in minibatches for m in part]
    for m in distributed.progress(micro_batches, "values"):
        value = critic(m.ids, m.is_response, m.lengths)  # (M,)
        if m.is_filler:  # it ran all the same: FSDP's ranks call the model equally often
            continue
        m.advantage = gae_of(m, value, gamma, lam)
        m.value, m.returns = value, m.advantage + value
        counts.add_returns(m.returns)
    counts.advantage_variance = whiten([m for m in micro_batches if not m.is_filler])


def gae_of(m: MicroBatch, value: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE (M,) of sequences whose reward comes with the last token; value (M,)."""
    lengths = torch.tensor(m.response_lengths, device=value.device)  # (B,)
    values = pad_sequence(value.split(m.response_lengths), batch_first=True)  # (B, L)
    valid = torch.arange(values.shape[1], device=value.device) < lengths[:, None]  # (B, L)
    rewards = torch.zeros_like(values)  # (B, L)
    reward = m.advantage[lengths.cumsum(0) - 1].to(values.dtype)  # (B,)
    rewards[torch.arange(len(lengths)), lengths - 1] = reward
    return gae(rewards, values, valid, gamma, lam)[valid]


def whiten(micro_batches: list[MicroBatch]) -> float:
    """Subtract the mean from the advantages, divide them by their deviation; return the variance.

    Mean and deviation are over all tokens of the step, on all ranks.
    """
    moments = torch.zeros(3, dtype=torch.double)  # tokens, sum of A, sum of A^2
    for m in micro_batches:
        A = m.advantage.double()
        moments += torch.stack([torch.ones_like(A).sum(), A.sum(), A.square().sum()]).cpu()
    dist.all_reduce(moments)
    tokens, total, squares = moments.tolist()
    mean = total / tokens
    deviation = math.sqrt(max(squares / tokens - mean**2, 0.0))
    for m in micro_batches:
        m.advantage = (m.advantage - mean) / (deviation + 1e-8)
    return deviation**2


def accumulate_value_gradient(critic, micro_batches: list[MicroBatch], counts) -> None:
    """Add the gradient of PPO's clipped value loss. A token's weight is that of the policy's loss.

    sum_t weight_t 1/2 max( (V - ret)^2, (V_old + clip(V - V_old, -c, c) - ret)^2 ),  ret = return
    """
    for m in distributed.progress(micro_batches, "critic"):
        value = critic(m.ids, m.is_response, m.lengths)  # (M,)
        if m.is_filler:
            loss = 0.0 * value.sum()
        else:
            clipped = m.value + (value - m.value).clamp(-VALUE_CLIP, VALUE_CLIP)
            squared_errors = (value - m.returns).square(), (clipped - m.returns).square()
            loss = 0.5 * (m.weight * torch.maximum(*squared_errors)).sum()
            counts.value_loss += loss.item()
        (loss * distributed.world_size()).backward()
