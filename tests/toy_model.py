"""What several test files share: a model small enough to compile in a second, and its tokenizer."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo.batch import TOKEN_VALUES, RowShape, Sample, pack
from grpo.model.arch import Arch
from grpo.model.decoder import to_decode
from grpo.model.logprobs import Outputs, completion_logprobs, outputs
from grpo.model.params import Params, ParamSpec, map_table, param_table
from grpo.policy import Policy
from grpo.sharding import AXIS_TYPES, MESH_AXES, param_shardings
from grpo.structs import Batch

ARCH = Arch(
    vocab_size=32,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=4,
    rope_theta=100.0,
    max_positions=64,
)


@functools.cache
def _drawn(arch: Arch) -> Params:
    rng = np.random.default_rng(0)

    def draw(spec: ParamSpec) -> np.ndarray:
        if not spec.fan_in:
            return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        return (rng.normal(size=spec.shape) / spec.fan_in**0.5).astype(np.float32)

    return map_table(draw, param_table(arch))


def toy_params(arch: Arch = ARCH) -> Params:
    """Random weights; the norm scales too, which are born as ones and would hide a missing one.

    Copies, since some tests donate them.
    """
    return jax.tree.map(jnp.array, _drawn(arch))


def mesh_of(
    data: int = 1, fsdp: int = 1, tensor: int = 1, axis_types: str = "auto", expert: int = 1
) -> Mesh:
    """A mesh over the first data x fsdp x tensor x expert of the fake devices."""
    sizes = (data, fsdp, tensor, expert)
    devices, types = jax.devices()[: math.prod(sizes)], (AXIS_TYPES[axis_types],) * 4
    return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)


@dataclasses.dataclass(frozen=True)
class ToyTokenizer:
    """Ids 0..25 are the letters, 26..29 two letters each; 30 and 31 end a completion."""

    vocab_size: int = 32
    eos_ids: tuple[int, ...] = (31, 30)
    pad_id: int = 31
    bos_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        pieces = [*"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "ef", "gh", "", ""]
        return "".join(pieces[i] for i in ids)


def policy_on(mesh: Mesh, arch: Arch = ARCH, *, chunk: int = 4) -> Policy:
    """The toy model on a mesh, in float32."""
    shardings = param_shardings(param_table(arch), mesh)
    settings: Any = {"dtype": "float32", "remat": "none"}

    def logprobs(params: Params, base: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        return completion_logprobs(params, arch, batch, temperature=0.7, chunk=chunk, **settings)

    def of_rows(params: Params, base: Params, batch: Any) -> Outputs:
        return outputs(params, arch, batch, **settings)

    return Policy(
        arch=arch,
        tokenizer=ToyTokenizer(),
        mesh=mesh,
        table=param_table(arch),
        shardings=shardings,
        initial_params=lambda: jax.device_put(toy_params(arch), shardings),
        to_decode=jax.jit(lambda params, base: to_decode(params, arch, "float32")),
        logprobs=logprobs,
        outputs=of_rows,
    )


MAX_PROMPT, MAX_NEW = 4, 8


def ragged_samples(groups: int = 8, group_size: int = 4, seed: int = 0) -> list[Sample]:
    """Completions of all lengths, every token with numbers of its own; some do not train."""
    rng = np.random.default_rng(seed)

    def one(group: int, prompt: list[int]) -> Sample:
        completion = rng.integers(0, 32, rng.integers(1, MAX_NEW + 1)).tolist()
        return Sample(
            group=group,
            prompt=prompt,
            completion=completion,
            trains=bool(rng.random() < 0.9),
            advantage=float(np.float32(rng.normal())),
            **{n: rng.normal(-3.5, 0.5, len(completion)).astype("f4") for n in TOKEN_VALUES},  # type: ignore[arg-type]
        )

    prompts = [rng.integers(0, 30, rng.integers(1, MAX_PROMPT + 1)).tolist() for _ in range(groups)]
    return [one(group, prompt) for group, prompt in enumerate(prompts) for _ in range(group_size)]


def one_a_row(samples: Sequence[Sample]) -> Batch:
    """The plain form: a row is one prompt and one completion, whatever packing would do."""
    shape = RowShape(rows=1, tokens=MAX_PROMPT + MAX_NEW, completion_tokens=MAX_NEW)
    rows = [pack([sample], shape).microbatches[0] for sample in samples]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
