"""Model families: from the `config.json` of a checkpoint to our `Arch` and our parameter names.

A family is one function and, where it names its tensors otherwise, one table of names. What our
decoder cannot compute is refused here, before any weight is read; what GGUF files say of
themselves is read in `grpo.model.files.families_gguf`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from grpo.model.arch import Arch, Experts, Latent
from grpo.model.fields import Fields
from grpo.model.rope import Linear, Llama3, Scaling, Yarn

# Ours -> theirs. Names under "layers/" have one tensor for each layer. A model has those of the
# tensors that its parameter table lists.
HF_LLAMA_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers/attn_norm": "model.layers.{layer}.input_layernorm.weight",
    "layers/q": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/k": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/v": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers/k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers/v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers/q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers/k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    "layers/o": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/down": "model.layers.{layer}.mlp.down_proj.weight",
}

# With four norms a layer, the one "after attention" is no longer the one before the MLP.
HF_SANDWICH_NAMES: Mapping[str, str] = {
    **HF_LLAMA_NAMES,
    "layers/post_attn_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm.weight",
    "layers/post_mlp_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
}

# Latent attention has other projections; a layer with experts has its MLP under other names. Names
# under "dense_layers/" count on to those under "layers/".
_HF_LATENT_NAMES: Mapping[str, str] = {
    name: f"model.layers.{{layer}}.self_attn.{theirs}.weight"
    for name, theirs in (
        ("q_a", "q_a_proj"),
        ("q_a_norm", "q_a_layernorm"),
        ("q_b", "q_b_proj"),
        ("kv_a", "kv_a_proj_with_mqa"),
        ("kv_a_norm", "kv_a_layernorm"),
        ("kv_b", "kv_b_proj"),
    )
}
_HF_EXPERT_NAMES: Mapping[str, str] = {
    "router": "model.layers.{layer}.mlp.gate.weight",
    "router_bias": "model.layers.{layer}.mlp.gate.e_score_correction_bias",
    "expert_gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "expert_up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "expert_down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    "gate": "model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.shared_experts.up_proj.weight",
    "down": "model.layers.{layer}.mlp.shared_experts.down_proj.weight",
}

# What a config.json may say that changes nothing of what the model computes.
_HARMLESS = frozenset(
    """
    _name_or_path architectures attn_implementation bos_token_id cache_implementation
    chunk_size_feed_forward do_sample dtype eos_token_id id2label initializer_range
    is_llama_config label2id max_length model_type name_or_path pad_token_id pretraining_tp
    repetition_penalty return_dict sep_token_id task_specific_params temperature
    tokenizer_class top_k top_p torch_dtype transformers.js_config transformers_version
    unk_token_id unsloth_fixed unsloth_version use_cache
    """.split()
)


def hf_names(arch: Arch) -> Mapping[str, str]:
    """Our parameter paths -> the names of tensors in a Hugging Face folder of this model."""
    names = dict(HF_SANDWICH_NAMES if arch.sandwich_norm else HF_LLAMA_NAMES)
    names |= {f"layers/{name}": theirs for name, theirs in _HF_LATENT_NAMES.items()}
    if arch.experts:
        plain = [name for name in names if name.startswith("layers/")]
        names |= {f"dense_{name}": names[name] for name in plain}
        names |= {f"layers/{name}": theirs for name, theirs in _HF_EXPERT_NAMES.items()}
    return names


def arch_from_hf(config: Mapping[str, Any]) -> Arch:
    """The shape that a Hugging Face `config.json` describes.

    Absent fields mean what the family's configuration class of `transformers` takes them to mean.

    Raises:
      ValueError: the model is of a family, or uses a feature, that this decoder does not have, a
        field is missing, or one is there that nobody here knows; the message names the field.
    """
    fields = Fields("config.json", config)
    family = str(fields.get("model_type"))
    if family not in _FAMILIES:
        raise fields.unsupported("model_type", family, sorted(_FAMILIES))
    model_class, read = _FAMILIES[family]
    architectures = fields.get("architectures", [model_class])
    if model_class not in architectures:
        raise fields.unsupported("architectures", architectures, [model_class])
    fields.only("attention_dropout", 0.0)
    fields.only("quantization_config")
    arch = read(fields)
    fields.nothing_else(_HARMLESS)
    if isinstance(arch.rope_scaling, Yarn):  # users who stretch a model leave the old limit there
        stretched = int(arch.rope_scaling.factor * arch.rope_scaling.original_positions)
        arch = dataclasses.replace(arch, max_positions=max(arch.max_positions, stretched))
    return arch


def _llama(fields: Fields) -> Arch:
    """Llama 2 and 3, SmolLM 2, DeepSeek-R1-Distill-Llama."""
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    return Arch(**_sizes(fields, max_positions=2048), **_rope(fields))


def _mistral(fields: Fields) -> Arch:
    """Mistral 7B and Nemo; in the first version every layer is a sliding one."""
    window = fields.nullable("sliding_window", 4096)
    kinds = ("sliding",) * fields.need("num_hidden_layers")
    return Arch(
        **_sizes(fields, max_positions=131_072),
        **_rope(fields),
        layer_types=kinds if window else (),
        window=window,
    )


def _qwen2(fields: Fields) -> Arch:
    """Qwen 2 and 2.5, DeepSeek-R1-Distill-Qwen."""
    return Arch(
        **_sizes(fields, max_positions=32_768),
        **_rope(fields),
        **_qwen_layers(fields),
        qkv_bias=True,
    )


def _qwen3(fields: Fields) -> Arch:
    fields.only("attention_bias", False)
    return Arch(
        **_sizes(fields, max_positions=32_768, head_width=128),
        **_rope(fields),
        **_qwen_layers(fields),
        qk_norm=True,
    )


def _qwen3_moe(fields: Fields) -> Arch:
    """Every layer has experts; none is shared."""
    for name in ("attention_bias", "use_sliding_window"):
        fields.only(name, False)
    for name in ("sliding_window", "max_window_layers"):
        fields.get(name)  # both mean nothing then
    for name in ("router_aux_loss_coef", "output_router_logits"):
        fields.get(name)  # of pre-training's loss
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    count = fields.get("num_experts", fields.get("num_local_experts", 128))
    experts = Experts(
        count=fields.get("num_local_experts", count),
        per_token=fields.get("num_experts_per_tok", 8),
        width=fields.get("moe_intermediate_size", 768),
        normalised=bool(fields.get("norm_topk_prob", False)),
    )
    return Arch(
        **_sizes(fields, max_positions=32_768, head_width=128),
        **_rope(fields),
        qk_norm=True,
        experts=experts,
    )


def _deepseek_v2(fields: Fields) -> Arch:
    """DeepSeek-V2 and V2-Lite, softmax routing."""
    fields.only("scoring_func", "softmax")
    fields.only("norm_topk_prob", False)  # `transformers` does not read it
    fields.only("mlp_bias", False)
    method = fields.get("topk_method", "greedy")
    groups: dict[str, Any] = {}
    if method == "group_limited_greedy":
        groups = {"groups": fields.need("n_group"), "groups_per_token": fields.need("topk_group")}
    elif method != "greedy":
        raise fields.unsupported("topk_method", method, ["greedy", "group_limited_greedy"])
    for name in ("n_group", "topk_group"):
        fields.get(name)  # of no meaning to the greedy method
    experts = Experts(
        **_deepseek_experts(fields, count=64, per_token=None, width=1407, shared=2, dense=0),
        **groups,
        normalised=False,
        scale=float(fields.get("routed_scaling_factor", 1.0)),
    )
    return _deepseek(fields, experts, max_positions=2048, interleaved=True)


def _deepseek_v3(fields: Fields) -> Arch:
    """DeepSeek-V3 and R1: sigmoid routing, balanced by a bias that only chooses."""
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    experts = Experts(
        **_deepseek_experts(fields, count=256, per_token=8, width=2048, shared=1, dense=3),
        groups=fields.get("n_group", 8),
        groups_per_token=fields.get("topk_group", 4),
        group_top=2,
        scoring="sigmoid",
        normalised=bool(fields.get("norm_topk_prob", True)),
        scale=float(fields.get("routed_scaling_factor", 2.5)),
        selection_bias=True,
    )
    interleaved = bool(fields.get("rope_interleave", True))
    return _deepseek(fields, experts, max_positions=4096, interleaved=interleaved)


def _deepseek_experts(
    fields: Fields, *, count: int, per_token: int | None, width: int, shared: int, dense: int
) -> dict[str, Any]:
    """What V2 and V3 call by the same names; the arguments are what their absence means."""
    fields.only("moe_layer_freq", 1)
    for name in ("aux_loss_alpha", "seq_aux", "output_router_logits", "ep_size", "auto_map"):
        fields.get(name)  # of pre-training's loss, or of how others run the model
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        fields.get(name)  # predict further tokens; `grpo.model.files.weights` leaves them out
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    listed = [fields.get(name) for name in names]
    if per_token is None:
        per_token = fields.need("num_experts_per_tok")
    width = fields.get("moe_intermediate_size", width)
    return {
        "count": next((value for value in listed if value is not None), count),
        "per_token": fields.get("num_experts_per_tok", per_token),
        "width": width,
        "shared_width": width * fields.get("n_shared_experts", shared),
        "first_dense": fields.get("first_k_dense_replace", dense),
    }


def _deepseek(fields: Fields, experts: Experts, *, max_positions: int, interleaved: bool) -> Arch:
    """Latent attention, and the scale that YaRN's `mscale_all_dim` puts on its scores."""
    fields.only("attention_bias", False)
    plain, turned = fields.get("qk_nope_head_dim", 128), fields.get("qk_rope_head_dim", 64)
    latent = Latent(
        kv_rank=fields.get("kv_lora_rank", 512),
        q_rank=fields.nullable("q_lora_rank", 1536),
        plain_width=plain,
        rope_width=turned,
        value_width=fields.get("v_head_dim", 128),
        interleaved=interleaved,
    )
    fields.only("head_dim", turned)  # as `transformers` saves it
    fields.only("qk_head_dim", plain + turned)
    rope = {**fields.get("rope_scaling", {}), **fields.get("rope_parameters", {})}
    stretch = yarn_gain(float(rope.get("factor") or 1), float(rope.get("mscale_all_dim") or 0))
    sizes = _sizes(fields, max_positions=max_positions)
    fields.only("num_key_value_heads", sizes["num_heads"])
    return Arch(
        **sizes | {"head_width": plain + turned},
        **_rope(fields),
        query_scale=None if stretch == 1 else (plain + turned) ** -0.5 * stretch**2,
        experts=experts,
        latent=latent,
    )


