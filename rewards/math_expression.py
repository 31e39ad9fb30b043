"""Reads an expression, in LaTeX or plain text, into a tree of `Node`.

Nothing here calls `eval`, `sympify` or `parse_expr`. A text is read as a whole or not at all: no
number is ever picked out of something that could not be understood. Scans are linear, and length
and nesting are capped, so any text is read or refused within a few milliseconds.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from rewards.math_words import CONSTANTS, FUNCTIONS, KEEP_OUT, NOUNS, SEPARATORS, UNITS

MAX_DEPTH = 14
_MAX_TOKENS = 200  # in one expression; bounds the depth of its tree


class Unreadable(ValueError):
    """The text is no answer that this module understands; the message says where it stopped."""


@dataclass(frozen=True, slots=True)
class Node:
    """An expression.

    Attributes:
      op: "num", "mixed", "sym", "inf", one of `+ - * / ^`, "neg", "pm", "mp", "deg", "percent",
        or the name of a function.
      args: its operands.
      value: of a "num", or of a "mixed" number such as 2 3/4.
      name: of a "sym".
    """

    op: str
    args: tuple["Node", ...] = ()
    value: Fraction = Fraction(0)
    name: str = ""


class Token(NamedTuple):
    """A piece of an answer's text."""

    kind: str  # "num", "sym", "word", "cmd", "op", "begin", "end"
    text: str
    spaced: bool = False  # whitespace stands before it


_WRAPPER = (
    r"\\(?:text|textbf|textit|textrm|textsf|textnormal|mbox|hbox|mathrm|mathbf|mathit|mathsf"
    r"|operatorname|bold|bf|rm)\s*\{(?P<inside>[^{}]*)\}"
)
_TOKEN = re.compile(
    rf"(?P<space>\s+)|{_WRAPPER}"
    r"|\\(?P<edge>begin|end)\s*\{(?P<environment>[a-z]+)\}"
    r"|(?P<num>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?)"
    r"|(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<letters>[A-Za-z]+)|(?P<op>\*\*|<=|>=|!=|.)",
    re.ASCII | re.DOTALL,
)


def tokens_of(text: str, in_words: bool = False) -> Iterator[Token]:
    """Splits a text; within `\\text{}` every run of letters is a word."""
    spaced = in_words
    for match in _TOKEN.finditer(text):
        kind, found = match.lastgroup, match.group()
        if kind == "space":
            spaced = True
            continue
        if kind == "inside":
            yield from tokens_of(match.group("inside"), True)
        elif kind == "environment":
            yield Token(match.group("edge"), match.group("environment"))
        elif kind == "letters":
            yield from _letters(found, spaced, in_words)
        else:
            yield Token(kind or "op", found, spaced)
        spaced = in_words


def _letters(run: str, spaced: bool, in_words: bool) -> Iterator[Token]:
    """A run of letters is a function, a word, or a product of single letters."""
    low = run.casefold()
    if run in FUNCTIONS or run in CONSTANTS:
        yield Token("cmd", "\\" + run, spaced)
    elif in_words or low in KEEP_OUT or low in UNITS or low in SEPARATORS or low in NOUNS:
        if len(run) == 1 and not (in_words and low in UNITS):
            yield Token("sym", run, spaced)
        else:
            yield Token("word", run, spaced)
    elif len(run) > 3:
        yield Token("word", run, spaced)
    else:
        for letter in run:
            yield Token("sym", letter, spaced)


def symbols(node: Node) -> frozenset[str]:
    """The names of the variables in an expression."""
    if node.op == "sym":
        return frozenset(() if node.name in CONSTANT_NAMES else (node.name,))
    return frozenset().union(*(symbols(each) for each in node.args))


_SIGNS = {"+": "+", "-": "-", r"\pm": "pm", r"\mp": "mp"}
_TIMES = {"*": "*", r"\cdot": "*", r"\times": "*", "/": "/", r"\div": "/"}
CONSTANT_NAMES = frozenset(("pi", "e", "i"))
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega "
    "ell".split()
)
_INFINITE = frozenset(("\\infty", "\\infinity", "\\oo", "\\inf"))
_FENCES = {r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil"),
           r"\lvert": (r"\rvert", "abs")}  # fmt: skip
_END = Token("end of text", "")


