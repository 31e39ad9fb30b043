"""Multiple choice."""

import re

from rewards.api import Problem, Verdict
from rewards.formats import answer_text

_MAX_ANSWER = 1_000
# "B", "(B)", "B.", "B)", "**B**", "\boxed{B}"; in what follows a mark, the choice's own text.
_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.:)]|$)\s*")


def choice_answer(completion: str, problem: Problem) -> float:
    """1.0 if the answer block names the reference's letter, and nothing but that choice.

    "B", "(b)", "B." and "B)" are the same. If `problem.meta["choices"]` lists the texts of A, B, C
    and so on, then the text alone is an answer too, as is "B. its text"; a letter with another
    text is none, and neither is "A or B".
    """
    answer = answer_text(completion)
    if answer is None or not answer.strip():
        return Verdict(0.0, "no answer")
    if len(answer) > _MAX_ANSWER:
        return Verdict(0.0, "too long", answer)
    letter = _chosen(answer.strip(), [_plain(text) for text in problem.meta.get("choices", ())])
    if letter is None:
        return Verdict(0.0, "no choice", answer)
    right = letter == str(problem.reference).strip().upper()
    return Verdict(float(right), "right" if right else "wrong", letter)


def _chosen(answer: str, choices: list[str]) -> str | None:
    match = _LETTER.match(answer)
    if match is None:
        return _letter_of(_plain(answer), choices)
    letter, rest = match.group(1).upper(), _plain(answer[match.end() :])
    if not rest or _letter_of(rest, choices) == letter:
        return letter
    return _letter_of(_plain(answer), choices)


def _letter_of(text: str, choices: list[str]) -> str | None:
    """The one choice with this text; None for two equal ones."""
    return chr(ord("A") + choices.index(text)) if choices.count(text) == 1 else None


def _plain(text: str) -> str:
    return " ".join(str(text).split()).casefold().removesuffix(".")
