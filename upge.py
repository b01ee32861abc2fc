r"""Every post-training algorithm of arXiv 2509.04419 as one estimator.

This file depends only on torch; copy it into your project, and start at `upge_loss`. The paper's
Unified Policy Gradient Estimator (UPGE) has four components, a mask 1_stable, a denominator pi_ref,
an advantage A, and the gradient of the policy pi_theta:

    grad J = sum_t  1_stable,t * (1 / pi_ref,t) * A_t * grad pi_theta(y_t | q, y_<t)

pi_ref is not a frozen reference model, and there is no KL term.

HPT, the paper's algorithm, chooses the components per question q. The model answers q with n
rollouts, and P is the share that is right. If P > gamma, HPT trains on the rollouts with the row
`dr_grpo` of the table below. If P <= gamma, it trains on the demonstration of q with the row `sft`.

Since grad pi = pi * grad log pi, autograd derives every row from one surrogate loss:

    loss = - sum_t  w_t * 1_stable,t * A_t * exp(log pi_theta,t - log pi_ref,t)

The gradient flows only through the first log pi_theta. Wherever pi_theta stands inside pi_ref,
1_stable or A, it is detached, a mere number: with pi_ref = pi_theta the exponential is 1, and its
gradient is grad log pi_theta. w_t is the normaliser, the weight of a token, which the paper's table
leaves out. The value of this loss means nothing; only its gradient is the algorithm. A row of the
table is a choice of components (TABLE below holds it, `python upge.py` prints it):

    row         data     1_stable  pi_ref                         A                   w
    sft         demo     1         pi_theta                       1                   1/(G|y|)
    dft         demo     1         1                              1                   1/(G|y|)
    reinforce   rollout  1         pi_theta                       +1 / -1             1/(G|y|)
    rloo        rollout  1         pi_theta                       R - mean of others  1/(G L_max)
    ppo         rollout  clip(r)   pi_old                         GAE(R)              1/all tokens
    grpo        rollout  clip(r)   pi_old                         (R - mean)/std      1/(G|y|)
    dr_grpo     rollout  clip(r)   pi_old                         R - mean            1/(G L_max)
    dapo        rollout  clip(r)   pi_old                         (R - mean)/std      1/all tokens
    cispo       rollout  1         max(pi_old, pi_theta/(1+eps))  (R - mean)/std      1/sum |y|
    gspo        rollout  clip(s)   pi_theta/s                     (R - mean)/std      1/(G|y|)
    luffy       rollout  1         pi_old                         R - mean            1/(G L_max)
    luffy_demo  demo     1         (pi_theta+g)^2/g               R - mean            1/(G L_max)
    offline     demo     1         (pi_theta+g)^2/g               R                   1/(G L_max)
    srft        rollout  1         pi_theta                       (+1 / -1) * 0.1e^H  1/(G L_max)
    srft_sft    demo     1         pi_theta                       (1) * 0.5e^-H       1/(G L_max)
    srft_demo   demo     1         1                              (R - mean)/std      1/(G L_max)
    chord_demo  demo     1         pi_theta                       (1) * p(1-p)        1/all tokens

r = pi_theta/pi_old of a token; s = the geometric mean of r over its sequence. clip(x) is a mask: 0
if x has left [1-eps_low, 1+eps_high] on the side to which A pushes it, else 1. R = reward of the
sequence; mean and std are over its group. The group is the n rollouts of a prompt, or a
demonstration alone, or (LUFFY, SRFT) both together; G is its size. |y| = length of the sequence in
tokens; L_max = the largest allowed length. H = mean entropy of pi_theta over the sequence; the
factor 0.1e^H applies only where A > 0. p = pi_theta of the token. g = 0.1. Except in "1/all
tokens", w is also divided by the number of prompts, N.

One step of HPT on N = 2 prompts with n = 3 rollouts each; c_sft is the coefficient of the SFT loss:

    >>> n, l_max, c_sft = 3, 10, 0.05
    >>> R = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])        # (N, n) rewards
    >>> alpha, beta = hpt_gate(R.sum(-1), n, gamma=0.0)             # (N,), (N,): [1, 0] and [0, 1]
    >>> prompt = torch.tensor([0, 0, 0, 1, 1, 1])                   # (B,) B = N n rollouts
    >>> lengths = torch.tensor([4, 2, 3, 4, 4, 1])                  # (B,) tokens
    >>> valid = torch.arange(4) < lengths[:, None]                  # (B, T) false at padding
    >>> logp = torch.full((6, 4), -1.0).double().requires_grad_()   # (B, T) log pi_theta
    >>> row = TABLE["dr_grpo"]
    >>> A = row.advantage(R).reshape(6, 1)
    >>> weight = alpha[prompt] * row.normaliser(lengths, prompt, 2, l_max)
    >>> rl, _ = upge_loss(row, logp, valid, A, weight[:, None], old_logp=logp.detach())
    >>> demo_logp = torch.full((2, 5), -2.0).double().requires_grad_()  # (N, T) demonstrations
    >>> row, ones = TABLE["sft"], torch.ones(2, 5)
    >>> weight = c_sft * beta * row.normaliser(ones.sum(-1), torch.tensor([0, 1]), 2, l_max)
    >>> sft, _ = upge_loss(row, demo_logp, ones.bool(), ones, weight[:, None])
    >>> (rl + sft).backward()
    >>> (60 * logp.grad[:, 0]).round(decimals=2).tolist()           # N n L_max * gradient = -A
    [-0.67, 0.33, 0.33, -0.0, -0.0, -0.0]
    >>> (10 * demo_logp.grad[:, 0]).round(decimals=2).tolist()      # N |y| * gradient = -c_sft
    [-0.0, -0.05]

Several processes: compute `weight` from all sequences of the optimizer step on all ranks. The loss
is a sum, but DDP, FSDP and accelerate average gradients over ranks, so multiply the loss by the
number of ranks before backward(). The gradients of micro-batches add up; accelerate's `backward`
divides by the number of accumulation steps, so multiply by it too.

Tensors are padded, (B, T), or packed, (1, T) with `seq` naming the sequence of each token: B
sequences, T tokens. Log-probabilities are natural logarithms, of the tokens of the responses.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """What pi_ref and 1_stable are computed from: detached tensors, all (B, T) or all (1, T)."""

    logp: Tensor  # log pi_theta
    advantage: Tensor
    valid: Tensor  # bool, false at padding
    eps: tuple[float, float]  # clip range below and above 1
    old_logp: Tensor | None  # log pi_old
    seq: Tensor | None  # int64, the sequence that a token belongs to, 0 .. B-1
    entropy: Tensor | None  # entropy of pi_theta at each token, nats


OPTIONAL = {
    "old_logp": "log pi_old of every token, in the shape of logp",
    "seq": "the sequence that every token belongs to, in the shape of logp (zeros if only one)",
    "entropy": "the entropy of pi_theta at every token, in the shape of logp",
}


def given(t: Tokens, name: str) -> Tensor:
    """The optional tensor `name` of `t`. Raises ValueError if upge_loss was called without it."""
    tensor = getattr(t, name)
    if tensor is None:
        raise ValueError(f"this row needs {name}: pass {OPTIONAL[name]}")
    return tensor


def log_ratio(t: Tokens) -> Tensor:
    """log r = log(pi_theta / pi_old), shape of t.logp."""
    return t.logp - given(t, "old_logp")


def sequence_mean(x: Tensor, t: Tokens) -> Tensor:
    """The mean of x over the valid tokens of each token's own sequence, in the shape of x."""
    seq = given(t, "seq")
    sums = torch.zeros(int(seq.max()) + 1, dtype=x.dtype, device=x.device)
    counts = torch.zeros_like(sums)
    sums.index_add_(0, seq.flatten(), torch.where(t.valid, x, 0).flatten())
    counts.index_add_(0, seq.flatten(), t.valid.to(x.dtype).flatten())
    return (sums / counts.clamp(min=1))[seq]


