"""What the training loop decides by rule, and two steps of `main` against a plain loop."""

import copy
import functools
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import spawn, tiny_lm
from programs import read
from transformers import AutoConfig

import train_hpt
from common import batches, distributed, flags
from common.batches import Sequence
from common.metrics import Counts
from rollout import Rollout
from toy import make
from train_hpt import Prompt, apply_gate, build_sequences, draw, grade, sample_rollouts
from upge import METHODS, TABLE

END = 1

# ------------------------------------------------------------------ which problems, and when


def test_each_epoch_holds_each_problem_once_in_an_order_of_its_own():
    """A step may end one epoch and begin the next."""
    places = sum((draw(list(range(10)), step, 4, seed=0) for step in range(1, 6)), [])
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10))
    assert places[:10] != places[10:]
    assert sorted(draw([0, 1, 2], 1, 6, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_minibatches_hold_each_prompt_once_and_differ_by_at_most_one():
    parts, others = (train_hpt.split_prompts(list(range(10)), 3, 0, step) for step in (1, 2))
    assert sorted(sum(parts, [])) == list(range(10)) and parts != others
    assert [len(part) for part in parts] == [4, 3, 3]


@pytest.mark.parametrize(
    "every, last, wanted",
    [(2, 3, [2, 3]), (0, 3, [3]), (1, 3, [1, 2, 3]), (5, 3, [3]), (2, 4, [2, 4])],
)
def test_what_is_due_every_so_often_is_due_at_the_end_too(every, last, wanted):
    due = [step for step in range(1, last + 1) if train_hpt.is_due(step, every, last)]
    assert due == wanted


def test_seeds_are_the_same_on_every_machine():
    """Python's own hash() of a text differs from process to process."""
    assert distributed.derive_seed(0, "epoch", 1) == 1015812230810940544
    assert distributed.shuffled(6, 0, "epoch", 1) == [1, 5, 0, 2, 4, 3]
    seeds = [distributed.derive_seed(i) for i in range(100)]
    assert min(seeds) >= 0 and max(seeds) < 2**62 and len(set(seeds)) == 100


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


# ------------------------------------------------------------------------ sampling and grading


class TokenSampler:
    """Stands in for rollout.Sampler: its tokens depend on the seed alone. It keeps its calls."""

    tensor_parallel = 1

    def __init__(self, model, *, config_overrides, **settings):
        self.settings, self.calls, self.loaded, self.seeds = settings, [], [], []

    def load(self, named_tensors):
        self.calls.append("load")
        self.loaded.append({name: tensor.clone() for name, tensor in named_tensors})

    def sleep(self):
        self.calls.append("sleep")

    def close(self):
        self.calls.append("close")

    def generate(self, prompts, seeds, n, with_logp=True):
        self.calls.append("generate" if with_logp else "evaluate")
        self.seeds += seeds
        return [responses_of(seed, n) for seed in seeds]


def responses_of(seed, n):
    """n responses of 1 to 5 tokens. One of 5 is cut; one of 1 is an end-of-sequence token alone.

    A response is right, that is to say its text is "1", if its first token is odd.
    """
    generator = torch.Generator().manual_seed(seed % 2**31)
    responses = []
    for _ in range(n):
        length = int(torch.randint(1, 6, (1,), generator=generator))
        ids = torch.randint(3, 32, (length,), generator=generator).tolist()
        text = str(ids[0] % 2)
        if length < 5:
            ids[-1] = END
        responses.append(Rollout(ids, [-3.0] * length, length == 5, text))
    return responses


class EndVerifier:
    """Stands in for reward.Verifier: a response is right if it ends with the answer."""

    def __init__(self, function=None):
        self.timeouts = 100  # those of an evaluation, which no step may count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def score(self, responses, answers):
        self.timeouts += len(responses)
        return [float(r.endswith(a)) for r, a in zip(responses, answers, strict=True)]


def seeds_of(step, seed=0, count=4):
    sampler, args = TokenSampler("", config_overrides=None), SimpleNamespace(seed=seed)
    args.samples_per_prompt = 3
    sample_rollouts(sampler, [{"prompt_ids": [1, 2]}] * count, step, METHODS["hpt"], args)
    return sampler.seeds


def test_a_seed_depends_on_the_run_the_step_and_the_place_in_the_step():
    assert len(set(seeds_of(1))) == 4
    assert seeds_of(1) == seeds_of(1) and seeds_of(1, count=6)[:4] == seeds_of(1)
    assert not set(seeds_of(1)) & set(seeds_of(2)) and not set(seeds_of(1)) & set(seeds_of(1, 5))


@pytest.mark.parametrize("name, n", [("hpt", 3), ("grpo", 3), ("luffy", 2), ("sft", 0)])
def test_a_demonstration_in_the_group_takes_the_place_of_a_rollout(name, n):
    sampler, args = TokenSampler("", config_overrides=None), SimpleNamespace(seed=0)
    args.samples_per_prompt = 3
    groups = sample_rollouts(sampler, [{"prompt_ids": [1]}] * 2, 1, METHODS[name], args)
    assert [len(group) for group in groups] == [n, n]


def graded(name):
    """(rewards, rewards of demonstrations, how many were graded); two problems, three rollouts."""
    answers, demonstrations = ("1", "2"), ("is 1", "is 9")
    problems = [{"answer": a, "demonstration": d} for a, d in zip(answers, demonstrations)]
    texts = [["1", "2", "1"], ["1", "2", "3"]]
    rollouts = [[Rollout([], [], False, text) for text in group] for group in texts]
    counts = Counts()
    rewards, demo_rewards = grade(EndVerifier(), problems, rollouts, METHODS[name], counts)
    return rewards, demo_rewards, counts.timeouts


def test_rewards_keep_the_order_of_prompts_and_rollouts():
    assert graded("hpt") == ([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [1.0, 1.0], 6)


@pytest.mark.parametrize("name", ["luffy", "srft", "hpt_mix", "hpt_off"])
def test_demonstrations_are_graded_if_their_reward_matters(name):
    assert graded(name)[1:] == ([1.0, 0.0], 8)


def test_without_rollouts_nothing_is_graded():
    counts = Counts()
    rewards, ones = grade(EndVerifier(), [{}, {}], [[], []], METHODS["sft"], counts)
    assert (rewards, ones, counts.timeouts) == ([[], []], [1.0, 1.0], 0)


# ------------------------------------------------------------------------------------- the gate


def own_gate(rewards, step):
    """A gate of one's own: it depends on the rewards and on the step."""
    P = rewards.double().mean(-1)
    return P, (1 - P) / step


@pytest.mark.parametrize(
    "name, gamma, wanted",
    [
        ("hpt", 0.0, ([1, 1, 0], [0, 0, 1])),
        ("hpt_mix", 0.4, ([1, 0, 0], [0, 1, 1])),
        ("grpo", 0.0, ([1, 1, 1], [0, 0, 0])),
        ("sft", 0.0, ([0, 0, 0], [1, 1, 1])),
        ("luffy", 0.0, ([1, 1, 1], [1, 1, 1])),
    ],
)
def test_alpha_and_beta_of_each_prompt(name, gamma, wanted):
    gate = train_hpt.load_gate(SimpleNamespace(gate=None, gamma=gamma))
    rewards = [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert apply_gate(gate, rewards, 1, METHODS[name]) == wanted


def test_a_gate_of_ones_own_is_given_rewards_and_step():
    gate = train_hpt.load_gate(SimpleNamespace(gate="test_training:own_gate"))
    alpha, beta = apply_gate(gate, [[1.0, 0.0], [0.0, 0.0]], 4, METHODS["hpt"])
    assert (alpha, beta) == ([0.5, 0.0], [0.125, 0.25])


@pytest.mark.parametrize("name", ["no_such_module:gate", "test_training:no_such_gate", "gate"])
def test_a_gate_that_is_not_there_is_one_sentence(name):
    with pytest.raises(SystemExit, match=f"^error: --gate {name} cannot be loaded"):
        train_hpt.load_gate(SimpleNamespace(gate=name))


def test_a_gate_must_decide_for_every_prompt():
    def one_for_all(rewards, step):
        return torch.tensor(0.5), torch.tensor(0.5)

    with pytest.raises(SystemExit, match="a number each per prompt"):
        apply_gate(one_for_all, [[1.0], [0.0]], 1, METHODS["hpt"])


# ------------------------------------------------------------------------ sequences and weights


def one_prompt(alpha, beta, rewards=(1.0, 0.0)):
    """Rollouts of 2, 3, ... tokens, and a demonstration of 4."""
    rollouts = [Rollout([5] * (2 + i), [-1.0] * (2 + i), False, "") for i in range(len(rewards))]
    problem = {"prompt_ids": [1, 2, 3], "demo_ids": [6] * 4}
    return Prompt(problem, rollouts, list(rewards), 1.0, alpha, beta)


def sequences_of(name, *prompts):
    return build_sequences(list(prompts), METHODS[name], c_sft=0.05, l_max=8)


def test_hpts_weights_and_advantages_by_hand():
    """One prompt trains on its two rollouts, one on its demonstration."""
    by_row = sequences_of("hpt", one_prompt(1, 0), one_prompt(0, 1))
    rollouts, [demo] = by_row["dr_grpo"], by_row["sft"]
    assert [s.weight for s in rollouts] == pytest.approx([1 / 2 / 2 / 8] * 2)
    assert [s.advantage for s in rollouts] == [0.5, -0.5]
    assert demo == Sequence([1, 2, 3], [6] * 4, True, 1, 1.0, pytest.approx(0.05 / 2 / 4))


# ----------------------------------------------------------------------- what is not computed


class CountingPolicy:
    """Stands in for the policy: it counts the response tokens that it is given."""

    def __init__(self):
        self.tokens = 0
        self.parameter = torch.zeros(1, requires_grad=True)

    def __call__(self, ids, is_response, lengths, with_entropy=False):
        count = int(is_response.sum())
        self.tokens += count
        logp = self.parameter.expand(count) - 1.0
        return logp, (logp.detach() if with_entropy else None)


def tokens_computed(prompts, name, parts=1, pi_old="trainer", entropy_coef=0.0):
    """(in the old-policy pass, in the updates): response tokens that go through the policy."""
    args = SimpleNamespace(clip_eps=None, entropy_coef=entropy_coef, pi_old=pi_old)
    policy, counts, minibatches = CountingPolicy(), Counts(), []
    for i in range(parts):
        by_row = sequences_of(name, *prompts[i::parts])
        cut = batches.build_micro_batches(by_row, 100, entropy_coef, torch.device("cpu"), counts)
        minibatches.append(cut)
    train_hpt.old_policy_pass(policy, minibatches[1:], args, counts)
    before = policy.tokens
    for micro_batches in minibatches:
        train_hpt.accumulate_gradient(policy, micro_batches, args, counts)
    return before, policy.tokens - before


SIGNAL, NO_SIGNAL = one_prompt(1, 0), one_prompt(1, 0, (1.0, 1.0))  # rollouts of 2 and 3 tokens


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "rloo", "maxrl", "dapo", "cispo", "gspo", "luffy", "hpt"]
)
def test_rollouts_whose_rewards_are_equal_are_not_computed(name):
    same = one_prompt(1, 0, (1.0, 1.0, 1.0))._replace(demo_reward=1.0)
    assert tokens_computed([SIGNAL, same], name)[1] == 5
    assert tokens_computed([same, same], name)[1] == 0


def test_equal_fractions_have_no_signal_either():
    """The mean of three times 0.1 is not 0.1 in floating point."""
    assert tokens_computed([one_prompt(1, 0, (0.1, 0.1, 0.1))], "grpo")[1] == 0


@pytest.mark.parametrize("name, tokens", [("reinforce", 5), ("sft", 4), ("srft", 9), ("ppo", 5)])
def test_what_has_a_signal_is_computed(name, tokens):
    """A sign, a demonstration, and a reward of 0 of which a critic makes advantages."""
    prompt = one_prompt(1, 1, (0.0, 0.0) if name == "ppo" else (1.0, 1.0))
    assert tokens_computed([prompt], name)[1] == tokens


def test_an_entropy_bonus_needs_all_rollouts():
    assert tokens_computed([SIGNAL, NO_SIGNAL], "grpo", entropy_coef=0.01)[1] == 10


@pytest.mark.parametrize("name, wanted", [("dapo", [1 / 10]), ("grpo", [1 / 12, 1 / 8])])
def test_denominators_count_what_is_not_computed(name, wanted):
    """DAPO divides by all tokens, GRPO by N = 2 prompts, G = 2 rollouts and 2 or 3 tokens."""
    by_row, counts = sequences_of(name, SIGNAL, NO_SIGNAL), Counts()
    [m] = batches.build_micro_batches(by_row, 100, 0.0, torch.device("cpu"), counts)
    assert m.weight.unique().tolist() == pytest.approx(wanted)
    assert (counts.sequences, counts.computed_sequences) == (4, 2)


@pytest.mark.parametrize(
    "name, pi_old, wanted",
    [
        ("grpo", "trainer", 5),  # the second mini-batch only
        ("grpo", "tis", 5),
        ("grpo", "sampler", 0),
        ("reinforce", "trainer", 0),  # no component compares with pi_old
        ("reinforce", "tis", 5),
        ("luffy", "trainer", 5),
        ("sft", "tis", 0),
    ],
)
def test_the_old_policy_pass_is_made_only_where_it_is_needed(name, pi_old, wanted):
    prompts = [one_prompt(1, 1), one_prompt(1, 1)]
    assert tokens_computed(prompts, name, 2, pi_old)[0] == wanted
    assert tokens_computed(prompts, name, 1, pi_old)[0] == 0


def test_importance_weights_are_truncated_at_2():
    m = batches.collate(TABLE["grpo"], sequences_of("grpo", SIGNAL)["grpo"], "cpu")
    advantage, logp = m.advantage, torch.tensor([-1.0, -0.8, -1.2, 2.0, 2.0])  # the sampler: -1
    train_hpt.set_old_policy(m, logp, "tis", Counts())
    weights = torch.tensor([1.0, math.exp(0.2), math.exp(-0.2), 2.0, 2.0])
    assert torch.equal(m.old_logp, logp) and torch.allclose(m.advantage, advantage * weights)


# ----------------------------------------------------------------------------- learning rates


class RecordingNetwork:
    """Stands in for a policy or a critic: remembers its optimizer steps, (rate, largest norm)."""

    def __init__(self):
        self.steps = []

    def step(self, lr, max_norm):
        self.steps.append((lr, max_norm))
        return 7.0 + len(self.steps)


def test_policy_and_critic_step_together_each_at_its_own_rate():
    """The warm-up is linear, and its first update has a rate already."""
    policy, critic, counts = RecordingNetwork(), RecordingNetwork(), Counts()
    args = SimpleNamespace(lr=1.0, critic_lr=10.0, warmup_steps=4, max_grad_norm=0.5, clip_eps=None)
    args.lr_schedule = "constant"
    for updates_before in (0, 1, 3, 9):
        train_hpt.update(policy, critic, [], updates_before, args, counts)
    assert policy.steps == [(0.25, 0.5), (0.5, 0.5), (1.0, 0.5), (1.0, 0.5)]
    assert critic.steps == [(2.5, 0.5), (5.0, 0.5), (10.0, 0.5), (10.0, 0.5)]
    assert counts.grad_norms == counts.critic_norms == [8.0, 9.0, 10.0, 11.0]
    args.warmup_steps = 0
    train_hpt.update(policy, None, [], 0, args, counts)
    assert policy.steps[-1] == (1.0, 0.5) and counts.lr == 1.0


@pytest.mark.parametrize("warmup", [0, 1, 4, 20, 30])
def test_the_cosine_is_that_of_torch(warmup):
    """It falls to a tenth in the last of 20 updates. Without a warm-up it begins with --lr."""
    args = SimpleNamespace(warmup_steps=warmup, lr_schedule="cosine")
    args.steps, args.minibatches_per_step = 10, 2
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rising = max(1, warmup) - 1  # updates until the rate is 1
    schedules = torch.optim.lr_scheduler
    parts = [schedules.CosineAnnealingLR(optimizer, max(1, 19 - rising), eta_min=0.1)]
    if rising:
        parts.insert(0, schedules.LinearLR(optimizer, 1 / warmup, total_iters=rising))
    schedule = schedules.SequentialLR(optimizer, parts, milestones=[rising] * (len(parts) - 1))
    rates = []
    for updates_before in range(20):
        rates.append(train_hpt.lr_factor(updates_before, args))
        assert rates[-1] == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()
    if warmup < 20:
        assert rates[-1] == pytest.approx(0.1) and max(rates) == rates[rising] == 1.0
    args.lr_schedule = "constant"
    assert train_hpt.lr_factor(19, args) == min(1.0, 20 / max(1, warmup))


# -------------------------------------------------- two steps of `main` against a plain loop

FLAGS = """
    --prompts-per-step 4 --samples-per-prompt 3 --minibatches-per-step 2 --steps 2 --seed 3
    --temperature 0.7 --max-prompt-tokens 8 --max-response-tokens 8 --tokens-per-microbatch 15
    --gamma 0.34 --sft-coef 0.5 --lr 1e-2 --warmup-steps 3 --max-grad-norm 0.02 --weight-decay 0.1
    --critic-lr 3e-2 --data made-up.jsonl
"""
RUNS = {  # on two ranks, except "alone"
    "luffy": "--method luffy --save-every 1 --eval-samples 2 --eval-data made-up.jsonl",
    "own gate": "--method hpt_mix --gate test_training:own_gate --probe-gradients 2",
    "dapo": "--method dapo --pi-old tis",
    "sft": "--method sft",
    "ppo": "--method ppo",
    "idle": "--method hpt --gamma 1 --sft-coef 0",  # all prompts are gated, and weigh nothing
    "alone": "--method hpt_mix --tokens-per-microbatch 1000",
}


def args_of(name, model="m", out=None):
    """The flags of a run of `main`."""
    words = ["--model", str(model), *(["--out", str(out)] if out else []), *RUNS[name].split()]
    return flags.parse_training_args([*FLAGS.split(), *words])


def made_up_problems():
    """Six problems; every other demonstration is wrong."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(6):
        demo = torch.randint(3, 32, (4 + i % 3,), generator=generator).tolist()
        problem = {"prompt": "q", "prompt_ids": [3 + i, 4], "demo_ids": demo, "answer": "1"}
        made.append(problem | {"demonstration": str(i % 2)})
    return made


def made_up_inputs(args, method):
    """Stands in for train_hpt.load_inputs."""
    config = AutoConfig.from_pretrained(args.model)
    held_out = made_up_problems() if args.eval_data else []
    return train_hpt.Inputs(make.tokenizer(), config, made_up_problems(), "", held_out, [END])


def join(rank, store):
    """Stands in for distributed.init_process_group: two ranks, without torchrun."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    return torch.device("cpu")


def run_main(rank, folder):
    """In a process of its own: `main` in all ways of RUNS; stand-ins sample, grade and load."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # The trainer's float32 would hide small faults: compare in float64.
    torch.nn.Module.float = torch.nn.Module.double
    for name in RUNS:
        start = functools.partial(join, rank, folder / f"{name}.store")
        if name == "alone":
            start = distributed.init_process_group
        if name == "alone" and rank == 1:
            return
        samplers = []

        def make_sampler(model, **settings):
            samplers.append(TokenSampler(model, **settings))
            return samplers[-1]

        with (
            mock.patch("rollout.Sampler", make_sampler),
            mock.patch("reward.Verifier", EndVerifier),
            mock.patch("train_hpt.load_inputs", made_up_inputs),
            mock.patch("common.distributed.init_process_group", start),
            mock.patch("train_hpt.closing_report"),
        ):
            train_hpt.main(args_of(name, folder / "base", folder / name))
        dist.destroy_process_group()
        if rank == 0:
            torch.save(vars(samplers[0]), folder / name / "sampler.pt")


class Run(NamedTuple):
    """What a run of `main` has done."""

    sampler: dict  # attributes of rank 0's TokenSampler
    metrics: list[dict]
    out: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name of RUNS: Run}."""
    folder, found = tmp_path_factory.mktemp("main"), {}
    tiny_lm().save_pretrained(folder / "base")
    spawn(run_main, folder, processes=2)
    for name in RUNS:
        out = folder / name
        found[name] = Run(torch.load(out / "sampler.pt"), read(out / "metrics.jsonl"), out)
    return found


class Drawn(NamedTuple):
    """What an objective by hand knows of a prompt."""

    demo: torch.Tensor  # log pi_theta of the demonstration's tokens
    logp: list  # log pi_theta of each rollout's tokens
    old: list  # log pi_old of the same
    R: list[float]
    demo_reward: float
    step: int
    tokens: float  # of rollouts per prompt of the mini-batch

    @property
    def p(self):
        """P, the mean reward."""
        return sum(self.R) / len(self.R)

    @property
    def shaped(self):
        """LUFFY's f(pi), summed over the demonstration."""
        return (self.demo.exp() / (self.demo.exp() + 0.1)).sum()

    def clipped(self, A, low=0.2, high=0.2):
        """PPO's objective, summed over rollouts and tokens; A: one per rollout, or its tokens."""
        ratios = [(x - old).exp() for x, old in zip(self.logp, self.old)]
        parts = [torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a) for r, a in zip(ratios, A)]
        return torch.cat(parts).sum()


def luffy_by_hand(q, args):
    """The demonstration is one more member of the group."""
    mean = (sum(q.R) + q.demo_reward) / 3
    rollouts = q.clipped([r - mean for r in q.R], math.inf, math.inf)
    return ((q.demo_reward - mean) * q.shaped + rollouts) / 3 / 8


def hpt_mix_by_hand(q, args):
    """Dr. GRPO, and SFT with offline RL on the demonstration."""
    alpha, beta = float(q.p > args.gamma), float(q.p <= args.gamma)
    if args.gate:
        alpha, beta = q.p, (1 - q.p) / q.step
    sft = args.sft_coef * q.demo.mean() + q.demo_reward * q.shaped / 3 / 8
    return alpha * q.clipped([r - q.p for r in q.R]) / 3 / 8 + beta * sft


def dapo_by_hand(q, args):
    """With the importance weights of --pi-old tis: the sampler says -3 of every token."""
    deviation = torch.tensor(q.R).double().std() + 1e-6
    weights = [(old + 3).exp().clamp(max=2.0) if args.pi_old == "tis" else 1 for old in q.old]
    return (
        q.clipped([w * (r - q.p) / deviation for r, w in zip(q.R, weights)], 0.2, 0.28) / q.tokens
    )


def sft_by_hand(q, args):
    return q.demo.mean()


BY_HAND = {  # with rollouts per prompt
    "luffy": (luffy_by_hand, 2),
    "own gate": (hpt_mix_by_hand, 3),
    "alone": (hpt_mix_by_hand, 3),
    "dapo": (dapo_by_hand, 3),
    "sft": (sft_by_hand, 0),
}


def plain_loop(name, graded=True, stale_by_update=False, beta2=0.999, **changes):
    """The same two steps with plain torch: (weights after 0, 1 and 2 steps, norms of updates)."""
    args, lm, (objective, n) = args_of(name), tiny_lm(), BY_HAND[name]
    vars(args).update(changes)
    betas, decay = (0.9, beta2), args.weight_decay
    optimizer = torch.optim.AdamW(lm.parameters(), betas=betas, weight_decay=decay)
    history, norms = [copy.deepcopy(dict(lm.named_parameters()))], []
    for step in (1, 2):
        problems, groups = drawn_in(step, n, args.seed)
        old = read_step(lm, problems, groups, args.temperature)
        order = distributed.shuffled(4, args.seed, "mini-batches", step)
        for part in (order[0::2], order[1::2]):
            if stale_by_update:
                old = read_step(lm, problems, groups, args.temperature)
            loss, tokens = 0.0, sum(len(r.ids) for q in part for r in groups[q]) / 2
            now = read_step(lm, problems, groups, args.temperature)
            for q in part:
                R = [float(r.text == "1") for r in groups[q]]
                demo_reward = float(problems[q]["demonstration"] == "1") if graded else 1.0
                before = [x.detach() for x in old[q][1:]]
                known = Drawn(now[q][0], now[q][1:], before, R, demo_reward, step, tokens)
                loss = loss - objective(known, args) / 2
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), args.max_grad_norm)
            norms.append(norm.item())
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, len(norms) / args.warmup_steps)
            optimizer.step()
            optimizer.zero_grad()
        history.append(copy.deepcopy(dict(lm.named_parameters())))
    return history, norms


