"""What the training loop decides by rule, and two steps of it against a plain loop."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import train_hpt
from common import distributed, model
from common.metrics import Counts
from common.model import Network, Policy
from rollout import Rollout
from test_upge import spawn, tiny_lm
from train_hpt import (
    Prompt,
    Sequence,
    apply_gate,
    build_sequences,
    collate,
    draw,
    grade,
    is_due,
    sample_rollouts,
    split_prompts,
    warmed_up,
)
from upge import METHODS

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

    timeouts = 0

    def score(self, responses, answers):
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
    got = apply_gate(rewards, METHODS[method], arguments(gate=gate, gamma=gamma))
    assert got[0] == pytest.approx(wanted[0]) and got[1] == pytest.approx(wanted[1])


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
    assert m.ids.tolist() == [[1, 2, 3, 5, 5, 0], [1, 2, 3, 5, 5, 5]]
    assert m.response.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert m.seq.tolist() == [[0, 0, 1, 1, 1]] and m.lengths == [2, 3] and m.tokens == 11
    assert m.sampler_logp.shape == m.advantage.shape == m.weight.shape == (1, 5)


def test_a_filler_weighs_nothing():
    m = collate("sft", [], "cpu")
    assert m.is_filler and m.weight.tolist() == [[0.0]] and m.tokens == 0


def test_the_part_of_one_prompt_is_what_that_prompt_alone_would_be():
    steps = [Sequence([1] * (2 + q), [4] * (6 - q), False, q, q, q, [-q] * (6 - q)) for q in (0, 1)]
    part, alone = collate("grpo", steps, "cpu").only(1), collate("grpo", steps[1:], "cpu")
    assert part.ids.equal(alone.ids) and part.response.equal(alone.response)
    assert part.seq.equal(alone.seq) and part.lengths == alone.lengths
    assert part.weight.equal(alone.weight) and part.sampler_logp.equal(alone.sampler_logp)
    assert collate("grpo", steps, "cpu").only(7).is_filler


# ------------------------------------------------------------------------------- ranks and counts


def totals_on_ranks(rank, port, path):
    """In two processes: the totals of different counts."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
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
    spawn(totals_on_ranks, distributed.free_port(), path, processes=2)
    return json.loads(path.read_text())


def test_counts_are_summed_over_ranks(totals):
    assert totals[0]["tokens"] == 3.0 and totals[0]["old_tokens"] == 4.0


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


# ----------------------------------------------------------- two steps against a plain loop


TWO_STEPS = {
    "method": "luffy",
    "samples_per_prompt": 3,
    "prompts_per_step": 4,
    "minibatches_per_step": 2,
    "seed": 3,
    "sft_coef": 0.05,
    "max_response_tokens": 8,
    "tokens_per_microbatch": 30,
    "clip_eps": None,
    "entropy_coef": 0.0,
    "pi_old": "trainer",
    "tis_cap": 2.0,
    "lr": 1e-2,
    "warmup_steps": 3,
    "max_grad_norm": 0.02,
    "weight_decay": 0.1,
    "temperature": 0.7,
}


class TokenSampler:
    """Stands in for the sampler: responses that depend on the seed alone."""

    tensor_parallel = 1

    def generate(self, prompts, seeds, n, label=None):
        return [self.group(seed, n) for seed in seeds]

    def group(self, seed, n):
        g = torch.Generator().manual_seed(seed % 2**31)
        group = []
        for _ in range(n):
            ids = torch.randint(3, 32, (int(torch.randint(2, 6, (1,), generator=g)),), generator=g)
            right = str(int(ids[0]) % 2)
            group.append(Rollout(ids.tolist(), [-3.0] * len(ids), False, right))
        return group


def problems():
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(6):
        demo = torch.randint(3, 32, (4 + i % 3,), generator=g).tolist()
        made.append(
            {
                "prompt_ids": [3 + i, 4],
                "demo_ids": demo,
                "answer": "1",
                "demonstration": str(i % 2),  # every other demonstration is wrong
            }
        )
    return made