# ---- pi_ref, the denominator: each function returns log pi_ref in the shape of t.logp


def ref_theta(t: Tokens) -> Tensor:
    """pi_ref = pi_theta: the gradient of log pi_theta, as in SFT and REINFORCE."""
    return t.logp


def ref_old(t: Tokens) -> Tensor:
    """pi_ref = pi_old: the gradient of the ratio r."""
    return given(t, "old_logp")


def ref_one(t: Tokens) -> Tensor:
    """pi_ref = 1: the gradient of pi_theta itself."""
    return torch.zeros_like(t.logp)


def ref_cispo(t: Tokens) -> Tensor:
    """pi_ref = max(pi_old, pi_theta/(1+eps_high)): r is capped but keeps its gradient.

    Deviation: the paper's Table 1 prints CISPO as a {0, 1} mask over pi_old, which would drop the
    gradient of a capped token. CISPO itself (arXiv 2506.13585) keeps it.
    """
    return torch.maximum(given(t, "old_logp"), t.logp - math.log1p(t.eps[1]))


def ref_gspo(t: Tokens) -> Tensor:
    """pi_ref = pi_theta/s, s the geometric mean of r over the sequence (arXiv 2507.18071)."""
    return t.logp - sequence_mean(log_ratio(t), t)


def ref_luffy(t: Tokens, g: float = 0.1) -> Tensor:
    """pi_ref = (pi_theta+g)^2/g: the gradient of LUFFY's f(pi) = pi/(pi+g) (arXiv 2504.14945)."""
    return 2 * (t.logp.exp() + g).log() - math.log(g)


