"""What is measured in a step: sums that grow meanwhile, the metrics made of them, and their line.

docs/metrics.md says what each metric means.
"""

import dataclasses
import math
import statistics
import time

import torch
from torch import Tensor

from common import distributed

PEAK_BF16_FLOPS = {  # dense FLOP/s from the data sheets
    "A100": 312e12,
    "A800": 312e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
}


class Clock:
    """Seconds per phase of a step: `lap(name)` gives the time since the last lap to `name`."""

    def __init__(self):
        self.times = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the phase `name`."""
        now = time.perf_counter()
        self.times[name] = now - self.last
        self.last = now


def divergence(log_ratio: Tensor) -> float:
    """The sum of r - 1 - log r over tokens, where log r is `log_ratio`; it is never negative.

    In float32, r - 1 is mostly rounding where r is close to 1, and the sum could fall below 0.
    """
    log_ratio = log_ratio.double()
    return (log_ratio.expm1() - log_ratio).clamp(min=0).sum().item()


@dataclasses.dataclass
class Counts:
    """Sums over the sequences that this rank trains on in one step."""

    timeouts: float = 0.0  # answers that the verifier gave up
    # with the weights before the first update, over tokens of rollouts
    mismatch_tokens: float = 0.0
    mismatch_kl: float = 0.0  # KL(sampler || trainer), estimated per token by r - 1 - log r
    mismatch_max: float = 0.0  # largest |log-probability of the trainer - of the sampler|
    return_tokens: float = 0.0
    returns: float = 0.0
    returns_squared: float = 0.0
    advantage_variance: float = 0.0  # of all ranks, before whitening
    # the update, over tokens of rollouts
    rl_tokens: float = 0.0
    rl_loss: float = 0.0
    clipped: float = 0.0  # tokens with 1_stable = 0
    approx_kl: float = 0.0  # KL(pi_old || pi_theta), estimated per token by r - 1 - log r
    value_loss: float = 0.0
    # the update, over demonstrations
    demonstrations: float = 0.0
    nll: float = 0.0  # mean over the tokens of each demonstration, summed over demonstrations
    # the update, over all sequences
    tokens: float = 0.0  # of prompts and responses
    filler_tokens: float = 0.0  # of fillers, not among them
    # the same on every rank
    sequences: float = 0.0
    computed_sequences: float = 0.0  # those that have a signal
    lr: float = 0.0  # of the last optimizer step
    grad_norms: list[float] = dataclasses.field(default_factory=list)  # one per optimizer step
    critic_norms: list[float] = dataclasses.field(default_factory=list)

    def add_mismatch(self, trainer: Tensor, sampler: Tensor) -> None:
        """Compare the log-probabilities (M,) of trainer and sampler.

        A tiny difference is rounding. A large one means stale weights in the sampler, a wrong mask
        or a wrong temperature.
        """
        gap = trainer - sampler
        self.mismatch_kl += divergence(gap)
        largest = gap.abs().max().item()
        if math.isnan(largest) or largest > self.mismatch_max:  # a NaN, once there, stays
            self.mismatch_max = largest
        self.mismatch_tokens += gap.numel()

    def add_returns(self, returns: Tensor) -> None:
        """PPO: the returns (M,) that the critic fits."""
        returns = returns.double()
        self.return_tokens += returns.numel()
        self.returns += returns.sum().item()
        self.returns_squared += returns.square().sum().item()

    def add_rollouts(self, loss: Tensor, logp: Tensor, old_logp: Tensor, stable: Tensor) -> None:
        """An update on rollouts: the surrogate loss, and (M,) tensors."""
        log_ratio = logp.detach() - old_logp
        self.rl_loss += loss.item()
        self.rl_tokens += logp.numel()
        self.clipped += (stable == 0).sum().item()
        self.approx_kl += divergence(log_ratio)

    def add_demonstrations(self, logp: Tensor, lengths: list[int]) -> None:
        """An update on demonstrations: logp (M,) of demonstrations of these lengths."""
        parts = logp.detach().split(lengths)
        self.nll -= sum(part.mean().item() for part in parts)
        self.demonstrations += len(lengths)

    def total(self) -> "Counts":
        """The counts of all ranks together. Every rank must call this."""
        sums = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        equal_everywhere = ("advantage_variance", "lr", "sequences", "computed_sequences")
        maxima = ("mismatch_max", *equal_everywhere)
        return dataclasses.replace(self, **distributed.total_over_ranks(sums, maxima))


def step_metrics(
    step: int,
    prompts: list,
    combine: str | None,
    counts: Counts,
    times: dict[str, float],
    parameters: int,
) -> dict:
    """The line of metrics.jsonl for one step.

    Args:
        prompts: the step's train_hpt.Prompt objects, all of them.
        combine: the method's, as upge.Method has it.
        counts: the total over the ranks.
        times: seconds per phase.
        parameters: of the policy.
    """
    metrics = {"step": step} | data_metrics(prompts)
    if combine == "gate":
        metrics["hpt/sft_frac"] = statistics.fmean(p.beta for p in prompts)
    if any(p.rollouts for p in prompts):
        metrics |= rollout_metrics(prompts, counts.timeouts, times["rollout"])
    if counts.mismatch_tokens:
        metrics["mismatch/kl"] = counts.mismatch_kl / counts.mismatch_tokens
        metrics["mismatch/logp_max"] = counts.mismatch_max
    if counts.rl_tokens:
        metrics |= {
            "policy/clip_frac": counts.clipped / counts.rl_tokens,
            "policy/approx_kl": counts.approx_kl / counts.rl_tokens,
            "loss/rl": counts.rl_loss,
        }
    if counts.demonstrations:
        metrics["sft/nll"] = counts.nll / counts.demonstrations
    if counts.critic_norms:
        metrics |= critic_metrics(counts)
    finite = [norm for norm in counts.grad_norms if math.isfinite(norm)]
    metrics |= {
        "optim/grad_norm": statistics.fmean(finite) if finite else None,
        "optim/skipped": len(counts.grad_norms) - len(finite),
        "optim/lr": counts.lr,
        "perf/train_tokens_per_sec": counts.tokens / times["train"],
    }
    if counts.sequences:
        metrics["data/no_signal"] = 1 - counts.computed_sequences / counts.sequences
    if counts.tokens:
        computed = counts.tokens + counts.filler_tokens
        metrics["perf/padding_frac"] = counts.filler_tokens / computed
    if torch.cuda.is_available():
        metrics |= gpu_metrics(parameters, counts.tokens, times["train"])
    metrics |= {f"time/{name}": seconds for name, seconds in times.items()}
    metrics["time/step"] = sum(times.values())
    return metrics


def data_metrics(prompts: list) -> dict:
    """What was sampled and what is trained on."""
    rollouts_trained = sum(len(p.rollouts) for p in prompts if p.alpha)
    demonstrations_trained = sum(p.beta > 0 for p in prompts)
    trained = rollouts_trained + demonstrations_trained
    demo_tokens = sum(len(p.problem["demo_ids"]) for p in prompts if p.beta)
    return {
        "hpt/offline_ratio": demonstrations_trained / max(1, trained),
        "data/rollouts": sum(len(p.rollouts) for p in prompts),
        "data/demo_tokens": demo_tokens,
    }


def rollout_metrics(prompts: list, timeouts: float, seconds: float) -> dict:
    """Rewards, lengths and entropy of all rollouts of the step, trained on or not."""
    responses = [r for p in prompts for r in p.rollouts]
    rewards = [reward for p in prompts for reward in p.rewards]
    lengths = [len(r.ids) for r in responses]
    tokens = sum(lengths)
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/timeouts": timeouts,
        "reward/frac_zero_std": statistics.fmean(len(set(p.rewards)) == 1 for p in prompts),
        "hpt/solve_rate": statistics.fmean(max(p.rewards) > 0 for p in prompts),
        "response_length/mean": statistics.fmean(lengths),
        "response_length/max": max(lengths),
        "response_length/clip_ratio": statistics.fmean(r.truncated for r in responses),
        # -log p of a token, averaged over sampled tokens, is an unbiased estimate of the entropy.
        "policy/entropy": -sum(sum(r.logp) for r in responses) / tokens,
        "perf/rollout_tokens_per_sec": tokens / seconds,
    }


def critic_metrics(counts: Counts) -> dict:
    """PPO's critic: how well it predicted the returns before the update, and its loss."""
    mean = counts.returns / counts.return_tokens
    variance = counts.returns_squared / counts.return_tokens - mean**2
    finite = [norm for norm in counts.critic_norms if math.isfinite(norm)]
    metrics = {
        "critic/loss": counts.value_loss / len(counts.critic_norms),
        "critic/returns_mean": mean,
        "critic/grad_norm": statistics.fmean(finite) if finite else None,
        "critic/skipped": sum(not math.isfinite(norm) for norm in counts.critic_norms),
    }
    if variance > 1e-6:  # explained variance is undefined if all returns are equal
        metrics["critic/explained_variance"] = 1 - counts.advantage_variance / variance
    return metrics


