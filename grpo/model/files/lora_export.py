"""Adapters out: a folder that `peft` loads on top of the Hugging Face model beneath them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from grpo.model import families

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(folder: Path, adapters: Mapping[str, Any], alpha: float, base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
      folder: made if it is not there.
      adapters: as trained: a [L, D, r] and b [L, r, F] of each target.
      alpha: `lora.alpha`.
      base: what `peft` calls the model beneath: a folder, or its name on the Hub.
    """
    tensors, modules = {}, []
    for name, pair in adapters["layers"].items():
        module = families.HF_LLAMA_NAMES[f"layers/{name}"].removesuffix(".weight")
        modules.append(module.rpartition(".")[2])
        # Stored as [outputs, inputs], like every matrix there: x A' B'.
        for kind, array_LXY in (("lora_A", pair["a"]), ("lora_B", pair["b"])):
            for layer, matrix_XY in enumerate(np.asarray(jax.device_get(array_LXY), np.float32)):
                path = f"base_model.model.{module.format(layer=layer)}.{kind}.weight"
                tensors[path] = np.ascontiguousarray(matrix_XY.T)
    rank = next(iter(adapters["layers"].values()))["a"].shape[-1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
