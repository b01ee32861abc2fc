"""Every flag of train_hpt.py and evaluate.py, with its help; what cannot be is one sentence.

    train_hpt.py: error: argument --steps: must be a whole number of at least 1, not 0

An argument @FILE stands for the flags in that file, written as in a shell, with "#" for comments;
flags that come later on the command line replace them. The checks that compare several flags stand
in `check_training` and `check_evaluation`.
"""

import argparse
import datetime
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path

from common.benchmarks import BENCHMARKS
from common.data import PAPER_DATA, SYSTEM, source_name
from upge import METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
TOY_ARGS = REPOSITORY / "toy" / "toy.args"
COLUMNS = ("prompt", "answer", "demonstration", "system", "level")
SOURCES = ".jsonl, .json, .parquet, or hub NAME:CONFIG:SPLIT"
# A resumed run may have other values of these: they change how long it is, what is measured and
# saved, and how the work is cut, which changes the gradient by rounding at most.
MAY_CHANGE = {"plan", "out", "resume", "steps", "save_every", "eval_every", "probe_gradients"}
MAY_CHANGE |= {"tokens_per_microbatch", "gradient_checkpointing", "compile", "offload"}
MAY_CHANGE |= {"tensor_parallel", "gpu_memory_utilization", "wandb", "tensorboard"}


# ---------------------------------------------------------------------------------- kinds of values


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: a number of `kind` from `low` to `high`; with `above`, not `low` itself."""
    what = "a whole number" if kind is int else "a number"
    rule = f"{what} {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        rule += f" and at most {high:g}"

    def parse(text: str):
        """The number in a text. ArgumentTypeError: it is none, or outside of the range."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text}")
        return value

    return parse


COUNT, COUNT_OR_0 = number(int, 1), number(int, 0)
POSITIVE, POSITIVE_OR_0 = number(float, 0, above=True), number(float, 0)
SHARE, SHARE_ABOVE_0 = number(float, 0, 1), number(float, 0, 1, above=True)
TEMPERATURE = number(float, 0.01, 2)  # vLLM samples at 0.01 where it is told less
PATH = os.path.expanduser  # an argparse type: ~ is the home, in files of arguments, too


def columns(text: str) -> dict[str, str]:
    """An argparse type: KEY=COLUMN,..., the columns that hold the keys of a problem."""
    pairs = [[part.strip() for part in pair.split("=", 1)] for pair in text.split(",")]
    if not all(len(pair) == 2 and pair[0] in COLUMNS and pair[1] for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"must be KEY=COLUMN,... with the keys {', '.join(COLUMNS)}, not {text}"
        )
    return dict(pairs)


def function_name(text: str) -> str:
    """An argparse type: MODULE:FUNCTION, a function of the user's."""
    if not re.fullmatch(r"[\w.]+:\w+", text):
        raise argparse.ArgumentTypeError(f"must be MODULE:FUNCTION, not {text}")
    return text


class Parser(argparse.ArgumentParser):
    """An argparse parser that reads @FILE arguments, and speaks on rank 0 alone."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=program,
            usage=f"{program} [flags] [@FILE]; --help lists the flags",
            description=description,
            allow_abbrev=False,
            fromfile_prefix_chars="@",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The words of a line of an @FILE; {repo} stands for the folder of this repository."""
        return shlex.split(arg_line.replace("{repo}", str(REPOSITORY)), comments=True)

    def error(self, message: str):
        """Print one sentence and end the program; argparse calls this."""
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # torchrun ends this rank meanwhile
        super().error(message)


# ------------------------------------------------------------------------------------- train_hpt.py

TRAINING = """\
Hybrid Post-Training (arXiv 2509.04419) and the methods it is compared with.

  torchrun train_hpt.py                        the toy: toy/toy.args
  torchrun --nproc_per_node=8 train_hpt.py @recipes/qwen2.5-math-7b.args --seed 1
  torchrun train_hpt.py --model DIR --data problems.jsonl

In brackets stands a flag's default, which is the paper's where the paper gives one."""


