"""Special tokens: which words of a prompt or a demonstration are control tokens.

A chat template, and the flags, may write control tokens as <|im_end|>. The words of a data set may
not: a problem that mentions <|im_end|> would end its own turn. So in them such words are text, and
are tokenised as any other text. There is one exception: in what an assistant says, the tags around
its thoughts (THINK_TAGS) are the model's own tokens, if its tokenizer has them.

Where a text mentions no control token, the tokenizer is called as it is.
"""

import json
import re
import secrets

THINK_TAGS = ("<think>", "</think>")
TAG = r"(?:<[^<>\s]+>|\[[^\[\]\s]+\])"
# The tags in which a prompt ends, as <think>, with the white space around them.
LONGEST_END = 200  # characters of a prompt in which they are looked for
TAGS_AT_THE_END = re.compile(rf"(?:{TAG}\s*)+\Z")


def control_tokens(tokenizer) -> dict[str, int]:
    """Return {text: id} of a tokenizer's control tokens.

    They are the special tokens, and added tokens that look like a tag: many tokenizers do not mark
    <think> or <tool_call> as special. Added words and runs of spaces are text.
    """
    found = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        is_control = token.special or re.fullmatch(TAG, token.content)
        if is_control and token.content.strip():
            found[token.content] = token_id
    return found


def ending_tokens(tokenizer) -> list[str]:
    """Return the special tokens that do not belong to a demonstration if they stand at its end."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [text for text in special if text.strip() and text not in THINK_TAGS]


class Writer:
    """Turns texts into token ids, with the words of a data set as text.

    `protect` marks the control tokens in words of a data set. The marked words go through the chat
    template. `ids` takes the result apart: what is marked is text, what is not is a control token.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        self.ends = ending_tokens(tokenizer)
        self.key = secrets.token_hex(8)  # in no text of a data set
        self.nonce = f"\U000f0000{self.key}\U000f0001"  # the mark
        self.copy = None  # made when it is needed

    def mentions_control(self, ids: list[int], is_assistant: bool = False) -> bool:
        """Tell whether a text, tokenised as it is, holds a control token that it may not hold."""
        allowed = THINK_TAGS if is_assistant else ()
        forbidden = {i for text, i in self.control.items() if text not in allowed}
        return not forbidden.isdisjoint(ids)

    def protect(self, text: str, is_assistant: bool = False) -> str:
        """Return a text of a data set with a mark behind the first letter of each control token."""
        allowed = THINK_TAGS if is_assistant else ()
        names = [name for name in self.control if name not in allowed]
        return re.sub(one_of(names), self.mark, text)

    def mark(self, match: re.Match) -> str:
        """Return the text of a match with a mark behind its first letter."""
        return match.group()[0] + self.nonce + match.group()[1:]

    def ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text that holds marks of `protect`.

        The unmarked control tokens get other names, and then the marks are taken away. The text is
        tokenised by a copy of the tokenizer that knows control tokens by these names alone. So
        every piece of text between two control tokens is tokenised as it always is.
        """
        if self.copy is None:
            self.copy = self.renamed_copy()
        unmarked = rf"(?:{one_of(self.control)})(?!{self.nonce})"
        renamed = re.sub(unmarked, self.rename, text)
        encoding = self.copy.encode(
            renamed.replace(self.nonce, ""), add_special_tokens=add_special_tokens
        )
        return encoding.ids

    def rename(self, match: re.Match) -> str:
        """Return the other name of the control token that was matched."""
        return self.name_of(match.group())

    def name_of(self, token: str) -> str:
        """Return the other name of a token; a token that is no control token keeps its name."""
        if token not in self.control:
            return token
        return f"\U000f0002{self.key}.{self.control[token]}\U000f0003"

    def renamed_copy(self):
        """Return a copy of the tokenizer in which control tokens have other names, and their ids.

        Raises:
            SystemExit: the tokenizer is not of the library `tokenizers`, or of an unknown kind.
        """
        from tokenizers import Tokenizer

        where = f"error: --model {self.tokenizer.name_or_path}: a problem mentions a special token"
        remedy = "which this tokenizer cannot write as text: take the problem out of the data"
        if not getattr(self.tokenizer, "is_fast", False):
            raise SystemExit(f"{where}, {remedy}")
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None
        for token in state["added_tokens"]:
            token["content"] = self.name_of(token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.name_of(word): i for word, i in model["vocab"].items()}
        else:  # pairs (word, score)
            model["vocab"] = [[self.name_of(word), score] for word, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self.name_of(model["unk_token"])
        try:
            copy = Tokenizer.from_str(json.dumps(state))
        except Exception as error:  # the library raises this class itself
            raise SystemExit(f"{where}, {remedy} ({error})") from error
        if any(copy.token_to_id(self.name_of(text)) != i for text, i in self.control.items()):
            raise SystemExit(f"{where}, {remedy}")
        return copy


def one_of(names) -> str:
    """Return a regular expression for one of several texts, the longest first; it may be none."""
    alternatives = sorted(map(re.escape, names), key=len, reverse=True)
    return "|".join(alternatives) or r"(?!)"


def without_end(text: str, writer: Writer) -> str:
    """Return a demonstration without the special tokens in which it ends.

    The end-of-sequence token is added to every demonstration. Data sets were often written with the
    end of a turn of some chat template, which need not be the tokenizer's end-of-sequence token.
    """
    while True:
        stripped = text.rstrip()
        end = next((end for end in writer.ends if stripped.endswith(end)), None)
        if end is None:
            return text
        text = stripped.removesuffix(end)


def without_open_tag(demonstration: str, prompt: str) -> str:
    """Return a demonstration without the tags that the prompt has written already.

    A template may end in <think>, and a demonstration begin with it. The tag is written once, and
    so is the white space behind it.
    """
    end = TAGS_AT_THE_END.search(prompt[-LONGEST_END:])
    tags = re.findall(TAG, end.group()) if end else []
    for first in range(len(tags)):
        repeated = re.match(r"\s*" + r"\s*".join(map(re.escape, tags[first:])), demonstration)
        if repeated:
            rest = demonstration[repeated.end() :]
            for space in prompt[len(prompt.rstrip()) :]:
                rest = rest.removeprefix(space)
            return rest
    return demonstration
