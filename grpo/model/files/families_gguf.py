"""Model families as GGUF files describe them: metadata to our `Arch`, and llama.cpp's names.

The metadata says less than a config.json: what is the same in every model of a family is written
in llama.cpp's source, and so it is here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from grpo.model.arch import Arch
from grpo.model.fields import Fields

# Ours -> theirs, as in `grpo.model.families`.
GGUF_LLAMA_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "layers/attn_norm": "blk.{layer}.attn_norm.weight",
    "layers/q": "blk.{layer}.attn_q.weight",
    "layers/k": "blk.{layer}.attn_k.weight",
    "layers/v": "blk.{layer}.attn_v.weight",
    "layers/q_bias": "blk.{layer}.attn_q.bias",
    "layers/k_bias": "blk.{layer}.attn_k.bias",
    "layers/v_bias": "blk.{layer}.attn_v.bias",
    "layers/q_norm": "blk.{layer}.attn_q_norm.weight",
    "layers/k_norm": "blk.{layer}.attn_k_norm.weight",
    "layers/o": "blk.{layer}.attn_output.weight",
    "layers/post_attn_norm": "blk.{layer}.post_attention_norm.weight",
    "layers/mlp_norm": "blk.{layer}.ffn_norm.weight",
    "layers/gate": "blk.{layer}.ffn_gate.weight",
    "layers/up": "blk.{layer}.ffn_up.weight",
    "layers/down": "blk.{layer}.ffn_down.weight",
    "layers/post_mlp_norm": "blk.{layer}.post_ffw_norm.weight",
}

# What metadata under a family's own prefix may say that changes nothing of what is computed.
_HARMLESS = ("vocab_size", "rope.scaling.finetuned")


def arch_from_gguf(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Arch:
    """The shape that a GGUF file describes.

    Args:
      fields: the file's metadata, values as plain Python objects.
      shapes: tensor name -> shape, slowest axis first (the reverse of GGUF's own order). The
        size of the vocabulary and whether the head is tied can only be read from here.

    Raises:
      ValueError: the model is of a family, or uses a feature, that this decoder does not have, a
        field is missing, or one is there that nobody here knows; the message names the field.
    """
    where = "GGUF metadata"
    family = str(fields.get("general.architecture"))
    if family not in _FAMILIES:
        supported = sorted(_FAMILIES)
        raise Fields(where, fields).unsupported("general.architecture", family, supported)
    if "rope_freqs.weight" in shapes:  # llama.cpp's form of Llama 3.1's scaled frequencies
        raise ValueError(
            "GGUF file: tensor rope_freqs.weight (scaled rotary positions) is not supported; use "
            "the model's Hugging Face folder"
        )
    if "token_embd.weight" not in shapes:
        raise ValueError("GGUF file: tensor token_embd.weight is missing")
    prefix = f"{family}."
    own = Fields(
        f"{where}: {family}",
        {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)},
    )
    own.only("rope.scaling.type", "none")
    own.only("expert_count", 0)
    arch = _FAMILIES[family](own, _sizes(own, shapes))
    own.nothing_else(_HARMLESS)
    return arch


def rotates_neighbours(family: str) -> bool:
    """Whether query and key rows are stored in llama.cpp's own rotary order."""
    return family == "llama"


def _sizes(own: Fields, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, num_heads = own.need("embedding_length"), own.need("attention.head_count")
    head_width = own.get("attention.key_length", width // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        own.only(name, head_width)
    # The file keeps the epsilon in float32: 1e-5 reads back as 9.999999747e-06.
    eps = np.float32(own.need("attention.layer_norm_rms_epsilon"))
    return {
        "vocab_size": shapes["token_embd.weight"][0],
        "width": width,
        "mlp_width": own.need("feed_forward_length"),
        "num_layers": own.need("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": own.get("attention.head_count_kv", num_heads),
        "head_width": head_width,
        "rope_theta": float(own.get("rope.freq_base", 10_000.0)),
        "norm_eps": float(str(eps)),
        "tied_head": "output.weight" not in shapes,
        "max_positions": own.need("context_length"),
    }


def _llama(own: Fields, sizes: dict[str, Any]) -> Arch:
    return Arch(**sizes)


def _qwen2(own: Fields, sizes: dict[str, Any]) -> Arch:
    return Arch(**sizes, qkv_bias=True)


def _qwen3(own: Fields, sizes: dict[str, Any]) -> Arch:
    return Arch(**sizes, qk_norm=True)


def _gemma3(own: Fields, sizes: dict[str, Any]) -> Arch:
    """The text models but the largest, which scales its queries otherwise."""
    own.only("attention.sliding_window_pattern", 6)
    if sizes["num_layers"] == 62:
        raise own.unsupported("block_count", 62, ["the models of 1B to 12B"])
    slides = [(layer + 1) % 6 != 0 for layer in range(sizes["num_layers"])]
    return Arch(
        **sizes | {"rope_theta": float(own.get("rope.freq_base", 1_000_000.0))},
        local_rope_theta=float(own.get("rope.freq_base_swa", 10_000.0)),
        layer_types=tuple("sliding" if yes else "global" for yes in slides),
        window=own.need("attention.sliding_window"),
        qk_norm=True,
        norm_offset=1.0,
        sandwich_norm=True,
        embed_scale=sizes["width"] ** 0.5,
        activation="gelu_tanh",
    )


_FAMILIES: Mapping[str, Callable[[Fields, dict[str, Any]], Arch]] = {
    "gemma3": _gemma3,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
