"""Problems, and how they become token ids.

A problem is a dict:

    "prompt"         str, the question
    "answer"         str, or a list of the answers that count as right
    "demonstration"  str, a worked solution; only where a method trains on demonstrations
    "system"         str, the system message that the data set asks for, if it has one
    "level"          str or number by which results are broken down, if the data set has one
    "messages"       list of {role, content}, the conversation of which "prompt" is the end
    "prompt_ids"     list of token ids
    "demo_ids"       list of token ids, where there is a demonstration

docs/data.md says which forms of data are accepted. A file that cannot be read, or lacks a column,
ends the program with one sentence; a row with an odd value is left out and counted. Everything slow
is imported inside the functions, since common/flags.py imports this module.
"""

import datetime
import json
import math
import re
from pathlib import Path

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
# The paper's prompt for Llama-3.1-8B, a base model without a chat template.
PLAIN = "Question:\n{prompt}\n" + SYSTEM + "\nAnswer:\nLet's think step by step."
PAPER_DATA = "Elliott/Openr1-Math-46k-8192"  # the paper's training set, on the hub
SUFFIXES = (".jsonl", ".json", ".parquet")
THINK = "<think>"


# --------------------------------------------------------------------------------- rows of a source


def read_rows(source: str) -> list[tuple[str, object]]:
    """The rows of a file or a hub data set, each with its place, as "problems.jsonl:12"."""
    path = Path(source)
    if path.suffix not in SUFFIXES and not path.exists():
        name, config, split = [*source.split(":", 2), "", ""][:3]
        rows = load_hub(name, config or None, split or "train")
        return [(f"{source}:{number}", row) for number, row in enumerate(rows, 1)]
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise SystemExit(f"error: {source}: no such file, or not .jsonl, .json or .parquet")
    place, rows = source, []
    try:
        if path.suffix == ".jsonl":
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    place = f"{source}:{number}"
                    if line.strip():
                        rows.append((place, json.loads(line.rstrip())))
        else:
            rows = [(f"{source}:{number}", row) for number, row in enumerate(read_whole(path), 1)]
    except Exception as error:  # of several kinds: not UTF-8, not JSON, not parquet
        raise SystemExit(f"error: {place}: cannot be read: {error}") from error
    return rows


def read_whole(path: Path) -> list:
    """The rows of a .json or .parquet file."""
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def load_hub(name: str, config: str | None, split: str) -> list[dict]:
    """The rows of a hub data set."""
    try:
        import datasets

        return list(datasets.load_dataset(name, config, split=split))
    except Exception as error:  # of dozens of kinds, each of which names its reason
        raise SystemExit(
            f"error: {name} is no file here, and no hub data set that can be loaded: {error}"
        ) from error


def source_name(source: str) -> str:
    """What results call a source: the name of a file, or the last part of a hub id."""
    return Path(source).stem if Path(source).suffix in SUFFIXES else source.rpartition("/")[2]


# -------------------------------------------------------------------------------- rows as problems


def to_problem(row, place: str, columns: dict[str, str], need_demonstration: bool) -> dict | None:
    """A row of a source as a problem; None if it has an odd value.

    Raises:
        SystemExit: the row is no object, or lacks a column.
    """
    if not isinstance(row, dict):
        raise SystemExit(f"error: {place}: a problem is an object, not {row!r:.60}")
    needed = ["prompt", "answer", *(["demonstration"] if need_demonstration else [])]
    fields = fields_of(row | {key: column(row, name) for key, name in columns.items()})
    for key in needed:
        name = columns.get(key, key)
        if fields.get(key) is None and name not in row:
            raise SystemExit(
                f"error: {place}: no '{name}' (it has: {', '.join(row)}): say which column holds "
                f"it with --columns {key}=NAME"
            )
    problem = {key: fields[key] for key in needed} | {"answer": answer_of(fields["answer"])}
    texts = [problem[key] for key in needed if key != "answer"]
    if not problem["answer"] or not all(isinstance(x, str) and x.strip() for x in texts):
        return None
    for key, kinds in (("system", str), ("level", str | int | float), ("messages", list)):
        if isinstance(fields.get(key), kinds) and fields[key] == fields[key]:  # not nan
            problem[key] = fields[key]
    return problem


