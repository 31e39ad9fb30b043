"""Final answers that are a number or a short text.

Numbers are compared as exact fractions, never as floats: 2**53 and 2**53 + 1 differ, and so do
10**400 and 10**401. Only ASCII digits count (`int` and `\\d` also take others, and `1_000`).
"""

import numbers
import re
from fractions import Fraction
from typing import Any

from rewards.api import Problem
from rewards.formats import answer_text

_MAX_NUMBER = 100  # characters
_MAX_TEXT = 1_000
_MAX_TAIL = 10_000  # how far from the end `last_number` looks

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(rf"([-+]?)\$?({_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:/([0-9]+))?")
# A minus counts as a sign only where it cannot be a subtraction: "5-3" ends in 3. The exponent is
# matched so that 1e9 is one thing that is no plain number, rather than a 1 and a 9.
_IN_PROSE = re.compile(
    r"(?:(?<![0-9A-Za-z.)\]])-\$?)?"
    rf"(?:(?<![0-9A-Za-z_]){_DIGITS}(?:\.[0-9]+)?|(?<![0-9A-Za-z_.])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?"
)


def parse_number(text: str) -> Fraction | None:
    """Exact value of a text that is one number, None for anything else.

    Integers, decimals and a/b, with a sign, with commas between groups of three digits. Around
    them spaces, `$` and one trailing full stop are dropped, and so is `%`: 50% is 50, as a problem
    that asks for a percentage expects. No exponents, no units, no words.
    """
    if len(text) > _MAX_NUMBER:
        return None
    text = text.strip().removesuffix(".").removesuffix("%").replace("\u2212", "-").strip("$ ")
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, magnitude, denominator = match.groups()
    if denominator is not None and int(denominator) == 0:
        return None
    value = Fraction(magnitude.replace(",", "")) / int(denominator or 1)
    return -value if sign == "-" else value


def tagged_answer(completion: str) -> str | None:
    """The answer block in a canonical spelling, for voting: equal answers are equal strings."""
    answer = answer_text(completion)
    if answer is None or len(answer) > _MAX_TEXT or not answer.strip():
        return None
    value = parse_number(answer)
    return _normal(answer) if value is None else str(value)


def last_number_text(completion: str) -> str | None:
    """The last number of the text in a canonical spelling, for voting; None if there is none.

    Looks at the last 10,000 characters. In "3/4" the last number is 4.
    """
    last = None
    for match in _IN_PROSE.finditer(completion[-_MAX_TAIL:]):
        last = match
    value = parse_number(last.group()) if last else None
    return None if value is None else str(value)


def exact_answer(completion: str, problem: Problem) -> float:
    """1.0 if the answer block is the reference's text, whatever its case and spacing."""
    answer = answer_text(completion)
    if answer is None or len(answer) > _MAX_TEXT:
        return 0.0
    return float(_normal(answer) == _normal(str(problem.reference)))


def numeric_answer(completion: str, problem: Problem) -> float:
    """1.0 if the answer block is one number (see `parse_number`) equal to the reference.

    Raises:
      ValueError: the reference is no number, which is a fault of the data set.
    """
    reference = _reference_number(problem.reference)
    answer = answer_text(completion)
    return float(answer is not None and parse_number(answer) == reference)


def last_number(completion: str, problem: Problem) -> float:
    """1.0 if the last number of the text equals the reference; for models that write no tags.

    Raises:
      ValueError: the reference is no number.
    """
    return float(last_number_text(completion) == str(_reference_number(problem.reference)))


def gsm8k_answer(completion: str, problem: Problem) -> float:
    """1.0 if the answer block, or else the line after the last `####`, is the reference number.

    A completion with an answer tag is judged by its answer block alone.

    Raises:
      ValueError: the reference is no number.
    """
    reference = _reference_number(problem.reference)
    if "<answer>" in completion:
        answer = answer_text(completion)
    else:
        _, marked, rest = completion.rpartition("####")
        answer = rest.partition("\n")[0] if marked else None
    return float(answer is not None and parse_number(answer) == reference)


def _reference_number(reference: Any) -> Fraction:
    """A float stands for the decimal it prints as: 0.1 is 1/10."""
    if isinstance(reference, Fraction):
        return reference
    if isinstance(reference, numbers.Integral):
        return Fraction(int(reference))
    if isinstance(reference, numbers.Real):
        return Fraction(repr(float(reference)))
    value = parse_number(reference) if isinstance(reference, str) else None
    if value is None:
        raise ValueError(f"the reference {str(reference)[:80]!r} is not a number")
    return value


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
