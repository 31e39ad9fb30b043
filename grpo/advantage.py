"""How much better each completion did than the others of its group."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def group_advantage(reward_PG: Array, valid_PG: Array, *, scale_by_std: bool) -> jax.Array:
    """A = (r - mean_G r) / (std_G r + 1e-6), the division only if `scale_by_std`.

    Mean and (population) standard deviation run over the valid completions of one problem.

    Args:
      reward_PG: float32 points; row p is one problem's group.
      valid_PG: bool; an invalid completion is neither averaged nor trained on.
      scale_by_std: True is GRPO [1]. False is Dr. GRPO [2], which does not favour problems the
        policy nearly always, or nearly never, solves.

    Returns:
      float32 advantages [P, G]: 0 where invalid, and exactly 0 for a group whose rewards are all
      equal. That is decided on the rewards: in float32 six rewards of 0.3 have a deviation of
      3e-8, and dividing by it would turn rounding into advantages near 1.

    Raises:
      ValueError: G < 2; a group of one has nothing to be compared with.

    Source: [1] arXiv:2402.03300, section 4.1. [2] arXiv:2503.20783.
    """
    if reward_PG.shape[1] < 2:
        raise ValueError(f"group_size must be at least 2, got {reward_PG.shape[1]}")
    count_P1 = jnp.maximum(valid_PG.sum(axis=1, keepdims=True), 1)
    mean_P1 = jnp.sum(reward_PG, axis=1, keepdims=True, where=valid_PG) / count_P1
    advantage_PG = jnp.where(valid_PG, reward_PG - mean_P1, 0.0)
    if scale_by_std:
        variance_P1 = jnp.sum(advantage_PG**2, axis=1, keepdims=True) / count_P1
        advantage_PG = advantage_PG / (jnp.sqrt(variance_P1) + 1e-6)
    return jnp.where(has_signal(reward_PG, valid_PG)[:, None], advantage_PG, 0.0)


def has_signal(reward_PG: Array, valid_PG: Array) -> jax.Array:
    """bool [P]: the valid rewards of the group are not all equal, so it teaches something."""
    low_P = jnp.min(reward_PG, axis=1, where=valid_PG, initial=jnp.inf)
    high_P = jnp.max(reward_PG, axis=1, where=valid_PG, initial=-jnp.inf)
    return high_P > low_P
