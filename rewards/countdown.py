"""The Countdown game: reach a target from given numbers, each used once."""

from fractions import Fraction

from rewards.answers import parse_number
from rewards.api import Problem
from rewards.arithmetic import arithmetic
from rewards.formats import answer_text

_MAX_ANSWER = 300


def countdown(completion: str, problem: Problem) -> float:
    """1.0 if the answer block's sum uses every number exactly once and makes the target.

    `problem.reference` is {"numbers": [3, 4, 2], "target": 14}. The sum may be followed by
    "= 14"; what stands there must then be the target itself. A sign ("-(2-5)") uses no number.
    """
    target = Fraction(problem.reference["target"])
    answer = answer_text(completion)
    if answer is None or len(answer) > _MAX_ANSWER:
        return 0.0
    expression, equals, result = answer.partition("=")
    evaluated = arithmetic(expression)
    if evaluated is None or (equals and parse_number(result) != target):
        return 0.0
    value, literals = evaluated
    return float(value == target and sorted(literals) == sorted(problem.reference["numbers"]))
