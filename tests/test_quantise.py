"""Few bits: no number further off than half of its scale, and the same product either way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import ARCH, mesh_of, toy_params

from grpo.model.linear import frozen_linear
from grpo.model.params import param_table
from grpo.model.quantise import (
    LARGEST,
    Quantised,
    dequantise,
    int8_matrices,
    int8_table,
    quantise,
    stored,
    stored_table,
    whole_numbers,
)
from grpo.sharding import param_shardings

RNG = np.random.default_rng(0)
X_LDF = RNG.normal(size=(2, 24, 5)).astype(np.float32)
X_LDF[0, 3, 2], X_LDF[1, :8, 1] = 40.0, 0.0  # an outlier, and a block of nothing


def plainly(x_LDF: np.ndarray, block: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and scales by the definition, one block after the other."""
    L, D, F = x_LDF.shape
    whole, scales = np.zeros((L, D, F), np.int8), np.zeros((L, D // block, F), np.float32)
    for layer in range(L):
        for n in range(D // block):
            for f in range(F):
                inside = slice(n * block, (n + 1) * block)
                top = np.abs(x_LDF[layer, inside, f]).max() / np.float32(LARGEST[bits])
                scale = float(top.astype(jnp.bfloat16))
                scales[layer, n, f] = scale
                for d in range(n * block, (n + 1) * block):
                    number = round(float(x_LDF[layer, d, f]) / scale) if scale else 0
                    whole[layer, d, f] = max(-LARGEST[bits], min(LARGEST[bits], number))
    return whole, scales


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [24, 8, 4])
def test_numbers_are_whole_and_no_further_off_than_half_a_scale(bits, block):
    got = quantise(jnp.asarray(X_LDF), -2, block, bits)
    whole, scales = plainly(X_LDF, block, bits)
    np.testing.assert_array_equal(whole_numbers(got), whole)
    np.testing.assert_array_equal(got.scales.astype(np.float32), scales)
    back = np.asarray(dequantise(got, jnp.float32))
    spread = np.repeat(scales, block, axis=1)
    np.testing.assert_array_equal(back, whole * spread)
    assert (np.abs(back - X_LDF) <= spread / 2).all()
    assert np.abs(whole).max() == LARGEST[bits] and (back[1, :4, 1] == 0).all()


def test_four_bits_are_two_numbers_a_byte():
    got = quantise(jnp.asarray(X_LDF), -2, 8, 4)
    assert got.values.dtype == jnp.uint8 and got.values.shape == (2, 12, 5)
    assert got.scales.dtype == jnp.bfloat16 and got.scales.shape == (2, 3, 5)
    low, high = np.asarray(got.values[0, 4, 0]) & 15, np.asarray(got.values[0, 4, 0]) >> 4
    whole = np.asarray(whole_numbers(got))
    assert [low, high] == [whole[0, 8, 0] % 16, whole[0, 12, 0] % 16]


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="blocks of 16 do not divide an axis of 24 at 8 bits"):
        quantise(jnp.asarray(X_LDF), -2, 16)
    with pytest.raises(ValueError, match="blocks of 3 do not divide an axis of 24 at 4 bits"):
        quantise(jnp.asarray(X_LDF), -2, 3, 4)


def test_a_vector_of_a_cache_has_its_own_scale():
    x_BH = np.array([[1.0, -127.0], [0.5, -0.125]], np.float32)
    got = quantise(jnp.asarray(x_BH), -1, 2)
    np.testing.assert_array_equal(got.values, [[1, -127], [127, -32]])
    assert got.scales.shape == (2, 1) and got.scales[0, 0] == 1


@pytest.mark.parametrize("bits, block", [(8, 24), (8, 8), (4, 24), (4, 8)])
def test_a_frozen_product_is_that_of_the_numbers_it_stands_for(bits, block):
    """Forward and back; the weight itself has no gradient."""
    weight = quantise(jnp.asarray(X_LDF[0]), -2, block, bits)
    dense_DF = np.asarray(dequantise(weight, jnp.float32))
    x_BTD = RNG.normal(size=(2, 3, 24)).astype(np.float32)
    d_BTF = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    out, pull = jax.vjp(lambda x: frozen_linear(x, weight), jnp.asarray(x_BTD))
    np.testing.assert_allclose(out, x_BTD @ dense_DF, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        pull(jnp.asarray(d_BTF))[0], d_BTF @ dense_DF.T, rtol=1e-5, atol=1e-4
    )

    def of_weight(scales: jax.Array) -> jax.Array:
        return frozen_linear(jnp.asarray(x_BTD), weight.replace(scales=scales)).sum()

    assert not np.any(jax.grad(of_weight)(weight.scales))


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_the_matrices_of_layers_alone_are_quantised(dtype):
    params = toy_params()
    kept = stored(params, dtype)
    for name, leaf in kept["layers"].items():
        quantised = dtype != "bfloat16" and "norm" not in name
        assert isinstance(leaf, Quantised) == quantised, name
        if not quantised:
            np.testing.assert_array_equal(leaf, params["layers"][name].astype(jnp.bfloat16))
    np.testing.assert_array_equal(kept["embed"], params["embed"].astype(jnp.bfloat16))
    if dtype != "bfloat16":
        o_LDF = np.asarray(params["layers"]["o"]).reshape(2, 16, 16)  # heads are inputs here
        error = np.abs(dequantise(kept["layers"]["o"], jnp.float32) - o_LDF)
        assert 0 < error.max() <= np.abs(o_LDF).max() / LARGEST[int(dtype[3:])] / 2 * 1.01


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_tables_tell_the_shapes_and_mesh_axes_of_what_is_stored(dtype):
    mesh = mesh_of(fsdp=2, tensor=2)
    table: Any = param_table(ARCH)
    for made, of_table in (
        (stored(toy_params(), dtype), stored_table(table, dtype)),
        (int8_matrices(toy_params()), int8_table(table)),
    ):
        shardings = param_shardings(of_table, mesh)
        placed = jax.device_put(made, shardings)
        jax.tree.map(np.testing.assert_array_equal, placed, made)
        # Half of the inputs, half of the outputs.
        whole = made["layers"]["gate"].values
        [part, *_] = placed["layers"]["gate"].values.addressable_shards
        assert part.data.shape == (2, whole.shape[1] // 2, whole.shape[2] // 2)
