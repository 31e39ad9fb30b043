"""Packed rows: what stands where, what trains, and that nothing is lost, split or overfilled."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_model import ARCH, MAX_NEW, MAX_PROMPT, mesh_of, ragged_samples

from grpo.batch import (
    Packed,
    RowShape,
    Sample,
    minibatches,
    pack,
    row_shape,
    to_device,
    totals,
    unpack,
)
from grpo.model.params import attention_share
from grpo.structs import Batch


def nats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# Two groups. Id 0 is also what rows are padded with.
SAMPLES = [
    Sample(7, [5, 6, 7], [1, 2], advantage=0.5, sampler_logprobs=nats(-1, -2)),
    Sample(7, [5, 6, 7], [3, 0, 0], advantage=-0.5, sampler_logprobs=nats(-3, -4, -5), carried=2),
    Sample(2, [8], [4, 31], trains=False, advantage=2.0, old_logprobs=nats(-6, -7)),
]
SHAPE = RowShape(rows=1, tokens=12, completion_tokens=8)


def rows_of(packed: Packed) -> Batch:
    """All microbatches under one another."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *packed.microbatches)


# ---- what stands where -----------------------------------------------------------------------


def test_a_row_is_prompts_each_followed_by_its_completions():
    packed = pack(SAMPLES, SHAPE)
    row = jax.tree.map(lambda a: a[0].tolist(), rows_of(packed))
    assert row.tokens_RT == [5, 6, 7, 3, 0, 0, 1, 2, 8, 4, 31, 0]  # the longest of a group first
    assert row.positions_RT == [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 0]
    assert row.groups_RT == [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0]
    assert row.branches_RT == [0, 0, 0, 1, 1, 1, 2, 2, 0, 3, 3, 0]
    assert row.targets_RC == [3, 0, 0, 1, 2, 4, 31, 0]
    assert row.contexts_RC == [2, 3, 4, 2, 6, 8, 9, 0]  # the first token follows the prompt
    assert row.sequences_RC == [0, 0, 0, 1, 1, 2, 2, 0]
    assert row.mask_RC == [True] * 5 + [False] * 3
    assert row.carried_RC == [True] * 2 + [False] * 6
    assert row.advantage_RC == [-0.5] * 3 + [0.5] * 2 + [2.0] * 2 + [0]
    assert row.sampler_logprobs_RC == [-3, -4, -5, -1, -2, 0, 0, 0]
    assert row.old_logprobs_RC == [0, 0, 0, 0, 0, -6, -7, 0]
    assert packed.places == [(0, 3), (0, 0), (0, 5)]


def test_dtypes_are_what_the_update_is_compiled_for():
    """They do not depend on what the samples hold."""
    wanted = dict.fromkeys(Batch.__dataclass_fields__, "int32")
    del wanted["routes_RTLk"]  # which only mixtures of experts have
    wanted |= {"mask_RC": "bool", "carried_RC": "bool"}
    floats = ("advantage", "old_logprobs", "sampler_logprobs", "ref_logprobs")
    wanted |= {f"{name}_RC": "float32" for name in floats}
    for samples in (SAMPLES, []):
        for batch in pack(samples, SHAPE).microbatches:
            assert {name: getattr(batch, name).dtype.name for name in wanted} == wanted
            assert batch.routes_RTLk is None


def test_nothing_to_pack_is_one_microbatch_of_padding():
    packed = pack([], RowShape(rows=4, tokens=6, completion_tokens=3))
    assert len(packed.microbatches) == 1 and packed.places == []
    assert packed.microbatches[0].tokens_RT.shape == (4, 6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(packed.microbatches[0]))


@pytest.mark.parametrize("tokens, completion_tokens", [(4, 3), (6, 2)])
def test_a_sample_longer_than_a_row_is_an_error(tokens, completion_tokens):
    message = rf"prompt of 3 .* of 3 .* {tokens} slots, {completion_tokens} for completions"
    with pytest.raises(ValueError, match=message):
        pack(SAMPLES[1:2], RowShape(1, tokens, completion_tokens))


def test_a_minibatch_counts_what_trains():
    assert totals(SAMPLES) == (5, 2)
    assert totals([*SAMPLES, dataclasses.replace(SAMPLES[0], completion=[])]) == (5, 2)
    assert totals([]) == (0, 0)


# ---- packing, of anything --------------------------------------------------------------------

