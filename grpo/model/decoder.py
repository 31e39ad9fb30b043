"""The decoder, in two forms over one set of weights and one set of block functions.

Train form: layers stacked and scanned, whole sequences, rematerialised. Decode form: a list of
layers, unrolled, one token at a time over a key/value cache (scanning layers over a cache copies
the whole cache every token). What a block computes is written once, in `block`; the two forms
differ only in the `attend` they hand to it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo.model.arch import Arch
from grpo.model.attention import KV, attention, shared_prefix_attention, tree_attention
from grpo.model.embedding import embed_tokens
from grpo.model.params import Params, ParamSpec, param_table
from grpo.sharding import DECODE_RULES, propagated, shard, spec

_PRODUCTS = ("q", "k", "v", "attn_out", "residual", "gate", "up")  # named in `block`
REMAT_POLICIES: dict[str, Any] = {
    # Weights gathered over `fsdp` are gathered again in the backward pass, whatever else is kept:
    # kept, they would be the whole model on every device.
    "none": jax.checkpoint_policies.save_anything_except_these_names("weights"),
    "full": jax.checkpoint_policies.nothing_saveable,
    "attn": jax.checkpoint_policies.save_only_these_names("attn_out"),
    "products": jax.checkpoint_policies.save_only_these_names(*_PRODUCTS),
}

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale, the statistics in float32."""
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_square_BT1 = jnp.mean(x32_BTD * x32_BTD, axis=-1, keepdims=True)
    return (x32_BTD * jax.lax.rsqrt(mean_square_BT1 + eps)).astype(x_BTD.dtype) * scale_D


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (h, h + H/2) by position * theta**(-2h/H) (arXiv:2104.09864)."""
    half = x_BTNH.shape[-1] // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = positions_BT[..., None, None].astype(jnp.float32) * frequency_h
    sin, cos = jnp.sin(angle_BT1h).astype(x_BTNH.dtype), jnp.cos(angle_BT1h).astype(x_BTNH.dtype)
    left, right = x_BTNH[..., :half], x_BTNH[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


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


def block(
    weights: Params, x_BTD: jax.Array, positions_BT: jax.Array, arch: Arch, attend: Attend
) -> tuple[jax.Array, Any]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    `attend(q, k, v)` gets this layer's projections, rotated, and returns the mixed values and
    whatever the caller wants to keep (the updated cache).
    """
    w = jax.tree.map(lambda a: a.astype(x_BTD.dtype), weights)
    B, T, _ = x_BTD.shape

    def heads(h_BTD: jax.Array, name: str) -> jax.Array:
        D, count, width = w[name].shape
        product = linear(h_BTD, w[name].reshape(D, -1)).reshape(B, T, count, width)
        return checkpoint_name(product, name)

    h_BTD = rms_norm(x_BTD, w["attn_norm"], arch.norm_eps)
    q_BTNH = rotary(heads(h_BTD, "q"), positions_BT, arch.rope_theta)
    k_BTKH = rotary(heads(h_BTD, "k"), positions_BT, arch.rope_theta)
    v_BTKH = heads(h_BTD, "v")
    mixed_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH)
    mixed_BTD = linear(mixed_BTNH.reshape(B, T, -1), w["o"].reshape(-1, arch.width))
    x_BTD = checkpoint_name(x_BTD + mixed_BTD, "residual")
    h_BTD = rms_norm(x_BTD, w["mlp_norm"], arch.norm_eps)
    gate_BTF = checkpoint_name(linear(h_BTD, w["gate"]), "gate")
    up_BTF = checkpoint_name(linear(h_BTD, w["up"]), "up")
    return x_BTD + linear(jax.nn.silu(gate_BTF) * up_BTF, w["down"]), kept


def head(params: Params) -> jax.Array:
    """The output matrix [D, V]; a tied model's is its embedding, transposed."""
    return params["head"] if "head" in params else params["embed"].T


# ---- train form ------------------------------------------------------------------------------


def _gathered(weights: Params, arch: Arch, dtype: str) -> Params:
    """One layer's weights in `dtype`, whole but for the tensor axis: what FSDP gathers.

    Cast first, so that half as many bytes travel.
    """

    def gather(spec: ParamSpec, weight: jax.Array) -> jax.Array:
        whole = shard(weight.astype(dtype), *spec.axes[1:], rules=DECODE_RULES)
        return checkpoint_name(whole, "weights")

    table = param_table(arch)["layers"]
    return jax.tree.map(gather, table, weights, is_leaf=lambda x: isinstance(x, ParamSpec))


