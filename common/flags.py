"""Every flag of train_hpt.py and evaluate.py, with its check and its help.

The check of a flag is its argparse type. If a value fails it, argparse prints one sentence:

    train_hpt.py: error: argument --steps: must be a whole number of at least 1, not 0

Checks that compare several flags stand in `check_training` and `check_evaluation`. An argument
@FILE stands for the flags in that file; flags that come later on the command line replace them.
Nothing slow is imported here, so that --help and errors come at once.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from common import terminal
from common.data import BENCHMARKS, PAPER_DATA, SYSTEM, source_name
from common.distributed import during_imports, one_failure_message, printable

REPOSITORY = Path(__file__).resolve().parents[1]
TOY_ARGS = REPOSITORY / "toy" / "toy.args"
# Names in upge.py, which is not imported here since it imports torch, which is slow.
METHODS = ["sft", "dft", "reinforce", "rloo", "ppo", "grpo", "dr_grpo", "dapo", "cispo", "gspo"]
METHODS += ["luffy", "srft", "chord", "hpt", "hpt_mix", "hpt_off"]
GROUP_METHODS = ["luffy", "srft"]  # those with combine == "group"
# Those that train on nothing but rollouts whose advantage is 0 if a group holds one rollout.
COMPARING_METHODS = ["rloo", "grpo", "dr_grpo", "dapo", "cispo", "gspo"]


# ---------------------------------------------------------------------------------------- checks


@dataclasses.dataclass(frozen=True)
class Number:
    """An argparse type: a number that a test accepts. No test below accepts a NaN."""

    kind: type  # int or float
    rule: str  # which numbers are accepted, in words that follow "must be"
    accepts: Callable[[float], bool]

    @property
    def metavar(self) -> str:
        """How --help calls the value."""
        return "N" if self.kind is int else "X"

    def __call__(self, text: str):
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.accepts(value):
            raise argparse.ArgumentTypeError(f"must be {self.rule}, not {text}")
        return value


COUNT = Number(int, "a whole number of at least 1", lambda x: x >= 1)
COUNT_OR_0 = Number(int, "a whole number of at least 0", lambda x: x >= 0)
SEED = Number(int, "a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)
POSITIVE = Number(float, "a number above 0", lambda x: 0 < x < math.inf)
POSITIVE_OR_INF = Number(float, "a number above 0, or inf", lambda x: x > 0)
POSITIVE_OR_0 = Number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
SHARE = Number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
SHARE_ABOVE_0 = Number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)


def writable_directory(text: str) -> str:
    """An argparse type: a directory that can be made or written to."""
    parent = unwritable_parent(text)
    if parent:
        raise argparse.ArgumentTypeError(
            f"{text} cannot be made: {parent} is no directory that can be written to"
        )
    return text


def unwritable_parent(path: str) -> Path | None:
    """Return what keeps a directory from being made: its lowest parent, if that is not writable."""
    absolute = Path(path).absolute()
    parent = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    return None if parent.is_dir() and os.access(parent, os.W_OK) else parent


COLUMNS = ("prompt", "answer", "demonstration", "system", "level")


def columns(text: str) -> dict[str, str]:
    """An argparse type: KEY=COLUMN,..., the columns that hold the keys of a problem."""
    found = {}
    for pair in text.split(","):
        key, _, column = (part.strip() for part in pair.partition("="))
        if key not in COLUMNS or not column:
            raise argparse.ArgumentTypeError(
                f"must be KEY=COLUMN,... with the keys {', '.join(COLUMNS)}, not {text}"
            )
        if key in found:
            raise argparse.ArgumentTypeError(f"names a column for {key} twice: {text}")
        found[key] = column
    return found


def critic_directory(text: str) -> str:
    """An argparse type: a directory that holds a critic."""
    if not Path(text, "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{text} is no model directory; a run of --method ppo saves a critic in final/critic"
        )
    return text


# ------------------------------------------------------------------------------- the two programs


def parse_training_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags of train_hpt.py, checked. argv: the command line's, if it is not given."""
    with one_failure_message(quiet=True):
        parser = training_parser()
        words = sys.argv[1:] if argv is None else argv
        if not has_flag("--model", words) and not any(word.startswith("@") for word in words):
            if has_flag("--data", words):
                parser.error("--data needs a --model; without one the toy trains on its own data")
            words = [f"@{TOY_ARGS}", *words]
        args = parser.parse_args(parser.expand(words))
        check_training(parser, args)
    if argv is None:  # the program goes on with slow imports
        during_imports()
        terminal.start(args.verbose)
    return args


