"""Model families: from what a checkpoint says of itself to our `Arch` and our parameter names.

A family is one function for each kind of file and one table of names for each. A new family adds
its entries below; what our decoder cannot compute is refused here, before any weight is read.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from grpo.model.arch import Arch

# Ours -> theirs. Names under "layers/" have one tensor for each layer.
HF_LLAMA_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers/attn_norm": "model.layers.{layer}.input_layernorm.weight",
    "layers/q": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/k": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/v": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/o": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/down": "model.layers.{layer}.mlp.down_proj.weight",
}

GGUF_LLAMA_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "layers/attn_norm": "blk.{layer}.attn_norm.weight",
    "layers/q": "blk.{layer}.attn_q.weight",
    "layers/k": "blk.{layer}.attn_k.weight",
    "layers/v": "blk.{layer}.attn_v.weight",
    "layers/o": "blk.{layer}.attn_output.weight",
    "layers/mlp_norm": "blk.{layer}.ffn_norm.weight",
    "layers/gate": "blk.{layer}.ffn_gate.weight",
    "layers/up": "blk.{layer}.ffn_up.weight",
    "layers/down": "blk.{layer}.ffn_down.weight",
}


def arch_from_hf(config: Mapping[str, Any]) -> Arch:
    """The shape that a Hugging Face `config.json` describes.

    Raises:
      ValueError: the model is of a family, or uses a feature, that this decoder does not have, or
        a field is missing; the message names the field and what is supported.
    """
    family = str(config.get("model_type"))
    if family not in _FROM_HF:
        raise _unsupported("config.json", "model_type", family, sorted(_FROM_HF))
    return _FROM_HF[family](config)


def arch_from_gguf(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Arch:
    """The shape that a GGUF file describes.

    Args:
      fields: the file's metadata, values as plain Python objects.
      shapes: tensor name -> shape, slowest axis first (the reverse of GGUF's own order). The
        size of the vocabulary and whether the head is tied can only be read from here.

    Raises:
      ValueError: as `arch_from_hf`.
    """
    family = str(fields.get("general.architecture"))
    if family not in _FROM_GGUF:
        raise _unsupported("GGUF metadata", "general.architecture", family, sorted(_FROM_GGUF))
    return _FROM_GGUF[family](fields, shapes)


def _llama_from_hf(config: Mapping[str, Any]) -> Arch:
    where = "config.json"
    # Absent fields mean what LlamaConfig of `transformers` takes them to mean.
    _require(where, config, "hidden_act", ("silu",), default="silu")
    for field in ("attention_bias", "mlp_bias"):
        _require(where, config, field, (False,), default=False)
    for field in ("sliding_window", "quantization_config"):
        _require(where, config, field, (None,), default=None)
    if "LlamaForCausalLM" not in (config.get("architectures") or ["LlamaForCausalLM"]):
        raise _unsupported(where, "architectures", config["architectures"], ["LlamaForCausalLM"])

    width = _get(where, config, "hidden_size")
    num_heads = _get(where, config, "num_attention_heads")
    return Arch(
        vocab_size=_get(where, config, "vocab_size"),
        width=width,
        mlp_width=_get(where, config, "intermediate_size"),
        num_layers=_get(where, config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_width=config.get("head_dim") or width // num_heads,
        rope_theta=_hf_rope_theta(config),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config.get("max_position_embeddings", 2048)),
    )


def _hf_rope_theta(config: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies; refuses every kind of scaled rotary positions.

    `transformers` 5 moved `rope_theta` and the old `rope_scaling` into `rope_parameters`.
    """
    theta = config.get("rope_theta", 10_000.0)
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise _unsupported("config.json", field, rope, ["none", "rope_type 'default'"])
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise _unsupported("config.json", "partial_rotary_factor", partial, [1.0])
        theta = rope.get("rope_theta", theta)
    return float(theta)


def _llama_from_gguf(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Arch:
    where = "GGUF metadata"
    _require(where, fields, "llama.rope.scaling.type", ("none",), default="none")
    _require(where, fields, "llama.expert_count", (0,), default=0)
    if "rope_freqs.weight" in shapes:  # llama.cpp's form of Llama 3.1's scaled frequencies
        raise _unsupported("GGUF file", "tensor rope_freqs.weight", "scaled rope", ["plain rope"])
    if "token_embd.weight" not in shapes:
        raise ValueError("GGUF file: tensor token_embd.weight is missing")

    width = _get(where, fields, "llama.embedding_length")
    num_heads = _get(where, fields, "llama.attention.head_count")
    head_width = fields.get("llama.attention.key_length", width // num_heads)
    for field in ("llama.attention.value_length", "llama.rope.dimension_count"):
        _require(where, fields, field, (head_width,), default=head_width)
    # The file keeps the epsilon in float32: 1e-5 reads back as 9.999999747e-06.
    eps = np.float32(_get(where, fields, "llama.attention.layer_norm_rms_epsilon"))
    return Arch(
        vocab_size=shapes["token_embd.weight"][0],
        width=width,
        mlp_width=_get(where, fields, "llama.feed_forward_length"),
        num_layers=_get(where, fields, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.get("llama.attention.head_count_kv", num_heads),
        head_width=head_width,
        rope_theta=float(fields.get("llama.rope.freq_base", 10_000.0)),
        norm_eps=float(str(eps)),
        tied_head="output.weight" not in shapes,
        max_positions=_get(where, fields, "llama.context_length"),
    )


_FROM_HF: Mapping[str, Callable[[Mapping[str, Any]], Arch]] = {"llama": _llama_from_hf}
_FROM_GGUF: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Arch]] = {
    "llama": _llama_from_gguf
}


def _get(where: str, fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ValueError(f"{where}: field {name!r} is missing")
    return fields[name]


def _require(
    where: str, fields: Mapping[str, Any], name: str, supported: tuple[Any, ...], default: Any
) -> None:
    value = fields.get(name, default)
    if value not in supported:
        raise _unsupported(where, name, value, supported)


def _unsupported(where: str, name: str, value: Any, supported: Any) -> ValueError:
    listed = ", ".join(repr(v) if not isinstance(v, str) else v for v in supported)
    return ValueError(f"{where}: {name} is {value!r}, which is not supported; supported: {listed}")
