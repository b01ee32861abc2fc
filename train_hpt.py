"""Hybrid Post-Training (Algorithm 1 of arXiv 2509.04419): roll out with vLLM, gate, update with FSDP, repeat.

    torchrun train_hpt.py                                        the toy, on any machine, in minutes
    torchrun --nproc_per_node=8 train_hpt.py --model Qwen/Qwen2.5-Math-7B \\
        --rope-theta 40000 --max-position-embeddings 16384       the paper's run, on eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train_hpt.py ...

Defaults are the paper's. `main` reads as the algorithm; the mathematics is in upge.py.
"""
import argparse
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

PAPER_DATA = "Elliott/Openr1-Math-46k-8192"


class Method(NamedTuple):
    """What a --method trains: rows of upge.TABLE, and how a prompt's rollouts and its demonstration meet."""
    rollout: str | None  # the row of its rollouts
    demo: tuple = ()  # the rows of its demonstration, added up
    meet: str | None = None  # "gate": alpha and beta decide; "group": the demonstration is one of the group of n


METHODS = {
    "sft":       Method(None, ("sft",)),
    "dft":       Method(None, ("dft",)),
    "reinforce": Method("reinforce"),
    "rloo":      Method("rloo"),
    "ppo":       Method("ppo"),
    "grpo":      Method("grpo"),
    "dr_grpo":   Method("dr_grpo"),
    "dapo":      Method("dapo"),
    "cispo":     Method("cispo"),
    "gspo":      Method("gspo"),
    "luffy":     Method("luffy", ("luffy_demo",), "group"),
    "srft":      Method("srft", ("srft_sft", "luffy_demo"), "group"),
    "hpt":       Method("dr_grpo", ("sft",), "gate"),
    "hpt_mix":   Method("dr_grpo", ("sft", "luffy_demo"), "gate"),  # the paper's ablation, Mix/ON: SFT and offline RL where gated
    "hpt_off":   Method("dr_grpo", ("luffy_demo",), "gate"),  # OFF/ON: offline RL instead of SFT
}


