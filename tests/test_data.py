"""common/data.py: problems in every layout, benchmarks, prompts, token ids, a model's config."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import rollout
import train_hpt
from common import data, flags
from toy import make
from upge import METHODS

LOCAL_DATA = Path(__file__).resolve().parents[2] / "shared/data"
GOOD = {"prompt": "1+2", "answer": "3", "demonstration": "1+2+0=3;\\boxed{3}"}
PAPER_ROW = {
    "data_source": "math",
    "ability": "math",
    "extra_info": {"index": 0},
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2"},
    ],
    "target": [{"role": "assistant", "content": "<think>\n\\boxed{3}"}],
}
PAPER_PROBLEM = {
    "prompt": "1+2",
    "answer": "3",
    "demonstration": "<think>\n\\boxed{3}",
    "system": "Be brief.",
}


def write_jsonl(path, rows):
    """Write rows, each a dict or a line of text, and return the path as a string."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return make.tokenizer()


# ----------------------------------------------------------------------------------- files and rows


def test_jsonl_has_a_problem_per_line_and_empty_lines_are_left_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, "", GOOD | {"prompt": "3+4"}])
    assert data.load_problems(path, True) == [GOOD, GOOD | {"prompt": "3+4"}]


def test_json_holds_a_list_of_problems(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD]))
    assert data.load_problems(tmp_path / "a.json", True) == [GOOD]


def test_the_columns_of_the_paper_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([PAPER_ROW] * 2)
    parquet.write_table(table, tmp_path / "a.parquet")
    assert data.load_problems(tmp_path / "a.parquet", True) == [PAPER_PROBLEM] * 2


def test_the_columns_of_the_paper_in_jsonl(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [PAPER_ROW])
    assert data.load_problems(path, True) == [PAPER_PROBLEM]


@pytest.mark.parametrize("row", [GOOD, PAPER_ROW])
def test_a_demonstration_is_not_read_where_none_is_needed(tmp_path, row):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert "demonstration" not in data.load_problems(path)[0]
    assert "demonstration" in data.load_problems(path, need_demonstration=True)[0]


def test_a_level_is_kept_and_other_keys_are_not(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD | {"level": 3, "source": "x"}])
    assert data.load_problems(path, True) == [GOOD | {"level": 3}]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, suffix):
    text = json.dumps(GOOD if suffix == "jsonl" else [GOOD])
    (tmp_path / f"a.{suffix}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert data.load_problems(tmp_path / f"a.{suffix}", True) == [GOOD]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line(tmp_path, character):
    problem = GOOD | {"prompt": f"1{character}+2"}
    line = json.dumps(problem, ensure_ascii=False)
    assert len(line.splitlines()) == 2  # negative control: these characters break lines too
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert data.load_problems(tmp_path / "a.jsonl", True) == [problem] * 2


def test_lines_may_end_as_on_windows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes((json.dumps(GOOD) + "\r\n").encode() * 2)
    assert data.load_problems(tmp_path / "a.jsonl", True) == [GOOD] * 2


def test_an_answer_may_be_a_list_of_answers(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD | {"answer": ["3", "three"]}])
    assert data.load_problems(path)[0]["answer"] == ["3", "three"]


@pytest.mark.skipif(not LOCAL_DATA.exists(), reason="needs local copies of the data sets")
def test_a_sample_of_the_training_set_of_the_paper():
    parquet = data.load_problems(LOCAL_DATA / "openr1_schema_sample.parquet", True)
    jsonl = data.load_problems(LOCAL_DATA / "math_demos.jsonl", True)
    assert len(parquet) == len(jsonl) == 300
    for a, b in zip(parquet, jsonl):
        assert (a["prompt"], a["answer"]) == (b["prompt"], b["answer"])
        assert a["demonstration"].startswith("<think>\n" + b["demonstration"])


