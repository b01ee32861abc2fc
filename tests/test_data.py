"""common/data.py: rows of every form, benchmarks, prompts, token ids; the files of a model."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from programs import BASE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from common import benchmarks, data, model

GOOD = {"prompt": "1+2", "answer": "3", "demonstration": "1+2+0=3;\\boxed{3}"}
TURNS = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "1+2"}]
WORKED = "<think>\n\\boxed{3}"
PAPER_ROW = {
    "extra_info": {"index": 0, "level": "easy"},
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "prompt": TURNS,
    "target": [{"role": "assistant", "content": WORKED}],
}
PAPER = {"prompt": "1+2", "answer": "3", "demonstration": WORKED, "system": "Brief."}
PAPER |= {"level": "easy", "messages": TURNS[1:]}
GSM8K_ROW = {"question": "Half?", "answer": "It is 48/2=<<48/2=24>>24.\n#### 24"}
GSM8K = {"prompt": "Half?", "answer": "24", "demonstration": "It is 48/2=24.\n\\boxed{24}"}
OTHER = {"q": {"text": "1+2"}, "a.b": 3.0, "s": "S \\boxed{3}", "prompt": "no", "h": {"level": 2}}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def new_tokenizer(end=""):
    """The toy's tokenizer with a chat template that shows all; `end` stands behind the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE.replace("assistant\n", "assistant\n" + end)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