def drawn_in(step, n, seed=3):
    """The problems of a step, and n responses to each."""
    problems = []
    for place in range((step - 1) * 4, step * 4):
        epoch, position = divmod(place, 6)
        order = distributed.shuffled(6, seed, "epoch", epoch)
        problems.append(made_up_problems()[order[position]])
    return problems, [responses_of(distributed.derive_seed(seed, step, i), n) for i in range(4)]


def read_step(lm, problems, groups, temperature):
    """Per prompt, the log-probabilities of the demonstration and of each rollout."""
    read_all = []
    for problem, group in zip(problems, groups):
        responses = [problem["demo_ids"], *(r.ids for r in group)]
        read_all.append([logp_of(lm, problem["prompt_ids"], y, temperature) for y in responses])
    return read_all


def logp_of(lm, prompt, response, temperature):
    """(n,) of a response, with plain transformers."""
    logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, torch.tensor(response)[:, None])[:, 0]


def differences(run, wanted):
    """The largest between the weights that the sampler was given and others, step by step."""
    pairs = zip(run.sampler["loaded"], wanted, strict=True)
    return [max((a[k] - b[k].detach()).abs().max().item() for k in b) for a, b in pairs]


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_and_gradient_norms_are_those_of_a_plain_loop(runs, name):
    weights, norms = plain_loop(name)
    assert max(differences(runs[name], weights)) < 1e-6
    logged = [line["optim/grad_norm"] for line in runs[name].metrics if line["step"] > 0]
    assert logged == pytest.approx([sum(norms[:2]) / 2, sum(norms[2:]) / 2], rel=1e-5)


