"""Divergences: plain loops, hand numbers, and no signal where there is nothing to learn."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.divergence import forward_kl, jsd, reverse_kl, sampled_reverse_kl

V = 7
WHOLE: dict[str, Callable[..., jax.Array]] = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "jsd": partial(jsd, beta=0.3),
}


# ---- the same in plain Python, from logits ---------------------------------------------------


def softmax(logits: Sequence[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        total += a * math.log(a / b)
    return total


def plain_jsd(p: Sequence[float], q: Sequence[float], beta: float) -> float:
    """GKD's eq. 1: p the teacher, q the student."""
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)


ORACLES: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "reverse": lambda student, teacher: kl(softmax(student), softmax(teacher)),
    "forward": lambda student, teacher: kl(softmax(teacher), softmax(student)),
    "jsd": lambda student, teacher: plain_jsd(softmax(teacher), softmax(student), 0.3),
}


def of_logits(divergence: Callable[..., Any], student: Any, teacher: Any, sampled: Any = 0) -> Any:
    student, teacher = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return divergence(student, teacher, jnp.asarray(sampled))


@pytest.fixture(scope="module")
def logits() -> tuple[np.ndarray, np.ndarray]:
    """Of student and teacher, at six places."""
    rng = np.random.default_rng(0)
    return rng.normal(0, 1.5, (2, 3, V)), rng.normal(0, 1.5, (2, 3, V))


@pytest.mark.parametrize("name", WHOLE)
def test_values_are_those_of_plain_loops(logits, name):
    student, teacher = logits
    got = of_logits(WHOLE[name], jnp.float32(student), jnp.float32(teacher))
    assert got.shape == (2, 3)
    for place in np.ndindex(2, 3):
        wanted = ORACLES[name](student[place].tolist(), teacher[place].tolist())
        assert wanted > 0.005
        assert got[place] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_are_finite_differences(logits, name):
    student, teacher = logits[0][0, 0], logits[1][0, 0]
    got = jax.grad(partial(of_logits, WHOLE[name]))(jnp.float32(student), jnp.float32(teacher))
    step = 1e-5
    for v in range(V):
        up, down = student.copy(), student.copy()
        up[v] += step
        down[v] -= step
        higher, lower = (ORACLES[name](x.tolist(), teacher.tolist()) for x in (up, down))
        assert got[v] == pytest.approx((higher - lower) / (2 * step), abs=2e-6)


def test_hand_numbers():
    """A fair coin judged by one that falls on heads a quarter of the time, and the other way."""
    fair, bent = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    there = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    back = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    token = jnp.array(1)
    assert reverse_kl(fair, bent, token) == pytest.approx(there, abs=1e-6)
    assert forward_kl(fair, bent, token) == pytest.approx(back, abs=1e-6)
    assert sampled_reverse_kl(fair, bent, token) == pytest.approx(math.log(2 / 3), abs=1e-6)
    # Half of each: 3/8 and 5/8.
    mixed = [3 / 8, 5 / 8]
    half = 0.5 * kl([0.5, 0.5], mixed) + 0.5 * kl([0.25, 0.75], mixed)
    assert jsd(fair, bent, token, beta=0.5) == pytest.approx(half, abs=1e-6)
    assert jsd(bent, fair, token, beta=0.5) == pytest.approx(half, abs=1e-6)  # symmetric there


def test_at_its_ends_jsd_is_either_kl(logits):
    """Divided by what vanishes there (GKD, section 3)."""
    student, teacher = (jax.nn.log_softmax(jnp.float32(x)) for x in logits)
    token, small = jnp.zeros((2, 3), jnp.int32), 1e-3
    forward = jsd(student, teacher, token, beta=small) / small
    reverse = jsd(student, teacher, token, beta=1 - small) / small
    np.testing.assert_allclose(forward, forward_kl(student, teacher, token), rtol=2e-2)
    np.testing.assert_allclose(reverse, reverse_kl(student, teacher, token), rtol=2e-2)
    assert float(jnp.abs(forward - reverse).max()) > 0.1  # they are not the same


@pytest.mark.parametrize("name", [*WHOLE, "sampled"])
def test_a_student_like_its_teacher_has_nothing_to_learn(logits, name):
    divergence = WHOLE.get(name, sampled_reverse_kl)
    same = jnp.float32(logits[0])
    sampled = jnp.ones((2, 3), jnp.int32)
    value, gradient = jax.value_and_grad(
        lambda student: of_logits(divergence, student, same, sampled).sum()
    )(same)
    tolerance = 2e-7 if name == "jsd" else 0.0  # exactly nothing, but for the mixture's rounding
    assert abs(float(value)) <= tolerance * 6
    assert float(jnp.abs(gradient).max()) <= tolerance


def test_the_sampled_one_is_right_on_average(logits):
    """Over all tokens that the student may draw: value and gradient of the reverse KL, exactly."""
    student, teacher = jnp.float32(logits[0][1, 2]), jnp.float32(logits[1][1, 2])
    each = jax.value_and_grad(partial(of_logits, sampled_reverse_kl))
    values, gradients = jax.vmap(each, (None, None, 0))(student, teacher, jnp.arange(V))
    chances = jax.nn.softmax(student)
    wanted, gradient = jax.value_and_grad(partial(of_logits, reverse_kl))(student, teacher)
    assert chances @ values == pytest.approx(float(wanted), abs=1e-6)
    np.testing.assert_allclose(chances @ gradients, gradient, atol=1e-6)
    assert float(jnp.abs(gradient).max()) > 0.05


def test_the_sampled_one_is_the_policy_gradient(logits):
    """- advantage * grad log pi(token), the advantage log teacher - log student."""
    student, teacher = jnp.float32(logits[0][0, 1]), jnp.float32(logits[1][0, 1])
    token = 3
    got = jax.grad(partial(of_logits, sampled_reverse_kl))(student, teacher, token)
    p, q = softmax(student.tolist()), softmax(teacher.tolist())
    advantage = math.log(q[token]) - math.log(p[token])
    wanted = [-advantage * ((v == token) - p[v]) for v in range(V)]
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("name", [*WHOLE, "sampled"])
def test_certainty_is_no_division_by_zero(name):
    divergence = WHOLE.get(name, sampled_reverse_kl)
    student, teacher = jnp.array([200.0, 0.0, -200.0]), jnp.array([-200.0, 0.0, 200.0])
    value, gradient = jax.value_and_grad(partial(of_logits, divergence))(student, teacher, 0)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if name == "jsd":  # at most the entropy of the coin that picks one of the two
        assert value == pytest.approx(-(0.3 * math.log(0.3) + 0.7 * math.log(0.7)), abs=1e-5)
    else:
        assert value == pytest.approx(400.0, rel=1e-5)
