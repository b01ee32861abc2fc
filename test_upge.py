"""upge.py: every row against the loss of its paper, written by hand.

All is computed in float64. Every identity stands beside a negative control: a wrong formula that
the same comparison must reject.
"""

import doctest
import functools
import math
import os
import runpy
import statistics
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

import upge
from tests.helpers import error, flat_gradient, made_up_step, read, spawn, tiny_lm
from upge import METHODS, TABLE, gae, hpt_gate, response_tokens, upge_loss

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all that is spawned here computes on a CPU

# A ragged off-policy batch: 12 responses to 3 prompts, pi_theta/pi_old from 0.4 to 1.8, and some
# tokens of pi_theta < 0.1. Every group has right and wrong responses.

N, G, L_MAX = 3, 4, 16
LENGTHS = torch.tensor([9, 1, 4, 7, 2, 9, 3, 5, 8, 6, 1, 4])  # (B,)
PROMPT = torch.arange(N).repeat_interleave(G)  # (B,)
B, M = len(LENGTHS), int(LENGTHS.sum())
SEQ = torch.arange(B).repeat_interleave(LENGTHS)  # (M,)
REWARDS = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1]], dtype=torch.double)  # (N, G)


def uniform(seed, low=0.0, high=1.0, size=(M,)):
    """Random numbers in float64, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(size, dtype=torch.double, generator=generator)


LOGP = uniform(0, -3.0, -0.01)
OLD = LOGP - uniform(1, 0.4, 1.8).log()
ENTROPY = uniform(2)
GAE = uniform(3, -1.0, 1.0)  # PPO's advantage, one per token


def loss_of_row(name, logp, **changes):
    """(loss, mask) of a row for the batch."""
    row = TABLE[name]
    A = GAE if name == "ppo" else row.advantages(REWARDS).flatten()[SEQ]
    given = {
        "seq": SEQ,
        "advantage": A,
        "weight": row.weights(LENGTHS, PROMPT, N, L_MAX)[SEQ],
        "old_logp": OLD,
        "entropy": ENTROPY,
    }
    return upge_loss(row, logp, **given | changes)


def gradient_of_row(name, **changes):
    """The gradient (M,) of a row for the batch."""
    logp = LOGP.clone().requires_grad_()
    loss, _ = loss_of_row(name, logp, **changes)
    return torch.autograd.grad(loss, logp)[0]


# ------------------------------------------------------------------------ the losses of the papers


class Response(NamedTuple):
    """What a formula knows of one response y."""

    x: Tensor  # (|y|,) log pi_theta, with its gradient
    r: Tensor  # (|y|,) pi_theta/pi_old, with its gradient
    R: Tensor  # its reward
    group: Tensor  # (G,) the rewards of its group
    group_tokens: int
    H: Tensor  # its mean entropy
    gae: Tensor  # (|y|,)

    @property
    def p(self):
        return self.x.exp()

    @property
    def A(self):
        """Dr. GRPO's advantage."""
        return self.R - self.group.mean()

    @property
    def standard(self):
        """GRPO's advantage."""
        return self.A / (self.group.std() + 1e-6)

    @property
    def s(self):
        """GSPO's ratio."""
        return self.r.log().mean().exp()


def clipped(ratio, A, low=0.2, high=0.2):
    """PPO's objective."""
    return torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def others(y):
    """The mean reward of the other responses of a group."""
    return (y.group.sum() - y.R) / (G - 1)


def trust_region(p):
    """TrSFT: the log-likelihood, continued below 0.1 as its tangent."""
    return torch.where(p > 0.1, p.log(), p / 0.1 - 1 + math.log(0.1))


def shaped(p):
    """LUFFY's f."""
    return p / (p + 0.1)


