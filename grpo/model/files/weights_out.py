"""Weights out: our parameters under the names and in the layout that other programs read.

The inverse of `grpo.model.files.weights`, over the same tables. Tensors leave one at a time: only
one is ever whole, in the memory of a device or of a host, besides the shard that is being filled.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from grpo.model import families
from grpo.model.arch import Arch
from grpo.model.files.weights import INPUT_AXES, flat_table, their_names
from grpo.model.params import Params, ParamSpec
from grpo.sharding import replicated

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file holds it.

    Attributes:
      name: theirs.
      path: of ours, such as "layers/q".
      place: which layer of ours it is, and which expert; (): ours is not stacked.
      shape: [outputs, inputs] for a matrix.
    """

    name: str
    path: str
    place: tuple[int, ...]
    shape: tuple[int, ...]


def stored_tensors(arch: Arch, names: Mapping[str, str]) -> list[StoredTensor]:
    """What a file of this model holds, in the order of its layers.

    Args:
      arch: shape of the model.
      names: our path -> their name, with {layer} and {expert}.
    """

    def tensors(path: str, spec: ParamSpec) -> list[StoredTensor]:
        return [
            StoredTensor(name, path, place, _stored_shape(path, spec.shape[len(place) :]))
            for place, name in their_names(names, arch.first_dense, path, spec)
        ]

    def order(tensor: StoredTensor) -> tuple[bool, int]:
        """Layers in between, one after the other; within one as the table has it."""
        first = arch.first_dense if tensor.path.startswith("layers/") else 0
        if tensor.place:
            return True, first + tensor.place[0]
        return tensor.path != "embed", arch.num_layers

    found = [tensor for path, spec in flat_table(arch) for tensor in tensors(path, spec)]
    return sorted(found, key=order)


def stored_values(params: Params, tensors: list[StoredTensor]) -> Iterator[np.ndarray]:
    """The values of each tensor, float32 and in its stored shape, one after the other.

    Every process of a run takes part, and each gets all values.
    """
    for tensor in tensors:
        leaf: Any = params
        for name in tensor.path.split("/"):
            leaf = leaf[name]
        values = _gathered(leaf, tensor.place)
        inputs = INPUT_AXES.get(tensor.path.rpartition("/")[2])
        if inputs is not None:
            values = values.reshape(math.prod(values.shape[:inputs]), -1).T.reshape(tensor.shape)
        yield np.ascontiguousarray(values)


def write_safetensors(
    folder: Path, params: Params, arch: Arch, *, dtype: str, max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index, into `folder`.

    Every process must call it; process 0 writes.

    Args:
      folder: exists.
      params: the train form.
      arch: their shape.
      dtype: one of `DTYPES`; values are rounded to the nearest.
      max_shard_bytes: of one file; a larger tensor gets a file of its own.

    Raises:
      ValueError: a value is too large for `dtype`, or not finite.
    """
    tensors = stored_tensors(arch, families.hf_names(arch))
    shards = _shards(tensors, DTYPES[dtype].itemsize, max_shard_bytes)
    files = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        held: dict[str, np.ndarray] = {}
        for tensor, values in zip(shard, stored_values(params, shard), strict=True):
            if jax.process_index() == 0:
                held[tensor.name] = rounded(values, dtype, tensor.name)
        if held:
            # transformers refuses files that do not name their framework.
            save_file(held, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # it makes them readable for the owner alone
    if len(files) > 1 and jax.process_index() == 0:
        total = sum(math.prod(tensor.shape) for tensor in tensors) * DTYPES[dtype].itemsize
        index = {
            "metadata": {"total_size": total},
            "weight_map": {
                tensor.name: file
                for file, shard in zip(files, shards, strict=True)
                for tensor in shard
            },
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def rounded(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """`values` in `dtype`, rounded to the nearest.

    Raises:
      ValueError: one of them is not finite there; says which tensor.
    """
    with np.errstate(over="ignore"):  # told below
        result = values.astype(DTYPES[dtype])
    if not np.isfinite(result.astype(np.float32)).all():
        largest = float(np.max(np.abs(values)))
        raise ValueError(
            f"tensor {name}: values up to {largest:g} have no finite {dtype} form; "
            "write another dtype"
        )
    return result


def interleaved_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Query or key rows in llama.cpp's rotary order: inverse of `weights.half_split_rows`.

    Args:
      weight: [heads * H, D].
      num_heads: heads stacked along the rows.
    """
    rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    inputs = INPUT_AXES.get(path.rpartition("/")[2])
    if inputs is None:
        return shape
    outputs = (math.prod(shape[inputs:]),)
    return (*outputs, math.prod(shape[:inputs])) if inputs else outputs


def _shards(tensors: list[StoredTensor], itemsize: int, max_bytes: int) -> list[list[StoredTensor]]:
    """The tensors in their order, a new shard begun where the next one would not fit."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _gathered(leaf: jax.Array, place: tuple[int, ...]) -> np.ndarray:
    """An array, or one layer of it, whole on this host, in float32."""
    picked = _picked(leaf, place) if place else leaf
    if not picked.is_fully_addressable:
        picked = _everywhere(picked)
    return np.asarray(picked, np.float32)


@jax.jit
def _picked(stacked: jax.Array, place: tuple[int, ...]) -> jax.Array:
    for number in place:
        stacked = jax.lax.dynamic_index_in_dim(stacked, number, keepdims=False)
    return stacked


def _everywhere(x: jax.Array) -> jax.Array:
    sharding: Any = x.sharding  # that of an array over many hosts has a mesh
    return jax.jit(_same, out_shardings=replicated(sharding.mesh))(x)


def _same(x: jax.Array) -> jax.Array:
    return x