def parse_args(argv=None):
    """The flags. Imports nothing heavy: --help and mistyped flags are answered at once."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, usage="train_hpt.py [flags]; --help lists them",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument_group("model").add_argument
    flag("--model", help="Hugging Face directory or hub id of a causal LM; without it, the toy of toy.py")
    flag("--rope-theta", type=float, help="override, for trainer and sampler (paper: 40000 for Qwen2.5-Math)")
    flag("--max-position-embeddings", type=int, help="override, likewise (paper: 16384 for Qwen2.5-Math)")
    flag = parser.add_argument_group("data").add_argument
    flag("--data", default=PAPER_DATA, help=".jsonl (prompt, answer, demonstration), .parquet or hub id (%(default)s)")
    flag("--eval-data", help="held-out problems, evaluated before and after training")
    flag("--template", choices=("chat", "plain"), default="chat", help="the model's chat template, or the paper's plain "
         "text for Llama base models")
    flag("--system-prompt", help="system message of the chat; '' for none, 'data' for the data set's own (default: "
         "'Please reason step by step, and put your final answer within \\boxed{}.')")
    flag("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out (%(default)s)")
    flag("--max-response-tokens", type=int, default=8192, help="also the constant L_max of the table; demonstrations that do not fit "
         "whole are left out (%(default)s)")
    flag = parser.add_argument_group("rollout").add_argument
    flag("--prompts-per-step", type=int, default=128, help="prompts a rollout step (%(default)s)")
    flag("--samples-per-prompt", type=int, default=8, help="n, rollouts a prompt (%(default)s)")
    flag("--temperature", type=float, default=1.0, help="of sampler and trainer (%(default)s)")
    flag("--tensor-parallel", type=int, default=1, help="ranks that share one vLLM engine (%(default)s)")
    flag("--gpu-memory-utilization", type=float, default=0.5, help="share of a GPU for vLLM, weights and cache, while "
         "it samples (%(default)s)")
    flag = parser.add_argument_group("algorithm").add_argument
    flag("--method", default="hpt", choices=METHODS,
         help="rows of the table that upge.py prints (%(default)s)")
    flag("--gate", choices=("switch", "smooth"), default="switch", help="of the hpt methods: (alpha, beta) is (1, 0) or (0, 1) by "
         "--gamma, or (P, 1 - P) (%(default)s)")
    flag("--gamma", type=float, default=0.0, help="HPT gate: the demonstration where P <= gamma; paper: 0 for Qwen, "
         "0.25 for Llama (%(default)s)")
    flag("--sft-coef", type=float, default=0.05, help="c_sft, weight of the SFT loss in HPT; 0.05 is what the authors' "
         "run amounts to, 1.0 is Eq. 13 taken literally (%(default)s)")
    flag("--clip-eps", type=float, help="clip range on both sides; default the row's own (0.2; dapo 0.2 and 0.28; "
         "gspo 3e-4 and 4e-4); inf, which the authors ran, clips nothing")
    flag("--pi-ref", choices=("old", "rollout", "tis"), default="old", help="pi_old is the trainer's own, what the sampler "
         "reported, or the trainer's with truncated importance weights between the two (%(default)s)")
    flag("--tis-cap", type=float, default=2.0, help="largest weight of --pi-ref tis (%(default)s)")
    flag("--reward", default="reward:grade", metavar="MODULE:FUNCTION", help="of (response, answer) -> 0 .. 1, run in worker processes "
         "with a deadline (%(default)s: the last \\boxed{}, by math-verify)")
    flag("--entropy-coef", type=float, default=0.0, help="entropy bonus on rollouts (%(default)s)")
    flag = parser.add_argument_group("ppo").add_argument
    flag("--critic", help="directory of a critic to go on from, as saved in a checkpoint's critic/ (default: the base, saying 0)")
    flag("--critic-lr", type=float, default=1e-5, help="(%(default)s)")
    flag("--gae-gamma", type=float, default=1.0, help="discount a token (%(default)s)")
    flag("--gae-lambda", type=float, default=1.0, help="(%(default)s)")
    flag("--value-clip", type=float, default=0.2, help="a value may move so far from the old one; inf clips nothing (%(default)s)")
    flag = parser.add_argument_group("optimisation").add_argument
    flag("--steps", type=int, default=500, help="rollout steps (%(default)s)")
    flag("--minibatches-per-step", type=int, default=2, help="optimizer steps a rollout step (%(default)s)")
    flag("--tokens-per-microbatch", type=int, default=32768, help="the memory knob: padded tokens a forward pass; it "
         "does not change the gradient (%(default)s)")
    flag("--lr", type=float, default=5e-6, help="AdamW, constant after warm-up (%(default)s)")
    flag("--warmup-steps", type=int, default=0, help="optimizer steps of linear warm-up (%(default)s)")
    flag("--weight-decay", type=float, default=0.01, help="(%(default)s)")
    flag("--max-grad-norm", type=float, default=1.0, help="(%(default)s)")
    flag("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True,
         help="recompute activations in the backward pass: less memory, a third more time")
    flag = parser.add_argument_group("logging").add_argument
    flag("--out", help="output directory, which must not exist (runs/METHOD-MODEL-seedS-TIME)")
    flag("--seed", type=int, default=0, help="of everything random (%(default)s)")
    flag("--eval-every", type=int, default=0, help="evaluate every N steps too (%(default)s: only before and after)")
    flag("--eval-samples", type=int, default=8, help="samples a held-out problem, at --temperature (%(default)s)")
    flag("--probe-gradients", type=int, default=0, metavar="N", help="every N steps measure the RL and the SFT gradient: norms, "
         "cosine, variance over prompts; costs about one more update (%(default)s: never)")
    flag("--save-every", type=int, default=0, help="a checkpoint every N steps too (%(default)s: only at the end)")

    given = parser.parse_args(argv)
    if given.model is None:
        if given.data != PAPER_DATA:
            parser.error("--data needs a --model: without one the toy is trained on its own data")
        import toy
        parser.set_defaults(**toy.defaults())
    args = parser.parse_args(argv)

    at_least = {"prompts_per_step": 1, "samples_per_prompt": 1, "tensor_parallel": 1, "steps": 1, "minibatches_per_step": 1,
                "tokens_per_microbatch": 1, "max_prompt_tokens": 1, "max_response_tokens": 1, "eval_samples": 1,
                "warmup_steps": 0, "eval_every": 0, "save_every": 0, "probe_gradients": 0, "sft_coef": 0, "entropy_coef": 0, "weight_decay": 0}
    for name, least in at_least.items():
        if not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value) and name not in ("clip_eps", "max_grad_norm", "value_clip"):
            parser.error(f"--{name.replace('_', '-')} must be a finite number, not {value}")
    for name in ("lr", "temperature", "max_grad_norm", "clip_eps", "tis_cap", "critic_lr", "value_clip", "rope_theta",
                 "max_position_embeddings", "gpu_memory_utilization"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    for name, what in {"gamma": "a share of rollouts", "gae_gamma": "a discount", "gae_lambda": "a discount",
                       "gpu_memory_utilization": "a share of a GPU"}.items():
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} is {what}, from 0 to 1, not {getattr(args, name)}")
    if METHODS[args.method].meet == "group" and args.samples_per_prompt < 2:
        parser.error(f"--method {args.method} makes a group of rollouts and the demonstration: --samples-per-prompt must be at least 2")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, not {args.seed}")
    if args.critic and args.method != "ppo":
        parser.error(f"--critic is for --method ppo, not {args.method}")
    if args.critic and not Path(args.critic, "config.json").is_file():
        parser.error(f"--critic {args.critic}: no model directory; a run of --method ppo saves one in final/critic")
    if args.minibatches_per_step > args.prompts_per_step:
        parser.error(f"--minibatches-per-step {args.minibatches_per_step} needs at least as many --prompts-per-step, "
                     f"not {args.prompts_per_step}")
    out = Path(args.out or "runs")
    if args.out and out.exists():
        parser.error(f"--out {args.out} exists already: name another directory, or remove it")
    above = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        parser.error(f"--out {out} cannot be made: {above} is no directory that can be written to")
    return args


if __name__ == "__main__":  # before the imports below, which take seconds
    import rollout
    with rollout.one_voice(quiet=True):
        cli = parse_args()

import collections
import functools
import random

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import evaluate
import model
import probe
import report
import reward
import rollout
from upge import PI_OLD, TABLE, adv_one, factor_one, gae, hpt_gate, smooth_gate, upge_loss

GATES = {"switch": hpt_gate, "smooth": smooth_gate}


# ------------------------------------------------------------------------------------------ from sequences to gradient

class Prompt(NamedTuple):
    """A problem of the step with what came of it."""
    problem: dict
    rolled: list  # of rollout.Rollout
    rewards: list  # float, one a rollout
    demo_reward: float
    alpha: float  # share of its rollouts in the loss
    beta: float  # share of its demonstration


class Sequence(NamedTuple):
    """A response to train on: a rollout or a demonstration."""
    prompt: list  # token ids
    response: list  # token ids
    row: str  # of upge.TABLE
    group: int  # its prompt, 0 .. N-1
    advantage: float  # the reward, where the row makes advantages of a critic's values
    weight: float  # of each of its tokens, global and final
    sampler_logp: list | None = None  # of a rollout, one a token


def build_sequences(prompts, method, sft_coef, l_max):
    """The sequences of one optimizer step by row of the table, {row: list}, from its N prompts: all that a weight depends on.

        L = (1/N) sum_q [ alpha_q L_RL(q) + c_sft beta_q L_SFT(q) ]

    c_sft weighs the sft row against rollouts; alone it has nothing to be weighed against, and it is 1. The other rows of
    demonstrations have the scale of the rollouts' rows and no coefficient; under a gate the demonstration is a group of its
    own in the normaliser (G = 1), as it stands for all n rollouts.
    """
    parts = {}
    for name in filter(None, (method.rollout, *method.demo)):
        row, members = TABLE[name], []
        is_demo, mixed = row.data == "demo", method.meet == "group"
        for q, p in enumerate(prompts):
            share = p.beta * (sft_coef if name == "sft" and method.rollout else 1.0) if is_demo else p.alpha
            if share:
                rewards = p.rewards + [p.demo_reward] * (is_demo or mixed)  # (G,)
                A = rewards if row.advantage is gae else row.advantage(torch.tensor(rewards, dtype=torch.double)).tolist()
                if mixed or not is_demo:
                    members += [Sequence(p.problem["prompt_ids"], r.ids, name, q, a, share, r.logp) for r, a in zip(p.rolled, A)]
                if mixed or is_demo:
                    members += [Sequence(p.problem["prompt_ids"], p.problem["demo_ids"], name, q, A[-1], share)]
        if members:  # of a mixed group all count in the normaliser, those that are another row's too
            lengths, groups = torch.tensor([(len(s.response), s.group) for s in members]).T  # (B,), (B,)
            weights = row.normaliser(lengths, groups, len(prompts), l_max).tolist()
            members = [s._replace(weight=s.weight * w) for s, w in zip(members, weights)]
        parts[name] = [s for s in members if (s.sampler_logp is None) == is_demo]
    return parts


def plan_microbatches(sequences, ranks, budget):
    """For each rank its list of micro-batches, lists of sequences; all ranks get equally many, the last may be empty.

    Ranks are balanced by tokens. Rows of a micro-batch are of similar length and their padded size stays within
    `budget` tokens, one row at least. Every rank computes the whole plan, so that none waits for another.
    """
    length = lambda s: len(s.prompt) + len(s.response)
    shares, load = [[] for _ in range(ranks)], [0] * ranks
    for s in sorted(sequences, key=length, reverse=True):
        least = load.index(min(load))
        shares[least].append(s)
        load[least] += length(s)
    plans = []
    for share in shares:
        batches = []
        for s in share:
            if not batches or (len(batches[-1]) + 1) * length(batches[-1][0]) > budget:
                batches.append([])
            batches[-1].append(s)
        plans.append(batches)
    most = max(map(len, plans))
    return [batches + [[]] * (most - len(batches)) for batches in plans]


def collate(batch, device):
    """A list of B sequences as ids (B, T) int64 and response (B, T) bool; an empty one as a row that weighs nothing."""
    rows = [(s.prompt, s.response) for s in batch] or [([0], [0])]
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    response = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (p, r) in enumerate(rows):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        response[i, len(p) : len(p) + len(r)] = True
    return ids.to(device), response.to(device)


def per_token(batch, values, device):
    """One value a sequence, or one a token, as the packed (1, n) float32 tensor that goes with the policy's output."""
    flat = [v for s, value in zip(batch, values) for v in (value if isinstance(value, list) else [value] * len(s.response))]
    return torch.tensor([flat or [0.0]], device=device)


