r"""Every post-training algorithm as one estimator (arXiv 2509.04419). Needs torch alone: copy this file.

The Unified Policy Gradient Estimator (UPGE) has four components:

    grad J = sum_t  1_stable,t * (1 / pi_ref,t) * A_t * grad pi_theta(y_t | q, y_<t)

Since grad pi = pi grad log pi, a single surrogate gives all of them by autograd, once everything
but pi_theta is detached and each token has a weight N_t (the normaliser the paper's table drops):

    loss = - sum_t  N_t * 1_stable,t * A_t * exp(log pi_theta,t - log pi_ref,t)

An algorithm is a choice of components, a row of TABLE below (`python upge.py` prints it):

    algorithm    data      1_stable    pi_ref             A                    N
    sft          demo      1           pi_theta           1                    per sequence
    dft          demo      1           1                  1                    per sequence
    reinforce    rollout   1           pi_theta           +1 / -1              per sequence
    rloo         rollout   1           pi_theta           R - mean of others   constant L_max
    ppo          rollout   clip(r)     pi_old             GAE                  per token
    grpo         rollout   clip(r)     pi_old             (R-mean)/std         per sequence
    dr_grpo      rollout   clip(r)     pi_old             R - mean             constant L_max
    dapo         rollout   clip(r)     pi_old             (R-mean)/std         per token
    cispo        rollout   1           max(pi_old, ...)   (R-mean)/std         per token of the group
    gspo         rollout   clip(s)     pi_theta / s       (R-mean)/std         per sequence
    luffy        rollout   1           pi_old             R - mean             constant L_max
    luffy_demo   demo      1           (pi_theta+g)^2/g   R - mean             constant L_max
    srft         rollout   1           pi_theta           +0.1 exp(H) / -1     constant L_max
    srft_sft     demo      1           pi_theta           0.5 exp(-H)          constant L_max
    srft_demo    demo      1           1                  (R-mean)/std         constant L_max

HPT is no row of its own: per question, `hpt_gate` chooses the dr_grpo row where the model's
rollouts succeed and the sft row where they fail. LUFFY and SRFT add up their rows over groups of
rollouts and a demonstration. The value of the surrogate means nothing; only its gradient does.

Example: one Dr. GRPO gradient, three rollouts of one prompt, four tokens at most.

    >>> import torch
    >>> logp = torch.full((3, 4), -1.0, requires_grad=True)           # (B, T) log pi_theta
    >>> lengths = torch.tensor([4, 2, 3])                             # (B,)
    >>> valid = torch.arange(4) < lengths[:, None]                    # (B, T) real tokens, not padding
    >>> row = TABLE["dr_grpo"]
    >>> A = row.advantage(torch.tensor([1.0, 0.0, 0.0]))              # (G,) rewards of the group
    >>> N = row.normaliser(lengths, group=torch.zeros(3).long(), prompts=1, l_max=10)
    >>> loss, _ = upge_loss(row, logp, valid, A[:, None], N[:, None], old_logp=logp.detach())
    >>> loss.backward()
    >>> [round(g, 4) for g in (30 * logp.grad[:, 0]).tolist()]        # -A, times G * L_max
    [-0.6667, 0.3333, 0.3333]

Tensors are (B, T), padded, or (1, T), packed with `seq` naming each token's sequence.
B sequences, T tokens, G rollouts of a prompt. Log-probabilities are of the tokens that were sampled.
"""
import math
from typing import Callable, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """What pi_ref and 1_stable may look at: detached tensors of one shape, (B, T) or (1, T)."""
    logp: Tensor  # log pi_theta
    old_logp: Tensor  # log pi_old
    advantage: Tensor
    valid: Tensor  # bool
    seq: Tensor  # int64, the sequence a token belongs to, 0 .. B-1
    eps: tuple[float, float]  # clip range below and above 1
    entropy: Tensor | None  # of pi_theta at each token, nats

# ---- reference policy: log pi_ref, shape of `t.logp`. The first line of a docstring is its name in the printed table.

def ref_theta(t):
    """pi_theta"""
    return t.logp

def ref_old(t):
    """pi_old"""
    return t.old_logp

