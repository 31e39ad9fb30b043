"""Collectives of a compiled program, read from its HLO text, with the bytes that each moves."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

_OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_OPS)})(-start)?\(")
_CALLED = re.compile(r"(body|condition|calls|to_apply)=%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


_Total = tuple[dict[str, float], dict[str, float], int]


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What one run of a program exchanges.

    Attributes:
      counts: operation -> times it runs.
      link_bytes: operation -> bytes each device sends, a ring over the devices taking part:
        (n - 1) / n of the whole array; twice that for an all-reduce (scaling book, "Sharding").
      endless: loops whose number of turns the text does not tell; each counts as one turn.
    """

    counts: dict[str, float]
    link_bytes: dict[str, float]
    endless: int


def collectives(text: str) -> Collectives:
    """Walks the program from its entry; what is in a loop counts as often as the loop turns.

    Args:
      text: `compiled.as_text()`.
    """
    bodies, entry = _computations(text)
    total: dict[str, _Total] = {}

    def walk(name: str) -> _Total:
        if name in total:
            return total[name]
        counts: dict[str, float] = defaultdict(float)
        moved: dict[str, float] = defaultdict(float)
        endless = 0
        for line in bodies.get(name, ()):
            if found := _COLLECTIVE.search(line):
                op, size = _moved(line, found, name)
                counts[op] += 1
                moved[op] += size
            for called, times in _calls(line, bodies):
                inner = walk(called)
                for op in inner[0]:
                    counts[op] += inner[0][op] * (times or 1)
                    moved[op] += inner[1][op] * (times or 1)
                endless += inner[2] + (times is None)
        total[name] = counts, moved, endless
        return total[name]

    counts, moved, endless = walk(entry)
    return Collectives(dict(counts), dict(moved), endless)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies, entry


def _calls(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, int | None]]:
    """(computation, times) that an instruction calls; None: a loop of unknown length."""
    named = dict(_CALLED.findall(line))
    if "body" in named:
        yield named["body"], _trips(line, bodies.get(named.get("condition", ""), []))
    elif "calls" in named:
        yield named["calls"], 1
    if branches := _BRANCHES.search(line):
        for name in re.findall(r"%([\w.\-]+)", branches[1]):
            yield name, 1


def _trips(line: str, condition: list[str]) -> int | None:
    """As the compiler noted it, or from a condition `counter < constant`, counted from 0 by 1."""
    if known := _TRIPS.search(line):
        return int(known[1])
    root = next((text for text in condition if "ROOT" in text), "")
    compared = re.search(r"compare\(([^)]*)\), direction=LT", root)
    if not compared:
        return None
    limit = compared[1].split("%")[-1]
    for text in condition:
        if constant := re.search(rf"%{re.escape(limit)} = .* constant\((\d+)\)", text):
            return int(constant[1])
    return None


def _moved(line: str, found: re.Match, computation: str) -> tuple[str, float]:
    """(operation, bytes each device sends) of one collective instruction."""
    shape, op, start = found[1], found[2], bool(found[3])
    size = sum(_array_bytes(kind, dims) for kind, dims in _ARRAY.findall(shape))
    n = _group_size(line)
    if op == "collective-permute":
        return op, size / 2 if start else size
    if op == "all-gather" and start:  # (operands, results), the results n times as large
        size *= n / (n + 1)
    share = size * (n - 1) / n
    if "all-reduce-scatter" in computation:  # a TPU's fusion of an all-reduce and a slice
        return "reduce-scatter", share
    if op == "reduce-scatter":  # `size` is a device's part
        return op, share * n
    return op, 2 * share if op == "all-reduce" else share


def _array_bytes(kind: str, dims: str) -> float:
    bits = int(re.findall(r"\d+", kind)[0]) if kind != "pred" else 8
    return bits / 8 * math.prod(int(d) for d in dims.split(",") if d)


def _group_size(line: str) -> int:
    """Devices that take part together."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return 1
