r"""Every post-training algorithm of arXiv 2509.04419 as one estimator. Needs torch alone: copy it.

The paper's Unified Policy Gradient Estimator (UPGE) has four components, a mask 1_stable, a
denominator pi_ref, an advantage A, and the gradient of the policy pi_theta:

    grad J = sum_t  1_stable,t * (1 / pi_ref,t) * A_t * grad pi_theta(y_t | q, y_<t)

pi_ref is not a frozen reference model, and there is no KL term. Since grad pi = pi grad log pi,
autograd derives every algorithm from one surrogate loss, whose value means nothing:

    loss = - sum_t  weight_t * 1_stable,t * A_t * exp(log pi_theta,t - log pi_ref,t)

The gradient flows through the first log pi_theta alone. Where pi_theta stands inside another
component, it is a mere number. So with pi_ref = pi_theta the exponential is 1, and its gradient is
grad log pi_theta. The weight of a token is w, the normaliser of its row, which the paper's table
leaves out, times a coefficient of yours. Nothing is divided afterwards.

An algorithm is a row of TABLE: it names one formula per component, and the dictionaries above it
hold the code of each formula. A method (METHODS) says which rows train on a prompt's rollouts and
on its demonstration. HPT, the paper's algorithm, decides between the two per prompt (`hpt_gate`).

Tensors are flat, without padding: (M,) has one number per response token, and `seq` (M,) says to
which of the B sequences, 0 .. B-1, the token belongs. `response_tokens` makes them from a model's
padded logits. x[seq] turns a value per sequence, (B,), into one per token. One update of HPT on
N = 2 prompts with n = 3 rollouts each, of which one is right:

    >>> from torch import ones, tensor
    >>> l_max, c_sft = 10, 0.05
    >>> R = tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])            # (N, n) rewards
    >>> alpha, beta = hpt_gate(R, gamma=0.0)                      # (N,) each: [1, 0] and [0, 1]

    >>> row = TABLE["dr_grpo"]                                    # the rollouts
    >>> prompt, lengths = tensor([0, 0, 0, 1, 1, 1]), tensor([4, 2, 3, 4, 4, 1])    # (B,) each
    >>> seq = torch.arange(6).repeat_interleave(lengths)          # (M,)
    >>> logp = torch.full((18,), -1.0).double().requires_grad_()  # (M,) log pi_theta
    >>> A = row.advantages(R).flatten()                           # (B,)
    >>> weight = alpha[prompt] * row.weights(lengths, prompt, num_prompts=2, l_max=l_max)    # (B,)
    >>> rl, _ = upge_loss(row, logp, seq, A[seq], weight[seq], old_logp=logp.detach())

    >>> row = TABLE["sft"]                                        # the demonstrations
    >>> prompt, lengths = tensor([0, 1]), tensor([5, 5])
    >>> seq = torch.arange(2).repeat_interleave(lengths)
    >>> demo = torch.full((10,), -2.0).double().requires_grad_()
    >>> weight = c_sft * beta * row.weights(lengths, prompt, num_prompts=2, l_max=l_max)
    >>> sft, _ = upge_loss(row, demo, seq, ones(10), weight[seq])

    >>> (rl + sft).backward()
    >>> first = [0, 4, 6, 9]                                      # first tokens of four rollouts
    >>> (60 * logp.grad[first]).round(decimals=2).tolist()        # -A, since 60 = N n L_max
    [-0.67, 0.33, 0.33, 0.0]
    >>> (10 * demo.grad[[0, 5]]).round(decimals=2).tolist()       # -c_sft, since 10 = N |y|
    [0.0, -0.05]

Micro-batches and ranks: compute the weights from all sequences of the update, on all ranks, before
they are dealt into micro-batches; keep each sequence whole. Then the gradients add up. DDP, FSDP
and accelerate average over ranks: multiply the loss by the number of ranks. accelerator.backward
also divides by the number of accumulation steps: multiply by it, too.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """What 1_stable, pi_ref and the scale of A are computed from: detached, (M,) each."""

    logp: Tensor  # log pi_theta
    seq: Tensor  # the sequence of each token
    advantage: Tensor
    old_logp: Tensor | None  # log pi_old
    entropy: Tensor | None  # of pi_theta, nats
    eps: tuple[float, float]  # clip range below and above 1

    def need(self, name: str) -> Tensor:
        """The tensor of that name. ValueError: upge_loss was called without it."""
        if getattr(self, name) is None:
            raise ValueError(f"this row needs {name}, one number per token")
        return getattr(self, name)

    def log_r(self) -> Tensor:
        """log r = log(pi_theta/pi_old)."""
        return self.logp - self.need("old_logp")

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x over the tokens of each token's own sequence."""
        zeros = x.new_zeros(int(self.seq.max()) + 1 if len(x) else 0)
        total = zeros.index_add(0, self.seq, x)
        count = zeros.index_add(0, self.seq, torch.ones_like(x))
        return (total / count)[self.seq]

    def clip(self, ratio: Tensor) -> Tensor:
        """0 where PPO's min(ratio A, clamp(ratio, 1-eps_low, 1+eps_high) A) is flat, else 1.

        It is flat where the ratio has left its range on the side to which A pushes it.
        """
        too_high = (self.advantage > 0) & (ratio > 1 + self.eps[1])
        too_low = (self.advantage < 0) & (ratio < 1 - self.eps[0])
        return (~(too_high | too_low)).to(ratio.dtype)


