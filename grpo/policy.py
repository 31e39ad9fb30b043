"""The policy as the stages see it: weights in, decode form out, log-probs of a batch."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo.config import Config, LoraConfig, ModelConfig
from grpo.data.tokenizer import Tokenizer, with_thinking
from grpo.model.arch import Arch
from grpo.model.attention import chosen_attention
from grpo.model.decoder import to_decode
from grpo.model.logprobs import Outputs, completion_logprobs, outputs
from grpo.model.lora import (
    adapted,
    adapter_table,
    base_norm,
    change_norm,
    init_adapters,
    merged,
    target_names,
)
from grpo.model.params import (
    Params,
    ParamSpec,
    decode_table,
    init_params,
    map_table,
    num_params,
    param_table,
)
from grpo.model.quantise import int8_matrices, int8_table, stored, stored_as, stored_table
from grpo.model.stack import summed_after
from grpo.sharding import (
    DECODE_RULES,
    make_mesh,
    param_shardings,
    platform_of,
    propagated,
    replicated,
    specs_of,
)
from grpo.source import at_path, new_arch, new_tokenizer, open_source
from grpo.structs import Batch

Read = Callable[..., Params]
# (parameters, base, batch) -> log-probs and entropy; with a teacher, a `Comparison` and entropy
Logprobs = Callable[[Params, Params, Batch], tuple[Any, jax.Array]]
_ADAPTERS = 0x6C6F7261  # keeps their random numbers apart from those of a new model's weights


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model on a mesh: parameters that are trained and, beneath adapters, a base that is not.

    Attributes:
      arch: its shape.
      tokenizer: its tokenizer.
      mesh: the devices.
      table: of the parameters that are trained: all of them, or adapters.
      shardings: theirs.
      initial_params: () -> the parameters a run starts from, sharded.
      to_decode: (parameters, base) -> the decode form of the whole, in one jitted cast, unstack
        and reshard.
      logprobs: (parameters, base, batch) -> log-probs and entropy [R, C]; not jitted.
      outputs: (parameters, base, batch) -> what its logits are made of; not jitted.
      decode_shardings: of the decode form.
      base: () -> the frozen weights, read when first asked for; empty if all are trained.
      base_like: their shapes, dtypes and shardings.
      change: parameters -> metrics of how far adapters have moved the policy from its base.
      merged: (parameters, base) -> float32 weights of the whole, as `param_table` lays them out.
    """

    arch: Arch
    tokenizer: Tokenizer
    mesh: Mesh
    table: dict[str, Any]
    shardings: dict[str, Any]
    initial_params: Callable[[], Params]
    to_decode: Callable[[Params, Params], Params]
    logprobs: Logprobs
    outputs: Callable[[Params, Params, Batch], Outputs]
    decode_shardings: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: Callable[[], Params] = dict
    base_like: Params = dataclasses.field(default_factory=dict)
    change: Callable[[Params], dict[str, float]] = lambda params: {}
    merged: Callable[[Params, Params], Params] = lambda params, base: params

    def for_decoding(self, params: Params) -> Params:
        """The decode form of the policy with these parameters."""
        return self.to_decode(params, self.base())


def make_policy(config: Config) -> Policy:
    """Reads what the model is and lays it out; weights are read only by `initial_params`."""
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.axis_types, expert=sizes.expert)
    if config.model.source:
        source = open_source(config.model.source)
        arch, tokenizer, read = source.arch, source.tokenizer, source.read
        if config.model.thinking != "default":
            tokenizer = with_thinking(tokenizer, config.model.thinking == "on")
    else:
        tokenizer = new_tokenizer(config.model)
        arch, read = new_arch(config.model, tokenizer.vocab_size), None
    if arch.experts or arch.latent:
        _plain_only(config)
    return lay_out(
        arch,
        tokenizer,
        mesh,
        config.model,
        lora=config.lora,
        sampled=config.sample.weights,
        temperature=config.sample.temperature,
        seed=config.seed,
        read=read,
    )


def _plain_only(config: Config) -> None:
    """Refuses what mixtures of experts and latent attention do not go together with."""
    for name, value, plain in (
        ("lora.rank", config.lora.rank, 0),
        ("sample.weights", config.sample.weights, "compute"),
        ("sample.cache", config.sample.cache, "compute"),
    ):
        if value != plain:
            raise ValueError(
                f"{name} is {value!r}, but the model has experts or latent attention, for which "
                f"only {plain!r} is there"
            )


