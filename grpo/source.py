"""Where a model comes from: files of others, or a checkpoint of one of our runs."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from grpo import fetch
from grpo.checkpoint import read_params, saved_steps
from grpo.config import LoraConfig, ModelConfig
from grpo.data.tokenizer import Tokenizer, load_tokenizer, with_thinking
from grpo.model.arch import Arch
from grpo.model.families import arch_from_hf
from grpo.model.files.weights import StoredArray, load_weights, read_arch
from grpo.model.lora import adapter_table, merged, target_names
from grpo.model.params import Params, ParamSpec, param_table
from grpo.model.quantise import stored_as
from grpo.sharding import make_mesh, param_shardings, propagated, specs_of

_S = TypeVar("_S", ModelConfig, LoraConfig)
Keep = Callable[[str, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that can be read.

    Attributes:
      arch: its shape.
      tokenizer: its tokenizer.
      files: the Hugging Face folder or .gguf file that it is or, trained further, began as; None
        if it began as random weights.
      workdir: of the run it is a checkpoint of; None if it is `files`.
      step: of that checkpoint.
      lora: of the run, if it trained adapters: the checkpoint then holds nothing else.
      base_dtype: what it stored `files` in beneath them.
      tokenizer_from: where the tokenizer is from, if not from `files`.
    """

    arch: Arch
    tokenizer: Tokenizer
    files: Path | None
    workdir: Path | None = None
    step: int = 0
    lora: LoraConfig | None = None
    base_dtype: str = "float32"
    tokenizer_from: Path | None = None

    @property
    def tokenizer_files(self) -> Path | None:
        """The folder or .gguf file that the tokenizer is in; None: it is the one over bytes."""
        return self.files or self.tokenizer_from

    def read(self, shardings: dict[str, Any], keep: Keep | None = None) -> Params:
        """The parameters, float32, laid out as `shardings` (nested as they are) say.

        Those of a run that trained adapters are merged into what is beneath them.

        Args:
          shardings: of the arrays.
          keep: (path, array) -> what is kept of an array, asked as soon as the array is there.

        Raises:
          FileNotFoundError, ValueError: what is stored is not a whole model of this shape.
        """
        keep = keep or (lambda path, array: array)
        if self.workdir is not None:
            params = self._of_run(self.workdir / "checkpoints", shardings)

            def kept(path: Any, array: jax.Array) -> Any:
                return keep(jax.tree_util.keystr(path, simple=True, separator="/"), array)

            return jax.tree_util.tree_map_with_path(kept, params)
        assert self.files is not None

        def put(path: str, spec: ParamSpec, array: StoredArray) -> Any:
            return keep(path, _put(shardings, path, spec, array))

        return load_weights(self.files, self.arch, put)

    def _of_run(self, checkpoints: Path, shardings: dict[str, Any]) -> Params:
        if self.lora is None:
            return read_params(checkpoints, self.step, shardings)

        def as_stored(path: str, array: jax.Array) -> Any:
            return stored_as(path.rpartition("/")[2], array, self.base_dtype)

        base = dataclasses.replace(self, workdir=None).read(shardings, as_stored)
        adapters = self.adapters(jax.tree.leaves(shardings)[0].mesh)
        scale = self.lora.alpha / self.lora.rank
        whole = partial(merged, scale=scale, table=param_table(self.arch))
        merge = propagated(whole, specs_of(shardings))
        return jax.jit(merge, out_shardings=shardings)(adapters, base)

    def adapters(self, mesh: Mesh) -> Params:
        """What a run with `lora` trained, on the mesh.

        Raises:
          ValueError: it trained no adapters, or the checkpoint's are of another kind.
        """
        if self.lora is None or self.workdir is None:
            raise ValueError(f"{self.workdir or self.files} has no adapters: see lora.rank")
        table = param_table(self.arch)
        trained = adapter_table(table, self.lora.rank, target_names(table, self.lora.targets))
        checkpoints = self.workdir / "checkpoints"
        return read_params(checkpoints, self.step, param_shardings(trained, mesh))


def open_source(source: str, *, step: int | None = None, base: str = "") -> Source:
    """Finds out what `source` is; weights are read only by `Source.read`.

    Args:
      source: a Hugging Face folder, a .gguf file, a name that `grpo.fetch` knows, or the workdir
        of a run.
      step: of the run's checkpoint; None: the newest.
      base: where the model that the run began with is now, if no longer where its configuration
        says.

    Raises:
      FileNotFoundError: a file is missing, or the run has no such checkpoint.
      ValueError: nothing that can be read as a model.
    """
    path = Path(source).expanduser()
    if is_workdir(path):
        return _open_workdir(path, step, base)
    if step is not None or base:
        raise ValueError(f"{source} is no run's workdir: it has no steps and no base")
    path = fetch.model_path(source)
    return Source(read_arch(path), load_tokenizer(path), path)


