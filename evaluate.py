"""Sample answers to benchmarks and score them: avg@n and pass@k with standard errors.

    python evaluate.py --model DIR --paper                  the paper's benchmarks, from the hub
    python evaluate.py --model DIR --paper --data FILE ...  the paper's protocol on your own files
    python evaluate.py --model DIR --bench aime24 --samples 8 --temperature 1
    torchrun --nproc_per_node=8 evaluate.py --model DIR ... one engine per rank, the same table
    python evaluate.py --compare runs/A runs/B              A against B, problem by problem

    main
      1. read the benchmarks; check everything that can be wrong
      2. make the directory, or find it and read the responses that it holds
      3. start an engine
      4. sample the responses that are missing; score all of them
      5. print the table

If an evaluation is interrupted, the same command continues it. Every response is written as soon as
its problem is done, and the seed of a problem depends on nothing but --seed and its position in its
benchmark. So neither interruptions nor the number of ranks change the table on a CPU. On a GPU the
last digits of the logits depend on which prompts are computed together, and a response may differ.
"""

from common import flags

# Flags are read before the slow imports, so that --help and wrong flags are answered at once.
ARGS = flags.parse_evaluation_args() if __name__ == "__main__" else None

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
from pathlib import Path

import reward
from common import curves, data, distributed, report, terminal
from rollout import Sampler, check_vllm

# The numbers depend on these flags.
DECISIVE_FLAGS = (
    "model",
    "template",
    "system_prompt",
    "temperature",
    "top_p",
    "max_response_tokens",
    "seed",
    "rope_theta",
    "max_position_embeddings",
    "reward",
    "tensor_parallel",
)


@dataclasses.dataclass
class TestSet:
    """A benchmark or a file of problems."""

    name: str
    problems: list  # of dicts with "prompt", "answer", "prompt_ids" and perhaps "level"
    samples: int  # n, responses per problem
    note: str = ""  # what was left out of the problems, if anything was


def main(args) -> None:
    """Evaluate args.model. Under torchrun every rank runs this, and rank 0 prints the table."""
    # 1. Read the benchmarks; check everything that can be wrong before an engine starts.
    terminal.begin_phase("model and data")
    check_vllm()
    config, tokenizer = data.load_config_and_tokenizer(
        args.model, args.rope_theta, args.max_position_embeddings, args.trust_remote_code
    )
    test_sets = load_test_sets(args, tokenizer)
    longest_prompt = max(len(p["prompt_ids"]) for test in test_sets for p in test.problems)
    data.check_context(config, longest_prompt, args.max_response_tokens)
    for test in test_sets:
        data.check_vocabulary(args.model, config, tokenizer, test.problems)
    data.check_weights(args.model, config, args.trust_remote_code)

    # The verifier's worker processes start first, before this process holds threads or a GPU.
    terminal.begin_phase("verifier")
    with reward.Verifier(function=args.reward) as verifier:
        # 2. Make the directory, or find it and read the responses that it holds.
        terminal.begin_phase("process group")
        distributed.init_process_group()
        terminal.end_phase()
        my_rank = distributed.rank()  # kept, since the process group ends with the engine
        with terminal.progress("digests of weights and problems"):
            settings = describe(args, config, test_sets)
        for test in test_sets:
            if test.note and my_rank == 0:
                terminal.say(f"{test.name}: {test.note}")
        with evaluation_directory(args, settings) as out:
            recorded = read_generations(out)

            # 3. Start an engine, unless no response is missing.
            sampler = None
            if is_incomplete(recorded, test_sets):
                terminal.begin_phase("sampler (vLLM)")
                end_token_ids = data.end_token_ids(args.model, config, tokenizer)
                sampler = start_sampler(args, longest_prompt, end_token_ids)
                terminal.end_phase()

            # 4. Sample the responses that are missing; score all of them.
            results, timeouts = measure_all(test_sets, sampler, verifier, args.seed, recorded, out)
            if sampler:
                sampler.close()

            # 5. Print the table.
            if my_rank == 0:
                report.evaluation_table(out, settings, results, timeouts)


# ---------------------------------------------------------------------------------------- measuring


