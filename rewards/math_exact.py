"""Exact values of rational expressions, within limits, and whether a number is worked out."""

import math
from collections.abc import Callable
from fractions import Fraction

from rewards.math_expression import Node

_MAX_BITS = 60_000  # of an exact number: 10^(10^4) is still compared, 10^(10^5) is not
_MAX_FACTORIAL = 3_000


class TooBig(ValueError):
    """A number or power that nobody should have to work out to judge an answer."""


def is_literal(node: Node) -> bool:
    """Whether a number is written out: 12, -0.5, 3/4, 1 3/4, 2.5 x 10^3, 2^10."""
    if node.op in ("num", "mixed"):
        return True
    if node.op == "neg":
        return node.args[0].op != "neg" and is_literal(node.args[0])
    if node.op in ("/", "^"):
        return all(_is_signed_number(each) for each in node.args)
    if node.op == "*":
        left, right = node.args
        return _is_signed_number(left) and _is_power_of_ten(right)
    return False


def _is_signed_number(node: Node) -> bool:
    return node.op == "num" or (node.op == "neg" and node.args[0].op == "num")


def _is_power_of_ten(node: Node) -> bool:
    if node.op != "^" or not _is_signed_number(node.args[1]):
        return False
    return node.args[0].op == "num" and node.args[0].value == 10


def exact(node: Node, point: dict[str, Fraction] | None = None) -> Fraction | None:
    """The exact value of a rational expression at `point`, None if it is not one.

    Raises:
      TooBig: a number in it would have over 60,000 bits.
    """
    if node.op in ("num", "mixed"):
        return node.value
    if node.op == "sym":
        return point.get(node.name) if point else None
    if node.op not in _ARITHMETIC:
        return None
    values = [exact(each, point) for each in node.args]
    if None in values:
        return None
    return _ARITHMETIC[node.op](*values)


def _divide(top: Fraction, bottom: Fraction) -> Fraction | None:
    return top / bottom if bottom else None


def _raise(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        return None
    if abs(exponent) * _bits(base) > _MAX_BITS:
        raise TooBig("a power too big to be worked out")
    return base ** int(exponent)


def _bits(value: Fraction) -> int:
    """0 for 0, 1 and -1, whose powers do not grow."""
    return max(abs(value.numerator).bit_length(), value.denominator.bit_length()) - 1


def _factorial(n: Fraction) -> Fraction | None:
    if n.denominator != 1 or n < 0:
        return None
    if n > _MAX_FACTORIAL:
        raise TooBig("a factorial too big to be worked out")
    return Fraction(math.factorial(int(n)))


def _binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator != 1 or k.denominator != 1 or min(n, k) < 0:
        return None
    if n > _MAX_FACTORIAL:
        raise TooBig("a binomial too big to be worked out")
    return Fraction(math.comb(int(n), int(k)))


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > 4 * _MAX_BITS:
        raise TooBig("a number too big to be worked out")
    return value


_ARITHMETIC: dict[str, Callable[..., Fraction | None]] = {
    "+": lambda a, b: _bounded(a + b),
    "-": lambda a, b: _bounded(a - b),
    "*": lambda a, b: _bounded(a * b),
    "/": _divide,
    "^": _raise,
    "neg": lambda a: -a,
    "abs": abs,
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
    "factorial": _factorial,
    "binom": _binomial,
}
