"""The policy as the stages see it: weights in, decode form out, log-probs of a batch."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from grpo.config import Config, ModelConfig
from grpo.data.tokenizer import Tokenizer, load_tokenizer, with_thinking
from grpo.model.arch import Arch
from grpo.model.attention import chosen_attention
from grpo.model.decoder import to_decode
from grpo.model.logprobs import completion_logprobs
from grpo.model.params import Params, decode_table, init_params, param_table
from grpo.sharding import DECODE_RULES, make_mesh, param_shardings, propagated, specs_of
from grpo.source import new_arch, open_source
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
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.axis_types, expert=sizes.expert)
    if config.model.source:
        source = open_source(config.model.source)
        arch, tokenizer, read = source.arch, source.tokenizer, source.read
        if config.model.thinking != "default":
            tokenizer = with_thinking(tokenizer, config.model.thinking == "on")
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
      read: reads weights, given their shardings; None draws random ones.
    """
    shardings = param_shardings(param_table(arch), mesh)
    decode_form = param_shardings(decode_table(arch), mesh, DECODE_RULES)
    platform = mesh.devices.flat[0].platform
    attention_by = chosen_attention(model.attention, platform, arch, model.compute_dtype)

    def initial_params() -> Params:
        if read is not None:
            return read(shardings)
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
