"""Problems and benchmarks, and how they become token ids.

A problem is a dict:

    "prompt"         str, the question
    "answer"         str, or a list of the answers that count as right
    "demonstration"  str, a worked solution; only where a method trains on demonstrations
    "system"         str, the system message that the data set asks for, if it has one
    "level"          str or number by which results are broken down, if the data set has one
    "prompt_ids"     list of token ids, added by `tokenize`
    "demo_ids"       list of token ids, added by `tokenize` where there is a demonstration

Bad input ends the program with one sentence that names the flag, or the file and the line.
Everything slow is imported inside the functions, since common/flags.py imports this module.
"""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import NamedTuple, NoReturn

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
# The paper's prompt for Llama-3.1-8B, a base model without a chat template.
PLAIN = "Question:\n{prompt}\n" + SYSTEM + "\nAnswer:\nLet's think step by step."
PAPER_DATA = "Elliott/Openr1-Math-46k-8192"  # the paper's training set, on the hub


def fail(where: str, why: str) -> NoReturn:
    """End the program with one sentence: which flag or line is wrong, and why."""
    raise SystemExit(f"error: {where}: {why}")


# --------------------------------------------------------------------------- problems from a source


def load_problems(
    source: str | Path, need_demonstration: bool = False, flag: str = "--data"
) -> list[dict]:
    """Read the problems of a file, or of a data set on the hub (its split "train").

    A row has the keys of a problem, or the columns of the paper's training set (PAPER_DATA):
    `prompt`, a list of messages; `target`, a list with the demonstration as a message; and
    `reward_model.ground_truth`, the answer.

    Args:
        source: a .jsonl, .json (one list of rows) or .parquet file, or the id of a hub data set.
        need_demonstration: whether each row must have a demonstration. If not, it is not read.
        flag: the flag that named the source, for errors.
    """
    path = Path(source)
    if path.suffix in READERS or path.exists():
        rows = read_file(path, flag)
    else:
        rows = list(enumerate(load_hub(f"{flag} {source} is no file here", str(source)), 1))
    if not rows:
        fail(f"{flag} {source}", "no rows")
    return [to_problem(row, f"{source}:{line}", need_demonstration) for line, row in rows]


def read_file(path: Path, flag: str) -> list[tuple]:
    """Return the rows of a data file as pairs (line, or number of the row from 1; row)."""
    if path.is_dir():
        fail(f"{flag} {path}", "a directory; name a file in it")
    if not path.is_file():
        fail(f"{flag} {path}", "no such file")
    if path.suffix not in READERS:
        fail(f"{flag} {path}", "a data file ends in .jsonl, .json or .parquet")
    return READERS[path.suffix](path)


def read_jsonl(path: Path) -> list[tuple]:
    """Return (line, row) pairs of a .jsonl file; empty lines are left out."""
    rows = []
    # Not splitlines(): it also splits at characters that may stand inside a JSON string, as U+2028.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            rows.append((number, parse_json(line, path, number)))
    return rows


def read_json(path: Path) -> list[tuple]:
    """Return (number, row) pairs of a .json file, which holds one list."""
    rows = parse_json(read_text(path), path)
    if not isinstance(rows, list):
        fail(str(path), "a .json file must hold a list of problems; with one per line it is .jsonl")
    return list(enumerate(rows, 1))


def read_parquet(path: Path) -> list[tuple]:
    """Return (number, row) pairs of a .parquet file."""
    try:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:  # of many kinds, or there is no pyarrow
        fail(str(path), f"cannot be read as parquet: {error}")
    return list(enumerate(rows, 1))


READERS = {".jsonl": read_jsonl, ".json": read_json, ".parquet": read_parquet}


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without the byte-order mark that some editors write."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        fail(str(path), f"not UTF-8 text: {error}")