@pytest.mark.skipif(not LOCAL_DATA.exists(), reason="needs local copies of the data sets")
def test_local_copies_of_the_benchmarks():
    paths = sorted((LOCAL_DATA / "benchmarks").glob("*.json"))
    assert sum(len(data.load_problems(path)) for path in paths) == 1744


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ([GOOD, '{"prompt": "1+2", "answer'], r"bad.jsonl:2: not JSON: .* at column 19"),
        (
            [GOOD, "", {"prompt": "1+2", "answer": "3"}],
            r"bad.jsonl:3: no 'demonstration' \(it has: prompt, answer\); this method trains on",
        ),
        ([{"question": "1", "answer": "3"}], r"bad.jsonl:1: no 'prompt' \(it has: question, ans"),
        (
            [GOOD | {"answer": 3}],
            r"bad.jsonl:1: 'answer' must be a string that is not empty \(or a list of .*, not 3",
        ),
        ([GOOD | {"answer": " "}], r"bad.jsonl:1: 'answer' must be a string"),
        ([GOOD | {"answer": []}], r"bad.jsonl:1: 'answer' must be a string"),
        ([GOOD | {"answer": ["3", ""]}], r"bad.jsonl:1: 'answer' must be a string"),
        ([GOOD | {"prompt": ""}], r"bad.jsonl:1: 'prompt' must be a string that is not empty, not"),
        ([GOOD | {"demonstration": None}], r"bad.jsonl:1: 'demonstration' must be a string"),
        (["[1, 2]"], r"bad.jsonl:1: a problem is an object .* not list"),
        (
            [PAPER_ROW | {"reward_model": {}}],
            r"bad.jsonl:1: .* reward_model.ground_truth \(KeyError: 'ground_truth'\)",
        ),
        ([PAPER_ROW | {"prompt": ["hello"]}], r"bad.jsonl:1: .* lacks the columns of Elliott/"),
        ([PAPER_ROW | {"target": []}], r"bad.jsonl:1: no 'demonstration'"),
        ([], r"--data .*bad.jsonl: no rows"),
        (
            [GOOD | {"level": [1]}],
            r"bad.jsonl:1: 'level' must be a number or a string, and not 'all', not \[1\]",
        ),
        ([GOOD | {"level": "all"}], "and not 'all', not 'all'"),
        ([GOOD | {"level": float("nan")}], "not nan"),
        ([GOOD | {"level": True}], "not True"),
        (
            ['{"prompt": "\\ud800", "answer": "3", "demonstration": "3"}'],
            r"bad.jsonl:1: half of a surrogate pair",
        ),
        (["[" * 100_000], r"bad.jsonl:1: nested too deeply"),
        ([GOOD | {"level": float("inf")}], "not inf"),
        ([GOOD, '{"other": ' + "9" * 5000 + "}"], r"bad.jsonl:2: a number of thousands of digits"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, rows, sentence):
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        data.load_problems(path, need_demonstration=True)


