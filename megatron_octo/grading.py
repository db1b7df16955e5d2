"""The final answer out of a response, and whether it equals the reference. RL and evaluation share it.

Safe to call from any thread (no signals) and on any text: nothing here raises on what a model wrote.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_SYMBOLIC_CHARACTERS = 256
_PIECES = re.compile(r"\\boxed\s*\{|\\fbox\s*\{|\\.|[{}]", re.DOTALL)
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[ ,;:!]|~|\\quad|\\qquad|\s+")
_SIZES = re.compile(r"\\(?:left|right|bigl|bigr|big|Big|displaystyle)(?![a-zA-Z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9a-z])(?![0-9])")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,64}(?:\.[0-9]{0,64})?|\.[0-9]{1,64})")
_FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?[0-9]{1,64})\}\{([+-]?[0-9]{1,64})\}|([+-]?[0-9]{1,64})/([0-9]{1,64})")
_UNIT_WORDS = (
    "degrees?|dollars?|cents?|percent|points?|units?|miles?|feet|foot|inch(?:es)?|yards?|meters?|metres?|hours?|"
    "minutes?|seconds?|days?|weeks?|months?|years?|mph|km/h|km|cm|mm|kg|ft|apples?|books?|coins?|people|students?|"
    "(?:square|cubic|sq\\.?)(?:units?|feet|inch(?:es)?|cm|meters?|miles?|yards?)"
)
_UNITS = re.compile(rf"(?<=[0-9}}.])(?:{_UNIT_WORDS})(?:\^\{{?[23]\}}?)?$")
_ASSIGNMENT = re.compile(r"[a-z](?:_[0-9a-z])?=(?=[^=])|answeris:?|answer:")
# Text on which exact arithmetic can run away: a power or a factorial of more than three digits, a tower of powers.
_RUNAWAY = re.compile(
    r"(?:\^|\*\*)\{?\(?[+-]?[0-9]{4,}|(?:\^|\*\*).*(?:\^|\*\*).*(?:\^|\*\*)|[0-9]{3,}\)*!|!!|[0-9]{65,}"
)


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

    The order of tests is the paper's (string, then math-verify); exact numbers come between, so that
    most answers never reach the symbolic part.
    """
    a, b = normalise(answer), normalise(reference)
    if not a or not b:
        return False
    if a == b:
        return True
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x == y
    return _symbolically_equal(a, b)


def normalise(answer: str) -> str:
    """An answer without what does not change its meaning: spaces, dollars, units, `x =`, LaTeX spelling; lower case."""
    out = answer.strip().strip("$").replace("\u2212", "-").replace("\u2013", "-")
    while (inner := extract_answer(out)) is not None:
        out = inner
    out = out.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    out = re.sub(r"\\[dt]frac", r"\\frac", out)
    out = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "", out)
    out = _SIZES.sub("", _WRAPPERS.sub(r"\1", out))
    out = _SHORT_ROOT.sub(r"\\sqrt{\1}", _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", out))
    out = _SPACES.sub("", out).replace("{,}", ",").lower().rstrip(".").rstrip(",")
    out = _ASSIGNMENT.sub("", out, count=1) if _ASSIGNMENT.match(out) else out
    out = _UNITS.sub("", out)
    if re.fullmatch(r"\([a-z]\)", out):  # a choice
        out = out[1]
    return out.replace(",", "") if _THOUSANDS.fullmatch(out) else out


def number(answer: str) -> Fraction | None:
    """The exact value of a normalised answer that is a plain number or a fraction of integers, else None."""
    if _NUMBER.fullmatch(answer):
        return Fraction(answer if answer[-1] != "." else answer[:-1])
    if match := _FRACTION.fullmatch(answer):
        sign, top, bottom, plain_top, plain_bottom = match.groups()
        numerator, denominator = int(top or plain_top), int(bottom or plain_bottom)
        if denominator == 0:
            return None
        return Fraction(numerator, denominator) * (-1 if sign == "-" else 1)
    return None


def _symbolically_equal(a: str, b: str) -> bool:
    """math-verify's opinion; its own time limits are signals, so what could run for ever is refused before."""
    if any(len(text) > MAX_SYMBOLIC_CHARACTERS or _RUNAWAY.search(text) for text in (a, b)):
        return False
    from math_verify import parse, verify

    quiet = logging.getLogger("math_verify")
    quiet.setLevel(logging.CRITICAL)  # it warns at each call that its time limits are off
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    parsed_a, parsed_b = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (a, b))
    return bool(parsed_a and parsed_b and verify(parsed_b, parsed_a, timeout_seconds=None))
