"""toy/: the shipped files are what toy/make.py makes, and toy.args names them."""

import json
import random
from pathlib import Path

import pytest

from common import data, flags
from toy import make

TOY = Path(make.__file__).parent


def read(name):
    return [json.loads(line) for line in (TOY / name).read_text().splitlines()]


def test_the_shipped_files_are_those_that_make_writes(tmp_path):
    make.write_data(tmp_path)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (TOY / name).read_bytes()


def test_another_seed_gives_other_problems():  # a negative control of the test above
    assert make.problems(seed=1)[0] != read("train.jsonl")


def test_levels_are_numbers_of_digits():
    for row in read("train.jsonl") + read("held_out.jsonl"):
        a, b = row["prompt"].split("+")
        assert len(a) == len(b) == row["level"]


def test_the_number_of_problems_of_each_level():
    for name, counts in (
        ("train.jsonl", {1: 49, 2: 150, 3: 300, 4: 500, 5: 500, 6: 500}),
        ("held_out.jsonl", dict.fromkeys(range(1, 7), 32)),
    ):
        levels = [row["level"] for row in read(name)]
        assert {level: levels.count(level) for level in sorted(set(levels))} == counts


def test_no_problem_is_in_both_files_or_twice():
    prompts = [row["prompt"] for row in read("train.jsonl") + read("held_out.jsonl")]
    assert len(set(prompts)) == len(prompts) == 1999 + 192


def test_answers_are_sums_and_demonstrations_end_in_them():
    for row in read("train.jsonl") + read("held_out.jsonl"):
        a, b = row["prompt"].split("+")
        assert row["answer"] == str(int(a) + int(b))
        assert row["demonstration"].endswith(f";\\boxed{{{row['answer']}}}")


def test_a_demonstration_by_hand():
    assert make.solve(47, 85) == ("7+5+0=12;4+8+1=13;\\boxed{132}", "132")
    assert make.solve(41, 25) == ("1+5+0=6;4+2+0=6;\\boxed{66}", "66")


def test_a_wrong_total_is_carried_on():
    """The text is consistent with its own wrong totals, and they are as frequent as WRONG says."""
    rng, wrong_totals = random.Random(0), [0, 0]
    for _ in range(4000):
        text, answer = make.solve(47, 85, rng)
        first, second = (int(step.split("=")[1]) for step in text.split(";")[:2])
        expected = 4 + 8 + first // 10
        assert f"4+8+{first // 10}=" in text
        assert answer == str(second // 10 or "") + str(second % 10) + str(first % 10)
        wrong_totals[0] += first != 12
        wrong_totals[1] += second != expected
    for count, chance in zip(wrong_totals, make.WRONG):
        assert count / 4000 == pytest.approx(chance, abs=0.04)


def test_the_shipped_tokenizer_is_the_one_that_make_builds():
    made, (_, shipped) = make.tokenizer(), data.load_config_and_tokenizer(str(make.BASE))
    texts = [row["demonstration"] for row in read("held_out.jsonl")]
    assert shipped(texts)["input_ids"] == made(texts)["input_ids"]
    assert shipped.get_vocab() == made.get_vocab()
    assert shipped.chat_template == made.chat_template


def test_the_shipped_model_fits_its_config():
    config, _ = data.load_config_and_tokenizer(str(make.BASE))
    data.check_weights(str(make.BASE), config)


def test_every_problem_fits_the_limits_of_the_toy():
    args = flags.parse_training_args([])
    _, tokenizer = data.load_config_and_tokenizer(args.model)
    for source, count in ((args.data, 1999), (args.eval_data, 192)):
        assert len(data.load_fitting_problems(args, source, tokenizer, True)[0]) == count