def centred(R: Tensor) -> Tensor:
    """R - mean of the group, (N, G); exactly 0 where all rewards of a group are equal."""
    equal = R.amax(-1, keepdim=True) == R.amin(-1, keepdim=True)
    return torch.where(equal, 0, R - R.mean(-1, keepdim=True))


def std(R: Tensor) -> Tensor:
    """The sample standard deviation of each group, which divides by G-1, as in verl and TRL."""
    return R.std(-1, correction=min(1, R.shape[-1] - 1), keepdim=True)


def group_sum(x: Tensor, prompt: Tensor) -> Tensor:
    """For each of the B entries of x, the sum of x over the entries of the same prompt."""
    return torch.bincount(prompt, weights=x)[prompt]


# ---- The formulas. The key of a dictionary is the formula, the value is its code.
#
# r     pi_theta/pi_old of a token                  R      reward of a sequence
# s     geometric mean of r over its sequence       G      sequences in its group
# H     mean entropy of pi_theta over its sequence  |y|    tokens of a sequence
# p     pi_theta of a token                         N      prompts of the update
# g     0.1                                         L_max  the largest allowed |y|
#
# A group is the n rollouts of a prompt, or its demonstration alone, or, in LUFFY and SRFT, n-1
# rollouts and the demonstration.

