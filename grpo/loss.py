"""The objective, as pure functions of log-probabilities. No model, no mesh, no tokenizer here.

A loss is put together from small functions, each chosen by naming it in the experiment:

  objective   (log_ratio_RC, batch) -> points a token, to be maximised
  aggregate   (batch, totals) -> how much each token counts in the sum
  correction  (log_gap_RC, batch) -> importance weight of sampler against trainer
  kl          (logprobs_RC, ref_logprobs_RC) -> nats a token

Their keyword-only numbers have the names of fields of the configuration, which fills them in
(`grpo.config.bind`). Every loss is a sum over trained tokens, already divided by counts of the
*whole* minibatch (`Totals`): microbatches, padding, packing and sharding then change nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo.structs import Batch, Comparison, Mean, Totals

Means = dict[str, Mean]
Maxima = dict[str, jax.Array]
Objective = Callable[[jax.Array, Batch], jax.Array]
Aggregate = Callable[[Batch, Totals], jax.Array]
Correction = Callable[[jax.Array, Batch], jax.Array]
Divergence = Callable[[jax.Array, jax.Array], jax.Array]

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: finite in float32, and far beyond any clip

# Bins of `policy/ratio_share`: below the first, between neighbours (lower edge included), from the
# last on. Ratios in the middle bin have not moved.
RATIO_EDGES = (0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.25, 2.0)


def sum_by_sequence(x_RC: jax.Array, batch: Batch) -> jax.Array:
    """At each trained token, the sum of x over the trained tokens of its completion; else 0."""

    def one_row(x_C: jax.Array, sequences_C: jax.Array) -> jax.Array:
        sums_C = jax.ops.segment_sum(x_C, sequences_C, num_segments=len(x_C))
        return jnp.take_along_axis(sums_C, sequences_C, axis=0)

    # Masked slots name sequence 0, or nothing in particular: they bring 0 and take 0.
    sequences_RC = jnp.where(batch.mask_RC, batch.sequences_RC, 0)
    sums_RC = jax.vmap(one_row)(jnp.where(batch.mask_RC, x_RC, 0), sequences_RC)
    return jnp.where(batch.mask_RC, sums_RC, 0)


def mean_by_sequence(x_RC: jax.Array, batch: Batch) -> jax.Array:
    """At each trained token, the mean of x over the trained tokens of its completion; else 0."""
    return sum_by_sequence(x_RC, batch) / _trained_lengths(batch)


def _trained_lengths(batch: Batch) -> jax.Array:
    return jnp.maximum(sum_by_sequence(batch.mask_RC.astype(jnp.float32), batch), 1.0)


# ---- objectives ------------------------------------------------------------------------------
# log_ratio_RC = log pi - log pi_old, within +-MAX_LOG_RATIO, 0 where masked; it carries the
# gradient. At ratio 1 each of them has the slope A, the plain policy gradient.


def policy_gradient(log_ratio_RC: jax.Array, batch: Batch) -> jax.Array:
    """A * log ratio: its gradient is REINFORCE's, A * grad log pi, whatever the ratio.

    Source: Williams, Machine Learning 8 (1992), theorem 1.
    """
    return batch.advantage_RC * log_ratio_RC


def clipped(
    log_ratio_RC: jax.Array, batch: Batch, *, clip_low: float, clip_high: float
) -> jax.Array:
    """min(ratio * A, clip(ratio, 1 - low, 1 + high) * A).

    Source: PPO, arXiv:1707.06347, eq. 7; separate low and high: DAPO, arXiv:2503.14476, eq. 10.
    """
    return _clipped_surrogate(log_ratio_RC, batch.advantage_RC, clip_low, clip_high)


def dual_clipped(
    log_ratio_RC: jax.Array, batch: Batch, *, clip_low: float, clip_high: float, dual_clip: float
) -> jax.Array:
    """`clipped`, and where A < 0 never below dual_clip * A.

    A bad token whose ratio has grown without bound would otherwise dominate the batch.

    Args:
      log_ratio_RC: see above.
      batch: advantages.
      clip_low: how far the ratio may fall below 1 before it stops paying.
      clip_high: how far above.
      dual_clip: greater than 1 + clip_high; the ratio from which a bad token has no gradient.

    Source: arXiv:1912.09729, eq. 5.
    """
    objective_RC = clipped(log_ratio_RC, batch, clip_low=clip_low, clip_high=clip_high)
    floor_RC = dual_clip * batch.advantage_RC
    return jnp.where(batch.advantage_RC < 0, jnp.maximum(objective_RC, floor_RC), objective_RC)


def gspo(log_ratio_RC: jax.Array, batch: Batch, *, clip_low: float, clip_high: float) -> jax.Array:
    """`clipped`, with one ratio a completion: the geometric mean of its tokens' ratios.

    Every token of the completion holds the same value, so that `by_sequence` counts it once. A
    geometric mean moves far less than a token's ratio: useful clips are near 3e-4.

    Source: arXiv:2507.18071, eq. 5 to 7.
    """
    log_ratio_RC = mean_by_sequence(log_ratio_RC, batch)
    return _clipped_surrogate(log_ratio_RC, batch.advantage_RC, clip_low, clip_high)


def gspo_token(
    log_ratio_RC: jax.Array, batch: Batch, *, clip_low: float, clip_high: float
) -> jax.Array:
    """GSPO with a gradient a token: the value of the completion's ratio, the slope of the token's.

    Equal to `gspo` in value and gradient while all tokens of a completion share their advantage;
    this form also allows advantages that differ.

    Source: arXiv:2507.18071, eq. 13 and 14.
    """
    sequence_RC = jax.lax.stop_gradient(mean_by_sequence(log_ratio_RC, batch))
    log_ratio_RC = sequence_RC + log_ratio_RC - jax.lax.stop_gradient(log_ratio_RC)
    return _clipped_surrogate(log_ratio_RC, batch.advantage_RC, clip_low, clip_high)


def gmpo(log_ratio_RC: jax.Array, batch: Batch, *, clip_low: float, clip_high: float) -> jax.Array:
    """A * geometric mean over the completion of its tokens' clipped ratios.

    Tokens are clipped one by one, pessimistically as in PPO, but in log space: the ratio stays in
    [exp(-clip_low), exp(clip_high)]. Made for `by_sequence`, as `gspo` is.

    Source: arXiv:2507.20673, section 3; the paper clips at 0.4.
    """
    sign_RC = jnp.sign(batch.advantage_RC)
    clipped_RC = jnp.clip(log_ratio_RC, -clip_low, clip_high)
    log_ratio_RC = sign_RC * jnp.minimum(sign_RC * log_ratio_RC, sign_RC * clipped_RC)
    return batch.advantage_RC * jnp.exp(mean_by_sequence(log_ratio_RC, batch))


def cispo(log_ratio_RC: jax.Array, batch: Batch, *, clip_high: float) -> jax.Array:
    """min(ratio, 1 + high), without gradient, * A * log ratio: clips the weight, not the token.

    No token ever loses its gradient. There is no lower bound, as in the paper's runs.

    Source: MiniMax-M1, arXiv:2506.13585, eq. 4 and 5.
    """
    weight_RC = jnp.minimum(jnp.exp(log_ratio_RC), 1.0 + clip_high)
    return jax.lax.stop_gradient(weight_RC) * batch.advantage_RC * log_ratio_RC


def sapo(
    log_ratio_RC: jax.Array,
    batch: Batch,
    *,
    sapo_temperature_positive: float,
    sapo_temperature_negative: float,
) -> jax.Array:
    """A * 4 / tau * sigmoid(tau * (ratio - 1)): a soft gate in place of the clip.

    tau is `sapo_temperature_positive` where A > 0, else `sapo_temperature_negative`; higher closes
    the gate sooner.

    Source: arXiv:2511.20347, section 3.
    """
    positive_RC = batch.advantage_RC > 0
    tau_RC = jnp.where(positive_RC, sapo_temperature_positive, sapo_temperature_negative)
    gate_RC = 4.0 / tau_RC * jax.nn.sigmoid(tau_RC * jnp.expm1(log_ratio_RC))
    return batch.advantage_RC * gate_RC


def _clipped_surrogate(
    log_ratio_RC: jax.Array, advantage_RC: jax.Array, clip_low: float, clip_high: float
) -> jax.Array:
    ratio_RC = jnp.exp(log_ratio_RC)
    clipped_RC = jnp.clip(ratio_RC, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.minimum(ratio_RC * advantage_RC, clipped_RC * advantage_RC)


# ---- aggregation -----------------------------------------------------------------------------


def by_token(batch: Batch, totals: Totals) -> jax.Array:
    """1 / tokens: every token of the minibatch counts the same.

    Source: DAPO, arXiv:2503.14476, eq. 8.
    """
    return batch.mask_RC / jnp.maximum(totals.tokens, 1.0)


def by_sequence(batch: Batch, totals: Totals) -> jax.Array:
    """1 / (length * sequences): every completion counts the same, its tokens share that.

    The length is that of the trained tokens. Long wrong completions are punished less a token:
    Dr. GRPO's objection.

    Source: GRPO, arXiv:2402.03300, eq. 3.
    """
    return batch.mask_RC / (_trained_lengths(batch) * jnp.maximum(totals.sequences, 1.0))


def by_length(batch: Batch, totals: Totals, *, max_new_tokens: int) -> jax.Array:
    """1 / (sequences * max_new_tokens): a constant, so that no length is favoured.

    Source: Dr. GRPO, arXiv:2503.20783, section 3.2 and listing 1.
    """
    return batch.mask_RC / (jnp.maximum(totals.sequences, 1.0) * max_new_tokens)


# ---- correction of the gap between sampler and trainer ---------------------------------------
# log_gap_RC = log pi_old - log pi_sampler, within +-MAX_LOG_RATIO, 0 where masked, no gradient.
# Dropped tokens stay in the denominators: they are counted in `Totals` before anything is dropped.


def uncorrected(log_gap_RC: jax.Array, batch: Batch) -> jax.Array:
    """1: the sampler is taken at its word. `grpo_loss` knows it and computes nothing."""
    return jnp.ones_like(log_gap_RC)


def truncated(log_gap_RC: jax.Array, batch: Batch, *, correction_cap: float) -> jax.Array:
    """min(pi_old / pi_sampler, cap): token-level truncated importance sampling.

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training"
    (2025), eq. 5; Ionides, "Truncated importance sampling" (2008).
    """
    return jnp.minimum(jnp.exp(log_gap_RC), correction_cap)


def icepop(
    log_gap_RC: jax.Array, batch: Batch, *, correction_low: float, correction_high: float
) -> jax.Array:
    """pi_old / pi_sampler where it lies in [low, high], else 0: the token is dropped.

    Source: Ling team, "Small leak can sink a great ship: IcePop" (2025), bounds 0.5 and 5.
    """
    ratio_RC = jnp.exp(log_gap_RC)
    inside_RC = (ratio_RC >= correction_low) & (ratio_RC <= correction_high)
    return jnp.where(inside_RC, ratio_RC, 0.0)


def masked_sequences(
    log_gap_RC: jax.Array, batch: Batch, *, correction_cap: float, sequence_gap_max: float
) -> jax.Array:
    """`truncated`, without the completions whose geometric mean ratio is too far from 1.

    A completion is dropped whole where |mean_t log(pi_old / pi_sampler)| > sequence_gap_max. The
    mean, unlike the product over tokens, does not grow with length; in expectation it is minus
    the KL of sampler and trainer a token.

    Source: Li et al., "When speed kills stability: demystifying RL collapse from the
    training-inference mismatch" (2025), geometric sequence rejection with token-level truncation.
    """
    kept_RC = jnp.abs(mean_by_sequence(log_gap_RC, batch)) <= sequence_gap_max
    return jnp.where(kept_RC, truncated(log_gap_RC, batch, correction_cap=correction_cap), 0.0)


# ---- KL to the reference ---------------------------------------------------------------------
# Estimates of KL(pi || ref) from tokens that pi sampled. Unbiased values need not have useful
# gradients: the notes say which way each pulls when it is a loss on the policy's own tokens.


def k1(logprobs_RC: jax.Array, ref_logprobs_RC: jax.Array) -> jax.Array:
    """log pi - log ref: unbiased, and useless as a loss, which `check_kl` refuses.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    return logprobs_RC - ref_logprobs_RC