def parse_training_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of train_hpt.py, checked; without --model, --data and @FILE those of the toy.

    argv: words to read in place of the command line.
    """
    words = sys.argv[1:] if argv is None else argv
    parser = training_parser()
    if not any(word.startswith(("--model", "--data", "@")) for word in words):
        words = [f"@{TOY_ARGS}", *words]
    args = parser.parse_args(words)
    check_training(parser, args)
    return args


def training_parser() -> Parser:
    """The parser of train_hpt.py."""
    parser = Parser("train_hpt.py", TRAINING)
    add_model_flags(parser)

    add = parser.add_argument_group("data").add_argument
    add("--data", type=PATH, default=PAPER_DATA, metavar="SOURCE", help=f"{SOURCES} (%(default)s)")
    add(
        "--eval-data",
        type=PATH,
        metavar="SOURCE",
        help="held-out problems to measure accuracy on (none)",
    )
    add_prompt_flags(add)
    add(
        "--max-prompt-tokens", type=COUNT, default=1024, metavar="N", help="longer: left out (1024)"
    )
    add("--max-response-tokens", type=COUNT, default=8192, metavar="N", help="L_max (8192)")

    add = parser.add_argument_group("rollout").add_argument
    add("--prompts-per-step", type=COUNT, default=128, metavar="N", help="per rollout step (128)")
    add("--samples-per-prompt", type=COUNT, default=8, metavar="N", help="n, rollouts (8)")
    about = "T; rollouts and losses, demonstrations' too, use softmax(logits / T) (1)"
    add("--temperature", type=TEMPERATURE, default=1.0, metavar="X", help=about)
    add_engine_flags(add, None)

    about = f"`python upge.py` prints every METHOD:\n{' '.join(METHODS)}"
    add = parser.add_argument_group("algorithm", about).add_argument
    about = "which rows of the table are trained (hpt)"
    add("--method", choices=METHODS, default="hpt", metavar="METHOD", help=about)
    about = "(rewards (N, n), step) -> (alpha, beta) in place of HPT's gate; see examples/gates.py"
    add("--gate", type=function_name, metavar="MODULE:FUNCTION", help=about)
    about = "HPT: SFT where P <= gamma (0); the paper, Llama: 0.25"
    add("--gamma", type=SHARE, default=0.0, metavar="X", help=about)
    # In the authors' code the weight of a demonstration depends on the micro-batches. It lies
    # between 0.02 and 0.11, where the rollouts of a prompt weigh 1.
    about = "c_sft, weight of SFT in HPT (0.05); a rule: docs/faq.md"
    add("--sft-coef", type=POSITIVE_OR_0, default=0.05, metavar="X", help=about)
    about = "epsilon of the clip; inf: no clip (the row's own)"
    add("--clip-eps", type=POSITIVE, metavar="X", help=about)
    about = "whose log-probabilities are log pi_old; tis: the trainer's, and importance weights"
    add("--pi-old", choices=["trainer", "sampler", "tis"], default="trainer", help=about)
    add_reward_flag(add)
    about = "weight of an entropy bonus on rollouts (0)"
    add("--entropy-coef", type=POSITIVE_OR_0, default=0.0, metavar="X", help=about)
    add("--critic-lr", type=POSITIVE, default=1e-5, metavar="X", help="PPO's critic (1e-5)")
    add("--gae-gamma", type=SHARE, default=1.0, metavar="X", help="PPO: gamma of GAE (1)")
    add("--gae-lambda", type=SHARE, default=1.0, metavar="X", help="PPO: lambda of GAE (1)")

    add_optimisation_flags(parser.add_argument_group("optimisation").add_argument)

    add = parser.add_argument_group("output").add_argument
    about = "a new directory, or that of --resume (runs/METHOD-MODEL-seedS-TIME)"
    add("--out", type=PATH, metavar="DIR", help=about)
    add("--seed", type=COUNT_OR_0, default=0, metavar="N", help="random seed (0)")
    about = "steps between evaluations; 0: only before and after (0)"
    add("--eval-every", type=COUNT_OR_0, default=0, metavar="N", help=about)
    about = "responses per held-out problem, at --temperature (8)"
    add("--eval-samples", type=COUNT, default=8, metavar="N", help=about)
    about = "steps between probes of the gradients; 0: never (0)"
    add("--probe-gradients", type=COUNT_OR_0, default=0, metavar="N", help=about)
    about = "steps between checkpoints, of which two stay; 0: only one at the end (0)"
    add("--save-every", type=COUNT_OR_0, default=0, metavar="N", help=about)
    about = "go on from the newest checkpoint in --out, or begin if there is none"
    add("--resume", action="store_true", help=about)
    add("--wandb", metavar="PROJECT", help="send the metrics to Weights & Biases, too (no)")
    add("--tensorboard", action="store_true", help="write them for TensorBoard, too (no)")
    about = "only estimate the memory, on this machine or on GPUs of so many GB; then end"
    add("--plan", nargs="?", type=POSITIVE_OR_0, const=0.0, metavar="GB", help=about)
    return parser


def add_optimisation_flags(add) -> None:
    """Add the flags that say how the loss is minimised."""
    add("--steps", type=COUNT, default=500, metavar="N", help="rollout steps (500)")
    about = "optimizer steps per rollout step (2)"
    add("--minibatches-per-step", type=COUNT, default=2, metavar="N", help=about)
    about = "tokens per forward pass; does not change the gradient (32768)"
    add("--tokens-per-microbatch", type=COUNT, default=32768, metavar="N", help=about)
    add("--lr", type=POSITIVE, default=5e-6, metavar="X", help="learning rate of AdamW (5e-6)")
    about = "optimizer steps of linear warm-up (0)"
    add("--warmup-steps", type=COUNT_OR_0, default=0, metavar="N", help=about)
    about = "after the warm-up; cosine falls to a tenth of --lr in the last update (constant)"
    add("--lr-schedule", choices=["constant", "cosine"], default="constant", help=about)
    add("--weight-decay", type=POSITIVE_OR_0, default=0.01, metavar="X", help="of AdamW (0.01)")
    about = "clip gradients to this norm; inf: no clip (1)"
    add("--max-grad-norm", type=POSITIVE, default=1.0, metavar="X", help=about)
    about = "compute activations twice, a quarter more time; auto: if memory asks for it (auto)"
    add("--gradient-checkpointing", choices=["auto", "on", "off"], default="auto", help=about)
    about = "keep weights, gradients and moments in the host's memory: for small GPUs, slower (no)"
    add("--offload", action="store_true", help=about)
    about = "do not compile the decoder blocks; only a GPU compiles them"
    add("--no-compile", dest="compile", action="store_false", help=about)


def check_training(parser: Parser, args: argparse.Namespace) -> None:
    """End the program if flags of train_hpt.py contradict each other."""
    method = METHODS[args.method]
    check_common(parser, args)
    compares = method.rollouts and not method.combine and args.method not in ("reinforce", "ppo")
    if args.samples_per_prompt < 2 and (compares or method.combine == "group"):
        parser.error(
            f"--method {args.method} compares the members of a group: --samples-per-prompt must be "
            "at least 2"
        )
    if args.method == "chord" and not args.gate:
        parser.error("--method chord needs a schedule: --gate examples.gates:chord")
    if args.gate and method.combine != "gate":
        parser.error(f"--gate is for hpt, hpt_... and chord, not for {args.method}")
    if args.minibatches_per_step > args.prompts_per_step:
        parser.error("--minibatches-per-step must not be above --prompts-per-step")
    for package in ("wandb", "tensorboard"):
        if getattr(args, package) and importlib.util.find_spec(package) is None:
            parser.error(f"--{package} needs the package {package}: pip install {package}")
    config = Path(args.out or "", "config.json")
    if args.resume and not args.out:
        parser.error("--resume needs --out: the directory of the run to go on with")
    if args.resume and config.exists():
        saved = json.loads(config.read_text())["flags"]
        args.date = saved.get("date", args.date)  # the run keeps the date of its beginning
        now = json.loads(json.dumps(vars(args)))
        may_change = MAY_CHANGE - ({"steps"} if args.lr_schedule == "cosine" else set())
        for name in saved.keys() & now.keys() - may_change:
            if saved[name] != now[name] and not is_moved(name, saved[name], now[name]):
                flag = "--" + name.replace("_", "-")
                parser.error(f"--resume: the run in {args.out} has {flag} {saved[name]}")


def is_moved(name: str, before, now) -> bool:
    """Whether a flag names the same file or model at another place: it is there, and not here."""
    if name not in ("model", "data", "eval_data") or not before or not now:
        return False
    is_there = Path(now).exists() and not Path(before).exists()
    return is_there and Path(before).name == Path(now).resolve().name


# -------------------------------------------------------------------------------------- evaluate.py

EVALUATION = f"""\
Sample responses to benchmarks and grade them: avg@n and pass@k; compare two evaluations.

  python evaluate.py --model DIR --paper --data FILE ...
  torchrun --nproc_per_node=8 evaluate.py --model DIR --bench aime24 --samples 8
  python evaluate.py --compare runs/A runs/B

