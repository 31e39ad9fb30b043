"""Who looks at whom: attention over packed rows of trees, and over a prompt shared by many."""

import jax
import jax.numpy as jnp

KV = tuple[jax.Array, jax.Array]  # keys and values, each [B, S, K, H]
_BLOCK = 256  # queries whose attention scores exist at one time


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention, N query heads over K key/value heads; softmax in float32."""
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="xla"
    )


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
    *,
    implementation: str = "xla",
) -> jax.Array:
    """Attention of packed rows; see `tree_mask` for who sees whom.

    Args:
      q_RTNH: queries.
      k_RTKH: keys.
      v_RTKH: values.
      groups_RT: int32; 0 is padding.
      branches_RT: int32; 0 is a prompt.
      implementation: "xla" anywhere; "cudnn" on a GPU, "splash" on a TPU. See `chosen_attention`.
    """
    if implementation == "splash":
        from grpo.model.splash import splash_tree_attention  # only here: it brings Pallas

        return splash_tree_attention(q_RTNH, k_RTKH, v_RTKH, groups_RT, branches_RT)
    if implementation == "cudnn":
        return _cudnn_tree_attention(q_RTNH, k_RTKH, v_RTKH, groups_RT, branches_RT)
    return _xla_tree_attention(q_RTNH, k_RTKH, v_RTKH, groups_RT, branches_RT)


def chosen_attention(wanted: str, platform: str, *, head_width: int, dtype: str) -> str:
    """Which implementation trains: `wanted`, or for "auto" the best that works here.

    Args:
      wanted: `model.attention`.
      platform: of the devices: "cpu", "gpu" (or "cuda"), "tpu".
      head_width: H.
      dtype: what blocks compute in.

    Raises:
      ValueError: what is wanted cannot work here.
    """
    on_gpu = platform in ("gpu", "cuda")
    faults = {
        "splash": [] if platform == "tpu" else [f"it runs on a TPU, and this is a {platform}"],
        "cudnn": [
            fault
            for fault, present in {
                f"it runs on an NVIDIA GPU, and this is a {platform}": not on_gpu,
                f"it computes in bfloat16, and model.compute_dtype is {dtype}": dtype != "bfloat16",
                f"it takes heads of at most 128, multiples of 8, and these are {head_width} wide": (
                    head_width > 128 or head_width % 8 != 0
                ),
            }.items()
            if present
        ],
        "xla": [],
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
) -> jax.Array:
    """By cuDNN's flash attention. The mask is a [R, 1, T, T] array in the compute dtype, so the
    memory grows with the square of the row, though not times the heads."""
    T, pad = q_RTNH.shape[1], q_RTNH.shape[1] % 2  # cuDNN wants an even length with a mask
    q_RTNH, k_RTKH, v_RTKH, groups_RT, branches_RT = (
        jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        for x in (q_RTNH, k_RTKH, v_RTKH, groups_RT, branches_RT)
    )
    mask_R1TT = tree_mask(groups_RT, branches_RT, 0, T + pad)[:, None]
    mixed_RTNH = jax.nn.dot_product_attention(
        q_RTNH, k_RTKH, v_RTKH, mask=mask_R1TT, implementation="cudnn"
    )
    return mixed_RTNH[:, :T]


def _xla_tree_attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    groups_RT: jax.Array,
    branches_RT: jax.Array,
) -> jax.Array:
    """A block of queries at a time: half of the square is never made."""
    T, mixed = q_RTNH.shape[1], []
    for start in range(0, T, _BLOCK):
        stop = min(start + _BLOCK, T)
        mask_RqS = tree_mask(groups_RT, branches_RT, start, stop)
        mixed.append(attention(q_RTNH[:, start:stop], k_RTKH[:, :stop], v_RTKH[:, :stop], mask_RqS))
    return jnp.concatenate(mixed, axis=1)


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
