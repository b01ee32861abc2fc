"""Sample responses to benchmarks and grade them: avg@n and pass@k, with standard errors.

    python evaluate.py --model DIR --paper                  the paper's benchmarks, from the hub
    python evaluate.py --model DIR --paper --data FILE ...  the paper's protocol on your own files
    python evaluate.py --model DIR --bench aime24 --samples 8 --temperature 1
    torchrun --nproc_per_node=8 evaluate.py --model DIR ... one engine per rank, the same table
    python evaluate.py --compare runs/A runs/B              A against B, problem by problem

    main
      1. read the benchmarks; what can be wrong is found here, before slow starts
      2. start the verifier and the engine, make the directory
      3. sample and grade the benchmarks; write NAME.jsonl of each when it is done
      4. print the table, which goes to table.md, too

The seed of a problem depends on nothing but --seed and its position in its benchmark, so the number
of ranks does not change the table on a CPU. On a GPU the last digits of the logits depend on which
prompts are computed together, and a response may differ.
"""

import common  # noqa: F401 (it quiets other libraries, so it comes before them)

# isort: split
import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import reward
import rollout
from common import benchmarks, data, distributed, flags, model, report


class TestSet(NamedTuple):
    """A benchmark from the hub, or a file of problems."""

    name: str
    problems: list[dict]  # with "prompt", "answer", "prompt_ids" and perhaps "level"
    samples: int  # n, responses per problem
    note: str  # a sentence on the problems that were left out


def main(args) -> None:
    """Evaluate args.model. Under torchrun every rank calls it, and rank 0 prints the table."""
    # 1. Read the benchmarks.
    if args.sampler == "vllm":
        rollout.check_vllm()
    config, tokenizer = model.load_config_and_tokenizer(args)
    test_sets = load_test_sets(args, tokenizer)
    longest = max(len(p["prompt_ids"]) for test_set in test_sets for p in test_set.problems)
    model.check_context(config, longest, args.max_response_tokens)

    # 2. Start the verifier, which fails fast, then the engine.
    with reward.Verifier(function=args.reward) as verifier:
        distributed.init_process_group()
        is_rank_0 = distributed.rank() == 0
        sampler = rollout.build(
            args,
            max_prompt_tokens=longest,
            end_token_ids=model.end_token_ids(args.model, config, tokenizer),
            config_overrides=model.overrides_of(args),
            top_p=args.top_p,
            gpu_memory_utilization=args.gpu_memory_utilization,
        )
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = Path(args.out or f"runs/eval-{Path(args.model).name}-{stamp}")
        if is_rank_0:
            report.make_directory(out)

        # 3. Sample and grade the benchmarks.
        results = {}
        for name, problems, n, _ in test_sets:
            results[name] = measure(sampler, verifier, problems, n, args.seed)
            if is_rank_0:
                report.replace_file(out / f"{name}.jsonl", report.lines_of(results[name]))
        lost = distributed.total_over_ranks({"timeouts": verifier.timeouts})["timeouts"]
        sampler.close()

    # 4. Print the table.
    if is_rank_0:
        lines = settings(args, test_sets)
        lines += ["", *report.markdown_table(table(results)), "", TABLE_NOTE.format(lost)]
        report.replace_file(out / "table.md", "\n".join(lines) + "\n")
        report.say("\n".join(["", *lines, "", f"written to {out}"]))


# ---------------------------------------------------------------------------------------- measuring


def measure(sampler, verifier, problems: list[dict], n: int, seed: int) -> list[dict]:
    """Sample n responses to each problem, grade them, and return one result per problem.

    Every rank calls this with the same arguments. Each engine samples its share of the problems,
    each rank grades its share of the responses, and every rank gets all results.

    Args:
        sampler: rollout.Sampler or rollout.TransformersSampler.
        verifier: reward.Verifier. A response is right if its reward is exactly 1.
        problems: dicts with "prompt", "answer", "prompt_ids" and perhaps "level".
        n: responses per problem.
        seed: a problem's own seed is derived from this one and from its index in `problems`.

    Returns:
        Results as common/report.py describes them, in the order of the problems.
    """
    seeds = [distributed.derive_seed(seed, "evaluate", index) for index in range(len(problems))]
    requests = [(p["prompt_ids"], own) for p, own in zip(problems, seeds, strict=True)]
    sample = functools.partial(sample_share, sampler, n)
    groups = distributed.share_work(requests, sample, sampler.tensor_parallel)
    pairs = [(r.text, p["answer"]) for p, group in zip(problems, groups) for r in group]
    rewards = distributed.share_work(pairs, functools.partial(grade_share, verifier))
    results = []
    for index, (problem, group) in enumerate(zip(problems, groups, strict=True)):
        result = {
            "prompt": problem["prompt"],
            "level": problem.get("level"),
            "samples": n,
            "correct": rewards[index * n : (index + 1) * n].count(1.0),
            "lengths": [len(r.ids) for r in group],
            "truncated": sum(r.truncated for r in group),
            "responses": [r.text for r in group],
        }
        results.append(result)
    return results


def sample_share(sampler, n: int, requests: list[tuple]) -> list[list[rollout.Rollout]]:
    """Return n responses to each (prompt ids, seed) of this rank's share."""
    prompts, seeds = [ids for ids, _ in requests], [seed for _, seed in requests]
    return sampler.generate(prompts, seeds, n, with_logp=False)


def grade_share(verifier, pairs: list[tuple]) -> list[float]:
    """Return the rewards of this rank's share of the (response, answer) pairs."""
    return verifier.score([response for response, _ in pairs], [answer for _, answer in pairs])