@pytest.mark.parametrize(
    "name, change",
    [
        ("luffy", {"lr": 1.1e-2}),
        ("luffy", {"max_grad_norm": math.inf}),
        ("luffy", {"warmup_steps": 4}),
        ("luffy", {"weight_decay": 0.01}),
        ("luffy", {"beta2": 0.95}),
        ("luffy", {"temperature": 1.0}),
        ("luffy", {"graded": False}),
        ("luffy", {"stale_by_update": True}),
        ("luffy", {"seed": 4}),
        ("own gate", {"gate": None}),
        ("alone", {"sft_coef": 0.05}),
        ("alone", {"gamma": 0.0}),
        ("dapo", {"pi_old": "trainer"}),
    ],
)
def test_a_plain_loop_that_differs_ends_elsewhere(runs, name, change):
    """Negative controls of the test above."""
    assert differences(runs[name], plain_loop(name, **change)[0])[2] > 1e-5


def test_the_sampler_sleeps_while_the_trainer_works(runs):
    step, calls = ["generate", "sleep", "load"], runs["luffy"].sampler["calls"]
    # --eval-every is 0: an evaluation before and one after
    assert calls == ["sleep", "load", "evaluate", *step, *step, "evaluate", "close"]
    assert "generate" not in runs["sft"].sampler["calls"]
    settings = runs["luffy"].sampler["settings"]
    assert settings["temperature"] == 0.7 and settings["end_token_ids"] == [END]
    assert settings["max_prompt_tokens"] == settings["max_response_tokens"] == 8


