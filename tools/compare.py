"""Train the paper's methods from one base for equally many rollout steps, and draw its comparison, on the toy.

    python compare.py                everything, three seeds; goes on where it was stopped
    python compare.py --seeds 1      one seed
    python compare.py --report       the table and the figures again, from the runs that are there

Each run is the real program, `torchrun train_hpt.py`, as a user would type it; the command is in its log.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RUNS = {  # label: (method, other flags)
    "SFT": ("sft", {}),
    "GRPO": ("grpo", {}),
    "Dr. GRPO": ("dr_grpo", {}),
    "PPO": ("ppo", {}),
    "SFT -> GRPO": ("grpo", {"model": "SFT"}),  # starts from that run's checkpoint
    "LUFFY": ("luffy", {}),
    "SRFT": ("srft", {}),
    "HPT": ("hpt", {}),
    "HPT, gamma 1/8": ("hpt", {"gamma": 1 / 8}),
    "HPT, gamma 2/8": ("hpt", {"gamma": 2 / 8}),
    "HPT, Mix/ON": ("hpt_mix", {}),
    "HPT, OFF/ON": ("hpt_off", {}),
    "GRPO, longer sums": ("grpo", {"data": "longer", "steps": 60, "lr": 5e-4}),
    "HPT, longer sums": ("hpt", {"data": "longer", "steps": 60, "lr": 5e-4}),
}
MAIN = list(RUNS)[:8]  # the paper's table; they are evaluated up to pass@64, the others at 8 samples
LONGER = [label for label in RUNS if RUNS[label][1].get("data") == "longer"]  # trained and tested on what the base never solves
HARD = (5, 6)  # levels that the base solves less than 3 times in 100
PANELS = {"reward/mean": "reward on training prompts", "hpt/offline_ratio": "offline ratio", "policy/entropy": "entropy per token, nats",
          "response_length/mean": "response length, tokens", "eval/pass@1": "held-out accuracy"}


def command(script, **flags):
    """The command line of a script of this folder; True and False are switches."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(Path(__file__).parent / script)]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        line += [f"--{flag}"] if value is True else [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return line


def directory(folder, label, seed):
    """Where a run writes."""
    return folder / f"{label.lower().replace('->', 'then').replace('/', '_').replace(',', '').replace('.', '').replace(' ', '-')}-seed{seed}"


def call(line, log):
    """Run a command, everything it prints into a file; SystemExit names the file where it fails."""
    with open(log, "w") as file:
        print(*line, file=file, flush=True)
        if subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
            raise SystemExit(f"error: a run failed, its output is in {log}")