SHAPES = [
    RowShape(rows=4, tokens=MAX_PROMPT + MAX_NEW, completion_tokens=MAX_NEW),
    RowShape(rows=3, tokens=30, completion_tokens=20),
    RowShape(rows=1, tokens=60, completion_tokens=13),  # completion slots run out first
    RowShape(rows=2, tokens=400, completion_tokens=300),  # everything in one row
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_completion_stands_whole_behind_its_prompt(shape, seed):
    samples = ragged_samples(seed=seed)
    packed = pack(samples, shape)
    rows = rows_of(packed)
    assert rows.tokens_RT.shape == (len(packed.microbatches) * shape.rows, shape.tokens)
    taken_RC, taken_RT = np.zeros(rows.mask_RC.shape, int), np.zeros(rows.tokens_RT.shape, int)
    for sample, (row, start) in zip(samples, packed.places, strict=True):
        there = slice(start, start + len(sample.completion))
        branch = rows.sequences_RC[row, start] + 1
        own = np.flatnonzero(rows.branches_RT[row] == branch)
        group = rows.groups_RT[row, own[0]]
        prompt = np.flatnonzero((rows.groups_RT[row] == group) & (rows.branches_RT[row] == 0))
        assert rows.tokens_RT[row, own].tolist() == sample.completion
        assert rows.tokens_RT[row, prompt].tolist() == sample.prompt
        seen = [*prompt, *own]
        assert sorted(seen) == seen and (rows.groups_RT[row, seen] == group).all()
        assert rows.positions_RT[row, seen].tolist() == list(range(len(seen)))
        assert rows.contexts_RC[row, there].tolist() == seen[len(prompt) - 1 : -1]
        assert rows.targets_RC[row, there].tolist() == sample.completion
        assert (rows.sequences_RC[row, there] == branch - 1).all()
        assert (rows.advantage_RC[row, there] == np.float32(sample.advantage)).all()
        assert (rows.mask_RC[row, there] == sample.trains).all()
        taken_RC[row, there] += 1
        taken_RT[row, own] += 1
        taken_RT[row, prompt] = 1
    assert taken_RC.max() == taken_RT.max() == 1  # no two completions share a slot
    np.testing.assert_array_equal(taken_RT > 0, rows.groups_RT > 0)
    assert not rows.mask_RC[taken_RC == 0].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_is_the_inverse(shape):
    samples = ragged_samples()
    packed = pack(samples, shape)
    rows = rows_of(packed)
    for name in ("old_logprobs", "sampler_logprobs", "ref_logprobs"):
        values = unpack(getattr(rows, f"{name}_RC"), packed, samples)
        for sample, value in zip(samples, values, strict=True):
            np.testing.assert_array_equal(value, getattr(sample, name))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_stands_once_in_a_row_and_opens_a_row_only_where_none_had_room(shape):
    samples = ragged_samples()
    packed = pack(samples, shape)
    rows = rows_of(packed)
    free_R = (rows.groups_RT == 0).sum(axis=1)
    written_R = np.zeros(len(free_R), int)
    first: dict[tuple[int, int], tuple[int, Sample]] = {}
    for sample, (row, start) in zip(samples, packed.places, strict=True):
        written_R[row] += len(sample.completion)
        key = row, sample.group
        first[key] = min(first.get(key, (start, sample)), (start, sample), key=lambda x: x[0])
    for row, groups_T in enumerate(rows.groups_RT):
        assert groups_T.max() == len([key for key in first if key[0] == row])
    for (row, _), (_, sample) in first.items():
        length = len(sample.completion)
        full_R = free_R < len(sample.prompt) + length
        assert (full_R | (shape.completion_tokens - written_R < length))[:row].all()


def test_first_fit_by_hand():
    def sample(group: int, prompt: int, length: int) -> Sample:
        return Sample(group, [1] * prompt, [2] * length)

    samples = [sample(1, 3, 2), sample(1, 3, 5), sample(1, 3, 3), sample(2, 2, 1), sample(2, 2, 4)]
    packed = pack(samples, RowShape(rows=2, tokens=10, completion_tokens=9))
    # Row 0: 3 + 5, then the 2. Row 1: 3 + 3. Row 2: 2 + 4, then the 1, which would have fitted
    # into row 1 with a prompt of its own.
    assert packed.places == [(0, 5), (0, 0), (1, 0), (2, 4), (2, 0)]
    assert len(packed.microbatches) == 2


def test_the_same_samples_always_give_the_same_rows():
    one, other = (pack(ragged_samples(), SHAPES[1]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, rows_of(one), rows_of(other))
    assert one.places == other.places


# ---- the shape of rows -----------------------------------------------------------------------

NUMBERS = {
    "max_prompt": 20,
    "max_new": 100,
    "group_size": 8,
    "samples": 64,
    "microbatch_tokens": 2000,
    "ways": 4,
    "attention_share": 1e-4,
}


def shape_of(**changes: float) -> RowShape:
    return row_shape(**(NUMBERS | changes))  # type: ignore[arg-type]


def test_what_attention_costs_beside_a_token():
    """Of the toy: 2 layers of 4 heads of 4; matrices of 16 x (16 + 8 + 8 + 16 + 3 x 24), norms."""
    a_layer = 16 * (16 + 8 + 8 + 16 + 3 * 24) + 2 * 16
    operations = (4 * 4 * 4) / (2 * a_layer)
    assert attention_share(ARCH, "tpu") == attention_share(ARCH, "gpu") == pytest.approx(operations)
    assert attention_share(ARCH, "cpu") == pytest.approx(4 * operations)


@pytest.mark.parametrize("max_prompt", [1, 50, 400])
@pytest.mark.parametrize("microbatch_tokens", [1, 300, 5000])
@pytest.mark.parametrize("ways", [1, 8])
@pytest.mark.parametrize("attention_share", [0.0, 1e-5, 1e-1])
def test_a_microbatch_keeps_to_its_budget_and_divides_over_the_mesh(
    max_prompt, microbatch_tokens, ways, attention_share
):
    shape = shape_of(
        max_prompt=max_prompt,
        microbatch_tokens=microbatch_tokens,
        ways=ways,
        attention_share=attention_share,
    )
    assert shape.rows >= ways and shape.rows % ways == 0
    k, rest = divmod(shape.completion_tokens, 100)
    assert k >= 1 and rest == 0
    assert shape.tokens == -(-k // 8) * max_prompt + shape.completion_tokens
    one_row_a_device = shape.rows == ways and k == 1
    assert shape.rows // ways * shape.tokens <= microbatch_tokens or one_row_a_device
    longest = Sample(0, [1] * max_prompt, [1] * 100)
    pack([longest] * 16, shape)  # anything the run can sample fits


def test_rows_are_long_to_share_prompts_and_short_where_attention_is_dear():
    cheap, dear = shape_of(attention_share=0.0), shape_of(attention_share=1.0)
    assert dear.completion_tokens == 100 < cheap.completion_tokens
    long_prompt = {"max_prompt": 400, "attention_share": 1e-3}
    assert shape_of(max_prompt=1, attention_share=1e-3).tokens < shape_of(**long_prompt).tokens


def test_there_are_no_more_rows_than_samples():
    shape = shape_of(samples=3, microbatch_tokens=10**9, ways=1, attention_share=1.0)
    assert shape == RowShape(rows=3, tokens=120, completion_tokens=100)
    one = shape_of(samples=1, microbatch_tokens=10**9)
    assert one == RowShape(rows=4, tokens=120, completion_tokens=100)


# ---- minibatches -----------------------------------------------------------------------------


def numbers(parts: list[list[Sample]]) -> list[list[tuple[int, ...]]]:
    return [[(s.group, *s.completion) for s in part] for part in parts]


def test_minibatches_are_a_permutation_that_keeps_groups_whole():
    samples = ragged_samples(groups=12)
    parts = minibatches(samples, 3, seed=0, step=0)
    assert [len(part) for part in parts] == [16, 16, 16]
    groups = [sample.group for part in parts for sample in part[::4]]
    assert sorted(groups) == list(range(12)) != groups
    for part in parts:
        for first in range(0, len(part), 4):
            wanted = samples[4 * part[first].group : 4 * part[first].group + 4]
            assert all(a is b for a, b in zip(part[first : first + 4], wanted, strict=True))


def test_minibatches_depend_on_seed_step_and_pass_alone():
    samples = ragged_samples(groups=12)

    def order(seed: int, step: int, number: int) -> list[list[tuple[int, ...]]]:
        return numbers(minibatches(samples, 3, seed=seed, step=step, number=number))

    assert order(0, 0, 0) == order(0, 0, 0)
    assert len({str(order(*key)) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))}) == 4


def test_one_minibatch_is_the_samples_as_they_were():
    samples = ragged_samples()
    assert minibatches(samples, 1, seed=0, step=0, number=3) == [samples]


def test_to_device_splits_rows_over_the_mesh():
    [batch] = pack(SAMPLES, RowShape(rows=16, tokens=12, completion_tokens=8)).microbatches
    batch = dataclasses.replace(batch, tokens_RT=np.arange(16)[:, None] * np.ones((1, 12), int))
    placed = to_device(batch, mesh_of(data=4, fsdp=2))
    np.testing.assert_array_equal(placed.tokens_RT, batch.tokens_RT)
    for leaf in jax.tree.leaves(placed):
        assert {piece.data.shape for piece in leaf.addressable_shards} == {(2, leaf.shape[1])}
