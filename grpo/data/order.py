"""Which problems a step asks: a pure function of (seed, step), so that nothing has to be saved."""

import functools

import numpy as np


def problems_for_step(source_len: int, step: int, count: int, seed: int) -> list[int]:
    """The indices of the `count` problems of `step`, all different.

    Every epoch is a fresh permutation of the whole source, cut into steps of `count`. The
    remainder that does not fill a step is left out of that epoch.

    Args:
      source_len: how many problems there are.
      step: counts rollouts from 0.
      count: problems a step.
      seed: of the run; not negative.

    Raises:
      ValueError: a step cannot be filled, or a number is out of range.
    """
    if count < 1 or step < 0 or seed < 0:
        raise ValueError(f"need count >= 1, step >= 0 and seed >= 0; got {count}, {step}, {seed}")
    if count > source_len:
        raise ValueError(
            f"a step asks {count} different problems but the source holds {source_len}: "
            f"{count} - {source_len} = {count - source_len} too few. Ask fewer a step and sample "
            "larger groups, or use more data"
        )
    epoch, batch = divmod(step, source_len // count)
    chosen = _permutation(source_len, seed, epoch)[batch * count : (batch + 1) * count]
    return [int(i) for i in chosen]


@functools.lru_cache(maxsize=4)  # training and evaluation, each across an epoch's border
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)
