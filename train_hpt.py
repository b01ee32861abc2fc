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

PAPER_DATA = "Elliott/Openr1-Math-46k-8192"


def parse_args(argv=None):
    """The flags. Imports nothing heavy: --help and mistyped flags are answered at once."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
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
    flag("--max-response-tokens", type=int, default=8192, help="also L_max of Dr. GRPO; demonstrations that do not fit "
         "whole are left out (%(default)s)")
    flag = parser.add_argument_group("rollout").add_argument
    flag("--prompts-per-step", type=int, default=128, help="prompts a rollout step (%(default)s)")
    flag("--samples-per-prompt", type=int, default=8, help="n, rollouts a prompt (%(default)s)")
    flag("--temperature", type=float, default=1.0, help="of sampler and trainer (%(default)s)")
    flag("--tensor-parallel", type=int, default=1, help="ranks that share one vLLM engine (%(default)s)")
    flag("--gpu-memory-utilization", type=float, default=0.5, help="share of a GPU for vLLM, weights and cache, while "
         "it samples (%(default)s)")
    flag = parser.add_argument_group("algorithm").add_argument
    flag("--method", default="hpt", choices=("sft", "reinforce", "grpo", "dr_grpo", "cispo", "gspo", "hpt"),
         help="rows of the table that upge.py prints (%(default)s)")
    flag("--gamma", type=float, default=0.0, help="HPT gate: the demonstration where P <= gamma; paper: 0 for Qwen, "
         "0.25 for Llama (%(default)s)")
    flag("--sft-coef", type=float, default=0.05, help="c_sft, weight of the SFT loss in HPT; 0.05 is what the authors' "
         "run amounts to, 1.0 is Eq. 13 taken literally (%(default)s)")
    flag("--clip-eps", type=float, help="clip range on both sides; default the row's own (0.2; gspo 3e-4 and 4e-4); "
         "inf, which the authors ran, clips nothing")
    flag("--entropy-coef", type=float, default=0.0, help="entropy bonus on rollouts (%(default)s)")
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
                "warmup_steps": 0, "eval_every": 0, "save_every": 0, "sft_coef": 0, "entropy_coef": 0, "weight_decay": 0}
    for name, least in at_least.items():
        if not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    for name in ("lr", "temperature", "max_grad_norm", "clip_eps"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if not 0 <= args.gamma <= 1:
        parser.error(f"--gamma is a share of rollouts, from 0 to 1, not {args.gamma}")
    if args.minibatches_per_step > args.prompts_per_step:
        parser.error(f"--minibatches-per-step {args.minibatches_per_step} needs at least as many --prompts-per-step, "
                     f"not {args.prompts_per_step}")
    if args.out and Path(args.out).exists():
        parser.error(f"--out {args.out} exists already: name another directory, or remove it")
    return args


if __name__ == "__main__":
    cli = parse_args()  # before the imports below, which take seconds

import collections
import functools
import random
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import evaluate
import report
import reward
import rollout
from upge import METHODS, TABLE, hpt_gate, upge_loss


# ---------------------------------------------------------------------------------------------- the policy under FSDP

class Policy(torch.nn.Module):
    """A causal LM whose forward pass gives log-probabilities of chosen tokens, never all logits at once."""

    def __init__(self, lm, temperature, chunk=1024):
        super().__init__()
        self.lm, self.temperature, self.chunk = lm, temperature, chunk
        self.softcap = getattr(lm.config, "final_logit_softcapping", None)  # Gemma 2

    def forward(self, ids, response, with_entropy=False):
        """Log-probabilities (n,), float32 or wider, of the n tokens marked in `response`, row by row, and their entropy or None.

        ids (B, T) int64, padded on the right; under causal attention no real token sees the padding, so there is no
        attention mask. response (B, T) bool, never True in column 0.
        """
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        hidden, targets = hidden[:, :-1][response[:, 1:]], ids[response]  # (n, D), (n,): the state before each token
        parts = [checkpoint(self.head, h, t, with_entropy, use_reentrant=False)
                 for h, t in zip(hidden.split(self.chunk), targets.split(self.chunk))]
        logp, entropy = zip(*parts)
        return torch.cat(logp), torch.cat(entropy) if with_entropy else None

    def head(self, hidden, targets, with_entropy):
        """(c, D) states and (c,) token ids to (c,) log-probabilities and entropies; recomputed in the backward pass."""
        logits = self.lm.get_output_embeddings()(hidden)  # (c, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits / self.temperature
        logp = logits - logits.logsumexp(-1, keepdim=True)
        entropy = -(logp.exp() * logp).sum(-1) if with_entropy else None
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


def build_policy(args, config, device):
    """The sharded policy: float32 master weights; on a GPU, bfloat16 compute and float32 gradient reduction."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype="auto")
    lm.train()  # without this, HF ignores gradient checkpointing; dropout is off in the config
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(lm, args.temperature)
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in [m for m in lm.modules() if type(m).__name__ in lm._no_split_modules]:
        fully_shard(block.float(), mesh=mesh, mp_policy=precision)
    return fully_shard(policy.float(), mesh=mesh, mp_policy=precision)