def parse_evaluation_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags of evaluate.py, checked. argv: the command line's, if it is not given."""
    with one_failure_message(quiet=True):
        parser = evaluation_parser()
        args = parser.parse_args(parser.expand(sys.argv[1:] if argv is None else argv))
        check_evaluation(parser, args)
    if argv is None:  # the program goes on with slow imports
        during_imports()
        terminal.start(args.verbose)
    return args


def has_flag(name: str, words: list[str]) -> bool:
    """Tell whether a command line holds a flag, as "--model X" or as "--model=X"."""
    return any(word == name or word.startswith(f"{name}=") for word in words)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reads @FILE arguments, and names the file and line of an error."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=program,
            usage=f"{program} [flags] [@FILE]; --help lists the flags",
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        self.place = ""  # "FILE:LINE: " while a line of a file is read

    def error(self, message: str):
        """Print the usage and a sentence, and end the program; argparse calls this."""
        super().error(printable(self.place + message))

    def expand(self, words: list[str]) -> list[str]:
        """Return a command line with each @FILE replaced by the flags in the file."""
        expanded = []
        for word in words:
            expanded += self.read_args_file(word[1:]) if word.startswith("@") else [word]
        return expanded

    def read_args_file(self, path: str) -> list[str]:
        """Return the flags in a file.

        A flag and its values stand on one line, and are quoted as in a shell; "#" begins a comment.
        {repo} stands for the folder of this repository. Each line is parsed by itself here, so that
        an error names the line.
        """
        try:
            content = Path(path).read_bytes()
            lines = content.decode("utf-8-sig").splitlines()
        except OSError as error:
            self.error(f"@{path} cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            line_number = content.count(b"\n", 0, error.start) + 1
            self.error(f"{path}:{line_number}: this is not UTF-8: save the file in that encoding")
        words = []
        for line_number, line in enumerate(lines, 1):
            self.place = f"{path}:{line_number}: "
            try:
                words_of_line = shlex.split(line, comments=True)
            except ValueError as error:
                self.error(f"{error}: {line}")
            words_of_line = [word.replace("{repo}", str(REPOSITORY)) for word in words_of_line]
            self.parse_args(words_of_line)
            words += words_of_line
        self.place = ""
        return words


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description, and has room for long names of flags."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)


def number(group, name: str, kind: Number, default: float | None, about: str) -> None:
    """Add a flag whose value is a number; the default, if there is one, ends its help."""
    if default is not None:
        about += " (%(default)s)"
    group.add_argument(name, type=kind, default=default, metavar=kind.metavar, help=about)


def text(group, name: str, metavar: str, about: str, default: str | None = None, kind=str) -> None:
    """Add a flag whose value is a text; the default, if there is one, ends its help."""
    if default is not None:
        about += " (%(default)s)"
    group.add_argument(name, type=kind, default=default, metavar=metavar, help=about)


def choice(group, name: str, choices: list[str], about: str) -> None:
    """Add a flag whose value is one of several names, of which the first is the default."""
    group.add_argument(name, choices=choices, default=choices[0], help=f"{about} (%(default)s)")


# ---------------------------------------------------------------------------- flags of train_hpt.py

TRAINING_DESCRIPTION = """\
Hybrid Post-Training (arXiv 2509.04419) and the methods it is compared with.

  torchrun train_hpt.py                        the toy: toy/toy.args
  torchrun --nproc_per_node=8 train_hpt.py @recipes/qwen2.5-math-7b.args --seed 1
  torchrun train_hpt.py --model DIR --data problems.jsonl

In brackets stands a flag's default, which is the paper's where the paper gives one."""


def training_parser() -> Parser:
    """Return the parser of train_hpt.py."""
    parser = Parser("train_hpt.py", TRAINING_DESCRIPTION)
    add_model_flags(parser)

    group = parser.add_argument_group("data")
    text(group, "--data", "SOURCE", SOURCES, PAPER_DATA)
    add_columns_flag(group)
    text(group, "--eval-data", "SOURCE", "held-out problems on which accuracy is measured (none)")
    text(
        group,
        "--eval-columns",
        "KEY=COLUMN,...",
        "columns of --eval-data (those of --columns)",
        kind=columns,
    )
    add_prompt_flags(group)
    number(group, "--max-prompt-tokens", COUNT, 1024, "problems with longer prompts are left out")
    number(group, "--max-response-tokens", COUNT, 8192, "L_max; longer demonstrations are left out")

    group = parser.add_argument_group("rollout")
    number(group, "--prompts-per-step", COUNT, 128, "prompts per rollout step")
    number(group, "--samples-per-prompt", COUNT, 8, "n, rollouts per prompt")
    # The trainer divides every logit by the temperature too. So every log-probability in the loss,
    # also that of a demonstration, is of softmax(logits / T), the distribution that was sampled.
    number(
        group,
        "--temperature",
        POSITIVE,
        1.0,
        "T; rollouts and losses, demonstrations' too, use softmax(logits / T)",
    )
    add_engine_flags(group, gpu_memory_utilization=None)

    add_algorithm_flags(parser)
    add_optimisation_flags(parser)

    group = parser.add_argument_group("logging")
    text(
        group,
        "--out",
        "DIR",
        "a new directory, or that of --resume (runs/METHOD-MODEL-seedS-TIME)",
        kind=writable_directory,
    )
    number(group, "--seed", SEED, 0, "random seed")
    number(
        group, "--eval-every", COUNT_OR_0, 0, "steps between evaluations; 0: only before and after"
    )
    number(group, "--eval-samples", COUNT, 8, "responses per held-out problem, at --temperature")
    number(
        group, "--probe-gradients", COUNT_OR_0, 0, "steps between probes of the gradients; 0: never"
    )
    number(
        group, "--save-every", COUNT_OR_0, 0, "steps between checkpoints; 0: only one at the end"
    )
    number(group, "--keep", COUNT_OR_0, 2, "the newest checkpoints that stay besides final; 0: all")
    add_verbose_flag(group)
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, or begin if there is none",
    )
    text(group, "--wandb", "PROJECT", "also send the metrics to this project of W&B (no)")
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the metrics to OUT/tensorboard, for TensorBoard",
    )
    group.add_argument(
        "--plan",
        nargs="?",
        type=POSITIVE_OR_0,
        const=0.0,
        metavar="GB",
        help="only estimate the memory, on this machine or on GPUs of so many GB; then end",
    )
    return parser


