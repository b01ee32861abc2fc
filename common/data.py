"""Problems and benchmarks, and how they become token ids.

A problem is a dict:

    "prompt"         str, the question
    "answer"         str, or a list of the answers that count as right
    "demonstration"  str, a worked solution; only where a method trains on demonstrations
    "system"         str, the system message that the data set asks for, if it has one
    "level"          str or number by which results are broken down, if the data set has one
    "turns"          the messages {role, content} that lead to the response, only where they are not
                     one question of the user, which "prompt" then is the last of
    "place"          where a problem with turns stands, for errors
    "boxed"          what was added to a demonstration without a box: its answer in one
    "prompt_ids"     list of token ids, added by `tokenize`
    "demo_ids"       list of token ids, added by `tokenize` where there is a demonstration

docs/data.md says which forms of data are accepted. Bad input ends the program with one sentence
that names the flag, or the file and the line.
Everything slow is imported inside the functions, since common/flags.py imports this module.
"""

import contextlib
import functools
import hashlib
import json
import math
import random
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from common import tokens

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
# The paper's prompt for Llama-3.1-8B, a base model without a chat template.
PLAIN = "Question:\n{prompt}\n" + SYSTEM + "\nAnswer:\nLet's think step by step."
PAPER_DATA = "Elliott/Openr1-Math-46k-8192"  # the paper's training set, on the hub
# Characters of a problem, all its texts together. A longer one is damage, not a question; to
# tokenise 100 MB of it would take minutes and more than 6 GB.
LONGEST_PROBLEM = 1_000_000


def fail(where: str, why: str) -> NoReturn:
    """End the program with one sentence: which flag or line is wrong, and why."""
    raise SystemExit(f"error: {where}: {why}")


# --------------------------------------------------------------------------- problems from a source


def load_problems(
    source: str | Path,
    need_demonstration: bool = False,
    flag: str = "--data",
    columns: dict[str, str] | None = None,
    box: bool = True,
) -> list[dict]:
    """Read the problems of a file, or of a data set on the hub.

    A row has the keys of a problem, or other names that `columns` gives, or a form of `fields_of`.

    Args:
        source: a .jsonl, .json (one list of rows) or .parquet file, or a hub data set:
            NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; the split is "train" if it is not given.
        need_demonstration: whether each row must have a demonstration. If not, it is not read.
        flag: the flag that named the source, for errors.
        columns: {key of a problem: name of the column that holds it}.
        box: whether a demonstration without a \\boxed{} gets its answer boxed at the end.
    """
    if is_file(source):
        rows = read_file(Path(source), flag)
    else:
        name, config, split = split_hub_name(str(source), flag)
        where = f"{flag} {source} is no file here"
        rows = list(enumerate(load_hub(where, name, config, split), 1))
    if not rows:
        fail(f"{flag} {source}", "no rows")
    problems = []
    for line, row in rows:
        place = f"{source}:{line}"
        problems.append(to_problem(row, place, need_demonstration, columns or {}, box))
    return problems


def is_file(source: str | Path) -> bool:
    """Tell whether a source names a file (or a directory by mistake), not a hub data set."""
    path = Path(source)
    return path.suffix in READERS or path.exists()


def source_name(source: str | Path) -> str:
    """Return what results call a source: the name of a file, or the last part of a hub id."""
    return Path(source).stem if is_file(source) else str(source).rpartition("/")[2]


def split_hub_name(source: str, flag: str) -> tuple[str, str | None, str]:
    """Return (name, config or None, split) of NAME, NAME:CONFIG or NAME:CONFIG:SPLIT."""
    name, config, split = [*source.split(":", 2), "", ""][:3]
    if not name:
        fail(f"{flag} {source}", "no name before the colon; a hub data set is NAME:CONFIG:SPLIT")
    return name, config or None, split or "train"


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
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not is_utf8(line):
                fail(f"{path}:{number}", f"not UTF-8 text ({error.reason}): save it as UTF-8")
        raise


