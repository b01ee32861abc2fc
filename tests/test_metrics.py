"""The metrics of a step, on steps made up by hand."""

import math

import pytest
import torch
import torch.distributed as dist

from common import metrics
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


def measured(prompts=STEP, combine="gate", **counts):
    counts = {"tokens": 6.0, "grad_norms": [1.0, 3.0]} | counts
    return step_metrics(7, prompts, combine, Counts(**counts), TIMES, 1000)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("step", 7),
        ("reward/mean", 0.5),
        ("reward/std", 0.5),
        ("reward/timeouts", 3.0),
        ("reward/frac_zero_std", 2 / 3),
        ("hpt/solve_rate", 2 / 3),
        ("hpt/sft_frac", 1 / 3),
        ("hpt/offline_ratio", 1 / 5),  # one demonstration beside four rollouts
        ("data/rollouts", 6),  # also those that the gate left out, here and below
        ("data/demo_tokens", 3),
        ("data/no_signal", 0.25),
        ("response_length/mean", 3.0),
        ("response_length/max", 4),
        ("response_length/clip_ratio", 1 / 3),
        ("policy/entropy", 0.5),  # positive: -log p
        ("optim/grad_norm", 2.0),
        ("optim/lr", 0.25),
        ("optim/skipped", 0),
        ("perf/padding_frac", 0.25),
        ("perf/train_tokens_per_sec", 1.5),
        ("perf/rollout_tokens_per_sec", 9.0),
        ("time/step", 7.0),
    ],
)
def test_a_metric_by_hand(name, wanted):
    counts = {"filler_tokens": 2.0, "sequences": 8.0, "computed_sequences": 6.0}
    assert measured(**counts, lr=0.25, timeouts=3.0)[name] == pytest.approx(wanted)


def test_the_entropy_counts_tokens_not_responses():
    prompt = made_up_prompt((1.0, 0.0), 1, 0, lengths=(1, 3))
    prompt.rollouts[1] = prompt.rollouts[1]._replace(logp=[-2.0, -3.0, -4.0])
    assert measured([prompt])["policy/entropy"] == (0.5 + 2 + 3 + 4) / 4


def test_a_prompt_may_train_on_both_kinds():
    row = measured([made_up_prompt((1.0, 0.0), 0.5, 0.5)])
    assert row["hpt/offline_ratio"] == 1 / 3 and row["hpt/sft_frac"] == 0.5


def test_what_a_step_does_not_have_is_not_there():
    row = measured([made_up_prompt((), 0, 1)], combine=None)
    assert row["hpt/offline_ratio"] == 1.0 and row["data/rollouts"] == 0
    assert "hpt/sft_frac" not in row and "sft/nll" not in row and "mismatch/kl" not in row
    assert not any(name.startswith(("reward/", "response", "policy/", "critic/")) for name in row)


@pytest.mark.parametrize(
    "norms, mean, skipped", [([2.0, math.nan], 2.0, 1), ([math.inf], None, 1), ([1.0, 5.0], 3.0, 0)]
)
def test_skipped_updates_are_counted_and_left_out_of_the_mean(norms, mean, skipped):
    row = measured(grad_norms=norms, critic_norms=norms, return_tokens=1.0)
    assert row["optim/skipped"] == row["critic/skipped"] == skipped
    assert row["optim/grad_norm"] == row["critic/grad_norm"] == mean


def test_mismatch_of_sampler_and_trainer():
    counts = Counts(tokens=1.0)
    counts.add_mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.5]))
    counts.add_mismatch(torch.tensor([-1.0]), torch.tensor([-1.2]))
    row = measured(**vars(counts))
    wanted = sum(math.exp(gap) - 1 - gap for gap in (0.0, -0.5, 0.2)) / 3
    assert row["mismatch/kl"] == pytest.approx(wanted, rel=1e-5)
    assert row["mismatch/logp_max"] == pytest.approx(0.5)


def test_a_mismatch_that_is_not_a_number_is_not_hidden_by_a_later_one():
    counts, good = Counts(), torch.tensor([-1.0])
    counts.add_mismatch(torch.tensor([math.nan]), good)
    counts.add_mismatch(good, good - 0.5)
    assert math.isnan(counts.mismatch_max) and math.isnan(counts.mismatch_kl)


