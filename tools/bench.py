"""Measure how fast the program is, beside what one would use in its place.

    python -m tools.bench step       seconds of a training step, beside TRL's GRPOTrainer
    python -m tools.bench update     tokens/s of the update, beside a plain Hugging Face pass
    python -m tools.bench rollout    tokens/s of the sampler, beside vLLM's own LLM.generate

Other flags are those of train_hpt.py; without --model it is the toy. Both sides take turns: one
call each to warm up, then --rounds rounds, every other one in reverse order. The table has the
median, the least and the most of the rounds. Leave the machine idle meanwhile.

`step` makes whole runs, each in a process of its own, which ends with a checkpoint in the temporary
directory. TRL has the same model, prompts, lengths, updates, verifier and loss (dr_grpo).
`update` has random weights of --shape, and random sequences: --prompts-per-step times
--samples-per-prompt responses of --lengths, with prompts of --max-prompt-tokens. Under torchrun it
is sharded, and the plain pass is left out.
"""

import common  # noqa: F401 (it quiets other libraries, so it comes before them)

# isort: split
import argparse
import concurrent.futures
import contextlib
import copy
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

import reward
import train_hpt
from common import distributed, flags, metrics, model, plan, report
from common.batches import Sequence, build_micro_batches
from upge import METHODS

SHORTEST = 16  # response tokens
CONFIG = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
CONFIG += ("num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")
SHAPES = {  # the same, in this order
    "toy": ("qwen2", 128, 512, 3, 4, 4, 262, True),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
}


