"""The objective: hand points, plain Python loops, invariances, and exact policy gradients."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from packed import Tokens, batch_of, pack, ragged, totals_of

from grpo import advantage, loss
from grpo.loss import grpo_loss, k1, k2, k3, sft_loss
from grpo.structs import Batch, Scores, Totals

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
OBJECTIVES: dict[str, loss.Objective] = {
    "policy_gradient": loss.policy_gradient,
    "clipped": partial(loss.clipped, **CLIP),
    "dual_clipped": partial(loss.dual_clipped, **CLIP, dual_clip=1.5),
    "gspo": partial(loss.gspo, clip_low=0.1, clip_high=0.15),
    "gspo_token": partial(loss.gspo_token, clip_low=0.1, clip_high=0.15),
    "gmpo": partial(loss.gmpo, clip_low=0.3, clip_high=0.4),
    "cispo": partial(loss.cispo, clip_high=0.3),
    "sapo": partial(loss.sapo, sapo_temperature_positive=1.0, sapo_temperature_negative=1.05),
}
AGGREGATES: dict[str, loss.Aggregate] = {
    "by_token": loss.by_token,
    "by_sequence": loss.by_sequence,
    "by_length": partial(loss.by_length, max_new_tokens=7),
}
CORRECTIONS: dict[str, loss.Correction] = {
    "uncorrected": loss.uncorrected,
    "truncated": partial(loss.truncated, correction_cap=1.3),
    "icepop": partial(loss.icepop, correction_low=0.6, correction_high=1.5),
    "masked_sequences": partial(loss.masked_sequences, correction_cap=1.3, sequence_gap_max=0.2),
}
PLAIN: dict[str, Any] = {
    "objective": OBJECTIVES["clipped"],
    "aggregate": loss.by_token,
    "correction": loss.uncorrected,
    "kl": k3,
    "kl_coef": 0.0,
    "entropy_coef": 0.0,
    "on_policy": False,
}


def named(**choice: Any) -> dict[str, Any]:
    """PLAIN with other functions, themselves or by their names above."""
    tables: Any = {"objective": OBJECTIVES, "aggregate": AGGREGATES, "correction": CORRECTIONS}
    return PLAIN | {k: tables[k][v] if isinstance(v, str) else v for k, v in choice.items()}


# ---- the clip --------------------------------------------------------------------------------


@jax.jit
@jax.value_and_grad
def _clipped_at_02(logprobs_RC: jax.Array, batch: Batch) -> jax.Array:
    clip = partial(loss.clipped, clip_low=0.2, clip_high=0.2)
    settings = PLAIN | {"objective": clip}
    return grpo_loss(logprobs_RC, jnp.zeros((1, 1)), batch, Totals(1, 1), **settings)[0]


@pytest.mark.parametrize(
    "ratio, points, value, slope",  # slope: of the loss by the log-probability
    [
        (1.5, +1.0, -1.2, 0.0),  # good token, already raised enough: clipped, no gradient
        (1.5, -1.0, +1.5, +1.5),  # bad token, raised: full penalty
        (0.5, +1.0, -0.5, -0.5),  # good token, lowered: full push back
        (0.5, -1.0, +0.8, 0.0),  # bad token, lowered enough: clipped, no gradient
        (1.1, +2.0, -2.2, -2.2),  # inside the clip: the policy gradient, times the ratio
        (0.9, -2.0, +1.8, +1.8),
    ],
)
def test_clip_has_four_quadrants(ratio, points, value, slope):
    batch = batch_of(np.ones((1, 1), bool), advantage_RC=np.full((1, 1), points, np.float32))

    got, gradient = _clipped_at_02(np.full((1, 1), math.log(ratio), np.float32), batch)
    assert got == pytest.approx(value, abs=1e-6)
    assert gradient[0, 0] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    "name, numbers, ratio, points, expected, slope",
    [
        # Each side of the clip has its own width.
        ("clipped", {"clip_low": 0.1, "clip_high": 0.4}, 1.25, 1, 1.25, 1.25),
        ("clipped", {"clip_low": 0.1, "clip_high": 0.4}, 1.5, 1, 1.4, 0),
        ("clipped", {"clip_low": 0.1, "clip_high": 0.4}, 0.65, -1, -0.9, 0),
        # Dual clip: a bad token costs at most 3 |A|; a good one is as before.
        ("dual_clipped", CLIP | {"dual_clip": 3.0}, 2.0, -1, -2.0, -2.0),
        ("dual_clipped", CLIP | {"dual_clip": 3.0}, 5.0, -1, -3.0, 0),
        ("dual_clipped", CLIP | {"dual_clip": 3.0}, 5.0, 1, 1.28, 0),
        ("dual_clipped", CLIP | {"dual_clip": 3.0}, 0.5, 2, 1.0, 1.0),
        # GMPO clips in log space: ratio 1.5 = exp(0.405) is beyond exp(0.4) = 1.4918.
        ("gmpo", {"clip_low": 0.4, "clip_high": 0.4}, 1.5, 1, math.exp(0.4), 0),
        ("gmpo", {"clip_low": 0.4, "clip_high": 0.4}, 1.5, -1, -1.5, -1.5),
        ("gmpo", {"clip_low": 0.4, "clip_high": 0.4}, 0.5, -2, -2 * math.exp(-0.4), 0),
        # CISPO: value weight * A * log ratio, slope weight * A; only the weight is bounded.
        ("cispo", {"clip_high": 1.0}, 1.5, 2, 3 * math.log(1.5), 3.0),
        ("cispo", {"clip_high": 1.0}, 4.0, 1, 2 * math.log(4.0), 2.0),
        ("cispo", {"clip_high": 1.0}, 0.01, -1, -0.01 * math.log(0.01), -0.01),
        # SAPO at ratio 2, tau 1: 4 sigmoid(1); slope 4 sigmoid(1) sigmoid(-1) * 2.
        (
            "sapo",
            {"sapo_temperature_positive": 1.0, "sapo_temperature_negative": 9.0},
            2.0,
            1,
            4 / (1 + math.exp(-1)),
            8 / (1 + math.exp(-1)) / (1 + math.exp(1)),
        ),
        (
            "sapo",
            {"sapo_temperature_positive": 9.0, "sapo_temperature_negative": 2.0},
            1.5,
            -1,
            -2 / (1 + math.exp(-1)),
            -6 / (1 + math.exp(-1)) / (1 + math.exp(1)),
        ),
    ],
)
def test_objectives_at_points_done_by_hand(name, numbers, ratio, points, expected, slope):
    batch = batch_of([[True]], advantage_RC=np.full((1, 1), points, np.float32))
    function = partial(getattr(loss, name), **numbers)
    run = jax.jit(jax.value_and_grad(lambda x_RC: function(x_RC, batch).sum()))
    value, gradient = run(np.full((1, 1), math.log(ratio), np.float32))
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert gradient[0, 0] == pytest.approx(slope, rel=1e-5, abs=1e-6)


# ---- the KL ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ref_over_pi, expected",
    [(1, 0.0), (2, 1 - math.log(2)), (0.5, math.log(2) - 0.5), (math.e, math.e - 2)],
)
def test_kl_hand_points(ref_over_pi, expected):
    log = math.log(ref_over_pi)
    assert k3(jnp.float32(-3.0), jnp.float32(-3.0 + log)) == pytest.approx(expected, rel=1e-5)
    assert k2(jnp.float32(-3.0), jnp.float32(-3.0 + log)) == pytest.approx(log**2 / 2, abs=1e-6)
    assert k1(jnp.float32(-3.0), jnp.float32(-3.0 + log)) == pytest.approx(-log, abs=1e-6)


def test_k3_is_never_negative():
    size = np.logspace(-12, 3, 20_001, dtype=np.float32)
    for difference in (size, -size):
        estimate = np.asarray(k3(jnp.zeros(difference.shape), jnp.asarray(difference)))
        assert (estimate >= 0).all() and np.isfinite(estimate).all()


PI_LOGITS, REF_LOGITS = np.array([0.3, -0.2, 1.1]), np.array([-0.5, 0.9, 0.2])


def categorical(logits: Any) -> jax.Array:
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))


def expected_kl(logits: jax.Array, estimator: loss.Divergence) -> jax.Array:
    """Mean of the estimator over tokens of pi, with pi's weights held: what a loss averages."""
    logprobs_V = categorical(logits)
    weights_V = jax.lax.stop_gradient(jnp.exp(logprobs_V))
    return weights_V @ estimator(logprobs_V, categorical(REF_LOGITS))


