"""A lens on the gradient: do the RL and the SFT signal conflict, and how noisy is each?

This measures what section 3 of the paper discusses. --probe-gradients switches it on. For the
rollouts (rl) and the demonstrations (sft) of one mini-batch it gives

    norm        of the part's gradient
    cosine      between the two gradients
    variance    over prompts: the trace of the sample covariance of the gradients of single prompts

The two norms say how to set c_sft: where they differ by far, one of the two trains alone.
"""

import dataclasses

import torch
import torch.distributed as dist

from common.batches import MicroBatch, collate

PARTS = {"rl": "rollout", "sft": "demo"}


def probe(policy, micro_batches, accumulate, counted: dict, prompts: int) -> dict[str, float]:
    """{"probe/...": float} for one optimizer step. It leaves weights and gradients as they were.

    Args:
        policy: the sharded policy, without a gradient.
        micro_batches: this rank's MicroBatch objects of the optimizer step.
        accumulate: a function (policy, micro_batches) that adds their gradient, as
            train_hpt.accumulate_gradient does.
        counted: how many prompts each part has. Those that are not computed have gradient 0.
        prompts: N, all prompts of the optimizer step.

    It costs a backward pass per prompt, part and micro-batch. A metric that needs more prompts than
    there are is left out.
    """
    metrics, gradients = {}, {}
    for part, data in PARTS.items():
        of_part = [m for m in micro_batches if m.row.data == data]
        gradient, squares, count = None, 0.0, counted[part]
        for q in range(prompts):
            own = gradient_of_prompt(policy, of_part, q, accumulate)
            if own is not None:
                gradient = own if gradient is None else gradient + own
                squares += over_ranks(own.square().sum().item())
        if gradient is not None:
            square = over_ranks(gradient.square().sum().item())
            gradients[part], metrics[f"probe/{part}_norm"] = gradient, square**0.5
        if gradient is not None and count > 1:
            # `gradient` is the sum over prompts of g_q = h_q / N, with h_q the gradient of prompt q
            # alone: the weights contain 1/N. The sample variance of the h_q over `count` prompts
            # is N^2 (sum |g_q|^2 - |sum g_q|^2 / count) / (count - 1).
            variance = max(0.0, squares - square / count) / (count - 1)
            metrics[f"probe/{part}_variance"] = prompts**2 * variance
    if all(metrics.get(f"probe/{part}_norm") for part in PARTS):
        dot = over_ranks((gradients["rl"] * gradients["sft"]).sum().item())
        metrics["probe/cosine"] = dot / metrics["probe/rl_norm"] / metrics["probe/sft_norm"]
    return metrics


def gradient_of_prompt(policy, micro_batches: list[MicroBatch], q: int, accumulate):
    """This rank's shard of the gradient of prompt q, flat, or None if no rank has a part of it."""
    mine = [only(m, q) for m in micro_batches if q in m.prompts]
    passes = int(over_ranks(len(mine), dist.ReduceOp.MAX))
    if passes == 0:
        return None
    # FSDP needs equally many passes on every rank: fill up with micro-batches that weigh nothing.
    for _ in range(passes - len(mine)):
        mine.append(collate(micro_batches[0].row, [], micro_batches[0].ids.device))
    accumulate(policy, mine)
    shards = [p.grad.to_local().flatten() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    return torch.cat(shards)


def only(m: MicroBatch, q: int) -> MicroBatch:
    """The part of a micro-batch that belongs to prompt q."""
    kept = torch.tensor([prompt == q for prompt in m.prompts], device=m.ids.device)  # (B,) bool
    lengths = torch.tensor(m.lengths, device=m.ids.device)  # (B,)
    of_token = kept.repeat_interleave(lengths)  # (T,)
    of_response = kept[m.seq]  # (M,)
    cut = {"ids": m.ids[of_token], "is_response": m.is_response[of_token]}
    for name in ("advantage", "weight", "sampler_logp", "old_logp", "value", "returns"):
        tensor = getattr(m, name)
        cut[name] = tensor if tensor is None else tensor[of_response]
    for name in ("lengths", "response_lengths", "prompts"):
        cut[name] = [x for x, prompt in zip(getattr(m, name), m.prompts) if prompt == q]
    cut["seq"] = m.seq[of_response].unique(return_inverse=True)[1]  # 0, 1, ... in their order
    return dataclasses.replace(m, **cut)


def over_ranks(x: float, operation=dist.ReduceOp.SUM) -> float:
    """A number summed over the ranks, or their maximum."""
    value = torch.tensor(float(x), dtype=torch.double)
    dist.all_reduce(value, operation)
    return value.item()
