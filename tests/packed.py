"""Random ragged completions, and the packed rows that the loss sees of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo.structs import Batch, Totals

RUBBISH = 1e30  # what stands in slots that nothing may read


@dataclasses.dataclass
class Tokens:
    """One completion, one list a field: nats of each token under each policy.

    Attributes:
      trains: tokens that count; a completion may have none.
      advantage: the completion's.
    """

    trains: list[bool]
    advantage: float
    logprobs: list[float]
    entropy: list[float]
    old_logprobs: list[float]
    sampler_logprobs: list[float]
    ref_logprobs: list[float]


def ragged(seed: int, count: int = 9) -> list[Tokens]:
    """Lengths from 1 to 6, ratios on both sides of any clip; one masked whole, one in part."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        length = int(rng.integers(1, 7)) if number else 5
        trains = [number != 2] * length
        if number == 0:
            trains[1:3] = [False, False]
        logprobs = -rng.exponential(1.0, length)

        def near(width: float, around: np.ndarray = logprobs) -> list[float]:
            return (around + rng.normal(0, width, len(around))).tolist()

        out.append(
            Tokens(
                trains=trains,
                advantage=float(rng.normal()),
                logprobs=logprobs.tolist(),
                entropy=rng.exponential(1.0, length).tolist(),
                old_logprobs=near(0.4),
                sampler_logprobs=near(0.6),
                ref_logprobs=near(1.0),
            )
        )
    return out


def pack(
    completions: Sequence[Tokens], rows: Sequence[Sequence[int]], width: int
) -> tuple[Any, Any, Batch]:
    """(log-probs, entropy, batch): row r holds the completions `rows[r]`, one after another."""
    shape = (len(rows), width)
    arrays: dict[str, Any] = {
        "sequences": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, bool),
        **{name: np.full(shape, RUBBISH, np.float32) for name in _FLOATS},
    }
    for r, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members):
            tokens = completions[member]
            slots = slice(start, start + len(tokens.trains))
            arrays["sequences"][r, slots] = number
            arrays["mask"][r, slots] = tokens.trains
            for name in _FLOATS:
                arrays[name][r, slots] = getattr(tokens, name)
            start = slots.stop
        assert start <= width
    batch = batch_of(
        arrays["mask"],
        sequences_RC=arrays["sequences"],
        advantage_RC=arrays["advantage"],
        old_logprobs_RC=arrays["old_logprobs"],
        sampler_logprobs_RC=arrays["sampler_logprobs"],
        ref_logprobs_RC=arrays["ref_logprobs"],
    )
    return arrays["logprobs"], arrays["entropy"], batch


_FLOATS = (
    "advantage",
    "logprobs",
    "entropy",
    "old_logprobs",
    "sampler_logprobs",
    "ref_logprobs",
)


def batch_of(mask_RC: Any, **fields: Any) -> Batch:
    """A batch as the loss sees it: what it does not read is absent, and zeros are the default."""
    zeros_RC = np.zeros(np.shape(mask_RC), np.float32)
    names = ("advantage_RC", "old_logprobs_RC", "sampler_logprobs_RC", "ref_logprobs_RC")
    defaults = dict.fromkeys(names, zeros_RC) | {"sequences_RC": zeros_RC.astype(np.int32)}
    return Batch(
        tokens_RT=None,
        positions_RT=None,
        groups_RT=None,
        branches_RT=None,
        contexts_RC=None,
        targets_RC=None,
        mask_RC=np.asarray(mask_RC),
        **(defaults | fields),
    )


def totals_of(completions: Sequence[Tokens]) -> Totals:
    """Counted one by one."""
    return Totals(
        tokens=sum(sum(tokens.trains) for tokens in completions),
        sequences=sum(any(tokens.trains) for tokens in completions),
    )