# ---- 1_stable, the stabilisation mask: each function returns 0 or 1 per token, shape of t.logp


def stable_always(t: Tokens) -> Tensor:
    """1 for every token."""
    return torch.ones_like(t.logp)


def stable_ppo(t: Tokens) -> Tensor:
    """PPO's clip, token by token: clip(r)."""
    return clip_mask(log_ratio(t).exp(), t.advantage, t.eps)


def stable_gspo(t: Tokens) -> Tensor:
    """GSPO's clip, one value per sequence: clip(s), s the geometric mean of r over the sequence."""
    return clip_mask(sequence_mean(log_ratio(t), t).exp(), t.advantage, t.eps)


def clip_mask(ratio: Tensor, advantage: Tensor, eps: tuple[float, float]) -> Tensor:
    """0 where PPO's objective is flat in r, else 1; shape and dtype of `ratio`.

    The objective is min(r A, clamp(r, 1-eps_low, 1+eps_high) A).

    It is flat where A > 0 and r > 1+eps_high, and where A < 0 and r < 1-eps_low. Both comparisons
    are strict: at the bound itself the gradient passes.
    """
    too_high = (advantage > 0) & (ratio > 1 + eps[1])
    too_low = (advantage < 0) & (ratio < 1 - eps[0])
    return (~(too_high | too_low)).to(ratio.dtype)


# ---- A, the advantage. Input: rewards (N, G), one line per prompt; if the group contains a
# demonstration, its reward comes last. Output: advantages, same shape.


def check_groups(rewards: Tensor) -> None:
    """Raise ValueError unless rewards are floats (N, G): flat ones would be taken for one group."""
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards must be (N, G), one row per prompt, not {tuple(rewards.shape)}: "
            "reshape them to (number of prompts, rollouts per prompt)"
        )
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be of a floating-point type, not {rewards.dtype}")


def adv_one(rewards: Tensor) -> Tensor:
    """A = 1, whatever the reward."""
    check_groups(rewards)
    return torch.ones_like(rewards)


def adv_reward(rewards: Tensor) -> Tensor:
    """A = R. For PPO, `gae` then makes advantages per token of R and a critic's values."""
    check_groups(rewards)
    return rewards


def adv_sign(rewards: Tensor) -> Tensor:
    """A = +1 for reward 1, -1 for reward 0."""
    check_groups(rewards)
    return 2 * rewards - 1


def adv_centred(rewards: Tensor) -> Tensor:
    """A = R - mean of the group; exactly 0 if all rewards of the group are equal."""
    check_groups(rewards)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return torch.where(equal, 0, rewards - rewards.mean(-1, keepdim=True))


def adv_leave_one_out(rewards: Tensor) -> Tensor:
    """A = R - mean of the other members, which is G/(G-1) (R - mean) (RLOO, arXiv 2402.14740)."""
    group_size = rewards.shape[-1]
    return adv_centred(rewards) * group_size / max(1, group_size - 1)


