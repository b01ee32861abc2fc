"""Hybrid Post-Training (HPT, arXiv 2509.04419, Algorithm 1) and the methods it is compared with.

    torchrun train_hpt.py                                      a toy, on any machine, in minutes
    torchrun --nproc_per_node=8 train_hpt.py @recipes/qwen2.5-math-7b.args

A step does the following; `main` has the same numbers:

    1. Draw prompts; sample n rollouts of each with the current policy (vLLM).
    2. Grade the rollouts: the reward is 1 if the answer is right, else 0.
    3. The gate. P is the mean reward of a prompt's rollouts. If P > gamma, train on the rollouts
       (alpha = 1, beta = 0), else on the prompt's demonstration (alpha = 0, beta = 1).
    4. Deal the prompts into mini-batches, one per update. Give each sequence its advantage and its
       weight in the loss of its mini-batch of N prompts,

           L = (1/N) sum_q [ alpha_q L_RL(q) + c_sft beta_q L_SFT(q) ]

       Cut the sequences into micro-batches: what goes through the model together on one rank.
    5. Compute log pi_old, with the policy before the first update of the step. Then update the
       policy (FSDP) once per mini-batch, with the gradient of L, clipped to --max-grad-norm, and
       AdamW with weight decay. Every log-probability, also that of a demonstration, is one of
       softmax(logits / T), with T the temperature of the sampler: the policy divides by T.
    6. Give the new weights to the sampler. Write metrics, evaluate, save.

L_RL and L_SFT are rows of the table in upge.py, the ones that METHODS gives to --method. A step is
a rollout step; an update is a step of the optimizer. Every rank runs `main`. Everything random
depends on the seed, the step and the place of a prompt in the step, never on the rank.
"""

import common  # noqa: F401 (it quiets other libraries, so it comes before them)

# isort: split
import functools
import importlib
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import evaluate
import reward
import rollout
from common import checkpoint, data, distributed, flags, metrics, model, plan, probe, report
from common.batches import MicroBatch, Sequence, build_micro_batches
from common.closing import closing_report
from common.critic import accumulate_value_gradient, value_pass
from upge import METHODS, TABLE, Method, Row, hpt_gate, upge_loss


def main(args) -> None:
    """Train as the docstring of this file says. Every rank calls it."""
    method, gate = METHODS[args.method], load_gate(args)
    inputs = load_inputs(args, method)  # bad models and data fail here, before slow starts
    with reward.Verifier(function=args.reward) as verifier:
        device, sampler, policy, critic = start(args, method, inputs)  # in this order: see there
        out, steps_done = open_run(args, method, inputs, policy, critic)
        # A budget of 1 token leaves each sequence alone, for models that cannot take several.
        budget = args.tokens_per_microbatch if policy.can_pack else 1
        sampler.load(policy.weights())  # wakes the sampler, which `start` has put to sleep
        if inputs.held_out and steps_done == 0:
            measured = evaluate_held_out(0, inputs, sampler, verifier, args, out)
            report.log(out, {"step": 0} | measured, args.steps)

        for step in range(steps_done + 1, args.steps + 1):
            clock, counts = metrics.Clock(), metrics.Counts()

            # 1. Draw prompts, sample rollouts. Then the sampler sleeps and the trainer has the GPU.
            problems = draw(inputs.problems, step, args.prompts_per_step, args.seed)
            rollouts = sample_rollouts(sampler, problems, step, method, args)
            sampler.sleep()
            clock.lap("rollout")

            # 2. Grade the rollouts, and the demonstrations if their reward is used.
            rewards, demo_rewards = grade(verifier, problems, rollouts, method, counts)
            clock.lap("reward")

            # 3. The gate: alpha weighs a prompt's rollouts, beta its demonstration.
            alpha, beta = apply_gate(gate, rewards, step, method)
            prompts = list(map(Prompt, problems, rollouts, rewards, demo_rewards, alpha, beta))

            # 4. Deal the prompts into mini-batches. All ranks compute all weights; then each takes
            # its micro-batches. What has A = 0 is left out, and a rank that has fewer micro-batches
            # than another gets fillers of weight 0, since FSDP's ranks must move together.
            dealt = split_prompts(prompts, args.minibatches_per_step, args.seed, step)
            minibatches = []
            for batch in dealt:
                by_row = build_sequences(batch, method, args.sft_coef, args.max_response_tokens)
                mine = build_micro_batches(by_row, budget, args.entropy_coef, device, counts)
                minibatches.append(mine)

            # 5. Compute what the policy before the first update is needed for; then update.
            if critic:
                value_pass(critic, minibatches, args.gae_gamma, args.gae_lambda, counts)
            old_policy_pass(policy, minibatches[1:], args, counts)
            probed = probe_gradients(policy, dealt[0], minibatches[0], step, args)
            for i, micro_batches in enumerate(minibatches):
                updates_before = (step - 1) * args.minibatches_per_step + i
                update(policy, critic, micro_batches, updates_before, args, counts)
            clock.lap("train")

            # 6. The sampler wakes with the new weights. Metrics, evaluation, checkpoint.
            sampler.load(policy.weights())
            clock.lap("sync")
            measured = metrics.step_metrics(
                step, prompts, method.combine, counts.total(), clock.times, policy.num_parameters()
            )
            if inputs.held_out and is_due(step, args.eval_every, args.steps):
                measured |= evaluate_held_out(step, inputs, sampler, verifier, args, out)
            report.log(out, measured | probed, args.steps)
            report.log_samples(out, step, prompts)
            if method.combine == "gate":
                report.log_gate(out, step, prompts)
            save_if_due(out, step, args, inputs, policy, critic)
        sampler.close()
    closing_report(out, args)


