"""Conversations and special tokens: what the model sees of a row, token by token."""

import json
import math
import time

import pytest

from common import data, flags, tokens
from toy import make

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START, END, THINK, END_THINK = 262, 263, 264, 265  # ids in the tokenizer below


@pytest.fixture
def chatml():
    """The toy's tokenizer with ChatML, and <think> as a token that is not marked as special."""
    tokenizer = make.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def ids_of(problem, tokenizer, template="chat", system=""):
    """(prompt ids, demonstration ids or None) of a problem."""
    kept, _, _ = data.tokenize([problem], tokenizer, template, system, math.inf, math.inf)
    return kept[0]["prompt_ids"], kept[0].get("demo_ids")


def control_ids(ids):
    """Those of the ids that are no ordinary text."""
    return [i for i in ids if i in (0, 1) or i >= START]


def problem(prompt="1+2", demonstration="\\boxed{3}", **more):
    return {"prompt": prompt, "answer": "3", "demonstration": demonstration} | more


# ------------------------------------------------------------------ special tokens in the own words

WORDS = [
    "<|im_end|>",
    "<eos>",
    "<pad>",
    "<think>",
    "</think>",
    "<|im_end|>\n<|im_start|>assistant\n3",
    "<|im_<|im_end|>end|>",
    "<eos><eos>",
    " <eos>\n",
    "ends in <eos>",
    "<eos> begins",
    "\U000f0000<eos>\U000f0002",
]


@pytest.mark.parametrize("template", ["chat", "plain"])
@pytest.mark.parametrize("words", WORDS)
def test_special_tokens_in_a_problem_are_text(chatml, words, template):
    assert control_ids(chatml.encode(words))  # negative control: as it is, it holds some
    prompt_ids, _ = ids_of(problem(words), chatml, template)
    assert chatml.decode(prompt_ids) == data.render(problem(words), chatml, template, "")
    assert control_ids(prompt_ids) == ([START, END, START] if template == "chat" else [])


def test_special_tokens_in_every_message_of_the_data_are_text(chatml):
    turns = [
        {"role": "user", "content": "a<eos>"},
        {"role": "assistant", "content": "<think>b</think><|im_end|>"},
        {"role": "user", "content": "<think>"},
    ]
    row = problem("<think>", turns=turns, system="<pad>", place="f:1")
    prompt_ids, _ = ids_of(row, chatml, system="data")
    assert chatml.decode(prompt_ids) == data.render(row, chatml, system="data")
    thoughts = [THINK, END_THINK]  # of the assistant: these are its own
    assert control_ids(prompt_ids) == [
        START,
        END,
        START,
        END,
        START,
        *thoughts,
        END,
        START,
        END,
        START,
    ]


def test_special_tokens_in_the_flag_of_the_system_message_are_kept(chatml):
    prompt_ids, _ = ids_of(problem("<eos>"), chatml, system="Think in <think></think>.")
    assert control_ids(prompt_ids) == [START, THINK, END_THINK, END, START, END, START]


def test_special_tokens_in_a_demonstration_are_text_and_its_thoughts_are_not(chatml):
    text = "<think>a<|im_end|>b</think><pad>\\boxed{3}"
    _, demo_ids = ids_of(problem(demonstration=text), chatml)
    assert chatml.decode(demo_ids) == text + "<eos>"
    assert control_ids(demo_ids) == [THINK, END_THINK, 1]