def adv_standardised(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """A = (R - mean)/(std + 1e-6); 0 for a group of one.

    std is the sample standard deviation (G-1), as in verl and TRL; the population std would be
    smaller by sqrt(7/8) at G = 8.
    """
    check_groups(rewards)
    if rewards.shape[-1] == 1:
        return torch.zeros_like(rewards)
    return adv_centred(rewards) / (rewards.std(-1, keepdim=True) + eps)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, valid: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): (B, T) advantages, no gradient.

        A_t = delta_t + gamma lam A_{t+1},    delta_t = r_t + gamma V_{t+1} - V_t

    rewards (B, T) come with each token, usually 0 before the last; values (B, T) are the critic's,
    of the state before each token; valid (B, T) bool marks a prefix of each line. Padding may hold
    anything and gets A = 0. The episode ends with the last token: the value after it is 0. The
    returns that a critic fits are advantages + values.
    """
    advantages, next_advantage, next_value = torch.zeros_like(values), 0.0, 0.0
    for i in reversed(range(values.shape[1])):
        delta = rewards[:, i] + gamma * next_value - values[:, i]
        next_advantage = torch.where(valid[:, i], delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(valid[:, i], values[:, i], 0.0)
        advantages[:, i] = next_advantage
    return advantages


# ---- A scale of A, detached, in the shape of t.logp. SRFT's come from H, the mean entropy of
# pi_theta over the sequence. Deviation: SRFT's own code (arXiv 2506.19767) has exp(+H) on its SFT
# term; exp(-H) is how the authors of HPT ran it.


def scale_one(t: Tokens) -> Tensor:
    """No scale: 1."""
    return torch.ones_like(t.logp)


def scale_srft(t: Tokens) -> Tensor:
    """0.1 exp(H) where A > 0, else 1."""
    mean_entropy = sequence_mean(given(t, "entropy"), t)
    return torch.where(t.advantage > 0, 0.1 * mean_entropy.exp(), 1.0)


def scale_srft_sft(t: Tokens) -> Tensor:
    """0.5 exp(-H)."""
    mean_entropy = sequence_mean(given(t, "entropy"), t)
    return 0.5 * (-mean_entropy).exp()


def scale_chord(t: Tokens) -> Tensor:
    """CHORD's phi = p (1 - p), p = pi_theta of the token (arXiv 2508.11408, eq. 5).

    It is largest at p = 1/2: what the model knows already, and what it finds absurd, weigh little.
    """
    p = t.logp.exp()
    return p * (1 - p)


# ---- w, the normaliser: the weight of each token of a sequence, (B,) float64. All take
#   lengths (B,)  tokens per sequence
#   group (B,)    the prompt that a sequence belongs to, 0, 1, ..
#   num_prompts   N, all prompts of the optimizer step on all ranks, whether they train on rollouts
#                 or on demonstrations
#   l_max         the largest allowed length of a response
# They are computed before the step is cut into micro-batches: the cut cannot change the gradient.


def per_sequence(lengths: Tensor, group: Tensor, num_prompts: int, l_max: int) -> Tensor:
    """1/(G |y|) per prompt: the mean over tokens, then over the group."""
    return 1.0 / (num_prompts * group_sum(torch.ones_like(lengths), group) * lengths)


def per_constant(lengths: Tensor, group: Tensor, num_prompts: int, l_max: int) -> Tensor:
    """1/(G L_max) per prompt: the same weight for every token, whatever the lengths."""
    return 1.0 / (num_prompts * group_sum(torch.ones_like(lengths), group) * l_max)


def per_group_token(lengths: Tensor, group: Tensor, num_prompts: int, l_max: int) -> Tensor:
    """1/sum |y| per prompt: the mean over all tokens of the group."""
    return 1.0 / (num_prompts * group_sum(lengths, group))


def per_token(lengths: Tensor, group: Tensor, num_prompts: int, l_max: int) -> Tensor:
    """1/all tokens: the mean over all tokens of all prompts."""
    return 1.0 / lengths.double().sum().expand(len(lengths))


def group_sum(x: Tensor, group: Tensor) -> Tensor:
    """For each of the B entries of x, the sum of x over the entries of its group: (B,) float64."""
    groups = int(group.max()) + 1 if len(group) else 0
    sums = torch.zeros(groups, dtype=torch.double, device=x.device)
    return sums.index_add_(0, group, x.double())[group]


# ---- the table


class Row(NamedTuple):
    """One algorithm: where its tokens come from, and the function chosen for each component."""

    data: str  # "demo" or "rollout"
    stable: Callable[[Tokens], Tensor]
    log_ref: Callable[[Tokens], Tensor]
    advantage: Callable[[Tensor], Tensor]
    normaliser: Callable[[Tensor, Tensor, int, int], Tensor]
    eps: tuple[float, float] = (0.2, 0.2)  # clip range below and above 1
    scale: Callable[[Tokens], Tensor] = scale_one
    critic: bool = False  # PPO: `gae` turns rewards and a critic's values into advantages

    @property
    def needs_old_logp(self) -> bool:
        """Whether a component may depend on pi_old. A function of your own counts as if it did."""
        ref_without = self.log_ref in (ref_theta, ref_one, ref_luffy)
        return not (ref_without and self.stable is stable_always)

    @property
    def needs_entropy(self) -> bool:
        """Whether the scale may depend on the entropy. One of your own counts as if it did."""
        return self.scale not in (scale_one, scale_chord)


# fmt: off
TABLE = {
    "sft":        Row("demo",    stable_always, ref_theta, adv_one,           per_sequence),
    "dft":        Row("demo",    stable_always, ref_one,   adv_one,           per_sequence),
    "reinforce":  Row("rollout", stable_always, ref_theta, adv_sign,          per_sequence),
    "rloo":       Row("rollout", stable_always, ref_theta, adv_leave_one_out, per_constant),
    "ppo":        Row("rollout", stable_ppo,    ref_old,   adv_reward,        per_token,
                      critic=True),
    "grpo":       Row("rollout", stable_ppo,    ref_old,   adv_standardised,  per_sequence),
    "dr_grpo":    Row("rollout", stable_ppo,    ref_old,   adv_centred,       per_constant),
    "dapo":       Row("rollout", stable_ppo,    ref_old,   adv_standardised,  per_token,
                      eps=(0.2, 0.28)),
    "cispo":      Row("rollout", stable_always, ref_cispo, adv_standardised,  per_group_token),
    "gspo":       Row("rollout", stable_gspo,   ref_gspo,  adv_standardised,  per_sequence,
                      eps=(3e-4, 4e-4)),
    # LUFFY's code does not divide A by std, though its paper's text does.
    "luffy":      Row("rollout", stable_always, ref_old,   adv_centred,       per_constant),
    "luffy_demo": Row("demo",    stable_always, ref_luffy, adv_centred,       per_constant),
    # Offline RL on a demonstration alone: LUFFY's shape, and no group to compare its reward with.
    "offline":    Row("demo",    stable_always, ref_luffy, adv_reward,        per_constant),
    "srft":       Row("rollout", stable_always, ref_theta, adv_sign,          per_constant,
                      scale=scale_srft),
    "srft_sft":   Row("demo",    stable_always, ref_theta, adv_one,           per_constant,
                      scale=scale_srft_sft),
    # SRFT's own row, as in the paper's Table 1. No method below uses it: the authors of HPT ran
    # SRFT with luffy_demo in its place.
    "srft_demo":  Row("demo",    stable_always, ref_one,   adv_standardised,  per_constant),
    "chord_demo": Row("demo",    stable_always, ref_theta, adv_one,           per_token,
                      scale=scale_chord),
}
# fmt: on


class Method(NamedTuple):
    """Which rows of TABLE a method uses on a prompt's rollouts and on its demonstration."""

    rollouts: str | None  # the row for the rollouts
    demonstration: tuple[str, ...] = ()  # the rows for it; their losses add up
    # "gate":  per prompt, the gate decides between the rollouts and the demonstration.
    # "group": the demonstration joins the rollouts as one more member, in place of a rollout.
    # "schedule": every prompt trains on both; the step decides how much each weighs.
    combine: str | None = None


