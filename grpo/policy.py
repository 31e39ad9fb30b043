"""The policy as the stages see it: weights in, decode form out, log-probs of a batch."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo import fetch
from grpo.config import Config, ModelConfig
from grpo.data.tokenizer import Tokenizer, load_tokenizer
from grpo.model.arch import Arch
from grpo.model.attention import chosen_attention
from grpo.model.decoder import to_decode
from grpo.model.logprobs import completion_logprobs
from grpo.model.params import Params, ParamSpec, decode_table, init_params, param_table
from grpo.model.weights import StoredArray, load_weights, read_arch
from grpo.sharding import DECODE_RULES, make_mesh, param_shardings, propagated, specs_of
from grpo.structs import Batch

Logprobs = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model on a mesh.

    Attributes:
      arch: its shape.
      tokenizer: its tokenizer.
      mesh: the devices.
      shardings: of the train form's parameters.
      initial_params: () -> the parameters a run starts from, sharded.
      for_decoding: train form -> decode form, in one jitted cast, unstack and reshard.
      logprobs: (params, batch) -> log-probs and entropy [R, C]; not jitted.
    """

    arch: Arch
    tokenizer: Tokenizer
    mesh: Mesh
    shardings: dict[str, Any]
    initial_params: Callable[[], Params]
    for_decoding: Callable[[Params], Params]
    logprobs: Logprobs


def make_policy(config: Config) -> Policy:
    """Reads what the model is and lays it out; weights are read only by `initial_params`."""
    sizes = config.mesh
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.axis_types)
    if config.model.source:
        path = fetch.model_path(config.model.source)
        arch, tokenizer = read_arch(path), load_tokenizer(path)
        read = partial(load_weights, path, arch)
    else:
        tokenizer = load_tokenizer("bytes")
        arch, read = _new_arch(config.model, tokenizer.vocab_size), None
    return lay_out(
        arch,
        tokenizer,
        mesh,
        config.model,
        temperature=config.sample.temperature,
        seed=config.seed,
        read=read,
    )


def lay_out(
    arch: Arch,
    tokenizer: Tokenizer,
    mesh: Mesh,
    model: ModelConfig,
    *,
    temperature: float,
    seed: int = 0,
    read: Callable[[Any], Params] | None = None,
) -> Policy:
    """A policy of the given shape on a mesh.

    Args:
      arch: its shape.
      tokenizer: its tokenizer.
      mesh: the devices.
      model: how it is computed; the sizes in it are not looked at.
      temperature: of the log-probs.
      seed: of random weights.
      read: reads weights, given what puts one array on the devices; None draws random ones.
    """
    shardings = param_shardings(param_table(arch), mesh)
    attention_by = chosen_attention(
        model.attention,
        mesh.devices.flat[0].platform,
        head_width=arch.head_width,
        dtype=model.compute_dtype,
    )
    decode_form = param_shardings(decode_table(arch), mesh, DECODE_RULES)

    def initial_params() -> Params:
        if read is not None:
            return read(partial(_put, shardings))
        make = propagated(partial(init_params, arch), specs_of(shardings))
        return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))

    return Policy(
        arch=arch,
        tokenizer=tokenizer,
        mesh=mesh,
        shardings=shardings,
        initial_params=initial_params,
        for_decoding=jax.jit(
            propagated(
                partial(to_decode, arch=arch, dtype=model.compute_dtype), specs_of(decode_form)
            ),
            out_shardings=decode_form,
        ),
        logprobs=partial(
            _logprobs,
            arch=arch,
            temperature=temperature,
            dtype=model.compute_dtype,
            remat=model.remat,
            chunk=model.logprob_chunk,
            attention_by=attention_by,
        ),
    )


def _logprobs(params: Params, batch: Batch, **settings: Any) -> tuple[jax.Array, jax.Array]:
    return completion_logprobs(params, batch=batch, **settings)


def _new_arch(model: ModelConfig, vocab_size: int) -> Arch:
    if model.width % model.num_heads:
        raise ValueError(
            f"model.width ({model.width}) must be a multiple of model.num_heads "
            f"({model.num_heads}): each head gets an equal share"
        )
    return Arch(
        vocab_size=vocab_size,
        width=model.width,
        mlp_width=model.mlp_width,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_width=model.width // model.num_heads,
    )


def _put(
    shardings: dict[str, Any], path: str, spec: ParamSpec, array: StoredArray | np.ndarray
) -> jax.Array:
    """One array of the table ("layers/q") to its devices, shard by shard.

    Only the shards of this host's devices are read, each once, and one at a time is held.
    """
    sharding: Any = shardings
    for name in path.split("/"):
        sharding = sharding[name]
    where: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        bounds = tuple(axis.indices(n)[:2] for axis, n in zip(index, array.shape, strict=True))
        where.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in where.items():
        values = array[tuple(slice(*ends) for ends in bounds)]
        shards += [jax.device_put(values, device) for device in devices]
        jax.block_until_ready(shards)  # so that `values` can go before the next are read
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)