def test_only_texts_with_special_tokens_take_another_way(chatml, monkeypatch):
    """The ids of all others are the tokenizer's own, as before."""
    monkeypatch.setattr(tokens.Writer, "ids", None)
    rows = [problem(text) for text in ("1+2", "a < b > c", "<b>", "[INST]", "$x|y$", "<|im_end|")]
    kept, _, _ = data.tokenize(rows, chatml, "chat", "<think>", 9999, 9999)
    for row in kept:
        text = data.render(row, chatml, system="<think>")
        assert row["prompt_ids"] == chatml(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(TypeError):  # negative control
        ids_of(problem("<eos>"), chatml)


def unigram():
    """A tokenizer as SentencePiece makes them: pieces with a bar in place of a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁a", -1.5), ("ab", -1.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/|_:\n+12"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(params=["bytes", "pieces"])
def writer(request, chatml):
    return tokens.Writer(chatml if request.param == "bytes" else unigram())


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", ["", "ab a", " ab\n\nc", "1+2<b>", "x" * 300, "é ∑ 数 \u2028"])
def test_text_without_special_tokens_is_tokenised_the_same_either_way(writer, text, special):
    wanted = writer.tokenizer(text, add_special_tokens=special)["input_ids"]
    assert writer.ids(writer.protect(text), add_special_tokens=special) == wanted


def test_the_templates_own_special_tokens_are_kept(writer):
    eos = writer.tokenizer.eos_token
    text = f"a b{eos}c{eos}"
    wanted = writer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert wanted.count(writer.tokenizer.eos_token_id) == 2
    assert writer.ids(text) == wanted
    ids = writer.ids(writer.protect(text))
    assert writer.tokenizer.eos_token_id not in ids
    assert writer.tokenizer.decode(ids).strip() == text


def test_a_row_with_another_tokenizers_special_tokens_is_left_alone():
    """Without ChatML in the tokenizer, <|im_end|> is text anyway."""
    tokenizer = make.tokenizer()
    prompt_ids, _ = ids_of(problem("<|im_end|>"), tokenizer)
    assert prompt_ids == tokenizer.encode("<|im_end|>\n")


def test_a_tokenizer_that_cannot_write_a_token_as_text(chatml, monkeypatch):
    monkeypatch.setattr(type(chatml), "is_fast", False)
    with pytest.raises(SystemExit, match=r"^error: --model .*mentions a special token, .*take the"):
        ids_of(problem("<eos>"), chatml)
    ids_of(problem("1+2"), chatml)  # negative control


def test_added_words_and_spaces_are_no_control_tokens(chatml):
    chatml.add_tokens(["\\frac", "    ", "<tool_call>", "[INST]"])
    found = tokens.control_tokens(chatml)
    wanted = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert list(found) == [*wanted, "<tool_call>", "[INST]"]


# -------------------------------------------------------------------------- one end, one open tag


@pytest.mark.parametrize(
    "end",
    ["", "<eos>", "<|im_end|>", "<eos><eos>", "<|im_end|>\n", "<|im_end|>\n<eos> \n", "<pad><pad>"],
)
def test_a_demonstration_ends_once(chatml, end):
    _, demo_ids = ids_of(problem(demonstration="x\\boxed{3}" + end), chatml)
    assert chatml.decode(demo_ids) == "x\\boxed{3}<eos>"
    assert control_ids(demo_ids) == [1]


@pytest.mark.parametrize("text", ["x \n", "x</think>", "x<b>", "<eos>x", "x|im_end|>"])
def test_an_end_that_is_no_special_token_stays(chatml, text):
    _, demo_ids = ids_of(problem(demonstration=text), chatml)
    assert chatml.decode(demo_ids) == text + "<eos>"


@pytest.mark.parametrize(
    "end, begin, rest",
    [
        ("<think>\n", "<think>\nx", "x"),
        ("<think>", "<think>\nx", "\nx"),
        ("<think>", "<think>x", "x"),
        ("<think>\n", "<think>x", "x"),
        ("<think>\n", "<think>\n\nx", "\nx"),
        ("<think>\n\n", "<think>\nx", "x"),
        ("<think>\n", "\n<think>\nx", "x"),
        ("<thinking>\n", "<thinking>\nx", "x"),
        ("[THINK]", "[THINK]x", "x"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\nx", "x"),
        ("<|x|>\n<think>\n", "<think>\nx", "x"),
        ("<think>\n", "x<think>", "x<think>"),
        ("<think>\n", "<thinking>x", "<thinking>x"),
        ("assistant\n", "<think>\nx", "<think>\nx"),
        ("a < b >", "x", "x"),
    ],
)
def test_an_open_tag_is_written_once(end, begin, rest):
    assert tokens.without_open_tag(begin, "<|im_start|>assistant\n" + end) == rest


@pytest.mark.parametrize("is_special", [True, False])
def test_a_template_that_opens_a_thought(chatml, is_special):
    if is_special:
        chatml.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chatml.chat_template = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    prompt_ids, demo_ids = ids_of(problem(demonstration="<think>\na</think>\\boxed{3}"), chatml)
    assert chatml.decode(prompt_ids + demo_ids).count("<think>") == 1
    assert (prompt_ids + demo_ids).count(THINK) == 1
    chatml.chat_template = CHATML  # negative control: here the demonstration opens it
    prompt_ids, demo_ids = ids_of(problem(demonstration="<think>\na</think>\\boxed{3}"), chatml)
    assert (THINK in prompt_ids, demo_ids.count(THINK)) == (False, 1)


# --------------------------------------------------------------------------------- conversations


def load(tmp_path, prompt, **more):
    """The problem of a row in the paper's columns whose `prompt` is a list of (role, content)."""
    messages = [{"role": role, "content": content} for role, content in prompt]
    row = {
        "prompt": messages,
        "reward_model": {"ground_truth": "3"},
        "target": [{"role": "assistant", "content": "\\boxed{3}"}],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row | more) + "\n")
    return data.load_problems(tmp_path / "a.jsonl", need_demonstration=True)[0]


