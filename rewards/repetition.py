"""Whether a completion says the same thing again and again."""

import dataclasses

from rewards.api import Problem
from rewards.words import words

_PRIME = 2**61 - 1
_BASE = 0x1B873593A5F1D6E7 % _PRIME


@dataclasses.dataclass(frozen=True)
class Unrepeated:
    """Share of a completion's n-grams of words that are its first occurrence: 1.0 is no repeat.

    A completion of fewer than n words repeats nothing and gets 1.0; one without a word gets 0.0,
    so that silence is never the best style.

    Attributes:
      n: words in a row that count as one thing. A small n punishes ordinary prose, where "of the"
        comes back in every paragraph, and arithmetic, which restates its numbers.

    Source: after the repetition penalty of arXiv:2502.03373, here a share in [0, 1].
    """

    n: int = 20

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"an n-gram has at least one word, got {self.n}")

    def __call__(self, completion: str, problem: Problem) -> float:
        del problem
        found = words(completion)
        grams = max(len(found) - self.n + 1, 0)
        if not grams:
            return float(bool(found))
        return _distinct(found, self.n) / grams


def _distinct(found: list[str], n: int) -> int:
    """How many different runs of n words there are; time does not grow with n.

    A run is told by a rolling hash of its words' numbers, so that no run is copied.
    """
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word.casefold(), len(numbers) + 1) for word in found]
    oldest = pow(_BASE, n, _PRIME)
    value, seen = 0, set()
    for i, number in enumerate(ids):
        value = value * _BASE + number
        if i >= n:
            value -= ids[i - n] * oldest
        value %= _PRIME
        if i >= n - 1:
            seen.add(value)
    return len(seen)
