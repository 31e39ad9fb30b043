"""The reward of reasoning-gym's tasks: its own scorer, made safe to train against."""

import functools
import json
import math
from typing import Any

from rewards.api import Problem, last_tag


def gym_reward(completion: str, problem: Problem) -> float:
    """What the task's scorer gives the answer block, within [0, 1].

    Several tasks give partial credit, and some a few hundredths for any attempt. A scorer that
    raises has met an answer it could not read, which is a wrong answer. So is one with digits that
    are not ASCII, which many of the scorers take: Python's `int` and `float` do.

    Raises:
      ValueError: the problem is not one of `GymProblems`.
    """
    answer = last_tag(completion, "answer")
    name, config = problem.meta.get("gym_name"), problem.meta.get("gym_config", {})
    if name is None or "gym_entry" not in problem.meta:
        raise ValueError(f"problem {problem.uid!r} has no gym_name and gym_entry in its meta")
    if name == "game_of_life_halting":
        raise ValueError("game_of_life_halting scores every answer as right, so it teaches nothing")
    scorer = _scorer(name, json.dumps(config, sort_keys=True))
    if answer is None or not answer.strip():
        return 0.0
    if any(character.isdigit() and not character.isascii() for character in answer):
        return 0.0
    try:
        score = float(scorer.score_answer(answer=answer.strip(), entry=problem.meta["gym_entry"]))
    except Exception:  # scorers are third-party code; they raise a dozen types on junk
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


@functools.lru_cache(maxsize=128)  # more than there are tasks
def _scorer(name: str, config: str) -> Any:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'gym_reward needs reasoning-gym: pip install "grpo[gym]"'
        ) from error
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(config))
