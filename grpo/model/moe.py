"""Mixture of experts: which experts a token goes to, and what they make of it.

Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`): shapes are fixed,
and no token is ever dropped. Over the mesh axis "expert" each device holds some of the experts; it
gets the tokens of all devices that share a batch part with it, computes those that go to its own,
and the parts are added up. That is exact, and moves every token to every device of the axis; to
move each only where it goes (an all-to-all) would be the refinement for many experts.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo.model.arch import Experts
from grpo.sharding import TRAIN_RULES, shard, spec

Activation = Callable[[jax.Array], jax.Array]

# Held and computed in float32 in both forms: near a tie, scores rounded to bfloat16 choose others.
FLOAT32 = ("router", "router_bias")


def mixture(
    weights: Mapping[str, jax.Array],
    x_BTD: jax.Array,
    experts: Experts,
    activation: Activation,
    chosen_BTk: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What its experts make of each token, and which they were.

    Args:
      weights: router [D, E], router_bias [E], expert_gate and expert_up [E, D, F], expert_down
        [E, F, D].
      x_BTD: tokens.
      experts: how many, and how they are chosen.
      activation: of the gate.
      chosen_BTk: experts chosen elsewhere, which replace the router's own choice; -1 where it is
        left to it. How they are weighed is the router's own in any case, gradient and all.

    Returns:
      The sum [B, T, D], and the experts int32 [B, T, k], the first those of the highest scores
      where they were not given.
    """
    B, T, D = x_BTD.shape
    x_nD = x_BTD.reshape(B * T, D)
    bias_E = weights.get("router_bias")
    logits_nE = x_nD.astype(jnp.float32) @ weights["router"].astype(jnp.float32)
    scores_nE = scores(logits_nE, experts)
    ids_nk = choice(jax.lax.stop_gradient(scores_nE), bias_E, experts)
    if chosen_BTk is not None:
        chosen_nk = chosen_BTk.reshape(B * T, -1).astype(jnp.int32)
        ids_nk = jnp.where(chosen_nk < 0, ids_nk, chosen_nk)
    share_nk = weighing(scores_nE, ids_nk, experts)
    held = Held(weights["expert_gate"], weights["expert_up"], weights["expert_down"])
    out_nD = _over_devices(x_nD, ids_nk, share_nk, held, activation)
    return out_nD.reshape(B, T, D), ids_nk.reshape(B, T, -1)


def scores(logits_nE: jax.Array, experts: Experts) -> jax.Array:
    """The router's scores, float32."""
    if experts.scoring == "softmax":
        return jax.nn.softmax(logits_nE, axis=-1)
    return jax.nn.sigmoid(logits_nE)