# What a response adds to the objective that is maximised.
PAPER = {
    "sft": lambda y: y.x.mean() / (N * G),
    "dft": lambda y: (y.p.detach() * y.x).mean() / (N * G),
    "trsft": lambda y: trust_region(y.p).mean() / (N * G),
    "reinforce": lambda y: (1 if y.R == 1 else -1) * y.x.mean() / (N * G),
    "rloo": lambda y: (y.R - others(y)) * y.x.sum() / (N * G * L_MAX),
    # The mean over the right responses, less the mean over all.
    "maxrl": lambda y: (y.R / y.group.sum() - 1 / G) * y.x.mean() / N,
    "ppo": lambda y: clipped(y.r, y.gae).sum() / M,
    "grpo": lambda y: clipped(y.r, y.standard).mean() / (N * G),
    "dr_grpo": lambda y: clipped(y.r, y.A).sum() / (N * G * L_MAX),
    "dapo": lambda y: clipped(y.r, y.standard, 0.2, 0.28).sum() / M,
    "cispo": lambda y: (y.r.clamp(max=1.2).detach() * y.standard * y.x).sum() / N / y.group_tokens,
    "gspo": lambda y: clipped(y.s, y.standard, 3e-4, 4e-4) / (N * G),
    "luffy": lambda y: (y.r * y.A).sum() / (N * G * L_MAX),
    "luffy_demo": lambda y: (y.A * shaped(y.p)).sum() / (N * G * L_MAX),
    "offline": lambda y: (y.R * shaped(y.p)).sum() / (N * G * L_MAX),
    "srft": lambda y: (0.1 * y.H.exp() if y.R == 1 else -1) * y.x.sum() / (N * G * L_MAX),
    "srft_sft": lambda y: 0.5 * (-y.H).exp() * y.x.sum() / (N * G * L_MAX),
    "chord_demo": lambda y: ((y.p * (1 - y.p)).detach() * y.x).sum() / M,
}

WRONG = {  # negative controls: a mistake that is easily made
    "sft": lambda y: y.x.sum() / M,  # a mean over all tokens
    "dft": lambda y: (y.p * y.x).mean() / (N * G),  # the weight is not detached
    "trsft": lambda y: torch.where(y.p > 0.1, y.x, 0.0).mean() / (N * G),  # masked below 0.1
    "reinforce": lambda y: y.R * y.x.mean() / (N * G),  # wrong responses are ignored
    "rloo": lambda y: y.A * y.x.sum() / (N * G * L_MAX),  # the mean includes its own reward
    "maxrl": lambda y: y.standard * y.x.mean() / (N * G),  # divided by std
    "ppo": lambda y: (y.r * y.gae).sum() / M,  # not clipped
    "grpo": lambda y: clipped(y.r, y.A / y.group.std(correction=0)).mean() / (N * G),
    "dr_grpo": lambda y: clipped(y.r, y.A).mean() / (N * G),  # divided by its own length
    "dapo": lambda y: clipped(y.r, y.standard).sum() / M,  # the same range on both sides
    # The paper's Table 1 as printed: the gradient of a capped token is dropped.
    "cispo": lambda y: clipped(y.r, y.standard, 9.0, 0.2).sum() / N / y.group_tokens,
    "gspo": lambda y: clipped(y.r, y.standard, 3e-4, 4e-4).mean() / (N * G),  # ratios of tokens
    "luffy": lambda y: clipped(y.r, y.A).sum() / (N * G * L_MAX),  # clipped
    # f itself stands where its slope should.
    "luffy_demo": lambda y: (y.A * shaped(y.p).detach() * y.x).sum() / (N * G * L_MAX),
    "offline": lambda y: (y.R * y.x).sum() / (N * G * L_MAX),  # not shaped
    "srft": lambda y: (0.1 * (-y.H).exp() if y.R == 1 else -1) * y.x.sum() / (N * G * L_MAX),
    "srft_sft": lambda y: 0.5 * y.H.exp() * y.x.sum() / (N * G * L_MAX),  # e^H
    "chord_demo": lambda y: (y.p * (1 - y.p) * y.x).sum() / M,  # the weight is not detached
}


def gradient_by_hand(objective):
    """The gradient (M,) of -objective, summed over the responses of the batch."""
    logp = LOGP.clone().requires_grad_()
    total = 0.0
    for i in range(B):
        mine, q = SEQ == i, PROMPT[i]
        response = Response(
            x=logp[mine],
            r=(logp - OLD).exp()[mine],
            R=REWARDS.flatten()[i],
            group=REWARDS[q],
            group_tokens=int(LENGTHS[PROMPT == q].sum()),
            H=ENTROPY[mine].mean(),
            gae=GAE[mine],
        )
        total = total + objective(response)
    return torch.autograd.grad(-total, logp)[0]


