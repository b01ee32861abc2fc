"""The paper's benchmarks: where they live on the hub, and which of their columns make a problem."""

import hashlib
import random
from typing import NamedTuple

from common import data


class Benchmark(NamedTuple):
    """Where a test set lives on the hub, and which of its columns make a problem."""

    hub: str
    split: str
    question: str
    answer: str
    config: str | None = None


# Hub ids and columns as public evaluation code uses them. None of them could be loaded when this
# was written, so an error names the row.
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
    """The paper's samples per problem: 32 for AIME and AMC, also as files, 1 for all others."""
    return 32 if name.lower().startswith(("aime", "amc")) else 1


def load_benchmark(args, name: str, tokenizer) -> tuple[list[dict], str]:
    """The problems of a benchmark from the hub, tokenised, and a sentence on what was left out."""
    benchmark, problems = BENCHMARKS[name], []
    for number, row in enumerate(
        data.load_hub(benchmark.hub, benchmark.config, benchmark.split), 1
    ):
        try:
            problems.append(from_benchmark(name, row))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SystemExit(
                f"error: --bench {name}: row {number} of {benchmark.hub} is not as expected "
                f"({type(error).__name__}: {error}); it has: {', '.join(row)}"
            ) from error
    return data.tokenize(args, problems, tokenizer)


def from_benchmark(name: str, row: dict) -> dict:
    """One row of a benchmark as a problem. ValueError: it has no question or no answer."""
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
    answer = data.answer_of(answer)
    if not question or not answer:
        raise ValueError("no question or no answer")
    answer = ", ".join(answer) if isinstance(answer, list) else answer  # OlympiadBench: all of them
    level = {"level": row["level"]} if "level" in row else {}
    return {"prompt": question, "answer": answer} | level


def multiple_choice(question: str, texts: list[str], right: int) -> tuple[str, str]:
    """A question with its choices lettered, and the letter of the choice `right`."""
    letters = [chr(ord("A") + i) for i in range(len(texts))]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts)]
    return question.strip() + "\n\n" + "\n".join(lines), letters[right]