def load_test_sets(args, tokenizer) -> list[TestSet]:
    """Read the benchmarks of --bench and the files of --data; tokenise their prompts."""
    loaded = {name: benchmarks.load_benchmark(args, name, tokenizer) for name in args.bench}
    for source in args.data:
        loaded[data.source_name(source)] = data.load_problems(args, source, tokenizer)
    test_sets = []
    for name, (problems, note) in loaded.items():
        n = benchmarks.paper_samples(name) if args.paper else args.samples
        test_sets.append(TestSet(name, problems, n, note))
    return test_sets


# ---------------------------------------------------------------------------------------- the table

# The paper averages these benchmarks apart from the others, as out of distribution. Files count by
# the beginning of their names.
OUT_OF_DISTRIBUTION = ("arc_c", "arc-c", "gpqa")
TABLE_NOTE = (
    "±: one standard error over problems. tokens: mean response length. "
    "The verifier gave up {} responses, which count as wrong."
)
NO_SETTINGS = ("bench", "data", "paper", "samples", "out")  # the table says n


def settings(args, test_sets: list[TestSet]) -> list[str]:
    """Return what the numbers depend on, as the lines of a Markdown list."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    known = report.versions_and_commit()
    found |= {"device": device} | known["versions"] | {"commit": known["commit"]}
    pairs = [*found.items(), *((test_set.name, test_set.note) for test_set in test_sets)]
    return [f"- {name}: {value}" for name, value in pairs if value not in (None, "", {})]


def table(results: dict[str, list[dict]]) -> list[list]:
    """Return the head and the rows of the table of {benchmark: its results}, as lists of cells."""
    most_samples = max(rows[0]["samples"] for rows in results.values())
    ks = [2**i for i in range(1, most_samples.bit_length())]  # pass@1 is avg@n
    head = ["benchmark", "problems", "n", "avg@n, %", *(f"pass@{k}, %" for k in ks)]
    rows = [[*head, "truncated, %", "tokens"]]
    means = {"mean": [], "mean, out of distribution": []}
    for name, of_benchmark in results.items():
        for level, part in report.by_level(of_benchmark).items():
            numbers = report.summary(part)
            row = [name if level == "all" else f"{name}, level {level}"]
            row += [numbers["problems"], numbers["samples"]]
            scores = [numbers.get(f"pass@{k}") for k in (1, *ks)]
            row += ["" if score is None else score.percent() for score in scores]
            rows.append([*row, f"{100 * numbers['truncated']:.1f}", f"{numbers['length']:.1f}"])
        outside = name.lower().startswith(OUT_OF_DISTRIBUTION)
        means["mean, out of distribution" if outside else "mean"].append(scores[0])
    for label, members in means.items():
        if len(members) > 1:
            row = [f"{label} of {len(members)}", "", "", mean_of_scores(members).percent()]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def mean_of_scores(scores: list[report.Score]) -> report.Score:
    """Return the mean of independent Scores; its error is sqrt(sum of squared errors) / count."""
    mean = sum(score.mean for score in scores) / len(scores)
    error = math.hypot(*(score.error for score in scores)) / len(scores)
    return report.Score(mean, error)


# ------------------------------------------------------------------------ comparing two evaluations


def compare(path_a: str, path_b: str) -> None:
    """Print how evaluation A differs from B: accuracies, paired difference, exclusive solves.

    Raises:
        SystemExit: the two have no benchmark in common, or other problems in it.
    """
    a, b = read_evaluation(path_a), read_evaluation(path_b)
    names = [name for name in a if name in b]
    if not names:
        raise SystemExit(f"error: --compare: no benchmark is in both: {sorted(a)} and {sorted(b)}")
    rows = [["benchmark", "problems", "A, %", "B, %", "A - B", "A alone solves", "B alone solves"]]
    for name in names:
        if [r["prompt"] for r in a[name]] != [r["prompt"] for r in b[name]]:
            raise SystemExit(f"error: --compare: {name} is not the same problems in both")
        scores = report.compare_results(a[name], b[name])
        cells = [scores[key].percent() for key in ("a", "b", "difference")]
        rows.append([name, len(a[name]), *cells, *exclusive_solves(a[name], b[name])])
    print(f"- A: {path_a}\n- B: {path_b}\n")
    print("\n".join(report.markdown_table(rows)))
    print("\n±: one standard error; A - B is paired. Solved: over half of the samples are right.")
    print("Compare what was sampled alike: settings are in table.md, or in config.json of a run.")


def read_evaluation(path: str) -> dict[str, list[dict]]:
    """Return {benchmark: its results} of an evaluation, or of a training run's last evaluation."""
    is_training = Path(path, "config.json").exists()
    files = Path(path).glob("held_out.jsonl" if is_training else "*.jsonl")
    results = {file.stem: report.read_results(file) for file in sorted(files)}
    if not any(results.values()):
        raise SystemExit(
            f"error: --compare: {path} holds no results (a run has some with --eval-data)"
        )
    if is_training:
        rows = results["held_out"]
        results["held_out"] = [row for row in rows if row["step"] == rows[-1]["step"]]
    return results


def exclusive_solves(a: list[dict], b: list[dict]) -> tuple[int, int]:
    """Return how many problems are solved in a alone and in b alone (the paper's Table 4).

    a and b are results of the same problems. Solved means that over half of the samples are right.
    """
    solved = [[2 * r["correct"] > r["samples"] for r in results] for results in (a, b)]
    pairs = list(zip(*solved, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


if __name__ == "__main__":
    with distributed.one_sentence():
        ARGS = flags.parse_evaluation_args()
        if ARGS.compare:
            compare(*ARGS.compare)
        else:
            record(main)(ARGS)