STABLE = {  # 1_stable
    "1": lambda t: torch.ones_like(t.logp),
    "clip(r)": lambda t: t.clip(t.log_r().exp()),
    "clip(s)": lambda t: t.clip(t.mean(t.log_r()).exp()),
}
LOG_REF = {  # log pi_ref
    "pi_theta": lambda t: t.logp,  # pi_theta/pi_ref has the gradient of log pi_theta
    "pi_old": lambda t: t.need("old_logp"),  # ... of r
    "1": lambda t: torch.zeros_like(t.logp),  # ... of pi_theta
    "max(pi_theta, g)": lambda t: t.logp.clamp(min=math.log(0.1)),  # TrSFT, arXiv 2512.17636
    # CISPO, arXiv 2506.13585: r is capped from above and keeps its gradient. Deviation: the paper's
    # Table 1 prints a mask over pi_old, which would drop the gradient of a capped token.
    "max(pi_old, pi_theta/(1+eps))": lambda t: torch.maximum(
        t.need("old_logp"), t.logp - math.log1p(t.eps[1])
    ),
    "pi_theta/s": lambda t: t.logp - t.mean(t.log_r()),  # GSPO, arXiv 2507.18071
    # LUFFY, arXiv 2504.14945: ... of f(pi) = pi/(pi+g).
    "(pi_theta+g)^2/g": lambda t: 2 * (t.logp.exp() + 0.1).log() - math.log(0.1),
}
SCALE = {  # a factor of A that depends on pi_theta
    "": lambda t: torch.ones_like(t.logp),
    # SRFT, arXiv 2506.19767. Deviation: e^-H, as HPT's authors ran it; SRFT's own code has e^H.
    "0.1e^H if A>0": lambda t: torch.where(
        t.advantage > 0, 0.1 * t.mean(t.need("entropy")).exp(), 1.0
    ),
    "0.5e^-H": lambda t: 0.5 * (-t.mean(t.need("entropy"))).exp(),
    "p(1-p)": lambda t: t.logp.exp() * (1 - t.logp.exp()),  # CHORD's phi, arXiv 2508.11408
}
ADVANTAGE = {  # from R (N, G), one line per prompt with the demonstration's reward last: (N, G)
    "1": torch.ones_like,
    "R": lambda R: R,
    "+1 / -1": lambda R: 2 * R - 1,
    "R - mean": centred,
    "R - mean(others)": lambda R: centred(R) * R.shape[-1] / max(1, R.shape[-1] - 1),
    "(R - mean)/std": lambda R: centred(R) / (std(R) + 1e-6),
    "(R - mean)/mean": lambda R: centred(R) / (R.mean(-1, keepdim=True) + 1e-6),
    "GAE(R)": lambda R: R,  # `gae` turns R and the values of a critic into A per token
}
NORMALISER = {  # w of a sequence's tokens, (B,), from |y|, G and the tokens per group, (B,) each
    "1/(NG|y|)": lambda y, G, group_tokens, N, l_max: 1 / (N * G * y),
    "1/(NG L_max)": lambda y, G, group_tokens, N, l_max: 1 / (N * G * l_max),
    "1/(N sum|y|)": lambda y, G, group_tokens, N, l_max: 1 / (N * group_tokens),
    "1/all tokens": lambda y, G, group_tokens, N, l_max: (1 / y.sum()).expand(len(y)),
}


# ---- The table


class Row(NamedTuple):
    """An algorithm: what it trains on, and the formula of each component."""

    data: str  # "demo" or "rollout"
    stable: str
    pi_ref: str
    advantage: str
    normaliser: str
    scale: str = ""
    eps: tuple[float, float] = (0.2, 0.2)  # clip range below and above 1

    def advantages(self, rewards: Tensor) -> Tensor:
        """A, in the shape of the rewards (N, G). ValueError: they are flat, or whole numbers."""
        if rewards.ndim != 2 or not rewards.is_floating_point():
            shape = tuple(rewards.shape)
            raise ValueError(f"rewards must be floats (N, G), not {rewards.dtype} {shape}")
        return ADVANTAGE[self.advantage](rewards)

    def weights(self, lengths: Tensor, prompt: Tensor, num_prompts: int, l_max: int) -> Tensor:
        """w of each sequence's tokens, (B,) float64.

        Args:
            lengths: (B,) response tokens of all sequences of the update, on all ranks.
            prompt: (B,) int64, the prompt that each sequence answers, 0 .. num_prompts-1.
            num_prompts: N. It counts the prompts that train on the other kind of data, too.
            l_max: the largest allowed length of a response.
        """
        y = lengths.double()
        sizes, tokens = group_sum(torch.ones_like(y), prompt), group_sum(y, prompt)
        return NORMALISER[self.normaliser](y, sizes, tokens, num_prompts, l_max)


