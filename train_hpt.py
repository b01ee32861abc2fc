"""Hybrid Post-Training (HPT, arXiv 2509.04419, Algorithm 1) and the methods it is compared with.

    torchrun train_hpt.py                                      a toy, on any machine, in minutes
    torchrun --nproc_per_node=8 train_hpt.py @recipes/qwen2.5-math-7b.args

A step does the following; `main` has the same numbers:

    1. Draw prompts; sample n rollouts of each with the current policy (vLLM).
    2. Grade the rollouts: the reward is 1 if the answer is right, else 0.
    3. The gate. P is the mean reward of a prompt's rollouts. If P > gamma, train on the rollouts
       (alpha = 1, beta = 0), else on the prompt's demonstration (alpha = 0, beta = 1).
    4. Split the prompts into mini-batches. Give each sequence its advantage and its weight.
    5. Update the policy (FSDP) once per mini-batch of N prompts, with the gradient of

           L = (1/N) sum_q [ alpha_q L_RL(q) + c_sft beta_q L_SFT(q) ]

    6. Give the new weights to the sampler. Write metrics, evaluate, save.

L_RL and L_SFT are rows of the table in upge.py. Every rank runs `main`. Everything random depends
on the seed, the step and the place of a prompt in the step, never on the rank.
"""

from common import flags, terminal

# Flags are read before the slow imports, so that --help and wrong flags are answered at once.
ARGS = flags.parse_training_args() if __name__ == "__main__" else None

import dataclasses
import functools
import heapq
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import evaluate
import reward
import rollout
from common import checkpoint, data, distributed, interrupt, metrics, model, plan, probe, report
from common.step_table import StepTable
from upge import GATES, METHODS, PI_OLD, TABLE, Method, adv_one, chord_schedule, gae, upge_loss


def main(args) -> None:
    """Train as the docstring of this file says. Every rank calls it."""
    method = METHODS[args.method]
    terminal.begin_phase("model and data")
    inputs = load_inputs(args, method)  # bad models and data fail here, before slow starts
    terminal.begin_phase("verifier")
    with reward.Verifier(function=args.reward) as verifier:
        memory = plan.memory_plan(args, inputs.config, needs_critic(method))
        device, sampler, policy, critic = start(args, method, inputs, memory)
        out, step_done = open_run(args, inputs, policy, critic)  # --resume loads a checkpoint here
        print_plan(args, method, inputs, policy, memory, out)
        table = start_table(args, inputs)
        sampler.load(policy.weights())  # wakes the sampler, which `start` has put to sleep
        if inputs.held_out and step_done == 0:
            measured = evaluate_held_out(0, inputs, sampler, verifier, args, out)
            report.log(out, {"step": 0} | measured, table)

        for step in range(step_done + 1, args.steps + 1):
            terminal.begin_step(step, args.steps)
            clock, counts = metrics.Clock(), metrics.Counts()

            # 1. Draw prompts, sample rollouts. Then the sampler sleeps and the trainer has the GPU.
            problems = draw(inputs.problems, step, args.prompts_per_step, args.seed)
            rollouts = sample_rollouts(sampler, problems, step, args)
            sampler.sleep()
            clock.lap("rollout")

            # 2. Grade the rollouts, and the demonstrations if their reward is used.
            rewards, demo_rewards = grade(verifier, problems, rollouts, method, counts)
            clock.lap("reward")

            # 3. The gate: alpha weighs a prompt's rollouts, beta its demonstration.
            alpha, beta = apply_gate(rewards, step, method, args)
            prompts = list(map(Prompt, problems, rollouts, rewards, demo_rewards, alpha, beta))

            # 4. Deal the prompts into mini-batches; build the micro-batches of this rank.
            parts = split_prompts(prompts, args.minibatches_per_step, args.seed, step)
            minibatches, can_pack = [], policy.can_pack
            for part in parts:
                built = build_micro_batches(part, method, args, device, counts, can_pack)
                minibatches.append(built)

            # 5. Compute what depends on the weights before the first update; then update.
            if critic:
                value_pass(critic, minibatches, args, counts)
            old_policy_pass(policy, minibatches[1:], args, counts)
            probed = probe_gradients(policy, parts[0], minibatches[0], step, args)
            for i, micro_batches in enumerate(minibatches):
                updates_before = (step - 1) * args.minibatches_per_step + i
                update(policy, critic, micro_batches, updates_before, args, counts)
            clock.lap("train")

            # 6. The sampler wakes with the new weights. Metrics, evaluation, checkpoint.
            sampler.load(policy.weights())
            clock.lap("sync")
            measured = measure_step(step, prompts, method, counts, clock, policy) | probed
            if is_due(step, args.eval_every, args.steps):
                measured |= evaluate_held_out(step, inputs, sampler, verifier, args, out)
            report.log(out, measured, table)
            report.log_samples(out, step, prompts)
            end_step(out, step, counts, args, policy, critic, inputs)
        sampler.close()
    report.closing_table(out, args)