def add_algorithm_flags(parser: Parser) -> None:
    """Add the flags that say what the loss is."""
    group = parser.add_argument_group(
        "algorithm", f"`python upge.py` prints every METHOD:\n{' '.join(METHODS)}"
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        default="hpt",
        metavar="METHOD",
        help="which rows of the table are trained (%(default)s)",
    )
    choice(group, "--gate", ["switch", "smooth"], "HPT: alpha is 0 or 1 by --gamma, or P")
    number(group, "--gamma", SHARE, 0.0, "HPT: SFT where P <= gamma; the paper, Llama: 0.25")
    # In the authors' code the weight of a demonstration depends on the micro-batches. It lies
    # between 0.02 and 0.11, where the rollouts of a prompt weigh 1.
    number(
        group, "--sft-coef", POSITIVE_OR_0, 0.05, "c_sft, weight of SFT in HPT; Eq. 13 as it is: 1"
    )
    number(
        group,
        "--clip-eps",
        POSITIVE_OR_INF,
        None,
        "epsilon of the clip; inf: no clip (the row's own)",
    )
    choice(
        group, "--pi-old", ["trainer", "sampler", "tis"], "whose log-probabilities are log pi_old"
    )
    number(group, "--tis-cap", POSITIVE, 2.0, "where --pi-old tis truncates importance weights")
    add_reward_flag(group)
    number(group, "--entropy-coef", POSITIVE_OR_0, 0.0, "weight of an entropy bonus on rollouts")

    group = parser.add_argument_group("chord")
    group.add_argument(
        "--chord-mu",
        type=SHARE,
        nargs=2,
        default=[0.1, 0.1],
        metavar=("PEAK", "VALLEY"),
        help="mu, the weight of demonstrations; rollouts weigh 1 - mu (0.1 0.1)",
    )
    group.add_argument(
        "--chord-steps",
        type=COUNT_OR_0,
        nargs=2,
        default=[0, 0],
        metavar=("WARMUP", "DECAY"),
        help="rollout steps in which mu rises from 0 to PEAK, and falls to VALLEY (0 0)",
    )

    group = parser.add_argument_group("ppo")
    text(
        group,
        "--critic",
        "DIR",
        "a trained critic (the base model with a value head initialised to 0)",
        kind=critic_directory,
    )
    number(group, "--critic-lr", POSITIVE, 1e-5, "learning rate of the critic")
    number(group, "--gae-gamma", SHARE, 1.0, "gamma of GAE, discount per token")
    number(group, "--gae-lambda", SHARE, 1.0, "lambda of GAE, decay per token")
    number(
        group, "--value-clip", POSITIVE_OR_INF, 0.2, "clip range of the value loss; inf: no clip"
    )


