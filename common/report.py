"""What a run prints and writes: plan, config.json, metrics.jsonl, samples.jsonl, closing table. No mathematics here."""
import json
import math
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

import evaluate
import plot
import rollout

PEAK_BF16 = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12}  # dense FLOP/s, data sheets
WATCHED = {"reward/mean": "reward", "hpt/sft_frac": "gated", "hpt/offline_ratio": "offline", "sft/nll": "nll",
           "response_length/mean": "length", "policy/entropy": "entropy", "mismatch/kl": "mismatch", "optim/grad_norm": "grad",
           "time/step": "sec", "eval/pass@1": "HELD-OUT ACCURACY"}


def step_metrics(args, method, step, prompts, totals, grad_norms, critic_norms, times, policy):
    """One flat dict a step; the README says what each name means. method and prompts: train_hpt.Method, list of train_hpt.Prompt."""
    rewards = [p.rewards for p in prompts]
    responses = [r for p in prompts for r in p.rolled]
    online, offline = sum(len(p.rolled) for p in prompts if p.alpha), sum(p.beta > 0 for p in prompts)
    metrics = {"step": step, "hpt/offline_ratio": offline / (online + offline),
               "data/rollouts": len(responses), "data/demo_tokens": sum(len(p.problem["demo_ids"]) for p in prompts if p.beta)}
    if method.meet == "gate":
        metrics["hpt/sft_frac"] = statistics.fmean(p.beta for p in prompts)
    if responses:
        flat, lengths = [r for rs in rewards for r in rs], [len(r.ids) for r in responses]
        metrics |= {
            "reward/mean": statistics.fmean(flat), "reward/std": statistics.pstdev(flat), "reward/timeouts": totals["timeouts"],
            "reward/frac_zero_std": statistics.fmean(len(set(rs)) == 1 for rs in rewards),
            "hpt/solve_rate": statistics.fmean(max(rs) > 0 for rs in rewards),
            "response_length/mean": statistics.fmean(lengths), "response_length/max": max(lengths),
            "response_length/clip_ratio": statistics.fmean(r.truncated for r in responses),
            "policy/entropy": -sum(sum(r.logp) for r in responses) / sum(lengths),
            "perf/rollout_tokens_per_sec": sum(lengths) / times["rollout"],
        }
    if totals["rl_tokens"]:
        metrics |= {"mismatch/kl": totals["mismatch_kl"] / totals["old_tokens"], "mismatch/logp_max": totals["mismatch_max"],
                    "policy/clip_frac": totals["clipped"] / totals["rl_tokens"],
                    "policy/approx_kl": totals["kl"] / totals["rl_tokens"], "loss/rl": totals["rl_loss"]}
    if totals["demonstrations"]:
        metrics["sft/nll"] = totals["nll"] / totals["demonstrations"]
    if critic_norms:  # PPO
        mean = totals["returns"] / totals["old_tokens"]
        variance = totals["returns_sq"] / totals["old_tokens"] - mean**2
        metrics |= {"critic/loss": totals["value_loss"] / len(critic_norms), "critic/returns_mean": mean,
                    "critic/grad_norm": statistics.fmean(critic_norms),
                    "critic/skipped": sum(not math.isfinite(norm) for norm in critic_norms)}
        if variance > 1e-6:  # the part of the returns' variance that the critic foresaw; equal returns leave nothing to foresee
            metrics["critic/explained_variance"] = 1 - totals["advantage_var"] / variance
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    metrics |= {"optim/grad_norm": statistics.fmean(finite) if finite else None, "optim/skipped": len(grad_norms) - len(finite),
                "optim/lr": args.lr * min(1.0, step * args.minibatches_per_step / max(1, args.warmup_steps)),
                "perf/train_tokens_per_sec": totals["tokens"] / times["train"],
                "perf/padding_frac": 1 - totals["tokens"] / totals["padded"]}
    if torch.cuda.is_available():
        metrics["perf/max_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        name = torch.cuda.get_device_name()
        peak = next((flops for gpu, flops in PEAK_BF16.items() if gpu in name), None)
        if peak:  # 6 floating-point operations a parameter and token; recomputation is not useful work
            flops = 6 * sum(p.numel() for p in policy.parameters()) * totals["tokens"]
            metrics["perf/mfu"] = flops / times["train"] / peak / dist.get_world_size()
    return metrics | {f"time/{name}": seconds for name, seconds in times.items()} | {"time/step": sum(times.values())}


def open_output(args):
    """Make the run's directory, with config.json in it, on rank 0; return its path on every rank."""
    name = [None]
    if dist.get_rank() == 0:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name[0] = args.out or f"runs/{args.method}-{Path(args.model).name}-seed{args.seed}-{stamp}"
        try:
            Path(name[0]).mkdir(parents=True)
        except OSError as error:
            raise SystemExit(f"error: --out {name[0]} cannot be made: {error.strerror}; name another directory") from error
        here = Path(__file__).parent
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
        versions = {"python": sys.version.split()[0], "vllm": rollout.VLLM_VERSION}
        versions |= {package: metadata.version(package) for package in ("torch", "transformers", "math-verify", "numpy")}
        config = {"flags": vars(args), "ranks": dist.get_world_size(), "versions": versions, "commit": commit or None}
        (Path(name[0]) / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    dist.broadcast_object_list(name)
    return Path(name[0])


def print_plan(args, out, policy, critic, tokenizer, problems, left_out, held_out, held_out_left, n):
    """What is about to happen, before the first step."""
    world, size = dist.get_world_size(), sum(p.numel() for p in policy.parameters())
    trained = size + (sum(p.numel() for p in critic.parameters()) if critic else 0)
    first = problems[0]
    demonstration = repr(tokenizer.decode(first["demo_ids"])[:600]) if "demo_ids" in first else ""
    print(f"""
{args.method} on {args.model}: {size / 1e6:,.1f} M parameters, {world} rank{'s' * (world > 1)}; weights, gradients and Adam's moments {16 * trained / world / 1e9:.2f} GB a rank
{len(problems)} problems from {args.data} ({left_out}); {len(held_out)} held out{f" ({held_out_left})" * bool(held_out)}
{args.steps} steps of {args.prompts_per_step} prompts x {n} rollouts, {args.minibatches_per_step} optimizer steps each; micro-batches of {args.tokens_per_microbatch} tokens a rank
writing to {out}

the first problem, as the model sees it{', and its demonstration' * bool(demonstration)}:
{tokenizer.decode(first['prompt_ids'])!r}
{demonstration}
""", flush=True)


def log(out, metrics):
    """Append a line to metrics.jsonl and, for a person, print the few numbers that one watches."""
    if dist.get_rank() == 0:
        with open(out / "metrics.jsonl", "a") as file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            file.write(json.dumps(finite, allow_nan=False) + "\n")
        shown = [f"{label} {metrics[name]:.3g}" for name, label in WATCHED.items() if metrics.get(name) is not None]
        print(f"step {metrics['step']:>4}  " + "  ".join(shown), flush=True)


def log_samples(out, step, prompts, count=3):
    """Append the first rollout of a few prompts to samples.jsonl, with reward, P and what the gate chose."""
    if dist.get_rank() != 0:
        return
    with open(out / "samples.jsonl", "a") as file:
        for p in prompts[:count]:
            shown = {"response": p.rolled[0].text, "reward": p.rewards[0], "P": statistics.fmean(p.rewards)} if p.rolled else {}
            trained_on = " and ".join(["rollouts"] * (p.alpha > 0) + ["demonstration"] * (p.beta > 0))
            file.write(json.dumps({"step": step, "prompt": p.problem["prompt"], "answer": p.problem["answer"], **shown,
                                   "trained_on": trained_on}) + "\n")


def closing_table(args, out, held_out, offline_ratios):
    """The closing table, from the held-out results before and after, and the paths of what was written."""
    if held_out:
        print(f"\nheld-out accuracy, %, mean of {args.eval_samples} sample{'s' * (args.eval_samples > 1)} at temperature {args.temperature:g}, "
              "+- one standard error over problems")
        print(f"{'level':>8} {'problems':>9} {'before':>14} {'after':>14}")
        for (level, was), (_, now) in zip(*(evaluate.by_level(results).items() for results in held_out)):
            cells = [evaluate.mean_and_error([r["correct"] / args.eval_samples for r in part]) for part in (was, now)]
            print(f"{level!s:>8} {len(was):>9} " + " ".join(f"{100 * mean:>7.1f} +-{100 * error:4.1f}" for mean, error in cells))
    few = max(1, min(5, len(offline_ratios)))
    print(f"\noffline ratio, mean of {few} steps: {statistics.fmean(offline_ratios[:few]):.3f} at the start, "
          f"{statistics.fmean(offline_ratios[-few:]):.3f} at the end")
    plot.plot({out.name: [out]}, out / "curves.png")
    for name, what in {"metrics.jsonl": "every metric of every step", "samples.jsonl": "a few rollouts of every step",
                       "held_out.jsonl": "every held-out problem at every evaluation",
                       "curves.png": "the curves", "config.json": "flags, versions, commit", "final": "the model"}.items():
        if (out / name).exists():
            print(f"  {out / name}: {what}")