class Parser:
    """Reads a range of tokens as one expression, all of it or nothing.

    Juxtaposition multiplies and binds as `*` does, but what is ambiguous is refused: `1/2x`, `2 3`,
    `2^3^4`, `--5`.
    """

    def __init__(self, tokens: Sequence[Token]):
        self._tokens = list(tokens)
        self._at = 0
        self._depth = 0
        self._in_bars = False
        self._factors = 1  # how many stand side by side in what was read last

    def whole(self) -> Node:
        """The expression that all of the tokens make.

        Raises:
          Unreadable: they make none, or it is too long or nested too deeply.
        """
        if len(self._tokens) > _MAX_TOKENS:
            raise Unreadable("a long expression")
        node = self._sum()
        if self._peek() is not _END:
            raise Unreadable(f"cannot go on at {self._peek().text[:20]!r}")
        return node

    def _peek(self) -> Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else _END

    def _take(self) -> Token:
        token = self._peek()
        self._at += 1
        return token

    def _accept(self, text: str) -> bool:
        found = self._peek().text == text and self._peek() is not _END
        self._at += found
        return found

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise Unreadable(f"expected {text!r}")

    def _sum(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        node = self._signed(self._product)
        while self._peek().text in _SIGNS:
            op = _SIGNS[self._take().text]
            node = Node(op, (node, self._product()))
        self._depth -= 1
        return node

    def _signed(self, operand: Callable[[], Node]) -> Node:
        sign = _SIGNS[self._take().text] if self._peek().text in _SIGNS else "+"
        node = operand()
        return node if sign == "+" else Node("neg" if sign == "-" else sign, (node,))

    def _product(self) -> Node:
        node = self._juxtaposed()
        while self._peek().text in _TIMES or self._peek().text == "**":
            op = _TIMES.get(self._take().text)
            if op is None:
                raise Unreadable("two powers in a row")
            right = self._signed(self._juxtaposed)
            if op == "/" and self._factors > 1:
                raise Unreadable("a product after a slash")
            node = Node(op, (node, right))
        return node

    def _juxtaposed(self) -> Node:
        mixed = self._mixed()
        node = self._postfixed(mixed) if mixed else self._power()
        factors = 1
        while self._starts_factor():
            if self._peek().kind == "num":
                raise Unreadable("two numbers in a row")
            node = Node("*", (node, self._power()))
            factors += 1
        self._factors = factors
        return node

    def _starts_factor(self) -> bool:
        token = self._peek()
        if token.kind in ("num", "sym"):
            return True
        if token.kind == "word":
            return len(token.text) == 1
        if token.kind == "cmd":
            return token.text[1:] in _GREEK or token.text in _ATOMS or token.text[1:] in FUNCTIONS
        return token.text in ("(", "[", "{") or (token.text == "|" and not self._in_bars)

    def _mixed(self) -> Node | None:
        """`2 3/4` or `2\\frac34`: a whole number and a proper fraction; their sum."""
        kinds = [token.kind for token in self._tokens[self._at : self._at + 4]]
        if kinds[:1] != ["num"] or not self._peek().text.isdigit():
            return None
        whole, after = self._peek(), self._tokens[self._at + 1 : self._at + 4]
        if len(after) == 3 and after[0].kind == after[2].kind == "num" and after[1].text == "/":
            self._at += 4
            top, bottom = after[0].text, after[2].text
        elif after and after[0].text == r"\frac":
            start, self._at = self._at, self._at + 2
            parts = self._argument(), self._argument()
            if any(part.op != "num" for part in parts):
                self._at = start
                return None
            top, bottom = (str(part.value) for part in parts)
        else:
            return None
        if not (top.isdigit() and bottom.isdigit() and int(top) < int(bottom)):
            raise Unreadable("a mixed number with an improper fraction")
        return Node("mixed", value=int(whole.text) + Fraction(int(top), int(bottom)))

    def _power(self) -> Node:
        node = self._postfixed(self._atom())
        if self._peek().text not in ("^", "**"):
            return node
        self._take()
        if self._peek().text in (r"\circ", "{") and self._is_degree():
            return Node("deg", (node,))
        node = self._postfixed(Node("^", (node, self._exponent())))
        if self._peek().text in ("^", "**"):
            raise Unreadable("two powers in a row")
        return node

    def _is_degree(self) -> bool:
        if self._accept(r"\circ"):
            return True
        texts = [token.text for token in self._tokens[self._at : self._at + 3]]
        found = texts == ["{", r"\circ", "}"]
        self._at += 3 * found
        return found

    def _postfixed(self, node: Node) -> Node:
        while True:
            if self._accept("!"):
                node = Node("factorial", (node,))
            elif self._accept("%") or self._accept(r"\%"):
                node = Node("percent", (node,))
            else:
                return node

    def _exponent(self) -> Node:
        if self._peek().text in ("+", "-"):
            return self._signed(self._exponent)
        if self._peek().kind == "num":
            return self._number(self._take().text)
        return self._argument()

    def _argument(self) -> Node:
        """What a command or `^` applies to: a group in braces, or one digit, letter or command."""
        token = self._peek()
        if token.text == "{":
            return self._group("{", "}")
        if token.kind == "num":
            return self._number(self._one_digit())
        if token.text == "(":
            return self._group("(", ")")
        return self._atom()

    def _one_digit(self) -> str:
        """As TeX does: `\\frac12` has the arguments 1 and 2."""
        text = self._take().text
        if len(text) > 1:
            if not text.isdigit():
                raise Unreadable("a decimal where one digit is read")
            self._at -= 1
            self._tokens[self._at] = Token("num", text[1:])
        return text[0]

    def _group(self, opening: str, closing: str) -> Node:
        self._expect(opening)
        bars, self._in_bars = self._in_bars, False
        node = self._sum()
        self._in_bars = bars
        self._expect(closing)
        return node

    def _number(self, text: str) -> Node:
        return Node("num", value=Fraction(text))

    def _atom(self) -> Node:
        token = self._peek()
        if token.kind == "num":
            return self._number(self._take().text)
        if token.kind == "sym" or (token.kind == "word" and len(token.text) == 1):
            return self._symbol(self._take().text)
        if token.kind == "cmd":
            return self._command(self._take().text)
        if token.text == "(":
            return self._group("(", ")")
        if token.text == "[":
            return self._group("[", "]")
        if token.text == "{":
            return self._group("{", "}")
        if self._accept("|"):
            return self._bars()
        raise Unreadable(f"cannot read {token.text[:20]!r}")

    def _bars(self) -> Node:
        if self._in_bars:
            raise Unreadable("bars within bars")
        self._in_bars = True
        node = Node("abs", (self._sum(),))
        self._in_bars = False
        self._expect("|")
        return node

    def _symbol(self, name: str) -> Node:
        if self._accept("_"):
            token = self._take()
            subscript = token.text
            if subscript == "{":
                subscript = ""
                while not self._accept("}"):
                    token = self._take()
                    if token.kind not in ("num", "sym", "word"):
                        raise Unreadable("a subscript that is no name")
                    subscript += token.text
            elif token.kind not in ("num", "sym"):
                raise Unreadable("a subscript that is no name")
            return Node("sym", name=f"{name}_{subscript}")
        if name in ("f", "g", "h") and self._peek().text == "(":
            raise Unreadable("an unknown function")
        return Node("sym", name=name)

    def _command(self, command: str) -> Node:
        name = command[1:]
        if command in (r"\frac", r"\binom", r"\dbinom", r"\tbinom"):
            op = "/" if command == r"\frac" else "binom"
            return Node(op, (self._argument(), self._argument()))
        if command == r"\sqrt":
            return self._root()
        if command in _INFINITE:
            return Node("inf")
        if command == r"\pi":
            return Node("sym", name="pi")
        if name in FUNCTIONS:
            return self._function(name)
        if name in _GREEK:
            return self._symbol(name)
        if command in _FENCES:
            closing, op = _FENCES[command]
            node = Node(op, (self._sum(),))
            self._expect(closing)
            return node
        raise Unreadable(f"cannot read {command[:20]!r}")

    def _root(self) -> Node:
        if self._peek().text == "[":
            index = self._group("[", "]")
            return Node("root", (self._argument(), index))
        if self._peek().kind == "num" and len(self._peek().text) > 1:
            raise Unreadable("a root of several digits without braces")
        return Node("root", (self._argument(), Node("num", value=Fraction(2))))

    def _function(self, name: str) -> Node:
        """`\\sin^2 x`, `\\log_2 8`, `\\ln(x)`; without brackets the argument is a product."""
        base = None
        if name in ("log", "lg") and self._accept("_"):
            base = self._argument()
        power = self._exponent() if self._accept("^") else None
        if power is not None and (power.op != "num" or power.value < 1):
            raise Unreadable("an inverse function")
        if self._peek().text in ("(", "{", "["):
            argument = self._argument() if self._peek().text != "[" else self._group("[", "]")
        else:
            argument = self._bare_argument()
        node = Node(name, (argument,) if base is None else (argument, base))
        return node if power is None else Node("^", (node, power))

    def _bare_argument(self) -> Node:
        node = self._power()
        while self._starts_factor() and self._peek().text[1:] not in FUNCTIONS:
            if self._peek().kind == "num":
                raise Unreadable("two numbers in a row")
            node = Node("*", (node, self._power()))
        after = self._tokens[self._at + 1 : self._at + 2]
        if self._peek().text == "/" and not (after and after[0].text[1:] in FUNCTIONS):
            raise Unreadable("a slash in an argument without brackets")
        return node


_ATOMS = frozenset((r"\frac", r"\binom", r"\dbinom", r"\tbinom", r"\pi", *_INFINITE, *_FENCES))
