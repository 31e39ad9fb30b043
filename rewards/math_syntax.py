"""Reads a cleaned final answer: lists, sets, tuples, intervals, matrices, equations, and words.

Like rewards/math_expression.py, which reads the expressions in them, it reads all of a text or
refuses it.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rewards.math_expression import (
    CONSTANT_NAMES,
    MAX_DEPTH,
    Node,
    Parser,
    Token,
    Unreadable,
    symbols,
    tokens_of,
)
from rewards.math_words import KEEP_OUT, SEPARATORS, UNITS

MAX_CHARS = 1_000
_MAX_ITEMS = 40


@dataclass(frozen=True, slots=True)
class Scalar:
    """One expression, with what it counts or measures if that was written after it."""

    node: Node
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """An answer in words, such as a name or the letter of a choice; lower case."""

    text: str


@dataclass(frozen=True, slots=True)
class Based:
    """Digits with the base they are written in."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Group:
    """Several answers in one.

    Attributes:
      kind: "list", "set", "union", "minus", "ratio", "2x3" for a matrix, or the two brackets of a
        tuple or interval, such as "[)".
      items: the members; a matrix row by row.
    """

    kind: str
    items: tuple["Answer", ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation or inequality between two expressions; `op` is one of = < > <= >= !=."""

    op: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Named:
    """`x = 5` or `x \\in S`: an answer with the name of what it is the value of."""

    name: str
    answer: "Answer"


Answer = Scalar | Words | Based | Group | Relation | Named

_NAME = re.compile(r"[A-Za-z]\([a-z]\)|\([a-z](?:,[a-z])+\)", re.ASCII)
_MATRICES = frozenset(("pmatrix", "bmatrix", "matrix", "smallmatrix"))
_BASED = re.compile(r"([0-9][0-9A-Z]{0,100})_(?:\{([0-9]{1,2})\}|([0-9]))", re.ASCII)
_COMMAS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])", re.ASCII)


def read(text: str) -> Answer:
    """The answer that a cleaned text stands for.

    Raises:
      Unreadable: it is not one answer in a form listed in rewards/math_answer.py.
    """
    if len(text) > MAX_CHARS:
        raise Unreadable(f"over {MAX_CHARS} characters")
    based = _BASED.fullmatch(text)
    if based:
        return _based(based.group(1), int(based.group(2) or based.group(3)))
    tokens = list(tokens_of(_without_commas(_without_dollars(text))))
    if not tokens:
        raise Unreadable("empty")
    money = r"\$" in text or text.count("$") % 2 == 1
    words = _words(tokens)
    if words is not None and not money:
        return words
    letters = [token.text for token in tokens if token.text not in ("(", ")")]
    if len(letters) == 1 and len(letters[0]) == 1 and letters[0].isalpha():
        return Scalar(Node("sym", name=letters[0]))  # a choice: (B), B
    answer = _Reader(tokens).answer(0, len(tokens))
    return _as_dollars(answer) if money else answer


def _words(tokens: Sequence[Token]) -> Words | None:
    spelled = all(token.kind == "word" or token.text in ("-", "'") for token in tokens)
    if not spelled or not tokens or len(tokens[0].text) == 1:
        return None
    return Words(" ".join(token.text for token in tokens).casefold())


def _based(digits: str, base: int) -> Based:
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        raise Unreadable(f"no number in base {base}")
    return Based(digits.lstrip("0") or "0", base)


def _without_dollars(text: str) -> str:
    return text.replace(r"\$", " ").replace("$", " ") if "$" in text else text


def _without_commas(text: str) -> str:
    """Commas between groups of three digits go, except within brackets, where they separate."""
    if "," not in text or any(bracket in text for bracket in ("(", "[", r"\{")):
        return text
    return _COMMAS.sub(lambda match: match.group().replace(",", ""), text)


def _as_dollars(answer: Answer) -> Answer:
    if isinstance(answer, Scalar) and answer.unit in ("", "dollar"):
        return Scalar(answer.node, "dollar")
    if isinstance(answer, Group) and answer.kind == "list":
        return Group("list", tuple(_as_dollars(item) for item in answer.items))
    if isinstance(answer, Named):
        return Named(answer.name, _as_dollars(answer.answer))
    raise Unreadable("a dollar sign where there is no amount")


_OPENING = {"(": ")]", "[": ")]", "{": "}", r"\{": (r"\}",), r"\langle": (r"\rangle",)}
_CLOSING = frozenset((")", "]", "}", r"\}", r"\rangle"))
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", r"\le": "<=", r"\leq": "<=",
    r"\ge": ">=", r"\geq": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!=", r"\neq": "!=",
    r"\leqslant": "<=", r"\geqslant": ">=",
}  # fmt: skip
_BEFORE = frozenset(("USD", "EUR", "GBP"))  # units that stand before the number
_FLIPPED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
INFINITY = Node("inf")
MINUS_INFINITY = Node("neg", (INFINITY,))
_NOTHING = frozenset((r"\emptyset", r"\varnothing"))


class _Reader:
    """Reads a range of tokens as an answer: lists and sets first, expressions at the leaves."""

    def __init__(self, tokens: Sequence[Token]):
        self._tokens = tokens
        self._close = _matching(tokens)

    def answer(self, low: int, high: int) -> Answer:
        """A comma-separated list, or one item."""
        parts = self._split(low, high, ",", ";", *SEPARATORS)
        if len(parts) == 1:
            return self._item(low, high)
        items = [self._item(*part) for part in parts]
        if 0 < sum(isinstance(item, Words) for item in items) < len(items):
            raise Unreadable("words among other things")
        kinds = [item.answer if isinstance(item, Named) else item for item in items]
        if all(isinstance(item, Group) and len(item.kind) == 2 for item in kinds):
            joined_by_or = any(token.text == "or" for token in self._tokens[low:high])
            if joined_by_or and all(isinstance(item, Named) for item in items):
                return _shared_name(items, "union")
        return _shared_name(items, "list")

    def _split(self, low: int, high: int, *marks: str) -> list[tuple[int, int]]:
        """The ranges between `marks` outside all brackets; ", and" is one mark."""
        parts, start, at = [], low, low
        while at < high:
            token = self._tokens[at]
            if token.text in marks and token.kind != "num":
                after_comma = start == at and at > low and token.text in SEPARATORS
                if not after_comma:
                    parts.append((start, at))
                start = at + 1
            at = self._close.get(at, at) + 1
        parts.append((start, high))
        if any(first == last for first, last in parts) or len(parts) > _MAX_ITEMS:
            raise Unreadable("a list with an empty or with too many items")
        return parts

    def _item(self, low: int, high: int) -> Answer:
        member = self._split(low, high, r"\in")
        if len(member) == 2:
            answer = self._set(*member[1])
            if not isinstance(answer, Group):
                raise Unreadable("a member of something that is no set")
            return Named(self._name(*member[0]), answer)
        relations = [at for at in self._outside(low, high) if self._tokens[at].text in _RELATIONS]
        if relations:
            return self._relation(low, high, relations)
        return self._set(low, high)

    def _outside(self, low: int, high: int) -> Iterator[int]:
        at = low
        while at < high:
            yield at
            at = self._close.get(at, at) + 1

    def _relation(self, low: int, high: int, at: list[int]) -> Answer:
        edges = [low - 1, *at, high]
        sides = [(first + 1, last) for first, last in itertools.pairwise(edges)]
        if any(first >= last for first, last in sides):
            raise Unreadable("a relation without one of its sides")
        ops = [_RELATIONS[self._tokens[n].text] for n in at]
        if len(ops) == 2 and (set(ops) <= {"<", "<="} or set(ops) <= {">", ">="}):
            return self._between(sides, ops)
        if len(ops) != 1:
            raise Unreadable("a chain of relations")
        if ops[0] == "=":
            name = self._name_or_none(*sides[0])
            if name is not None:
                return Named(name, self._set(*sides[1]))
            name = self._name_or_none(*sides[1])
            if name is not None:
                return Named(name, self._set(*sides[0]))
        left, right = (self._plain(*side) for side in sides)
        if left.unit or right.unit:
            raise Unreadable("a unit within a relation")
        return _half_line(Relation(ops[0], left.node, right.node))

    def _between(self, sides: list[tuple[int, int]], ops: list[str]) -> Answer:
        name = self._name(*sides[1])
        ends = [self._plain(*sides[0]), self._plain(*sides[2])]
        if ops[0] in (">", ">="):
            ends, ops = ends[::-1], [_FLIPPED[op] for op in ops[::-1]]
        kind = ("[" if ops[0] == "<=" else "(") + ("]" if ops[1] == "<=" else ")")
        return Named(name, Group(kind, tuple(ends)))

    def _name(self, low: int, high: int) -> str:
        name = self._name_or_none(low, high)
        if name is None:
            raise Unreadable("a relation whose left side is no name")
        return name

    def _name_or_none(self, low: int, high: int) -> str | None:
        """One letter, f(x), points such as AB, or an angle between points."""
        tokens = list(self._tokens[low:high])
        if tokens and tokens[0].text == r"\angle":
            tokens = tokens[1:]
        spelled = "".join(token.text for token in tokens)
        if tokens and all(token.text.isupper() and token.text.isalpha() for token in tokens):
            return spelled if len(spelled) <= 4 else None
        if _NAME.fullmatch(spelled):
            return spelled
        try:
            node = Parser(tokens).whole()
        except Unreadable:
            return None
        constant = node.op != "sym" or node.name in ("pi", "e", "i")
        return None if constant else node.name

    def _set(self, low: int, high: int) -> Answer:
        words = _words(self._tokens[low:high])
        if words is not None:
            return words
        union = self._split(low, high, r"\cup")
        if len(union) > 1:
            return Group("union", tuple(self._set(*part) for part in union))
        minus = self._split(low, high, r"\setminus", r"\backslash")
        if len(minus) == 2:
            return Group("minus", tuple(self._set(*part) for part in minus))
        return self._bracketed(low, high) or self._ratio(low, high)

    def _ratio(self, low: int, high: int) -> Answer:
        parts = self._split(low, high, ":")
        if len(parts) > 1:
            return Group("ratio", tuple(self._plain(*part) for part in parts))
        return _with_both_signs(self._scalar(low, high))

    def _bracketed(self, low: int, high: int) -> Answer | None:
        """A set, tuple, interval or matrix that spans the whole range."""
        first = self._tokens[low]
        if high - low == 1 and first.text in _NOTHING:
            return Group("set", ())
        if high - low == 1 and first.text == r"\R":
            return Group("()", (Scalar(MINUS_INFINITY), Scalar(INFINITY)))
        if self._close.get(low) != high - 1:
            return None
        if first.kind == "begin":
            return self._matrix(low + 1, high - 1)
        if first.text == r"\{":
            return self._members(low + 1, high - 1)
        if first.text in ("(", "[", r"\langle"):
            parts = self._split(low + 1, high - 1, ",") if high - low > 2 else []
            last = self._tokens[high - 1].text
            if len(parts) < 2 and (first.text, last) == ("(", ")"):
                return None  # a parenthesised expression
            kind = "()" if first.text == r"\langle" else first.text + last
            return Group(kind, tuple(self._element(*part) for part in parts))
        return None

    def _members(self, low: int, high: int) -> Group:
        if low == high:
            return Group("set", ())
        items = [self._element(*part) for part in self._split(low, high, ",")]
        return Group("set", tuple(_flat(items)))

    def _element(self, low: int, high: int) -> Answer:
        """A tuple or an expression, as stands within brackets."""
        return self._bracketed(low, high) or _with_both_signs(self._scalar(low, high))

    def _matrix(self, low: int, high: int) -> Group:
        if self._tokens[high - 1].text == r"\\":
            high -= 1
        rows = [self._split(*row, "&") for row in self._split(low, high, r"\\")]
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("a matrix with rows of different lengths")
        cells = tuple(self._plain(*cell) for row in rows for cell in row)
        return Group(f"{len(rows)}x{len(rows[0])}", cells)

    def _plain(self, low: int, high: int) -> Scalar:
        """An expression that stands for one value."""
        scalar = self._scalar(low, high)
        if _contains(scalar.node, "pm", "mp"):
            raise Unreadable("two signs where one value stands")
        return scalar

    def _scalar(self, low: int, high: int) -> Scalar:
        """An expression and the unit after it."""
        end = high
        if self._tokens[low].text in _BEFORE and high - low > 1:
            unit = _unit(self._tokens[low : low + 1])
            rest = self._scalar(low + 1, high)
            if rest.unit:
                raise Unreadable("two units")
            return Scalar(rest.node, unit)
        while end > low and self._ends_in_unit(low, end):
            end -= 1
        end, power = self._unit_power(low, end, high)
        unit = _unit(self._tokens[end:power]) + self._exponent(power, high)
        if end == low:
            raise Unreadable("a unit without a number")
        node, sign_of_unit = _without_sign(Parser(self._tokens[low:end]).whole())
        if unit and sign_of_unit:
            raise Unreadable("two units")
        return Scalar(node, unit or sign_of_unit)

    def _ends_in_unit(self, low: int, end: int) -> bool:
        token = self._tokens[end - 1]
        return token.kind == "word" or (token.text == "/" and self._tokens[end - 2].kind == "word")

    def _unit_power(self, low: int, end: int, high: int) -> tuple[int, int]:
        """Where the unit starts and where its exponent does, as in cm^2."""
        if end < high:
            return end, high
        for width in (2, 4):  # ^2 and ^{2}
            at = high - width
            if at > low and self._tokens[at].text == "^" and self._tokens[at - 1].kind == "word":
                start = at
                while start > low and self._ends_in_unit(low, start):
                    start -= 1
                return start, at
        return high, high

    def _exponent(self, power: int, high: int) -> str:
        digits = "".join(token.text for token in self._tokens[power:high] if token.kind == "num")
        if power < high and digits not in ("2", "3"):
            raise Unreadable("an odd exponent of a unit")
        return f"^{digits}" if digits else ""


def _without_sign(node: Node) -> tuple[Node, str]:
    """Takes off a degree or percent sign that stands last, as in -50%."""
    if node.op == "neg":
        inside, unit = _without_sign(node.args[0])
        return Node("neg", (inside,)), unit
    unit = {"deg": "degree", "percent": "percent"}.get(node.op, "")
    inside = node.args[0] if unit else node
    if _contains(inside, "percent"):
        raise Unreadable("a percent sign within an expression")
    return inside, unit


def _contains(node: Node, *ops: str) -> bool:
    return node.op in ops or any(_contains(each, *ops) for each in node.args)


def _unit(tokens: Sequence[Token]) -> str:
    """The unit's canonical name.

    Known units may stand anywhere after the number. Any other word of more than three letters
    counts as what is counted, if it stands apart from the number and does not change its value.
    """
    names = []
    for token in tokens:
        low = token.text.casefold()
        if low in KEEP_OUT or (low not in UNITS and not token.spaced and token.text != "/"):
            raise Unreadable(f"the word {token.text[:20]!r} after a number")
        names.append(UNITS.get(low, low))
    if len(names) > 6:
        raise Unreadable("a sentence after a number")
    joined = " ".join(name for name in names if name)
    for short, power in (("square ", "^2"), ("cubic ", "^3")):
        if joined.startswith(short):
            joined = joined.removeprefix(short) + power
    return joined


def _matching(tokens: Sequence[Token]) -> dict[int, int]:
    """For each opening bracket where it closes."""
    stack: list[int] = []
    close: dict[int, int] = {}
    for at, token in enumerate(tokens):
        if token.kind == "begin" or token.text in _OPENING:
            stack.append(at)
            if len(stack) > MAX_DEPTH:
                raise Unreadable("nested too deeply")
        elif token.kind == "end" or token.text in _CLOSING:
            if not stack or not _fit(tokens[stack[-1]], token):
                raise Unreadable("brackets that do not match")
            close[stack.pop()] = at
    if stack:
        raise Unreadable("a bracket that is not closed")
    return close


def _fit(opening: Token, closing: Token) -> bool:
    if opening.kind == "begin":
        return closing.kind == "end" and closing.text == opening.text in _MATRICES
    return closing.kind != "end" and closing.text in _OPENING[opening.text]


def _shared_name(items: Sequence[Answer], kind: str) -> Answer:
    """`x = 1 or x = 2`, and `x = 1, 2`, are one list with one name."""
    names = {item.name for item in items if isinstance(item, Named)}
    first_only = not any(isinstance(item, Named) for item in items[1:])
    plain = [item.answer if isinstance(item, Named) else item for item in items]
    if len(names) == 1 and (first_only or all(isinstance(item, Named) for item in items)):
        return Named(names.pop(), Group(kind, tuple(_flat(plain))))
    return Group(kind, tuple(_flat(items)))


def _flat(items: Sequence[Answer]) -> Iterator[Answer]:
    """Members that are lists themselves, such as 1 \\pm 2, are replaced by their own members."""
    for item in items:
        if isinstance(item, Group) and item.kind == "list":
            yield from item.items
        else:
            yield item


def _half_line(relation: Relation) -> Answer:
    """`x > 6` is an interval with a name; other relations stay what they are."""
    op, left, right = relation.op, relation.left, relation.right
    if op in ("=", "!="):
        return relation
    if _is_name(right) and not symbols(left):
        op, left, right = _FLIPPED[op], right, left
    if not _is_name(left) or symbols(right):
        return relation
    end = Scalar(right)
    if op in (">", ">="):
        kind = "()" if op == ">" else "[)"
        return Named(left.name, Group(kind, (end, Scalar(INFINITY))))
    kind = "()" if op == "<" else "(]"
    return Named(left.name, Group(kind, (Scalar(MINUS_INFINITY), end)))


def _is_name(node: Node) -> bool:
    return node.op == "sym" and node.name not in CONSTANT_NAMES


def _with_both_signs(scalar: Scalar) -> Answer:
    """An expression with \\pm is the list of its two values."""
    if not _contains(scalar.node, "pm", "mp"):
        return scalar
    values = [Scalar(_choose_sign(scalar.node, upper), scalar.unit) for upper in (True, False)]
    return Group("list", tuple(values))


def _choose_sign(node: Node, upper: bool) -> Node:
    args = tuple(_choose_sign(each, upper) for each in node.args)
    if node.op not in ("pm", "mp"):
        return Node(node.op, args, node.value, node.name)
    plus = upper == (node.op == "pm")
    if len(args) == 1:
        return args[0] if plus else Node("neg", args)
    return Node("+" if plus else "-", args)