def write_rows(path, rows):
    """Write rows, each a dict or a line of text."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def load(source, tokenizer, demonstrations=True, limits=(999, 999), **flags):
    """(problems, note) of a source."""
    args = {"columns": {}, "template": "chat", "system_prompt": "", "reward": "reward:grade"}
    args["date"] = "2026-11-29"
    args = SimpleNamespace(**(args | flags))
    return data.load_problems(args, str(source), tokenizer, demonstrations, *limits)


@pytest.fixture
def of_rows(tmp_path, tokenizer):
    """A function: (problems, note) of rows, as a file."""

    def function(rows, tokenizer=tokenizer, **settings):
        return load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, **settings)

    return function


def without_ids(problem):
    return {key: value for key, value in problem.items() if not key.endswith("_ids")}


# ----------------------------------------------------------------------------------- forms of a row


@pytest.mark.parametrize(
    "row, wanted",
    [
        (GOOD | {"level": 3, "source": "x"}, GOOD | {"level": 3}),
        (GOOD | {"system": "Brief."}, GOOD | {"system": "Brief."}),
        # Many data sets have such a column, and it holds the solution.
        (GOOD | {"messages": [{"role": "user", "content": "1+2=3"}]}, GOOD),
        (GOOD | {"answer": 3}, GOOD),
        (GOOD | {"answer": 3.0}, GOOD),
        (GOOD | {"answer": 0.5}, GOOD | {"answer": "0.5"}),
        (GOOD | {"answer": ["3", 4]}, GOOD | {"answer": ["3", "4"]}),
        (PAPER_ROW, PAPER),
        (GSM8K_ROW, GSM8K),
    ],
)
def test_forms_of_a_row(of_rows, row, wanted):
    (problem,), note = of_rows([row])
    assert without_ids(problem) == wanted
    assert note.startswith("0 left out")
    (problem,), _ = of_rows([row], demonstrations=False)
    assert set(wanted) - set(problem) == {"demonstration"} and "demo_ids" not in problem


def test_columns_name_other_columns_also_inside_others(of_rows):
    columns = {"prompt": "q.text", "answer": "a.b", "demonstration": "s", "level": "h.level"}
    (problem,), _ = of_rows([OTHER], columns=columns)
    wanted = {"prompt": "1+2", "answer": "3", "demonstration": "S \\boxed{3}", "level": 2}
    assert without_ids(problem) == wanted
    twice = {"prompt": "question", "answer": "answer", "demonstration": "answer"}
    assert of_rows([GSM8K_ROW], columns=twice) == of_rows([GSM8K_ROW])


def test_files_of_every_kind(tmp_path, tokenizer):
    rows = [GOOD, GOOD | {"prompt": "1\u2028+2"}]  # a line separator that ends no line of a file
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    (tmp_path / "c.json").write_bytes(json.dumps(rows).encode("utf-8-sig"))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for path in tmp_path.iterdir():
        assert [without_ids(p) for p in load(path, tokenizer)[0]] == rows, path.name
    parquet.write_table(arrow.Table.from_pylist([PAPER_ROW] * 2), tmp_path / "e.parquet")
    problems, _ = load(tmp_path / "e.parquet", tokenizer)
    assert [without_ids(problem) for problem in problems] == [PAPER] * 2


@pytest.fixture
def hub(monkeypatch):
    """A hub of {(name, config, split): rows}; what else is asked for is not there."""
    sets = {}

    def load_dataset(name, config, split):
        return sets[name, config, split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return sets


@pytest.mark.parametrize(
    "source, config, split",
    [("", None, "train"), (":a", "a", "train"), (":a:test", "a", "test"), ("::b", None, "b")],
)
def test_a_data_set_on_the_hub(hub, tokenizer, source, config, split):
    hub["me/sums", config, split] = [GOOD]
    assert without_ids(load(f"me/sums{source}", tokenizer)[0][0]) == GOOD
    hub["me/sums", config, split] = [GOOD, {"prompt": "1+2"}]
    with pytest.raises(SystemExit, match=f"^error: me/sums{source}:2: no 'answer'"):
        load(f"me/sums{source}", tokenizer)
    with pytest.raises(SystemExit, match=r"^error: you/sums is no file here, and no hub data set"):
        load("you/sums", tokenizer)


# ---------------------------------------------------------------------- what ends in one sentence


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("a.csv", b"prompt,answer", "a.csv: no such file, or not .jsonl, .json or .parquet"),
        ("", None, ": no such file"),  # a directory
        ("a.jsonl", b'\n\n{"prompt": "1', "a.jsonl:3: cannot be read: "),
        ("a.jsonl", b'{}\n{"prompt": "\xe9"}', "a.jsonl:2: cannot be read: 'utf-8'"),
        ("a.jsonl", b"[1, 2]", r"a.jsonl:1: a problem is an object, not \[1, 2\]"),
        ("a.jsonl", b"", "a.jsonl: no problem is left: 0 left out"),
        ("a.json", b'[\n{"prompt": "1+2",\n"answer": }]', "a.json: cannot be read: .* line 3"),
        ("a.json", b'{"prompt": "1+2"}', "a.json:1: a problem is an object, not 'prompt'"),
        ("a.json", b"7", "a.json: cannot be read: "),
        ("a.parquet", b"not parquet", "a.parquet: cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, tokenizer, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=rf"^error: {re.escape(str(tmp_path))}/?{sentence}"):
        load(tmp_path / name, tokenizer)


@pytest.mark.parametrize(
    "row, columns, sentence",
    [
        ({"prompt": "1"}, {}, r"no 'answer' \(it has: prompt\): .* --columns answer=NAME"),
        (GOOD, {"prompt": "problem"}, r"no 'problem' \(it .* --columns prompt=NAME"),
        (OTHER, {"prompt": "q.words", "answer": "a.b"}, "no 'q.words'"),
        ({"prompt": "1+2", "answer": "3"}, {}, "no 'demonstration'"),
        (PAPER_ROW | {"reward_model": {}}, {}, "no 'answer'"),
    ],
)
def test_a_missing_column_is_named_with_its_line(of_rows, row, columns, sentence):
    rows = [GOOD | OTHER | {"problem": "1"}, "", row] if "prompt" not in columns else ["", "", row]
    with pytest.raises(SystemExit, match=f"^error: .*rows.jsonl:3: {sentence}"):
        of_rows(rows, columns=columns)


def test_a_template_that_refuses_a_prompt(of_rows):
    tokenizer = new_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(SystemExit, match=r"^error: .*'1\+2': no system role.*--system-prompt ''"):
        of_rows([GOOD], tokenizer)


# ------------------------------------------------------------------------- left out and counted


@pytest.mark.parametrize(
    "odd",
    [
        *({"answer": value} for value in (None, "", " ", [], ["3", ""], True, {}, float("nan"))),
        *({"prompt": value} for value in (None, "", " \n", 3, [], ["1+2"])),
        *({"demonstration": value} for value in (None, "", 3)),
        *({"prompt": f"1{special}+2"} for special in ("<eos>", "<|im_end|>")),
        {"prompt": [{"role": "user", "content": "<eos>"}, {"role": "user", "content": "1+2"}]},
    ],
)
def test_odd_values_are_left_out_and_counted(of_rows, odd):
    problems, note = of_rows([GOOD, GOOD | odd])
    assert [problem["prompt"] for problem in problems] == ["1+2"]
    assert note == "1 left out: 1 with odd values"
    with pytest.raises(SystemExit, match=r"^error: .*no problem is left: 1 left out: 1 with odd"):
        of_rows([GOOD | odd])


def test_a_null_in_a_named_column_is_an_odd_value(of_rows):
    rows = [GOOD | {"a": "4"}, GOOD | {"a": None}]
    problems, note = of_rows(rows, columns={"answer": "a"})
    assert [problem["answer"] for problem in problems] == ["4"] and note.startswith("1 left out")


def test_a_special_token_in_a_demonstration_is_text_and_its_end_comes_once(of_rows, tokenizer):
    text = "The token <|im_end|> ends <eos> a turn. \\boxed{3}"
    (problem,), note = of_rows([GOOD | {"demonstration": text}])
    ids, end = problem["demo_ids"], tokenizer.eos_token_id
    assert note == "0 left out"
    assert tokenizer.decode(ids[:-1]) == text
    assert ids.index(end) == len(ids) - 1
    # Negative control: tokenised without this care, it would end in the middle.
    assert {end, tokenizer.convert_tokens_to_ids("<|im_end|>")} < set(tokenizer(text).input_ids)


def test_what_does_not_fit_is_left_out_and_counted(of_rows):
    rows = [GOOD, GOOD | {"prompt": "9" * 60}, GOOD | {"demonstration": "\\boxed{3}" + "9" * 60}]
    rows += [rows[1] | rows[2] | {"prompt": "8" * 60}, GOOD | {"answer": ""}]
    problems, note = of_rows(rows, limits=(60, 40))
    assert [problem["prompt"] for problem in problems] == ["1+2"]
    reasons = "2 with a longer prompt, 1 with a longer demonstration, 1 with odd values"
    assert note == f"4 left out: {reasons}"
    problems, note = of_rows(rows, limits=(60, 40), demonstrations=False)
    assert len(problems) == 2 and note == "3 left out: 2 with a longer prompt, 1 with odd values"
    longest = len(problems[0]["prompt_ids"])
    assert len(of_rows([GOOD], limits=(longest, 99))[0]) == 1
    with pytest.raises(SystemExit, match="1 with a longer prompt"):
        of_rows([GOOD], limits=(longest - 1, 99))


def test_a_demonstration_is_whole_or_left_out(of_rows, tokenizer):
    rows = [GOOD | {"demonstration": "\\boxed{3}" + "7" * i} for i in range(12)]
    whole = {row["demonstration"] for row in rows}
    shortest = len(tokenizer.encode(rows[0]["demonstration"])) + 1
    for limit in range(shortest, shortest + 12):
        problems, note = of_rows(rows, limits=(999, limit))
        for problem in problems:
            *ids, last = problem["demo_ids"]
            assert tokenizer.decode(ids) in whole and last == tokenizer.eos_token_id
        assert len(problems) == limit - shortest + 1
        assert note.startswith(f"{12 - len(problems)} left out")


# ----------------------------------------------------------------------- prompts and demonstrations


@pytest.mark.parametrize(
    "text, reward, wanted",
    [
        ("It is 3.", "reward:grade", "It is 3.\n\\boxed{3}"),
        ("It is 3.\n<|im_end|>\n", "reward:grade", "It is 3.\n\\boxed{3}"),
        ("It is 3.", "mine:grade", "It is 3."),
        ("So \\boxed {3}.", "reward:grade", "So \\boxed {3}."),
        ("\\boxed{3}<|im_end|>\n<eos> ", "reward:grade", "\\boxed{3}"),
        ("\\boxed{3}</think>", "reward:grade", "\\boxed{3}</think>"),
    ],
)
def test_a_box_and_an_end_come_once(of_rows, tokenizer, text, reward, wanted):
    (problem,), note = of_rows([GOOD | {"demonstration": text}], reward=reward)
    *ids, last = problem["demo_ids"]
    assert problem["demonstration"] == tokenizer.decode(ids) == wanted
    assert last == tokenizer.eos_token_id
    has_box = "; 1 demonstrations were given a box"
    assert note == "0 left out" + (has_box if "\n\\boxed" in wanted else "")


@pytest.mark.parametrize("answer", ["3", "$3$", ["3", "x"], "\\boxed{3}"])
def test_what_is_boxed(answer):
    assert data.with_box("It is.\n", answer) == "It is.\n\\boxed{3}"
    assert data.with_box("It is.", "$1$, $2$") == "It is.\n\\boxed{$1$, $2$}"


@pytest.mark.parametrize("end, rest", [("", "<think>\nA"), ("<think>", "\nA"), ("<think>\n", "A")])
def test_think_is_written_once(of_rows, end, rest):
    tokenizer = new_tokenizer(end)
    text = "<think>\nA</think>\\boxed{3}"
    (problem,), _ = of_rows([GOOD | {"demonstration": text}], tokenizer)
    ids = problem["prompt_ids"] + problem["demo_ids"]
    assert tokenizer.decode(ids).endswith("assistant\n" + text + "<eos>")
    assert tokenizer.decode(problem["demo_ids"]) == rest + "</think>\\boxed{3}<eos>"
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1  # the token, not its letters
    (other,), _ = of_rows([GOOD], tokenizer)  # it does not begin with the tag
    assert tokenizer.decode(other["demo_ids"]) == GOOD["demonstration"] + "<eos>"


@pytest.mark.parametrize(
    "flag, system", [(data.SYSTEM, data.SYSTEM), ("data", "Brief."), ("", None)]
)
def test_the_system_message(of_rows, tokenizer, flag, system):
    (problem,), _ = of_rows([PAPER_ROW], system_prompt=flag)
    begin = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    wanted = f"{begin}<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(problem["prompt_ids"]) == wanted
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in problem["prompt_ids"]


def test_turns_go_to_the_template_as_they_are(of_rows, tokenizer):
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "1+2"), ("assistant", "It is")]
    messages = [{"role": role, "content": content} for role, content in turns]
    begin = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    begin += "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
    for count, prompt in ((3, begin), (4, begin + "It is")):  # the response goes on
        row = PAPER_ROW | {"prompt": messages[:count]}
        (problem,), _ = of_rows([row])
        assert tokenizer.decode(problem["prompt_ids"]) == prompt
        with pytest.raises(SystemExit, match="1 left out"):  # it writes a single question
            of_rows([row], template="plain")


def test_the_plain_template_with_a_tokenizer_that_adds_a_beginning_and_an_end(of_rows):
    tokenizer = new_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", begin), ("<eos>", end)]
    )
    assert tokenizer("1+2").input_ids[:: len("1+2") + 1] == [begin, end]  # negative control
    for template in ("plain", "chat"):
        (problem,), _ = of_rows([GOOD | {"prompt": "{1}+2"}], tokenizer, template=template)
        ids = problem["prompt_ids"] + problem["demo_ids"]
        assert ids.count(begin) == (template == "plain") and ids.count(end) == 1
        if template == "plain":
            wanted = f"<bos>Question:\n{{1}}+2\n{data.SYSTEM}\nAnswer:\nLet's think step by step."
            assert tokenizer.decode(problem["prompt_ids"]) == wanted


@pytest.mark.parametrize("is_special", [True, False])
def test_tags_of_thoughts_are_tokens_whatever_the_tokenizer_calls_them(of_rows, is_special):
    tokenizer = new_tokenizer()
    if is_special:
        names = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
        tokenizer.add_special_tokens({"additional_special_tokens": names})
    text = "<think>A</think>\\boxed{3}"
    (problem,), _ = of_rows([GOOD | {"demonstration": text}], tokenizer)
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [i for i in problem["demo_ids"] if i in tags] == tags
    odd = GOOD | {"demonstration": "<eos>" + text}
    problems, note = of_rows([GOOD, odd], tokenizer)
    assert len(problems) == (1 if is_special else 2)
    assert problems[-1]["demo_ids"].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    "odd",
    [
        PAPER_ROW | {"target": [{"role": "user", "content": "1"}, PAPER_ROW["target"][0]]},
        GOOD | {"demonstration": "<eos> <|im_end|>\n"},
    ],
    ids=["two messages as a target", "nothing but ends"],
)
def test_more_odd_rows(of_rows, odd):
    problems, note = of_rows([GOOD, odd])
    assert (len(problems), note) == (1, "1 left out: 1 with odd values")


def test_a_system_message_of_the_data_that_mentions_a_special_token(of_rows):
    row = GOOD | {"system": "Stop at <|im_end|>."}
    assert of_rows([GOOD, row], system_prompt="data")[1] == "1 left out: 1 with odd values"
    assert of_rows([GOOD, row], system_prompt="")[1] == "0 left out"  # it is dropped anyway


def test_numbers_that_are_none_of_the_usual(of_rows):
    (problem,), _ = of_rows([GOOD | {"answer": 10**400, "level": float("nan")}])
    assert problem["answer"] == "1" + "0" * 400 and "level" not in problem


# --------------------------------------------------------------------------------------- benchmarks

# Written out here, so that a wrong entry of BENCHMARKS is noticed: where each lives, its two
# columns, an answer there, the answer of the problem.
HUB = {
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer", "204", "204"),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer", "70", "70"),
    "amc": ("AI-MO/aimo-validation-amc", None, "train", "problem", "answer", 142.0, "142"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer", "p - q", "p - q"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer", "4e33", "4e33"),
    "olympiad": ("math-ai/olympiadbench", None, "test", "question", "final_answer", [1, 2], "1, 2"),
    "arc_c": ("allenai/ai2_arc", "ARC-Challenge", "test", "question", "answerKey", "2", "B"),
    "gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train", "Question", "Correct Answer", "r\n", "D"),
}
WRONG = {"Incorrect Answer 1": "x", "Incorrect Answer 2": "y", "Incorrect Answer 3": "z"}
CHOICES = {"choices": {"text": ["a", "b"], "label": ["1", "2"]}}
MORE_COLUMNS = {"math500": {"level": 3}, "arc_c": CHOICES, "gpqa": WRONG}
PROMPTS = {"arc_c": "P\n\nA. a\nB. b", "gpqa": "P\n\nA. z\nB. y\nC. x\nD. r"}
ARGS = SimpleNamespace(template="chat", system_prompt="", date="2026-11-29")


@pytest.mark.parametrize("name", HUB)
def test_a_benchmark_is_read_and_an_odd_row_is_named(hub, tokenizer, name):
    assert list(benchmarks.BENCHMARKS) == list(HUB)
    *place, question, answer, value, wanted = HUB[name]
    row = {question: "P", answer: value} | MORE_COLUMNS.get(name, {})
    hub[tuple(place)] = [row]
    (problem,), note = benchmarks.load_benchmark(ARGS, name, tokenizer)
    level = {"level": 3} if name == "math500" else {}
    assert without_ids(problem) == {"prompt": PROMPTS.get(name, "P"), "answer": wanted} | level
    assert note == "0 left out" and problem["prompt_ids"]
    for column in (question, answer):
        for odd in (row | {column: None}, {key: row[key] for key in row if key != column}):
            hub[tuple(place)] = [row, odd]
            with pytest.raises(SystemExit, match=f"^error: --bench {name}: row 2 of {place[0]} "):
                benchmarks.load_benchmark(ARGS, name, tokenizer)


def test_a_benchmark_that_cannot_be_loaded_is_named(hub, tokenizer):
    with pytest.raises(SystemExit, match=r"^error: AI-MO/aimo-validation-amc is no file here"):
        benchmarks.load_benchmark(ARGS, "amc", tokenizer)


def test_the_right_choice_of_gpqa_is_at_every_letter_and_always_at_the_same():
    rows = [WRONG | {"Question": f"Which, {i}?", "Correct Answer": "r"} for i in range(30)]
    problems = [benchmarks.from_benchmark("gpqa", row) for row in rows]
    assert {problem["answer"] for problem in problems} == set("ABCD")
    for row, problem in zip(rows, problems):
        question, _, *choices = problem["prompt"].splitlines()
        assert question == row["Question"] and f"{problem['answer']}. r" in choices
        assert sorted(choice[3:] for choice in choices) == ["r", "x", "y", "z"]
        assert benchmarks.from_benchmark("gpqa", row) == problem


def test_the_paper_takes_32_samples_of_small_benchmarks_alone():
    assert {benchmarks.paper_samples(name) for name in ("aime24", "amc", "AIME_2024", "amc23")} == {
        32
    }
    assert {benchmarks.paper_samples(name) for name in ("math500", "gpqa", "my_amc")} == {1}
    names = [data.source_name(source) for source in ("a/amc23.json", "openai/gsm8k")]
    assert names == ["amc23", "gsm8k"]


# ------------------------------------------------------------------------------- a model's files


@pytest.fixture
def folder(tmp_path):
    """A copy of the toy's base model without its weights, which nothing here reads."""
    for file in BASE.iterdir():
        (tmp_path / file.name).write_bytes(b"" if "safetensors" in file.name else file.read_bytes())
    return tmp_path