A NAME of a benchmark is one of: {" ".join(BENCHMARKS)}.
In brackets stands a flag's default, which is the paper's where the paper gives one."""


def parse_evaluation_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of evaluate.py, checked. argv: the command line's, if it is not given."""
    parser = evaluation_parser()
    args = parser.parse_args(argv)
    check_evaluation(parser, args)
    return args


def evaluation_parser() -> Parser:
    """The parser of evaluate.py."""
    parser = Parser("evaluate.py", EVALUATION)
    add_model_flags(parser)

    add = parser.add_argument_group("problems").add_argument
    about = "benchmarks from the hub (none)"
    add("--bench", nargs="+", default=[], choices=BENCHMARKS, metavar="NAME", help=about)
    about = f"problems: {SOURCES} (none)"
    add("--data", nargs="+", type=PATH, default=[], metavar="SOURCE", help=about)
    # The protocol is the defaults below, and the samples per problem of benchmarks.paper_samples.
    about = "the paper's protocol; on all benchmarks if there is no --bench or --data"
    add("--paper", action="store_true", help=about)
    add_prompt_flags(add)

    add = parser.add_argument_group("sampling").add_argument
    add("--samples", type=COUNT, metavar="N", help="n, responses per problem (8)")
    about = "T in softmax(logits / T); 0: greedy (0.6)"
    add("--temperature", type=POSITIVE_OR_0, default=0.6, metavar="X", help=about)
    about = "p; sample the likeliest tokens of this probability (0.95)"
    add("--top-p", type=SHARE_ABOVE_0, default=0.95, metavar="X", help=about)
    add("--max-response-tokens", type=COUNT, default=8192, metavar="N", help="longest (8192)")
    add_engine_flags(add, 0.9)
    add_reward_flag(add)
    add("--seed", type=COUNT_OR_0, default=0, metavar="N", help="random seed (0)")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=PATH, metavar="DIR", help="a new directory (runs/eval-MODEL-TIME)")
    about = "two directories, of evaluations or training runs; nothing is sampled"
    add("--compare", nargs=2, metavar=("A", "B"), help=about)
    return parser


