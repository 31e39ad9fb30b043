"""Rows of the update: what stands where, and what trains."""

import jax
import numpy as np
import pytest
from toy_model import mesh_of

from grpo.batch import make_batch, make_rows, minibatches, to_device
from grpo.structs import Batch, Completion, Rollout
from rewards.api import Problem

PROMPTS = [[5, 6, 7], [8], [5, 6, 7, 9]]
COMPLETIONS = [[1, 2], [3, 0, 0, 31], [4]]  # id 0 is also what rows are padded with


def rows() -> Batch:
    return make_rows(PROMPTS, COMPLETIONS, max_prompt=4, max_new=5)


def test_a_row_is_prompt_completion_padding():
    batch = rows()
    assert batch.tokens_RT.tolist() == [
        [5, 6, 7, 1, 2, 0, 0, 0, 0],
        [8, 3, 0, 0, 31, 0, 0, 0, 0],
        [5, 6, 7, 9, 4, 0, 0, 0, 0],
    ]
    assert batch.segments_RT.tolist() == [
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
    ]
    assert batch.positions_RT.tolist() == [list(range(9))] * 3


def test_masks_come_from_lengths():
    """A sampled id that equals the padding is a token like any other."""
    batch = rows()
    assert batch.mask_RC.sum(axis=1).tolist() == [2, 4, 1]
    assert batch.mask_RC[1].tolist() == [True, True, True, True, False]


def test_targets_point_at_the_completion():
    batch = rows()
    for row, completion in enumerate(COMPLETIONS):
        slots = batch.targets_RC[row][batch.mask_RC[row]]
        assert batch.tokens_RT[row][slots].tolist() == completion
    assert (batch.targets_RC[~batch.mask_RC] == 0).all()


def test_dtypes_are_what_the_update_is_compiled_for():
    kinds = {name: getattr(rows(), name).dtype.name for name in Batch.__dataclass_fields__}
    assert kinds == {
        "tokens_RT": "int32",
        "positions_RT": "int32",
        "segments_RT": "int32",
        "targets_RC": "int32",
        "mask_RC": "bool",
        "advantage_RC": "float32",
        "old_logprobs_RC": "float32",
        "sampler_logprobs_RC": "float32",
        "ref_logprobs_RC": "float32",
    }


def test_rows_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError):
        make_rows([[1, 2]], [[3, 4, 5]], max_prompt=2, max_new=2)


def rollout() -> Rollout:
    """Two problems, two completions each, of lengths 1, 2, 3, 2."""
    written = [(0, 0, (1,)), (0, 1, (2, 3)), (1, 0, (4, 5, 6)), (1, 1, (7, 31))]
    return Rollout(
        problems=[Problem(uid=uid, prompt=uid, reference="") for uid in "pq"],
        prompts=[[10, 11], [12]],
        completions=[
            Completion(p, g, tokens, -np.arange(1, len(tokens) + 1, dtype=np.float32), "eos")
            for p, g, tokens in written
        ],
        group_size=2,
    )


def test_make_batch_gives_each_row_its_own_advantage():
    advantage_PG = np.array([[0.5, -0.5], [2.0, -2.0]], np.float32)
    valid_PG = np.array([[True, True], [False, True]])
    batch = make_batch(rollout(), advantage_PG, valid_PG, max_prompt=2, max_new=3)
    assert batch.tokens_RT.tolist() == [
        [10, 11, 1, 0, 0],
        [10, 11, 2, 3, 0],
        [12, 4, 5, 6, 0],
        [12, 7, 31, 0, 0],
    ]
    # Row 2's verifier failed: it stays in the batch, and does not train.
    assert batch.mask_RC.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]]
    np.testing.assert_array_equal(
        batch.advantage_RC, np.array([[0.5, 0, 0], [-0.5, -0.5, 0], [0, 0, 0], [-2, -2, 0]])
    )
    assert batch.advantage_RC.dtype == np.float32
    assert batch.sampler_logprobs_RC.tolist() == [
        [-1, 0, 0],
        [-1, -2, 0],
        [-1, -2, -3],
        [-1, -2, 0],
    ]


def numbered(count: int) -> Batch:
    """Rows that can be told apart: row i is full of i."""
    batch = make_rows([[1]] * count, [[2]] * count, max_prompt=1, max_new=1)
    return jax.tree.map(lambda a: np.broadcast_to(np.arange(count)[:, None], a.shape), batch)


def row_numbers(parts: list[Batch]) -> list[list[int]]:
    return [part.tokens_RT[:, 0].tolist() for part in parts]


def test_minibatches_are_a_permutation_that_moves_rows_whole():
    parts = minibatches(numbered(12), 3, seed=0, step=0)
    numbers = row_numbers(parts)
    flat = [number for part in numbers for number in part]
    assert [len(part) for part in numbers] == [4, 4, 4]
    assert sorted(flat) == list(range(12)) != flat
    for part in parts:
        for leaf in jax.tree.leaves(part):
            np.testing.assert_array_equal(leaf[:, 0], part.tokens_RT[:, 0])


def test_minibatches_depend_on_seed_and_step_alone():
    def order(seed: int, step: int) -> list[list[int]]:
        return row_numbers(minibatches(numbered(12), 3, seed, step))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_one_minibatch_is_the_batch_as_it_was():
    assert row_numbers(minibatches(numbered(12), 1, seed=0, step=0)) == [list(range(12))]


@pytest.mark.parametrize("micro, shape", [(0, (1, 16)), (16, (1, 16)), (8, (2, 8))])
def test_to_device_splits_rows_over_microbatches_then_devices(micro, shape):
    batch = to_device(numbered(16), micro, mesh_of(data=4, fsdp=2))
    assert batch.tokens_RT.shape == (*shape, 2) and batch.mask_RC.shape == (*shape, 1)
    np.testing.assert_array_equal(batch.tokens_RT[..., 0].reshape(-1), np.arange(16))
    pieces = {shard.data.shape for shard in batch.tokens_RT.addressable_shards}
    assert pieces == {(shape[0], shape[1] // 8, 2)}