@functools.cache
def paper_gradient(name):
    return gradient_by_hand(PAPER[name])


@pytest.mark.parametrize("name", TABLE)
def test_a_row_is_its_papers_loss_and_no_other(name):
    got = gradient_of_row(name)
    tolerance = 1e-5 if name == "maxrl" else 1e-8  # upge adds 1e-6 to maxrl's denominator
    assert error(got, paper_gradient(name)) <= tolerance
    assert error(got, gradient_by_hand(WRONG[name])) > 1e-2
    for other in TABLE:
        if other != name:
            assert error(got, paper_gradient(other)) > 1e-2, other


def test_sft_is_cross_entropy():
    torch.manual_seed(1)
    logits = torch.randn(M, 11, dtype=torch.double, requires_grad=True)
    targets = torch.randint(11, (M,))
    logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    cross_entropy = torch.nn.functional.cross_entropy(logits, targets, reduction="none")  # (M,)
    means = [cross_entropy[SEQ == i].mean() for i in range(B)]

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    # Every sequence is a group of its own: one demonstration per prompt.
    weight = TABLE["sft"].weights(LENGTHS, torch.arange(B), B, L_MAX)
    loss, _ = upge_loss(TABLE["sft"], logp, SEQ, torch.ones(M), weight[SEQ])
    assert error(gradient(loss), gradient(torch.stack(means).mean())) <= 1e-8
    assert error(gradient(loss), gradient(cross_entropy.mean())) > 1e-2  # negative control


@pytest.mark.parametrize("name", ["ppo", "grpo", "cispo", "gspo"])
def test_on_policy_the_rows_agree(name):
    weight = TABLE["reinforce"].weights(LENGTHS, PROMPT, N, L_MAX)[SEQ]
    same = {"advantage": TABLE["grpo"].advantages(REWARDS).flatten()[SEQ], "weight": weight}
    wanted = gradient_of_row("reinforce", **same)
    assert error(gradient_of_row(name, **same, old_logp=LOGP), wanted) <= 1e-8
    assert error(gradient_of_row(name, **same), wanted) > 1e-2  # negative control: off-policy


# -------------------------------------------------------------------- masks, sequences, detachment


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_mask_at_and_around_its_bounds(sign):
    eps = (0.25, 0.5)  # dyadic, so that 1 - eps and 1 + eps are exact
    bounds = [0.5, 0.75 - 1e-12, 0.75, 1.0, 1.5, 1.5 + 1e-12, 2.0]
    ratio = torch.tensor(bounds, dtype=torch.double)
    wanted = [1, 1, 1, 1, 1, 0, 0] if sign > 0 else [0, 0, 1, 1, 1, 1, 1]

    def mask(advantage, eps):
        seq = torch.zeros(7).long()
        return upge.Tokens(ratio, seq, torch.full((7,), advantage), None, None, eps).clip(ratio)

    assert mask(sign, eps).tolist() == wanted
    # autograd of the clipped objective says the same, bounds included
    r = ratio.clone().requires_grad_()
    torch.minimum(sign * r, sign * r.clamp(1 - eps[0], 1 + eps[1])).sum().backward()
    assert (sign * r.grad).tolist() == wanted
    assert mask(-sign, eps).tolist() != wanted  # negative control: the sign of A is not ignored
    assert mask(0.0, eps).all() and mask(sign, (math.inf, math.inf)).all()


def test_the_second_result_is_the_mask_and_eps_replaces_the_rows_range():
    _, mask = loss_of_row("grpo", LOGP)
    A, r = TABLE["grpo"].advantages(REWARDS).flatten()[SEQ], (LOGP - OLD).exp()
    flat = ((A > 0) & (r > 1.2)) | ((A < 0) & (r < 0.8))
    assert mask.equal((~flat).double()) and 0 < mask.sum() < M
    _, wider = loss_of_row("grpo", LOGP, eps=(0.3, 0.5))
    _, none = loss_of_row("grpo", LOGP, eps=(0.0, 0.0))
    assert none.sum() < mask.sum() < wider.sum()


