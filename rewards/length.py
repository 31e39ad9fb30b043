"""Rewards for how long a completion is, in the policy's own tokens.

They ask for the fact `length_tokens`, which the trainer knows and the text does not show.
"""

import dataclasses
import math

from rewards.api import Facts, Problem, Reward, call


@dataclasses.dataclass(frozen=True)
class SoftOverlong:
    """1.0 up to a soft limit, then falling in a straight line to 0.0 at the hard one.

    With L = length_tokens: 1 + R_length(L), where R_length is 0 for L <= max - cache,
    ((max - cache) - L) / cache from there to max, and -1 beyond. The 1 keeps rewards in [0, 1];
    advantages compare completions with one another, so it changes nothing.

    Attributes:
      max_tokens: the hard limit, where the reward reaches 0.0.
      cache_tokens: length of the slope before it.

    Raises:
      ValueError: a slope of no length, or longer than the limit.

    Source: arXiv:2503.14476, equation 13.
    """

    max_tokens: int
    cache_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise ValueError(
                f"cache_tokens must be in 1..max_tokens, got {self.cache_tokens} of "
                f"{self.max_tokens}"
            )

    def __call__(self, completion: str, problem: Problem, *, length_tokens: int) -> float:
        del completion, problem
        over = length_tokens - (self.max_tokens - self.cache_tokens)
        return 1.0 - min(max(over / self.cache_tokens, 0.0), 1.0)


@dataclasses.dataclass(frozen=True)
class LengthBetween:
    """1.0 for a completion of `low` to `high` tokens, both included, else 0.0: a filter.

    Attributes:
      low: the fewest tokens.
      high: the most.

    Raises:
      ValueError: there is no length between them.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"need 0 <= low <= high, got {self.low} and {self.high}")

    def __call__(self, completion: str, problem: Problem, *, length_tokens: int) -> float:
        del completion, problem
        return float(self.low <= length_tokens <= self.high)


@dataclasses.dataclass(frozen=True)
class CosineLength:
    """A verdict that also depends on length: short if right, thorough if wrong.

    From `short` at length 0 along half a cosine to `long` at `max_tokens`, with one pair for right
    completions and one for wrong; 0.0 for a completion that was cut off. List the verifier itself
    before this one: `solved` counts full marks of the first reward.

    Attributes:
      verifier: the reward whose 1.0 is right.
      max_tokens: where the curve ends.
      right: values (short, long) of a right completion.
      wrong: values (short, long) of a wrong one; the longer may be worth more, since thinking on
        might have helped, but never as much as any right one.

    Raises:
      ValueError: values outside [0, 1], or wrong ones that can beat right ones.

    Source: the cosine reward of arXiv:2502.03373, whose values leave [0, 1].
    """

    verifier: Reward
    max_tokens: int
    right: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (0.0, 0.25)

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 <= min(self.wrong) <= max(self.wrong) < min(self.right):
            raise ValueError(f"every right value must be above every wrong one: {self}")
        if max(self.right) > 1:
            raise ValueError(f"rewards lie in [0, 1]: {self}")

    def __call__(
        self, completion: str, problem: Problem, *, length_tokens: int, **facts: object
    ) -> float:
        known: Facts = {**facts, "length_tokens": length_tokens}
        verdict = call(self.verifier, completion, problem, known)
        if length_tokens >= self.max_tokens or not completion.strip():
            return 0.0
        short, long = self.right if verdict >= 1.0 else self.wrong
        share = (1.0 + math.cos(math.pi * length_tokens / self.max_tokens)) / 2.0
        return long + (short - long) * share