def column(row: dict, name: str):
    """The value of a column; a name with dots is one inside others: reward_model.ground_truth."""
    value = row
    for part in [name] if name in row else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def fields_of(row: dict) -> dict:
    """The fields of a problem from a row in one of the forms that are known.

    They are the keys of a problem; the columns of the paper's training set: `prompt`, a list of
    messages; `target`, a list with the demonstration as a message; and reward_model.ground_truth,
    the answer; and GSM8K's form: `question`, and an `answer` that is worked and ends in "#### 72".
    """
    fields = row | {"messages": None}  # those of a row hold its solution too, in many data sets
    if isinstance(row.get("prompt"), list) and row["prompt"]:
        turns = [turn for turn in row["prompt"] if isinstance(turn, dict)]
        systems = [turn.get("content") for turn in turns if turn.get("role") == "system"]
        fields["messages"] = [turn for turn in turns if turn.get("role") != "system"]
        fields["prompt"] = fields["messages"][-1].get("content") if fields["messages"] else ""
        if systems and isinstance(systems[0], str):
            fields["system"] = systems[0]
        fields.setdefault("answer", column(row, "reward_model.ground_truth"))
        target = row.get("target")
        message = target[0] if isinstance(target, list) and len(target) == 1 else target
        fields.setdefault("demonstration", column({"target": message}, "target.content") or target)
    if row.get("level") is None:
        fields["level"] = column(row, "extra_info.level")
    worked = split_worked(fields.get("answer"))
    if worked:
        fields.setdefault("prompt", fields.get("question"))
        demonstration = fields.get("demonstration", fields["answer"])
        fields["demonstration"] = (split_worked(demonstration) or [demonstration])[0]
        fields["answer"] = worked[1]
    return fields


def split_worked(text) -> tuple[str, str] | None:
    """(worked solution, answer) of a text in GSM8K's form, else None.

    The form is a solution whose last line is "#### 72". Its calculator marks, as <<48/2=24>>, are
    for a tool, and are taken out of the solution.
    """
    found = re.fullmatch(r"(.*)\n\s*####\s*([^\s#].*)", str(text).rstrip(), re.DOTALL)
    if not isinstance(text, str) or not found or "\n" in found[2]:
        return None
    return re.sub(r"<<[^<>]*>>", "", found[1]).rstrip(), found[2]


def answer_of(value) -> str | list[str] | None:
    """An answer as text, or a list of accepted ones; None if it is empty or odd."""
    if isinstance(value, list):
        answers = [answer_of(item) for item in value]
        return answers if all(isinstance(answer, str) for answer in answers) else None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if type(value) in (int, float) and abs(value) < math.inf else None


def with_box(demonstration: str, answer: str | list[str]) -> str:
    """A demonstration that has no box, with the answer in one at its end.

    The verifier reads the last box of a response, so a model that never sees one learns nothing
    that is rewarded.
    """
    answer = answer[0] if isinstance(answer, list) else answer
    answer = re.sub(r"\A\$([^$]*)\$\Z", r"\1", answer.strip())
    boxed = answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
    return f"{demonstration.rstrip()}\n{boxed}"


# ---------------------------------------------------------------------- from problems to token ids


def load_problems(
    args,
    source: str,
    tokenizer,
    need_demonstration: bool = False,
    max_prompt_tokens: float = math.inf,
    max_response_tokens: float = math.inf,
) -> tuple[list[dict], str]:
    """The tokenised problems of a source that can be used, and a sentence on those left out.

    Args:
        args: flags: columns, template, system_prompt, reward.
        source: a .jsonl, .json (one list of rows) or .parquet file, or a hub data set:
            NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; the split is "train" if it is not given.
        need_demonstration: whether each row must have a demonstration. If not, it is not read.
        max_prompt_tokens, max_response_tokens: limits, which prompt and demonstration may reach.

    Raises:
        SystemExit: the source cannot be read, or lacks a column, or no problem is left.
    """
    rows = read_rows(source)
    found = [to_problem(row, place, args.columns, need_demonstration) for place, row in rows]
    problems = [problem for problem in found if problem]
    ends = tuple(special_tokens(tokenizer))
    boxed = 0
    for problem in problems if need_demonstration else []:
        text = without_end(problem["demonstration"], ends)
        # Another verifier may read no box.
        if text.strip() and args.reward == "reward:grade" and not re.search(r"\\boxed\s*\{", text):
            text = with_box(text, problem["answer"])
            boxed += 1
        problem["demonstration"] = text
    odd, limits = len(rows) - len(problems), (max_prompt_tokens, max_response_tokens)
    problems, note = tokenize(args, problems, tokenizer, limits, odd)
    if not problems:
        raise SystemExit(f"error: {source}: no problem is left: {note}")
    return problems, note + (f"; {boxed} demonstrations were given a box" if boxed else "")


