"""Sample answers to a file of problems and score them: avg@n and pass@k with standard errors.

    python evaluate.py --model runs/NAME/final --data problems.jsonl
    torchrun --nproc_per_node=8 evaluate.py --model ... --data ...        (the problems are split over the engines)
"""
import argparse
import json
import math
import os


def parse_args(argv=None):
    """The flags; imports nothing heavy."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, usage="evaluate.py [flags]; --help lists them",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory or hub id")
    parser.add_argument("--data", required=True, help=".jsonl, .json or .parquet file, or hub id, as for train_hpt.py")
    parser.add_argument("--samples", type=int, default=8, help="n, samples per problem (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, help="the paper's (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="the paper's (default %(default)s)")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out and counted")
    parser.add_argument("--max-response-tokens", type=int, default=8192, help="(default %(default)s)")
    parser.add_argument("--template", choices=("chat", "plain"), default="chat", help="as for train_hpt.py")
    parser.add_argument("--system-prompt", help="as for train_hpt.py; default: the paper's")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share one engine")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a .jsonl file, which must not exist, for the result of every problem")
    return parser.parse_args(argv)


def pass_at_k(n, c, k):
    """Probability that at least one of k samples is right, from c right of n: 1 - C(n-c, k)/C(n, k), unbiased."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values):
    """Mean of a list and its standard error, from the sample standard deviation (nan for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def measure(llm, verifier, problems, *, samples, seed, max_response_tokens, temperature, top_p=1.0, tensor_parallel=1,
            progress=None):
    """Sample each problem (it has "prompt_ids") `samples` times and score: one dict a problem, in order.

    {"prompt", "level", "samples", "correct", "lengths" (tokens), "truncated" (count)}. Every rank calls it with the same
    arguments and gets the whole list.
    """
    import rollout

    def work(jobs):
        rolled = rollout.generate(llm, [p["prompt_ids"] for _, p in jobs],
                                  [rollout.derive_seed(seed, "evaluate", i) for i, _ in jobs], n=samples, top_p=top_p,
                                  max_response_tokens=max_response_tokens, temperature=temperature, progress=progress)
        rewards = verifier.score([r.text for group in rolled for r in group],
                                 [p["answer"] for _, p in jobs for _ in range(samples)])
        return [{"prompt": p["prompt"], "level": p.get("level"), "samples": samples, "correct": int(sum(rewards[j * samples : (j + 1) * samples])),
                 "lengths": [len(r.ids) for r in group], "truncated": sum(r.truncated for r in group)}
                for j, ((_, p), group) in enumerate(zip(jobs, rolled))]

    return rollout.spread(list(enumerate(problems)), work, group=tensor_parallel)


def write(path, results, **more):
    """Append the results to a .jsonl file, a problem a line, each with what `more` says."""
    with open(path, "a") as file:
        file.writelines(json.dumps(more | result) + "\n" for result in results)


def by_level(results):
    """{level: its results}, levels sorted, and under "all" everything."""
    levels = sorted({r["level"] for r in results if r["level"] is not None}, key=lambda level: (str(type(level)), level))
    return {level: [r for r in results if r["level"] == level] for level in levels} | {"all": results}


def summary(results, samples):
    """{"avg@n": .., "pass@k": .. for k = 1, 2, 4 .. n} as (mean, standard error) pairs over problems."""
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    scores = {f"avg@{samples}": mean_and_error([r["correct"] / samples for r in results])}
    return scores | {f"pass@{k}": mean_and_error([pass_at_k(samples, r["correct"], k) for r in results]) for k in ks}


def main(args):
    """Load, sample, score, print the table. Under torchrun rank 0 prints."""
    import data
    import reward
    import rollout

    for good, sentence in (
            (args.samples >= 1, f"--samples must be at least 1, not {args.samples}"),
            (0 <= args.temperature < math.inf, f"--temperature must be 0 or more, not {args.temperature}"),
            (args.temperature or args.samples == 1, "--temperature 0 always gives the same answer: use --samples 1"),
            (0 < args.top_p <= 1, f"--top-p must be above 0 and at most 1, not {args.top_p}"),
            (0 < args.gpu_memory_utilization <= 1, f"--gpu-memory-utilization is a share, not {args.gpu_memory_utilization}"),
            (args.max_prompt_tokens >= 1, f"--max-prompt-tokens must be at least 1, not {args.max_prompt_tokens}"),
            (args.max_response_tokens >= 1, f"--max-response-tokens must be at least 1, not {args.max_response_tokens}"),
            (args.tensor_parallel >= 1, f"--tensor-parallel must be at least 1, not {args.tensor_parallel}")):
        if not good:
            raise SystemExit(f"error: {sentence}")
    if args.out and os.path.exists(args.out):
        raise SystemExit(f"error: --out {args.out} exists already: name another file, or remove it")
    rollout.check_vllm()
    config, tokenizer = data.load_config_and_tokenizer(args.model)
    system = data.SYSTEM if args.system_prompt is None else args.system_prompt
    problems, long_prompts, _ = data.tokenize(data.load_problems(args.data), tokenizer, args.template, system,
                                              args.max_prompt_tokens, math.inf)
    if not problems:
        raise SystemExit(f"error: --data {args.data}: no prompt fits into --max-prompt-tokens {args.max_prompt_tokens}")
    data.check_context(config, args.max_prompt_tokens, args.max_response_tokens)
    data.check_weights(args.model, config)
    with reward.Verifier() as verifier:
        rank, world = rollout.init_process_group()
        if world % args.tensor_parallel:
            raise SystemExit(f"error: --tensor-parallel {args.tensor_parallel} must divide the number of ranks, {world}")
        llm = rollout.build(args.model, max_tokens=args.max_prompt_tokens + args.max_response_tokens, seed=args.seed,
                            tensor_parallel=args.tensor_parallel, gpu_memory_utilization=args.gpu_memory_utilization)
        results = measure(llm, verifier, problems, samples=args.samples, seed=args.seed, top_p=args.top_p,
                          max_response_tokens=args.max_response_tokens, temperature=args.temperature,
                          tensor_parallel=args.tensor_parallel, progress="evaluate" if rank == 0 else None)
        rollout.close(llm)
    if rank == 0:
        if args.out:
            write(args.out, results)
        print(f"{args.model} on {args.data}: {len(problems)} problems ({long_prompts} left out, prompt too long), "
              f"{args.samples} samples each, temperature {args.temperature}, top-p {args.top_p}, at most "
              f"{args.max_response_tokens} tokens, template {args.template}, seed {args.seed}")
        lengths = [length for r in results for length in r["lengths"]]
        print(f"response length {sum(lengths) / len(lengths):.1f} tokens, truncated "
              f"{sum(r['truncated'] for r in results) / len(lengths):.1%}; percent, +- one standard error over problems\n")
        for row, (level, part) in enumerate(by_level(results).items()):
            scores = summary(part, args.samples)
            if row == 0:
                print(f"{'level':>8} {'problems':>8} " + " ".join(f"{name:>14}" for name in scores))
            print(f"{level!s:>8} {len(part):>8} " + " ".join(f"{100 * m:>7.1f} +-{100 * e:4.1f}" for m, e in scores.values()))


if __name__ == "__main__":
    import rollout
    with rollout.one_voice(quiet=True):
        cli = parse_args()
    with rollout.one_voice():
        main(cli)
