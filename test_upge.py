"""upge.py against losses written out by hand, and the trainer's gradient against the same losses.

All is computed in float64. Every identity stands beside a negative control: a wrong formula that
the same comparison must reject.
"""

import dataclasses
import doctest
import functools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import upge
from common import probe
from common.metrics import Counts
from common.model import Critic, Policy
from rollout import Rollout
from train_hpt import (
    Prompt,
    Sequence,
    accumulate_critic_gradient,
    accumulate_gradient,
    build_micro_batches,
    build_sequences,
    collate,
    old_policy_pass,
    plan_micro_batches,
    value_pass,
)
from upge import (
    METHODS,
    PI_OLD,
    TABLE,
    chord_schedule,
    clip_mask,
    gae,
    hpt_gate,
    smooth_gate,
    upge_loss,
)

# Everything here is float64 on a CPU. Where there are GPUs, the trainer would take them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

N, G, T, L_MAX, g = 3, 4, 9, 16, 0.1  # prompts, rollouts of each, longest, constant, LUFFY's g
B = N * G
GROUP = torch.arange(N).repeat_interleave(G)  # (B,)
ENTROPY = torch.rand(B, T, dtype=torch.double, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def batch():
    """A ragged off-policy batch: pi_theta/pi_old from 0.4 to 1.8, groups with both rewards."""
    torch.manual_seed(0)
    lengths = torch.tensor([9, 1, 4, 7, 2, 9, 3, 5, 8, 6, 1, 4])
    valid = torch.arange(T) < lengths[:, None]
    logp = (-3 * torch.rand(B, T, dtype=torch.double) - 0.01).requires_grad_()
    old = logp.detach() - torch.empty(B, T, dtype=torch.double).uniform_(0.4, 1.8).log()
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1]], dtype=torch.double)
    return logp, old, valid, lengths, rewards


def advantages(name, rewards):
    """(B, 1), and for PPO something per token."""
    if name == "ppo":
        return torch.randn(B, T, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    return TABLE[name].advantage(rewards).reshape(B, 1)


def row_gradient(name, batch, A=None, normaliser=None, **changes):
    """Gradient of the table's row for the batch, (B, T)."""
    logp, old, valid, lengths, rewards = batch
    row = TABLE[name]._replace(**changes)
    weight = (normaliser or row.normaliser)(lengths, GROUP, N, L_MAX)[:, None]
    A = advantages(name, rewards) if A is None else A
    return torch.autograd.grad(
        upge_loss(row, logp, valid, A, weight, old, entropy=ENTROPY)[0], logp
    )[0]


def direct_gradient(name, batch, A=None):
    """Gradient (B, T) of the loss as the method's own paper writes it, sequence by sequence."""
    logp, old, valid, lengths, rewards = batch
    A = (advantages(name, rewards) if A is None else A).expand(B, T)
    lo, hi = TABLE[name].eps
    total = 0.0
    for i in range(B):
        n, a = int(lengths[i]), A[i]
        x, r = logp[i, :n], torch.exp(logp[i, :n] - old[i, :n])
        a = a[:n]
        clipped = torch.minimum(r * a, r.clamp(1 - lo, 1 + hi) * a)
        s, h = torch.exp((x - old[i, :n]).mean()), ENTROPY[i, :n].mean()
        R = rewards[int(GROUP[i])]
        mine = R[i % G]
        group_tokens = lengths[GROUP == GROUP[i]].sum()
        total = (
            total
            + {
                "sft": lambda: x.mean() / (N * G),
                "reinforce": lambda: (a * x).mean() / (N * G),
                "dft": lambda: x.exp().mean() / (N * G),  # the token's loss -log pi times sg(pi)
                "rloo": lambda: ((mine - (R.sum() - mine) / (G - 1)) * x).sum() / (N * G * L_MAX),
                "ppo": lambda: clipped.sum() / lengths.sum(),
                "dapo": lambda: clipped.sum() / lengths.sum(),
                "luffy": lambda: (r * (mine - R.mean())).sum() / (N * G * L_MAX),
                "srft": lambda: ((0.1 * h.exp() if mine == 1 else -1) * x).sum() / (N * G * L_MAX),
                "srft_sft": lambda: 0.5 * (-h).exp() * x.sum() / (N * G * L_MAX),
                "grpo": lambda: clipped.mean() / (N * G),
                "dr_grpo": lambda: clipped.sum() / (N * G * L_MAX),
                "cispo": lambda: (r.clamp(max=1 + hi).detach() * a * x).sum() / (N * group_tokens),
                "gspo": lambda: torch.minimum(s * a[0], s.clamp(1 - lo, 1 + hi) * a[0]) / (N * G),
                "srft_demo": lambda: (a * x.exp()).sum() / (N * G * L_MAX),
                "offline": lambda: (mine * x.exp() / (x.exp() + g)).sum() / (N * G * L_MAX),
                "luffy_demo": lambda: (a * x.exp() / (x.exp() + g)).sum() / (N * G * L_MAX),
                "chord_demo": lambda: (phi(x.exp().detach()) * x).sum() / lengths.sum(),
            }[name]()
        )
    return torch.autograd.grad(-total, logp)[0]


def phi(p):
    """CHORD's weight of a token."""
    return p * (1 - p)


def error(got, wanted):
    """Relative error in norm."""
    return ((got - wanted).norm() / wanted.norm()).item()


# ----------------------------------------------------------------------------------- the identities


@pytest.mark.parametrize("name", TABLE)
def test_row_is_its_directly_written_loss_and_no_other(name, batch):
    got = row_gradient(name, batch)
    assert error(got, direct_gradient(name, batch)) <= 1e-8
    for other in TABLE:  # negative control: the comparison tells every row from every other
        if other != name:
            assert error(got, direct_gradient(other, batch)) > 1e-2, other


@pytest.mark.parametrize("name", TABLE)
def test_packed_is_padded(name, batch):
    logp, old, valid, lengths, rewards = batch
    row, A = TABLE[name], advantages(name, rewards).expand(B, T)
    weight = row.normaliser(lengths, GROUP, N, L_MAX)[:, None].expand(B, T)
    seq = torch.arange(B)[:, None].expand(B, T)
    pack = lambda x: x[valid][None]  # (1, n)

    def packed(seq):
        loss, _ = upge_loss(
            row,
            pack(logp),
            torch.ones_like(pack(logp), dtype=torch.bool),
            pack(A),
            pack(weight),
            pack(old),
            seq,
            entropy=pack(ENTROPY),
        )
        return torch.autograd.grad(loss, logp)[0]

    assert error(packed(pack(seq)), row_gradient(name, batch)) <= 1e-8
    if name in NEEDS_SEQ:  # negative control: the whole pack as one sequence
        as_one = torch.zeros_like(pack(seq))
        assert error(packed(as_one), row_gradient(name, batch)) > 1e-2


def test_sft_is_cross_entropy(batch):
    _, _, valid, lengths, _ = batch
    torch.manual_seed(1)
    logits = torch.randn(B, T, 11, dtype=torch.double, requires_grad=True)
    targets = torch.randint(11, (B, T))
    logp = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    ce = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none"
    )  # (B, T)
    losses = {
        upge.per_sequence: torch.stack([ce[i, :n].mean() for i, n in enumerate(lengths)]).mean(),
        upge.per_token: ce[valid].mean(),
    }
    one = torch.ones(B, 1)
    gradients = {}
    for normaliser, loss in losses.items():
        # Every sequence is a group of its own: one demonstration per prompt.
        weight = normaliser(lengths, torch.arange(B), B, L_MAX)[:, None]
        surrogate, _ = upge_loss(TABLE["sft"], logp, valid, one, weight)
        got = torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
        gradients[normaliser] = got
        assert error(got, torch.autograd.grad(loss, logits, retain_graph=True)[0]) <= 1e-8
    assert error(*gradients.values()) > 1e-2  # negative control: the rows are ragged