def _qwen_layers(fields: Fields) -> dict[str, Any]:
    """Sliding layers from `max_window_layers` on, if they are switched on at all."""
    window, first = fields.get("sliding_window", 4096), fields.get("max_window_layers", 28)
    if not fields.get("use_sliding_window", False):
        window = None
    L = fields.need("num_hidden_layers")
    slides = [window is not None and layer >= first for layer in range(L)]
    return _layer_types(fields, slides, window)


def _smollm3(fields: Fields) -> Arch:
    """Every fourth layer has no positions (arXiv:2501.18795)."""
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        fields.only(name, False)
    for name in ("sliding_window", "max_window_layers"):
        fields.get(name)  # both mean nothing then
    L, every = fields.need("num_hidden_layers"), fields.get("no_rope_layer_interval", 4)
    default = [(layer + 1) % every != 0 for layer in range(L)]
    rotated = fields.get("no_rope_layers", default)[:L]
    if any(kind != "full_attention" for kind in fields.get("layer_types", ())):
        raise fields.unsupported("layer_types", fields.get("layer_types"), ["full_attention"])
    kinds = tuple("global" if yes else "unrotated" for yes in rotated)
    return Arch(
        **_sizes(fields, max_positions=32_768, tied=True),
        **_rope(fields, theta=2_000_000.0),
        layer_types=kinds if "unrotated" in kinds else (),
    )


