"""Assert lines taken apart, so that the program can run without seeing what is expected of it.

`assert add(2, 3) == 5` becomes a call, which the program is asked to make, and a comparison, which
is made here. Nothing of a line is executed here: arguments and expected values are literals.
"""

import ast
import builtins
import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_BUILTINS = frozenset(dir(builtins))


@dataclasses.dataclass(frozen=True)
class Assertion:
    """One call and what is asserted of its value.

    Attributes:
      name: of the function.
      args: its arguments.
      kwargs: its arguments by name.
      relation: how the value stands to `expected`.
      expected: a plain value.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    relation: Callable[[Any, Any], Any]
    expected: Any

    def holds(self, value: Any) -> bool:
        """Whether a plain value (never an object of the program's own) is what was asserted."""
        try:
            return bool(self.relation(value, self.expected))
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            return False


def parse(source: str) -> ast.Module:
    """The tree of a source, without Python's warnings about its style."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def split_assertion(line: str, entry: str = "") -> Assertion | None:
    """The line's call and comparison, None if it is not that simple.

    Taken apart: `f(…)`, `not f(…)`, `f(…) == literal` and the other way round, `!=`, `is`,
    `is not`, and `abs(f(…) - literal) < literal`; all arguments literals, and f no builtin.

    Args:
      line: of Python.
      entry: the program's function, which may hide a builtin.
    """
    try:
        (statement,) = parse(line.strip()).body
        found = _split(statement.test) if isinstance(statement, ast.Assert) else None
        return found if found and (found.name == entry or found.name not in _BUILTINS) else None
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


def free_names(sources: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Names that the sources use, and that neither they, `known` sources nor Python define."""
    trees = [parse(source) for source in sources]
    defined = set(_BUILTINS)
    for tree in (*trees, *map(parse, known)):
        defined.update(_bound_names(tree))
    used = {
        node.id: None for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)
    }
    return [name for name in used if name not in defined]


def _bound_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id


def _split(test: ast.expr) -> Assertion | None:
    if isinstance(test, ast.Call):
        return _assertion(test, lambda value, _: value, None)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _assertion(test.operand, lambda value, _: not value, None)
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    left, right, relation = test.left, test.comparators[0], type(test.ops[0])
    if relation is ast.Lt:
        return _near(left, right)
    if relation not in _RELATIONS:
        return None
    if not isinstance(left, ast.Call) or _is_literal_call(left):
        left, right = right, left
    return _assertion(left, _RELATIONS[relation], ast.literal_eval(right))


_RELATIONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


def _near(left: ast.expr, right: ast.expr) -> Assertion | None:
    """`abs(f(…) - expected) < tolerance`."""
    if not (isinstance(left, ast.Call) and _called(left) == "abs" and len(left.args) == 1):
        return None
    difference, tolerance = left.args[0], ast.literal_eval(right)
    if not isinstance(difference, ast.BinOp) or not isinstance(difference.op, ast.Sub):
        return None
    call, expected = difference.left, ast.literal_eval(difference.right)
    return _assertion(call, lambda value, near: abs(value - near) < tolerance, expected)


def _assertion(
    call: ast.expr, relation: Callable[[Any, Any], Any], expected: Any
) -> Assertion | None:
    name = _called(call) if isinstance(call, ast.Call) else None
    if name is None or not isinstance(call, ast.Call):
        return None
    kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    if None in kwargs:  # **more
        return None
    args = tuple(ast.literal_eval(argument) for argument in call.args)
    named = {key: value for key, value in kwargs.items() if key is not None}
    return Assertion(name, args, named, relation, expected)


def _called(call: ast.Call) -> str | None:
    return call.func.id if isinstance(call.func, ast.Name) else None


def _is_literal_call(call: ast.Call) -> bool:
    """`set()`, the one call that `ast.literal_eval` takes."""
    return _called(call) == "set"
