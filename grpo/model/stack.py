"""Stacked layers, scanned; their gradients can be added to earlier ones in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class Summed(struct.PyTreeNode):
    """Stacked weights whose gradient comes out with `sums` already added.

    The backward pass starts from `sums` and adds each layer's gradient where it belongs. Added
    afterwards, the gradients of all layers would have to exist twice.
    """

    weights: Any  # arrays [L, ...]
    sums: Any  # as `weights`: gradients of earlier microbatches


def scan_layers(layer: Callable[[Any, Any, Any], Any], x: Any, stacked: Any, settings: Any) -> Any:
    """`layer(x, weights, settings)` of every layer in turn.

    Args:
      layer: (x, weights of one layer, its settings) -> x.
      x: what goes in.
      stacked: weights with a leading layer axis, or `Summed`.
      settings: arrays with a leading layer axis, which get no gradient.
    """
    if not isinstance(stacked, Summed):
        return jax.lax.scan(lambda x, xs: (layer(x, *xs), None), x, (stacked, settings))[0]

    def step(
        carry: tuple[Any, Any], xs: tuple[jax.Array, Any, Any]
    ) -> tuple[tuple[Any, Any], None]:
        (x, stack), (number, weights, settings) = carry, xs
        weights, stack = _routed(weights, stack, number)
        return (layer(x, weights, settings), stack), None

    # The weights are read from the scanned copy; their gradients flow into the carried one, whose
    # values nobody reads, so that it exists in the backward pass alone.
    weights = stacked.weights
    numbers = jnp.arange(len(jax.tree.leaves(weights)[0]))
    carry, xs = (x, weights), (numbers, jax.lax.stop_gradient(weights), settings)
    (x, stack), _ = jax.lax.scan(step, carry, xs)
    return _begun(x, stack, jax.lax.stop_gradient(stacked.sums))


def summed_after(stacked: Any) -> Any:
    """The weights of `Summed`, whose sums are added once all layers have their gradients.

    For weights too small for that to cost memory; others are returned as they are.
    """
    if not isinstance(stacked, Summed):
        return stacked
    return _plus(stacked.weights, jax.lax.stop_gradient(stacked.sums))


@jax.custom_vjp
def _plus(weights: Any, sums: Any) -> Any:
    """`weights` as they are; `sums` are added to their gradient."""
    return weights


def _plus_forward(weights: Any, sums: Any) -> tuple[Any, Any]:
    return weights, sums


def _plus_backward(sums: Any, d_out: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, d_out, sums), None


_plus.defvjp(_plus_forward, _plus_backward)


@jax.custom_vjp
def _routed(weights: Any, stack: Any, number: jax.Array) -> tuple[Any, Any]:
    """Both as they are; the gradient of `weights` is added to that of `stack`."""
    return weights, stack


def _routed_forward(weights: Any, stack: Any, number: jax.Array) -> tuple[Any, jax.Array]:
    return (weights, stack), number


def _routed_backward(number: jax.Array, d_out: tuple[Any, Any]) -> tuple[Any, Any, None]:
    d_weights, d_stack = d_out

    def add(stack: jax.Array, new: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(stack, old + new, number, 0)

    nothing = jax.tree.map(jnp.zeros_like, d_weights)
    return nothing, jax.tree.map(add, d_stack, d_weights), None


_routed.defvjp(_routed_forward, _routed_backward)


@jax.custom_vjp
def _begun(x: Any, stack: Any, sums: Any) -> Any:
    """`x` as it is; the gradient of `stack` begins with `sums`."""
    return x


def _begun_forward(x: Any, stack: Any, sums: Any) -> tuple[Any, Any]:
    return x, sums


def _begun_backward(sums: Any, d_x: Any) -> tuple[Any, Any, None]:
    return d_x, sums, None


_begun.defvjp(_begun_forward, _begun_backward)