def add_optimisation_flags(parser: Parser) -> None:
    """Add the flags that say how the loss is minimised."""
    group = parser.add_argument_group("optimisation")
    number(group, "--steps", COUNT, 500, "rollout steps")
    number(group, "--minibatches-per-step", COUNT, 2, "optimizer steps per rollout step")
    number(
        group,
        "--tokens-per-microbatch",
        COUNT,
        32768,
        "tokens per forward pass; does not change the gradient",
    )
    number(
        group,
        "--replicas",
        COUNT,
        1,
        "copies of the weights, say one per machine; each is sharded over its ranks",
    )
    number(group, "--lr", POSITIVE, 5e-6, "learning rate of AdamW, constant after warm-up")
    number(group, "--warmup-steps", COUNT_OR_0, 0, "optimizer steps of linear warm-up")
    number(group, "--weight-decay", POSITIVE_OR_0, 0.01, "weight decay of AdamW")
    number(
        group, "--max-grad-norm", POSITIVE_OR_INF, 1.0, "clip gradients to this norm; inf: no clip"
    )
    number(
        group,
        "--max-skipped",
        COUNT_OR_0,
        20,
        "more skipped optimizer steps in a row end the run",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute activations twice: less memory, a third more time (%(default)s)",
    )


def check_not_empty(parser: Parser, args: argparse.Namespace) -> None:
    """End the program if a name is empty, as where a variable of the shell was not set."""
    for name in ("model", "data", "eval_data", "out", "wandb"):
        value = getattr(args, name, None)
        if "" in (value if isinstance(value, list) else [value]):
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is empty: give it a value, or leave it out")


def check_training(parser: Parser, args: argparse.Namespace) -> None:
    """End the program if flags of train_hpt.py contradict each other."""
    check_not_empty(parser, args)
    if args.model is None:
        parser.error("--model is missing: name a Hugging Face directory or a hub id")
    if args.method in GROUP_METHODS and args.samples_per_prompt < 2:
        parser.error(
            f"--method {args.method} combines rollouts and the demonstration into a group: "
            f"--samples-per-prompt must be at least 2, not {args.samples_per_prompt}"
        )
    if args.method in COMPARING_METHODS and args.samples_per_prompt < 2:
        parser.error(
            f"--method {args.method} compares the rollouts of a prompt with each other, and would "
            "train on nothing: --samples-per-prompt must be at least 2, not "
            f"{args.samples_per_prompt}"
        )
    (peak, valley), (_, decay) = args.chord_mu, args.chord_steps
    if args.method == "chord" and peak != valley and decay == 0:
        parser.error(
            f"--chord-mu {peak:g} {valley:g} says that mu falls, but --chord-steps gives it no "
            "steps to fall in: its second number must be above 0"
        )
    if args.critic and args.method != "ppo":
        parser.error(f"--critic is for --method ppo, not {args.method}")
    if args.minibatches_per_step > args.prompts_per_step:
        parser.error(
            f"--minibatches-per-step {args.minibatches_per_step} needs at least as many "
            f"--prompts-per-step, not {args.prompts_per_step}"
        )
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks % args.replicas:
        parser.error(f"--replicas {args.replicas} must divide the number of ranks, {ranks}")
    if args.out is None and unwritable_parent("runs"):
        parser.error("the directory runs/ cannot be made or written to: name another one as --out")
    for package in ("wandb", "tensorboard"):
        if getattr(args, package) and not is_installed(package):
            parser.error(f"--{package} needs the package {package}: pip install {package}")
    check_out(parser, args)


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported. A mere folder of that name is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