def check_evaluation(parser: Parser, args: argparse.Namespace) -> None:
    """Fill in what --paper decides; end the program if flags of evaluate.py contradict."""
    if args.compare:
        return
    check_common(parser, args)
    if args.paper and not args.bench and not args.data:
        args.bench = list(BENCHMARKS)
    names = args.bench + [source_name(source) for source in args.data]
    if not names:
        parser.error("nothing to evaluate on: give --bench, --data or --paper")
    if len(set(names)) < len(names):
        parser.error(f"--bench and --data: two are named alike, of {' '.join(names)}")
    if args.paper and args.samples:
        parser.error("--paper sets --samples itself: leave one of the two out")
    args.samples = args.samples or 8
    if 0 < args.temperature < 0.01 or args.temperature > 2:
        parser.error("--temperature must be 0, or from 0.01 to 2")
    if args.temperature == 0 and args.samples > 1:
        parser.error("--temperature 0 always gives the same answer: use --samples 1")


# ------------------------------------------------------------------------------------ both programs


def check_common(parser: Parser, args: argparse.Namespace) -> None:
    """End the program if flags of either program contradict each other."""
    if not args.model:
        parser.error("--model is missing: name a Hugging Face directory or a hub id")
    if args.out and Path(args.out).exists() and not getattr(args, "resume", False):
        parser.error(f"--out {args.out} exists already: name another directory")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks % args.tensor_parallel:
        parser.error(f"--tensor-parallel must divide the number of ranks, {ranks}")
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get(
        "PYTORCH_ALLOC_CONF", ""
    )
    if args.tensor_parallel > 1 and "expandable_segments:True" in allocator:
        parser.error(
            "--tensor-parallel and PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True end in a crash "
            "of vLLM's graph capture: unset the variable"
        )
    if args.sampler == "transformers" and args.tensor_parallel > 1:
        parser.error("--tensor-parallel is for --sampler vllm")


