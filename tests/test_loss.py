"""The objective: hand points, a triple loop in plain Python, and an exact policy gradient."""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.advantage import group_advantage
from grpo.loss import clipped_objective, grpo_loss, kl_k3, sft_loss
from grpo.structs import Batch


def batch_of(mask_RC, **fields) -> Batch:
    """A batch as the loss sees it; what it does not read is absent, and zeros are the default."""
    zeros_RC = np.zeros(np.shape(mask_RC), np.float32)
    names = ("advantage_RC", "old_logprobs_RC", "sampler_logprobs_RC", "ref_logprobs_RC")
    defaults = dict.fromkeys(names, zeros_RC)
    return Batch(
        tokens_RT=None,
        positions_RT=None,
        segments_RT=None,
        targets_RC=None,
        mask_RC=np.asarray(mask_RC),
        **(defaults | fields),
    )


def loss_of(logprobs_RC, batch: Batch, **settings) -> jax.Array:
    """The loss alone, divided by the batch's own token count."""
    settings = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0, "on_policy": False} | settings
    count = jnp.float32(batch.mask_RC.sum())
    return grpo_loss(logprobs_RC, jnp.zeros_like(logprobs_RC), batch, count, **settings)[0]


# ---- the clip --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",  # slope: of the loss by the log-probability
    [
        (1.5, +1.0, -1.2, 0.0),  # good token, already raised enough: clipped, no gradient
        (1.5, -1.0, +1.5, +1.5),  # bad token, raised: full penalty
        (0.5, +1.0, -0.5, -0.5),  # good token, lowered: full push back
        (0.5, -1.0, +0.8, 0.0),  # bad token, lowered enough: clipped, no gradient
        (1.1, +2.0, -2.2, -2.2),  # inside the clip: the policy gradient, times the ratio
        (0.9, -2.0, +1.8, +1.8),
    ],
)
def test_clip_has_four_quadrants(ratio, advantage, loss, slope):
    batch = batch_of(np.ones((1, 1), bool), advantage_RC=np.full((1, 1), advantage, np.float32))
    objective = partial(loss_of, batch=batch, clip_low=0.2, clip_high=0.2)
    got, gradient = jax.value_and_grad(objective)(jnp.full((1, 1), math.log(ratio)))
    assert got == pytest.approx(loss, abs=1e-6)
    assert gradient[0, 0] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, objective",
    [(1.25, 1, 1.25), (1.5, 1, 1.4), (0.65, -1, -0.9), (0.95, -1, -0.95)],
)
def test_each_side_of_the_clip_has_its_own_width(ratio, advantage, objective):
    got = clipped_objective(jnp.log(ratio), jnp.float32(advantage), 0.1, 0.4)
    assert got == pytest.approx(objective, abs=1e-6)


