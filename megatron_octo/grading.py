"""The final answer out of a response, and whether it equals the reference. RL and evaluation share it.

Safe to call from any thread (no signals) and on any text: nothing here raises on what a model wrote.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from megatron_octo import symbolic

MAX_CHARACTERS = 2_000
"""A longer answer equals only itself."""
MAX_SYMBOLIC_CHARACTERS = 256
_PIECES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)  # some escape the backslash
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,64}\.?|[0-9]{0,64}\.[0-9]{1,64})(?:e[+-]?[0-9]{1,2})?")
_FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?[0-9]{1,64})\}\{([+-]?[0-9]{1,64})\}|([+-]?[0-9]{1,64})/([0-9]{1,64})")
_PRODUCT = re.compile(  # 6.02\times10^{23}
    rf"({_NUMBER.pattern})(?:\\times|\\cdot|\*)([1-9][0-9]{{0,2}})(?:\^(?:([0-9])|\{{([+-]?[0-9]{{1,3}})\}}))?"
)
_REPEATING = re.compile(r"([+-]?)([0-9]{0,32})\.([0-9]{0,32})\\overline\{([0-9]{1,32})\}")
# Exact arithmetic runs away on powers and factorials of more than three digits and on towers of powers. The symbolic
# engine would be ended by the kernel then; this is sooner.
_RUNAWAY = re.compile(
    r"(?:\^|\*\*)\{?\(?[+-]?[0-9]{4,}|(?:(?:\^|\*\*)[^-+,;=&a-z]*){3}|[0-9]{3,}\)*!|[0-9]{2}!\)+!|!!|[0-9]{65,}"
)
_TOWER = re.compile(r"(?:\^|\*\*)[{(\s]*([0-9]{1,3})[})\s]*(?:\^|\*\*)[{(\s]*([0-9]{1,3})(?![0-9])")
# Of what has no value the symbolic engine makes one: a product of a word's letters, the truth of a relation of numbers.
_VALUELESS = re.compile(
    r"[a-z]{3,}|no|on|[iv]{2}|\([ivx]{2,}\)"  # a word; (iv)
    r"|(?!.*(?:and|or))[0-9a-z]*[a-z][0-9][0-9a-z]*"  # a label, such as A2
    r"|.*[0-9)}]\(?(?:(?:or|and|but|at)[a-z]{3,}|not).*|[0-9]+[a-z]{3,}(?:and|or)[0-9].*"  # 5 or more; 5 red and 3 blue
    r"|[^a-z\\<>]*(?:(?:[<>]|\\(?:[lg](?:eq?|t)|neq?)(?![a-z]))[^a-z\\<>]*)+"
)
# To math-verify "million" is a unit like any other, and the case of a letter nothing: it gets what both stand for.
_SCALES = {"hundred": "10^2", "thousand": "10^3", "million": "10^6", "billion": "10^9", "dozen": "12"}
_SCALE = re.compile(
    rf"(?<=[0-9}}.)])(?:\\[ ,;:!]|~|\s)*(\\(?:text|mathrm|mbox)\s*\{{)?\s*({'|'.join(_SCALES)})s?(?![a-z])",
    re.IGNORECASE,
)
# The letter of 5m is a unit only where the other answer has that unit, too. Otherwise it is a factor in both.
_LETTER = re.compile(r"(?<=[0-9}])([mghs])(?=[\s.,;$)*\\]*$)", re.IGNORECASE)
_SWAPPED = re.compile(
    r"(?:\\left\s*)?\(\s*y\s*,\s*x\s*(?:\\right\s*)?\)\s*=\s*(?:\\left\s*)?\(([^(),]*),([^(),]*?)(?:\\right\s*)?\)",
    re.IGNORECASE,
)
_CAPITAL = re.compile(r"(\\(?:Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega))(?![A-Za-z]|\s*_)")
# What an answer says it is the value of: x, f(3). That a function is called f or y means nothing.
_NAME = re.compile(
    r"^(?:([a-z](?:_[0-9a-z])?(?:\([-+.0-9]+\))?)|[a-z](?:_[0-9a-z])?\([a-z]\))=(?=[^=])(?!.*,.*=)|(?<=[^=])=([a-z])$"
)
_LIST_MARK = re.compile(r"floor|([(\[{])|([)\]}])|([,;]|and|or)")
_SET = re.compile(r"\\\{[^|:<>]*,[^|:<>]*\\\}")  # by what is in it, not by what is true of that
_TUPLE = re.compile(r"\([^()]*,[^()]*\)")  # or an open interval

_WORDS = r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|boldsymbol|mbox|operatorname|underline)\s*\{([^{}]*)\}"
_COUNTED = rf"(?!\\[a-z]+\s*\{{(?:\W*(?:or|and|not|but|at (?:least|most))\b|\s*[0-9])){_WORDS}"
_DEGREE = r"(?:\u00b0|\\degree(?![a-z])|\^\s*\{?\s*\\circ\s*+\}?)"
_POWER = r"(?:\^\{?([23])\}?)?"
_GAP = r"(?:\\[ ,;:]|~|\s)+"
# How a unit is compared: its names. Others, where they follow as text, only with each other.
_UNITS = {
    name: re.compile(names)
    for name, names in {
        "": "units?|points?|apples?|books?|coins?|people|students?",
        "%": r"\\?%|percent",
        "degree": "degrees?",
        "degree C": r"degrees?c(?:elsius)?",
        "degree F": r"degrees?f(?:ahrenheit)?",
        "dollar": "dollars?",
        "cent": "cents?",
        "mm": "mm|millimet(?:er|re)s?",
        "cm": "cm|centimet(?:er|re)s?",
        "m": "m|met(?:er|re)s?",
        "km": "km|kilomet(?:er|re)s?",
        "inch": "in|inch(?:es)?",
        "foot": "ft|foot|feet",
        "yard": "yds?|yards?",
        "mile": "mi|miles?",
        "g": "g|grams?",
        "kg": "kgs?|kilograms?",
        "pound": "lbs?|pounds?",
        "s": "s|secs?|seconds?",
        "minute": "mins?|minutes?",
        "hour": "h|hrs?|hours?",
        "day": "days?",
        "week": "weeks?",
        "month": "months?",
        "year": "yrs?|years?",
        "mile/hour": "mph|milesperhour|miles/hour",
        "km/hour": "km/h|kmph|kilomet(?:er|re)sperhour",
        "m/s": "m/s|met(?:er|re)spersecond",
        "am": "am",
        "pm": "pm",
    }.items()
}
_SHAPES = {"square": "2", "sq": "2", "sq.": "2", "cubic": "3"}
_UNIT = re.compile(r"(square|sq\.?|cubic)?(.*?)([23])?")
_BASE = re.compile(r"(?=[a-f]*[0-9])([0-9a-f]+)_\{?([2-9]|[1-9][0-9])\}?")  # a_1 is a variable
_UNIT_START = r"(?<=[0-9}.)])(?=\\?%|[a-z.]{2}|(?<![.)])[mghs]$)"  # one letter as in 5 m, never (x+1)m
_BARE_UNIT = "|".join(names.pattern for names in _UNITS.values())
_REWRITES = [  # of lower-case text, in this order; none changes what an answer means. A unit's mark is #
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(\*\*?|`)(.+)\1$", r"\2"),
        ("[\u2212\u2013]", "-"),
        ("\u03c0", r"\\pi "),
        ("\u221e|(?<!\\\\)infinity", r"\\infty "),
        ("\u00bd", r"\\frac{1}{2}"),
        (r"\u221a(?:\(([^()]*)\)|([0-9]+|[a-z]))", r"\\sqrt{\1\2}"),
        (
            rf"(?<![0-9])([0-9]+){_GAP}(?:([0-9]{{1,2}})/([0-9]+)|([0-9]{{3}})/([0-9]{{3,}}))",
            r"\1\\frac{\2\4}{\3\5}",
        ),
        (rf"(\\(?:sin|cos|tan|cot|sec|csc))[\s({{]*([0-9.]+)\s*{_DEGREE}\s*[)}}]?", r"\1(\2\\pi/180)"),
        (_DEGREE + r"\s*+(?:\\(?:text|mathrm)\{\s*)?([cf]?)\W*$", r"#degree\1"),
        (r"\\[()\[\]]|\\?\$|[\u20ac\u00a3]", ""),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\q?quad(?![a-z])", " "),
        (r"\\(?:left|right|bigg?[lr]?|displaystyle|approx)(?![a-z])|\\color\s*\{[^{}]*\}", ""),
        (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset"),
        (rf"(?<=[^\s(=,;+-])(?:\\[ ,;:!]|~|\s)*{_COUNTED}{_POWER}\s*[.,;]*$", r"#\1\2"),
        (_WORDS, r"\1"),
        (r"^\(([iv]{2}|[ivx]{3,})\)$", r"\1"),
        (r"^\(?([a-z])\)$|^\(?([a-e])\)(?:\\ |~|\s)(?!.*[\s,;/~]\(?[a-e]\)).*$", r"\1\2"),  # one choice
        (r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
        (rf"(?<=[0-9])(?<![0-9]{{4}}){_GAP}(?=[0-9]{{3}}(?![0-9]))", ""),  # thousands
        (rf"(?<=[0-9]){_GAP}(?=[0-9])", " "),  # any others are two numbers
        (r"(?<!\\)\\[ ,;:!]|~|(?<![0-9])\s+|\s+(?![0-9])", ""),
        (r"\{([,:])\}", r"\1"),
        (r"([ap])\.m(?![a-z])\.?", r"\1m"),
        (r"[.,;\\]+$", ""),
        (rf"{_UNIT_START}((?:sq\.?|square|cubic)?(?:{_BARE_UNIT})){_POWER}$", r"#\1\2"),
        (r"^\{([^{}]*)\}$", r"\1"),
        (r"\\frac(\{[^{}]*\})([0-9])", r"\\frac\1{\2}"),
        (r"\\frac([0-9])\{", r"\\frac{\1}{"),
        (r"\\sqrt([0-9a-z])(?![0-9])", r"\\sqrt{\1}"),
        (r"^(?:the)?(?:final)?answer(?:is:?|:)", ""),
    )
]


@dataclass(frozen=True, slots=True)
class Grade:
    """What a response is worth."""

    answer: str | None
    """The final answer as written; None where the response has none."""
    correct: bool
    """Whether it equals the reference."""
    failed: bool = False
    """The comparison itself broke; the answer then counts as wrong."""


def extract_answer(text: str) -> str | None:
    r"""The content of the last complete `\boxed{}`, braces nested to any depth; None where there is none."""
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    box = None
    for piece in _PIECES.finditer(text):
        token = piece.group()
        if token.endswith("{") and len(token) > 2:
            open_braces.append(piece.end())
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                box = (start, piece.start())
    content = text[slice(*box)].strip() if box else ""
    return content or None


def grade(response: str, reference: str) -> Grade:
    """Grade a response against the reference answer. Never raises."""
    answer = None
    try:
        answer = extract_answer(response)
        return Grade(answer, answer is not None and answers_equal(answer, reference))
    except Exception:  # a model can write anything
        return Grade(answer, correct=False, failed=True)


def is_correct(response: str, reference: str) -> bool:
    """Whether the response's final answer equals the reference. Never raises."""
    return grade(response, reference).correct