def ref_one(t):
    """1"""
    return torch.zeros_like(t.logp)

def ref_cispo(t):
    """max(pi_old, pi_theta/(1+eps))

    The ratio pi_theta/pi_ref is capped at 1+eps, and a capped token keeps its gradient. Deviation: the paper's
    Table 1 prints CISPO as a {0,1} mask over pi_old, which would drop that gradient (cf. arXiv 2506.13585).
    """
    return torch.maximum(t.old_logp, t.logp - math.log1p(t.eps[1]))

def ref_gspo(t):
    """pi_theta/s, s = mean ratio"""  # geometric: exp(mean over the sequence of log(pi_theta/pi_old)) (arXiv 2507.18071)
    return t.logp - sequence_mean(t.logp - t.old_logp, t.valid, t.seq)

def ref_luffy(t, g=0.1):
    """(pi_theta+g)^2/g"""  # from LUFFY's shaping f(x) = x/(x+g), whose slope is g/(x+g)^2 (arXiv 2504.14945)
    return 2 * (t.logp.exp() + g).log() - math.log(g)

# ---- stabilisation mask: 1_stable in {0, 1}, shape of `t.logp`

def stable_always(t):
    """1"""
    return torch.ones_like(t.logp)

def stable_ppo(t):
    """clip(r), r = pi_theta/pi_old"""
    return clip_mask((t.logp - t.old_logp).exp(), t.advantage, t.eps)

def stable_gspo(t):
    """clip(s), s = mean ratio"""
    return clip_mask(sequence_mean(t.logp - t.old_logp, t.valid, t.seq).exp(), t.advantage, t.eps)

def clip_mask(ratio, advantage, eps):
    """0 where min(r A, clip(r) A) is flat, else 1 (same shape and dtype as `ratio`).

    Flat where A > 0 and r > 1+eps_hi, or A < 0 and r < 1-eps_lo; strict, so at the bound the gradient passes.
    """
    flat = ((advantage > 0) & (ratio > 1 + eps[1])) | ((advantage < 0) & (ratio < 1 - eps[0]))
    return (~flat).to(ratio.dtype)

# ---- advantage: from rewards (..., G), one group a row, a demonstration's among them, to the same shape

def adv_one(rewards):
    """1"""
    return torch.ones_like(rewards)

def adv_sign(rewards):
    """+1 / -1"""
    return 2 * rewards - 1

def adv_centred(rewards):
    """R - mean"""  # a group whose rewards are all equal, or a group of one, gets exactly 0
    same = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return torch.where(same, 0, rewards - rewards.mean(-1, keepdim=True))

def adv_leave_one_out(rewards):
    """R - mean of others"""  # G/(G-1) times R - mean (RLOO, arXiv 2402.14740)
    return adv_centred(rewards) * rewards.shape[-1] / max(1, rewards.shape[-1] - 1)

def adv_standardised(rewards, eps=1e-6):
    """(R - mean)/(std + 1e-6)

    std is the sample (n-1) one, as in verl and TRL; the population's is sqrt(7/8) of it at G = 8.
    """
    if rewards.shape[-1] == 1:
        return torch.zeros_like(rewards)
    return adv_centred(rewards) / (rewards.std(-1, keepdim=True) + eps)

def gae(rewards, values, valid, gamma=1.0, lam=1.0):
    """GAE(gamma, lambda)

    Padded (B, T) only; rewards and values per token, value after the last valid token 0. Returns advantages
    (B, T), 0 at padding; returns for the critic are advantages + values. A_t = delta_t + gamma lambda A_{t+1},
    delta_t = r_t + gamma V_{t+1} - V_t (arXiv 1506.02438, eq. 16). Valid tokens are a prefix of each row.
    """
    advantages, after, value_after = torch.zeros_like(values), 0.0, 0.0
    for i in reversed(range(values.shape[1])):
        delta = rewards[:, i] + gamma * value_after - values[:, i]
        after = torch.where(valid[:, i], delta + gamma * lam * after, 0.0)
        value_after = torch.where(valid[:, i], values[:, i], 0.0)
        advantages[:, i] = after
    return advantages

