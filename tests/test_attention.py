"""The trainer's attention by every implementation: the same values and gradients."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import ARCH, mesh_of

from grpo.model import blockwise, splash
from grpo.model.arch import queries_at_once
from grpo.model.attention import attention, chosen_attention, tree_attention
from grpo.model.masks import tree_mask

R, T, H = 4, 150, 8


@functools.cache
def trees() -> tuple[np.ndarray, np.ndarray]:
    """Groups and branches of four rows: one group, several, half empty, empty."""
    groups_RT, branches_RT = np.zeros((R, T), np.int32), np.zeros((R, T), np.int32)
    pieces = {
        0: [(1, 0, 50), (1, 1, 40), (1, 2, 60)],
        1: [(1, 0, 3), (1, 1, 70), (2, 0, 30), (2, 2, 1), (2, 3, 20), (2, 4, 26)],
        2: [(1, 0, 60), (1, 1, 10), (1, 2, 5)],
    }
    for row, parts in pieces.items():
        slot = 0
        for group, branch, length in parts:
            groups_RT[row, slot : slot + length] = group
            branches_RT[row, slot : slot + length] = branch
            slot += length
    return groups_RT, branches_RT


def inputs(N: int, K: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(R, T, heads, H)), jnp.float32) for heads in (N, K, K)]


def value_and_gradients(attend: Any, N: int, K: int) -> Any:
    groups_RT, branches_RT = trees()
    slope = np.random.default_rng(1).normal(size=(R, T, N, H)).astype(np.float32)
    slope *= (groups_RT > 0)[..., None, None]  # what padding gets, nobody reads

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, jnp.asarray(groups_RT), jnp.asarray(branches_RT))
        return jnp.sum(out * slope), jnp.where(groups_RT[..., None, None] > 0, out, 0)

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*inputs(N, K))


@functools.cache
def by_xla(N: int, K: int, score_cap: float | None = None) -> Any:
    attend = partial(tree_attention, score_cap=score_cap)
    return jax.tree.map(np.asarray, value_and_gradients(attend, N, K))


close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("T", [11, 12], ids=["a shorter last block", "whole blocks"])
@pytest.mark.parametrize("window, score_cap", [(None, None), (3, None), (None, 2.0), (3, 2.0)])
def test_blockwise_attention_is_attention(monkeypatch, T, window, score_cap):
    """Value and gradients, against one softmax over the whole row that jax differentiates."""
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(2, T, heads, 3)), jnp.float32) for heads in (4, 2, 2)]
    slope_RTNH = jnp.asarray(rng.normal(size=(2, T, 4, 3)), jnp.float32)
    groups_RT = jnp.asarray([[1] * (T - 2) + [0] * 2, [1] * 6 + [2] * (T - 6)])
    branches_RT = jnp.zeros((2, T), jnp.int32).at[:, 3:].set(1).at[:, 8:].set(2)
    positions_RT = jnp.where(branches_RT == 2, jnp.arange(T) - 5, jnp.arange(T))
    tree: dict[str, Any] = {
        "groups_RT": groups_RT,
        "branches_RT": branches_RT,
        "positions_RT": positions_RT,
        "window": window,
    }
    monkeypatch.setattr(blockwise, "queries_at_once", lambda T: 4)

    def whole(q, k, v):
        mask_RTT = tree_mask(groups_RT, branches_RT, 0, T, positions_RT, window)
        return attention(q, k, v, mask_RTT, score_cap)

    def run(attend):
        def loss(*qkv):
            out_RTNH = attend(*qkv) * (groups_RT > 0)[..., None, None]
            return jnp.sum(out_RTNH * slope_RTNH), out_RTNH

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)

    got = run(partial(tree_attention, **tree, score_cap=score_cap))
    jax.tree.map(close, got, run(whole))
    assert all(np.abs(gradient).max() > 0.1 for gradient in got[1])


@pytest.mark.parametrize("T, size, blocks", [(1, 128, 1), (4096, 128, 32), (32_768, 1024, 32)])
def test_the_compiler_sees_no_more_than_32_blocks(T, size, blocks):
    assert queries_at_once(T) == size and len(blockwise._blocks(T)) == blocks
    for length in range(1, 20_000, 777):
        ends = blockwise._blocks(length)
        assert len(ends) <= 32 and (ends[0][0], ends[-1][1]) == (0, length)


def test_the_weights_of_attention_are_not_kept():
    """Where attention outputs are kept, the backward pass needs nothing of size T x T."""
    tree = tuple(map(jnp.asarray, trees()))
    policy = jax.checkpoint_policies.save_only_these_names("attn_out")
    attend = jax.checkpoint(lambda *qkv: tree_attention(*qkv, *tree), policy=policy)
    kept = jax.tree.leaves(jax.vjp(attend, *inputs(4, 2))[1])
    assert sum(leaf.shape == (R, T, 4, H) for leaf in kept) == 2  # queries and what comes out
    assert all(leaf.shape.count(T) < 2 for leaf in kept)


@pytest.mark.parametrize("score_cap", [None, 2.0])
def test_splash_gives_the_values_and_gradients_of_xla(score_cap):
    """In the interpreter: the kernel's steps as plain JAX, blocks of 128 of a row of 150."""
    (_, out), gradients = value_and_gradients(
        partial(splash.splash_tree_attention, interpret=True, score_cap=score_cap), 4, 2
    )
    (_, expected), expected_gradients = by_xla(4, 2, score_cap)
    close(out, expected)
    jax.tree.map(close, gradients, expected_gradients)
    assert all(np.abs(gradient).max() > 0.1 for gradient in expected_gradients)


