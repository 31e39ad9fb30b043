"""Low-rank adapters: a small tree of trained arrays beside frozen weights (LoRA, arXiv:2106.09685).

Every adapted matrix W [D, F] is used as W + alpha / r * a @ b, by sampler and trainer alike, and
the sum is formed only by `merged`, for export. b starts as zeros, so a new policy is its base. Over
8- or 4-bit weights (`grpo.model.quantise`) this is QLoRA (arXiv:2305.14314), with whole numbers in
place of NF4.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grpo.model.linear import Adapted
from grpo.model.params import MATRICES, Params, ParamSpec, matrix_spec
from grpo.model.quantise import Quantised, dequantise


def target_names(table: Mapping[str, Any], patterns: Sequence[str]) -> tuple[str, ...]:
    """The matrices of a layer that any of the patterns ("q", "*", "[kv]") matches.

    Raises:
      ValueError: a pattern matches none.
    """
    names = [name for name in table["layers"] if name in MATRICES]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"lora.targets: {pattern!r} matches no matrix; there are {names}")
    return tuple(n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns))


def adapter_table(table: Mapping[str, Any], rank: int, names: Sequence[str]) -> dict[str, Any]:
    """The parameter table of the adapters: a [L, D, r] and b [L, r, F] for each named matrix."""

    def pair(name: str) -> dict[str, ParamSpec]:
        matrix = matrix_spec(table["layers"][name], MATRICES[name])
        (L, D, F), (layer, inputs, outputs) = matrix.shape, matrix.axes
        return {
            # Drawn as wide as `peft` draws: uniformly within D ** -0.5, a variance of 1 / 3D.
            "a": ParamSpec((L, D, rank), (layer, inputs, None), 3 * D),
            "b": ParamSpec((L, rank, F), (layer, None, outputs), rank),
        }

    return {"layers": {name: pair(name) for name in names}}


def init_adapters(table: Mapping[str, Any], key: jax.Array) -> Params:
    """a at random, b zeros: the policy is its base."""

    def draw(number: int, pair: Mapping[str, ParamSpec]) -> dict[str, jax.Array]:
        a, b = pair["a"], pair["b"]
        noise = jax.random.normal(jax.random.fold_in(key, number), a.shape, jnp.float32)
        return {"a": noise * a.fan_in**-0.5, "b": jnp.zeros(b.shape, jnp.float32)}

    return {"layers": {n: draw(i, pair) for i, (n, pair) in enumerate(table["layers"].items())}}


def adapted(adapters: Mapping[str, Any], base: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """`base` with every adapted matrix as `Adapted`; of arrays as of tables."""
    layers = dict(base["layers"])
    for name, pair in adapters["layers"].items():
        layers[name] = Adapted(base=layers[name], a=pair["a"], b=pair["b"], scale=scale)
    return {**base, "layers": layers}


def merged(adapters: Params, base: Params, scale: float, table: Mapping[str, Any]) -> Params:
    """The float32 weights, laid out as `table` says, that give the same policy without adapters."""
    layers = {}
    for name, spec in table["layers"].items():
        weight = _float32(base["layers"][name])
        if name in adapters["layers"]:
            a, b = adapters["layers"][name]["a"], adapters["layers"][name]["b"]
            weight = weight.reshape(len(a), a.shape[1], -1) + scale * (a @ b)
        layers[name] = weight.reshape(spec.shape)
    rest = {name: _float32(value) for name, value in base.items() if name != "layers"}
    return {**rest, "layers": layers}


def _float32(weight: Any) -> jax.Array:
    if isinstance(weight, Quantised):
        return dequantise(weight, jnp.float32)
    return weight.astype(jnp.float32)


def change_norm(adapters: Params, scale: float) -> jax.Array:
    """Frobenius norm of all that the adapters add, scale * a @ b, without forming it.

    |ab|^2 = trace(b'a'ab), which is the sum of the elements of (a'a) * (bb').
    """
    total = jnp.zeros(())
    for pair in adapters["layers"].values():
        inner_Lrr = jnp.einsum("ldr,lds->lrs", pair["a"], pair["a"])
        outer_Lrr = jnp.einsum("lrf,lsf->lrs", pair["b"], pair["b"])
        total += jnp.sum(inner_Lrr * outer_Lrr)
    return scale * jnp.sqrt(jnp.maximum(total, 0.0))  # rounding may leave less than nothing


def base_norm(base: Params, names: Sequence[str]) -> jax.Array:
    """Frobenius norm of the named matrices, all layers together."""
    squares = [jnp.sum(_float32(base["layers"][name]) ** 2) for name in names]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))