def full_weights(policy, dtype):
    """(Hugging Face name, full tensor) pairs, gathered from the shards one at a time; every rank must consume them.

    Tied weights come under each of their names, as rollout.load wants them.
    """
    for name, parameter in policy.lm.named_parameters(remove_duplicate=False):
        yield name, parameter.detach().full_tensor().to(dtype)


def save(policy, tokenizer, directory, device):
    """A plain Hugging Face directory: float32 from a CPU, bfloat16 from a GPU, as the sampler held it."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = {name: tensor.cpu() for name, tensor in full_weights(policy, dtype)}
    if dist.get_rank() == 0:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(policy.lm.config, dtype=dtype)
        skeleton.generation_config = policy.lm.generation_config
        skeleton.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)


# ------------------------------------------------------------------------------------------ from sequences to gradient

class Sequence(NamedTuple):
    """A response to train on: a rollout or a demonstration."""
    prompt: list  # token ids
    response: list  # token ids
    row: str  # of upge.TABLE
    group: int  # its prompt, 0 .. N-1
    advantage: float
    weight: float  # of each of its tokens, global and final
    sampler_logp: list | None = None  # of a rollout, one a token


def build_sequences(chunk, method, sft_coef, l_max):
    """The (rollouts, demonstrations) of one optimizer step, from its N prompts with all that a weight depends on.

        L = (1/N) sum_q [ alpha_q L_RL(q) + c_sft beta_q L_SFT(q) ]

    chunk: list of (problem, its rollouts, their rewards, alpha, beta). c_sft weighs demonstrations against rollouts; a
    method that has demonstrations alone has nothing to weigh them against, and it is 1.
    """
    rl, sft = method
    online, offline = [], []
    for q, (problem, rolled, rewards, alpha, beta) in enumerate(chunk):
        if alpha:
            advantages = TABLE[rl].advantage(torch.tensor(rewards, dtype=torch.double)).tolist()  # (G,)
            online += [Sequence(problem["prompt_ids"], r.ids, rl, q, a, alpha, r.logp) for r, a in zip(rolled, advantages)]
        if beta:
            offline += [Sequence(problem["prompt_ids"], problem["demo_ids"], sft, q, 1.0, beta * (sft_coef if rl else 1.0))]

    def normalised(sequences):
        if not sequences:
            return []
        lengths, groups = torch.tensor([(len(s.response), s.group) for s in sequences]).T  # (B,), (B,)
        weights = TABLE[sequences[0].row].normaliser(lengths, groups, len(chunk), l_max)  # (B,)
        return [s._replace(weight=s.weight * w) for s, w in zip(sequences, weights.tolist())]

    return normalised(online), normalised(offline)


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


@torch.no_grad()
def reference_logp(policy, batches, device, totals):
    """log pi_old of this rank's rollout micro-batches, a packed (1, n) tensor each: call it before the first update.

    These are the trainer's own numbers, as in the authors' code, not the sampler's; `totals` collects how far the
    two differ, which is what rounding leaves, or a stale weight, a wrong mask, a wrong temperature.
    """
    result = []
    for batch in progress(batches, "pi_old"):
        logp = policy(*collate(batch, device))[0][None]
        result.append(logp)
        if batch:
            gap = logp - per_token(batch, [s.sampler_logp for s in batch], device)
            totals["mismatch_kl"] += (gap.exp() - 1 - gap).sum().item()
            totals["mismatch_max"] = max(totals["mismatch_max"], gap.abs().max().item())
            totals["old_tokens"] += gap.numel()
    return result


def accumulate_gradient(policy, batches, old_logps, clip_eps, entropy_coef, device, totals):
    """Add the gradient of L over this rank's micro-batches of one row; FSDP sums it over the ranks.

    Every denominator is inside the sequences' weights: micro-batches and ranks only split a sum.
    """
    for batch, old_logp in progress(list(zip(batches, old_logps, strict=True)), "update"):
        logp, entropy = policy(*collate(batch, device), with_entropy=entropy_coef > 0)
        logp = logp[None]  # (1, n), packed
        loss = 0.0 * logp.sum()  # a rank without work still takes part in FSDP's exchanges
        if batch:
            row = TABLE[batch[0].row]
            seq = per_token(batch, list(range(len(batch))), device).long()
            advantage = per_token(batch, [s.advantage for s in batch], device)
            weight = per_token(batch, [s.weight for s in batch], device)
            eps = None if clip_eps is None else (clip_eps, clip_eps)
            loss, stable = upge_loss(row, logp, torch.ones_like(seq, dtype=torch.bool), advantage, weight, old_logp, seq, eps)
            if row.data == "rollout":
                totals["rl_loss"] += loss.item()
                totals["rl_tokens"] += logp.numel()
                totals["clipped"] += (stable == 0).sum().item()
                totals["kl"] += (kl := logp.detach() - old_logp).exp().sub(1 + kl).sum().item()
                if entropy is not None:
                    loss = loss - entropy_coef * (weight * entropy).sum()
            else:
                parts = logp.detach()[0].split([len(s.response) for s in batch])
                totals["nll"] -= sum(part.mean().item() for part in parts)
                totals["demonstrations"] += len(batch)
        totals["padded"] += logp.numel() if not batch else len(batch) * max(len(s.prompt + s.response) for s in batch)
        totals["tokens"] += sum(len(s.prompt + s.response) for s in batch)
        (loss * dist.get_world_size()).backward()  # FSDP averages over ranks; L is a sum


def step_optimizer(policy, optimizer, args, updates_done):
    """Clip, step, clear; return the gradient norm. One that is not finite skips the step, says so, and harms nothing."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, (updates_done + 1) / max(1, args.warmup_steps))
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
    if math.isfinite(norm):
        optimizer.step()
    elif dist.get_rank() == 0:
        print(f"optimizer step {updates_done + 1}: gradient norm {norm}: skipped", flush=True)
    optimizer.zero_grad()
    return norm