def _gemma2(fields: Fields) -> Arch:
    L = fields.need("num_hidden_layers")
    slides = [layer % 2 == 0 for layer in range(L)]
    return Arch(
        **_gemma(fields),
        **_rope(fields),
        **_layer_types(fields, slides, fields.nullable("sliding_window", 4096)),
        score_cap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_cap=_cap(fields, "final_logit_softcapping", 30.0),
    )


def _gemma3(fields: Fields) -> Arch:
    """The text models; five layers of six slide, with a rotary base of their own."""
    L = fields.need("num_hidden_layers")
    every = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    slides = [(layer + 1) % every != 0 for layer in range(L)]
    # `transformers` has these two in the configuration, and no code that reads the first.
    fields.only("attn_logit_softcapping")
    layers = _layer_types(fields, slides, fields.nullable("sliding_window", 4096))
    # In its new form, one description of rotary positions for each type of layer.
    both = fields.get("rope_parameters", {})
    if unknown := set(both) - {"full_attention", "sliding_attention"}:
        raise fields.unsupported(
            "rope_parameters", both, [f"full_attention and sliding_attention, not {unknown}"]
        )
    local = Fields("config.json: rope_parameters of sliding_attention", _of(both, "sliding"))
    local.only("rope_type", "default")
    local_theta = local.get("rope_theta", fields.get("rope_local_base_freq", 10_000.0))
    local.nothing_else()
    theta, scaling = _read_rope(
        fields,
        {**fields.get("rope_scaling", {}), **_of(both, "full")},
        fields.get("rope_theta", 1_000_000.0),
    )
    return Arch(
        **_gemma(fields),
        **layers,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=float(local_theta) if layers else None,
        qk_norm=True,
        logit_cap=_cap(fields, "final_logit_softcapping", None),
    )


