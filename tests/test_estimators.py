"""Estimators against brute force: every subset, every tie, every resample."""

import itertools
import math

import numpy as np
import pytest

from grpo.estimators import avg_at_k, bootstrap_interval, majority_correct, pass_at_k


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