# --------------------------------------------------------------------------------------------------------- Algorithm 1

def main(args):
    """Algorithm 1. Every rank runs it; what is random depends on (seed, step, problem) and on no rank."""
    # 0. All that a user can get wrong is checked before anything heavy starts.
    rollout.check_vllm()
    rl, sft = method = METHODS[args.method]  # row of the table for rollouts, for demonstrations; None where unused
    config, tokenizer = data.load_config_and_tokenizer(args.model, args.rope_theta, args.max_position_embeddings)
    data.check_context(config, args.max_prompt_tokens, args.max_response_tokens)
    problems, left_out = load_problems(args, args.data, tokenizer, need_demonstration=sft is not None)
    held_out, _ = load_problems(args, args.eval_data, tokenizer) if args.eval_data else ([], None)
    workers = min(8, max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    with reward.Verifier(workers) as verifier:  # its processes first, then the sampler, then the trainer
        rank, world = rollout.init_process_group()
        if world % args.tensor_parallel:
            raise SystemExit(f"error: --tensor-parallel {args.tensor_parallel} does not divide the {world} ranks")
        out, chief = report.open_output(args), rank == 0
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        override = functools.partial(data.override, rope_theta=args.rope_theta,
                                     max_position_embeddings=args.max_position_embeddings)
        llm = rollout.build(args.model, override, max_tokens=args.max_prompt_tokens + args.max_response_tokens,
                            tensor_parallel=args.tensor_parallel, seed=args.seed,
                            gpu_memory_utilization=args.gpu_memory_utilization)
        rollout.sleep(llm)
        policy = build_policy(args, config, device)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
        if chief:
            report.print_plan(args, out, policy, tokenizer, problems, left_out, held_out)

        def sample(share):  # of (prompt ids, seed) pairs
            return rollout.generate(llm, [ids for ids, _ in share], [seed for _, seed in share], n=args.samples_per_prompt,
                                    max_response_tokens=args.max_response_tokens, temperature=args.temperature,
                                    progress="rollouts" if chief else None)

        def score(share):  # of (response, answer) pairs
            return verifier.score([text for text, _ in share], [answer for _, answer in share])

        def sync():
            rollout.load(llm, full_weights(policy, torch.bfloat16 if gpu else torch.float32))

        def measure_held_out():
            results = evaluate.measure(llm, verifier, held_out, samples=args.eval_samples, seed=args.seed,
                                       max_response_tokens=args.max_response_tokens, temperature=args.temperature,
                                       tensor_parallel=args.tensor_parallel, progress="held-out problems" if chief else None)
            return results, {f"eval/{name}": mean for name, (mean, _) in evaluate.summary(results, args.eval_samples).items()}

        sync()
        if held_out:
            before, scores = measure_held_out()
            report.log(out, {"step": 0} | scores)
        offline_ratios, updates = [], 0

        for step in range(1, args.steps + 1):
            lap, totals = stopwatch(), collections.defaultdict(float)
            prompts = [problems[i] for i in draw(len(problems), step, args.prompts_per_step, args.seed)]

            # 1. n rollouts of each prompt from the policy as it is.
            rolled = [[]] * len(prompts)
            if rl:
                seeds = [rollout.derive_seed(args.seed, step, i) for i in range(len(prompts))]
                rolled = rollout.spread([(p["prompt_ids"], s) for p, s in zip(prompts, seeds)], sample, args.tensor_parallel)
            rollout.sleep(llm)
            times = {"rollout": lap()}

            # 2. Rewards, 0 or 1 from the verifier.
            timeouts = verifier.timeouts
            scores = iter(rollout.spread([(r.text, p["answer"]) for p, rs in zip(prompts, rolled) for r in rs], score))
            rewards = [[next(scores) for _ in rs] for rs in rolled]
            totals["timeouts"] = verifier.timeouts - timeouts
            times["reward"] = lap()

            # 3. The gate: a prompt's rollouts (alpha) where the model succeeds, its demonstration (beta) where it fails.
            if rl and sft:
                correct = torch.tensor([round(sum(r)) for r in rewards])
                alpha, beta = (x.tolist() for x in hpt_gate(correct, args.samples_per_prompt, args.gamma))
            else:
                alpha, beta = [int(rl is not None)] * len(prompts), [int(sft is not None)] * len(prompts)

            # 4. Shuffled mini-batches of prompts, each with its own demonstrations; their number never depends on the gate.
            order = shuffled(len(prompts), args.seed, "mini-batches", step)
            batches = []  # per optimizer step this rank's micro-batches: (of rollouts, of demonstrations)
            for k in range(args.minibatches_per_step):
                chunk = [(prompts[q], rolled[q], rewards[q], alpha[q], beta[q]) for q in order[k :: args.minibatches_per_step]]
                parts = build_sequences(chunk, method, args.sft_coef, args.max_response_tokens)
                batches.append([plan_microbatches(part, world, args.tokens_per_microbatch)[rank] for part in parts])
            old_logps = [reference_logp(policy, online, device, totals) for online, _ in batches]
            grad_norms = []
            for (online, offline), old in zip(batches, old_logps):
                accumulate_gradient(policy, online + offline, old + [None] * len(offline), args.clip_eps,
                                    args.entropy_coef, device, totals)
                grad_norms.append(step_optimizer(policy, optimizer, args, updates))
                updates += 1
            times["train"] = lap()

            # 5. The sampler takes the new weights; metrics, checkpoint.
            sync()
            times["sync"] = lap()
            metrics = report.step_metrics(args, step, rolled, rewards, beta, reduced(totals), grad_norms, times, policy)
            last = step == args.steps
            if held_out and (last or args.eval_every and step % args.eval_every == 0):
                after, scores = measure_held_out()
                metrics |= scores
            report.log(out, metrics)
            report.log_samples(out, step, prompts, rolled, rewards, beta)
            offline_ratios.append(metrics["hpt/offline_ratio"])
            if last or args.save_every and step % args.save_every == 0:
                save(policy, tokenizer, out / ("final" if last else f"step_{step:06d}"), device)
        rollout.close(llm)
    if chief:
        report.closing_table(args, out, (before, after) if held_out else None, offline_ratios)


# ---------------------------------------------------------------------------------------------------------- the rest

def load_problems(args, source, tokenizer, need_demonstration=False):
    """The problems of a --data or --eval-data that fit, and a sentence on those that do not."""
    problems = data.load_problems(source, need_demonstration)
    system = data.SYSTEM if args.system_prompt is None else args.system_prompt
    kept, prompts, demos = data.tokenize(problems, tokenizer, args.template, system, args.max_prompt_tokens,
                                         args.max_response_tokens)
    left_out = f"{prompts} left out with a prompt over {args.max_prompt_tokens} tokens, {demos} with a demonstration over " \
               f"{args.max_response_tokens}"
    if not kept:
        raise SystemExit(f"error: {source}: no problem is left: {left_out}")
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
    join = lambda key: max if key.endswith("_max") else sum
    return collections.defaultdict(float, {k: join(k)(t.get(k, 0.0) for t in everyone) for t in everyone for k in t})


if __name__ == "__main__":
    try:
        main(cli)
    except SystemExit as error:  # one rank says it, not all
        raise SystemExit(error.code if int(os.environ.get("RANK", 0)) == 0 else 1) from error