def test_k1_and_k3_are_unbiased_for_the_kl():
    pi, ref = categorical(PI_LOGITS), categorical(REF_LOGITS)
    exact = jnp.exp(pi) @ (pi - ref)
    for estimator in (k1, k3):
        got = expected_kl(jnp.asarray(PI_LOGITS), estimator)
        assert float(got) == pytest.approx(float(exact), abs=1e-6)


def test_the_gradient_of_each_kl_as_a_loss():
    """k1: zero, whatever the reference. k2: of KL(pi || ref). k3: of KL(ref || pi)."""
    ref, logits = categorical(REF_LOGITS), jnp.asarray(PI_LOGITS, jnp.float32)
    reverse = jax.grad(lambda x: jnp.exp(categorical(x)) @ (categorical(x) - ref))(logits)
    forward = jax.grad(lambda x: jnp.exp(ref) @ (ref - categorical(x)))(logits)
    assert np.abs(reverse).max() > 0.1 and np.abs(reverse - forward).max() > 0.1
    for estimator, expected in ((k1, jnp.zeros(3)), (k2, reverse), (k3, forward)):
        gradient = jax.grad(expected_kl)(logits, estimator)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kl", [k1, partial(k1)])
def test_k1_is_refused_as_a_loss(kl):
    logprobs_RC, entropy_RC, batch = pack(ragged(0), [range(9)], 64)
    with pytest.raises(ValueError, match=r"E\[grad log pi\] = 0.*algo.kl_in_reward"):
        grpo_loss(
            logprobs_RC, entropy_RC, batch, Totals(1, 1), **(PLAIN | {"kl": kl, "kl_coef": 0.1})
        )


# ---- against plain Python --------------------------------------------------------------------

Floats = list[float]


