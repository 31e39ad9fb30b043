"""Plain Python values as JSON and back, for two processes that do not trust each other.

A value is sent as a list that starts with the tag of its exact type, so 1, 1.0, True and "1" stay
four different things and a tuple is no list. Nothing that comes back is executed, imported or
unpickled. An instance of a subclass travels as the plain value underneath it, so an `int` that
claims to equal everything arrives as the integer it is.
"""

import collections
import decimal
import fractions
import itertools
from collections.abc import Callable, Iterator
from typing import Any

MAX_ITEMS = 100_000
MAX_DEPTH = 100


class Opaque(Exception):
    """The value is nothing that can be sent: an object of the program's own, or too large."""


class Malformed(Exception):
    """What came back is no value."""


def encode(value: Any) -> list[Any]:
    """The value with its tag, ready for JSON.

    Iterators are read to their end and arrive as iterators.

    Raises:
      Opaque: it holds an object without a plain form, more than 100,000 items, or itself.
    """
    return _encode(value, 0, itertools.count())


def decode(tagged: Any) -> Any:
    """The value that `encode` was given.

    Raises:
      Malformed: `encode` never wrote this.
    """
    try:
        return _decode(tagged, 0)
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, RecursionError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None


def _encode(value: Any, depth: int, counter: Iterator[int]) -> list[Any]:
    if depth > MAX_DEPTH or next(counter) > MAX_ITEMS:
        raise Opaque("too large a value")
    if value is None:
        return ["none"]
    kind = type(value)
    for base, tag, plain in _SCALARS:
        if issubclass(kind, base):
            return [tag, plain(value)]
    for base, tag, items in _CONTAINERS:
        if issubclass(kind, base):
            return [tag, [_encode(item, depth + 1, counter) for item in items(value)]]
    if issubclass(kind, dict):
        return ["dict", _pairs(dict.items(value), depth, counter)]
    if kind is type({}.items()):
        return ["items", _pairs(value, depth, counter)]
    if hasattr(kind, "__next__"):
        read = itertools.islice(value, MAX_ITEMS + 1)
        return ["iterator", [_encode(item, depth + 1, counter) for item in read]]
    raise Opaque(f"a value of type {kind.__name__!r:.100}")


def _pairs(items: Any, depth: int, counter: Iterator[int]) -> list[list[Any]]:
    return [
        [_encode(key, depth + 1, counter), _encode(item, depth + 1, counter)] for key, item in items
    ]


# bool before int, which it is too.
_SCALARS: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (bool, "bool", int),
    (int, "int", lambda value: hex(int.__index__(value))),
    (float, "float", float.hex),
    (str, "str", str.__str__),
    (bytes, "bytes", bytes.hex),
    (bytearray, "bytearray", bytearray.hex),
    (complex, "complex", lambda value: [value.real.hex(), value.imag.hex()]),
    (range, "range", lambda value: [hex(n) for n in (value.start, value.stop, value.step)]),
    (decimal.Decimal, "decimal", decimal.Decimal.__str__),
    (fractions.Fraction, "fraction", lambda value: [hex(value.numerator), hex(value.denominator)]),
)
_CONTAINERS: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (list, "list", list.__iter__),
    (tuple, "tuple", tuple.__iter__),
    (set, "set", set.__iter__),
    (frozenset, "frozenset", frozenset.__iter__),
    (collections.deque, "deque", collections.deque.__iter__),
    (type({}.keys()), "keys", iter),
    (type({}.values()), "iterator", iter),
)


def _decode(tagged: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    tag, *rest = tagged
    if tag == "none":
        return None
    (content,) = rest
    if tag in _FROM_SCALAR:
        return _FROM_SCALAR[tag](content)
    if tag in ("dict", "items"):
        found = {_decode(key, depth + 1): _decode(item, depth + 1) for key, item in content}
        return found if tag == "dict" else found.items()
    return _FROM_CONTAINER[tag]([_decode(item, depth + 1) for item in content])


def _integer(text: str) -> int:
    return int(text, 16)


_FROM_SCALAR: dict[str, Callable[[Any], Any]] = {
    "bool": lambda content: content == 1,
    "int": _integer,
    "float": float.fromhex,
    "str": str.__str__,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda content: complex(*map(float.fromhex, content)),
    "range": lambda content: range(*map(_integer, content)),
    "decimal": decimal.Decimal,
    "fraction": lambda content: fractions.Fraction(*map(_integer, content)),
}
_FROM_CONTAINER: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "keys": lambda content: dict.fromkeys(content).keys(),
    "iterator": iter,
}
