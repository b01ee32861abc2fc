"""A lens on the gradient: do the RL and the SFT signal conflict, and how noisy is each? (the paper's section 3, measured)

For the rollouts (rl) and the demonstrations (sft) of a mini-batch, with h_q the gradient of prompt q alone and K prompts that
have a part: norm of the part's gradient, cosine between the two, and the variance of the estimator over prompts, the
trace of the sample covariance of h_q.
"""
import collections

import torch
import torch.distributed as dist

from upge import TABLE

PARTS = {"rl": "rollout", "sft": "demo"}


def probe(policy, batches, befores, accumulate):
    """{"probe/..": float} for this rank's micro-batches of one optimizer step; leaves weights and gradients as they were.

    batches, befores: as train_hpt.accumulate_gradient takes them. accumulate: that function, its args and device bound.
    A backward pass for each prompt and part of a micro-batch; a metric that needs more prompts than there are is left out.
    """
    metrics, total = {}, {}
    prompts = 1 + global_sum(max((s.group for _, batch in batches for s in batch), default=-1), dist.ReduceOp.MAX)
    for part, data in PARTS.items():
        total[part], squares, count = 0.0, 0.0, 0
        for q in range(int(prompts)):
            mine = [pair for pair in map(select, batches, befores, [q] * len(batches)) if pair and TABLE[pair[0][0]].data == data]
            passes = int(global_sum(len(mine), dist.ReduceOp.MAX))
            if passes:  # ranks must run equally many
                filler = next(((name, []) for name, _ in batches if TABLE[name].data == data), None)
                mine += [(filler, None)] * (passes - len(mine))
                accumulate(policy, *zip(*mine), totals=collections.defaultdict(float))
                gradient = torch.cat([p.grad.to_local().flatten() for p in policy.parameters() if p.grad is not None])
                policy.zero_grad()
                total[part] = total[part] + gradient
                squares += global_sum(gradient.square().sum().item())
                count += 1
        if count:
            square = global_sum(total[part].square().sum().item())
            metrics[f"probe/{part}_norm"] = square**0.5
        if count > 1:  # the prompts' weights contain 1/N: h_q = N times what was summed, and their mean N/K of the total
            metrics[f"probe/{part}_variance"] = prompts**2 * max(0.0, squares - square / count) / (count - 1)
    if all(metrics.get(f"probe/{part}_norm") for part in PARTS):
        dot = global_sum((total["rl"] * total["sft"]).sum().item())
        metrics["probe/cosine"] = dot / metrics["probe/rl_norm"] / metrics["probe/sft_norm"]
    return metrics


def select(named_batch, before, q):
    """The part of a micro-batch that belongs to prompt q, in the same form, or None."""
    name, batch = named_batch
    kept = [s.group == q for s in batch]
    if not any(kept):
        return None
    tokens = torch.tensor([k for k, s in zip(kept, batch) for _ in s.response], device=before.weight.device)
    cut = before._make(None if x is None else x[:, tokens] for x in before)
    return (name, [s for s, k in zip(batch, kept) if k]), cut


def global_sum(x, op=dist.ReduceOp.SUM):
    """A number summed (or `op`) over the ranks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.tensor(float(x), dtype=torch.double, device=device)
    dist.all_reduce(value, op)
    return value.item()