def inside(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def surrogate(ratio: float, A: float, low: float, high: float) -> float:
    return min(ratio * A, inside(ratio, 1 - low, 1 + high) * A)


def slow_objective(name: str, x: Floats, x0: Floats, A: float) -> Floats:
    """Each token's objective. x: log-ratios of a completion's trained tokens; x0: without slope."""
    mean, mean0 = sum(x) / len(x), sum(x0) / len(x0)
    if name == "policy_gradient":
        return [A * xi for xi in x]
    if name == "clipped":
        return [surrogate(math.exp(xi), A, 0.2, 0.28) for xi in x]
    if name == "dual_clipped":
        plain = [surrogate(math.exp(xi), A, 0.2, 0.28) for xi in x]
        return [max(p, 1.5 * A) for p in plain] if A < 0 else plain
    if name == "gspo":
        return [surrogate(math.exp(mean), A, 0.1, 0.15)] * len(x)
    if name == "gspo_token":
        return [
            surrogate(math.exp(mean0 + xi - fixed), A, 0.1, 0.15)
            for xi, fixed in zip(x, x0, strict=True)
        ]
    if name == "gmpo":
        worst = min if A > 0 else max
        kept = [worst(xi, inside(xi, -0.3, 0.4)) for xi in x]
        return [A * math.exp(sum(kept) / len(kept))] * len(x)
    if name == "cispo":
        return [min(math.exp(f), 1.3) * A * xi for xi, f in zip(x, x0, strict=True)]
    assert name == "sapo"
    tau = 1.0 if A > 0 else 1.05
    return [A * 4 / tau / (1 + math.exp(-tau * (math.exp(xi) - 1))) for xi in x]


def slow_correction(name: str, gaps: Floats) -> Floats:
    """Weight of each trained token of a completion."""
    ratios = [math.exp(gap) for gap in gaps]
    if name == "uncorrected":
        return [1.0] * len(gaps)
    if name == "icepop":
        return [ratio if 0.6 <= ratio <= 1.5 else 0.0 for ratio in ratios]
    if name == "masked_sequences" and abs(sum(gaps) / len(gaps)) > 0.2:
        return [0.0] * len(gaps)
    return [min(ratio, 1.3) for ratio in ratios]


def slow_loss(
    moved: list[tuple[Floats, Floats]],
    completions: list[Tokens],
    *,
    objective: str = "clipped",
    aggregate: str = "by_token",
    correction: str = "uncorrected",
    kl: Any = k3,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    on_policy: bool = False,
) -> float:
    """The loss, one token at a time, float64. `moved`: log-probs and entropy of each completion;
    those in `completions` are the point about which detached numbers stay."""
    tokens = sum(sum(c.trains) for c in completions)
    sequences = sum(any(c.trains) for c in completions)
    total = 0.0
    for (logprobs, entropy), c in zip(moved, completions, strict=True):
        at = [t for t, trains in enumerate(c.trains) if trains]
        if not at:
            continue
        old = c.logprobs if on_policy else c.old_logprobs
        points = slow_objective(
            objective,
            [logprobs[t] - old[t] for t in at],
            [c.logprobs[t] - old[t] for t in at],
            c.advantage,
        )
        weights = slow_correction(correction, [old[t] - c.sampler_logprobs[t] for t in at])
        share = {
            "by_token": 1 / tokens,
            "by_sequence": 1 / (len(at) * sequences),
            "by_length": 1 / (7 * sequences),
        }[aggregate]
        for t, point, weight in zip(at, points, weights, strict=True):
            d = c.ref_logprobs[t] - logprobs[t]
            divergence = d * d / 2 if kl is k2 else math.exp(d) - d - 1
            total += share * (weight * point - kl_coef * divergence + entropy_coef * entropy[t])
    return -total


def slow_gradient(completions: list[Tokens], **choice: Any) -> list[np.ndarray]:
    """Central differences of `slow_loss`; [2, length] a completion, by log-probs and entropy."""
    base = [(list(c.logprobs), list(c.entropy)) for c in completions]
    out, eps = [], 1e-6
    for n, c in enumerate(completions):
        gradient = np.zeros((2, len(c.trains)))
        for which, t in np.ndindex(gradient.shape):
            start = base[n][which][t]
            base[n][which][t] = start + eps
            above = slow_loss(base, completions, **choice)
            base[n][which][t] = start - eps
            gradient[which, t] = (above - slow_loss(base, completions, **choice)) / (2 * eps)
            base[n][which][t] = start
        out.append(gradient)
    return out


ROWS = ((3, 0), (1, 2, 4, 5), (), (6, 7, 8))


def unpacked(x_RC: Any, completions: list[Tokens], rows: Any = ROWS) -> list[np.ndarray]:
    """What belongs to each completion, out of packed rows."""
    out: list[Any] = [None] * len(completions)
    x_RC = np.asarray(x_RC)  # slices of a jax array would each be compiled
    for r, members in enumerate(rows):
        start = 0
        for member in members:
            length = len(completions[member].trains)
            out[member] = x_RC[r, start : start + length]
            start += length
    return out


def fast(
    completions: list[Tokens],
    rows: Any = ROWS,
    width: int = 24,
    metrics: bool = False,  # they take most of the time to compile
    **choice: Any,
) -> Any:
    """(loss, gradients of each completion [2, length], means, maxima) by the real thing."""
    logprobs_RC, entropy_RC, batch = pack(completions, rows, width)
    totals, settings = totals_of(completions), named(**choice)

    def value(logprobs_RC, entropy_RC):
        got, means, maxima = grpo_loss(logprobs_RC, entropy_RC, batch, totals, **settings)
        return got, (means, maxima) if metrics else ({}, {})

    both = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    (got, (means, maxima)), (by_logprob_RC, by_entropy_RC) = both(logprobs_RC, entropy_RC)
    outside_RC = ~np.asarray(batch.mask_RC)
    assert (np.asarray(by_logprob_RC)[outside_RC] == 0).all()
    pairs = zip(
        unpacked(by_logprob_RC, completions, rows),
        unpacked(by_entropy_RC, completions, rows),
        strict=True,
    )
    return got, [np.stack(pair) for pair in pairs], means, maxima


@pytest.mark.parametrize(
    "choice",
    [
        *({"objective": name, "aggregate": "by_sequence"} for name in OBJECTIVES),
        *({"aggregate": name, "entropy_coef": 0.2} for name in ("by_token", "by_length")),
        *({"correction": name} for name in CORRECTIONS if name != "uncorrected"),
        {"kl": k2, "kl_coef": 0.3, "aggregate": "by_length"},
        {"kl": k3, "kl_coef": 0.3, "objective": "gspo", "correction": "truncated"},
        {"on_policy": True, "correction": "icepop", "kl_coef": 0.1},
    ],
    ids=lambda choice: "-".join(str(getattr(v, "__name__", v)) for v in choice.values()),
)
def test_values_and_gradients_against_a_loop(choice):
    completions = ragged(0)
    value, gradients, *_ = fast(completions, **choice)
    base = [(c.logprobs, c.entropy) for c in completions]
    assert value == pytest.approx(slow_loss(base, completions, **choice), rel=1e-5, abs=1e-6)
    for got, expected in zip(gradients, slow_gradient(completions, **choice), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_sums_by_sequence_are_of_trained_tokens_only():
    batch = batch_of(
        [[True, True, True, False, True, False]],
        sequences_RC=jnp.array([[0, 0, 2, 2, 2, 99]]),
    )
    x_RC = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0, jnp.nan]])
    assert loss.sum_by_sequence(x_RC, batch).tolist() == [[3, 3, 20, 0, 20, 0]]
    assert loss.mean_by_sequence(x_RC, batch).tolist() == [[1.5, 1.5, 10, 0, 10, 0]]


