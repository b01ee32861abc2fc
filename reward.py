r"""The verifier: 1.0 if the last \boxed{} of a response is the reference answer, else 0.0.

    reward(response, answer)                 one answer
    with Verifier(workers=8) as verifier:    many answers, in order; the trainer does this
        rewards = verifier.score(responses, answers)

Two answers are the same if they are the same text up to markup, or if both are read whole and have
the same value. `latex2sympy`, the parser of math-verify, reads them, behind a guard: alone it reads
5 3 as 8, takes gamma for a number and drops primes. docs/verifier.md has the rules and examples.

Mathematics that a model writes can take hours and all memory, and a signal cannot interrupt a long
computation in C. So `grade`, or a function of yours (`--reward MODULE:FUNCTION`), runs in worker
processes, with a deadline for each answer and a memory limit for each worker. A worker that misses
the deadline or dies is replaced; its answer scores 0 and is counted.
"""

import ctypes
import functools
import importlib
import json
import os
import queue
import random
import re
import resource
import select
import signal
import subprocess
import sys
import tokenize
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sympy
from tqdm import tqdm

LONGEST = 2000  # characters of a final answer worth reading
START = 60.0  # seconds that a worker may take to import what it needs
GRADE = "reward:grade"
ALL_LOST = 8  # the run ends after so many lost answers, in calls that lost every answer
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


# ------------------------------------------------------------------------------------------------
# One answer
# ------------------------------------------------------------------------------------------------