@pytest.mark.parametrize("name", TABLE)
def test_tokens_may_come_in_any_order(name):
    order = torch.randperm(M, generator=torch.Generator().manual_seed(5))
    row = TABLE[name]
    A = GAE if name == "ppo" else row.advantages(REWARDS).flatten()[SEQ]
    w = row.weights(LENGTHS, PROMPT, N, L_MAX)[SEQ]

    def gradient(seq):
        logp = LOGP[order].requires_grad_()
        others = (OLD[order], ENTROPY[order])
        loss, _ = upge_loss(row, logp, seq, A[order], w[order], *others)
        return torch.autograd.grad(loss, logp)[0]

    assert error(gradient(SEQ[order]), gradient_of_row(name)[order]) <= 1e-8
    if name in {"gspo", "srft", "srft_sft"}:  # negative control: all tokens as one sequence
        assert error(gradient(torch.zeros(M).long()), gradient_of_row(name)[order]) > 1e-2


@pytest.mark.parametrize("name", TABLE)
def test_the_gradient_flows_through_the_first_logp_alone(name):
    A = GAE if name == "ppo" else TABLE[name].advantages(REWARDS).flatten()[SEQ]
    weight = TABLE[name].weights(LENGTHS, PROMPT, N, L_MAX)[SEQ]
    values = {"advantage": A, "weight": weight, "old_logp": OLD, "entropy": ENTROPY}
    given = {key: value.clone().requires_grad_() for key, value in values.items()}
    logp = LOGP.clone().requires_grad_()
    loss_of_row(name, logp, **given)[0].backward()
    assert all(x.grad is None for x in given.values())
    assert logp.grad.abs().max() > 0  # negative control


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "dapo", "gspo"])
def test_a_masked_token_of_infinite_ratio_gives_0(name):
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    old = torch.tensor([-math.inf, -1.0])
    seq, one = torch.tensor([0, 1]), torch.ones(2)
    loss, mask = upge_loss(TABLE[name], logp, seq, one, one, old)
    loss.backward()
    assert mask.tolist() == [0, 1] and logp.grad.tolist() == [0, -1] and loss.item() == -1
    # Negative controls: 0 times infinity is nan, and what is not masked stays infinite, so that
    # the trainer's check of the gradient norm sees it.
    assert (mask * (logp - old).exp()).isnan().any()
    loss, _ = upge_loss(TABLE[name], logp, seq, -one, one, old)
    assert not loss.isfinite()


# ------------------------------------------------------------------------- advantages and weights

BY_HAND = {  # of a reward and the rewards of its whole group
    "1": lambda R, group: 1.0,
    "R": lambda R, group: R,
    "+1 / -1": lambda R, group: 2 * R - 1,
    "R - mean": lambda R, group: R - statistics.mean(group),
    "R - mean(others)": lambda R, group: R - (sum(group) - R) / (len(group) - 1),
    "(R - mean)/std": lambda R, group: (R - statistics.mean(group)) / statistics.stdev(group),
    "(R - mean)/mean": lambda R, group: R / statistics.mean(group) - 1,
    "GAE(R)": lambda R, group: R,
}
RELATIVE = ["R - mean", "R - mean(others)", "(R - mean)/std", "(R - mean)/mean"]


@pytest.mark.parametrize("name", upge.ADVANTAGE)
def test_an_advantage_is_its_formula(name):
    R = uniform(6, size=(5, 8))
    got = upge.ADVANTAGE[name](R)
    for key, formula in BY_HAND.items():
        wanted = [[formula(x, group) for x in group] for group in R.tolist()]
        same = torch.allclose(got, torch.tensor(wanted).double(), rtol=1e-4)
        assert same == (key == name or {key, name} == {"R", "GAE(R)"}), key


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_equal_rewards_and_a_group_of_one_have_no_advantage(name, dtype):
    advantage = upge.ADVANTAGE[name]
    equal = torch.full((2, 3), 0.1, dtype=dtype)
    for rewards in (equal, 0 * equal, equal[:, :1]):
        assert (advantage(rewards) == 0).all()
    uneven = torch.tensor([[0.1, 0.1, 0.2]], dtype=dtype)
    assert advantage(uneven).abs().max() > 0 and advantage(uneven).sum().abs() < 1e-5