def is_utf8(line: bytes) -> bool:
    """Tell whether bytes are UTF-8 text."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def parse_json(text: str, path: Path, first_line: int = 1):
    """Return the value of a JSON text, which begins on line `first_line` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        fail(f"{path}:{line}", f"not JSON: {error.msg} at column {error.colno}")
    except ValueError:  # of Python's, against numbers that take long to read
        fail(f"{path}:{first_line}", "a number of thousands of digits")
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


def to_problem(
    row, where: str, need_demonstration: bool, columns: dict[str, str], box: bool
) -> dict:
    """Return a row of a source as a problem, checked; `where` is its place in the source."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        fail(where, f"a problem is an object with 'prompt' and 'answer', not {kind}")
    fields = fields_of(with_columns(row, columns, where), where, need_demonstration)
    needed = ["prompt", "answer"]
    if need_demonstration:
        needed.append("demonstration")
    problem = {}
    for key in needed:
        if key not in fields:
            reason = "; this method trains on demonstrations" if key == "demonstration" else ""
            fail(
                where,
                f"no '{key}' (it has: {', '.join(row)}){reason}; if a column has another name, "
                f"say so with --columns {key}=NAME",
            )
        check_text(key, fields[key], where)
        problem[key] = fields[key]
    for key in ("system", "level", "turns", "place"):
        if fields.get(key) is not None:
            problem[key] = fields[key]
    if "level" in problem:
        check_level(problem["level"], where)
    if "system" in problem and not isinstance(problem["system"], str):
        fail(where, f"'system' must be a string, not {problem['system']!r:.60}")
    check_characters(problem, where)
    return with_box(problem) if need_demonstration and box else problem


def with_columns(row: dict, columns: dict[str, str], where: str) -> dict:
    """Return a row with the keys of a problem, from the columns that the user has named.

    A name with dots stands for a value inside others, as reward_model.ground_truth. An answer may
    be a number here, since many data sets hold answers as numbers.
    """
    found = {}
    for key, name in columns.items():
        value = row
        for part in [name] if name in row else name.split("."):
            if not isinstance(value, dict) or part not in value:
                fail(where, f"no column '{name}', which --columns names (it has: {', '.join(row)})")
            value = value[part]
        found[key] = number_as_text(value) if key == "answer" else value
    return row | found


def number_as_text(value):
    """Return a finite number as text, without ".0" at its end; return anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return value
    return str(int(value)) if value == int(value) else str(value)


def fields_of(row: dict, where: str, need_demonstration: bool) -> dict:
    """Return the fields of a problem from a row in one of the forms that are known.

    They are the keys of a problem; the columns of the paper's training set (PAPER_DATA): `prompt`,
    a list of messages; `target`, a list with the demonstration as a message; and
    `reward_model.ground_truth`, the answer; and GSM8K's form: `question`, and an `answer` that is
    worked and ends in "#### 72".
    """
    fields = dict(row)
    if isinstance(row.get("prompt"), list):
        fields |= from_paper_columns(row, where)
        if need_demonstration and row.get("target") and "demonstration" not in row:
            fields["demonstration"] = from_target(row["target"], where)
    extra = row.get("extra_info")
    if row.get("level") is None and isinstance(extra, dict) and extra.get("level") is not None:
        fields["level"] = extra["level"]
    worked = split_worked(fields.get("answer"))
    if worked:
        if "prompt" not in fields and "question" in fields:
            fields["prompt"] = fields["question"]
        demonstration = fields.get("demonstration", fields["answer"])
        fields["demonstration"] = (split_worked(demonstration) or [demonstration])[0]
        fields["answer"] = worked[1]
    return fields


def split_worked(text) -> tuple[str, str] | None:
    """Return (worked solution, answer) of a text in GSM8K's form, else None.

    The form is a solution whose last line is "#### 72". Its calculator marks, as <<48/2=24>>, are
    for a tool, and are taken out of the solution.
    """
    if not isinstance(text, str):
        return None
    solution, _, last = text.rstrip().rpartition("\n")
    marked = re.fullmatch(r"\s*####\s*([^\s#].*)", last)
    if not marked:
        return None
    return re.sub(r"<<[^<>]*>>", "", solution).rstrip(), marked.group(1)


