"""One token from a distribution: temperature only, one uniform a row, no sort."""

import jax
import jax.numpy as jnp

_BLOCK = 128


def inverse_cdf(probability_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The token at which the running sum of probabilities passes `uniform_B`.

    A two-level prefix sum, blocks first: float32 stays accurate over 150k tokens, and one uniform
    a row replaces V of them (measured 7 ms against 179 ms at B = 64, V = 32k on a CPU). A token of
    probability 0 is never returned.
    """
    B, V = probability_BV.shape
    padded = jnp.pad(probability_BV, ((0, 0), (0, -V % _BLOCK)))
    parts_Bnb = padded.reshape(B, -1, _BLOCK)
    mass_Bn = parts_Bnb.sum(-1)
    reached_Bn = jnp.cumsum(mass_Bn, axis=-1)
    goal_B = uniform_B * reached_Bn[:, -1]
    block_B = _first_beyond(reached_Bn, goal_B, mass_Bn)
    before_Bn = jnp.pad(reached_Bn, ((0, 0), (1, 0)))
    left_B = goal_B - jnp.take_along_axis(before_Bn, block_B[:, None], axis=1)[:, 0]
    part_Bb = jnp.take_along_axis(parts_Bnb, block_B[:, None, None], axis=1)[:, 0]
    within_B = _first_beyond(jnp.cumsum(part_Bb, axis=-1), left_B, part_Bb)
    return (block_B * _BLOCK + within_B).astype(jnp.int32)


def _first_beyond(reached_Bn: jax.Array, goal_B: jax.Array, mass_Bn: jax.Array) -> jax.Array:
    """The first entry of positive mass whose running sum exceeds the goal.

    Rounding may carry the goal past a block's end, where the last possible entry is taken, or
    before its start (XLA fuses u * total - before, so the difference can be negative though the
    rounded product was not less): hence the mass is looked at, not only the sum.
    """
    possible_Bn = mass_Bn > 0
    beyond_Bn = possible_Bn & (reached_Bn > goal_B[:, None])
    last_B = mass_Bn.shape[1] - 1 - jnp.argmax(possible_Bn[:, ::-1], axis=-1)
    return jnp.where(beyond_Bn.any(axis=-1), jnp.argmax(beyond_Bn, axis=-1), last_B)


def sample_token(
    logits_BV: jax.Array, uniform_B: jax.Array, temperature: jax.Array, *, greedy: bool
) -> tuple[jax.Array, jax.Array]:
    """A token a row, and its log-probability (nats) in the distribution it was drawn from.

    Args:
      logits_BV: float32.
      uniform_B: float32 in [0, 1), one random number a row.
      temperature: positive; divides the logits. The log-probability includes it.
      greedy: take the likeliest token instead, whatever the random number.
    """
    scaled_BV = logits_BV / temperature
    normaliser_B = jax.nn.logsumexp(scaled_BV, axis=-1)
    if greedy:
        token_B = jnp.argmax(scaled_BV, axis=-1).astype(jnp.int32)
    else:
        token_B = inverse_cdf(jnp.exp(scaled_BV - normaliser_B[:, None]), uniform_B)
    chosen_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - normaliser_B