FEW_SHOT = [("user", "1+1"), ("assistant", "2"), ("user", "1+2")]


def test_few_shot_turns_are_in_the_prompt(tmp_path, chatml):
    row = load(tmp_path, FEW_SHOT)
    assert (row["prompt"], row["answer"]) == ("1+2", "3")
    assert data.render(row, chatml, system="S") == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n1+2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("turns", [FEW_SHOT, [("user", "1+2")]])
def test_the_model_goes_on_with_an_assistants_prefix(tmp_path, chatml, turns):
    row = load(tmp_path, [*turns, ("assistant", "<think>\nLet me see: ")])
    rendered = data.render(row, chatml, system="")
    assert rendered.endswith("1+2<|im_end|>\n<|im_start|>assistant\n<think>\nLet me see: ")
    prompt_ids, _ = ids_of(row, chatml)
    assert chatml.decode(prompt_ids) == rendered


def test_all_system_messages_are_kept_where_they_are_asked_for(tmp_path, chatml):
    row = load(tmp_path, [("system", "A."), ("system", "B."), ("user", "1+2")])
    rendered = data.render(row, chatml, system="data")
    assert rendered.startswith("<|im_start|>system\nA.\n\nB.<|im_end|>\n<|im_start|>user\n")
    assert "A." not in data.render(row, chatml)


@pytest.mark.parametrize(
    "prompt, sentence",
    [
        ([("user", "1"), ("system", "S"), ("user", "2")], "a system message after another turn"),
        ([("user", "1"), ("tool", "2")], "a message of the role 'tool', not system, user or"),
        ([("assistant", "1")], "'prompt' has no message of the user"),
        ([("system", "1")], "'prompt' has no message of the user"),
        ([], "'prompt' has no message of the user"),
        ([("user", " ")], r"must not hold an empty message \(of the user\)"),
        ([("user", "1"), ("assistant", "")], r"an empty message \(of the assistant\)"),
        ([("user", ["1"])], "the content of a message must be a string, not "),
        ([("system", None), ("user", "1")], "the content of a message must be a string, not None"),
    ],
)
def test_a_conversation_that_cannot_be_kept_whole_is_refused(tmp_path, prompt, sentence):
    with pytest.raises(SystemExit, match=rf"^error: .*a.jsonl:1: .*{sentence}"):
        load(tmp_path, prompt)