def test_a_divergence_is_never_negative():
    """r - 1 - log r in float32 falls below 0 for tiny log r, by rounding."""
    gap = torch.logspace(-9, -1, 4001)
    gap = torch.cat([gap, -gap])
    assert (gap.exp() - 1 - gap).min() < 0  # negative control
    assert all(metrics.divergence(one) >= 0 for one in gap)
    wanted = (gap.double() ** 2 / 2).sum().item()
    assert metrics.divergence(gap) == pytest.approx(wanted, rel=0.05)


def test_updates_on_rollouts_and_demonstrations():
    """Each weight contains its normaliser, so the losses of micro-batches are parts of one sum."""
    counts, old = Counts(), torch.tensor([-1.0, -2.0, -1.0, -1.0])
    stable = torch.tensor([1.0, 0.0, 1.0, 1.0])
    counts.add_rollouts(torch.tensor(0.25), torch.full((4,), -1.0), old, stable)
    counts.add_rollouts(torch.tensor(-1.0), old, old, stable)
    counts.add_demonstrations(torch.tensor([-1.0, -3.0, -5.0]), [2, 1])
    row = measured(**vars(counts))
    assert row["loss/rl"] == -0.75 and row["policy/clip_frac"] == 0.25
    wanted = (math.e - 1 - 1) / 8  # of pi_theta/pi_old = e; its inverse has another value
    assert row["policy/approx_kl"] == pytest.approx(wanted, rel=1e-5)
    assert row["sft/nll"] == (2 + 5) / 2  # each demonstration counts alike


@pytest.mark.parametrize("variance, explained", [(0.1, 1 - 0.1 / 0.25), (1.0, 1 - 1 / 0.25)])
def test_explained_variance_by_hand(variance, explained):
    """A critic worse than none explains less than nothing: 1, 0, 1, 0 for 0, 1, 0, 1."""
    counts = Counts(value_loss=3.0, critic_norms=[1.0, 5.0], advantage_variance=variance)
    counts.add_returns(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    row = measured(**vars(counts))
    assert row["critic/explained_variance"] == pytest.approx(explained)
    assert row["critic/loss"] == 1.5 and row["critic/returns_mean"] == 0.5


def test_equal_returns_leave_nothing_to_explain():
    counts = Counts(critic_norms=[1.0])
    counts.add_returns(torch.ones(2))
    assert "critic/explained_variance" not in measured(**vars(counts))


def test_counts_of_ranks_are_summed_unless_they_are_maxima_or_equal(monkeypatch):
    ranks = []
    for tokens, gap in ((1.0, 0.2), (2.0, -0.1), (4.0, math.nan)):
        ranks.append(Counts(tokens=tokens, lr=0.5, advantage_variance=0.3, grad_norms=[2.0]))
        ranks[-1].add_mismatch(torch.zeros(2), torch.tensor([0.0, gap]))

    def total(count):
        def gather(everyone, own):
            everyone[:] = [{k: vars(other)[k] for k in own} for other in ranks[:count]]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        return ranks[0].total()

    two = total(2)
    assert (two.tokens, two.mismatch_tokens) == (3.0, 4.0)
    assert two.mismatch_max == pytest.approx(0.2)
    assert (two.lr, two.advantage_variance, two.grad_norms) == (0.5, 0.3, [2.0])
    assert math.isnan(total(3).mismatch_max)  # a nan on one rank is not hidden


def test_use_of_a_gpu_is_6_operations_per_parameter_and_token(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    row = measured(tokens=1e5)  # of 1000 parameters, in 4 seconds
    assert row["perf/mfu"] == pytest.approx(6 * 1000 * 1e5 / 4 / 989e12)
    assert row["perf/max_memory_gb"] == 3.0


def test_a_clock_measures_each_phase_from_the_end_of_the_last(monkeypatch):
    ticks = iter([10.0, 13.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    clock = Clock()
    clock.lap("a")
    clock.lap("b")
    assert clock.times == {"a": 3.0, "b": 7.0}