# A resumed run may have other values of these: they change how long it is, what is measured and
# saved, and how the work is cut, which changes the gradient by rounding at most.
MAY_CHANGE = ["out", "resume", "steps", "save_every", "keep", "max_skipped", "eval_every"]
MAY_CHANGE += ["probe_gradients", "tokens_per_microbatch", "gradient_checkpointing"]
MAY_CHANGE += ["tensor_parallel", "gpu_memory_utilization", "wandb", "tensorboard", "verbose"]


def check_out(parser: Parser, args: argparse.Namespace) -> None:
    """End the program if --out exists without --resume, or is no run of these flags with it."""
    if not args.resume:
        if args.out and Path(args.out).exists():
            parser.error(
                f"argument --out: {args.out} exists already: name another directory, or go on with "
                "the run in it with --resume"
            )
        return
    if args.out is None:
        parser.error("--resume needs --out: the directory of the run to go on with")
    config = Path(args.out, "config.json")
    if not config.exists():
        if any(not path.name.startswith(".") for path in Path(args.out).glob("*")):
            parser.error(f"--resume: {args.out} holds no run of this program (no config.json)")
        return  # the run begins
    try:
        saved = json.loads(config.read_text())["flags"]
    except (OSError, ValueError, LookupError) as error:
        parser.error(f"--resume: {config} cannot be read: {error}")
    now = json.loads(json.dumps(vars(args)))
    for name, value in saved.items():
        if name in now and name not in MAY_CHANGE and now[name] != value:
            flag = "--" + name.replace("_", "-")
            parser.error(
                f"--resume: the run in {args.out} has {flag} {value}, not {now[name]}: give the "
                "same value, or name a new --out"
            )


# ----------------------------------------------------------------------------- flags of evaluate.py

EVALUATION_DESCRIPTION = f"""\
Sample responses to benchmarks and grade them: avg@n and pass@k; compare two evaluations.

  python evaluate.py --model DIR --paper --data FILE ...
  torchrun --nproc_per_node=8 evaluate.py --model DIR --bench aime24 --samples 8
  python evaluate.py --compare runs/A runs/B

A NAME of a benchmark is one of: {" ".join(BENCHMARKS)}.
In brackets stands a flag's default, which is the paper's where the paper gives one."""


def evaluation_parser() -> Parser:
    """Return the parser of evaluate.py."""
    parser = Parser("evaluate.py", EVALUATION_DESCRIPTION)
    add_model_flags(parser)

    group = parser.add_argument_group("problems")
    group.add_argument(
        "--bench",
        nargs="+",
        default=[],
        choices=BENCHMARKS,
        metavar="NAME",
        help="benchmarks from the hub (none)",
    )
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help=f"problems: {SOURCES} (none)",
    )
    add_columns_flag(group)
    # The protocol is the defaults below, and the samples per problem of data.paper_samples.
    group.add_argument(
        "--paper",
        action="store_true",
        help="the paper's protocol; on all benchmarks if there is no --bench or --data",
    )
    add_prompt_flags(group)

    group = parser.add_argument_group("sampling")
    number(group, "--samples", COUNT, None, "n, responses per problem (8)")
    number(group, "--temperature", POSITIVE_OR_0, 0.6, "T in softmax(logits / T); 0: greedy")
    number(
        group, "--top-p", SHARE_ABOVE_0, 0.95, "p; sample the likeliest tokens of this probability"
    )
    number(group, "--max-response-tokens", COUNT, 8192, "longest response, in tokens")
    add_engine_flags(group, gpu_memory_utilization=0.9)
    add_reward_flag(group)
    number(group, "--seed", SEED, 0, "random seed")

    group = parser.add_argument_group("output")
    text(group, "--out", "DIR", "directory to write to, or to continue in (runs/eval-MODEL-KEY)")
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two directories, of evaluations or training runs; nothing is sampled",
    )
    add_verbose_flag(group)
    return parser