def is_due(step: int, every: int, last_step: int) -> bool:
    """True at the last step, and at every multiple of `every` if that is not 0."""
    return step == last_step or (every > 0 and step % every == 0)


# ------------------------------------------------------------------------ parts 1, 2 and 3: prompts


class Prompt(NamedTuple):
    """A problem of the step, and what came of it."""

    problem: dict  # as common/data.py loads it, with "prompt_ids" and, if needed, "demo_ids"
    rollouts: list[rollout.Rollout]
    rewards: list[float]  # one per rollout
    demo_reward: float
    alpha: float  # weight of its rollouts in the loss
    beta: float  # weight of its demonstration


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


def rollouts_per_prompt(method: Method, samples_per_prompt: int) -> int:
    """--samples-per-prompt, less one if the demonstration joins the group; 0 without rollouts."""
    if method.rollouts is None:
        return 0
    return samples_per_prompt - (method.combine == "group")


def sample_rollouts(sampler, problems: list, step: int, method: Method, args) -> list[list]:
    """The rollouts of each problem. Each engine samples a share; every rank gets all of them."""
    n = rollouts_per_prompt(method, args.samples_per_prompt)
    if n == 0:
        return [[] for _ in problems]
    seeds = [distributed.derive_seed(args.seed, step, i) for i in range(len(problems))]
    requests = [(p["prompt_ids"], seed) for p, seed in zip(problems, seeds)]
    sample = functools.partial(sample_share, sampler, n)
    return distributed.share_work(requests, sample, sampler.tensor_parallel)


def sample_share(sampler, n: int, requests: list[tuple]) -> list[list[rollout.Rollout]]:
    """This rank's share: n rollouts for each (prompt ids, seed)."""
    prompts, seeds = [ids for ids, _ in requests], [seed for _, seed in requests]
    return sampler.generate(prompts, seeds, n)


