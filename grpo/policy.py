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
from grpo.model.decoder import to_decode
from grpo.model.logprobs import completion_logprobs
from grpo.model.params import Params, ParamSpec, decode_table, init_params, param_table
from grpo.model.weights import load_weights, read_arch
from grpo.sharding import DECODE_RULES, make_mesh, param_shardings
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
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if config.model.source:
        path = fetch.model_path(config.model.source)
        arch, tokenizer = read_arch(path), load_tokenizer(path)
        read = partial(load_weights, path, arch)
    else:
        tokenizer = load_tokenizer("bytes")
        arch, read = new_arch(config.model, tokenizer.vocab_size), None
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

    def initial_params() -> Params:
        if read is not None:
            return read(partial(_put, shardings))
        make = jax.jit(partial(init_params, arch), out_shardings=shardings)
        return make(jax.random.key(seed))

    return Policy(
        arch=arch,
        tokenizer=tokenizer,
        mesh=mesh,
        shardings=shardings,
        initial_params=initial_params,
        for_decoding=jax.jit(
            partial(to_decode, arch=arch, dtype=model.compute_dtype),
            out_shardings=param_shardings(decode_table(arch), mesh, DECODE_RULES),
        ),
        logprobs=partial(
            _logprobs,
            arch=arch,
            temperature=temperature,
            dtype=model.compute_dtype,
            remat=model.remat,
            chunk=model.logprob_chunk,
        ),
    )


def _logprobs(params: Params, batch: Batch, **settings: Any) -> tuple[jax.Array, jax.Array]:
    return completion_logprobs(params, batch=batch, **settings)


def new_arch(model: ModelConfig, vocab_size: int) -> Arch:
    """The shape of a model made anew, from the sizes in the configuration."""
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


def _put(shardings: dict[str, Any], path: str, spec: ParamSpec, array: np.ndarray) -> jax.Array:
    """One array of the table ("layers/q") to its devices."""
    sharding: Any = shardings
    for name in path.split("/"):
        sharding = sharding[name]
    return jax.device_put(array, sharding)
