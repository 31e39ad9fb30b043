"""Answers that are a run of letters or a list of items."""

import operator
from typing import Any

from rewards.answers import parse_number
from rewards.api import BadReference, Problem
from rewards.formats import answer_text

_MAX_LETTERS = 1_000
_MAX_LIST = 10_000
_QUOTES = "'\"`"
_BETWEEN_LETTERS = str.maketrans("", "", " \t\r\n,-." + _QUOTES)
_BRACKETS = ("[]", "()")


def letters_answer(completion: str, problem: Problem) -> float:
    """1.0 if the answer block spells the reference: "c-a-t", "C A T" and "cat" are the same.

    Case, spaces, commas, hyphens, full stops and quotes do not count; every other character does.
    """
    answer = answer_text(completion)
    if answer is None or len(answer) > _MAX_LETTERS:
        return 0.0
    return float(_letters(answer) == _letters(str(problem.reference)))


def letters_share(completion: str, problem: Problem) -> float:
    """Share of the reference's letters that the answer block has in their places: a graded reward.

    Letters are read as in `letters_answer`, whose 1.0 is this one's; what is too long or too short
    is measured by the longer of the two, so "catcat" for "cat" is 1/2.

    Raises:
      BadReference: the reference has no letters.
    """
    expected = _letters(str(problem.reference))
    if not expected:
        raise BadReference(f"the reference {problem.reference!r} has no letters")
    answer = answer_text(completion)
    if answer is None or len(answer) > _MAX_LETTERS:
        return 0.0
    found = _letters(answer)
    in_place = sum(map(operator.eq, found, expected))
    return in_place / max(len(found), len(expected))


def list_answer(completion: str, problem: Problem) -> float:
    """1.0 if the answer block lists the reference's items in its order, as after sorting.

    Commas separate the items if there is one, else whitespace; one pair of brackets around the list
    and quotes around an item are dropped. Two numbers are compared by value, all else by text
    without case.
    """
    answer = answer_text(completion)
    if answer is None or len(answer) > _MAX_LIST:
        return 0.0
    items, expected = _items(answer), list(problem.reference)
    if len(items) != len(expected):
        return 0.0
    return float(all(map(_same_item, items, expected)))


def _letters(text: str) -> str:
    return text.translate(_BETWEEN_LETTERS).casefold()


def _items(text: str) -> list[str]:
    text = text.strip()
    if len(text) >= 2 and text[0] + text[-1] in _BRACKETS:
        text = text[1:-1]
    return [
        item.strip().strip(_QUOTES) for item in (text.split(",") if "," in text else text.split())
    ]


def _same_item(item: str, expected: Any) -> bool:
    value = parse_number(item)
    if value is not None and value == parse_number(str(expected)):
        return True
    return item.casefold() == str(expected).casefold()