def test_every_evaluation_samples_with_the_same_seeds(runs):
    """The stand-in's responses depend on the seeds alone, so its accuracy does not change."""
    scores = {line["step"]: line.get("eval/avg@2") for line in runs["luffy"].metrics}
    assert scores[0] == scores[2] and 0 < scores[0] < 1 and scores[1] is None


def test_checkpoints_are_written_when_they_are_due(runs):
    """PPO's critic is saved beside the policy."""
    for name, wanted in (("luffy", {"final", "step_000001"}), ("ppo", {"final", "critic"})):
        assert {path.parent.name for path in runs[name].out.rglob("model.safetensors")} == wanted


def test_gradients_are_probed_when_the_flag_says_so(runs):
    """The weights are those of a plain loop all the same."""
    probed = ["probe/cosine" in line for line in runs["own gate"].metrics]
    assert probed == [False, True]


def with_signal(step):
    """LUFFY's (prompt ids, rollouts, demonstration) of the groups whose rewards differ."""
    for problem, group in zip(*drawn_in(step, 2)):
        if len({problem["demonstration"], *(r.text for r in group)}) > 1:
            yield problem["prompt_ids"], [r.ids for r in group], problem["demo_ids"]


@pytest.mark.parametrize("step", [1, 2])
def test_the_metrics_count_every_trained_token_once(runs, step):
    """Those of both ranks, and no fillers."""
    groups, line = list(with_signal(step)), runs["luffy"].metrics[step]
    responses = [(prompt, ids) for prompt, group, demo in groups for ids in (*group, demo)]
    tokens = sum(len(prompt) + len(ids) for prompt, ids in responses)
    assert line["perf/train_tokens_per_sec"] * line["time/train"] == pytest.approx(tokens)
    assert line["data/no_signal"] == pytest.approx(1 - len(groups) / 4)
    assert line["reward/timeouts"] == 4 * 2 + 4  # the stand-in counts what it grades