def answers_equal(answer: str, reference: str) -> bool:
    """Whether two answers mean the same: as strings, as numbers, then as mathematics.

    The order of tests is the paper's (string, then math-verify); exact numbers come between, so that most answers never
    reach the symbolic part.

    Raises:
        symbolic.Undecided: math-verify came to no verdict.
    """
    if max(len(answer), len(reference)) > MAX_CHARACTERS:
        return answer.strip() == reference.strip()
    answer, reference = _spelled_out(answer), _spelled_out(reference)
    a, b = measure(answer), measure(reference)
    if a.unit != b.unit:
        answer, reference = (_LETTER.sub(r"*\1", each) for each in (answer, reference))
        a, b = measure(answer), measure(reference)
    if not a.text or not b.text or a.disagrees(b):
        return False
    if a.text == b.text or a.text + a.words == b.text + b.words:  # 9 values, 9\text{ values}
        return True
    x, y = number(a.text), number(b.text)
    if x is not None and y is not None:
        return x == y or ("%" in (a.unit, b.unit) and x * a.share == y * b.share)
    if a.is_valueless or b.is_valueless or a.repeats_otherwise(b):
        return False
    pairs = [
        texts
        for texts in dict.fromkeys([(a.text, b.text), (answer, reference)])
        if not any(len(text) > MAX_SYMBOLIC_CHARACTERS or _runs_away(text) for text in texts)
    ]
    return bool(pairs) and symbolic.equal(*pairs)


