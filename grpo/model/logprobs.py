"""Log-probabilities and entropy of chosen tokens, without ever holding [R, T, V]."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from grpo.model.arch import Arch
from grpo.model.decoder import head, hidden_states
from grpo.model.masks import capped
from grpo.model.params import Params
from grpo.sharding import TRAIN_RULES, propagated, shard, spec
from grpo.structs import Batch, Comparison

Pair = tuple[jax.Array, jax.Array]
# (sampled tokens [R, c], logits [R, c, V] of each model) -> arrays [R, c]
Measure = Callable[..., Any]
_KEPT = "logit_norms"  # what `over_chunks` does not compute again
_BLOCK = 128  # entries of the vocabulary that are added up first


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
      chunk: places at a time, at most.
      logit_caps: of each model.
    """
    R, C = targets_RC.shape
    chunk = math.ceil(C / math.ceil(C / chunk))  # of as many chunks, the shortest
    pad = -C % chunk

    def split(x_RC: jax.Array) -> jax.Array:
        x_RC = jnp.pad(x_RC, ((0, 0), (0, pad), *((0, 0),) * (x_RC.ndim - 2)))
        return jnp.moveaxis(x_RC.reshape(R, -1, chunk, *x_RC.shape[2:]), 1, 0)

    def join(x_nRc: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_nRc, 0, 1).reshape(R, -1)[:, :C]

    kept = jax.checkpoint_policies.save_only_these_names(_KEPT)

    @partial(jax.checkpoint, prevent_cse=False, policy=kept)
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


@jax.custom_vjp
def _logits(hidden_RcD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """hidden @ head, float32: factors in the dtype of `hidden`, the gradient of `head` in its own.

    The gradient is written with the narrow factor turned around, see `grpo.model.linear.linear`.
    """
    weight = head_DV.astype(hidden_RcD.dtype)
    logits_RcV = jnp.einsum("rcd,dv->rcv", hidden_RcD, weight, preferred_element_type=jnp.float32)
    return shard(logits_RcV, "batch", None, "vocab")


def _logits_forward(hidden_RcD: jax.Array, head_DV: jax.Array) -> tuple[jax.Array, Pair]:
    return _logits(hidden_RcD, head_DV), (hidden_RcD, head_DV)


def _logits_backward(kept: Pair, d_logits_RcV: jax.Array) -> Pair:
    hidden_RcD, head_DV = kept
    dtype = hidden_RcD.dtype
    d_logits_RcV = d_logits_RcV.astype(dtype)
    d_hidden_RcD = jnp.einsum("rcv,dv->rcd", d_logits_RcV, head_DV.astype(dtype))
    rows, wide = (((0, 1), (0, 1)), ((), ())), head_DV.dtype
    product = partial(jax.lax.dot_general, dimension_numbers=rows, preferred_element_type=wide)
    d_head_DV = jax.lax.platform_dependent(
        hidden_RcD,
        d_logits_RcV,
        cpu=lambda *both: product(*(x.astype(wide) for x in both)),  # knows no bf16 x bf16 = f32
        default=product,
    )
    return d_hidden_RcD, d_head_DV


_logits.defvjp(_logits_forward, _logits_backward)


# ---- measures --------------------------------------------------------------------------------


@jax.custom_vjp
def logprob_and_entropy(targets_Rc: jax.Array, logits_RcV: jax.Array) -> Pair:
    """log pi(target) and the entropy of pi, float32 nats.

    Forward and backward pass each take one exponential a logit. The target's logit is a masked
    sum, not a gather, so the vocabulary may stay sharded.
    """
    return _logprob_forward(targets_Rc, logits_RcV)[0]


def _logprob_forward(
    targets_Rc: jax.Array, logits_RcV: jax.Array
) -> tuple[Pair, tuple[jax.Array, ...]]:
    top_Rc1 = logits_RcV.max(axis=-1, keepdims=True)
    below_RcV = logits_RcV - top_Rc1
    weight_RcV = jnp.exp(below_RcV)
    chosen_RcV = _is_chosen(targets_Rc, logits_RcV) * below_RcV
    total_Rc, weighted_Rc, chosen_Rc = _sums(weight_RcV, weight_RcV * below_RcV, chosen_RcV)
    log_total_Rc = jnp.log(total_Rc)
    norm_Rc, entropy_Rc = checkpoint_name(
        (top_Rc1[..., 0] + log_total_Rc, log_total_Rc - weighted_Rc / total_Rc), _KEPT
    )
    return (chosen_Rc - log_total_Rc, entropy_Rc), (targets_Rc, logits_RcV, norm_Rc, entropy_Rc)


def _logprob_backward(kept: tuple[jax.Array, ...], d_out: Pair) -> tuple[None, jax.Array]:
    targets_Rc, logits_RcV, norm_Rc, entropy_Rc = kept
    d_logprob_Rc1, d_entropy_Rc1 = (d[..., None] for d in d_out)
    logprob_RcV = logits_RcV - norm_Rc[..., None]
    of_entropy_RcV = d_entropy_Rc1 * (logprob_RcV + entropy_Rc[..., None])
    of_chosen_RcV = _is_chosen(targets_Rc, logits_RcV) * d_logprob_Rc1
    return None, of_chosen_RcV - jnp.exp(logprob_RcV) * (d_logprob_Rc1 + of_entropy_RcV)


logprob_and_entropy.defvjp(_logprob_forward, _logprob_backward)


def _sums(*arrays_RcV: jax.Array) -> list[jax.Array]:
    """[R, c] of each array, in one reduction of all of them where the vocabulary is not split.

    XLA on a CPU would make the exponentials once for each sum. It also adds one number after
    another, which loses digits over a whole vocabulary: blocks first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape[str(TRAIN_RULES["vocab"])] > 1:
        return [x_RcV.sum(axis=-1) for x_RcV in arrays_RcV]
    R, c, V = arrays_RcV[0].shape
    pad = (0, 0), (0, 0), (0, -V % _BLOCK)
    blocks_Rcnb = [jnp.pad(x_RcV, pad).reshape(R, c, -1, _BLOCK) for x_RcV in arrays_RcV]
    of_blocks = jax.lax.reduce(
        blocks_Rcnb,
        [jnp.float32(0)] * len(blocks_Rcnb),
        lambda some, more: [a + b for a, b in zip(some, more, strict=True)],
        dimensions=(3,),
    )
    return [x_Rcn.sum(axis=-1) for x_Rcn in of_blocks]


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
    return jnp.sum(values_RcV, axis=-1, where=_is_chosen(ids_Rc, values_RcV))


def _is_chosen(ids_Rc: jax.Array, like_RcV: jax.Array) -> jax.Array:
    """bool [R, c, V]."""
    ids_11V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, like_RcV.shape[-1]), 2)
    return ids_11V == ids_Rc[..., None]


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