def with_box(problem: dict) -> dict:
    """Return a problem whose demonstration ends in its boxed answer, if it had no box at all.

    The verifier reads the last box of a response, so a model that never sees one learns nothing
    that is rewarded.
    """
    if re.search(r"\\boxed\s*\{", problem["demonstration"]):
        return problem
    answer = problem["answer"]
    answer = answer[0] if isinstance(answer, list) else answer
    answer = re.sub(r"\A\$([^$]*)\$\Z", r"\1", answer.strip())
    boxed = "\n" + (answer if "\\boxed" in answer else f"\\boxed{{{answer}}}")
    return problem | {"demonstration": problem["demonstration"].rstrip() + boxed, "boxed": boxed}


def from_paper_columns(row: dict, where: str) -> dict:
    """Return prompt, answer, system message and turns of a row whose `prompt` is a list."""
    try:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]
        answer = row["answer"] if "answer" in row else row["reward_model"]["ground_truth"]
    except (KeyError, TypeError, IndexError) as error:
        fail(
            where,
            f"'prompt' is a list, but the row lacks the columns of {PAPER_DATA}: 'prompt' and "
            "'target', lists of messages {role, content}, and reward_model.ground_truth "
            f"({type(error).__name__}: {error})",
        )
    system, turns = split_system(turns, where)
    check_turns(turns, where)
    questions = [turn["content"] for turn in turns if turn["role"] == "user"]
    fields = {"prompt": questions[-1], "answer": answer}
    if system:
        fields["system"] = system
    if len(turns) > 1:
        fields |= {"turns": turns, "place": where}
    return fields


def split_system(turns: list[dict], where: str) -> tuple[str, list[dict]]:
    """Return the system messages of a conversation as one text, and its other turns."""
    for turn in turns:
        if not isinstance(turn["content"], str):
            fail(where, f"the content of a message must be a string, not {turn['content']!r:.60}")
    first = 0
    while first < len(turns) and turns[first]["role"] == "system":
        first += 1
    system = "\n\n".join(turn["content"] for turn in turns[:first] if turn["content"].strip())
    return system, turns[first:]


def check_turns(turns: list[dict], where: str) -> None:
    """End the program unless the turns after the system message are of the user and an assistant.

    The last may be the assistant's: then the model goes on with what it says.
    """
    for turn in turns:
        if turn["role"] == "system":
            fail(where, "a system message after another turn; it must come first")
        if turn["role"] not in ("user", "assistant"):
            fail(where, f"a message of the role {turn['role']!r}, not system, user or assistant")
        if not turn["content"].strip():
            fail(where, f"'prompt' must not hold an empty message (of the {turn['role']})")
    if not any(turn["role"] == "user" for turn in turns):
        fail(where, "'prompt' has no message of the user")


def from_target(target, where: str) -> str:
    """Return the demonstration in the column `target`: text, or a list with one message."""
    if isinstance(target, str):
        return target
    messages = target if isinstance(target, list) else [target]
    if len(messages) != 1:
        fail(where, f"'target' must be one message of the assistant, not {len(messages)} messages")
    message = messages[0]
    if not isinstance(message, dict) or message.get("role") != "assistant":
        fail(where, f"'target' must be one message of the assistant, not {message!r:.60}")
    return message.get("content")


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
    is_finite = isinstance(level, str) or (is_label and abs(level) < math.inf)  # not a nan either
    if not is_label or not is_finite or level == "all":
        fail(where, f"'level' must be a number or a string, and not 'all', not {level!r:.60}")


