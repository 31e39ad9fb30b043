"""Rotary frequencies: the plain ones, and the scalings that stretch them to longer contexts."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """Every frequency divided by `factor` (positions interpolated, arXiv:2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling (arXiv:2407.21783): slow pairs divided by `factor`, fast ones kept.

    A pair that turns less than `low` times in `original_positions` is slow, more than `high` times
    fast; in between the two frequencies are mixed by how many turns it makes.
    """

    factor: float
    low: float
    high: float
    original_positions: int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): as Llama 3.1's, but mixed by the number of the pair.

    Attributes:
      factor: slow frequencies are divided by it.
      slow, fast: turns in `original_positions` where the mixing ends and begins.
      original_positions: context of the model before it was stretched.
      gain: multiplies rotated queries and keys (the paper's sqrt(1/t)).
      whole_pairs: whether the ends of the mixing are rounded outwards to whole pairs.
    """

    factor: float
    slow: float
    fast: float
    original_positions: int
    gain: float
    whole_pairs: bool = True


Scaling = Linear | Llama3 | Yarn


def frequencies(theta: float, scaling: Scaling | None, head_width: int) -> np.ndarray:
    """Radians a position for each of the H / 2 pairs, float32.

    Plain: theta ** (-2h / H) for pair h (arXiv:2104.09864).
    """
    pair_h = np.arange(head_width // 2, dtype=np.float64)
    plain_h = theta ** (-2 * pair_h / head_width)
    match scaling:
        case None:
            scaled_h = plain_h
        case Linear():
            scaled_h = plain_h / scaling.factor
        case Llama3():
            turns_h = scaling.original_positions * plain_h / (2 * math.pi)
            kept_h = np.clip((turns_h - scaling.low) / (scaling.high - scaling.low), 0, 1)
            scaled_h = kept_h * plain_h + (1 - kept_h) * plain_h / scaling.factor
        case Yarn():
            first, last = _mixed_pairs(scaling, theta, head_width)
            kept_h = 1 - np.clip((pair_h - first) / (last - first), 0, 1)
            scaled_h = kept_h * plain_h + (1 - kept_h) * plain_h / scaling.factor
    return scaled_h.astype(np.float32)


def _mixed_pairs(yarn: Yarn, theta: float, head_width: int) -> tuple[float, float]:
    """The pairs between which YaRN mixes: those that make `fast` and `slow` turns."""

    def pair(turns: float) -> float:
        longest = yarn.original_positions / (turns * 2 * math.pi)
        return head_width * math.log(longest) / (2 * math.log(theta))

    first, last = pair(yarn.fast), pair(yarn.slow)
    if yarn.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_width - 1)
    return first, last + 0.001 if first == last else last