def test_on_policy_the_rows_agree(batch):
    logp, _, valid, lengths, rewards = batch
    on = (logp, logp.detach(), valid, lengths, rewards)
    A = TABLE["grpo"].advantage(rewards).reshape(B, 1).expand(B, T)
    names = ["reinforce", "ppo", "grpo", "cispo", "gspo"]
    wanted = row_gradient("reinforce", on, A, upge.per_sequence)
    for name in names:
        assert error(row_gradient(name, on, A, upge.per_sequence), wanted) <= 1e-8
        if name != "reinforce":  # negative control: off-policy they part
            assert error(row_gradient(name, batch, A, upge.per_sequence), wanted) > 1e-2


# --------------------------------------------------------------------- masks and reference policies


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clip_mask_at_and_around_its_bounds(sign):
    eps = (0.25, 0.5)  # dyadic: 1 - eps and 1 + eps are exact
    ratio = torch.tensor([0.5, 0.75 - 1e-12, 0.75, 1.0, 1.5, 1.5 + 1e-12, 2.0], dtype=torch.double)
    wanted = [1, 1, 1, 1, 1, 0, 0] if sign > 0 else [0, 0, 1, 1, 1, 1, 1]
    assert clip_mask(ratio, torch.full_like(ratio, sign), eps).tolist() == wanted
    # autograd of the clipped objective says the same, bounds included
    r = ratio.clone().requires_grad_()
    torch.minimum(sign * r, sign * r.clamp(1 - eps[0], 1 + eps[1])).sum().backward()
    assert (sign * r.grad).tolist() == wanted
    # negative control: with the sign of A ignored, autograd's answer is missed on one side
    flipped = clip_mask(ratio, torch.full_like(ratio, -sign), eps).tolist()
    assert flipped != (sign * r.grad).tolist()
    assert clip_mask(ratio, torch.full_like(ratio, sign), (math.inf, math.inf)).all()


def test_cispo_keeps_the_gradient_of_a_clipped_token():
    logp = torch.tensor([[math.log(0.9)]], dtype=torch.double, requires_grad=True)
    old = logp.detach() - math.log(1.8)  # r = 1.8
    one = torch.ones(1, 1, dtype=torch.double)
    gradient = lambda row: torch.autograd.grad(
        upge_loss(row, logp, one.bool(), one, one, old)[0], logp
    )[0].item()
    ppo_unclipped = gradient(TABLE["ppo"]._replace(stable=upge.stable_always))  # -r
    wanted = ppo_unclipped * 1.2 / 1.8  # times (1+eps)/r
    assert gradient(TABLE["cispo"]) == pytest.approx(wanted, rel=1e-12)
    # negative control: the paper's Table 1 as printed
    masked = TABLE["cispo"]._replace(stable=upge.stable_ppo, log_ref=upge.ref_old)
    assert gradient(masked) == 0.0


def test_gspo_weighs_a_sequence_evenly(batch):
    A = torch.full((B, 1), -1.0, dtype=torch.double)  # with A < 0 only small s are clipped
    got = row_gradient("gspo", batch, A)
    _, _, valid, lengths, _ = batch
    spread = [got[i, :n].std().item() for i, n in enumerate(lengths) if n > 1]
    assert max(spread) < 1e-15 and got.abs().max() > 1e-3
    per_token_ratio = row_gradient("gspo", batch, A, log_ref=upge.ref_old)  # negative control
    assert max(per_token_ratio[i, :n].std().item() for i, n in enumerate(lengths) if n > 1) > 1e-3


def test_luffy_coefficient():
    p = torch.tensor([[0.01, 0.1, 0.5, 0.99]], dtype=torch.double)
    logp = p.log().requires_grad_()
    one = torch.ones_like(p)
    upge_loss(TABLE["luffy_demo"], logp, one.bool(), one, one)[0].backward()
    assert torch.allclose(-logp.grad, p * g / (p + g) ** 2, rtol=1e-12)
    # negative control: the shaping, not its slope
    assert not torch.allclose(-logp.grad, p / (p + g), rtol=1e-2)


def test_chord_weighs_most_where_the_model_is_of_two_minds():
    p = torch.tensor([[0.01, 0.25, 0.5, 0.75, 0.99]], dtype=torch.double)
    logp, one = p.log().requires_grad_(), torch.ones_like(p)
    upge_loss(TABLE["chord_demo"], logp, one.bool(), one, one)[0].backward()
    wanted = [0.0099, 0.1875, 0.25, 0.1875, 0.0099]
    assert (-logp.grad)[0].tolist() == pytest.approx(wanted, rel=1e-12)
    # negative control: the gradient through the weight as well, had it not been detached
    through = torch.autograd.grad((phi(logp.exp()) * logp).sum(), logp)[0]
    assert error(through, -logp.grad) > 1e-2


GARBAGE = [math.nan, math.inf, -7.0]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_may_hold_anything(name, garbage, batch):
    """In every tensor, also in advantages and weights per token."""
    logp, old, valid, lengths, rewards = batch
    wanted = row_gradient(name, batch)
    fill = lambda x: torch.where(valid, x.detach(), garbage)
    logp = fill(logp).requires_grad_()
    weight = TABLE[name].normaliser(lengths, GROUP, N, L_MAX)[:, None]
    loss, stable = upge_loss(
        TABLE[name],
        logp,
        valid,
        fill(advantages(name, rewards)),
        fill(weight),
        fill(old),
        entropy=fill(ENTROPY),
    )
    got = torch.autograd.grad(loss, logp)[0]
    assert error(got[valid], wanted[valid]) <= 1e-12 and (got[~valid] == 0).all()
    assert loss.isfinite() and stable.isfinite().all()


def test_a_mask_that_lets_the_padding_in_changes_the_gradient(batch):
    """A negative control of the test above."""
    logp, old, valid, lengths, rewards = batch
    everything = torch.ones_like(valid)
    got = row_gradient("grpo", (logp, old, everything, lengths, rewards))
    assert error(got, row_gradient("grpo", batch)) > 1e-2


@pytest.mark.parametrize("name", TABLE)
def test_a_sequence_of_padding_alone_adds_nothing(name, batch):
    logp, _, valid, _, _ = batch
    empty = valid.clone()
    empty[0] = False
    loss, _ = call(name, batch, valid=empty)
    got = torch.autograd.grad(loss, logp)[0]
    assert loss.isfinite() and got.isfinite().all() and (got[0] == 0).all()
    assert error(got[1:], row_gradient(name, batch)[1:]) <= 1e-12


# --------------------------------------------------------------------------------------- advantages


@pytest.fixture
def R():
    """Rewards (5, 8)."""
    return torch.rand(5, 8, dtype=torch.double, generator=torch.Generator().manual_seed(2))


RELATIVE = [upge.adv_centred, upge.adv_standardised, upge.adv_leave_one_out]


@pytest.mark.parametrize("advantage", RELATIVE)
def test_relative_advantages_of_a_group_sum_to_0(advantage, R):
    assert advantage(R).sum(-1).abs().max() < 1e-8 < advantage(R).abs().max()


