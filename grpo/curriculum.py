"""Asking the problems that the policy solves about half of the time: they teach most.

Of 0/1 rewards a group's variance, and with it the expected gradient, is largest where the pass
rate is one half; where it is 0 or 1 there is none. So several problems are considered for each one
asked, in the order of the data set's permutation, and those whose running pass rate is nearest to
one half are taken. Dynamic sampling (`grpo.groups`) throws such groups away after paying for them;
this avoids paying, and both can be on.

The bias: what is maximised is no longer the mean over the data set. Problems in the middle are
asked more often than those the policy nearly always or never solves, so the latter are learnt, and
their forgetting is noticed, later; `reward/...` of a step is that of the chosen problems, and says
little about the data set or about another run: compare runs by their evaluations. The rates are
estimates, of a few samples and of older policies, and choosing by them favours what looked like a
half by chance.

Arrays here are the host's (numpy), and nothing is changed in place.

Source: choosing by the distance to a pass rate of one half is "balanced online difficulty
filtering", arXiv:2504.03380; here with running rates instead of fresh samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_KEEP = 0.7  # of what is known of a problem, each time it is considered: about three askings count
_PRIOR = 0.25  # how many askings the belief in one half counts; a single 0 of G is a rate of 0.1
_FIFTHS = 5


class PassRates(NamedTuple):
    """What is known of each of the U problems: sums over the times it was asked, fading.

    Attributes:
      solved_U: float32, of the shares of completions that were right.
      asked_U: float32, of 1; 0 where a problem was never asked.
    """

    solved_U: np.ndarray
    asked_U: np.ndarray


class Round(NamedTuple):
    """The problems of one draw.

    Attributes:
      considered: indices of all.
      asked: of those chosen.
      share_P: float32, right completions of each one asked; NaN where no verdict was valid.
    """

    considered: Sequence[int]
    asked: Sequence[int]
    share_P: np.ndarray


def unseen(count: int) -> PassRates:
    """Nothing is known of any of `count` problems."""
    return PassRates(np.zeros(count, np.float32), np.zeros(count, np.float32))


def rate(known: PassRates) -> np.ndarray:
    """The running pass rates [U], float32 in (0, 1); one half for a problem never asked."""
    return (known.solved_U + np.float32(0.5 * _PRIOR)) / (known.asked_U + np.float32(_PRIOR))


def choose(known: PassRates | None, considered: Sequence[int], count: int) -> list[int]:
    """The `count` problems whose running rates are nearest to one half, in the order considered.

    Of equally near ones the first are taken. Without rates the first `count` are.
    """
    if known is None:
        return list(considered[:count])
    # |rate - 1/2|, in a form where always right and always wrong are equally far to the last bit.
    away_U = np.abs(known.solved_U - known.asked_U / 2) / (known.asked_U + np.float32(_PRIOR))
    order = np.argsort(away_U[np.asarray(considered)], kind="stable")
    nearest = np.sort(order[:count])
    return [considered[i] for i in nearest]


def solved_share(solved_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    """The share of right ones among each group's valid completions [P]; NaN if it has none."""
    count_P = valid_PG.sum(axis=1)
    right_P = (solved_PG & valid_PG).sum(axis=1)
    return np.where(count_P > 0, right_P / np.maximum(count_P, 1), np.nan).astype(np.float32)


def observed(known: PassRates, seen: Round) -> PassRates:
    """`known` after a round.

    What was known of every considered problem fades, also of those passed over: their rates drift
    back to one half, so that none is given up for good on an answer of long ago.
    """
    solved_U, asked_U = known.solved_U.copy(), known.asked_U.copy()
    considered = np.asarray(seen.considered, int)
    solved_U[considered] *= np.float32(_KEEP)
    asked_U[considered] *= np.float32(_KEEP)
    judged_P = ~np.isnan(seen.share_P)
    asked = np.asarray(seen.asked, int)[judged_P]
    solved_U[asked] += seen.share_P[judged_P]
    asked_U[asked] += 1
    return PassRates(solved_U, asked_U)


def after_step(
    known: PassRates | None, rounds: Sequence[Round]
) -> tuple[PassRates | None, dict[str, float | list[float]]]:
    """What is known after the rounds of a step, and metrics; nothing if there are no rates.

    `curriculum/rate_mean` is the mean running rate of all U problems. `reward/solved_by_rate` has
    five numbers: the mean share solved of this step's problems whose rate before it was in
    [0, 0.2), [0.2, 0.4) and so on; NaN where there was none.
    """
    if known is None:
        return None, {}
    rate_P = np.concatenate([rate(known)[np.asarray(r.asked)] for r in rounds])
    share_P = np.concatenate([r.share_P for r in rounds])
    for seen in rounds:
        known = observed(known, seen)
    return known, {
        "curriculum/rate_mean": float(rate(known).mean()),
        "reward/solved_by_rate": solved_by_rate(rate_P, share_P),
    }


def solved_by_rate(rate_P: np.ndarray, share_P: np.ndarray) -> list[float]:
    """Means of `share_P` in the fifths of `rate_P`; a NaN share does not count."""
    fifth_P = np.minimum((rate_P * _FIFTHS).astype(int), _FIFTHS - 1)
    chosen = [share_P[(fifth_P == n) & ~np.isnan(share_P)] for n in range(_FIFTHS)]
    return [float(shares.mean()) if len(shares) else float("nan") for shares in chosen]
