"""From completions of any length to packed rows of one shape, on the host.

A row holds one or more prompts, each followed by completions of it: completions that share a row
share their prompt, which is then computed once, forward and backward. The packed form gives the
loss and gradients of one row a completion, exactly.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grpo.sharding import batch_sharding
from grpo.structs import Batch, Totals

TOKEN_VALUES = ("old_logprobs", "sampler_logprobs", "ref_logprobs")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion to learn from.

    Attributes:
      group: completions of the same group share their prompt.
      prompt, completion: token ids.
      trains: False where it only takes part in the counts of what was sampled.
      advantage: of the whole completion.
      old_logprobs, sampler_logprobs, ref_logprobs: float32 nats, one a completion token; None is
        zeros. See `Batch`.
      carried: as in `Completion`.
    """

    group: int
    prompt: Sequence[int]
    completion: Sequence[int]
    trains: bool = True
    advantage: float = 0.0
    old_logprobs: np.ndarray | None = None
    sampler_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    carried: int = 0


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The one shape of a run's microbatches.

    Attributes:
      rows: R, of a microbatch, over all devices.
      tokens: T, prompt and completion slots of a row.
      completion_tokens: C, completion slots of a row.
    """

    rows: int
    tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows, and where each sample went.

    Attributes:
      microbatches: one `Batch` [R, ...] each; at least one, which is all padding if there is
        nothing to pack.
      places: (row over all microbatches, first completion slot) of each sample.
    """

    microbatches: list[Batch]
    places: list[tuple[int, int]]


