"""Group advantages: hand numbers, and a double loop in plain Python."""

import math

import numpy as np
import pytest

from grpo.advantage import group_advantage, has_signal


def slow_advantage(
    rewards: list[list[float]], valid: list[list[bool]], scale: bool
) -> list[list[float]]:
    """The docstring's formula, one number at a time."""
    out = []
    for row, usable in zip(rewards, valid, strict=True):
        kept = [r for r, ok in zip(row, usable, strict=True) if ok]
        if len(set(kept)) < 2:
            out.append([0.0] * len(row))
            continue
        mean = sum(kept) / len(kept)
        std = math.sqrt(sum((r - mean) ** 2 for r in kept) / len(kept))
        divisor = std + 1e-6 if scale else 1.0
        out.append([(r - mean) / divisor if ok else 0.0 for r, ok in zip(row, usable, strict=True)])
    return out


def advantages(rewards, valid=None, *, scale_by_std):
    reward_PG = np.array(rewards, np.float32)
    valid_PG = np.ones_like(reward_PG, bool) if valid is None else np.array(valid, bool)
    return np.asarray(group_advantage(reward_PG, valid_PG, scale_by_std=scale_by_std))


@pytest.mark.parametrize(
    "rewards, scale_by_std, expected",
    [
        ([1, 0], False, [0.5, -0.5]),
        ([1, 0], True, [1, -1]),
        ([1, 0, 0, 0], False, [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 0], True, [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),  # std = sqrt(3) / 4
        ([1, 2, 3], True, [-(1.5**0.5), 0, 1.5**0.5]),  # population std = sqrt(2 / 3)
    ],
)
def test_hand_numbers(rewards, scale_by_std, expected):
    got = advantages([rewards], scale_by_std=scale_by_std)
    np.testing.assert_allclose(got, [expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_against_a_double_loop(scale_by_std):
    rng = np.random.default_rng(0)
    for group in (2, 3, 8):
        rewards = rng.choice([0.0, 0.1, 0.5, 1.0], (40, group)).astype(np.float32)
        valid = rng.random((40, group)) < 0.7
        expected = slow_advantage(rewards.tolist(), valid.tolist(), scale_by_std)
        got = advantages(rewards, valid, scale_by_std=scale_by_std)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 1.0, 1 / 3, 1e6])
def test_a_flat_group_teaches_exactly_nothing(reward, scale_by_std):
    got = advantages([[reward] * 6], scale_by_std=scale_by_std)
    assert (got == 0.0).all()


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_an_invalid_row_is_zero_and_not_averaged(scale_by_std):
    # A verifier that failed may have left anything there.
    with_bad = advantages(
        [[1, 777.0, 0, np.nan]], [[True, False, True, False]], scale_by_std=scale_by_std
    )
    without = advantages([[1, 0]], scale_by_std=scale_by_std)
    assert with_bad[0, [1, 3]].tolist() == [0, 0]
    np.testing.assert_array_equal(with_bad[:, [0, 2]], without)


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_groups_with_nothing_to_compare_are_zero(scale_by_std):
    got = advantages([[1, 0], [1, 0]], [[False, False], [True, False]], scale_by_std=scale_by_std)
    np.testing.assert_array_equal(got, np.zeros((2, 2)))


def test_a_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        advantages([[1.0]], scale_by_std=True)


def test_has_signal_counts_valid_rewards_only():
    reward_PG = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 0, 0]], np.float32)
    valid_PG = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]], bool)
    assert has_signal(reward_PG, valid_PG).tolist() == [False, True, False, False]
