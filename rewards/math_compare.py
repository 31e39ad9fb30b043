"""Whether two answers that were read are the same answer, and if not, why not.

Rational numbers are compared here, exactly. Only what is left over, expressions with roots,
constants, functions or variables, goes to rewards/math_symbolic.py.
"""

from collections.abc import Sequence
from fractions import Fraction

from rewards.math_exact import exact, is_literal
from rewards.math_expression import Node, symbols
from rewards.math_syntax import Answer, Based, Group, Named, Relation, Scalar, Words

_UNORDERED = ("list", "set", "union")
_KIND_NAMES = {Scalar: "an expression", Words: "words", Based: "a number with a base"}


def difference(gold: Answer, said: Answer) -> str:
    """The empty string if `said` is the same answer as `gold`, else what differs.

    Raises:
      TooBig: it cannot be said within the limits.
    """
    if gold == said:
        return ""
    gold, said = _same_view(gold, said)
    if isinstance(gold, Scalar) and isinstance(said, Scalar):
        return _scalars(gold, said)
    if isinstance(gold, Relation) and isinstance(said, Relation):
        return _relations(gold, said)
    if isinstance(gold, Named) and isinstance(said, Named):
        if gold.name != said.name:
            return f"the value of {said.name}, not of {gold.name}"
        return difference(gold.answer, said.answer)
    if isinstance(gold, Group) and isinstance(said, Group):
        return _groups(gold, said)
    if type(gold) is type(said):
        return "not the reference"
    return f"{_kind(said)} where the reference is {_kind(gold)}"


def _kind(answer: Answer) -> str:
    if isinstance(answer, Group):
        return {"()": "a tuple or open interval", "union": "a union"}.get(
            answer.kind, f"a {answer.kind}" if answer.kind.isalpha() else f"a {answer.kind} group"
        )
    return _KIND_NAMES.get(type(answer), "an equation")


def _same_view(gold: Answer, said: Answer) -> tuple[Answer, Answer]:
    """Drops a name that only one of the two gives, or takes both as equations."""
    if isinstance(gold, Words) or isinstance(said, Words):
        return _as_words(gold), _as_words(said)
    if isinstance(gold, Relation) and isinstance(said, Named):
        return gold, _as_equation(said)
    if isinstance(gold, Named) and isinstance(said, Relation):
        return _as_equation(gold), said
    if isinstance(gold, Named) and not isinstance(said, Named):
        return gold.answer, said
    if isinstance(said, Named) and not isinstance(gold, Named):
        return gold, said.answer
    return gold, said


def _as_words(answer: Answer) -> Answer:
    return Words(answer.text.replace(" - ", " ")) if isinstance(answer, Words) else answer


def _as_equation(named: Named) -> Answer:
    if isinstance(named.answer, Scalar) and len(named.name) == 1:
        return Relation("=", Node("sym", name=named.name), named.answer.node)
    return named


def _groups(gold: Group, said: Group) -> str:
    unordered = gold.kind in _UNORDERED
    same_kind = gold.kind == said.kind or {gold.kind, said.kind} == {"list", "set"}
    if not same_kind:
        return f"{_kind(said)} where the reference is {_kind(gold)}"
    if len(gold.items) != len(said.items):
        return f"{len(said.items)} items, the reference has {len(gold.items)}"
    if not unordered:
        pairs = zip(gold.items, said.items, strict=True)
        return next((found for found in (difference(*pair) for pair in pairs) if found), "")
    return _unordered(gold.items, list(said.items))


def _unordered(gold: Sequence[Answer], left: list[Answer]) -> str:
    """Matches one to one; greedy is right because being the same answer is transitive."""
    for item in gold:
        match = next((other for other in left if not difference(item, other)), None)
        if match is None:
            return "an item of the reference is missing"
        left.remove(match)
    return ""


def _relations(gold: Relation, said: Relation) -> str:
    """One is the other times a constant, which is positive if they are inequalities."""
    flipped = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
    said_zero = Node("-", (said.left, said.right))
    if said.op != gold.op:
        if flipped.get(said.op) != gold.op:
            return "another relation"
        said_zero = Node("-", (said.right, said.left))
    gold_zero = Node("-", (gold.left, gold.right))
    names = symbols(gold_zero)
    if not names or names != symbols(said_zero) or _infinite(gold_zero) or _infinite(said_zero):
        return "another relation"
    factor = _ratio(gold_zero, said_zero, sorted(names))
    if gold.op not in ("=", "!=") and factor < 0:
        return "another relation"
    scaled = Node("*", (Node("num", value=abs(factor)), said_zero))
    return _symbolic(gold_zero, scaled if factor > 0 else Node("neg", (scaled,)))


def _ratio(gold: Node, said: Node, names: Sequence[str]) -> Fraction:
    """How many times `said` is `gold` at a point where both are rational and not zero, else 1."""
    for shift in range(4):
        point = {name: Fraction(7 * i + 5 + shift * 11, 3) for i, name in enumerate(names)}
        values = [exact(node, point) for node in (gold, said)]
        if values[0] and values[1]:
            return values[0] / values[1]
    return Fraction(1)


def _scalars(gold: Scalar, said: Scalar) -> str:
    if gold.unit and said.unit and gold.unit != said.unit:
        return f"{said.unit}, not {gold.unit}"
    gold_value, said_value = exact(gold.node), exact(said.node)
    literal = is_literal(gold.node)
    if gold_value is not None and said_value is not None:
        if gold_value != said_value:
            return "another number"
        return "not worked out" if literal and not is_literal(said.node) else ""
    if literal:
        return "not the number, or not worked out"
    if _infinite(gold.node) or _infinite(said.node):
        return "not the same infinity"
    if symbols(gold.node) != symbols(said.node):
        return "other variables"
    return _symbolic(gold.node, said.node)


def _symbolic(gold: Node, said: Node) -> str:
    from rewards import math_symbolic  # imports sympy, which takes a second and a lot of memory

    return "" if math_symbolic.equal(gold, said) else "another expression"


def _infinite(node: Node) -> bool:
    return node.op == "inf" or any(_infinite(each) for each in node.args)
