"""Which traces stay: against counting by hand and against trying everything."""

import itertools
from collections import Counter
from typing import Any

import pytest

from grpo.stages.selection import (
    BUCKETS,
    balanced,
    balanced_counts,
    bucket_counts,
    bucket_name,
    bucket_of,
    distinct,
    first_of_each,
    general_count,
    general_indices,
)


def row(question: str, worked: str, pass_rate: float = 0.5) -> dict[str, Any]:
    return {"prompt": question, "worked": worked, "provenance": {"pass_rate": pass_rate}}


def said(rows: Any) -> list[tuple[str, str]]:
    return [(r["prompt"], r["worked"]) for r in rows]


@pytest.mark.parametrize(
    "sixteenths, bucket", [(1e-9, 0), (1, 0), (4, 0), (5, 1), (8, 1), (12, 2), (13, 3), (16, 3)]
)
def test_buckets_include_their_upper_ends(sixteenths, bucket):
    assert bucket_of(sixteenths / 16) == bucket


@pytest.mark.parametrize("pass_rate", [0.0, -0.5, 1.01])
def test_a_pass_rate_without_a_trace_is_refused(pass_rate):
    with pytest.raises(ValueError, match="pass rate in"):
        bucket_of(pass_rate)


def test_buckets_have_names():
    names = ["(0, 0.25]", "(0.25, 0.5]", "(0.5, 0.75]", "(0.75, 1]"]
    assert [bucket_name(b) for b in range(4)] == names


def test_what_says_the_same_counts_once_for_each_question():
    rows = [row("a", "x y"), row("a", " x\n y "), row("b", "x y"), row("a", "xy"), row("a", "x y")]
    assert said(distinct(rows)) == [("a", "x y"), ("b", "x y"), ("a", "xy")]
    chat = {"messages": [{"role": "user", "content": "a"}], "worked": "x y", "provenance": {}}
    assert len(distinct([*rows, chat, dict(chat)])) == 4  # asked otherwise, it is another question


def test_of_each_question_the_first_few_stay():
    rows = [row(q, str(n)) for n, q in enumerate("aabaaba")]
    kept = [("a", "0"), ("a", "1"), ("b", "2"), ("b", "5")]
    assert said(first_of_each(rows, 2)) == kept
    assert first_of_each(rows, 9) == rows


def most_by_trying(available: tuple[int, ...], share: float) -> int:
    """The largest sum of counts, none above its bucket or above `share` of the sum."""
    sums = [
        sum(counts)
        for counts in itertools.product(*(range(n + 1) for n in available))
        if all(count <= share * sum(counts) + 1e-9 for count in counts)
    ]
    return max(sums)


@pytest.mark.parametrize("share", [0.25, 0.3, 0.4, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    "available",
    [(5, 0, 3, 1), (4, 4, 4, 4), (6, 1, 0, 0), (0, 0, 7, 0), (0, 0, 0, 0), (7, 2, 2, 1)],
)
def test_no_balanced_choice_is_larger(available, share):
    counts = balanced_counts(available, share)
    assert all(count <= most for count, most in zip(counts, available, strict=True))
    assert all(count <= share * sum(counts) + 1e-9 for count in counts)
    assert sum(counts) == most_by_trying(available, share)


def test_a_balance_done_by_hand():
    """100 easy, 10 middling, 5 and 0 hard, at most half of one kind: the easy equal the others."""
    assert balanced_counts([0, 5, 10, 100], 0.5) == [0, 5, 10, 15]
    assert balanced_counts([71, 29, 0, 0], 0.71) == [71, 29, 0, 0]  # 0.71 * 100 is 70.99…


def test_balancing_drops_at_random_and_keeps_the_order():
    rows = [row("q", str(n), BUCKETS[3 if n % 4 else 0]) for n in range(40)]  # 10 hard, 30 easy
    kept = balanced(rows, 0.5, seed=0)
    assert bucket_counts(kept) == [10, 0, 0, 10]
    numbers = [int(r["worked"]) for r in kept]
    assert numbers == sorted(numbers) and balanced(rows, 0.5, seed=0) == kept
    assert balanced(rows, 0.5, seed=1) != kept and balanced(rows, 1.0, seed=0) == rows


def test_every_row_of_a_bucket_is_as_likely_to_stay():
    rows = [row("q", str(n), BUCKETS[3 if n < 6 else 0]) for n in range(9)]  # 6 easy, 3 hard
    stayed = Counter(
        r["worked"] for seed in range(400) for r in balanced(rows, 0.5, seed) if r["worked"] < "6"
    )
    # Each with probability 1/2, 400 times: standard deviation 10.
    assert len(stayed) == 6 and all(150 < count < 250 for count in stayed.values())


def test_a_balance_that_cannot_be_is_explained():
    rows = [row("q", str(n), 1.0) for n in range(7)]
    with pytest.raises(ValueError, match=r"bucket_share is 0.5.*'\(0.75, 1\]': 7"):
        balanced(rows, 0.5, seed=0)
    assert balanced([], 0.5, seed=0) == []


@pytest.mark.parametrize(
    "rows, share, count", [(600, 0.25, 200), (3, 0.25, 1), (10, 0.0, 0), (0, 0.5, 0), (7, 0.5, 7)]
)
def test_general_rows_are_their_share_of_all(rows, share, count):
    assert general_count(rows, share) == count
    assert count == pytest.approx(share * (rows + count), abs=0.5)


def test_general_rows_are_drawn_without_repeats():
    chosen = general_indices(50, 20, seed=3)
    assert len(set(chosen)) == 20 and max(chosen) < 50 and chosen != sorted(chosen)
    assert general_indices(50, 20, seed=3) == chosen != general_indices(50, 20, seed=4)
    assert general_indices(50, 10, seed=3) == chosen[:10]
    with pytest.raises(ValueError, match="to give 3 rows .* has only 2"):
        general_indices(2, 3, seed=0)
