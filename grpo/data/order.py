"""Which problems are asked next: a pure function of (seed, cursor), so that one number is saved."""

import functools

import numpy as np


def draw(source_len: int, cursor: int, count: int, seed: int) -> tuple[list[int], int]:
    """The indices of the next `count` problems, all different, and the cursor behind them.

    Every epoch is a fresh permutation of the whole source. What is left of an epoch that cannot
    fill the draw is left out of it.

    Args:
      source_len: how many problems there are.
      cursor: problems drawn or left out so far; 0 at first.
      count: problems wanted.
      seed: of the run; not negative.

    Raises:
      ValueError: a draw cannot be filled, or a number is out of range.
    """
    if count < 1 or cursor < 0 or seed < 0:
        raise ValueError(f"need count >= 1, cursor >= 0, seed >= 0; got {count}, {cursor}, {seed}")
    if count > source_len:
        raise ValueError(
            f"a step asks {count} different problems but the source holds {source_len}: "
            f"{count} - {source_len} = {count - source_len} too few. Ask fewer a step and sample "
            "larger groups, or use more data"
        )
    epoch, start = divmod(cursor, source_len)
    if start + count > source_len:
        epoch, start = epoch + 1, 0
    chosen = _permutation(source_len, seed, epoch)[start : start + count]
    return [int(i) for i in chosen], epoch * source_len + start + count


def problems_for_step(source_len: int, step: int, count: int, seed: int) -> list[int]:
    """The problems of `step` where every step draws `count`: what `draw` gives the step-th time."""
    if step < 0:
        raise ValueError(f"need step >= 0; got {step}")
    epoch, batch = divmod(step, max(source_len // max(count, 1), 1))
    return draw(source_len, epoch * source_len + batch * count, count, seed)[0]


@functools.lru_cache(maxsize=4)  # training and evaluation, each across an epoch's border
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)
