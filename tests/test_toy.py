"""toy/: the shipped files are what toy/make.py makes, and training on them needs no download."""

import random
from pathlib import Path

import pytest
from programs import BASE, ROOT, read
from safetensors.torch import load_file

from common import data, flags, model
from toy import make


def test_the_shipped_files_are_those_that_make_writes(tmp_path):
    make.write_data(tmp_path)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "toy" / name).read_bytes()
    assert make.problems(seed=1)[0] != read(ROOT / "toy/train.jsonl")  # negative control


def test_levels_answers_and_demonstrations():
    counts = ({1: 49, 2: 150, 3: 300, 4: 500, 5: 500, 6: 500}, dict.fromkeys(range(1, 7), 32))
    files = [read(ROOT / "toy" / name) for name in ("train.jsonl", "held_out.jsonl")]
    for rows, wanted in zip(files, counts):
        levels = [row["level"] for row in rows]
        assert {level: levels.count(level) for level in sorted(set(levels))} == wanted
    rows = sum(files, [])
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        a, b = row["prompt"].split("+")
        assert len(a) == len(b) == row["level"] and row["answer"] == str(int(a) + int(b))
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
    args = flags.parse_training_args([])
    made, (_, shipped) = make.tokenizer(), model.load_config_and_tokenizer(args)
    texts = [row["demonstration"] for row in read(ROOT / "toy/held_out.jsonl")]
    assert shipped(texts)["input_ids"] == made(texts)["input_ids"]
    assert shipped.get_vocab() == made.get_vocab()
    assert shipped.chat_template == made.chat_template


def test_the_toy_needs_no_download_and_takes_minutes(monkeypatch):
    """Its files are in the repository, all problems fit, and its model and its steps are small."""
    args = flags.parse_training_args([])
    for name in (args.model, args.data, args.eval_data):
        assert Path(name).is_relative_to(ROOT) and Path(name).exists()
    _, tokenizer = model.load_config_and_tokenizer(args)
    limits = args.max_prompt_tokens, args.max_response_tokens
    for source, count in ((args.data, 1999), (args.eval_data, 192)):
        assert len(data.load_problems(args, source, tokenizer, True, *limits)[0]) == count
    weights = load_file(BASE / "model.safetensors").values()
    tokens = args.steps * args.prompts_per_step * args.samples_per_prompt * sum(limits)
    assert sum(w.numel() for w in weights) < 1e6 and tokens < 1.5e6
