"""The decoder, in two forms over one set of weights and one set of block functions.

Train form: layers stacked and scanned, whole sequences, rematerialised. Decode form: a list of
layers, unrolled, one token at a time over a key/value cache (scanning layers over a cache copies
the whole cache every token). What a block computes is written once, in `block`; the two forms
differ only in the `attend` they hand to it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo.model.arch import Arch
from grpo.model.linear import in_dtype, project
from grpo.model.params import Params
from grpo.model.quantise import Quantised, dequantise, quantise
from grpo.sharding import DECODE_RULES, shard

_PRODUCTS = ("q", "k", "v", "attn_out", "residual", "gate", "up")  # named in `block`
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attn": jax.checkpoint_policies.save_only_these_names("attn_out"),
    "products": jax.checkpoint_policies.save_only_these_names(*_PRODUCTS),
}

KV = tuple[jax.Array, jax.Array]  # keys and values, each [B, K, S, H]
Stored = jax.Array | Quantised  # as a cache keeps either
Cache = tuple[Stored, Stored]  # of one layer
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


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention, N query heads over K key/value heads; softmax in float32."""
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="xla"
    )


def block(
    weights: Params, x_BTD: jax.Array, positions_BT: jax.Array, arch: Arch, attend: Attend
) -> tuple[jax.Array, Any]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    `attend(q, k, v)` gets this layer's projections, rotated, and returns the mixed values and
    whatever the caller wants to keep (the updated cache).
    """
    w = in_dtype(weights, x_BTD.dtype)
    B, T, _ = x_BTD.shape

    def heads(h_BTD: jax.Array, name: str) -> jax.Array:
        product = project(h_BTD, w[name]).reshape(B, T, -1, arch.head_width)
        return checkpoint_name(product, name)

    h_BTD = rms_norm(x_BTD, w["attn_norm"], arch.norm_eps)
    q_BTNH = rotary(heads(h_BTD, "q"), positions_BT, arch.rope_theta)
    k_BTKH = rotary(heads(h_BTD, "k"), positions_BT, arch.rope_theta)
    v_BTKH = heads(h_BTD, "v")
    mixed_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH)
    mixed_BTD = project(mixed_BTNH.reshape(B, T, -1), w["o"])
    x_BTD = checkpoint_name(x_BTD + mixed_BTD, "residual")
    h_BTD = rms_norm(x_BTD, w["mlp_norm"], arch.norm_eps)
    gate_BTF = checkpoint_name(project(h_BTD, w["gate"]), "gate")
    up_BTF = checkpoint_name(project(h_BTD, w["up"]), "up")
    return x_BTD + project(jax.nn.silu(gate_BTF) * up_BTF, w["down"]), kept


def head(params: Params) -> jax.Array:
    """The output matrix [D, V]; a tied model's is its embedding, transposed."""
    return params["head"] if "head" in params else params["embed"].T


# ---- train form ------------------------------------------------------------------------------


_BLOCK = 256  # queries whose attention scores exist at one time


def tree_mask(groups_RT: jax.Array, branches_RT: jax.Array, start: int, stop: int) -> jax.Array:
    """bool [R, stop - start, stop]: which slots before `stop` each slot from `start` on sees.

    A token sees earlier tokens of its own branch and of its group's prompt (branch 0). Slots and
    positions order alike within a branch, so slots give the causal order.
    """
    group_Rq1, group_R1s = groups_RT[:, start:stop, None], groups_RT[:, None, :stop]
    branch_Rq1, branch_R1s = branches_RT[:, start:stop, None], branches_RT[:, None, :stop]
    causal_qs = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
    related_Rqs = (branch_R1s == 0) | (branch_R1s == branch_Rq1)
    return causal_qs & (group_Rq1 == group_R1s) & related_Rqs & (group_Rq1 > 0)


