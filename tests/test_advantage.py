"""Advantages: hand numbers, plain Python loops over subsets, and what all estimators promise."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from grpo import advantage
from grpo.advantage import has_signal, overlong_penalty, penalised, with_component
from grpo.structs import Scores

ESTIMATORS: dict[str, Callable[[Scores], np.ndarray]] = {
    "grpo": advantage.grpo,
    "dr_grpo": advantage.dr_grpo,
    "rloo": advantage.rloo,
    "reinforce_pp": advantage.reinforce_pp,
    "maxrl": advantage.maxrl,
    "pass_at_1": partial(advantage.pass_at_k, pass_k=1),
    "pass_at_2": partial(advantage.pass_at_k, pass_k=2),
    "gdpo": advantage.gdpo,
}


def scores_of(
    rewards: Any, valid: Any = None, components: Any = None, weights: Any = None
) -> Scores:
    """Scores of one component that is the reward, unless components are given."""
    reward_PG = np.array(rewards, np.float32)
    valid_PG = np.ones_like(reward_PG, bool) if valid is None else np.array(valid, bool)
    return Scores(
        reward_PG=reward_PG,
        valid_PG=valid_PG,
        components=components or {"right": reward_PG},
        weights=weights or {"right": 1.0},
        statuses={},
    )


# ---- hand numbers ----------------------------------------------------------------------------

ROOT3, ROOT15 = math.sqrt(3), math.sqrt(1.5)


@pytest.mark.parametrize(
    "name, rewards, expected",
    [
        ("grpo", [1, 0], [1, -1]),
        ("grpo", [1, 0, 0, 0], [ROOT3, -1 / ROOT3, -1 / ROOT3, -1 / ROOT3]),  # std sqrt(3) / 4
        ("grpo", [1, 2, 3], [-ROOT15, 0, ROOT15]),  # population std sqrt(2 / 3)
        ("dr_grpo", [1, 0], [0.5, -0.5]),
        ("dr_grpo", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1, 0], [1, -1]),
        ("rloo", [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        ("reinforce_pp", [1, 0], [1, -1]),  # a batch of one group: its own deviation
        ("maxrl", [1, 0, 0, 0], [3, -1, -1, -1]),  # mean 1/4
        ("maxrl", [1, 1, 1, 0], [1 / 3, 1 / 3, 1 / 3, -1]),
        ("maxrl", [0.5, 0], [1, -1]),
        ("pass_at_1", [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        # Of the three pairs with the right one all are right, of the three without none. Of the
        # three pairs with a given wrong one 1 is right, of the three without 2 are.
        ("pass_at_2", [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        ("pass_at_2", [1, 1, 0, 0], [1 - 2 / 3, 1 - 2 / 3, 2 / 3 - 1, 2 / 3 - 1]),
        ("pass_at_2", [1, 1, 1, 0], [0, 0, 0, 0]),  # any two hold a right one
        ("gdpo", [1, 0], [1, -1]),
    ],
)
def test_hand_numbers(name, rewards, expected):
    got = ESTIMATORS[name](scores_of([rewards]))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [expected], rtol=1e-5, atol=1e-6)


def test_reinforce_pp_has_one_scale_for_the_whole_batch():
    """Centred: +-1/2, +-1/20, 0, 0. Variance (2/4 + 2/400) / 6 = 0.0841667, std 0.290115."""
    got = advantage.reinforce_pp(scores_of([[1, 0], [0.1, 0], [1, 1]]))
    expected = np.array([[1.723457, -1.723457], [0.1723457, -0.1723457], [0, 0]])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gdpo_tells_apart_what_a_sum_makes_equal():
    """Right or well-formed pay 1 each. GRPO sees (1, 1, 0); GDPO knows that form is the rarer."""
    right, form = [1, 1, 0, 0], [0, 0, 1, 0]
    scores = scores_of(
        [np.add(right, form)],
        components={"right": np.array([right]), "form": np.array([form])},
        weights={"right": 1.0, "form": 1.0},
    )
    summed = advantage.grpo(scores)[0]
    assert summed[0] == summed[2]
    # Alone: right +-1; form sqrt(3), -1/sqrt(3). Sums, before the batch's deviation:
    sums = np.array([1 - 1 / ROOT3, 1 - 1 / ROOT3, ROOT3 - 1, -1 - 1 / ROOT3])
    got = advantage.gdpo(scores)[0]
    np.testing.assert_allclose(got, sums / sums.std(), rtol=1e-5)
    assert got[2] > got[0]
    # Weights come after the normalisation, so they say what counts, not the components' scales.
    grown = dataclasses.replace(
        scores, components={"right": np.array([right]), "form": 100 * np.array([form])}
    )
    np.testing.assert_allclose(advantage.gdpo(grown)[0], got, rtol=1e-4)
    heavy = dataclasses.replace(scores, weights={"right": 3.0, "form": 1.0})
    assert advantage.gdpo(heavy)[0, 2] < 0 < advantage.gdpo(heavy)[0, 0]


def test_gdpo_learns_where_the_sum_is_flat():
    components = {"right": np.array([[1.0, 0.0]]), "form": np.array([[0.0, 1.0]])}
    scores = scores_of([[1, 1]], components=components, weights={"right": 2.0, "form": 1.0})
    np.testing.assert_allclose(advantage.gdpo(scores), [[1, -1]], rtol=1e-5)


# ---- against plain loops ---------------------------------------------------------------------


def others(values: list[float], i: int) -> list[float]:
    return values[:i] + values[i + 1 :]


def slow_group(name: str, r: list[float]) -> list[float]:
    """The docstrings' formulas for one group's valid rewards, one completion at a time."""
    n, mean, i_n = len(r), sum(r) / len(r), range(len(r))
    if name == "grpo":
        return [(x - mean) / (statistics.pstdev(r) + 1e-6) for x in r]
    if name in ("dr_grpo", "reinforce_pp"):  # the latter before its batch-wide division
        return [x - mean for x in r]
    if name == "rloo":
        return [r[i] - statistics.mean(others(r, i)) for i in i_n]
    if name == "maxrl":
        return [(x - mean) / mean for x in r]
    k = {"pass_at_1": 1, "pass_at_2": 2}[name]
    if n <= k:
        return [0.0] * n

    def best(subsets):
        return statistics.mean(max(r[j] for j in subset) for subset in subsets)

    subsets = list(itertools.combinations(i_n, k))
    return [
        best([s for s in subsets if i in s]) - best([s for s in subsets if i not in s]) for i in i_n
    ]


def slow_batch(name: str, rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
    out = np.zeros(rewards.shape)
    compared: list[float] = []
    for p, group in enumerate(rewards):
        kept = np.flatnonzero(valid[p])
        r = [float(group[g]) for g in kept]
        if len(r) >= 2:
            values = slow_group(name, r) if len(set(r)) > 1 else [0.0] * len(r)
            out[p, kept] = values
            compared += values
    return out / (statistics.pstdev(compared) + 1e-6) if name == "reinforce_pp" else out


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "gdpo"])
def test_against_a_loop(name):
    rng = np.random.default_rng(0)
    for group in (3, 4, 7):
        rewards = rng.choice([0.0, 0.1, 0.5, 1.0], (40, group)).astype(np.float32)
        valid = rng.random((40, group)) < 0.7
        got = ESTIMATORS[name](scores_of(rewards, valid))
        np.testing.assert_allclose(got, slow_batch(name, rewards, valid), rtol=1e-5, atol=1e-6)


def test_gdpo_against_a_loop():
    rng = np.random.default_rng(0)
    valid = rng.random((30, 5)) < 0.8
    components = {name: rng.integers(0, 2, (30, 5)).astype(float) for name in ("right", "form")}
    components["flat"] = np.ones((30, 5))
    weights = {"right": 1.0, "form": -0.3, "flat": 2.0}
    summed = np.zeros((30, 5))
    for name, component in components.items():
        summed += weights[name] * slow_batch("grpo", component, valid)
    compared = summed[valid & (valid.sum(axis=1, keepdims=True) >= 2)]
    got = advantage.gdpo(scores_of(np.zeros((30, 5)), valid, components, weights))
    np.testing.assert_allclose(got, summed / (compared.std() + 1e-6), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 30])
def test_pass_at_k_in_large_groups_neither_overflows_nor_leaves_dust(k):
    rewards = np.zeros((2, 2048))
    rewards[0, :7] = 1.0
    rewards[1, : 2048 - k + 1] = 1.0  # k - 1 wrong ones: every k-subset is right
    got = advantage.pass_at_k(scores_of(rewards), pass_k=k)
    assert np.isfinite(got).all()
    assert (got[1] == 0).all()
    wrong, n = 2041, 2048

    def miss(wrong, n):  # chance that k of n are all wrong
        return math.comb(wrong, k) / math.comb(n, k)

    np.testing.assert_allclose(got[0, 0], miss(wrong, n - 1), rtol=1e-4)
    beside = math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)
    np.testing.assert_allclose(got[0, -1], miss(wrong - 1, n - 1) - beside, rtol=1e-3)


# ---- what all of them promise ----------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 1.0, 1 / 3, 1e6])
def test_a_flat_group_teaches_exactly_nothing(reward, name):
    got = ESTIMATORS[name](scores_of([[reward] * 6, [1, 0, 0, 0, 0, 0]]))
    assert (got[0] == 0.0).all() and got[1, 0] > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_invalid_row_is_zero_and_not_averaged(name):
    # A verifier that failed may have left anything there.
    with_bad = ESTIMATORS[name](
        scores_of([[1, 777.0, 0, np.nan, 0]], [[True, False, True, False, True]])
    )
    without = ESTIMATORS[name](scores_of([[1, 0, 0]]))
    assert with_bad[0, [1, 3]].tolist() == [0, 0]
    np.testing.assert_array_equal(with_bad[:, [0, 2, 4]], without)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_groups_with_nothing_to_compare_are_zero(name):
    valid = [[False, False, False], [True, False, False]]
    got = ESTIMATORS[name](scores_of([[1, 0, 1], [1, 0, 1]], valid))
    np.testing.assert_array_equal(got, np.zeros((2, 3)))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_order_within_a_group_does_not_matter(name):
    rng = np.random.default_rng(1)
    rewards, order = rng.random((5, 6)), rng.permutation(6)
    got = ESTIMATORS[name](scores_of(rewards))
    moved = ESTIMATORS[name](scores_of(rewards[:, order]))
    np.testing.assert_allclose(moved, got[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if "pass" not in name])
def test_a_group_of_one_is_an_error(name):
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ESTIMATORS[name](scores_of([[1.0]]))


@pytest.mark.parametrize("k", [0, 2, 3])
def test_pass_k_must_leave_somebody_to_compare_with(k):
    with pytest.raises(ValueError, match=rf"from 1 to group_size - 1 \(1\), got {k}"):
        advantage.pass_at_k(scores_of([[1, 0]]), pass_k=k)


def test_maxrl_refuses_negative_rewards_but_not_those_of_failed_verifiers():
    with pytest.raises(ValueError, match="maxrl needs rewards of at least 0, got -0.5"):
        advantage.maxrl(scores_of([[1, -0.5]]))
    advantage.maxrl(scores_of([[1, 0, -0.5]], [[True, True, False]]))


def test_has_signal_counts_valid_rewards_only():
    reward_PG = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 0, 0]], np.float32)
    valid_PG = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]], bool)
    assert has_signal(reward_PG, valid_PG).tolist() == [False, True, False, False]


# ---- what changes rewards --------------------------------------------------------------------


def test_kl_is_subtracted_from_the_reward_and_stays_visible():
    scores = scores_of([[1, 0, 7]], [[True, True, False]])
    got = penalised(scores, np.array([[2.0, -1.0, np.nan]]), 0.1)
    np.testing.assert_allclose(got.reward_PG, [[0.8, 0.1, 7]], rtol=1e-6)
    np.testing.assert_array_equal(got.components["kl_ref"], [[2, -1, 0]])
    assert got.weights == {"right": 1.0, "kl_ref": -0.1}
    assert list(scores.components) == ["right"]  # a new record, the old one as it was
    # The reward is still the weighted sum of its components, which is what gdpo reads.
    total = np.zeros((1, 3))
    for name, component in got.components.items():
        total += got.weights[name] * component
    np.testing.assert_allclose(got.reward_PG[got.valid_PG], total[got.valid_PG], rtol=1e-6)


def test_a_component_is_named_once_and_finite():
    scores = scores_of([[1, 0]])
    with pytest.raises(ValueError, match="already a reward component 'right'"):
        with_component(scores, "right", np.zeros((1, 2)), 1.0)
    with pytest.raises(ValueError, match="'kl_ref' is not finite"):
        penalised(scores, np.array([[0, np.inf]]), 0.1)


@pytest.mark.parametrize(
    "length, points",
    [(0, 0), (60, 0), (80, 0), (81, -0.025), (90, -0.25), (99, -0.475), (100, -0.5)],
)
def test_overlong_penalty_falls_over_the_last_tokens(length, points):
    """Limit 100 tokens, buffer 20, penalty 0.5: each of the last 20 costs 1/40."""
    assert overlong_penalty(np.array(length), 100, 20, 0.5) == pytest.approx(points)


def test_overlong_penalty_of_a_group_is_a_component():
    points_PG = overlong_penalty(np.array([[4, 9], [10, 8]]), 10, 2, 1.0)
    np.testing.assert_array_equal(points_PG, [[0, -0.5], [-1, 0]])
    got = with_component(scores_of([[1, 1], [1, 0]]), "overlong", points_PG, 1.0)
    np.testing.assert_array_equal(got.reward_PG, [[1, 0.5], [0, 0]])


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_that_does_not_fit_is_an_error(buffer):
    with pytest.raises(ValueError, match=rf"from 1 to max_new_tokens \(100\), got {buffer}"):
        overlong_penalty(np.zeros(1), 100, buffer, 1.0)
