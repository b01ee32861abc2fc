r"""What the text of an answer says: from LaTeX or plain text to expressions and structures.

    tokens = tokenize(clean(text))     markup is taken off; nothing that has a meaning is dropped
    spelled(tokens)                    the same text up to spacing and markup is the same string
    Reader(tokens).answer()            what it says, or NotUnderstood

`Reader` follows a grammar and reads to the end or raises. It builds a `Value` (a sympy expression
with its unit) or one of the structures around values: `Group`, `Joined`, `Matrix`, `Relation`,
`Many`, `Based`, `Text`. This module imports nothing of ours.
"""

import re
from dataclasses import dataclass

import sympy


class NotUnderstood(Exception):
    """The text does not follow the grammar, so that it can only be compared as text."""


# ------------------------------------------------------------------------------------------------
# Vocabulary
# ------------------------------------------------------------------------------------------------


def _commands(names):
    """A set of LaTeX commands, from their names."""
    return {"\\" + name for name in names.split()}


def _spellings(table):
    """{spelling: name} of a table {name: its spellings}."""
    return {spelling: name for name, spellings in table.items() for spelling in spellings.split()}


GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
GREEK_LETTERS = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
SYMBOLS = _commands(
    GREEK + " Upsilon varepsilon vartheta varrho varsigma varphi hbar ell aleph emptyset "
    "mathbb{N} mathbb{Z} mathbb{Q} mathbb{R} mathbb{C}"
) - {"\\pi"}


def _common_logarithm(argument):
    return sympy.log(argument, 10)


FUNCTIONS = {
    "\\sin": sympy.sin,
    "\\cos": sympy.cos,
    "\\tan": sympy.tan,
    "\\cot": sympy.cot,
    "\\sec": sympy.sec,
    "\\csc": sympy.csc,
    "\\arcsin": sympy.asin,
    "\\arccos": sympy.acos,
    "\\arctan": sympy.atan,
    "\\sinh": sympy.sinh,
    "\\cosh": sympy.cosh,
    "\\tanh": sympy.tanh,
    "\\ln": sympy.log,
    "\\log": _common_logarithm,
    "\\lg": _common_logarithm,
    "\\exp": sympy.exp,
    "\\abs": sympy.Abs,
}
INVERSES = {"\\sin": sympy.asin, "\\cos": sympy.acos, "\\tan": sympy.atan}
TRIGONOMETRIC = _commands("sin cos tan cot sec csc")
OPAQUE_FUNCTIONS = _commands("gcd lcm max min")  # only the same arguments give the same value
# Letters that stand for a function wherever a parenthesis follows. Others do so only before a
# single symbol or number, as in x(t) and I(0), and multiply a longer parenthesis, as in n(n+1).
FUNCTION_LETTERS = set("fghFGHPu")
ACCENTS = _commands(
    "overline bar vec hat tilde dot ddot widehat widetilde overrightarrow overleftrightarrow"
)
NAMES = SYMBOLS | ACCENTS | _commands("angle triangle")
STARTS = NAMES | FUNCTIONS.keys() | OPAQUE_FUNCTIONS
STARTS |= _commands("frac sqrt binom pi infty lfloor lceil")

ALIASES = _spellings(  # spellings of one and the same command
    {
        "\\frac": r"\dfrac \tfrac \cfrac",
        "\\binom": r"\dbinom \tbinom",
        "\\leq": r"\le \leqslant",
        "\\geq": r"\ge \geqslant",
        "\\neq": r"\ne",
        "\\approx": r"\approxeq",
        "<": r"\lt",
        ">": r"\gt",
        "*": r"\ast",
        "\\cdot": r"\cdotp",
        "\\setminus": r"\smallsetminus \backslash",
        "\\{": r"\lbrace",
        "\\}": r"\rbrace",
        "[": r"\lbrack",
        "]": r"\rbrack",
        "|": r"\lvert \rvert \vert",
        "\\emptyset": r"\varnothing",
        "\\infty": r"\infinity \inf \oo",
        "\\circ": r"\degree",
        "\\ldots": r"\dots \cdots \dotsc",
        "\\arcsin": r"\asin",
        "\\arccos": r"\acos",
        "\\arctan": r"\atan",
        "'": r"\prime",
        "i": r"\imath",
        "and": r"\land",
        "or": r"\lor",
    }
)
UNICODE = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": r"\div ",
    "≤": r"\leq ",
    "≥": r"\geq ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "√": " sqrt ",
    "°": r"^\circ ",
    "′": "'",
    "’": "'",
    "″": "''",
    "…": r"\ldots ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "ℝ": r"\mathbb{R}",
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
    **{letter: f"\\{name} " for letter, name in zip(GREEK_LETTERS, GREEK.split(), strict=True)},
}
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"

SILENT = _commands(  # commands that change only how a text looks
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle "
    "scriptstyle limits quad qquad enspace thinspace it bf rm sf tt bfseries itshape large Large "
    "LARGE huge Huge normalsize small footnotesize scriptsize tiny centering boldmath nonumber "
    "allowbreak nobreak hfill"
)
STYLES = _commands(  # commands whose argument stays what it is
    "mathbf mathit mathsf mathtt mathcal mathscr mathfrak mathnormal mathop mathrel mathord "
    "boldsymbol bm pmb underline boxed fbox emph ensuremath"
)
UPRIGHT = _commands(  # commands whose argument is words, or upright letters
    "text textbf textit textrm textsf texttt textnormal textup textmd textsc mbox hbox mathrm "
    "operatorname operatorname* textsuperscript"
)
COLOURS = _commands("textcolor color colorbox")
ENVIRONMENTS = {"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"}
MARKS = {"<=": "\\leq", ">=": "\\geq", "!=": "\\neq", "==": "=", "\\%": "%", "\\|": "‖"}

