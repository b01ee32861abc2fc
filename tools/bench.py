"""Measure how fast the program is, beside what one would use in its place.

    python -m tools.bench rollout    tokens/s of the sampler, against vLLM's own LLM.generate
    python -m tools.bench update     tokens/s of the update, against a plain Hugging Face pass
    python -m tools.bench load       seconds to start, and to give the sampler new weights
    python -m tools.bench step       where the time of a training step goes

Other flags are those of train_hpt.py; without --model it is the toy. What is compared takes turns:
one call each to warm up, then --rounds rounds, every other one in reverse order. A figure is the
median of the rounds, beside the smallest and the largest. Leave the machine idle meanwhile.

    rollout --lengths lognormal:120:512    every response gets a length of its own, drawn with a
                                           heavy tail; transformers' generate takes part, too
    update --shape qwen2.5-1.5b --lengths fixed:8128
                                           random weights; needs neither vLLM nor math-verify;
                                           under torchrun it is sharded, and the plain pass left out
    step --peer trl                        against TRL's GRPOTrainer (tools/bench_trl.py)
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from common import flags

MIN_LENGTH = 16  # of a response whose length is drawn
CONFIG_KEYS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
CONFIG_KEYS += ("num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")
SHAPES = {
    "toy": ("qwen2", 128, 512, 3, 4, 4, 262, True),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
}


def main(argv: list[str] | None = None) -> None:
    """Run one of the benchmarks, and print what it measures."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=flags.HelpFormatter,
    )
    parser.add_argument("what", choices=list(BENCHMARKS), help="what is measured")
    flags.number(parser, "--rounds", flags.COUNT, 5, "rounds that count")
    about = "fixed:N or lognormal:MEAN:MAX response tokens (rollout: as the model ends them)"
    parser.add_argument("--lengths", type=lengths, metavar="LENGTHS", help=about)
    flags.choice(parser, "--shape", list(SHAPES), "update: shape of the model")
    flags.number(parser, "--vocabulary", flags.COUNT, None, "update: words (those of the shape)")
    flags.number(parser, "--sequences", flags.COUNT, 64, "update: sequences, an even number")
    flags.number(parser, "--prompt-tokens", flags.COUNT, 64, "update: tokens of each prompt")
    about = "update: measure ours alone, where the plain pass does not fit into memory"
    parser.add_argument("--alone", action="store_true", help=about)
    flags.number(parser, "--generate-batch", flags.COUNT, 64, "rollout: batch of generate")
    parser.add_argument("--peer", choices=["trl"], help="step: whose step is measured beside ours")
    about = "step: sequences per forward pass of the peer (all of an optimizer step)"
    parser.add_argument("--peer-batch", type=flags.COUNT, metavar="N", help=about)
    bench, rest = parser.parse_known_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (bench.what == "rollout" or bench.peer):
        raise SystemExit("error: rollout and --peer compare single processes: leave out torchrun")
    BENCHMARKS[bench.what](bench, rest)


# ------------------------------------------------------------------------- what they have in common


def lengths(text: str) -> tuple[str, int, int]:
    """An argparse type: (kind, mean, longest) of fixed:N or lognormal:MEAN:MAX."""
    kind, *numbers = text.split(":")
    with contextlib.suppress(ValueError):
        mean, longest = (int(number) for number in (numbers * 2)[:2])
        if kind == "fixed" and len(numbers) == 1 and mean > 0:
            return kind, mean, longest
        if kind == "lognormal" and len(numbers) == 2 and MIN_LENGTH < mean < longest:
            return kind, mean, longest
    raise argparse.ArgumentTypeError(
        f"must be fixed:N or lognormal:MEAN:MAX with {MIN_LENGTH} < MEAN < MAX, not {text}"
    )


def draw_lengths(distribution: tuple[str, int, int], count: int, seed: int) -> list[int]:
    """`count` lengths. The log-normal has sigma 1 and that mean before its ends are cut off."""
    kind, mean, longest = distribution
    if kind == "fixed":
        return [mean] * count
    generator, drawn = random.Random(seed), []
    while len(drawn) < count:
        length = round(generator.lognormvariate(math.log(mean) - 0.5, 1.0))
        if MIN_LENGTH <= length <= longest:
            drawn.append(length)
    return drawn