def progress(items, label):
    """A tqdm bar over a list on rank 0's terminal; nothing elsewhere."""
    return tqdm(items, label, leave=False, disable=None if dist.get_rank() == 0 else True)


class Before(NamedTuple):
    """What the update takes as given, of one micro-batch: packed (1, n) tensors, fixed before the first optimizer step."""
    advantage: torch.Tensor
    weight: torch.Tensor
    old_logp: torch.Tensor | None = None  # of rollouts
    factor: torch.Tensor | None = None  # of PI_OLD, already in the advantage
    value: torch.Tensor | None = None  # of PPO's critic
    returns: torch.Tensor | None = None


@torch.no_grad()
def before_update(policy, critic, batches, args, device, totals):
    """A Before for each of this rank's micro-batches, (row, sequences) pairs of a whole rollout step.

    log pi_old is the trainer's own by default, as in the authors' code, not the sampler's; `totals` collects how far the two
    differ, which is what rounding leaves, or a stale weight, a wrong mask, a wrong temperature. PPO's advantages are
    whitened over all tokens of all ranks.
    """
    befores, moments = [], torch.zeros(3, dtype=torch.double, device=device)  # tokens, sum of A, sum of A^2
    for name, batch in progress(batches, "pi_old"):
        before = Before(per_token(batch, [s.advantage for s in batch], device), per_token(batch, [s.weight for s in batch], device))
        if TABLE[name].data == "rollout":
            ids, response = collate(batch, device)
            logp = policy(ids, response)[0][None]
            sampler = per_token(batch, [s.sampler_logp for s in batch], device)
            value = critic(ids, response)[None] if critic else None
            if batch:
                old_logp, factor = PI_OLD[args.pi_ref](logp, sampler, args.tis_cap)
                before = before._replace(old_logp=old_logp, factor=factor)
                gap = logp - sampler
                totals["mismatch_kl"] += (gap.exp() - 1 - gap).sum().item()
                totals["mismatch_max"] = max(gap.abs().max().item(), totals["mismatch_max"])
                totals["old_tokens"] += gap.numel()
            if batch and critic:
                A = packed_gae(batch, value, args.gae_gamma, args.gae_lambda)
                before = before._replace(advantage=A, value=value, returns=A + value)
                A, R = A.double(), before.returns.double()
                moments += torch.stack([torch.ones_like(A).sum(), A.sum(), A.square().sum()])
                totals["returns"] += R.sum().item()
                totals["returns_sq"] += R.square().sum().item()
        befores.append(before)
    if critic:
        dist.all_reduce(moments)
        n, total, squares = moments.tolist()
        mean, std = total / n, math.sqrt(max(squares / n - (total / n) ** 2, 0.0))
        totals["advantage_var"] = std**2 / dist.get_world_size()  # every rank has it, and totals are summed
        befores = [b if b.returns is None else b._replace(advantage=(b.advantage - mean) / (std + 1e-8)) for b in befores]
    return [b if b.factor is None else b._replace(advantage=b.advantage * b.factor) for b in befores]