@pytest.mark.parametrize(
    "tensor, axis_types", [(2, "explicit"), (4, "auto")], ids=["heads split", "keys shared"]
)
def test_splash_over_devices_is_splash(tensor, axis_types):
    mesh = mesh_of(fsdp=2, tensor=tensor, axis_types=axis_types)
    with jax.set_mesh(mesh):
        (_, out), gradients = value_and_gradients(
            jax.sharding.auto_axes(
                partial(splash.splash_tree_attention, interpret=True),
                out_sharding=jax.sharding.PartitionSpec(),
            ),
            4,
            2,
        )
    (_, expected), expected_gradients = by_xla(4, 2)
    close(out, expected)
    jax.tree.map(close, gradients, expected_gradients)


def test_the_numbers_of_queries_say_what_the_mask_says():
    groups_RT, branches_RT = (jnp.asarray(x) for x in trees())
    sees = splash._sees(T)
    mask_RTT = np.asarray(tree_mask(groups_RT, branches_RT, 0, T))
    for row in range(R):
        groups_T, branches_T = groups_RT[row], branches_RT[row]
        numbers_T = splash._numbers(groups_T, branches_T)
        seen_TS = np.asarray(sees(numbers_T[:, None], jnp.arange(2 * T)[None]))
        same_TS = np.asarray((groups_T[:, None] == groups_T[None]) & (groups_T > 0)[:, None])
        prompt_S = np.asarray(branches_T == 0)[None]
        got_TS = (seen_TS[:, :T] & same_TS & prompt_S) | (seen_TS[:, T:] & same_TS & ~prompt_S)
        np.testing.assert_array_equal(got_TS, mask_RTT[row])


def test_a_row_too_long_for_splash_is_an_error():
    q = jax.ShapeDtypeStruct((1, splash.LONGEST + 1, 1, 8), jnp.float32)
    tree = jax.ShapeDtypeStruct((1, splash.LONGEST + 1), jnp.int32)
    with pytest.raises(ValueError, match="32768 token slots, but splash attention takes 32767"):
        jax.eval_shape(splash.splash_tree_attention, q, q, q, tree, tree)


BASE = dataclasses.replace(ARCH, head_width=64)
CAPPED, WIDE = dataclasses.replace(BASE, score_cap=50.0), dataclasses.replace(BASE, head_width=256)
WINDOWED = dataclasses.replace(BASE, layer_types=("sliding", "global"), window=4)


@pytest.mark.parametrize(
    "wanted, platform, arch, dtype, chosen",
    [
        ("auto", "tpu", BASE, "bfloat16", "splash"),
        ("auto", "tpu", CAPPED, "bfloat16", "splash"),
        ("auto", "tpu", WINDOWED, "bfloat16", "xla"),
        ("auto", "gpu", BASE, "bfloat16", "cudnn"),
        ("auto", "gpu", WINDOWED, "bfloat16", "cudnn"),
        ("auto", "gpu", CAPPED, "bfloat16", "xla"),
        ("auto", "cuda", WIDE, "bfloat16", "xla"),
        ("auto", "gpu", BASE, "float32", "xla"),
        ("auto", "cpu", BASE, "bfloat16", "xla"),
        ("xla", "tpu", BASE, "bfloat16", "xla"),
    ],
)
def test_auto_is_the_best_that_works(wanted, platform, arch, dtype, chosen):
    assert chosen_attention(wanted, platform, arch, dtype) == chosen


@pytest.mark.parametrize(
    "wanted, arch, message",
    [
        ("splash", BASE, "it runs on a TPU, and this is a cpu"),
        ("splash", WINDOWED, "it has no window, and the model's is 4"),
        ("cudnn", WIDE, "on a GPU, and this is a cpu; .*compute_dtype is float32; .* are 256"),
        ("cudnn", CAPPED, "it cannot cap scores, and the model does, at 50.0"),
    ],
)
def test_what_cannot_work_here_is_an_error(wanted, arch, message):
    with pytest.raises(ValueError, match=message):
        chosen_attention(wanted, "cpu", arch, "float32")


def test_cudnn_is_what_a_gpu_gets(monkeypatch):
    """There is none here: traced and lowered for one, forward and backward, as if cuDNN 9.10 were.

    The row is of odd length, which cuDNN does not take.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, *tree: Any) -> jax.Array:
        out = tree_attention(q, k, v, *tree, implementation="cudnn")
        assert out.shape == q.shape
        return out.astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((2, 63, heads, 64), jnp.bfloat16) for heads in (4, 2))
    tree = jax.ShapeDtypeStruct((2, 63), jnp.int32)
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, tree, tree)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
