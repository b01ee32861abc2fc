"""From the prompts of a step to the gradient: sequences, micro-batches, ranks.

The gradient that two ranks compute with FSDP is compared with the loss of each method written by
hand, response by response, in float64. Each comparison stands beside a negative control.
"""

import dataclasses
import functools
import os
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from common import batches, head, probe
from common.batches import Sequence, build_micro_batches, collate, plan_micro_batches
from common.critic import accumulate_value_gradient, value_pass
from common.metrics import Counts
from common.model import Critic, Policy
from rollout import Rollout
from tests.helpers import error, made_up_step, read, spawn, tiny_critic, tiny_lm
from train_hpt import Prompt, accumulate_gradient, build_sequences, old_policy_pass
from upge import METHODS, TABLE

C_SFT, L_MAX, GAE_GAMMA, GAE_LAMBDA = 0.05, 32, 0.9, 0.8
CPU = torch.device("cpu")


def prompts_of(gated, alpha=None, beta=None):
    """Six prompts, the first `gated` of which train on their demonstration.

    The trainer gives a token about -3.5, so some ratios to the sampler are above 2.
    """
    generator = torch.Generator().manual_seed(6)
    prompts = []
    for q, (ids, group, demo, R) in enumerate(zip(*made_up_step(gated))):
        logps = [(-2 - 3 * torch.rand(len(y), generator=generator)).tolist() for y in group]
        rollouts = [Rollout(y, logp, False, "") for y, logp in zip(group, logps)]
        a = float(q >= gated) if alpha is None else alpha
        b = float(q < gated) if beta is None else beta
        problem = {"prompt_ids": ids, "demo_ids": demo}
        prompts.append(Prompt(problem, rollouts, R.tolist(), 1.0, a, b))
    return prompts


def prompts_of_method(name):
    """Prompts on which the method differs from all others."""
    method = METHODS[name]
    if method.rollouts is None:
        return prompts_of(6)
    if method.combine == "group":
        return prompts_of(0, 1.0, 1.0)
    if name == "chord":
        return prompts_of(0, 0.7, 0.3)
    return prompts_of(2 if method.combine == "gate" else 0)


# -------------------------------------------------------------------------- what the trainer does


class Case(NamedTuple):
    """A step whose gradient the trainer computes. It also serves as the trainer's `args`."""

    method: str
    prompts: list
    budget: int = 40  # tokens per micro-batch
    clip_eps: float | None = None
    entropy_coef: float = 0.0
    pi_old: str = "trainer"
    probed: bool = False
    wrong: bool = False  # weigh tokens per micro-batch, as gradient accumulation often does


def solved(prompts):
    """The last prompt has no signal, so that its gradient is 0."""
    return [*prompts[:-1], prompts[-1]._replace(rewards=[1.0] * 4)]


def reordered(prompts):
    """The same prompts and rollouts in another order."""
    reverse = [p._replace(rollouts=p.rollouts[::-1], rewards=p.rewards[::-1]) for p in prompts]
    return reverse[::-1]


def other_dropped_rollouts(prompts):
    """Other tokens in the rollouts that the gate drops."""
    changed = [[r._replace(ids=r.ids[::-1]) for r in p.rollouts] for p in prompts]
    return [p._replace(rollouts=c) if p.beta else p for p, c in zip(prompts, changed)]


CASES = {name: Case(name, prompts_of_method(name)) for name in METHODS} | {
    "whole": Case("hpt", prompts_of(2), 10_000),
    "one by one": Case("hpt", prompts_of(2), 1),
    "probed": Case("hpt", prompts_of(2), 50, probed=True),
    "probed, solved": Case("hpt", solved(prompts_of(2)), 50, probed=True),
    "reordered": Case("hpt", reordered(prompts_of(2)), 50),
    "dropped changed": Case("hpt", other_dropped_rollouts(prompts_of(2)), 10_000),
    "wrong whole": Case("hpt", prompts_of(2), 10_000, wrong=True),
    "wrong small": Case("hpt", prompts_of(2), 20, wrong=True),
    "smooth": Case("hpt", prompts_of(2, 0.3, 0.7)),
    "none gated": Case("hpt", prompts_of(0)),
    "one gated": Case("hpt", prompts_of(1)),
    "all gated": Case("hpt", prompts_of(6)),
    "clip": Case("dr_grpo", prompts_of(0), clip_eps=0.05),
    "bonus": Case("grpo", prompts_of(0), entropy_coef=0.1),
    "bonus on demonstrations": Case("sft", prompts_of(6), entropy_coef=0.1),
    "sampler": Case("grpo", prompts_of(0), pi_old="sampler"),
    "tis": Case("grpo", prompts_of(0), pi_old="tis"),
    "ppo, one by one": Case("ppo", prompts_of(0), 1),
}