def parse_json(text: str, path: Path, first_line: int = 1):
    """Return the value of a JSON text, which begins on line `first_line` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        fail(f"{path}:{line}", f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        fail(f"{path}:{first_line}", "nested too deeply")


def load_hub(where: str, name: str, config: str | None = None, split: str = "train") -> list[dict]:
    """Return the rows of a hub data set; `where` begins the error if there is none."""
    try:
        import datasets

        return list(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # of dozens of kinds, each of which names its reason
        fail(where, f"the hub data set {name} cannot be loaded: {error}")


# ------------------------------------------------------------------------------------ rows, checked


def to_problem(row, where: str, need_demonstration: bool) -> dict:
    """Return a row of a source as a problem, checked; `where` is its place in the source."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        fail(where, f"a problem is an object with 'prompt' and 'answer', not {kind}")
    fields = row
    if isinstance(row.get("prompt"), list):
        fields = from_paper_columns(row, where)
    needed = ["prompt", "answer"]
    if need_demonstration:
        needed.append("demonstration")
    problem = {}
    for key in needed:
        if key not in fields:
            reason = "; this method trains on demonstrations" if key == "demonstration" else ""
            fail(where, f"no '{key}' (it has: {', '.join(row)}){reason}")
        check_text(key, fields[key], where)
        problem[key] = fields[key]
    for key in ("system", "level"):
        if fields.get(key) is not None:
            problem[key] = fields[key]
    if "level" in problem:
        check_level(problem["level"], where)
    check_characters(problem, where)
    return problem


def from_paper_columns(row: dict, where: str) -> dict:
    """Return the fields of a problem from a row with the columns of the paper's training set."""
    try:
        messages = {message["role"]: message["content"] for message in row["prompt"]}
        fields = {"prompt": messages["user"], "answer": row["reward_model"]["ground_truth"]}
        if "system" in messages:
            fields["system"] = messages["system"]
        if row.get("target"):
            fields["demonstration"] = row["target"][0]["content"]
    except (KeyError, TypeError, IndexError) as error:
        fail(
            where,
            f"'prompt' is a list, but the row lacks the columns of {PAPER_DATA}: 'prompt' and "
            "'target', lists of messages {role, content}, and reward_model.ground_truth "
            f"({type(error).__name__}: {error})",
        )
    return fields


def check_text(key: str, value, where: str) -> None:
    """End the program unless a value is text; an answer may be a list of texts."""
    texts, allowed = [value], "a string that is not empty"
    if key == "answer":
        allowed += " (or a list of them)"
        if isinstance(value, list) and value:
            texts = value
    if not all(isinstance(text, str) and text.strip() for text in texts):
        fail(where, f"'{key}' must be {allowed}, not {value!r:.60}")


def check_level(level, where: str) -> None:
    """End the program unless a level can label a line of a table. "all" labels the last line."""
    is_label = isinstance(level, (str, int, float)) and not isinstance(level, bool)
    is_nan = level != level
    if not is_label or is_nan or level == "all":
        fail(where, f"'level' must be a number or a string, and not 'all', not {level!r:.60}")


def check_characters(problem: dict, where: str) -> None:
    """End the program if a text holds half of a surrogate pair, which cannot be written."""
    try:
        json.dumps(problem, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        fail(where, f"half of a surrogate pair, which is no character: {error}")


# ------------------------------------------------------------------------- the paper's benchmarks


class Benchmark(NamedTuple):
    """Where a test set lives on the hub, and which of its columns make a problem."""

    hub: str
    split: str
    question: str
    answer: str
    config: str | None = None


# Hub ids and columns as public evaluation code uses them. None of them could be loaded when this
# was written, so an error names the column that is missing.
BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer"),
    "aime25": Benchmark("math-ai/aime25", "test", "problem", "answer"),
    "amc": Benchmark("AI-MO/aimo-validation-amc", "train", "problem", "answer"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer"),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer"),
    "olympiad": Benchmark("math-ai/olympiadbench", "test", "question", "final_answer"),
    "arc_c": Benchmark("allenai/ai2_arc", "test", "question", "answerKey", "ARC-Challenge"),
    "gpqa": Benchmark("Idavidrein/gpqa", "train", "Question", "Correct Answer", "gpqa_diamond"),
}


def paper_samples(name: str) -> int:
    """Return the paper's samples per problem: 32 for AIME and AMC, 1 for all others.

    name: of a benchmark, or of a file without its suffix, as amc23 or AIME_2024.
    """
    return 32 if name.lower().startswith(("aime", "amc")) else 1


def load_benchmark(name: str) -> list[dict]:
    """Return the problems of a benchmark from the hub, {"prompt", "answer"} and perhaps "level"."""
    benchmark = BENCHMARKS[name]
    rows = load_hub(f"--bench {name}", benchmark.hub, benchmark.config, benchmark.split)
    problems = []
    for number, row in enumerate(rows, 1):
        try:
            problems.append(from_benchmark(name, row))
        except (KeyError, TypeError, ValueError) as error:
            fail(
                f"--bench {name}",
                f"row {number} of {benchmark.hub} does not have the columns that common/data.py "
                f"expects ({type(error).__name__}: {error}); it has: {', '.join(row)}",
            )
    return problems