def check_characters(problem: dict, where: str) -> None:
    """End the program if a problem is far too long, or holds half of a surrogate pair.

    The latter cannot be written to a file.
    """
    text = json.dumps(problem, ensure_ascii=False)
    if len(text) > LONGEST_PROBLEM:
        fail(
            where,
            f"a problem of {len(text):,} characters, and no model reads more than "
            f"{LONGEST_PROBLEM:,}: take it out of the data",
        )
    try:
        text.encode()
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
    model: str,
    rope_theta: float | None = None,
    max_position_embeddings: int | None = None,
    trust_remote_code: bool = False,
):
    """Return the Hugging Face config, with the overrides applied, and the tokenizer of a model.

    Args:
        model: a directory or a hub id.
        trust_remote_code: whether Python files that come with the model may be run. It is given to
            transformers either way; if it is not, transformers asks on standard input.
    """
    from transformers import AutoConfig, AutoTokenizer

    where = f"--model {model}"
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, since every file of the model may be broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            fail(
                where,
                "it comes with Python code of its own, which is not run: if you have read that "
                "code and trust it, add --trust-remote-code",
            )
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


def end_token_ids(model: str, config, tokenizer) -> list[int]:
    """Return every token that ends a response, the tokenizer's end-of-sequence token first.

    The tokenizer, the config and the generation config of a model each name some, and they differ
    where a chat model was made of a base model. The sampler stops at all of them, and a model that
    was trained is saved with all of them: else it would not know its own end.
    """
    from transformers import GenerationConfig

    configs = [config, config.get_text_config()]
    with contextlib.suppress(OSError):  # not every model has one
        configs.append(GenerationConfig.from_pretrained(model))
    named = [getattr(named_by, "eos_token_id", None) for named_by in configs]
    ids = [tokenizer.eos_token_id]
    for value in named:
        for token in value if isinstance(value, list | tuple) else [value]:
            # Some configs name a token outside the vocabulary, which can never be sampled.
            is_token = isinstance(token, int) and 0 <= token < config.get_text_config().vocab_size
            if is_token and token not in ids:
                ids.append(token)
    return ids


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


def overrides_of(args):
    """Return `override` with the flags' values, a function config -> config, for the sampler."""
    return functools.partial(
        override,
        rope_theta=args.rope_theta,
        max_position_embeddings=args.max_position_embeddings,
    )


def check_weights(model: str, config, trust_remote_code: bool = False) -> None:
    """End the program unless a model directory's weights can be read and fit its config.

    They must be .safetensors: a pickled .bin file can run code when it is read. A model on the hub
    is left to the libraries that read it, which are told the same.
    """
    folder, where = Path(model), f"--model {model}"
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        fail(
            where,
            "its weights are pickled (.bin), and such a file can run code when it is read: convert "
            "them to .safetensors where that does no harm, or take a model that has them",
        )
    if not files:
        fail(where, "no .safetensors file there")
    stored = stored_shapes(files, where)
    wanted = wanted_shapes(config, where, trust_remote_code)
    # Other names may be an older layout of these, or experts one by one: transformers translates
    # them, and model.build_policy asks it what was missing.
    may_be_translated = bool(stored.keys() - wanted.keys())
    for name, shape in wanted.items():
        if name not in stored:
            if may_be_translated:
                continue
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


def wanted_shapes(config, where: str, trust_remote_code: bool = False) -> dict[str, list[int]]:
    """Return {name: shape} of the parameters of the model that a config describes."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):  # no memory for the parameters
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, since every number of the config may be wrong
        reason = str(error).splitlines()[0]
        fail(where, f"no causal language model can be made of its config.json: {reason:.200}")
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def check_vocabulary(model: str, config, tokenizer, problems: list[dict]) -> None:
    """End the program if tokenised problems hold a token for which the model has no embedding.

    A tokenizer may know more tokens than the model, as long as no problem uses them. The other way
    round, a vocabulary that is padded beyond the tokenizer, does no harm.
    """
    size = config.get_text_config().vocab_size
    if max(tokenizer.get_vocab().values()) < size:
        return
    for problem in problems:
        largest = max(problem["prompt_ids"] + problem.get("demo_ids", []))
        if largest >= size:
            token = tokenizer.convert_ids_to_tokens(largest)
            fail(
                f"--model {model}",
                f"its tokenizer has a token {largest}, {token!r}, which {problem['prompt']!r:.60} "
                f"uses, and its vocabulary ends at {size - 1}: do the tokenizer's files belong to "
                "the model?",
            )


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

    Returns the problems that fit, and a sentence on what was left out or changed.
    """
    columns = args.columns
    if flag == "--eval-data" and args.eval_columns is not None:
        columns = args.eval_columns
    # A verifier of the user's own may want answers in another form than a box.
    box = args.reward == "reward:grade"
    problems = load_problems(source, need_demonstration, flag, columns, box)
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
    return fitting, left_out + changes(fitting, args.template, args.system_prompt)