@pytest.mark.parametrize("advantage", RELATIVE)
def test_relative_advantages_do_not_depend_on_an_offset(advantage, R):
    assert torch.allclose(advantage(R + 3), advantage(R), atol=1e-8)


@pytest.mark.parametrize("advantage", RELATIVE)
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_equal_rewards_give_exactly_0(advantage, dtype):
    rewards = torch.full((2, 3), 0.1, dtype=dtype)
    assert (advantage(rewards) == 0).all()


def test_equal_rewards_would_not_give_0_by_themselves():
    """A negative control: in double precision 0.1 + 0.1 + 0.1 is not 0.3."""
    rewards = torch.full((1, 3), 0.1, dtype=torch.double)
    assert (rewards - rewards.mean(-1, keepdim=True)).abs().max() > 0


@pytest.mark.parametrize("advantage", RELATIVE)
def test_a_group_of_one_has_no_advantage(advantage):
    assert (advantage(torch.rand(4, 1)) == 0).all()


def test_only_standardised_advantages_do_not_depend_on_the_scale(R):
    centred, standard = upge.adv_centred, upge.adv_standardised
    assert torch.allclose(standard(10 * R), standard(R), rtol=1e-4)
    assert torch.allclose(centred(10 * R), 10 * centred(R))
    assert not torch.allclose(standard(R), centred(R), rtol=1e-2)


def test_std_is_that_of_a_sample(R):
    centred = R - R.mean(-1, keepdim=True)
    wanted = centred / (R.std(-1, correction=1, keepdim=True) + 1e-6)
    assert torch.allclose(upge.adv_standardised(R), wanted)
    population = centred / (R.std(-1, correction=0, keepdim=True) + 1e-6)  # negative control
    assert (population / wanted).mean().item() == pytest.approx(math.sqrt(8 / 7), abs=1e-4)


def test_leave_one_out_compares_with_the_mean_of_the_others(R):
    others = torch.stack([R[:, i] - R[:, torch.arange(8) != i].mean(-1) for i in range(8)], -1)
    assert torch.allclose(upge.adv_leave_one_out(R), others)
    assert not torch.allclose(upge.adv_centred(R), others, rtol=1e-2)  # negative control


def test_the_sign_of_a_reward():
    assert upge.adv_sign(torch.tensor([[1.0, 0.0]])).tolist() == [[1, -1]]


def test_gae_against_brute_force():
    torch.manual_seed(3)
    lengths = [5, 1, 3]
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    rewards, values = (
        torch.where(valid, torch.randn(3, 5, dtype=torch.double), math.nan) for _ in "rv"
    )

    def brute(gamma, lam):
        A = torch.zeros(3, 5, dtype=torch.double)
        for i, n in enumerate(lengths):
            V = values[i, :n].tolist() + [0.0]
            delta = [rewards[i, t] + gamma * V[t + 1] - V[t] for t in range(n)]
            for t in range(n):
                A[i, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
        return A

    got = gae(rewards, values, valid, 0.9, 0.8)
    assert error(got, brute(0.9, 0.8)) < 1e-12
    assert error(got, brute(0.9, 0.9)) > 1e-2  # negative control
    returns = torch.where(valid, rewards, 0).flip(1).cumsum(1).flip(1)
    assert (
        error(gae(rewards, values, valid)[valid], (returns - values)[valid]) < 1e-12
    )  # gamma = lambda = 1


# --------------------------------------------------------------------------------------- HPT's gate


@pytest.mark.parametrize(
    "n, gamma, gated",
    [
        (8, 0.0, {0}),
        (8, 2 / 8, {0, 1, 2}),
        (8, 0.24, {0, 1}),
        (8, 1.0, set(range(9))),
        (10, 0.3, {0, 1, 2, 3}),
        (100, 0.29, set(range(30))),
        (1, 0.0, {0}),
    ],
)
def test_gate_is_inclusive_and_counts(n, gamma, gated):
    alpha, beta = hpt_gate(torch.arange(n + 1), n, gamma)
    assert {c for c in range(n + 1) if beta[c]} == gated
    assert (alpha + beta == 1).all()


def test_gate_at_its_bound_takes_the_demonstration():
    _, at_bound = hpt_gate(torch.tensor([2]), 8, 2 / 8)
    _, above = hpt_gate(torch.tensor([3]), 8, 2 / 8)  # negative control
    assert (at_bound.item(), above.item()) == (1, 0)


def test_gate_compares_the_mean_of_rewards_between_0_and_1():
    """A prompt whose P is between two counts: 1.1 of 4 is below 0.3, 1.3 of 4 is above."""
    sums = torch.tensor([1.1, 0.3 + 0.3 + 0.6, 1.3])  # float32, as train_hpt.py has them
    _, beta = hpt_gate(sums, 4, 0.3)
    assert beta.tolist() == [1, 1, 0]


def test_smooth_gate():
    alpha, beta = smooth_gate(torch.tensor([0, 2, 8]), 8)
    assert alpha.tolist() == [0, 0.25, 1] and beta.tolist() == [1, 0.75, 0]


@pytest.mark.parametrize(
    "schedule, by_hand",
    [
        # the paper's CHORD-mu: no warm-up, 0.9 to 0.05 in 200 steps; half of it at step 100
        ((0.9, 0.05, 0, 200), {100: 0.475, 200: 0.05, 201: 0.05, 10_000: 0.05}),
        # the example in its code: to 0.5 in 200 steps, then to 0.02 in 400
        ((0.5, 0.02, 200, 400), {1: 0.0025, 100: 0.25, 200: 0.5, 400: 0.26, 600: 0.02, 601: 0.02}),
        # a third of the way in time is a quarter of the way down: (1 - cos 60 degrees) / 2
        ((0.8, 0.4, 3, 3), {1: 0.8 / 3, 2: 1.6 / 3, 3: 0.8, 4: 0.7, 5: 0.5, 6: 0.4}),
        # the paper's CHORD-phi, and the default: constant
        ((0.1, 0.1, 0, 0), {1: 0.1, 2: 0.1, 500: 0.1}),
        ((0.3, 0.3, 2, 0), {1: 0.15, 2: 0.3, 3: 0.3}),
    ],
)
def test_chord_schedule_by_hand(schedule, by_hand):
    for step, mu in by_hand.items():
        assert chord_schedule(step, *schedule) == pytest.approx((1 - mu, mu), abs=1e-12)


def test_chords_mu_falls_along_a_cosine():
    """A negative control of the test above: a line would be elsewhere, except in the middle."""
    _, mu = chord_schedule(50, 0.9, 0.05, 0, 200)
    line = 0.9 + (0.05 - 0.9) * 50 / 200
    assert mu > line + 0.05


def test_pi_old_of_trainer_or_sampler():
    """Rewards over three actions, sampled from q while the trainer has p.

    Importance weights, with a large cap, and pi_old = q give the gradient of p.
    """
    p, q = (
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.double),
        torch.tensor([0.2, 0.3, 0.5], dtype=torch.double),
    )
    R = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.double)
    logits = p.log().requires_grad_()
    logp = logits.log_softmax(0)[:, None]  # each action a sequence of one token

    def gradient(pi_old, cap=math.inf):
        old, importance = PI_OLD[pi_old](logp.detach(), q.log()[:, None], cap)
        loss, _ = upge_loss(
            TABLE["dr_grpo"]._replace(stable=upge.stable_always),
            logp,
            torch.ones(3, 1, dtype=torch.bool),
            R,
            q[:, None] * importance,
            old,
        )  # q as weight: the expectation over the sampler's draws
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    true = torch.autograd.grad(-(logp.exp() * R).sum(), logits, retain_graph=True)[0]
    assert error(gradient("tis"), true) < 1e-12 and error(gradient("sampler"), true) < 1e-12
    assert error(gradient("trainer"), true) > 1e-2  # negative control: the mismatch ignored
    assert error(gradient("tis", cap=2.0), true) > 1e-2  # p/q = 2.5 at the first action, truncated
    assert PI_OLD["tis"](p.log(), q.log(), 2.0)[1].tolist() == pytest.approx([2.0, 1.0, 0.4])


