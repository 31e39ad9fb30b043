"""Every family against `transformers`: tiny models, and the configs of published ones."""

import json
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo.model.arch import Arch
from grpo.model.decoder import hidden_states, layers_of
from grpo.model.families import arch_from_hf
from grpo.model.params import Params, num_params
from grpo.model.rope import Linear, Llama3, Yarn, frequencies
from tools import parity

ROPES = json.loads((parity.GOLDEN / "families.json").read_text())["ropes"]


def archs() -> dict[str, Arch]:
    return {name: arch_from_hf(model["config"]) for name, model in parity.MODELS.items()}


@pytest.mark.parametrize("name", sorted(parity.MODELS))
def test_logits_are_those_of_transformers(name, tmp_path):
    """Train form with left, right and no padding; prefill and decode; 1e-4 in float32.

    The two forms also agree with each other, to 1e-5.
    """
    arch, params = parity.load(name, tmp_path)
    long, short = parity.golden(name)
    train, decode = parity.train_logits(arch, params), parity.decode_logits(arch, params)
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    for padding, expected in {"none": long, "left": short, "right": short}.items():
        close(train[padding], expected)
    for row, expected in enumerate([long, short]):
        close(decode[row], expected[-parity.FED :])
    for row, padding in enumerate(["none", "right"]):
        ours = train[padding][-parity.FED :]
        np.testing.assert_allclose(decode[row], ours, rtol=0, atol=1e-5)


# One here that has nearly everything; the others take as long again each.
_QUICK = ("gemma3",)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in _QUICK else pytest.mark.slow)
        for name in sorted(parity.MODELS)
    ],
)
def test_sampler_and_trainer_agree(name, tmp_path):
    arch, params = parity.load(name, tmp_path)
    assert parity.sampler_gap(arch, params) <= 1e-5


def test_layers_that_differ_are_rematerialised_as_they_are(tmp_path):
    """The scan carries their windows and frequencies; a gradient must not depend on remat."""
    arch, params = parity.load("gemma3", tmp_path)
    tokens_RT = jnp.asarray(parity.ROWS[0])[None]
    positions_RT, ones_RT = jnp.arange(tokens_RT.shape[1])[None], jnp.ones_like(tokens_RT)

    def gradient(remat: str) -> Params:
        def loss(params: Params) -> jax.Array:
            hidden_RTD = hidden_states(
                params,
                arch,
                tokens_RT,
                positions_RT,
                ones_RT,
                ones_RT,
                dtype="float32",
                remat=remat,
            )
            return jnp.sum(jnp.sin(hidden_RTD))

        return jax.jit(jax.grad(loss), compiler_options=parity.QUICK_COMPILE)(params)

    saved, recomputed = gradient("none"), gradient("full")
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(saved))
    near = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, saved, recomputed)


def test_what_a_family_departs_in_matters():
    """The windows, scalings and caps of the tiny models are such that the goldens show them."""
    assert np.abs(parity.golden("smollm2")[0] - parity.golden("smollm3")[0]).max() > 0.1
    assert 4 < np.abs(parity.golden("gemma2")[0]).max() < 5 == archs()["gemma2"].logit_cap
    longest = max(map(len, parity.ROWS))
    for name, arch in archs().items():
        if "sliding" in arch.layer_types:
            assert arch.window is not None and arch.window < longest / 2, name
    scaled = {type(arch.rope_scaling) for arch in archs().values()}
    assert scaled == {type(None), Linear, Llama3, Yarn}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_frequencies_are_those_of_transformers(rope):
    config = {
        **parity.MODELS["llama2"]["config"],
        **rope["config"],
        "num_key_value_heads": 2,
    }
    arch = arch_from_hf(config)
    got_h = frequencies(arch.rope_theta, arch.rope_scaling, arch.head_width)
    np.testing.assert_allclose(got_h, rope["frequencies"], rtol=3e-7)
    assert layers_of(arch)[0].gain == pytest.approx(rope["gain"], rel=1e-7)


# ---- published configs -------------------------------------------------------------------------

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
}
_LLAMA |= {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "use_cache": True}
_LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
}
_GEMMA3: dict[str, Any] = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}


def sizes(D: int, F: int, L: int, N: int, K: int, V: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "vocab_size": V,
        "tie_word_embeddings": tied,
    }


def six(L: int) -> tuple[str, ...]:
    return tuple("global" if n % 6 == 5 else "sliding" for n in range(L))


