"""Numbers for held-out problems: pass@k, avg@k, majority vote, and how sure they are."""

import collections
import itertools
import math
from collections.abc import Sequence

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k samples is right, estimated without bias from n >= k.

    1 - C(n - c, k) / C(n, k): the share of all k-subsets of the n samples that hold a right one.
    Written as 1 - prod_{i = n-c+1..n} (1 - k / i), which no binomial can overflow. (The tempting
    1 - (1 - c/n)^k is biased: for n = 2, c = 1, k = 2 it says 3/4.)

    Args:
      num_samples: n, completions of one problem.
      num_correct: c, right ones among them.
      k: how many tries are allowed.

    Raises:
      ValueError: not 1 <= k <= n or not 0 <= c <= n.

    Source: arXiv:2107.03374, equation 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be from 1 to num_samples ({num_samples}), got {k}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be from 0 to {num_samples}, got {num_correct}")
    if num_samples - num_correct < k:  # too few wrong ones to fill k places
        return 1.0
    i = np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / i))


def avg_at_k(correct: Sequence[bool]) -> float:
    """Share of the k samples of a problem that are right: pass@1 measured k times.

    Raises:
      ValueError: no samples.
    """
    if not len(correct):
        raise ValueError("avg@k needs at least one sample")
    return float(np.mean(np.asarray(correct, np.float64)))


def majority_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer of one problem is right (maj@k, self-consistency).

    A tie is decided by a fair draw, and this is its expectation: the mean over the tied answers.
    A sample without an answer (None) has no vote; if none has one, the score is the mean over
    all samples. An answer that the verifier judged both ways counts as its mean.

    Args:
      answers: what was extracted from each sample, normalised so that equal means equal.
      correct: the verifier's word on each sample.

    Raises:
      ValueError: no samples, or lists of different lengths.

    Source: arXiv:2203.11171.
    """
    if not answers or len(answers) != len(correct):
        raise ValueError(f"got {len(answers)} answers and {len(correct)} verdicts")
    verdicts: dict[str, list[bool]] = collections.defaultdict(list)
    for answer, verdict in zip(answers, correct, strict=True):
        if answer is not None:
            verdicts[answer].append(verdict)
    if not verdicts:
        return avg_at_k(correct)
    most = max(len(votes) for votes in verdicts.values())
    return float(np.mean([np.mean(v) for v in verdicts.values() if len(v) == most]))


def majority_at_k(
    answers: Sequence[str | None],
    correct: Sequence[bool],
    k: int,
    subsets: int = 500,
    seed: int = 0,
) -> float:
    """maj@k of one problem, estimated without bias from n >= k samples.

    The mean of `majority_correct` over the k-subsets of the samples: over all of them if they are
    no more than `subsets`, else over so many drawn at random.

    Args:
      answers: as in `majority_correct`.
      correct: likewise.
      k: how many samples vote.
      subsets: most that are looked at.
      seed: of the draws; the same seed gives the same estimate.

    Raises:
      ValueError: not 1 <= k <= n, or lists of different lengths.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of samples ({n}), got {k}")
    if n != len(correct):
        raise ValueError(f"got {n} answers and {len(correct)} verdicts")
    chosen: Sequence[Sequence[int]]
    if math.comb(n, k) <= subsets:
        chosen = list(itertools.combinations(range(n), k))
    else:
        rng = np.random.default_rng(seed)
        chosen = [rng.choice(n, k, replace=False).tolist() for _ in range(subsets)]
    votes = [majority_correct([answers[i] for i in s], [correct[i] for i in s]) for s in chosen]
    return float(np.mean(votes))


def bootstrap_interval(
    values_per_problem: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems.

    Problems are drawn, not samples: the samples of one problem are not independent, and counting
    them as if they were makes the interval too narrow.

    Args:
      values_per_problem: one number a problem, for example its pass@1.
      confidence: probability mass inside the interval.
      resamples: number of bootstrap draws.
      seed: of the draws; the same seed gives the same interval.

    Raises:
      ValueError: no problems, a value that is not finite, or confidence outside (0, 1).
    """
    values_P = np.asarray(values_per_problem, np.float64)
    if values_P.size == 0 or not np.all(np.isfinite(values_P)):
        raise ValueError("bootstrap needs at least one problem, and finite values only")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    rng = np.random.default_rng(seed)
    # One resample at a time: all at once would be resamples x P indices, gigabytes for a big set.
    means = [rng.choice(values_P, values_P.size).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