def test_equal_rewards_would_not_give_0_by_themselves():
    """A negative control: in double precision 0.1 + 0.1 + 0.1 is not 0.3."""
    rewards = torch.full((1, 3), 0.1, dtype=torch.double)
    assert (rewards - rewards.mean(-1, keepdim=True)).abs().max() > 0


@pytest.mark.parametrize("rewards", [torch.ones(3), torch.ones(1, 3).long()])
def test_flat_rewards_and_whole_numbers_are_refused(rewards):
    for row in TABLE.values():
        with pytest.raises(ValueError, match=r"^rewards must be floats \(N, G\), not torch.*\(.*3"):
            row.advantages(rewards)
        assert row.advantages(torch.ones(1, 3)).shape == (1, 3)


@pytest.mark.parametrize("name", TABLE)
def test_weights_are_float64_and_count_every_prompt_of_the_step(name):
    """With demonstrations of 3 more prompts in the step, a response weighs half."""
    row = TABLE[name]
    w = row.weights(LENGTHS, PROMPT, 2 * N, L_MAX)
    assert w.dtype == torch.double and w.shape == (B,)
    half = row.weights(LENGTHS, PROMPT, N, L_MAX) / 2
    assert torch.allclose(w, half) == (row.normaliser != "1/all tokens")


def test_the_weights_of_a_prompt_do_not_depend_on_its_number():
    """Prompts 0 and 2 train on rollouts, prompt 1 on its demonstration."""
    lengths, row = torch.tensor([4, 2, 3, 5]), TABLE["cispo"]
    got = row.weights(lengths, torch.tensor([0, 2, 0, 2]), 3, L_MAX)
    assert torch.allclose(got, 1 / 3 / torch.tensor([7.0, 7, 7, 7]).double())
    lengths[0] = 40
    changed = row.weights(lengths, torch.tensor([0, 2, 0, 2]), 3, L_MAX)
    assert changed[1] == got[1] and changed[2] < got[2]


# -------------------------------------------------------------------------------------------- GAE


def gae_by_hand(rewards, values, gamma, lam):
    """The sum of arXiv 1506.02438, eq. 16, for one response."""
    steps = range(len(values))
    V = [*values, 0.0]
    delta = [rewards[t] + gamma * V[t + 1] - V[t] for t in steps]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in steps if k >= t) for t in steps]


def test_gae_is_its_sum():
    lengths = [5, 1, 3]
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    rewards = torch.where(valid, uniform(7, -1, 1, (3, 5)), math.nan)  # padding may hold anything
    values = torch.where(valid, uniform(8, -1, 1, (3, 5)), math.nan)
    got = gae(rewards, values, valid, 0.9, 0.8)

    def by_hand(gamma, lam):
        rows = zip(rewards.tolist(), values.tolist(), lengths)
        return torch.tensor([x for R, V, n in rows for x in gae_by_hand(R[:n], V[:n], gamma, lam)])

    assert error(got[valid], by_hand(0.9, 0.8)) < 1e-6 and (got[~valid] == 0).all()
    assert error(got[valid], by_hand(0.9, 0.9)) > 1e-2  # negative controls
    assert error(got[valid], by_hand(1.0, 0.8)) > 1e-2
    # With gamma = lambda = 1 it is the return less the value.
    returns = torch.where(valid, rewards, 0).flip(1).cumsum(1).flip(1)
    assert error(gae(rewards, values, valid)[valid], (returns - values)[valid]) < 1e-12


def test_gae_of_bfloat16_values_is_computed_in_float32():
    n, one = 400, torch.ones(1, 400)
    rewards = torch.zeros(1, n)
    rewards[0, -1] = 1.0
    values = (0.5 + 0.3 * torch.sin(torch.arange(n))).bfloat16()[None]
    got = gae(rewards, values, one.bool())
    wanted = gae(rewards.double(), values.double(), one.bool())
    assert got.dtype == torch.float32 and error(got.double(), wanted) < 1e-5
    after, rounded = torch.zeros(1).bfloat16(), []  # negative control: the recursion in bfloat16
    V = [*values[0], torch.tensor(0.0).bfloat16()]
    for t in reversed(range(n)):
        after = rewards[0, t].bfloat16() + V[t + 1] - V[t] + after
        rounded.insert(0, after.item())
    assert error(torch.tensor(rounded).double(), wanted[0]) > 1e-2


