"""Pretrained weights in: Hugging Face safetensors folders and GGUF files to our parameters.

Arrays leave one at a time through `put`, which gets each where it is stored: of a safetensors
folder only those parts are read that `put` asks for, so a host that asks for the shards of its own
devices, one by one, never holds more than a shard.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from grpo.model import families
from grpo.model.arch import Arch
from grpo.model.files import families_gguf
from grpo.model.params import MATRICES, Params, ParamSpec, param_table

Index = tuple[slice, ...]  # of step 1; one for every axis


class StoredArray:
    """One of our arrays where it is stored: `array[index]` reads that part, float32.

    `np.asarray(array)` reads all of it.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...], read: Callable[[Index], np.ndarray]):
        self.shape, self._read = shape, read

    def __getitem__(self, index: Index) -> np.ndarray:
        bounds = [axis.indices(size) for axis, size in zip(index, self.shape, strict=True)]
        return self._read(tuple(slice(start, stop) for start, stop, _ in bounds))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[(slice(None),) * len(self.shape)], dtype)


# What becomes of an array: (path such as "layers/q", its spec, the array) -> leaf.
Put = Callable[[str, ParamSpec, StoredArray], Any]

# Both formats store a matrix as [outputs, inputs] and flatten heads. So a stored matrix is ours
# with its first `n` axes (the inputs) flattened, the rest (the outputs) flattened, transposed; a
# bias has outputs only.
# Arrays not listed are stored as we keep them.
INPUT_AXES = {**MATRICES, "head": 1, "q_bias": 0, "k_bias": 0, "v_bias": 0}
INPUT_AXES |= {"q_a": 1, "q_b": 1, "kv_a": 1, "kv_b": 1}
INPUT_AXES |= {"router": 1, "expert_gate": 1, "expert_up": 1, "expert_down": 1}


def read_arch(source: Path) -> Arch:
    """The shape of the model stored in `source`, a safetensors folder or a .gguf file.

    Raises:
      FileNotFoundError: nothing there, or a folder without config.json.
      ValueError: a model that `grpo.model.families` does not support.
    """
    if _is_gguf(source):
        reader = _gguf_reader(source)
        shapes = {t.name: tuple(map(int, reversed(t.shape))) for t in reader.tensors}
        # Vocabulary and merges are most of the metadata, slow to decode, and not needed here.
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.")
        }
        return families_gguf.arch_from_gguf(fields, shapes)
    config = source / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} is missing: is {source} a Hugging Face model folder?")
    return families.arch_from_hf(json.loads(config.read_text(encoding="utf-8")))


def load_weights(source: Path, arch: Arch, put: Put | None = None) -> Params:
    """Parameters of the model stored in `source`, named and laid out as `param_table(arch)`.

    Args:
      source: folder with `model.safetensors`, or with shards and `model.safetensors.index.json`
        (bfloat16, float16 or float32); or a `.gguf` file, whose tensors are dequantised.
      arch: as `read_arch(source)` gives it.
      put: makes a leaf of the result from each array, for example by reading the shards of this
        host's devices. By default `jnp.asarray` of all of it.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a tensor is missing, unknown, of another shape or of an unsupported dtype.
    """
    stored = (_open_gguf if _is_gguf(source) else _open_safetensors)(source, arch)
    place: Put = put or (lambda path, spec, array: jnp.asarray(np.asarray(array)))
    table = dict(flat_table(arch))
    _check_names(stored, table)

    params: Params = {}
    for path, spec in table.items():
        group, _, name = path.rpartition("/")
        leaf = place(path, spec, _stored_array(stored, path, spec))
        (params.setdefault(group, {}) if group else params)[name] = leaf
    return params


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The tensors of one stored model, whatever the format."""

    listing: Path  # the file that says which tensors there are
    names: Mapping[str, str]  # our path -> their name, with {layer} and {expert}
    first_dense: int  # layers before those that are stacked under "layers"
    files: Mapping[str, Path]  # their name -> the file that holds it
    ignored: Callable[[str], bool]  # their names that carry nothing we need
    shape: Callable[[str], tuple[int, ...]]
    read: Callable[[str, Index], np.ndarray]  # part of a tensor, float32 [outputs, inputs]


def flat_table(arch: Arch) -> Iterator[tuple[str, ParamSpec]]:
    for name, entry in param_table(arch).items():
        if isinstance(entry, ParamSpec):
            yield name, entry
        else:
            yield from ((f"{name}/{inner}", spec) for inner, spec in entry.items())


def their_names(
    names: Mapping[str, str], first_dense: int, path: str, spec: ParamSpec
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Where in one of our arrays each stored tensor goes, and its name.

    () and one name; or (layer,) for each; or (layer, expert) for each.
    """
    first = first_dense if path.startswith("layers/") else 0
    stacked = spec.axes[: 2 if "experts" in spec.axes else 1] if "/" in path else ()
    for place in np.ndindex(spec.shape[: len(stacked)]):
        numbers = dict(zip(("layer", "expert"), place, strict=False))
        if numbers:
            numbers["layer"] += first
        yield place, names[path].format(**numbers)