def now() -> float:
    """Seconds on a clock, once the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(rounds: int, sides: dict) -> dict[str, list]:
    """{name: what its function returned in each round}; each is called once before, to warm up."""
    results = {name: [] for name in sides}
    for run in sides.values():
        run()
    for i in range(rounds):
        for name in sorted(sides, key=list(sides).index, reverse=i % 2 == 1):
            results[name].append(sides[name]())
    return results


def show(text: str = "") -> None:
    """Print a line on rank 0."""
    from common import distributed

    if distributed.rank() == 0:
        print(text, flush=True)


def show_machine(title: str) -> None:
    """Print what is measured, on what, and with which versions."""
    import torch

    from common import report

    device = platform.machine()
    with contextlib.suppress(OSError, IndexError):
        device = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    device += f", {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} torch threads"
    device += f", {memory:.0f} GB"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, {device}"
    versions = report.versions_and_commit()
    if importlib.util.find_spec("trl"):
        versions["versions"]["trl"] = metadata.version("trl")
    numbers = ", ".join(f"{name} {version}" for name, version in versions["versions"].items())
    show(f"{title}\n{device}; load average {os.getloadavg()[0]:.1f}\n{numbers}")
    show(f"commit {versions['commit']}\n")


def show_figure(name: str, values: list[float], unit: str) -> float:
    """Print the median of the rounds and their range; return the median."""
    median = statistics.median(values)
    digits = 0 if median >= 1000 else 3 if median < 10 else 1
    spread = f"{min(values):,.{digits}f} to {max(values):,.{digits}f}"
    show(f"  {name:<46} {median:>9,.{digits}f} {unit}  ({spread}; {len(values)} rounds)")
    return median


class Run(NamedTuple):
    """What a training run has when its first step begins."""

    args: argparse.Namespace
    method: object  # upge.Method
    inputs: object  # train_hpt.Inputs
    device: object
    sampler: object
    policy: object
    critic: object  # or None


def start(rest: list[str]) -> Run:
    """A training run with these flags, at its start."""
    import train_hpt
    from common import plan
    from upge import METHODS

    args = flags.parse_training_args(rest)
    method = METHODS[args.method]
    inputs = train_hpt.load_inputs(args, method)
    memory = plan.memory_plan(args, inputs.config, train_hpt.needs_critic(method))
    device, sampler, policy, critic = train_hpt.start(args, method, inputs, memory)
    sampler.load(policy.weights())
    return Run(args, method, inputs, device, sampler, policy, critic)


# ------------------------------------------------------------------------------------------ rollout


def rollout_benchmark(bench, rest: list[str]) -> None:
    """Tokens/s of the sampler, of LLM.generate, and with --lengths of transformers' generate."""
    import train_hpt

    if bench.lengths:
        longest = bench.lengths[2]
        if not flags.has_flag("--model", rest):  # the toy has 256 positions
            rest = [*rest, "--max-position-embeddings", str(256 + longest)]
        rest = [*rest, "--max-response-tokens", str(longest)]
    run = start(rest)
    sampler, limits = run.sampler, None
    # Every method samples alike; this one never takes a rollout away for a demonstration.
    args = argparse.Namespace(**vars(run.args) | {"method": "hpt"})
    problems = train_hpt.draw(run.inputs.problems, 1, args.prompts_per_step, args.seed)
    if bench.lengths:  # a request per response, since each has a limit of its own
        problems = [problem for problem in problems for _ in range(args.samples_per_prompt)]
        args.samples_per_prompt = 1
        limits = draw_lengths(bench.lengths, len(problems), args.seed)
    show_machine(f"rollouts of {args.model}, {len(problems)} x {args.samples_per_prompt}")
    requests, sampled = [], {}

    def ours():
        """Sample as a training step does; tokens/s."""
        sampler.llm.reset_prefix_cache()
        requests.clear()
        with recorded_requests(sampler, requests, limits):
            begin = now()
            rollouts = train_hpt.sample_rollouts(sampler, problems, 1, args)
            seconds = now() - begin
        sampled["ours"] = [r.ids for group in rollouts for r in group]
        return tokens_of(sampled["ours"]) / seconds

    def bare(name, logprobs):
        """Hand the same requests to LLM.generate; tokens/s."""
        sampler.llm.reset_prefix_cache()
        prompts, settings = [prompt for prompt, _ in requests], []
        for _, ours in requests:
            settings.append(ours.clone())
            settings[-1].detokenize, settings[-1].logprobs = True, logprobs
            settings[-1].flat_logprobs = False  # as without our settings
        begin = now()
        outputs = sampler.llm.generate(prompts, settings, use_tqdm=False)
        seconds = now() - begin
        sampled[name] = [list(o.token_ids) for output in outputs for o in output.outputs]
        return tokens_of(sampled[name]) / seconds

    sides = {"ours (text and log-probabilities)": ours}
    for logprobs, gives in ((None, "text"), (0, "text and log-probabilities")):
        name = f"LLM.generate ({gives})"
        sides[name] = lambda name=name, logprobs=logprobs: bare(name, logprobs)
    if limits:
        name = f"transformers' generate, batches of {bench.generate_batch}"
        sides[name] = generate_of_transformers(run, problems, limits, bench.generate_batch)
    speeds = take_turns(bench.rounds, sides)
    count, total = len(sampled["ours"]), tokens_of(sampled["ours"])
    longest = max(map(len, sampled["ours"]))
    show(f"{count} responses, mean {total / count:.1f} tokens, longest {longest}")
    same = all(responses == sampled["ours"] for responses in sampled.values())
    show(f"vLLM's responses are token for token {'the same' if same else 'NOT the same'}")
    medians = {name: show_figure(name, rates, "tokens/s") for name, rates in speeds.items()}
    for name, median in list(medians.items())[1:]:
        show(f"  ours / {name}: {next(iter(medians.values())) / median:.2f}")
    sampler.close()