def test_an_error_in_json_names_its_line(tmp_path):
    (tmp_path / "bad.json").write_text('[\n{"prompt": "1+2",\n"answer": }]')
    with pytest.raises(SystemExit, match=r"bad.json:3: not JSON: .* at column 11"):
        data.load_problems(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.parquet", b"not parquet", "cannot be read as parquet: "),
        ("a.json", b'{"prompt": 1}', "must hold a list of problems"),
        ("latin.jsonl", b'{}\n{"prompt": "\xe9"}', r"latin.jsonl:2: not UTF-8 text"),
        ("utf16.jsonl", '{"prompt": "1"}'.encode("utf-16"), r"utf16.jsonl:1: not UTF-8 text"),
        ("a.csv", b"prompt,answer", r"a data file ends in .jsonl, .json or .parquet"),
        ("none.jsonl", None, "no such file"),
        (".", None, "a directory; name a file in it"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        data.load_problems(tmp_path / name)


@pytest.mark.parametrize("key", ["prompt", "answer", "demonstration", "system", "level"])
def test_a_line_of_100_mb_is_refused_before_it_is_tokenised(key):
    """To tokenise it took minutes and 6 GB. Any of its texts may be the long one."""
    row = GOOD | {"system": "s", "level": "a"} | {key: "1 " * 50_000_000}
    with pytest.raises(SystemExit, match=r"^error: f:7: a problem of 100,000,.* characters"):
        data.to_problem(row, "f:7", True, {}, True)


def test_a_problem_of_300_kb_is_an_ordinary_problem():
    data.to_problem(GOOD | {"prompt": "1+" * 150_000}, "f:7", True, {}, True)


def test_the_flag_that_named_a_source_is_in_the_error(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --eval-data .*none.jsonl: no such file"):
        data.load_problems(tmp_path / "none.jsonl", flag="--eval-data")


def test_a_hub_data_set_that_cannot_be_loaded_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ValueError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    sentence = "--data someone/something is no file here: the hub data set .*: no network"
    with pytest.raises(SystemExit, match=sentence):
        data.load_problems("someone/something")


def test_a_hub_data_set_is_read_from_its_split_train(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(*arguments, **more):
        calls.append((arguments, more))
        return [PAPER_ROW]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert data.load_problems("someone/something", True) == [PAPER_PROBLEM]
    assert calls == [(("someone/something", None), {"split": "train"})]


# --------------------------------------------------------------------------------------- benchmarks

# Written out here, so that a wrong entry of data.BENCHMARKS is noticed: where each lives, its
# configuration and split, and a row in its columns.
GPQA_ROW = {
    "Question": "Which?",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "w1",
    "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3",
}
MATH_ROW = {"problem": "P", "solution": "S", "answer": "p - q", "subject": "Algebra", "level": 3}
ARC_ROW = {
    "question": "Q",
    "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
HUB = {
    "aime24": (
        "HuggingFaceH4/aime_2024",
        "default",
        "train",
        {"id": 60, "problem": "P", "answer": "204"},
    ),
    "aime25": ("math-ai/aime25", "default", "test", {"problem": "P", "answer": "70"}),
    "amc": ("AI-MO/aimo-validation-amc", "default", "train", {"problem": "P", "answer": 142.0}),
    "math500": ("HuggingFaceH4/MATH-500", "default", "test", MATH_ROW),
    "minerva": ("math-ai/minervamath", "default", "test", {"question": "P", "answer": "4.5e33"}),
    "olympiad": (
        "math-ai/olympiadbench",
        "default",
        "test",
        {"question": "P", "final_answer": ["$2$", "$3$"]},
    ),
    "arc_c": ("allenai/ai2_arc", "ARC-Challenge", "test", ARC_ROW),
    "gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train", GPQA_ROW),
}
PROBLEMS = {
    "aime24": {"prompt": "P", "answer": "204"},
    "aime25": {"prompt": "P", "answer": "70"},
    "amc": {"prompt": "P", "answer": "142"},
    "math500": {"prompt": "P", "answer": "p - q", "level": 3},
    "minerva": {"prompt": "P", "answer": "4.5e33"},
    "olympiad": {"prompt": "P", "answer": "$2$, $3$"},
    "arc_c": {"prompt": "Q\n\nA. a\nB. b\nC. c", "answer": "B"},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Data sets with the hub's ids, configurations, splits and columns, read by `datasets`."""
    datasets = pytest.importorskip("datasets")
    for hub_id, config, split, row in HUB.values():
        folder = tmp_path / hub_id
        folder.mkdir(parents=True)
        datasets.Dataset.from_list([row]).to_parquet(folder / "rows.parquet")
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
            f"  - split: {split}\n    path: rows.parquet\n---\n"
        )
    monkeypatch.chdir(tmp_path)  # a hub id is then the path of a local data set


def test_every_benchmark_of_the_paper_is_known():
    assert list(data.BENCHMARKS) == list(HUB)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_benchmark_from_the_hub(hub, name):
    assert data.load_benchmark(name) == [PROBLEMS[name]]


def test_gpqa_has_its_choices_lettered(hub):
    problem = data.load_benchmark("gpqa")[0]
    lines = problem["prompt"].splitlines()
    assert lines[:2] == ["Which?", ""]
    assert [line[:3] for line in lines[2:]] == ["A. ", "B. ", "C. ", "D. "]
    assert sorted(line[3:] for line in lines[2:]) == ["right", "w1", "w2", "w3"]
    assert f"{problem['answer']}. right" in lines


def test_the_right_choice_of_gpqa_is_at_every_letter():
    rows = [GPQA_ROW | {"Question": f"Which, {i}?"} for i in range(40)]
    problems = [data.from_benchmark("gpqa", row) for row in rows]
    assert {problem["answer"] for problem in problems} == set("ABCD")
    for problem in problems:
        assert f"{problem['answer']}. right" in problem["prompt"].splitlines()


def test_the_order_of_gpqa_depends_on_the_question_alone(hub):
    assert data.load_benchmark("gpqa") == data.load_benchmark("gpqa")


def test_a_column_that_is_missing_is_named(hub, monkeypatch):
    changed = data.BENCHMARKS["aime24"]._replace(question="Problem")
    monkeypatch.setitem(data.BENCHMARKS, "aime24", changed)
    sentence = r"--bench aime24: row 1 of .*\(KeyError: 'Problem'\); it has: id, problem, answer"
    with pytest.raises(SystemExit, match=sentence):
        data.load_benchmark("aime24")


def test_a_benchmark_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SystemExit, match=r"--bench amc: the hub data set AI-MO/.*: no network"):
        data.load_benchmark("amc")


@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "amc", "AIME_2024", "AMC"])
def test_the_paper_takes_32_samples_of_small_benchmarks(name):
    assert data.paper_samples(name) == 32


@pytest.mark.parametrize(
    "name", ["math500", "minerva", "olympiadbench", "arc_c", "gpqa", "mine", "my_amc"]
)
def test_the_paper_takes_1_sample_of_others(name):
    assert data.paper_samples(name) == 1


# ------------------------------------------------------------------------------------------ prompts

PROBLEM = {"prompt": "What is {1}+2?", "answer": "3", "system": "Be brief."}


@pytest.fixture
def talkative():
    """A tokenizer whose chat template shows every message."""
    tokenizer = make.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def test_the_plain_template_is_the_text_of_the_paper(tokenizer):
    assert data.render(PROBLEM, tokenizer, "plain") == (
        "Question:\nWhat is {1}+2?\n"
        "Please reason step by step, and put your final answer within \\boxed{}.\n"
        "Answer:\nLet's think step by step."
    )


@pytest.mark.parametrize(
    "system, begin",
    [
        (data.SYSTEM, f"[system]{data.SYSTEM}"),  # not the data set's own message
        ("data", "[system]Be brief."),
        ("", ""),
    ],
)
def test_the_system_message_of_the_chat(talkative, system, begin):
    rendered = data.render(PROBLEM, talkative, system=system)
    assert rendered == begin + "[user]What is {1}+2?[assistant]"


def test_a_problem_without_a_system_message_gets_none(talkative):
    assert data.render(GOOD, talkative, system="data") == "[user]1+2[assistant]"


def test_a_template_that_refuses_a_conversation(talkative):
    talkative.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(SystemExit, match=r"no system role.*--system-prompt ''"):
        data.render(PROBLEM, talkative)


def test_a_template_that_makes_nothing_of_a_conversation(talkative):
    talkative.chat_template = " "
    with pytest.raises(SystemExit, match="makes nothing of it"):
        data.render(PROBLEM, talkative)


# ---------------------------------------------------------------------------------------- token ids


def tokenize(problems, tokenizer, template="chat", max_prompt_tokens=999, max_response_tokens=999):
    return data.tokenize(problems, tokenizer, template, "", max_prompt_tokens, max_response_tokens)


def test_a_demonstration_ends_in_the_end_of_sequence_token(tokenizer):
    kept, _, _ = tokenize([GOOD], tokenizer)
    demo_ids = kept[0]["demo_ids"]
    assert demo_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(demo_ids[:-1]) == GOOD["demonstration"]


def test_the_prompt_is_the_rendered_text(tokenizer):
    kept, _, _ = tokenize([GOOD], tokenizer)
    assert tokenizer.decode(kept[0]["prompt_ids"]) == "1+2\n"


def test_a_prompt_that_just_fits_is_kept_and_one_token_more_is_not(tokenizer):
    length = len(tokenizer.encode("1+2\n"))
    kept, long_prompts, _ = tokenize([GOOD], tokenizer, max_prompt_tokens=length)
    assert (len(kept), long_prompts) == (1, 0)
    kept, long_prompts, _ = tokenize([GOOD], tokenizer, max_prompt_tokens=length - 1)
    assert (len(kept), long_prompts) == (0, 1)


def test_a_demonstration_that_just_fits_is_kept_and_one_token_more_is_not(tokenizer):
    length = len(tokenizer.encode(GOOD["demonstration"])) + 1  # with the end-of-sequence token
    kept, _, long_demonstrations = tokenize([GOOD], tokenizer, max_response_tokens=length)
    assert (len(kept), long_demonstrations) == (1, 0)
    kept, _, long_demonstrations = tokenize([GOOD], tokenizer, max_response_tokens=length - 1)
    assert (len(kept), long_demonstrations) == (0, 1)


def test_what_is_too_long_is_counted_once(tokenizer):
    long_prompt = GOOD | {"prompt": "9" * 50}
    long_both = long_prompt | {"demonstration": "9" * 50}
    long_demonstration = GOOD | {"demonstration": "9" * 50}
    problems = [GOOD, long_prompt, long_both, long_demonstration]
    kept, long_prompts, long_demonstrations = tokenize(problems, tokenizer, "chat", 10, 40)
    assert [problem["prompt"] for problem in kept] == ["1+2"]
    assert (long_prompts, long_demonstrations) == (2, 1)


@pytest.fixture
def with_bos():
    """A tokenizer that begins every text with <bos>, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "<bos>{{ messages[-1].content }}"
    return tokenizer


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_prompt_begins_with_one_bos(with_bos, template):
    kept, _, _ = tokenize([GOOD], with_bos, template)
    prompt_ids = kept[0]["prompt_ids"]
    assert prompt_ids[0] == with_bos.bos_token_id
    assert prompt_ids.count(with_bos.bos_token_id) == 1


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_demonstration_has_no_bos(with_bos, template):
    kept, _, _ = tokenize([GOOD], with_bos, template)
    assert with_bos.bos_token_id not in kept[0]["demo_ids"]


def training_args(*more):
    """Flags of train_hpt.py for short problems."""
    words = ["--model", str(make.BASE), "--max-prompt-tokens", "16"]
    return flags.parse_training_args([*words, "--max-response-tokens", "32", *more])


def test_held_out_problems_stay_whatever_their_demonstrations(tmp_path, tokenizer):
    args = training_args("--max-response-tokens", "4")
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD] * 3)
    assert len(data.load_fitting_problems(args, path, tokenizer)[0]) == 3
    with pytest.raises(SystemExit, match="no problem is left"):  # negative control
        data.load_fitting_problems(args, path, tokenizer, need_demonstration=True)


def test_a_sentence_says_what_was_left_out(tmp_path, tokenizer):
    long_prompt, long_demonstration = (
        GOOD | {"prompt": "9" * 50},
        GOOD | {"prompt": "2+1", "demonstration": "9" * 50},
    )
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, long_prompt, long_demonstration])
    args = training_args()
    problems, sentence = data.load_fitting_problems(args, path, tokenizer, need_demonstration=True)
    assert len(problems) == 1
    assert sentence == ("1 left out with a prompt over 16 tokens, 1 with a demonstration over 32")
    problems, sentence = data.load_fitting_problems(args, path, tokenizer)
    assert len(problems) == 2
    assert sentence == "1 left out with a prompt over 16 tokens"


def test_problems_that_are_there_twice_are_kept_and_counted(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, GOOD, GOOD | {"answer": "4"}])
    args = flags.parse_training_args(["--model", "m", "--data", str(path)])
    problems, sentence = data.load_fitting_problems(args, str(path), tokenizer)
    assert len(problems) == 3 and sentence.endswith(", 2 with the prompt of an earlier one")
    _, sentence = data.load_fitting_problems(
        args, str(write_jsonl(tmp_path / "b.jsonl", [GOOD])), tokenizer
    )
    assert "earlier" not in sentence


def test_a_demonstration_of_special_tokens_alone_is_refused(tokenizer):
    problem = GOOD | {"demonstration": "<eos> <eos>"}
    with pytest.raises(SystemExit, match=r"^error: the demonstration of '1\+2': nothing but spec"):
        data.tokenize([problem], tokenizer, "plain", "", 1000, 1000)


def test_the_flags_choose_template_and_system_message(tmp_path, talkative):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    prompts = []
    for more in ([], ["--system-prompt", ""], ["--template", "plain"]):
        args = training_args("--max-prompt-tokens", "256", *more)
        problems, _ = data.load_fitting_problems(args, path, talkative)
        prompts.append(talkative.decode(problems[0]["prompt_ids"]))
    assert prompts[0] == f"[system]{data.SYSTEM}[user]1+2[assistant]"
    assert prompts[1] == "[user]1+2[assistant]"
    assert prompts[2].startswith("Question:\n1+2\n")


# --------------------------------------------------------------------------------- a model's config


def test_dropout_is_off():
    from transformers import GPT2Config, Qwen2Config

    qwen, gpt2 = Qwen2Config(attention_dropout=0.1), GPT2Config(resid_pdrop=0.2)
    assert (qwen.attention_dropout, gpt2.resid_pdrop) == (0.1, 0.2)  # negative control
    assert data.override(qwen).attention_dropout == 0.0
    overridden = data.override(gpt2)
    assert (overridden.resid_pdrop, overridden.embd_pdrop, overridden.attn_pdrop) == (0, 0, 0)


def test_rope_theta_changes_the_frequencies_of_the_model():
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    dimension = 16
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    before = Qwen2RotaryEmbedding(config).inv_freq
    after = Qwen2RotaryEmbedding(data.override(config, rope_theta=40000.0)).inv_freq
    wanted = [40000.0 ** (-2 * i / dimension) for i in range(dimension // 2)]
    assert after.tolist() == pytest.approx(wanted)
    assert before.tolist() != pytest.approx(wanted)  # negative control


def test_positions_are_overridden():
    from transformers import Qwen2Config

    assert data.override(Qwen2Config(), None, 16384).max_position_embeddings == 16384


def test_without_overrides_a_config_keeps_its_values():
    from transformers import Qwen2Config

    config = Qwen2Config(max_position_embeddings=100, rope_parameters={"rope_theta": 7.0})
    overridden = data.override(config)
    assert overridden.max_position_embeddings == 100
    assert overridden.rope_parameters["rope_theta"] == 7.0


def test_a_bare_config_can_be_overridden():
    from transformers import PreTrainedConfig

    data.override(PreTrainedConfig(), 40000.0, 16384)


def test_loading_a_model_applies_the_overrides():
    config, tokenizer = data.load_config_and_tokenizer(str(make.BASE), 40000.0, 512)
    assert config.rope_parameters["rope_theta"] == 40000.0
    assert config.max_position_embeddings == 512
    assert tokenizer.decode(tokenizer.encode("1+2")) == "1+2"


def test_the_trainer_gets_the_overrides_of_the_flags(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD])
    more = ["--data", path, "--rope-theta", "40000", "--max-position-embeddings", "512"]
    inputs = train_hpt.load_inputs(training_args(*more), METHODS["hpt"])
    assert inputs.config.rope_parameters["rope_theta"] == 40000.0
    assert inputs.config.max_position_embeddings == 512


def test_the_sampler_gets_the_overrides_of_the_flags(monkeypatch):
    from transformers import Qwen2Config

    given = {}

    class Stop(Exception):
        pass

    def sampler(*_, config_overrides, **__):
        given["override"] = config_overrides
        raise Stop

    monkeypatch.setattr(rollout, "Sampler", sampler)
    monkeypatch.setattr(train_hpt.distributed, "init_process_group", lambda: "cpu")
    args = training_args("--rope-theta", "40000", "--max-position-embeddings", "512")
    with pytest.raises(Stop):
        inputs = train_hpt.Inputs(None, Qwen2Config(), [], "", [], "", [1])
        memory = SimpleNamespace(utilization=0.5, concurrent=256)
        train_hpt.start(args, METHODS["hpt"], inputs, memory)
    config = given["override"](Qwen2Config(attention_dropout=0.1))
    assert config.rope_parameters["rope_theta"] == 40000.0
    assert (config.max_position_embeddings, config.attention_dropout) == (512, 0.0)


def test_a_family_without_a_single_rope_theta(tmp_path):
    from transformers import GPT2Config

    make.tokenizer().save_pretrained(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="--rope-theta: a gpt2 model has no single rope_theta"):
        data.load_config_and_tokenizer(str(tmp_path), rope_theta=40000.0)
    data.load_config_and_tokenizer(str(tmp_path))  # negative control


def test_a_context_that_just_fits_passes_and_one_token_more_does_not():
    from transformers import Qwen2Config

    config = Qwen2Config(max_position_embeddings=256)
    data.check_context(config, 16, 240)
    sentence = "need 257 positions, the model has 256: .*--max-position-embeddings"
    with pytest.raises(SystemExit, match=sentence):
        data.check_context(config, 17, 240)