@pytest.mark.parametrize("log_ratio", [-1e4, 1e4, -100.0, 100.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_huge_ratio_stays_finite(log_ratio, advantage):
    objective = partial(clipped_objective, clip_low=0.2, clip_high=0.2)
    value, slope = jax.value_and_grad(objective)(jnp.float32(log_ratio), jnp.float32(advantage))
    assert math.isfinite(value) and math.isfinite(slope)


# ---- k3 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref_over_pi, expected",
    [(1, 0.0), (2, 1 - math.log(2)), (0.5, math.log(2) - 0.5), (math.e, math.e - 2)],
)
def test_k3_hand_points(ref_over_pi, expected):
    assert kl_k3(jnp.float32(-3.0), -3.0 + jnp.log(ref_over_pi)) == pytest.approx(
        expected, rel=1e-5
    )


def test_k3_is_never_negative():
    size = np.logspace(-12, 3, 20_001, dtype=np.float32)
    for difference in (size, -size):
        k3 = np.asarray(kl_k3(jnp.zeros(difference.shape), jnp.asarray(difference)))
        assert (k3 >= 0).all() and np.isfinite(k3).all()


def test_k3_slope_is_one_minus_the_ratio():
    """d/d(log pi) of exp(d) - d - 1, with d = log ref - log pi, is 1 - ref / pi."""
    for ratio in (0.25, 1.0, 3.0):
        slope = jax.grad(kl_k3)(jnp.float32(-1.0), -1.0 + jnp.log(ratio))
        assert slope == pytest.approx(1 - ratio, abs=1e-6)


def test_k3_is_unbiased_for_the_kl():
    pi, ref = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    mean = float(pi @ np.asarray(kl_k3(jnp.log(pi), jnp.log(ref))))
    assert mean == pytest.approx(float(pi @ np.log(pi / ref)), abs=1e-6)


# ---- the whole loss, against plain Python ----------------------------------------------------


def slow_loss(logprobs, batch: Batch, low: float, high: float, kl_coef: float) -> float:
    """arXiv:2402.03300, eq. 3 with k3, by token over the batch: one number at a time, float64."""
    total, count = 0.0, 0
    for r, row in enumerate(batch.mask_RC):
        for c, trains in enumerate(row):
            if not trains:
                continue
            count += 1
            ratio = math.exp(logprobs[r][c] - float(batch.old_logprobs_RC[r, c]))
            advantage = float(batch.advantage_RC[r, c])
            clipped = min(max(ratio, 1 - low), 1 + high)
            total += min(ratio * advantage, clipped * advantage)
            d = float(batch.ref_logprobs_RC[r, c]) - logprobs[r][c]
            total -= kl_coef * (math.exp(d) - d - 1)
    return -total / count


def slow_gradient(logprobs, batch: Batch, *settings: float) -> np.ndarray:
    """Central differences of `slow_loss`."""
    gradient, eps = np.zeros(np.shape(logprobs)), 1e-6
    for r, c in np.ndindex(gradient.shape):
        moved = np.array(logprobs, np.float64)
        moved[r, c] += eps
        above = slow_loss(moved.tolist(), batch, *settings)
        moved[r, c] -= 2 * eps
        gradient[r, c] = (above - slow_loss(moved.tolist(), batch, *settings)) / (2 * eps)
    return gradient


def ragged(seed: int, rows: int = 6, width: int = 7) -> tuple[np.ndarray, Batch]:
    """Log-probs and a batch: lengths from 0 to full, ratios on both sides of any clip."""
    rng = np.random.default_rng(seed)
    lengths_R = rng.permutation([0, width, *rng.integers(1, width, rows - 2)])
    mask_RC = np.arange(width) < lengths_R[:, None]

    def near(x_RC: np.ndarray, width: float) -> np.ndarray:
        return (x_RC + rng.normal(0, width, x_RC.shape)).astype(np.float32)

    logprobs_RC = -rng.exponential(1.0, mask_RC.shape).astype(np.float32)
    batch = batch_of(
        mask_RC,
        advantage_RC=np.where(mask_RC, rng.normal(size=(rows, 1)), 0).astype(np.float32),
        old_logprobs_RC=near(logprobs_RC, 0.4),
        sampler_logprobs_RC=near(logprobs_RC, 0.4),
        ref_logprobs_RC=near(logprobs_RC, 1.0),
    )
    return logprobs_RC, batch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("low, high, kl_coef", [(0.2, 0.2, 0.0), (0.1, 0.4, 0.0), (0.2, 0.28, 0.3)])
def test_values_and_gradients_against_a_triple_loop(seed, low, high, kl_coef):
    logprobs_RC, batch = ragged(seed)
    objective = partial(loss_of, batch=batch, clip_low=low, clip_high=high, kl_coef=kl_coef)
    value, gradient_RC = jax.value_and_grad(objective)(jnp.asarray(logprobs_RC))
    slow = (logprobs_RC.tolist(), batch, low, high, kl_coef)
    assert value == pytest.approx(slow_loss(*slow), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient_RC, slow_gradient(*slow), rtol=1e-5, atol=1e-6)


def test_on_policy_gradient_is_the_policy_gradient():
    """The ratio is 1 by construction: the slope of every token is -A / count."""
    logprobs_RC, batch = ragged(0)
    objective = partial(loss_of, batch=batch, on_policy=True)
    value, gradient_RC = jax.value_and_grad(objective)(jnp.asarray(logprobs_RC))
    expected_RC = -batch.advantage_RC / batch.mask_RC.sum()
    np.testing.assert_allclose(gradient_RC, expected_RC, rtol=1e-6, atol=1e-9)
    assert value == pytest.approx(float(expected_RC.sum()), rel=1e-5)
    # ... and what a first update against recomputed log-probs does.
    same = dataclasses.replace(batch, old_logprobs_RC=logprobs_RC)
    off_policy = jax.grad(partial(loss_of, batch=same))(jnp.asarray(logprobs_RC))
    np.testing.assert_array_equal(gradient_RC, off_policy)


@pytest.mark.parametrize("rubbish", [-1e6, 1e6, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("on_policy", [True, False])
def test_masked_tokens_contribute_nothing(rubbish, on_policy):
    logprobs_RC, batch = ragged(1)

    @jax.jit
    def run(logprobs_RC, batch):
        count = jnp.float32(batch.mask_RC.sum())

        def objective(x_RC):
            loss, means, maxima = grpo_loss(
                x_RC,
                x_RC,
                batch,
                count,
                clip_low=0.2,
                clip_high=0.28,
                kl_coef=0.3,
                on_policy=on_policy,
            )
            return loss, (means, maxima)

        return jax.value_and_grad(objective, has_aux=True)(logprobs_RC)

    def spoil(x_RC):
        return np.where(batch.mask_RC, x_RC, np.float32(rubbish))

    spoiled = dataclasses.replace(
        batch,
        advantage_RC=spoil(batch.advantage_RC),
        old_logprobs_RC=spoil(batch.old_logprobs_RC),
        sampler_logprobs_RC=spoil(batch.sampler_logprobs_RC),
        ref_logprobs_RC=spoil(batch.ref_logprobs_RC),
    )
    clean, dirty = run(logprobs_RC, batch), run(spoil(logprobs_RC), spoiled)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert (np.asarray(clean[1])[~batch.mask_RC] == 0).all()


def test_metrics_are_sums_and_counts_over_trained_tokens():
    mask_RC = np.array([[True, True], [True, False]])
    batch = batch_of(
        mask_RC,
        advantage_RC=np.array([[1, 1], [-1, 0]], np.float32),
        old_logprobs_RC=np.array([[-1, -2], [-3, -9]], np.float32),
        sampler_logprobs_RC=np.array([[-1.5, -2], [-3.25, 9]], np.float32),
    )
    logprobs_RC = batch.old_logprobs_RC + np.log([[1.5, 1.1], [0.5, 7]]).astype(np.float32)
    entropy_RC = np.array([[1, 2], [3, 99]], np.float32)
    _, means, maxima = grpo_loss(
        jnp.asarray(logprobs_RC),
        jnp.asarray(entropy_RC),
        batch,
        jnp.float32(3),
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.0,
        on_policy=False,
    )
    assert {name: (float(m.total), int(m.count)) for name, m in means.items()} == {
        "sampler/gap_nats_mean": (0.75, 3),
        "policy/entropy_nats": (6.0, 3),
        "policy/clip_fraction": (2.0, 3),  # 1.5 upwards, 0.5 downwards; 1.1 is inside
        "policy/objective": (pytest.approx(1.2 + 1.1 - 0.8), 3),
    }
    assert float(maxima["sampler/gap_nats_max"]) == 0.5


def test_sft_loss_is_the_mean_surprise():
    logprobs_RC = jnp.log(jnp.array([[0.9, 0.25], [0.6, 0.001]]))
    batch = batch_of([[True, True], [True, False]])
    loss, means, _ = sft_loss(logprobs_RC, jnp.ones((2, 2)), batch, jnp.float32(3))
    assert loss == pytest.approx(-math.log(0.9 * 0.25 * 0.6) / 3, rel=1e-6)
    assert tuple(means["sft/confident"]) == (2, 3)


# ---- the exact gradient of an enumerable policy ----------------------------------------------


def every_sequence(stops: bool) -> list[list[int]]:
    """All completions over three tokens, at most two long; `stops`: token 0 ends one."""
    if not stops:
        return [list(pair) for pair in itertools.product(range(3), repeat=2)]
    return [[0], *([first, second] for first in (1, 2) for second in range(3))]


@pytest.mark.parametrize(
    "stops, group, on_policy", [(False, 2, True), (False, 2, False), (True, 3, True)]
)
def test_expected_gradient_is_exact(stops, group, on_policy):
    """The mean, over every possible group, of the estimator's gradient.

    With A_i = r_i - mean_G r and S_i the score (gradient of log pi) of sample i, independence and
    E[S] = 0 leave E[A_i S_i] = (1 - 1/G) E[r S]: the term of the mean that holds sample i itself
    is all that is lost. So E[sum_i A_i S_i] = (G - 1) * gradient of the expected reward, and as a
    mean over the group (G - 1) / G of it. The loss is divided by a constant here, as Dr. GRPO is:
    division by the group's own length would weigh short groups more.
    """
    sequences = every_sequence(stops)
    rng = np.random.default_rng(0)
    reward_S = jnp.asarray(rng.normal(size=len(sequences)), jnp.float32)
    tokens_SC = jnp.asarray([[*s, 0][:2] for s in sequences])
    mask_SC = jnp.asarray([[c < len(s) for c in range(2)] for s in sequences])
    theta = {
        "first": jnp.asarray(rng.normal(size=3), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32),
    }

    def logprobs(theta, tokens_GC):
        first = jax.nn.log_softmax(theta["first"])[tokens_GC[:, 0]]
        second = jax.nn.log_softmax(theta["second"])[tokens_GC[:, 0], tokens_GC[:, 1]]
        return jnp.stack([first, second], axis=1)

    def probability_S(theta):
        return jnp.exp(jnp.sum(logprobs(theta, tokens_SC), axis=1, where=mask_SC))

    def expected_reward(theta):
        return probability_S(theta) @ reward_S

    def group_loss(theta, members_G):
        tokens_GC, mask_GC = tokens_SC[members_G], mask_SC[members_G]
        advantage_1G = group_advantage(
            reward_S[members_G][None], jnp.ones((1, group), bool), scale_by_std=False
        )
        batch = Batch(
            tokens_RT=tokens_GC,
            positions_RT=None,
            segments_RT=None,
            targets_RC=None,
            mask_RC=mask_GC,
            advantage_RC=jnp.where(mask_GC, advantage_1G[0][:, None], 0.0),
            old_logprobs_RC=jax.lax.stop_gradient(logprobs(theta, tokens_GC)),
            sampler_logprobs_RC=jnp.zeros((group, 2)),
            ref_logprobs_RC=jnp.zeros((group, 2)),
        )
        return grpo_loss(
            logprobs(theta, tokens_GC),
            jnp.zeros((group, 2)),
            batch,
            jnp.float32(group),
            clip_low=0.2,
            clip_high=0.28,
            kl_coef=0.0,
            on_policy=on_policy,
        )[0]

    @jax.jit
    def estimate(theta, groups_XG):
        weight_X = jnp.prod(probability_S(theta)[groups_XG], axis=1)
        gradients = jax.vmap(jax.grad(group_loss), in_axes=(None, 0))(theta, groups_XG)
        return weight_X.sum(), jax.tree.map(lambda g: -jnp.tensordot(weight_X, g, 1), gradients)

    groups_XG = jnp.asarray(list(itertools.product(range(len(sequences)), repeat=group)))
    total, estimated = estimate(theta, groups_XG)
    assert total == pytest.approx(1.0, abs=1e-5)  # the groups are all there are
    exact = jax.grad(expected_reward)(theta)
    share = (group - 1) / group
    for name in theta:
        np.testing.assert_allclose(estimated[name], share * exact[name], rtol=0, atol=1e-6)
        assert np.abs(exact[name]).max() > 0.01
