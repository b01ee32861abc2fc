r"""What counts as the same answer.

    same(given, wanted)    whether two final answers, in LaTeX or plain text, are the same

Two answers are the same if they are the same text up to spacing and markup, or if both were
understood whole (common/latex.py) and what they say is equal. A text that is not understood whole
is compared as text, never by a number found inside it. math-verify has the last word on whether
two expressions are equal; their values at random points have a veto. docs/verifier.md lists the
rules with examples.
"""

import logging
import random
import re

import sympy

from common.latex import (
    INFINITY,
    SCALES,
    UNITS,
    Based,
    Group,
    Joined,
    Many,
    Matrix,
    NotUnderstood,
    Reader,
    Relation,
    Text,
    Value,
    clean,
    spelled,
    tokenize,
)

# Words that change what the number before them says; they are never forgiven either.
BOUNDS = {
    *("not", "no", "or", "less", "more", "fewer", "greater", "most", "least", "over", "under"),
    *("above", "below", "than", "up", "down", "at", "off", "short", "out", "of", "per", "percent"),
    *("squared", "cubed", "factorial", "mod", "modulo", "remainder", "base", "inverse", "root"),
    *("negative", "minus", "plus", "times", "half", "halves", "third", "thirds", "quarter"),
    *("quarters", "fifth", "fifths", "tenth", "tenths", "hundredth", "hundredths"),
    *("thousandth", "thousandths"),
}


# ------------------------------------------------------------------------------------------------
# From meaning to a verdict
# ------------------------------------------------------------------------------------------------

EQUATION_SIGNS = {"=", "\\approx"}
ORDER = {"<": ">", "\\leq": "\\geq", ">": "<", "\\geq": "\\leq"}


def same(given, wanted):
    """Whether `given` is the reference answer `wanted`, both texts as they stand in a box."""
    letter = re.fullmatch(r"\(?([A-J])\)?", _bare(wanted))
    if letter:
        return _chosen(given) == letter[1]
    try:
        given, wanted = (tokenize(clean(text)) for text in (given, wanted))
        if spelled(given) == spelled(wanted):
            return bool(given)
        wanted = Reader(wanted).answer()
        if isinstance(wanted, Based) and spelled(given) == wanted.digits:
            return True  # a missing base is forgiven, as a missing unit is
        given = Reader(given).answer()
        return equal(given, wanted)
    except (NotUnderstood, RecursionError):
        return False


# multiple choice