# ------------------------------------------------------------------- what the loop decides by rule


def draw(problems: list, step: int, count: int, seed: int) -> list:
    """The `count` problems of a step. Steps count from 1.

    The steps go through all problems, epoch by epoch; each epoch has an order of its own.
    """
    n = len(problems)
    orders = {}  # of the one or more epochs that the step touches
    drawn = []
    for place in range((step - 1) * count, step * count):
        epoch, position = divmod(place, n)
        if epoch not in orders:
            orders[epoch] = distributed.shuffled(n, seed, "epoch", epoch)
        drawn.append(problems[orders[epoch][position]])
    return drawn


def split_prompts(prompts: list, minibatches: int, seed: int, step: int) -> list[list]:
    """The prompts of a step, shuffled and dealt into mini-batches.

    Their number does not depend on the gate. A mini-batch may hold prompts that train on their
    rollouts and prompts that train on their demonstration.
    """
    order = distributed.shuffled(len(prompts), seed, "mini-batches", step)
    return [[prompts[q] for q in order[i::minibatches]] for i in range(minibatches)]


def warmed_up(lr: float, updates_before: int, warmup_steps: int) -> float:
    """The learning rate of an optimizer step: linear warm-up, then constant."""
    return lr * min(1.0, (updates_before + 1) / max(1, warmup_steps))


def is_due(step: int, every: int, last_step: int) -> bool:
    """True at the last step, and at every multiple of `every` if that is not 0."""
    return step == last_step or (every > 0 and step % every == 0)


# --------------------------------------------------------------------------- parts 1, 2 and 3


class Prompt(NamedTuple):
    """A problem of the step, and what came of it."""

    problem: dict  # as common/data.py loads it, with "prompt_ids" and, if needed, "demo_ids"
    rollouts: list[rollout.Rollout]
    rewards: list[float]  # one per rollout
    demo_reward: float
    alpha: float  # weight of its rollouts in the loss
    beta: float  # weight of its demonstration


def rollouts_per_prompt(args) -> int:
    """--samples-per-prompt, less one if the demonstration joins the group; 0 without rollouts."""
    method = METHODS[args.method]
    if method.rollouts is None:
        return 0
    return args.samples_per_prompt - (method.combine == "group")


def sample_rollouts(sampler, problems: list, step: int, args) -> list[list[rollout.Rollout]]:
    """The rollouts of each problem. Each rank samples a share; every rank gets all of them."""
    n = rollouts_per_prompt(args)
    if n == 0:
        return [[] for _ in problems]
    seeds = [distributed.derive_seed(args.seed, step, i) for i in range(len(problems))]
    requests = [(p["prompt_ids"], seed) for p, seed in zip(problems, seeds)]
    sample = functools.partial(sample_share, sampler, n)
    return distributed.share_work(requests, sample, sampler.tensor_parallel)


def sample_share(sampler, n: int, requests: list[tuple]) -> list[list[rollout.Rollout]]:
    """This rank's share: n rollouts for each (prompt ids, seed)."""
    prompts, seeds = [ids for ids, _ in requests], [seed for _, seed in requests]
    return sampler.generate(prompts, seeds, n, label="sampling")


def grade(verifier, problems: list, rollouts: list, method: Method, counts) -> tuple[list, list]:
    """(rewards per problem and rollout, reward per demonstration), each from 0 to 1.

    Each rank grades a share; every rank gets all rewards.

    A demonstration is graded only if a row of the method computes an advantage from its reward;
    else its reward is 1.
    """
    reward_used = any(TABLE[name].advantage is not adv_one for name in method.demonstration)
    n = len(rollouts[0])
    pairs = [(r.text, p["answer"]) for p, group in zip(problems, rollouts) for r in group]
    if reward_used:
        pairs += [(p["demonstration"], p["answer"]) for p in problems]
    timeouts_before = verifier.timeouts
    scores = distributed.share_work(pairs, functools.partial(grade_share, verifier))
    counts.timeouts += verifier.timeouts - timeouts_before
    rewards = [scores[i * n : (i + 1) * n] for i in range(len(problems))]
    demo_rewards = scores[len(problems) * n :] if reward_used else [1.0] * len(problems)
    return rewards, demo_rewards


def grade_share(verifier, pairs: list[tuple]) -> list[float]:
    """This rank's share: the rewards of (response, answer) pairs."""
    responses, answers = [response for response, _ in pairs], [answer for _, answer in pairs]
    with terminal.progress("grading", len(pairs)) as part:
        return verifier.score(responses, answers, each_done=part.update)