def made_up_value(ids, is_response, lengths):
    """A critic: some function of the token."""
    return torch.sin(ids[is_response].double())


def stale(logp):
    """log-probabilities of a policy some updates back: ratios from 0.74 to 1.35."""
    logp = logp.double()
    return logp + 0.3 * torch.sin(1e3 * logp)


def micro_batches_of(case):
    by_row = build_sequences(case.prompts, METHODS[case.method], C_SFT, L_MAX)
    return build_micro_batches(by_row, case.budget, case.entropy_coef, CPU, Counts())


def flat(gradient_of):
    """The whole gradient of a model, of which FSDP's ranks have shards."""
    gradients = [p.grad for p in gradient_of.parameters()]
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients]
    return torch.cat([x.flatten() for x in whole]).clone()


def trainer_gradient(policy, case):
    """(the gradient, what the probe saw or {})."""
    micro_batches = micro_batches_of(case)
    for m in micro_batches if case.wrong else []:
        of_row = sum(other.row == m.row for other in micro_batches)
        m.weight = torch.full_like(m.weight, 1 / of_row / m.weight.numel())
    if case.method == "ppo":
        value_pass(made_up_value, [micro_batches], GAE_GAMMA, GAE_LAMBDA, Counts())
    old_policy_pass(policy, [micro_batches], case, Counts())
    for m in micro_batches:
        if m.old_logp is not None:
            m.old_logp = stale(m.old_logp)  # as if some updates had been made
    seen = {}
    if case.probed:
        accumulate = functools.partial(accumulate_gradient, args=case, counts=Counts())
        seen = probe.probe(policy, micro_batches, accumulate, {"rl": 4, "sft": 2}, 6)
    accumulate_gradient(policy, micro_batches, case, Counts())
    gradient = flat(policy)
    policy.zero_grad()
    return gradient, seen


def critic_gradient():
    """The gradient of the value loss of PPO's critic, some updates after the values."""
    critic = fully_shard(Critic(tiny_critic()))
    micro_batches = micro_batches_of(CASES["ppo"])
    value_pass(critic, [micro_batches], GAE_GAMMA, GAE_LAMBDA, Counts())
    for m in micro_batches:
        m.value = m.value if m.is_filler else stale(m.value)
    accumulate_value_gradient(critic, micro_batches, Counts())
    return flat(critic)


def gradients_on_rank(rank, path):
    """In a process of its own: the gradients of all cases, to `path`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    lm = tiny_lm()
    for block in lm.model.layers:
        fully_shard(block)
    head.CHUNK = 7
    policy = fully_shard(Policy(lm, temperature=1.0))
    results = {name: trainer_gradient(policy, case) for name, case in CASES.items()}
    results["critic"] = critic_gradient(), {}
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case: (gradient, what the probe saw)} of two ranks."""
    path = tmp_path_factory.mktemp("gradients") / "gradients.pt"
    spawn(gradients_on_rank, path, processes=2)
    return torch.load(path)


@pytest.fixture
def gradients(results):
    return {name: gradient for name, (gradient, _) in results.items()}


# ---------------------------------------------------------------------------- the losses by hand


def clipped(ratio, A, low=0.2, high=0.2):
    """PPO's objective."""
    return torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


the_lm = functools.cache(tiny_lm)


@functools.cache
def read_once(prompt, response):
    """What `read` gives, as a part of one graph that all losses share; tuples of token ids."""
    return read(the_lm(), list(prompt), list(response))


def gae(reward, V):
    """GAE of one response with values V (n,), step by step from the end."""
    A, after, V = [], 0.0, [*V.tolist(), 0.0]
    for t in reversed(range(len(V) - 1)):
        here = reward if t == len(V) - 2 else 0.0
        after = here + GAE_GAMMA * V[t + 1] - V[t] + GAE_GAMMA * GAE_LAMBDA * after
        A.insert(0, after)
    return torch.tensor(A, dtype=torch.double)