def measure(
    sampler, verifier, problems, *, samples, seed, label=None, recorded=None, record=None
) -> list[dict]:
    """Sample responses to problems, score them, and return one result per problem.

    Every rank calls this with the same arguments. Each engine does its share of the problems, and
    every rank gets all results.

    Args:
        sampler: rollout.Sampler, or None if `recorded` has responses to every problem.
        verifier: reward.Verifier. A response is right if its reward is exactly 1.
        problems: dicts with "prompt", "answer", "prompt_ids" and perhaps "level".
        samples: n, responses per problem.
        seed: a problem's own seed is derived from this one and from its index in `problems`.
        label: what the terminal shows meanwhile; without it nothing.
        recorded: {index of a problem: its responses} of an earlier call. These problems are not
            sampled again.
        record: a function that is called with (index, responses) as soon as a problem is done. A
            response is a dict: "text", "tokens" (their number) and "truncated".

    Returns:
        Results as common/report.py describes them, in the order of the problems.
    """
    measurement = Measurement(sampler, verifier, samples, seed, label, recorded or {}, record)
    ranks_per_engine = sampler.tensor_parallel if sampler else 1
    return distributed.share_work(list(enumerate(problems)), measurement.run, ranks_per_engine)


@dataclasses.dataclass
class Measurement:
    """The arguments of `measure`, and what a rank does with its share of the problems."""

    sampler: Sampler | None
    verifier: reward.Verifier
    samples: int
    seed: int
    label: str | None
    recorded: dict
    record: object  # a function or None

    def run(self, numbered: list) -> list[dict]:
        """Return the results of (index, problem) pairs."""
        responses = self.sample(numbered)
        return self.score([problem for _, problem in numbered], responses)

    def sample(self, numbered: list) -> list[list[dict]]:
        """Return the responses to (index, problem) pairs; those recorded are not sampled again."""
        found = {}
        missing = []
        for index, problem in numbered:
            if index in self.recorded:
                found[index] = self.recorded[index]
            else:
                missing.append((index, problem))
        if missing:
            prompts = [problem["prompt_ids"] for _, problem in missing]
            seeds = [distributed.derive_seed(self.seed, "evaluate", index) for index, _ in missing]
            with terminal.progress(self.label, len(numbered), done=len(found)) as part:
                for position, rollouts in self.sampler.stream(prompts, seeds, self.samples):
                    index = missing[position][0]
                    found[index] = [response_of(rollout) for rollout in rollouts]
                    if self.record:
                        self.record(index, found[index])
                    part.update()
        return [found[index] for index, _ in numbered]

    def score(self, problems: list, responses: list[list[dict]]) -> list[dict]:
        """Return the results of problems and their responses."""
        texts, answers = [], []
        for problem, group in zip(problems, responses, strict=True):
            texts += [response["text"] for response in group]
            answers += [problem["answer"]] * len(group)
        with terminal.progress(self.label and f"{self.label}, grading", len(texts)) as part:
            rewards = self.verifier.score(texts, answers, each_done=part.update)

        results = []
        start = 0
        for problem, group in zip(problems, responses, strict=True):
            group_rewards = rewards[start : start + len(group)]
            start += len(group)
            result = {
                "prompt": problem["prompt"],
                "level": problem.get("level"),
                "samples": self.samples,
                "correct": group_rewards.count(1.0),
                "lengths": [response["tokens"] for response in group],
                "truncated": sum(response["truncated"] for response in group),
            }
            results.append(result)
        return results


def response_of(rollout) -> dict:
    """Return what is recorded of a rollout.Rollout."""
    return {"text": rollout.text, "tokens": len(rollout.ids), "truncated": rollout.truncated}


# --------------------------------------------------------------------------- steps of an evaluation


def load_test_sets(args, tokenizer) -> list[TestSet]:
    """Read the benchmarks of --bench and the files of --data; tokenise their prompts."""
    sources = {name: data.load_benchmark(name) for name in args.bench}
    for source in args.data:
        sources[data.source_name(source)] = data.load_problems(source, columns=args.columns)
    test_sets = []
    for name, problems in sources.items():
        tokenized, _, _ = data.tokenize(
            problems, tokenizer, args.template, args.system_prompt, math.inf, math.inf
        )
        samples = data.paper_samples(name) if args.paper else args.samples
        note = data.changes(tokenized, args.template, args.system_prompt)
        test_sets.append(TestSet(name, tokenized, samples, note.removeprefix(", ")))
    return test_sets


def describe(args, config, test_sets: list[TestSet]) -> dict:
    """Return everything that the numbers depend on.

    An evaluation is continued only if all of this is unchanged.
    """
    import torch

    device = "CPU, float32"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, bfloat16"
    settings = {name: getattr(args, name) for name in DECISIVE_FLAGS}
    settings["weights"] = weights_digest(args.model) or getattr(config, "_commit_hash", None)
    settings["benchmarks"] = {
        test.name: f"{len(test.problems)} problems ({problems_digest(test.problems)}), "
        f"{test.samples} samples each"
        for test in test_sets
    }
    settings["device"] = device
    settings["versions"] = report.versions_and_commit()["versions"]
    return settings


