"""The metrics of a step, on steps made up by hand."""

import math

import pytest
import torch

from common.metrics import Clock, Counts, step_metrics
from rollout import Rollout
from train_hpt import Prompt


def made_up_prompt(rewards, alpha, beta, lengths=(2, 4), truncated=False):
    rollouts = [Rollout([5] * n, [-0.5] * n, truncated, "") for n in lengths[: len(rewards)]]
    return Prompt({"demo_ids": [1, 2, 3]}, rollouts, list(rewards), 1.0, alpha, beta)


STEP = [
    made_up_prompt((1.0, 0.0), 1, 0),
    made_up_prompt((0.0, 0.0), 0, 1, truncated=True),
    made_up_prompt((1.0, 1.0), 1, 0),
]
TIMES = {"rollout": 2.0, "reward": 1.0, "train": 4.0}


def measured(prompts=STEP, combine="gate", counts=None, **changes):
    counts = counts or Counts(
        tokens=6.0,
        filler_tokens=2.0,
        sequences=8.0,
        computed_sequences=6.0,
        grad_norms=[1.0, 3.0],
        lr=0.25,
    )
    for name, value in changes.items():
        setattr(counts, name, value)
    return step_metrics(7, prompts, combine, counts, TIMES, 1000)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("step", 7),
        ("reward/mean", 0.5),
        ("reward/std", 0.5),
        ("reward/frac_zero_std", 2 / 3),
        ("hpt/solve_rate", 2 / 3),
        ("hpt/sft_frac", 1 / 3),
        ("hpt/offline_ratio", 1 / 5),  # one demonstration beside four rollouts
        ("data/rollouts", 6),
        ("data/demo_tokens", 3),
        ("response_length/mean", 3.0),
        ("response_length/max", 4),
        ("response_length/clip_ratio", 1 / 3),
        ("policy/entropy", 0.5),  # positive: -log p
        ("optim/grad_norm", 2.0),
        ("optim/lr", 0.25),
        ("optim/skipped", 0),
        ("perf/padding_frac", 0.25),
        ("data/no_signal", 0.25),
        ("perf/train_tokens_per_sec", 1.5),
        ("perf/rollout_tokens_per_sec", 9.0),
        ("time/step", 7.0),
    ],
)
def test_a_metric_by_hand(name, wanted):
    assert measured()[name] == pytest.approx(wanted)


def test_a_skipped_update_is_counted_and_left_out_of_the_mean():
    metrics = measured(grad_norms=[2.0, math.nan])
    assert metrics["optim/skipped"] == 1 and metrics["optim/grad_norm"] == 2.0


def test_if_all_updates_were_skipped_there_is_no_norm():
    assert measured(grad_norms=[math.inf])["optim/grad_norm"] is None


def test_without_a_gate_there_is_no_gated_share():
    assert "hpt/sft_frac" not in measured(combine=None)


def test_a_schedule_logs_its_mu_and_no_gated_share():
    metrics = measured([made_up_prompt((1.0, 0.0), 0.7, 0.3)], combine="schedule")
    assert metrics["chord/mu"] == 0.3 and "hpt/sft_frac" not in metrics
    assert "chord/mu" not in measured()  # negative control: a gate has none


def test_without_rollouts_there_are_no_rewards():
    prompts = [made_up_prompt((), 0, 1)]
    metrics = measured(prompts, combine=None)
    assert metrics["hpt/offline_ratio"] == 1.0 and metrics["data/rollouts"] == 0
    assert not any(name.startswith(("reward/", "response", "policy/")) for name in metrics)


def test_a_step_of_demonstrations_alone_has_no_mismatch():
    assert "mismatch/kl" not in measured() and "sft/nll" not in measured()


def test_mismatch_of_sampler_and_trainer():
    counts = Counts(tokens=1.0, rl_tokens=1.0)
    counts.add_mismatch(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -1.5]]))
    counts.add_mismatch(torch.tensor([[-1.0]]), torch.tensor([[-1.2]]))
    metrics = measured(counts=counts)
    gaps = [0.0, -0.5, 0.2]
    wanted = sum(math.exp(gap) - 1 - gap for gap in gaps) / 3
    assert metrics["mismatch/kl"] == pytest.approx(wanted, rel=1e-5)
    assert metrics["mismatch/logp_max"] == pytest.approx(0.5)


def test_clip_fraction_and_approximate_kl():
    counts = Counts(tokens=1.0)
    logp, old = torch.tensor([[-1.0, -1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -2.0, -1.0, -1.0]])
    counts.add_rollouts(torch.tensor(0.5), logp, old, torch.tensor([[1.0, 0.0, 1.0, 1.0]]))
    metrics = measured(counts=counts)
    assert metrics["policy/clip_frac"] == 0.25 and metrics["loss/rl"] == 0.5
    wanted = (math.e - 1 - 1) / 4  # of pi_theta/pi_old = e; its inverse has another value
    assert metrics["policy/approx_kl"] == pytest.approx(wanted, rel=1e-5)