# fmt: off
TABLE = {
    #                 data       1_stable   pi_ref              A                   w
    "sft":        Row("demo",    "1",       "pi_theta",         "1",                "1/(NG|y|)"),
    "dft":        Row("demo",    "1",       "1",                "1",                "1/(NG|y|)"),
    "trsft":      Row("demo",    "1",       "max(pi_theta, g)", "1",                "1/(NG|y|)"),
    "reinforce":  Row("rollout", "1",       "pi_theta",         "+1 / -1",          "1/(NG|y|)"),
    "rloo":       Row("rollout", "1",       "pi_theta",         "R - mean(others)", "1/(NG L_max)"),
    "maxrl":      Row("rollout", "1",       "pi_theta",         "(R - mean)/mean",  "1/(NG|y|)"),
    "ppo":        Row("rollout", "clip(r)", "pi_old",           "GAE(R)",           "1/all tokens"),
    "grpo":       Row("rollout", "clip(r)", "pi_old",           "(R - mean)/std",   "1/(NG|y|)"),
    "dr_grpo":    Row("rollout", "clip(r)", "pi_old",           "R - mean",         "1/(NG L_max)"),
    "dapo":       Row("rollout", "clip(r)", "pi_old",           "(R - mean)/std",   "1/all tokens",
                      eps=(0.2, 0.28)),
    "cispo":      Row("rollout", "1",       "max(pi_old, pi_theta/(1+eps))",
                                                                "(R - mean)/std",   "1/(N sum|y|)"),
    "gspo":       Row("rollout", "clip(s)", "pi_theta/s",       "(R - mean)/std",   "1/(NG|y|)",
                      eps=(3e-4, 4e-4)),
    # LUFFY's code does not divide A by std, though its paper's text does.
    "luffy":      Row("rollout", "1",       "pi_old",           "R - mean",         "1/(NG L_max)"),
    "luffy_demo": Row("demo",    "1",       "(pi_theta+g)^2/g", "R - mean",         "1/(NG L_max)"),
    "offline":    Row("demo",    "1",       "(pi_theta+g)^2/g", "R",                "1/(NG L_max)"),
    "srft":       Row("rollout", "1",       "pi_theta",         "+1 / -1",          "1/(NG L_max)",
                      scale="0.1e^H if A>0"),
    "srft_sft":   Row("demo",    "1",       "pi_theta",         "1",                "1/(NG L_max)",
                      scale="0.5e^-H"),
    "chord_demo": Row("demo",    "1",       "pi_theta",         "1",                "1/all tokens",
                      scale="p(1-p)"),
}


class Method(NamedTuple):
    """Which rows a method trains on a prompt's rollouts and on its demonstration."""

    rollouts: str | None
    demonstration: dict[str, str]  # {row: its coefficient, "1", "c_sft" or "1/n"}; losses add up
    combine: str | None = None  # "gate": (alpha, beta) per prompt; "group": both form one group


METHODS = {
    "hpt":     Method("dr_grpo", {"sft": "c_sft"},                     "gate"),
    # The paper's ablation. Mix/ON: offline RL and SFT on the demonstration. OFF/ON: offline RL
    # alone. As the authors ran it, it weighs as one rollout of n.
    "hpt_mix": Method("dr_grpo", {"sft": "c_sft", "offline": "1/n"},   "gate"),
    "hpt_off": Method("dr_grpo", {"offline": "1/n"},                   "gate"),
    "chord":   Method("grpo",    {"chord_demo": "1"},                  "gate"),  # by a schedule
    "luffy":   Method("luffy",   {"luffy_demo": "1"},                  "group"),
    "srft":    Method("srft",    {"srft_sft": "1", "luffy_demo": "1"}, "group"),
    **{f"hpt_{name}": Method("dr_grpo", {name: "c_sft"}, "gate") for name in ("dft", "trsft")},
    **{name: Method(None, {name: "1"}) for name in ("sft", "dft", "trsft")},
    **{name: Method(name, {}) for name in ("reinforce", "rloo", "maxrl", "ppo", "grpo", "dr_grpo")},
    **{name: Method(name, {}) for name in ("dapo", "cispo", "gspo")},
}
# fmt: on