# ----------------------------------------------------- the trainer's gradient, over real gloo ranks

ARGS = {
    "clip_eps": None,
    "entropy_coef": 0.0,
    "pi_old": "trainer",
    "tis_cap": 2.0,
    "gae_gamma": 0.9,
    "gae_lambda": 0.8,
    "sft_coef": 0.05,
    "max_response_tokens": 32,
    "tokens_per_microbatch": 40,
}


def made_up_step(gated, grouped=False):
    """Six prompts with four rollouts each, the first `gated` of them failed."""
    torch.manual_seed(4)
    token = lambda n: torch.randint(3, 32, (n,)).tolist()
    prompts = []
    for q in range(6):
        problem = {"prompt_ids": token(2 + q), "demo_ids": token(5 + 3 * q)}
        rollouts = [
            Rollout(token(n), (-3 * torch.rand(n)).tolist(), False, "")
            for n in torch.randint(1, 20, (4,)).tolist()
        ]
        rewards = [0.0] * 4 if q < gated else [1.0, 0.0, float(q % 2), 0.0]
        beta = float(q < gated)
        prompts.append(
            Prompt(problem, rollouts, rewards, 1.0, *((1.0, 1.0) if grouped else (1 - beta, beta)))
        )
    return prompts


def tiny_lm():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).double()


def tiny_critic():
    from transformers import Qwen2ForTokenClassification

    config = tiny_lm().config
    config.num_labels, config.classifier_dropout = 1, 0.0
    torch.manual_seed(7)
    return Qwen2ForTokenClassification(config).double()


def made_up_value(ids, response, lengths):
    """A critic: some function of the token, in float64."""
    return torch.sin(ids[response].double())


class Case(NamedTuple):
    """A step whose gradient the trainer computes in processes of its own."""

    prompts: list
    method: str
    budget: int = 40  # tokens per micro-batch
    changes: dict | None = None  # of ARGS
    wrong: bool = False  # weigh tokens per micro-batch, as gradient accumulation often does
    probe: bool = False


def gradient_on_ranks(rank, world, cases, path):
    """In a process of its own: the trainer's gradient of each case and of the critic, to `path`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{path}.{world}-ranks"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    lm, cpu = tiny_lm(), torch.device("cpu")
    for block in lm.model.layers:
        fully_shard(block)
    policy = fully_shard(Policy(lm, temperature=1.0, chunk=7))
    results = []
    for case in cases:
        settings = ARGS | (case.changes or {}) | {"tokens_per_microbatch": case.budget}
        args = SimpleNamespace(**settings)
        method = METHODS[case.method]
        micro_batches = build_micro_batches(case.prompts, method, args, cpu, Counts())
        if case.wrong:
            weigh_per_micro_batch(micro_batches)
        if case.method == "ppo":
            value_pass(made_up_value, [micro_batches], args, Counts())
        old_policy_pass(policy, [micro_batches], args, Counts())
        for m in micro_batches:
            if m.old_logp is not None:
                m.old_logp = stale(m.old_logp)  # as if some updates had been made
        accumulate = functools.partial(accumulate_gradient, args=args, counts=Counts())
        counted = {
            "rl": sum(p.alpha > 0 for p in case.prompts),
            "sft": sum(p.beta > 0 for p in case.prompts),
        }
        seen = {}
        if case.probe:
            seen = probe.probe(policy, micro_batches, accumulate, counted, len(case.prompts))
        accumulate(policy, micro_batches)
        gradient = {name: p.grad.full_tensor().clone() for name, p in lm.named_parameters()}
        results.append(gradient | seen)
        policy.zero_grad()
    results.append(critic_gradient_on_ranks(cpu))
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


def weigh_per_micro_batch(micro_batches):
    """The mean over the tokens of each micro-batch, averaged over the micro-batches of a row."""
    for m in micro_batches:
        of_row = sum(other.row == m.row for other in micro_batches)
        m.weight = torch.full_like(m.weight, 1 / of_row / m.weight.numel())


def critic_gradient_on_ranks(device):
    """{name: gradient} of the value loss."""
    value_model, args = tiny_critic(), SimpleNamespace(**ARGS)
    critic = fully_shard(Critic(value_model))
    micro_batches = build_micro_batches(made_up_step(0), METHODS["ppo"], args, device, Counts())
    value_pass(critic, [micro_batches], args, Counts())
    for m in micro_batches:
        if m.value is not None:
            m.value = stale(m.value)
    accumulate_critic_gradient(critic, micro_batches, 0.2, Counts())
    return {name: p.grad.full_tensor().clone() for name, p in value_model.named_parameters()}


def spawn(function, *args, processes=1, seconds=300):
    """Run function(rank, *args) in processes of their own; fail if they take too long."""
    context = torch.multiprocessing.spawn(function, args, nprocs=processes, join=False)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{function.__name__} did not end in {seconds} s")


def stale(logp):
    """log-probabilities of a policy some updates back: ratios from 0.74 to 1.35."""
    logp = logp.double()
    return logp + 0.3 * torch.sin(1e3 * logp)


def step_with_a_solved_prompt():
    """The last prompt has no signal, so that its gradient is 0."""
    *prompts, last = made_up_step(2)
    return [*prompts, last._replace(rewards=[1.0] * 4)]


def smooth_step():
    """A step with weights between 0 and 1 for both kinds."""
    prompts = made_up_step(2)
    return [p._replace(alpha=q / 6, beta=1 - q / 6) for q, p in enumerate(prompts)]


def reordered_step():
    """The same step in another order."""
    prompts = reversed(made_up_step(2))
    return [p._replace(rollouts=p.rollouts[::-1], rewards=p.rewards[::-1]) for p in prompts]


def step_with_other_dropped_rollouts():
    """The same step, with other tokens in the rollouts that the gate drops."""
    prompts = []
    for p in made_up_step(2):
        if p.beta:
            p = p._replace(rollouts=[r._replace(ids=r.ids[::-1]) for r in p.rollouts])
        prompts.append(p)
    return prompts


def step_of_method(name):
    """A step on which the method differs from all others."""
    method = METHODS[name]
    if method.rollouts is None:
        return made_up_step(6)
    if method.combine == "schedule":
        return [p._replace(alpha=0.7, beta=0.3) for p in made_up_step(0)]
    gated = 2 if method.combine == "gate" else 0
    return made_up_step(gated, grouped=method.combine == "group")


CASES = {
    "whole": Case(made_up_step(2), "hpt", 10_000),
    "one row": Case(made_up_step(2), "hpt", 1),
    "small": Case(made_up_step(2), "hpt", 50, probe=True),
    "solved": Case(step_with_a_solved_prompt(), "hpt", 50, probe=True),
    "wrong whole": Case(made_up_step(2), "hpt", 10_000, wrong=True),
    "wrong small": Case(made_up_step(2), "hpt", 20, wrong=True),
    "sampler": Case(made_up_step(0), "grpo", changes={"pi_old": "sampler"}),
    "tis": Case(made_up_step(0), "grpo", changes={"pi_old": "tis"}),
    "tis, low cap": Case(made_up_step(0), "grpo", changes={"pi_old": "tis", "tis_cap": 0.3}),
    "smooth": Case(smooth_step(), "hpt"),
    "clip": Case(made_up_step(0), "dr_grpo", changes={"clip_eps": 0.05}),
    "bonus": Case(made_up_step(0), "grpo", changes={"entropy_coef": 0.1}),
    "bonus on demonstrations": Case(made_up_step(6), "sft", changes={"entropy_coef": 0.1}),
    "ppo, one row": Case(made_up_step(0), "ppo", 1),
    "reordered": Case(reordered_step(), "hpt", 50),
    "dropped changed": Case(step_with_other_dropped_rollouts(), "hpt", 10_000),
}
CASES |= {gated: Case(made_up_step(gated), "hpt") for gated in range(7)}
CASES |= {name: Case(step_of_method(name), name) for name in METHODS}


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """The trainer's gradients from 1 and from 2 real processes."""
    return {
        world: gradients_of(world, tmp_path_factory.mktemp("gradients") / "gradients.pt")
        for world in (1, 2)
    }