def from_benchmark(name: str, row: dict) -> dict:
    """Return one row of a benchmark as a problem."""
    benchmark = BENCHMARKS[name]
    question, answer = row[benchmark.question], row[benchmark.answer]
    if name == "arc_c":
        right = row["choices"]["label"].index(answer)
        question, answer = multiple_choice(question, row["choices"]["text"], right)
    elif name == "gpqa":
        # The data set names the right choice first. They are shuffled, in an order that depends on
        # the question alone, so that it is the same in every run.
        texts = [answer.strip()] + [row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3)]
        order = [0, 1, 2, 3]
        random.Random(hashlib.sha256(question.encode()).digest()).shuffle(order)
        question, answer = multiple_choice(question, [texts[i] for i in order], order.index(0))
    elif isinstance(answer, list):  # OlympiadBench: all of them are asked for
        answer = ", ".join(answer)
    elif isinstance(answer, float):  # AMC: 142.0
        answer = f"{answer:g}"
    problem = {"prompt": question, "answer": str(answer)}
    if "level" in row:
        problem["level"] = row["level"]
    return problem


def multiple_choice(question: str, texts: list[str], right: int) -> tuple[str, str]:
    """Return a question with its choices lettered, and the letter of the choice `right`."""
    letters = [chr(ord("A") + i) for i in range(len(texts))]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts)]
    return question.strip() + "\n\n" + "\n".join(lines), letters[right]


# -------------------------------------------------------------------------------- the model's files


def load_config_and_tokenizer(
    model: str, rope_theta: float | None = None, max_position_embeddings: int | None = None
):
    """Return the Hugging Face config, with the overrides applied, and the tokenizer of a model.

    model: a directory or a hub id.
    """
    from transformers import AutoConfig, AutoTokenizer

    where = f"--model {model}"
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        fail(
            where,
            "neither a Hugging Face model directory here nor a model that the hub gives: " + reason,
        )
    if tokenizer.eos_token_id is None:
        fail(where, "its tokenizer has no end-of-sequence token")
    if not tokenizer.encode("1+1", add_special_tokens=False):
        fail(where, "its tokenizer is empty: are tokenizer.json and tokenizer_config.json there?")
    rope_parameters = getattr(config, "rope_parameters", None) or {}
    if rope_theta is not None and "rope_theta" not in rope_parameters:
        fail("--rope-theta", f"a {config.model_type} model has no single rope_theta")
    return override(config, rope_theta, max_position_embeddings), tokenizer


def override(config, rope_theta: float | None = None, max_position_embeddings: int | None = None):
    """Change a Hugging Face config in place and return it.

    The trainer and the sampler both call this on the config that they read. It also switches
    dropout off: the sampler has none, and the trainer must compute the same probabilities.
    """
    for name, value in config.to_dict().items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    if max_position_embeddings is not None:
        config.max_position_embeddings = max_position_embeddings
    # vLLM also calls this on a bare PreTrainedConfig, which has no rope_parameters.
    if rope_theta is not None and hasattr(config, "rope_parameters"):
        config.rope_parameters = config.rope_parameters | {"rope_theta": rope_theta}
    return config


def check_weights(model: str, config) -> None:
    """End the program unless a model directory's weights can be read and fit its config.

    A model on the hub, or one saved as .bin files, is left to the library that reads it.
    """
    folder, where = Path(model), f"--model {model}"
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if not any(folder.glob("*.bin")):
            fail(where, "no .safetensors or .bin file there")
        return
    stored, wanted = stored_shapes(files, where), wanted_shapes(config)
    if not stored.keys() & wanted.keys():
        return  # names of an older layout, which transformers translates
    for name, shape in wanted.items():
        if name not in stored:
            fail(where, f"the weights have no {name}; its config.json asks for {shape}")
        if stored[name] != shape:
            fail(
                where,
                f"the weights' {name} has shape {stored[name]}; its config.json asks for {shape}",
            )


