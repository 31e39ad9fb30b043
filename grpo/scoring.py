"""From finished completions to `Scores`: the trainer's side of the reward workers."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from grpo.config import RewardConfig
from grpo.data.sources import ProblemSource
from grpo.runtime import hosts
from grpo.structs import SOLVED, Scores
from rewards.api import Facts, Problem, Score, Status
from rewards.pool import RewardPool

_TROUBLES = ("timeouts", "crashes", "lost", "unavailable", "retries", "restarts")
_STATUSES = tuple(Status)
_MAX_WRONG_GOLD = 0.05  # share of gold answers that may be judged wrongly before a run refuses


class RewardFailure(RuntimeError):
    """The rewards cannot be trusted; the message says which and why."""


class _Verdicts(NamedTuple):
    """What n rewards said of P x G completions.

    Attributes:
      value_PGn: float32.
      valid_PGn: bool.
      status_PGn: int8, index into `_STATUSES`; -1: not judged here.
    """

    value_PGn: np.ndarray
    valid_PGn: np.ndarray
    status_PGn: np.ndarray


class Scorer:
    """Runs the configured rewards in worker processes and adds them up.

    Every process of a run has its own workers, and judges the completions it owns
    (`grpo.runtime.hosts.owns`). Use as a context manager: leaving it ends the workers.

    Args:
      config: the rewards. Of none there are no workers; every completion is then valid, and none
        solves its problem.
      waits_for: is told whom `collect` waits for, and "" when it no longer does.
    """

    def __init__(self, config: RewardConfig, waits_for: Callable[[str], None] = lambda whom: None):
        self.weights = np.array([weight for weight, _ in config.functions], np.float32)
        self._pool: RewardPool | None = None
        self.names: list[str] = []
        if config.functions:
            self._pool = RewardPool(
                config.functions, workers=config.workers, deadline_s=config.deadline_s
            )
            self.names = list(self._pool.names)
            for note in self._pool.notes:
                hosts.say(note)
        self._wait_s, self._waits_for = config.wait_s, waits_for
        # Of the pools of all processes, at the last `collect` and at the last report.
        self._counts = dict.fromkeys(_TROUBLES, 0)
        self._counted = dict.fromkeys(_TROUBLES, 0)

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def submit(self, text: str, problem: Problem, facts: Facts) -> "Future[list[Score]]":
        """Starts judging one completion; `facts` are the `rewards.api.FACTS` of it."""
        if self._pool is not None:
            return self._pool.submit(text, problem, facts)
        nothing: Future[list[Score]] = Future()
        nothing.set_result([])
        return nothing

    def collect(self, futures_PG: Sequence[Sequence["Future[list[Score]] | None"]]) -> Scores:
        """Waits for every judgement, those of other processes too. A collective.

        A row with any failed component is invalid as a whole. So is one whose judgement is still
        missing when `reward.wait_s` is over: one host with a slow service holds up no other.

        Args:
          futures_PG: of the completions; None for one that another process has judged.

        Raises:
          HostError: a judgement could not be had on some process; by a single process, what it
            raised.
        """
        if self._pool is None:
            return _unjudged(len(futures_PG), len(futures_PG[0]))
        self._waits_for("its own verdicts")
        own, failure = self._await(futures_PG)
        counts = self._pool.counts()
        self._waits_for("the verdicts of the other processes")
        gathered = hosts.gather(
            own._asdict()
            | {
                "troubles": np.array([counts[event] for event in _TROUBLES], np.int64),
                "message": hosts.message_bytes(failure),
            }
        )
        self._waits_for("")
        hosts.check_messages(gathered["message"], failure)
        self._counts = dict(zip(_TROUBLES, gathered["troubles"].sum(axis=0).tolist(), strict=True))
        # Where a process has no verdict it has zeros, and the status -1.
        return self._scores(
            _Verdicts(
                gathered["value_PGn"].sum(axis=0),
                gathered["valid_PGn"].max(axis=0),
                gathered["status_PGn"].max(axis=0),
            )
        )

    def collect_own(self, futures_PG: Sequence[Sequence["Future[list[Score]]"]]) -> Scores:
        """The same for completions all of which this process judges; asks no other."""
        own, failure = self._await(futures_PG)
        if failure is not None:
            raise failure
        return self._scores(own)

    def _await(
        self, futures_PG: Sequence[Sequence["Future[list[Score]] | None"]]
    ) -> tuple["_Verdicts", Exception | None]:
        """This process's verdicts, and the error that ended the waiting for them."""
        shape = len(futures_PG), len(futures_PG[0]), len(self.names)
        own = _Verdicts(np.zeros(shape, "f4"), np.zeros(shape, "?"), np.full(shape, -1, np.int8))
        enough = time.monotonic() + self._wait_s
        for p, group in enumerate(futures_PG):
            for g, future in enumerate(group):
                if future is None:
                    continue
                try:
                    scores = future.result(max(0.0, enough - time.monotonic()))
                except TimeoutError:
                    future.cancel()
                    own.status_PGn[p, g] = _STATUSES.index(Status.LOST)
                except Exception as error:
                    return own, error
                else:
                    own.value_PGn[p, g] = [score.value for score in scores]
                    own.valid_PGn[p, g] = [score.valid for score in scores]
                    own.status_PGn[p, g] = [_STATUSES.index(score.status) for score in scores]
        return own, None

    def _scores(self, found: "_Verdicts") -> Scores:
        value_PGn, valid_PG = found.value_PGn, found.valid_PGn.min(axis=-1)
        assert (found.status_PGn >= 0).all(), "a completion that no process has judged"
        return Scores(
            reward_PG=np.where(valid_PG, value_PGn @ self.weights, 0.0).astype(np.float32),
            valid_PG=valid_PG,
            components={name: value_PGn[..., n] for n, name in enumerate(self.names)},
            weights=dict(zip(self.names, map(float, self.weights), strict=True)),
            statuses={
                name: [str(_STATUSES[code]) for code in found.status_PGn[..., n].reshape(-1)]
                for n, name in enumerate(self.names)
            },
        )

    def solved_PG(self, scores: Scores) -> np.ndarray:
        """bool: the first reward, the verifier, gave full marks."""
        if not self.names:
            return np.zeros_like(scores.valid_PG)
        return (scores.components[self.names[0]] >= SOLVED) & scores.valid_PG

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Means over the valid rows, and how often verifiers failed or ran out of time.

        `reward/pool/...` count what went wrong up to the last `collect`, since the last call (see
        `RewardPool.counts`). Without rewards there are none.
        """
        if not self.names:
            return {}
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
        for event in _TROUBLES:
            report[f"reward/pool/{event}"] = float(self._counts[event] - self._counted[event])
        self._counted = self._counts
        return report


def _unjudged(P: int, G: int) -> Scores:
    return Scores(
        reward_PG=np.zeros((P, G), np.float32),
        valid_PG=np.ones((P, G), np.bool_),
        components={},
        weights={},
        statuses={},
    )


def _as_if_sampled(text: str) -> Facts:
    """What a reward may ask for; a gold answer is short, so its length need not be exact."""
    return {"length_tokens": len(text) // 4 + 1, "finish_reason": "eos"}


def _timeout_rate(scores: Scores) -> float:
    late = np.array([[s == "timeout" for s in found] for found in scores.statuses.values()])
    return float(late.any(axis=0).mean())


def check_rewards(scorer: Scorer, source: ProblemSource, config: RewardConfig) -> None:
    """`check_gold` as `config` asks for it, on all processes; errors are those of `check_gold`."""
    if config.gold_check:
        with hosts.together():
            hosts.say(check_gold(scorer, source, config.gold_format, config.gold_check))


def check_gold(scorer: Scorer, source: ProblemSource, gold_format: str, count: int) -> str:
    """Refuses to go on if the verifier rejects right answers or takes wrong ones.

    Judges the gold answers of `count` problems, spread over the source, against their own problem
    and against another one whose answer differs. By the workers of this process: each process has
    others, on a machine that may lack something.

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
    scores = scorer.collect_own(
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
