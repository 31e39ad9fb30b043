"""Model families, the other way: from our `Arch` to what a file says of its model.

What is written is read back at once, so a shape that a family's fields cannot express is an error
here and never a file that computes something else.
"""

import dataclasses
from typing import Any

from grpo.model import families
from grpo.model.arch import Arch
from grpo.model.files import families_gguf

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SWITCHES: dict[str, dict[str, bool]] = {  # what each family has, and is off
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
}


def hf_config(arch: Arch) -> dict[str, Any]:
    """The fields of config.json that describe this shape, as a Llama, Qwen 2 or Qwen 3.

    Raises:
      ValueError: a shape that is none of these.
    """
    family = _family(arch)
    config = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        **_SWITCHES[family],
        "head_dim": arch.head_width,
        "hidden_act": "silu",
        "hidden_size": arch.width,
        "initializer_range": 0.02,
        "intermediate_size": arch.mlp_width,
        "max_position_embeddings": arch.max_positions,
        "num_attention_heads": arch.num_heads,
        "num_hidden_layers": arch.num_layers,
        "num_key_value_heads": arch.num_kv_heads,
        "rms_norm_eps": arch.norm_eps,
        "rope_scaling": None,
        "rope_theta": arch.rope_theta,
        "tie_word_embeddings": arch.tied_head,
        "use_cache": True,
        "vocab_size": arch.vocab_size,
    }
    _must_equal(f"config.json of a {family} model", families.arch_from_hf(config), arch)
    return config


def gguf_fields(arch: Arch) -> tuple[str, dict[str, int | float]]:
    """The family, and the metadata that describes this shape, as llama.cpp's converter names it.

    Raises:
      ValueError: a shape that is no Llama, Qwen 2 or Qwen 3 with plain rotary positions.
    """
    family = _family(arch)
    fields: dict[str, int | float] = {
        "vocab_size": arch.vocab_size,
        "context_length": arch.max_positions,
        "embedding_length": arch.width,
        "block_count": arch.num_layers,
        "feed_forward_length": arch.mlp_width,
        "attention.head_count": arch.num_heads,
        "attention.head_count_kv": arch.num_kv_heads,
        "attention.key_length": arch.head_width,
        "attention.value_length": arch.head_width,
        "rope.dimension_count": arch.head_width,
        "rope.freq_base": float(arch.rope_theta),
        "attention.layer_norm_rms_epsilon": float(arch.norm_eps),
    }
    named = {f"{family}.{name}": value for name, value in fields.items()}
    shapes = {"token_embd.weight": (arch.vocab_size, arch.width)}
    if not arch.tied_head:
        shapes["output.weight"] = (arch.vocab_size, arch.width)
    read = families_gguf.arch_from_gguf({"general.architecture": family, **named}, shapes)
    _must_equal(f"GGUF metadata of a {family} model", read, arch)
    return family, named


def _family(arch: Arch) -> str:
    if arch.qkv_bias:
        return "qwen2"
    return "qwen3" if arch.qk_norm else "llama"


def _must_equal(where: str, got: Arch, wanted: Arch) -> None:
    differing = [
        f"{field.name}={getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(Arch)
        if getattr(got, field.name) != getattr(wanted, field.name)
    ]
    if differing:
        raise ValueError(
            f"{where} cannot express {', '.join(differing)} as it is written here; for other "
            "families, export to a folder from a base in Hugging Face's layout, whose config.json "
            "is kept, and turn that into GGUF with convert_hf_to_gguf.py of llama.cpp"
        )
