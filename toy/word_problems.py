"""Word problems for a small language model, with worked demonstrations.

A problem tells of someone's things: how many there are first, and what is added or taken away. Its
level says how many operations it has, and of how many digits the given numbers are (LEVELS):

    Mia has 47 marbles. Mia finds 85 more. Mia loses 21. How many marbles does Mia have now?
    47 + 85 = 132. 132 - 21 = 111. The answer is \\boxed{111}.

There are two sets of wordings. Training uses the first. Of the held-out problems, half are told in
the first, half in the second, which also has other names and other things; the level of the latter
is marked "new wording". No held-out problem has the numbers of a training problem either.

    python -m toy.word_problems    makes word_problems_train.jsonl and word_problems_held_out.jsonl

Both files are shipped; recipes/smollm2-135m-word-problems.args names them.
"""

import random
from pathlib import Path
from typing import NamedTuple

from toy.make import write_jsonl

FOLDER = Path(__file__).resolve().parent
# level: (operations, digits of each given number)
LEVELS = {1: (1, 1), 2: (2, 1), 3: (1, 2), 4: (2, 2), 5: (2, 3), 6: (4, 2)}
# Training problems per level. One operation on one-digit numbers gives few different problems.
TRAIN = {1: 80, 2: 320, 3: 320, 4: 240, 5: 120, 6: 120}
HELD_OUT = 12  # held-out problems per level and set of wordings


class Wordings(NamedTuple):
    """Ways to tell a problem; one of each is drawn."""

    names: tuple[str, ...]
    things: tuple[str, ...]
    start: tuple[str, ...]
    packs: tuple[str, ...]  # as `start`, with a product: b packs of a things
    add: tuple[str, ...]
    subtract: tuple[str, ...]
    question: tuple[str, ...]


TRAINED = Wordings(
    names=("Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Ida", "Tom"),
    things=("marbles", "shells", "cards", "coins", "stamps", "pencils", "apples", "books"),
    start=("{name} has {a} {things}.", "{name} owns {a} {things}.", "{name} got {a} {things}."),
    packs=(
        "{name} has {b} boxes with {a} {things} each.",
        "{name} buys {b} packs of {a} {things}.",
    ),
    add=("{name} finds {b} more.", "{name} gets {b} more.", "A friend gives {name} {b}."),
    subtract=("{name} loses {b}.", "{name} gives away {b}.", "{name} gives {b} to a friend."),
    question=(
        "How many {things} does {name} have now?",
        "How many {things} does {name} have in the end?",
    ),
)
NEW = Wordings(
    names=("Eva", "Max", "Lin", "Raj", "Ola", "Kim"),
    things=("buttons", "stones", "tickets", "roses", "candles", "keys"),
    start=("There are {a} {things} on the table of {name}.", "{name} starts with {a} {things}."),
    packs=("{name} opens {b} bags, and each holds {a} {things}.",),
    add=("Then another {b} are added.", "The next day {name} picks up {b}."),
    subtract=("Then {name} sells {b}.", "Later {b} of them are taken away."),
    question=("What is the number of {things} in the end?", "How many {things} are there now?"),
)


def draw(rng: random.Random, level: int) -> tuple:
    """Return the numbers of a problem: the first one, then (sign, number) for each operation.

    The sign is "+", "-" or "*". Only the first operation may be a product, with a factor from 2 to
    5. No number is below 2, nor is any result.
    """
    operations, digits = LEVELS[level]
    smallest, end = max(2, 10 ** (digits - 1)), 10**digits
    first = total = rng.randrange(smallest, end)
    steps = []
    for place in range(operations):
        number, sign = rng.randrange(smallest, end), rng.choice("+-")
        if place == 0 and rng.random() < 1 / 3:
            sign, number = "*", rng.randrange(2, 6)
        if sign == "-" and total - number < 2:
            sign = "+"
        total = apply(sign, total, number)
        steps.append((sign, number))
    return first, *steps


def apply(sign: str, a: int, b: int) -> int:
    """Return a + b, a - b or a * b."""
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def tell(rng: random.Random, numbers: tuple, wordings: Wordings) -> str:
    """Return the text of a problem."""
    first, *steps = numbers
    words = {"name": rng.choice(wordings.names), "things": rng.choice(wordings.things)}
    templates = {"+": wordings.add, "-": wordings.subtract}
    sentences = []
    if steps[0][0] == "*":
        factor = steps.pop(0)[1]
        sentences.append(rng.choice(wordings.packs).format(a=first, b=factor, **words))
    else:
        sentences.append(rng.choice(wordings.start).format(a=first, **words))
    for sign, number in steps:
        sentences.append(rng.choice(templates[sign]).format(b=number, **words))
    sentences.append(rng.choice(wordings.question).format(**words))
    return " ".join(sentences)


def solve(numbers: tuple) -> tuple[str, str]:
    """Return the demonstration and the answer."""
    total, *steps = numbers
    text = ""
    for sign, number in steps:
        result = apply(sign, total, number)
        text += f"{total} {sign} {number} = {result}. "
        total = result
    return f"{text}The answer is \\boxed{{{total}}}.", str(total)


def problems(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Return training and held-out problems; no two of a level have the same numbers."""
    rng = random.Random(f"word problems {seed}")
    train, held_out = [], []
    for level, count in TRAIN.items():
        drawn = {}  # as a set, but in the order in which the numbers were drawn
        while len(drawn) < 2 * HELD_OUT + count:
            drawn[draw(rng, level)] = None
        for i, numbers in enumerate(drawn):
            is_new = i < HELD_OUT
            demonstration, answer = solve(numbers)
            row = {
                "prompt": tell(rng, numbers, NEW if is_new else TRAINED),
                "answer": answer,
                "demonstration": demonstration,
                "level": f"{level}, new wording" if is_new else str(level),
            }
            # The next HELD_OUT are held out too, in the wordings of the training problems.
            (held_out if i < 2 * HELD_OUT else train).append(row)
    return train, held_out


def write_data(folder: Path) -> None:
    """Write the problems as word_problems_train.jsonl and word_problems_held_out.jsonl."""
    for name, rows in zip(("train", "held_out"), problems()):
        write_jsonl(folder / f"word_problems_{name}.jsonl", rows)


if __name__ == "__main__":
    write_data(FOLDER)
