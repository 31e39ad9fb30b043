"""Arrays of 8 or 4 bits a number with their scales: what is frozen, and what is only sampled with.

Symmetric, absolute maximum (as LLM.int8, arXiv:2208.07339, and the 4-bit integers that QLoRA,
arXiv:2305.14314, compares itself with): x ~ scale * n with whole n in [-127, 127] or [-7, 7], one
scale for each block of numbers. So no number is off by more than half of its scale.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from grpo.model.params import MATRICES, Params, ParamSpec, matrix_spec

LARGEST = {8: 127, 4: 7}  # bits -> the largest whole number
BLOCK = 64  # inputs that share a scale, where a matrix is stored for good
_BITS = {"int8": 8, "int4": 4}


class Quantised(struct.PyTreeNode):
    """x ~ scales * values.

    Attributes:
      values: int8, of x's shape; at 4 bits uint8, half as long along the last axis but one: a
        block's first half in the low four bits, its second in the high ones.
      scales: bfloat16, of x's shape with the quantised axis a number a block.
      bits: 8 or 4.
    """

    values: Any
    scales: Any
    bits: int = struct.field(pytree_node=False, default=8)


def quantise(x: jax.Array, axis: int, block: int, bits: int = 8) -> Quantised:
    """x in whole numbers, each `block` neighbours along `axis` with a scale of their own.

    Args:
      x: float32, so that it is rounded once.
      axis: negative; at 4 bits it must be -2.
      block: divides the axis; at 4 bits it must be even.
      bits: 8 or 4.

    Raises:
      ValueError: `block` does not divide the axis, or is odd at 4 bits.
    """
    size, largest = x.shape[axis], LARGEST[bits]
    if size % block or (bits == 4 and block % 2):
        raise ValueError(f"blocks of {block} do not divide an axis of {size} at {bits} bits")
    split = x.ndim + axis
    blocks = x.reshape(*x.shape[:split], size // block, block, *x.shape[split + 1 :])
    top = jnp.max(jnp.abs(blocks), axis=split + 1, keepdims=True)
    # Rounded first: the numbers are then the nearest ones for the scale that is really kept.
    scales = (top / largest).astype(jnp.bfloat16)
    divisor = jnp.where(scales == 0, 1, scales).astype(x.dtype)
    whole = jnp.clip(jnp.round(blocks / divisor), -largest, largest).astype(jnp.int8)
    scales = scales.squeeze(split + 1)
    if bits == 8:
        return Quantised(values=whole.reshape(x.shape), scales=scales)
    low, high = jnp.split((whole & 0xF).astype(jnp.uint8), 2, axis=split + 1)
    packed = low | (high << 4)
    shape = (*x.shape[:split], size // 2, *x.shape[split + 1 :])
    return Quantised(values=packed.reshape(shape), scales=scales, bits=4)


def whole_numbers(x: Quantised) -> jax.Array:
    """The int8 numbers, one an element."""
    if x.bits == 8:
        return x.values
    *lead, half, width = x.values.shape
    packed = x.values.reshape(*lead, x.scales.shape[-2], -1, width)
    both = jnp.concatenate([packed << 4, packed & 0xF0], axis=-2)
    signed = jax.lax.bitcast_convert_type(both, jnp.int8) >> 4  # which carries the sign down
    return signed.reshape(*lead, 2 * half, width)


def dequantise(x: Quantised, dtype: Any) -> jax.Array:
    """scales * values."""
    whole = whole_numbers(x).astype(dtype)
    scales = x.scales.astype(dtype)
    for axis, (count, size) in enumerate(zip(scales.shape, whole.shape, strict=True)):
        if count not in (1, size):
            scales = jnp.repeat(scales, size // count, axis)
    return whole * scales


# ---- the weights of a model ------------------------------------------------------------------
# Only the matrices of its layers: embedding, head and norms are few, and feel it most.


def stored_as(name: str, weight: jax.Array, dtype: str) -> Any:
    """A frozen array, as the parameter table names and lays it out, as `dtype` stores it.

    At int8 and int4 the matrices of layers are quantised in blocks of inputs; all else is bfloat16.
    """
    if dtype not in _BITS:
        return weight.astype(dtype)
    if name not in MATRICES:
        return weight.astype(jnp.bfloat16)
    matrix_LDF = _matrix(name, weight)
    return quantise(matrix_LDF, -2, _block(matrix_LDF.shape[-2]), _BITS[dtype])


def stored(params: Params, dtype: str) -> Params:
    """All frozen weights as `dtype` stores them."""
    layers = {name: stored_as(name, weight, dtype) for name, weight in params["layers"].items()}
    rest = {n: stored_as(n, weight, dtype) for n, weight in params.items() if n != "layers"}
    return {**rest, "layers": layers}


def stored_table(table: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The table of what `stored_as` makes of the arrays of `table`."""
    if dtype not in _BITS:
        return dict(table)

    def spec_of(name: str, spec: ParamSpec) -> Quantised:
        matrix = matrix_spec(spec, MATRICES[name])
        return _quantised_spec(matrix, _block(matrix.shape[-2]), _BITS[dtype])

    return _each_matrix(table, spec_of)


def int8_matrices(params: Mapping[str, Any]) -> Params:
    """The stacked matrices of layers in 8 bits with one scale an output: made for a rollout."""

    def values_of(name: str, weight: jax.Array) -> Quantised:
        matrix_LDF = _matrix(name, weight)
        return quantise(matrix_LDF, -2, matrix_LDF.shape[-2])

    return _each_matrix(params, values_of)


def int8_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of what `int8_matrices` makes."""

    def spec_of(name: str, spec: ParamSpec) -> Quantised:
        matrix = matrix_spec(spec, MATRICES[name])
        return _quantised_spec(matrix, matrix.shape[-2], 8)

    return _each_matrix(table, spec_of)


def _each_matrix(tree: Mapping[str, Any], fn: Callable[[str, Any], Any]) -> dict[str, Any]:
    layers = {n: fn(n, leaf) if n in MATRICES else leaf for n, leaf in tree["layers"].items()}
    return {**tree, "layers": layers}


def _matrix(name: str, weight: jax.Array) -> jax.Array:
    """[L, *in, *out] -> float32 [L, D, F]."""
    outputs = weight.shape[1 + MATRICES[name] :]
    return weight.astype(jnp.float32).reshape(weight.shape[0], -1, math.prod(outputs))


def _quantised_spec(matrix: ParamSpec, block: int, bits: int) -> Quantised:
    """The two arrays that `quantise(x, -2, block, bits)` makes of a matrix [L, D, F]."""
    L, D, F = matrix.shape
    layer, _, outputs = matrix.axes
    return Quantised(
        values=ParamSpec((L, D * bits // 8, F), matrix.axes, matrix.fan_in),
        # Not split by inputs: 576 inputs are 9 blocks, which few meshes divide.
        scales=ParamSpec((L, D // block, F), (layer, None, outputs), matrix.fan_in),
        bits=bits,
    )


def _block(size: int) -> int:
    """The block a matrix of so many inputs is stored in: BLOCK, or the most that divides both."""
    return math.gcd(size, BLOCK)
