"""One reward for problems of several kinds: each kind is judged by its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, overload

from rewards.api import (
    BadReference,
    Batched,
    Problem,
    Reward,
    Row,
    Score,
    call,
    call_batch,
    judge,
)


@overload
def by_task(rewards: Mapping[str, Reward]) -> "ByTask": ...
@overload
def by_task(rewards: Mapping[str, Reward | Batched]) -> "ByTask | Batched": ...
def by_task(rewards: Mapping[str, Reward | Batched]) -> "ByTask | Batched":
    """The reward that `problem.meta["task"]` names: rules for reasoning, a judge for the rest.

        by_task({"WordedSums": numeric_answer, "Backwards": letters_share})

    With a batched member all of it is batched, and its plain members are judged in those calls.

    Raises:
      ValueError: no members, or batched ones that differ in more than their functions: there is
        one queue for all of them.
    """
    batched = [reward for reward in rewards.values() if isinstance(reward, Batched)]
    if not batched:
        return ByTask({t: r for t, r in rewards.items() if not isinstance(r, Batched)})
    first = batched[0]
    if any(dataclasses.replace(other, function=first.function) != first for other in batched):
        raise ValueError(
            "batched members of one by_task must agree in size, wait_s, timeout_s, retries, "
            f"parallel and backoff_s: {batched}"
        )
    return dataclasses.replace(first, function=BatchByTask(rewards))


@dataclasses.dataclass(frozen=True)
class ByTask:
    """The plain reward that `problem.meta["task"]` names.

    Attributes:
      rewards: task -> reward; batched ones need `by_task`.

    Raises:
      ValueError: no members, or a batched one.
      BadReference: when called: the problem's task is none of them.

    Source: arXiv:2501.12948, section 2.3.4: rules where there are rules, models of preference for
      everything else, in one stage of reinforcement learning.
    """

    rewards: Mapping[str, Reward]

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("a reward by task needs a reward for at least one task")
        if any(isinstance(reward, Batched) for reward in self.rewards.values()):
            raise ValueError("ByTask takes plain rewards only; by_task takes batched ones as well")

    def __call__(self, completion: str, problem: Problem, **facts: Any) -> float:
        return call(_chosen(self.rewards, problem), completion, problem, facts)


@dataclasses.dataclass(frozen=True)
class BatchByTask:
    """What `by_task` makes of members of which one is batched: each gets its rows of a batch."""

    rewards: Mapping[str, Reward | Batched]

    @property
    def __name__(self) -> str:
        return ByTask.__name__

    def __call__(
        self, completions: Sequence[str], problems: Sequence[Problem], **facts: Sequence[Any]
    ) -> list[Any]:
        rows: list[Row] = [
            (text, problem, {name: facts[name][i] for name in facts if facts[name][i] is not None})
            for i, (text, problem) in enumerate(zip(completions, problems, strict=True))
        ]
        values: list[Any] = [None] * len(rows)
        together: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            # A plain member's failure is its own row's; as an exception it would be everybody's.
            if isinstance(self.rewards.get(row[1].meta.get("task", "")), Batched):
                together.setdefault(row[1].meta["task"], []).append(i)
            else:
                values[i] = self._alone(row)
        for task, members in together.items():
            batched = self.rewards[task]
            assert isinstance(batched, Batched)
            judged = call_batch(batched.function, [rows[i] for i in members])
            for i, value in zip(members, judged, strict=True):
                values[i] = value
        return values

    def _alone(self, row: Row) -> Score:
        text, problem, facts = row

        def chosen(completion: str, problem: Problem, **facts: Any) -> float:
            return call(_chosen(self.rewards, problem), completion, problem, facts)

        return judge(chosen, text, problem, facts)


def _chosen(rewards: Mapping[str, Any], problem: Problem) -> Any:
    task: Any = problem.meta.get("task")
    if task not in rewards:
        raise BadReference(
            f"there is no reward for meta['task'] = {task!r}; there are rewards for "
            f"{', '.join(sorted(rewards))}"
        )
    return rewards[task]