def work(folder, label, seed, steps, samples, toy_flags):
    """Train one run and evaluate its end; what is there already is kept. True if anything was done."""
    out, (method, more) = directory(folder, label, seed), RUNS[label]
    flags = toy_flags | {"method": method, "seed": seed, "steps": steps, "eval_every": steps // 2} | more
    if flags["model"] in RUNS:
        flags["model"] = directory(folder, flags["model"], seed) / "final"
    if flags["data"] == "longer":
        flags |= {"data": folder / "longer.jsonl", "eval_data": folder / "longer_held_out.jsonl", "max_prompt_tokens": 24}
    done = (out / "final/config.json").exists()
    if not done:
        if out.exists():  # a run that was stopped starts anew; it is kept aside
            out.rename(out.with_name(f"{out.name}.stopped{time.time():.0f}"))
        call(command("train_hpt.py", **flags, out=out), folder / f"{out.name}.log")
    elif (steps := json.loads((out / "config.json").read_text())["flags"]["steps"]) != flags["steps"]:
        raise SystemExit(f"error: {out} took {steps} steps, not {flags['steps']}: name another --out, or the same --steps")
    return deep_evaluation(folder, label, seed, out / "final", samples, toy_flags) or not done


def deep_evaluation(folder, label, seed, model, samples, toy_flags):
    """Many samples of the hard held-out problems, for pass@k, of the first seed of the main methods. True if it was done now."""
    out = directory(folder, label, seed).with_suffix(".pass")
    if seed or label not in [*MAIN, "base"] or (out / "results.jsonl").exists():
        return False
    call(command("evaluate.py", model=model, data=folder / "hard_held_out.jsonl", samples=samples, temperature=1.0, top_p=1.0,
                 max_response_tokens=toy_flags["max_response_tokens"], out=out), folder / f"{out.name}.log")
    return True


def read(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def accuracies(rows, levels=None):
    """Mean accuracy, %, over the problems (of some levels)."""
    return 100 * statistics.fmean(r["correct"] / r["samples"] for r in rows if levels is None or r["level"] in levels)


def spread(values, digits=1):
    """mean ± sample standard deviation over seeds."""
    return f"{statistics.fmean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def report(folder, seeds):
    """Write comparison.md, comparison.png and pass.png from the runs that are finished; return the text."""
    import evaluate
    import plot
    ends, before = {}, None  # label: its finished directories; the base's results
    for label in RUNS:
        ends[label] = [d for seed in range(seeds) if (d := directory(folder, label, seed), (d / "final").exists())[1]]
    ends = {label: directories for label, directories in ends.items() if directories}
    if not ends:
        raise SystemExit(f"error: no finished run in {folder}")
    final, middle = {label: [] for label in ends}, {label: [] for label in ends}
    for label, directories in ends.items():
        for d in directories:
            rows = read(d / "held_out.jsonl")
            final[label].append([r for r in rows if r["step"] == rows[-1]["step"]])
            middle[label].append([r for r in rows if 0 < r["step"] < rows[-1]["step"]])
            if before is None and label not in LONGER and RUNS[label][1].get("model") not in RUNS:
                before = [r for r in rows if r["step"] == 0]
    text = ["| method | seeds | halfway, % | held out, % | levels 5-6, % | rollouts | demonstration tokens | training, s, median |", "|---" * 8 + "|"]
    if before:
        text += [f"| base | | | {accuracies(before):.1f} | {accuracies(before, HARD):.1f} | | | |"]
    for label, results in final.items():
        if label in LONGER:
            continue
        parent = RUNS[label][1].get("model")  # SFT -> GRPO has cost both
        runs = [[d, *([directory(folder, parent, d.name.rsplit('seed')[1])] if parent else [])] for d in ends[label]]
        steps = [[r for part in parts for r in read(part / "metrics.jsonl") if r["step"]] for parts in runs]
        total = lambda name: [sum(r[name] for r in rows) for rows in steps]
        halfway = [accuracies(r) for r in middle[label] if r]  # where a run has one evaluation between first and last
        text += [f"| {label} | {len(results)} | {spread(halfway) if halfway else ''} | {spread([accuracies(r) for r in results])} | "
                 f"{spread([accuracies(r, HARD) for r in results])} | "
                 f"{statistics.fmean(total('data/rollouts')):,.0f} | {statistics.fmean(total('data/demo_tokens')):,.0f} | "
                 f"{statistics.median(total('time/step')):.0f} |"]
    deep = {label: path for label in ["base", *MAIN] if (path := directory(folder, label, 0).with_suffix(".pass") / "results.jsonl").exists()}
    curves = {}
    if deep:
        ks = [2**i for i in range(read(next(iter(deep.values())))[0]["samples"].bit_length())]
        text += ["", "| pass@k, levels 5-6, seed 0, % | " + " | ".join(map(str, ks)) + " |", "|---" * (len(ks) + 1) + "|"]
        for label, path in deep.items():
            rows = read(path)
            curves[label] = {k: 100 * evaluate.mean_pass_at_k(rows, k)[0] for k in ks}
            text += [f"| {label} | " + " | ".join(f"{value:.1f}" for value in curves[label].values()) + " |"]
    if any(label in LONGER for label in final):
        text += ["", "| sums of 7 digits, 60 steps, lr 5e-4 | seeds | before, % | held out, % | share gated at the end | reward at the end |", "|---" * 6 + "|"]
        for label in filter(final.get, LONGER):
            last = [read(d / "metrics.jsonl")[-1] for d in ends[label]]
            gated = [f"{statistics.fmean(r['hpt/sft_frac'] for r in last):.2f}"] if "hpt/sft_frac" in last[0] else [""]
            first = [[r for r in read(d / "held_out.jsonl") if not r["step"]] for d in ends[label]]
            text += [f"| {label} | {len(last)} | {spread([accuracies(r) for r in first])} | {spread([accuracies(r) for r in final[label]])} | {gated[0]} | "
                     f"{statistics.fmean(r['reward/mean'] for r in last):.2f} |"]
    if "HPT" in final and "GRPO" in final:  # solved: right in more than half of the samples
        solved = [{d.name.rsplit("seed")[1]: {r["prompt"] for r in rows if 2 * r["correct"] > r["samples"]}
                   for d, rows in zip(ends[label], final[label])} for label in ("HPT", "GRPO")]  # by seed
        count = lambda a, b: f"+{len(a - b)}/-{len(b - a)}"
        seeds_of_both = sorted(solved[0].keys() & solved[1].keys())
        text += ["", f"Of {len(final['HPT'][0])} held-out problems, solved by HPT and not by GRPO, and the reverse, by seed: "
                 + ", ".join(count(*(s[seed] for s in solved)) for seed in seeds_of_both)
                 + "; as a yardstick, by GRPO and not by GRPO with the next seed, and the reverse: "
                 + ", ".join(count(solved[1][a], solved[1][b]) for a, b in zip(seeds_of_both, seeds_of_both[1:]))]
    (folder / "comparison.md").write_text("\n".join(text) + "\n")
    plot.plot({label: ends[label] for label in MAIN if label in ends}, folder / "comparison.png", PANELS)
    if curves:
        plot.pass_at_k(curves, folder / "pass.png")
    return "\n".join(text)


def main():
    """Run what is missing, a few at a time, and report."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1 of every run (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="rollout steps of every run but those on longer sums, which take 60 (%(default)s)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count()), help="runs at a time, one thread each (%(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="samples of a hard held-out problem for pass@k, seed 0 (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="LABEL", help="of " + "; ".join(RUNS))
    parser.add_argument("--out", default="runs/compare", help="(%(default)s)")
    parser.add_argument("--report", action="store_true", help="only the table and the figures, from the runs that are there")
    args = parser.parse_args()
    if min(args.seeds, args.steps, args.jobs, args.samples) < 1:
        parser.error("--seeds, --steps, --jobs and --samples must be at least 1")
    if missing := {RUNS[label][1].get("model") for label in args.only} & set(RUNS) - set(args.only):
        parser.error(f"--only also needs {', '.join(missing)}, whose checkpoint another run starts from")
    import toy
    folder, started = Path(args.out), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if not args.report:
        toy_flags = toy.defaults()
        longer, longer_held_out = toy.problems(counts={7: 500})
        hard = [row for row in toy.problems()[1] if row["level"] in HARD]
        for name, rows in {"longer": longer, "longer_held_out": longer_held_out, "hard_held_out": hard}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        waves = [[(label, seed) for seed in range(args.seeds) for label in args.only if (RUNS[label][1].get("model") in RUNS) == second]
                 for second in (False, True)]  # those that start from another's checkpoint come second
        done, total = 0, sum(map(len, waves))
        print(f"{total} runs of {args.steps} steps, {args.jobs} at a time, into {folder}", flush=True)
        deep_evaluation(folder, "base", 0, toy_flags["model"], args.samples, toy_flags)
        for wave in waves:
            with ThreadPoolExecutor(args.jobs) as pool:
                for (label, seed), new in zip(wave, pool.map(lambda job: work(folder, *job, args.steps, args.samples, toy_flags), wave)):
                    done += 1
                    print(f"{done:>3} of {total}: {label}, seed {seed}{'' if new else ' (was there)'}, "
                          f"{(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    print(f"\n{report(folder, args.seeds)}\n\n{folder}: comparison.md, comparison.png, pass.png, and every run")


if __name__ == "__main__":
    main()
