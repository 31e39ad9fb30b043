"""Chunked log-probs: the naive ones, in less memory, and of the right tokens."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import ARCH, toy_params

from grpo.batch import RowShape, Sample, pack
from grpo.model.decoder import head, hidden_states
from grpo.model.logprobs import completion_logprobs, logprob_and_entropy, over_chunks

R, C, D, V = 3, 7, 5, 11


def chunked_logprobs(hidden_RCD, head_DV, targets_RC, **numbers):
    one = [hidden_RCD], [head_DV], targets_RC
    return over_chunks(logprob_and_entropy, *one, logit_caps=[None], **numbers)


def naive_logprobs(hidden_RCD, head_DV, targets_RC, temperature):
    logits_RCV = jnp.einsum("rcd,dv->rcv", hidden_RCD, head_DV) / temperature
    logprobs_RCV = jax.nn.log_softmax(logits_RCV)
    chosen_RC = jnp.take_along_axis(logprobs_RCV, targets_RC[..., None], axis=-1)[..., 0]
    return chosen_RC, -jnp.sum(jnp.exp(logprobs_RCV) * logprobs_RCV, axis=-1)


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden_RCD, head_DV = rng.normal(size=(R, C, D)), rng.normal(size=(D, V))
    targets_RC = rng.integers(0, V, (R, C))
    return (
        jnp.asarray(hidden_RCD, jnp.float32),
        jnp.asarray(head_DV, jnp.float32),
        jnp.asarray(targets_RC, jnp.int32),
    )


@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (3, 0.7), (7, 1.5), (100, 0.7)])
def test_values_and_gradients_are_the_naive_ones(inputs, chunk, temperature):
    hidden_RCD, head_DV, targets_RC = inputs
    weights = np.random.default_rng(1).normal(size=(2, R, C)).astype(np.float32)

    def total(fn):
        def run(hidden_RCD, head_DV):
            values = fn(hidden_RCD, head_DV, targets_RC)
            return sum((w * v).sum() for w, v in zip(weights, values, strict=True)), values

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))

    chunked = total(partial(chunked_logprobs, temperature=temperature, chunk=chunk))
    naive = total(partial(naive_logprobs, temperature=temperature))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        chunked(hidden_RCD, head_DV),
        naive(hidden_RCD, head_DV),
    )


def test_entropy_at_hand_points():
    """A flat distribution has log V nats, a certain one none; temperature flattens."""
    head_DV = jnp.eye(4, dtype=jnp.float32)
    hidden_RCD = jnp.array([[[0, 0, 0, 0], [100, 0, 0, 0], [4, 0, 0, 0]]], jnp.float32)
    targets_RC = jnp.zeros((1, 3), jnp.int32)
    logprobs, entropy = chunked_logprobs(hidden_RCD, head_DV, targets_RC, temperature=4.0, chunk=2)
    p = np.e / (np.e + 3)  # logit 4 / temperature 4 = 1
    q = (1 - p) / 3
    flat, certain, between = np.log(4), 0.0, -(p * np.log(p) + 3 * q * np.log(q))
    np.testing.assert_allclose(entropy[0], [flat, certain, between], atol=1e-5)
    np.testing.assert_allclose(logprobs[0], [-flat, 0, np.log(p)], atol=1e-5)


def test_bfloat16_hidden_states_give_float32_results(inputs):
    hidden_RCD, head_DV, targets_RC = inputs
    low = hidden_RCD.astype(jnp.bfloat16)
    got = chunked_logprobs(low, head_DV, targets_RC, temperature=1.0, chunk=3)
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden_RCD, head_DV)]
    expected = naive_logprobs(rounded[0], rounded[1], targets_RC, 1.0)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_hidden_states_give_the_head_a_float32_gradient(inputs):
    """The sum over chunks, where most of a gradient would be lost, is not rounded."""
    hidden_RCD, head_DV, targets_RC = inputs
    low = hidden_RCD.astype(jnp.bfloat16)

    def head_gradient(hidden_RCD, chunk):
        def total(head_DV):
            one = hidden_RCD, head_DV, targets_RC
            return chunked_logprobs(*one, temperature=1.0, chunk=chunk)[0].sum()

        return jax.jit(jax.grad(total))(head_DV)

    got_DV, whole_DV = head_gradient(low, 1), head_gradient(low.astype(jnp.float32), C)
    assert got_DV.dtype == jnp.float32
    np.testing.assert_allclose(got_DV, whole_DV, atol=0.02 * float(abs(whole_DV).max()))
    assert (got_DV.astype(jnp.bfloat16).astype(jnp.float32) != got_DV).mean() > 0.9


def test_a_long_row_keeps_its_digits():
    """A vocabulary of 50,000, added up one number after another, would be off by 1e-4."""
    rng = np.random.default_rng(0)
    logits_RcV = rng.normal(size=(1, 4, 50_001)).astype(np.float32) * 3
    targets_Rc = np.asarray([[0, 128, 49_999, 50_000]])
    got = jax.jit(logprob_and_entropy)(targets_Rc, logits_RcV)
    exact_RcV = logits_RcV.astype(np.float64)
    exact_RcV -= np.log(np.exp(exact_RcV).sum(-1, keepdims=True))
    np.testing.assert_allclose(got[0][0], exact_RcV[0, range(4), targets_Rc[0]], atol=1e-5)
    np.testing.assert_allclose(got[1], -(np.exp(exact_RcV) * exact_RcV).sum(-1), atol=1e-5)


def test_bfloat16_gradients_are_near_those_of_float32():
    rng = np.random.default_rng(0)
    hidden_RCD = jnp.asarray(rng.normal(size=(2, 64, 32)), jnp.bfloat16)
    head_DV = jnp.asarray(rng.normal(size=(32, 256)), jnp.float32)
    targets_RC = jnp.asarray(rng.integers(0, 256, (2, 64)), jnp.int32)

    def total(hidden_RCD, head_DV):
        one = hidden_RCD, head_DV, targets_RC
        return chunked_logprobs(*one, temperature=1.0, chunk=32)[0].sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    exact = gradients(hidden_RCD.astype(jnp.float32), head_DV)
    for got, whole in zip(gradients(hidden_RCD, head_DV), exact, strict=True):
        error = np.abs(np.asarray(got, np.float32) - whole).max()
        assert error < 0.03 * np.abs(whole).max()


def test_the_whole_logits_are_never_held():
    """Temporary memory of value and gradient, as compiled: less than one [R, C, V] array."""
    R, C, D, V = 4, 64, 8, 4096
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [((R, C, D), "float32"), ((D, V), "float32"), ((R, C), "int32")]
    ]

    def temporary(fn) -> int:
        def loss(hidden_RCD, head_DV, targets_RC):
            logprobs_RC, entropy_RC = fn(hidden_RCD, head_DV, targets_RC)
            return logprobs_RC.sum() + entropy_RC.sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    whole = 4 * R * C * V
    assert temporary(partial(chunked_logprobs, temperature=1.0, chunk=4)) < whole / 2
    assert temporary(partial(naive_logprobs, temperature=1.0)) >= whole  # the measure measures


def test_the_one_shift():
    """Each completion token is judged by the logits of what precedes it, and by no others.

    That is the slot before, but for a completion's first token: there it is the prompt's last one,
    however many other completions of the prompt stand in between.
    """
    params, temperature = toy_params(), 0.6
    written = [(0, [3, 1, 4], [5, 3]), (0, [3, 1, 4], [0, 0, 0]), (1, [1], [5, 8, 9, 7, 31])]
    samples = [Sample(*one) for one in written]
    packed = pack(samples, RowShape(rows=1, tokens=16, completion_tokens=11))
    [batch] = packed.microbatches
    form: dict[str, Any] = {"dtype": "float32", "remat": "none"}
    got_RC, entropy_RC = jax.jit(
        lambda p, b: completion_logprobs(p, ARCH, b, temperature=temperature, chunk=2, **form)
    )(params, batch)
    T = 8
    alone_RT = np.zeros((len(samples), T), np.int32)
    for row, (_, prompt, completion) in enumerate(written):
        alone_RT[row, : len(prompt) + len(completion)] = [*prompt, *completion]
    positions_RT = np.broadcast_to(np.arange(T, dtype=np.int32), alone_RT.shape)
    ones_RT = np.ones_like(alone_RT)
    hidden_RTD = jax.jit(lambda p, *row: hidden_states(p, ARCH, *row, **form))(
        params, alone_RT, positions_RT, ones_RT, ones_RT
    )
    logits_RTV = np.asarray(hidden_RTD, np.float64) @ np.asarray(head(params)) / temperature
    logprobs_RTV = logits_RTV - np.log(np.exp(logits_RTV).sum(-1, keepdims=True))
    for number, (_, prompt, completion) in enumerate(written):
        row, start = packed.places[number]
        for i, token in enumerate(completion):
            before_V = logprobs_RTV[number, len(prompt) + i - 1]
            got, entropy = got_RC[row, start + i], entropy_RC[row, start + i]
            assert got == pytest.approx(before_V[token], abs=1e-5)
            assert entropy == pytest.approx(-np.exp(before_V) @ before_V, abs=1e-5)