def choice(scores_nE: jax.Array, bias_E: jax.Array | None, experts: Experts) -> jax.Array:
    """The experts [n, k] of each token, by score and bias; without a gradient."""
    if bias_E is not None:
        scores_nE = scores_nE + jax.lax.stop_gradient(bias_E)
    if experts.groups_per_token < experts.groups:
        n, E = scores_nE.shape
        scores_nge = scores_nE.reshape(n, experts.groups, E // experts.groups)
        best_ng = jax.lax.top_k(scores_nge, experts.group_top)[0].sum(-1)
        groups_nj = jax.lax.top_k(best_ng, experts.groups_per_token)[1]
        allowed_ng = (groups_nj[..., None] == jnp.arange(experts.groups)).any(axis=1)
        scores_nE = jnp.where(allowed_ng[..., None], scores_nge, -jnp.inf).reshape(n, E)
    return jax.lax.top_k(scores_nE, experts.per_token)[1]


def weighing(scores_nE: jax.Array, ids_nk: jax.Array, experts: Experts) -> jax.Array:
    """What the output of each chosen expert is multiplied by, float32 [n, k]."""
    E = scores_nE.shape[-1]
    picked_nkE = ids_nk[..., None] == jnp.arange(E)  # a gather's gradient would be a scatter
    share_nk = jnp.sum(jnp.where(picked_nkE, scores_nE[:, None], 0.0), axis=-1)
    if experts.normalised:
        share_nk = share_nk / (share_nk.sum(axis=-1, keepdims=True) + 1e-20)
    return share_nk * experts.scale


class Held(NamedTuple):
    """Weights of some experts in a row."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


def _over_devices(
    x_nD: jax.Array, ids_nk: jax.Array, share_nk: jax.Array, held: Held, activation: Activation
) -> jax.Array:
    """`expert_outputs` with experts over "expert", their widths over "tensor"."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return expert_outputs(x_nD, ids_nk, share_nk, held, activation)
    ways = math.prod(mesh.shape[axis] for axis in TRAIN_RULES["batch"] or ())
    # A prefill may have fewer rows than the mesh has parts; all devices then compute all of it.
    batch = "batch" if x_nD.shape[0] % ways == 0 else None
    tokens: Any = (batch, None)
    up: Any = ("experts", None, "mlp")
    down: Any = ("experts", "mlp", None)
    axes = (tokens, tokens, tokens, Held(up, up, down))

    def local(x_nD: jax.Array, ids_nk: jax.Array, share_nk: jax.Array, held: Held) -> jax.Array:
        first = jax.lax.axis_index("expert") * held.gate_EDF.shape[0]
        if batch:
            x_nD, ids_nk, share_nk = (
                jax.lax.all_gather(a, "expert", axis=0, tiled=True)
                for a in (x_nD, ids_nk, share_nk)
            )
        # Said outright: a gather with indices that differ between devices, of what does not, would
        # else not add up its gradients over them.
        alike = ("tensor",) if batch else ("tensor", "expert")
        x_nD, ids_nk, share_nk = (
            jax.lax.pcast(a, alike, to="varying") for a in (x_nD, ids_nk, share_nk)
        )
        part_nD = expert_outputs(x_nD, ids_nk, share_nk, held, activation, first=first)
        part_nD = jax.lax.psum(part_nD, "tensor")
        if batch:
            return jax.lax.psum_scatter(part_nD, "expert", scatter_dimension=0, tiled=True)
        return jax.lax.psum(part_nD, "expert")

    def is_axes(x: Any) -> bool:
        return isinstance(x, tuple) and not isinstance(x[0], tuple)

    specs = jax.tree.map(spec, axes, is_leaf=is_axes)
    arrays = (x_nD, ids_nk, share_nk, held)
    placed = jax.tree.map(lambda names, a: shard(a, *names), axes, arrays, is_leaf=is_axes)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0])(*placed)


def expert_outputs(
    x_nD: jax.Array,
    ids_nk: jax.Array,
    share_nk: jax.Array,
    held: Held,
    activation: Activation,
    *,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Sum [n, D] over each token's experts, of those held, which are numbered from `first` on."""
    n, k = ids_nk.shape
    E = held.gate_EDF.shape[0]
    local_m = (ids_nk - first).reshape(-1)  # m = n * k
    group_m = jnp.where((local_m >= 0) & (local_m < E), local_m, E)  # E: another device's
    order_m = jnp.argsort(group_m, stable=True)
    sizes_E = jnp.sum(group_m[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes_E)
    rows_mD = x_nD[order_m // k]
    gate_mF = checkpoint_name(product(rows_mD, held.gate_EDF), "gate")
    up_mF = checkpoint_name(product(rows_mD, held.up_EDF), "up")
    out_mD = product(activation(gate_mF) * up_mF, held.down_EFD)
    # What stands behind the last group, no kernel promises.
    out_mD = jnp.where((group_m[order_m] < E)[:, None], out_mD, 0)
    out_nkD = out_mD[jnp.argsort(order_m)].reshape(n, k, -1)
    summed_nD = jnp.einsum(
        "nkd,nk->nd", out_nkD, share_nk.astype(jnp.float32), preferred_element_type=jnp.float32
    )
    return summed_nD.astype(x_nD.dtype)
