"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), in two forms.

One vector a token, [c, r] of kv_rank + rope_width numbers, stands for the keys and values of all
heads: c makes each head's plain key and its value, r is the rotated key that all heads share.

Expanded (the train form): keys and values are made from it, and attention is that of any decoder.
Absorbed (the decode form): a head's query is brought to where c is instead, q W_k, so that all
heads look at the same one key [c, r] a token, which is all the cache holds; what they mix, they mix
of c, and make values of it afterwards. The two are the same numbers in another order. Prefill is
absorbed too: a score costs 2 (kv_rank + rope_width) products there, against head_width +
value_width expanded (3.6 times as much in DeepSeek-V3), in exchange for making no keys and values.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from grpo.model.arch import Latent

Weights = Mapping[str, jax.Array]


def de_interleaved(x_BTNr: jax.Array, latent: Latent) -> jax.Array:
    """Rotary pairs as halves, whichever way the model was trained; scores do not change."""
    if not latent.interleaved:
        return x_BTNr
    return jnp.concatenate([x_BTNr[..., 0::2], x_BTNr[..., 1::2]], axis=-1)


def queries_and_latent(
    q_BTNH: jax.Array,
    kv_BTR: jax.Array,
    latent: Latent,
    norm: Callable[[jax.Array], jax.Array],
    rotate: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each head's plain and rotated query, and the one key [c, r] of all, [B, T, 1, R].

    Args:
      q_BTNH: projected queries.
      kv_BTR: projected latents, R = kv_rank + rope_width.
      latent: widths.
      norm: of c.
      rotate: by position.
    """
    plain_BTNp = q_BTNH[..., : latent.plain_width]
    q_BTNr = rotate(de_interleaved(q_BTNH[..., latent.plain_width :], latent))
    c_BTc = norm(kv_BTR[..., : latent.kv_rank])
    k_BT1r = rotate(de_interleaved(kv_BTR[:, :, None, latent.kv_rank :], latent))
    return plain_BTNp, q_BTNr, jnp.concatenate([c_BTc[:, :, None], k_BT1r], axis=-1)


def expanded(
    plain_BTNp: jax.Array,
    q_BTNr: jax.Array,
    key_BT1R: jax.Array,
    made_BTNX: jax.Array,
    latent: Latent,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values for any attention, all of one width: the narrower end in zeros.

    `made_BTNX` is what was made of c: each head's plain key, and behind it its value.
    """
    k_BTNp, v_BTNv = jnp.split(made_BTNX, [latent.plain_width], axis=-1)
    k_BT1r = key_BT1R[..., latent.kv_rank :]
    k_BTNr = jnp.broadcast_to(k_BT1r, (*k_BTNp.shape[:3], latent.rope_width))
    q_BTNH = jnp.concatenate([plain_BTNp, q_BTNr], axis=-1)
    k_BTNH = jnp.concatenate([k_BTNp, k_BTNr], axis=-1)
    width = max(q_BTNH.shape[-1], v_BTNv.shape[-1])
    return _padded(q_BTNH, width), _padded(k_BTNH, width), _padded(v_BTNv, width)


def absorbed(plain_BTNp: jax.Array, q_BTNr: jax.Array, k_up: jax.Array) -> jax.Array:
    """Queries [B, T, N, R] that look at the latent vectors themselves."""
    q_BTNc = jnp.einsum("btnp,cnp->btnc", plain_BTNp, k_up)
    return jnp.concatenate([q_BTNc, q_BTNr], axis=-1)


def values(mixed_BTNX: jax.Array, weights: Weights, latent: Latent) -> jax.Array:
    """Each head's mixed value [B, T, N, V], of what attention mixed in either form."""
    if "v_up" not in weights:
        return mixed_BTNX[..., : latent.value_width]
    mixed_BTNc = mixed_BTNX[..., : latent.kv_rank]  # of [c, r], where r is no value
    return jnp.einsum("btnc,cnv->btnv", mixed_BTNc, weights["v_up"])


def _padded(x_BTNH: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x_BTNH, ((0, 0),) * 3 + ((0, width - x_BTNH.shape[-1]),))