def tokenize(
    args, problems: list[dict], tokenizer, limits=(math.inf, math.inf), odd_rows: int = 0
) -> tuple[list[dict], str]:
    """Add "prompt_ids", and "demo_ids" where there is a demonstration; leave out what is odd.

    Prompt and demonstration are tokenised apart, as they are when the model samples a response. A
    demonstration ends in the end-of-sequence token, once. Nothing is cut: a demonstration without
    its end would teach the model never to stop. A special token in the words of a prompt would end
    its turn, so such a problem is odd. In a demonstration it is plain text, but tags of thoughts
    are tokens. Few tokenizers call these special; there, other special tokens make it odd as well.

    limits: the most tokens of a prompt, and of a demonstration with its end.
    odd_rows: how many are left out already.

    Returns (the problems that are left, a sentence on the others).
    """
    specials = special_tokens(tokenizer)
    can_split = specials == special_tokens(tokenizer, but=())
    usable, texts, worked = [], [], []
    for problem in problems:
        system = problem.get("system") if args.system_prompt == "data" else None
        demonstration = problem.get("demonstration", "none is needed")
        parts = [problem["prompt"], problem.get("messages"), system]
        words = json.dumps(parts if can_split else [*parts, demonstration], ensure_ascii=False)
        if not demonstration.strip() or any(special in words for special in specials):
            continue
        text = render(problem, tokenizer, args)
        if text:
            usable.append(problem)
            texts.append(text)
            worked.append(without_open_tag(problem.get("demonstration", ""), text))
    # A chat template writes the special tokens itself, as the one that begins a sequence. For the
    # plain template the tokenizer adds them; one that ends a sequence does not belong there.
    is_plain, end = args.template == "plain", tokenizer.eos_token_id
    prompts = ids_of(texts, tokenizer, add_special_tokens=is_plain)
    responses = ids_of(worked, tokenizer, add_special_tokens=False, split_special_tokens=can_split)
    fitting, long_prompts, long_demonstrations = [], 0, 0
    for problem, ids, demo_ids in zip(usable, prompts, responses, strict=True):
        while is_plain and ids[-1] in tokenizer.all_special_ids:
            ids = ids[:-1]
        problem = problem | {"prompt_ids": ids}
        if "demonstration" in problem:
            problem["demo_ids"] = [*demo_ids, end]
        if len(problem["prompt_ids"]) > limits[0]:
            long_prompts += 1
        elif len(problem.get("demo_ids", [])) > limits[1]:
            long_demonstrations += 1
        else:
            fitting.append(problem)
    counts = {"a longer prompt": long_prompts, "a longer demonstration": long_demonstrations}
    counts["odd values"] = odd_rows + len(problems) - len(usable)
    reasons = [f"{count} with {why}" for why, count in counts.items() if count]
    note = f"{sum(counts.values())} left out"
    return fitting, note + (f": {', '.join(reasons)}" if reasons else "")


def special_tokens(tokenizer, but=(THINK, "</think>")) -> list[str]:
    """The texts of a tokenizer's special tokens, but the tags with which a model marks thoughts."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [text for text in texts if text.strip() and text not in but]


def ids_of(texts: list[str], tokenizer, **settings) -> list[list[int]]:
    """The token ids of texts, which may be none."""
    return tokenizer(texts, **settings)["input_ids"] if texts else []


def render(problem: dict, tokenizer, args) -> str | None:
    """The prompt as text, up to where the response begins.

    None if the template drops a problem's question, or is plain and there are several turns.

    args: template, "chat" for the tokenizer's own or "plain" for the paper's text PLAIN;
    system_prompt, "" for none or "data" for the problem's own; date, which some templates write.
    """
    messages = problem.get("messages") or [{"role": "user", "content": problem["prompt"]}]
    if args.template == "plain":
        return PLAIN.replace("{prompt}", problem["prompt"]) if len(messages) == 1 else None
    system = args.system_prompt
    system = problem.get("system", "") if system == "data" else system
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    goes_on = messages[-1].get("role") == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=False,
            strftime_now=datetime.date.fromisoformat(args.date).strftime,
        )
    except Exception as error:  # a template is a program that comes with the model
        raise SystemExit(
            f"error: the model's chat template refuses {problem['prompt']!r:.60}: {error}; if it "
            "knows no system message, use --system-prompt '' (or --template plain)"
        ) from error
    return text if "messages" in problem or problem["prompt"].strip() in text else None


def without_end(text: str, ends: tuple[str, ...]) -> str:
    """A demonstration without the special tokens in which it ends: its end is added later, once."""
    while text.rstrip().endswith(ends):
        end = next(end for end in ends if text.rstrip().endswith(end))
        text = text.rstrip().removesuffix(end)
    return text


def without_open_tag(text: str, prompt: str) -> str:
    """A demonstration without the <think> that its prompt has written already, if it has."""
    if re.search(r"</think>(\s|<[^<>]*>)*\Z", prompt) and text.lstrip().startswith(THINK):
        raise SystemExit("error: the chat template has closed what a demonstration opens, <think>")
    if not prompt.rstrip().endswith(THINK) or not text.lstrip().startswith(THINK):
        return text
    text = text.lstrip().removeprefix(THINK)
    for space in prompt[len(prompt.rstrip()) :]:  # it stands behind the tag
        text = text.removeprefix(space)
    return text