def main(argv: list[str] | None = None) -> None:
    """Run one of the measures. argv: the command line's, if it is not given."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["step", "update", "rollout"], help="what is measured")
    add("--rounds", type=flags.COUNT, default=5, metavar="N", help="rounds that count (5)")
    add("--shape", choices=SHAPES, default="toy", help="update: the model's shape (toy)")
    about = "update: fixed:N or lognormal:MEAN:MAX response tokens (fixed:256)"
    add("--lengths", type=lengths, default=("fixed", 256, 256), metavar="LENGTHS", help=about)
    about = "step: sequences per forward pass of TRL (all of an update)"
    add("--trl-batch", type=flags.COUNT, metavar="N", help=about)
    bench, words = parser.parse_known_args(argv)
    if bench.what != "update" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error(f"{bench.what} compares single processes: leave out torchrun")
    if bench.what == "update" and any(w.startswith(("--model", "--data", "@")) for w in words):
        parser.error("update has random weights and data: leave out --model, --data and @FILE")
    measure = {"step": measure_step, "update": measure_update, "rollout": measure_rollout}
    measure[bench.what](bench, words)


# --------------------------------------------------------------------------------- what they share


def now() -> float:
    """Seconds on a clock, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(rounds: int, sides: dict) -> dict[str, list]:
    """{name: what its function returned in each round}; each is called once before, to warm up."""
    results = {name: [] for name in sides}
    for run in sides.values():
        run()
    for i in range(rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            results[name].append(sides[name]())
    return results


def print_table(title: str, unit: str, sides: dict[str, list[float]], **more: list[str]) -> None:
    """Print what was measured, on what, and a line per side; the first side is ours.

    Args:
        sides: {name: a number per round}.
        more: {head of a further column: a text per side}.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    load, known = os.getloadavg()[0], report.versions_and_commit()
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    rows = [["side", f"{unit}, median", "least", "most", "ours / this", *more]]
    ours = statistics.median(next(iter(sides.values())))
    for i, (name, values) in enumerate(sides.items()):
        median = statistics.median(values)
        numbers = [f"{x:,.2f}" for x in (median, min(values), max(values), ours / median)]
        rows.append([name, *numbers, *(texts[i] for texts in more.values())])
    print(f"{title}\n{device}, {os.cpu_count()} cores, load average {load:.1f}; {versions}")
    print("\n".join([f"commit {known['commit']}", "", *report.markdown_table(rows)]))


# ------------------------------------------------------------------------------------------ rollout


def measure_rollout(bench, words: list[str]) -> None:
    """Tokens/s of the sampler as training uses it, and of LLM.generate on the same requests."""
    from vllm import SamplingParams

    args, method = flags.parse_training_args(words), METHODS["hpt"]
    inputs = train_hpt.load_inputs(args, method)
    _, sampler, policy, _ = train_hpt.start(args, method, inputs)
    sampler.load(policy.weights())
    problems = train_hpt.draw(inputs.problems, 1, args.prompts_per_step, args.seed)
    prompts, n = [p["prompt_ids"] for p in problems], args.samples_per_prompt
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    settings = [
        SamplingParams(
            n=n,
            seed=seed,
            temperature=args.temperature,
            max_tokens=args.max_response_tokens,
            stop_token_ids=sampler.more_end_ids or None,
            logprobs=0,  # of the sampled token only
        )
        for seed in range(len(prompts))
    ]

    def timed(generate) -> tuple[float, list]:
        """(tokens/s, token ids of all responses) of a function that samples."""
        sampler.llm.reset_prefix_cache()
        begin = now()
        responses = generate()
        seconds = now() - begin
        return sum(map(len, responses)) / seconds, responses

    def ours() -> list:
        """What a training step calls."""
        groups = sampler.generate(prompts, range(len(prompts)), n)
        return [r.ids for group in groups for r in group]

    def theirs() -> list:
        """The engine without our sampler: it gives text and log-probabilities, too."""
        outputs = sampler.llm.generate(requests, settings, use_tqdm=False)
        return [list(o.token_ids) for output in outputs for o in output.outputs]

    sides = {"ours": lambda: timed(ours), "LLM.generate": lambda: timed(theirs)}
    results = take_turns(bench.rounds, sides)
    speeds = {name: [speed for speed, _ in rounds] for name, rounds in results.items()}
    print_table(f"rollouts of {args.model}: {len(prompts)} x {n}", "tokens/s", speeds)
    sampled = [responses for rounds in results.values() for _, responses in rounds]
    same = all(responses == sampled[0] for responses in sampled)
    mean = statistics.fmean(map(len, sampled[0]))
    print(f"\n{mean:.1f} tokens per response; both sample {'the same' if same else 'OTHER'} tokens")
    sampler.close()


# ------------------------------------------------------------------------------------------- update


def measure_update(bench, words: list[str]) -> None:
    """Tokens/s of forward, loss and backward, and of a plain pass over the same sequences."""
    from transformers import AutoConfig

    small = ["--max-prompt-tokens", "64", "--prompts-per-step", "32", "--samples-per-prompt", "2"]
    longest = ["--max-response-tokens", str(bench.lengths[2])]
    # The learning rate is next to 0, so that every round has the same work.
    args = flags.parse_training_args(["--model", "-", *small, *words, *longest, "--lr", "1e-12"])
    device = distributed.init_process_group()
    positions = args.max_prompt_tokens + args.max_response_tokens
    shape = dict(zip(CONFIG, SHAPES[bench.shape]))
    config = AutoConfig.for_model(**shape, max_position_embeddings=positions)
    sequences = random_sequences(args, bench.lengths, config.vocab_size)
    tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in sequences)

    lm = random_model(config, torch.bfloat16, device)
    checkpointing = plan.memory_plan(args, config, False).checkpointing
    policy = model.shard(model.Policy(lm, args.temperature), args, device, checkpointing)
    cut = args.tokens_per_microbatch, args.entropy_coef, device, metrics.Counts()
    micro_batches = build_micro_batches({"dr_grpo": sequences}, *cut)

    def ours() -> float:
        """Tokens/s of an update without its optimizer step, which the plain side does not have."""
        begin = now()
        train_hpt.accumulate_gradient(policy, micro_batches, args, metrics.Counts())
        seconds = now() - begin
        policy.step(args.lr, args.max_grad_norm)
        return tokens / seconds

    sides = {"ours": ours}
    if distributed.world_size() == 1:
        sides["plain"] = plain_pass(args, config, sequences, device, checkpointing)
    speeds = take_turns(bench.rounds, sides)
    if distributed.rank() == 0:
        title = f"update of {bench.shape}: {len(sequences)} sequences, {tokens:,} tokens"
        print_table(title, "tokens/s", speeds, **utilisation(speeds, policy.num_parameters()))
    dist.destroy_process_group()


def random_sequences(args, distribution: tuple, vocab_size: int) -> list[Sequence]:
    """Sequences of random tokens, whose advantages are not 0."""
    rng, sequences = random.Random(0), []
    count = args.prompts_per_step * args.samples_per_prompt
    for i, length in enumerate(draw_lengths(distribution, count)):
        prompt = rng.choices(range(vocab_size), k=args.max_prompt_tokens)
        response = rng.choices(range(vocab_size), k=length)
        A, weight = (-1.0) ** i, 1 / (count * args.max_response_tokens)
        sequences.append(Sequence(prompt, response, False, i, A, weight, [-5.0] * length))
    return sequences


def random_model(config, dtype, device):
    """A Hugging Face model with random weights, the same at every call and on every rank."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:  # it is slow to draw many numbers on a CPU
        # A copy of the config, since the policy sets an attention function of its own in it.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def plain_pass(args, config, sequences: list[Sequence], device, checkpointing: bool):
    """A function that runs forward and backward as one writes it with transformers; tokens/s.

    Sequences of similar lengths share a padded batch of at most --tokens-per-microbatch tokens. It
    computes in the trainer's dtype, and checkpoints the gradient if the trainer does.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = random_model(config, dtype, device).train()
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    texts = [(s.prompt_ids + s.response_ids, len(s.prompt_ids)) for s in sequences]
    texts.sort(key=lambda text: -len(text[0]))
    tokens, batches = sum(len(ids) for ids, _ in texts), []
    while texts:
        size = max(1, args.tokens_per_microbatch // len(texts[0][0]))
        batches.append(texts[:size])
        del texts[:size]

    def run() -> float:
        """Tokens/s of forward, cross entropy and backward."""
        begin = now()
        for batch in batches:
            rows = [torch.tensor(ids) for ids, _ in batch]
            ids = pad_sequence(rows, batch_first=True, padding_value=-1).to(device)  # (B, S)
            labels = ids.masked_fill(ids < 0, -100)  # -100: no label
            for line, (_, prompt_tokens) in zip(labels, batch):
                line[:prompt_tokens] = -100
            logits = lm(ids.clamp(min=0), attention_mask=ids >= 0, use_cache=False).logits
            logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (loss / len(sequences)).backward()
            del logits, loss  # else they live on while the next batch is computed
        seconds = now() - begin
        lm.zero_grad()
        return tokens / seconds

    return run


def utilisation(speeds: dict[str, list[float]], parameters: int) -> dict[str, list[str]]:
    """{"MFU": perf/mfu per side}, on a GPU."""
    if not torch.cuda.is_available():
        return {}
    medians = [statistics.median(values) for values in speeds.values()]
    used = [metrics.gpu_metrics(parameters, tokens, 1.0).get("perf/mfu") for tokens in medians]
    return {"MFU": ["" if share is None else f"{share:.1%}" for share in used]}


def lengths(text: str) -> tuple[str, int, int]:
    """An argparse type: (kind, mean, longest) of fixed:N or lognormal:MEAN:MAX."""
    kind, *numbers = text.split(":")
    mean, longest = (int(number) for number in (numbers * 2)[:2])
    if (kind, len(numbers)) not in (
        ("fixed", 1),
        ("lognormal", 2),
    ) or not SHORTEST <= mean <= longest:
        raise ValueError(text)
    return kind, mean, longest


def draw_lengths(distribution: tuple[str, int, int], count: int) -> list[int]:
    """`count` lengths. The log-normal has sigma 1 and that mean before its ends are cut off."""
    kind, mean, longest = distribution
    if kind == "fixed":
        return [mean] * count
    rng, drawn = random.Random(0), []
    while len(drawn) < count:
        length = round(rng.lognormvariate(math.log(mean) - 0.5, 1.0))
        if SHORTEST <= length <= longest:
            drawn.append(length)
    return drawn


# --------------------------------------------------------------------------------------------- step


def measure_step(bench, words: list[str]) -> None:
    """Seconds of a step of ours and of TRL's, in two runs of each."""
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("error: step compares with TRL: pip install trl accelerate")
    words = [*words, "--method", "dr_grpo", "--eval-data", ""]
    flags.parse_training_args(words)  # a wrong flag ends the program here
    runs, steps = {"ours": our_steps, "TRL": trl_steps}, {"ours": [], "TRL": []}
    spawn = multiprocessing.get_context("spawn")
    for name in ("ours", "TRL", "TRL", "ours"):
        # A process of its own: both want the process group, and the GPU, for themselves.
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
            steps[name] += process.submit(runs[name], bench, words).result()
    seconds = {name: [step.pop("seconds") for step in side] for name, side in steps.items()}
    means = {}  # what the two sampled differs, and the time depends on it
    for key in steps["ours"][0]:
        sides = [[step[key] for step in side] for side in steps.values()]
        means[key] = [f"{statistics.fmean(values):.2f}" for values in sides]
    print_table(f"a step, and one of TRL {metadata.version('trl')}", "seconds", seconds, **means)


def our_steps(bench, words: list[str]) -> list[dict]:
    """What metrics.jsonl says of each step of a run but the first, which warms up."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder, "run")
        words = [*words, "--steps", str(bench.rounds + 1), "--out", str(out)]
        train_hpt.main(flags.parse_training_args(words))
        rows = report.read_jsonl(out / "metrics.jsonl")
    return [
        {
            "seconds": row["time/step"],
            "reward": row["reward/mean"],
            "response tokens": row["response_length/mean"],
            "groups of equal rewards": row["reward/frac_zero_std"],
        }
        for row in rows[1:]
    ]


def trl_steps(bench, words: list[str]) -> list[dict]:
    """The same of GRPOTrainer. A step is the time from one call of the verifier to the next."""
    from datasets import Dataset
    from trl import GRPOTrainer

    args = flags.parse_training_args(words)
    inputs, steps = train_hpt.load_inputs(args, METHODS[args.method]), bench.rounds + 2
    problems = []
    for step in range(1, steps + 1):
        problems += train_hpt.draw(inputs.problems, step, args.prompts_per_step, args.seed)
    texts = [inputs.tokenizer.decode(problem["prompt_ids"]) for problem in problems]
    if inputs.tokenizer(texts)["input_ids"] != [problem["prompt_ids"] for problem in problems]:
        raise ValueError("TRL would read the prompts as other tokens than train_hpt.py")
    dataset = Dataset.from_dict({"prompt": texts, "answer": [p["answer"] for p in problems]})
    clock, measured = [], []

    def grade(completions, completion_ids, answer, **_) -> list[float]:
        """The rewards of a step's rollouts; TRL calls it once per step."""
        scores, n = verifier.score(completions, answer), args.samples_per_prompt
        groups = [scores[i : i + n] for i in range(0, len(scores), n)]
        clock.append(now())
        measured.append(
            {
                "reward": statistics.fmean(scores),
                "response tokens": statistics.fmean(map(len, completion_ids)),
                "groups of equal rewards": statistics.fmean(len(set(g)) == 1 for g in groups),
            }
        )
        return scores

    with tempfile.TemporaryDirectory() as folder, reward.Verifier(function=args.reward) as verifier:
        checkpointing = plan.memory_plan(args, inputs.config, False).checkpointing
        config = grpo_config(args, steps, bench.trl_batch, folder, checkpointing)
        tokenizer = inputs.tokenizer
        with contextlib.redirect_stdout(io.StringIO()):
            GRPOTrainer(args.model, grade, config, dataset, processing_class=tokenizer).train()
    seconds = [end - begin for begin, end in itertools.pairwise(clock)]
    return [{"seconds": s} | m for s, m in zip(seconds, measured[1:])][1:]  # the first warms up


def grpo_config(args, steps: int, batch: int | None, folder: str, checkpointing: bool):
    """Our settings in TRL's words. batch: sequences per forward pass, by default all of an update.

    TRL samples with vLLM on a GPU, else with transformers: on a CPU, vLLM 0.32 repacks its weights,
    and then has no weight loaders, which TRL 1.16 needs to give it new ones.
    """
    from trl import GRPOConfig

    has_gpu = torch.cuda.is_available()
    sequences = args.prompts_per_step * args.samples_per_prompt
    per_update = sequences // args.minibatches_per_step
    batch = batch or per_update
    return GRPOConfig(
        output_dir=folder,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        epsilon=args.clip_eps or 0.2,
        num_generations=args.samples_per_prompt,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=per_update // batch,
        steps_per_generation=sequences // batch,
        max_steps=steps * args.minibatches_per_step,
        max_completion_length=args.max_response_tokens,
        temperature=args.temperature,
        learning_rate=args.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        gradient_checkpointing=checkpointing,
        bf16=has_gpu,
        model_init_kwargs={"dtype": "float32"},
        shuffle_dataset=False,
        use_vllm=has_gpu,
        vllm_mode="colocate",
        vllm_max_model_length=args.max_prompt_tokens + args.max_response_tokens,
        seed=args.seed,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
