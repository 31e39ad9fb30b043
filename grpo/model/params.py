"""The parameter table: one line an array gives its shape, logical axes and initialiser."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from grpo.model.arch import Arch

Params = dict[str, Any]  # nested dict of arrays, as `param_table` names them

# The matrices of a layer, and how many of their leading axes (the layer's own left out) are summed
# over in a product; the rest are its outputs.
MATRICES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One array of the model. `axes` are logical names (see `grpo.sharding.RULES`)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int  # initial standard deviation is fan_in ** -0.5; 0: starts as `fill` everywhere
    fill: float = 1.0


def param_table(arch: Arch) -> dict[str, Any]:
    """Every parameter of the train form, nested as the parameters are.

    The arrays under "layers" are stacked: axis 0 is the layer, which the forward pass scans.
    Residual-writing matrices (`o`, `down`) start smaller by sqrt(2L), as GPT-2 does, so that the
    residual stream keeps unit scale at any depth.
    """
    V, D, F, L = arch.vocab_size, arch.width, arch.mlp_width, arch.num_layers
    N, K, H = arch.num_heads, arch.num_kv_heads, arch.head_width
    unit = 1.0 - arch.norm_offset  # the scale with which a norm only norms
    table: dict[str, Any] = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), D),
        "final_norm": ParamSpec((D,), (None,), 0, unit),
        "layers": {
            "attn_norm": ParamSpec((L, D), ("layer", None), 0, unit),
            "q": ParamSpec((L, D, N, H), ("layer", "embed", "heads", None), D),
            "k": ParamSpec((L, D, K, H), ("layer", "embed", "kv_heads", None), D),
            "v": ParamSpec((L, D, K, H), ("layer", "embed", "kv_heads", None), D),
            "o": ParamSpec((L, N, H, D), ("layer", "heads", None, "embed"), N * H * 2 * L),
            "mlp_norm": ParamSpec((L, D), ("layer", None), 0, unit),
            "gate": ParamSpec((L, D, F), ("layer", "embed", "mlp"), D),
            "up": ParamSpec((L, D, F), ("layer", "embed", "mlp"), D),
            "down": ParamSpec((L, F, D), ("layer", "mlp", "embed"), F * 2 * L),
        },
    }
    if arch.qkv_bias:
        for name, heads, axis in (("q", N, "heads"), ("k", K, "kv_heads"), ("v", K, "kv_heads")):
            table["layers"][f"{name}_bias"] = ParamSpec((L, heads, H), ("layer", axis, None), 0, 0)
    if arch.qk_norm:
        for name in ("q_norm", "k_norm"):
            table["layers"][name] = ParamSpec((L, H), ("layer", None), 0, unit)
    if arch.sandwich_norm:
        for name in ("post_attn_norm", "post_mlp_norm"):
            table["layers"][name] = ParamSpec((L, D), ("layer", None), 0, unit)
    if not arch.tied_head:
        table["head"] = ParamSpec((D, V), ("embed", "vocab"), D)
    return table


def map_table(fn: Callable[[ParamSpec], Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """`fn` of every spec, in the table's nesting."""
    return jax.tree.map(fn, dict(table), is_leaf=lambda x: isinstance(x, ParamSpec))


def decode_table(table: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The table of a decode form: the stacked arrays become a list of one dict a layer."""
    layer = map_table(
        lambda s: dataclasses.replace(s, shape=s.shape[1:], axes=s.axes[1:]), table["layers"]
    )
    return {**table, "layers": [layer] * num_layers}


def matrix_spec(spec: ParamSpec, inputs: int) -> ParamSpec:
    """A stacked array [L, *in, *out], of so many input axes, as the matrices [L, D, F] it is."""
    layers, rest = spec.shape[0], spec.shape[1:]
    return ParamSpec(
        (layers, math.prod(rest[:inputs]), math.prod(rest[inputs:])),
        (spec.axes[0], spec.axes[1], spec.axes[1 + inputs]),
        spec.fan_in,
    )


def init_params(arch: Arch, key: jax.Array) -> Params:
    """Random float32 parameters, each drawn from `key` and its own number in the table."""
    specs, treedef = jax.tree.flatten(param_table(arch), is_leaf=lambda x: isinstance(x, ParamSpec))

    def draw(number: int, spec: ParamSpec) -> jax.Array:
        if spec.fan_in == 0:
            return jnp.full(spec.shape, spec.fill, jnp.float32)
        noise = jax.random.normal(jax.random.fold_in(key, number), spec.shape, jnp.float32)
        return noise / math.sqrt(spec.fan_in)

    return jax.tree.unflatten(treedef, [draw(i, spec) for i, spec in enumerate(specs)])


def num_params(arch: Arch) -> int:
    """Parameters of the model, counting a tied head once."""
    leaves = jax.tree.leaves(param_table(arch), is_leaf=lambda x: isinstance(x, ParamSpec))
    return sum(math.prod(spec.shape) for spec in leaves)


def attention_share(arch: Arch) -> float:
    """Operations to attend to one position, over those of one token's matrix products."""
    leaves = jax.tree.leaves(
        param_table(arch)["layers"], is_leaf=lambda x: isinstance(x, ParamSpec)
    )
    attended = 4 * arch.num_heads * arch.head_width * arch.num_layers
    return attended / (2 * sum(math.prod(spec.shape) for spec in leaves))