def test_gae_carries_no_gradient_of_the_critic():
    values = torch.zeros(1, 3, requires_grad=True)
    assert not gae(torch.ones(1, 3), values, torch.ones(1, 3).bool()).requires_grad


# -------------------------------------------------------------------------------------- HPT's gate


@pytest.mark.parametrize(
    "n, gamma, gated",  # so many right rollouts or fewer: the demonstration is taken
    [(8, 0.0, 0), (8, 2 / 8, 2), (8, 0.24, 1), (8, 1.0, 8), (10, 0.3, 3), (100, 0.29, 29)],
)
def test_the_gate_takes_the_demonstration_where_p_is_at_most_gamma(n, gamma, gated):
    right = torch.arange(n + 1)[:, None]  # 0 .. n right rollouts, as many prompts
    alpha, beta = hpt_gate((torch.arange(n) < right).float(), gamma)
    assert beta.nonzero().flatten().tolist() == list(range(gated + 1))
    assert (alpha + beta == 1).all() and alpha.dtype == torch.int64


def test_the_gate_forgives_a_mean_that_was_rounded_upwards():
    R = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.31]], dtype=torch.double)
    assert hpt_gate(R, 0.2)[1].tolist() == [1, 0]
    assert R[0].mean() > 0.2  # negative control


# ------------------------------------------------------------------------- from logits to tokens

VOCABULARY, PAD, END = 7, 0, 1
# A made-up model: its logits depend on the last token alone.
NEXT = 2 * uniform(9, -1, 1, (VOCABULARY, VOCABULARY))
QUESTIONS = [[3, 4], [5], [3, 4, 6]]
ANSWERS = [[2, 2, END], [4, END], [2, 5, 6, END]]


def padded(left=0):
    """(ids, is_response), (B, S) each, padded on the right and with `left` tokens on the left."""
    ids = torch.full((3, 8 + left), PAD)
    is_response = torch.zeros_like(ids).bool()
    for i, (q, y) in enumerate(zip(QUESTIONS, ANSWERS)):
        begin = left + len(q)
        ids[i, left : begin + len(y)] = torch.tensor(q + y)
        is_response[i, begin : begin + len(y)] = True
    return ids, is_response


def tokens_by_hand(temperature, shift=1):
    """log-probabilities of the answers; the logits are those of `shift` tokens before."""
    logp = []
    for q, y in zip(QUESTIONS, ANSWERS):
        ids = q + y
        for t in range(len(q), len(ids)):
            logits = [x / temperature for x in NEXT[ids[t - shift]].tolist()]
            logp.append(logits[ids[t]] - math.log(sum(math.exp(x) for x in logits)))
    return torch.tensor(logp)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("left", [0, 3])
def test_response_tokens_are_those_of_the_model(temperature, left):
    ids, is_response = padded(left)
    logp, seq = response_tokens(NEXT[ids], ids, is_response, temperature)
    assert seq.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]  # every answer with its end token
    assert error(logp, tokens_by_hand(temperature)) < 1e-6
    # Negative controls: logits of the token's own position, or another temperature.
    assert error(logp, tokens_by_hand(temperature, shift=0)) > 1e-2
    assert error(logp, tokens_by_hand(temperature + 0.3)) > 1e-2


def test_prompts_and_padding_may_hold_anything():
    ids, is_response = padded()
    logits = NEXT[ids].requires_grad_()
    logp, _ = response_tokens(logits, ids, is_response)
    used = logits.detach().clone()
    before_response = is_response.roll(-1, 1)  # the positions whose logits are used
    used[~before_response] = math.nan
    used.requires_grad_()
    again, _ = response_tokens(used, ids, is_response)
    again.sum().backward()
    assert again.equal(logp) and (used.grad[~before_response] == 0).all()
    everything, _ = response_tokens(logits, ids, ids != PAD)  # negative control: prompts count
    assert len(everything) == len(logp) + 3  # and the first token of a prompt has no logits