def gpu_metrics(parameters: int, tokens: float, seconds: float) -> dict:
    """Peak memory, and model FLOP utilisation on a GPU whose peak is known."""
    metrics = {"perf/max_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    for gpu, peak in PEAK_BF16_FLOPS.items():
        if gpu in torch.cuda.get_device_name():
            # 6 floating-point operations per parameter and token. Recomputation under gradient
            # checkpointing does not count as useful.
            used = 6 * parameters * tokens / seconds
            metrics["perf/mfu"] = used / peak / distributed.world_size()
    return metrics


HEADER = (
    "     step  reward  gated  offline    nll  length  entropy  mismatch     grad   tok/s     sec"
)


def step_line(metrics: dict, last_step: int) -> str:
    """Return the line of a step; "-" stands for a metric that the step does not have."""

    def cell(name, form):
        """The metric of that name as text; form is one of format()."""
        value = metrics.get(name)
        return "-" if value is None else format(value, form)

    samples = "perf/rollout_tokens_per_sec" in metrics
    speed = "perf/rollout_tokens_per_sec" if samples else "perf/train_tokens_per_sec"
    step = f"{metrics['step']}/{last_step}"
    line = (
        f"{step:>9}  {cell('reward/mean', '.3f'):>6}  "
        f"{cell('hpt/sft_frac', '.3f'):>5}  {cell('hpt/offline_ratio', '.3f'):>7}  "
        f"{cell('sft/nll', '.3f'):>5}  {cell('response_length/mean', '.1f'):>6}  "
        f"{cell('policy/entropy', '.3f'):>7}  {cell('mismatch/kl', '.1e'):>8}  "
        f"{cell('optim/grad_norm', '.2g'):>7}  {cell(speed, '.0f'):>6}  "
        f"{cell('time/step', '.1f'):>6}"
    )
    if skipped := metrics.get("optim/skipped", 0) + metrics.get("critic/skipped", 0):
        line += f"  {skipped} skipped"  # optimizer steps whose gradient was not finite
    if metrics.get("perf/train_tokens_per_sec") == 0:
        line += "  nothing to train on"  # no sequence has a signal
    if "eval/pass@1" in metrics:
        line += f"  HELD-OUT ACCURACY {metrics['eval/pass@1']:.3f}"
    return line