def hidden_states(
    params: Params,
    arch: Arch,
    tokens_RT: jax.Array,
    positions_RT: jax.Array,
    groups_RT: jax.Array,
    branches_RT: jax.Array,
    *,
    dtype: str,
    remat: str,
    attention_by: str = "xla",
) -> jax.Array:
    """Final, normed hidden states [R, T, D] of packed rows (see `grpo.structs.Batch`).

    Args:
      params: the train form.
      arch: shape of the model.
      tokens_RT: int32 ids.
      positions_RT: int32.
      groups_RT: int32; 0 is padding.
      branches_RT: int32; 0 is a prompt.
      dtype: what the blocks compute in; parameters are cast layer by layer.
      remat: which activations the backward pass recomputes: "none" of them, "full": all,
        "attn": all but the attention outputs, "products": all but the matrix products.
      attention_by: see `grpo.model.attention.tree_attention`.
    """

    rows = spec(("batch", None, None))

    def inside(
        weights: Params,
        x_RTD: jax.Array,
        positions_RT: jax.Array,
        groups_RT: jax.Array,
        branches_RT: jax.Array,
    ) -> jax.Array:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            mixed = tree_attention(q, k, v, groups_RT, branches_RT, implementation=attention_by)
            return checkpoint_name(mixed, "attn_out"), None

        return block(weights, x_RTD, positions_RT, arch, attend)[0]

    def layer(x_RTD: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        weights = _gathered(weights, arch, dtype)
        x_RTD = shard(x_RTD, "batch", None, None)
        tree = positions_RT, groups_RT, branches_RT
        return propagated(inside, rows)(weights, x_RTD, *tree), None

    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    x_RTD = embed_tokens(params["embed"], tokens_RT, dtype)
    x_RTD, _ = jax.lax.scan(layer, x_RTD, params["layers"])
    return rms_norm(x_RTD, params["final_norm"].astype(dtype), arch.norm_eps)


# ---- decode form -----------------------------------------------------------------------------


def to_decode(params: Params, arch: Arch, dtype: str) -> Params:
    """The decode form of the same weights: compute dtype, one dict a layer.

    Run under `jit` with the decode shardings; the one place where parameters change dtype or
    layout for the sampler.
    """
    cast = jax.tree.map(lambda a: a.astype(dtype), params)
    stacked = cast["layers"]
    cast["layers"] = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(arch.num_layers)]
    return cast


def _shard_kv(x_BKSH: jax.Array) -> jax.Array:
    return shard(x_BKSH, "batch", "kv_heads", None, None, rules=DECODE_RULES)


def empty_cache(arch: Arch, rows: int, length: int, dtype: str) -> list[KV]:
    """Keys and values of nothing yet: per layer two arrays [rows, K, length, H].

    Heads come before positions, as the matrix products of decoding want them: the other order
    makes XLA on a CPU turn the whole cache around at every token.
    """
    shape = (rows, arch.num_kv_heads, length, arch.head_width)
    return [
        (_shard_kv(jnp.zeros(shape, dtype)), _shard_kv(jnp.zeros(shape, dtype)))
        for _ in range(arch.num_layers)
    ]


def prefill(weights: Params, arch: Arch, tokens_RQ: jax.Array) -> list[KV]:
    """Keys and values of prompts, [R, K, Q, H] per layer; what stands behind a prompt's end is
    rubbish, which `decode_step` does not look at."""
    positions_RQ = jnp.broadcast_to(jnp.arange(tokens_RQ.shape[1]), tokens_RQ.shape)
    causal_RQQ = positions_RQ[:, :, None] >= positions_RQ[:, None, :]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KV]:
        return attention(q, k, v, causal_RQQ), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    x_RQD, cache = weights["embed"][tokens_RQ], []
    for layer in weights["layers"]:
        x_RQD, kv = block(layer, x_RQD, positions_RQ, arch, attend)
        cache.append(kv)
    return cache


def decode_step(
    weights: Params,
    arch: Arch,
    prompts: list[KV],
    prompt_len_P: jax.Array,
    cache: list[KV],
    tokens_BT: jax.Array,
    written_B: jax.Array,
) -> tuple[jax.Array, list[KV]]:
    """Logits [B, T, V] of what follows each token, and the cache with their keys and values.

    Args:
      weights: the decode form.
      arch: shape of the model.
      prompts: keys and values [P, K, Q, H] a layer; see `shared_prefix_attention`.
      prompt_len_P: tokens of each prompt.
      cache: keys and values [B, K, S, H] a layer of what stands behind the prompts.
      tokens_BT: the next tokens of each sequence, usually one.
      written_B: tokens already in each row of the cache; these go behind them.
    """
    B, T = tokens_BT.shape
    length = cache[0][0].shape[2]
    slot_BT = written_B[:, None] + jnp.arange(T)
    visible_BTS = jnp.arange(length) <= slot_BT[..., None]
    position_BT = jnp.repeat(prompt_len_P, B // len(prompt_len_P))[:, None] + slot_BT
    rows_B1 = jnp.arange(B)[:, None]

    def put(cache_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        # Indices around a slice put its axis last: [B, T, K, H], as the new ones are.
        return cache_BKSH.at[rows_B1, :, slot_BT].set(
            new_BTKH.astype(cache_BKSH.dtype), mode="drop", unique_indices=True
        )

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *, prompt: KV, own: KV
    ) -> tuple[jax.Array, KV]:
        own = put(own[0], k), put(own[1], v)
        return shared_prefix_attention(q, prompt, prompt_len_P, own, visible_BTS), own

    x_BTD, written = weights["embed"][tokens_BT], []
    for layer, prompt, own in zip(weights["layers"], prompts, cache, strict=True):
        attend_here = functools.partial(attend, prompt=prompt, own=own)
        x_BTD, kept = block(layer, x_BTD, position_BT, arch, attend_here)
        written.append(kept)
    x_BTD = rms_norm(x_BTD, weights["final_norm"], arch.norm_eps)
    logits_BTV = jnp.einsum("btd,dv->btv", x_BTD, head(weights), preferred_element_type=jnp.float32)
    return logits_BTV, written
