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

_SLOWER_ON_CPU = 4  # an operation of attention: narrow heads, masks, exponentials (measured)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One array of the model. `axes` are logical names (see `grpo.sharding.RULES`)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int  # initial standard deviation is fan_in ** -0.5; 0: starts as `fill` everywhere
    fill: float = 1.0


def param_table(arch: Arch) -> dict[str, Any]:
    """Every parameter of the train form, nested as the parameters are.

    The arrays under "layers" are stacked: axis 0 is the layer, which the forward pass scans. So
    are those under "dense_layers", where a model with experts begins with layers without.
    Residual-writing matrices (`o`, `down`) start smaller by sqrt(2L), as GPT-2 does, so that the
    residual stream keeps unit scale at any depth.
    """
    V, D = arch.vocab_size, arch.width
    table: dict[str, Any] = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), D),
        "final_norm": ParamSpec((D,), (None,), 0, 1.0 - arch.norm_offset),
    }
    if arch.first_dense:
        table["dense_layers"] = _layers_table(arch, arch.first_dense, _mlp_table)
    mlp = _experts_table if arch.experts else _mlp_table
    table["layers"] = _layers_table(arch, arch.num_layers - arch.first_dense, mlp)
    if not arch.tied_head:
        table["head"] = ParamSpec((D, V), ("embed", "vocab"), D)
    return table


def _layers_table(
    arch: Arch, L: int, mlp: Callable[[Arch, int], dict[str, ParamSpec]]
) -> dict[str, ParamSpec]:
    """`L` layers of one kind."""
    D, H, unit = arch.width, arch.head_width, 1.0 - arch.norm_offset  # that only norms
    layers = {
        "attn_norm": ParamSpec((L, D), ("layer", None), 0, unit),
        **(_latent_table(arch, L) if arch.latent else _attention_table(arch, L)),
        "mlp_norm": ParamSpec((L, D), ("layer", None), 0, unit),
        **mlp(arch, L),
    }
    if arch.qk_norm:
        for name in ("q_norm", "k_norm"):
            layers[name] = ParamSpec((L, H), ("layer", None), 0, unit)
    if arch.sandwich_norm:
        for name in ("post_attn_norm", "post_mlp_norm"):
            layers[name] = ParamSpec((L, D), ("layer", None), 0, unit)
    return layers


def _attention_table(arch: Arch, L: int) -> dict[str, ParamSpec]:
    D, N, K, H = arch.width, arch.num_heads, arch.num_kv_heads, arch.head_width
    table = {
        "q": ParamSpec((L, D, N, H), ("layer", "embed", "heads", None), D),
        "k": ParamSpec((L, D, K, H), ("layer", "embed", "kv_heads", None), D),
        "v": ParamSpec((L, D, K, H), ("layer", "embed", "kv_heads", None), D),
        "o": _writer((L, N, H, D), ("layer", "heads", None, "embed"), N * H, arch),
    }
    if arch.qkv_bias:
        for name, heads, axis in (("q", N, "heads"), ("k", K, "kv_heads"), ("v", K, "kv_heads")):
            table[f"{name}_bias"] = ParamSpec((L, heads, H), ("layer", axis, None), 0, 0)
    return table


def _latent_table(arch: Arch, L: int) -> dict[str, ParamSpec]:
    """`kv_b` makes of a latent vector each head's plain key, and behind it its value."""
    latent, D, N, H = arch.latent, arch.width, arch.num_heads, arch.head_width
    assert latent is not None
    rank, V = latent.kv_rank, latent.value_width
    head = ("layer", None, "heads", None)
    queries = {"q": ParamSpec((L, D, N, H), ("layer", "embed", "heads", None), D)}
    if latent.q_rank is not None:
        queries = {
            "q_a": ParamSpec((L, D, latent.q_rank), ("layer", "embed", None), D),
            "q_a_norm": ParamSpec((L, latent.q_rank), ("layer", None), 0),
            "q_b": ParamSpec((L, latent.q_rank, N, H), head, latent.q_rank),
        }
    return {
        **queries,
        "kv_a": ParamSpec((L, D, latent.cached_width), ("layer", "embed", None), D),
        "kv_a_norm": ParamSpec((L, rank), ("layer", None), 0),
        "kv_b": ParamSpec((L, rank, N, latent.plain_width + V), head, rank),
        "o": _writer((L, N, V, D), ("layer", "heads", None, "embed"), N * V, arch),
    }


