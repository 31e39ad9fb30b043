"""From finished completions to `Scores`: the trainer's side of the reward workers."""

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from grpo.config import RewardConfig
from grpo.data.sources import ProblemSource
from grpo.structs import SOLVED, Scores
from rewards.api import Facts, Problem, Score
from rewards.pool import RewardPool

_TROUBLES = ("timeouts", "crashes", "lost", "unavailable", "retries", "restarts")
_MAX_WRONG_GOLD = 0.05  # share of gold answers that may be judged wrongly before a run refuses


class RewardFailure(RuntimeError):
    """The rewards cannot be trusted; the message says which and why."""


class Scorer:
    """Runs the configured rewards in worker processes and adds them up.

    Use as a context manager: leaving it ends the workers.
    """

    def __init__(self, config: RewardConfig):
        self.weights = np.array([weight for weight, _ in config.functions], np.float32)
        self._pool = RewardPool(
            config.functions, workers=config.workers, deadline_s=config.deadline_s
        )
        self.names: list[str] = list(self._pool.names)
        for note in self._pool.notes:
            print(note)
        self._counted: dict[str, int] = {}  # the pool's counts at the last report

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def submit(self, text: str, problem: Problem, facts: Facts) -> "Future[list[Score]]":
        """Starts judging one completion; `facts` are the `rewards.api.FACTS` of it."""
        return self._pool.submit(text, problem, facts)

    def collect(self, futures_PG: Sequence[Sequence["Future[list[Score]]"]]) -> Scores:
        """Waits for every judgement. A row with any failed component is invalid as a whole."""
        scores_PG = [[future.result() for future in group] for group in futures_PG]
        value_PGn = np.array([[[s.value for s in row] for row in g] for g in scores_PG], np.float32)
        valid_PG = np.array([[all(s.valid for s in row) for row in g] for g in scores_PG])
        return Scores(
            reward_PG=np.where(valid_PG, value_PGn @ self.weights, 0.0).astype(np.float32),
            valid_PG=valid_PG,
            components={name: value_PGn[..., n] for n, name in enumerate(self.names)},
            weights=dict(zip(self.names, map(float, self.weights), strict=True)),
            statuses={
                name: [str(row[n].status) for group in scores_PG for row in group]
                for n, name in enumerate(self.names)
            },
        )

    def solved_PG(self, scores: Scores) -> np.ndarray:
        """bool: the first reward, the verifier, gave full marks."""
        return (scores.components[self.names[0]] >= SOLVED) & scores.valid_PG

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Means over the valid rows, and how often verifiers failed or ran out of time.

        `reward/pool/...` count what went wrong since the last call (see `RewardPool.counts`).
        """
        valid_PG = scores.valid_PG
        count = max(int(valid_PG.sum()), 1)
        report = {
            "reward/mean": float(scores.reward_PG.sum(where=valid_PG) / count),
            "reward/solved": float(self.solved_PG(scores).sum() / count),
            "reward/failure_rate": float(1 - valid_PG.mean()),
            "reward/timeout_rate": _timeout_rate(scores),
        }
        for name, value_PG in scores.components.items():
            report[f"reward/component/{name}"] = float(value_PG.sum(where=valid_PG) / count)
        counts = self._pool.counts()
        for event in _TROUBLES:
            report[f"reward/pool/{event}"] = float(counts[event] - self._counted.get(event, 0))
        self._counted = counts
        return report


def _as_if_sampled(text: str) -> Facts:
    """What a reward may ask for; a gold answer is short, so its length need not be exact."""
    return {"length_tokens": len(text) // 4 + 1, "finish_reason": "eos"}


def _timeout_rate(scores: Scores) -> float:
    late = np.array([[s == "timeout" for s in found] for found in scores.statuses.values()])
    return float(late.any(axis=0).mean())


def check_gold(scorer: Scorer, source: ProblemSource, gold_format: str, count: int) -> str:
    """Refuses to go on if the verifier rejects right answers or takes wrong ones.

    Judges the gold answers of `count` problems, spread over the source, against their own problem
    and against another one whose answer differs.

    Returns:
      A line for the log.

    Raises:
      RewardFailure: over 5 % judged wrongly; the message shows the first of them.
    """
    spread = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    problems = [p for p in (source[int(i)] for i in spread) if p.gold is not None]
    if not problems:
        return "gold check: skipped, these problems carry no gold answers"
    texts = [gold_format.replace("{gold}", str(problem.gold)) for problem in problems]
    pairs = [(text, problem, True) for text, problem in zip(texts, problems, strict=True)]
    for number, problem in enumerate(problems):
        others = [n for n in range(len(problems)) if problems[n].gold != problem.gold]
        if others:
            following = [n for n in others if n > number] or others
            pairs.append((texts[following[0]], problem, False))
    scores = scorer.collect(
        [[scorer.submit(text, problem, _as_if_sampled(text))] for text, problem, _ in pairs]
    )
    solved = scorer.solved_PG(scores)[:, 0]
    for wanted, what in ((True, "right answers rejected"), (False, "wrong answers accepted")):
        asked = [n for n, (_, _, right) in enumerate(pairs) if right is wanted]
        bad = [n for n in asked if bool(solved[n]) is not wanted or not scores.valid_PG[n, 0]]
        if len(bad) > _MAX_WRONG_GOLD * len(asked):
            text, problem, _ = pairs[bad[0]]
            status = {name: found[bad[0]] for name, found in scores.statuses.items()}
            raise RewardFailure(
                f"the verifier {scorer.names[0]!r} does not fit these problems: "
                f"{len(bad)} of {len(asked)} {what}. The first: problem {problem.uid!r}, reference "
                f"{problem.reference!r}, completion {text!r}, status {status}. Mend the reward, "
                "the references or reward.gold_format (reward.gold_check=0 skips this check)"
            )
    return f"gold check: {len(problems)} right answers accepted, wrong ones rejected"