def grade(verifier, problems: list, rollouts: list, method: Method, counts) -> tuple[list, list]:
    """(rewards per problem and rollout, reward per demonstration), each from 0 to 1.

    Each rank grades a share; every rank gets all rewards. A demonstration is graded only if a row
    of the method computes an advantage from its reward; else its reward is 1.
    """
    reward_used = any(TABLE[name].advantage != "1" for name in method.demonstration)
    n = len(rollouts[0])
    pairs = [(r.text, p["answer"]) for p, group in zip(problems, rollouts) for r in group]
    if reward_used:
        pairs += [(p["demonstration"], p["answer"]) for p in problems]
    timeouts_before = verifier.timeouts
    scores = distributed.share_work(pairs, functools.partial(evaluate.grade_share, verifier))
    counts.timeouts += verifier.timeouts - timeouts_before
    rewards = [scores[i * n : (i + 1) * n] for i in range(len(problems))]
    demo_rewards = scores[len(problems) * n :] if reward_used else [1.0] * len(problems)
    return rewards, demo_rewards


def load_gate(args):
    """The gate: a function (rewards, step) -> (alpha, beta), that of --gate, or else HPT's.

    rewards is float64, a line of n per prompt of the step; alpha and beta have a number per prompt.

    Raises:
        SystemExit: it cannot be imported.
    """
    if not args.gate:
        return lambda rewards, step: hpt_gate(rewards, args.gamma)
    sys.path.append(os.getcwd())
    module, _, name = args.gate.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module of the user's may raise
        why = f"{type(error).__name__}: {error}"
        raise SystemExit(f"error: --gate {args.gate} cannot be loaded: {why}") from error


def apply_gate(gate, rewards: list, step: int, method: Method) -> tuple[list, list]:
    """(alpha, beta), one of each per prompt.

    Without a gate, alpha is 1 if the method trains on rollouts, and beta is 1 if it trains on
    demonstrations; else they are 0.
    """
    if method.combine != "gate":
        has_rollouts, has_demonstration = method.rollouts is not None, bool(method.demonstration)
        return [float(has_rollouts)] * len(rewards), [float(has_demonstration)] * len(rewards)
    try:
        found = gate(torch.tensor(rewards, dtype=torch.double), step)
        alpha, beta = (torch.as_tensor(x, dtype=torch.double) for x in found)
    except Exception as error:  # whatever a function of the user's may raise
        raise SystemExit(f"error: --gate: {type(error).__name__}: {error}") from error
    for x in (alpha, beta):
        if x.shape != (len(rewards),) or not x.isfinite().all():
            raise SystemExit("error: --gate must give alpha and beta, a number each per prompt")
    return alpha.tolist(), beta.tolist()


# -------------------------------------------------------------------------------- part 4: sequences


def split_prompts(prompts: list, minibatches: int, seed: int, step: int) -> list[list]:
    """The prompts of a step, shuffled and dealt into mini-batches; some may hold one prompt more.

    Their number does not depend on the gate. A mini-batch may hold prompts that train on their
    rollouts and prompts that train on their demonstration.
    """
    order = distributed.shuffled(len(prompts), seed, "mini-batches", step)
    return [[prompts[q] for q in order[i::minibatches]] for i in range(minibatches)]


def build_sequences(
    prompts: list[Prompt], method: Method, c_sft: float, l_max: int
) -> dict[str, list[Sequence]]:
    """{row of the table: its sequences} of one mini-batch, with every advantage and weight.

        L = (1/N) sum_q [ alpha_q L_RL(q) + c_sft beta_q L_SFT(q) ]

    The weight contains alpha or beta, c_sft and the row's normaliser, which has 1/N in it (or, in
    a row with 1/all tokens, the tokens of all sequences that are trained on). Nothing is divided
    later, so cutting the mini-batch into micro-batches and ranks only splits a sum.
    """
    by_row = {}
    for name in filter(None, (method.rollouts, *method.demonstration)):
        row, members = TABLE[name], []  # members of the groups, which the normaliser counts
        for q, prompt in enumerate(prompts):
            coefficient = prompt.alpha
            if row.data == "demo":
                n = len(prompt.rollouts)
                factor = {"1": 1.0, "c_sft": c_sft, "1/n": 1 / max(1, n)}
                coefficient = factor[method.demonstration[name]] * prompt.beta
            if coefficient:
                together = method.combine == "group"
                members += group_of(prompt, q, row, together, coefficient)
        if members:  # so far, their weight is a coefficient; the normaliser completes it
            lengths = torch.tensor([len(s.response_ids) for s in members])  # (B,)
            indices = torch.tensor([s.prompt for s in members])  # (B,)
            weights = row.weights(lengths, indices, len(prompts), l_max).tolist()
            members = [s._replace(weight=s.weight * w) for s, w in zip(members, weights)]
        by_row[name] = [s for s in members if s.is_demo == (row.data == "demo")]
    return by_row