def last_boxed(text):
    r"""The content of the last \boxed{...} of `text`, braces balanced, or None without one."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    if not starts:
        return None
    text = text[starts[-1] :]
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped brace does not count
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[: brace.start()]
    return None


def grade(response, answer):
    r"""Whether the last \boxed{} of a response is the reference answer.

    It can hang and can take all memory: `reward` and `Verifier` are the safe ways to call it.

    Args:
        response: str.
        answer: str or number, or a list of accepted ones. It may be boxed itself.

    Returns:
        1.0 or 0.0.
    """
    given = last_boxed(response)
    if given is None or len(given) > LONGEST:
        return 0.0
    given = last_boxed(given) or given
    accepted = [str(wanted) for wanted in (answer if isinstance(answer, list) else [answer])]
    return float(any(same(given, last_boxed(wanted) or wanted) for wanted in accepted))


def same(given, wanted):
    """Whether `given` is the reference answer `wanted`, both as they stand in a box (str)."""
    if given.strip() == wanted.strip():
        return bool(given.strip())
    given, wanted = plain(given), plain(wanted)
    letter = re.fullmatch(r"[(\[]?([A-J])[)\]]?", spelled(wanted))
    if letter:
        choice = CHOICE.match(re.sub(r"\\text|[{}]", "", given))
        return choice is not None and (choice[1] or choice[2]).upper() == letter[1]
    if spelled(given) == spelled(wanted):
        return bool(given)
    if given.isalnum() and re.fullmatch(rf"{given}_\{{?\d+\}}?", wanted):
        return True  # a missing base is forgiven
    try:
        return same_lists(given, wanted)
    except Exception:  # sympy raises errors of all kinds at what it cannot compute
        return False


# ------------------------------------------------------------------------------------------------
# Markup: one spelling for what can be written in many ways
# ------------------------------------------------------------------------------------------------

CHARACTERS = {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "±": r"\pm ", "√": r"\sqrt "}
CHARACTERS |= {"π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "≠": r"\neq ", "≤": r"\leq "}
CHARACTERS |= {"≥": r"\geq ", "²": "^2", "³": "^3", "₂": "_2", "₃": "_3"}
CHARACTERS = str.maketrans(CHARACTERS)
COMMANDS = {  # what to read for which commands; the first two kinds only change the looks
    " ": "left right big Big quad displaystyle limits large Huge bf rm",
    "": "mathbf boldsymbol bm underline emph boxed fbox",
    r"\text": "textbf textit textrm mbox mathrm operatorname",
    r"\frac": "dfrac tfrac",
    r"\binom": "dbinom",
    r"\leq": "le leqslant",
    r"\geq": "ge geqslant",
    r"\neq": "ne",
    r"\infty": "inf infinity",
    r"\emptyset": "varnothing",
    "|": "lvert rvert mid",
    "°": "circ",
}
COMMANDS = {old: new for new, olds in COMMANDS.items() for old in olds.split()}
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp"
WITHOUT_BACKSLASH = rf"sqrt|pi|inf|infty|infinity|theta|alpha|beta|{FUNCTIONS}"
BARE_UNITS = "cm|mm|km|kg|ft|mi|mph|min|sec|day|men|[ap]m"
AND = r"(?:or|and(?!.*(?:[<>]|\\[lg]eq)))"  # "and" between inequalities separates no items
BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
PARENTHESES = r"\(((?:[^()]|\([^()]*\))*)\)"

REWRITINGS = {  # what is undone: (pattern, replacement); they are applied from top to bottom
    # marks and spaces
    "a full stop": (r"(?<!\\)[.,;:\s]+$", ""),
    "**73**": (r"^(\*\*?|__|`)(.+)\1$", r"\2"),
    "sqrt, pi, sin": (rf"(?<![A-Za-z\\])({WITHOUT_BACKSLASH})(?![A-Za-z])", r"\\\1 "),
    r"\textcolor{red}": (r"\\(?:text)?color\{\w+\}", " "),
    "other commands": (r"\\([A-Za-z]+)", lambda command: COMMANDS.get(command[1], command[0])),
    r"1\,000": (r"(?<=\d)(?:\{,\}|,\\!|\\[,!;: ]|~)\s*(?=\d{3}(?!\d))", ""),
    "1 000": (r"(?<![\d.])[1-9]\d{0,2}(?: \d{3})+(?!\d)", lambda m: m[0].replace(" ", "")),
    r"\, \( $": (r"(?<!\\)(?:\\[,;:!> \n()\[\]]|\$)|~", " "),
    # words
    r"\text{ cm. }": (r"\\text\s*\{\s*([^{}]*?)[\s.,]*\}", r"\\text{\1}"),
    r"\mathrm{i}": (r"\\text\{([ied])\}", r"\1"),
    "12th": (r"(?<=\d)\s*\^?\s*\{?\s*(?:\\text\{)?(?:st|nd|rd|th)(?![a-z])\s*\}{0,2}", " "),
    r"\text{a and b}": (
        rf"\\text\{{([^{{}}]*[^{{}},\s]),? {AND}\b\s*([^{{}}]*)\}}",
        r"\\text{\1},\2",
    ),
    "1 and 2": (rf",?\s*\\text\{{\s*{AND},?\}}(?!\s*$)|,? {AND} (?![^{{}}]*\}})", ","),
    "percent": (r"\\%|\s*(?:\\text\{)?percent\}?$", "%"),
    "degrees": (r"\^\s*\{?\s*°\s*\}?|\s*(?:\\text\{)?degrees\}?$", "°"),
    "73 apples": (
        rf"(?<=[\d}}°])(?:\s+(?=[A-Za-z]{{4}})|\s*(?=(?:{BARE_UNITS})(?![a-z])))"
        r"([A-Za-z]+(?:[ /][A-Za-z]+)*)(?=(?:\^\{?\d\}?)?$)",
        r"\\text{\1}",
    ),
    # mathematics as programs write it
    "x**2": (r"\*\*", "^"),
    "1e-5": (r"^(-?[\d.]+)[eE]([+-]?\d+)\s*(?=$|\\text)", r"\1\\times 10^{\2}"),
    "sqrt(2)": (rf"\\sqrt\s*{PARENTHESES}", r"\\sqrt{\1}"),
    "x^(2)": (rf"\^\s*{PARENTHESES}", r"^{\1}"),
    "x^-1": (r"\^\s*(-\w+)", r"^{\1}"),
    "+5": (r"(^|[(\[{,=])\s*\+", r"\1"),
    # braces
    r"\frac12": (r"\\(frac|binom|sqrt)\s*(\w)", r"\\\1{\2}"),
    r"\frac{1}2": (rf"(\\(?:frac|binom)\s*{BRACES})\s*(\w)", r"\1{\2}"),
    r"\log_2 8": (r"\\log\s*_\s*(?:\{(\w+)\}|(\w))\s*(\d+)", r"\\log_{\1\2}(\3)"),
    r"{\bf x}": (r"(?<![\\\w}\]^_])\{(\w)\}", r"\1"),
    r"\{x | 2 < x\}": (r"^\\\{\s*(\w)\s*[|:](?=.*(?:[<>]|\\[lg]eq))(.*\b\1\b.*)\\\}$", r"\2"),
}
REWRITINGS = {name: (re.compile(old), new) for name, (old, new) in REWRITINGS.items()}


def plain(text):
    """An answer (str) in the one of its spellings that the functions below expect."""
    text = text.translate(CHARACTERS)
    for pattern, replacement in REWRITINGS.values():
        text = pattern.sub(replacement, text.strip())
    if not re.search(r"[(\[]|\\\{", text):  # in brackets a comma separates
        thousands = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])"
        text = re.sub(thousands, lambda number: number[0].replace(",", ""), text)
    while re.fullmatch(BRACES, text):
        text = text[1:-1].strip()
    return text


def spelled(text):
    """A plain text without what changes nothing: spaces, {x} for x, capitals of words."""
    text = re.sub(r"(?<![\\A-Za-z])[A-Za-z][a-z]{2,}", lambda word: word[0].lower(), text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\{(\w)\}", r" \1 ", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # but 5 3 is not 53


# ------------------------------------------------------------------------------------------------
# Structure: choices, lists, names, intervals, units
# ------------------------------------------------------------------------------------------------

CHOICE = re.compile(
    r"""
    \W* (?: (?:option|choice|answer) [\s:]* )?
    (?: [(\[] \s* ([A-J]) \s* [)\]]                              # (C), and whatever follows
      | ([A-J]) (?: $ | \s*[.:)] (?=\s|$) | (?=\s*\() ) )        # C alone, C. 12 m, C (12 m)
    (?! \s* (?: (?:[,;/&]|and|or) \s* )+ [(\[]? [A-J]\b          # and no second letter
      | \s* [(\[] [A-J] [)\]] )
    """,
    re.IGNORECASE | re.VERBOSE,
)
NAME = re.compile(
    r"""
    (?! \\pi | \\infty | \\not )
    (?: \\text\{[^{}]*\} | \\?[A-Za-z] | \\[a-z]+ | [A-Z]{2,3} | [A-Za-z]{3,}
      | \( \s* [a-z] (?: \s*,\s* [a-z] )+ \s* \) )               # (x, y)
    (?: _ (?: \w | \{[^{}]*\} ) )?                               # x_1
    (?: \( [\w,\ \\]* \) )?                                      # f(x)
    """,
    re.VERBOSE,
)
SIGNS = r"[=<>]|\\(?:approx|leq|geq|neq|in)(?![A-Za-z])"
FLIPPED = {">": "<", r"\geq": r"\leq"}
UNIT = re.compile(
    r"""
    (?<= [\w})|°%!.] ) \s*
    ((?: \\text\{[^{}]*\} (?: \^ (?: \d | \{-?\d\} ) )? (?: \s | / )* | ° \s* [CFK]? | % )+) $
    | ^(?: \\\$ | [€£] ) | (?: \\\$ | [€£] )$
    """,
    re.VERBOSE,
)
UNITS = {"meter": "m", "centimeter": "cm", "kilometer": "km", "inch": "in", "inche": "in"}
UNITS |= {"feet": "ft", "foot": "ft", "gram": "g", "kilogram": "kg", "mile": "mi"}
UNITS |= {"second": "s", "minute": "min", "hour": "h", "dollar": "$"}
NEVER_FORGIVEN = re.compile(
    r"%|illion|thousand|hundred|dozen|hal[fv]|third|quarter|fifth|tenth|percent|squared|cubed"
    r"|\b(?:is|no|not|or|less|more|fewer|most|least|over|under|than|mod|modulo|base|factorial"
    r"|times|pi|root|minus|negative)\b",
    re.IGNORECASE,
)


def split(text, separators):
    """(parts, separators) of a text, cut at separators (a regex) that stand in no brackets."""
    parts, found, depth, start = [], [], 0, 0
    for match in re.finditer(rf"\\?[()\[\]{{}}]|(?P<separator>{separators})", text):
        if match["separator"] is None:
            depth += 1 if match[0][-1] in "([{" else -1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            found.append(match[0])
            start = match.end()
    return [*parts, text[start:].strip()], found


def items(text):
    r"""The items of a list, a set or a union; a \pm makes two of one."""
    braces = re.fullmatch(r"\\\{(.*)\\\}", text)
    if braces and len(split(text, r"\\cup")[0]) == 1:
        text = braces[1]
    found = []
    for item in split(text, r"[,;]|\\cup(?![A-Za-z])")[0]:
        if re.search(r"\\pm(?![A-Za-z])", item):
            found.append(item.replace(r"\pm", "+").removeprefix("+"))
            item = item.replace(r"\pm", "-")
        found.append(item)
    return found


def same_lists(given, wanted):
    """Whether the items of two lists are the same, in any order.

    The order counts where only one side says which value has which name: 1,2 for x=1,y=2.
    """
    given, left = items(given), items(wanted)
    if len(given) != len(left):
        return False
    if len(left) > 1:
        names, others = ({name_and_value(item)[0] for item in side} for side in (given, left))
        if (names == {None} and len(others) > 1) or (others == {None} and len(names) > 1):
            return all(map(same_items, given, left))
    for item in given:
        found = next((i for i, other in enumerate(left) if same_items(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


@functools.lru_cache(4096)
def name_and_value(item):
    """(name, value) of an item, each str or None.

    x = 5 and 2 < x < 3 have the name x and the values 5 and (2,3). A value alone has no name. What
    says something else has no value: x + y = 5.
    """
    sides, signs = split(item, SIGNS)
    if not signs:
        return None, item
    if signs[0] in FLIPPED:
        sides, signs = sides[::-1], [FLIPPED.get(sign, sign) for sign in signs[::-1]]
    if set(signs) <= {"=", r"\approx"} or (signs == [r"\in"] and is_name(sides[0])):
        name = sides[0] if is_name(sides[0]) else None
        values, signs = (sides[1:], signs[1:]) if is_name(sides[0]) else (sides, signs)
        if all(map(same_in_chain, [values[0]] * len(signs), signs, values[1:])):
            return name, values[0]
    if set(signs) <= {"<", r"\leq"}:
        if len(sides) == 2 and is_name(sides[0]):
            sides, signs = [r"-\infty", *sides], ["<", *signs]
        elif len(sides) == 2:
            sides, signs = [*sides, r"\infty"], [*signs, "<"]
        if len(sides) == 3 and is_name(sides[1]):
            opening, closing = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
            return sides[1], f"{opening}{sides[0]},{sides[2]}{closing}"
    return None, None


def is_name(side):
    """Whether one side of a relation is a name, or is missing, as in < 3."""
    return not side or NAME.fullmatch(side) is not None


def same_in_chain(value, sign, other):
    r"""Whether 5 = 2 + 3 or 2/3 \approx 0.67 is true."""
    if same_values(value, other):
        return True
    a, b = read(value), read(other)
    return sign == r"\approx" and None not in (a, b) and is_rounded(a, b, value, other, least=1)


def same_items(given, wanted):
    """Whether two items have the same value, or are the same relation."""
    if spelled(given) == spelled(wanted):
        return True
    (name, value), (other, other_value) = name_and_value(given), name_and_value(wanted)
    if name and other and spelled(name) != spelled(other):
        return False
    if value is not None and other_value is not None:
        return same_values(value, other_value)
    (sides, signs), (others, other_signs) = split(given, SIGNS), split(wanted, SIGNS)
    if len(signs) != 1 or signs != other_signs:
        return False
    if all(map(same_values, sides, others)):
        return True
    a, b, c, d = map(read, sides + others)
    return signs == ["="] and None not in (a, b, c, d) and are_multiples(a - b, c - d)


def same_values(given, wanted):
    """Whether two pairs or intervals have the same brackets and parts, or two values agree."""
    if spelled(given) == spelled(wanted):
        return True
    parts = []
    for text in (given, wanted):
        in_brackets = re.fullmatch(r"[(\[](.*)[)\]]", text)
        parts.append(split(in_brackets[1], ",")[0] if in_brackets else [])
    if max(map(len, parts)) > 1:
        same_brackets = given[0] == wanted[0] and given[-1] == wanted[-1]
        return same_brackets and len(parts[0]) == len(parts[1]) and all(map(same_values, *parts))
    (given, unit), (wanted, other) = value_and_unit(given), value_and_unit(wanted)
    a, b = read(given), read(wanted)
    if a is None or b is None:
        return False
    if unit == "%" and not other:  # 28% is 0.28; it is 28 too, but 0.5% is not 0.5
        return a == 100 * b or (given == wanted and b > 1)
    if other == "%" and not unit:
        return a == b or agree(100 * a, b) or is_rounded(100 * a, b, given, wanted, least=1)
    if unit != other and ((unit and other) or b.free_symbols):
        return False
    if unit != other and NEVER_FORGIVEN.search(unit + other):
        return False
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        pairs = list(zip(a, b)) if a.shape == b.shape else []
    else:
        pairs = [(a, b)]
    return bool(pairs) and all(agree(x, y) or is_rounded(x, y, given, wanted) for x, y in pairs)


def value_and_unit(text):
    """A text without its unit, and the unit, which may be ""."""
    unit = UNIT.search(text)
    if not unit or unit[0] == text or re.search(rf"\\(?:{FUNCTIONS})", text):
        return text, ""
    words = re.findall(r"[A-Za-z]+|\S", re.sub(r"\\text|[{}\\]|\^1", "", unit[0]))
    words = [word.lower().removesuffix("s") if len(word) > 3 else word for word in words]
    return UNIT.sub("", text).strip(), " ".join(UNITS.get(word, word) for word in words)


# ------------------------------------------------------------------------------------------------
# Values: reading and comparing
# ------------------------------------------------------------------------------------------------

GREEK = "alpha|beta|gamma|Gamma|delta|Delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega"
READABLE = re.compile(
    rf"""
    (?: \\ (?: frac | sqrt | binom | pi | cdot | times | div | {FUNCTIONS} | {GREEK} | ell | hbar
             | [lr]floor | [lr]ceil | (?:begin|end)\{{[pb]matrix\}} ) (?![A-Za-z])
      | \\\\ | [0-9A-Za-z+\-*/^_{{}}()\[\].|!&°\s] )+
    """,
    re.VERBOSE,
)
MISREAD = {  # what latex2sympy reads otherwise than people do: its pattern
    "5 3": r"\d\s+[\d.]",
    r"(5)3, \sqrt12": r"(?<!matrix)[})!]\s*\d",
    "5{3}": r"\d\s*\{",
    "1/2x": r"/\s*(?:\d+|[A-Za-z])\s*(?:[A-Za-z(]|\\(?!cdot|times|rceil|rfloor|end)[A-Za-z])",
    r"\sin x/2": rf"\\(?:{FUNCTIONS})(?![A-Za-z])(?:\^(?:\w|\{{[^{{}}]*\}}))?[^+\-,(){{}}]*"
    r"(?:/|\*|\\cdot|\\times)",
    "ABC, a name": r"(?<![\\A-Za-z{])[A-Za-z]{3,}",
    r"\frac{dx}{dt}": r"\{d[\w\s\\]*\}\s*\{d[\w\s\\]",
    "y^{(4)}": r"\^\s*\{\s*\(",
    "52_8": r"\d\s*_",
    "n!!, |x|y||": r"!!|\|\s*\|",
    "2^3^4": r"\^\s*\w\s*\^",
    "what takes hours": r"\d\s*\^\s*\{[^{}]*\^|\^\s*\{?-?\d{5}|\d{5}\)?!|!\s*\)\s*!|[({]{8}",
}
MISREAD = re.compile("|".join(MISREAD.values()))
RENAMED = {r"\gamma": r"\upsilon ", r"\Gamma": r"\Upsilon ", "I": r"\Xi ", "E": r"\varpi "}


@functools.lru_cache(4096)
def read(text):
    """An exact sympy expression or matrix, or None for what is only compared as text.

    Decimals become fractions and degrees radians. i is the imaginary unit, e is Euler's number.
    """
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", text):
        return sympy.Rational(text)
    if not READABLE.fullmatch(text) or MISREAD.search(text):
        return None
    for above, below in re.findall(r"\d\s*\\frac\{(\d+)\}\{(\d+)\}", text):
        if int(above) >= int(below):  # 5\frac{9}{2} may be a mixed number or a product
            return None
    text = re.sub(r"([\w.]+)\s*°", r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"((?<![\^_\d.])[\d.]+|\))\s*(?=\()", r"\1\\cdot ", text)  # else 2(3) is 5
    text = re.sub(r"\\[A-Za-z]+|[A-Za-z]", lambda name: RENAMED.get(name[0], name[0]), text)
    config = ConversionConfig(lowercase_symbols=False)
    try:
        found = latex2sympy(text, normalization_config=None, conversion_config=config)
    except Exception:  # it raises errors of all kinds at what is not its LaTeX
        return None
    if not isinstance(found, sympy.Expr | sympy.MatrixBase):
        return None
    exact = {number: sympy.Rational(str(number)) for number in found.atoms(sympy.Float)}
    return found.xreplace({sympy.Symbol("i"): sympy.I, **exact}).doit()


def agree(a, b):
    """Whether two expressions have the same values at random points, of which one is defined."""
    if a.has(sympy.oo, sympy.zoo, sympy.nan) or b.has(sympy.oo, sympy.zoo, sympy.nan):
        return False
    if a == b or (a.is_Rational and b.is_Rational):
        return a == b
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    zero = sympy.Float("1e-30" if symbols else "1e-50")
    dice = random.Random(0)
    compared = False
    for low in (1, 1, -4) * (10 if a.has(sympy.floor, sympy.ceiling) else 1):
        point = {symbol: sympy.Float(dice.uniform(low, 4), 60) for symbol in symbols}
        x, y = (sympy.N(side.subs(point), 60) for side in (a, b))
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            continue
        largest = max(abs(x), abs(y))
        if largest > zero and abs(x - y) > 1e-30 * largest:
            return False
        compared = True
    return compared


def are_multiples(a, b):
    """Whether a = 0 and b = 0 are the same equation up to a factor."""
    symbols = sorted(a.free_symbols, key=str)
    point = {symbol: sympy.Rational(17 + n, 5 + 2 * n) for n, symbol in enumerate(symbols)}
    return bool(symbols) and agree(a * b.subs(point), b * a.subs(point))


def is_rounded(a, b, given, wanted, least=2):
    """Whether two numbers are one number, rounded in one of their texts.

    A given decimal needs six places. An exact number is rounded to the places of the reference, of
    which there are `least` or more.
    """
    own, other = (
        min(map(len, re.findall(r"\.(\d+)", text)), default=0) for text in (given, wanted)
    )
    if a.free_symbols or b.free_symbols or not (own >= 6 or (own == 0 and other >= least)):
        return False
    difference = abs(sympy.N(a - b, 40))
    half = sympy.Rational(51, 100) / 10 ** min(own or other, 12)
    return bool(difference <= half and difference <= abs(b) / 50)


# ------------------------------------------------------------------------------------------------
# Many answers
# ------------------------------------------------------------------------------------------------


def reward(response, answer):
    """`grade` of one response in a worker process, which is kept: 0.0 where it misses 5 seconds."""
    return _own_verifier().score([response], [answer])[0]


@functools.cache
def _own_verifier():
    return Verifier(workers=1)  # its worker ends with the program


class Verifier:
    """A pool of worker processes; use it in a `with` block.

    Args:
        workers: how many; by default this rank's share of the cores, 8 at most.
        deadline: seconds for one answer.
        memory: bytes that a worker may take beyond its imports.
        function: "MODULE:FUNCTION" of (response, answer) -> a number from 0 to 1. A file MODULE.py
            in the current directory comes first. It is read once, so all workers have the same.

    Raises:
        SystemExit: where the function cannot be loaded, raises, or returns something else.

    `timeouts` counts the lost answers, which missed the deadline or took their worker down.
    """

    def __init__(self, workers=None, deadline=5.0, memory=2**30, function=GRADE):
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = workers or min(8, max(1, os.cpu_count() // ranks))
        self.deadline, self.memory, self.function = deadline, memory, function
        self.timeouts = self.lost_in_a_row = 0
        file = Path(function.partition(":")[0].replace(".", "/") + ".py").absolute()
        self.file = ["", ""]  # the path and the text of the user's file
        if function == GRADE and file.is_file() and not file.samefile(__file__):
            print(f"the verifier is the built-in {GRADE}, not {file}", file=sys.stderr)
        elif function != GRADE and file.is_file():
            with tokenize.open(file) as source:  # in the encoding that the file declares
                self.file = [str(file), source.read()]
        self.idle = queue.SimpleQueue()
        # They live as long as the pool: the kernel ends a worker with the thread that started it.
        self.threads = ThreadPoolExecutor(workers)
        for worker in self.threads.map(lambda _: self._start(), range(workers)):
            self.idle.put(worker)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)
        while not self.idle.empty():
            _kill(self.idle.get())

    def score(self, responses, answers):
        """Rewards in the order of the responses; rank 0 shows progress on a terminal.

        Args:
            responses: list of str.
            answers: list of the same length, of what `grade` takes as an answer.

        Returns:
            A list of floats. A lost answer has 0.0.

        Raises:
            SystemExit: where this call and those before it lost every answer, ALL_LOST or more.
                Every group would look unsolved, and HPT would be SFT without a word.
        """
        questions = list(zip(responses, answers, strict=True))
        hidden = None if os.environ.get("RANK", "0") == "0" else True  # None: on no terminal
        scored = self.threads.map(self._score, questions)
        scores = list(tqdm(scored, "grading", len(questions), leave=False, disable=hidden))
        lost = scores.count(None)
        self.timeouts += lost
        self.lost_in_a_row = self.lost_in_a_row + lost if lost == len(scores) else 0
        if self.lost_in_a_row >= ALL_LOST:
            raise SystemExit(
                f"error: --reward {self.function} lost all of the last {self.lost_in_a_row} "
                f"answers: its process died or took more than {self.deadline:g} s at each; run the "
                "function by hand on one response"
            )
        return [score or 0.0 for score in scores]

    def _score(self, question):
        """The score of a (response, answer) pair, None where it is lost."""
        worker = self.idle.get()
        try:
            said = _ask(worker, question, self.deadline)
            if said is None:
                _kill(worker)
                worker = self._start()
        finally:
            self.idle.put(worker)
        if isinstance(said, str):
            raise SystemExit(f"error: --reward {self.function} {said}")
        return said

    def _start(self):
        """A new worker: a fresh interpreter, which inherits no CUDA, no threads, no sockets."""
        program = [sys.executable, os.path.abspath(__file__), self.function, str(self.memory)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        worker = subprocess.Popen([*program, str(os.getpid())], start_new_session=True, **pipes)
        said = _ask(worker, self.file, START)
        if said == 1.0:
            return worker
        _kill(worker)
        said = said or f"its process ends, or takes more than {START:.0f} s to start"
        where = f"{self.function} ({self.file[0]})" if self.file[0] else self.function
        raise SystemExit(f"error: --reward {where} cannot be loaded: {said}")


def _ask(worker, question, deadline):
    """What a worker says to a question, or at its start to the user's file, [path, text].

    Returns:
        A number, or what is wrong (str), or None where it misses the deadline (seconds) or dies.
    """
    try:
        worker.stdin.write(json.dumps(question).encode() + b"\n")
        worker.stdin.flush()
        answered = select.poll()  # select.select knows only the first 1024 files of a program
        answered.register(worker.stdout, select.POLLIN)
        said = worker.stdout.readline() if answered.poll(1000 * deadline) else b""
    except BrokenPipeError:
        return None
    return json.loads(said) if said else None


def _kill(worker):
    """End a worker and what a function of the user's may have started."""
    if worker.returncode is None:  # after that its number may be another process's
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    worker.stdout.close()