def _runs_away(text: str) -> bool:
    towers = _TOWER.findall(text)  # 2^{2^{10}} is none yet, 2^{9^9} is one
    return bool(_RUNAWAY.search(text)) or any(int(base) ** int(power) > 9_999 for base, power in towers)


@dataclass(frozen=True, slots=True)
class Measure:
    """An answer without what does not change its meaning."""

    text: str
    """Lower case, without dollars, `x =` and spaces but between two numbers, in one spelling of LaTeX."""
    unit: str | None
    """What it counts: "cm2", "_2" for the base; None where it does not say, or in words that are not known."""
    words: str = ""
    """Those words, such as `boys`."""
    name: str | None = None
    """The x of `x = 3`. Two capitals, such as IV or AB, are a label and not a product: they name themselves."""

    @property
    def share(self) -> Fraction:
        """What one of the unit is worth: a hundredth, if it is a percent."""
        return Fraction(1, 100) if self.unit == "%" else Fraction(1)

    @property
    def is_valueless(self) -> bool:
        """Whether it is a word, a label, the digits of a base or a statement about numbers: equal as text or not."""
        return bool(_VALUELESS.fullmatch(self.text)) or (self.unit or "").startswith("_") or self.is_untrue

    @property
    def is_untrue(self) -> bool:
        """Whether it equates numbers, as `3=4`, that are not the same but for rounding: not 1/3=0.33 or 1/4=25%."""
        if self.unit is not None:  # of the last alone, it may be
            return False
        sides = [side for text in self.text.split("=") if (side := number(text)) is not None]
        return len(sides) == self.text.count("=") + 1 and 100 * (max(sides) - min(sides)) > max(map(abs, sides))

    @property
    def items(self) -> list[str]:
        """Those of a list, a tuple's too; of anything else the one."""
        text = self.text[1:-1] if _TUPLE.fullmatch(self.text) else self.text
        depth, start, items = 0, 0, []
        for mark in _LIST_MARK.finditer(text):
            opens, closes, separates = mark.groups()
            depth += bool(opens) - bool(closes)
            if separates and depth == 0:
                items.append(text[start : mark.start()])
                start = mark.end()
        return [item for item in (*items, text[start:]) if item]

    def disagrees(self, other: Measure) -> bool:
        """Whether both say what they count, what they name or whether order matters, and it is not the same.

        `1,2` says nothing of its order and may equal a set or a pair: as strings (as Hendrycks et al. compare) they
        differ, but math-verify, which has the paper's last word, takes it for either.
        """
        if self.unit is not None and other.unit is not None:
            less, more = sorted((self.unit, other.unit))
            if less != more and not more.startswith(f"{less} "):  # of any scale: degree, not degree C
                return True
        less, more = sorted((self.words, other.words), key=len)
        if less and less[0] != more[0] and less not in more:  # oz, ounces; ways, different ways
            return True
        if self.name and other.name and self.name != other.name:
            return not (self.name in _letters(other.text) or other.name in _letters(self.text))  # y=x+1 and x=y-1
        return any(_SET.fullmatch(a.text) and _TUPLE.fullmatch(b.text) for a, b in ((self, other), (other, self)))

    def repeats_otherwise(self, other: Measure) -> bool:
        """Whether something occurs in both lists, and not as often: to math-verify they are sets."""
        mine, others = (Counter(number(item) or item for item in each.items) for each in (self, other))
        return any(mine[item] != others[item] for item in mine.keys() & others.keys())


