"""A reward that runs on another machine, behind `python -m rewards.serve`.

  rewards=((1.0, remote_reward("http://10.0.0.7:8765")), (0.1, r1_format))

The token is read from the environment variable REWARDS_TOKEN. References and meta go as JSON: a
tuple arrives as a list, and what JSON does not have cannot be sent.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from rewards.api import FACTS, Batched, Problem, Score
from rewards.post import Refused, post_json, token_from

TOKEN_VARIABLE = "REWARDS_TOKEN"


def remote_reward(
    url: str, name: str | None = None, *, timeout_s: float = 60.0, **settings: Any
) -> Batched:
    """One of the server's rewards as a component.

    Args:
      url: the server's address, as it prints it.
      name: which of its rewards; None takes the first.
      timeout_s: seconds for one batch.
      **settings: further fields of `Batched`: size, wait_s, retries, parallel, backoff_s.
    """
    function = RemoteReward(url.rstrip("/"), name, timeout_s)
    return Batched(function, timeout_s=timeout_s, **settings)


@dataclasses.dataclass(frozen=True)
class RemoteReward:
    """The batch function of `remote_reward`."""

    url: str
    name: str | None
    timeout_s: float

    @property
    def __name__(self) -> str:
        return self.name or "remote"

    def __call__(
        self, completions: Sequence[str], problems: Sequence[Problem], **facts: Sequence[Any]
    ) -> list[Score]:
        known = [{name: facts[name][row] for name in FACTS} for row in range(len(completions))]
        items = list(map(_item, completions, problems, known))
        reply = post_json(
            f"{self.url}/v1/score",
            {"items": items},
            token=token_from(TOKEN_VARIABLE),
            timeout_s=0.9 * self.timeout_s,  # to be told, rather than killed
        )
        try:
            scores = {result["id"]: result["scores"] for result in reply["results"]}
            return [self._mine(scores[item["id"]]) for item in items]
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{self.url} replied with something else: {error!r:.200}") from error

    def _mine(self, scores: dict[str, Any]) -> Score:
        return Score.from_json(scores[self.name] if self.name else next(iter(scores.values())))


def _item(completion: str, problem: Problem, facts: dict[str, Any]) -> dict[str, Any]:
    """One completion of a request. The id follows from the rest: a repeated request is known."""
    content = {
        "completion": completion,
        "problem": dataclasses.asdict(problem),
        "facts": {name: value for name, value in facts.items() if value is not None},
    }
    encoded = json.dumps(content, sort_keys=True).encode()
    return {"id": hashlib.sha256(encoded).hexdigest(), **content}