def whitened_gae(prompts):
    """Per prompt and rollout, the advantages (n,) under the made-up critic."""
    groups = []
    for p in prompts:
        values = [torch.sin(torch.tensor(r.ids).double()) for r in p.rollouts]
        groups.append(list(map(gae, p.rewards, values)))
    tokens = torch.cat([A for group in groups for A in group])
    return [[(A - tokens.mean()) / tokens.std(correction=0) for A in group] for group in groups]


@dataclasses.dataclass
class ByHand:
    """The loss of a method, written out prompt by prompt, without micro-batches."""

    method: str
    c_sft: float = C_SFT
    pi_old: str = "trainer"
    eps: float = 0.2
    bonus: float = 0.0

    def gradient(self, prompts):
        objective, whitened = 0.0, whitened_gae(prompts)
        tokens = sum(len(r.ids) for p in prompts for r in p.rollouts) / len(prompts)
        demo_tokens = sum(len(p.problem["demo_ids"]) for p in prompts) / len(prompts)
        for p, A in zip(prompts, whitened):
            if METHODS[self.method].demonstration:
                objective = objective + p.beta * self.demonstration(p, demo_tokens)
            for i in range(len(p.rollouts) if METHODS[self.method].rollouts else 0):
                objective = objective + p.alpha * self.rollout(p, i, A[i], tokens)
        parameters = list(the_lm().parameters())
        gradients = torch.autograd.grad(-objective / len(prompts), parameters, retain_graph=True)
        return torch.cat([x.flatten() for x in gradients])

    def demonstration(self, p, tokens):
        """What the demonstration of a prompt adds; `tokens` is their mean length."""
        x, H = read_once(tuple(p.problem["prompt_ids"]), tuple(p.problem["demo_ids"]))
        prob, weight, n = x.exp(), x.exp().detach(), len(p.rollouts)
        shaped = (prob / (prob + 0.1)).sum()  # LUFFY's f(pi)
        dft, trsft = (weight * x).mean(), (prob / weight.clamp(min=0.1)).mean()
        in_group = (1 - (sum(p.rewards) + 1) / (n + 1)) * shaped / (n + 1) / L_MAX
        alone = shaped / n / L_MAX
        return {
            "sft": x.mean(),
            "dft": dft,
            "trsft": trsft,
            "luffy": in_group,
            "srft": 0.5 * (-H.detach()).exp() * x.sum() / (n + 1) / L_MAX + in_group,
            "chord": (weight * (1 - weight) * x).sum() / tokens,
            "hpt": self.c_sft * x.mean(),
            "hpt_dft": self.c_sft * dft,
            "hpt_trsft": self.c_sft * trsft,
            "hpt_off": alone,
            "hpt_mix": self.c_sft * x.mean() + alone,
        }[self.method]

    def rollout(self, p, i, whitened, tokens):
        """What rollout i of a prompt adds; `tokens` is the mean per prompt of all rollouts'."""
        reward, R, n = p.rewards[i], torch.tensor(p.rewards).double(), len(p.rollouts)
        x, H = read_once(tuple(p.problem["prompt_ids"]), tuple(p.rollouts[i].ids))
        sampler = torch.tensor(p.rollouts[i].logp).double()
        ratio = (x - stale(sampler if self.pi_old == "sampler" else x.detach())).exp()
        importance = 1.0
        if self.pi_old == "tis":
            importance = (x.detach() - sampler).exp().clamp(max=2.0)
        centred = reward - R.mean()
        standard = centred / (R.std() + 1e-6)
        in_group = reward - (R.sum() + 1) / (n + 1)
        dr_grpo = clipped(ratio, centred, self.eps, self.eps).sum() / n / L_MAX
        grpo = (importance * clipped(ratio, standard)).mean() / n
        cispo = (ratio.clamp(max=1.2).detach() * standard * x).sum()
        objective = {
            "reinforce": lambda: (2 * reward - 1) * x.mean() / n,
            "rloo": lambda: (reward - (R.sum() - reward) / (n - 1)) * x.sum() / n / L_MAX,
            "maxrl": lambda: (reward / R.mean() - 1) * x.mean() / n,
            "ppo": lambda: clipped(ratio, whitened).sum() / tokens,
            "grpo": lambda: grpo,
            "dapo": lambda: clipped(ratio, standard, 0.2, 0.28).sum() / tokens,
            "cispo": lambda: cispo / sum(len(r.ids) for r in p.rollouts),
            "gspo": lambda: clipped(ratio.log().mean().exp(), standard, 3e-4, 4e-4) / n,
            "luffy": lambda: (ratio * in_group).sum() / (n + 1) / L_MAX,
            "srft": lambda: (0.1 * H.detach().exp() if reward else -1) * x.sum() / (n + 1) / L_MAX,
            "chord": lambda: grpo,
        }.get(self.method, lambda: dr_grpo)
        return objective() + self.bonus * H / n