def test_the_losses_of_micro_batches_add_up():
    """Each weight contains its normaliser, so the losses are parts of one sum."""
    counts = Counts(tokens=1.0)
    for loss in (0.25, -1.0):
        one = torch.zeros(1, 1)
        counts.add_rollouts(torch.tensor(loss), one, one, torch.ones(1, 1))
    assert measured(counts=counts)["loss/rl"] == -0.75


def test_nll_is_the_mean_over_demonstrations_of_their_mean_over_tokens():
    counts = Counts(tokens=1.0)
    counts.add_demonstrations(torch.tensor([[-1.0, -3.0, -5.0]]), [2, 1])
    assert measured(counts=counts)["sft/nll"] == pytest.approx((2 + 5) / 2)


def test_explained_variance_by_hand():
    returns = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    counts = Counts(tokens=1.0, advantage_variance=0.1)
    counts.add_returns(returns)
    counts.value_loss, counts.critic_norms = 3.0, [1.0, 5.0]
    metrics = measured(counts=counts)
    assert metrics["critic/explained_variance"] == pytest.approx(1 - 0.1 / 0.25)
    assert metrics["critic/loss"] == 1.5 and metrics["critic/returns_mean"] == 0.5
    assert metrics["critic/grad_norm"] == 3.0 and metrics["critic/skipped"] == 0


def test_equal_returns_leave_nothing_to_explain():
    counts = Counts(tokens=1.0, critic_norms=[1.0])
    counts.add_returns(torch.ones(1, 2))
    assert "critic/explained_variance" not in measured(counts=counts)


def test_a_critic_worse_than_none_explains_less_than_nothing():
    """It predicts 1, 0, 1, 0 where the returns are 0, 1, 0, 1: the advantages are -1 and 1."""
    counts = Counts(tokens=1.0, advantage_variance=1.0)
    counts.add_returns(torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
    counts.critic_norms = [1.0]
    assert measured(counts=counts)["critic/explained_variance"] == pytest.approx(1 - 1 / 0.25)


def test_skipped_updates_of_the_critic_are_counted():
    counts = Counts(tokens=1.0, return_tokens=1.0)
    counts.critic_norms = [1.0, math.inf, 2.0]
    metrics = measured(counts=counts)
    assert metrics["critic/skipped"] == 1 and metrics["critic/grad_norm"] == 1.5


def test_timeouts_are_those_of_the_verifier():
    assert measured(timeouts=3.0)["reward/timeouts"] == 3.0


def test_the_entropy_counts_tokens_not_responses():
    prompt = made_up_prompt((1.0, 0.0), 1, 0, lengths=(1, 3))
    other = prompt.rollouts[1]._replace(logp=[-2.0, -3.0, -4.0])
    prompt.rollouts[1] = other
    assert measured([prompt])["policy/entropy"] == (0.5 + 2 + 3 + 4) / 4


def test_rollouts_that_the_gate_left_out_are_measured_too():
    gated = made_up_prompt((0.0, 0.0), 0, 1, lengths=(1, 1), truncated=True)
    metrics = measured([gated])
    assert metrics["response_length/clip_ratio"] == 1.0 and metrics["reward/mean"] == 0.0


def test_a_smooth_gate_trains_on_both_kinds():
    assert measured([made_up_prompt((1.0, 0.0), 0.5, 0.5)])["hpt/offline_ratio"] == 1 / 3


def test_use_of_a_gpu_is_6_operations_per_parameter_and_token(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    metrics = measured(tokens=1e5)  # of 1000 parameters, in 4 seconds
    assert metrics["perf/mfu"] == pytest.approx(6 * 1000 * 1e5 / 4 / 989e12)
    assert metrics["perf/max_memory_gb"] == 3.0


def test_a_clock_measures_each_phase_from_the_end_of_the_last(monkeypatch):
    ticks = iter([10.0, 13.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    clock = Clock()
    clock.lap("a")
    clock.lap("b")
    assert clock.times == {"a": 3.0, "b": 7.0}


def test_a_mismatch_that_is_not_a_number_is_not_hidden_by_a_later_one():
    counts, good = Counts(), torch.tensor([[-1.0]])
    counts.add_mismatch(torch.tensor([[math.nan]]), good)
    counts.add_mismatch(good, good - 0.5)
    assert math.isnan(counts.mismatch_max)
