"""From completions of any length to fixed-shape rows, on the host."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from grpo.sharding import batch_sharding
from grpo.structs import Batch, Rollout


def make_rows(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    max_prompt: int,
    max_new: int,
) -> Batch:
    """One row a sequence: prompt, completion, padding. All completion tokens train.

    Masks come from lengths, never from comparing with a padding id. Advantages and log-probs are
    zero.
    """
    R, T, C = len(prompts), max_prompt + max_new, max_new
    tokens_RT = np.zeros((R, T), np.int32)
    segments_RT = np.zeros((R, T), np.int32)
    prompt_len_R = np.array([len(p) for p in prompts], np.int32)
    completion_len_R = np.array([len(c) for c in completions], np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        tokens_RT[row, :end] = [*prompt, *completion]
        segments_RT[row, :end] = 1
    slots_C = np.arange(C, dtype=np.int32)
    mask_RC = slots_C < completion_len_R[:, None]
    zeros_RC = np.zeros((R, C), np.float32)
    return Batch(
        tokens_RT=tokens_RT,
        positions_RT=np.broadcast_to(np.arange(T, dtype=np.int32), (R, T)).copy(),
        segments_RT=segments_RT,
        targets_RC=np.where(mask_RC, prompt_len_R[:, None] + slots_C, 0).astype(np.int32),
        mask_RC=mask_RC,
        advantage_RC=zeros_RC,
        old_logprobs_RC=zeros_RC,
        sampler_logprobs_RC=zeros_RC,
        ref_logprobs_RC=zeros_RC,
    )


def make_batch(
    rollout: Rollout,
    advantage_PG: np.ndarray,
    valid_PG: np.ndarray,
    *,
    max_prompt: int,
    max_new: int,
) -> Batch:
    """Rows of a rollout, with advantages; rows whose verifier failed do not train."""
    prompts = [rollout.prompts[c.problem] for c in rollout.completions]
    completions = [c.tokens for c in rollout.completions]
    rows = make_rows(prompts, completions, max_prompt=max_prompt, max_new=max_new)
    mask_RC = rows.mask_RC & valid_PG.reshape(-1, 1)
    sampler_logprobs_RC = np.zeros_like(rows.sampler_logprobs_RC)
    for row, completion in enumerate(rollout.completions):
        sampler_logprobs_RC[row, : len(completion.tokens)] = completion.logprobs
    return rows.replace(
        mask_RC=mask_RC,
        advantage_RC=np.where(mask_RC, advantage_PG.reshape(-1, 1), 0.0).astype(np.float32),
        sampler_logprobs_RC=sampler_logprobs_RC,
    )


def minibatches(batch: Batch, count: int, seed: int, step: int) -> list[Batch]:
    """The rows in `count` equal parts, shuffled by (seed, step) unless there is only one."""
    if count == 1:
        return [batch]
    rows = batch.tokens_RT.shape[0]
    order = np.random.default_rng([seed, step]).permutation(rows)
    return [jax.tree.map(lambda a, part=part: a[part], batch) for part in np.split(order, count)]


def to_device(batch: Batch, microbatch_rows: int, mesh: Mesh) -> Batch:
    """[R, ...] on the host to [M, R / M, ...] on the mesh, rows split over its batch axes."""
    rows = batch.tokens_RT.shape[0]
    micro = microbatch_rows or rows
    sharding = batch_sharding(mesh, leading=1)
    return jax.tree.map(
        lambda a: jax.device_put(
            np.asarray(a).reshape(rows // micro, micro, *a.shape[1:]), sharding
        ),
        batch,
    )