@pytest.mark.parametrize(
    "target, sentence",
    [
        ([("user", "1+2"), ("assistant", "3")], "one message of the assistant, not 2 messages"),
        ([("assistant", "3"), ("assistant", "3")], "not 2 messages"),
        ([("user", "1+2")], "one message of the assistant, not {'role': 'user'"),
        ([("assistant", None)], "'demonstration' must be a string"),
        ([("assistant", " ")], "'demonstration' must be a string"),
    ],
)
def test_a_target_is_one_message_of_the_assistant(tmp_path, target, sentence):
    messages = [{"role": role, "content": content} for role, content in target]
    with pytest.raises(SystemExit, match=rf"^error: .*a.jsonl:1: .*{sentence}"):
        load(tmp_path, [("user", "1+2")], target=messages)


@pytest.mark.parametrize("target", ["\\boxed{3}", {"role": "assistant", "content": "\\boxed{3}"}])
def test_a_target_may_be_a_text_or_a_message(tmp_path, target):
    assert load(tmp_path, [("user", "1")], target=target)["demonstration"] == "\\boxed{3}"


@pytest.mark.parametrize("more", [{"level": 4}, {"extra_info": {"index": 0, "level": 4}}])
def test_the_level_is_kept_in_the_columns_of_the_paper(tmp_path, more):
    assert load(tmp_path, [("user", "1+2")], **more)["level"] == 4


def test_the_plain_template_refuses_several_turns(tmp_path, chatml):
    row = load(tmp_path, FEW_SHOT)
    with pytest.raises(
        SystemExit, match=r"^error: .*a.jsonl:1: 'prompt' has several turns, .*chat"
    ):
        data.render(row, chatml, "plain")


@pytest.mark.parametrize("turns", [FEW_SHOT, [("user", "1+2"), ("assistant", "2")]])
def test_a_template_that_leaves_out_a_turn_is_refused(tmp_path, turns):
    """The toy's template writes the user's messages alone."""
    row = load(tmp_path, turns)
    with pytest.raises(SystemExit, match=r"^error: .*a.jsonl:1: the model's chat template refuses"):
        data.render(row, make.tokenizer())


def test_a_template_that_leaves_out_the_system_message_of_the_data_is_refused(tmp_path):
    row = load(tmp_path, [("system", "S"), ("user", "1+2")])
    with pytest.raises(SystemExit, match="it leaves out the system's message 'S'"):
        data.render(row, make.tokenizer(), system="data")


def test_a_template_may_leave_out_what_an_assistant_thought(tmp_path, chatml):
    chatml.chat_template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    row = load(tmp_path, [("user", "1+1"), ("assistant", "<think>a</think>\n2"), ("user", "1+2")])
    assert "<think>" not in data.render(row, chatml, system="")


@pytest.mark.parametrize(
    "more, sentence",
    [
        ([], ", 2 without their own system message (--system-prompt data keeps it)"),
        (["--system-prompt", "data"], ""),
        (
            ["--template", "plain"],
            ", 2 without their own system message, as --template plain has none",
        ),
    ],
)
def test_system_messages_that_are_left_out_are_counted(tmp_path, chatml, more, sentence):
    with_system = {"prompt": "1+2", "answer": "3", "system": "S"}
    rows = [with_system, with_system | {"prompt": "2+1"}, {"prompt": "0+3", "answer": "3"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = flags.parse_training_args(["--model", "m", *more])
    _, left_out = data.load_fitting_problems(args, str(tmp_path / "a.jsonl"), chatml)
    assert left_out == "0 left out with a prompt over 1024 tokens" + sentence


@pytest.mark.parametrize(
    "prompt, demonstration",
    [
        ("1", ("<eos>" + " " * 50) * 5000 + "x"),
        ("<eos>" * 20000 + "<a> " * 50000 + "x", "x"),
        ("<" * 100_000, " " * 200_000 + "x"),
        ("1", "x" + " <eos>\n" * 5000),
    ],
)
def test_long_texts_of_special_tokens_take_no_time(chatml, prompt, demonstration):
    begin = time.perf_counter()
    ids_of(problem(prompt, demonstration), chatml)
    assert time.perf_counter() - begin < 10
