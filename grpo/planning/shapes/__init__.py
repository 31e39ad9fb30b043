"""Shapes of models that need not be here: the fields of their `config.json` that fix every size."""

import json
from importlib import resources
from pathlib import Path

from grpo import fetch
from grpo.config import ModelConfig
from grpo.model.arch import Arch
from grpo.model.families import arch_from_hf
from grpo.model.files.weights import read_arch
from grpo.source import new_arch, new_tokenizer


def known() -> dict[str, Path]:
    """Name -> file of every shape that comes with this package."""
    folder = Path(str(resources.files(__package__)))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_arch(model: ModelConfig, shape: str = "") -> Arch:
    """The shape of a run's model, without its weights if possible.

    Args:
      model: `source` may be a folder that is not here, if its last part is the name of a known
        shape ("/models/Qwen2.5-7B").
      shape: a `config.json` to take instead.

    Raises:
      ValueError: the model is not here, and its name means nothing.
    """
    if shape:
        return arch_from_hf(json.loads(Path(shape).read_text()))
    if not model.source:
        return new_arch(model, new_tokenizer(model).vocab_size)
    names = {name.lower(): path for name, path in known().items()}
    wanted = Path(model.source).name.lower()
    if not Path(model.source).exists() and wanted in names:
        return arch_from_hf(json.loads(names[wanted].read_text()))
    try:
        return read_arch(fetch.model_path(model.source))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{error}; a plan needs the shape alone: give it with --shape=CONFIG_JSON, or name one "
            f"of {', '.join(known())}"
        ) from error