def apply_gate(rewards: list, step: int, method: Method, args) -> tuple[list[float], list[float]]:
    """(alpha, beta), one of each per prompt.

    A gate looks at the rewards of a prompt, a schedule at the step alone. Without either, alpha is
    1 if the method trains on rollouts, and beta is 1 if it trains on demonstrations; else they are
    0.
    """
    if method.combine == "gate":
        correct = torch.tensor([sum(group) for group in rewards])
        alpha, beta = GATES[args.gate](correct, args.samples_per_prompt, args.gamma)
        return alpha.tolist(), beta.tolist()
    if method.combine == "schedule":
        alpha, beta = chord_schedule(step, *args.chord_mu, *args.chord_steps)
        return [alpha] * len(rewards), [beta] * len(rewards)
    has_rollouts, has_demonstration = method.rollouts is not None, bool(method.demonstration)
    return [float(has_rollouts)] * len(rewards), [float(has_demonstration)] * len(rewards)


# -------------------------------------------------------------- part 4: sequences and micro-batches


class Sequence(NamedTuple):
    """One response to train on: a rollout or a demonstration."""

    prompt_ids: list[int]
    response_ids: list[int]
    is_demo: bool
    prompt_index: int  # 0 .. N-1, which prompt of the mini-batch it answers
    advantage: float  # for PPO the reward, which `value_pass` turns into GAE
    weight: float = 0.0  # of each of its tokens in the loss
    sampler_logp: list[float] | None = None  # of a rollout, one per token


def build_sequences(
    prompts: list[Prompt], method: Method, c_sft: float, l_max: int
) -> dict[str, list[Sequence]]:
    """{row of the table: its sequences} of one mini-batch, with every advantage and weight.

        L = (1/N) sum_q [ alpha_q L_RL(q) + c_sft beta_q L_SFT(q) ]

    `weight` contains alpha or beta, c_sft and the row's normaliser, 1/N included. Nothing is
    divided later, so cutting the mini-batch into micro-batches and ranks only splits a sum.
    """
    names = [name for name in (method.rollouts, *method.demonstration) if name]
    by_row = {}
    for name in names:
        counted = []  # sequences that the normaliser counts
        for q, prompt in enumerate(prompts):
            counted += sequences_of_prompt(name, q, prompt, method, c_sft)
        if counted:  # so far, their weight is a coefficient; the normaliser completes it
            lengths = torch.tensor([len(s.response_ids) for s in counted])  # (B,)
            groups = torch.tensor([s.prompt_index for s in counted])  # (B,)
            normaliser = TABLE[name].normaliser(lengths, groups, len(prompts), l_max).tolist()
            counted = [s._replace(weight=s.weight * w) for s, w in zip(counted, normaliser)]
        is_demo = TABLE[name].data == "demo"
        by_row[name] = [s for s in counted if s.is_demo == is_demo]
    return by_row


def sequences_of_prompt(
    name: str, q: int, prompt: Prompt, method: Method, c_sft: float
) -> list[Sequence]:
    """The sequences of one prompt that count in a row's normaliser.

    Their weight is only alpha or beta times a coefficient; the caller multiplies the normaliser in.

    A row trains on rollouts or on demonstrations. In a method that combines them into a group, the
    normaliser and the advantages are over the whole group, so all its members are returned; the
    caller drops those on which the row does not train.
    """
    row = TABLE[name]
    is_demo, grouped = row.data == "demo", method.combine == "group"
    coefficient = 1.0
    # c_sft balances SFT against RL; if the method has no RL, there is nothing to balance.
    if name == "sft" and method.rollouts:
        coefficient = c_sft
    # Offline RL on a demonstration weighs as one rollout of n, as the authors run it.
    if name == "offline":
        coefficient = 1 / len(prompt.rollouts)
    weight = (coefficient * prompt.beta) if is_demo else prompt.alpha
    if weight == 0:
        return []
    if grouped:
        rewards = [*prompt.rewards, prompt.demo_reward]
    else:
        rewards = [prompt.demo_reward] if is_demo else prompt.rewards
    advantages = row.advantage(torch.tensor([rewards], dtype=torch.double))[0].tolist()  # (G,)
    ids, members = prompt.problem["prompt_ids"], []
    if grouped or not is_demo:
        for r, A in zip(prompt.rollouts, advantages):  # in a group, the last A is left over
            members.append(Sequence(ids, r.ids, False, q, A, weight, r.logp))
    if grouped or is_demo:
        demo_ids = prompt.problem["demo_ids"]
        members.append(Sequence(ids, demo_ids, True, q, advantages[-1], weight))
    return members


