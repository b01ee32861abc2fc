"""Sample answers to benchmarks and score them: avg@n and pass@k with standard errors; compare two evaluations.

    python evaluate.py --model DIR --paper                       the paper's protocol on all its benchmarks, from the hub
    python evaluate.py --model DIR --paper --data FILE ...       ... on files of your own
    python evaluate.py --model DIR --bench aime24 math500 --samples 8 --temperature 1
    torchrun --nproc_per_node=8 evaluate.py --model DIR ...      the problems are split over the engines
    python evaluate.py --compare runs/A runs/B                   A against B, problem by problem

The same command again goes on where it was interrupted: generations are kept, and only those that are missing are sampled.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import statistics
import sys
from importlib import metadata
from pathlib import Path

import benchmarks
import data
import reward
import rollout

PAPER = {"temperature": 0.6, "top_p": 0.95, "max_response_tokens": 8192, "system_prompt": data.SYSTEM}


def parse_args(argv=None):
    """The flags; imports nothing heavy."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, usage="evaluate.py [flags]; --help lists them",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face directory or hub id")
    parser.add_argument("--bench", nargs="+", default=[], choices=benchmarks.BENCHMARKS, metavar="NAME",
                        help="from the hub: " + ", ".join(f"{name} ({b.hub})" for name, b in benchmarks.BENCHMARKS.items()))
    parser.add_argument("--data", nargs="+", default=[], help=".jsonl, .json or .parquet files, or hub ids, as for train_hpt.py")
    parser.add_argument("--paper", action="store_true", help="the paper's protocol: temperature 0.6, top-p 0.95, 8192 tokens, its system "
                        "prompt, 32 samples for AIME and AMC (files named so) and 1 elsewhere; all benchmarks where none is named")
    parser.add_argument("--samples", type=int, help="n, samples per problem (default 8)")
    parser.add_argument("--temperature", type=float, help="(default 0.6)")
    parser.add_argument("--top-p", type=float, help="(default 0.95)")
    parser.add_argument("--max-response-tokens", type=int, help="(default 8192)")
    parser.add_argument("--template", choices=("chat", "plain"), default="chat", help="as for train_hpt.py")
    parser.add_argument("--system-prompt", help="as for train_hpt.py; default: the paper's")
    parser.add_argument("--rope-theta", type=float, help="as for train_hpt.py; a checkpoint of it has it in its config")
    parser.add_argument("--max-position-embeddings", type=int, help="likewise")
    parser.add_argument("--reward", default="reward:grade", metavar="MODULE:FUNCTION", help="as for train_hpt.py; right is what it gives 1")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share one engine")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="directory to write to, or to go on in (default: runs/eval-MODEL-SETTINGS)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two directories: of this program, or of training runs (their "
                        "last held-out evaluation); nothing is sampled")
    args = parser.parse_args(argv)
    if args.compare:
        if args.model or args.bench or args.data or args.paper:
            parser.error("--compare takes two directories, and --out: nothing is sampled")
        return args
    given = [name for name in (*PAPER, "samples") if getattr(args, name) is not None]
    if args.paper and given:
        parser.error(f"--paper sets --{given[0].replace('_', '-')} itself: leave one of the two out")
    for name, value in PAPER.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    args.samples = 8 if args.samples is None else args.samples
    if args.paper and not args.bench + args.data:
        args.bench = list(benchmarks.BENCHMARKS)
    names = args.bench + [Path(source).stem for source in args.data]
    for good, sentence in (
            (args.model, "--model is missing: a Hugging Face directory or hub id"),
            (names, "nothing to evaluate on: name a --bench or a file as --data, or take --paper for all of the paper's"),
            (len(set(names)) == len(names), f"--bench and --data: two are named alike, of {' '.join(names)}"),
            (args.samples >= 1, f"--samples must be at least 1, not {args.samples}"),
            (0 <= args.temperature < math.inf, f"--temperature must be 0 or more, not {args.temperature}"),
            (args.temperature or args.samples == 1, "--temperature 0 always gives the same answer: use --samples 1"),
            (0 < args.top_p <= 1, f"--top-p must be above 0 and at most 1, not {args.top_p}"),
            (0 < args.gpu_memory_utilization <= 1, f"--gpu-memory-utilization is a share, not {args.gpu_memory_utilization}"),
            (0 <= args.seed < 2**32, f"--seed must be from 0 to 2**32 - 1, not {args.seed}"),
            (args.rope_theta is None or 0 < args.rope_theta < math.inf, f"--rope-theta must be above 0, not {args.rope_theta}"),
            (args.max_response_tokens >= 1, f"--max-response-tokens must be at least 1, not {args.max_response_tokens}"),
            (args.tensor_parallel >= 1, f"--tensor-parallel must be at least 1, not {args.tensor_parallel}")):
        if not good:
            parser.error(sentence)
    return args


# ------------------------------------------------------------------------------------------------------------ measures