def _check_names(stored: _Stored, table: Mapping[str, ParamSpec]) -> None:
    expected = {
        name
        for path, spec in table.items()
        for _, name in their_names(stored.names, stored.first_dense, path, spec)
    }
    missing = sorted(expected - stored.files.keys())
    if missing:
        raise ValueError(f"{stored.listing}: {_some(missing)} missing")
    extra = sorted(n for n in stored.files.keys() - expected if not stored.ignored(n))
    if extra:
        raise ValueError(
            f"{stored.listing}: {_some(extra)} not part of the architecture its config describes"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def _stored_array(stored: _Stored, path: str, spec: ParamSpec) -> StoredArray:
    """One of our arrays; a stacked one has a tensor a layer, or one a layer and expert."""
    tensors = dict(their_names(stored.names, stored.first_dense, path, spec))
    stacked = len(next(iter(tensors)))
    shape = spec.shape[stacked:]
    for name in tensors.values():
        _check_shape(stored, name, path, shape)

    def read(index: Index) -> np.ndarray:
        inner = index[stacked:]
        if not stacked:
            return _part(stored, tensors[()], path, shape, inner)
        out = np.empty([axis.stop - axis.start for axis in index], np.float32)
        for place in np.ndindex(out.shape[:stacked]):
            of_all = tuple(axis.start + n for axis, n in zip(index, place, strict=False))
            out[place] = _part(stored, tensors[of_all], path, shape, inner)
        return out

    return StoredArray(spec.shape, read)


def _check_shape(stored: _Stored, name: str, path: str, shape: tuple[int, ...]) -> None:
    inputs = INPUT_AXES.get(path.rpartition("/")[2])
    expected = shape
    if inputs is not None:
        expected = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))[: 1 + (inputs > 0)]
    if stored.shape(name) != expected:
        raise ValueError(
            f"{stored.files[name]}: tensor {name} has shape {stored.shape(name)}, "
            f"expected {expected}"
        )


def _part(
    stored: _Stored, name: str, path: str, shape: tuple[int, ...], index: Index
) -> np.ndarray:
    """Part of tensor `name`, whose shape we call `shape`."""
    inputs = INPUT_AXES.get(path.rpartition("/")[2])
    if inputs is None:
        return np.ascontiguousarray(stored.read(name, index))
    flat = [_flat(shape[inputs:], index[inputs:])]
    if inputs:
        flat.append(_flat(shape[:inputs], index[:inputs]))
    values = stored.read(name, tuple(flat)).T
    # Of the first axis of either group what is wanted was read, of the others everything.
    leading = (0, inputs)
    read = [
        axis.stop - axis.start if i in leading else size
        for i, (axis, size) in enumerate(zip(index, shape, strict=True))
    ]
    rest = tuple(slice(None) if i in leading else axis for i, axis in enumerate(index))
    return np.ascontiguousarray(values.reshape(read)[rest])


def _flat(shape: tuple[int, ...], index: Index) -> slice:
    """What of the flattened axes holds the part: a range, by the first of them."""
    inner = math.prod(shape[1:])
    return slice(index[0].start * inner, index[0].stop * inner)


_FLOAT_DTYPES = ("BF16", "F16", "F32")