def plan_micro_batches(sequences: list[Sequence], ranks: int, budget: int) -> list[list[list]]:
    """For each rank its micro-batches, which are lists of sequences.

    FSDP's ranks move together, pass by pass: so all have equally many micro-batches, and those of
    a pass should take equally long. Longest first, each sequence goes to the place (a rank's
    micro-batch of a pass) that has the fewest tokens so far. A micro-batch holds at most `budget`
    tokens, unless it is a single sequence. If there are more places than sequences, some ranks get
    empty lists, which `collate` turns into fillers.
    """
    longest_first = sorted(sequences, key=total_length, reverse=True)
    total = sum(min(total_length(s), budget) for s in sequences)
    passes = min(math.ceil(total / (budget * ranks)), math.ceil(len(sequences) / ranks))
    while True:  # with as many places as sequences, each has its own
        places = [[] for _ in range(passes * ranks)]
        loads = [(0, i) for i in range(len(places))]  # (tokens, place), as a heap
        for s in longest_first:
            tokens, i = loads[0]  # the least
            heapq.heapreplace(loads, (tokens + total_length(s), i))
            places[i].append(s)
        if all(tokens <= budget or len(places[i]) == 1 for tokens, i in loads):
            return [places[rank::ranks] for rank in range(ranks)]
        passes += 1


def total_length(s: Sequence) -> int:
    """Tokens of prompt and response."""
    return len(s.prompt_ids) + len(s.response_ids)


def has_signal(s: Sequence, row: str, entropy_coef: float) -> bool:
    """Whether a sequence can contribute to the gradient.

    The loss is proportional to A. So a sequence with A = 0 need not be computed, unless it feeds
    the entropy bonus, or its A is still a reward, which the critic turns into advantages.
    """
    in_bonus = entropy_coef > 0 and TABLE[row].data == "rollout"
    return s.advantage != 0 or in_bonus or TABLE[row].critic


@dataclasses.dataclass
class MicroBatch:
    """B sequences of one row of the table that go through the model together.

    They stand one after the other without padding: T tokens of prompts and responses, of which the
    M response tokens are trained on. policy(ids, response_mask, lengths, with_entropy) returns two
    tensors (M,) in the same order: the log-probabilities of the response tokens, and their
    entropies, or None without with_entropy.
    """

    row: str  # its name
    ids: Tensor  # (1, T) int64
    response_mask: Tensor  # (1, T) bool, marks the M tokens to train on
    prompt_indices: list[int]  # (B,) the prompt_index of each sequence; empty in a filler
    lengths: list[int]  # (B,) tokens of each sequence
    response_lengths: list[int]  # (B,) response tokens of each sequence
    seq: Tensor  # (1, M) int64, which sequence a token belongs to, 0 .. B-1
    advantage: Tensor  # (1, M)
    weight: Tensor  # (1, M)
    # These are (1, M), and None for demonstrations.
    sampler_logp: Tensor | None = None  # log-probabilities as the sampler reported them
    old_logp: Tensor | None = None  # log pi_old; `old_policy_pass` or `accumulate_gradient` sets it
    # `value_pass` of PPO sets these two, and replaces the advantage by GAE.
    value: Tensor | None = None  # of the critic, before the update
    returns: Tensor | None = None  # what the critic fits

    @property
    def is_filler(self) -> bool:
        """Whether it is a filler, a sequence of weight 0, for a rank that has no sequence left."""
        return not self.prompt_indices

    @property
    def is_rollouts(self) -> bool:
        """Whether its row trains on rollouts."""
        return TABLE[self.row].data == "rollout"

    def only(self, q: int | None) -> "MicroBatch":
        """The part that belongs to prompt q, for the probe; a filler if q is None or not there."""
        kept = [i for i, index in enumerate(self.prompt_indices) if index == q]
        if not kept:
            return collate(self.row, [], self.ids.device)
        is_kept = torch.tensor([i in kept for i in range(len(self.lengths))])  # (B,)
        keep = repeat_per_token(is_kept, self.lengths, self.ids.device)[0]  # (T,)
        keep_response = keep[self.response_mask[0]]  # (M,)
        packed = ("advantage", "weight", "sampler_logp", "old_logp", "value", "returns")
        cut = {name: getattr(self, name) for name in packed}
        lengths = [self.response_lengths[i] for i in kept]
        return dataclasses.replace(
            self,
            ids=self.ids[:, keep],
            response_mask=self.response_mask[:, keep],
            prompt_indices=[q] * len(kept),
            lengths=[self.lengths[i] for i in kept],
            response_lengths=lengths,
            seq=repeat_per_token(torch.arange(len(kept)), lengths, self.ids.device),
            **{name: x if x is None else x[:, keep_response] for name, x in cut.items()},
        )


