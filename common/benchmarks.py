"""The test sets of the paper by name, as evaluate.py's --bench takes them, and what of them a problem is made of.

Hub ids and columns as public evaluation code uses them; none could be loaded when this was written, so a column that is
not there is a sentence that names it. Files of your own, --data, need no entry here.
"""
import hashlib
import random
from typing import NamedTuple

import data


class Benchmark(NamedTuple):
    """Where a benchmark lives on the hub."""
    hub: str
    config: str | None
    split: str
    question: str  # a column
    answer: str  # a column


BENCHMARKS = {
    "aime24":   Benchmark("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25":   Benchmark("math-ai/aime25", None, "test", "problem", "answer"),
    "amc":      Benchmark("AI-MO/aimo-validation-amc", None, "train", "problem", "answer"),
    "math500":  Benchmark("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "minerva":  Benchmark("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiad": Benchmark("math-ai/olympiadbench", None, "test", "question", "final_answer"),
    "arc_c":    Benchmark("allenai/ai2_arc", "ARC-Challenge", "test", "question", "answerKey"),
    "gpqa":     Benchmark("Idavidrein/gpqa", "gpqa_diamond", "train", "Question", "Correct Answer"),
}


def paper_samples(name):
    """Samples a problem in the paper's protocol: 32 for AIME and AMC (amc23.json, AIME_2024.json), 1 for everything else."""
    return 32 if name.lower().startswith(("aime", "amc")) else 1


def load(name):
    """The problems of a benchmark from the hub, as data.load_problems gives them. SystemExit where it cannot be read."""
    b = BENCHMARKS[name]
    rows = data.load_hub(b.hub, b.config, b.split, f"--bench {name}:")
    problems = []
    for number, row in enumerate(rows, 1):
        try:
            problems.append(_problem(name, b, row))
        except (KeyError, TypeError, ValueError) as error:
            raise SystemExit(f"error: --bench {name}: row {number} of {b.hub} is not laid out as benchmarks.py expects "
                             f"({type(error).__name__}: {error}); it has: {', '.join(row)}") from error
    return problems


def _problem(name, b, row):
    """One row of the hub as {"prompt", "answer", "level" where there is one}."""
    question, answer = row[b.question], row[b.answer]
    if name == "arc_c":
        question, answer = _choices(question, row["choices"]["text"], row["choices"]["label"].index(answer))
    elif name == "gpqa":
        texts = [answer.strip(), *(row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
        order = list(range(4))  # in the data set the right one comes first: an order of the question's own, the same everywhere
        random.Random(hashlib.sha256(question.encode()).digest()).shuffle(order)
        question, answer = _choices(question, [texts[i] for i in order], order.index(0))
    elif isinstance(answer, list):  # OlympiadBench: all of them are asked for
        answer = ", ".join(answer)
    elif isinstance(answer, float):  # AMC: 142.0
        answer = f"{answer:g}"
    return {"prompt": question, "answer": str(answer)} | ({"level": row["level"]} if "level" in row else {})


def _choices(question, texts, right):
    """A multiple choice question with its choices lettered, and the letter of the right one."""
    lines = [f"{chr(65 + i)}. {text}" for i, text in enumerate(texts)]
    return "\n\n".join([question.strip(), "\n".join(lines)]), chr(65 + right)
