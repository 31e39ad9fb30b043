"""Rewards that count only if another one holds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, overload

from rewards.api import Batched, Problem, Reward, Row, call, call_batch, reward_name


@overload
def gated(reward: Batched, by: Reward, at_least: float = 1.0) -> Batched: ...
@overload
def gated(reward: Reward, by: Reward, at_least: float = 1.0) -> Reward: ...
def gated(reward: Reward | Batched, by: Reward, at_least: float = 1.0) -> Reward | Batched:
    """The reward where the gate `by` gives at least `at_least`, else 0.0; the gate is asked first.

    `gated(numeric_answer, by=r1_format)` pays a right answer only in the right form;
    `gated(Unrepeated(), by=numeric_answer)` pays style only with substance;
    `gated(llm_judge(…), by=r1_format)` does not even ask the judge about the rest.
    """
    if isinstance(reward, Batched):
        return dataclasses.replace(reward, function=GatedBatch(reward.function, by, at_least))
    return Gated(reward, by, at_least)


@dataclasses.dataclass(frozen=True)
class Gated:
    """What `gated` makes of a plain reward."""

    reward: Reward
    by: Reward
    at_least: float

    @property
    def __name__(self) -> str:
        return f"{reward_name(self.reward)}_if_{reward_name(self.by)}"

    def __call__(self, completion: str, problem: Problem, **facts: Any) -> float:
        if call(self.by, completion, problem, facts) < self.at_least:
            return 0.0
        return call(self.reward, completion, problem, facts)


@dataclasses.dataclass(frozen=True)
class GatedBatch:
    """What `gated` makes of the function of a batched one."""

    function: Callable[..., Any]
    by: Reward
    at_least: float

    @property
    def __name__(self) -> str:
        return f"{reward_name(self.function)}_if_{reward_name(self.by)}"

    def __call__(
        self, completions: Sequence[str], problems: Sequence[Problem], **facts: Sequence[Any]
    ) -> list[Any]:
        rows: list[Row] = [
            (text, problem, {name: facts[name][i] for name in facts if facts[name][i] is not None})
            for i, (text, problem) in enumerate(zip(completions, problems, strict=True))
        ]
        passed = [i for i, row in enumerate(rows) if call(self.by, *row) >= self.at_least]
        values: list[Any] = [0.0] * len(rows)
        if passed:
            judged = call_batch(self.function, [rows[i] for i in passed])
            for i, value in zip(passed, judged, strict=True):
                values[i] = value
        return values
