"""Tiny models of every supported family: their configs, and weights that are a function of names.

Nothing but numpy, so that the reference implementation and ours can both be given the same models
where the other is not installed. Shapes are awkward on purpose: head widths other than D / N,
fewer key/value heads than query heads, windows and rotary scalings that matter within a few tokens.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
_PLAIN = {"rope_type": "default", "rope_theta": 100.0}
_GEMMA: dict[str, Any] = {**_SIZES, "head_dim": 6, "tie_word_embeddings": True, "sliding_window": 4}
_GEMMA |= {"query_pre_attn_scalar": 9, "layer_types": ["sliding_attention", "full_attention"]}

# What the configuration class of each model type is given.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama2": {**_SIZES, "model_type": "llama", "hidden_size": 24, "num_key_value_heads": 4},
    "llama3": {**_SIZES, "model_type": "llama", "head_dim": 8, "rope_parameters": _LLAMA3},
    "smollm2": {
        **_SIZES,
        "model_type": "llama",
        "hidden_size": 24,
        "tie_word_embeddings": True,
        "rope_parameters": _PLAIN,
    },
    "smollm3": {
        **_SIZES,
        "model_type": "smollm3",
        "hidden_size": 24,
        "tie_word_embeddings": True,
        "no_rope_layers": [1, 0],
        "rope_parameters": _PLAIN,
    },
    "qwen2": {
        **_SIZES,
        "model_type": "qwen2",
        "hidden_size": 24,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": _PLAIN,
    },
    "qwen2_yarn": {
        **_SIZES,
        "model_type": "qwen2",
        "hidden_size": 32,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_parameters": _YARN,
    },
    "qwen3": {**_SIZES, "model_type": "qwen3", "head_dim": 10, "rope_parameters": _PLAIN},
    "mistral": {
        **_SIZES,
        "model_type": "mistral",
        "head_dim": 6,
        "sliding_window": 3,
        "rope_parameters": _PLAIN,
    },
    "gemma2": {
        **_GEMMA,
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "rope_parameters": _PLAIN,
    },
    "gemma3": {
        **_GEMMA,
        "model_type": "gemma3_text",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 200.0, "factor": 2.0},
        },
    },
}

# Two rows of one length and a shorter one.
TOKENS: Sequence[Sequence[int]] = (
    (1, 17, 5, 33, 8, 21, 9, 30, 12, 39, 4),
    (1, 6, 25, 14, 36, 11, 3),
)


def weights(shapes: Mapping[str, Sequence[int]], gemma: bool) -> dict[str, np.ndarray]:
    """Float32 values for tensors of these names and shapes: the same wherever they are made.

    Args:
      shapes: stored name -> shape; matrices are [outputs, inputs].
      gemma: whether scales of norms are stored as what they are above 1.
    """

    def one(name: str, shape: Sequence[int]) -> np.ndarray:
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if "norm" in name:
            return noise * 0.3 + (0 if gemma else 1)
        if len(shape) == 1 or "embed" in name:
            return noise * 0.5
        return noise / shape[1] ** 0.5

    return {name: one(name, shape).astype(np.float32) for name, shape in shapes.items()}


def write_folder(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Any]) -> Path:
    """A model folder as the reference implementation would save it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    gemma = str(config["model_type"]).startswith("gemma")
    save_file(weights(shapes, gemma), folder / "model.safetensors")
    return folder