def hpt_gate(R: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """HPT's (alpha, beta) per prompt, (N,) int64 each, from the rewards R (N, n) of its n rollouts.

    P is their mean. P > gamma: (1, 0), train on the rollouts. Else (0, 1), on the demonstration.
    """
    # 1e-6: in float32 the mean of 0.3, 0.3, 0.6 and 0.0 is above 0.3.
    alpha = (R.double().mean(-1) > gamma + 1e-6).long()
    return alpha, 1 - alpha


@torch.no_grad()
def gae(R: Tensor, values: Tensor, valid: Tensor, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): A (B, L), 0 at padding.

        A_t = delta_t + gamma lam A_{t+1},    delta_t = R_t + gamma V_{t+1} - V_t

    This alone is padded: time runs along the second dimension. R (B, L) are rewards per token,
    usually 0 before the last; values (B, L) are the critic's before each token, and the value after
    the last is 0; valid (B, L) bool marks a prefix of each line.
    """
    values = values.to(
        torch.promote_types(values.dtype, torch.float32)
    )  # bfloat16 adds up errors of 5 %
    advantages, next_advantage, next_value = torch.zeros_like(values), 0.0, 0.0
    for i in reversed(range(values.shape[1])):
        delta = R[:, i] + gamma * next_value - values[:, i]
        next_advantage = torch.where(valid[:, i], delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(valid[:, i], values[:, i], 0.0)
        advantages[:, i] = next_advantage
    return advantages


def response_tokens(
    logits: Tensor, ids: Tensor, is_response: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log pi_theta, seq), (M,) each, from a model's logits (B, S, V) of token ids (B, S).

    Args:
        is_response: (B, S) bool, true at the tokens to train on. The end-of-sequence token is one
            of them, else the model never learns to stop; the prompt and padding are not.
        temperature: the sampler's. Its distribution must be softmax(logits / temperature), so
            top-k and top-p must be off.
    """
    mask = is_response[:, 1:].bool()
    logits = logits[:, :-1][mask]  # (M, V): the logits at a position are of the token after it
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[:, 1:][mask][:, None])[:, 0], mask.nonzero()[:, 0]


def upge_loss(
    row: Row,
    logp: Tensor,
    seq: Tensor,
    advantage: Tensor,
    weight: Tensor,
    old_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    eps: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, 1_stable): a sum whose gradient is minus the policy gradient of `row`, its mask (M,).

    Args:
        row: a row of TABLE, or one of your own.
        logp: (M,) log pi_theta of the response tokens. The gradient flows through this alone.
        seq: (M,) int64, the sequence of each token, 0 .. B-1.
        advantage: (M,) `row.advantages(R).flatten()[seq]`; for ppo, that of `gae`.
        weight: (M,) `row.weights(...)[seq]`, times a coefficient of your own.
        old_logp: (M,) log pi_old. Rows with r, s or pi_old need it.
        entropy: (M,) of pi_theta, in nats. Rows with H need it.
        eps: (below, above), a clip range in place of the row's own.

    Raises:
        ValueError: a tensor is missing, has another shape than logp, or is of a 16-bit type, which
            has 3 digits.
    """
    given = {"logp": logp, "seq": seq, "advantage": advantage, "weight": weight}
    for name, x in (given | {"old_logp": old_logp, "entropy": entropy}).items():
        if x is not None and (x.ndim != 1 or len(x) != len(logp)):
            raise ValueError(f"{name} must be (M,), one number per token, not {tuple(x.shape)}")
        if x is not None and x.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {x.dtype}: compute it in float32")
    with torch.no_grad():
        eps = row.eps if eps is None else eps
        t = Tokens(logp.detach(), seq, advantage, old_logp, entropy, eps)
        stable, log_ref = STABLE[row.stable](t), LOG_REF[row.pi_ref](t).detach()
        factor = weight.to(logp.dtype) * stable * SCALE[row.scale](t) * advantage
    log_ratio = torch.where(factor == 0, 0.0, logp - log_ref)  # 0 times infinity would be nan
    return -(factor * log_ratio.exp()).sum(), stable


if __name__ == "__main__":
    for name, row in TABLE.items():
        A = f"({row.advantage}) * {row.scale}" if row.scale else row.advantage
        print(f"{name:11} {row.data:8} {row.stable:8} {row.pi_ref:30} {A:26} {row.normaliser}")
    print()
    for name, method in METHODS.items():
        rows = " + ".join(f"{weight} {row}" for row, weight in method.demonstration.items())
        print(f"{name:11} {method.rollouts or '':11} {rows:30} {method.combine or ''}")