def tokens_of(responses: list[list[int]]) -> int:
    """The number of tokens of all responses."""
    return sum(map(len, responses))


@contextlib.contextmanager
def recorded_requests(sampler, requests: list, limits: list[int] | None):
    """Collect (prompt, SamplingParams) of every request that the sampler makes in the block.

    limits: if given, the length of the response to each request, which then ends nowhere else.
    """
    engine = sampler.llm.llm_engine
    add_request = engine.add_request

    def recording(request_id, prompt, params, *more, **settings):
        """As the engine's own, which it calls."""
        if limits:
            params.max_tokens, params.ignore_eos = limits[len(requests)], True
            params.stop_token_ids = []
        requests.append((prompt, params.clone()))
        return add_request(request_id, prompt, params, *more, **settings)

    engine.add_request = recording
    try:
        yield
    finally:
        del engine.add_request  # the method of its class is there again


def generate_of_transformers(run: Run, problems: list, limits: list[int], batch_size: int):
    """A function that samples responses of these lengths with generate; it returns tokens/s.

    A batch ends when its longest response does: generate cannot put a new request into a row whose
    response has ended.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    lm = AutoModelForCausalLM.from_pretrained(run.args.model, config=run.inputs.config, dtype=dtype)
    lm = lm.to(run.device).eval()
    lm.generation_config.eos_token_id = None  # else it would fill in what a call leaves out
    settings = {"do_sample": True, "temperature": run.args.temperature, "top_k": 0, "top_p": 1.0}

    @torch.inference_mode()
    def run_batches():
        """Sample all responses, batch by batch; tokens/s."""
        begin = now()
        for i in range(0, len(problems), batch_size):
            prompts = [torch.tensor(p["prompt_ids"]) for p in problems[i : i + batch_size]]
            ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(run.device)
            ones = [torch.ones_like(prompt) for prompt in prompts]
            mask = pad_sequence(ones, batch_first=True, padding_side="left").to(run.device)
            most = max(limits[i : i + batch_size])
            out = lm.generate(
                ids, attention_mask=mask, max_new_tokens=most, pad_token_id=0, **settings
            )
            assert out.shape[1] == ids.shape[1] + most, "a batch ended before its longest response"
        return sum(limits) / (now() - begin)

    return run_batches


# ------------------------------------------------------------------------------------------- update


def update_benchmark(bench, rest: list[str]) -> None:
    """Tokens/s, FLOP/s and memory of the update on random weights, against a plain pass."""
    import torch
    from transformers import AutoConfig

    import train_hpt
    from common import distributed, metrics, model, plan
    from upge import METHODS

    if bench.sequences % 2:
        raise SystemExit(f"error: --sequences must be even, not {bench.sequences}")
    refused = [word for word in rest if word.startswith("@")]
    refused += [flag for flag in ("--model", "--data", "--plan") if flags.has_flag(flag, rest)]
    if refused:
        raise SystemExit(
            "error: update measures random weights of --shape on random sequences: leave out "
            f"{refused[0]}"
        )
    bench.lengths = bench.lengths or ("fixed", 256, 256)
    longest = bench.prompt_tokens + bench.lengths[2]
    device = distributed.init_process_group()
    shape = dict(zip(CONFIG_KEYS, SHAPES[bench.shape]))
    shape["vocab_size"] = bench.vocabulary or shape["vocab_size"]
    config = AutoConfig.for_model(**shape, max_position_embeddings=longest)
    with tempfile.TemporaryDirectory() as folder:
        folder = write_random_model(config, folder, device)
        # The learning rate is next to 0, so that every round has the same work.
        rest = ["--model", folder, "--data", "none", "--lr", "1e-12", *rest]
        rest += ["--max-prompt-tokens", str(bench.prompt_tokens)]
        rest += ["--max-response-tokens", str(bench.lengths[2])]
        args = flags.parse_training_args(rest)
        show_machine(
            f"update of {bench.shape}: {bench.sequences} sequences of {bench.prompt_tokens} + "
            f"{':'.join(map(str, bench.lengths))} tokens, micro-batches of "
            f"{args.tokens_per_microbatch} tokens, gradient checkpointing "
            f"{'on' if args.gradient_checkpointing else 'off'}"
        )
        memory = Memory(device)
        policy = model.build_policy(args, config, device)
        sequences = random_sequences(bench, config.vocab_size)
        batch = train_hpt.build_micro_batches(
            prompts_of(sequences),
            METHODS["dr_grpo"],
            args,
            device,
            metrics.Counts(),
            policy.can_pack,
        )

        def ours():
            """Seconds of the passes, of the whole update, and bytes of memory."""
            memory.begin()
            begin = now()
            train_hpt.accumulate_gradient(policy, batch, args, metrics.Counts())
            middle = now()
            policy.step(args.lr, args.max_grad_norm)
            return middle - begin, now() - begin, memory.of_pass()

        ours()  # so that Adam's moments count as held
        sides = {"ours": ours}
        held = {"ours": memory.settle()}
        if distributed.world_size() == 1 and not bench.alone:
            sides["plain"] = plain_pass(args, sequences, device, memory)
            held["plain"] = memory.settle()
    results = take_turns(bench.rounds, sides)
    show_update(results, held, sequences, config, policy.num_parameters())
    estimate = plan.memory_plan(args, config, has_critic=False)
    show("what --plan estimates for ours")
    show(f"  {'memory of the pass, at its peak':<46} {estimate.training / 1e9:>9.3f} GB")
    show(f"  {'memory held between passes':<46} {estimate.resident / 1e9:>9.3f} GB")
    torch.distributed.destroy_process_group()


def write_random_model(config, folder: str, device) -> str:
    """Write random weights on rank 0; return their folder, on every rank of this machine."""
    import torch
    from transformers import AutoModelForCausalLM

    from common import distributed

    if distributed.rank() == 0:
        torch.manual_seed(0)
        with device:  # it is slow to draw many numbers on a CPU
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lm.save_pretrained(folder)
    message = [folder]
    torch.distributed.broadcast_object_list(message)
    return message[0]


def random_sequences(bench, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of random tokens, with the lengths asked for."""
    generator = random.Random(0)
    sequences = []
    for length in draw_lengths(bench.lengths, bench.sequences, seed=0):
        ids = generator.choices(range(vocab_size), k=bench.prompt_tokens + length)
        sequences.append((ids[: bench.prompt_tokens], ids[bench.prompt_tokens :]))
    return sequences