def stored_shapes(files: list[Path], where: str) -> dict[str, list[int]]:
    """Return {name: shape} of the tensors in .safetensors files, without reading the tensors."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    shapes[name] = list(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            fail(where, f"{file.name} is broken: {error}")
    return shapes


def wanted_shapes(config) -> dict[str, list[int]]:
    """Return {name: shape} of the parameters of the model that a config describes."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # no memory for the parameters
        model = AutoModelForCausalLM.from_config(config)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def check_context(config, prompt_tokens: int, max_response_tokens: int) -> None:
    """End the program unless a prompt and a response together fit the model's positions."""
    needed = prompt_tokens + max_response_tokens
    positions = getattr(config, "max_position_embeddings", math.inf)
    if needed > positions:
        raise SystemExit(
            f"error: prompts of up to {prompt_tokens} tokens and --max-response-tokens "
            f"{max_response_tokens} need {needed} positions, the model has {positions}: lower the "
            "latter, or raise the model's with --max-position-embeddings (and --rope-theta)"
        )


# ---------------------------------------------------------------------- from problems to token ids


def load_fitting_problems(
    args, source: str, tokenizer, need_demonstration: bool = False, flag: str = "--data"
) -> tuple[list[dict], str]:
    """Read and tokenise the problems of a source, as the flags of training say.

    Returns the problems that fit, and a sentence on how many were left out.
    """
    problems = load_problems(source, need_demonstration, flag)
    fitting, long_prompts, long_demonstrations = tokenize(
        problems,
        tokenizer,
        args.template,
        args.system_prompt,
        args.max_prompt_tokens,
        args.max_response_tokens,
    )
    left_out = f"{long_prompts} left out with a prompt over {args.max_prompt_tokens} tokens"
    if need_demonstration:
        left_out += f", {long_demonstrations} with a demonstration over {args.max_response_tokens}"
    if not fitting:
        fail(f"{flag} {source}", f"no problem is left: {left_out}")
    return fitting, left_out


def tokenize(
    problems: list[dict],
    tokenizer,
    template: str,
    system: str,
    max_prompt_tokens: float,
    max_response_tokens: float,
) -> tuple[list[dict], int, int]:
    """Add "prompt_ids", and "demo_ids" where there is a demonstration; leave out what is too long.

    Prompt and demonstration are tokenised apart, as they are when the model samples a response. A
    demonstration ends in the end-of-sequence token. Nothing is cut: a demonstration without its end
    would teach the model never to stop.

    Args:
        template, system: as in `render`.
        max_prompt_tokens, max_response_tokens: limits, which a text may just reach.

    Returns:
        (problems that fit, number with too long a prompt, number of others with too long a
        demonstration).
    """
    # A chat template writes the special tokens itself, as the one that begins a sequence. For the
    # plain template the tokenizer adds them.
    texts = [render(problem, tokenizer, template, system) for problem in problems]
    prompts = tokenizer(texts, add_special_tokens=template == "plain")["input_ids"]
    texts = [problem.get("demonstration", "") for problem in problems]
    demonstrations = tokenizer(texts, add_special_tokens=False)["input_ids"]
    fitting, long_prompts, long_demonstrations = [], 0, 0
    for problem, prompt_ids, demo_ids in zip(problems, prompts, demonstrations, strict=True):
        with_tokens = problem | {"prompt_ids": prompt_ids}
        if "demonstration" in problem:
            with_tokens["demo_ids"] = [*demo_ids, tokenizer.eos_token_id]
        if len(prompt_ids) > max_prompt_tokens:
            long_prompts += 1
        elif len(with_tokens.get("demo_ids", [])) > max_response_tokens:
            long_demonstrations += 1
        else:
            fitting.append(with_tokens)
    return fitting, long_prompts, long_demonstrations


def render(problem: dict, tokenizer, template: str = "chat", system: str = SYSTEM) -> str:
    """Return the prompt as text, up to where the response begins.

    Args:
        template: "chat" for the tokenizer's own chat template, "plain" for the paper's text PLAIN.
        system: the system message of the chat; "" for none, "data" for the problem's own.
    """
    if template == "plain":
        return PLAIN.replace("{prompt}", problem["prompt"])
    if not tokenizer.chat_template:
        fail(
            f"--model {tokenizer.name_or_path}",
            "its tokenizer has no chat template: use --template plain",
        )
    if system == "data":
        system = problem.get("system", "")
    messages = [{"role": "user", "content": problem["prompt"]}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if not text.strip():
            raise ValueError("it makes nothing of it")
    except Exception as error:  # a template is a program that comes with the model
        raise SystemExit(
            f"error: the model's chat template refuses this conversation: {error}; if it knows no "
            "system message, use --system-prompt '' (or --template plain)"
        ) from error
    return text
