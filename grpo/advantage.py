"""How much better each completion did than others: one small function an estimator.

Every estimator is `(scores, **numbers) -> float32 [P, G]`, pure numpy on the host, float64 inside.
All keep the same promises: an invalid completion is 0 and is not averaged over; a group whose
rewards are all equal, or with fewer than two valid completions, is exactly 0. That is decided on
the rewards: in float32 six rewards of 0.3 have a deviation of 3e-8, and dividing by it would turn
rounding into advantages near 1.

Keyword-only numbers have the names of fields of `grpo.config.AlgoConfig`, which fills them in.
"""

import dataclasses

import numpy as np

from grpo.structs import Scores

_EPS = 1e-6  # added to deviations; peers use 1e-4 to 1e-8


def grpo(scores: Scores) -> np.ndarray:
    """A = (r - mean_G r) / (std_G r + 1e-6), with the population deviation.

    The division favours problems the policy nearly always, or nearly never, solves.

    Source: arXiv:2402.03300, section 4.1.2.
    """
    centred_PG = _centred(scores.reward_PG, scores.valid_PG)
    return _float32(_over_group_std(centred_PG, scores.valid_PG))


def dr_grpo(scores: Scores) -> np.ndarray:
    """A = r - mean_G r: GRPO done right, without the deviation.

    Unbiased up to the constant (G - 1) / G, as each reward is in its own baseline.

    Source: arXiv:2503.20783, section 3.2.
    """
    return _float32(_centred(scores.reward_PG, scores.valid_PG))


def rloo(scores: Scores) -> np.ndarray:
    """A = r - mean of the *other* valid rewards of the group (leave one out): unbiased.

    With n valid completions it is n / (n - 1) times the centred reward.

    Source: arXiv:2402.14740, section 2.2.
    """
    count_P1 = _counts(scores.valid_PG)
    centred_PG = _centred(scores.reward_PG, scores.valid_PG)
    return _float32(centred_PG * count_P1 / np.maximum(count_P1 - 1, 1))


def reinforce_pp(scores: Scores) -> np.ndarray:
    """A = (r - mean_G r) / (std of that over the batch + 1e-6).

    This is the variant with a group baseline ("REINFORCE++-baseline"). The plain one, made for one
    completion a problem, has no group mean. The deviation runs over the completions of the whole
    batch that have others to be compared with, flat groups included: it says how much there is to
    learn in this batch, the same for every problem.

    Source: arXiv:2501.03262, section 3.
    """
    centred_PG = _centred(scores.reward_PG, scores.valid_PG)
    return _float32(_over_batch_std(centred_PG, scores.valid_PG))


def maxrl(scores: Scores) -> np.ndarray:
    """A = (r - mean_G r) / mean_G r: climbs the log-likelihood of success, not its probability.

    For rewards of 0 and 1 and success probability p, the mean of A_i S_i over the group (S the
    gradient of log pi) is in expectation the gradient of the truncated Maclaurin series of log p,
    -sum_{k=1..G-1} (1 - p)^k / k. Its first term is plain reinforcement learning; with growing G a
    problem weighs 1 / p. (The paper's mean over successes alone reaches k = G; the baseline, left
    out with the groups that have no success, costs the last term.) Rewards between 0 and 1 count
    as partial successes.

    Raises:
      ValueError: a negative reward; the mean is then no probability and may even be 0.

    Source: arXiv:2602.02710.
    """
    lowest = np.min(scores.reward_PG, where=scores.valid_PG, initial=0.0)
    if lowest < 0:
        raise ValueError(
            f"advantage.maxrl needs rewards of at least 0, got {lowest:g}; take another advantage "
            "or leave out what subtracts points (negative weights, overlong_buffer_tokens, "
            "kl_in_reward)"
        )
    centred_PG = _centred(scores.reward_PG, scores.valid_PG)
    total_P1 = np.sum(scores.reward_PG, 1, np.float64, keepdims=True, where=scores.valid_PG)
    mean_P1 = total_P1 / _counts(scores.valid_PG)
    return _float32(centred_PG / np.where(mean_P1 > 0, mean_P1, 1.0))