def test_bfloat16_logits_give_float32_log_probabilities():
    ids, is_response = padded()
    logits = NEXT[ids].bfloat16()
    logp, _ = response_tokens(logits, ids, is_response)
    wanted, _ = response_tokens(logits.double(), ids, is_response)
    assert logp.dtype == torch.float32 and error(logp, wanted) < 1e-6
    rounded = logits.log_softmax(-1)[:, :-1][is_response[:, 1:]]  # negative control
    rounded = rounded.gather(-1, ids[:, 1:][is_response[:, 1:]][:, None])[:, 0]
    assert error(rounded, wanted) > 1e-4


# --------------------------------------------------------------------- one gradient on any split


def sequences_of(step):
    """[(prompt, response)], all rollouts of a step."""
    return [(q, y) for q, group in zip(step.prompts, step.rollouts) for y in group]


def weights_of(row, sequences, prompt, num_prompts):
    lengths = torch.tensor([len(y) for _, y in sequences])
    return row.weights(lengths, prompt, num_prompts, l_max=20)


def stale(logp):
    """log-probabilities of a policy some updates back: ratios from 0.74 to 1.35."""
    return logp + 0.3 * torch.sin(1e3 * logp)


def loss_of(lm, row, sequences, A, weight):
    """The loss of some sequences, as those write it who copy upge.py."""
    ids = pad_sequence([torch.tensor(q + y) for q, y in sequences], batch_first=True)
    place = torch.arange(ids.shape[1])
    begin = torch.tensor([[len(q)] for q, _ in sequences])
    end = torch.tensor([[len(q) + len(y)] for q, y in sequences])
    logits = lm(input_ids=ids).logits
    logp, seq = response_tokens(logits, ids, (begin <= place) & (place < end))
    return upge_loss(row, logp, seq, A[seq], weight[seq], stale(logp.detach().double()))[0]


def gradient_of_parts(name, cuts, weights_per_part=False, ranks=1, lm=None):
    """The gradient of a step whose sequences are cut into parts, each a slice.

    weights_per_part: the weights are computed from each part alone, and the parts are averaged,
    as gradient accumulation and data parallelism often do.
    """
    row, step = TABLE[name], made_up_step(2)
    sequences, prompt = sequences_of(step), torch.arange(6).repeat_interleave(4)
    A, weight = row.advantages(step.rewards).flatten(), weights_of(row, sequences, prompt, 6)
    lm = lm or tiny_lm()
    for cut in cuts:
        part, w = sequences[cut], weight[cut]
        if weights_per_part:
            w = weights_of(row, part, prompt[cut], len(prompt[cut].unique())) / len(cuts)
        (ranks * loss_of(lm, row, part, A[cut], w)).backward()
    return flat_gradient(lm)


def slices(size, total=24):
    return [slice(i, i + size) for i in range(0, total, size)]


def gradient_by_papers_loss(name):
    """The gradient of DAPO or GSPO of the made-up step, written out response by response."""
    step, lm, objective = made_up_step(2), tiny_lm(), 0.0
    all_tokens = sum(len(y) for _, y in sequences_of(step))
    for q, group, R in zip(step.prompts, step.rollouts, step.rewards):
        for i, y in enumerate(group):
            x, _ = read(lm, q, y)
            r, A = (x - stale(x.detach())).exp(), (R[i] - R.mean()) / (R.std() + 1e-6)
            if name == "dapo":
                objective = objective + clipped(r, A, 0.2, 0.28).sum() / all_tokens
            else:
                objective = objective + clipped(r.log().mean().exp(), A, 3e-4, 4e-4) / 24
    (-objective).backward()
    return flat_gradient(lm)


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_micro_batches_add_up_to_the_whole(name):
    whole = gradient_of_parts(name, slices(24))
    assert error(whole, gradient_by_papers_loss(name)) < 1e-3
    for size in (1, 5):
        assert error(gradient_of_parts(name, slices(size)), whole) < 1e-5
    apart = gradient_of_parts(name, slices(5), weights_per_part=True)  # negative control
    assert error(apart, whole) > 1e-2


