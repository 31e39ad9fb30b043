"""Export: a trained model for other programs.

    python -m grpo.export WORKDIR OUT

writes the newest checkpoint of a run into the new folder OUT, in Hugging Face's layout: config,
safetensors, tokenizer, chat template, generation config and model card. `transformers` loads it,
and so does `model.source` here. If OUT ends in .gguf it is one file for llama.cpp. In place of
WORKDIR stands anything that `model.source` takes. Adapters (lora.rank) are merged into the model
beneath them, or with --adapter written alone, for `peft`.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags

from grpo import command
from grpo.checkpoint import params_sha256
from grpo.data.tokenizer_out import add_to_gguf, write_tokenizer
from grpo.model.files.families_out import hf_config
from grpo.model.files.gguf_out import GGUF_DTYPES, write_gguf
from grpo.model.files.lora_export import write_peft
from grpo.model.files.weights_out import DTYPES, write_safetensors
from grpo.model.params import Params, param_table
from grpo.model_card import model_card
from grpo.sharding import param_shardings, replicated
from grpo.source import Source, fitting_mesh, open_source

_USAGE = (
    "usage: python -m grpo.export WORKDIR OUT [--dtype=bfloat16] [--adapter] [--step=N] "
    "[--base=MODEL]"
)
_GB = 10**9


def export(
    source: Source, out: Path, *, dtype: str | None = None, max_shard_gb: float = 5.0
) -> None:
    """Writes `source` to `out`, a folder or a .gguf file that does not exist yet.

    Nothing is at `out` before everything is written. On several processes each must call it; they
    hold the parameters together, and process 0 writes.

    Args:
      source: what to write.
      out: where.
      dtype: of the matrices. For a folder one of `DTYPES`, by default float32, which is exact;
        for a .gguf file one of `GGUF_DTYPES`, by default float16.
      max_shard_gb: 10^9 bytes, of one safetensors file.

    Raises:
      FileExistsError: something is there.
      ValueError: a dtype that this kind of file does not have, or cannot hold the values.
    """
    is_gguf = out.suffix == ".gguf"
    dtypes = GGUF_DTYPES if is_gguf else tuple(DTYPES)
    dtype = dtype or dtypes[0]
    if dtype not in dtypes:
        kind = "a .gguf file" if is_gguf else "a folder"
        raise ValueError(f"--dtype={dtype}: {kind} has one of {', '.join(dtypes)}")
    _refuse_existing(out)
    mesh = fitting_mesh(source.arch)
    with jax.set_mesh(mesh), _whole(out) as partial_out:
        params = source.read(param_shardings(param_table(source.arch), mesh))
        if is_gguf:
            write_gguf(
                partial_out,
                params,
                source.arch,
                dtype=dtype,
                name=(source.workdir or source.files or out).resolve().stem,
                add_tokenizer=partial(
                    add_to_gguf,
                    tokenizer=source.tokenizer,
                    files=source.tokenizer_files,
                    rows=source.arch.vocab_size,
                ),
            )
        else:
            _write_folder(partial_out, source, params, dtype, int(max_shard_gb * _GB))


def export_adapter(source: Source, out: Path) -> None:
    """Writes the adapters of a run to the new folder `out`, as `peft` stores them.

    On several processes each must call it.

    Raises:
      FileExistsError: something is there.
      ValueError: the run trained no adapters.
    """
    _refuse_existing(out)
    mesh = fitting_mesh(source.arch)
    with jax.set_mesh(mesh):
        adapters = jax.device_put(source.adapters(mesh), replicated(mesh))
    assert source.lora is not None  # or there were no adapters
    if jax.process_index() == 0:
        with _whole(out) as folder:
            write_peft(folder, adapters, source.lora.alpha, str(source.files))
            write_tokenizer(folder, source.tokenizer, source.files)


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already; name another place, or remove it")


def _write_folder(
    folder: Path, source: Source, params: Params, dtype: str, max_shard_bytes: int
) -> None:
    write_safetensors(folder, params, source.arch, dtype=dtype, max_shard_bytes=max_shard_bytes)
    digest = params_sha256(params)
    if jax.process_index() != 0:
        return
    _write_json(folder / "config.json", _config(source, dtype))
    _write_json(folder / "generation_config.json", _generation_config(source))
    write_tokenizer(folder, source.tokenizer, source.tokenizer_files)
    card = model_card(source, dtype=dtype, params_sha256=digest)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _config(source: Source, dtype: str) -> dict[str, Any]:
    """config.json: that of the folder the model came from where there is one, else made."""
    own = _from_folder(source, "config.json")
    config = own or {**hf_config(source.arch), **_token_ids(source)}
    config.pop("_name_or_path", None)
    # `transformers` 5 calls it dtype, and reads the older name too.
    config.pop("dtype", None)
    config["torch_dtype"] = dtype
    return config


def _generation_config(source: Source) -> dict[str, Any]:
    return _from_folder(source, "generation_config.json") or _token_ids(source)


def _token_ids(source: Source) -> dict[str, Any]:
    tokenizer = source.tokenizer
    eos = list(tokenizer.eos_ids)
    ids = {"eos_token_id": eos[0] if len(eos) == 1 else eos, "pad_token_id": tokenizer.pad_id}
    return ids if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id, **ids}


def _from_folder(source: Source, name: str) -> dict[str, Any]:
    if source.files is None or not (source.files / name).is_file():
        return {}
    return json.loads((source.files / name).read_text(encoding="utf-8"))


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A path beside `out` that becomes `out` in one step, if nothing is raised."""
    if jax.process_index() != 0:
        yield out
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        inner = Path(folder) / out.name
        if out.suffix != ".gguf":
            inner.mkdir()
        yield inner
        if out.is_dir():
            out.rmdir()  # empty: export() saw to it
        os.replace(inner, out)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Command line; see the module's docstring."""
    dtypes = sorted({*DTYPES, *GGUF_DTYPES})
    dtype = flags.DEFINE_enum(
        "dtype",
        None,
        dtypes,
        "of the matrices. A folder: float32 (default; exact, and so the same params_sha256 when "
        "it is read again), or bfloat16 or float16, half as large and rounded. A .gguf file: "
        "float16 (default), q8_0, bfloat16 or float32",
    )
    step = flags.DEFINE_integer("step", None, "of the run's checkpoint; by default the newest")
    base = flags.DEFINE_string(
        "base", "", "where the model that the run began with is now, if it was moved"
    )
    adapter = flags.DEFINE_bool("adapter", False, "the adapters alone, as `peft` stores them")
    shard = flags.DEFINE_float("max_shard_gb", 5.0, "largest safetensors file, 10^9 bytes", 0.001)

    def start(source: str, out: str) -> None:
        opened = open_source(source, step=step.value, base=base.value)
        target = Path(out).expanduser()
        if adapter.value:
            if dtype.value or target.suffix == ".gguf":
                raise ValueError("--adapter writes a folder of float32; it goes without --dtype")
            export_adapter(opened, target)
        else:
            export(opened, target, dtype=dtype.value, max_shard_gb=shard.value)
        if jax.process_index() == 0:
            files = [target] if target.is_file() else sorted(target.iterdir())
            size = sum(file.stat().st_size for file in files)
            print(f"{target}: {len(files)} files, {size / _GB:.3f} GB")

    command.run(start, "WORKDIR", "OUT", usage=_USAGE)


if __name__ == "__main__":
    main()