@pytest.fixture(params=[1, 2])
def gradients(request, by_ranks):
    return by_ranks[request.param]


def gradients_of(world, path):
    """{case: flat gradient}; the value loss is "critic", what the probe saw is "probe CASE"."""
    spawn(gradient_on_ranks, world, list(CASES.values()), path, processes=world)
    gradients = {}
    for case, result in zip([*CASES, "critic"], torch.load(path), strict=True):
        seen = {name: value for name, value in result.items() if name.startswith("probe/")}
        if seen:
            gradients[f"probe {case}"] = seen
        parameters = [value for name, value in result.items() if name not in seen]
        gradients[case] = torch.cat([p.flatten() for p in parameters])
    return gradients


def read(lm, prompt, response):
    """Log-probabilities (n,) of a response, and its mean entropy, with plain transformers."""
    logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    return logp.gather(-1, torch.tensor(response)[:, None])[:, 0], entropy


@dataclasses.dataclass
class ByHand:
    """The loss of a method, written out prompt by prompt, without padding."""

    method: str
    sft_coef: float = 0.05
    pi_old: str = "trainer"
    tis_cap: float = 2.0
    eps: float = 0.2
    bonus: float = 0.0
    L: int = 32

    def gradient(self, prompts):
        """Flat gradient of the tiny model."""
        lm, objective = tiny_lm(), 0.0
        whitened = ppo_advantages(prompts)
        tokens_per_prompt = sum(len(r.ids) for p in prompts for r in p.rollouts) / len(prompts)
        demo_tokens = sum(len(p.problem["demo_ids"]) for p in prompts) / len(prompts)
        for p, A in zip(prompts, whitened, strict=True):
            if METHODS[self.method].demonstration:
                objective = objective + p.beta * self.demonstration(lm, p, demo_tokens)
            if METHODS[self.method].rollouts and p.alpha:
                for i in range(len(p.rollouts)):
                    objective = objective + self.rollout(lm, p, i, A[i], tokens_per_prompt)
        (-objective / len(prompts)).backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters()])

    def demonstration(self, lm, p, tokens_per_demonstration):
        """What the demonstration of a prompt adds to the objective of the prompt."""
        x, H = read(lm, p.problem["prompt_ids"], p.problem["demo_ids"])
        G, group = len(p.rollouts), torch.tensor([*p.rewards, p.demo_reward])
        shaped = (x.exp() / (x.exp() + g)).sum()  # LUFFY's f(pi)
        in_group = (p.demo_reward - group.mean()) * shaped / (G + 1) / self.L
        alone = p.demo_reward * shaped / G / self.L
        return {
            "sft": x.mean(),
            "dft": (x.exp().detach() * x).mean(),
            "luffy": in_group,
            "srft": 0.5 * (-H.detach()).exp() * x.sum() / (G + 1) / self.L + in_group,
            "chord": (phi(x.exp().detach()) * x).sum() / tokens_per_demonstration,
            "hpt": self.sft_coef * x.mean(),
            "hpt_off": alone,
            "hpt_mix": self.sft_coef * x.mean() + alone,
        }[self.method]

    def rollout(self, lm, p, i, whitened, tokens_per_prompt):
        """What rollout i of a prompt adds to the objective of the prompt."""
        r, reward = p.rollouts[i], p.rewards[i]
        x, H = read(lm, p.problem["prompt_ids"], r.ids)
        R, G, L = torch.tensor(p.rewards), len(p.rollouts), self.L
        sampler = torch.tensor(r.logp, dtype=torch.double)
        old = stale(sampler if self.pi_old == "sampler" else x.detach())
        ratio, s = torch.exp(x - old), torch.exp((x - old).mean())
        importance = 1.0
        if self.pi_old == "tis":
            importance = (x.detach() - sampler).exp().clamp(max=self.tis_cap)
        centred = reward - R.mean()
        standard = centred / (R.std() + 1e-6)
        in_group = reward - (R.sum() + p.demo_reward) / (G + 1)
        srft = 0.1 * H.detach().exp() if reward else -1.0
        dr_grpo = clipped(ratio, centred, self.eps, self.eps).sum() / G / L
        grpo = (importance * clipped(ratio, standard, 0.2, 0.2)).mean() / G
        return (
            p.alpha
            * {
                "reinforce": (2 * reward - 1) * x.mean() / G,
                "rloo": (reward - (R.sum() - reward) / (G - 1)) * x.sum() / G / L,
                "ppo": clipped(ratio, whitened, 0.2, 0.2).sum() / tokens_per_prompt,
                "grpo": grpo,
                "chord": grpo,
                "dr_grpo": dr_grpo,
                "dapo": clipped(ratio, standard, 0.2, 0.28).sum() / tokens_per_prompt,
                "cispo": (ratio.clamp(max=1.2).detach() * standard * x).sum()
                / sum(len(other.ids) for other in p.rollouts),
                "gspo": clipped(s, standard, 3e-4, 4e-4) / G,
                "luffy": (ratio * in_group).sum() / (G + 1) / L,
                "srft": srft * x.sum() / (G + 1) / L,
                "hpt": dr_grpo,
                "hpt_mix": dr_grpo,
                "hpt_off": dr_grpo,
            }[self.method]
            + self.bonus * H / G
        )


def clipped(ratio, A, low, high):
    """PPO's objective."""
    return torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def ppo_advantages(prompts):
    """Per prompt and rollout the whitened GAE under the made-up critic."""
    groups = []
    for p in prompts:
        values = [torch.sin(torch.tensor(r.ids).double()) for r in p.rollouts]
        groups.append(list(map(direct_gae, p.rewards, values)))
    tokens = torch.cat([A for group in groups for A in group])
    mean, std = tokens.mean(), tokens.std(correction=0)
    return [[(A - mean) / std for A in group] for group in groups]


def direct_gradient_of_method(method, prompts, **settings):
    """Flat gradient of the method's loss."""
    return ByHand(method, **settings).gradient(prompts)


