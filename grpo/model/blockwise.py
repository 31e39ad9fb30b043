"""Tree attention a block of queries at a time, with its backward pass written out.

Half of the square of scores is never made, and nothing of the square is kept: the backward pass
makes a block's weights again from its scores and one number a query, the logarithm of their sum (as
FlashAttention does, arXiv:2205.14135, section 3.1). Every product is written as rows times columns
of arrays that lie so in memory: of its operands only queries, keys and values are turned around,
never the weights, which XLA on a CPU would otherwise copy for every gradient.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo.model.arch import queries_at_once
from grpo.model.masks import capped, tree_mask

_LOW = float(jnp.finfo(jnp.float32).min)


class Tree(NamedTuple):
    """Who sees whom, see `grpo.model.masks.tree_mask`."""

    groups_RT: jax.Array
    branches_RT: jax.Array
    positions_RT: jax.Array | None
    window: Any

    def seen(self, start: int, stop: int) -> jax.Array:
        """bool [R, stop - start, stop]."""
        return tree_mask(
            self.groups_RT, self.branches_RT, start, stop, self.positions_RT, self.window
        )


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    tree: Tree,
    score_cap: float | None,
) -> jax.Array:
    """Softmax attention [R, T, N, H] over a tree, N query heads over K key/value heads.

    Scores and softmax are float32. What the backward pass needs of the forward one is named
    "attn_out", for the policies of `jax.checkpoint`.
    """
    return _forward(q_RTNH, k_RTKH, v_RTKH, tree, score_cap)[0]


def _forward(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    tree: Tree,
    score_cap: float | None,
) -> tuple[jax.Array, Any]:
    K = k_RTKH.shape[2]
    k_RKHT, v_RKTH = k_RTKH.transpose(0, 2, 3, 1), v_RTKH.swapaxes(1, 2)
    outs, norms = [], []
    for start, stop in _blocks(q_RTNH.shape[1]):
        q_RKmH = _folded(_scaled(q_RTNH[:, start:stop]), K)
        scores_RKmS = _scores(q_RKmH, k_RKHT[..., :stop], score_cap)
        scores_RKmS = _where(tree.seen(start, stop), scores_RKmS, _LOW)
        top_RKm1 = scores_RKmS.max(axis=-1, keepdims=True)
        weight_RKmS = jnp.exp(scores_RKmS - top_RKm1)
        total_RKm1 = weight_RKmS.sum(axis=-1, keepdims=True)
        mixed_RKmH = _product(weight_RKmS.astype(v_RKTH.dtype), v_RKTH[:, :, :stop]) / total_RKm1
        outs.append(_unfolded(mixed_RKmH, stop - start).astype(q_RTNH.dtype))
        norms.append(top_RKm1 + jnp.log(total_RKm1))
    out_RTNH, norms = checkpoint_name((jnp.concatenate(outs, axis=1), norms), "attn_out")
    return out_RTNH, (q_RTNH, k_RTKH, v_RTKH, tree, out_RTNH, norms)


def _backward(
    score_cap: float | None, kept: Any, d_out_RTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_RTNH, k_RTKH, v_RTKH, tree, out_RTNH, norms = kept
    K = k_RTKH.shape[2]
    k_RKTH, k_RKHT = k_RTKH.swapaxes(1, 2), k_RTKH.transpose(0, 2, 3, 1)
    v_RKHT = v_RTKH.transpose(0, 2, 3, 1)
    dq, dk_RKHT = [], jnp.zeros(k_RKHT.shape, jnp.float32)
    dv_RKHT = jnp.zeros(v_RKHT.shape, jnp.float32)
    for (start, stop), norm_RKm1 in zip(_blocks(q_RTNH.shape[1]), norms, strict=True):
        q_RKmH = _folded(_scaled(q_RTNH[:, start:stop]), K)
        out_RKmH, d_out_RKmH = (_folded(x[:, start:stop], K) for x in (out_RTNH, d_out_RTNH))
        scores_RKmS = _scores(q_RKmH, k_RKHT[..., :stop], score_cap)
        weight_RKmS = jnp.exp(scores_RKmS - norm_RKm1)
        weight_RKmS = _where(tree.seen(start, stop), weight_RKmS, 0.0)
        # What a score does to the softmax is its weight times how far the value that it brings is
        # above the mean of all, both along the gradient.
        mean_RKm1 = jnp.sum(
            d_out_RKmH.astype(jnp.float32) * out_RKmH.astype(jnp.float32), axis=-1, keepdims=True
        )
        d_scores_RKmS = weight_RKmS * (_product(d_out_RKmH, v_RKHT[..., :stop]) - mean_RKm1)
        if score_cap is not None:
            d_scores_RKmS *= 1 - (scores_RKmS / score_cap) ** 2
        d_scores_RKmS = d_scores_RKmS.astype(q_RTNH.dtype)
        dq_RKmH = _product(d_scores_RKmS, k_RKTH[:, :, :stop])
        dq.append(_scaled(_unfolded(dq_RKmH, stop - start)).astype(q_RTNH.dtype))
        dk_RKHT = _plus(dk_RKHT, _product(q_RKmH.swapaxes(2, 3), d_scores_RKmS))
        weight_RKmS = weight_RKmS.astype(v_RTKH.dtype)
        dv_RKHT = _plus(dv_RKHT, _product(d_out_RKmH.swapaxes(2, 3), weight_RKmS))
    dk_RTKH, dv_RTKH = dk_RKHT.transpose(0, 3, 1, 2), dv_RKHT.transpose(0, 3, 1, 2)
    return jnp.concatenate(dq, 1), dk_RTKH.astype(k_RTKH.dtype), dv_RTKH.astype(v_RTKH.dtype), None


blockwise_attention.defvjp(_forward, _backward)


def _blocks(T: int) -> list[tuple[int, int]]:
    size = queries_at_once(T)
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _scaled(q_RqNH: jax.Array) -> jax.Array:
    return q_RqNH * q_RqNH.shape[-1] ** -0.5


def _folded(x_RqNH: jax.Array, K: int) -> jax.Array:
    """[R, K, m, H], m = N / K * q: the queries that look at the same keys, one after another."""
    R, q, N, H = x_RqNH.shape
    return x_RqNH.reshape(R, q, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(R, K, -1, H)


def _unfolded(x_RKmH: jax.Array, q: int) -> jax.Array:
    R, K, m, H = x_RKmH.shape
    return x_RKmH.reshape(R, K, m // q, q, H).transpose(0, 3, 1, 2, 4).reshape(R, q, -1, H)


def _product(left_RKxy: jax.Array, right_RKyz: jax.Array) -> jax.Array:
    return jnp.einsum("rkxy,rkyz->rkxz", left_RKxy, right_RKyz, preferred_element_type=jnp.float32)


def _scores(q_RKmH: jax.Array, k_RKHS: jax.Array, score_cap: float | None) -> jax.Array:
    return capped(_product(q_RKmH, k_RKHS), score_cap)


def _where(seen_RqS: jax.Array, x_RKmS: jax.Array, otherwise: float) -> jax.Array:
    R, K, m, S = x_RKmS.shape
    x_RKnqS = x_RKmS.reshape(R, K, -1, seen_RqS.shape[1], S)
    return jnp.where(seen_RqS[:, None, None], x_RKnqS, otherwise).reshape(R, K, m, S)


def _plus(sum_RKHT: jax.Array, new_RKHS: jax.Array) -> jax.Array:
    """Adds to the first S."""
    first_RKHS = sum_RKHT[..., : new_RKHS.shape[-1]] + new_RKHS
    return jax.lax.dynamic_update_slice(sum_RKHT, first_RKHS, (0, 0, 0, 0))