def pass_at_k(scores: Scores, *, pass_k: int) -> np.ndarray:
    """Policy gradient of pass@k, or of the best reward among k when rewards are not 0 or 1.

    A_i = mean over the k-subsets that hold i of their best reward - mean over those that do not.
    The second mean is a baseline that does not depend on completion i, so the estimate is
    unbiased: the mean of A_i S_i over the group is the gradient of max@k, divided by k. With k = 1
    it is `rloo`. As each k-subset of all n completions either holds i or not, A_i is also
    n / k * (M - M_i), with M and M_i the estimates of max@k with and without completion i.

    Groups with fewer than k wrong completions are 0 too: whichever are drawn, one is right.
    Groups with at most k valid completions are 0.

    Args:
      scores: any finite rewards.
      pass_k: k; less than G.

    Raises:
      ValueError: not 1 <= pass_k < G.

    Source: arXiv:2505.15201 (PKPO), the leave-one-out baseline s^(loo); pass@k: arXiv:2107.03374.
    """
    P, G = scores.reward_PG.shape
    if not 1 <= pass_k < G:
        raise ValueError(f"pass_k must be from 1 to group_size - 1 ({G - 1}), got {pass_k}")
    advantage_PG = np.zeros((P, G))
    for p in np.flatnonzero(has_signal(scores.reward_PG, scores.valid_PG)):
        valid_G = scores.valid_PG[p]
        advantage_PG[p, valid_G] = _best_of_k_advantage(scores.reward_PG[p, valid_G], pass_k)
    return _float32(advantage_PG)


def gdpo(scores: Scores) -> np.ndarray:
    """Every component normalised in its group by itself, added up with its weight, rescaled.

    A = sum_n w_n (r_n - mean_G r_n) / (std_G r_n + 1e-6), divided by its deviation over the batch
    (its batch mean is 0 already). Adding the rewards first, as all others do, lets different
    combinations of components collapse into the same advantage. A component that is flat in a
    group adds exactly 0; so a group teaches as long as any component does, even where
    `has_signal` of the summed reward says no.

    Source: arXiv:2601.05242, section 3.
    """
    valid_PG = scores.valid_PG
    summed_PG = np.zeros(valid_PG.shape)
    for name, component_PG in scores.components.items():
        normalised_PG = _over_group_std(_centred(component_PG, valid_PG), valid_PG)
        summed_PG += scores.weights[name] * normalised_PG
    return _float32(_over_batch_std(summed_PG, valid_PG))


