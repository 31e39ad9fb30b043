"""The last stage: are two expressions with roots, constants, functions or variables equal?

Two judges have to agree. The expressions are evaluated to 100 digits at fixed points and must agree
in the first 40; this also ends most comparisons of different expressions. Then Math-Verify, which
simplifies symbolically, must call them equal. It gets them as sympy objects that are built here
from our trees: it never sees the text of a model, from which it would read 17 = 42 as 42, and the
head of a formula it cannot parse as the whole.

Math-Verify gets no timeout of its own, because its timeouts are alarms: the pool's deadline ends a
comparison that does not. Importing this module takes about a second.
"""

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.math_exact import TooBig, exact
from rewards.math_expression import Node, symbols

try:
    import mpmath
    import sympy
    from math_verify import verify
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        'math_answer compares expressions with Math-Verify: pip install "grpo[math]"'
    ) from missing

# It warns, once per process, that it was asked for no timeout.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_DIGITS = 100
_AGREE = 40
_MAX_EXPONENT = 10_000
_MAX_SYMBOLIC_EXPONENT = 50  # of a sum: simplifying may multiply it out
_MAX_ARGUMENT = 10**6
# Positive, negative and large, so that |x| and x, or x^2 and x^3, do not agree everywhere.
_POINTS = (("1.3717", "0.6133"), ("-0.8291", "-1.1173"), ("3.0517", "-2.7129"))


def equal(gold: Node, said: Node) -> bool:
    """Whether two expressions are equal for all values of their variables.

    Raises:
      TooBig: an exponent or argument in them is beyond what is worked out.
    """
    if gold == said:
        return True
    _check_size(gold)
    _check_size(said)
    names = sorted(symbols(gold) | symbols(said))
    return _agree(gold, said, names) and _simplify_to_same(gold, said, names)


def _check_size(node: Node) -> None:
    if node.op == "^":
        power = exact(node.args[1])
        base = node.args[0]
        limit = _MAX_SYMBOLIC_EXPONENT if base.op in ("+", "-") else _MAX_EXPONENT
        if power is not None and abs(power) > limit:
            raise TooBig("a power too big to be worked out")
    for each in node.args:
        _check_size(each)


def _agree(gold: Node, said: Node, names: Sequence[str]) -> bool:
    """Whether both have the same 40 digits wherever both have a value, and have one somewhere."""
    compared = 0
    with mpmath.workdps(_DIGITS):
        for start, step in _POINTS[: 3 if names else 1]:
            point = {name: mpmath.mpf(start) + i * mpmath.mpf(step) for i, name in enumerate(names)}
            try:
                ours, theirs = _value(gold, point), _value(said, point)
            except (ArithmeticError, ValueError, mpmath.libmp.NoConvergence):
                continue
            if not mpmath.isfinite(ours) or not mpmath.isfinite(theirs):
                continue
            compared += 1
            size = max(abs(ours), abs(theirs))
            if abs(ours - theirs) > size * mpmath.mpf(10) ** -_AGREE:
                return False
    return compared > 0


def _value(node: Node, point: Mapping[str, Any]) -> Any:
    if node.op in ("num", "mixed"):
        return mpmath.mpf(node.value.numerator) / node.value.denominator
    if node.op == "sym":
        return point[node.name] if node.name in point else _CONSTANTS[node.name]()
    values = [_value(each, point) for each in node.args]
    if node.op == "^" and abs(values[1]) > _MAX_EXPONENT:
        raise TooBig("a power too big to be worked out")
    if node.op in _GROWING and abs(values[0]) > _MAX_ARGUMENT:
        raise TooBig(f"an argument of {node.op} too big to be worked out")
    return _FUNCTIONS[node.op](*values)


def _root(value: Any, index: Any) -> Any:
    """The real root of a negative number if there is one, else the principal root."""
    if index == 2:
        return mpmath.sqrt(value)
    odd = index == int(mpmath.re(index)) and int(index) % 2 == 1
    if odd and mpmath.im(value) == 0 and mpmath.re(value) < 0:
        return -mpmath.root(-value, int(index))
    return mpmath.power(value, 1 / index)


def _power(base: Any, exponent: Any) -> Any:
    if base == 0 and mpmath.re(exponent) <= 0:
        raise ZeroDivisionError
    return mpmath.power(base, exponent)


_CONSTANTS = {
    "pi": lambda: +mpmath.pi,
    "e": lambda: +mpmath.e,
    "i": lambda: mpmath.mpc(0, 1),
}
_GROWING = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh exp factorial binom floor ceil".split()
)
_FUNCTIONS: dict[str, Any] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": _power,
    "neg": lambda a: -a,
    "abs": abs,
    "deg": lambda a: a * mpmath.pi / 180,
    "root": _root,
    "factorial": mpmath.factorial,
    "binom": mpmath.binomial,
    "floor": mpmath.floor,
    "ceil": mpmath.ceil,
    "log": lambda a, base=None: mpmath.log(a) / mpmath.log(10 if base is None else base),
    "lg": lambda a, base=None: mpmath.log(a) / mpmath.log(10 if base is None else base),
    "ln": mpmath.log,
    "arcsin": mpmath.asin,
    "arccos": mpmath.acos,
    "arctan": mpmath.atan,
    **{
        name: getattr(mpmath, name) for name in "sin cos tan cot sec csc sinh cosh tanh exp".split()
    },
}


def _simplify_to_same(gold: Node, said: Node, names: Sequence[str]) -> bool:
    # Names of our own: Math-Verify takes N for n.
    variables = {name: sympy.Symbol(f"x_{i}", real=True) for i, name in enumerate(names)}
    known = variables | {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}
    return bool(
        verify(
            build(gold, known),
            build(said, known),
            numeric_precision=30,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )


def build(node: Node, known: Mapping[str, Any]) -> Any:
    """The sympy object of an expression whose names are `known`. Does not check its size."""
    if node.op in ("num", "mixed"):
        return sympy.Rational(node.value.numerator, node.value.denominator)
    if node.op == "sym":
        return known[node.name]
    args = [build(each, known) for each in node.args]
    return _BUILD[node.op](*args) if node.op in _BUILD else getattr(sympy, _NAMES[node.op])(*args)


def _real_root(value: Any, index: Any) -> Any:
    odd = index.is_Integer and index % 2 == 1
    return sympy.real_root(value, index) if odd and value.is_negative else value ** (1 / index)


def _log(value: Any, base: Any = 10) -> Any:
    return sympy.log(value) / sympy.log(base)


_BUILD: dict[str, Any] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": operator.pow,
    "neg": operator.neg,
    "deg": lambda a: a * sympy.pi / 180,
    "root": _real_root,
    "log": _log,
    "lg": _log,
}
_NAMES = {
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh exp factorial floor".split()},
    "abs": "Abs",
    "binom": "binomial",
    "ceil": "ceiling",
    "ln": "log",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
}