def prompts_of(sequences: list) -> list:
    """train_hpt's Prompts, each with a right and a wrong rollout, so that no advantage is 0."""
    from rollout import Rollout
    from train_hpt import Prompt

    prompts = []
    for (prompt_ids, right), (_, wrong) in zip(sequences[::2], sequences[1::2]):
        rollouts = []
        for ids in (right, wrong):  # what the sampler thought of a token does not matter here
            rollouts.append(Rollout(ids=ids, logp=[-5.0] * len(ids), truncated=False, text=""))
        problem = {"prompt": "", "answer": "", "prompt_ids": prompt_ids}
        prompts.append(Prompt(problem, rollouts, [1.0, 0.0], 1.0, 1.0, 0.0))
    return prompts


def plain_pass(args, sequences: list, device, memory: "Memory"):
    """A function that runs forward and backward as one writes it with transformers alone.

    Sequences of similar lengths share a padded batch of at most --tokens-per-microbatch tokens. It
    computes in the trainer's dtype, and checkpoints the gradient if the trainer does.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).train()
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    batches, tensors = [], []
    for prompt, response in sorted(sequences, key=lambda pair: -len(pair[0] + pair[1])):
        longest = len(batches[-1][0][0]) if batches else 0
        if not batches or (len(batches[-1]) + 1) * longest > args.tokens_per_microbatch:
            batches.append([])
        labels = [-100] * len(prompt) + response
        batches[-1].append((prompt + response, [1] * len(labels), labels))
    for batch in batches:
        padded = []
        for rows, filling in zip(zip(*batch), (0, 0, -100)):
            rows = [torch.tensor(row) for row in rows]
            padded.append(pad_sequence(rows, batch_first=True, padding_value=filling).to(device))
        tensors.append(padded)  # ids, mask, labels

    def run():
        """Seconds of the passes, twice, and bytes of memory."""
        memory.begin()
        begin = now()
        for ids, mask, labels in tensors:
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (loss / len(sequences)).backward()
            del logits, loss  # else they live on while the next batch is computed
        seconds = now() - begin
        lm.zero_grad()
        return seconds, seconds, memory.of_pass()

    return run


class Memory:
    """Bytes that a side holds, and that a pass takes on top: of the GPU, or resident on a CPU."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.settled = self.before_pass = self.in_use()

    def in_use(self, peak: bool = False) -> int:
        """Bytes in use now, or at most since `begin`."""
        import torch

        if self.on_gpu:
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept for later, does not count
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])

    def settle(self) -> int:
        """Bytes in use now that were not in use at the last call, or at the start."""
        before, self.settled = self.settled, self.in_use()
        return self.settled - before

    def begin(self) -> None:
        """Note what is in use before a pass, and forget the peak so far."""
        import torch

        self.before_pass = self.in_use()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux begins VmHWM anew

    def of_pass(self) -> int:
        """The most bytes in use since `begin`, less those in use then."""
        return self.in_use(peak=True) - self.before_pass