# In train_hpt.py, `sequences_of_prompt` gives two rows of demonstrations a coefficient beside
# rollouts: sft has c_sft, offline 1/n.
# fmt: off
METHODS = {
    "sft":       Method(None, ("sft",)),
    "dft":       Method(None, ("dft",)),
    "reinforce": Method("reinforce"),
    "rloo":      Method("rloo"),
    "ppo":       Method("ppo"),
    "grpo":      Method("grpo"),
    "dr_grpo":   Method("dr_grpo"),
    "dapo":      Method("dapo"),
    "cispo":     Method("cispo"),
    "gspo":      Method("gspo"),
    "luffy":     Method("luffy",   ("luffy_demo",),            "group"),
    "srft":      Method("srft",    ("srft_sft", "luffy_demo"), "group"),
    "chord":     Method("grpo",    ("chord_demo",),            "schedule"),
    "hpt":       Method("dr_grpo", ("sft",),                   "gate"),
    # The paper's ablation replaces SFT in HPT: Mix/ON adds offline RL to it, OFF/ON has it alone.
    "hpt_mix":   Method("dr_grpo", ("sft", "offline"),         "gate"),  # Mix/ON
    "hpt_off":   Method("dr_grpo", ("offline",),               "gate"),  # OFF/ON
}
# fmt: on


