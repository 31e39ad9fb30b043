"""Which traces become data: each question a few different ones, each difficulty its share.

Rows are those of `grpo.stages.rejection`, of which only the question, `worked` and `provenance` are
looked at. All functions are pure.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

BUCKETS = (0.25, 0.5, 0.75, 1.0)  # upper ends of pass rates, each part of its bucket


def bucket_of(pass_rate: float) -> int:
    """Index of the bucket of `BUCKETS` that a pass rate falls into.

    Raises:
      ValueError: 0 or less, or above 1: nothing was right, so there is no trace.
    """
    if not 0 < pass_rate <= 1:
        raise ValueError(f"a problem with a trace has a pass rate in (0, 1], not {pass_rate}")
    return next(b for b, high in enumerate(BUCKETS) if pass_rate <= high)


def bucket_name(bucket: int) -> str:
    """ "(0.25, 0.5]"."""
    low = BUCKETS[bucket - 1] if bucket else 0
    return f"({low:g}, {BUCKETS[bucket]:g}]"


def bucket_counts(rows: Sequence[Row]) -> list[int]:
    """Rows of each bucket."""
    found = Counter(_bucket(row) for row in rows)
    return [found[b] for b in range(len(BUCKETS))]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The first of every question's rows that say the same, whatever their whitespace."""
    first = {(_question(row), " ".join(row["worked"].split())): row for row in reversed(rows)}
    kept = set(map(id, first.values()))
    return [row for row in rows if id(row) in kept]


def first_of_each(rows: Sequence[Row], keep: int) -> list[Row]:
    """At most `keep` rows of each question, the first ones.

    Samples of a question differ in their random numbers only, so the order they are numbered in is
    a random one that favours no length.
    """
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        question = _question(row)
        seen[question] += 1
        if seen[question] <= keep:
            kept.append(row)
    return kept


def balanced(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """As many rows as can be without any bucket being more than `share` of them.

    Which rows of a bucket go is a fixed random choice; the others keep their order.

    Raises:
      ValueError: no row could stay, because too few buckets have any.
    """
    available = bucket_counts(rows)
    wanted = balanced_counts(available, share)
    if rows and not sum(wanted):
        found = {bucket_name(b): count for b, count in enumerate(available)}
        raise ValueError(
            f"rejection.bucket_share is {share}, but the traces are of pass rates {found}: a "
            "bucket would be more than that however few of its rows stay. Raise it (what is "
            "sampled is kept), or ask problems of other difficulties"
        )
    kept: set[int] = set()
    for b, count in enumerate(wanted):
        members = [n for n, row in enumerate(rows) if _bucket(row) == b]
        order = np.random.default_rng([seed, b]).permutation(len(members))
        kept.update(members[int(n)] for n in order[:count])
    return [row for n, row in enumerate(rows) if n in kept]


def balanced_counts(available: Sequence[int], share: float) -> list[int]:
    """How many rows of each bucket stay: the most with none above `share` of their sum."""
    total = sum(available)
    while True:
        most = math.floor(share * total + 1e-9)  # 0.29 * 100 is 28.999…
        counts = [min(count, most) for count in available]
        # Each pass allows no more than the one before, and no solution is ever ruled out.
        if sum(counts) == total:
            return counts
        total = sum(counts)


def general_count(rows: int, share: float) -> int:
    """Rows to be added to `rows` so that they are `share` of all, to the nearest."""
    return round(rows * share / (1 - share))


def general_indices(size: int, count: int, seed: int) -> list[int]:
    """`count` different rows of a source of `size`, in a fixed random order.

    Raises:
      ValueError: the source has fewer.
    """
    if count > size:
        raise ValueError(
            f"rejection.general is to give {count} rows (rejection.general_share), but has only "
            f"{size}; lower the share"
        )
    return [int(n) for n in np.random.default_rng(seed).permutation(size)[:count]]


def _bucket(row: Row) -> int:
    return bucket_of(row["provenance"]["pass_rate"])


def _question(row: Row) -> str:
    """What is asked; two uids may ask the same."""
    return json.dumps([row.get("prompt"), row.get("messages")], sort_keys=True)
