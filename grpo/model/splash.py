"""Attention of packed trees by the TPU's splash kernel: scores are never held, only blocks of them.

The kernel asks of every pair of a query and a key: are their segment ids equal, and does a function
of the query's number and the key's place say yes? Here the numbers are data, not places. A row's
keys stand there twice, first for its prompts, then for its completions (the segment ids of the
other kind match nothing), and a query's number says where in the second half its branch begins and
where it stands itself:

  first half:   a prompt token of the query's group, not behind the query
  second half:  a token of the query's group between the start of its branch and the query

The memory grows with the length, not its square. Of the two halves the blocks above the diagonal
are skipped, so it computes about twice the scores of plain causal attention.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from grpo.sharding import TRAIN_RULES, fitted, spec

_BITS = 15  # of a place; two of them are a query's number
LONGEST = 2**_BITS - 1  # slots of a row
_LANES = 128  # the TPU's: rows and blocks come in multiples of it


def splash_tree_attention(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    groups_RT: jax.Array,
    branches_RT: jax.Array,
    *,
    score_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`grpo.model.attention.tree_attention` in one kernel, forward and backward.

    The slots of a branch, and of a group's prompt, must be next to each other, as `grpo.batch` lays
    them out. What a padding slot gets is finite and otherwise undefined.

    Args:
      q_RTNH: queries; rows split over the mesh's batch axes, heads over its tensor axis.
      k_RTKH: keys; rows and heads likewise, or all heads everywhere (`grpo.sharding.fitted`).
      v_RTKH: values.
      groups_RT: int32; 0 is padding.
      branches_RT: int32; 0 is a prompt.
      score_cap: as in `Arch`.
      interpret: run the kernel's steps as plain JAX, where there is no TPU; slow.

    Raises:
      ValueError: a row is longer than `LONGEST`.
    """
    if q_RTNH.shape[1] > LONGEST:
        raise ValueError(
            f"rows of {q_RTNH.shape[1]} token slots, but splash attention takes {LONGEST} at most: "
            "lower algo.microbatch_tokens, or set model.attention=xla"
        )
    queries_per_key = q_RTNH.shape[2] // k_RTKH.shape[2]
    local = functools.partial(
        _local, queries_per_key=queries_per_key, score_cap=score_cap, interpret=interpret
    )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q_RTNH, k_RTKH, v_RTKH, groups_RT, branches_RT, shared_keys=False)
    heads, rows = spec(("batch", None, "heads", None)), spec(("batch", None))
    keys = fitted(("batch", None, "kv_heads", None), k_RTKH.shape, mesh)
    on_each = jax.shard_map(
        functools.partial(local, shared_keys=keys != heads),
        in_specs=(heads, keys, keys, rows, rows),
        out_specs=heads,
        check_vma=False,  # a kernel does not tell
    )
    return on_each(q_RTNH, k_RTKH, v_RTKH, groups_RT, branches_RT)


def _local(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    groups_RT: jax.Array,
    branches_RT: jax.Array,
    *,
    queries_per_key: int,
    shared_keys: bool,
    score_cap: float | None,
    interpret: bool,
) -> jax.Array:
    """One device's rows and heads; with `shared_keys` it has all keys' heads and takes its one."""
    R, T, N, H = q_RTNH.shape
    if shared_keys:
        first = jax.lax.axis_index(str(TRAIN_RULES["heads"])) * N // queries_per_key
        k_RTKH, v_RTKH = (
            jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k_RTKH, v_RTKH)
        )
    K = k_RTKH.shape[2]
    pad = -T % _LANES
    q_RTNH, k_RTKH, v_RTKH, groups_RT, branches_RT = (
        jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        for x in (q_RTNH * H**-0.5, k_RTKH, v_RTKH, groups_RT, branches_RT)
    )
    q_RKnTH = jnp.moveaxis(q_RTNH.reshape(R, T + pad, K, N // K, H), 1, 3)
    k_RKSH, v_RKSH = (jnp.moveaxis(jnp.concatenate([x, x], axis=1), 1, 2) for x in (k_RTKH, v_RTKH))
    kernel = _kernel(T + pad, N // K, score_cap=score_cap, interpret=interpret)

    def row(q_KnTH: Any, k_KSH: Any, v_KSH: Any, groups_T: Any, branches_T: Any) -> Any:
        segments = kernels.SegmentIds(
            q=groups_T,
            kv=jnp.concatenate(
                [
                    jnp.where((groups_T > 0) & (branches_T == 0), groups_T, -1),
                    jnp.where((groups_T > 0) & (branches_T > 0), groups_T, -1),
                ]
            ),
        )
        numbered = _with_numbers(kernel, _numbers(groups_T, branches_T))
        return jax.vmap(numbered, (0, 0, 0, None))(q_KnTH, k_KSH, v_KSH, segments)

    mixed_RKnTH = jax.vmap(row)(q_RKnTH, k_RKSH, v_RKSH, groups_RT, branches_RT)
    return jnp.moveaxis(mixed_RKnTH, 3, 1).reshape(R, T + pad, N, H)[:, :T]


def _numbers(groups_T: jax.Array, branches_T: jax.Array) -> jax.Array:
    """int32 of each query: its place, and in the lower bits where its branch begins."""
    place_T = jnp.arange(len(groups_T), dtype=jnp.int32)
    new_T = (jnp.diff(groups_T, prepend=-1) != 0) | (jnp.diff(branches_T, prepend=-1) != 0)
    return place_T << _BITS | jax.lax.cummax(jnp.where(new_T, place_T, 0))


@functools.cache
def _sees(T: int) -> Callable[[Any, Any], Any]:
    """(queries' numbers, places of keys) -> bool; see the head of this file."""

    def sees(number: Any, key: Any) -> Any:
        completions = key >= T
        place = jnp.where(completions, key - T, key)
        first = jnp.where(completions, number & LONGEST, 0)
        return (first <= place) & (place <= number >> _BITS)

    return sees


class _TwiceCausal(masks._ComputableMask):
    """[T, 2T]: all a tree can allow, from which the kernel sees which blocks to skip."""

    def __init__(self, T: int):
        super().__init__((T, 2 * T), lambda q, key: key % T <= q)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TwiceCausal) and self.shape == other.shape

    def __hash__(self) -> int:
        return hash((type(self), self.shape))


def _kernel(
    T: int, heads: int, *, score_cap: float | None, interpret: bool
) -> kernels.SplashAttentionKernel:
    block = next(size for size in (512, 256, _LANES) if T % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([_TwiceCausal(T)] * heads),
        block_sizes=sizes,
        # What the backward pass needs of the forward one is kept where attention outputs are.
        residual_checkpoint_name="attn_out",
        attn_logits_soft_cap=score_cap,
        interpret=interpret,
    )


def _with_numbers(
    kernel: kernels.SplashAttentionKernel, numbers_T: jax.Array
) -> kernels.SplashAttentionKernel:
    """The kernel with other numbers for its queries than their places."""
    found: Any = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    infos = [info._replace(q_sequence=numbers_T) for info in found]
    settings = kernel.kwargs | {"mask_function": _sees(len(numbers_T))}
    return kernels.SplashAttentionKernel(*infos, **settings)