def collate(row: str, sequences: list[Sequence], device) -> MicroBatch:
    """A MicroBatch of the sequences; without any, a filler: two tokens, of weight 0."""
    batch = sequences or [Sequence([0], [0], True, 0, 0.0)]
    ids, mask = [], []
    for s in batch:
        ids += [*s.prompt_ids, *s.response_ids]
        mask += [False] * len(s.prompt_ids) + [True] * len(s.response_ids)
    response_lengths = [len(s.response_ids) for s in batch]

    per_token = functools.partial(repeat_per_token, lengths=response_lengths, device=device)
    sampler_logp = None
    if batch[0].sampler_logp is not None:
        sampler_logp = torch.tensor([[logp for s in batch for logp in s.sampler_logp]])
    return MicroBatch(
        row=row,
        ids=torch.tensor([ids], device=device),
        response_mask=torch.tensor([mask], device=device),
        prompt_indices=[s.prompt_index for s in sequences],
        lengths=[total_length(s) for s in batch],
        response_lengths=response_lengths,
        seq=per_token(torch.arange(len(batch))),
        advantage=per_token(torch.tensor([s.advantage for s in batch])),
        weight=per_token(torch.tensor([s.weight for s in batch])),
        sampler_logp=None if sampler_logp is None else sampler_logp.to(device),
    )


def repeat_per_token(values: Tensor, lengths: list[int], device) -> Tensor:
    """(1, sum of lengths): each of the B values, repeated for the tokens of its sequence."""
    return values.repeat_interleave(torch.tensor(lengths))[None].to(device)


def build_micro_batches(
    prompts: list[Prompt], method: Method, args, device, counts, can_pack: bool = True
) -> list[MicroBatch]:
    """This rank's micro-batches of a mini-batch of prompts, row by row.

    Every rank computes the plan of all ranks: so they agree on the number of micro-batches without
    having to communicate. There may be none, if no sequence has a signal.

    can_pack: as model.Network has it. Else each sequence is a micro-batch of its own.
    """
    by_row = build_sequences(prompts, method, args.sft_coef, args.max_response_tokens)
    budget = args.tokens_per_microbatch if can_pack else 1
    micro_batches = []
    for row, sequences in by_row.items():
        computed = [s for s in sequences if has_signal(s, row, args.entropy_coef)]
        counts.sequences += len(sequences)
        counts.computed_sequences += len(computed)
        plans = plan_micro_batches(computed, distributed.world_size(), budget)
        for planned in plans[distributed.rank()]:
            micro_batches.append(collate(row, planned, device))
    return micro_batches


# ----------------------------------------------------------------------- part 5: the update


@torch.no_grad()
def value_pass(critic, minibatches: list[list[MicroBatch]], args, counts) -> None:
    """PPO: the critic's values before the first update, the returns, and the whitened GAE."""
    rollout_batches = [m for micro_batches in minibatches for m in micro_batches]
    for m in terminal.each("values", rollout_batches):
        value = critic(m.ids, m.response_mask, m.lengths)[None]  # (1, M)
        if m.is_filler:  # it ran all the same: FSDP's ranks call the model equally often
            continue
        m.advantage = packed_gae(m, value, args.gae_gamma, args.gae_lambda)
        m.value, m.returns = value, m.advantage + value
        counts.add_returns(m.returns)
    counts.advantage_variance = whiten(rollout_batches)


@torch.no_grad()
def old_policy_pass(policy, later: list[list[MicroBatch]], args, counts) -> None:
    """Compute log pi_old for the mini-batches after the first, with the weights before any update.

    The first mini-batch needs no such pass: its own forward pass gives the same. Nor does a row
    without pi_old, unless --pi-old tis weighs its advantages, or one whose pi_old is the sampler's.
    """
    rollout_batches = [m for micro_batches in later for m in micro_batches if m.is_rollouts]
    for m in terminal.each("pi_old", rollout_batches):
        is_trainers = args.pi_old == "trainer" and TABLE[m.row].needs_old_logp
        if not (is_trainers or args.pi_old == "tis"):
            m.old_logp = m.sampler_logp  # where no component has pi_old, only a metric reads it
            continue
        logp, _ = policy(m.ids, m.response_mask, m.lengths)  # (M,)
        if not m.is_filler:  # it ran all the same: FSDP's ranks call the model equally often
            set_old_policy(m, logp[None], args, counts)


def set_old_policy(m: MicroBatch, logp: Tensor, args, counts) -> None:
    """Set log pi_old from logp (1, M), the trainer's with the weights before the first update.

    By default log pi_old is the trainer's, as in the authors' code, not the sampler's. PPO's
    whitening comes before, so that importance weights are not whitened.
    """
    m.old_logp, importance = PI_OLD[args.pi_old](logp, m.sampler_logp, args.tis_cap)
    m.advantage = m.advantage * importance
    counts.add_mismatch(logp, m.sampler_logp)


