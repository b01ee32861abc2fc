"""Wrong answers: a reference answer with one digit, sign, relation, letter or word changed."""

import re

PIECE = re.compile(
    r"""
    (?P<command> \\[A-Za-z]+ )
  | (?P<escaped> \\. )
  | (?P<digit>   \d )
  | (?P<word>    [A-Za-z]{2,} )
  | (?P<letter>  [A-Za-z] )
  | (?P<mark>    [-+<>=()\[\]!/^_,] )
    """,
    re.VERBOSE,
)
OTHERS = {  # what stands in for a sign, a relation, a command
    "+": "-",
    "-": "+",
    "<": ">",
    ">": "<",
    "=": r"\neq ",
    "/": "+",
    "!": "",
    ",": ";7,",
    "(": "[",
    "[": "(",
    ")": "]",
    "]": ")",
    "^": "_",
    "_": "^",
    r"\pm": "+",
    r"\times": "+",
    r"\le": r"\ge",
    r"\ge": r"\le",
    r"\leq": r"\geq",
    r"\geqslant": r"\leqslant",
    r"\neq": "=",
    r"\in": r"\notin",
    r"\cup": r"\cap",
    r"\cap": r"\cup",
    r"\mid": r"\nmid",
    r"\cdot": "+",
    r"\sin": r"\cos",
    r"\cos": r"\sin",
    r"\arcsin": r"\arccos",
    r"\cot": r"\tan",
    r"\arctan": r"\arcsin",
    r"\ln": r"\sin",
    r"\log": r"\exp",
    r"\exp": r"\ln",
    r"\infty": "1",
    r"\pi": r"\theta",
    r"\binom": r"\frac",
    r"\frac": r"\binom",
    r"\sqrt": "",
    r"\lfloor": "(",
    r"\dot": r"\ddot",
    r"\ddot": r"\dot",
    r"\vec": r"\hat",
    r"\bar": "",
    r"\overline": "",
    r"\alpha": r"\beta",
    r"\gamma": r"\delta",
    r"\tau": r"\rho",
    r"\omega": r"\mu",
    r"\theta": r"\phi",
    r"\lambda": r"\mu",
    r"\zeta": r"\eta",
    r"\sigma": r"\rho",
    r"\delta": r"\gamma",
    r"\Delta": r"\Gamma",
    r"\rho": r"\sigma",
    r"\hbar": r"\ell",
    r"\angle": r"\triangle",
    r"\circ": r"\prime",
    r"\equiv": r"\neq",
    r"\pmod": r"\bmod",
    r"\implies": r"\iff",
    r"\parallel": r"\perp",
    r"\sum": r"\prod",
    r"\int": r"\sum",
    r"\lim": r"\max",
    r"\nabla": r"\Delta",
    r"\prime": "1",
}
WORDS = {"even": "odd", "cm": "mm", "km": "cm", "AM": "PM", "million": "billion", "no": "yes"}


def mutants(answer):
    """Texts that differ from `answer` in one place and in meaning.

    Left out are changes that leave the meaning: -0 for 0, and the case or the brackets of the
    letter of a multiple choice.
    """
    choice = re.search(r"^\W*(\\text\{)?\W*[A-J]\W*$", answer) is not None
    found = []
    for match in PIECE.finditer(answer):
        kind, piece, before = match.lastgroup, match.group(), answer[: match.start()]
        for other in _others(kind, piece, before, choice):
            found.append(before + other + answer[match.end() :])
    bare = answer.strip("$")
    if bare[0].isdigit() and float(re.match(r"\d+\.?\d*", bare)[0]):
        found.append("-" + answer)
    if bare.startswith("-"):
        found.append(answer.replace("-", "", 1))
    return [text for text in dict.fromkeys(found) if text != answer]


def _others(kind, piece, before, choice):
    """What may stand in the place of a piece of an answer."""
    if kind == "digit":
        return [str((int(piece) + step) % 10) for step in (1, 8)]
    if kind == "letter":
        following = chr(ord(piece) + 1) if piece not in "zZ" else "a"
        exponent = piece in "eE" and re.search(r"\d$", before)
        return [following] if choice or exponent else [following, piece.swapcase()]
    if kind == "word":
        if re.search(r"\\(begin|end|mathrm|operatorname)\s*\{$", before):
            return []
        others = [piece[:-1] + chr(ord(piece[-1]) + 1), piece + "x"]
        return [*others, WORDS.get(piece, "other")]
    if kind == "mark" and choice:
        return []
    return [OTHERS[piece]] if piece in OTHERS else []