def loop_of_the_trainer(rank, port, path):
    """Two steps through the functions that `main` calls, on one rank."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=1)
    args, cpu = SimpleNamespace(**TWO_STEPS), torch.device("cpu")
    method, lm = METHODS[args.method], tiny_lm()
    policy = fully_shard(Policy(lm, args.temperature, chunk=5))
    policy.optimizer = model.build_optimizer(policy, args)
    for step in (1, 2):
        drawn = draw(problems(), step, args.prompts_per_step, args.seed)
        rollouts = sample_rollouts(TokenSampler(), drawn, step, args)
        counts = Counts()
        rewards, demo_rewards = grade(RecordingVerifier(), drawn, rollouts, method, counts)
        alpha, beta = apply_gate(rewards, method, args)
        prompts = list(map(Prompt, drawn, rollouts, rewards, demo_rewards, alpha, beta))
        minibatches = []
        for chunk in split_prompts(prompts, args.minibatches_per_step, args.seed, step):
            minibatches.append(train_hpt.build_micro_batches(chunk, method, args, cpu))
        train_hpt.old_policy_pass(policy, None, minibatches, args, counts)
        for i, micro_batches in enumerate(minibatches):
            updates_before = (step - 1) * args.minibatches_per_step + i
            train_hpt.update(policy, None, micro_batches, updates_before, args, counts)
    torch.save({name: p.full_tensor() for name, p in lm.named_parameters()}, path)
    dist.destroy_process_group()


def plain_loop(lr=1e-2, clip=0.02, warmup=3, decay=0.1, temperature=0.7, graded=True):
    """The same two steps of LUFFY, written out with plain torch and transformers."""
    lm = tiny_lm()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=decay)

    def log_probabilities(prompt, response):
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1)
        return logp.gather(-1, torch.tensor(response)[:, None])[:, 0]

    updates = 0
    for step in (1, 2):
        order = []
        for place in range((step - 1) * 4, step * 4):
            epoch, position = divmod(place, 6)
            order.append(problems()[distributed.shuffled(6, 3, "epoch", epoch)[position]])
        groups = [
            TokenSampler().group(distributed.derive_seed(3, step, i), 2) for i in range(len(order))
        ]
        with torch.no_grad():
            old = [
                [log_probabilities(p["prompt_ids"], r.ids) for r in group]
                for p, group in zip(order, groups)
            ]
        shuffle = distributed.shuffled(4, 3, "mini-batches", step)
        for chunk in (shuffle[0::2], shuffle[1::2]):
            loss = 0.0
            for q in chunk:
                p, group = order[q], groups[q]
                demo_reward = float(p["demonstration"] == "1") if graded else 1.0
                R = [float(r.text == "1") for r in group] + [demo_reward]
                mean = sum(R) / 3
                for r, reward, old_logp in zip(group, R, old[q]):
                    ratio = (log_probabilities(p["prompt_ids"], r.ids) - old_logp).exp()
                    loss = loss - (reward - mean) * ratio.sum() / (2 * 3 * 8)
                pi = log_probabilities(p["prompt_ids"], p["demo_ids"]).exp()
                loss = loss - (R[-1] - mean) * (pi / (pi + 0.1)).sum() / (2 * 3 * 8)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), clip)
            updates += 1
            optimizer.param_groups[0]["lr"] = lr * min(1.0, updates / warmup)
            optimizer.step()
            optimizer.zero_grad()
    return dict(lm.named_parameters())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("two_steps") / "weights.pt"
    spawn(loop_of_the_trainer, distributed.free_port(), path)
    return torch.load(path)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_two_steps_are_those_of_a_plain_loop(trained):
    assert largest_difference(trained, plain_loop()) < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1.1e-2},
        {"clip": math.inf},
        {"warmup": 1},
        {"decay": 0.0},
        {"temperature": 1.0},
        {"graded": False},
    ],
)
def test_a_plain_loop_that_differs_ends_elsewhere(trained, change):
    """Negative controls of the test above."""
    assert largest_difference(trained, plain_loop(**change)) > 1e-5