def packed_gae(batch, value, gamma, lam):
    """GAE of B sequences whose reward comes with the last token: value (1, n) to advantages (1, n)."""
    lengths = torch.tensor([len(s.response) for s in batch], device=value.device)
    values = pad_sequence(value[0].split(lengths.tolist()), batch_first=True)  # (B, T)
    valid = torch.arange(values.shape[1], device=value.device) < lengths[:, None]
    rewards = torch.zeros_like(values)
    rewards[torch.arange(len(batch)), lengths - 1] = torch.tensor([s.advantage for s in batch], dtype=values.dtype, device=value.device)
    return gae(rewards, values, valid, gamma, lam)[valid][None]


def accumulate_gradient(policy, batches, befores, args, device, totals):
    """Add the gradient of L over this rank's micro-batches, (row, sequences) pairs; FSDP sums it over the ranks.

    Every denominator is inside the sequences' weights: micro-batches and ranks only split a sum.
    """
    eps = None if args.clip_eps is None else (args.clip_eps, args.clip_eps)
    for (name, batch), before in progress(list(zip(batches, befores, strict=True)), "update"):
        row = TABLE[name]
        bonus = args.entropy_coef if row.data == "rollout" else 0.0
        logp, entropy = policy(*collate(batch, device), with_entropy=bonus > 0 or row.factor is not factor_one)
        logp, entropy = logp[None], None if entropy is None else entropy[None]  # (1, n), packed
        loss = 0.0 * logp.sum()  # a rank without work still takes part in FSDP's exchanges
        if batch:
            seq = per_token(batch, list(range(len(batch))), device).long()
            loss, stable = upge_loss(row, logp, torch.ones_like(seq, dtype=torch.bool), before.advantage, before.weight,
                                     before.old_logp, seq, eps, entropy)
            if row.data == "rollout":
                totals["rl_loss"] += loss.item()
                totals["rl_tokens"] += logp.numel()
                totals["clipped"] += (stable == 0).sum().item()
                totals["kl"] += (kl := logp.detach() - before.old_logp).exp().sub(1 + kl).sum().item()
                if bonus:
                    loss = loss - bonus * (before.weight * entropy).sum()
            else:
                parts = logp.detach()[0].split([len(s.response) for s in batch])
                totals["nll"] -= sum(part.mean().item() for part in parts)
                totals["demonstrations"] += len(batch)
        totals["padded"] += logp.numel() if not batch else len(batch) * max(len(s.prompt + s.response) for s in batch)
        totals["tokens"] += sum(len(s.prompt + s.response) for s in batch)
        (loss * dist.get_world_size()).backward()  # FSDP averages over ranks; L is a sum