# ---- what must change nothing ----------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "objective": "gspo_token",
    "aggregate": "by_sequence",
    "correction": "masked_sequences",
    "kl": k3,
    "kl_coef": 0.2,
    "entropy_coef": 0.1,
}


@functools.cache
def _packed_as_usual() -> Any:
    return fast(ragged(1), metrics=True, **EVERYTHING)


@pytest.mark.parametrize(
    "rows, width",
    [
        ([[n] for n in range(9)], 6),  # a completion a row
        ([[n] for n in range(9)], 40),  # ... with much padding
        ([list(range(9))], 64),  # one row
        ([[8, 6], [], [0, 3, 1], [7, 2, 5, 4]], 24),  # another order
    ],
)
def test_packing_padding_and_order_change_nothing(rows, width):
    completions = ragged(1)
    value, gradients, means, maxima = _packed_as_usual()
    other, others, means2, maxima2 = fast(completions, rows, width, True, **EVERYTHING)
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    for got, expected in zip(others, gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, (means2, maxima2), (means, maxima))


def test_microbatches_add_up_to_the_whole():
    """Also when they hold different numbers of tokens, and one of them none."""
    completions = ragged(2)
    whole, gradients, means, _ = fast(completions, metrics=True, **EVERYTHING)
    totals = totals_of(completions)
    value, summed = 0.0, []
    run = jax.jit(jax.value_and_grad(partial(_loss_and_means, **named(**EVERYTHING)), has_aux=True))
    for members in ((4, 0), (1, 2, 3, 5, 6, 7, 8), ()):
        rows = [members]
        logprobs_RC, entropy_RC, batch = pack(completions, rows, 48)
        (part, parts), gradient_RC = run(logprobs_RC, entropy_RC, batch, totals)
        value += part
        summed.append(parts)
        for member, got in enumerate(unpacked(gradient_RC, completions, rows)):
            if got is not None:
                np.testing.assert_allclose(got, gradients[member][0], rtol=1e-4, atol=1e-7)
    assert float(value) == pytest.approx(float(whole), rel=1e-5)
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda whole, *parts: same(sum(parts), whole), means, *summed)


def _loss_and_means(logprobs_RC, entropy_RC, batch, totals, **settings):
    value, means, _ = grpo_loss(logprobs_RC, entropy_RC, batch, totals, **settings)
    return value, means