def check_evaluation(parser: Parser, args: argparse.Namespace) -> None:
    """Fill in what --paper decides; end the program if flags of evaluate.py contradict."""
    check_not_empty(parser, args)
    if args.compare:
        if args.model or args.bench or args.data or args.paper:
            parser.error("--compare takes two directories, and --out: nothing is sampled")
        return
    if args.model is None:
        parser.error("--model is missing: name a Hugging Face directory or a hub id")
    if args.paper:
        for name in ("temperature", "top_p", "max_response_tokens", "system_prompt", "samples"):
            if getattr(args, name) != parser.get_default(name):
                flag = "--" + name.replace("_", "-")
                parser.error(f"--paper sets {flag} itself: leave one of the two out")
        if not args.bench and not args.data:
            args.bench = list(BENCHMARKS)
    if args.samples is None:
        args.samples = 8
    names = args.bench + [source_name(source) for source in args.data]
    if not names:
        parser.error(
            "nothing to evaluate on: name a --bench, or a file as --data, or take --paper for all "
            "benchmarks of the paper"
        )
    if len(set(names)) < len(names):
        parser.error(f"--bench and --data: two are named alike, of {' '.join(names)}")
    if args.temperature == 0 and args.samples > 1:
        parser.error("--temperature 0 always gives the same answer: use --samples 1")


# --------------------------------------------------------------------------- flags of both programs


def add_model_flags(parser: Parser) -> None:
    """Add the model, and what of its config is replaced."""
    group = parser.add_argument_group("model")
    text(group, "--model", "DIR", "Hugging Face directory or hub id of a causal language model")
    number(
        group,
        "--rope-theta",
        POSITIVE,
        None,
        "replaces the config's value; the paper: 40000 for Qwen2.5-Math",
    )
    number(
        group,
        "--max-position-embeddings",
        COUNT,
        None,
        "replaces the config's value; the paper: 16384 for Qwen2.5-Math",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model, with all your rights (never)",
    )


SOURCES = ".jsonl, .json, .parquet, or hub NAME:CONFIG:SPLIT"


def add_columns_flag(group) -> None:
    """Add the flag that names the columns of --data."""
    text(
        group,
        "--columns",
        "KEY=COLUMN,...",
        f"columns of --data that hold {', '.join(COLUMNS)} (these)",
        kind=columns,
    )


def add_prompt_flags(group) -> None:
    """Add the flags that say how a problem is written as a prompt."""
    choice(group, "--template", ["chat", "plain"], "the model's chat template, or the paper's text")
    text(
        group,
        "--system-prompt",
        "TEXT",
        "system message of the chat; '': none; data: the problem's own (the paper's)",
    )
    group.set_defaults(system_prompt=SYSTEM)


def add_reward_flag(group) -> None:
    """Add the flag that names the verifier."""
    about = "grades (response, answer) from 0 to 1"
    text(group, "--reward", "MODULE:FUNCTION", about, "reward:grade")


def add_verbose_flag(group) -> None:
    """Add the flag that lets other libraries print."""
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="print what vLLM, torch and transformers say, too; their errors come in any case",
    )


def add_engine_flags(group, gpu_memory_utilization: float | None) -> None:
    """Add the flags that say how vLLM uses the GPUs."""
    left = " (what the trainer leaves free)" if gpu_memory_utilization is None else ""
    number(group, "--tensor-parallel", COUNT, 1, "ranks that share one vLLM engine")
    number(
        group,
        "--gpu-memory-utilization",
        SHARE_ABOVE_0,
        gpu_memory_utilization,
        "share of a GPU for vLLM while it samples" + left,
    )