def measure(answer: str) -> Measure:
    """Rewrite an answer so that equal ones are more often equal as strings."""
    while (inner := extract_answer(answer)) is not None:
        answer = inner
    text = answer.lower().replace("#", "").strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text, _, words = text.partition("#")
    if first := re.match(r"([a-z](?:_[0-9a-z])?)=", text):  # x=1 or x=2; math-verify would see the 2 alone
        text = re.sub(rf"([,;]|and|or){first[1]}=", r"\1", text)
    name = _NAME.search(text)
    text = _NAME.sub("", text)
    text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    if (base := _BASE.fullmatch(text)) and all(int(digit, 16) < int(base[2]) for digit in base[1]):
        return Measure(base[1], f"_{base[2]}")
    is_label = len(text) == 2 and text.isalpha() and text.upper() in answer
    words = words.replace("#", "")
    unit = _unit(words)
    return Measure(
        text,
        "dollar" if unit is None and answer.count("$") % 2 else unit,  # two are LaTeX's
        words if unit is None else "",
        text if is_label else name and (name[1] or name[2]),
    )


def _spelled_out(answer: str) -> str:
    answer = _SCALE.sub(lambda scale: f"\\cdot{_SCALES[scale[2].lower()]}{scale[1] or ' '}", answer)
    answer = _SWAPPED.sub(r"(x,y)=(\2,\1)", answer)
    return _CAPITAL.sub(r"\1_{capital}", answer)


def _letters(text: str) -> str:
    return re.sub(r"\\[a-z]+", "", text)


def _unit(words: str) -> str | None:
    match = _UNIT.fullmatch(words)
    if match is None:
        return None
    shape, words, power = match.groups()
    names = (name for name, spelled in _UNITS.items() if spelled.fullmatch(words))
    return next((name + (power or _SHAPES.get(shape, "")) for name in names), None)


def number(text: str) -> Fraction | None:
    """The exact value of a plain number, one times a power, or a fraction of integers, else None."""
    if match := _PRODUCT.fullmatch(text):
        factor, base, digit, exponent = match.groups()
        return Fraction(factor.replace(".e", "e").removesuffix(".")) * Fraction(base) ** int(digit or exponent or 1)
    if _NUMBER.fullmatch(text):
        return Fraction(text.replace(".e", "e").removesuffix("."))
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom, plain_top, plain_bottom = match.groups()
        numerator, denominator = int(top or plain_top), int(bottom or plain_bottom)
        if denominator == 0:
            return None
        return Fraction(numerator, denominator) * (-1 if sign == "-" else 1)
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, repeated = match.groups()
        value = Fraction(int(whole or 0)) + Fraction(int(fixed or 0), 10 ** len(fixed))
        value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
        return -value if sign == "-" else value
    return None
