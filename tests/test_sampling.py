"""Filters against plain sorting, and the log-probabilities of what they leave."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_model import mesh_of

from grpo.engine.sampling import Filters, filtered, sample_token
from grpo.sharding import propagated

OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def filters_with(**changes: Any) -> Filters:
    values = OFF | changes
    return Filters(
        np.int32(values["top_k"]), np.float32(values["top_p"]), np.float32(values["min_p"])
    )


@functools.cache
def compiled_filtered():
    return jax.jit(filtered)


@functools.cache
def compiled_sample(greedy: bool = False):
    return jax.jit(functools.partial(sample_token, greedy=greedy))


def kept(logits_BV: np.ndarray, **changes: Any) -> np.ndarray:
    """Which tokens are left, bool [B, V]; those that are left keep their logits."""
    result_BV = np.asarray(compiled_filtered()(logits_BV, filters_with(**changes)))
    left_BV = result_BV > -np.inf
    assert (result_BV[left_BV] == logits_BV[left_BV]).all()
    return left_BV


def probabilities(logits_BV: np.ndarray) -> np.ndarray:
    """float64; of float32 softmax, so that what is equal there is equal here."""
    return np.asarray(jax.nn.softmax(logits_BV, axis=-1)).astype(np.float64)


def sorted_kept(probability_V: np.ndarray, *, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The definition by sorting: the lowest probability that each filter lets pass."""
    falling = np.sort(probability_V)[::-1]
    lowest = min_p * falling[0]
    if top_k:
        lowest = max(lowest, falling[min(top_k, len(falling)) - 1])
    if top_p < 1:
        reached = np.cumsum(falling) >= top_p
        lowest = max(lowest, falling[reached.argmax() if reached.any() else -1])
    return probability_V >= lowest


def random_logits(B: int, V: int, seed: int) -> np.ndarray:
    """Rows from nearly flat to very peaked."""
    rng = np.random.default_rng(seed)
    sharpness_B1 = np.geomspace(0.1, 10, B)[:, None]
    return (rng.normal(size=(B, V)) * sharpness_B1).astype(np.float32)


SETTINGS: list[dict[str, Any]] = [
    {},
    *({"top_k": k} for k in (1, 2, 7, 36, 37, 38, 1000)),
    *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.99)),
    *({"min_p": p} for p in (1e-6, 0.01, 0.3, 1.0)),
    {"top_k": 5, "top_p": 0.7},
    {"top_k": 9, "min_p": 0.05},
    {"top_p": 0.8, "min_p": 0.2},
    {"top_k": 4, "top_p": 0.95, "min_p": 0.1},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_what_is_kept_is_what_sorting_keeps(changes):
    logits_BV = random_logits(24, 37, seed=3)
    left_BV = kept(logits_BV, **changes)
    rows = probabilities(logits_BV)
    expected_BV = np.array([sorted_kept(row, **(OFF | changes)) for row in rows])
    np.testing.assert_array_equal(left_BV, expected_BV)
    assert left_BV.any(axis=1).all()


def test_a_count_of_the_whole_vocabulary_or_more_keeps_everything():
    logits_BV = random_logits(4, 37, seed=0)
    for top_k in (37, 38, 2**31 - 1):
        assert kept(logits_BV, top_k=top_k).all()


@pytest.mark.parametrize("top_p", [0.999, 0.999999, np.nextafter(np.float32(1), np.float32(0))])
def test_nearly_all_the_probability_is_kept_for_a_share_near_one(top_p):
    """Sums in float32 need not reach 1: then everything stays, never nothing."""
    logits_BV = random_logits(16, 3000, seed=1)
    left_BV, probability_BV = kept(logits_BV, top_p=top_p), probabilities(logits_BV)
    mass_B = probability_BV.sum(axis=1, where=left_BV)
    assert (mass_B >= top_p - 1e-6).all()
    # and no token more than needed, but for rounding
    least_B = np.where(left_BV, probability_BV, np.inf).min(axis=1)
    assert ((mass_B - least_B < top_p + 1e-6) | left_BV.all(axis=1)).all()