def direct_gae(reward, V):
    """GAE(0.9, 0.8) of one response with values V (n,), step by step from the end."""
    row, after, V = [], 0.0, V.tolist() + [0.0]
    for t in reversed(range(len(V) - 1)):
        after = (reward if t == len(V) - 2 else 0.0) + 0.9 * V[t + 1] - V[t] + 0.9 * 0.8 * after
        row.insert(0, after)
    return torch.tensor(row, dtype=torch.double)


def direct_critic_gradient(prompts, clip=0.2, half=0.5):
    """PPO's clipped value loss written out token by token, no padding."""
    lm, total = tiny_critic(), 0.0
    for p in prompts:
        for r, reward in zip(p.rollouts, p.rewards):
            hidden = lm.base_model(
                torch.tensor([p.problem["prompt_ids"] + r.ids])
            ).last_hidden_state[0]
            V = lm.score(hidden)[len(p.problem["prompt_ids"]) - 1 : -1, 0]
            returns, old = direct_gae(reward, V.detach()) + V.detach(), stale(V.detach())
            for t in range(len(V)):
                near = old[t] + (V[t] - old[t]).clamp(-clip, clip)
                total = total + half * torch.maximum(
                    (V[t] - returns[t]) ** 2, (near - returns[t]) ** 2
                )
    (total / sum(len(r.ids) for p in prompts for r in p.rollouts)).backward()
    return torch.cat([p.grad.flatten() for p in lm.parameters()])


def test_the_critics_gradient_is_that_of_its_directly_written_loss(gradients):
    assert error(gradients["critic"], direct_critic_gradient(made_up_step(0))) <= 1e-6


def test_the_critics_gradient_is_clipped_and_halved(gradients):
    """Negative controls of the test above."""
    unclipped = direct_critic_gradient(made_up_step(0), clip=math.inf)
    assert error(gradients["critic"], unclipped) > 1e-3
    assert error(gradients["critic"], direct_critic_gradient(made_up_step(0), half=1.0)) > 1e-2


def test_ranks_agree(by_ranks):
    for case in [*CASES, "critic"]:
        if not str(case).startswith("wrong"):
            assert error(by_ranks[2][case], by_ranks[1][case]) <= 1e-8, case
    assert error(by_ranks[2]["wrong small"], by_ranks[1]["wrong small"]) > 1e-2  # negative control


@pytest.mark.parametrize("case", ["whole", "one row", "small", "reordered", "dropped changed"])
def test_the_gradient_depends_on_no_split_and_no_order(gradients, case):
    wanted = direct_gradient_of_method("hpt", made_up_step(2))
    assert error(gradients[case], wanted) <= 1e-7  # weights and advantages travel as float32
    assert error(gradients[case], gradients["whole"]) <= 1e-10


def test_dropped_rollouts_contribute_exactly_nothing(gradients):
    assert torch.equal(gradients["dropped changed"], gradients["whole"])


def test_a_mean_per_micro_batch_would_depend_on_the_split(gradients):
    """A negative control of the two tests above."""
    assert error(gradients["wrong small"], gradients["wrong whole"]) > 1e-2


def test_another_coefficient_or_a_missing_prompt_is_another_gradient(gradients):
    """Negative controls, too."""
    prompts = made_up_step(2)
    other = direct_gradient_of_method("hpt", prompts, sft_coef=0.06)
    assert error(other, gradients["whole"]) > 1e-3
    assert error(direct_gradient_of_method("hpt", prompts[1:]), gradients["whole"]) > 1e-2