RELATIONS = {"=", "\\approx", "\\neq", "<", ">", "\\leq", "\\geq", "\\in"}
SEPARATORS = {",", ";", "and", "or"}
CLOSING = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle"}
BRACKETS = CLOSING.keys() | CLOSING.values() | {"{", "}"}

CURRENCIES = {"\\$": "$", "€": "EUR", "£": "GBP"}
SCALES = {  # words that multiply
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
UNITS = _spellings(  # spellings of units in the singular; short ones keep their case
    {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "dm": "dm decimeter decimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "nm": "nm nanometer nanometre",
        "inch": "inch in",
        "ft": "ft foot feet",
        "yd": "yd yard",
        "mile": "mile mi",
        "g": "g gram gm",
        "kg": "kg kilogram",
        "mg": "mg milligram",
        "lb": "lb pound",
        "oz": "oz ounce",
        "ms": "ms millisecond",
        "s": "s second sec",
        "minute": "minute min",
        "hour": "hour h hr",
        "day": "day",
        "week": "week wk",
        "month": "month",
        "year": "year yr",
        "L": "L l liter litre",
        "mL": "mL ml milliliter millilitre",
        "°": "degree deg",
        "C": "C celsius",
        "F": "F fahrenheit",
        "K": "K kelvin",
        "rad": "rad radian",
        "$": "dollar usd USD buck",
        "cent": "cent",
        "EUR": "EUR euro",
        "GBP": "GBP",
        "Hz": "Hz hertz",
        "N": "N newton",
        "J": "J joule",
        "kJ": "kJ kilojoule",
        "W": "W watt",
        "kW": "kW kilowatt",
        "V": "V volt",
        "A": "A ampere amp",
        "eV": "eV electronvolt",
        "Pa": "Pa pascal",
        "kPa": "kPa kilopascal",
        "mol": "mol mole",
        "mph": "mph",
        "unit": "unit",
        "erg": "erg",
        "AM": "AM am",
        "PM": "PM pm",
        "th": "th st nd rd",
        "%": "percent pct percentage",
    }
)
BASES = {  # bases by name
    name: base
    for base, name in enumerate(
        (
            *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
            *("twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
        ),
        start=2,
    )
}
# Names and units that are read without a backslash or \text{}. mg and ms are often products.
PLAIN_NAMES = FUNCTIONS.keys() | OPAQUE_FUNCTIONS
PLAIN_NAMES |= _commands("pi sqrt infty infinity inf oo alpha beta gamma delta theta lambda sigma")
PLAIN_NAMES |= _commands("omega phi tau rho")
PLAIN_UNITS = {"mm", "cm", "km", "kg", "ml", "mL", "in", "ft", "yd", "lb", "oz", "hr", "am", "pm"}
DEGREE = sympy.Symbol("°")
INFINITY = sympy.Symbol("∞")  # sympy's own would swallow the 1 of \infty + 1
SIGN = sympy.Symbol("±")  # 1 in the first value of an expression with \pm, -1 in the second


# ------------------------------------------------------------------------------------------------
# From text to tokens
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A piece of an answer.

    kind: "number", "letter" (one, italic), "command", "word" (upright letters) or "mark".
    spaced: whether white space stood before it.
    """

    kind: str
    text: str
    spaced: bool = False


TOKEN = re.compile(
    r"""
    (?P<space>    \s+ | ~ | \\[,;:!>\ \n] )
  | (?P<row>      \\\\ (?: \s*\[ [\d.]+ \w\w \] )? )          # a new row of a matrix, with its gap
  | (?P<command>  \\ (?: [A-Za-z]+ \*? ) )
  | (?P<escaped>  \\ [^A-Za-z] )                              # \{ \} \% \$ \|
  | (?P<number>   [0-9]+ (?:\.[0-9]*)? | \.[0-9]+ )
  | (?P<letters>  [A-Za-z]+ )
  | (?P<mark>     \*\* | <= | >= | != | == | . )
    """,
    re.VERBOSE | re.DOTALL,
)
# 4.5e33: only as a whole value, since 3x+2e-3 has an e that is a number
SCIENTIFIC = re.compile(
    r"""
    (?P<before>  (?: ^ | [=(\[,;{] | \\approx ) \s* [+-]? \s* )
    (?P<digits>  \d+\.?\d* | \.\d+ )  [eE]  (?P<power> [+-]?\d+ )
    (?= \s* (?: $ | [,;)\]}] | \\text | \\mathrm | \\mbox | \\[,;:\ ] | ~ | \s[A-Za-z] ) )
    """,
    re.VERBOSE,
)
# 1{,}000 1,\!000 1\,000 1\ 000 1~000 1 000: a group of three digits after one to three
THOUSANDS = re.compile(
    r"""
    (?<! [\d.,_^] ) (?<! \\frac ) (?<! \\sqrt )
    [1-9]\d{0,2} (?: (?: \{,\} | ,\\! | \\[,;:!\ ] | ~ | [ ] ) \s* \d{3} )+
    (?! \d )
    """,
    re.VERBOSE,
)
PLAIN_THOUSANDS = re.compile(r"(?<![\d.,_^])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
OPENING_BRACKETS = re.compile(r"\\left|\\\{|\\lbrace|\\langle|\\begin\{|[(\[]")


def clean(text):
    """`text` without what stands around an answer, and with one spelling of what has many."""
    text = "".join(UNICODE.get(character, character) for character in text)
    text = _lower_and_upper(text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text).strip()  # \( and \[ begin a formula
    for fence in (
        "**",
        "__",
        "`",
        "*",
        '"',
    ):  # Markdown around the whole
        inside = text[len(fence) : -len(fence)]
        if text.startswith(fence) and text.endswith(fence) and inside and fence not in inside:
            text = inside
    text = re.sub(r"\^\s*\{\s*(\\rm\s*)?(st|nd|rd|th)\s*\}", r"^{\\text{th}}", text)  # 12^{th}
    text = re.sub(r"(?<!\\)\$", " ", text)  # $ around formulas; \$ is a currency
    text = re.sub(r"\\[a-z]?space\*?\{[^{}]*\}|\\phantom\{[^{}]*\}|\\hfill", " ", text)
    text = re.sub(r"\bnp\.(?=[a-z])", "", text)  # np.arcsin(10/13), in Minerva
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)  # 7 a.m.
    text = THOUSANDS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    if not OPENING_BRACKETS.search(text):  # in brackets a comma separates
        text = PLAIN_THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    text = SCIENTIFIC.sub(r"\g<before>\g<digits>\\times 10^{\g<power>}", text)
    return text.strip().removesuffix("\\\\").rstrip(" \n\t.,;:")


def _lower_and_upper(text):
    """`text` with its subscript and superscript characters in braces after _ and ^."""
    for sign, characters in (("^", SUPERSCRIPTS), ("_", SUBSCRIPTS)):
        text = re.sub(f"([{characters}]+)", rf"{sign}{{\1}}", text)
        text = text.translate(str.maketrans(characters, "0123456789"))
    return text


def tokenize(text, upright=None):
    r"""The tokens of a cleaned text. Markup is gone, spaces are only remembered.

    upright: the command, \text or one of its like, whose argument `text` is.
    """
    tokens, at, spaced = [], 0, True
    while at < len(text):
        match = TOKEN.match(text, at)
        kind, piece, at = match.lastgroup, match.group(), match.end()
        if kind == "command":
            added, at = _command(ALIASES.get(piece, piece), text, at, spaced)
            tokens += added
        elif kind == "letters" and upright:
            tokens.append(_upright_letters(piece, upright, spaced))
        elif kind == "letters":
            tokens += _letters(piece, tokens, text[at : at + 1], spaced)
        elif kind == "number":
            tokens.append(Token("number", piece, spaced))
        elif kind == "row":
            tokens.append(Token("mark", "\\\\"))
        elif kind != "space" and piece != "\\":
            tokens.append(Token("mark", MARKS.get(piece, piece), spaced))
        spaced = kind == "space" or (piece in SILENT and spaced)
    return tokens


def _command(name, text, at, spaced):
    """The tokens of the command that ends at `at`, and where what belongs to it ends."""
    if name in ("\\left", "\\right", "\\middle"):
        dot = re.compile(r"\s*\.").match(text, at)  # an invisible delimiter
        return [], dot.end() if dot else at
    if name in COLOURS:
        return [], _argument(text, at)[1]
    if name in UPRIGHT:
        content, at = _argument(text, at)
        return tokenize(content, upright=name), at
    if name in ("\\begin", "\\end", "\\mathbb"):
        content, at = _argument(text, at)
        if name == "\\begin" and content == "array":
            at = _argument(text, at)[1]  # how the columns are aligned
        return [Token("command", f"{name}{{{content.strip()}}}", spaced)], at
    if name in SILENT or name in STYLES:
        return [], at
    if name.startswith("\\") and name not in CLOSING and name not in CLOSING.values():
        return [Token("command", name, spaced)], at
    return [Token("letter" if name.isalpha() else "mark", name, spaced)], at


def _argument(text, at):
    """The argument of a command that ends at `at`, braced or one character, and where it ends."""
    while text[at : at + 1].isspace():
        at += 1
    if text[at : at + 1] != "{":
        return text[at : at + 1], at + 1
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, at):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[at + 1 : brace.start()], brace.end()
    raise NotUnderstood("a brace is not closed")


def _upright_letters(letters, command, spaced):
    r"""The token of a run of letters inside \text{} and its like."""
    if letters in ("and", "or"):
        return Token("mark", letters)
    name = ALIASES.get("\\" + letters, "\\" + letters)
    if command in ("\\operatorname", "\\mathrm") and name in FUNCTIONS.keys() | OPAQUE_FUNCTIONS:
        return Token("command", name, spaced)
    if letters in ("i", "e", "d"):  # the imaginary unit, Euler's number, a differential
        return Token("letter", letters, spaced)
    return Token("word", letters, spaced)


def _letters(run, before, following, spaced):
    """The tokens of a run of plain letters: a name, a word, or one symbol per letter."""
    name = ALIASES.get("\\" + run, "\\" + run)
    last = before[-1] if before else None
    glued = last is not None and not spaced and last.text not in RELATIONS | SEPARATORS
    ends = not following or following in " \n\t.,;:=<>)!?~"
    if run in ("and", "or") and not glued:
        return [Token("mark", run)]
    if run in ("sec", "min") and ends and last and last.kind == "number":
        return [Token("word", run, spaced)]  # 5 sec
    if name in PLAIN_NAMES:
        return [Token("command", name, spaced)]
    if last and last.kind == "number" and ends and run in ("st", "nd", "rd", "th"):
        return [Token("word", run)]
    unit = run in PLAIN_UNITS and last and (last.kind == "number" or last.text == "}")
    alone = ends and not glued and (len(run) >= 3 or (len(run) == 2 and (run.isupper() or unit)))
    if alone or len(run) >= 4:
        return [Token("word", run, spaced)]
    return [Token("letter", letter, spaced and i == 0) for i, letter in enumerate(run)]


def spelled(tokens):
    """Tokens as one string without spaces, so that equal strings are the same text."""
    pieces = []
    for i, token in enumerate(tokens):
        piece = token.text
        if token.kind == "command":
            piece += " "  # \pi r is not \pir
        elif token.kind == "word" and (len(piece) > 3 or piece[1:].islower()):
            piece = piece.lower()
        elif token.kind == "number" and pieces and pieces[-1][-1].isdigit():
            piece = " " + piece  # 1 2 is not 12
        elif piece in ("{", "}") and _holds_one_token(tokens, i):
            continue  # x^{2} is x^2
        pieces.append(piece)
    return "".join(pieces)


def _holds_one_token(tokens, i):
    """Whether the brace at `i` belongs to a pair around a single token."""
    start = i if tokens[i].text == "{" else i - 2
    pair = tokens[start : start + 3] if start >= 0 else []
    return [token.text in "{}" for token in pair] == [True, False, True]


# ------------------------------------------------------------------------------------------------
# What an answer can be
# ------------------------------------------------------------------------------------------------


@dataclass
class Value:
    """An expression with its unit, a tuple of words. places: the decimals of a plain decimal."""

    expression: sympy.Expr
    unit: tuple = ()
    places: int | None = None


@dataclass
class Text:
    """Words."""

    text: str


@dataclass
class Based:
    """A number written in a base: its digits and the base."""

    digits: str
    base: int


@dataclass
class Group:
    r"""Items in brackets: an ordered pair, an interval, or, in \{ and \}, a set."""

    opening: str
    items: list
    closing: str


@dataclass
class Joined:
    """Sets joined by one operator."""

    operator: str
    parts: list


@dataclass
class Matrix:
    """Rows of items. A determinant is not one."""

    rows: list


@dataclass
class Relation:
    """A chain of sides with a sign between each two. The first side of `> 3` is None."""

    sides: list
    signs: list


@dataclass
class Many:
    """A list without brackets. alternatives: whether `or` or a sign ± joins it."""

    items: list
    alternatives: bool = False


# ------------------------------------------------------------------------------------------------
# From tokens to meaning
# ------------------------------------------------------------------------------------------------

LARGEST_POWER = 10**5  # bits of a power that is worth computing
LARGEST_FACTORIAL = 5000


class Reader:
    """A recursive descent over tokens. Each method reads one rule of the grammar and moves on.

    answer    = relation (separator relation)*
    relation  = [sign] joined (sign joined)*
    joined    = side (\\cup side)*
    side      = words | number in a base | sum [unit]
    sum       = [+-] product ([+-] product)*
    product   = power ([* /] power)*                 the operator may be missing
    power     = atom [^ exponent] [!] [°]
    atom      = number | name | function | fraction | root | bracket | matrix | ...
    """

    def __init__(self, tokens):
        self.tokens = list(tokens)
        self.at = 0

    # moving on

    def peek(self, ahead=0):
        """The text of a coming token, "" at the end."""
        place = self.at + ahead
        return self.tokens[place].text if place < len(self.tokens) else ""

    def kind(self, ahead=0):
        """The kind of a coming token, "" at the end. A word is not a mark, whatever its text."""
        place = self.at + ahead
        return self.tokens[place].kind if place < len(self.tokens) else ""

    def accept(self, *texts):
        """The coming token's text, if it is one of `texts`; it is then read. Else ""."""
        if self.kind() in ("word", "") or self.peek() not in texts:
            return ""
        self.at += 1
        return self.tokens[self.at - 1].text

    def expect(self, text):
        """Read this token."""
        if not self.accept(text):
            raise NotUnderstood(f"{text} was expected, {self.peek()!r} came")

    # structures

    def answer(self):
        """The whole text."""
        found = self.list_of_relations()
        if self.at < len(self.tokens):
            raise NotUnderstood(f"{self.peek()!r} was not expected")
        return found

    def list_of_relations(self):
        """Relations, separated."""
        items, words = [self.relation()], set()
        while self.peek() in SEPARATORS and self.kind() != "word":
            words.add(self.accept(",", ";"))
            words.add(self.accept("and", "or"))  # perhaps after a comma
            items.append(self.relation())
        if len(items) == 1:
            return items[0]
        return Many(_flattened(items), alternatives="or" in words)

    def relation(self):
        """One side, or sides with signs between them."""
        sides = [None if self.peek() in RELATIONS else self.joined()]
        signs = []
        while sign := self.accept(*RELATIONS):
            signs.append(sign)
            sides.append(self.joined())
        if not signs or (sides[0] is None and signs in (["="], ["\\approx"])):
            return sides[-1]
        return Relation(sides, signs)

    def joined(self):
        """Sets with one operator between them, or one side."""
        parts, operator = [self.side()], ""
        while self.peek() in ("\\cup", "\\cap", "\\setminus") and operator in ("", self.peek()):
            operator = self.accept(self.peek())
            parts.append(self.side())
        return Joined(operator, parts) if operator else parts[0]

    def side(self):
        """Words, a number in a base, or a value with its unit."""
        if self.kind() == "word" and len(self.peek()) > 1:
            return self.words()
        if based := self.based():
            return based
        start = self.at
        currency = self.currency()
        found = self.sum()
        bracketed = start and self.tokens[start - 1].text in BRACKETS and self.peek() in BRACKETS
        if bracketed and not currency:  # a part of an expression
            return found
        places = _decimals(self.tokens[start : self.at])
        unit = self.unit()
        if isinstance(found, sympy.Expr):
            return _value(found, currency, unit, places)
        if unit or currency:
            raise NotUnderstood("only a value has a unit")
        return found

    def words(self):
        """Words up to the next sign or separator."""
        start = self.at
        while self.peek() and (
            self.kind() == "word" or self.peek() not in RELATIONS | SEPARATORS | {")", "]", "\\}"}
        ):
            self.at += 1
        tokens = self.tokens[start : self.at]
        if len(tokens) > 1 and tokens[0].text.lower() in ("a", "an", "the"):
            tokens = tokens[1:]
        return Text(spelled(tokens))

    def based(self):
        """A number with its base, as 4210_5 and A5_{16}, else None and nothing is read."""
        start, digits = self.at, ""
        bracketed = self.accept("(")
        while self.kind() == "number" or (self.kind() == "letter" and self.peek() in "ABCDEF"):
            digits += self.peek()
            self.at += 1
        closed = not bracketed or self.accept(")")
        base = self.base() if digits and closed and self.accept("_") else None
        if base and _is_written_in(digits, base):
            return Based(digits.lstrip("0") or "0", base)
        self.at = start
        return None

    def base(self):
        """The subscript that names a base, or None."""
        text = self.argument_text().strip("()")
        return int(text) if text.isdigit() and len(text) < 3 else BASES.get(text)

    def currency(self):
        """The unit of a currency's sign before a value, after a minus perhaps."""
        place = self.at + (self.peek() in ("-", "+"))
        sign = self.tokens[place].text if place < len(self.tokens) else ""
        unit = CURRENCIES.get(sign)
        if unit:
            del self.tokens[place]
        return ((unit, 1),) if unit else ()

    def unit(self):
        """The words after a value, each with its power, as (("cm", 2),)."""
        words, sign, power = [], 1, 1
        while True:
            if sign_of_unit := self.accept("%", *CURRENCIES):
                words.append([CURRENCIES.get(sign_of_unit, "%"), 1])
            elif self.kind() == "word" or self.is_ordinal():
                self.accept("^")
                braced = self.accept("{")
                word = self.peek()
                self.at += 1
                if braced:
                    self.expect("}")
                if word == "per":
                    sign = -1
                elif word in ("square", "sq", "cubic"):
                    power = 3 if word == "cubic" else 2
                else:
                    words.append([_unit_name(word), sign * power])
                    power = 1
            elif self.peek() == "^" and words:
                self.at += 1
                words[-1][1] *= self.integer()
            elif self.peek() == "/" and words and self.kind(1) == "word":
                self.at += 1
                sign = -1
            elif self.peek() == "\\cdot" and words and self.kind(1) == "word":
                self.at += 1
            else:
                return tuple((word, power) for word, power in words)

    def is_ordinal(self):
        r"""Whether ^{\text{th}} comes."""
        return self.peek() == "^" and (
            self.kind(1) == "word" or (self.peek(1) == "{" and self.kind(2) == "word")
        )

    def integer(self):
        """A small integer, braced perhaps."""
        braced, minus = self.accept("{"), self.accept("-")
        text = self.peek()
        if self.kind() != "number" or not text.isdigit():
            raise NotUnderstood("a power of a unit is an integer")
        self.at += 1
        if braced:
            self.expect("}")
        return -int(text) if minus else int(text)

    # expressions

    def sum(self):
        """Products with plus and minus between them."""
        sign = self.accept("+", "-", "\\pm", "\\mp")
        total = self.product()
        if sign:
            total = _signed(sign, total)
        while sign := self.accept("+", "-", "\\pm", "\\mp"):
            total = _number(total) + _signed(sign, self.product())
        return total

    def product(self):
        """Powers, multiplied or divided. After a plain slash nothing may be left out: 1/2x."""
        total, divided = self.power(), False
        while True:
            if self.accept("\\cdot", "\\times", "*"):
                total, divided = _number(total) * self.signed_power(), False
            elif self.accept("/", "\\div"):
                total, divided = _number(total) / self.signed_power(), True
            elif not self.starts_power():
                return total
            elif divided or self.is_beside_a_number():
                raise NotUnderstood("numbers side by side, or 1/2x")
            else:
                total = _number(total) * _number(self.power())

    def is_beside_a_number(self):
        """Whether a number comes that could be more digits, as in 5 3 and 5{3}; not in n 2^n."""
        before = self.tokens[self.at - 1].kind
        if self.peek() == "{":
            return before == self.kind(1) == "number"
        separate = before != "number" and self.tokens[self.at].spaced and self.peek(1) == "^"
        return self.kind() == "number" and not separate

    def signed_power(self):
        """The right side of an operator, which may have a minus."""
        minus = self.accept("-")
        value = _number(self.power())
        return -value if minus else value

    def starts_power(self):
        """Whether another factor comes."""
        if self.kind() in ("number", "letter"):
            return True
        if self.kind() == "command":
            return self.peek() in STARTS or self.peek().startswith("\\begin")
        return self.kind() == "mark" and self.peek() in ("(", "[", "{", "\\{", "\\lfloor")

    def power(self):
        """An atom with what stands behind it."""
        value = self.atom()
        powered = False
        while True:
            if self.peek() == "^" and self.is_degree():
                value = _number(value) * DEGREE
            elif self.peek() == "^" and self.is_ordinal():
                return value
            elif not powered and self.accept("^", "**"):
                value, powered = _power(_number(value), self.exponent()), True
            elif not powered and self.accept("!"):
                value, powered = _factorial(_number(value)), True
            elif self.peek() in ("^", "**", "!", "_", "'"):
                raise NotUnderstood("a second power, or a subscript of no name")
            else:
                return value

    def is_degree(self):
        r"""Read ^\circ or ^{\circ}, if it comes."""
        for tokens in (["^", "\\circ"], ["^", "{", "\\circ", "}"]):
            if [self.peek(ahead) for ahead in range(len(tokens))] == tokens:
                self.at += len(tokens)
                return True
        return False

    def exponent(self):
        """What stands after ^: braces, a parenthesis, or one atom with a sign."""
        if self.accept("{"):
            if self.peek() == "(" and self.peek(2) + self.peek(3) == ")}":
                raise NotUnderstood("y^{(4)} is a derivative")
            value = _number(self.sum())
            self.expect("}")
            return value
        return self.signed_atom()

    def signed_atom(self):
        """An atom with or without a minus before it: what an exponent or an argument may be."""
        minus = self.accept("-")
        value = _number(self.atom())
        return -value if minus else value

    def atom(self):
        """The smallest piece that has a value."""
        kind, text = self.kind(), self.peek()
        if kind == "number":
            return self.number()
        if derivative := self.derivative():
            return derivative
        if kind == "letter" or (kind == "word" and len(text) == 1) or text in NAMES:
            return self.name()
        self.at += 1
        if kind == "command" and text.startswith("\\begin"):
            return self.matrix(text)
        if kind == "mark" and text == "{":
            value = self.list_of_relations()
            self.expect("}")
            return value
        if kind in ("mark", "command"):
            if text in CLOSING:
                return self.group(text)
            if text in ("|", "\\lfloor", "\\lceil"):
                return self.between(text)
        if kind == "command":
            if text in FUNCTIONS:
                return self.function(text)
            if text in OPAQUE_FUNCTIONS:
                return self.application(text)
            if text == "\\frac":
                return self.fraction()
            if text == "\\sqrt":
                return self.root()
            if text == "\\binom":
                upper, lower = self.argument(), self.argument()
                return _binomial(upper, lower)
            if text == "\\pi":
                return sympy.pi
            if text == "\\infty":
                return INFINITY
        raise NotUnderstood(f"{text!r} was not expected")

    def number(self):
        """A number: an integer, a decimal, a repeating decimal or a mixed number."""
        text = self.peek()
        self.at += 1
        if "." in text and self.accept("\\overline", "\\dot"):
            digits = self.argument_text()
            if not digits.isdigit():
                raise NotUnderstood("only digits repeat")
            shift = len(text) - text.index(".") - 1
            repeated = sympy.Rational(int(digits), (10 ** len(digits) - 1) * 10**shift)
            return _rational(text) + repeated
        value = _rational(text)
        if text.isdigit():
            fraction = self.proper_fraction()
            if fraction is not None:
                return value + fraction
        return value

    def proper_fraction(self):
        r"""The fraction of a mixed number, 1\frac{4}{5} or 2 1/3, or None and nothing is read."""
        start = self.at
        if self.kind() == "number" and self.peek(1) == "/" and self.kind(2) == "number":
            over, under = _rational(self.peek()), _rational(self.peek(2))
            self.at += 3
        elif self.accept("\\frac"):
            over, under = self.argument(), self.argument()
        else:
            return None
        if not (over.is_Rational and under.is_Integer):
            self.at = start  # 2\frac{x}{3} is a product
            return None
        if not (over.is_Integer and 0 < over < under):
            raise NotUnderstood("a mixed number or a product")
        return over / under

    def name(self):
        """A symbol with its subscript and primes, or a function of that name."""
        text = plain = self.peek()
        self.at += 1
        if text in ACCENTS:
            text += self.argument_text()
        elif text in ("\\angle", "\\triangle"):
            text += self.letters()
        if self.accept("_"):
            text += "_" + self.argument_text()
        while self.accept("'"):
            text += "'"
        if self.peek() == "^" and (self.peek(1) == "'" or self.peek(1) + self.peek(2) == "{'"):
            self.at += 1
            primes = self.argument_text()
            if set(primes) != {"'"}:
                raise NotUnderstood("a prime within a power")
            text += primes
        if self.accept("_"):
            raise NotUnderstood("a subscript after a prime, or a second one")
        if text in ("e", "i"):
            return {"e": sympy.E, "i": sympy.I}[text]
        if plain in FUNCTION_LETTERS and self.inverse():
            text += "^{-1}"
        if self.peek() == "(" and (plain in FUNCTION_LETTERS or self.is_argument(text)):
            return self.application(text)
        return sympy.Symbol(text)

    def inverse(self):
        """Read ^{-1} before a parenthesis, if it comes."""
        found = "".join(self.peek(ahead) for ahead in range(6)) == "^{-1}("
        self.at += 5 * found
        return found

    def is_argument(self, name):
        """Whether a parenthesis with nothing but another symbol, a number or a list comes."""
        depth, inside = 0, []
        for token in self.tokens[self.at :]:
            depth += {"(": 1, ")": -1}.get(token.text, 0)
            if depth == 0:
                break
            inside.append(token)
        inside = inside[1:]
        if any(token.text == "," for token in inside):
            return True
        return (
            len(inside) == 1
            and inside[0].text != name
            and (inside[0].kind in ("number", "letter") or inside[0].text in SYMBOLS)
        )

    def application(self, name):
        """A function of which only the name and the arguments are known, as one symbol."""
        self.expect("(")
        arguments = [self.joined()]
        while self.accept(","):
            arguments.append(self.joined())
        self.expect(")")
        return sympy.Symbol(f"{name}({','.join(map(_description, arguments))})")

    def derivative(self):
        """dx/dt as one symbol, else None."""
        operator, _, slash, other, _ = (self.peek(ahead) for ahead in range(5))
        if operator not in ("d", "\\partial") or (slash, other) != ("/", operator):
            return None
        if not {self.kind(1), self.kind(4)} <= {"letter", "command"}:
            return None
        self.at += 5
        return sympy.Symbol(spelled(self.tokens[self.at - 5 : self.at]))

    def fraction(self):
        r"""The rest of a \frac. A derivative is one symbol."""
        start = self.at
        over, under = self.raw_argument(), self.raw_argument()
        if _is_differential(over) and _is_differential(under) and len(under) > 1:
            if len(over) == 1 or (over[1].text == "^" and len(over) < 6):
                raise NotUnderstood("an operator of differentiation")
            return sympy.Symbol(f"{spelled(over)}/{spelled(under)}")
        self.at = start
        over, under = self.argument(), self.argument()
        return over / under

    def raw_argument(self):
        """The tokens of a braced argument, or of one token; a number gives its first digit."""
        if self.peek() != "{":
            self.split_number()
            self.at += 1
            return self.tokens[self.at - 1 : self.at]
        depth, start = 0, self.at
        while self.at < len(self.tokens):
            depth += {"{": 1, "}": -1}.get(self.peek(), 0)
            self.at += 1
            if depth == 0:
                return self.tokens[start + 1 : self.at - 1]
        raise NotUnderstood("a brace is not closed")

    def split_number(self):
        r"""Make \frac12 two numbers of one digit; longer ones are not understood."""
        text = self.peek()
        if self.kind() == "number" and len(text) > 1:
            before = self.tokens[self.at - 1]
            if len(text) != 2 or not text.isdigit() or before.text not in ("\\frac", "\\binom"):
                raise NotUnderstood(f"{text} as an argument without braces")
            digits = [Token("number", digit) for digit in text]
            self.tokens[self.at : self.at + 1] = digits

    def argument(self):
        """The value of a command's argument, in braces or one token."""
        if self.accept("{"):
            value = _number(self.sum())
            self.expect("}")
            return value
        self.split_number()
        if self.kind() not in ("number", "letter", "command"):
            raise NotUnderstood("an argument was expected")
        if self.kind() == "number":
            self.at += 1
            return _rational(self.tokens[self.at - 1].text)
        if self.kind() == "letter":
            self.at += 1
            return Reader(self.tokens[self.at - 1 : self.at]).atom()
        return _number(self.atom())

    def argument_text(self):
        """The text of a command's argument or of a subscript."""
        text = spelled(self.raw_subscript())
        if not text:
            raise NotUnderstood("an empty argument")
        return text

    def raw_subscript(self):
        """The tokens of a subscript: braces, or one token."""
        if self.peek() == "{":
            return self.raw_argument()
        self.at += 1
        return self.tokens[self.at - 1 : self.at]

    def letters(self):
        """The letters that name an angle or a triangle."""
        start = self.at
        while self.kind() in ("letter", "word") or self.peek() == "_":
            if self.accept("_"):
                self.raw_subscript()
            else:
                self.at += 1
        return spelled(self.tokens[start : self.at])

    def root(self):
        r"""The rest of a \sqrt, whose argument may be in parentheses, as in sqrt(2)."""
        degree = sympy.Integer(2)
        if self.accept("["):
            degree = _number(self.sum())
            self.expect("]")
        if self.peek() == "(":
            return _power(_number(self.atom()), 1 / degree)
        if self.kind() == "number" and len(self.peek()) > 1:
            raise NotUnderstood("a root without braces")
        return _power(self.argument(), 1 / degree)

    def function(self, name):
        """A function with its power, its base and its argument."""
        base, power = None, None
        while sign := self.accept("_", "^"):
            if sign == "_":
                base = self.argument_or_atom()
            else:
                power = self.exponent()
        argument = self.function_argument()
        if name in TRIGONOMETRIC:
            argument = argument.subs(DEGREE, sympy.pi / 180)
        if base is not None:
            if name != "\\log":
                raise NotUnderstood("a base of no logarithm")
            return _power(sympy.log(argument, base), power or sympy.Integer(1))
        if power == -1 and name in TRIGONOMETRIC:
            inverse = {"\\sin": sympy.asin, "\\cos": sympy.acos, "\\tan": sympy.atan}.get(name)
            if not inverse:
                raise NotUnderstood("an inverse")
            return inverse(argument)
        value = FUNCTIONS[name](argument)
        return value if power is None else _power(value, power)

    def argument_or_atom(self):
        """A logarithm's base."""
        if self.peek() == "{":
            return self.argument()
        return _number(self.atom())

    def function_argument(self):
        """The argument of a function: in brackets, or the factors up to the next sign."""
        if self.peek() in ("(", "{"):
            unclear = ("(", "!") if self.peek() == "(" else ("(", "!", "^", "**")
            value = _number(self.atom())
            if self.peek() in unclear:
                raise NotUnderstood("where the argument ends is not clear")
            return value
        value = _number(self.power())
        while self.starts_power() and self.peek() not in FUNCTIONS:
            if self.peek() == "(" or self.kind() == "number":
                raise NotUnderstood("where the argument ends is not clear")
            value *= _number(self.power())
        if self.peek() == "/" and self.peek(1) not in FUNCTIONS:
            raise NotUnderstood("where the argument ends is not clear")
        return value

    def between(self, opening):
        """An absolute value, a floor or a ceiling."""
        value = _number(self.sum())
        self.expect({"|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}[opening])
        functions = {"|": sympy.Abs, "\\lfloor": sympy.floor, "\\lceil": sympy.ceiling}
        return functions[opening](value)

    def group(self, opening):
        """The rest of a bracket: one value in parentheses, or a pair, an interval, a set."""
        items, closing = [], self.accept("\\}")
        if not closing:
            items = [self.relation()]
            while self.accept(",", ";"):
                items.append(self.relation())
            closing = self.accept(")", "]", "\\}", "\\rangle")
        half_open = opening + closing in ("(]", "[)") and len(items) == 2
        if closing != CLOSING[opening] and not half_open:
            raise NotUnderstood("brackets that do not match")
        if len(items) == 1 and opening in "([" and isinstance(items[0], sympy.Expr | Matrix):
            return items[0]
        if len(items) == 1 and isinstance(items[0], Value) and items[0].unit == (("°", 1),):
            return items[0].expression * DEGREE
        items = [_value(item) if isinstance(item, sympy.Expr) else item for item in items]
        if opening == "\\{":
            items = _flattened(items)
        if any(isinstance(item, Many) for item in items):
            raise NotUnderstood("alternatives within a pair")
        return Group(opening, items, closing)

    def matrix(self, begin):
        """The rest of a matrix."""
        name = begin[len("\\begin{") : -1]
        if name not in ENVIRONMENTS:
            raise NotUnderstood(begin)
        rows = [[]]
        while not self.accept(f"\\end{{{name}}}"):
            rows[-1].append(self.side())
            if self.accept("\\\\"):
                if self.peek() != f"\\end{{{name}}}":
                    rows.append([])
            elif self.peek() != f"\\end{{{name}}}":
                self.expect("&")
        if not rows[0] or len({len(row) for row in rows}) > 1:
            raise NotUnderstood("rows of different lengths")
        return Matrix(rows)


BRACKETS = {"(", ")", "[", "]", "{", "}", "\\{", "\\}", "\\langle", "\\rangle"}
NAMES = SYMBOLS | ACCENTS | {"\\angle", "\\triangle"}
STARTS = NAMES | FUNCTIONS.keys() | OPAQUE_FUNCTIONS
STARTS |= {"\\frac", "\\sqrt", "\\binom", "\\pi", "\\infty", "\\lfloor", "\\lceil"}


def _value(expression, currency=(), unit=(), places=None):
    """The expression with its unit, or two where it has a sign ±."""
    if unit and unit[0][0] in SCALES:
        expression, places, unit = expression * SCALES[unit[0][0]], None, unit[1:]
    if expression.has(DEGREE):
        expression, unit = expression / DEGREE, (("°", 1), *unit)
    unit = tuple(sorted({*currency, *unit}))
    if expression.has(DEGREE, sympy.nan, sympy.zoo, sympy.oo) or (currency and len(unit) > 1):
        raise NotUnderstood("a degree within a value, or no value")
    if expression.has(SIGN):
        return Many([Value(expression.subs(SIGN, sign), unit) for sign in (1, -1)], True)
    return Value(expression, unit, places)


def _is_written_in(digits, base):
    """Whether `digits` can be a number in a base; C_1 and E_{12} are names."""
    values = [int(digit, 16) if digit.isalnum() else 99 for digit in digits]
    return max(values) < base and any(digit.isdigit() for digit in digits)


def _is_differential(tokens):
    """Whether tokens are d, or d with a power or a name after it."""
    if not tokens or tokens[0].text not in ("d", "\\partial"):
        return False
    following = tokens[1] if len(tokens) > 1 else Token("mark", "^")
    return following.text == "^" or following.kind == "letter" or following.text in NAMES


def _flattened(items):
    """Items, with those of alternatives in place of the alternatives."""
    return [part for item in items for part in (item.items if isinstance(item, Many) else [item])]


def _number(found):
    """`found`, which must be an expression."""
    if not isinstance(found, sympy.Expr):
        raise NotUnderstood("arithmetic with what is no number")
    return found


def _signed(sign, value):
    """A product with the sign before it."""
    return {"+": 1, "-": -1, "\\pm": SIGN, "\\mp": -SIGN}[sign] * _number(value)


def _rational(text):
    """The exact value of a number's text."""
    return sympy.Rational(text.rstrip(".") if text != "." else "0")


def _power(base, exponent):
    """base ** exponent, unless nobody wants to see it in digits."""
    if base.is_number and exponent.is_number and exponent.is_real and base not in (0, 1, -1):
        bits = 20  # of a base that is no fraction
        if base.is_Rational:
            bits = max(base.p.bit_length(), base.q.bit_length())
        if abs(exponent) * bits > LARGEST_POWER:
            raise NotUnderstood("too large a power")
    return base**exponent


def _factorial(value):
    if value.is_number and not (value.is_Integer and 0 <= value <= LARGEST_FACTORIAL):
        raise NotUnderstood("too large a factorial, or none")
    return sympy.factorial(value)


def _binomial(upper, lower):
    numbers = upper.is_number and lower.is_number
    if numbers and not (upper.is_Integer and lower.is_Integer and 0 <= lower <= upper <= 10**4):
        raise NotUnderstood("too large a binomial, or none")
    return sympy.binomial(upper, lower)


def _decimals(tokens):
    """How many decimals a plain decimal has, with its power of ten; None for all else."""
    texts = [token.text for token in tokens if token.text not in "{}"]
    if texts and texts[0] in "+-":
        texts = texts[1:]
    if not texts or tokens[-1].text == "." or "." not in texts[0] or texts[0] == ".":
        return None
    places = len(texts[0]) - texts[0].index(".") - 1
    if len(texts) == 1:
        return places
    if texts[1] in ("\\times", "\\cdot", "*") and texts[2:4] == ["10", "^"]:
        power = "".join(texts[4:])
        return places - int(power) if re.fullmatch(r"-?\d{1,4}", power) else None
    return None


def _unit_name(word):
    """The unit of that name, singular or plural; a word that is no unit stays as it is."""
    small = word.lower() if word[1:].islower() or len(word) > 4 else word  # MHz is not mHz
    for name in (word, small, small.removesuffix("s"), small.removesuffix("es")):
        if name in UNITS and (name == word or len(word) > 2):
            return UNITS[name]
    return small if len(word) > 2 else word


def _description(found):
    """A text that is equal for equal arguments of a function, if not for all of them."""
    return str(found)
