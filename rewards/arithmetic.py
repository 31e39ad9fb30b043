"""Exact value of a sum a model wrote, without running what it wrote."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

_MAX_CHARS = 200
_MAX_DEPTH = 50
_MAX_NODES = 100
_MAX_LITERAL = 10**12

_ALPHABET = re.compile(r"[0-9+\-*/() ]*")
_SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-"})
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Exact value and literals of a sum like "(3+5)*2"; None for anything else.

    Integers, `+ - * /` (also the typographic times, divide and minus), signs and parentheses. The
    tree gives both value and literals, so a rule such as "each number once" is checked on what was
    computed. `**` is not in the table, so "9**9**9" is None at once rather than a hang.
    """
    if len(text) > _MAX_CHARS:
        return None
    text = text.strip().translate(_SIGNS)
    if not _ALPHABET.fullmatch(text):
        return None
    literals: list[int] = []
    nodes = 0

    def value(node: ast.expr, depth: int) -> Fraction:
        nonlocal nodes
        nodes += 1
        if depth > _MAX_DEPTH or nodes > _MAX_NODES:
            raise ValueError("too big")
        if isinstance(node, ast.BinOp):
            left, right = value(node.left, depth + 1), value(node.right, depth + 1)
            return _BINARY[type(node.op)](left, right)
        if isinstance(node, ast.UnaryOp):
            return _UNARY[type(node.op)](value(node.operand, depth + 1))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            if node.value > _MAX_LITERAL:
                raise ValueError("too big")
            literals.append(node.value)
            return Fraction(node.value)
        raise KeyError(type(node).__name__)

    try:
        return value(ast.parse(text, mode="eval").body, 0), literals
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError, MemoryError):
        return None