def problems_digest(problems: list[dict]) -> str:
    """Return a hash of what is asked and what is right."""
    content = [(problem["prompt_ids"], problem["answer"]) for problem in problems]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


# What decides a response besides the weights: configs, tokenizer, chat template, code.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*token*",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*.py",
    "*.index.json",
)
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
WHOLE = 2**30  # bytes of weights up to which all of them are read
BLOCK, BLOCKS = 2**16, 16  # above that: bytes per block, and blocks per tensor


def weights_digest(model: str) -> str | None:
    """Return a hash of what decides a model's responses; None for a model from the hub.

    It is of every byte, except in .safetensors files of more than WHOLE bytes in total. Of these
    it reads the header, and of each tensor BLOCKS blocks that are spread over all of it: training
    changes every tensor everywhere, and 15 GB would take too long.
    """
    weights, others = find_files(model, WEIGHT_FILES), find_files(model, MODEL_FILES)
    if not weights and not others:
        return None
    total = sum(path.stat().st_size for path in weights)
    digest = hashlib.sha256()
    for path in [path for path in others if path not in weights] + weights:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            if path.suffix == ".safetensors" and total > WHOLE:
                hash_tensors(file, digest)
            else:
                while chunk := file.read(2**24):
                    digest.update(chunk)
    return digest.hexdigest()[:12]


