"""Who looks at whom: attention over packed rows of trees, and over a prompt shared by many."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo.model.arch import Arch
from grpo.model.blockwise import Tree, blockwise_attention
from grpo.model.masks import capped, tree_mask

KV = tuple[jax.Array, jax.Array]  # keys and values, each [B, S, K, H]


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    score_cap: float | None = None,
) -> jax.Array:
    """Softmax attention, N query heads over K key/value heads; softmax in float32."""
    if score_cap is not None:
        return _capped_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, score_cap)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="xla"
    )


def _capped_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, cap: float
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKnH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKnTS = jnp.einsum(
        "btknh,bskh->bknts", q_BTKnH, k_BSKH, preferred_element_type=jnp.float32
    )
    low = jnp.finfo(jnp.float32).min
    scores_BKnTS = jnp.where(mask_BTS[:, None, None], capped(scores_BKnTS, cap), low)
    weight_BKnTS = jax.nn.softmax(scores_BKnTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bknts,bskh->btknh", weight_BKnTS, v_BSKH).reshape(B, T, N, H)


def tree_attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    groups_RT: jax.Array,
    branches_RT: jax.Array,
    positions_RT: jax.Array | None = None,
    window: Any = None,
    score_cap: float | None = None,
    *,
    implementation: str = "xla",
) -> jax.Array:
    """Attention of packed rows; see `tree_mask` for who sees whom.

    What the backward pass needs of it is named "attn_out", for the policies of `jax.checkpoint`.

    Args:
      q_RTNH: queries.
      k_RTKH: keys.
      v_RTKH: values.
      groups_RT: int32; 0 is padding.
      branches_RT: int32; 0 is a prompt.
      positions_RT: int32; needed with a window.
      window: how many tokens a query sees; None: all. Not by splash.
      score_cap: as in `Arch`. Not by cuDNN.
      implementation: "xla" anywhere; "cudnn" on a GPU, "splash" on a TPU. See `chosen_attention`.
    """
    qkv = q_RTNH, k_RTKH, v_RTKH
    if implementation == "splash":
        from grpo.model.splash import splash_tree_attention  # only here: it brings Pallas

        return splash_tree_attention(*qkv, groups_RT, branches_RT, score_cap=score_cap)
    if implementation == "cudnn":
        mixed_RTNH = _cudnn_tree_attention(*qkv, groups_RT, branches_RT, positions_RT, window)
        return checkpoint_name(mixed_RTNH, "attn_out")
    tree = Tree(groups_RT, branches_RT, positions_RT, window)
    return blockwise_attention(*qkv, tree, score_cap)


def chosen_attention(wanted: str, platform: str, arch: Arch, dtype: str) -> str:
    """Which implementation trains: `wanted`, or for "auto" the best that works here.

    Args:
      wanted: `model.attention`.
      platform: of the devices: "cpu", "gpu" (or "cuda"), "tpu".
      arch: of the model.
      dtype: what blocks compute in.

    Raises:
      ValueError: what is wanted cannot work here.
    """
    H = arch.head_width
    limits = {
        "splash": {
            f"it runs on a TPU, and this is a {platform}": platform != "tpu",
            f"it has no window, and the model's is {arch.window}": arch.window is not None,
        },
        "cudnn": {
            f"it runs on a GPU, and this is a {platform}": platform not in ("gpu", "cuda"),
            f"it computes in bfloat16, and model.compute_dtype is {dtype}": dtype != "bfloat16",
            f"its heads are multiples of 8 up to 128 wide, and the model's are {H}": (
                H > 128 or H % 8 != 0
            ),
            f"it cannot cap scores, and the model does, at {arch.score_cap}": (
                arch.score_cap is not None
            ),
        },
        "xla": {},
    }
    faults = {
        name: [fault for fault, there in of_one.items() if there] for name, of_one in limits.items()
    }
    if wanted == "auto":
        return next(name for name, found in faults.items() if not found)
    if faults[wanted]:
        raise ValueError(
            f"model.attention is {wanted!r}, but {'; '.join(faults[wanted])}. Leave it at auto"
        )
    return wanted


def _cudnn_tree_attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    groups_RT: jax.Array,
    branches_RT: jax.Array,
    positions_RT: jax.Array | None,
    window: Any,
) -> jax.Array:
    """By cuDNN's flash attention. The mask is a [R, 1, T, T] array in the compute dtype, so the
    memory grows with the square of the row, though not times the heads."""
    T = q_RTNH.shape[1]

    def even(x_RTX: jax.Array) -> jax.Array:
        """cuDNN wants an even length with a mask."""
        return jnp.pad(x_RTX, ((0, 0), (0, T % 2)) + ((0, 0),) * (x_RTX.ndim - 2))

    positions_RT = None if positions_RT is None else even(positions_RT)
    mask_RTT = tree_mask(even(groups_RT), even(branches_RT), 0, T + T % 2, positions_RT, window)
    mixed_RTNH = jax.nn.dot_product_attention(
        even(q_RTNH),
        even(k_RTKH),
        even(v_RTKH),
        mask=mask_RTT[:, None],
        implementation="cudnn",
    )
    return mixed_RTNH[:, :T]


def shared_prefix_attention(
    q_BTNH: jax.Array,
    prompt: KV,
    prompt_len_P: jax.Array,
    own: KV,
    visible_BTS: jax.Array,
    prompt_visible_BTQ: jax.Array | None = None,
    score_cap: float | None = None,
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
      prompt_visible_BTQ: which of its prompt's it sees; all, by default.
      score_cap: as in `Arch`.
    """
    B, T, N, H = q_BTNH.shape
    P, K, Q, _ = prompt[0].shape
    n = N // K  # query heads a key/value head
    q_BTNH = q_BTNH * H**-0.5
    q_BTKnH = q_BTNH.reshape(B, T, K, n, H)
    q_BKmH = jnp.moveaxis(q_BTKnH, 2, 1).reshape(B, K, T * n, H)
    q_PKgH = jnp.moveaxis(q_BTNH.reshape(P, -1, T, K, n, H), 3, 1).reshape(P, K, -1, H)

    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        product = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32)
        return capped(product, score_cap)

    def mixed(weight: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.einsum("bkqs,bksh->bkqh", weight.astype(v.dtype), v)

    low = jnp.finfo(jnp.float32).min
    seen_PKgQ = (jnp.arange(Q) < prompt_len_P[:, None])[:, None, None]
    if prompt_visible_BTQ is not None:
        seen_PgQ = jnp.repeat(prompt_visible_BTQ.reshape(P, -1, Q), n, axis=1)
        seen_PKgQ = seen_PKgQ & seen_PgQ[:, None]
    scores_PKgQ = jnp.where(seen_PKgQ, scores(q_PKgH, prompt[0]), low)
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
    weight_PKgQ = jnp.where(seen_PKgQ, jnp.exp(scores_PKgQ - per_prompt(top_BKm1)), 0.0)
    weight_BKmS = jnp.exp(scores_BKmS - top_BKm1)
    total_BKm1 = per_sequence(weight_PKgQ.sum(-1, keepdims=True)) + weight_BKmS.sum(
        -1, keepdims=True
    )
    out_BKmH = per_sequence(mixed(weight_PKgQ, prompt[1])) + mixed(weight_BKmS, own[1])
    out_BKTnH = (out_BKmH / total_BKm1).reshape(B, K, T, n, H)
    return jnp.moveaxis(out_BKTnH, 2, 1).reshape(B, T, N, H).astype(q_BTNH.dtype)
