"""Log-probabilities and entropy of chosen tokens, without ever holding [R, T, V]."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo.model.arch import Arch
from grpo.model.decoder import head, hidden_states
from grpo.model.masks import capped
from grpo.model.params import Params
from grpo.sharding import propagated, shard, spec
from grpo.structs import Batch, Comparison

Pair = tuple[jax.Array, jax.Array]
# (sampled tokens [R, c], logits [R, c, V] of each model) -> arrays [R, c]
Measure = Callable[..., Any]


class Outputs(NamedTuple):
    """What the logits of packed rows are made of: those of a slot are capped(hidden @ head).

    Attributes:
      hidden_RTD: final hidden states.
      head_DV: output matrix.
      logit_cap: see `grpo.model.masks.capped`.
    """

    hidden_RTD: jax.Array
    head_DV: jax.Array
    logit_cap: float | None


def outputs(
    params: Params,
    arch: Arch,
    batch: Batch,
    *,
    dtype: str,
    remat: str,
    attention_by: str = "xla",
) -> Outputs:
    """The trunk of a model over a batch; see `grpo.model.decoder.hidden_states`."""
    hidden_RTD = hidden_states(
        params,
        arch,
        batch.tokens_RT,
        batch.positions_RT,
        batch.groups_RT,
        batch.branches_RT,
        batch.routes_RTLk,
        dtype=dtype,
        remat=remat,
        attention_by=attention_by,
    )
    return Outputs(hidden_RTD, shard(head(params), None, "vocab"), arch.logit_cap)


def over_chunks(
    measure: Measure,
    hidden_RCD: Sequence[jax.Array],
    heads_DV: Sequence[jax.Array],
    targets_RC: jax.Array,
    *,
    temperature: float,
    chunk: int,
    logit_caps: Sequence[float | None],
) -> Any:
    """`measure(targets_Rc, *logits_RcV)` at all places: a tree of arrays [R, C].

    Scans over chunks of the C axis and recomputes each chunk's logits in the backward pass: the
    largest array is [R, chunk, V] instead of [R, C, V] (112 GB at 32k tokens and a vocabulary of
    152k), once a model.

    Args:
      measure: of logits divided by the temperature; the vocabulary may be sharded.
      hidden_RCD: of each model, widths may differ.
      heads_DV: of each model.
      targets_RC: int32 ids.
      temperature: of all.
      chunk: places at a time.
      logit_caps: of each model.
    """
    R, C = targets_RC.shape
    chunk = min(chunk, C)
    pad = -C % chunk

    def split(x_RC: jax.Array) -> jax.Array:
        x_RC = jnp.pad(x_RC, ((0, 0), (0, pad), *((0, 0),) * (x_RC.ndim - 2)))
        return jnp.moveaxis(x_RC.reshape(R, -1, chunk, *x_RC.shape[2:]), 1, 0)

    def join(x_nRc: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_nRc, 0, 1).reshape(R, -1)[:, :C]

    @partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
    def piece(
        heads_DV: Sequence[jax.Array], hidden_RcD: Sequence[jax.Array], targets_Rc: jax.Array
    ) -> Any:
        made = zip(hidden_RcD, heads_DV, logit_caps, strict=True)
        logits_RcV = [capped(_logits(*parts), cap) / temperature for *parts, cap in made]
        return measure(targets_Rc, *logits_RcV)

    def step(carry: None, xs: Any) -> tuple[None, Any]:
        return carry, piece(heads_DV, *xs)

    chunks = [split(x_RCD) for x_RCD in hidden_RCD], split(targets_RC)
    return jax.tree.map(join, jax.lax.scan(step, None, chunks)[1])


def _logits(hidden_RcD: jax.Array, head_DV: jax.Array) -> jax.Array:
    weight = head_DV.astype(hidden_RcD.dtype)  # cast here: the gradient adds up in float32
    logits_RcV = jnp.einsum("rcd,dv->rcv", hidden_RcD, weight, preferred_element_type=jnp.float32)
    return shard(logits_RcV, "batch", None, "vocab")


# ---- measures --------------------------------------------------------------------------------


def logprob_and_entropy(targets_Rc: jax.Array, logits_RcV: jax.Array) -> Pair:
    """log pi(target) and the entropy of pi, float32 nats.

    The target's logit is a masked sum, not a gather, so the vocabulary may stay sharded.
    """
    top_Rc1 = jax.lax.stop_gradient(logits_RcV.max(axis=-1, keepdims=True))
    weight_RcV = jnp.exp(logits_RcV - top_Rc1)
    total_Rc = weight_RcV.sum(axis=-1)
    normaliser_Rc = jnp.log(total_Rc) + top_Rc1[..., 0]
    entropy_Rc = normaliser_Rc - jnp.sum(weight_RcV * logits_RcV, axis=-1) / total_Rc
    return _chosen(logits_RcV, targets_Rc) - normaliser_Rc, entropy_Rc


def comparison(
    targets_Rc: jax.Array,
    student_RcV: jax.Array,
    teacher_RcV: jax.Array,
    *,
    divergence: Callable[..., jax.Array],
) -> tuple[Comparison, jax.Array]:
    """What student and teacher make of a place, and the student's entropy, float32 nats.

    The divergence alone carries a gradient, and none to the teacher.

    Args:
      targets_Rc: the tokens that the student sampled.
      student_RcV: logits.
      teacher_RcV: logits over the same tokens.
      divergence: one of `grpo.divergence`, its numbers bound.
    """
    student_RcV = jax.nn.log_softmax(student_RcV)
    teacher_RcV = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_RcV))
    fixed_RcV = jax.lax.stop_gradient(student_RcV)
    compared = Comparison(
        divergence_RC=divergence(student_RcV, teacher_RcV, targets_Rc),
        logprobs_RC=_chosen(fixed_RcV, targets_Rc),
        teacher_logprobs_RC=_chosen(teacher_RcV, targets_Rc),
    )
    return compared, -jnp.sum(jnp.exp(fixed_RcV) * fixed_RcV, axis=-1)


def _chosen(values_RcV: jax.Array, ids_Rc: jax.Array) -> jax.Array:
    ids_11V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, values_RcV.shape[-1]), 2)
    return jnp.sum(values_RcV, axis=-1, where=ids_11V == ids_Rc[..., None])


# ---- of a batch ------------------------------------------------------------------------------


def measured(
    measure: Measure, batch: Batch, models: Sequence[Outputs], *, temperature: float, chunk: int
) -> Any:
    """`over_chunks` at every completion token of a batch. Prompt positions never reach the head.

    Where vocabularies differ in size, the ids that all models have are all there are: the others
    are padding of an embedding, which no tokenizer makes.
    """
    V = min(model.head_DV.shape[1] for model in models)

    def of_targets(
        hidden_RTD: Sequence[jax.Array],
        heads_DV: Sequence[jax.Array],
        contexts_RC: jax.Array,
        targets_RC: jax.Array,
    ) -> Any:
        contexts_RC1 = contexts_RC[..., None]
        return over_chunks(
            measure,
            [jnp.take_along_axis(x_RTD, contexts_RC1, axis=1) for x_RTD in hidden_RTD],
            [head_DV[:, :V] for head_DV in heads_DV],
            targets_RC,
            temperature=temperature,
            chunk=chunk,
            logit_caps=[model.logit_cap for model in models],
        )

    return propagated(of_targets, spec(("batch", None)))(
        [model.hidden_RTD for model in models],
        [model.head_DV for model in models],
        batch.contexts_RC,
        batch.targets_RC,
    )


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
    """log pi and entropy [R, C] of every completion token of a batch, at the run's temperature."""
    model = outputs(params, arch, batch, dtype=dtype, remat=remat, attention_by=attention_by)
    return measured(logprob_and_entropy, batch, [model], temperature=temperature, chunk=chunk)