def test_a_share_of_one_keeps_even_what_has_no_probability():
    logits_BV = np.array([[0.0, -200.0, -300.0]], np.float32)  # the last two underflow to 0
    assert kept(logits_BV).all()
    assert kept(logits_BV, top_p=0.5).tolist() == [[True, False, False]]
    assert kept(logits_BV, top_k=3).all()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"top_k": 1}, [1, 1, 0, 0, 0]),  # as likely as the likeliest
        ({"top_k": 2}, [1, 1, 0, 0, 0]),
        ({"top_k": 3}, [1, 1, 1, 1, 0]),  # as likely as the third
        ({"top_k": 5}, [1, 1, 1, 1, 1]),
        ({"top_p": 0.25}, [1, 1, 0, 0, 0]),
        ({"top_p": 0.77}, [1, 1, 0, 0, 0]),  # they hold 0.78
        ({"top_p": 0.79}, [1, 1, 1, 1, 0]),
        ({"min_p": 0.24}, [1, 1, 1, 1, 0]),
        ({"min_p": 0.26}, [1, 1, 0, 0, 0]),
    ],
)
def test_equally_likely_tokens_stay_or_go_together(changes, expected):
    logits_BV = np.log(np.array([[4, 4, 1, 1, 0.25]], np.float32))
    assert kept(logits_BV, **changes)[0].tolist() == [bool(x) for x in expected]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_log_probabilities_are_those_of_what_is_left(changes, greedy):
    logits_BV, temperature = random_logits(24, 37, seed=5), np.float32(0.7)
    uniform_B = np.random.default_rng(5).random(24, np.float32)
    token_B, logprob_B = map(
        np.asarray,
        compiled_sample(greedy)(logits_BV, uniform_B, temperature, filters=filters_with(**changes)),
    )
    scaled_BV = np.asarray(logits_BV / temperature)
    for row, token, logprob in zip(probabilities(scaled_BV), token_B, logprob_B, strict=True):
        left_V = sorted_kept(row, **(OFF | changes))
        assert left_V[token]
        expected = np.log(row[token] / row.sum(where=left_V))
        assert logprob == pytest.approx(expected, abs=2e-6)
    if greedy:
        assert (token_B == logits_BV.argmax(axis=1)).all()


def test_draws_follow_what_is_left():
    probability_V = np.array([0.4, 0.05, 0.3, 0.1, 0.15])
    count = 20_000
    logits_BV = np.broadcast_to(np.log(probability_V).astype(np.float32), (count, 5))
    uniform_B = np.random.default_rng(0).random(count, np.float32)
    token_B, _ = compiled_sample()(
        logits_BV, uniform_B, np.float32(1), filters=filters_with(top_k=3)
    )
    counts_V = np.bincount(np.asarray(token_B), minlength=5)
    assert counts_V[[1, 3]].sum() == 0
    expected = probability_V[[0, 2, 4]] / 0.85 * count
    assert ((counts_V[[0, 2, 4]] - expected) ** 2 / expected).sum() < 13.8  # 99.9 % of chi-square


def test_filters_that_are_off_change_nothing():
    logits_BV, temperature = random_logits(8, 37, seed=2), np.float32(0.9)
    uniform_B = np.random.default_rng(2).random(8, np.float32)
    plain = compiled_sample()(logits_BV, uniform_B, temperature)
    off = compiled_sample()(logits_BV, uniform_B, temperature, filters=filters_with())
    for one, other in zip(plain, off, strict=True):
        np.testing.assert_array_equal(one, other)


# ---- a vocabulary split over devices ---------------------------------------------------------


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
@pytest.mark.parametrize("V", [512, 600])  # parts of whole blocks, and of blocks cut short
def test_a_split_vocabulary_gives_the_same_tokens(V, axis_types):
    """Sampled, greedy and filtered; every token of some rows has no probability but a few."""
    B = 64
    logits_BV = random_logits(B, V, seed=5)
    logits_BV[::3, : V - 7] = -np.inf
    logits_BV[1::3, 40:] = -np.inf
    uniform_B = np.random.default_rng(0).random(B).astype(np.float32)
    uniform_B[:2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    mesh = mesh_of(fsdp=2, tensor=4, axis_types=axis_types)
    split = jax.device_put(logits_BV, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    for greedy, filters in ((False, None), (True, None), (False, filters_with(top_k=5))):
        one = functools.partial(sample_token, greedy=greedy, filters=filters)
        token_B, logprob_B = jax.jit(one)(logits_BV, uniform_B, np.float32(0.7))
        with jax.set_mesh(mesh):
            on_mesh = jax.jit(propagated(one, PartitionSpec()))
            got_B, got_logprob_B = on_mesh(split, uniform_B, np.float32(0.7))
        np.testing.assert_array_equal(got_B, token_B)
        np.testing.assert_allclose(got_logprob_B, logprob_B, rtol=1e-5, atol=1e-5)
        assert (np.take_along_axis(logits_BV, np.asarray(token_B)[:, None], 1) > -np.inf).all()