CHOICE = re.compile(
    r"""
    (?: (?:option|choice|answer) [\s:]* )?
    (?: [(\[] (?P<bracketed> [A-J] ) [)\]]                       # (C) and what follows
      | (?P<plain> [A-J] ) (?: $ | \s*[.:)] (?=\s|$)             # C, or C. and what follows
                             | (?=\s+\() )                       # C (12 m)
    )
    (?! \s* (?: (?:[,;/&]|and|or) \s* )+ [(\[]? [A-J]\b         # but no second letter
      | \s* [(\[] [A-J] [)\]] )
    .*
    """,
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
CHOICE_MARKUP = re.compile(
    r"""
    \\ (?: (?:text|math)\w* | mbox | boldsymbol | underline | bf | rm | left | right ) (?![a-zA-Z])
  | \\ [(),;!\ ]
  | [{}$*~]
    """,
    re.VERBOSE,
)


def _bare(text):
    """`text` without dollars, braces, font commands and the spaces around it."""
    return CHOICE_MARKUP.sub("", text).strip("\\.,\n ")


def _chosen(given):
    """The one letter that an answer to a multiple choice names, alone or before its text."""
    found = CHOICE.fullmatch(_bare(given))
    return (found["bracketed"] or found["plain"]).upper() if found else None


# structures


def equal(given, wanted):
    """Whether two things that were read are equal; `wanted` is of the reference."""
    if isinstance(given, Relation) or isinstance(wanted, Relation):
        return _equal_relations(given, wanted)
    if isinstance(given, Value) and isinstance(wanted, Value):
        return _equal_values(given, wanted)
    if isinstance(given, Text) and isinstance(wanted, Text):
        return given.text == wanted.text
    if isinstance(given, Based) or isinstance(wanted, Based):
        return _equal_in_bases(given, wanted)
    if isinstance(given, Many) or isinstance(wanted, Many) or _is_set(given) or _is_set(wanted):
        return _equal_collections(given, wanted)
    if isinstance(given, Group) and isinstance(wanted, Group):
        brackets = (given.opening, given.closing) == (wanted.opening, wanted.closing)
        return brackets and _equal_in_order(given.items, wanted.items)
    if isinstance(given, Joined) and isinstance(wanted, Joined):
        if given.operator != wanted.operator:
            return False
        if given.operator == "\\setminus":
            return _equal_in_order(given.parts, wanted.parts)
        return _matches(given.parts, wanted.parts)
    if isinstance(given, Matrix) and isinstance(wanted, Matrix):
        return len(given.rows) == len(wanted.rows) and all(
            map(_equal_in_order, given.rows, wanted.rows)
        )
    return False


def _equal_in_order(given, wanted):
    return len(given) == len(wanted) and all(map(equal, given, wanted))


def _matches(given, wanted):
    """Whether each item of `given` is one of `wanted`, each used once."""
    if len(given) != len(wanted):
        return False
    left = list(wanted)
    for item in given:
        found = next((i for i, other in enumerate(left) if equal(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _is_set(found):
    return isinstance(found, Group) and found.opening == "\\{"


def _equal_collections(given, wanted):
    """Lists and sets. Their order says nothing, unless it says which value has which name."""
    if isinstance(given, Joined) or isinstance(wanted, Joined):
        return _equal_unions(given, wanted)
    sides = []
    for found in (given, wanted):
        items = found.items if isinstance(found, Many) or _is_set(found) else [found]
        if _is_set(found):  # a set holds nothing twice
            items = [x for i, x in enumerate(items) if not any(equal(x, y) for y in items[:i])]
        sides.append(items)
    names = [[_name(item) for item in items if _name(item)] for items in sides]
    for own, other in (names, names[::-1]):
        if len(set(own)) > 1 and not other:
            return _equal_in_order(*sides)
    return _matches(*sides)


def _equal_unions(given, wanted):
    r"""Whether x < 3 \text{ or } x > 5 is a union of intervals, or the reverse."""
    joined = []
    for found in (given, wanted):
        if isinstance(found, Many) and found.alternatives:
            intervals = [_interval(item) for item in found.items]
            if None in intervals or len({name for name, _ in intervals}) > 1:
                return False
            found = Joined("\\cup", [group for _, group in intervals])
        joined.append(found)
    return isinstance(joined[0], Joined) and isinstance(joined[1], Joined) and equal(*joined)


def _equal_in_bases(given, wanted):
    """Numbers with a base; base ten is none."""
    sides = [
        Value(sympy.Integer(found.digits))
        if isinstance(found, Based) and found.base == 10
        else found
        for found in (given, wanted)
    ]
    if isinstance(sides[0], Based) and isinstance(sides[1], Based):
        return given == wanted
    if isinstance(sides[0], Value) and isinstance(sides[1], Value):
        return equal(*sides)
    plain = isinstance(sides[0], Value) and not sides[0].unit and sides[0].expression
    return isinstance(wanted, Based) and str(plain) == wanted.digits


# values


def _equal_values(given, wanted):
    """Expressions with their units: a missing unit is forgiven, a different one is not."""
    percent = (("%", 1),)
    if given.unit == percent and wanted.unit == ():
        return _equal_expressions(Value(given.expression / 100), wanted)
    if wanted.unit == percent and given.unit == ():
        fraction = Value(wanted.expression / 100)
        return _equal_expressions(given, wanted) or _equal_expressions(given, fraction)
    if given.unit != wanted.unit and not _forgiven(given, wanted):
        return False
    return _equal_expressions(given, wanted)


def _forgiven(given, wanted):
    """Whether one of the values has no unit, and the unit of the other may be missing."""
    if given.unit and wanted.unit:
        return False
    words = {word for word, _ in given.unit + wanted.unit}
    if words & (BOUNDS | SCALES.keys() | {"%"}):
        return False
    return words <= set(UNITS.values()) or not wanted.expression.free_symbols


def _equal_expressions(given, wanted):
    """Whether two expressions are equal, or one is the other rounded to six places or more."""
    a, b = given.expression, wanted.expression
    if a == b:
        return True
    if (given.places is None) != (wanted.places is None):
        places = given.places if wanted.places is None else wanted.places
        if _is_rounded(a, b, places):
            return True
    if a.is_Rational and b.is_Rational:
        return False
    return not _differ_somewhere(a, b) and _proved_equal(a, b)


def _is_rounded(a, b, places):
    """Whether two numbers differ by no more than rounding to `places` decimals, six at least."""
    if places < 6 or not (a.is_number and b.is_number):
        return False
    a, b = a.evalf(40), b.evalf(40)
    allowed = 0.5 * 10.0 ** -min(places, 12)
    return bool(abs(a - b) <= min(allowed, 1e-5 * abs(b)))


def _differ_somewhere(a, b):
    """Whether two expressions have different values for some random values of their symbols."""
    symbols = a.free_symbols | b.free_symbols
    zero = 1e-30 if symbols else 1e-60  # what is called 0, given 50 digits
    for point in _points(symbols):
        x, y = (_at(expression, point) for expression in (a, b))
        if x is None or y is None:
            continue
        largest = max(abs(x), abs(y))
        if largest > zero and abs(x - y) > 1e-15 * largest:
            return True
    return False


def _is_no_constant(expression):
    """Whether an expression has different values for different values of its symbols."""
    values = [_at(expression, point) for point in _points(expression.free_symbols)]
    values = [value for value in values if value is not None]
    return any(abs(value - values[0]) > 1e-15 * abs(values[0]) for value in values[1:])


def _points(symbols):
    """Three random values for each symbol: two positive ones, and one of any sign."""
    dice = random.Random(0)
    ordered = sorted(symbols, key=str)
    for low in (1, 1, -4) if symbols else (1,):
        yield {symbol: sympy.Float(dice.uniform(low, 4), 50) for symbol in ordered}


def _at(expression, point):
    """The value of an expression at a point, with 50 digits, or None where it has none."""
    value = expression.xreplace(point).evalf(50)
    return value if value.is_number and value.is_finite else None


def _proved_equal(a, b):
    """Whether the difference of two expressions expands to 0, or math-verify finds them equal."""
    from math_verify import verify

    difference = a - b
    if difference.has(sympy.sinh, sympy.cosh, sympy.tanh):
        difference = difference.rewrite(sympy.exp)
    if sympy.expand(difference) == 0:
        return True
    if difference.has(sympy.factorial, sympy.binomial):
        a, b = sympy.combsimp(a), sympy.combsimp(b)
    logging.disable()  # it warns, each time, that its own timeouts are off
    return verify(b, a, timeout_seconds=None)


# relations


def _equal_relations(given, wanted):
    """Equations, inequalities, and values with a name against values without one."""
    own, other = _denoted(given), _denoted(wanted)
    if own and other and own[0] == other[0] and _any_equal(own[1], other[1]):
        return True
    if own and not isinstance(wanted, Relation):
        return _any_equal(own[1], [wanted])
    if other and not isinstance(given, Relation):
        return _any_equal([given], other[1])
    if isinstance(given, Relation) and not isinstance(wanted, Relation) and not own:
        values = _values(given.sides, given.signs)
        if not values and _is_quantity(given.sides[0]) and _is_number(wanted):
            values = _values(given.sides[1:], given.signs[1:])
        if values and given.signs[0] in EQUATION_SIGNS:
            return _any_equal(values, [wanted])
    ranges = _interval(given), _interval(wanted)
    if all(ranges):
        (name, group), (other_name, other_group) = ranges
        return (name == other_name or None in (name, other_name)) and equal(group, other_group)
    if not (isinstance(given, Relation) and isinstance(wanted, Relation)):
        return False
    return _equal_chains(given, wanted)


def _any_equal(given, wanted):
    return any(equal(a, b) for a in given for b in wanted)


def _denoted(found):
    """(name, values) of `x = 5`, `f(x) = 2x = x + x` or `x \\in [1, 2]`, else None."""
    if not isinstance(found, Relation) or not _is_name(found.sides[0]):
        return None
    if found.signs == ["\\in"] and isinstance(found.sides[1], Group | Joined):
        return _written(found.sides[0]), found.sides[1:]
    if not set(found.signs) <= EQUATION_SIGNS:
        return None
    if isinstance(found.sides[0], Text) and isinstance(found.sides[-1], Text):
        return None  # MR = SRMC is a relation of two names
    values = _values(found.sides[1:], found.signs[1:])
    return (_written(found.sides[0]), values) if values else None


def _values(sides, signs):
    """The sides of a chain that all have one value, or [] where they differ."""
    if not set(signs) <= EQUATION_SIGNS or any(side is None for side in sides):
        return []
    for previous, sign, side in zip(sides, signs, sides[1:]):
        rounded = sign == "\\approx" and _is_approximation(previous, side)
        if not rounded and not equal(previous, side):
            return []
    return sides


def _is_approximation(exact, decimal):
    r"""Whether a decimal is an exact value rounded, as in 14/3 \approx 4.67."""
    if not (isinstance(exact, Value) and isinstance(decimal, Value)):
        return False
    if exact.places is not None or not decimal.places or decimal.places < 1:
        return False
    difference = (exact.expression - decimal.expression).evalf(30)
    return bool(difference.is_real and abs(difference) <= 0.5 * 10.0**-decimal.places)


def _is_name(found):
    """Whether this is a symbol, a word or a tuple of symbols. A derivative is no name: y' = 3y."""
    if isinstance(found, Group):
        return found.opening == "(" and all(map(_is_name, found.items))
    if not isinstance(found, Value) or found.unit or not found.expression.is_Symbol:
        return isinstance(found, Text)
    name = str(found.expression)
    marks = ("'", "/", "\\dot", "\\ddot")
    is_derivative = not name.endswith(")") and any(mark in name for mark in marks)
    return found.expression != INFINITY and not is_derivative


def _is_quantity(found):
    """Whether this is an expression in symbols alone, as a + b, whose value an answer may be."""
    if not isinstance(found, Value) or found.unit or not found.expression.free_symbols:
        return False
    return found.expression.atoms(sympy.Number) <= {sympy.S.NegativeOne, sympy.S.Half}


def _is_number(found):
    return isinstance(found, Value) and not found.expression.free_symbols


def _name(found):
    """The name that an item of a list gives to its value, or None."""
    denoted = _denoted(found)
    return denoted and denoted[0]


def _written(name):
    if isinstance(name, Group):
        return ",".join(map(_written, name.items))
    return name.text if isinstance(name, Text) else str(name.expression)


def _interval(found):
    """(name or None, Group) of x < 3, < 3 or 2 < x < 3, else None."""
    if isinstance(found, Group) and not _is_set(found) and len(found.items) == 2:
        return None, found
    if not isinstance(found, Relation):
        return None
    if found.signs == ["\\in"] and _is_name(found.sides[0]):
        inside = _interval(found.sides[1])
        return inside and (_written(found.sides[0]), inside[1])
    if not set(found.signs) <= ORDER.keys():
        return None
    sides, signs = found.sides, found.signs
    if signs[0] in (">", "\\geq"):  # from right to left
        sides, signs = sides[::-1], [ORDER[sign] for sign in signs[::-1]]
    strict = [sign == "<" for sign in signs]
    if set(signs) - {"<", "\\leq"}:
        return None
    if len(sides) == 3 and _is_name(sides[1]):
        name, low, high = sides[1], sides[0], sides[2]
    elif len(sides) == 2 and (sides[0] is None or _is_name(sides[0])):
        name, low, high, strict = sides[0], Value(-INFINITY), sides[1], [True, *strict]
    elif len(sides) == 2 and (sides[1] is None or _is_name(sides[1])):
        name, low, high, strict = sides[1], sides[0], Value(INFINITY), [*strict, True]
    else:
        return None
    if _is_name(low) or _is_name(high) or not (isinstance(low, Value) and isinstance(high, Value)):
        return None
    group = Group("(" if strict[0] else "[", [low, high], ")" if strict[-1] else "]")
    return (None if name is None else _written(name)), group


def _equal_chains(given, wanted):
    """Two relations: the same sides, or for single signs a multiple of the same difference."""
    given, wanted = _oriented(given), _oriented(wanted)
    if given.signs != wanted.signs:
        return False
    if None in given.sides or None in wanted.sides:
        missing = [side is None for side in given.sides] == [side is None for side in wanted.sides]
        return missing and _equal_in_order(given.sides[1:], wanted.sides[1:])
    if _equal_in_order(given.sides, wanted.sides):
        return True
    if len(given.signs) > 1:
        return False
    if given.signs[0] in ("=", "\\neq") and _equal_in_order(given.sides[::-1], wanted.sides):
        return True
    differences = []
    for left, right in (given.sides, wanted.sides):
        if not (isinstance(left, Value) and isinstance(right, Value)) or left.unit or right.unit:
            return False
        differences.append(left.expression - right.expression)
    if any(difference.is_number for difference in differences):
        return False
    if _is_no_constant(differences[0] / differences[1]):
        return False
    ratio = sympy.simplify(differences[0] / differences[1])
    return bool(
        ratio.is_number
        and ratio.is_finite
        and ((given.signs[0] in ("=", "\\neq") and ratio != 0) or ratio.is_positive)
    )


def _oriented(relation):
    """The chain read from the small end."""
    if relation.signs[0] not in (">", "\\geq"):
        return relation
    signs = [ORDER.get(sign, sign) for sign in relation.signs[::-1]]
    return Relation(relation.sides[::-1], signs)