def show_update(results: dict, held: dict, sequences: list, config, parameters: int) -> None:
    """Print speed, FLOP/s, MFU and memory of every side."""
    import torch

    from common import distributed, metrics

    totals = [len(prompt) + len(response) for prompt, response in sequences]
    # 6 operations per parameter and token, as perf/mfu counts. Causal attention adds 6 D T^2 per
    # layer to a sequence of T tokens. What is computed twice is not useful work.
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(t * t for t in totals)
    useful = {"6 N": 6 * parameters * sum(totals)}
    useful["6 N + attention"] = useful["6 N"] + attention
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for name, peak in metrics.PEAK_BF16_FLOPS.items() if name in gpu), None)
    show(f"{parameters / 1e6:,.1f} M parameters, {sum(totals)} tokens, longest {max(totals)}")
    medians = []
    for side, rounds in results.items():
        show(side)
        passes, wholes, peaks = zip(*rounds)
        speeds = [sum(totals) / seconds for seconds in passes]
        medians.append(show_figure("forward and backward", speeds, "tokens/s"))
        if side == "ours":
            show_figure("with the optimizer step", [sum(totals) / s for s in wholes], "tokens/s")
        for label, flops in useful.items():
            rates = [flops / seconds / distributed.world_size() for seconds in wholes]
            show_figure(f"useful work per device, {label}", [r / 1e9 for r in rates], "GFLOP/s")
            if peak:
                show_figure(f"MFU, {label}", [100 * rate / peak for rate in rates], "%")
        show_figure("memory of the pass, at its peak", [bytes / 1e9 for bytes in peaks], "GB")
        show(f"  {'memory held between passes':<46} {held[side] / 1e9:>9.3f} GB")
    if len(medians) > 1:
        show(f"forward and backward, ours / plain: {medians[0] / medians[1]:.2f}")