def critic_gradient_by_hand(clip=0.2, half=0.5):
    """PPO's clipped value loss, token by token."""
    critic, total, count = tiny_critic(), 0.0, 0
    for p in CASES["ppo"].prompts:
        begin = len(p.problem["prompt_ids"])
        for r, reward in zip(p.rollouts, p.rewards):
            hidden = critic.base_model(torch.tensor([p.problem["prompt_ids"] + r.ids]))
            V = critic.score(hidden.last_hidden_state[0])[begin - 1 : -1, 0]
            returns, old = gae(reward, V.detach()) + V.detach(), stale(V.detach())
            near = old + (V - old).clamp(-clip, clip)
            errors = torch.maximum((V - returns) ** 2, (near - returns) ** 2)
            total, count = total + half * errors.sum(), count + len(V)
    (total / count).backward()
    return flat(critic)


@functools.cache
def method_by_hand(name):
    return ByHand(name).gradient(CASES[name].prompts)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_the_trainer_is_its_loss_written_by_hand(gradients, name):
    assert error(gradients[name], method_by_hand(name)) <= 1e-5
    others = {x: error(gradients[name], method_by_hand(x)) for x in METHODS if x != name}
    assert min(others.values()) > 1e-2, others  # negative control


@pytest.mark.parametrize("case", ["one by one", "probed", "reordered", "dropped changed"])
def test_the_gradient_depends_on_no_split_and_no_order(gradients, case):
    assert error(gradients[case], ByHand("hpt").gradient(prompts_of(2))) <= 1e-6
    assert error(gradients[case], gradients["whole"]) <= 1e-10


def test_one_rank_without_fsdp_has_the_gradient_of_two(gradients):
    for name in ("whole", "one by one", "gspo"):
        one, _ = trainer_gradient(Policy(tiny_lm(), temperature=1.0), CASES[name])
        assert error(gradients[name], one) <= 1e-8
    hotter, _ = trainer_gradient(Policy(tiny_lm(), temperature=1.2), CASES["whole"])
    assert error(gradients["whole"], hotter) > 1e-2  # negative control


def test_other_weights_coefficients_or_prompts_give_another_gradient(gradients):
    """Negative controls of the two tests above."""
    assert error(gradients["wrong small"], gradients["wrong whole"]) > 1e-2
    assert error(ByHand("hpt", c_sft=0.06).gradient(prompts_of(2)), gradients["whole"]) > 1e-3
    assert error(ByHand("hpt").gradient(prompts_of(2)[1:]), gradients["whole"]) > 1e-2


def test_dropped_rollouts_contribute_exactly_nothing(gradients):
    assert torch.equal(gradients["dropped changed"], gradients["whole"])


@pytest.mark.parametrize("case", ["smooth", "none gated", "one gated", "all gated"])
def test_hpt_with_any_gate(gradients, case):
    prompts = CASES[case].prompts
    assert error(gradients[case], ByHand("hpt").gradient(prompts)) <= 1e-6
    assert error(gradients[case], gradients["whole"]) > 1e-2  # negative control


@pytest.mark.parametrize(
    "case, method, settings",
    [
        ("clip", "dr_grpo", {"eps": 0.05}),
        ("bonus", "grpo", {"bonus": 0.1}),
        ("sampler", "grpo", {"pi_old": "sampler"}),
        ("tis", "grpo", {"pi_old": "tis"}),
    ],
)
def test_a_setting_does_what_it_says(gradients, case, method, settings):
    wanted = ByHand(method, **settings).gradient(prompts_of(0))
    assert error(gradients[case], wanted) <= 1e-5
    assert error(gradients[case], gradients[method]) > 1e-3  # negative control


def test_the_entropy_bonus_leaves_demonstrations_alone(gradients):
    assert torch.equal(gradients["bonus on demonstrations"], gradients["sft"])


def test_whitening_is_over_all_micro_batches(gradients):
    assert error(gradients["ppo, one by one"], gradients["ppo"]) <= 1e-8