@pytest.fixture(scope="module")
def by_hand():
    """{method: gradient of its directly written loss, on its case of CASES}."""
    return {name: direct_gradient_of_method(name, CASES[name].prompts) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_the_training_loop_is_its_directly_written_loss(gradients, by_hand, name):
    assert error(gradients[name], by_hand[name]) <= 1e-6
    others = {other: error(gradients[name], by_hand[other]) for other in METHODS if other != name}
    assert min(others.values()) > 1e-2, others  # negative control


def test_whitening_is_over_all_micro_batches(gradients):
    assert error(gradients["ppo, one row"], gradients["ppo"]) <= 1e-8


def test_the_gate_may_weigh_between_0_and_1(gradients):
    prompts = CASES["smooth"].prompts
    assert error(gradients["smooth"], direct_gradient_of_method("hpt", prompts)) <= 1e-6
    rounded = [p._replace(alpha=1.0) for p in prompts]  # negative control
    assert error(gradients["smooth"], direct_gradient_of_method("hpt", rounded)) > 1e-2


def test_the_clip_range_may_be_chosen(gradients, by_hand):
    wanted = direct_gradient_of_method("dr_grpo", made_up_step(0), eps=0.05)
    assert error(gradients["clip"], wanted) <= 1e-6
    assert error(gradients["clip"], by_hand["dr_grpo"]) > 1e-2  # negative control


def test_the_entropy_bonus_raises_the_entropy_of_rollouts(gradients):
    wanted = direct_gradient_of_method("grpo", made_up_step(0), bonus=0.1)
    assert error(gradients["bonus"], wanted) <= 1e-6
    inverted = direct_gradient_of_method("grpo", made_up_step(0), bonus=-0.1)  # negative control
    assert error(gradients["bonus"], inverted) > 1e-2


def test_the_entropy_bonus_leaves_demonstrations_alone(gradients):
    assert torch.equal(gradients["bonus on demonstrations"], gradients["sft"])


@pytest.mark.parametrize("pi_old", ["sampler", "tis"])
def test_pi_old_in_the_training_loop(gradients, by_hand, pi_old):
    wanted = direct_gradient_of_method("grpo", made_up_step(0), pi_old=pi_old)
    assert error(gradients[pi_old], wanted) <= 1e-6
    assert error(gradients[pi_old], by_hand["grpo"]) > 1e-2  # negative control


def test_importance_weights_are_truncated_where_the_flag_says(gradients):
    low = {"pi_old": "tis", "tis_cap": 0.3}  # the ratios of the made-up step lie below 2
    wanted = direct_gradient_of_method("grpo", made_up_step(0), **low)
    assert error(gradients["tis, low cap"], wanted) <= 1e-6
    assert error(gradients["tis, low cap"], gradients["tis"]) > 1e-2  # negative control


@pytest.mark.parametrize("name", ["small", "solved"])
def test_probe_is_what_prompt_by_prompt_gradients_say(gradients, name):
    prompts, seen = CASES[name].prompts, gradients[f"probe {name}"]
    by_prompt = []
    for q in range(len(prompts)):
        # The gradient is linear in the prompts: that of one is the whole minus that of the rest.
        rest = [other for i, other in enumerate(prompts) if i != q]
        by_prompt.append(
            6 * direct_gradient_of_method("hpt", prompts)
            - 5 * direct_gradient_of_method("hpt", rest)
        )
    sft, rl = torch.stack(by_prompt[:2]), torch.stack(by_prompt[2:])
    assert seen["probe/sft_norm"] == pytest.approx((sft.sum(0) / 6).norm().item(), rel=1e-6)
    assert seen["probe/rl_norm"] == pytest.approx((rl.sum(0) / 6).norm().item(), rel=1e-6)
    assert seen["probe/cosine"] == pytest.approx(
        torch.cosine_similarity(sft.sum(0), rl.sum(0), dim=0).item(), rel=1e-5
    )
    assert seen["probe/sft_variance"] == pytest.approx(sft.var(0).sum().item(), rel=1e-5)
    assert seen["probe/rl_variance"] == pytest.approx(rl.var(0).sum().item(), rel=1e-5)
    assert seen["probe/rl_variance"] != pytest.approx(
        rl.var(0, correction=0).sum().item(), rel=1e-2
    )  # negative control


def step_with_known_values(shuffled=False):
    """A response is worth 1 if its first token is odd, else 0.

    Nothing foretells that token, so V is 1/2 before it and R after it. Shuffled: the last token
    decides, of which the critic sees nothing in time.
    """
    prompts = []
    for _ in range(16):
        rollouts = []
        for _ in range(4):
            ids = torch.randint(3, 32, (6,)).tolist()
            rollouts.append(Rollout(ids, [0.0] * 6, False, ""))
        rewards = [float((r.ids[-1] if shuffled else r.ids[0]) % 2) for r in rollouts]
        prompts.append(Prompt({"prompt_ids": [3, 4]}, rollouts, rewards, 0.0, 1.0, 0.0))
    return prompts


def fit_critic(rank, path):
    """In a process of its own: the critic's explained variance on fresh rollouts.

    Before PPO's critic updates, after them, and on shuffled rewards.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=1)
    critic = fully_shard(Critic(tiny_critic().float()))
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    settings = {"gae_gamma": 1.0, "gae_lambda": 1.0, "tokens_per_microbatch": 512}
    args, cpu = SimpleNamespace(**ARGS | settings), torch.device("cpu")

    def micro_batches_and_explained_variance(shuffled=False):
        prompts, counts = step_with_known_values(shuffled), Counts()
        micro_batches = build_micro_batches(prompts, METHODS["ppo"], args, cpu, counts)
        value_pass(critic, [micro_batches], args, counts)
        returns = torch.cat([m.returns for m in micro_batches], 1)
        explained = 1 - counts.advantage_variance / returns.var(correction=0).item()
        return micro_batches, explained

    before = micro_batches_and_explained_variance()[1]
    for _ in range(150):
        micro_batches, _ = micro_batches_and_explained_variance()
        accumulate_critic_gradient(critic, micro_batches, 0.2, Counts())
        optimizer.step()
        optimizer.zero_grad()
    after = micro_batches_and_explained_variance()[1]
    torch.save((before, after, micro_batches_and_explained_variance(shuffled=True)[1]), path)
    dist.destroy_process_group()


def test_ppo_critic_fits_a_known_value_function(tmp_path):
    spawn(fit_critic, tmp_path / "fit.pt")
    before, after, shuffled = torch.load(tmp_path / "fit.pt")
    assert before < 0.1
    assert after == pytest.approx(5 / 6, abs=0.05)  # all that can be known: five states of six
    assert shuffled < 0.1  # negative control: rewards that the states seen do not tell


@pytest.mark.parametrize("gated", range(7))
def test_hpt_with_any_number_of_gated_prompts(gradients, gated):
    """The gradient is right, and no rank waits for another for ever."""
    assert error(gradients[gated], direct_gradient_of_method("hpt", made_up_step(gated))) <= 1e-7


def test_hpt_is_sft_where_all_are_gated_and_dr_grpo_where_none_is(gradients):
    assert error(gradients[6], 0.05 * gradients["sft"]) <= 1e-7
    assert error(gradients[0], gradients["dr_grpo"]) <= 1e-10
    assert error(gradients[1], gradients[0]) > 1e-3  # negative control


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_plan_holds_every_sequence_once(ranks, budget):
    for gated in range(7):
        by_row = build_sequences(made_up_step(gated), METHODS["hpt"], 0.05, 32)
        for row, sequences in by_row.items():
            plan = plan_micro_batches(sequences, ranks, budget)
            assert len({len(micro_batches) for micro_batches in plan}) == 1
            planned = [s for micro_batches in plan for batch in micro_batches for s in batch]
            assert sorted(planned) == sorted(sequences)
            for batch in (batch for micro_batches in plan for batch in micro_batches):
                assert len(batch) <= 1 or collate(row, batch, "cpu").ids.numel() <= budget


def test_plan_balances_tokens_not_sequences():
    lengths = [50, 3, 3, 3, 40, 3, 3, 20, 3, 3, 10, 3]
    sequences = [Sequence([1], [1] * n, False, 0, 0.0) for n in lengths]
    plan = plan_micro_batches(sequences, 2, 100)
    loads = [sum(len(s.response_ids) + 1 for batch in rank for s in batch) for rank in plan]
    assert abs(loads[0] - loads[1]) <= 10, loads
    half = [sum(lengths[i::2]) for i in (0, 1)]  # negative control: dealing out by count
    assert abs(half[0] - half[1]) > 10


# --------------------------------------------------------------- mistakes of those who copy upge.py


def call(name, batch, **changes):
    """upge_loss of a row with all that it needs, `changes` apart."""
    logp, old, valid, lengths, rewards = batch
    arguments = {
        "logp": logp,
        "valid": valid,
        "advantage": advantages(name, rewards),
        "weight": TABLE[name].normaliser(lengths, GROUP, N, L_MAX)[:, None],
        "old_logp": old,
        "entropy": ENTROPY,
    }
    return upge_loss(TABLE[name], **arguments | changes)


COMPARES_WITH_OLD = {"ppo", "grpo", "dr_grpo", "dapo", "cispo", "gspo", "luffy"}
NEEDS_SEQ = {"gspo", "srft", "srft_sft"}
NEEDS_ENTROPY = {"srft", "srft_sft"}


@pytest.mark.parametrize("name", TABLE)
def test_a_forgotten_old_logp_is_an_error_where_the_row_needs_it(name, batch):
    if name in COMPARES_WITH_OLD:
        with pytest.raises(ValueError, match="this row needs old_logp: pass log pi_old"):
            call(name, batch, old_logp=None)
    else:
        call(name, batch, old_logp=None)


@pytest.mark.parametrize("name", TABLE)
def test_a_forgotten_entropy_is_an_error_where_the_row_needs_it(name, batch):
    if name in NEEDS_ENTROPY:
        with pytest.raises(ValueError, match="this row needs entropy: pass the entropy"):
            call(name, batch, entropy=None)
    else:
        call(name, batch, entropy=None)


@pytest.mark.parametrize("name", TABLE)
def test_a_forgotten_seq_on_packed_input_is_an_error_where_the_row_needs_it(name, batch):
    logp, old, valid, _, _ = batch
    packed = {
        "logp": logp[valid][None],
        "valid": valid[valid][None],
        "advantage": torch.ones_like(logp[valid][None]),
        "weight": torch.ones_like(logp[valid][None]),
        "old_logp": old[valid][None],
        "entropy": ENTROPY[valid][None],
    }
    if name in NEEDS_SEQ:
        with pytest.raises(ValueError, match="this row needs seq: pass the sequence"):
            call(name, batch, **packed)
    else:
        call(name, batch, **packed)


@pytest.mark.parametrize("name", ["advantage", "weight"])
def test_one_value_per_sequence_must_be_a_column(name, batch):
    square = tuple(x[:, : x.shape[1]] if x.ndim == 2 else x for x in batch)
    logp = square[0][:T]  # (T, T): a (T,) tensor would broadcast along the wrong dimension
    with pytest.raises(ValueError, match=rf"{name} must have shape \(9, 9\) or \(9, 1\)"):
        call(
            "sft",
            batch,
            logp=logp,
            valid=square[2][:T],
            old_logp=None,
            entropy=None,
            **{"advantage": torch.ones(T, 1), "weight": torch.ones(T, 1)} | {name: torch.ones(T)},
        )


@pytest.mark.parametrize("name", ["advantage", "weight"])
def test_packed_input_takes_no_column(name, batch):
    logp, _, valid, _, _ = batch
    values = {"advantage": torch.ones(1, 1), "weight": torch.ones(1, 1)} | {name: torch.ones(B, 1)}
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        upge_loss(TABLE["sft"], logp[valid][None], valid[valid][None], **values)


@pytest.mark.parametrize("name", ["valid", "old_logp", "seq", "entropy"])
def test_tensors_per_token_must_have_the_shape_of_logp(name, batch):
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        call("grpo", batch, **{name: torch.ones(B, 1)})


def test_ppo_needs_an_advantage_per_token(batch):
    """Else R itself would be taken for an advantage, and PPO would run without a critic."""
    with pytest.raises(ValueError, match="advantage must have shape"):
        call("ppo", batch, advantage=TABLE["ppo"].advantage(batch[-1]).reshape(B, 1))


def test_packed_sequences_cannot_share_one_weight(batch):
    logp, _, valid, _, _ = batch
    packed, seq = logp[valid][None], torch.arange(B)[:, None].expand(B, T)[valid][None]
    A = torch.ones_like(packed)
    with pytest.raises(ValueError, match="weight must have shape"):
        upge_loss(TABLE["sft"], packed, A.bool(), A, torch.ones(1, 1), seq=seq)


def test_logp_must_have_two_dimensions(batch):
    logp, _, valid, _, _ = batch
    with pytest.raises(ValueError, match=r"logp must be \(B, T\)"):
        upge_loss(TABLE["sft"], logp[valid], valid[valid], torch.ones(1, 1), torch.ones(1, 1))


@pytest.mark.parametrize("name", TABLE)
def test_flat_rewards_are_an_error(name):
    with pytest.raises(ValueError, match=r"rewards must be \(N, G\), one row per prompt"):
        TABLE[name].advantage(torch.tensor([1.0, 0.0, 1.0]))
    assert TABLE[name].advantage(torch.tensor([[1.0, 0.0, 1.0]])).shape == (1, 3)


@pytest.mark.parametrize("name", TABLE)
def test_rewards_of_whole_numbers_are_an_error(name):
    """torch takes no mean of them."""
    with pytest.raises(ValueError, match=r"rewards must be of a floating-point type, not torch.i"):
        TABLE[name].advantage(torch.tensor([[1, 0, 1]]))


def test_a_mask_of_numbers_is_an_error(batch):
    """Tokenizers give masks of 0 and 1."""
    with pytest.raises(ValueError, match=r"valid must be a bool tensor, not torch.int64"):
        call("grpo", batch, valid=batch[2].long())


@pytest.mark.parametrize("eps", [0, 0.0, (0.0, 0.0)])
def test_a_clip_range_of_0_is_not_the_default(batch, eps):
    _, clipped = call("grpo", batch, eps=eps)
    _, default = call("grpo", batch)
    assert clipped.sum() < default.sum()


def test_one_number_is_a_clip_range_on_both_sides(batch):
    _, one = call("grpo", batch, eps=0.1)
    _, both = call("grpo", batch, eps=(0.1, 0.1))
    _, other = call("grpo", batch, eps=(0.1, 0.3))  # negative control
    assert one.equal(both) and not one.equal(other)


@pytest.mark.parametrize("name", TABLE)
def test_a_row_without_sequences_has_weights_of_length_0(name):
    empty = torch.zeros(0, dtype=torch.long)
    assert TABLE[name].normaliser(empty, empty, 3, L_MAX).shape == (0,)


def test_the_ratio_of_a_long_sequence_survives_bfloat16():
    """s = 1.284 over 600 tokens: bfloat16 would count 256 of them and give another s."""
    logp = torch.full((1, 600), -1.0, dtype=torch.bfloat16, requires_grad=True)
    old = torch.full((1, 600), -1.25, dtype=torch.bfloat16)  # both are exact in bfloat16
    valid, seq = torch.ones(1, 600, dtype=torch.bool), torch.zeros(1, 600, dtype=torch.long)
    one = torch.ones(1, 600)
    loss, stable = upge_loss(TABLE["gspo"], logp, valid, -one, one, old, seq)
    assert loss.item() == pytest.approx(600 * math.exp(0.25), rel=1e-4)
    assert stable.all()
    counted = torch.zeros(1, dtype=torch.bfloat16)  # negative control
    for _ in range(600):
        counted += 1
    assert counted.item() == 256


def test_returns_carry_no_gradient_of_the_critic():
    values = torch.zeros(1, 3, requires_grad=True)
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert not gae(torch.ones(1, 3), values, valid).requires_grad


def test_a_plain_hugging_face_loop_learns_with_upge_alone():
    """What someone who copies upge.py writes: sample, grade, gate, one loss, AdamW."""
    lm = tiny_lm().float()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    prompt, demo, n, length = [3, 4], [7, 7, 7], 8, 3  # right is a response that begins with 7
    torch.manual_seed(0)
    rewards_seen, gated_seen = [], []
    for _ in range(60):
        start = torch.tensor([prompt] * n)
        ids = lm.generate(
            start, max_new_tokens=length, min_new_tokens=length, do_sample=True, pad_token_id=0
        )
        rewards = (ids[:, len(prompt)] == 7).float()[None]  # (1, n)
        alpha, beta = hpt_gate(rewards.sum(-1), n, gamma=0.0)
        if beta[0]:
            row, ids = TABLE["sft"], torch.tensor([prompt + demo])
            A = torch.ones(1, 1)
        else:
            row = TABLE["dr_grpo"]
            A = row.advantage(rewards).reshape(n, 1)
        logits = lm(ids).logits[:, len(prompt) - 1 : -1]  # (B, length, V)
        targets = ids[:, len(prompt) :, None]
        logp = logits.log_softmax(-1).gather(-1, targets).squeeze(-1)  # (B, length)
        lengths, group = torch.full((len(ids),), length), torch.zeros(len(ids)).long()
        weight = row.normaliser(lengths, group, num_prompts=1, l_max=length)[:, None]
        valid = torch.ones_like(logp, dtype=torch.bool)
        loss, _ = upge_loss(row, logp, valid, A, weight, old_logp=logp.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards_seen.append(rewards.mean().item())
        gated_seen.append(beta.item())
    assert rewards_seen[0] < 0.3 and sum(rewards_seen[-10:]) / 10 > 0.9
    assert sum(gated_seen[:10]) > 0 and sum(gated_seen[-10:]) == 0


# ---------------------------------------------------------------------------- the table exists once


@functools.cache
def table_lines():
    """The lines of TABLE as `python upge.py` prints them."""
    command = [sys.executable, upge.__file__]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return printed.split("\n\n")[0].splitlines()


def test_the_doctest_runs():
    result = doctest.testmod(upge)
    assert result.failed == 0 and result.attempted > 15


def test_every_row_and_method_is_printed():
    names = [line.split()[0] for line in table_lines()]
    assert names == ["row", *TABLE]
    methods = upge.table_text().split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in methods] == ["method", *METHODS]


def test_the_docstring_has_the_table_that_is_printed():
    for line in table_lines():
        assert f"\n    {line}\n" in upge.__doc__


def test_the_readme_has_the_table_that_is_printed():
    readme = Path(upge.__file__).with_name("README.md").read_text()
    for line in table_lines()[1:]:
        cells = [cell.replace("|", "\\|") for cell in re.split("  +", line)]
        assert f"| {' | '.join(cells)} |" in readme