def row_shape(
    *,
    max_prompt: int,
    max_new: int,
    group_size: int,
    samples: int,
    microbatch_tokens: int,
    ways: int,
    attention_share: float,
) -> RowShape:
    """How long rows are, and how many a microbatch has.

    A row has room for k completions of full length and their prompts. Longer rows share prompts
    and waste less at their ends; but attention looks at the whole row. A completion costs

      T / k * (1 + a T / 2) * (1 + C / 2T)

    for T slots, a the cost of one attended position against that of one token, and C / 2 slots
    left over in a row; k is where that is least.

    Args:
      max_prompt, max_new: longest prompt and completion C, tokens.
      group_size: completions that share a prompt.
      samples: of a minibatch; a microbatch has no more rows than they can fill.
      microbatch_tokens: slots each device works on at a time; at least one row.
      ways: parts the mesh splits rows into.
      attention_share: a, see `grpo.model.params.attention_share`.
    """

    def slots(k: int) -> int:
        return math.ceil(k / group_size) * max_prompt + k * max_new

    def cost(k: int) -> float:
        T = slots(k)
        return T / k * (1 + attention_share * T / 2) * (1 + max_new / (2 * T))

    fitting = [k for k in range(1, samples + 1) if slots(k) <= microbatch_tokens] or [1]
    k = min(fitting, key=cost)
    most = math.ceil(math.ceil(samples / k) / ways)
    rows = max(1, min(microbatch_tokens // slots(k), most)) * ways
    return RowShape(rows=rows, tokens=slots(k), completion_tokens=k * max_new)


def totals(samples: Sequence[Sample]) -> Totals:
    """What the loss over these samples is divided by."""
    lengths = [len(s.completion) for s in samples if s.trains and s.completion]
    return Totals(tokens=np.float32(sum(lengths)), sequences=np.float32(len(lengths)))


def pack(samples: Sequence[Sample], shape: RowShape) -> Packed:
    """First fit: a completion goes into the first row that holds its prompt, or else has room.

    Longest first within a group, groups in the order they come: the same samples always give the
    same rows.

    Raises:
      ValueError: a sample is longer than a row.
    """
    rows = _assign(samples, shape)
    number = max(1, math.ceil(len(rows) / shape.rows))
    batch = _empty(number * shape.rows, shape)
    places: list[tuple[int, int]] = [(0, 0)] * len(samples)
    for row, members in enumerate(rows):
        for index, start in _lay_out(batch, row, members, samples):
            places[index] = (row, start)
    parts = [slice(m * shape.rows, (m + 1) * shape.rows) for m in range(number)]
    return Packed([jax.tree.map(lambda a, part=part: a[part], batch) for part in parts], places)


def _assign(samples: Sequence[Sample], shape: RowShape) -> list[dict[int, list[int]]]:
    """Which samples go into which row: a row is {group: its samples}."""
    rows: list[dict[int, list[int]]] = []
    free: list[tuple[int, int]] = []  # (token slots, completion slots) left in each row
    order: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        order.setdefault(sample.group, []).append(index)
    for group, members in order.items():
        for index in sorted(members, key=lambda i: -len(samples[i].completion)):
            prompt, length = len(samples[index].prompt), len(samples[index].completion)
            if prompt + length > shape.tokens or length > shape.completion_tokens:
                raise ValueError(
                    f"a prompt of {prompt} and a completion of {length} tokens do not fit into a "
                    f"row of {shape.tokens} slots, {shape.completion_tokens} for completions"
                )
            needs = [length if group in row else prompt + length for row in rows]
            fits = [
                n for n, need in enumerate(needs) if need <= free[n][0] and length <= free[n][1]
            ]
            sharing = [n for n in fits if group in rows[n]]
            chosen = (sharing or fits or [len(rows)])[0]
            if chosen == len(rows):
                rows.append({})
                free.append((shape.tokens, shape.completion_tokens))
                needs.append(prompt + length)
            rows[chosen].setdefault(group, []).append(index)
            tokens, completion_tokens = free[chosen]
            free[chosen] = (tokens - needs[chosen], completion_tokens - length)
    return rows


def _empty(rows: int, shape: RowShape) -> Batch:
    def zeros(width: int, dtype: type) -> np.ndarray:
        return np.zeros((rows, width), dtype)

    T, C = shape.tokens, shape.completion_tokens
    slots = {f"{name}_RT": zeros(T, np.int32) for name in ("tokens", "positions", "groups")}
    ids = {f"{name}_RC": zeros(C, np.int32) for name in ("contexts", "targets", "sequences")}
    values = {f"{name}_RC": zeros(C, np.float32) for name in ("advantage", *TOKEN_VALUES)}
    return Batch(
        **slots,
        branches_RT=zeros(T, np.int32),
        **ids,
        mask_RC=zeros(C, np.bool_),
        **values,
        carried_RC=zeros(C, np.bool_),
    )


def _lay_out(
    batch: Batch, row: int, members: dict[int, list[int]], samples: Sequence[Sample]
) -> list[tuple[int, int]]:
    """Writes one row; (sample, first completion slot) of each of its completions."""
    slot = column = branch = 0
    written = []
    for number, indices in enumerate(members.values(), start=1):
        prompt = samples[indices[0]].prompt
        here = slice(slot, slot + len(prompt))
        batch.tokens_RT[row, here] = prompt
        batch.positions_RT[row, here] = np.arange(len(prompt))
        batch.groups_RT[row, here] = number
        slot += len(prompt)
        last_of_prompt = slot - 1
        for index in indices:
            sample, branch = samples[index], branch + 1
            length = len(sample.completion)
            here, there = slice(slot, slot + length), slice(column, column + length)
            batch.tokens_RT[row, here] = sample.completion
            batch.positions_RT[row, here] = len(prompt) + np.arange(length)
            batch.groups_RT[row, here] = number
            batch.branches_RT[row, here] = branch
            batch.contexts_RC[row, there] = [last_of_prompt, *range(slot, slot + length - 1)][
                :length
            ]
            batch.targets_RC[row, there] = sample.completion
            batch.sequences_RC[row, there] = branch - 1
            batch.mask_RC[row, there] = sample.trains
            batch.advantage_RC[row, there] = sample.advantage
            batch.carried_RC[row, column : column + sample.carried] = True
            for name in TOKEN_VALUES:
                values = getattr(sample, name)
                if values is not None:
                    getattr(batch, f"{name}_RC")[row, there] = values
            written.append((index, column))
            slot, column = slot + length, column + length
    return written


def unpack(values_RC: np.ndarray, packed: Packed, samples: Sequence[Sample]) -> list[np.ndarray]:
    """One array a sample, of an array [rows of all microbatches, C]."""
    return [
        np.asarray(values_RC[row, start : start + len(sample.completion)])
        for sample, (row, start) in zip(samples, packed.places, strict=True)
    ]


def minibatches(
    samples: Sequence[Sample], count: int, *, seed: int, step: int, number: int = 0
) -> list[list[Sample]]:
    """The samples in `count` parts of as many groups each, groups kept whole.

    Shuffled by (seed, step, number of the pass), unless there is only one part.
    """
    if count == 1:
        return [list(samples)]
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    order = np.random.default_rng([seed, step, number]).permutation(list(groups))
    return [
        [sample for group in part for sample in groups[int(group)]]
        for part in np.array_split(order, count)
    ]


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """A microbatch [R, ...] on the mesh, rows split over its batch axes.

    Every process has the whole microbatch, and the same.
    """
    rows = batch_sharding(mesh)

    # Each process puts what its devices hold. `device_put` of a whole array would first compare it
    # with that of every other process, one collective an array.
    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, rows, lambda index: array[index])

    return jax.tree.map(put, batch)