def _mlp_table(arch: Arch, L: int, width: int | None = None) -> dict[str, ParamSpec]:
    D, F = arch.width, arch.mlp_width if width is None else width
    return {
        "gate": ParamSpec((L, D, F), ("layer", "embed", "mlp"), D),
        "up": ParamSpec((L, D, F), ("layer", "embed", "mlp"), D),
        "down": _writer((L, F, D), ("layer", "mlp", "embed"), F, arch),
    }


def _experts_table(arch: Arch, L: int) -> dict[str, ParamSpec]:
    """The MLP's names are the shared expert's, if there is one."""
    experts, D = arch.experts, arch.width
    assert experts is not None
    E, F = experts.count, experts.width
    wide = ("layer", "experts", "embed", "mlp")
    table = {
        "router": ParamSpec((L, D, E), ("layer", None, None), D),
        "expert_gate": ParamSpec((L, E, D, F), wide, D),
        "expert_up": ParamSpec((L, E, D, F), wide, D),
        "expert_down": _writer((L, E, F, D), ("layer", "experts", "mlp", "embed"), F, arch),
    }
    if experts.selection_bias:
        table["router_bias"] = ParamSpec((L, E), ("layer", None), 0, 0.0)
    if experts.shared_width:
        table |= _mlp_table(arch, L, experts.shared_width)
    return table


def _writer(
    shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int, arch: Arch
) -> ParamSpec:
    """What writes to the residual stream starts smaller; see `param_table`."""
    return ParamSpec(shape, axes, fan_in * 2 * arch.num_layers)


def map_table(fn: Callable[[ParamSpec], Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """`fn` of every spec, in the table's nesting."""
    return jax.tree.map(fn, dict(table), is_leaf=lambda x: isinstance(x, ParamSpec))


def decode_table(table: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The table of a decode form: the stacked arrays become a list of one dict a layer.

    `kv_b` of latent attention becomes two, which are used apart: `k_up` [rank, N, plain] and
    `v_up` [rank, N, value].
    """

    def layer(stack: Mapping[str, Any]) -> dict[str, Any]:
        one = map_table(lambda s: dataclasses.replace(s, shape=s.shape[1:], axes=s.axes[1:]), stack)
        if "kv_b" in one:
            both: ParamSpec = one.pop("kv_b")
            rank, N, made = both.shape
            turned = one["kv_a"].shape[-1] - rank
            plain = one["q" if "q" in one else "q_b"].shape[-1] - turned
            for name, width in ("k_up", plain), ("v_up", made - plain):
                one[name] = dataclasses.replace(both, shape=(rank, N, width))
        return one

    rest = {name: spec for name, spec in table.items() if not name.endswith("layers")}
    dense: list[Any] = []
    if first := table.get("dense_layers"):
        dense = [layer(first)] * first["attn_norm"].shape[0]
    layers = dense + [layer(table["layers"])] * (num_layers - len(dense))
    return {**rest, "layers": layers}


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


def active_params(arch: Arch) -> int:
    """Parameters that one token meets: all but those of the experts it does not go to."""
    if arch.experts is None:
        return num_params(arch)
    E, k = arch.experts.count, arch.experts.per_token
    layers = param_table(arch)["layers"]
    routed = sum(math.prod(s.shape) for s in layers.values() if "experts" in s.axes)
    return num_params(arch) - routed // E * (E - k)


def attention_share(arch: Arch, platform: str) -> float:
    """What it costs to attend to one position, over the cost of one token's matrix products.

    Operations; on a CPU, where those of attention take longer each, that many times more.
    """
    specs = [spec for spec in param_table(arch).values() if isinstance(spec, ParamSpec)]
    outside = sum(math.prod(spec.shape) for spec in specs)
    attended = 4 * arch.num_heads * arch.head_width * arch.num_layers
    share = attended / (2 * (active_params(arch) - outside))
    return share * (_SLOWER_ON_CPU if platform == "cpu" else 1)
