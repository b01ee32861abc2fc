"""A lens on the gradient: do the RL and the SFT signal conflict, and how noisy is each?

This measures what section 3 of the paper discusses. --probe-gradients switches it on. For the
rollouts (rl) and the demonstrations (sft) of one mini-batch it gives

    norm        of the part's gradient
    cosine      between the two gradients
    variance    over prompts: the trace of the sample covariance of the gradients of single prompts
"""

import torch
import torch.distributed as dist

from upge import TABLE

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
        of_part = [m for m in micro_batches if TABLE[m.row].data == data]
        gradient, squares, count = None, 0.0, counted[part]
        for q in range(prompts):
            own = gradient_of_prompt(policy, of_part, q, accumulate)
            if own is not None:
                gradient = own if gradient is None else gradient + own
                squares += over_shards(own.square().sum().item(), policy)
        if gradient is not None:
            square = over_shards(gradient.square().sum().item(), policy)
            gradients[part], metrics[f"probe/{part}_norm"] = gradient, square**0.5
        if gradient is not None and count > 1:
            # `gradient` is the sum over prompts of g_q = h_q / N, with h_q the gradient of prompt q
            # alone: the weights contain 1/N. The sample variance of the h_q over `count` prompts
            # is N^2 (sum |g_q|^2 - |sum g_q|^2 / count) / (count - 1).
            variance = max(0.0, squares - square / count) / (count - 1)
            metrics[f"probe/{part}_variance"] = prompts**2 * variance
    if all(metrics.get(f"probe/{part}_norm") for part in PARTS):
        dot = over_shards((gradients["rl"] * gradients["sft"]).sum().item(), policy)
        metrics["probe/cosine"] = dot / metrics["probe/rl_norm"] / metrics["probe/sft_norm"]
    return metrics


def prompts_without_finite_gradient(network, micro_batches, accumulate) -> set[int]:
    """The prompts of a mini-batch whose own gradient is not finite; arguments as for `probe`."""
    last_prompt = max((q for m in micro_batches for q in m.prompt_indices), default=-1)
    found = set()
    for q in range(1 + int(over_ranks(last_prompt, dist.ReduceOp.MAX))):
        own = gradient_of_prompt(network, micro_batches, q, accumulate)
        if own is not None and over_ranks(not own.isfinite().all()):
            found.add(q)
    return found


def gradient_of_prompt(policy, micro_batches, q: int, accumulate):
    """This rank's shard of the gradient of prompt q, flat, or None if no rank has a part of it."""
    mine = [m.only(q) for m in micro_batches if q in m.prompt_indices]
    passes = int(over_ranks(len(mine), dist.ReduceOp.MAX))
    if passes == 0:
        return None
    # FSDP needs equally many passes on every rank: fill up with micro-batches that weigh nothing.
    mine += [micro_batches[0].only(None)] * (passes - len(mine))
    accumulate(policy, mine)
    shards = [p.grad.to_local().flatten() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    return torch.cat(shards)


def over_shards(x: float, policy) -> float:
    """A number summed over the shards of a network; each is on as many ranks as it has replicas."""
    return over_ranks(x) / policy.replicas


def over_ranks(x: float, operation=dist.ReduceOp.SUM) -> float:
    """A number summed over the ranks, or their maximum."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.tensor(float(x), dtype=torch.double, device=device)
    dist.all_reduce(value, operation)
    return value.item()