def tree_attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    groups_RT: jax.Array,
    branches_RT: jax.Array,
) -> jax.Array:
    """Attention of packed rows, a block of queries at a time: half of the square is never made."""
    T, mixed = q_RTNH.shape[1], []
    for start in range(0, T, _BLOCK):
        stop = min(start + _BLOCK, T)
        mask_RqS = tree_mask(groups_RT, branches_RT, start, stop)
        mixed.append(attention(q_RTNH[:, start:stop], k_RTKH[:, :stop], v_RTKH[:, :stop], mask_RqS))
    return jnp.concatenate(mixed, axis=1)


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
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        mixed = tree_attention(q, k, v, groups_RT, branches_RT)
        return checkpoint_name(mixed, "attn_out"), None

    def layer(x_RTD: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        return block(weights, shard(x_RTD, "batch", None, None), positions_RT, arch, attend)

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    x_RTD = shard(params["embed"].astype(dtype)[tokens_RT], "batch", None, None)
    x_RTD, _ = jax.lax.scan(layer, x_RTD, params["layers"])
    return rms_norm(x_RTD, params["final_norm"].astype(dtype), arch.norm_eps)


# ---- decode form -----------------------------------------------------------------------------


def to_decode(params: Params, arch: Arch, dtype: str) -> Params:
    """The decode form of the same weights: compute dtype, one dict a layer.

    Run under `jit` with the decode shardings; the one place where parameters change dtype or
    layout for the sampler.
    """
    cast = in_dtype(params, dtype)
    stacked = cast["layers"]
    cast["layers"] = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(arch.num_layers)]
    return cast


def _shard_kv(x_BKSH: jax.Array) -> jax.Array:
    return shard(x_BKSH, "batch", "kv_heads", None, None, rules=DECODE_RULES)


def empty_cache(arch: Arch, rows: int, length: int, dtype: str) -> list[Cache]:
    """Keys and values of nothing yet: per layer two arrays [rows, K, length, H].

    Heads come before positions, as the matrix products of decoding want them: the other order
    makes XLA on a CPU turn the whole cache around at every token. A `dtype` of "int8" keeps a
    scale for each head of each token besides.
    """
    shape = (rows, arch.num_kv_heads, length, arch.head_width)

    def nothing() -> Stored:
        if dtype == "int8":
            return jax.tree.map(_shard_kv, in_int8(jnp.zeros(shape)))
        return _shard_kv(jnp.zeros(shape, dtype))

    return [(nothing(), nothing()) for _ in range(arch.num_layers)]


def in_int8(x_BKSH: jax.Array) -> Quantised:
    """Keys or values in 8 bits, each head of each token with a scale."""
    return quantise(x_BKSH, -1, x_BKSH.shape[-1])


def stored_like(cache: Stored, new: jax.Array) -> Stored:
    """`new` keys or values as the cache they go into stores them."""
    return in_int8(new) if isinstance(cache, Quantised) else new.astype(cache.dtype)


def _read(cache: Cache, dtype: Any) -> KV:
    k, v = (dequantise(x, dtype) if isinstance(x, Quantised) else x for x in cache)
    return k, v


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