def accumulate_critic_gradient(critic, batches, befores, value_clip, device, totals):
    """Add the gradient of PPO's clipped value loss over this rank's micro-batches of rollouts, with the policy's weights.

        sum_t N_t 1/2 max( (V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2 )
    """
    for (name, batch), before in progress(list(zip(batches, befores, strict=True)), "critic"):
        if TABLE[name].data == "demo":
            continue
        value = critic(*collate(batch, device))[None]  # (1, n)
        loss = 0.0 * value.sum()
        if batch:
            near = before.value + (value - before.value).clamp(-value_clip, value_clip)
            worst = torch.maximum((value - before.returns).square(), (near - before.returns).square())
            loss = 0.5 * (before.weight * worst).sum()
            totals["value_loss"] += loss.item()
        (loss * dist.get_world_size()).backward()


def step_optimizer(module, optimizer, lr, warmup_steps, max_norm, updates_done, name="policy"):
    """Clip, step, clear; return the gradient norm. One that is not finite skips the step, says so, and harms nothing."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1.0, (updates_done + 1) / max(1, warmup_steps))
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm).full_tensor().item()
    if math.isfinite(norm):
        optimizer.step()
    elif dist.get_rank() == 0:
        print(f"optimizer step {updates_done + 1}: gradient norm of the {name} {norm}: skipped", flush=True)
    optimizer.zero_grad()
    return norm


# --------------------------------------------------------------------------------------------------------- Algorithm 1

def main(args):
    """Algorithm 1. Every rank runs it; what is random depends on (seed, step, problem) and on no rank."""
    # 0. All that a user can get wrong is checked before anything heavy starts.
    rollout.check_vllm()
    method = METHODS[args.method]
    n = args.samples_per_prompt - (method.meet == "group") if method.rollout else 0  # rollouts a prompt
    score_demos = any(TABLE[name].advantage is not adv_one for name in method.demo)
    config, tokenizer = data.load_config_and_tokenizer(args.model, args.rope_theta, args.max_position_embeddings)
    data.check_context(config, args.max_prompt_tokens, args.max_response_tokens)
    needs_critic = bool(method.rollout) and TABLE[method.rollout].advantage is gae
    if needs_critic:
        model.check_critic(config, args.critic)
    problems, left_out = load_problems(args, args.data, tokenizer, need_demonstration=bool(method.demo))
    held_out, held_out_left = load_problems(args, args.eval_data, tokenizer, flag="--eval-data") if args.eval_data else ([], "")
    data.check_weights(args.model, config)

    with reward.Verifier(function=args.reward) as verifier:  # its processes first, then the sampler, then the trainer
        rank, world = rollout.init_process_group()
        if world % args.tensor_parallel:
            raise SystemExit(f"error: --tensor-parallel {args.tensor_parallel} must divide the number of ranks, {world}")
        gpu, chief = torch.cuda.is_available(), rank == 0
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        override = functools.partial(data.override, rope_theta=args.rope_theta,
                                     max_position_embeddings=args.max_position_embeddings)
        llm = rollout.build(args.model, override, max_tokens=args.max_prompt_tokens + args.max_response_tokens,
                            tensor_parallel=args.tensor_parallel, seed=args.seed,
                            gpu_memory_utilization=args.gpu_memory_utilization)
        rollout.sleep(llm)
        adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=args.weight_decay)
        policy = model.build_policy(args, config, device)
        optimizer = adamw(policy.parameters(), lr=args.lr)
        critic = None
        if needs_critic:
            critic = model.build_critic(args, config, device)
            critic_optimizer = adamw(critic.parameters(), lr=args.critic_lr)
        out = report.open_output(args)
        if chief:
            report.print_plan(args, out, policy, critic, tokenizer, problems, left_out, held_out, held_out_left, n)

        def sample(share):  # of (prompt ids, seed) pairs
            return rollout.generate(llm, [ids for ids, _ in share], [seed for _, seed in share], n=n,
                                    max_response_tokens=args.max_response_tokens, temperature=args.temperature,
                                    progress="rollouts" if chief else None)

        def score(share):  # of (response, answer) pairs
            return verifier.score([text for text, _ in share], [answer for _, answer in share])

        def sync():
            rollout.load(llm, model.full_weights(policy, torch.bfloat16 if gpu else torch.float32))

        def measure_held_out(step):
            results = evaluate.measure(llm, verifier, held_out, samples=args.eval_samples, seed=args.seed,
                                       max_response_tokens=args.max_response_tokens, temperature=args.temperature,
                                       tensor_parallel=args.tensor_parallel, progress="held-out problems" if chief else None)
            if chief:
                evaluate.write(out / "held_out.jsonl", results, step=step)
            return results, {f"eval/{name}": score[0] for name, score in evaluate.summary(results).items() if "@" in name}

        sync()
        if held_out:
            before, scores = measure_held_out(0)
            report.log(out, {"step": 0} | scores)
        offline_ratios, updates = [], 0

        for step in range(1, args.steps + 1):
            lap, totals = stopwatch(), collections.defaultdict(float)
            drawn = [problems[i] for i in draw(len(problems), step, args.prompts_per_step, args.seed)]

            # 1. n rollouts of each prompt from the policy as it is.
            rolled = [[]] * len(drawn)
            if method.rollout:
                seeds = [rollout.derive_seed(args.seed, step, i) for i in range(len(drawn))]
                rolled = rollout.spread([(p["prompt_ids"], s) for p, s in zip(drawn, seeds)], sample, args.tensor_parallel)
            rollout.sleep(llm)
            times = {"rollout": lap()}

            # 2. Rewards, from 0 to 1; of a demonstration too, where it is compared with rollouts.
            timeouts = verifier.timeouts
            texts = [[r.text for r in rs] + ([p["demonstration"]] if score_demos else []) for p, rs in zip(drawn, rolled)]
            scores = iter(rollout.spread([(text, p["answer"]) for p, group in zip(drawn, texts) for text in group], score))
            rewards = [[next(scores) for _ in group] for group in texts]
            demo_rewards = [group.pop() if score_demos else 1.0 for group in rewards]
            totals["timeouts"] = verifier.timeouts - timeouts
            times["reward"] = lap()

            # 3. The gate: a prompt's rollouts (alpha) where the model succeeds, its demonstration (beta) where it fails.
            if method.meet == "gate":
                correct = torch.tensor([sum(group) for group in rewards])
                alpha, beta = (x.tolist() for x in GATES[args.gate](correct, n, args.gamma))
            else:
                alpha, beta = [float(bool(method.rollout))] * len(drawn), [float(bool(method.demo))] * len(drawn)
            prompts = [Prompt(*fields) for fields in zip(drawn, rolled, rewards, demo_rewards, alpha, beta, strict=True)]

            # 4. Shuffled mini-batches of prompts, each with its own demonstrations; their number never depends on the gate.
            order, k = shuffled(len(prompts), args.seed, "mini-batches", step), args.minibatches_per_step
            minibatches = []  # per optimizer step this rank's micro-batches, (row, sequences) pairs
            for chunk in ([prompts[q] for q in order[i::k]] for i in range(k)):
                parts = build_sequences(chunk, method, args.sft_coef, args.max_response_tokens)
                minibatches.append([(row, batch) for row, sequences in parts.items()
                                    for batch in plan_microbatches(sequences, world, args.tokens_per_microbatch)[rank]])
            befores = iter(before_update(policy, critic, sum(minibatches, []), args, device, totals))
            grad_norms, critic_norms, seen = [], [], {}
            for batches in minibatches:
                given = [next(befores) for _ in batches]
                if args.probe_gradients and step % args.probe_gradients == 0 and not seen:
                    seen = probe.probe(policy, batches, given, functools.partial(accumulate_gradient, args=args, device=device))
                accumulate_gradient(policy, batches, given, args, device, totals)
                grad_norms.append(step_optimizer(policy, optimizer, args.lr, args.warmup_steps, args.max_grad_norm, updates))
                if critic:
                    accumulate_critic_gradient(critic, batches, given, args.value_clip, device, totals)
                    critic_norms.append(step_optimizer(critic, critic_optimizer, args.critic_lr, args.warmup_steps,
                                                       args.max_grad_norm, updates, "critic"))
                updates += 1
            times["train"] = lap()

            # 5. The sampler takes the new weights; metrics, checkpoint.
            sync()
            times["sync"] = lap()
            metrics = report.step_metrics(args, method, step, prompts, reduced(totals), grad_norms, critic_norms, times, policy) | seen
            last = step == args.steps
            if held_out and (last or args.eval_every and step % args.eval_every == 0):
                after, scores = measure_held_out(step)
                metrics |= scores
            report.log(out, metrics)
            report.log_samples(out, step, prompts)
            offline_ratios.append(metrics["hpt/offline_ratio"])
            if last or args.save_every and step % args.save_every == 0:
                checkpoint = out / ("final" if last else f"step_{step:06d}")  # plain Hugging Face directories
                model.save(policy, tokenizer, checkpoint, device)
                if critic:
                    model.save(critic, tokenizer, checkpoint / "critic", device)
        rollout.close(llm)
    if chief:
        report.closing_table(args, out, (before, after) if held_out else None, offline_ratios)


# ---------------------------------------------------------------------------------------------------------- the rest

def load_problems(args, source, tokenizer, need_demonstration=False, flag="--data"):
    """The problems of a --data or --eval-data that fit, and a sentence on those that do not."""
    problems = data.load_problems(source, need_demonstration, flag)
    system = data.SYSTEM if args.system_prompt is None else args.system_prompt
    kept, prompts, demos = data.tokenize(problems, tokenizer, args.template, system, args.max_prompt_tokens,
                                         args.max_response_tokens)
    left_out = f"{prompts} left out with a prompt over {args.max_prompt_tokens} tokens"
    if need_demonstration:
        left_out += f", {demos} with a demonstration over {args.max_response_tokens}"
    if not kept:
        raise SystemExit(f"error: {flag} {source}: no problem is left: {left_out}")
    return kept, left_out


def shuffled(n, *key):
    """0 .. n-1 in an order that depends on `key` alone."""
    order = list(range(n))
    random.Random(rollout.derive_seed(*key)).shuffle(order)
    return order


def draw(n, step, count, seed):
    """The problems of a step: each epoch goes through all n in an order of its own. Steps count from 1."""
    places = range((step - 1) * count, step * count)
    epochs = {place // n for place in places}
    orders = {epoch: shuffled(n, seed, "epoch", epoch) for epoch in epochs}
    return [orders[place // n][place % n] for place in places]


def stopwatch():
    """A function that returns the seconds since it was last called."""
    last = time.perf_counter()
    def lap():
        nonlocal last
        before, last = last, time.perf_counter()
        return last - before
    return lap


def reduced(totals):
    """The ranks' totals summed, or the maximum of those named so."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(totals))
    largest = lambda values: max(values, key=lambda x: (math.isnan(x), x))  # a NaN is never hidden
    join = lambda key: largest if key.endswith("_max") else sum
    return collections.defaultdict(float, {k: join(k)(t.get(k, 0.0) for t in everyone) for t in everyone for k in t})


if __name__ == "__main__":
    with rollout.one_voice():
        main(cli)
