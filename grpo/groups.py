"""The groups of a step: problems are asked until enough of them teach something."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from grpo.advantage import has_signal
from grpo.structs import SOLVED, Completion, Rollout, Scores
from rewards.api import Problem

# problems wanted, number of the round -> their rollout, scores and metrics
Ask = Callable[[int, int], tuple[Rollout, Scores, dict[str, float]]]


def fill_groups(ask: Ask, wanted: int, rounds: int) -> tuple[Rollout, Scores, dict[str, float]]:
    """`wanted` groups that teach something, or as many of them as `rounds` further draws give.

    Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): groups whose rewards are all equal have
    no gradient, so others are drawn in their place. Each round draws as many problems as the share
    of useful ones so far makes likely to be enough. Useful groups are kept in the order they were
    drawn; if they are too few the first flat ones fill the batch, and those beyond `wanted` are
    dropped. The bias: problems that are solved always or never are not seen by the update, and
    count as asked all the same.

    Args:
      ask: see `Ask`; the first round's number is 0.
      wanted: P.
      rounds: most further draws; 0 takes the first draw as it is.

    Returns:
      The groups, their scores, and the first round's metrics, times of all rounds added up, with
      `groups/asked` (problems drawn), `groups/useful_share` of them, `groups/all_right` and
      `groups/all_wrong` (shares of flat groups at the highest and at a lower reward) and
      `groups/signal` (useful ones among those kept).
    """
    found: list[tuple[Rollout, Scores]] = []
    metrics: dict[str, float] = {}
    asked = useful = 0
    for number in range(rounds + 1):
        missing = wanted - useful
        count = missing
        if asked:
            share = max(useful / asked, 1 / wanted)
            count = min(wanted, math.ceil(missing / share))
        rollout, scores, metrics_of_round = ask(count, number)
        metrics = _summed(metrics, metrics_of_round)
        found.append((rollout, scores))
        asked += count
        useful += int(has_signal(scores.reward_PG, scores.valid_PG).sum())
        if useful >= wanted:
            break
    rollout, scores = _joined(found)
    signal_P = has_signal(scores.reward_PG, scores.valid_PG)
    metrics |= flat_metrics(scores) | {
        "groups/asked": float(asked),
        "groups/useful_share": float(signal_P.mean()),
    }
    order = np.argsort(~signal_P, kind="stable")[:wanted]
    kept = np.sort(order)
    if len(signal_P) > wanted:
        rollout, scores = _taken(rollout, scores, kept)
    metrics["groups/signal"] = float(signal_P[kept].mean())
    return rollout, scores, metrics


def flat_metrics(scores: Scores) -> dict[str, float]:
    """Shares of groups that teach nothing, by how they did on the verifier, the first component."""
    flat_P = ~has_signal(scores.reward_PG, scores.valid_PG) & scores.valid_PG.any(axis=1)
    verifier_PG = next(iter(scores.components.values()))
    right_P = (np.where(scores.valid_PG, verifier_PG, np.inf) >= SOLVED).all(axis=1)
    return {
        "groups/all_right": float((flat_P & right_P).mean()),
        "groups/all_wrong": float((flat_P & ~right_P).mean()),
    }


def _summed(before: dict[str, float], new: dict[str, float]) -> dict[str, float]:
    """Times add up over rounds; of everything else the first round's value stands."""
    if not before:
        return dict(new)
    return {n: v + new[n] if n.startswith("time/") else v for n, v in before.items()}


def _joined(found: Sequence[tuple[Rollout, Scores]]) -> tuple[Rollout, Scores]:
    if len(found) == 1:
        return found[0]
    problems: list[Problem] = []
    prompts: list[list[int]] = []
    completions: list[Completion] = []
    for rollout, _ in found:
        first = len(problems)
        completions += [
            dataclasses.replace(c, problem=c.problem + first) for c in rollout.completions
        ]
        problems += rollout.problems
        prompts += rollout.prompts
    scores = [s for _, s in found]
    names = scores[0].components
    return (
        Rollout(problems, prompts, completions, found[0][0].group_size),
        Scores(
            reward_PG=np.concatenate([s.reward_PG for s in scores]),
            valid_PG=np.concatenate([s.valid_PG for s in scores]),
            components={n: np.concatenate([s.components[n] for s in scores]) for n in names},
            weights=scores[0].weights,
            statuses={n: [x for s in scores for x in s.statuses[n]] for n in scores[0].statuses},
        ),
    )


def _taken(rollout: Rollout, scores: Scores, rows: np.ndarray) -> tuple[Rollout, Scores]:
    """The groups at `rows`, renumbered."""
    G = rollout.group_size
    members = [int(p) * G + g for p in rows for g in range(G)]
    completions = [
        dataclasses.replace(rollout.completions[b], problem=number // G)
        for number, b in enumerate(members)
    ]
    return (
        Rollout(
            [rollout.problems[p] for p in rows],
            [rollout.prompts[p] for p in rows],
            completions,
            G,
        ),
        dataclasses.replace(
            scores,
            reward_PG=scores.reward_PG[rows],
            valid_PG=scores.valid_PG[rows],
            components={n: v[rows] for n, v in scores.components.items()},
            statuses={n: [v[b] for b in members] for n, v in scores.statuses.items()},
        ),
    )