def pass_at_k(n, c, k):
    """Probability that at least one of k samples is right, from c right of n: 1 - C(n-c, k)/C(n, k), unbiased."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values):
    """Mean of a list and its standard error, from the sample standard deviation (nan for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean_pass_at_k(results, k):
    """pass@k over problems, (mean, standard error); pass@1 is avg@n."""
    return mean_and_error([pass_at_k(r["samples"], r["correct"], k) for r in results])


def by_level(results):
    """{level: its results}, levels sorted, and under "all" everything."""
    levels = sorted({r["level"] for r in results if r["level"] is not None}, key=lambda level: (str(type(level)), level))
    return {level: [r for r in results if r["level"] == level] for level in levels} | {"all": results}


def summary(results):
    """What a list of results of as many samples each comes to: the numbers of results.json, a [mean, standard error] pair a share."""
    n, lengths = results[0]["samples"], [length for r in results for length in r["lengths"]]
    return {"problems": len(results), "samples": n, f"avg@{n}": mean_pass_at_k(results, 1),
            **{f"pass@{k}": mean_pass_at_k(results, k) for k in range(1, n + 1)},
            "truncated": sum(r["truncated"] for r in results) / len(lengths),
            "length/mean": statistics.fmean(lengths), "length/median": statistics.median(lengths), "length/max": max(lengths)}


def measure(llm, verifier, problems, *, samples, seed, max_response_tokens, temperature, top_p=1.0, tensor_parallel=1,
            progress=None, recorded=None, record=None):
    """Sample each problem (it has "prompt_ids") `samples` times and score: one dict a problem, in order.

    {"prompt", "level", "samples", "correct", "lengths" (tokens), "truncated" (count)}. Every rank calls it with the same
    arguments and gets the whole list. recorded: {index: generations} of an earlier call, taken instead of sampling;
    record: function that is given each new one, {"index", "responses": [{"text", "tokens", "truncated"}, ...]}, when it is done.
    """
    from tqdm import tqdm

    def work(jobs):
        done = {i: recorded[i] for i, _ in jobs if i in (recorded or {})}
        todo = [(i, p) for i, p in jobs if i not in done]
        bar = tqdm(desc=progress, total=len(jobs), initial=len(done), leave=False, disable=progress is None,
                   mininterval=0.1 if sys.stderr.isatty() else 30.0)
        if todo:
            for j, group in rollout.stream(llm, [p["prompt_ids"] for _, p in todo], [rollout.derive_seed(seed, "evaluate", i) for i, _ in todo],
                                           n=samples, max_response_tokens=max_response_tokens, temperature=temperature, top_p=top_p):
                i = todo[j][0]
                done[i] = {"index": i, "responses": [{"text": r.text, "tokens": len(r.ids), "truncated": r.truncated} for r in group]}
                if record:
                    record(done[i])
                bar.update()
        bar.close()
        said = [done[i]["responses"] for i, _ in jobs]
        rewards = iter(verifier.score([r["text"] for group in said for r in group], [p["answer"] for _, p in jobs for _ in range(samples)]))
        return [{"prompt": p["prompt"], "level": p.get("level"), "samples": samples, "correct": sum(next(rewards) == 1.0 for _ in group),
                 "lengths": [r["tokens"] for r in group], "truncated": sum(r["truncated"] for r in group)}
                for (_, p), group in zip(jobs, said)]

    return rollout.spread(list(enumerate(problems)), work, group=tensor_parallel)


def write(path, results, **more):
    """Append the results to a .jsonl file, a problem a line, each with what `more` says."""
    with open(path, "a") as file:
        file.writelines(json.dumps(more | result) + "\n" for result in results)


# ------------------------------------------------------------------------------------------------------ an evaluation

def main(args):
    """Load, sample what is not there yet, score, print the table and write it. Under torchrun rank 0 prints."""
    import tables

    rollout.check_vllm()
    config, tokenizer = data.load_config_and_tokenizer(args.model, args.rope_theta, args.max_position_embeddings)
    sources = {name: benchmarks.load(name) for name in args.bench} | {Path(source).stem: data.load_problems(source) for source in args.data}
    sources = {name: data.tokenize(problems, tokenizer, args.template, args.system_prompt, math.inf, math.inf)[0]
               for name, problems in sources.items()}
    samples = {name: benchmarks.paper_samples(name) if args.paper else args.samples for name in sources}
    longest = max(len(p["prompt_ids"]) for problems in sources.values() for p in problems)
    data.check_context(config, longest, args.max_response_tokens)
    data.check_weights(args.model, config)
    with reward.Verifier(function=args.reward) as verifier:
        rank, world = rollout.init_process_group()
        if world % args.tensor_parallel:
            raise SystemExit(f"error: --tensor-parallel {args.tensor_parallel} must divide the number of ranks, {world}")
        settings = describe(args, config, sources, samples)
        out, lock = open_output(args, settings)
        recorded = read_generations(out)
        llm = None
        if sum(map(len, recorded.values())) < sum(map(len, sources.values())):
            override = functools.partial(data.override, rope_theta=args.rope_theta, max_position_embeddings=args.max_position_embeddings)
            llm = rollout.build(args.model, override, max_tokens=longest + args.max_response_tokens, seed=args.seed,
                                tensor_parallel=args.tensor_parallel, gpu_memory_utilization=args.gpu_memory_utilization)
        results, timeouts = {}, {}
        with open(out / f"generations.{rank}.part", "a", buffering=1) as part:  # a line when a problem is done
            for name, problems in sources.items():
                before = verifier.timeouts
                record = lambda row: part.write(json.dumps({"benchmark": name} | row) + "\n") if rank % args.tensor_parallel == 0 else None
                results[name] = measure(llm, verifier, problems, samples=samples[name], seed=args.seed, top_p=args.top_p, record=record,
                                        max_response_tokens=args.max_response_tokens, temperature=args.temperature, recorded=recorded.get(name),
                                        tensor_parallel=args.tensor_parallel, progress=name if rank == 0 else None)
                timeouts[name] = sum(rollout.spread(range(world // args.tensor_parallel), lambda mine: [verifier.timeouts - before] * len(mine),
                                                    args.tensor_parallel))
        if llm:
            rollout.close(llm)
    if rank == 0:
        merge_generations(out)
        tables.report(out, settings, results, timeouts)
        lock.close()


def describe(args, config, sources, samples):
    """All that the numbers depend on, as a dict; an evaluation goes on only where all of it is the same."""
    import torch
    files = [path for pattern in ("config.json", "*.safetensors", "*.bin") for path in sorted(Path(args.model).glob(pattern))]
    weights = hashlib.sha256()
    for path in files:  # a mebibyte of each file tells two checkpoints apart
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size // 2 - 2**19))
            weights.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    digest = lambda problems: hashlib.sha256(repr([(p["prompt_ids"], p["answer"]) for p in problems]).encode()).hexdigest()[:12]
    names = ("model", "template", "system_prompt", "temperature", "top_p", "max_response_tokens", "seed", "rope_theta",
             "max_position_embeddings", "reward", "tensor_parallel")
    packages = ("torch", "transformers", "math-verify", "latex2sympy2_extended", "sympy")
    gpu = torch.cuda.is_available()
    return {name: getattr(args, name) for name in names} | {
        "weights": weights.hexdigest()[:12] if files else getattr(config, "_commit_hash", None),
        "benchmarks": {name: f"{len(problems)} problems ({digest(problems)}), {samples[name]} samples each" for name, problems in sources.items()},
        "device": f"{torch.cuda.get_device_name()}, bfloat16" if gpu else "CPU, float32",
        "versions": {"vllm": rollout.VLLM_VERSION} | {package: metadata.version(package) for package in packages}}


def open_output(args, settings):
    """(directory, the lock on it that rank 0 holds): made by rank 0, or found with the same settings and its parts joined."""
    import torch.distributed as dist
    name, lock = [None], None
    if dist.get_rank() == 0:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        out = Path(args.out or f"runs/eval-{Path(args.model).name}-{key}")
        name[0] = out
        if out.exists() and not (out / "settings.json").is_file():
            raise SystemExit(f"error: --out {out} exists and holds no evaluation: name another directory")
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = open(out / "settings.json", "a+")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SystemExit(f"error: --out {out}: another evaluation is writing there; wait for it, or name another directory") from error
        except OSError as error:
            raise SystemExit(f"error: --out {out} cannot be made: {error.strerror}; name another directory") from error
        lock.seek(0)
        text = lock.read()
        try:
            there = dict(json.loads(text)) if text or list(out.glob("generations*")) else settings
        except (ValueError, TypeError) as error:
            raise SystemExit(f"error: {out}/settings.json is broken: name another --out") from error
        if differ := [key for key in settings if there.get(key) != settings[key]]:
            raise SystemExit(f"error: --out {out} holds an evaluation with another {differ[0]}, {there.get(differ[0])}, not "
                             f"{settings[differ[0]]}: name another directory")
        if not text:
            lock.write(json.dumps(settings, indent=1) + "\n")
            lock.flush()
        merge_generations(out)
    dist.broadcast_object_list(name)
    name[0].mkdir(parents=True, exist_ok=True)  # on another machine
    return name[0], lock


def read_generations(out):
    """{benchmark: {index: {"index", "responses"}}} of all that an evaluation directory holds.

    A line that a kill has cut, perhaps with another one behind it, does not count: what was in it is sampled again, and is the same.
    """
    found = {}
    for path in [*out.glob("generations.jsonl"), *sorted(out.glob("generations.*.part"))]:
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                found.setdefault(row.pop("benchmark"), {})[row["index"]] = row
    return found


def merge_generations(out):
    """Join what the ranks wrote into generations.jsonl, in order; killed at any point it loses nothing."""
    found = read_generations(out)
    with open(out / "generations.jsonl.new", "w") as file:
        file.writelines(json.dumps({"benchmark": name} | rows[i]) + "\n" for name, rows in found.items() for i in sorted(rows))
    (out / "generations.jsonl.new").replace(out / "generations.jsonl")
    for part in out.glob("generations.*.part"):
        part.unlink()


if __name__ == "__main__":
    with rollout.one_voice(quiet=True):
        cli = parse_args()
    with rollout.one_voice():
        if cli.compare:
            import tables
            tables.compare(*cli.compare, cli.out)
        else:
            main(cli)
