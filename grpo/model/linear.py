"""Matrix products: with a weight that is trained, one that is frozen, one that is adapted."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from grpo.model.quantise import Quantised, dequantise, whole_numbers


class Adapted(struct.PyTreeNode):
    """A frozen weight W and what is added to it: W + scale * a @ b (LoRA, arXiv:2106.09685).

    The sum is never formed.

    Attributes:
      base: W, an array or `Quantised`.
      a: [D, r].
      b: [r, F].
      scale: alpha / r.
    """

    base: Any
    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)


Weight = jax.Array | Quantised | Adapted


def project(x_BTD: jax.Array, weight: Weight) -> jax.Array:
    """x @ weight, [B, T, F]; the leading axes of an array make up D, all others F."""
    if isinstance(weight, Adapted):
        inner_BTr = linear(x_BTD, weight.a) * weight.scale
        return frozen_linear(x_BTD, weight.base) + linear(inner_BTr, weight.b)
    if isinstance(weight, Quantised):
        return frozen_linear(x_BTD, weight)
    return linear(x_BTD, weight.reshape(x_BTD.shape[-1], -1))


def in_dtype(weights: Any, dtype: Any) -> Any:
    """All floating numbers of a tree in `dtype`; the whole ones of `Quantised` stay as they are.

    Scales are bfloat16 numbers, which every compute dtype holds exactly.
    """

    def cast(array: jax.Array) -> jax.Array:
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(cast, weights)


@jax.custom_vjp
def linear(x_BTD: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """x @ weight.

    The gradient of the weight is written so that XLA on a CPU, which wants the left side of this
    product turned around, turns the narrower of the two: left to itself it reads the wide one, with
    all that made it, column by column (245 GFLOP/s instead of 311 for the forward and backward
    pass of SmolLM2's MLP).
    """
    return jnp.einsum("btd,df->btf", x_BTD, weight_DF)


def _linear_forward(
    x_BTD: jax.Array, weight_DF: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x_BTD, weight_DF), (x_BTD, weight_DF)


def _linear_backward(
    kept: tuple[jax.Array, jax.Array], d_out_BTF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BTD, weight_DF = kept
    both = ((0, 1), (0, 1)), ((), ())
    if x_BTD.shape[-1] > d_out_BTF.shape[-1]:
        d_weight_DF = jax.lax.dot_general(d_out_BTF, x_BTD, both).T
    else:
        d_weight_DF = jax.lax.dot_general(x_BTD, d_out_BTF, both)
    return jnp.einsum("btf,df->btd", d_out_BTF, weight_DF), d_weight_DF


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def frozen_linear(x_BTD: jax.Array, weight: jax.Array | Quantised) -> jax.Array:
    """x @ weight, for a weight that gets no gradient.

    The backward pass keeps the weight as it is stored and dequantises it again: kept dequantised,
    a layer's matrices would be there once for every layer.
    """
    if isinstance(weight, Quantised) and weight.scales.shape[-2] == 1:
        # One scale an output: it comes out of the sum, and the product reads whole numbers.
        whole_DF = whole_numbers(weight).astype(x_BTD.dtype)
        return jnp.einsum("btd,df->btf", x_BTD, whole_DF) * weight.scales.astype(x_BTD.dtype)
    D = x_BTD.shape[-1]
    return jnp.einsum("btd,df->btf", x_BTD, _dense(weight, x_BTD.dtype).reshape(D, -1))


def _dense(weight: jax.Array | Quantised, dtype: Any) -> jax.Array:
    return dequantise(weight, dtype) if isinstance(weight, Quantised) else weight


def _frozen_forward(
    x_BTD: jax.Array, weight: jax.Array | Quantised
) -> tuple[jax.Array, jax.Array | Quantised]:
    return frozen_linear(x_BTD, weight), weight


def _frozen_backward(weight: jax.Array | Quantised, d_out_BTF: jax.Array) -> tuple[jax.Array, None]:
    dense_DF = _dense(weight, d_out_BTF.dtype).reshape(-1, d_out_BTF.shape[-1])
    return jnp.einsum("btf,df->btd", d_out_BTF, dense_DF), None


frozen_linear.defvjp(_frozen_forward, _frozen_backward)
