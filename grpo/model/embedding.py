"""Token embeddings of a table that is split both ways, without gathering the table."""

from functools import partial

import jax
import jax.numpy as jnp

from grpo.sharding import TRAIN_RULES, spec

_FSDP, _TENSOR = str(TRAIN_RULES["embed"]), str(TRAIN_RULES["vocab"])


def embed_tokens(embed_VD: jax.Array, tokens_RT: jax.Array, dtype: str) -> jax.Array:
    """Rows [R, T, D] of the table, in `dtype`.

    Each device looks up the tokens of all its `fsdp` peers in its own part of the table and sends
    the peers their rows. So activations travel, not the table, and the table's gradient is made
    where it belongs. (Left to XLA, a table split over both axes is copied whole to every device.)

    Args:
      embed_VD: the train form's table, split over `tensor` and `fsdp` where there is a mesh.
      tokens_RT: int32 ids, rows split over the mesh's batch axes, which must divide R.
      dtype: of the result; cast behind the look-up, so that the gradient adds up in float32.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return embed_VD[tokens_RT].astype(dtype)
    look_up = jax.shard_map(
        partial(_look_up, dtype=dtype),
        in_specs=(spec(("vocab", "embed")), spec(("batch", None))),
        out_specs=spec(("batch", None, None)),
    )
    return look_up(embed_VD, tokens_RT)


def _look_up(embed_vd: jax.Array, tokens_rT: jax.Array, *, dtype: str) -> jax.Array:
    """One device's part: [v, d] of the table and r rows of tokens -> [r, T, D]."""
    tokens_RT = jax.lax.all_gather(tokens_rT, _FSDP, tiled=True)
    row_RT = tokens_RT - jax.lax.axis_index(_TENSOR) * len(embed_vd)
    mine_RT = (row_RT >= 0) & (row_RT < len(embed_vd))
    found_RTd = embed_vd[jnp.where(mine_RT, row_RT, 0)].astype(dtype)
    found_RTd = jax.lax.psum(jnp.where(mine_RT[..., None], found_RTd, 0), _TENSOR)
    return jax.lax.all_to_all(found_RTd, _FSDP, split_axis=0, concat_axis=2, tiled=True)