# ------------------------------------------------------------------------------------------------
# The worker's side
# ------------------------------------------------------------------------------------------------


def _worker(name, memory, parent):
    """Read [path, text] of the user's file and say 1.0; then answer each line [response, answer].

    Args:
        name: "MODULE:FUNCTION".
        memory: bytes that it may take beyond its imports.
        parent: the process that started it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)  # works in a long C call too
    if os.getppid() != parent:  # the parent has gone already
        return
    questions, out = os.fdopen(os.dup(0)), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # nothing that a function prints may pass for an answer
    sys.path.append(os.getcwd())
    try:
        module, _, function = name.partition(":")
        path, text = json.loads(questions.readline())
        if path:  # under a name of its own, since a file may be called calendar.py
            own = types.ModuleType(f"reward_of_the_user_{module}")
            own.__file__, sys.modules[own.__name__] = path, own
            sys.path.insert(0, os.getcwd())  # what it imports may lie beside it
            exec(compile(text, path, "exec"), vars(own))
            sys.path.pop(0)
        score = getattr(own if path else importlib.import_module(module), function)
        if name == GRADE and score(r"\boxed{\sin^2 x+\cos^2 x}", "1") != 1.0:
            raise ImportError("sin^2 x + cos^2 x is not 1 by math-verify; install it again")
    except Exception as error:  # whatever a module of the user's may raise
        _say(out, f"{type(error).__name__}: {error}")
        return
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    _say(out, 1.0)
    for line in questions:
        response, answer = json.loads(line)
        try:
            value = float(score(response, answer))
            # 0.7 + 0.2 + 0.1 is 0.9999999999999999, and is meant as 1.
            value = next((end for end in (0.0, 1.0) if abs(value - end) <= 1e-6), value)
            wrong = f"returned {value}, not a number from 0 to 1, for {response[-60:]!r}"
            _say(out, value if 0 <= value <= 1 else wrong)
        except MemoryError:
            _say(out, None)  # as a missed deadline: the worker is replaced
        except Exception as error:
            _say(out, f"raised {type(error).__name__}: {error}, for {response[-60:]!r}")


def _say(out, what):
    os.write(out, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    _worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
