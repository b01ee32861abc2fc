"""toy/word_problems.py: the shipped files are what it makes, and what a problem must be."""

import collections
import random
import re

import pytest

import reward
from common import report
from toy import word_problems
from toy.word_problems import HELD_OUT, LEVELS, NEW, TRAIN, TRAINED

TRAIN_ROWS = report.read_jsonl(word_problems.FOLDER / "word_problems_train.jsonl")
HELD_OUT_ROWS = report.read_jsonl(word_problems.FOLDER / "word_problems_held_out.jsonl")
ROWS = TRAIN_ROWS + HELD_OUT_ROWS


def test_the_shipped_files_are_those_that_the_program_writes(tmp_path):
    word_problems.write_data(tmp_path)
    for name in ("word_problems_train.jsonl", "word_problems_held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (word_problems.FOLDER / name).read_bytes()


def test_another_seed_gives_other_problems():  # a negative control of the test above
    assert word_problems.problems(seed=1)[0] != TRAIN_ROWS


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
        assert reward.grade(row["demonstration"], row["answer"]) == 1


def test_a_level_is_a_number_of_operations_and_of_digits():
    for row in ROWS:
        operations, digits = LEVELS[int(row["level"][0])]
        first, *steps = given(row)
        assert len(steps) == operations
        numbers = [first] + [number for sign, number in steps if sign != "*"]
        assert all(len(str(number)) == digits for number in numbers)


def test_the_text_gives_the_numbers_of_the_demonstration_in_the_order_of_the_operations():
    for row in ROWS:
        first, *steps = given(row)
        numbers = [first] + [number for _, number in steps]
        if steps[0][0] == "*":  # "5 packs of 7": the factor comes first
            numbers[:2] = [numbers[1], numbers[0]]
        assert [int(number) for number in re.findall(r"\d+", row["prompt"])] == numbers


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


@pytest.mark.parametrize("field", ["names", "things"])
def test_new_wordings_have_other_words(field):
    assert not set(getattr(TRAINED, field)) & set(getattr(NEW, field))


def wording(sentence):
    """A sentence without its numbers, names and things."""
    for wordings in (TRAINED, NEW):
        for word in (*wordings.names, *wordings.things):
            sentence = re.sub(rf"\b{word}\b", "_", sentence)
    return re.sub(r"\d+", "#", sentence)


def wordings_of(rows):
    sentences = [s for row in rows for s in re.findall(r"[^.?]+[.?]", row["prompt"])]
    return {wording(sentence).strip() for sentence in sentences}


def test_no_sentence_of_a_new_wording_is_trained_on():
    is_new = [row for row in HELD_OUT_ROWS if "new" in row["level"]]
    known = [row for row in HELD_OUT_ROWS if "new" not in row["level"]]
    trained = wordings_of(TRAIN_ROWS)
    assert len(trained) == 13 and wordings_of(known) <= trained
    assert len(wordings_of(is_new)) == 9 and not wordings_of(is_new) & trained