def k2(logprobs_RC: jax.Array, ref_logprobs_RC: jax.Array) -> jax.Array:
    """(log pi - log ref)^2 / 2: a biased value, but the gradient of KL(pi || ref) in expectation.

    Source: http://joschu.net/blog/kl-approx.html.
    """
    return _clamp(logprobs_RC - ref_logprobs_RC) ** 2 / 2


def k3(logprobs_RC: jax.Array, ref_logprobs_RC: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = log ref - log pi: unbiased for KL(pi || ref), never negative.

    Its expected gradient as a loss is that of the other KL, KL(ref || pi).

    Source: http://joschu.net/blog/kl-approx.html; arXiv:2402.03300, eq. 4.
    """
    return _k3_of(_clamp(ref_logprobs_RC - logprobs_RC))


def check_kl(kl: Divergence) -> None:
    """Raises ValueError for k1, whose gradient as a loss is noise."""
    if getattr(kl, "func", kl) is k1:
        raise ValueError(
            "algo.kl is k1, which cannot be a loss: its expected gradient is E[grad log pi] = 0, "
            "whatever the reference. Take k2 or k3, or put the KL into the reward with "
            "algo.kl_in_reward"
        )


def _k3_of(log_ratio_RC: jax.Array) -> jax.Array:
    """q/p - 1 - log q/p, from tokens that p sampled: an unbiased estimate of KL(p || q)."""
    return jnp.expm1(log_ratio_RC) - log_ratio_RC


def _clamp(log_ratio_RC: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio_RC, -MAX_LOG_RATIO, MAX_LOG_RATIO)


# ---- the losses ------------------------------------------------------------------------------


def grpo_loss(
    logprobs_RC: jax.Array,
    entropy_RC: jax.Array,
    batch: Batch,
    totals: Totals,
    *,
    objective: Objective,
    aggregate: Aggregate,
    correction: Correction,
    kl: Divergence,
    kl_coef: float,
    entropy_coef: float,
    on_policy: bool,
) -> tuple[jax.Array, Means, Maxima]:
    """-sum of weight * (correction * objective - kl_coef * KL + entropy_coef * entropy).

    The sum runs over the tokens that train; nothing else is read, whatever stands there.

    Args:
      logprobs_RC: nats, of the policy being trained; carries the gradient.
      entropy_RC: nats, exact; carries the gradient too.
      batch: rows, advantages, masks, old and reference log-probs.
      totals: counts over the whole minibatch, all microbatches and devices.
      objective: one of those above, its numbers bound.
      aggregate: likewise; gives the weight.
      correction: likewise.
      kl: `k2` or `k3`.
      kl_coef: points a nat of KL to the reference; 0 leaves the reference out.
      entropy_coef: points a nat of entropy; 0 only logs it.
      on_policy: the batch gets one update, so the old policy *is* this one and the ratio is 1 by
        construction; `old_logprobs_RC` is not read.

    Returns:
      The loss, metrics as (sum, count) pairs over this call's tokens, and metrics to be maximised.

    Raises:
      ValueError: kl is k1.
    """
    # Masked before, not after: 0 * inf on the way back would be a NaN.
    mask_RC, batch = batch.mask_RC, _without_masked(batch)
    logprobs_RC = jnp.where(mask_RC, logprobs_RC, 0.0)
    entropy_RC = jnp.where(mask_RC, entropy_RC, 0.0)
    fixed_RC = jax.lax.stop_gradient(logprobs_RC)
    old_RC = fixed_RC if on_policy else batch.old_logprobs_RC
    raw_RC, gap_RC = logprobs_RC - old_RC, old_RC - batch.sampler_logprobs_RC
    log_ratio_RC, log_gap_RC = _clamp(raw_RC), _clamp(gap_RC)
    clamped_RC = (raw_RC != log_ratio_RC) | (gap_RC != log_gap_RC)

    objective_RC = objective(log_ratio_RC, batch)
    means = {"policy/objective": _mean(objective_RC, mask_RC)}
    points_RC = objective_RC
    if correction is not uncorrected:
        correction_RC = jax.lax.stop_gradient(correction(log_gap_RC, batch))
        points_RC = points_RC * correction_RC
        plain_RC = jnp.exp(log_gap_RC)
        touched_RC = jnp.abs(correction_RC - plain_RC) > 1e-5 * plain_RC
        means["sampler/corrected_share"] = _mean(touched_RC, mask_RC)
    if kl_coef:
        check_kl(kl)
        kl_RC = kl(logprobs_RC, batch.ref_logprobs_RC)
        points_RC = points_RC - kl_coef * kl_RC
        means["policy/kl_ref_nats"] = _mean(kl_RC, mask_RC)
        clamped_RC |= jnp.abs(fixed_RC - batch.ref_logprobs_RC) > MAX_LOG_RATIO
    if entropy_coef:
        points_RC = points_RC + entropy_coef * entropy_RC
    loss = -jnp.sum(aggregate(batch, totals) * points_RC)

    # Of carried tokens the gap is how far the policy has moved: no fault of the sampler.
    own_RC = mask_RC if batch.carried_RC is None else mask_RC & ~batch.carried_RC
    log_ratio_RC = jax.lax.stop_gradient(log_ratio_RC)
    silent_RC = jnp.zeros_like(mask_RC) if on_policy else _silent(objective, log_ratio_RC, batch)
    means |= _ratio_metrics(log_ratio_RC, silent_RC, batch) | {
        "policy/entropy_nats": _mean(entropy_RC, mask_RC),
        "policy/clamped_share": _mean(clamped_RC, mask_RC),
    }
    gaps, largest = _sampler_gap(gap_RC, own_RC)
    ratio_max = jnp.max(jnp.exp(log_ratio_RC), where=mask_RC, initial=0.0)
    maxima = largest | {"policy/ratio_max": ratio_max}
    return loss, means | gaps, jax.lax.stop_gradient(maxima)


def sft_loss(
    logprobs_RC: jax.Array, entropy_RC: jax.Array, batch: Batch, totals: Totals
) -> tuple[jax.Array, Means, Maxima]:
    """-sum(log pi) / tokens over completion tokens: supervised fine-tuning."""
    mask_RC = batch.mask_RC
    surprise_RC = -jnp.where(mask_RC, logprobs_RC, 0.0)
    means = {
        "sft/loss_nats": _mean(surprise_RC, mask_RC),
        # So certainly the likeliest token.
        "sft/confident": _mean(logprobs_RC > jnp.log(0.5), mask_RC),
        "policy/entropy_nats": _mean(entropy_RC, mask_RC),
    }
    return surprise_RC.sum() / jnp.maximum(totals.tokens, 1.0), means, {}


def distil_loss(
    compared: Comparison, entropy_RC: jax.Array, batch: Batch, totals: Totals
) -> tuple[jax.Array, Means, Maxima]:
    """sum(divergence) / tokens over what the student sampled: on-policy distillation.

    Nothing is differentiated that says how the tokens came about (GKD, arXiv:2306.13649, eq. 2,
    with all of the data from the student).
    """
    mask_RC = batch.mask_RC
    divergence_RC = jnp.where(mask_RC, compared.divergence_RC, 0.0)
    gap_RC = jnp.where(mask_RC, compared.logprobs_RC - batch.sampler_logprobs_RC, 0.0)
    gaps, largest = _sampler_gap(gap_RC, mask_RC)
    means = gaps | {
        "distil/divergence_nats": _mean(divergence_RC, mask_RC),
        "distil/teacher_logprob_nats": _mean(compared.teacher_logprobs_RC, mask_RC),
        "policy/entropy_nats": _mean(entropy_RC, mask_RC),
    }
    return divergence_RC.sum() / jnp.maximum(totals.tokens, 1.0), means, largest


def _sampler_gap(gap_RC: jax.Array, mask_RC: jax.Array) -> tuple[Means, Maxima]:
    """Metrics of log pi_trainer - log pi_sampler, which is 0 where masked."""
    means = {
        "sampler/gap_nats_mean": _mean(jnp.abs(gap_RC), mask_RC),
        "sampler/kl_nats": _mean(_k3_of(_clamp(gap_RC)), mask_RC),
    }
    return means, {"sampler/gap_nats_max": jnp.max(jnp.abs(gap_RC), where=mask_RC, initial=0.0)}


def _without_masked(batch: Batch) -> Batch:
    """Zeros wherever the mask is False."""
    names = (
        "sequences_RC",
        "advantage_RC",
        "old_logprobs_RC",
        "sampler_logprobs_RC",
        "ref_logprobs_RC",
    )
    kept = {name: jnp.where(batch.mask_RC, getattr(batch, name), 0) for name in names}
    return batch.replace(**kept)


def _mean(x_RC: jax.Array, mask_RC: jax.Array) -> Mean:
    return Mean(jnp.sum(x_RC, where=mask_RC), mask_RC.sum())


def _silent(objective: Objective, log_ratio_RC: jax.Array, batch: Batch) -> jax.Array:
    """bool: the objective no longer depends on this token, which is what a clip does to it."""
    slope_RC = jax.grad(lambda x_RC: objective(x_RC, batch).sum())(log_ratio_RC)
    return (slope_RC == 0) & (batch.advantage_RC != 0)


def _ratio_metrics(log_ratio_RC: jax.Array, silent_RC: jax.Array, batch: Batch) -> Means:
    """How far the policy is from the old one; shares are of all trained tokens.

    `clip_low_fraction` are tokens without gradient where A < 0 (the ratio had fallen, or met the
    dual clip), `clip_high_fraction` where A > 0; `clip_fraction` is their sum.
    """
    mask_RC, ratio_RC = batch.mask_RC, jnp.exp(log_ratio_RC)
    count = mask_RC.sum()
    reached_nRC = log_ratio_RC >= jnp.log(jnp.array(RATIO_EDGES))[:, None, None]
    reached_n = jnp.sum(reached_nRC, axis=(1, 2), where=mask_RC)
    at_least = jnp.concatenate([count[None], reached_n, jnp.zeros(1, reached_n.dtype)])
    return {
        "policy/ratio_mean": _mean(ratio_RC, mask_RC),
        "policy/ratio_share": Mean(at_least[:-1] - at_least[1:], count),
        "policy/kl_old_nats": _mean(_k3_of(log_ratio_RC), mask_RC),
        "policy/clip_fraction": _mean(silent_RC, mask_RC),
        "policy/clip_low_fraction": _mean(silent_RC & (batch.advantage_RC < 0), mask_RC),
        "policy/clip_high_fraction": _mean(silent_RC & (batch.advantage_RC > 0), mask_RC),
    }