def hpt_gate(correct: Tensor, n: int, gamma: float) -> tuple[Tensor, Tensor]:
    """HPT's choice per prompt (alpha, beta): (1, 0) takes its rollouts, (0, 1) its demonstration.

    Args:
        correct: (N,) number of right rollouts per prompt, or the sum of their rewards.
        n: rollouts per prompt, so that P = correct/n.
        gamma: the demonstration is taken where P <= gamma, bound included.

    Returns two (N,) int64 tensors that sum to 1.
    """
    # The 1e-6 keeps the bound included in spite of rounding: 0.29 * 100 is 28.999999999999996.
    beta = (correct.double() <= gamma * n + 1e-6).long()
    return 1 - beta, beta


def smooth_gate(correct: Tensor, n: int, gamma: float | None = None) -> tuple[Tensor, Tensor]:
    """(alpha, beta) = (P, 1 - P), two (N,) float64 tensors. As hpt_gate, but gamma is ignored."""
    alpha = correct.double() / n
    return alpha, 1 - alpha


GATES = {"switch": hpt_gate, "smooth": smooth_gate}


def chord_schedule(
    step: int, peak: float, valley: float, warmup: int = 0, decay: int = 0
) -> tuple[float, float]:
    """CHORD's (alpha, beta) of all prompts of a step, (1 - mu, mu): arXiv 2508.11408, eq. 3.

    mu rises in a line from 0 to `peak`, which it has at step `warmup`. Then it falls to `valley`,
    along half a cosine, in `decay` steps, and stays there.

    Args:
        step: counts from 1.
        peak, valley: from 0 to 1. Where they are equal and warmup is 0, mu is constant.
        warmup, decay: numbers of steps. With decay 0, mu is `valley` from step `warmup` on.
    """
    if step < warmup:
        mu = peak * step / warmup
    else:
        fallen = min(1.0, (step - warmup) / decay) if decay else 1.0  # how much of the way, in time
        mu = valley + (peak - valley) * (1 + math.cos(math.pi * fallen)) / 2
    return 1 - mu, mu


# ---- Which policy counts as pi_old. The sampler and the trainer compute slightly different
# log-probabilities with the same weights. Each function takes both, per sampled token, in any
# shape, and returns (log pi_old, importance weight). The weight multiplies the advantage.