def test_rows_over_eight_devices_change_nothing():
    completions = ragged(1)
    rows = [[n] for n in range(8)]
    logprobs_RC, entropy_RC, batch = pack(completions, rows, 8)
    args = (logprobs_RC, entropy_RC, batch, totals_of(completions[:8]))
    run = jax.jit(jax.value_and_grad(partial(_loss_and_means, **named(**EVERYTHING)), has_aux=True))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    sharded = (*(jax.device_put(x, spread) for x in args[:3]), args[3])
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, run(*sharded), run(*args))


@pytest.mark.parametrize("on_policy", [True, False])
def test_masked_slots_are_never_read(on_policy):
    logprobs_RC, entropy_RC, batch = pack(ragged(1), ROWS, 24)
    settings = named(**(EVERYTHING | {"on_policy": on_policy}))
    run = jax.jit(jax.value_and_grad(partial(_loss_and_means, **settings), has_aux=True))

    def with_rubbish(rubbish: float) -> Any:
        def spoil(x_RC):
            return jnp.where(batch.mask_RC, x_RC, rubbish)

        spoiled = dataclasses.replace(
            batch,
            sequences_RC=jnp.where(batch.mask_RC, batch.sequences_RC, 10**6),
            **{name: spoil(getattr(batch, name)) for name in _NATS},
        )
        totals = totals_of(ragged(1))
        return run(spoil(logprobs_RC), spoil(entropy_RC), spoiled, totals)

    clean = with_rubbish(0.0)
    assert np.isfinite(clean[0][0]) and (np.asarray(clean[1])[~batch.mask_RC] == 0).all()
    for rubbish in (-1e6, 1e6, -math.inf, math.inf, math.nan):
        jax.tree.map(np.testing.assert_array_equal, with_rubbish(rubbish), clean)


_NATS = ("advantage_RC", "old_logprobs_RC", "sampler_logprobs_RC", "ref_logprobs_RC")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_huge_ratios_and_gaps_stay_finite_and_are_counted(name):
    extremes = np.array([-1e30, -1e4, -100.0, -1.0, 0.0])
    grid = np.array(list(itertools.product(extremes, extremes, (-1.0, 0.0, 1.0))), np.float32)
    count = len(grid)
    batch = batch_of(
        np.ones((count, 1), bool),
        advantage_RC=grid[:, 2:],
        old_logprobs_RC=grid[:, 1:2],
        sampler_logprobs_RC=grid[:, :1][::-1],
        ref_logprobs_RC=grid[:, 1:2],
    )
    settings = named(objective=name, aggregate="by_sequence", correction="icepop", kl_coef=0.1)
    ones = jnp.ones((count, 1))

    def run(logprobs_RC):
        value, means, _ = grpo_loss(logprobs_RC, ones, batch, Totals(count, count), **settings)
        return value, means if name == "dual_clipped" else {}

    (value, means), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(grid[:, :1])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    for mean in means.values():
        assert np.isfinite(mean.total).all()
    if means:
        assert 0 < means["policy/clamped_share"].total < count


# ---- at ratio one ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, on_policy", [*((name, False) for name in OBJECTIVES), ("clipped", True), ("gspo", True)]
)
def test_at_ratio_one_every_objective_is_the_policy_gradient(name, on_policy):
    """So the slope of a token is -A * its weight, however the objective treats other ratios."""
    completions = ragged(0)
    if not on_policy:  # a first update against recomputed log-probs
        completions = [dataclasses.replace(c, old_logprobs=c.logprobs) for c in completions]
    _, gradients, means, maxima = fast(
        completions,
        metrics=name == "clipped",
        objective=name,
        aggregate="by_sequence",
        on_policy=on_policy,
    )
    sequences = totals_of(completions).sequences
    for c, got in zip(completions, gradients, strict=True):
        slope = -c.advantage / max(sum(c.trains), 1) / sequences
        np.testing.assert_allclose(got[0], np.where(c.trains, slope, 0.0), rtol=1e-5)
    if name == "clipped":
        assert means["policy/clip_fraction"].total == 0
        assert maxima["policy/ratio_max"] == 1


# ---- metrics ---------------------------------------------------------------------------------