# ---- SRFT's factor on A, from H, the mean entropy of pi_theta over the sequence, detached. Deviation: SRFT's own code
# (arXiv 2506.19767) has exp(+H) on its SFT term; this is how the authors of HPT ran it.

def factor_one(t):
    """1"""
    return 1.0

def factor_srft(t):
    """0.1 exp(H) where A > 0"""
    return torch.where(t.advantage > 0, 0.1 * sequence_mean(t.entropy, t.valid, t.seq).exp(), 1.0)

def factor_srft_sft(t):
    """0.5 exp(-H)"""
    return 0.5 * (-sequence_mean(t.entropy, t.valid, t.seq)).exp()

# ---- normaliser: weight of each token of a sequence, (B,) float64. `lengths` (B,) tokens, `group` (B,) the prompt a
# sequence belongs to, `prompts` the number of prompts in the optimizer step, HPT's two kinds together: fixed before
# the first micro-batch, over all ranks, so that no memory knob changes the gradient.

def per_sequence(lengths, group, prompts, l_max):
    """1/(G |y_i|) per prompt"""
    return 1.0 / (prompts * group_sum(torch.ones_like(lengths), group) * lengths)

def per_constant(lengths, group, prompts, l_max):
    """1/(G L_max) per prompt"""
    return 1.0 / (prompts * group_sum(torch.ones_like(lengths), group) * l_max)

def per_group_token(lengths, group, prompts, l_max):
    """1/sum_i |y_i| per prompt"""
    return 1.0 / (prompts * group_sum(lengths, group))

def per_token(lengths, group, prompts, l_max):
    """1/all tokens"""
    return 1.0 / lengths.double().sum().expand(len(lengths))

def group_sum(x, group):
    """Sum of x (B,) over the members of each one's group: (B,) float64."""
    return torch.zeros(int(group.max()) + 1, dtype=torch.double, device=x.device).index_add_(0, group, x.double())[group]

def sequence_mean(x, valid, seq):
    """Mean of x over the valid tokens of each token's own sequence, in the shape of x."""
    sums, counts = torch.zeros(2, int(seq.max()) + 1, dtype=x.dtype, device=x.device)
    sums.index_add_(0, seq.flatten(), torch.where(valid, x, 0).flatten())
    counts.index_add_(0, seq.flatten(), valid.to(x.dtype).flatten())
    return (sums / counts.clamp(min=1))[seq]

# ---- the table

class Row(NamedTuple):
    """One algorithm: where its tokens come from, its components' choices, its usual clip range, SRFT's factor on A."""
    data: str  # "demo" or "rollout"
    stable: Callable
    log_ref: Callable
    advantage: Callable
    normaliser: Callable
    eps: tuple[float, float] = (0.2, 0.2)  # below, above
    factor: Callable = factor_one


TABLE = {
    "sft":        Row("demo",    stable_always, ref_theta, adv_one,           per_sequence),  # Eq. 12
    "dft":        Row("demo",    stable_always, ref_one,   adv_one,           per_sequence),  # arXiv 2508.05629
    "reinforce":  Row("rollout", stable_always, ref_theta, adv_sign,          per_sequence),
    "rloo":       Row("rollout", stable_always, ref_theta, adv_leave_one_out, per_constant),
    "ppo":        Row("rollout", stable_ppo,    ref_old,   gae,               per_token),
    "grpo":       Row("rollout", stable_ppo,    ref_old,   adv_standardised,  per_sequence),
    "dr_grpo":    Row("rollout", stable_ppo,    ref_old,   adv_centred,       per_constant),
    "dapo":       Row("rollout", stable_ppo,    ref_old,   adv_standardised,  per_token, (0.2, 0.28)),  # arXiv 2503.14476
    "cispo":      Row("rollout", stable_always, ref_cispo, adv_standardised,  per_group_token),
    "gspo":       Row("rollout", stable_gspo,   ref_gspo,  adv_standardised,  per_sequence, (3e-4, 4e-4)),
    "luffy":      Row("rollout", stable_always, ref_old,   adv_centred,       per_constant),
    "luffy_demo": Row("demo",    stable_always, ref_luffy, adv_centred,       per_constant),  # the paper's text divides by std
    "srft":       Row("rollout", stable_always, ref_theta, adv_sign,          per_constant, factor=factor_srft),
    "srft_sft":   Row("demo",    stable_always, ref_theta, adv_one,           per_constant, factor=factor_srft_sft),
    "srft_demo":  Row("demo",    stable_always, ref_one,   adv_standardised,  per_constant),
}