def pi_old_trainer(trainer_logp: Tensor, sampler_logp: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The trainer's own policy before the first update of the step."""
    return trainer_logp, torch.ones_like(trainer_logp)


def pi_old_sampler(trainer_logp: Tensor, sampler_logp: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The policy that drew the tokens, as the sampler reported it."""
    return sampler_logp, torch.ones_like(sampler_logp)


def pi_old_tis(trainer_logp: Tensor, sampler_logp: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """The trainer's, with the truncated importance weight min(pi_trainer/pi_sampler, cap)."""
    return trainer_logp, (trainer_logp - sampler_logp).exp().clamp(max=cap)


PI_OLD = {"trainer": pi_old_trainer, "sampler": pi_old_sampler, "tis": pi_old_tis}


def upge_loss(
    row: Row,
    logp: Tensor,
    valid: Tensor,
    advantage: Tensor,
    weight: Tensor,
    old_logp: Tensor | None = None,
    seq: Tensor | None = None,
    eps: float | tuple[float, float] | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The surrogate loss, whose gradient is the policy gradient of `row`.

    The loss is a sum over tokens. `weight` contains every 1/length and 1/N: do not divide again.

    Args:
        row: a row of TABLE, or one of your own.
        logp: (B, T) padded or (1, T) packed, log pi_theta of the responses' tokens. The gradient
            flows through this argument only.
        valid: bool, shape of logp, false at padding. Padding may hold anything, NaN included.
        advantage: from `row.advantage`; for ppo from `gae`. Shape of logp; padded input may also
            have one value per sequence, (B, 1), except for ppo.
        weight: from `row.normaliser`, times a coefficient of your own. Shape of logp, or (B, 1).
        old_logp: log pi_old, shape of logp. ppo, grpo, dr_grpo, dapo, cispo, gspo, luffy need it.
        seq: int64, shape of logp, the sequence of each token of packed input. gspo, srft and
            srft_sft need it if logp is (1, T). Without seq, each line of logp is a sequence.
        eps: clip range in place of the row's own: one number, or (below, above).
        entropy: entropy of pi_theta in nats, shape of logp. srft and srft_sft need it.

    Returns:
        (loss, stable): a scalar, and 1_stable per token in the shape of logp.

    Raises:
        ValueError: a tensor that the row needs is missing, or a shape or dtype does not fit.
    """
    check_shapes(logp, {"valid": valid, "old_logp": old_logp, "seq": seq, "entropy": entropy})
    if valid.dtype != torch.bool:
        raise ValueError(f"valid must be a bool tensor, not {valid.dtype}: pass mask.bool()")
    check_shapes(logp, {"weight": weight}, one_per_sequence=seq is None)
    check_shapes(logp, {"advantage": advantage}, one_per_sequence=seq is None and not row.critic)
    # At least float32: bfloat16 has 3 digits and counts tokens only up to 256.
    logp = torch.where(valid, logp, 0).to(torch.promote_types(logp.dtype, torch.float32))
    with torch.no_grad():
        if seq is None and len(logp) > 1:
            seq = torch.arange(len(logp), device=logp.device)[:, None].expand_as(logp)
        if old_logp is not None:
            old_logp = torch.where(valid, old_logp, 0).to(logp.dtype)
        if entropy is not None:
            entropy = entropy.to(logp.dtype)
        A = torch.where(valid, advantage, 0)
        eps = row.eps if eps is None else eps
        eps = (eps, eps) if isinstance(eps, int | float) else tuple(eps)
        t = Tokens(logp.detach(), A, valid, eps, old_logp, seq, entropy)
        log_ref = row.log_ref(t)
        stable = row.stable(t)
        w = torch.where(valid, weight, 0).to(logp.dtype)
        coefficient = w * stable * row.scale(t) * A
    return -(coefficient * torch.exp(logp - log_ref)).sum(), stable


def check_shapes(
    logp: Tensor, tensors: dict[str, Tensor | None], one_per_sequence: bool = False
) -> None:
    """Raise ValueError if a tensor would broadcast to logp's shape in a way that is not meant."""
    if logp.ndim != 2:
        raise ValueError(f"logp must be (B, T), or packed (1, T), not {tuple(logp.shape)}")
    allowed = [tuple(logp.shape)]
    if one_per_sequence:
        allowed.append((len(logp), 1))
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) not in allowed:
            shapes = " or ".join(map(str, allowed))
            raise ValueError(
                f"{name} must have shape {shapes}, to go with logp, not {tuple(tensor.shape)}"
            )


# ---- the table as text

NAMES = {
    stable_always: "1",
    stable_ppo: "clip(r)",
    stable_gspo: "clip(s)",
    ref_theta: "pi_theta",
    ref_old: "pi_old",
    ref_one: "1",
    ref_cispo: "max(pi_old, pi_theta/(1+eps))",
    ref_gspo: "pi_theta/s",
    ref_luffy: "(pi_theta+g)^2/g",
    adv_one: "1",
    adv_reward: "R",
    adv_sign: "+1 / -1",
    adv_centred: "R - mean",
    adv_leave_one_out: "R - mean of others",
    adv_standardised: "(R - mean)/std",
    scale_srft: "0.1e^H",
    scale_srft_sft: "0.5e^-H",
    scale_chord: "p(1-p)",
    per_sequence: "1/(G|y|)",
    per_constant: "1/(G L_max)",
    per_group_token: "1/sum |y|",
    per_token: "1/all tokens",
}


def table_text() -> str:
    """TABLE and METHODS as aligned text."""
    lines = [["row", "data", "1_stable", "pi_ref", "A", "w"]]
    for name, row in TABLE.items():
        advantage = NAMES[row.advantage]
        if row.critic:
            advantage = f"GAE({advantage})"
        if row.scale is not scale_one:
            advantage = f"({advantage}) * {NAMES[row.scale]}"
        components = [NAMES[row.stable], NAMES[row.log_ref], advantage, NAMES[row.normaliser]]
        lines.append([name, row.data, *components])
    text = aligned(lines)
    lines = [["method", "rollouts", "demonstration", "combine"]]
    for name, method in METHODS.items():
        demonstration = " + ".join(method.demonstration)
        lines.append([name, method.rollouts or "", demonstration, method.combine or ""])
    return text + "\n\n" + aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text whose columns are aligned and two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


if __name__ == "__main__":
    print(table_text())