def packed_gae(m: MicroBatch, value: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE of packed sequences whose reward comes with the last token: value and result (1, M)."""
    lengths = torch.tensor(m.response_lengths, device=value.device)  # (B,)
    values = pad_sequence(value[0].split(m.response_lengths), batch_first=True)  # (B, T)
    valid = torch.arange(values.shape[1], device=value.device) < lengths[:, None]  # (B, T)
    rewards = torch.zeros_like(values)
    reward_per_sequence = m.advantage[0, lengths.cumsum(0) - 1]  # (B,)
    rewards[torch.arange(len(lengths)), lengths - 1] = reward_per_sequence.to(values.dtype)
    return gae(rewards, values, valid, gamma, lam)[valid][None]


def whiten(micro_batches: list[MicroBatch]) -> float:
    """PPO: subtract the mean from the advantages and divide them by their standard deviation.

    Mean and deviation are over all tokens of the step, on all ranks. Returns the variance.
    """
    device = micro_batches[0].advantage.device
    moments = torch.zeros(3, dtype=torch.double, device=device)  # tokens, sum of A, sum of A^2
    for m in micro_batches:
        if not m.is_filler:
            A = m.advantage.double()
            moments += torch.stack([torch.ones_like(A).sum(), A.sum(), A.square().sum()])
    dist.all_reduce(moments)
    tokens, total, squares = moments.tolist()
    mean = total / tokens
    std = math.sqrt(max(squares / tokens - mean**2, 0.0))
    for m in micro_batches:
        if not m.is_filler:
            m.advantage = (m.advantage - mean) / (std + 1e-8)
    return std**2


def update(policy, critic, micro_batches, updates_before: int, args, counts) -> None:
    """One optimizer step of the policy, and of PPO's critic, on one mini-batch."""
    counts.lr = warmed_up(args.lr, updates_before, args.warmup_steps)
    accumulate_gradient(policy, micro_batches, args, counts)
    counts.grad_norms.append(policy.step(counts.lr, args.max_grad_norm))
    if not math.isfinite(counts.grad_norms[-1]):
        again = functools.partial(accumulate_gradient, args=args, counts=metrics.Counts())
        counts.skipped += bad_sequences(policy, micro_batches, updates_before, again)
    if critic:
        critic_lr = warmed_up(args.critic_lr, updates_before, args.warmup_steps)
        accumulate_critic_gradient(critic, micro_batches, args.value_clip, counts)
        counts.critic_norms.append(critic.step(critic_lr, args.max_grad_norm))
        if not math.isfinite(counts.critic_norms[-1]):
            again = functools.partial(
                accumulate_critic_gradient, value_clip=args.value_clip, counts=metrics.Counts()
            )
            counts.skipped += bad_sequences(critic, micro_batches, updates_before, again)


def bad_sequences(network, micro_batches, updates_before: int, accumulate) -> list[dict]:
    """This rank's sequences of the prompts whose gradient is not finite, after a skipped update.

    If the gradient of each single prompt is finite, all sequences are returned.

    Args:
        accumulate: a function (network, micro_batches) that adds the gradient again.
    """
    bad = probe.prompts_without_finite_gradient(network, micro_batches, accumulate)
    rows = []
    for m in micro_batches:
        sequences = m.ids[0].split(m.lengths)
        for i, q in enumerate(m.prompt_indices):
            if not bad or q in bad:
                start = m.lengths[i] - m.response_lengths[i]
                rows.append(
                    {
                        "update": updates_before,
                        "network": network.name,
                        "row": m.row,
                        "prompt_ids": sequences[i][:start].tolist(),
                        "response_ids": sequences[i][start:].tolist(),
                        "advantage": m.advantage[m.seq == i].tolist()[0],
                    }
                )
    return rows


def accumulate_gradient(policy, micro_batches: list[MicroBatch], args, counts) -> None:
    """Add this rank's part of the gradient of L, and of the entropy bonus if there is one.

    L is a sum, of which each rank computes some terms. FSDP averages the ranks' parts, so each part
    is multiplied by the number of ranks.
    """
    for m in terminal.each("update", micro_batches):
        row = TABLE[m.row]
        bonus = args.entropy_coef if m.is_rollouts else 0.0
        with_entropy = bonus > 0 or row.needs_entropy
        logp, entropy = policy(m.ids, m.response_mask, m.lengths, with_entropy)  # (M,) each
        logp, entropy = logp[None], None if entropy is None else entropy[None]  # (1, M)
        if m.is_filler:
            loss = 0.0 * logp.sum()  # its backward pass takes part in FSDP's exchanges
            counts.filler_tokens += m.ids.numel()
        else:
            counts.tokens += m.ids.numel()
            if m.is_rollouts and m.old_logp is None:  # the first mini-batch of the step
                set_old_policy(m, logp.detach(), args, counts)
            valid = torch.ones_like(m.seq, dtype=torch.bool)  # packed: no padding
            loss, stable = upge_loss(
                row,
                logp,
                valid,
                m.advantage,
                m.weight,
                old_logp=m.old_logp,
                seq=m.seq,
                eps=args.clip_eps,
                entropy=entropy,
            )
            if m.is_rollouts:
                counts.add_rollouts(loss, logp, m.old_logp, stable)
            else:
                counts.add_demonstrations(logp, m.response_lengths)
            if bonus:  # sum of the rollouts' entropies, with the weights of the loss
                loss = loss - bonus * (m.weight * entropy).sum()
        (loss * distributed.world_size()).backward()


def accumulate_critic_gradient(critic, micro_batches, value_clip: float, counts) -> None:
    """Add the gradient of PPO's clipped value loss. A token's w_t is that of the policy's loss.

    sum_t w_t 1/2 max( (V - ret)^2, (V_old + clip(V - V_old, -c, c) - ret)^2 ),   ret = return
    """
    rollout_batches = [m for m in micro_batches if m.is_rollouts]
    for m in terminal.each("critic", rollout_batches):
        value = critic(m.ids, m.response_mask, m.lengths)[None]  # (1, M)
        if m.is_filler:
            loss = 0.0 * value.sum()
        else:
            clipped = m.value + (value - m.value).clamp(-value_clip, value_clip)
            squared_errors = (value - m.returns).square(), (clipped - m.returns).square()
            loss = 0.5 * (m.weight * torch.maximum(*squared_errors)).sum()
            counts.value_loss += loss.item()
        (loss * distributed.world_size()).backward()


def probe_gradients(policy, prompts: list[Prompt], micro_batches, step: int, args) -> dict:
    """What common/probe.py measures in a mini-batch, if the probe is due at this step; else {}."""
    if args.probe_gradients == 0 or step % args.probe_gradients:
        return {}
    unused = metrics.Counts()  # what the probe computes is not part of the step
    accumulate = functools.partial(accumulate_gradient, args=args, counts=unused)
    counted = {"rl": sum(p.alpha > 0 for p in prompts), "sft": sum(p.beta > 0 for p in prompts)}
    return probe.probe(policy, micro_batches, accumulate, counted, len(prompts))


# ------------------------------------------------------------------ start, evaluation, checkpoints


class Inputs(NamedTuple):
    """What a run reads from files or the hub."""

    tokenizer: object
    config: object  # of the model, overrides applied
    problems: list[dict]
    left_out: str  # a sentence on the problems that do not fit
    held_out: list[dict]  # empty without --eval-data
    held_out_left_out: str
    end_token_ids: list[int]  # what ends a response, the tokenizer's own first


def load_inputs(args, method: Method) -> Inputs:
    """Read and check config, tokenizer and data. Bad input ends in a SystemExit of one sentence."""
    rollout.check_vllm()
    config, tokenizer = data.load_config_and_tokenizer(
        args.model, args.rope_theta, args.max_position_embeddings, args.trust_remote_code
    )
    data.check_context(config, args.max_prompt_tokens, args.max_response_tokens)
    if needs_critic(method):
        model.check_critic(config, args.critic)
    problems, left_out = data.load_fitting_problems(
        args, args.data, tokenizer, need_demonstration=bool(method.demonstration)
    )
    held_out, held_out_left_out = [], ""
    if args.eval_data:
        held_out, held_out_left_out = data.load_fitting_problems(
            args, args.eval_data, tokenizer, flag="--eval-data"
        )
    data.check_vocabulary(args.model, config, tokenizer, problems + held_out)
    data.check_weights(args.model, config, args.trust_remote_code)
    end_token_ids = data.end_token_ids(args.model, config, tokenizer)
    return Inputs(tokenizer, config, problems, left_out, held_out, held_out_left_out, end_token_ids)


def needs_critic(method: Method) -> bool:
    """Whether the method's advantages come from a critic (PPO)."""
    return method.rollouts is not None and TABLE[method.rollouts].critic


def start(args, method: Method, inputs: Inputs, memory: plan.MemoryPlan):
    """Build (device, sampler, policy, critic or None); the sampler sleeps.

    The order matters on a GPU: vLLM measures the free memory when it starts, so it comes before the
    trainer takes any. (The verifier's processes are older than both, so they hold no CUDA context.)
    """
    terminal.begin_phase("process group")
    device = distributed.init_process_group()
    terminal.begin_phase("sampler (vLLM)")
    sampler = rollout.Sampler(
        args.model,
        max_prompt_tokens=args.max_prompt_tokens,
        max_response_tokens=args.max_response_tokens,
        temperature=args.temperature,
        config_overrides=data.overrides_of(args),
        tensor_parallel=args.tensor_parallel,
        end_token_ids=inputs.end_token_ids,
        gpu_memory_utilization=args.gpu_memory_utilization or memory.utilization,
        max_num_seqs=memory.concurrent,
        trust_remote_code=args.trust_remote_code,
        seed=args.seed,
    )
    sampler.sleep()
    terminal.begin_phase("policy under FSDP")
    policy = model.build_policy(args, inputs.config, device)
    critic = None
    if needs_critic(method):
        terminal.begin_phase("critic under FSDP")
        critic = model.build_critic(args, inputs.config, device)
    terminal.end_phase()
    return device, sampler, policy, critic


def print_plan(args, method: Method, inputs: Inputs, policy, memory, out: Path) -> None:
    """Say what is about to happen, on rank 0."""
    report.print_plan(
        args,
        out,
        parameters=policy.num_parameters(),
        memory=memory.lines(),
        tokenizer=inputs.tokenizer,
        problems=inputs.problems,
        left_out=inputs.left_out,
        held_out=inputs.held_out,
        held_out_left_out=inputs.held_out_left_out,
        n=rollouts_per_prompt(args),
    )


def start_table(args, inputs: Inputs) -> StepTable:
    """The table of steps, which estimates the time that is left from now on."""
    evaluated = set()
    if inputs.held_out:
        steps = range(1, args.steps + 1)
        evaluated = {step for step in steps if is_due(step, args.eval_every, args.steps)}
    return StepTable(args.steps, evaluated)


def measure_step(step, prompts: list[Prompt], method: Method, counts, clock, policy) -> dict:
    """The step's line of metrics.jsonl, from the counts of all ranks."""
    total = counts.total()
    return metrics.step_metrics(
        step, prompts, method.combine, total, clock.times, policy.num_parameters()
    )


def evaluate_held_out(step: int, inputs: Inputs, sampler, verifier, args, out: Path) -> dict:
    """Sample and grade the held-out problems; {} if there are none. Appends to held_out.jsonl."""
    if not inputs.held_out:
        return {}
    with terminal.progress("held-out problems"):  # what other ranks do when this one is done
        results = evaluate.measure(
            sampler,
            verifier,
            inputs.held_out,
            samples=args.eval_samples,
            seed=args.seed,
            label="held-out problems",
        )
    if distributed.rank() == 0:
        report.write_results(out / "held_out.jsonl", results, step=step)
    return report.held_out_metrics(results)


def open_run(args, inputs: Inputs, policy, critic) -> tuple[Path, int]:
    """Make the run's directory, or load the newest checkpoint in it: (directory, steps done)."""
    out = report.open_run(args)
    networks = [policy, critic] if critic else [policy]
    step_done = 0
    if args.resume:
        with terminal.progress("reading the checkpoint"):
            step_done = checkpoint.resume(out, networks, inputs, args.steps)
    seed_dropout(args.seed, step_done)
    report.begin_copies(out, args)
    interrupt.listen()
    return out, step_done


def end_step(out: Path, step: int, counts, args, policy, critic, inputs: Inputs) -> None:
    """Save a checkpoint if one is due, or if the run is told to stop; then stop it.

    Raises:
        SystemExit: the run is told to stop, or more than --max-skipped optimizer steps in a row
            were skipped.
    """
    networks = [policy, critic] if critic else [policy]
    if not all(map(math.isfinite, counts.grad_norms + counts.critic_norms)):
        report.log_skipped(out, step, counts.skipped, inputs.tokenizer)
    for network in networks:
        network.check_skipped(args.max_skipped)
    signal = interrupt.asked()
    if signal or is_due(step, args.save_every, args.steps):
        save_checkpoint(out, step, args, policy, critic, inputs)
    if signal and step < args.steps:
        interrupt.stop(signal, checkpoint.directory_of(out, step, args.steps), out)
    seed_dropout(args.seed, step)


def seed_dropout(seed: int, step_done: int) -> None:
    """Let the next step draw the same random numbers whether or not the run was resumed.

    Nothing but a model's dropout uses torch's own generator.
    """
    torch.manual_seed(distributed.derive_seed(seed, "dropout", step_done))


def save_checkpoint(out: Path, step: int, args, policy, critic, inputs: Inputs) -> None:
    """Write final/ or step_N/, a plain Hugging Face directory; PPO's critic goes to its critic/.

    Raises:
        SystemExit: training is over, and no optimizer step was ever taken.
    """
    networks = [policy, critic] if critic else [policy]
    if step == args.steps:
        for network in networks:
            network.check_updated()
    directory = checkpoint.directory_of(out, step, args.steps)
    with terminal.progress(f"saving {directory.name}"):
        checkpoint.save(directory, step, networks, inputs, args.keep)


if __name__ == "__main__":
    with distributed.one_failure_message(), terminal.closing():
        if ARGS.plan is None:
            main(ARGS)
        else:
            plan.show(ARGS, needs_critic(METHODS[ARGS.method]))
