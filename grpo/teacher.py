"""A second, frozen model beside the policy: both look at a batch in one program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from grpo.config import ModelConfig
from grpo.data.tokenizer import difference
from grpo.model import moe
from grpo.model.logprobs import Outputs, comparison, measured
from grpo.model.params import Params, num_params
from grpo.policy import Policy, lay_out
from grpo.source import Source, at_path
from grpo.structs import Batch, Comparison
from grpo.update import abstract_params


def make_teacher(source: Source, student: Policy, model: ModelConfig) -> Policy:
    """A policy of which nothing is trained: all its weights are its base, in the compute dtype.

    That is what blocks compute in, so nothing is lost beneath it; routers stay float32. The
    weights are read when they are first asked for.

    Args:
      source: of the teacher.
      student: who is to learn from it; the teacher lies on the same mesh.
      model: how both are computed.

    Raises:
      ValueError: the tokenizers are not the same, or the mesh does not divide the teacher.
    """
    check_tokens(source, student)
    try:
        teacher = lay_out(source.arch, source.tokenizer, student.mesh, model, temperature=1.0)
    except ValueError as error:
        raise ValueError(f"distil.teacher: {error}") from error
    dtype = model.compute_dtype

    def kept(path: str, array: jax.Array) -> jax.Array:
        stored = _stored_in(path, dtype)
        if array.dtype == stored:
            return array
        where = at_path(teacher.shardings, path)
        return jax.jit(lambda array: array.astype(stored), out_shardings=where)(array)

    def like(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        stored = _stored_in(jax.tree_util.keystr(path, simple=True, separator="/"), dtype)
        return jax.ShapeDtypeStruct(leaf.shape, stored, sharding=leaf.sharding)

    def of_rows(params: Params, base: Params, batch: Batch) -> Outputs:
        return teacher.outputs(base, {}, batch)

    return dataclasses.replace(
        teacher,
        outputs=of_rows,
        base=functools.cache(lambda: source.read(teacher.shardings, kept)),
        base_like=jax.tree_util.tree_map_with_path(like, abstract_params(teacher)),
    )


def check_tokens(source: Source, student: Policy) -> None:
    """Raises ValueError unless an id means the same to teacher and student.

    Embeddings may be padded to different sizes, as those of a family's small and large models are.
    """
    found = difference(student.tokenizer, source.tokenizer)
    if found is not None:
        raise ValueError(
            f"the policy and distil.teacher have different tokenizers: {found}. A teacher judges "
            "the policy's own token ids, so take one of the same family"
        )
    ids, rows = source.tokenizer.vocab_size, min(source.arch.vocab_size, student.arch.vocab_size)
    if rows < ids:
        raise ValueError(
            f"the tokenizer has {ids} ids, but the policy's model {student.arch.vocab_size} and "
            f"that of distil.teacher {source.arch.vocab_size}: some ids have no logit"
        )


def describe_teacher(source: Source, teacher: Policy, dtype: str) -> str:
    """A line for the start of the log."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(teacher.base_like))
    where = f"{source.workdir} after step {source.step}" if source.workdir else str(source.files)
    return (
        f"teacher: {where}, {num_params(source.arch):,} parameters, frozen in {dtype} "
        f"({size / 2**20:,.0f} MiB)"
    )


def taught(
    student: Policy,
    teacher: Policy,
    divergence: Callable[..., jax.Array],
    *,
    temperature: float,
    chunk: int,
) -> Policy:
    """The student as `grpo.update.Update` sees it: what it says of a token is a `Comparison`.

    Its base is that of both; sample with `student` itself.

    Args:
      student: what learns, all of it or adapters.
      teacher: of `make_teacher`.
      divergence: one of `grpo.divergence`, its numbers bound.
      temperature: of both.
      chunk: completion tokens whose logits exist at one time, per row and model.
    """
    measure = functools.partial(comparison, divergence=divergence)

    def compared(params: Params, base: Params, batch: Batch) -> tuple[Comparison, jax.Array]:
        # The teacher chooses its experts itself.
        unrouted = batch.replace(routes_RTLk=None)
        models = [
            student.outputs(params, base["student"], batch),
            teacher.outputs({}, base["teacher"], unrouted),
        ]
        return measured(measure, batch, models, temperature=temperature, chunk=chunk)

    return dataclasses.replace(
        student,
        logprobs=compared,
        base=functools.cache(lambda: {"student": student.base(), "teacher": teacher.base()}),
        base_like={"student": student.base_like, "teacher": teacher.base_like},
    )


def _stored_in(path: str, dtype: str) -> str:
    return "float32" if path.rpartition("/")[2] in moe.FLOAT32 else dtype