def test_metrics_are_sums_and_counts_over_trained_tokens():
    array = partial(np.array, dtype=np.float32)
    ratios = np.array([[1.5, 1.1001, 1.0], [0.5001, 7, 0.7]])
    batch = batch_of(
        [[True, True, True], [True, False, True]],
        sequences_RC=np.array([[0, 0, 1], [0, 0, 1]]),
        advantage_RC=array([[1.0, 1, 0], [-1, 0, 2]]),
        old_logprobs_RC=array([[-1.0, -2, -3], [-3, -9, -4]]),
        sampler_logprobs_RC=array([[-1.5, -2, -3], [-3.25, 9, -29]]),
        ref_logprobs_RC=array([[-1.0, -2, -3], [-3, -9, -4]]),
    )
    logprobs_RC = batch.old_logprobs_RC + array(np.log(ratios))
    settings = named(correction="icepop", kl_coef=1.0)
    settings["objective"] = partial(loss.clipped, clip_low=0.2, clip_high=0.2)
    run = jax.jit(partial(grpo_loss, **settings))
    entropy_RC = np.array([[1, 2, 3], [4, 99, 5]], np.float32)
    _, means, maxima = run(logprobs_RC, entropy_RC, batch, Totals(5, 4))
    got = {name: (np.asarray(m.total).tolist(), int(m.count)) for name, m in means.items()}
    near = partial(pytest.approx, rel=1e-5)

    def estimate(*log_ratios):
        return sum(math.exp(x) - 1 - x for x in log_ratios)

    assert got == {
        "policy/objective": (near(1.2 + 1.1001 + 0 - 0.8 + 1.4), 5),
        "policy/entropy_nats": (15.0, 5),
        "policy/ratio_mean": (near(1.5 + 1.1001 + 1.0 + 0.5001 + 0.7), 5),
        # Below 0.5, from 0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.25, from 2.
        "policy/ratio_share": ([0, 2, 0, 0, 1, 0, 1, 1, 0], 5),
        "policy/kl_old_nats": (near(estimate(*np.log([1.5, 1.1001, 0.5001, 0.7]))), 5),
        "policy/kl_ref_nats": (near(estimate(*-np.log([1.5, 1.1001, 0.5001, 0.7]))), 5),
        "policy/clip_fraction": (2, 5),  # 1.5 upwards, 0.5 downwards; 0.7 with A > 0 is not
        "policy/clip_low_fraction": (1, 5),
        "policy/clip_high_fraction": (1, 5),
        "policy/clamped_share": (1, 5),  # the gap of 25 nats
        "sampler/gap_nats_mean": (near(0.5 + 0.25 + 25), 5),
        "sampler/kl_nats": (near(estimate(0.5, 0.25, 20)), 5),
        # exp(0.5) and exp(20) are above 1.5: dropped.
        "sampler/corrected_share": (2, 5),
    }
    assert {name: float(value) for name, value in maxima.items()} == {
        "sampler/gap_nats_max": 25.0,
        "policy/ratio_max": near(1.5),
    }


def test_bins_of_the_ratio_begin_at_their_edges():
    above = np.array(loss.RATIO_EDGES) * (1 + 1e-6)
    shares = []
    for ratios in (above, above * (1 - 1e-5)):
        log_ratio_RC = np.log(ratios).astype(np.float32)[None]
        batch = batch_of(np.ones(log_ratio_RC.shape, bool))
        shares.append(_shares(log_ratio_RC, batch).tolist())
    assert shares == [[0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0]]


@jax.jit
def _shares(log_ratio_RC: jax.Array, batch: Batch) -> jax.Array:
    settings = named(aggregate="by_token")
    _, means, _ = grpo_loss(log_ratio_RC, log_ratio_RC, batch, Totals(8, 1), **settings)
    return means["policy/ratio_share"].total


def test_uncorrected_computes_no_weights():
    completions = ragged(0)
    _, _, means, _ = fast(completions, metrics=True)
    assert "sampler/corrected_share" not in means
    logprobs_RC, _, batch = pack(completions, ROWS, 24)
    assert (loss.uncorrected(logprobs_RC, batch) == 1).all()


def test_sft_loss_is_the_mean_surprise():
    logprobs_RC = jnp.log(jnp.array([[0.9, 0.25], [0.6, 0.0]]))
    batch = batch_of([[True, True], [True, False]])

    def run(logprobs_RC):
        value, means, _ = sft_loss(logprobs_RC, jnp.ones((2, 2)), batch, Totals(3, 2))
        return value, means

    (value, means), gradient = jax.value_and_grad(run, has_aux=True)(logprobs_RC)
    assert value == pytest.approx(-math.log(0.9 * 0.25 * 0.6) / 3, rel=1e-6)
    assert tuple(means["sft/confident"]) == (2, 3)
    np.testing.assert_allclose(gradient, [[-1 / 3, -1 / 3], [-1 / 3, 0]], rtol=1e-6)


# ---- the exact gradient of an enumerable policy ----------------------------------------------


def every_sequence(kind: str) -> list[list[int]]:
    """All completions over three tokens: `pairs`, `single` tokens, or `stops` where 0 ends one."""
    if kind == "single":
        return [[0], [1], [2]]
    if kind == "pairs":
        return [list(pair) for pair in itertools.product(range(3), repeat=2)]
    return [[0], *([first, second] for first in (1, 2) for second in range(3))]


@jax.jit
def _toy_logprobs(theta: Any, tokens_SC: Any, mask_SC: Any) -> jax.Array:
    first = jax.nn.log_softmax(theta["first"])[tokens_SC[:, 0]]
    second = jax.nn.log_softmax(theta["second"])[tokens_SC[:, 0], tokens_SC[:, 1]]
    return jnp.where(mask_SC, jnp.stack([first, second], axis=1), 0.0)


@functools.cache
def _toy_gradient(size: int, **choice: Any) -> Any:
    """-gradient of the mean loss of groups of this size, jitted; one for each choice."""
    by_length = partial(loss.by_length, max_new_tokens=1)
    settings = named(**({"aggregate": by_length} | choice))

    def one_group(logprobs_1C: jax.Array, batch: Batch) -> jax.Array:
        totals = Totals(batch.mask_RC.sum(), size)
        return grpo_loss(logprobs_1C, jnp.zeros_like(logprobs_1C), batch, totals, **settings)[0]

    @jax.jit
    @jax.grad
    def gradient(theta: Any, tokens_SC: Any, mask_SC: Any, X_G: Any, weight_X: Any, batch: Any):
        logprobs_SC = _toy_logprobs(theta, tokens_SC, mask_SC)
        logprobs_X1C = logprobs_SC[X_G].reshape(len(X_G), 1, -1)
        return -(weight_X @ jax.vmap(one_group)(logprobs_X1C, batch))

    return gradient