def is_workdir(path: Path) -> bool:
    """Whether a training run has begun there."""
    return "num_steps" in config_of(path)


def config_of(folder: Path) -> dict[str, Any]:
    """What config.json in `folder` holds, a model's or a run's; nothing if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def fitting_mesh(arch: Arch) -> Mesh:
    """A mesh over all devices that divides this model's axes, split by `tensor` as far as can be.

    Raises:
      ValueError: there is none.
    """
    devices = jax.device_count()
    for fsdp in (n for n in range(1, devices + 1) if devices % n == 0):
        mesh = make_mesh(1, fsdp, devices // fsdp)
        try:
            param_shardings(param_table(arch), mesh)
        except ValueError:
            continue
        return mesh
    raise ValueError(
        f"no mesh over {devices} devices divides this model's axes (width {arch.width}, "
        f"{arch.num_kv_heads} key/value heads); use fewer devices"
    )


def new_arch(model: ModelConfig, vocab_size: int) -> Arch:
    """The shape of a model that begins as random weights.

    Raises:
      ValueError: sizes that do not go together, or a `model.shape` that is not one.
    """
    if model.shape:
        return _described(model.shape, vocab_size)
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


def new_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer of a model that begins as random weights.

    Raises:
      FileNotFoundError, ValueError: there is none where `model.tokenizer` says.
    """
    return load_tokenizer(_tokenizer_from(model) or "bytes")


def _tokenizer_from(model: ModelConfig) -> Path | None:
    return None if model.tokenizer == "bytes" else fetch.model_path(model.tokenizer)


def _described(shape: str, vocab_size: int) -> Arch:
    try:
        fields = json.loads(shape)
    except ValueError as error:
        raise ValueError(f"model.shape is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"model.shape is a JSON {type(fields).__name__}, not an object of fields")
    if "vocab_size" in fields:
        raise ValueError(
            f"model.shape has a vocab_size ({fields['vocab_size']}); leave it out: the tokenizer's "
            f"is {vocab_size}"
        )
    return arch_from_hf({**fields, "vocab_size": vocab_size})


def _open_workdir(workdir: Path, step: int | None, base: str) -> Source:
    folder = workdir / "checkpoints"
    steps = saved_steps(folder)
    if not steps:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint yet: the run saves one every log.save_every steps, and "
            "one at its end"
        )
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{folder} holds checkpoints {steps}, none after step {step}")
    step = steps[-1] if step is None else step
    stored = config_of(workdir)
    model, lora = _section(ModelConfig, stored), _section(LoraConfig, stored)
    if not model.source and not base:
        if lora.rank:
            raise ValueError(
                f"the run in {workdir} trained adapters over random weights, which it did not save"
            )
        tokenizer = new_tokenizer(model)
        arch = new_arch(model, tokenizer.vocab_size)
        return Source(arch, tokenizer, None, workdir, step, tokenizer_from=_tokenizer_from(model))
    try:
        origin = open_source(base or model.source)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"the run in {workdir} began with model.source={model.source!r}, whose shape and "
            f"tokenizer are needed (say where it is now with --base): {error}"
        ) from error
    tokenizer = origin.tokenizer
    if model.thinking != "default":  # ask as the run asked
        tokenizer = with_thinking(tokenizer, model.thinking == "on")
    return dataclasses.replace(
        origin,
        tokenizer=tokenizer,
        workdir=workdir,
        step=step,
        lora=lora if lora.rank else None,
        base_dtype=model.base_dtype,
    )


def _section(kind: type[_S], config: Mapping[str, Any]) -> _S:
    """A section of a run's stored configuration; what an older run did not have has defaults."""
    names = {field.name for field in dataclasses.fields(kind)}
    stored = config.get(kind.__name__.removesuffix("Config").lower(), {})
    return kind(**{name: value for name, value in stored.items() if name in names})


def at_path(tree: Any, path: str) -> Any:
    """The leaf of nested dicts under a path such as "layers/q"."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _put(
    shardings: dict[str, Any], path: str, spec: ParamSpec, array: StoredArray | np.ndarray
) -> jax.Array:
    """One array of the table ("layers/q") to its devices, shard by shard.

    Only the shards of this host's devices are read, each once, and one at a time is held.
    """
    sharding = at_path(shardings, path)
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