def gradient_on_rank(rank, path):
    """In a process of its own: the gradient of this rank's part, averaged over ranks by DDP."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    results = []
    for settings in ({"ranks": 2}, {"ranks": 1}, {"ranks": 1, "weights_per_part": True}):
        lm = DistributedDataParallel(tiny_lm())
        results.append(gradient_of_parts("dapo", [slice(rank, None, 2)], lm=lm, **settings))
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    spawn(gradient_on_rank, tmp_path / "gradients.pt", processes=2)
    two, not_multiplied, weights_per_rank = torch.load(tmp_path / "gradients.pt")
    one = gradient_of_parts("dapo", slices(24))
    assert error(two, one) < 1e-5
    assert error(not_multiplied, one) == pytest.approx(0.5, abs=1e-4)  # negative controls
    assert error(weights_per_rank, one) > 1e-2


# --------------------------------------------------------------- mistakes of those who copy upge.py

NEED_OLD = {"ppo", "grpo", "dr_grpo", "dapo", "cispo", "gspo", "luffy"}
NEED_ENTROPY = {"srft", "srft_sft"}


@pytest.mark.parametrize("missing, needed", [("old_logp", NEED_OLD), ("entropy", NEED_ENTROPY)])
def test_a_tensor_that_the_row_needs_is_asked_for(missing, needed):
    for name in TABLE:
        if name in needed:
            with pytest.raises(ValueError, match=f"^this row needs {missing}, one number per tok"):
                loss_of_row(name, LOGP, **{missing: None})
        else:
            assert gradient_of_row(name, **{missing: None}).equal(gradient_of_row(name))


@pytest.mark.parametrize("name", ["logp", "seq", "advantage", "weight", "old_logp", "entropy"])
def test_a_tensor_of_another_shape_or_of_16_bits_is_refused(name):
    """Each in one sentence. A shape that would broadcast is refused, too."""
    good = {"logp": LOGP, "seq": SEQ, "advantage": GAE, "weight": GAE}
    good |= {"old_logp": OLD, "entropy": ENTROPY}
    shapes = [torch.ones(M, 1), torch.ones(1, M), torch.tensor(1.0)]
    shapes += [torch.ones(B), torch.ones(1)] if name != "logp" else []
    for x in shapes:
        with pytest.raises(ValueError) as raised:
            upge_loss(TABLE["grpo"], **good | {name: x})
        sentence = f"{name} must be (M,), one number per token, not {tuple(x.shape)}"
        assert str(raised.value) == sentence
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError) as raised:
            upge_loss(TABLE["grpo"], **good | {name: good[name].to(dtype)})
        assert str(raised.value) == f"{name} is {dtype}: compute it in float32"
    upge_loss(TABLE["grpo"], **good)  # negative control


# --------------------------------------------------------------------------- the table, the methods


def test_every_formula_of_a_row_has_code_and_every_code_a_row():
    columns = {
        "stable": upge.STABLE,
        "pi_ref": upge.LOG_REF,
        "scale": upge.SCALE,
        "advantage": upge.ADVANTAGE,
        "normaliser": upge.NORMALISER,
    }
    for column, code in columns.items():
        assert {getattr(row, column) for row in TABLE.values()} == set(code)
    assert {row.data for row in TABLE.values()} == {"demo", "rollout"}


def test_methods_train_rows_of_the_right_kind():
    used = set()
    for method in METHODS.values():
        if method.rollouts:
            assert TABLE[method.rollouts].data == "rollout"
        for name, weight in method.demonstration.items():
            assert TABLE[name].data == "demo" and weight in {"1", "c_sft", "1/n"}
        both = bool(method.rollouts and method.demonstration)
        assert both == (method.combine in {"gate", "group"})
        used |= {method.rollouts, *method.demonstration}
    assert used - {None} == set(TABLE)


def test_the_doctest_runs():
    result = doctest.testmod(upge)
    assert result.failed == 0 and result.attempted > 15


def test_every_row_and_method_is_printed(capsys):
    runpy.run_path(upge.__file__, run_name="__main__")
    rows, methods = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in rows.splitlines()] == list(TABLE)
    assert [line.split()[0] for line in methods.splitlines()] == list(METHODS)
    for line, row in zip(rows.splitlines(), TABLE.values()):
        assert all(text in line for text in row[:-1])