def changes(problems: list[dict], template: str, system: str) -> str:
    """Return what one should know of tokenised problems: "" or clauses after a comma.

    It is what was done to them beyond leaving some out, and how many are there more than once.
    """
    clauses = ""
    own_system = sum("system" in problem for problem in problems)
    if own_system and template == "plain":
        clauses += f", {own_system} without their own system message, as --template plain has none"
    elif own_system and system != "data":
        clauses += (
            f", {own_system} without their own system message (--system-prompt data keeps it)"
        )
    boxed = sum("boxed" in problem for problem in problems)
    if boxed:
        clauses += f", {boxed} with the answer boxed at the end of a demonstration without a box"
    again = len(problems) - len({tuple(problem["prompt_ids"]) for problem in problems})
    if again:
        clauses += f", {again} with the prompt of an earlier one"
    return clauses


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
    demonstration ends in the end-of-sequence token, once. Nothing is cut: a demonstration without
    its end would teach the model never to stop. Special tokens in the words of a data set are text
    (common/tokens.py).

    Args:
        template, system: as in `render`.
        max_prompt_tokens, max_response_tokens: limits, which a text may just reach.

    Returns:
        (problems that fit, number with too long a prompt, number of others with too long a
        demonstration).
    """
    writer = tokens.Writer(tokenizer)
    texts = [render(problem, tokenizer, template, system) for problem in problems]
    prompts = prompt_ids(problems, texts, writer, template, system)
    demonstrations = demonstration_ids(problems, texts, writer)
    fitting, long_prompts, long_demonstrations = [], 0, 0
    for problem, ids, demo_ids in zip(problems, prompts, demonstrations, strict=True):
        with_tokens = problem | {"prompt_ids": ids}
        if "demonstration" in problem:
            if not demo_ids:
                fail(
                    f"the demonstration of {problem['prompt']!r:.60}",
                    f"nothing but special tokens: {problem['demonstration']!r:.60}",
                )
            with_tokens["demo_ids"] = [*demo_ids, tokenizer.eos_token_id]
        if len(ids) > max_prompt_tokens:
            long_prompts += 1
        elif len(with_tokens.get("demo_ids", [])) > max_response_tokens:
            long_demonstrations += 1
        else:
            fitting.append(with_tokens)
    return fitting, long_prompts, long_demonstrations


def prompt_ids(
    problems: list[dict], texts: list[str], writer: tokens.Writer, template: str, system: str
) -> list[list[int]]:
    """Return the token ids of prompts, of which `texts` are what `render` makes of the problems."""
    # A chat template writes the special tokens itself, as the one that begins a sequence. For the
    # plain template the tokenizer adds them.
    add = template == "plain"
    prompts = writer.tokenizer(texts, add_special_tokens=add)["input_ids"]
    for i in mentioning_control(problems, writer):
        protected = protect(problems[i], writer)
        text = render(protected, writer.tokenizer, template, system)
        prompts[i] = writer.ids(text, add_special_tokens=add)
    return prompts


def mentioning_control(problems: list[dict], writer: tokens.Writer) -> list[int]:
    """Return the indices of problems of which a message holds a control token it may not hold."""
    owners, contents, assistants = [], [], []
    for i, problem in enumerate(problems):
        for turn in messages_of(problem, "data"):
            owners.append(i)
            contents.append(turn["content"])
            assistants.append(turn["role"] == "assistant")
    tokenized = writer.tokenizer(contents, add_special_tokens=False)["input_ids"]
    found = set()
    for i, ids, is_assistant in zip(owners, tokenized, assistants, strict=True):
        if writer.mentions_control(ids, is_assistant):
            found.add(i)
    return sorted(found)


def protect(problem: dict, writer: tokens.Writer) -> dict:
    """Return a problem whose words are marked as text, so that a template can take them."""
    protected = problem | {"prompt": writer.protect(problem["prompt"])}
    if "system" in problem:
        protected["system"] = writer.protect(problem["system"])
    if "turns" in problem:
        protected["turns"] = []
        for turn in problem["turns"]:
            content = writer.protect(turn["content"], turn["role"] == "assistant")
            protected["turns"].append({"role": turn["role"], "content": content})
    return protected


def demonstration_ids(
    problems: list[dict], prompts: list[str], writer: tokens.Writer
) -> list[list[int]]:
    """Return the token ids of demonstrations without their end; of none, [].

    What a prompt ends in, as <think>, is not repeated.
    """
    texts = []
    for problem, prompt in zip(problems, prompts, strict=True):
        boxed = problem.get("boxed", "")
        own = problem.get("demonstration", "").removesuffix(boxed)
        without_end = tokens.without_end(own, writer)
        texts.append(tokens.without_open_tag(without_end + boxed, prompt))
    tokenized = writer.tokenizer(texts, add_special_tokens=False)["input_ids"]
    for i, ids in enumerate(tokenized):
        if writer.mentions_control(ids, is_assistant=True):
            tokenized[i] = writer.ids(writer.protect(texts[i], is_assistant=True))
    return tokenized


def render(problem: dict, tokenizer, template: str = "chat", system: str = SYSTEM) -> str:
    """Return the prompt as text, up to where the response begins.

    Args:
        template: "chat" for the tokenizer's own chat template, "plain" for the paper's text PLAIN.
        system: the system message of the chat; "" for none, "data" for the problem's own.
    """
    if template == "plain":
        if "turns" in problem:
            fail(
                problem["place"],
                "'prompt' has several turns, and --template plain writes a single question: use "
                "--template chat",
            )
        return PLAIN.replace("{prompt}", problem["prompt"])
    if not tokenizer.chat_template:
        fail(
            f"--model {tokenizer.name_or_path}",
            "its tokenizer has no chat template: use --template plain",
        )
    messages = messages_of(problem, system)
    goes_on = messages[-1]["role"] == "assistant"
    place = f"{problem['place']}: " if "place" in problem else ""
    try:
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=False,
        )
        if not text.strip():
            raise ValueError("it makes nothing of it")
        if "turns" in problem or system == "data":
            check_all_shown(messages, text)
    except Exception as error:  # a template is a program that comes with the model
        raise SystemExit(
            f"error: {place}the model's chat template refuses this conversation: {error}; if it "
            "knows no system message, use --system-prompt '' (or --template plain)"
        ) from error
    return text


def messages_of(problem: dict, system: str) -> list[dict]:
    """Return the messages {role, content} of a problem; `system` is as in `render`."""
    messages = problem.get("turns") or [{"role": "user", "content": problem["prompt"]}]
    if system == "data":
        system = problem.get("system", "")
    return [{"role": "system", "content": system}, *messages] if system else list(messages)


def check_all_shown(messages: list[dict], text: str) -> None:
    """Raise ValueError unless a rendered prompt holds the content of all messages, in order.

    Templates may leave out what an assistant thought before it answered, and no more.
    """
    start = 0
    for message in messages:
        content = message["content"].rpartition("</think>")[2].strip()
        place = text.find(content, start)
        if place < 0:
            raise ValueError(f"it leaves out the {message['role']}'s message {content!r:.60}")
        start = place + len(content)