def _of(both: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return both.get(f"{kind}_attention") or {}


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    value = fields.nullable(name, default)
    return None if value is None else float(value)


def _gemma(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    fields.only("attention_bias", False)
    fields.only("use_bidirectional_attention", False)
    sizes = _sizes(
        fields,
        max_positions=8192,
        head_width=256,
        tied=True,
        activations=("hidden_activation", "hidden_act"),
    )
    scalar = float(fields.get("query_pre_attn_scalar", 256))
    return {
        **sizes,
        "query_scale": None if scalar == sizes["head_width"] else scalar**-0.5,
        "norm_offset": 1.0,
        "sandwich_norm": True,
        "embed_scale": sizes["width"] ** 0.5,
        "activation": "gelu_tanh",
    }


def _sizes(
    fields: Fields,
    *,
    max_positions: int,
    head_width: int | None = None,
    tied: bool = False,
    activations: tuple[str, ...] = ("hidden_act",),
) -> dict[str, Any]:
    """The numbers every family gives; the arguments are what their absence means."""
    expected = "gelu_pytorch_tanh" if "hidden_activation" in activations else "silu"
    for name in activations:
        fields.only(name, expected)
    width, num_heads = fields.need("hidden_size"), fields.need("num_attention_heads")
    return {
        "vocab_size": fields.need("vocab_size"),
        "width": width,
        "mlp_width": fields.need("intermediate_size"),
        "num_layers": fields.need("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": fields.get("num_key_value_heads", num_heads),
        "head_width": fields.get("head_dim", head_width or width // num_heads),
        "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
        "tied_head": bool(fields.get("tie_word_embeddings", tied)),
        "max_positions": int(fields.get("max_position_embeddings", max_positions)),
    }


def _layer_types(fields: Fields, slides: list[bool], window: int | None) -> dict[str, Any]:
    """Which layers slide: as the config lists them, else as `slides` has it."""
    theirs = {"full_attention": "global", "sliding_attention": "sliding"}
    listed = fields.get("layer_types")
    if listed is None:
        kinds = tuple("sliding" if yes else "global" for yes in slides)
    elif unknown := set(listed) - theirs.keys():
        raise fields.unsupported("layer_types", sorted(unknown)[0], sorted(theirs))
    elif len(listed) != len(slides):
        raise ValueError(
            f"config.json: layer_types names {len(listed)} layers, num_hidden_layers is "
            f"{len(slides)}"
        )
    else:
        kinds = tuple(theirs[kind] for kind in listed)
    if "sliding" not in kinds or (listed is None and window is None):
        return {}
    return {"layer_types": kinds, "window": window}


def _rope(fields: Fields, theta: float = 10_000.0) -> dict[str, Any]:
    """Base and scaling of the rotary frequencies.

    `transformers` 5 moved `rope_theta` and the old `rope_scaling` into `rope_parameters`.
    """
    rope = {**fields.get("rope_scaling", {}), **fields.get("rope_parameters", {})}
    base, scaling = _read_rope(fields, rope, fields.get("rope_theta", theta))
    return {"rope_theta": base, "rope_scaling": scaling}


def _read_rope(
    fields: Fields, description: Mapping[str, Any], theta: float
) -> tuple[float, Scaling | None]:
    rope = Fields("config.json: rope_scaling", description)
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.get("type")
    theta = float(rope.get("rope_theta", theta))
    rope.only("partial_rotary_factor", 1.0)
    fields.only("partial_rotary_factor", 1.0)
    longest = fields.get("max_position_embeddings")
    if kind == "default":
        scaling: Scaling | None = None
    elif kind == "linear":
        scaling = Linear(float(rope.need("factor")))
    elif kind == "llama3":
        scaling = Llama3(
            factor=float(rope.need("factor")),
            low=float(rope.need("low_freq_factor")),
            high=float(rope.need("high_freq_factor")),
            original_positions=rope.get("original_max_position_embeddings", longest),
        )
    elif kind == "yarn":
        scaling = _yarn(rope, longest)
    else:
        raise rope.unsupported("rope_type", kind, ["default", "linear", "llama3", "yarn"])
    rope.nothing_else(("original_max_position_embeddings",) if kind == "linear" else ())
    return theta, scaling


def yarn_gain(factor: float, scale: float = 1.0) -> float:
    """0.1 * scale * ln(factor) + 1 (arXiv:2309.00071, eq. 15)."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn(rope: Fields, longest: int) -> Yarn:
    factor = float(rope.need("factor"))
    gain, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if gain and all_dim:
        gain = yarn_gain(factor, gain) / yarn_gain(factor, all_dim)
    else:
        gain = yarn_gain(factor)
    return Yarn(
        factor=factor,
        slow=float(rope.get("beta_slow", 1)),
        fast=float(rope.get("beta_fast", 32)),
        original_positions=rope.get("original_max_position_embeddings", longest),
        gain=float(rope.get("attention_factor", gain)),
        whole_pairs=bool(rope.get("truncate", True)),
    )


_FAMILIES: Mapping[str, tuple[str, Callable[[Fields], Arch]]] = {
    "deepseek_v2": ("DeepseekV2ForCausalLM", _deepseek_v2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _deepseek_v3),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", _gemma3),
    "llama": ("LlamaForCausalLM", _llama),
    "mistral": ("MistralForCausalLM", _mistral),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "smollm3": ("SmolLM3ForCausalLM", _smollm3),
}