def find_files(folder: str, patterns: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder that match one of the patterns, sorted, each once."""
    found = {path for pattern in patterns for path in Path(folder).glob(pattern)}
    return sorted(path for path in found if path.is_file())


def hash_tensors(file, digest) -> None:
    """Add to a digest the header of an open .safetensors file, and blocks of each of its tensors.

    data.check_weights has read the header before, so it is whole.
    """
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length)
    digest.update(header)
    for name, tensor in sorted(json.loads(header).items()):
        if name == "__metadata__":
            continue
        start, end = tensor["data_offsets"]
        last = max(0, end - start - BLOCK)  # where the last block begins
        for offset in sorted({last * i // (BLOCKS - 1) for i in range(BLOCKS)}):
            file.seek(8 + length + start + offset)
            digest.update(file.read(min(BLOCK, end - start - offset)))


@contextlib.contextmanager
def evaluation_directory(args, settings: dict):
    """Make the evaluation's directory, or find it with the same settings: `with ... as path`.

    Rank 0 makes it and keeps a second evaluation out of it until the block ends; every rank gets
    its path.

    Raises:
        SystemExit: the directory cannot be made, or holds something else, or an evaluation with
            other settings, or one that is running.
    """
    import torch.distributed as dist

    out, settings_file = None, contextlib.nullcontext()
    if distributed.rank() == 0:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        out = Path(args.out or f"runs/eval-{Path(args.model).name}-{key}")
        if out.exists() and not (out / "settings.json").is_file():
            raise SystemExit(
                f"error: --out {out} exists and holds no evaluation: name another directory"
            )
        report.make_directory(out, exist_ok=True)
        settings_file = open_locked(out / "settings.json")
    with settings_file as file:
        if file:
            check_settings(file, out, settings)
        message = [out]
        dist.broadcast_object_list(message)
        # A rank on another machine makes the directory there, if the file system is not shared.
        yield report.make_directory(message[0], exist_ok=True)


def open_locked(path: Path):
    """Open a file to read and append; nobody else can lock it until it is closed."""
    try:
        file = open(path, "a+")  # noqa: SIM115 (the caller closes it)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SystemExit(
            f"error: --out {path.parent}: another evaluation is writing there; "
            "wait for it, or name another directory"
        ) from error
    except OSError as error:
        raise SystemExit(f"error: --out {path} cannot be opened: {error.strerror}") from error
    return file


def check_settings(file, out: Path, settings: dict) -> None:
    """Compare the settings in an open settings.json with `settings`; write them if it is empty.

    Raises:
        SystemExit: they differ; the first setting that does is named. Or the file cannot be read.
    """
    file.seek(0)
    text = file.read()
    if not text and not any(out.glob("generations*")):
        file.write(json.dumps(settings, indent=1) + "\n")
        file.flush()
        return
    try:
        found = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise SystemExit(f"error: {out}/settings.json is broken: name another --out") from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise SystemExit(
                f"error: --out {out} holds an evaluation with another {name}, {found.get(name)}, "
                f"not {value}: name another directory"
            )


def read_generations(out: Path) -> dict[str, dict[int, list]]:
    """Return {benchmark: {index of a problem: its responses}} of what all ranks have written.

    A program that is killed can leave a line cut off. Such a line is not JSON and is ignored; its
    problem is sampled again, with the same seed.
    """
    found = {}
    for path in sorted(out.glob("generations.*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                row = json.loads(line)
                found.setdefault(row["benchmark"], {})[row["index"]] = row["responses"]
    return found


def open_generations(out: Path):
    """Open this rank's generations.RANK.jsonl to append to it.

    Each line is on disk as soon as it is written. A line that was cut off is ended first, so that
    the next one does not continue it.
    """
    path = out / f"generations.{distributed.rank()}.jsonl"
    file = open(path, "a", buffering=1)  # noqa: SIM115 (the caller closes it)
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        file.write("\n")
    return file


def write_generation(file, benchmark: str, index: int, responses: list[dict]) -> None:
    """Append the responses to one problem to an open file."""
    row = {"benchmark": benchmark, "index": index, "responses": responses}
    file.write(json.dumps(row) + "\n")


def is_incomplete(recorded: dict, test_sets: list[TestSet]) -> bool:
    """Tell whether responses to any problem are missing."""
    return any(len(recorded.get(test.name, {})) < len(test.problems) for test in test_sets)


def start_sampler(args, longest_prompt: int, end_token_ids: list[int] | None = None) -> Sampler:
    """Start an engine for args.model, with the settings of the flags."""
    return Sampler(
        args.model,
        max_prompt_tokens=longest_prompt,
        max_response_tokens=args.max_response_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        config_overrides=data.overrides_of(args),
        tensor_parallel=args.tensor_parallel,
        end_token_ids=end_token_ids,
        gpu_memory_utilization=args.gpu_memory_utilization,
        trust_remote_code=args.trust_remote_code,
        seed=args.seed,
    )


def measure_all(
    test_sets: list[TestSet], sampler, verifier, seed: int, recorded: dict, out: Path
) -> tuple[dict, dict]:
    """Measure every test set and write new responses to this rank's file.

    Returns:
        ({name: results}, {name: how many responses the verifier gave up}).
    """
    results, timeouts = {}, {}
    with open_generations(out) as file:
        for test in test_sets:
            found = recorded.get(test.name, {})
            with terminal.progress(test.name):  # what other ranks do when this one is done
                results[test.name], timeouts[test.name] = measure_test_set(
                    test, sampler, verifier, seed, found, file
                )
    return results, timeouts


def measure_test_set(
    test: TestSet, sampler, verifier, seed: int, recorded: dict, file
) -> tuple[list[dict], int]:
    """Return a test set's results, and how many responses the verifier gave up on all ranks.

    New responses are appended to `file`. Ranks that share an engine hold the same responses: only
    the first of them records and counts.
    """
    is_first = sampler is None or distributed.rank() % sampler.tensor_parallel == 0
    record = functools.partial(write_generation, file, test.name) if is_first else None
    timeouts_before = verifier.timeouts
    results = measure(
        sampler,
        verifier,
        test.problems,
        samples=test.samples,
        seed=seed,
        label=test.name,
        recorded=recorded,
        record=record,
    )
    timeouts = verifier.timeouts - timeouts_before if is_first else 0
    return results, distributed.total_over_ranks({"timeouts": timeouts})["timeouts"]


# ------------------------------------------------------------------------ comparing two evaluations


@dataclasses.dataclass
class Evaluation:
    """What one evaluation left in its directory."""

    path: str
    results: dict  # {benchmark: list of results}
    settings: dict  # of evaluate.py, or the flags of a training run and the step


def compare(path_a: str, path_b: str, out: str | None = None) -> None:
    """Print how evaluation A differs from B, problem by problem.

    The table goes to comparison.md, its numbers to comparison.json and the curves of pass@k to
    pass.png, in the directory `out`.

    Raises:
        SystemExit: the two do not hold the same problems, or have no benchmark in common.
    """
    a, b = read_evaluation(path_a), read_evaluation(path_b)
    names = [name for name in a.results if name in b.results]
    if not names:
        raise SystemExit(
            f"error: --compare: no benchmark in common: {path_a} has {', '.join(a.results)}; "
            f"{path_b} has {', '.join(b.results)}"
        )
    numbers, pass_curves = {}, {}
    for name in names:
        check_same_problems(a, b, name)
        numbers |= compare_benchmark(name, a.results[name], b.results[name])
        for evaluation in (a, b):
            results = evaluation.results[name]
            samples = results[0]["samples"]
            if samples > 1:
                curve = report.pass_curve(results, range(1, samples + 1))
                pass_curves[f"{evaluation.path}, {name}"] = curve

    default = f"runs/compare-{Path(path_a).name}-{Path(path_b).name}"
    out = report.make_directory(out or default, exist_ok=True)
    written = {"a": path_a, "b": path_b, "results": numbers}
    report.write_json(out / "comparison.json", report.without_nan(written))
    lines = [f"- A: {path_a}", f"- B: {path_b}", *differing_settings(a, b), ""]
    lines += report.markdown_table(comparison_rows(numbers))
    text = "\n".join(lines)
    (out / "comparison.md").write_text(text + "\n")
    files = ["comparison.md", "comparison.json", *(["pass.png"] if pass_curves else [])]
    terminal.say(f"{text}\n\n{out}: {', '.join(files)}")
    if pass_curves:  # last, since matplotlib may be missing
        curves.pass_at_k(pass_curves, out / "pass.png")


def read_evaluation(path: str) -> Evaluation:
    """Read the results of evaluate.py, or the last held-out evaluation of a training run.

    Raises:
        SystemExit: neither is there, or it is empty or broken.
    """
    folder = Path(path)
    if (folder / "results.jsonl").is_file():
        file, settings_file, key = "results.jsonl", "results.json", "settings"
    elif (folder / "held_out.jsonl").is_file():
        file, settings_file, key = "held_out.jsonl", "config.json", "flags"
    else:
        raise SystemExit(
            f"error: --compare {path}: no results.jsonl (of evaluate.py, finished) "
            "and no held_out.jsonl (of train_hpt.py) there"
        )
    rows = report.read_results(folder / file, "--compare ")
    last_step = rows[-1].get("step")
    results = {}
    for row in rows:
        if row.get("step") == last_step:
            results.setdefault(row.get("benchmark", "held out"), []).append(row)
    settings = {}
    if (folder / settings_file).is_file():
        try:
            settings = json.loads((folder / settings_file).read_text())[key]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"error: --compare {folder / settings_file}: broken, or of another program: {error}"
            ) from error
    return Evaluation(path, results, settings | {"step": last_step})


def check_same_problems(a: Evaluation, b: Evaluation, name: str) -> None:
    """Raise SystemExit unless both evaluations hold the same problems of a benchmark."""
    prompts_a = [result["prompt"] for result in a.results[name]]
    prompts_b = [result["prompt"] for result in b.results[name]]
    if prompts_a != prompts_b:
        raise SystemExit(
            f"error: --compare: {name} is not the same problems in {a.path} "
            f"({len(prompts_a)} of them) and in {b.path} ({len(prompts_b)}): "
            "evaluate both, to the end, on the same file"
        )


def compare_benchmark(name: str, results_a: list[dict], results_b: list[dict]) -> dict:
    """Return {label: numbers of report.compare_results}, one per level and one for all levels."""
    pairs = []
    for a, b in zip(results_a, results_b, strict=True):
        pairs.append({"level": a["level"], "a": a, "b": b})
    numbers = {}
    for level, part in report.by_level(pairs).items():
        label = name if level == "all" else f"{name}, level {level}"
        numbers[label] = report.compare_results(
            [pair["a"] for pair in part], [pair["b"] for pair in part]
        )
    return numbers


def comparison_rows(numbers: dict) -> list[list]:
    """Return the head and the rows of the comparison's table, as lists of cells."""
    head = ["benchmark", "problems", "A, %", "B, %", "A - B", "95% interval"]
    rows = [[*head, "solved by A alone / by B alone"]]
    for label, part in numbers.items():
        low, high = part["interval"]
        a_alone, b_alone = part["exclusive"]
        row = [
            label,
            part["problems"],
            f"{100 * part['a']:.1f}",
            f"{100 * part['b']:.1f}",
            f"{100 * part['difference']:+.1f}",
            "n/a" if math.isnan(low) else f"[{100 * low:+.1f}, {100 * high:+.1f}]",
            f"+{a_alone}/-{b_alone}",
        ]
        rows.append(row)
    return rows


def differing_settings(a: Evaluation, b: Evaluation) -> list[str]:
    """Return one line per setting in which two evaluations differ.

    A setting that B does not know is left out: the two may come from different programs.
    """
    lines = []
    for name, value in a.settings.items():
        other = b.settings.get(name, value)
        if name not in ("model", "out") and value != other:
            lines.append(f"- {name}: {value} in A, {other} in B")
    return lines


if __name__ == "__main__":
    with distributed.one_failure_message(), terminal.closing():
        if ARGS.compare:
            compare(*ARGS.compare, ARGS.out)
        else:
            main(ARGS)
