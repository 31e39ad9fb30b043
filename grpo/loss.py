"""The objective, as pure functions of log-probabilities. No model, no mesh, no tokenizer here.

Every loss is a sum over trained tokens, already divided by the number of them in the *whole*
batch: microbatches, padding and sharding then change nothing.
"""

import jax
import jax.numpy as jnp

from grpo.structs import Batch, Mean

Means = dict[str, Mean]
Maxima = dict[str, jax.Array]

_MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: finite in float32, and far beyond any clip


def clipped_objective(
    log_ratio_RC: jax.Array, advantage_RC: jax.Array, clip_low: float, clip_high: float
) -> jax.Array:
    """min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), per token, to be maximised.

    Source: PPO, arXiv:1707.06347, eq. 7; separate low and high: DAPO, arXiv:2503.14476, eq. 10.
    """
    ratio_RC = jnp.exp(jnp.clip(log_ratio_RC, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    clipped_RC = jnp.clip(ratio_RC, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.minimum(ratio_RC * advantage_RC, clipped_RC * advantage_RC)


def kl_k3(logprobs_RC: jax.Array, ref_logprobs_RC: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = log ref - log pi: unbiased for KL(pi || ref), never negative.

    Source: http://joschu.net/blog/kl-approx.html; arXiv:2402.03300, eq. 4.
    """
    difference_RC = jnp.clip(ref_logprobs_RC - logprobs_RC, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.expm1(difference_RC) - difference_RC


def grpo_loss(
    logprobs_RC: jax.Array,
    entropy_RC: jax.Array,
    batch: Batch,
    num_tokens: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    on_policy: bool,
) -> tuple[jax.Array, Means, Maxima]:
    """-sum(clipped objective - kl_coef * KL) / num_tokens, over the tokens that train.

    arXiv:2402.03300, eq. 3, averaged by token over the batch as DAPO does.

    Args:
      logprobs_RC: nats, of the policy being trained; carries the gradient.
      entropy_RC: nats; logged.
      batch: rows, advantages, masks, old and reference log-probs.
      num_tokens: trained tokens of the whole batch, over all microbatches and devices.
      clip_low: how far the ratio may fall below 1 before it stops paying.
      clip_high: how far above.
      kl_coef: weight of the KL to the reference; 0 leaves the reference out.
      on_policy: the batch gets one update, so the old policy *is* this one and the ratio is 1 by
        construction; `old_logprobs_RC` is not read.

    Returns:
      The loss, metrics as (sum, count) pairs over this call's tokens, and metrics to be maximised.
    """
    old_RC = jax.lax.stop_gradient(logprobs_RC) if on_policy else batch.old_logprobs_RC
    log_ratio_RC = jnp.where(batch.mask_RC, logprobs_RC - old_RC, 0.0)
    objective_RC = clipped_objective(log_ratio_RC, batch.advantage_RC, clip_low, clip_high)
    count = batch.mask_RC.sum()

    def mean(x_RC: jax.Array) -> Mean:
        return Mean(jnp.sum(x_RC, where=batch.mask_RC), count)

    outside_RC = jnp.where(
        batch.advantage_RC > 0,
        log_ratio_RC > jnp.log1p(clip_high),
        log_ratio_RC < jnp.log1p(-clip_low),
    )
    gap_RC = jnp.where(batch.mask_RC, jnp.abs(batch.sampler_logprobs_RC - old_RC), 0.0)
    means = {
        "sampler/gap_nats_mean": mean(gap_RC),
        "policy/entropy_nats": mean(entropy_RC),
        "policy/clip_fraction": mean(outside_RC & (batch.advantage_RC != 0)),
        "policy/objective": mean(objective_RC),
    }
    if kl_coef:
        ref_RC = batch.ref_logprobs_RC
        # Masked before, not after: 0 * inf on the way back would be a NaN.
        kl_RC = kl_k3(jnp.where(batch.mask_RC, logprobs_RC, ref_RC), ref_RC)
        objective_RC = objective_RC - kl_coef * kl_RC
        means["policy/kl_ref_nats"] = mean(kl_RC)
    loss = -jnp.sum(objective_RC, where=batch.mask_RC) / num_tokens
    return loss, means, {"sampler/gap_nats_max": gap_RC.max()}


def sft_loss(
    logprobs_RC: jax.Array, entropy_RC: jax.Array, batch: Batch, num_tokens: jax.Array
) -> tuple[jax.Array, Means, Maxima]:
    """-sum(log pi) / num_tokens over completion tokens: supervised fine-tuning."""
    count = batch.mask_RC.sum()
    nats = -jnp.sum(logprobs_RC, where=batch.mask_RC)
    confident_RC = logprobs_RC > jnp.log(0.5)  # so certainly the likeliest token
    means = {
        "sft/loss_nats": Mean(nats, count),
        "sft/confident": Mean(jnp.sum(confident_RC, where=batch.mask_RC), count),
        "policy/entropy_nats": Mean(jnp.sum(entropy_RC, where=batch.mask_RC), count),
    }
    return nats / num_tokens, means, {}