# --------------------------------------------------------------------------------------------- load


def load_benchmark(bench, rest: list[str]) -> None:
    """Seconds to import vLLM, build engine and policy, and give the engine new weights."""
    import rollout

    times = {}

    class TimedSampler(rollout.Sampler):
        """A Sampler that notes how long it takes to build."""

        def __init__(self, *args, **settings):
            begin = now()
            super().__init__(*args, **settings)
            times["build the engine"] = now() - begin

    begin = now()
    rollout.set_vllm_environment()
    import vllm  # noqa: F401

    times["import vLLM"] = now() - begin
    rollout.Sampler = TimedSampler  # train_hpt.start builds it, with the settings of training
    begin = now()
    args, _, _, _, sampler, policy, _ = start(rest)
    others = sum(times.values()) - times["import vLLM"]
    times["the rest: data, policy, first weights"] = now() - begin - others
    show_machine(f"start and weights of {args.model}, {policy.num_parameters() / 1e6:,.1f} M")

    def load():
        """Seconds of what `main` does after the last update of a step."""
        sampler.sleep()
        begin = now()
        sampler.load(policy.weights())
        return now() - begin

    def gather():
        """Seconds of the trainer's part in it."""
        begin = now()
        for _ in policy.weights():
            pass
        return now() - begin

    results = take_turns(bench.rounds, {"load": load, "gather": gather})
    show("once, in this run")
    for name, seconds in times.items():
        show(f"  {name:<46} {seconds:>9.3f} s")
    show("at every step")
    show_figure("give the sampler new weights", results["load"], "s")
    show_figure("of this, gather them from the shards", results["gather"], "s")
    sampler.close()


# --------------------------------------------------------------------------------------------- step


def step_benchmark(bench, rest: list[str]) -> None:
    """The time budget of a training step, and with --peer trl the step of TRL's GRPOTrainer."""
    import reward

    environment = dict(os.environ)  # before this process joins a process group
    rest = peer_flags(rest) if bench.peer else rest
    grade = flags.parse_training_args(rest).reward
    with reward.Verifier(function=grade) as verifier, contextlib.ExitStack() as stack:
        run = start(rest)
        args, steps = run.args, iter(range(1, bench.rounds + 2))
        show_machine(
            f"step of {args.method} on {args.model}: {args.prompts_per_step} prompts x "
            f"{args.samples_per_prompt} rollouts, {args.minibatches_per_step} updates"
        )
        sides = {"ours": lambda: training_step(run, verifier, next(steps))}
        if bench.peer:
            sides["TRL"] = stack.enter_context(trl_steps(bench, rest, environment))
        show_steps(take_turns(bench.rounds, sides))
        run.sampler.close()


def training_step(run: Run, verifier, step: int) -> dict:
    """The step that train_hpt.main takes; returns {"seconds", "parts", "lengths", "rewards"}."""
    import train_hpt
    from common import metrics

    args, method, inputs, device, sampler, policy, critic = run
    begin, clock, counts = now(), metrics.Clock(), metrics.Counts()
    problems = train_hpt.draw(inputs.problems, step, args.prompts_per_step, args.seed)
    rollouts = train_hpt.sample_rollouts(sampler, problems, step, args)
    sampler.sleep()
    lap(clock, "rollout")
    rewards, demo_rewards = train_hpt.grade(verifier, problems, rollouts, method, counts)
    lap(clock, "reward")
    alpha, beta = train_hpt.apply_gate(rewards, step, method, args)
    fields = (problems, rollouts, rewards, demo_rewards, alpha, beta)
    prompts = list(map(train_hpt.Prompt, *fields))
    chunks = train_hpt.split_prompts(prompts, args.minibatches_per_step, args.seed, step)
    minibatches = []
    for chunk in chunks:
        minibatches.append(
            train_hpt.build_micro_batches(chunk, method, args, device, counts, policy.can_pack)
        )
    lap(clock, "gate and micro-batches")
    if critic:
        train_hpt.value_pass(critic, minibatches, args, counts)
    train_hpt.old_policy_pass(policy, minibatches[1:], args, counts)
    lap(clock, "old-policy pass")
    for i, batch in enumerate(minibatches):
        updates_before = (step - 1) * args.minibatches_per_step + i
        train_hpt.update(policy, critic, batch, updates_before, args, counts)
    lap(clock, "update")
    sampler.load(policy.weights())
    lap(clock, "weights")
    seconds = now() - begin
    lengths = [len(r.ids) for group in rollouts for r in group]
    parts = clock.times | {"rest": seconds - sum(clock.times.values())}
    return {"seconds": seconds, "parts": parts, "lengths": lengths, "rewards": rewards}