def test_empty_and_cut_responses_are_trained_on():
    """They are among those that the tests above compare: an end-of-sequence token alone, and 5."""
    lengths = {len(ids) for step in (1, 2) for _, group, _ in with_signal(step) for ids in group}
    assert {1, 5} <= lengths


def test_the_mismatch_of_the_first_step_is_that_of_a_plain_model(runs):
    """The sampler says -3 of every token."""
    lm = tiny_lm()
    pairs = [(prompt, ids) for prompt, group, _ in with_signal(1) for ids in group]
    gaps = torch.cat([logp_of(lm, *pair, 0.7).detach() for pair in pairs]) + 3.0
    first = runs["luffy"].metrics[1]
    assert first["mismatch/logp_max"] == pytest.approx(gaps.abs().max().item(), rel=1e-5)
    kl = (gaps.exp() - 1 - gaps).mean().item()
    assert first["mismatch/kl"] == pytest.approx(kl, rel=1e-5)


def test_a_step_with_nothing_to_train_on_is_legal_and_says_so(runs):
    """AdamW has seen no gradient yet, so that only its weight decay moves the weights."""
    decay = (1 - 1e-2 / 3 * 0.1) * (1 - 1e-2 * 2 / 3 * 0.1)
    before, after = runs["idle"].sampler["loaded"][:2]
    assert all(torch.allclose(after[name], decay * before[name]) for name in before)
    for line in runs["idle"].metrics:
        assert line["optim/grad_norm"] == 0 and line["optim/skipped"] == 0
        assert line["hpt/sft_frac"] == 1 and "mismatch/kl" not in line and "sft/nll" not in line
        assert line["perf/train_tokens_per_sec"] == 0 and "perf/padding_frac" not in line


@pytest.mark.parametrize("name", ["luffy", "dapo", "ppo"])
def test_every_update_on_rollouts_is_measured(runs, name):
    for line in runs[name].metrics[-2:]:
        # The second mini-batch is trained with weights that the first has moved away from pi_old.
        assert line["policy/approx_kl"] > 0
        assert line["loss/rl"] != 0 and 0 <= line["policy/clip_frac"] <= 1


def test_ppo_alone_has_a_critic_which_starts_at_0(runs):
    first, second = runs["ppo"].metrics
    assert first["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert abs(second["critic/explained_variance"]) > 1e-3
    needing = [name for name, method in METHODS.items() if train_hpt.has_critic(method)]
    assert needing == ["ppo"]