# The parts of published config.json files that say what is computed; how many parameters the model
# has, as its card or its checkpoint says; and what we must make of its peculiarities.
PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "Llama-2-7b": (
        {**_LLAMA, **sizes(4096, 11008, 32, 32, 32, 32000, False), "pretraining_tp": 1}
        | {"rope_scaling": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        6_738_415_616,
        {"norm_eps": 1e-5, "rope_theta": 10_000.0, "layer_types": ()},
    ),
    "Llama-3.2-1B": (
        {**_LLAMA, **sizes(2048, 8192, 16, 32, 8, 128_256, True), "head_dim": 64}
        | {"rope_scaling": _LLAMA3_ROPE, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5},
        1_235_814_400,
        {"rope_scaling": Llama3(32.0, 1.0, 4.0, 8192), "rope_theta": 500_000.0},
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        {**_LLAMA, **sizes(4096, 14336, 32, 32, 8, 128_256, False), "rope_theta": 500_000.0}
        | {"rope_scaling": _LLAMA3_ROPE | {"factor": 8.0}, "torch_dtype": "bfloat16"},
        8_030_261_248,
        {"rope_scaling": Llama3(8.0, 1.0, 4.0, 8192), "head_width": 128},
    ),
    "SmolLM2-135M": (
        {**_LLAMA, **sizes(576, 1536, 30, 9, 3, 49152, True), "is_llama_config": True}
        | {"rope_interleaved": False, "rope_theta": 100_000, "rms_norm_eps": 1e-5},
        134_515_008,
        {"rope_theta": 100_000.0, "tied_head": True},
    ),
    "SmolLM3-3B": (
        {**sizes(2048, 11008, 36, 16, 4, 128_256, True), "model_type": "smollm3"}
        | {"architectures": ["SmolLM3ForCausalLM"], "hidden_act": "silu", "sliding_window": None}
        | {"layer_types": ["full_attention"] * 36, "max_window_layers": 28, "mlp_bias": False}
        | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2}
        | {"rope_scaling": None, "rope_theta": 5e6, "use_sliding_window": False},
        3_075_098_624,
        {"layer_types": ("global", "global", "global", "unrotated") * 9, "rope_theta": 5e6},
    ),
    "Qwen2.5-0.5B": (
        {**_QWEN2, **sizes(896, 4864, 24, 14, 2, 151_936, True), "use_mrope": False}
        | {"max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False}
        | {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
        494_032_768,
        {"qkv_bias": True, "layer_types": (), "window": None, "head_width": 64},
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        {**_QWEN2, **sizes(1536, 8960, 28, 12, 2, 151_936, False), "use_mrope": False}
        | {"max_window_layers": 21, "sliding_window": 4096, "use_sliding_window": False}
        | {"rope_theta": 10000, "max_position_embeddings": 131_072},
        1_777_088_000,
        {"qkv_bias": True, "rope_theta": 10_000.0, "tied_head": False},
    ),
    "Qwen3-0.6B": (
        {**sizes(1024, 3072, 28, 16, 8, 151_936, True), "model_type": "qwen3", "head_dim": 128}
        | {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "attention_bias": False}
        | {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
        | {"rope_scaling": None, "rope_theta": 1000000},
        596_049_920,
        {"qk_norm": True, "qkv_bias": False, "head_width": 128},
    ),
    "Mistral-7B-v0.1": (
        {**sizes(4096, 14336, 32, 32, 8, 32000, False), "model_type": "mistral"}
        | {"architectures": ["MistralForCausalLM"], "hidden_act": "silu", "sliding_window": 4096},
        7_241_732_096,
        {"layer_types": ("sliding",) * 32, "window": 4096},
    ),
    "Mistral-Nemo": (
        {**sizes(5120, 14336, 40, 32, 8, 131_072, False), "model_type": "mistral"}
        | {"architectures": ["MistralForCausalLM"], "head_dim": 128, "sliding_window": None},
        12_247_782_400,
        {"layer_types": (), "window": None, "head_width": 128},
    ),
    "gemma-2-2b": (
        {**sizes(2304, 9216, 26, 8, 4, 256_000, True), "model_type": "gemma2", "head_dim": 256}
        | {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0}
        | {"cache_implementation": "hybrid", "final_logit_softcapping": 30.0}
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 10000.0},
        2_614_341_888,
        {"layer_types": ("sliding", "global") * 13, "window": 4096, "query_scale": None}
        | {"score_cap": 50.0, "logit_cap": 30.0, "embed_scale": 48.0, "sandwich_norm": True},
    ),
    "gemma-3-270m": (
        {**_GEMMA3, **sizes(640, 2048, 18, 4, 1, 262_144, True)},
        268_098_176,
        {"layer_types": six(18), "window": 512, "rope_theta": 1e6, "local_rope_theta": 1e4}
        | {"qk_norm": True, "score_cap": None, "logit_cap": None, "activation": "gelu_tanh"},
    ),
    "gemma-3-1b": (
        {**_GEMMA3, **sizes(1152, 6912, 26, 4, 1, 262_144, True)}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        999_885_952,
        {"layer_types": six(26), "rope_scaling": Linear(8.0), "norm_offset": 1.0},
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configs_are_read(name):
    config, parameters, expected = PUBLISHED[name]
    arch = arch_from_hf(config)
    assert num_params(arch) == parameters
    assert {field: getattr(arch, field) for field in expected} == expected


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "gemma-3-1b",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True",
        ),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma-3-1b", {"layer_types": ["chunked_attention"] * 26}, "is 'chunked_attention'"),
        ("gemma-3-1b", {"layer_types": ["full_attention"] * 3}, "names 3 layers.*26"),
        ("gemma-2-2b", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("gemma-2-2b", {"attention_bias": True}, "attention_bias is True"),
        ("SmolLM3-3B", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("SmolLM3-3B", {"layer_types": ["sliding_attention"] * 36}, "layer_types is"),
        ("Qwen3-0.6B", {"attention_bias": True}, "attention_bias is True"),
        ("Qwen3-0.6B", {"num_experts": 8}, r"'num_experts' \(8\) is not known"),
        ("Qwen2.5-0.5B", {"rope_scaling": {"type": "mrope"}}, "rope_type is 'mrope'"),
        ("Mistral-Nemo", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("Llama-2-7b", {"model_type": "gemma3"}, "model_type is 'gemma3'.*gemma3_text"),
        ("Llama-2-7b", {"quantization_config": {"bits": 4}}, "quantization_config is"),
    ],
)
def test_what_is_not_supported_is_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        arch_from_hf(PUBLISHED[name][0] | change)


def test_a_context_stretched_by_the_user_is_read():
    """As the cards of Qwen 2.5 tell users to edit the config, `type` and all."""
    edited = {"rope_scaling": {"factor": 4.0, "type": "yarn"}}
    arch = arch_from_hf(PUBLISHED["Qwen2.5-0.5B"][0] | edited)
    assert arch.max_positions == 4 * 32_768
    assert arch.rope_scaling == Yarn(4.0, 1.0, 32.0, 32_768, gain=0.1 * math.log(4.0) + 1)