def load_model(folder, template="chat", rope_theta=None, positions=None):
    args = SimpleNamespace(model=str(folder), template=template, rope_theta=rope_theta)
    args.max_position_embeddings = positions
    return model.load_config_and_tokenizer(args)


def test_a_model_is_loaded_with_the_overrides_of_the_flags(folder):
    config, tokenizer = load_model(folder, rope_theta=4e4, positions=512)
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (4e4, 512)
    assert tokenizer.decode(tokenizer.encode("1+2")) == "1+2"
    args = SimpleNamespace(rope_theta=4e4, max_position_embeddings=512)
    of_sampler = model.overrides_of(args)(Qwen2Config(attention_dropout=0.1))
    assert of_sampler.rope_parameters["rope_theta"] == 4e4
    assert (of_sampler.max_position_embeddings, of_sampler.attention_dropout) == (512, 0.0)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("chat_template.jinja", None, "no chat template: use --template plain"),
        ("model.safetensors", None, "no .safetensors file there"),
        ("config.json", '{"model_type": ', "cannot be loaded, from here or from the hub: "),
        ("tokenizer.json", "{", "cannot be loaded"),
        ("tokenizer_config.json", '{"eos_token": null}', "no end-of-sequence token"),
    ],
)
def test_a_model_that_cannot_be_used(folder, name, content, sentence):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(SystemExit, match=f"^error: --model {folder}.*{sentence}"):
        load_model(folder)
    if "template" in sentence:
        load_model(folder, template="plain")


def test_dropout_is_off():
    qwen, gpt2 = Qwen2Config(attention_dropout=0.1), GPT2Config(resid_pdrop=0.2)
    assert (qwen.attention_dropout, gpt2.resid_pdrop) == (0.1, 0.2)  # negative control
    gpt2 = model.override(gpt2, rope_theta=4e4)  # it has no rotary embedding
    assert model.override(qwen).attention_dropout == 0
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop) == (0, 0, 0)


def test_rope_theta_changes_the_frequencies_of_the_model():
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    before = Qwen2RotaryEmbedding(config).inv_freq.tolist()
    after = Qwen2RotaryEmbedding(model.override(config, rope_theta=4e4)).inv_freq.tolist()
    wanted = pytest.approx([4e4 ** (-2 * i / 16) for i in range(8)])
    assert after == wanted and before != wanted


def test_a_context_that_just_fits_passes_and_one_token_more_does_not():
    config = Qwen2Config(max_position_embeddings=256)
    model.check_context(config, 16, 240)
    with pytest.raises(SystemExit, match=r"^error: .*need 257 .*has 256.*--max-position-embed"):
        model.check_context(config, 17, 240)
