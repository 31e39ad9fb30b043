"""Weights from safetensors folders and GGUF files, written here and checked entry by entry."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from toy_model import ARCH as TOY
from toy_model import ToyTokenizer, mesh_of

from grpo.config import ModelConfig
from grpo.model.arch import Arch
from grpo.model.families import arch_from_hf
from grpo.model.files.families_gguf import arch_from_gguf
from grpo.model.files.weights import StoredArray, half_split_rows, load_weights, read_arch
from grpo.model.params import map_table, param_table
from grpo.policy import lay_out
from grpo.source import Source
from tools import parity, tiny_models

# Every width differs from every other, so a swapped axis cannot go unseen.
ARCH = Arch(
    vocab_size=11,
    width=10,
    mlp_width=7,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_width=4,
    rope_theta=5000.0,
    norm_eps=1e-5,
    tied_head=False,
    max_positions=64,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 11,
    "hidden_size": 10,
    "intermediate_size": 7,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}


def hf_tensors(arch: Arch = ARCH, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names, matrices as [outputs, inputs]."""
    D, F, N, K, H = arch.width, arch.mlp_width, arch.num_heads, arch.num_kv_heads, arch.head_width
    shapes = {"model.embed_tokens.weight": (arch.vocab_size, D), "model.norm.weight": (D,)}
    if not arch.tied_head:
        shapes["lm_head.weight"] = (arch.vocab_size, D)
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (D,),
            f"{prefix}.post_attention_layernorm.weight": (D,),
            f"{prefix}.self_attn.q_proj.weight": (N * H, D),
            f"{prefix}.self_attn.k_proj.weight": (K * H, D),
            f"{prefix}.self_attn.v_proj.weight": (K * H, D),
            f"{prefix}.self_attn.o_proj.weight": (D, N * H),
            f"{prefix}.mlp.gate_proj.weight": (F, D),
            f"{prefix}.mlp.up_proj.weight": (F, D),
            f"{prefix}.mlp.down_proj.weight": (D, F),
        }
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_folder(folder: Path, tensors: dict[str, Any], config: Any = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, tensors: dict[str, Any], num_shards: int) -> Path:
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        held = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_single_file_lands_entry_by_entry(tmp_path):
    tensors = hf_tensors()
    folder = write_folder(tmp_path, tensors)
    arch = read_arch(folder)
    assert arch == ARCH
    params = load_weights(folder, arch)
    assert jax.tree.map(np.shape, params) == map_table(lambda spec: spec.shape, param_table(ARCH))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}

    H, layers = ARCH.head_width, params["layers"]
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["final_norm"], tensors["model.norm.weight"])
    for layer in range(ARCH.num_layers):
        theirs = {
            name.removeprefix(f"model.layers.{layer}."): value for name, value in tensors.items()
        }
        for ours, name in [("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")]:
            stored = theirs[f"self_attn.{name}.weight"]
            for head in range(stored.shape[0] // H):
                rows = stored[head * H : (head + 1) * H]  # one head's outputs
                np.testing.assert_array_equal(layers[ours][layer, :, head], rows.T)
        for head in range(ARCH.num_heads):
            columns = theirs["self_attn.o_proj.weight"][:, head * H : (head + 1) * H]
            np.testing.assert_array_equal(layers["o"][layer, head], columns.T)
        for ours in ("gate", "up", "down"):
            stored = theirs[f"mlp.{ours}_proj.weight"]
            np.testing.assert_array_equal(layers[ours][layer], stored.T)
        np.testing.assert_array_equal(layers["attn_norm"][layer], theirs["input_layernorm.weight"])
        np.testing.assert_array_equal(
            layers["mlp_norm"][layer], theirs["post_attention_layernorm.weight"]
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_shards_equal_a_single_file_in_every_dtype(tmp_path, dtype):
    tensors = {name: value.astype(dtype) for name, value in hf_tensors().items()}
    (tmp_path / "sharded").mkdir()
    single = load_weights(write_folder(tmp_path / "single", tensors), ARCH)
    sharded = load_weights(write_shards(tmp_path / "sharded", tensors, 3), ARCH)
    jax.tree.map(np.testing.assert_array_equal, single, sharded)
    np.testing.assert_array_equal(
        single["embed"], tensors["model.embed_tokens.weight"].astype(np.float32)
    )


def test_tied_head_has_no_head_even_if_a_copy_is_stored(tmp_path):
    arch = dataclasses.replace(ARCH, tied_head=True)
    folder = write_folder(tmp_path, hf_tensors(), CONFIG | {"tie_word_embeddings": True})
    assert read_arch(folder) == arch
    assert "head" not in load_weights(folder, arch)


def test_put_makes_each_leaf(tmp_path):
    folder = write_folder(tmp_path, hf_tensors())
    seen = {}

    def put(path, spec, array):
        seen[path] = (spec.shape, array.shape, array.dtype)
        return path

    params = load_weights(folder, ARCH, put)
    assert params["layers"]["q"] == "layers/q" and params["embed"] == "embed"
    assert all(shape == got and dtype == np.float32 for shape, got, dtype in seen.values())
    assert len(seen) == 12


def test_a_part_is_that_part_of_the_whole(tmp_path):
    """Of every array, by every axis; of a safetensors folder and of GGUF."""
    folder = write_folder(tmp_path / "folder", hf_tensors())
    quantised = write_gguf(tmp_path / "tiny.gguf", GGUF_ARCH, hf_tensors(GGUF_ARCH))
    for source, arch in ((folder, ARCH), (quantised, GGUF_ARCH)):

        def compare(path, spec, array):
            whole = np.asarray(array)
            assert whole.shape == spec.shape and whole.flags.c_contiguous
            for axis, size in enumerate(spec.shape):
                for part in (slice(0, size // 2), slice(size // 2, size), slice(1, size)):
                    at = tuple(part if i == axis else slice(None) for i in range(len(spec.shape)))
                    np.testing.assert_array_equal(array[at], whole[at], err_msg=f"{path} {at}")
            middle = tuple(slice(n // 3, n // 3 + 1) for n in spec.shape)
            np.testing.assert_array_equal(array[middle], whole[middle])

        load_weights(source, arch, compare)


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
def test_a_host_reads_shard_by_shard(tmp_path, monkeypatch, axis_types):
    """What lands is what is stored, and nothing larger than a device's part is ever read."""
    tensors = hf_tensors(TOY)
    folder = write_folder(tmp_path, tensors)
    mesh = mesh_of(data=2, fsdp=2, tensor=2, axis_types=axis_types)
    read = Source(TOY, ToyTokenizer(), folder).read
    policy = lay_out(TOY, ToyTokenizer(), mesh, ModelConfig(), temperature=1.0, read=read)
    reads, whole = [], StoredArray.__getitem__

    def counted(self, index):
        reads.append((whole(self, index).nbytes, self.shape))
        return whole(self, index)

    monkeypatch.setattr(StoredArray, "__getitem__", counted)
    params = policy.initial_params()
    for nbytes, shape in reads:
        ways = 1 if shape[-1] == TOY.width and len(shape) < 3 and shape[0] != 32 else 4
        assert nbytes == 4 * math.prod(shape) // ways, shape
    # Each part once, though two devices keep it.
    assert sum(nbytes for nbytes, _ in reads) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(params)
    )
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, params, load_weights(folder, TOY))
    for leaf, sharding in zip(
        jax.tree.leaves(params), jax.tree.leaves(policy.shardings), strict=True
    ):
        assert leaf.sharding == sharding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "tensor model.norm.weight missing"),
        ({"model.norm.bias": np.zeros(10, np.float32)}, "model.norm.bias not part of the arch"),
        ({"model.norm.weight": np.zeros(9, np.float32)}, r"has shape \(9,\), expected \(10,\)"),
        (
            {"model.layers.1.self_attn.q_proj.weight": np.zeros((10, 24), np.float32)},
            r"layers.1.self_attn.q_proj.weight has shape \(10, 24\), expected \(24, 10\)",
        ),
        ({"model.norm.weight": np.zeros(10, np.int8)}, "is I8; supported: BF16, F16, F32"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    tensors = {k: v for k, v in (hf_tensors() | change).items() if v is not None}
    folder = write_folder(tmp_path, tensors)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(folder, ARCH)
    assert "model.safetensors" in str(error.value)


def test_files_that_are_missing_or_torn_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_arch(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_arch(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load_weights(tmp_path, ARCH)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match="neither a folder with safetensors nor a .gguf"):
        load_weights(tmp_path / "weights.bin", ARCH)
    folder = write_shards(tmp_path, hf_tensors(), 2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is not a complete"):
        load_weights(folder, ARCH)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors, named in"):
        load_weights(folder, ARCH)


# ---- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'.*supported: .*llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_type is 'dynamic'.*yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "trick": 1.0}},
            r"rope_scaling: field 'trick' \(1.0\) is not known",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"attention_bias": True}, "attention_bias is True.*supported: False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*supported: silu"),
        ({"new_trick": "on"}, r"'new_trick' \('on'\) is not known.*delete it"),
        ({"sliding_window": 4096}, r"'sliding_window' \(4096\) is not known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
    ],
)
def test_unsupported_configs_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        arch_from_hf(CONFIG | change)


def test_absent_fields_mean_what_transformers_means():
    config = {k: v for k, v in CONFIG.items() if k not in ("head_dim", "num_key_value_heads")}
    arch = arch_from_hf(config | {"hidden_size": 12})
    assert (arch.head_width, arch.num_kv_heads) == (2, 6)
    for field in ("rope_theta", "tie_word_embeddings", "rms_norm_eps"):
        del config[field]
    arch = arch_from_hf(config | {"hidden_size": 12})
    assert (arch.rope_theta, arch.tied_head, arch.norm_eps) == (10_000.0, False, 1e-6)


def test_rope_theta_is_found_in_rope_parameters():
    config = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": 70_000.0}
    assert arch_from_hf(config | {"rope_parameters": rope}).rope_theta == 70_000.0


# ---- GGUF --------------------------------------------------------------------------------------

# Q8_0 packs 32 values a block, so the widths along the inputs are multiples of 32 here.
GGUF_ARCH = dataclasses.replace(ARCH, width=32, mlp_width=64, num_heads=8, norm_eps=1e-5)

GGUF_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def interleaved_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's rotary order, written out: old rows i and i + H/2 become rows 2i and 2i + 1."""
    H = weight.shape[0] // num_heads
    order = [
        head * H + pair + half * (H // 2)
        for head in range(num_heads)
        for pair in range(H // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write_gguf(path: Path, arch: Arch, tensors: dict[str, np.ndarray]) -> Path:
    """Matrices in Q8_0, the rest in float32, as llama.cpp would name and order them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.width)
    writer.add_block_count(arch.num_layers)
    writer.add_feed_forward_length(arch.mlp_width)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_rope_dimension_count(arch.head_width)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for layer in range(arch.num_layers):
        for theirs, ours in GGUF_PARTS.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    quantised = gguf.GGMLQuantizationType.Q8_0
    for name, value in tensors.items():
        if name.endswith("q_proj.weight"):
            value = interleaved_rows(value, arch.num_heads)
        if name.endswith("k_proj.weight"):
            value = interleaved_rows(value, arch.num_kv_heads)
        if value.ndim == 2:
            packed = gguf.quantize(value, quantised)
            writer.add_tensor(names.get(name, name), packed, raw_dtype=quantised)
        else:
            writer.add_tensor(names.get(name, name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_equals_the_folder_it_was_made_from(tmp_path, tied):
    arch = dataclasses.replace(GGUF_ARCH, tied_head=tied)
    # Values that both Q8_0 (block maximum 127 = scale 1) and bfloat16 hold exactly.
    rng = np.random.default_rng(1)
    tensors = {}
    for name, value in hf_tensors(arch).items():
        whole = rng.integers(-127, 128, value.shape).astype(np.float32)
        whole[..., 0] = 127.0
        whole[..., 32::32] = 127.0
        tensors[name] = whole
    path = write_gguf(tmp_path / "tiny.gguf", arch, tensors)
    assert read_arch(path) == arch
    got = load_weights(path, arch)
    folder = write_folder(tmp_path / "folder", tensors)
    jax.tree.map(np.testing.assert_array_equal, got, load_weights(folder, arch))


_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LOCAL = {"rope_type": "default", "rope_theta": 10.0}
_ALL_SLIDE: dict[str, Any] = {
    "layer_types": ["sliding_attention"] * 2,
    "query_pre_attn_scalar": 6,
    "rope_parameters": {"sliding_attention": _LOCAL, "full_attention": _LOCAL},
}


@pytest.mark.parametrize(
    ("family", "change", "parts"),
    [
        ("qwen2", {}, {}),
        ("qwen3", {}, _NORMS),
        ("gemma3", _ALL_SLIDE, _NORMS | _FOUR_NORMS),
    ],
)
def test_gguf_of_other_families_equals_the_folder(tmp_path, family, change, parts):
    """Biases, more norms, Gemma's scales with 1 added; rows stay in their rotary order."""
    stored = parity.MODELS[family]
    config, shapes = stored["config"] | change, stored["shapes"]
    folder = tiny_models.write_folder(tmp_path / "folder", config, shapes)
    arch = read_arch(folder)

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", family)
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.width)
    writer.add_block_count(arch.num_layers)
    writer.add_feed_forward_length(arch.mlp_width)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_key_length(arch.head_width)
    writer.add_value_length(arch.head_width)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    if arch.window is not None:
        writer.add_sliding_window(arch.window)
        writer.add_float32("gemma3.rope.freq_base_swa", 10.0)
    names = {hf: theirs for theirs, hf in (GGUF_PARTS | parts).items()}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, value in tiny_models.weights(shapes, family == "gemma3").items():
        module, _, kind = key.rpartition(".")
        if module in outer:
            module = outer[module]
        else:
            layer, _, part = module.removeprefix("model.layers.").partition(".")
            module = f"blk.{layer}.{names[part]}"
        added = np.float32(family == "gemma3" and module.endswith("norm"))
        writer.add_tensor(f"{module}.{kind}", value + added)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    assert read_arch(tmp_path / "tiny.gguf") == arch
    got = load_weights(tmp_path / "tiny.gguf", arch)
    near = partial(np.testing.assert_allclose, rtol=0, atol=2e-7)  # 1 was added, and taken away
    jax.tree.map(near, got, load_weights(folder, arch))


def test_quantised_values_alone_are_rounded_to_bfloat16(tmp_path):
    tensors = hf_tensors(GGUF_ARCH)
    params = load_weights(write_gguf(tmp_path / "tiny.gguf", GGUF_ARCH, tensors), GGUF_ARCH)
    layers = params["layers"]
    last, first = params.pop("final_norm"), layers.pop("attn_norm")[0]
    np.testing.assert_array_equal(last, tensors["model.norm.weight"])
    np.testing.assert_array_equal(first, tensors["model.layers.0.input_layernorm.weight"])
    del layers["mlp_norm"]
    for leaf in jax.tree.leaves(params):
        rounded = np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(leaf, rounded)


def test_half_split_rows_undoes_the_interleaving():
    weight = np.arange(24.0).reshape(8, 3)  # 2 heads of 4 rows
    stored = interleaved_rows(weight, 2)
    assert stored[:, 0].tolist() == [0, 6, 3, 9, 12, 18, 15, 21]
    np.testing.assert_array_equal(half_split_rows(stored, 2), weight)


def test_gguf_errors_name_what_is_wrong(tmp_path):
    tensors = hf_tensors(GGUF_ARCH)
    extra = write_gguf(tmp_path / "a.gguf", GGUF_ARCH, tensors | {"odd": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"a\.gguf: tensor odd not part"):
        load_weights(extra, GGUF_ARCH)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    missing = write_gguf(tmp_path / "b.gguf", GGUF_ARCH, tensors)
    with pytest.raises(ValueError, match=r"b\.gguf: tensor blk\.1\.ffn_up\.weight missing"):
        load_weights(missing, GGUF_ARCH)
    (tmp_path / "c.gguf").write_bytes(b"not a model at all, whatever its name")
    with pytest.raises(ValueError, match=r"c\.gguf is not a complete GGUF file"):
        read_arch(tmp_path / "c.gguf")


EMBEDDING = {"token_embd.weight": (11, 10)}
SIZES = {
    "llama.embedding_length": 10,
    "llama.attention.head_count": 5,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.feed_forward_length": 7,
    "llama.block_count": 1,
    "llama.context_length": 64,
}


@pytest.mark.parametrize(
    ("fields", "shapes", "message"),
    [
        ({"general.architecture": "mamba"}, {}, "general.architecture is 'mamba'.*llama"),
        ({"llama.rope.scaling.type": "yarn"}, EMBEDDING, "llama: rope.scaling.type is 'yarn'"),
        ({"llama.expert_count": 8}, EMBEDDING, "llama: expert_count is 8"),
        (SIZES | {"llama.new_trick": 1}, EMBEDDING, r"'new_trick' \(1\) is not known"),
        ({}, {"rope_freqs.weight": (2,)}, "rope_freqs.weight"),
        ({}, {}, "token_embd.weight is missing"),
        ({}, EMBEDDING, "llama: field 'embedding_length' is missing"),
    ],
)
def test_unsupported_gguf_metadata_is_named(fields, shapes, message):
    with pytest.raises(ValueError, match=message):
        arch_from_gguf({"general.architecture": "llama"} | fields, shapes)
