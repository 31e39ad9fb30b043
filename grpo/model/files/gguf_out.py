"""Weights out as one .gguf file, for llama.cpp and what is built on it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo.model.arch import Arch
from grpo.model.files import families_gguf
from grpo.model.files.families_out import gguf_fields
from grpo.model.files.weights_out import (
    StoredTensor,
    interleaved_rows,
    rounded,
    stored_tensors,
    stored_values,
)
from grpo.model.params import Params

GGUF_DTYPES = ("float16", "q8_0", "bfloat16", "float32")
_GGML_TYPES = {"float16": "F16", "q8_0": "Q8_0", "bfloat16": "BF16", "float32": "F32"}
_FILE_TYPES = {
    "float16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "bfloat16": "MOSTLY_BF16",
    "float32": "ALL_F32",
}
_BLOCK = 32  # values that share a scale in Q8_0


def write_gguf(
    path: Path,
    params: Params,
    arch: Arch,
    *,
    dtype: str,
    name: str,
    add_tokenizer: Callable[[Any], None],
) -> None:
    """Writes a .gguf file. Every process must call it; process 0 writes.

    Args:
      path: of the file.
      params: the train form.
      arch: their shape.
      dtype: one of `GGUF_DTYPES`, of the matrices; norms are float32, as llama.cpp wants them.
        "q8_0": blocks of 32 values share a float16 scale; matrices whose rows are no multiple of
        32 are float16 then.
      name: of the model, for people.
      add_tokenizer: adds the tokenizer's metadata to the `gguf.GGUFWriter` it is given.

    Raises:
      ValueError: a shape that `gguf_fields` cannot express, or a value too large for `dtype`.
    """
    import gguf

    family, fields = gguf_fields(arch)
    tensors = stored_tensors(arch, families_gguf.GGUF_LLAMA_NAMES)
    writes = jax.process_index() == 0
    writer = gguf.GGUFWriter(path if writes else None, family)
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[dtype]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for field, value in fields.items():
        if isinstance(value, float):
            writer.add_float32(field, value)
        else:
            writer.add_uint32(field, value)
    add_tokenizer(writer)
    # All shapes come before the first values, so that no more than one tensor is ever held.
    for tensor in tensors:
        kind = _ggml_type(_dtype_of(tensor, dtype))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(tensor.shape) // block * size
        in_values = np.dtype(np.float32)  # what the shape counts, rather than bytes
        writer.add_tensor_info(tensor.name, tensor.shape, in_values, nbytes, raw_dtype=kind)
    if writes:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    heads = {"layers/q": arch.num_heads, "layers/k": arch.num_kv_heads}
    for tensor, values in zip(tensors, stored_values(params, tensors), strict=True):
        if tensor.path in heads and families_gguf.rotates_neighbours(family):
            values = interleaved_rows(values, heads[tensor.path])
        if writes:
            writer.write_tensor_data(_packed(values, _dtype_of(tensor, dtype), tensor.name))
    writer.close()


def _dtype_of(tensor: StoredTensor, dtype: str) -> str:
    if len(tensor.shape) == 1:
        return "float32"
    if dtype == "q8_0" and tensor.shape[-1] % _BLOCK:
        return "float16"
    return dtype


def _ggml_type(dtype: str) -> Any:
    import gguf

    return getattr(gguf.GGMLQuantizationType, _GGML_TYPES[dtype])


def _packed(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    import gguf

    if dtype == "q8_0":
        return gguf.quantize(values, _ggml_type(dtype))
    return rounded(values, dtype, name)