@dataclasses.dataclass
class Toy:
    """A tabular policy over all completions of a kind (S of them), and their rewards."""

    kind: str
    seed: int = 1

    def __post_init__(self) -> None:
        sequences = every_sequence(self.kind)
        rng = np.random.default_rng(self.seed)
        self.reward_S = rng.random(len(sequences)).astype(np.float32)
        self.tokens_SC = np.array([[*s, 0][:2] for s in sequences])
        self.mask_SC = np.array([[c < len(s) for c in range(2)] for s in sequences])
        self.theta = {
            "first": jnp.asarray(rng.normal(size=3), jnp.float32),
            "second": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32),
        }

    def logprobs_SC(self, theta: Any) -> jax.Array:
        return _toy_logprobs(theta, self.tokens_SC, self.mask_SC)

    def probability_S(self, theta: Any) -> jax.Array:
        return jnp.exp(self.logprobs_SC(theta).sum(axis=1))

    def groups(self, size: int) -> np.ndarray:
        """Every group there is, [X, size]: indices of completions."""
        return np.array(list(itertools.product(range(len(self.reward_S)), repeat=size)))

    def expected_gradient(
        self,
        estimator: Callable[[Scores], np.ndarray],
        size: int,
        *,
        sampler: Any = None,
        old: Any = None,
        kl_S: np.ndarray | None = None,
        **choice: Any,
    ) -> Any:
        """Mean over all groups that `sampler` (default: the policy) may draw of -grad loss.

        Each group is one packed row of a batch of its own.
        """
        X_G = self.groups(size)
        sampler, old = sampler or self.theta, old or self.theta
        reward_XG = self.reward_S[X_G]
        scores = Scores(reward_XG, np.ones(X_G.shape, bool), {"right": reward_XG}, {"right": 1}, {})
        if kl_S is not None:
            scores = advantage.penalised(scores, kl_S[X_G], 1.0)
        weight_X = np.prod(np.asarray(self.probability_S(sampler))[X_G], axis=1)
        assert weight_X.sum() == pytest.approx(1.0, abs=1e-5)

        def rows(x_SC: Any) -> np.ndarray:  # [X, 1, 2 * size]
            return np.asarray(x_SC)[X_G].reshape(len(X_G), 1, -1)

        batch = batch_of(
            rows(self.mask_SC),
            sequences_RC=np.tile(np.repeat(np.arange(size), 2), (len(X_G), 1, 1)),
            advantage_RC=np.repeat(estimator(scores), 2, axis=1)[:, None],
            old_logprobs_RC=rows(self.logprobs_SC(old)),
            sampler_logprobs_RC=rows(self.logprobs_SC(sampler)),
        )
        gradient = _toy_gradient(size, **({"objective": "clipped", "on_policy": True} | choice))
        return gradient(self.theta, self.tokens_SC, self.mask_SC, X_G, weight_X, batch)

    def exact(self, value: Callable[[jax.Array], jax.Array]) -> Any:
        """Gradient of a function of the completions' probabilities."""
        return jax.jit(jax.grad(lambda theta: value(self.probability_S(theta))))(self.theta)

    def expected_reward(self, probability_S: jax.Array) -> jax.Array:
        return probability_S @ self.reward_S


def assert_same(got: Any, expected: Any, scale: float = 1.0) -> None:
    for name in expected:
        assert np.abs(expected[name]).max() > 0.01
        np.testing.assert_allclose(got[name], scale * expected[name], rtol=0, atol=1e-5)


def inner(a: Any, b: Any) -> float:
    return float(sum(jnp.vdot(a[name], b[name]) for name in b))


@pytest.mark.parametrize("kind, size", [("pairs", 2), ("stops", 3)])
@pytest.mark.parametrize(
    "objective, on_policy", [("policy_gradient", False), ("clipped", True), ("clipped", False)]
)
def test_dr_grpo_is_unbiased_up_to_its_baseline(kind, size, objective, on_policy):
    """E[A_i S_i] = (1 - 1/G) E[r S]: the term of the mean that holds sample i is what is lost."""
    toy = Toy(kind)
    got = toy.expected_gradient(advantage.dr_grpo, size, objective=objective, on_policy=on_policy)
    assert_same(got, toy.exact(toy.expected_reward), (size - 1) / size)


@pytest.mark.parametrize("kind, size", [("pairs", 2), ("stops", 3)])
def test_rloo_is_unbiased(kind, size):
    toy = Toy(kind)
    got = toy.expected_gradient(advantage.rloo, size)
    assert_same(got, toy.exact(toy.expected_reward))