def add_model_flags(parser: Parser) -> None:
    """Add the model, and what of its config is replaced."""
    parser.set_defaults(date=str(datetime.date.today()))  # some chat templates write it
    add = parser.add_argument_group("model").add_argument
    about = "Hugging Face directory or hub id of a causal language model"
    add("--model", type=PATH, metavar="DIR", help=about)
    about = "replaces the config's value; the paper: 40000 for Qwen2.5-Math"
    add("--rope-theta", type=POSITIVE, metavar="X", help=about)
    about = "replaces the config's value; the paper: 16384 for Qwen2.5-Math"
    add("--max-position-embeddings", type=COUNT, metavar="N", help=about)


def add_prompt_flags(add) -> None:
    """Add the flags that say how a problem is read and written as a prompt."""
    about = f"columns that hold {', '.join(COLUMNS)} (these)"
    add("--columns", type=columns, default={}, metavar="KEY=COLUMN,...", help=about)
    about = "the model's chat template, or the paper's text (chat)"
    add("--template", choices=["chat", "plain"], default="chat", help=about)
    about = "system message of the chat; '': none; data: the problem's own (the paper's)"
    add("--system-prompt", default=SYSTEM, metavar="TEXT", help=about)


def add_engine_flags(add, gpu_memory_utilization: float | None) -> None:
    """Add the flags that say what samples, and how vLLM uses the GPUs."""
    about = "what samples: vLLM, or transformers where vLLM cannot be installed (vllm)"
    add("--sampler", choices=["vllm", "transformers"], default="vllm", help=about)
    about = "ranks that share one vLLM engine (1)"
    add("--tensor-parallel", type=COUNT, default=1, metavar="N", help=about)
    default = gpu_memory_utilization or "what the trainer leaves free"
    about = f"share of a GPU for vLLM while it samples ({default})"
    kind, default = SHARE_ABOVE_0, gpu_memory_utilization
    add("--gpu-memory-utilization", type=kind, default=default, metavar="X", help=about)


def add_reward_flag(add) -> None:
    """Add the flag that names the verifier."""
    about = "grades (response, answer) from 0 to 1 (reward:grade)"
    kind, default = function_name, "reward:grade"
    add("--reward", type=kind, default=default, metavar="MODULE:FUNCTION", help=about)
