"""Which attention scores count, and how large they get."""

from typing import Any

import jax
import jax.numpy as jnp


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), which never leaves (-cap, cap) (arXiv:2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def tree_mask(
    groups_RT: jax.Array,
    branches_RT: jax.Array,
    start: int,
    stop: int,
    positions_RT: jax.Array | None = None,
    window: Any = None,
) -> jax.Array:
    """bool [R, stop - start, stop]: which slots before `stop` each slot from `start` on sees.

    A token sees earlier tokens of its own branch and of its group's prompt (branch 0). Slots and
    positions order alike within a branch, so slots give the causal order. With a window it sees
    only those at its own and the `window` - 1 positions before.
    """
    group_Rq1, group_R1s = groups_RT[:, start:stop, None], groups_RT[:, None, :stop]
    branch_Rq1, branch_R1s = branches_RT[:, start:stop, None], branches_RT[:, None, :stop]
    causal_qs = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
    related_Rqs = (branch_R1s == 0) | (branch_R1s == branch_Rq1)
    seen_Rqs = causal_qs & (group_Rq1 == group_R1s) & related_Rqs & (group_Rq1 > 0)
    if window is None or positions_RT is None:
        return seen_Rqs
    return seen_Rqs & within(window, positions_RT[:, start:stop], positions_RT[:, :stop])


def within(window: Any, query_BT: jax.Array, key_BS: jax.Array) -> jax.Array:
    """bool [B, T, S]: whether a key is at most `window` - 1 positions before a query."""
    return query_BT[:, :, None] - key_BS[:, None, :] < window