def has_signal(reward_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    """bool [P]: the valid rewards of the group are not all equal, so it teaches something."""
    low_P = np.min(reward_PG, axis=1, where=valid_PG, initial=np.inf)
    high_P = np.max(reward_PG, axis=1, where=valid_PG, initial=-np.inf)
    return high_P > low_P


# ---- what changes rewards before they are compared -------------------------------------------


def with_component(scores: Scores, name: str, points_PG: np.ndarray, weight: float) -> Scores:
    """The scores with one more component: the reward grows by weight * points.

    Raises:
      ValueError: there is a component of this name, or a valid completion's points are not finite.
    """
    if name in scores.components:
        raise ValueError(f"there is already a reward component {name!r}; rename the function")
    if not np.isfinite(points_PG[scores.valid_PG]).all():
        raise ValueError(f"reward component {name!r} is not finite")
    added_PG = np.where(scores.valid_PG, points_PG, 0.0)
    return dataclasses.replace(
        scores,
        reward_PG=(scores.reward_PG + weight * added_PG).astype(np.float32),
        components={**scores.components, name: added_PG.astype(np.float32)},
        weights={**scores.weights, name: weight},
    )


def penalised(scores: Scores, kl_PG: np.ndarray, kl_coef: float) -> Scores:
    """KL to the reference in the reward: r - kl_coef * sum_t (log pi_old - log pi_ref).

    The place for k1: as part of the reward its policy gradient is that of the KL of whole
    completions, which as a loss it is not (`grpo.loss.k1`). No two completions then have quite the
    same reward; with `advantage.grpo`, whose groups all get deviation 1, a group that is flat but
    for the KL teaches the KL alone, however small `kl_coef` is. `dr_grpo` and `rloo` keep scale.

    Args:
      scores: as the rules gave them.
      kl_PG: nats, summed over each completion's tokens; log-probs of the policy that sampled.
      kl_coef: points a nat.

    Source: arXiv:2402.14740, section 2; arXiv:2501.03262, equation 4.
    """
    return with_component(scores, "kl_ref", kl_PG, -kl_coef)


def overlong_penalty(length: np.ndarray, max_new: int, buffer: int, penalty: float) -> np.ndarray:
    """Points lost by completions that come close to the limit: from 0 down to -penalty.

    0 up to max_new - buffer tokens, then falling linearly, -penalty at max_new tokens.

    Args:
      length: tokens (not characters) of each completion; any shape.
      max_new: most tokens a completion may have.
      buffer: how many tokens before the limit it begins.
      penalty: points at the limit.

    Raises:
      ValueError: not 1 <= buffer <= max_new.

    Source: DAPO, arXiv:2503.14476, equation 13.
    """
    if not 1 <= buffer <= max_new:
        raise ValueError(
            f"overlong_buffer_tokens must be from 1 to max_new_tokens ({max_new}), got {buffer}"
        )
    inside = np.clip(np.asarray(length) - (max_new - buffer), 0, buffer)
    return (-penalty * inside / buffer).astype(np.float32)


# ---- parts -----------------------------------------------------------------------------------


def _counts(valid_PG: np.ndarray) -> np.ndarray:
    return np.maximum(valid_PG.sum(axis=1, keepdims=True), 1)


def _centred(value_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    """Value minus its group's mean, float64; exactly 0 where invalid and in flat groups."""
    if value_PG.shape[1] < 2:
        raise ValueError(f"group_size must be at least 2, got {value_PG.shape[1]}")
    value_PG = np.where(valid_PG, value_PG, 0.0).astype(np.float64)
    mean_P1 = value_PG.sum(axis=1, keepdims=True) / _counts(valid_PG)
    teaches_PG = valid_PG & has_signal(value_PG, valid_PG)[:, None]
    return np.where(teaches_PG, value_PG - mean_P1, 0.0)


def _over_group_std(centred_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    variance_P1 = (centred_PG**2).sum(axis=1, keepdims=True) / _counts(valid_PG)
    return centred_PG / (np.sqrt(variance_P1) + _EPS)


def _over_batch_std(centred_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    compared_PG = valid_PG & (valid_PG.sum(axis=1, keepdims=True) >= 2)
    variance = (centred_PG**2).sum() / max(int(compared_PG.sum()), 1)
    return centred_PG / (np.sqrt(variance) + _EPS)


def _best_of_k_weights(n: int, k: int) -> np.ndarray:
    """Chance that the j-th smallest of n is the best of a random k-subset: C(j-1, k-1) / C(n, k).

    As a product from the largest down, which no binomial can overflow; exactly 0 for j < k.
    """
    j = np.arange(n, 1, -1)
    steps = np.maximum(j - k, 0) / (j - 1)
    return np.cumprod(np.concatenate([[min(k / n, 1.0)], steps]))[::-1]


def _best_of_k_advantage(reward_G: np.ndarray, k: int) -> np.ndarray:
    """n / k * (best of k among all - best of k among the others), for each of n rewards."""
    n = len(reward_G)
    if n <= k:
        return np.zeros(n)
    order = np.argsort(reward_G, kind="stable")
    # Below the best: what no k-subset can miss is then exactly 0, not nearly.
    below_n = reward_G[order].astype(np.float64) - reward_G.max()
    everyone = _best_of_k_weights(n, k) @ below_n
    weights = _best_of_k_weights(n - 1, k)
    smaller = np.concatenate([[0.0], np.cumsum(weights * below_n[:-1])])  # those ranked before i
    larger = np.cumsum((weights * below_n[1:])[::-1])[::-1]  # those after i, each a rank lower
    others_n = smaller + np.concatenate([larger, [0.0]])
    advantage_G = np.empty(n)
    advantage_G[order] = n / k * (everyone - others_n)
    return advantage_G


def _float32(advantage_PG: np.ndarray) -> np.ndarray:
    return advantage_PG.astype(np.float32)