def _open_safetensors(folder: Path, arch: Arch) -> _Stored:
    listing, handles, files = _safetensors_files(folder)

    def shape(name: str) -> tuple[int, ...]:
        return tuple(handles[files[name]].get_slice(name).get_shape())

    def read(name: str, index: Index) -> np.ndarray:
        tensor = handles[files[name]].get_slice(name)
        dtype = tensor.get_dtype()
        if dtype not in _FLOAT_DTYPES:
            raise ValueError(
                f"{files[name]}: tensor {name} is {dtype}; supported: {', '.join(_FLOAT_DTYPES)}"
            )
        return tensor[index].astype(np.float32)

    def ignored(name: str) -> bool:
        # Old exports keep the rotary frequencies; some keep a copy of a tied head. A head that is
        # not tied is in the table, so this never hides one.
        # DeepSeek-V3 has a layer behind the last that predicts the token after next; the model
        # without it is the model that is trained.
        extra = bool(arch.latent) and name.startswith(f"model.layers.{arch.num_layers}.")
        copied = name == families.HF_LLAMA_NAMES["head"]
        return name.endswith(".rotary_emb.inv_freq") or copied or extra

    names = families.hf_names(arch)
    return _Stored(listing, names, arch.first_dense, files, ignored, shape, read)


def _safetensors_files(folder: Path) -> tuple[Path, dict[Path, Any], dict[str, Path]]:
    """The listing file, an open handle a file, and which file holds each tensor."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        handle = _safe_open(single)
        return single, {single: handle}, dict.fromkeys(handle.keys(), single)
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {single.name} nor {index.name}")
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = {name: folder / shard for name, shard in weight_map.items()}
    handles = {}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise FileNotFoundError(f"{path}, named in {index}, is missing")
        handles[path] = _safe_open(path)
    held = {path: set(handle.keys()) for path, handle in handles.items()}
    for name, path in files.items():
        if name not in held[path]:
            raise ValueError(f"{path}: tensor {name} missing, though {index.name} places it there")
    return index, handles, files


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _is_gguf(source: Path) -> bool:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    if source.is_dir():
        return False
    if source.suffix != ".gguf":
        raise ValueError(f"{source} is neither a folder with safetensors nor a .gguf file")
    return True


def _gguf_reader(path: Path) -> Any:
    from gguf import GGUFReader  # only here: few runs need it

    try:
        return GGUFReader(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a complete GGUF file: {error}") from error


def _open_gguf(path: Path, arch: Arch) -> _Stored:
    from gguf import GGMLQuantizationType, dequantize

    whole = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    reader = _gguf_reader(path)
    tensors = {t.name: t for t in reader.tensors}
    heads = {}
    if families_gguf.rotates_neighbours(reader.fields["general.architecture"].contents()):
        heads = {".attn_q.weight": arch.num_heads, ".attn_k.weight": arch.num_kv_heads}

    def shape(name: str) -> tuple[int, ...]:
        return tuple(map(int, reversed(tensors[name].shape)))

    @functools.lru_cache(maxsize=1)
    def dequantised(name: str) -> np.ndarray:
        kind = tensors[name].tensor_type
        values = np.asarray(dequantize(tensors[name].data, kind), np.float32)
        if name.endswith("norm.weight"):  # llama.cpp keeps scales with the offset added
            values = values - arch.norm_offset
        # The weights were published in bfloat16. Rounding what the quantisation left of them to
        # bfloat16 gives what a folder converted from this file would hold: one model, one set
        # of parameters, whichever file it came from.
        if kind not in whole:
            values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        count = next((n for suffix, n in heads.items() if name.endswith(suffix)), 0)
        return half_split_rows(values, count) if count else values

    def read(name: str, index: Index) -> np.ndarray:
        return dequantised(name)[index]

    files = dict.fromkeys(tensors, path)
    return _Stored(path, families_gguf.GGUF_LLAMA_NAMES, 0, files, lambda name: False, shape, read)


def half_split_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Query or key rows from llama.cpp's rotary order back to the half-split one.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of a head; this decoder, like
    `transformers`, rotates row i with row i + H/2. Their converter interleaves the two halves of
    each head; this undoes it.

    Args:
      weight: [heads * H, D].
      num_heads: heads stacked along the rows.
    """
    rows, width = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)