def hpt_gate(correct, n, gamma):
    """HPT's choice per prompt, (alpha, beta): (1, 0) trains its rollouts, (0, 1) its demonstration.

    correct (N,) int, how many of the prompt's n rollouts are right; P = correct/n. The demonstration is taken where
    P <= gamma, inclusive, compared as integers, c <= floor(gamma n). Returns two (N,) int64 tensors that sum to 1.
    """
    beta = (correct <= math.floor(gamma * n + 1e-9)).long()  # 0.29 * 100 is 28.999999999999996
    return 1 - beta, beta


def smooth_gate(correct, n, gamma=None):
    """A smooth pair of feedback functions, alpha = P and beta = 1 - P: two (N,) float64 tensors that sum to 1."""
    alpha = correct.double() / n
    return alpha, 1 - alpha


# Whose pi_old: (log pi_old, a factor on each token) from the trainer's and the sampler's log-probabilities, which at scale
# never agree to the last bit. "tis": the sampler drew the tokens, and truncated importance weights correct for it.
PI_OLD = {
    "old":     lambda trainer, sampler, cap: (trainer, torch.ones_like(trainer)),
    "rollout": lambda trainer, sampler, cap: (sampler, torch.ones_like(trainer)),
    "tis":     lambda trainer, sampler, cap: (trainer, (trainer - sampler).exp().clamp(max=cap)),
}


def upge_loss(row, logp, valid, advantage, weight, old_logp=None, seq=None, eps=None, entropy=None):
    """The surrogate whose gradient is `row`'s policy gradient, and 1_stable: (scalar, tensor like logp).

    The surrogate is summed, not averaged, over tokens: the weights are the average.
    logp (B, T) or (1, T), the only tensor that gets a gradient; valid bool, same shape; advantage and weight
    broadcast to it (weight from `row.normaliser`, times any coefficient); old_logp same shape, log pi_old, needed
    where the row compares with it; seq int64, same shape, needed for packed rows alone; eps (below, above) defaults
    to the row's own; entropy same shape, needed by SRFT's rows. Padding may hold anything, NaN included.
    """
    with torch.no_grad():
        if seq is None:
            seq = torch.arange(logp.shape[0], device=logp.device)[:, None].expand_as(logp)
        old_logp = logp if old_logp is None else old_logp
        t = Tokens(*(torch.where(valid, x, 0) for x in (logp, old_logp, advantage)), valid, seq, eps or row.eps, entropy)
        log_ref = row.log_ref(t)
        stable = row.stable(t)
        coefficient = torch.where(valid, weight, 0).to(logp.dtype) * stable * row.factor(t) * t.advantage
    return -(coefficient * torch.exp(torch.where(valid, logp, 0) - log_ref)).sum(), stable


if __name__ == "__main__":
    name = lambda component: component.__doc__.splitlines()[0]
    cells = [("algorithm", "data", "1_stable", "pi_ref", "A", "N (normaliser)")]
    product = lambda row: name(row.advantage) if row.factor is factor_one else f"({name(row.advantage)}) * ({name(row.factor)})"
    stable = lambda row: name(row.stable) + ("" if row.stable is stable_always else ", eps %g %g" % row.eps)
    cells += [(key, row.data, stable(row), name(row.log_ref), product(row), name(row.normaliser)) for key, row in TABLE.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("grad J = sum_t N * 1_stable * (1/pi_ref) * A * grad pi_theta\n")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print("\nhpt: per prompt, the dr_grpo row where P > gamma, the sft row where P <= gamma\n"
          "luffy: luffy + luffy_demo; srft: srft + srft_sft + luffy_demo; over groups of rollouts and a demonstration\n"
          "pi_old: old, the trainer's; rollout, the sampler's; tis, the trainer's, times min(pi_old/pi_rollout, cap)")
