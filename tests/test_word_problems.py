"""toy/word_problems.py: the shipped files are what it makes, and what a problem must be."""

import collections
import json
import random
import re

import reward
from toy import word_problems
from toy.word_problems import FOLDER, HELD_OUT, LEVELS, NEW, TRAIN, TRAINED

FILES = ("word_problems_train.jsonl", "word_problems_held_out.jsonl")
TRAIN_ROWS, HELD_OUT_ROWS = (
    [json.loads(line) for line in (FOLDER / name).read_text().splitlines()] for name in FILES
)
ROWS = TRAIN_ROWS + HELD_OUT_ROWS


def test_the_shipped_files_are_those_that_the_program_writes(tmp_path):
    word_problems.write_data(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    assert word_problems.problems(seed=1)[0] != TRAIN_ROWS  # a negative control


def test_the_number_of_problems_of_each_level():
    counts = collections.Counter(row["level"] for row in TRAIN_ROWS)
    assert counts == {str(level): count for level, count in TRAIN.items()}
    counts = collections.Counter(row["level"] for row in HELD_OUT_ROWS)
    assert counts == {f"{n}{kind}": HELD_OUT for n in LEVELS for kind in ("", ", new wording")}


def equations(row):
    """The equations of a demonstration, [(a, sign, b, result), ...]."""
    found = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", row["demonstration"])
    return [(int(a), sign, int(b), int(result)) for a, sign, b, result in found]


def given(row):
    """The numbers that the problem gives, as the demonstration uses them."""
    steps = equations(row)
    return (steps[0][0], *((sign, b) for _, sign, b, _ in steps))


def test_demonstrations_are_right_and_end_in_the_answer():
    for row in ROWS:
        steps = equations(row)
        for (a, sign, b, result), (following, *_) in zip(steps, [*steps[1:], (None,)]):
            assert word_problems.apply(sign, a, b) == result
            assert following in (result, None)
        assert row["demonstration"].endswith(f"The answer is \\boxed{{{steps[-1][-1]}}}.")
        assert row["answer"] == str(steps[-1][-1])
        assert reward.last_boxed(row["demonstration"]) == row["answer"]


def test_the_text_gives_the_numbers_of_the_demonstration_and_those_of_its_level():
    for row in ROWS:
        operations, digits = LEVELS[int(row["level"][0])]
        first, *steps = given(row)
        numbers = [first] + [number for sign, number in steps if sign != "*"]
        assert len(steps) == operations
        assert all(len(str(number)) == digits for number in numbers)
        told = [first] + [number for _, number in steps]
        if steps[0][0] == "*":  # "5 packs of 7": the factor comes first
            told[:2] = [told[1], told[0]]
        assert [int(number) for number in re.findall(r"\d+", row["prompt"])] == told


def test_a_problem_by_hand():
    numbers = (47, ("+", 85), ("-", 21))
    assert word_problems.solve(numbers) == (
        "47 + 85 = 132. 132 - 21 = 111. The answer is \\boxed{111}.",
        "111",
    )
    one = word_problems.Wordings(
        names=("Mia",),
        things=("shells",),
        start=("{name} has {a} {things}.",),
        packs=("{name} has {b} bags of {a} {things}.",),
        add=("{name} finds {b}.",),
        subtract=("{name} loses {b}.",),
        question=("How many {things}?",),
    )
    told = word_problems.tell(random.Random(0), numbers, one)
    assert told == "Mia has 47 shells. Mia finds 85. Mia loses 21. How many shells?"
    told = word_problems.tell(random.Random(0), (7, ("*", 3)), one)
    assert told == "Mia has 3 bags of 7 shells. How many shells?"


def test_no_held_out_problem_has_the_numbers_of_a_training_problem():
    trained = {given(row) for row in TRAIN_ROWS}
    assert len(trained) == len(TRAIN_ROWS)
    assert not trained & {given(row) for row in HELD_OUT_ROWS}


def wordings_of(rows):
    """The sentences of problems without their numbers, names and things."""
    words = (*TRAINED.names, *TRAINED.things, *NEW.names, *NEW.things)
    text = " ".join(row["prompt"] for row in rows)
    text = re.sub(rf"\b({'|'.join(words)})\b", "_", re.sub(r"\d+", "#", text))
    return {sentence.strip() for sentence in re.findall(r"[^.?]+[.?]", text)}


def test_no_sentence_of_a_new_wording_is_trained_on():
    is_new = [row for row in HELD_OUT_ROWS if "new" in row["level"]]
    known = [row for row in HELD_OUT_ROWS if "new" not in row["level"]]
    trained = wordings_of(TRAIN_ROWS)
    assert len(trained) == 13 and wordings_of(known) <= trained
    assert len(wordings_of(is_new)) == 9 and not wordings_of(is_new) & trained
    assert not {*TRAINED.names, *TRAINED.things} & {*NEW.names, *NEW.things}