def shared_prefix_attention(
    q_BTNH: jax.Array,
    prompt: KV,
    prompt_len_P: jax.Array,
    own: KV,
    visible_BTS: jax.Array,
) -> jax.Array:
    """Attention over a prompt that G sequences share and over what each wrote itself.

    Scores of the two parts are normalised together, so the result is that of one softmax over
    both. The prompt's keys and values are read once for all G, not once for each.

    Args:
      q_BTNH: queries of B = P * G sequences; rows p * G to (p + 1) * G share prompt p.
      prompt: keys and values [P, K, Q, H].
      prompt_len_P: how much of each prompt there is.
      own: keys and values [B, K, S, H].
      visible_BTS: which of its own slots each query sees; at least one.
    """
    B, T, N, H = q_BTNH.shape
    P, K, Q, _ = prompt[0].shape
    n = N // K  # query heads a key/value head
    q_BTNH = q_BTNH * H**-0.5
    q_BTKnH = q_BTNH.reshape(B, T, K, n, H)
    q_BKmH = jnp.moveaxis(q_BTKnH, 2, 1).reshape(B, K, T * n, H)
    q_PKgH = jnp.moveaxis(q_BTNH.reshape(P, -1, T, K, n, H), 3, 1).reshape(P, K, -1, H)

    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32)

    def mixed(weight: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.einsum("bkqs,bksh->bkqh", weight.astype(v.dtype), v)

    low = jnp.finfo(jnp.float32).min
    there_P11Q = (jnp.arange(Q) < prompt_len_P[:, None])[:, None, None]
    scores_PKgQ = jnp.where(there_P11Q, scores(q_PKgH, prompt[0]), low)
    seen_BKmS = jnp.repeat(visible_BTS, n, axis=1)[:, None]
    scores_BKmS = jnp.where(seen_BKmS, scores(q_BKmH, own[0]), low)

    def per_sequence(x_PKgX: jax.Array) -> jax.Array:
        """[P, K, G * T * n, ...] -> [B, K, T * n, ...]."""
        split = x_PKgX.reshape(P, K, B // P, T * n, -1)
        return jnp.moveaxis(split, 2, 1).reshape(B, K, T * n, -1)

    def per_prompt(x_BKmX: jax.Array) -> jax.Array:
        split = x_BKmX.reshape(P, B // P, K, T * n, -1)
        return jnp.moveaxis(split, 2, 1).reshape(P, K, (B // P) * T * n, -1)

    top_BKm1 = jnp.maximum(
        per_sequence(scores_PKgQ.max(-1, keepdims=True)), scores_BKmS.max(-1, keepdims=True)
    )
    weight_PKgQ = jnp.where(there_P11Q, jnp.exp(scores_PKgQ - per_prompt(top_BKm1)), 0.0)
    weight_BKmS = jnp.exp(scores_BKmS - top_BKm1)
    total_BKm1 = per_sequence(weight_PKgQ.sum(-1, keepdims=True)) + weight_BKmS.sum(
        -1, keepdims=True
    )
    out_BKmH = per_sequence(mixed(weight_PKgQ, prompt[1])) + mixed(weight_BKmS, own[1])
    out_BKTnH = (out_BKmH / total_BKm1).reshape(B, K, T, n, H)
    return jnp.moveaxis(out_BKTnH, 2, 1).reshape(B, T, N, H).astype(q_BTNH.dtype)


def decode_step(
    weights: Params,
    arch: Arch,
    prompts: Sequence[Cache],
    prompt_len_P: jax.Array,
    cache: Sequence[Cache],
    tokens_BT: jax.Array,
    written_B: jax.Array,
) -> tuple[jax.Array, list[Cache]]:
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
    length = jax.tree.leaves(cache[0])[0].shape[2]
    slot_BT = written_B[:, None] + jnp.arange(T)
    visible_BTS = jnp.arange(length) <= slot_BT[..., None]
    position_BT = jnp.repeat(prompt_len_P, B // len(prompt_len_P))[:, None] + slot_BT
    rows_B1 = jnp.arange(B)[:, None]

    def put(cache_BKSH: Stored, new_BTKH: jax.Array) -> Stored:
        # Indices around a slice put its axis last: [B, T, K, H], as the new ones are.
        return jax.tree.map(
            lambda a, new: a.at[rows_B1, :, slot_BT].set(new, mode="drop", unique_indices=True),
            cache_BKSH,
            stored_like(cache_BKSH, new_BTKH),
        )

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *, prompt: Cache, own: Cache
    ) -> tuple[jax.Array, Cache]:
        own = put(own[0], k), put(own[1], v)
        prompt_kv, own_kv = _read(prompt, q.dtype), _read(own, q.dtype)
        return shared_prefix_attention(q, prompt_kv, prompt_len_P, own_kv, visible_BTS), own

    x_BTD, written = weights["embed"][tokens_BT], []
    for layer, prompt, own in zip(weights["layers"], prompts, cache, strict=True):
        attend_here = functools.partial(attend, prompt=prompt, own=own)
        x_BTD, kept = block(layer, x_BTD, position_BT, arch, attend_here)
        written.append(kept)
    x_BTD = rms_norm(x_BTD, weights["final_norm"], arch.norm_eps)
    logits_BTV = jnp.einsum("btd,dv->btv", x_BTD, head(weights), preferred_element_type=jnp.float32)
    return logits_BTV, written