def lay_out(
    arch: Arch,
    tokenizer: Tokenizer,
    mesh: Mesh,
    model: ModelConfig,
    *,
    temperature: float,
    lora: LoraConfig | None = None,
    sampled: str = "compute",
    seed: int = 0,
    read: Read | None = None,
) -> Policy:
    """A policy of the given shape on a mesh.

    Args:
      arch: its shape.
      tokenizer: its tokenizer.
      mesh: the devices.
      model: how it is computed; the sizes in it are not looked at.
      temperature: of the log-probs.
      lora: adapters; None or rank 0 trains all weights.
      sampled: "int8" quantises the matrices of the decode form.
      seed: of random weights.
      read: reads weights, given their shardings and, if not the arrays themselves are wanted,
        what becomes of each; None draws random ones.

    Raises:
      ValueError: the mesh does not divide the model, or a target of `lora` is none of its matrices.
    """
    whole, join = param_table(arch), _all_trained
    table, base_table, more = whole, dict[str, Any](), dict[str, Any]()
    if lora is not None and lora.rank:
        names, scale = target_names(whole, lora.targets), lora.alpha / lora.rank
        base_table = stored_table(whole, model.base_dtype)
        table, join = adapter_table(whole, lora.rank, names), partial(_on_base, scale=scale)
        base = functools.cache(partial(_base, arch, mesh, model.base_dtype, seed, read))
        more = {
            "base": base,
            "base_like": _base_like(whole, model.base_dtype, mesh),
            "change": _change(base, names, scale, mesh),
            "merged": partial(merged, scale=scale, table=whole),
        }
    shardings = param_shardings(table, mesh)

    def initial_params() -> Params:
        key = jax.random.key(seed)
        if more:
            draw = propagated(partial(init_adapters, table), specs_of(shardings))
            make = jax.jit(draw, out_shardings=shardings)
            return make(jax.random.fold_in(key, _ADAPTERS))
        return _weights(arch, shardings, key, read)

    in_arrays, in_table = _SAMPLED[sampled]

    def decode_form(params: Params, base: Params) -> Params:
        return to_decode(join(params, base, in_arrays), arch, model.compute_dtype)

    decoding = decode_table(join(table, base_table, in_table), arch.num_layers)
    decode_shardings = param_shardings(decoding, mesh, DECODE_RULES)
    platform = platform_of(mesh)
    settings: Any = {
        "dtype": model.compute_dtype,
        "remat": model.remat,
        "attention_by": chosen_attention(model.attention, platform, arch, model.compute_dtype),
    }

    def logprobs(params: Params, base: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        whole, chunk = join(params, base), model.logprob_chunk
        return completion_logprobs(
            whole, arch, batch, temperature=temperature, chunk=chunk, **settings
        )

    def of_rows(params: Params, base: Params, batch: Batch) -> Outputs:
        return outputs(join(params, base), arch, batch, **settings)

    return Policy(
        arch=arch,
        tokenizer=tokenizer,
        mesh=mesh,
        table=table,
        shardings=shardings,
        initial_params=initial_params,
        to_decode=jax.jit(
            propagated(decode_form, specs_of(decode_shardings)), out_shardings=decode_shardings
        ),
        decode_shardings=decode_shardings,
        logprobs=logprobs,
        outputs=of_rows,
        **more,
    )


def describe_adapters(policy: Policy, base_dtype: str) -> str:
    """A line for the start of the log: what is trained, and beneath it what is not."""
    arch, leaves = policy.arch, partial(jax.tree.leaves, is_leaf=lambda x: isinstance(x, ParamSpec))
    trained = sum(math.prod(spec.shape) for spec in leaves(policy.table))
    base = jax.tree.leaves(policy.base_like)
    size = sum(array.size * array.dtype.itemsize for array in base)
    return (
        f"adapters on {' '.join(policy.table['layers'])}: {trained:,} numbers are trained, "
        f"{num_params(arch):,} are frozen in {base_dtype} ({size / 2**20:,.0f} MiB)"
    )


# How parameters and base make the weights of the whole, arrays or tables; `matrices` is done to
# those of full size, never to adapters.

Matrices = Callable[[Mapping[str, Any]], dict[str, Any]]


def _as_they_are(weights: Mapping[str, Any]) -> dict[str, Any]:
    return dict(weights)


# What becomes of them in the decode form, and of their table.
_SAMPLED: dict[str, tuple[Matrices, Matrices]] = {
    "compute": (_as_they_are, _as_they_are),
    "int8": (int8_matrices, int8_table),
}


def _all_trained(
    params: Mapping[str, Any], base: Mapping[str, Any], matrices: Matrices = _as_they_are
) -> dict[str, Any]:
    return matrices(params)


def _on_base(
    params: Mapping[str, Any],
    base: Mapping[str, Any],
    matrices: Matrices = _as_they_are,
    *,
    scale: float,
) -> dict[str, Any]:
    return adapted({"layers": summed_after(params["layers"])}, matrices(base), scale)


def _weights(
    arch: Arch,
    shardings: dict[str, Any],
    key: jax.Array,
    read: Read | None,
) -> Params:
    """All weights in float32: read, or drawn at random."""
    if read is not None:
        return read(shardings)
    make = propagated(partial(init_params, arch), specs_of(shardings))
    return jax.jit(make, out_shardings=shardings)(key)


def _base(arch: Arch, mesh: Mesh, dtype: str, seed: int, read: Read | None) -> Params:
    """The frozen weights; each is brought to `dtype` on the devices as soon as it is there."""
    table = param_table(arch)
    shardings = param_shardings(table, mesh)
    kept = param_shardings(stored_table(table, dtype), mesh)
    if read is None:
        draw = propagated(lambda key: stored(init_params(arch, key), dtype), specs_of(kept))
        return jax.jit(draw, out_shardings=kept)(jax.random.key(seed))

    def store(path: str, array: jax.Array) -> Any:
        where = at_path(kept, path)
        name = path.rpartition("/")[2]
        as_stored = propagated(lambda array: stored_as(name, array, dtype), specs_of(where))
        return jax.jit(as_stored, out_shardings=where)(array)

    return read(shardings, store)


def _base_like(table: Mapping[str, Any], dtype: str, mesh: Mesh) -> Params:
    float32 = map_table(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), table)
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(partial(stored, dtype=dtype), float32),
        param_shardings(stored_table(table, dtype), mesh),
    )


def _change(
    base: Callable[[], Params], names: tuple[str, ...], scale: float, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    everywhere = replicated(mesh)

    def of(norm: Callable[..., jax.Array]) -> Callable[[Params], jax.Array]:
        return jax.jit(propagated(norm, everywhere.spec), out_shardings=everywhere)

    added = of(partial(change_norm, scale=scale))

    @functools.cache
    def frozen() -> float:
        return float(of(partial(base_norm, names=names))(base()))

    return lambda params: {"lora/weight_change": float(added(params)) / frozen()}
