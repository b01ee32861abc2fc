"""What the training loop decides by rule, and two steps of it against a plain loop."""

import copy
import json
import math
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

import train_hpt
from common import distributed, flags
from common.metrics import Counts
from common.model import Network
from rollout import Rollout
from test_upge import NEEDS_ENTROPY, spawn, tiny_lm
from toy import make
from train_hpt import (
    Prompt,
    Sequence,
    apply_gate,
    build_micro_batches,
    build_sequences,
    collate,
    draw,
    grade,
    is_due,
    needs_critic,
    plan_micro_batches,
    sample_rollouts,
    split_prompts,
    update,
    warmed_up,
)
from upge import METHODS, TABLE

# ---------------------------------------------------------------------------------- which problems


def test_an_epoch_holds_each_problem_once():
    drawn = [draw(list(range(12)), step, 4, seed=0) for step in (1, 2, 3)]
    assert sorted(sum(drawn, [])) == list(range(12))


def test_epochs_have_different_orders():
    first = sum((draw(list(range(12)), step, 4, seed=0) for step in (1, 2, 3)), [])
    second = sum((draw(list(range(12)), step, 4, seed=0) for step in (4, 5, 6)), [])
    assert sorted(second) == list(range(12)) and second != first


def test_a_step_may_end_one_epoch_and_begin_the_next():
    steps = [draw(list(range(5)), step, 3, seed=0) for step in range(1, 6)]
    places = sum(steps, [])
    assert [sorted(places[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3


def test_the_order_depends_on_the_seed_alone():
    assert draw(list(range(99)), 1, 50, seed=0) == draw(list(range(99)), 1, 50, seed=0)
    assert draw(list(range(99)), 1, 50, seed=0) != draw(list(range(99)), 1, 50, seed=1)


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(draw([0, 1, 2], 1, 6, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_minibatches_hold_each_prompt_once():
    chunks = split_prompts(list(range(10)), 3, seed=0, step=1)
    assert sorted(sum(chunks, [])) == list(range(10))
    assert [len(chunk) for chunk in chunks] == [4, 3, 3]


def test_minibatches_of_steps_differ():
    chunks = [split_prompts(list(range(10)), 2, seed=0, step=step) for step in (1, 2)]
    assert chunks[0] != chunks[1]


# --------------------------------------------------------------------------- rates and due dates


@pytest.mark.parametrize(
    "updates_before, warmup, wanted",
    [(0, 5, 0.2), (1, 5, 0.4), (4, 5, 1.0), (5, 5, 1.0), (99, 5, 1.0), (0, 0, 1.0), (0, 1, 1.0)],
)
def test_warm_up_is_linear_from_its_first_update(updates_before, warmup, wanted):
    assert warmed_up(1.0, updates_before, warmup) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "every, last, wanted",
    [(2, 3, [2, 3]), (0, 3, [3]), (1, 3, [1, 2, 3]), (5, 3, [3]), (2, 4, [2, 4])],
)
def test_what_is_due_every_so_often_is_due_at_the_end_too(every, last, wanted):
    assert [step for step in range(1, last + 1) if is_due(step, every, last)] == wanted


# ------------------------------------------------------------------------ sampling and grading


class RecordingSampler:
    """Stands in for the sampler: remembers what it is asked, and answers with the seed."""

    tensor_parallel = 1

    def __init__(self):
        self.asked = []

    def generate(self, prompts, seeds, n, label=None):
        self.asked += zip(map(tuple, prompts), seeds, strict=True)
        return [[Rollout([seed % 7], [-1.0], False, str(i)) for i in range(n)] for seed in seeds]


class RecordingVerifier:
    """Stands in for the verifier: a response is right if it ends with the answer."""

    def __init__(self, function=None):
        self.timeouts = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def score(self, responses, answers, each_done=None):
        self.timeouts += len(responses)
        return [float(r.endswith(a)) for r, a in zip(responses, answers, strict=True)]


def arguments(**changes):
    settings = {"method": "hpt", "samples_per_prompt": 3, "seed": 0, "gate": "switch", "gamma": 0.0}
    return SimpleNamespace(**settings | changes)


def seeds_of(step, **changes):
    sampler = RecordingSampler()
    sample_rollouts(sampler, [{"prompt_ids": [1, 2]}] * 4, step, arguments(**changes))
    return [seed for _, seed in sampler.asked]


def test_every_prompt_of_a_step_has_a_seed_of_its_own():
    assert len(set(seeds_of(1))) == 4


def test_steps_and_runs_sample_with_different_seeds():
    assert not set(seeds_of(1)) & set(seeds_of(2))
    assert not set(seeds_of(1)) & set(seeds_of(1, seed=1))
    assert seeds_of(1) == seeds_of(1)


@pytest.mark.parametrize("method, n", [("hpt", 3), ("grpo", 3), ("luffy", 2), ("sft", 0)])
def test_a_demonstration_in_the_group_takes_the_place_of_a_rollout(method, n):
    groups = sample_rollouts(
        RecordingSampler(), [{"prompt_ids": [1]}] * 2, 1, arguments(method=method)
    )
    assert [len(group) for group in groups] == [n, n]


def graded(method, demonstrations=("is 1", "is 9")):
    """Two problems with three rollouts each."""
    problems = [
        {"answer": "1", "demonstration": demonstrations[0]},
        {"answer": "2", "demonstration": demonstrations[1]},
    ]
    texts = [["1", "2", "1"], ["1", "2", "3"]]
    rollouts = [[Rollout([], [], False, text) for text in group] for group in texts]
    counts = Counts()
    rewards, demo_rewards = grade(RecordingVerifier(), problems, rollouts, METHODS[method], counts)
    return rewards, demo_rewards, counts


def test_rewards_keep_the_order_of_prompts_and_rollouts():
    assert graded("hpt")[0] == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("method", ["luffy", "srft", "hpt_mix", "hpt_off"])
def test_demonstrations_are_graded_if_their_reward_matters(method):
    assert graded(method)[1] == [1.0, 0.0]


@pytest.mark.parametrize("method", ["hpt", "grpo"])
def test_demonstrations_are_not_graded_if_their_reward_does_not_matter(method):
    _, demo_rewards, counts = graded(method)
    assert demo_rewards == [1.0, 1.0] and counts.timeouts == 6  # the stand-in counts calls


def test_timeouts_of_earlier_steps_are_not_counted_again():
    verifier, counts = RecordingVerifier(), Counts()
    verifier.timeouts = 100
    rollouts = [[Rollout([], [], False, "1")]]
    grade(verifier, [{"answer": "1"}], rollouts, METHODS["grpo"], counts)
    assert counts.timeouts == 1


def test_without_rollouts_nothing_is_graded():
    problems = [{"answer": "1", "demonstration": "is 9"}] * 2
    rewards, demo_rewards = grade(RecordingVerifier(), problems, [[], []], METHODS["sft"], Counts())
    assert rewards == [[], []] and demo_rewards == [1.0, 1.0]


@pytest.mark.parametrize(
    "method, gate, gamma, wanted",
    [
        ("hpt", "switch", 0.0, ([1, 1, 0], [0, 0, 1])),
        ("hpt", "switch", 0.4, ([1, 0, 0], [0, 1, 1])),
        ("hpt_mix", "smooth", 0.0, ([2 / 3, 1 / 3, 0], [1 / 3, 2 / 3, 1])),
        ("grpo", "switch", 0.0, ([1, 1, 1], [0, 0, 0])),
        ("sft", "switch", 0.0, ([0, 0, 0], [1, 1, 1])),
        ("luffy", "switch", 0.0, ([1, 1, 1], [1, 1, 1])),
    ],
)
def test_alpha_and_beta_of_each_prompt(method, gate, gamma, wanted):
    rewards = [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    got = apply_gate(rewards, 1, METHODS[method], arguments(gate=gate, gamma=gamma))
    assert got[0] == pytest.approx(wanted[0]) and got[1] == pytest.approx(wanted[1])


@pytest.mark.parametrize("step, mu", [(1, 0.45), (2, 0.9), (3, 0.5), (4, 0.1), (9, 0.1)])
def test_chord_weighs_all_prompts_of_a_step_alike(step, mu):
    """Two steps up to 0.9, two down to 0.1; the rewards do not matter."""
    args = arguments(chord_mu=[0.9, 0.1], chord_steps=[2, 2])
    alpha, beta = apply_gate([[1.0, 1.0], [0.0, 0.0]], step, METHODS["chord"], args)
    assert alpha == pytest.approx([1 - mu] * 2) and beta == pytest.approx([mu] * 2)


def test_chord_trains_every_prompt_on_both():
    by_row = build_sequences(
        [one_prompt(0.7, 0.3), one_prompt(0.7, 0.3)], METHODS["chord"], 0.05, 8
    )
    assert [s.weight for s in by_row["grpo"]] == pytest.approx(
        [0.7 / 2 / 2 / n for n in (2, 3)] * 2
    )
    assert [s.weight for s in by_row["chord_demo"]] == pytest.approx([0.3 / 8] * 2)


@pytest.mark.parametrize("mu, trained", [(0.0, "grpo"), (1.0, "chord_demo")])
def test_chord_at_its_ends_trains_on_one_alone(mu, trained):
    by_row = build_sequences([one_prompt(1 - mu, mu)], METHODS["chord"], 0.05, 8)
    assert {row for row, sequences in by_row.items() if sequences} == {trained}


@pytest.mark.parametrize("name", TABLE)
def test_entropies_are_computed_for_the_rows_that_use_them(name):
    assert TABLE[name].needs_entropy == (name in NEEDS_ENTROPY)


# ------------------------------------------------------------------ sequences and micro-batches


def one_prompt(alpha, beta, rewards=(1.0, 0.0)):
    rollouts = [Rollout([5] * (2 + i), [-1.0] * (2 + i), False, "") for i in range(len(rewards))]
    problem = {"prompt_ids": [1, 2, 3], "demo_ids": [6] * 4}
    return Prompt(problem, rollouts, list(rewards), 1.0, alpha, beta)


def test_weights_of_a_step_by_hand():
    """HPT: one prompt trains on its two rollouts, one on its demonstration; L_max is 8."""
    by_row = build_sequences([one_prompt(1, 0), one_prompt(0, 1)], METHODS["hpt"], 0.05, 8)
    assert [s.weight for s in by_row["dr_grpo"]] == pytest.approx([1 / 2 / 2 / 8] * 2)
    assert [s.advantage for s in by_row["dr_grpo"]] == [0.5, -0.5]
    assert [s.weight for s in by_row["sft"]] == pytest.approx([0.05 / 2 / 4])
    assert [(s.prompt_index, s.is_demo) for s in by_row["sft"]] == [(1, True)]


def test_alpha_and_beta_between_0_and_1_weigh_rollouts_and_demonstration():
    by_row = build_sequences([one_prompt(0.25, 0.75)], METHODS["hpt"], 0.05, 8)
    assert [s.weight for s in by_row["dr_grpo"]] == pytest.approx([0.25 / 2 / 8] * 2)
    assert [s.weight for s in by_row["sft"]] == pytest.approx([0.75 * 0.05 / 4])


def test_in_a_group_each_row_trains_its_own_members():
    """LUFFY: three members, of which the demonstration has its own row; rewards 1, 0, 1."""
    by_row = build_sequences([one_prompt(1, 1)], METHODS["luffy"], 0.05, 8)
    assert [s.is_demo for s in by_row["luffy"]] == [False, False]
    assert [s.is_demo for s in by_row["luffy_demo"]] == [True]
    advantages = [s.advantage for s in by_row["luffy"] + by_row["luffy_demo"]]
    assert advantages == pytest.approx([1 / 3, -2 / 3, 1 / 3])
    assert {s.weight for row in by_row.values() for s in row} == {1 / 3 / 8}


def test_sft_alone_has_no_coefficient():
    by_row = build_sequences([one_prompt(0, 1)], METHODS["sft"], 0.05, 8)
    assert [s.weight for s in by_row["sft"]] == pytest.approx([1 / 4])


def test_the_offline_arm_weighs_as_one_rollout_and_is_worth_its_own_reward():
    by_row = build_sequences([one_prompt(0, 1, (0.0, 0.0))], METHODS["hpt_off"], 0.05, 8)
    assert [(s.weight, s.advantage) for s in by_row["offline"]] == [(1 / 2 / 8, 1.0)]


def test_a_wrong_demonstration_teaches_nothing_offline():
    prompt = one_prompt(0, 1, (0.0, 0.0))._replace(demo_reward=0.0)
    by_row = build_sequences([prompt], METHODS["hpt_off"], 0.05, 8)
    assert [s.advantage for s in by_row["offline"]] == [0.0]


def test_a_micro_batch_packs_its_response_tokens_in_order():
    sequences = build_sequences([one_prompt(1, 0)], METHODS["grpo"], 1.0, 8)["grpo"]
    m = collate("grpo", sequences, "cpu")
    assert m.ids.tolist() == [[1, 2, 3, 5, 5, 1, 2, 3, 5, 5, 5]]
    assert m.response_mask.int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]]
    assert m.seq.tolist() == [[0, 0, 1, 1, 1]]
    assert (m.lengths, m.response_lengths) == ([5, 6], [2, 3])
    assert m.sampler_logp.shape == m.advantage.shape == m.weight.shape == (1, 5)


def test_a_filler_weighs_nothing():
    m = collate("sft", [], "cpu")
    assert m.is_filler and m.weight.tolist() == [[0.0]]


def test_the_part_of_one_prompt_is_what_that_prompt_alone_would_be():
    steps = [Sequence([1] * (2 + q), [4] * (6 - q), False, q, q, q, [-q] * (6 - q)) for q in (0, 1)]
    part, alone = collate("grpo", steps, "cpu").only(1), collate("grpo", steps[1:], "cpu")
    assert part.ids.equal(alone.ids) and part.response_mask.equal(alone.response_mask)
    assert part.seq.equal(alone.seq) and part.lengths == alone.lengths
    assert part.response_lengths == alone.response_lengths
    assert part.weight.equal(alone.weight) and part.sampler_logp.equal(alone.sampler_logp)
    assert collate("grpo", steps, "cpu").only(7).is_filler


def of_lengths(lengths):
    """Sequences of these total lengths."""
    return [Sequence([1], [1] * (n - 1), False, 0, 0.0) for n in lengths]


def planned_lengths(lengths, ranks, budget):
    """For each rank, the lengths in each of its micro-batches."""
    plan = plan_micro_batches(of_lengths(lengths), ranks, budget)
    return [[[len(s.response_ids) + 1 for s in batch] for batch in rank] for rank in plan]


def test_there_are_as_few_micro_batches_as_the_budget_allows_and_they_are_alike():
    assert planned_lengths([10] * 7, 1, 30) == [[[10] * 3, [10] * 2, [10] * 2]]
    assert planned_lengths([10] * 7, 1, 29) == [[[10] * 2, [10] * 2, [10] * 2, [10]]]
    assert planned_lengths([3, 10, 3], 1, 16) == [[[10, 3, 3]]]


def test_micro_batches_that_run_at_the_same_time_have_similar_loads():
    """FSDP's ranks wait for each other at every micro-batch."""
    lengths = [round(60 * 1.07**i) for i in range(64)]  # 60 to 4,200
    ranks = planned_lengths(lengths, 8, 8192)
    for at_the_same_time in zip(*ranks, strict=True):
        loads = list(map(sum, at_the_same_time))
        assert max(loads) <= 1.05 * sum(loads) / 8, loads
    by_count = [sum(lengths[rank::8]) for rank in range(8)]
    assert max(by_count) > 1.05 * sum(lengths) / 8  # negative control


def test_without_sequences_there_is_nothing_to_plan():
    assert planned_lengths([], 3, 10) == [[], [], []]


def test_a_sequence_longer_than_the_budget_is_alone():
    assert planned_lengths([3, 50, 3], 1, 6) == [[[50], [3, 3]]]


def test_ranks_have_equally_many_micro_batches():
    """The longest sequence weighs as much as the other three, which fit into one micro-batch."""
    assert planned_lengths([9, 3, 3, 3], 2, 9) == [[[9]], [[3, 3, 3]]]
    assert planned_lengths([9, 3, 3, 3], 2, 5) == [[[9], [3]], [[3], [3]]]
    assert planned_lengths([9, 3, 3], 2, 5) == [[[9], [3]], [[3], []]]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_loads_of_ranks_differ_by_at_most_the_longest_sequence(ranks):
    lengths = torch.randint(2, 60, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    loads = [sum(map(sum, rank)) for rank in planned_lengths(lengths, ranks, 100)]
    assert sum(loads) == sum(lengths) and max(loads) - min(loads) <= max(lengths)
    by_count = [sum(sorted(lengths)[i * 40 // ranks : (i + 1) * 40 // ranks]) for i in range(ranks)]
    assert max(by_count) - min(by_count) > max(lengths)  # negative control


def heavy_tailed_lengths(mean, longest, count=256):
    """Lengths of a log-normal distribution, most well below its mean."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randn(count, generator=g).exp()
    lengths = lengths * mean / lengths.mean()
    return [min(longest, max(2, int(n))) for n in lengths]


@pytest.mark.parametrize("ranks, mean, longest", [(8, 1500, 9216), (2, 300, 4096), (1, 60, 400)])
def test_what_ranks_wait_and_fillers_cost_is_at_most_5_percent(ranks, mean, longest):
    """Nothing is padded; a rank loses what it waits for the slowest at each micro-batch."""
    lengths = heavy_tailed_lengths(mean, longest)
    plan = planned_lengths(lengths, ranks, 32768)
    slowest = sum(max(map(sum, together)) for together in zip(*plan, strict=True))
    computed = ranks * slowest
    assert sum(map(len, plan)) * 2 < 0.05 * computed  # even if all were fillers of 2 tokens
    assert 1 - sum(lengths) / computed <= 0.05
    rows = sorted(lengths, reverse=True)  # negative control: padded to the longest of a micro-batch
    padded = sum(max(rows[i : i + 8]) * len(rows[i : i + 8]) for i in range(0, len(rows), 8))
    assert 1 - sum(lengths) / padded > 0.03
    in_order = sum(max(lengths[i : i + 8]) * 8 for i in range(0, len(lengths), 8))
    assert 1 - sum(lengths) / in_order > 0.2


# ------------------------------------------------------------------------- what is not computed


class CountingPolicy:
    """Stands in for the policy: it counts the response tokens that it is given."""

    can_pack = True

    def __init__(self):
        self.tokens = 0
        self.parameter = torch.zeros(1, requires_grad=True)

    def __call__(self, ids, response_mask, lengths, with_entropy=False):
        count = int(response_mask.sum())
        self.tokens += count
        logp = self.parameter.expand(count) - 1.0
        return logp, (logp.detach() if with_entropy else None)


def tokens_computed(prompts, method, minibatches=2, **changes):
    """(in the old-policy pass, in the updates): response tokens that go through the policy."""
    defaults = {
        "clip_eps": None,
        "entropy_coef": 0.0,
        "pi_old": "trainer",
        "tis_cap": 2.0,
        "sft_coef": 0.05,
        "max_response_tokens": 8,
        "tokens_per_microbatch": 100,
    }
    args, counts = SimpleNamespace(**defaults | changes), Counts()
    built = []
    for i in range(minibatches):
        chunk = prompts[i::minibatches]
        built.append(build_micro_batches(chunk, METHODS[method], args, torch.device("cpu"), counts))
    policy = CountingPolicy()
    train_hpt.old_policy_pass(policy, built[1:], args, counts)
    before = policy.tokens
    for micro_batches in built:
        train_hpt.accumulate_gradient(policy, micro_batches, args, counts)
    return before, policy.tokens - before


SIGNAL, NO_SIGNAL = one_prompt(1, 0), one_prompt(1, 0, (1.0, 1.0))  # rollouts of 2 and 3 tokens


def test_a_group_whose_rewards_are_equal_is_not_computed():
    assert tokens_computed([SIGNAL, NO_SIGNAL], "grpo", 1) == (0, 5)
    assert tokens_computed([NO_SIGNAL, NO_SIGNAL], "grpo", 1) == (0, 0)
    fractions = one_prompt(1, 0, (0.1, 0.1, 0.1))  # whose mean is not 0.1 in floating point
    assert tokens_computed([fractions], "grpo", 1) == (0, 0)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "dapo", "cispo", "gspo", "hpt"])
def test_no_method_that_compares_computes_groups_without_signal(method):
    assert tokens_computed([SIGNAL, NO_SIGNAL], method, 1)[1] == 5


@pytest.mark.parametrize("method", ["reinforce", "sft", "srft"])
def test_what_has_a_signal_is_computed(method):
    """The sign of a reward and a demonstration have a signal in every group."""
    prompt = one_prompt(1, 1, (1.0, 1.0))
    wanted = {"reinforce": 5, "sft": 4, "srft": 5 + 4}  # srft: its luffy_demo has none here
    assert tokens_computed([prompt], method, 1)[1] == wanted[method]


def test_an_entropy_bonus_needs_all_rollouts():
    assert tokens_computed([SIGNAL, NO_SIGNAL], "grpo", 1, entropy_coef=0.01)[1] == 10


def test_a_critic_needs_all_rollouts():
    by_row = build_sequences([NO_SIGNAL], METHODS["ppo"], 0.05, 8)
    failed = [s._replace(advantage=0.0) for s in by_row["ppo"]]  # the reward, not yet the advantage
    assert all(train_hpt.has_signal(s, "ppo", 0.0) for s in failed)


def test_denominators_count_what_is_not_computed():
    """DAPO divides by all tokens of the mini-batch, also those of the second prompt."""
    args = SimpleNamespace(
        sft_coef=0.05, max_response_tokens=8, tokens_per_microbatch=100, entropy_coef=0.0
    )
    cpu, counts = torch.device("cpu"), Counts()
    chunk = [SIGNAL, NO_SIGNAL]
    [m] = build_micro_batches(chunk, METHODS["dapo"], args, cpu, counts)
    assert m.weight.unique().tolist() == pytest.approx([1 / 10])
    [m] = build_micro_batches(chunk, METHODS["grpo"], args, cpu, counts)
    # N = 2 prompts, G = 2 rollouts, |y| = 2 or 3 tokens
    assert m.weight.unique().tolist() == pytest.approx([1 / 12, 1 / 8])
    assert (counts.sequences, counts.computed_sequences) == (8, 4)


@pytest.mark.parametrize(
    "method, changes, wanted",
    [
        ("grpo", {}, 5),  # the second mini-batch only
        ("grpo", {"pi_old": "tis"}, 5),
        ("grpo", {"pi_old": "sampler"}, 0),
        ("reinforce", {}, 0),  # no component compares with pi_old
        ("reinforce", {"pi_old": "tis"}, 5),
        ("luffy", {}, 5),
    ],
)
def test_the_old_policy_pass_is_made_only_where_it_is_needed(method, changes, wanted):
    prompts = [one_prompt(1, 1), one_prompt(1, 1)]
    assert tokens_computed(prompts, method, 2, **changes)[0] == wanted
    assert tokens_computed(prompts, method, 1, **changes)[0] == 0


def test_the_first_mini_batch_has_the_policy_of_its_own_pass_as_pi_old():
    """With --pi-old tis, its importance weights come from there, too."""
    args = SimpleNamespace(pi_old="tis", tis_cap=1.5)
    m = collate("grpo", build_sequences([SIGNAL], METHODS["grpo"], 1.0, 8)["grpo"], "cpu")
    advantage, logp = m.advantage, torch.full((1, 5), -0.8)  # the sampler says -1
    train_hpt.set_old_policy(m, logp, args, Counts())
    assert torch.equal(m.old_logp, logp)
    assert torch.allclose(m.advantage, advantage * math.exp(0.2))


# ------------------------------------------------------------------------------- ranks and counts


def test_seeds_are_the_same_on_every_machine():
    """Python's own hash() of a text differs from process to process."""
    assert distributed.derive_seed(0, "epoch", 1) == 1015812230810940544
    assert distributed.shuffled(6, 0, "epoch", 1) == [1, 5, 0, 2, 4, 3]


def test_a_seed_fits_into_63_bits():
    seeds = [distributed.derive_seed(i) for i in range(100)]
    assert max(seeds) < 2**62 and min(seeds) >= 0 and len(set(seeds)) == 100


def totals_on_ranks(rank, path):
    """In two processes: the totals of different counts."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    logp = torch.tensor([[-1.0, -2.0]])
    counts = Counts(tokens=float(1 + rank), lr=0.5, advantage_variance=0.3)
    counts.add_mismatch(logp, logp + (0.1 if rank else -0.2))
    counts.grad_norms.append(2.0)
    total = vars(counts.total())
    nan = Counts(mismatch_max=math.nan if rank else 1.0).total().mismatch_max
    shared = distributed.share_work([3, 4, 5], lambda items: [10 * x for x in items])
    if rank == 0:
        path.write_text(json.dumps([total, math.isnan(nan), shared]))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def totals(tmp_path_factory):
    path = tmp_path_factory.mktemp("totals") / "totals.json"
    spawn(totals_on_ranks, path, processes=2)
    return json.loads(path.read_text())


def test_counts_are_summed_over_ranks(totals):
    assert totals[0]["tokens"] == 3.0 and totals[0]["mismatch_tokens"] == 4.0


def test_maxima_and_what_all_ranks_share_are_not_summed(totals):
    assert totals[0]["mismatch_max"] == pytest.approx(0.2)  # the sign is dropped, too
    assert totals[0]["lr"] == 0.5 and totals[0]["advantage_variance"] == 0.3
    assert totals[0]["grad_norms"] == [2.0]


def test_a_nan_on_one_rank_is_not_hidden(totals):
    assert totals[1]


def test_shared_work_keeps_the_order(totals):
    assert totals[2] == [30, 40, 50]


def test_four_ranks_in_two_engines_leave_nothing_out(monkeypatch):
    """Two ranks per engine do the same share; the results come from one of them."""

    def gather(shares, own):
        for rank in range(4):
            shares[rank] = [10 * x for x in range(5)][rank // 2 :: 2]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    seen = []
    results = distributed.share_work(list(range(5)), lambda items: seen.extend(items) or items, 2)
    assert seen == [1, 3] and results == [0, 10, 20, 30, 40]


# -------------------------------------------------------------------------------- the optimizer


class OneWeight(Network):
    """A network with two weights of 1."""

    def __init__(self, weight_decay=0.0):
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.AdamW([self.weight], lr=9.0, weight_decay=weight_decay)

    def reshard(self):
        """FSDP's, which has nothing to do here."""


@pytest.fixture
def full_tensor(monkeypatch):
    """A plain tensor's norm, asked for as FSDP's would be."""
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda self: self, raising=False)


def stepped(gradient, lr=0.1, max_norm=1.0, weight_decay=0.0):
    network = OneWeight(weight_decay)
    network.weight.grad = torch.tensor(gradient)
    return network, network.step(lr, max_norm)


def test_a_step_uses_the_rate_it_is_given(full_tensor):
    network, _ = stepped([0.3, 0.4], lr=0.1)
    assert network.weight.tolist() == pytest.approx([0.9, 0.9])  # Adam's first step is lr


def test_the_norm_before_clipping_is_returned(full_tensor):
    assert stepped([3.0, 4.0])[1] == pytest.approx(5.0)


def test_the_gradient_is_clipped(full_tensor):
    network, _ = stepped([3.0, 4.0])
    moment = network.optimizer.state[network.weight]["exp_avg"]
    assert moment.tolist() == pytest.approx([0.06, 0.08])  # (1 - beta1) times a norm of 1
    loose, _ = stepped([3.0, 4.0], max_norm=math.inf)  # negative control
    assert loose.optimizer.state[loose.weight]["exp_avg"].tolist() == pytest.approx([0.3, 0.4])


def test_weight_decay_shrinks_the_weights(full_tensor):
    network, _ = stepped([0.0, 0.0], weight_decay=0.5)
    assert network.weight.tolist() == pytest.approx([0.95, 0.95])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(full_tensor, bad):
    network, norm = stepped([bad, 1.0])
    assert network.weight.tolist() == [1.0, 1.0] and not math.isfinite(norm)
    assert network.weight.grad is None and not network.optimizer.state


def test_only_optimizer_steps_skipped_in_a_row_count(full_tensor):
    network, counts = OneWeight(), []
    for value in (math.nan, math.inf, 1.0, math.nan):
        network.weight.grad = torch.tensor([value, 1.0])
        network.step(0.1, 1.0)
        counts.append(network.skipped_in_a_row)
    assert counts == [1, 2, 0, 1]
    network.check_skipped(1)
    with pytest.raises(SystemExit, match="the last 1 optimizer steps of the network were skipped"):
        network.check_skipped(0)


class RecordingNetwork:
    """Stands in for a policy or a critic: remembers its optimizer steps, (rate, largest norm)."""

    def __init__(self):
        self.steps = []

    def step(self, lr, max_norm):
        self.steps.append((lr, max_norm))
        return 7.0 + len(self.steps)


def test_policy_and_critic_step_together_each_at_its_own_rate():
    policy, critic, counts = RecordingNetwork(), RecordingNetwork(), Counts()
    args = arguments(lr=1.0, critic_lr=10.0, warmup_steps=4, max_grad_norm=0.5, value_clip=0.2)
    args.clip_eps, args.entropy_coef = None, 0.0
    for updates_before in (0, 1, 9):
        update(policy, critic, [], updates_before, args, counts)
    assert policy.steps == [(0.25, 0.5), (0.5, 0.5), (1.0, 0.5)]
    assert critic.steps == [(2.5, 0.5), (5.0, 0.5), (10.0, 0.5)]
    assert counts.grad_norms == counts.critic_norms == [8.0, 9.0, 10.0]


@pytest.mark.parametrize("method", METHODS)
def test_ppo_alone_needs_a_critic(method):
    assert needs_critic(METHODS[method]) == (method == "ppo")


# -------------------------------------------------- two steps of `main` against a plain loop

FLAGS = """
    --prompts-per-step 4 --samples-per-prompt 3 --minibatches-per-step 2 --steps 2 --seed 3
    --temperature 0.7 --max-prompt-tokens 8 --max-response-tokens 8 --tokens-per-microbatch 30
    --gamma 0.34 --sft-coef 0.5 --lr 1e-2 --warmup-steps 3 --max-grad-norm 0.02 --weight-decay 0.1
    --save-every 1 --eval-samples 2 --data made-up.jsonl --eval-data made-up.jsonl
"""
METHOD_FLAGS = {
    "luffy": [],
    "hpt": ["--gamma", "1", "--sft-coef", "0"],  # all prompts are gated, and weigh nothing
    "hpt_mix": ["--probe-gradients", "2"],
    "ppo": ["--critic-lr", "3e-2"],
}


class TokenSampler:
    """Stands in for rollout.Sampler: tokens that depend on the seed alone. It remembers its calls.

    A response is right, that is to say its text is "1", if its first token is odd.
    """

    tensor_parallel = 1

    def __init__(self, model, *, config_overrides, **settings):
        self.settings, self.calls, self.loaded = settings, [], []

    def load(self, named_tensors):
        self.calls.append("load")
        self.loaded.append({name: tensor.clone() for name, tensor in named_tensors})

    def sleep(self):
        self.calls.append("sleep")

    def close(self):
        self.calls.append("close")

    def generate(self, prompts, seeds, n, label=None):
        self.calls.append("generate")
        return [responses_of(seed, n) for seed in seeds]

    def stream(self, prompts, seeds, n):
        self.calls.append("evaluate")
        yield from enumerate(responses_of(seed, n) for seed in seeds)


def responses_of(seed, n):
    g = torch.Generator().manual_seed(seed % 2**31)
    responses = []
    for _ in range(n):
        length = int(torch.randint(2, 6, (1,), generator=g))
        ids = torch.randint(3, 32, (length,), generator=g).tolist()
        responses.append(Rollout(ids, [-3.0] * length, False, str(ids[0] % 2)))
    return responses


def made_up_problems():
    """Six problems; every other demonstration is wrong."""
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(6):
        demo = torch.randint(3, 32, (4 + i % 3,), generator=g).tolist()
        problem = {"prompt": "q", "prompt_ids": [3 + i, 4], "demo_ids": demo, "answer": "1"}
        made.append(problem | {"demonstration": str(i % 2)})
    return made


def made_up_inputs(args, method):
    """Stands in for train_hpt.load_inputs."""
    config = AutoConfig.from_pretrained(args.model)
    return train_hpt.Inputs(
        make.tokenizer(), config, made_up_problems(), "", made_up_problems(), "", [1]
    )


def run_main(rank, folder):
    """In a process of its own: `main` with each method; stand-ins sample, grade and load."""
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    # The trainer's float32 would hide small faults: compare in float64.
    torch.nn.Module.float = torch.nn.Module.double
    tiny_lm().save_pretrained(folder / "base")
    for method, more in METHOD_FLAGS.items():
        out = folder / method
        words = ["--model", str(folder / "base"), "--method", method, "--out", str(out)]
        args = flags.parse_training_args([*FLAGS.split(), *words, *more])
        samplers = []

        def make_sampler(model, **settings):
            samplers.append(TokenSampler(model, **settings))
            return samplers[-1]

        with (
            mock.patch("rollout.Sampler", make_sampler),
            mock.patch("reward.Verifier", RecordingVerifier),
            mock.patch("train_hpt.load_inputs", made_up_inputs),
            mock.patch("train_hpt.print_plan"),
            mock.patch("common.report.closing_table"),
        ):
            train_hpt.main(args)
        dist.destroy_process_group()
        [sampler] = samplers
        seen = {"calls": sampler.calls, "loaded": sampler.loaded, "settings": sampler.settings}
        torch.save(seen, out / "seen.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: what the sampler saw, "metrics": lines of metrics.jsonl, "out": the directory}."""
    folder = tmp_path_factory.mktemp("main")
    spawn(run_main, folder)
    seen = {}
    for method in METHOD_FLAGS:
        lines = (folder / method / "metrics.jsonl").read_text().splitlines()
        seen[method] = torch.load(folder / method / "seen.pt")
        seen[method] |= {"metrics": list(map(json.loads, lines)), "out": folder / method}
    return seen


def log_probabilities(lm, prompt, response, temperature):
    """(n,) of a response, with plain transformers."""
    logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, torch.tensor(response)[:, None])[:, 0]


def luffy_by_hand(demo_logp, ratios, rewards, demo_reward, c_sft, gamma):
    """LUFFY's objective of one prompt: the demonstration is one more member of the group."""
    mean = (sum(rewards) + demo_reward) / (len(rewards) + 1)
    shaped = demo_logp.exp() / (demo_logp.exp() + 0.1)
    objective = (demo_reward - mean) * shaped.sum() / 3 / 8
    for ratio, reward in zip(ratios, rewards, strict=True):
        objective = objective + (reward - mean) * ratio.sum() / 3 / 8
    return objective


def hpt_mix_by_hand(demo_logp, ratios, rewards, demo_reward, c_sft, gamma):
    """HPT Mix/ON of one prompt: SFT and offline RL on the demonstration, or Dr. GRPO."""
    if sum(rewards) / 3 <= gamma:
        shaped = demo_logp.exp() / (demo_logp.exp() + 0.1)
        return c_sft * demo_logp.mean() + demo_reward * shaped.sum() / 3 / 8
    mean, objective = sum(rewards) / 3, 0.0
    for ratio, reward in zip(ratios, rewards, strict=True):
        A = reward - mean
        objective = objective + torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).sum() / 3 / 8
    return objective


BY_HAND = {"luffy": (luffy_by_hand, 2), "hpt_mix": (hpt_mix_by_hand, 3)}  # with rollouts per prompt


def plain_loop(
    method,
    lr=1e-2,
    max_norm=0.02,
    warmup=3,
    decay=0.1,
    temperature=0.7,
    graded=True,
    c_sft=0.5,
    gamma=0.34,
    beta2=0.999,
    stale_by_update=False,
):
    """The same two steps with plain torch and transformers: the weights after 0, 1 and 2 steps."""
    lm, updates = tiny_lm(), 0
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1.0, betas=(0.9, beta2), weight_decay=decay)
    objective, n = BY_HAND[method]
    history = [copy.deepcopy(dict(lm.named_parameters()))]
    for step in (1, 2):
        drawn = []
        for place in range((step - 1) * 4, step * 4):
            epoch, position = divmod(place, 6)
            order = distributed.shuffled(6, 3, "epoch", epoch)
            drawn.append(made_up_problems()[order[position]])
        groups = [responses_of(distributed.derive_seed(3, step, i), n) for i in range(4)]
        old = old_log_probabilities(lm, drawn, groups, temperature)
        shuffle = distributed.shuffled(4, 3, "mini-batches", step)
        for chunk in (shuffle[0::2], shuffle[1::2]):
            if stale_by_update:
                old = old_log_probabilities(lm, drawn, groups, temperature)
            loss = 0.0
            for q in chunk:
                prompt, demo = drawn[q]["prompt_ids"], drawn[q]["demo_ids"]
                ratios = []
                for r, old_logp in zip(groups[q], old[q], strict=True):
                    ratios.append(
                        (log_probabilities(lm, prompt, r.ids, temperature) - old_logp).exp()
                    )
                rewards = [float(r.text == "1") for r in groups[q]]
                demo_reward = float(drawn[q]["demonstration"] == "1") if graded else 1.0
                demo_logp = log_probabilities(lm, prompt, demo, temperature)
                loss = loss - objective(demo_logp, ratios, rewards, demo_reward, c_sft, gamma) / 2
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), max_norm)
            updates += 1
            optimizer.param_groups[0]["lr"] = lr * min(1.0, updates / warmup)
            optimizer.step()
            optimizer.zero_grad()
        history.append(copy.deepcopy(dict(lm.named_parameters())))
    return history


@torch.no_grad()
def old_log_probabilities(lm, drawn, groups, temperature):
    old = []
    for problem, group in zip(drawn, groups, strict=True):
        prompt = problem["prompt_ids"]
        old.append([log_probabilities(lm, prompt, r.ids, temperature) for r in group])
    return old


def largest_difference(given, wanted):
    """Between the weights that the sampler was given and those of the plain loop."""
    return max((given[name] - wanted[name].detach()).abs().max().item() for name in wanted)


@pytest.mark.parametrize("method", BY_HAND)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_sampler_gets_the_weights_of_a_plain_loop(runs, method, steps):
    wanted = plain_loop(method)[steps]
    assert largest_difference(runs[method]["loaded"][steps], wanted) < 1e-6


@pytest.mark.parametrize(
    "method, change",
    [
        ("luffy", {"lr": 1.1e-2}),
        ("luffy", {"max_norm": math.inf}),
        ("luffy", {"warmup": 1}),
        ("luffy", {"warmup": 4}),
        ("luffy", {"decay": 0.0}),
        ("luffy", {"decay": 0.01}),
        ("luffy", {"beta2": 0.95}),
        ("luffy", {"temperature": 1.0}),
        ("luffy", {"graded": False}),
        ("luffy", {"stale_by_update": True}),
        ("hpt_mix", {"graded": False}),
        ("hpt_mix", {"c_sft": 0.05}),
        ("hpt_mix", {"gamma": 0.0}),
    ],
)
def test_a_plain_loop_that_differs_ends_elsewhere(runs, method, change):
    """Negative controls of the test above."""
    wanted = plain_loop(method, **change)[2]
    assert largest_difference(runs[method]["loaded"][2], wanted) > 1e-5


def test_the_sampler_sleeps_while_the_trainer_works(runs):
    step = ["generate", "sleep", "load"]
    wanted = ["sleep", "load", "evaluate", *step, *step, "evaluate", "close"]
    assert runs["luffy"]["calls"] == wanted


def test_the_sampler_has_the_settings_of_the_flags(runs):
    settings = runs["luffy"]["settings"]
    assert settings["temperature"] == 0.7 and settings["seed"] == 3
    assert settings["max_prompt_tokens"] == settings["max_response_tokens"] == 8


def test_evaluation_and_checkpoints_have_flags_of_their_own(runs):
    """--eval-every is 0: before and after; --save-every is 1."""
    evaluated = [line["step"] for line in runs["luffy"]["metrics"] if "eval/avg@2" in line]
    saved = sorted(path.parent.name for path in runs["luffy"]["out"].glob("*/model.safetensors"))
    assert evaluated == [0, 2] and saved == ["final", "step_000001"]


def test_every_evaluation_samples_with_the_same_seeds(runs):
    """The stand-in's responses depend on the seeds alone, so its accuracy does not change."""
    scores = [m["eval/avg@2"] for m in runs["luffy"]["metrics"] if "eval/avg@2" in m]
    assert scores[0] == scores[1] and 0 < scores[0] < 1


def test_the_logged_rate_is_that_of_the_steps_last_update(runs):
    rates = [line["optim/lr"] for line in runs["luffy"]["metrics"] if line["step"] > 0]
    assert rates == pytest.approx([1e-2 * 2 / 3, 1e-2])


def test_gradients_are_probed_when_the_flag_says_so(runs):
    probed = [any(k.startswith("probe/") for k in line) for line in runs["hpt_mix"]["metrics"]]
    assert probed == [False, False, True]


def test_samples_say_what_the_gate_chose(runs):
    lines = (runs["hpt_mix"]["out"] / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6 and {row["trained_on"] for row in rows} == {"rollouts", "demonstration"}
    assert all((row["trained_on"] == "demonstration") == (row["P"] <= 0.34) for row in rows)


def test_the_metrics_count_every_trained_token_once(runs):
    """LUFFY trains on groups of two rollouts and the demonstration whose rewards differ."""
    for step in (1, 2):
        problems = draw(made_up_problems(), step, 4, seed=3)
        tokens, loaded = 0, runs["luffy"]["metrics"][step]
        for i, problem in enumerate(problems):
            group = responses_of(distributed.derive_seed(3, step, i), 2)
            if len({problem["demonstration"], *(r.text for r in group)}) == 1:
                continue  # no signal: A = 0
            responses = [r.ids for r in group] + [problem["demo_ids"]]
            tokens += sum(len(problem["prompt_ids"]) + len(ids) for ids in responses)
        got = loaded["perf/train_tokens_per_sec"] * loaded["time/train"]
        assert got == pytest.approx(tokens)


def test_the_mismatch_of_the_first_step_is_that_of_a_plain_model(runs):
    """The sampler says -3 of every token."""
    gaps = []
    for i, problem in enumerate(draw(made_up_problems(), 1, 4, seed=3)):
        group = responses_of(distributed.derive_seed(3, 1, i), 2)
        if len({problem["demonstration"], *(r.text for r in group)}) == 1:
            continue  # no signal: A = 0
        for r in group:
            logp = log_probabilities(tiny_lm(), problem["prompt_ids"], r.ids, 0.7)
            gaps.append(logp.detach() + 3.0)
    gaps = torch.cat(gaps)
    first = runs["luffy"]["metrics"][1]
    assert first["mismatch/logp_max"] == pytest.approx(gaps.abs().max().item(), rel=1e-5)
    kl = (gaps.exp() - 1 - gaps).mean().item()
    assert first["mismatch/kl"] == pytest.approx(kl, rel=1e-5)


def test_a_step_with_nothing_to_train_on_is_legal_and_says_so(runs):
    """AdamW has seen no gradient yet, so that only its weight decay moves the weights."""
    decay = (1 - 1e-2 / 3 * 0.1) * (1 - 1e-2 * 2 / 3 * 0.1)
    before, after = runs["hpt"]["loaded"][:2]
    assert all(torch.allclose(after[name], decay * before[name]) for name in before)
    for line in runs["hpt"]["metrics"][1:]:
        assert line["optim/grad_norm"] == 0 and line["optim/skipped"] == 0
        assert line["hpt/sft_frac"] == 1 and "mismatch/kl" not in line and "sft/nll" not in line
        assert line["perf/train_tokens_per_sec"] == 0 and "perf/padding_frac" not in line


@pytest.mark.parametrize("method", ["luffy", "hpt_mix", "ppo"])
def test_every_update_on_rollouts_is_measured(runs, method):
    for line in runs[method]["metrics"][1:]:
        # The second mini-batch is trained with weights that the first has moved away from pi_old.
        assert line["policy/approx_kl"] > 0
        assert line["loss/rl"] != 0 and 0 <= line["policy/clip_frac"] <= 1


def test_ppos_critic_starts_at_0_and_is_saved(runs):
    first, second = runs["ppo"]["metrics"][1:]
    assert first["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert abs(second["critic/explained_variance"]) > 1e-3
    assert (runs["ppo"]["out"] / "final/critic/model.safetensors").exists()
    assert not (runs["luffy"]["out"] / "final/critic").exists()