def group_of(
    prompt: Prompt, q: int, row: Row, together: bool, coefficient: float
) -> list[Sequence]:
    """The group of prompt q, with its advantages; as yet the weight is a coefficient.

    together: the rollouts and the demonstration form one group, as in LUFFY. A row trains on one of
    the two kinds of members; advantages and normaliser are over all of them.
    """
    ids = prompt.problem["prompt_ids"]
    group, rewards = [], []
    if together or row.data == "rollout":
        group += [Sequence(ids, r.ids, False, q, 0.0, coefficient, r.logp) for r in prompt.rollouts]
        rewards += prompt.rewards
    if together or row.data == "demo":
        group.append(Sequence(ids, prompt.problem["demo_ids"], True, q, 0.0, coefficient))
        rewards.append(prompt.demo_reward)
    A = row.advantages(torch.tensor([rewards], dtype=torch.double))[0].tolist()  # (G,)
    return [s._replace(advantage=a) for s, a in zip(group, A)]


# ------------------------------------------------------------------------------- part 5: the update


@torch.no_grad()
def old_policy_pass(policy, later: list[list[MicroBatch]], args, counts) -> None:
    """Compute log pi_old for the mini-batches after the first, with the policy before any update.

    The first mini-batch needs no such pass: its own forward pass gives the same. Nor is one needed
    where pi_old is the sampler's, or where no formula of the row has pi_old.
    """
    rollout_batches = [m for micro_batches in later for m in micro_batches if m.is_rollouts]
    for m in distributed.progress(rollout_batches, "pi_old"):
        row_has_old = m.row.stable != "1" or m.row.pi_ref not in ("1", "pi_theta")
        if args.pi_old == "sampler" or (args.pi_old == "trainer" and not row_has_old):
            m.old_logp = m.sampler_logp  # if the row has no pi_old, only policy/approx_kl reads it
            continue
        logp, _ = policy(m.ids, m.is_response, m.lengths)  # (M,)
        if not m.is_filler:  # a filler ran all the same, since FSDP's ranks move together
            set_old_policy(m, logp, args.pi_old, counts)


def set_old_policy(m: MicroBatch, logp: torch.Tensor, pi_old: str, counts) -> None:
    """Set log pi_old from logp (M,), the trainer's with the policy before the first update.

    pi_old, the flag, says whose log-probabilities log pi_old is:
        "trainer"  the trainer's, as in the authors' code
        "sampler"  those that the sampler reported
        "tis"      the trainer's, and A is multiplied by the truncated importance weight
                   min(pi_trainer/pi_sampler, 2), which PPO's whitening (`value_pass`) precedes
    """
    m.old_logp = m.sampler_logp if pi_old == "sampler" else logp
    if pi_old == "tis":
        m.advantage = m.advantage * (logp - m.sampler_logp).exp().clamp(max=2.0)
    counts.add_mismatch(logp, m.sampler_logp)


def update(policy, critic, micro_batches, updates_before: int, args, counts) -> None:
    """One optimizer step of the policy, and of PPO's critic, on one mini-batch.

    If nothing in the mini-batch has a signal, the gradient is 0, and AdamW still moves the weights
    by its momentum and its weight decay.
    """
    factor = lr_factor(updates_before, args)
    counts.lr = args.lr * factor
    accumulate_gradient(policy, micro_batches, args, counts)
    counts.grad_norms.append(policy.step(counts.lr, args.max_grad_norm))
    if critic:
        rollout_batches = [m for m in micro_batches if m.is_rollouts]
        accumulate_value_gradient(critic, rollout_batches, counts)
        norm = critic.step(args.critic_lr * factor, args.max_grad_norm)
        counts.critic_norms.append(norm)


