"""Columns and forms of other data sets: --columns, GSM8K, answers boxed, NAME:CONFIG:SPLIT."""

import json
import time

import pytest

import evaluate
import reward
from common import data, flags
from toy import make

WORKED = "48/2 = <<48/2=24>>24 clips in May.\nIn all <<48+24=72>>72.\n#### 72"
GSM8K = {"question": "How many clips?", "answer": WORKED}
SOLUTION = "48/2 = 24 clips in May.\nIn all 72.\n\\boxed{72}"


def write(path, *rows):
    """Write a .jsonl file of rows and return its path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path, row, columns=None, need_demonstration=True, **more):
    """The problem of one row."""
    path = write(tmp_path / "a.jsonl", row)
    return data.load_problems(path, need_demonstration, columns=columns, **more)[0]


# -------------------------------------------------------------------------------------------- GSM8K


def test_gsm8k_is_read_as_it_is(tmp_path):
    assert load(tmp_path, GSM8K) == {
        "prompt": "How many clips?",
        "answer": "72",
        "demonstration": SOLUTION,
        "boxed": "\n\\boxed{72}",
    }
    assert load(tmp_path, GSM8K, need_demonstration=False) == {
        "prompt": "How many clips?",
        "answer": "72",
    }


@pytest.mark.parametrize(
    "columns", [{"prompt": "question"}, {"prompt": "question", "demonstration": "answer"}]
)
def test_gsm8k_by_its_columns(tmp_path, columns):
    assert load(tmp_path, GSM8K, columns)["demonstration"] == SOLUTION
    other = {"problem": "Q", "solution": WORKED}
    columns = {"prompt": "problem", "answer": "solution"}
    problem = load(tmp_path, other, columns)
    assert (problem["prompt"], problem["answer"]) == ("Q", "72")
    assert problem["demonstration"] == SOLUTION


@pytest.mark.parametrize(
    "text, worked",
    [
        ("a\n#### 72", ("a", "72")),
        ("a\n####72\n", ("a", "72")),
        ("a\r\n#### -1,234.5 \r\n", ("a", "-1,234.5")),
        ("a\n#### 1\nb\n#### 2", ("a\n#### 1\nb", "2")),
        ("<<1+1=2>>2\n#### 2", ("2", "2")),
        ("1 << 2 >> 3\n#### 4", ("1  3", "4")),
        ("#### 72", ("", "72")),
        ("a #### 72", None),
        ("a\n#### ", None),
        ("a\n#### 1\nb", None),
        ("72", None),
        (72, None),
        (None, None),
    ],
)
def test_the_form_of_a_worked_answer(text, worked):
    assert data.split_worked(text) == worked


def test_a_long_text_is_looked_at_once():
    begin = time.perf_counter()
    for text in ("\n" * 100_000 + "x####", "a \n" * 100_000 + "x", "<<" * 100_000 + "\n#### 1"):
        data.split_worked(text)
    assert time.perf_counter() - begin < 5


def test_an_answer_that_is_not_worked_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", GSM8K, {"question": "Q", "answer": "72"})
    with pytest.raises(SystemExit, match=r"a.jsonl:2: no 'prompt' .*--columns prompt=NAME"):
        data.load_problems(path)


# ------------------------------------------------------------------------------------- --columns

ROW = {"problem": "1+2", "solution": "It is \\boxed{3}.", "answer": "3", "difficulty": 2}
COLUMNS = {"prompt": "problem", "answer": "answer", "demonstration": "solution"}


def test_columns_are_read_by_their_names(tmp_path):
    problem = load(tmp_path, ROW, COLUMNS | {"level": "difficulty", "system": "problem"})
    assert problem == {
        "prompt": "1+2",
        "answer": "3",
        "demonstration": "It is \\boxed{3}.",
        "level": 2,
        "system": "1+2",
    }


def test_a_named_column_comes_before_one_with_the_name_of_the_key(tmp_path):
    assert load(tmp_path, ROW | {"prompt": "other"}, COLUMNS)["prompt"] == "1+2"


def test_a_column_inside_another(tmp_path):
    row = ROW | {"meta": {"answers": {"final": "4"}}, "x.y": "5"}
    assert load(tmp_path, row, COLUMNS | {"answer": "meta.answers.final"})["answer"] == "4"
    assert load(tmp_path, row, COLUMNS | {"answer": "x.y"})["answer"] == "5"


def test_a_column_of_messages(tmp_path):
    row = ROW | {"messages": [{"role": "user", "content": "Q"}]}
    assert load(tmp_path, row, COLUMNS | {"prompt": "messages"})["prompt"] == "Q"


@pytest.mark.parametrize("answer, text", [(204, "204"), (142.0, "142"), (0.5, "0.5"), (-3, "-3")])
def test_an_answer_in_a_column_may_be_a_number(tmp_path, answer, text):
    assert load(tmp_path, ROW | {"answer": answer}, COLUMNS)["answer"] == text


@pytest.mark.parametrize("answer", [True, None, [], float("nan"), float("inf"), {}])
def test_an_answer_in_a_column_is_checked(tmp_path, answer):
    with pytest.raises(SystemExit, match=r"a.jsonl:1: 'answer' must be"):
        load(tmp_path, ROW | {"answer": answer}, COLUMNS)


@pytest.mark.parametrize("name", ["problm", "answer.x", "meta.y"])
def test_a_column_that_is_missing_is_named_by_its_line(tmp_path, name):
    path = write(tmp_path / "a.jsonl", ROW | {name: "Q", "meta": {}}, ROW | {"meta": {}})
    sentence = rf"a.jsonl:2: no column '{name}', which --columns names \(it has: problem, solution,"
    with pytest.raises(SystemExit, match=sentence):
        data.load_problems(path, columns={"prompt": name, "answer": "answer"})


def test_a_system_message_must_be_text(tmp_path):
    with pytest.raises(SystemExit, match=r"a.jsonl:1: 'system' must be a string, not 2"):
        load(tmp_path, ROW, COLUMNS | {"system": "difficulty"})


def test_both_programs_take_columns(tmp_path):
    held_out = {"q": "3+4", "a": "7"}
    path, held_out_path = write(tmp_path / "a.jsonl", ROW), write(tmp_path / "b.jsonl", held_out)
    line = ["--model", str(make.BASE), "--columns", "prompt=problem,demonstration=solution"]
    line += ["--data", path, "--eval-data", held_out_path, "--eval-columns", "prompt=q,answer=a"]
    tokenizer = make.tokenizer()
    args = flags.parse_training_args(line)
    assert data.load_fitting_problems(args, path, tokenizer, True)[0][0]["prompt"] == "1+2"
    held_out = data.load_fitting_problems(args, held_out_path, tokenizer, flag="--eval-data")
    assert held_out[0][0]["prompt"] == "3+4"

    line = ["--model", str(make.BASE), "--columns", "prompt=q,answer=a", "--data", held_out_path]
    test_set = evaluate.load_test_sets(flags.parse_evaluation_args(line), tokenizer)[0]
    assert test_set.problems[0]["prompt"] == "3+4"


# ------------------------------------------------------------------------------------ boxed answers


@pytest.mark.parametrize(
    "answer, end",
    [
        ("3", "\\boxed{3}"),
        (["3", "three"], "\\boxed{3}"),
        ("$\\frac{1}{2}$", "\\boxed{\\frac{1}{2}}"),
        ("\\boxed{3}", "\\boxed{3}"),
        ("$1$ and $2$", "\\boxed{$1$ and $2$}"),
    ],
)
def test_a_demonstration_without_a_box_gets_its_answer_at_the_end(tmp_path, answer, end):
    row = {"prompt": "1+2", "answer": answer, "demonstration": "It is 3. \n"}
    problem = load(tmp_path, row)
    assert problem["demonstration"] == "It is 3.\n" + end
    assert problem["boxed"] == "\n" + end


@pytest.mark.parametrize("demonstration", ["so \\boxed{3}", "\\boxed {3}.", "\\boxed{4}, no"])
def test_a_demonstration_with_a_box_is_left_alone(tmp_path, demonstration):
    row = {"prompt": "1+2", "answer": "3", "demonstration": demonstration}
    assert load(tmp_path, row) == row


def test_the_boxed_demonstrations_are_counted(tmp_path):
    box = {"prompt": "1+2", "answer": "3", "demonstration": "\\boxed{3}"}
    path = write(tmp_path / "a.jsonl", GSM8K, GSM8K | {"question": "Another?"}, box)
    args = flags.parse_training_args(["--model", "m"])
    problems, left_out = data.load_fitting_problems(args, path, make.tokenizer(), True)
    assert len(problems) == 3
    clause = ", 2 with the answer boxed at the end of a demonstration without a box"
    assert left_out.endswith(clause)
    _, left_out = data.load_fitting_problems(args, path, make.tokenizer())
    assert "boxed" not in left_out  # of held-out problems nothing is boxed


def test_a_box_ends_before_the_end_of_sequence(tmp_path):
    row = {"prompt": "1+2", "answer": "3", "demonstration": "It is 3.<eos>"}
    tokenizer = make.tokenizer()
    kept, _, _ = data.tokenize([load(tmp_path, row)], tokenizer, "chat", "", 99, 99)
    assert tokenizer.decode(kept[0]["demo_ids"]) == "It is 3.\n\\boxed{3}<eos>"


def test_a_reward_of_ones_own_gets_the_demonstrations_as_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", GSM8K)
    args = flags.parse_training_args(["--model", "m", "--reward", "mine:grade"])
    problems, left_out = data.load_fitting_problems(args, path, make.tokenizer(), True)
    assert "boxed" not in problems[0]["demonstration"] + left_out


# ------------------------------------------------------------------------------- NAME:CONFIG:SPLIT


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local data set with two configurations and two splits, as hub/sums."""
    folder = tmp_path / "hub/sums"
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for config in ("main", "socratic"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            row = {"question": f"{config} {split}", "answer": "x\n#### 1"}
            write(folder / f"{config}-{split}.jsonl", row)
            lines += [f"  - split: {split}", f"    path: {config}-{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "source, question",
    [
        ("hub/sums:main:test", "main test"),
        ("hub/sums:socratic:train", "socratic train"),
        ("hub/sums:socratic", "socratic train"),
        ("hub/sums:main:train[:1]", "main train"),
    ],
)
def test_a_hub_data_set_by_configuration_and_split(hub, source, question):
    pytest.importorskip("datasets")
    assert data.load_problems(source)[0]["prompt"] == question


def test_gsm8k_as_people_have_it(tmp_path, monkeypatch):
    """`--data openai/gsm8k:main:train`, from a folder of that name with the hub's layout."""
    pytest.importorskip("datasets")
    folder = tmp_path / "openai/gsm8k"
    (folder / "main").mkdir(parents=True)
    write(folder / "main/train-00000.jsonl", GSM8K, {"question": "Q", "answer": WORKED})
    pattern = "main/train-*"
    lines = ["---", "configs:", "- config_name: main", "  data_files:", "  - split: train"]
    (folder / "README.md").write_text("\n".join([*lines, f"    path: {pattern}", "---", ""]))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    args = flags.parse_training_args(["--model", "m", "--data", "openai/gsm8k:main:train"])
    problems = data.load_problems(args.data, need_demonstration=True)
    assert [problem["prompt"] for problem in problems] == ["How many clips?", "Q"]
    for problem in problems:
        assert problem["answer"] == "72"
        assert reward.grade(problem["demonstration"], "72") == 1
        assert reward.grade(problem["demonstration"], "73") == 0


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("hub/sums:main:none", "--data hub/sums:main:none is no file here: .*cannot be loaded: "),
        ("hub/sums:none:test", "--data hub/sums:none:test is no file here: .*cannot be loaded: "),
        (":main:test", "--data :main:test: no name before the colon"),
    ],
)
def test_a_configuration_or_split_that_does_not_exist(hub, source, sentence):
    pytest.importorskip("datasets")
    with pytest.raises(SystemExit, match=f"^error: {sentence}"):
        data.load_problems(source)


@pytest.mark.parametrize(
    "source, name",
    [
        ("some/where/math500.json", "math500"),
        ("openai/gsm8k:main:test", "gsm8k:main:test"),
        ("someone/data.v2:main:test", "data.v2:main:test"),
        ("someone/data", "data"),
    ],
)
def test_results_name_a_source(source, name):
    assert data.source_name(source) == name