@pytest.mark.parametrize("k, size, binary", [(1, 2, False), (2, 3, False), (2, 4, True)])
def test_pass_at_k_is_the_gradient_of_the_best_of_k(k, size, binary):
    toy = Toy("stops")
    if binary:
        toy.reward_S = (toy.reward_S > 0.6).astype(np.float32)
    X_K = toy.groups(k)
    best_X = toy.reward_S[X_K].max(axis=1)

    def best_of_k(probability_S):
        return jnp.prod(probability_S[X_K], axis=1) @ best_X

    got = toy.expected_gradient(partial(advantage.pass_at_k, pass_k=k), size)
    assert_same(got, toy.exact(best_of_k), 1 / k)
    if binary:  # then the best of k is pass@k

        def pass_at_k(probability_S):
            return 1 - (1 - probability_S @ toy.reward_S) ** k

        assert_same(got, toy.exact(pass_at_k), 1 / k)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_maxrl_is_the_gradient_of_the_truncated_log_likelihood(size):
    toy = Toy("stops")
    toy.reward_S = (toy.reward_S > 0.6).astype(np.float32)

    def series(probability_S):
        p = probability_S @ toy.reward_S
        return -sum((1 - p) ** k / k for k in range(1, size))

    got = toy.expected_gradient(advantage.maxrl, size)
    assert_same(got, toy.exact(series))


def test_kl_in_the_reward_is_the_gradient_of_the_kl():
    """Of whole completions, later tokens' share included: E[r] - KL(pi || ref), exactly."""
    toy = Toy("stops")
    ref_S = np.asarray(toy.logprobs_SC(Toy("stops", seed=4).theta)).sum(axis=1)
    kl_S = np.asarray(toy.logprobs_SC(toy.theta)).sum(axis=1) - ref_S

    def penalised(probability_S):
        kl = probability_S @ (jnp.log(probability_S) - ref_S)
        return toy.expected_reward(probability_S) - kl

    got = toy.expected_gradient(advantage.rloo, 2, kl_S=kl_S)
    assert_same(got, toy.exact(penalised))


def test_importance_weights_undo_the_sampler():
    """Completions of one token, from a sampler that differs: a cap out of reach leaves no bias."""
    toy, sampler = Toy("single"), Toy("single", seed=3).theta
    exact = {"first": toy.exact(toy.expected_reward)["first"]}
    wide = partial(loss.truncated, correction_cap=1e6)
    run = partial(toy.expected_gradient, advantage.rloo, 2, sampler=sampler)
    corrected, ignored = run(correction=wide), run()
    assert_same(corrected, exact)
    assert np.abs(ignored["first"] - exact["first"]).max() > 0.01


# The biased ones, each in its own direction.


def test_the_deviation_favours_problems_that_are_nearly_solved_or_nearly_never():
    """Share of the true gradient that is kept: more at p = 0.05 and 0.95 than at 0.5."""

    def share(p: float, estimator: Callable[[Scores], np.ndarray]) -> float:
        toy = Toy("single")
        toy.theta["first"] = jnp.log(jnp.array([p, (1 - p) / 2, (1 - p) / 2]))
        toy.reward_S = np.array([1, 0, 0], np.float32)
        exact = toy.exact(toy.expected_reward)["first"]
        return float(toy.expected_gradient(estimator, 5)["first"][0] / exact[0])

    middle, rare, common = (share(p, advantage.grpo) for p in (0.5, 0.05, 0.95))
    assert rare > 1.1 * middle and common > 1.1 * middle
    for p in (0.5, 0.05, 0.95):
        assert share(p, advantage.dr_grpo) == pytest.approx(4 / 5, abs=1e-4)


def test_by_sequence_punishes_long_wrong_completions_less():
    """Right is short, wrong is long: what is long is then pushed down too little."""
    toy = Toy("stops")
    # First token 0: short and right; 1 and 2: long and wrong.
    toy.theta = {"first": jnp.zeros(3), "second": jnp.zeros((3, 3))}
    toy.reward_S = np.array([1.0, *([0.0] * 6)], np.float32)
    exact = toy.exact(toy.expected_reward)["first"]
    run = partial(toy.expected_gradient, advantage.dr_grpo, 2)
    constant, mean = run()["first"], run(aggregate="by_sequence")["first"]
    np.testing.assert_allclose(constant, exact / 2, atol=1e-6)
    # The long ones hold two tokens that share one vote: half the push down on their first token.
    assert 0 > mean[1] > constant[1]
    assert mean[0] < constant[0]


def test_the_clip_stops_pushing_what_has_moved_enough():
    """Off-policy, one token a completion: without a clip unbiased, with it shorter, not turned."""
    toy = Toy("single")
    exact = {"first": toy.exact(toy.expected_reward)["first"]}
    # The policy has already gone a long way uphill from the one that sampled.
    old = {**toy.theta, "first": toy.theta["first"] - 4.0 * exact["first"]}
    run = partial(toy.expected_gradient, advantage.rloo, 2, sampler=old, old=old, on_policy=False)
    wide = run(objective=partial(loss.clipped, clip_low=1.0, clip_high=1e6))
    narrow = run(objective=partial(loss.clipped, clip_low=0.05, clip_high=0.05))
    assert_same(wide, exact)
    assert inner(narrow, exact) < 0.5 * inner(wide, exact)
