"""Estimators against brute force: every subset, every tie, every resample."""

import collections
import itertools
import math

import numpy as np
import pytest

from grpo.measure.estimators import (
    avg_at_k,
    bootstrap_interval,
    majority_at_k,
    majority_correct,
    pass_at_k,
)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * c + [False] * (n - c)
        subsets = list(itertools.combinations(samples, k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_does_not_overflow():
    exact = 1 - math.comb(90_000, 1000) / math.comb(100_000, 1000)
    assert pass_at_k(100_000, 10_000, 1000) == pytest.approx(exact, rel=1e-9)
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5, rel=1e-9)


@pytest.mark.parametrize("n, c, k", [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="must be from"):
        pass_at_k(n, c, k)


def test_avg_at_k_is_pass_at_1():
    assert avg_at_k([True, False, False, True, False]) == 0.4
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="at least one sample"):
        avg_at_k([])


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "3"], [True, True, False], 1.0),
        (["7", "3", "3"], [True, False, False], 0.0),
        (["7", "3"], [True, False], 0.5),  # a tie of two
        (["7", "3", "4"], [True, False, False], 1 / 3),  # a tie of three
        ([None, None, "7"], [False, False, True], 1.0),  # None has no vote
        ([None, None], [False, False], 0.0),
        (["7", "7"], [True, False], 0.5),  # the verifier minded the format
    ],
)
def test_majority_by_hand(answers, correct, expected):
    assert majority_correct(answers, correct) == pytest.approx(expected)


def test_majority_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="2 answers and 1 verdicts"):
        majority_correct(["1", "2"], [True])
    with pytest.raises(ValueError, match="0 answers"):
        majority_correct([], [])


def votes_of(samples):
    """Who wins each way of voting, by counting: the share of right ones among the winners."""
    counts = collections.Counter(answer for answer, _ in samples if answer is not None)
    if not counts:
        return np.mean([right for _, right in samples])
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    shares = [np.mean([r for a, r in samples if a == winner]) for winner in winners]
    return np.mean(shares)


@pytest.mark.parametrize("k", range(1, 7))
def test_majority_at_k_is_the_mean_over_all_subsets(k):
    answers = ["7", "3", None, "7", "5", "3"]
    correct = [True, False, False, True, False, True]
    samples = list(zip(answers, correct, strict=True))
    every = [votes_of(subset) for subset in itertools.combinations(samples, k)]
    assert majority_at_k(answers, correct, k) == pytest.approx(np.mean(every), abs=1e-12)


def test_majority_of_one_is_the_mean_and_of_all_is_the_vote():
    answers, correct = ["7", "3", "3"], [True, False, False]
    assert majority_at_k(answers, correct, 1) == pytest.approx(1 / 3)
    assert majority_at_k(answers, correct, 3) == majority_correct(answers, correct) == 0.0


def test_majority_of_many_is_estimated_from_seeded_subsets():
    answers = [str(i % 3) for i in range(12)]
    correct = [answer == "1" for answer in answers]
    exact = majority_at_k(answers, correct, 5, subsets=math.comb(12, 5))
    drawn = [majority_at_k(answers, correct, 5, subsets=400, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # 400 draws of a number in [0, 1]: its mean is within 4 x 0.5 / 20.
    assert drawn == pytest.approx([exact] * 3, abs=0.1)


@pytest.mark.parametrize("k", [0, 3])
def test_majority_at_k_refuses_impossible_numbers(k):
    with pytest.raises(ValueError, match=rf"number of samples \(2\), got {k}"):
        majority_at_k(["1", "2"], [True, False], k)
    with pytest.raises(ValueError, match="2 answers and 1 verdicts"):
        majority_at_k(["1", "2"], [True], 1)


def test_bootstrap_agrees_with_every_resample():
    values = [0.0, 0.25, 1.0, 0.5]
    means = [np.mean(draw) for draw in itertools.product(values, repeat=len(values))]
    exact = np.quantile(means, [0.05, 0.95])
    assert bootstrap_interval(values, confidence=0.9, resamples=4000) == pytest.approx(
        exact, abs=0.04
    )


def test_bootstrap_is_seeded_and_shrinks_to_a_constant():
    values = np.linspace(0, 1, 30)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert bootstrap_interval([0.5] * 4) == (0.5, 0.5)


@pytest.mark.parametrize("values, confidence", [([], 0.9), ([math.nan], 0.9), ([1.0], 1.0)])
def test_bootstrap_refuses(values, confidence):
    with pytest.raises(ValueError):
        bootstrap_interval(values, confidence)