def lap(clock, name: str) -> None:
    """End a phase of the step, once the GPU has done what it was given."""
    now()
    clock.lap(name)


def show_steps(results: dict[str, list[dict]]) -> None:
    """Print each side's steps, the parts of ours, and the ratio of the medians."""
    medians = {}
    for side, steps in results.items():
        show(side)
        medians[side] = show_figure("a step", [step["seconds"] for step in steps], "s")
        lengths = [length for step in steps for length in step["lengths"]]
        groups = [group for step in steps for group in step["rewards"]]
        if lengths:  # else the method samples nothing
            without = statistics.fmean(len(set(group)) == 1 for group in groups)
            reward = statistics.fmean(value for group in groups for value in group)
            mean = statistics.fmean(lengths)
            show(
                f"  responses: mean {mean:.1f} tokens, longest {max(lengths)}; "
                f"mean reward {reward:.3f}; all rewards of a group are equal in {without:.0%}"
            )
    middle = sorted(results["ours"], key=lambda step: step["seconds"])[len(results["ours"]) // 2]
    show("parts of our step: in the step of median length, which they add up to; the medians")
    for name, seconds in middle["parts"].items():
        median = statistics.median(step["parts"][name] for step in results["ours"])
        share = seconds / middle["seconds"]
        show(f"  {name:<46} {seconds:>9.3f} s {share:>6.1%} {median:>9.3f} s")
    whole = sum(middle["parts"].values())
    show(f"  {'sum of the parts':<46} {whole:>9.3f} s; the whole {middle['seconds']:.3f} s")
    if "TRL" in medians:
        show(f"a step, ours / TRL, ratio of the medians: {medians['ours'] / medians['TRL']:.3f}")


def peer_flags(rest: list[str]) -> list[str]:
    """The flags with dr_grpo as the method. SystemExit if TRL cannot do what they say."""
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("error: --peer trl: TRL is not installed here: pip install trl accelerate")
    if not flags.has_flag("--model", rest) and not any(word.startswith("@") for word in rest):
        rest = [f"@{flags.TOY_ARGS}", *rest]
    rest = rest if flags.has_flag("--method", rest) else [*rest, "--method", "dr_grpo"]
    method = flags.parse_training_args(rest).method
    if method != "dr_grpo":
        raise SystemExit(f"error: --peer trl compares --method dr_grpo, not {method}")
    return rest


@contextlib.contextmanager
def trl_steps(bench, rest: list[str], environment: dict):
    """A function that lets tools/bench_trl.py take one step, and returns what it says of it."""
    command = [sys.executable, "-m", "tools.bench_trl", "--steps", str(bench.rounds + 1)]
    command += ["--batch", str(bench.peer_batch)] if bench.peer_batch else []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, *rest],
            cwd=flags.REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

        def answer():
            """The next line of JSON."""
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                raise SystemExit(f"error: TRL's process ended early:\n{errors.read()[-3000:]}")
            return json.loads(line)

        def step():
            """One step of TRL's, while this process waits."""
            process.stdin.write("step\n")
            process.stdin.flush()
            return answer()

        try:
            show(f"TRL: {answer()}\n")
            yield step
        finally:
            process.kill()
            process.wait()


BENCHMARKS = {
    "rollout": rollout_benchmark,
    "update": update_benchmark,
    "load": load_benchmark,
    "step": step_benchmark,
}

if __name__ == "__main__":
    main()
