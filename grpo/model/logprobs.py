"""Log-probabilities and entropy of chosen tokens, without ever holding [R, T, V]."""

from functools import partial

import jax
import jax.numpy as jnp

from grpo.model.arch import Arch
from grpo.model.attention import capped
from grpo.model.decoder import head, hidden_states
from grpo.model.params import Params
from grpo.sharding import propagated, shard, spec
from grpo.structs import Batch

Pair = tuple[jax.Array, jax.Array]


def chunked_logprobs(
    hidden_RCD: jax.Array,
    head_DV: jax.Array,
    targets_RC: jax.Array,
    *,
    temperature: float,
    chunk: int,
    logit_cap: float | None = None,
) -> Pair:
    """log pi(target) and the entropy of pi, both [R, C] float32 nats.

    Scans over chunks of the C axis and recomputes each chunk's logits in the backward pass: the
    largest array is [R, chunk, V] instead of [R, C, V] (112 GB at 32k tokens and a vocabulary of
    152k). The target's logit is a masked sum, not a gather, so the vocabulary may stay sharded.
    """
    R, C, D = hidden_RCD.shape
    chunk = min(chunk, C)
    pad = -C % chunk
    hidden_RCD = jnp.pad(hidden_RCD, ((0, 0), (0, pad), (0, 0)))
    targets_RC = jnp.pad(targets_RC, ((0, 0), (0, pad)))
    hidden_nRcD = jnp.moveaxis(hidden_RCD.reshape(R, -1, chunk, D), 1, 0)
    targets_nRc = jnp.moveaxis(targets_RC.reshape(R, -1, chunk), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
    def piece(head_DV: jax.Array, hidden_RcD: jax.Array, targets_Rc: jax.Array) -> Pair:
        weight = head_DV.astype(hidden_RcD.dtype)  # cast here: the gradient adds up in float32
        logits_RcV = jnp.einsum(
            "rcd,dv->rcv", hidden_RcD, weight, preferred_element_type=jnp.float32
        )
        logits_RcV = shard(logits_RcV, "batch", None, "vocab")
        logits_RcV = capped(logits_RcV, logit_cap) / temperature
        top_Rc1 = jax.lax.stop_gradient(logits_RcV.max(axis=-1, keepdims=True))
        weight_RcV = jnp.exp(logits_RcV - top_Rc1)
        total_Rc = weight_RcV.sum(axis=-1)
        normaliser_Rc = jnp.log(total_Rc) + top_Rc1[..., 0]
        ids_11V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_RcV.shape[-1]), 2)
        chosen_Rc = jnp.sum(logits_RcV, axis=-1, where=ids_11V == targets_Rc[..., None])
        entropy_Rc = normaliser_Rc - jnp.sum(weight_RcV * logits_RcV, axis=-1) / total_Rc
        return chosen_Rc - normaliser_Rc, entropy_Rc

    def step(carry: None, xs: Pair) -> tuple[None, Pair]:
        return carry, piece(head_DV, *xs)

    _, (logprobs_nRc, entropy_nRc) = jax.lax.scan(step, None, (hidden_nRcD, targets_nRc))

    def join(x_nRc: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_nRc, 0, 1).reshape(R, -1)[:, :C]

    return join(logprobs_nRc), join(entropy_nRc)


def completion_logprobs(
    params: Params,
    arch: Arch,
    batch: Batch,
    *,
    temperature: float,
    dtype: str,
    remat: str,
    chunk: int,
    attention_by: str = "xla",
) -> Pair:
    """log pi and entropy [R, C] of every completion token of a batch, at the run's temperature.

    Prompt positions never reach the head.
    """
    hidden_RTD = hidden_states(
        params,
        arch,
        batch.tokens_RT,
        batch.positions_RT,
        batch.groups_RT,
        batch.branches_RT,
        dtype=dtype,
        remat=remat,
        attention_by=attention_by,
    )

    def of_targets(
        hidden_RTD: jax.Array, head_DV: jax.Array, contexts_RC: jax.Array, targets_RC: jax.Array
    ) -> Pair:
        hidden_RCD = jnp.take_along_axis(hidden_RTD, contexts_RC[..., None], axis=1)
        return chunked_logprobs(
            hidden_RCD,
            head_DV,
            targets_RC,
            temperature=temperature,
            chunk=chunk,
            logit_cap=arch.logit_cap,
        )

    head_DV = shard(head(params), None, "vocab")
    rows = spec(("batch", None))
    return propagated(of_targets, (rows, rows))(
        hidden_RTD, head_DV, batch.contexts_RC, batch.targets_RC
    )
