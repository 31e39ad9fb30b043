"""Model families, the other way: from our `Arch` to what a file says of its model.

What an `Arch` becomes is read back at once, so a shape that a family's fields cannot express is an
error here and never a file that computes something else.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from grpo.model import families
from grpo.model.arch import Arch

if TYPE_CHECKING:
    import gguf


def hf_config(arch: Arch) -> dict[str, Any]:
    """The fields of config.json that describe this shape, as a Llama.

    Raises:
      ValueError: a shape that is not a Llama's.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": arch.head_width,
        "hidden_act": "silu",
        "hidden_size": arch.width,
        "initializer_range": 0.02,
        "intermediate_size": arch.mlp_width,
        "max_position_embeddings": arch.max_positions,
        "mlp_bias": False,
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
    _must_equal("config.json", families.arch_from_hf(config), arch)
    return config


def add_gguf_fields(writer: "gguf.GGUFWriter", arch: Arch) -> None:
    """Adds the metadata that describes this shape, as llama.cpp's converter names it.

    Raises:
      ValueError: a shape that is not a Llama's.
    """
    _must_equal("GGUF metadata", families.arch_from_hf(hf_config(arch)), arch)
    writer.add_vocab_size(arch.vocab_size)
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.width)
    writer.add_block_count(arch.num_layers)
    writer.add_feed_forward_length(arch.mlp_width)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_key_length(arch.head_width)
    writer.add_value_length(arch.head_width)
    writer.add_rope_dimension_count(arch.head_width)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.norm_eps)


def _must_equal(where: str, got: Arch, wanted: Arch) -> None:
    differing = [
        f"{field.name}={getattr(wanted, field.name)!r}"
        for field in dataclasses.fields(Arch)
        if getattr(got, field.name) != getattr(wanted, field.name)
    ]
    if differing:
        raise ValueError(f"{where} of a Llama cannot express {', '.join(differing)}")
