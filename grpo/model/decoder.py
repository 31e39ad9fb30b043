"""The decoder, in two forms over one set of weights and one set of block functions.

Train form: layers stacked and scanned, whole sequences, rematerialised. Decode form: a list of
layers, unrolled, one token at a time over a key/value cache (scanning layers over a cache copies
the whole cache every token). What a block computes is written once, in `block`; the two forms
differ only in the `attend` they hand to it. What differs from layer to layer is data (`Layer`):
scanned along with the weights in the train form, constants in the decode form. Layers without
experts that come before those with experts are a stack of their own, "dense_layers".
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from grpo.model import mla, moe
from grpo.model.arch import Arch, Latent
from grpo.model.attention import (
    KV,
    attention,
    shared_prefix_attention,
    tree_attention,
)
from grpo.model.embedding import embed_tokens
from grpo.model.linear import Adapted, Weight, in_dtype, project
from grpo.model.masks import capped, within
from grpo.model.params import Params, ParamSpec, param_table
from grpo.model.quantise import Quantised, dequantise, quantise
from grpo.model.rope import Yarn, frequencies
from grpo.model.stack import scan_layers
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

Stored = jax.Array | Quantised  # [B, K, S, H], as a cache keeps keys or values
Cache = tuple[Stored, ...]  # of one layer, see `empty_cache`
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Layer(NamedTuple):
    """What may differ between layers that share one block function."""

    frequency_h: Any  # radians a position of each rotary pair, float32 [H / 2]; 0: not rotated
    gain: Any  # multiplies rotated queries and keys
    window: Any  # how many tokens a query sees, itself included; None: all


def layers_of(arch: Arch) -> list[Layer]:
    """The layers' own settings, from first to last."""
    H, scaling = arch.rope_width, arch.rope_scaling
    gain = scaling.gain if isinstance(scaling, Yarn) else 1.0
    everywhere = Layer(frequencies(arch.rope_theta, scaling, H), gain, None)
    local = everywhere._replace(window=arch.window)
    if arch.local_rope_theta is not None:
        local = Layer(frequencies(arch.local_rope_theta, None, H), 1.0, arch.window)
    unrotated = Layer(np.zeros(H // 2, np.float32), 1.0, None)
    kinds = {"global": everywhere, "sliding": local, "unrotated": unrotated}
    return [kinds[name] for name in arch.layer_types or ("global",) * arch.num_layers]


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (offset + scale), the statistics in float32.

    With an offset the scale is applied in float32 as well, as Gemma does: bfloat16 holds what a
    scale is above 1 to 8 bits, their sum not.
    """
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_square_BT1 = jnp.mean(x32_BTD * x32_BTD, axis=-1, keepdims=True)
    normed_BTD = x32_BTD * jax.lax.rsqrt(mean_square_BT1 + eps)
    if offset:
        return (normed_BTD * (offset + scale_D.astype(jnp.float32))).astype(x_BTD.dtype)
    return normed_BTD.astype(x_BTD.dtype) * scale_D


def rotary(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    frequency_h: jax.Array | np.ndarray,
    gain: float = 1.0,
) -> jax.Array:
    """Rotates pairs (h, h + H/2) by position * frequency (arXiv:2104.09864), times `gain`."""
    half = x_BTNH.shape[-1] // 2
    angle_BT1h = positions_BT[..., None, None].astype(jnp.float32) * frequency_h
    sin = (jnp.sin(angle_BT1h) * gain).astype(x_BTNH.dtype)
    cos = (jnp.cos(angle_BT1h) * gain).astype(x_BTNH.dtype)
    left, right = x_BTNH[..., :half], x_BTNH[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def block(
    weights: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    arch: Arch,
    layer: Layer,
    attend: Attend,
    chosen_BTk: jax.Array | None = None,
) -> tuple[jax.Array, Any, jax.Array | None]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    `attend(q, k, v)` gets this layer's projections, rotated, and returns the mixed values and
    whatever the caller wants to keep (the updated cache). It divides scores by sqrt(H). In the
    decode form of latent attention, k and v are both the latents, as the only head.

    Returns what goes to the next layer, what `attend` kept, and the experts [B, T, k] that each
    token went to; None in a dense layer. `chosen_BTk` is as in `moe.mixture`.
    """
    w = _cast(weights, x_BTD.dtype)
    B, T, _ = x_BTD.shape

    def norm(x_BTD: jax.Array, name: str) -> jax.Array:
        return rms_norm(x_BTD, w[name], arch.norm_eps, arch.norm_offset)

    def heads(h_BTD: jax.Array, name: str) -> jax.Array:
        product = project(h_BTD, w[name]).reshape(B, T, -1, arch.head_width)
        if arch.qkv_bias:
            product += w[f"{name}_bias"]
        return checkpoint_name(product, name)

    def rotate(h_BTNH: jax.Array) -> jax.Array:
        return rotary(h_BTNH, positions_BT, layer.frequency_h, layer.gain)

    def placed(name: str) -> jax.Array:
        h_BTNH = heads(h_BTD, name)
        return rotate(norm(h_BTNH, f"{name}_norm") if arch.qk_norm else h_BTNH)

    def latent_qkv(latent: Latent) -> tuple[jax.Array, jax.Array, jax.Array]:
        if latent.q_rank is None:
            q_BTNH = heads(h_BTD, "q")
        else:
            q_BTNH = heads(norm(project(h_BTD, w["q_a"]), "q_a_norm"), "q_b")
        kv_BTR = checkpoint_name(project(h_BTD, w["kv_a"]), "k")
        plain_BTNp, q_BTNr, key_BT1R = mla.queries_and_latent(
            q_BTNH, kv_BTR, latent, lambda c_BTc: norm(c_BTc, "kv_a_norm"), rotate
        )
        if "k_up" in w:
            return mla.absorbed(plain_BTNp, q_BTNr, w["k_up"]), key_BT1R, key_BT1R
        made_BTX = project(key_BT1R[:, :, 0, : latent.kv_rank], w["kv_b"])
        made_BTNX = made_BTX.reshape(B, T, arch.num_heads, -1)
        return mla.expanded(plain_BTNp, q_BTNr, key_BT1R, made_BTNX, latent)

    def added(x_BTD: jax.Array, written_BTD: jax.Array, name: str) -> jax.Array:
        return x_BTD + (norm(written_BTD, name) if arch.sandwich_norm else written_BTD)

    h_BTD = norm(x_BTD, "attn_norm")
    if arch.latent:
        q_BTNH, k_BTKH, v_BTKH = latent_qkv(arch.latent)
    else:
        q_BTNH, k_BTKH, v_BTKH = placed("q"), placed("k"), heads(h_BTD, "v")
    if arch.query_scale is not None or q_BTNH.shape[-1] != arch.head_width:
        scale = arch.head_width**-0.5 if arch.query_scale is None else arch.query_scale
        q_BTNH *= scale * q_BTNH.shape[-1] ** 0.5
    mixed_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH)
    if arch.latent:
        mixed_BTNH = mla.values(mixed_BTNH, w, arch.latent)
    mixed_BTD = project(mixed_BTNH.reshape(B, T, -1), w["o"])
    x_BTD = checkpoint_name(added(x_BTD, mixed_BTD, "post_attn_norm"), "residual")
    h_BTD = norm(x_BTD, "mlp_norm")
    activation, routed_BTk, written_BTD = _ACTIVATIONS[arch.activation], None, []
    if "gate" in w:  # of a dense layer, or shared by all tokens of one with experts
        gate_BTF = checkpoint_name(project(h_BTD, w["gate"]), "gate")
        up_BTF = checkpoint_name(project(h_BTD, w["up"]), "up")
        written_BTD.append(project(activation(gate_BTF) * up_BTF, w["down"]))
    if arch.experts and "router" in w:
        out_BTD, routed_BTk = moe.mixture(w, h_BTD, arch.experts, activation, chosen_BTk)
        written_BTD.append(out_BTD)
    return added(x_BTD, sum(written_BTD[1:], written_BTD[0]), "post_mlp_norm"), kept, routed_BTk


def _cast(weights: Params, dtype: Any) -> Params:
    """A layer's weights, or a stack's, in `dtype`; routers stay what they are."""
    return {n: w if n in moe.FLOAT32 else in_dtype(w, dtype) for n, w in weights.items()}


def embed(table_VD: jax.Array, tokens_BT: jax.Array, arch: Arch) -> jax.Array:
    """What the first layer reads, in the table's dtype."""
    return _scaled(table_VD[tokens_BT], arch)


def _scaled(x_BTD: jax.Array, arch: Arch) -> jax.Array:
    return x_BTD if arch.embed_scale == 1 else x_BTD * jnp.asarray(arch.embed_scale, x_BTD.dtype)


def head(params: Params) -> jax.Array:
    """The output matrix [D, V]; a tied model's is its embedding, transposed."""
    return params["head"] if "head" in params else params["embed"].T


# ---- train form ------------------------------------------------------------------------------


def _gathered(weights: Params, table: Params, dtype: str) -> Params:
    """One layer's weights in `dtype`, whole but for the axes of products: what FSDP gathers.

    Cast first, so that half as many bytes travel.
    """

    def gather(weight: Weight, spec: ParamSpec) -> Weight:
        if isinstance(weight, Adapted):
            return weight.replace(base=gather(weight.base, spec))
        if isinstance(weight, Quantised):  # XLA gathers it
            return weight
        whole = shard(weight, *spec.axes[1:], rules=DECODE_RULES)
        return checkpoint_name(whole, "weights")

    cast = _cast(weights, dtype)
    return {name: gather(weight, table[name]) for name, weight in cast.items()}


def hidden_states(
    params: Params,
    arch: Arch,
    tokens_RT: jax.Array,
    positions_RT: jax.Array,
    groups_RT: jax.Array,
    branches_RT: jax.Array,
    routes_RTLk: jax.Array | None = None,
    *,
    dtype: str,
    remat: str,
    attention_by: str = "xla",
) -> jax.Array:
    """Final, normed hidden states [R, T, D] of packed rows (see `grpo.structs.Batch`).

    Args:
      params: the train form; its layers may be `Summed` (grpo/model/stack.py).
      arch: shape of the model.
      tokens_RT: int32 ids.
      positions_RT: int32.
      groups_RT: int32; 0 is padding.
      branches_RT: int32; 0 is a prompt.
      routes_RTLk: the experts that the sampler chose, see `grpo.structs.Batch`; None: the router
        chooses.
      dtype: what the blocks compute in; parameters are cast layer by layer.
      remat: which activations the backward pass recomputes: "none" of them, "full": all,
        "attn": all but the attention outputs, "products": all but the matrix products.
      attention_by: see `grpo.model.attention.tree_attention`.
    """

    def inside(
        weights: Params,
        x_RTD: jax.Array,
        own: dict[str, Any],
        positions_RT: jax.Array,
        groups_RT: jax.Array,
        branches_RT: jax.Array,
        *,
        shared: dict[str, Any],
    ) -> jax.Array:
        own = dict(own)
        chosen_RTk = own.pop("chosen", None)
        layer = Layer(**shared, **own)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            mixed = tree_attention(
                q,
                k,
                v,
                groups_RT,
                branches_RT,
                positions_RT,
                layer.window,
                arch.score_cap,
                implementation=attention_by,
            )
            return mixed, None

        return block(weights, x_RTD, positions_RT, arch, layer, attend, chosen_RTk)[0]

    def through(x_RTD: jax.Array, stack: str, layers: list[Layer]) -> jax.Array:
        shared, own = _scannable(layers)
        if routes_RTLk is not None and stack == "layers":
            own["chosen"] = jnp.moveaxis(routes_RTLk, 2, 0)
        compute = propagated(functools.partial(inside, shared=shared), rows)

        def one(x_RTD: jax.Array, weights: Params, own: dict[str, Any]) -> jax.Array:
            weights = _gathered(weights, table[stack], dtype)
            x_RTD = shard(x_RTD, "batch", None, None)
            return compute(weights, x_RTD, own, positions_RT, groups_RT, branches_RT)

        one = jax.checkpoint(one, policy=REMAT_POLICIES[remat], prevent_cse=False)
        return scan_layers(one, x_RTD, params[stack], own)

    table, rows = param_table(arch), spec(("batch", None, None))
    x_RTD = _scaled(embed_tokens(params["embed"], tokens_RT, dtype), arch)
    layers, dense = layers_of(arch), arch.first_dense
    if dense:
        x_RTD = through(x_RTD, "dense_layers", layers[:dense])
    x_RTD = through(x_RTD, "layers", layers[dense:])
    return rms_norm(x_RTD, params["final_norm"].astype(dtype), arch.norm_eps, arch.norm_offset)


def _scannable(layers: list[Layer]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all layers share, as it is, and what they do not, stacked for the scan."""
    shared, own = {}, {}
    for name in Layer._fields:
        values = [getattr(layer, name) for layer in layers]
        if all(np.array_equal(value, values[0]) for value in values):
            shared[name] = values[0]
        else:  # no window is one that is never left
            everything = np.int32(np.iinfo(np.int32).max)
            own[name] = np.stack([everything if value is None else value for value in values])
    return shared, own


# ---- decode form -----------------------------------------------------------------------------


def to_decode(params: Params, arch: Arch, dtype: str) -> Params:
    """The decode form of the same weights: compute dtype, one dict a layer.

    Run under `jit` with the decode shardings; the one place where parameters change dtype or
    layout for the sampler.
    """
    rest = {name: a for name, a in params.items() if not name.endswith("layers")}
    layers: list[Params] = []
    for stack, count in ("dense_layers", arch.first_dense), ("layers", arch.num_layers):
        cast = _cast(params.get(stack, {}), dtype)
        if "kv_b" in cast and arch.latent:
            plain, both = arch.latent.plain_width, cast.pop("kv_b")
            cast |= {"k_up": both[..., :plain], "v_up": both[..., plain:]}
        layers += [jax.tree.map(lambda a, i=i: a[i], cast) for i in range(count - len(layers))]
    return in_dtype(rest, dtype) | {"layers": layers}


def _shard_kv(x_BKSH: jax.Array) -> jax.Array:
    return shard(x_BKSH, "batch", "kv_heads", None, None, rules=DECODE_RULES)


def empty_cache(arch: Arch, rows: int, length: int, dtype: str, *, at_once: int = 1) -> list[Cache]:
    """What each layer caches of `length` tokens of `rows` sequences, of nothing yet.

    Keys and values, [rows, K, S, H] each; of latent attention one array [rows, 1, S, R]. S is
    `length`, in a sliding layer no more than `Arch.cache_lengths` says of tokens fed `at_once`.
    Heads come before positions, as the matrix products of decoding want them: the other order
    makes XLA on a CPU turn the whole cache around at every token. A `dtype` of "int8" keeps a
    scale for each head of each token besides. In layers with experts there is one array more:
    which of them each token went to, int16 [rows, 1, length, k], which nobody attends to but the
    trainer has to know.
    """

    def nothing(S: int) -> Stored:
        shape = (rows, arch.num_kv_heads, S, arch.head_width)
        if arch.latent:
            shape = (rows, 1, S, arch.latent.cached_width)
        if dtype != "int8":
            return _shard_kv(jnp.zeros(shape, dtype))
        return Quantised(
            values=_shard_kv(jnp.zeros(shape, jnp.int8)),
            scales=_shard_kv(jnp.zeros((*shape[:-1], 1), jnp.bfloat16)),
        )

    def layer(number: int, S: int) -> Cache:
        made: Cache = (nothing(S),) if arch.latent else (nothing(S), nothing(S))
        if arch.experts is None or number < arch.first_dense:
            return made
        chosen = jnp.zeros((rows, 1, length, arch.experts.per_token), jnp.int16)
        return (*made, shard(chosen, "batch", None, None, None, rules=DECODE_RULES))

    return [layer(number, S) for number, S in enumerate(arch.cache_lengths(length, at_once))]


def in_int8(x_BKSH: jax.Array) -> Quantised:
    """Keys or values in 8 bits, each head of each token with a scale."""
    return quantise(x_BKSH, -1, x_BKSH.shape[-1])


def stored_like(cache: Stored, new: jax.Array) -> Stored:
    """`new` keys or values as the cache they go into stores them."""
    return in_int8(new) if isinstance(cache, Quantised) else new.astype(cache.dtype)


def _read(cache: Cache, arch: Arch, dtype: Any) -> KV:
    """Keys and values; latents are both."""

    def read(x: Stored) -> jax.Array:
        return dequantise(x, dtype) if isinstance(x, Quantised) else x

    return read(cache[0]), read(cache[0 if arch.latent else 1])


def routes(arch: Arch, cache: list[Cache], row_Rn: jax.Array, place_Rn: jax.Array) -> jax.Array:
    """The experts [R, n, L, k] that the tokens at these places went to, where there are experts.

    Places beyond the cache give what is in its last.
    """
    chosen: list[Any] = [layer[-1] for layer in cache[arch.first_dense :]]
    picked = [layer_B1Sk.at[row_Rn, 0, place_Rn].get(mode="clip") for layer_B1Sk in chosen]
    return jnp.stack(picked, axis=2)


def prefill(weights: Params, arch: Arch, tokens_RQ: jax.Array) -> list[Cache]:
    """The cache of prompts, as `empty_cache` has it; what stands behind a prompt's end is rubbish,
    which `decode_step` does not look at."""
    positions_RQ = jnp.broadcast_to(jnp.arange(tokens_RQ.shape[1]), tokens_RQ.shape)
    causal_RQQ = positions_RQ[:, :, None] >= positions_RQ[:, None, :]

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None
    ) -> tuple[jax.Array, Cache]:
        mask_RQQ = causal_RQQ
        if window is not None:
            mask_RQQ = causal_RQQ & within(window, positions_RQ, positions_RQ)
        mixed = attention(q, k, v, mask_RQQ, arch.score_cap)
        return mixed, tuple(new.swapaxes(1, 2) for new in ((k,) if arch.latent else (k, v)))

    x_RQD, cache = embed(weights["embed"], tokens_RQ, arch), []
    for layer_weights, layer in zip(weights["layers"], layers_of(arch), strict=True):
        attend_here = functools.partial(attend, window=layer.window)
        x_RQD, kv, chosen = block(layer_weights, x_RQD, positions_RQ, arch, layer, attend_here)
        cache.append(kv if chosen is None else (*kv, chosen[:, None].astype(jnp.int16)))
    return cache


def decode_step(
    weights: Params,
    arch: Arch,
    prompts: Sequence[Cache],
    prompt_len_P: jax.Array,
    cache: Sequence[Cache],
    tokens_BT: jax.Array,
    written_B: jax.Array,
    room: int,
) -> tuple[jax.Array, list[Cache]]:
    """Logits [B, T, V] of what follows each token, and the cache with their keys and values.

    A layer's cache is a ring: the token at place p behind the prompt goes into slot p modulo its
    length. Of a prompt that is longer than its cache, the cache holds the last tokens.

    Args:
      weights: the decode form.
      arch: shape of the model.
      prompts: `empty_cache` of P prompts; see `shared_prefix_attention`.
      prompt_len_P: tokens of each prompt.
      cache: that of B sequences, of what stands behind the prompts.
      tokens_BT: the next tokens of each sequence, usually one.
      written_B: tokens already in each row of the cache; these go behind them.
      room: places that there are; tokens at `room` and beyond are not kept.

    Raises:
      ValueError: a layer's cache is too short for so many tokens at a time.
    """
    B, T = tokens_BT.shape
    for number, needed in enumerate(arch.cache_lengths(room, T)):
        if (found := jax.tree.leaves(cache[number])[0].shape[2]) < needed:
            raise ValueError(
                f"layer {number} caches {found} tokens, but {T} at a time of {room} need {needed}: "
                f"make the cache with at_once={T}"
            )
    place_BT = written_B[:, None] + jnp.arange(T)
    last_B1 = jnp.minimum(place_BT[:, -1:], room - 1)
    G = B // len(prompt_len_P)
    position_BT = jnp.repeat(prompt_len_P, G)[:, None] + place_BT
    rows_B1 = jnp.arange(B)[:, None]

    def put(cache_BKSH: Stored, new_BTKH: jax.Array) -> Stored:
        S = jax.tree.leaves(cache_BKSH)[0].shape[2]
        slot_BT = jnp.where(place_BT < room, place_BT % S, S + place_BT)  # from S on is nowhere
        # Indices around a slice put its axis last: [B, T, K, H], as the new ones are.
        return jax.tree.map(
            lambda a, new: a.at[rows_B1, :, slot_BT].set(new, mode="drop", unique_indices=True),
            cache_BKSH,
            stored_like(cache_BKSH, new_BTKH),
        )

    def visible(S: int, window: int | None) -> jax.Array:
        """[B, T, S]: which slots of a ring each new token sees, by the places that they hold.

        A slot holds the last place that belongs there and is written. Where a guess was wrong, it
        may hold one ahead, and is taken for the place a round before that: which no token from
        here on sees, since a ring has a slot more than the window for each token that was guessed.
        """
        place_BS = last_B1 - (last_B1 - jnp.arange(S)) % S
        there_BS, behind_BTS = place_BS >= 0, place_BS[:, None] <= place_BT[..., None]
        seen_BTS = there_BS[:, None] & behind_BTS
        return seen_BTS if window is None else seen_BTS & within(window, place_BT, place_BS)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *, prompt: Cache, own: Cache, window: int | None
    ) -> tuple[jax.Array, Cache]:
        own = tuple(map(put, own, (k,) if arch.latent else (k, v)))
        prompt_kv, own_kv = _read(prompt, arch, q.dtype), _read(own, arch, q.dtype)
        visible_BTS = visible(own_kv[0].shape[2], window)
        Q, prompt_visible_BTQ = prompt_kv[0].shape[2], None
        kept_P = jnp.minimum(prompt_len_P, Q)
        if window is not None:
            place_BQ = jnp.arange(Q) - jnp.repeat(kept_P, G)[:, None]  # the last one is at -1
            prompt_visible_BTQ = within(window, place_BT, place_BQ)
        mixed = shared_prefix_attention(
            q, prompt_kv, kept_P, own_kv, visible_BTS, prompt_visible_BTQ, arch.score_cap
        )
        return mixed, own

    x_BTD, written = embed(weights["embed"], tokens_BT, arch), []
    for layer_weights, layer, prompt, own in zip(
        weights["layers"], layers_of(arch), prompts, cache, strict=True
    ):
        attend_here = functools.partial(attend, prompt=prompt, own=own, window=layer.window)
        x_BTD, kept, chosen = block(layer_weights, x_BTD, position_BT, arch, layer, attend_here)
        written.append(kept if chosen is None else (*kept, put(own[-1], chosen[:, :, None])))
    x_BTD = rms_norm(x_BTD, weights["final_norm"], arch.norm_eps, arch.norm_offset)
    logits_BTV = jnp.einsum("btd,dv->btv", x_BTD, head(weights), preferred_element_type=jnp.float32)
    return capped(logits_BTV, arch.logit_cap), written
