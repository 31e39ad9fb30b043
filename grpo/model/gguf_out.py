"""Weights out as one .gguf file, for llama.cpp and what is built on it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo.model import families_gguf
from grpo.model.arch import Arch
from grpo.model.families_out import add_gguf_fields
from grpo.model.params import Params
from grpo.model.weights_out import interleaved_rows, rounded, stored_tensors, stored_values

GGUF_DTYPES = ("float16", "q8_0", "bfloat16", "float32")
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
      ValueError: a shape that GGUF's Llama cannot express, or a value too large for `dtype`.
    """
    import gguf

    kinds = {
        "float16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
        "bfloat16": gguf.GGMLQuantizationType.BF16,
        "float32": gguf.GGMLQuantizationType.F32,
    }
    file_types = {
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
        "float32": gguf.LlamaFileType.ALL_F32,
    }
    tensors = stored_tensors(arch, families_gguf.GGUF_LLAMA_NAMES)
    heads = {"layers/q": arch.num_heads, "layers/k": arch.num_kv_heads}
    writes = jax.process_index() == 0
    # Metadata comes first in the file, and says how large each tensor is: so all is told before
    # the first tensor is fetched, and no more than one is held.
    writer = gguf.GGUFWriter(path if writes else None, "llama")
    writer.add_name(name)
    writer.add_file_type(file_types[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_gguf_fields(writer, arch)
    add_tokenizer(writer)
    stored = {tensor.name: _kind_of(tensor.shape, dtype) for tensor in tensors}
    for tensor in tensors:
        kind = kinds[stored[tensor.name]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(tensor.shape) // block * size
        values_dtype = np.dtype(np.float32)  # the shape is in values, not in bytes
        writer.add_tensor_info(tensor.name, tensor.shape, values_dtype, nbytes, raw_dtype=kind)
    if writes:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    for tensor, values in zip(tensors, stored_values(params, tensors), strict=True):
        if tensor.path in heads:
            values = interleaved_rows(values, heads[tensor.path])
        if writes:
            chosen = stored[tensor.name]
            packed = chosen == "q8_0"
            writer.write_tensor_data(
                gguf.quantize(values, kinds[chosen])
                if packed
                else rounded(values, chosen, tensor.name)
            )
    writer.close()


def _kind_of(shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) == 1:
        return "float32"
    if dtype == "q8_0" and shape[-1] % _BLOCK:
        return "float16"
    return dtype