def lr_factor(updates_before: int, args) -> float:
    """What the learning rate is multiplied by in an update, of which there were so many before.

    It rises linearly over the warm-up to 1. Then it stays there, or with --lr-schedule cosine it
    falls along half a cosine to 0.1, which it has in the last update.
    """
    warmup = max(1, args.warmup_steps)
    update = updates_before + 1  # updates count from 1
    if update <= warmup:
        return update / warmup
    if args.lr_schedule == "constant":
        return 1.0
    progress = (update - warmup) / (args.steps * args.minibatches_per_step - warmup)  # up to 1
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def accumulate_gradient(policy, micro_batches: list[MicroBatch], args, counts) -> None:
    """Add this rank's part of the gradient of L, and of the entropy bonus if there is one.

    L is a sum, of which each rank computes some terms. FSDP averages the ranks' parts, so each part
    is multiplied by the number of ranks. In the first mini-batch of a step, log pi_old comes from
    the pass that is made here anyway.
    """
    eps = None if args.clip_eps is None else (args.clip_eps, args.clip_eps)
    for m in distributed.progress(micro_batches, "update"):
        bonus = args.entropy_coef if m.is_rollouts else 0.0
        with_entropy = bonus > 0 or "H" in m.row.scale
        logp, entropy = policy(m.ids, m.is_response, m.lengths, with_entropy)  # (M,), (M,) or None
        if m.is_filler:
            loss = 0.0 * logp.sum()  # its backward pass takes part in FSDP's exchanges
            counts.filler_tokens += m.ids.numel()
        else:
            counts.tokens += m.ids.numel()
            if m.is_rollouts and m.old_logp is None:  # the first mini-batch of the step
                set_old_policy(m, logp.detach(), args.pi_old, counts)
            loss, stable = upge_loss(
                m.row, logp, m.seq, m.advantage, m.weight, m.old_logp, entropy, eps
            )
            if m.is_rollouts:
                counts.add_rollouts(loss, logp, m.old_logp, stable)
            else:
                counts.add_demonstrations(logp, m.response_lengths)
            if bonus:  # sum of the rollouts' entropies, with the weights of the loss
                loss = loss - bonus * (m.weight * entropy).sum()
        (loss * distributed.world_size()).backward()


def probe_gradients(policy, prompts: list[Prompt], micro_batches, step: int, args) -> dict:
    """What common/probe.py measures in a mini-batch, if the probe is due at this step; else {}."""
    if args.probe_gradients == 0 or step % args.probe_gradients:
        return {}
    unused = metrics.Counts()  # the probe computes copies of micro-batches, beside the step
    accumulate = functools.partial(accumulate_gradient, args=args, counts=unused)
    counted = {"rl": sum(p.alpha > 0 for p in prompts), "sft": sum(p.beta > 0 for p in prompts)}
    return probe.probe(policy, micro_batches, accumulate, counted, len(prompts))


# ------------------------------------------------------------------- start, evaluation, checkpoints


class Inputs(NamedTuple):
    """What a run reads from files or the hub."""

    tokenizer: object
    config: object  # of the model, overrides applied
    problems: list[dict]
    left_out: str  # a sentence on the problems that do not fit
    held_out: list[dict]  # empty without --eval-data
    end_token_ids: list[int]  # what ends a response, the tokenizer's own first