def test_the_critics_gradient_is_its_loss_written_by_hand(gradients):
    assert error(gradients["critic"], critic_gradient_by_hand()) <= 1e-6
    for wrong in ({"clip": 9.0}, {"half": 1.0}):  # negative controls
        assert error(gradients["critic"], critic_gradient_by_hand(**wrong)) > 1e-3


@pytest.mark.parametrize("case", ["probed", "probed, solved"])
def test_the_probe_is_what_gradients_of_single_prompts_say(results, case):
    prompts, seen = CASES[case].prompts, results[case][1]
    single = torch.stack([ByHand("hpt").gradient([p]) for p in prompts])
    sft, rl = single[:2], single[2:]
    wanted = {
        "probe/sft_norm": (sft.sum(0) / 6).norm(),
        "probe/rl_norm": (rl.sum(0) / 6).norm(),
        "probe/cosine": torch.cosine_similarity(sft.sum(0), rl.sum(0), dim=0),
        "probe/sft_variance": sft.var(0).sum(),
        "probe/rl_variance": rl.var(0).sum(),
    }
    assert seen == pytest.approx({k: v.item() for k, v in wanted.items()}, rel=1e-5, abs=1e-7)
    population = rl.var(0, correction=0).sum().item()  # negative control
    assert seen["probe/rl_variance"] != pytest.approx(population, rel=1e-2)


# ------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_the_plan_holds_every_sequence_once(ranks, budget):
    for gated in range(7):
        by_row = build_sequences(prompts_of(gated), METHODS["hpt"], C_SFT, L_MAX)
        for row, sequences in by_row.items():
            plan = plan_micro_batches(sequences, ranks, budget)
            assert len({len(passes) for passes in plan}) == 1  # FSDP's ranks move together
            parts = [part for passes in plan for part in passes]
            assert sorted(s for part in parts for s in part) == sorted(sequences)
            for part in parts:
                assert len(part) <= 1 or collate(TABLE[row], part, CPU).ids.numel() <= budget


def test_the_plan_balances_tokens_not_sequences():
    lengths = [50, 3, 3, 3, 40, 3, 3, 20, 3, 3, 10, 3]
    sequences = [Sequence([1], [1] * n, False, 0, 0.0) for n in lengths]
    plan = plan_micro_batches(sequences, 2, 100)
    loads = [sum(batches.total_length(s) for part in passes for s in part) for passes in plan]
    assert abs(loads[0] - loads[1]) <= 10, loads
    dealt = [sum(lengths[i::2]) for i in (0, 1)]  # negative control: as many sequences each
    assert abs(dealt[0] - dealt[1]) > 10


def test_a_micro_batch_is_flat():
    first = Sequence([3, 4], [5, 6, 1], False, 0, 0.5, 0.1, [-1.0, -2.0, -3.0])
    second = Sequence([7], [8, 1], False, 4, -0.5, 0.2, [-4.0, -5.0])
    m = collate(TABLE["grpo"], [first, second], CPU)
    assert m.ids.tolist() == [3, 4, 5, 6, 1, 7, 8, 1]
    assert m.is_response.tolist() == [False, False, True, True, True, False, True, True]
    assert m.seq.tolist() == [0, 0, 0, 1, 1]
    assert (m.lengths, m.response_lengths, m.prompts) == ([5, 3], [3, 2], [0, 4])
    assert m.advantage.tolist() == [0.5] * 3 + [-0.5] * 2
    assert m.weight.tolist() == pytest.approx([0.1] * 3 + [0.2] * 2)
    assert m.sampler_logp.tolist() == [-1, -2, -3, -4, -5] and not m.is_filler
    filler = collate(TABLE["grpo"], [], CPU)
    assert filler.is_filler and filler.weight.tolist() == [0.0]


def test_what_has_no_signal_is_not_computed():
    """Two prompts are gated; of the other four, one is solved: A = 0 in all its rollouts."""
    prompts, counts = solved(prompts_of(2)), Counts()
    by_row = build_sequences(prompts, METHODS["hpt"], C_SFT, L_MAX)
    micro_batches = build_micro_batches(by_row, 10_000, 0.0, CPU, counts)
    assert counts.sequences == 18 and counts.computed_sequences == 14
    assert sum(len(m.prompts) for m in micro_batches) == 14
    with_bonus = Counts()  # every rollout feeds the entropy bonus
    build_micro_batches(by_row, 10_000, 0.1, CPU, with_bonus)
    assert with_bonus.computed_sequences == 18