def load_inputs(args, method: Method) -> Inputs:
    """Read and check config, tokenizer and data. Bad input ends in a SystemExit of one sentence."""
    if args.sampler == "vllm":
        rollout.check_vllm()
    config, tokenizer = model.load_config_and_tokenizer(args)
    model.check_context(config, args.max_prompt_tokens, args.max_response_tokens)
    limits = args.max_prompt_tokens, args.max_response_tokens
    has_demonstration = bool(method.demonstration)
    problems, left_out = data.load_problems(args, args.data, tokenizer, has_demonstration, *limits)
    held_out = []
    if args.eval_data:
        held_out, note = data.load_problems(args, args.eval_data, tokenizer, False, *limits)
        left_out += f"; held out: {note}"
    end_token_ids = model.end_token_ids(args.model, config, tokenizer)
    return Inputs(tokenizer, config, problems, left_out, held_out, end_token_ids)


def has_critic(method: Method) -> bool:
    """Whether the method's advantages come from a critic (PPO)."""
    return method.rollouts is not None and TABLE[method.rollouts].advantage == "GAE(R)"


def start(args, method: Method, inputs: Inputs):
    """Build (device, sampler, policy, critic or None); the sampler sleeps.

    The order matters on a GPU: vLLM measures the free memory when it starts, so it comes before the
    trainer takes any.
    """
    memory = plan.memory_plan(args, inputs.config, has_critic(method))
    device = distributed.init_process_group()
    sampler = rollout.build(
        args,
        max_prompt_tokens=args.max_prompt_tokens,
        end_token_ids=inputs.end_token_ids,
        config_overrides=model.overrides_of(args),
        gpu_memory_utilization=memory.utilization,
        max_num_seqs=memory.concurrent,
    )
    sampler.sleep()
    policy = model.build_policy(args, inputs.config, device, memory.checkpointing)
    critic = None
    if has_critic(method):
        critic = model.build_critic(args, inputs.config, device, memory.checkpointing)
    return device, sampler, policy, critic


def open_run(args, method: Method, inputs: Inputs, policy, critic) -> tuple[Path, int]:
    """Make the run's directory, or load the newest checkpoint in it: (directory, steps done)."""
    out = report.open_run(args)
    checkpoint.try_to_save(out, policy, inputs.tokenizer, inputs.end_token_ids)
    steps_done = 0
    if args.resume:
        networks = [policy, critic] if critic else [policy]
        steps_done = checkpoint.resume(out, networks, args.steps)
    memory = plan.memory_plan(args, inputs.config, has_critic(method))
    report.print_plan(
        args,
        out,
        parameters=policy.num_parameters(),
        memory_lines=memory.lines(),
        tokenizer=inputs.tokenizer,
        problems=inputs.problems,
        left_out=inputs.left_out,
        held_out=inputs.held_out,
        n=rollouts_per_prompt(method, args.samples_per_prompt),
    )
    report.begin_copies(out, args)
    distributed.listen_for_stop()
    return out, steps_done


def evaluate_held_out(step: int, inputs: Inputs, sampler, verifier, args, out: Path) -> dict:
    """Sample and grade the held-out problems; append the results to held_out.jsonl."""
    results = evaluate.measure(sampler, verifier, inputs.held_out, args.eval_samples, args.seed)
    if distributed.rank() == 0:
        report.write_results(out / "held_out.jsonl", results, step=step)
    return report.held_out_metrics(results)


def save_if_due(out: Path, step: int, args, inputs: Inputs, policy, critic) -> None:
    """Save a checkpoint if one is due, or if the run is told to stop; then stop it.

    Raises:
        SystemExit: the run was told to stop, by SIGTERM or Ctrl-C.
    """
    networks = [policy, critic] if critic else [policy]
    signal = distributed.stop_asked()
    if signal or is_due(step, args.save_every, args.steps):
        directory = checkpoint.save(
            out, step, args.steps, networks, inputs.tokenizer, inputs.end_token_ids
        )
    if signal and step < args.steps:
        if distributed.rank() == 0:
            report.say(f"stopped; {directory} is saved: add --out {out} --resume to go on")
        raise SystemExit(128 + signal)


if __name__ == "__main__":
    with distributed.one_sentence():
        ARGS = flags.parse_training_args()
        if ARGS.plan is None:
            record(main)(ARGS)
        else:
            plan.show(ARGS, has_critic(METHODS[ARGS.method]))
