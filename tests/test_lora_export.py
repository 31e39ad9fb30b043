"""The exported adapter: names and layout, and the same logits in `peft`."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_model import ARCH, ToyTokenizer, mesh_of, toy_params

from grpo.checkpoint import Checkpoints
from grpo.config import LoraConfig
from grpo.export import export_adapter
from grpo.model.decoder import head, hidden_states
from grpo.model.families import HF_LLAMA_NAMES
from grpo.model.files.lora_export import write_peft
from grpo.model.lora import adapted, adapter_table, init_adapters, merged
from grpo.model.params import Params, param_table
from grpo.model.quantise import stored
from grpo.sharding import param_shardings
from grpo.source import Source
from grpo.structs import TrainState

RANK, ALPHA = 3, 6.0
TABLE = param_table(ARCH)


def trained(names: tuple[str, ...]) -> Params:
    rng = np.random.default_rng(2)
    new = init_adapters(adapter_table(TABLE, RANK, names), jax.random.key(0))
    return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype("f4"), new)


def test_names_and_layout_are_those_of_peft(tmp_path):
    adapters = trained(("q", "o", "down"))
    write_peft(tmp_path / "adapter", adapters, ALPHA, "some/model")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert config["base_model_name_or_path"] == "some/model"
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * ARCH.num_layers
    prefix = "base_model.model.model.layers.1"
    for ours, theirs in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
        pair = adapters["layers"][ours]
        down = tensors[f"{prefix}.{theirs}.lora_A.weight"]
        up = tensors[f"{prefix}.{theirs}.lora_B.weight"]
        np.testing.assert_array_equal(down, pair["a"][1].T)
        np.testing.assert_array_equal(up, pair["b"][1].T)


def test_what_is_stored_adds_up_to_the_merged_weights(tmp_path):
    """As `peft` merges, W + alpha / r * B A with W as [outputs, inputs], from the files alone."""
    adapters = trained(("k", "o", "up"))
    write_peft(tmp_path, adapters, ALPHA, "")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    whole = merged(adapters, toy_params(), ALPHA / RANK, TABLE)
    for name, inputs in (("k", 16), ("o", 16), ("up", 16)):
        for layer in range(ARCH.num_layers):
            module = HF_LLAMA_NAMES[f"layers/{name}"].format(layer=layer).removesuffix(".weight")
            down = tensors[f"base_model.model.{module}.lora_A.weight"]
            up = tensors[f"base_model.model.{module}.lora_B.weight"]
            before = np.asarray(toy_params()["layers"][name][layer]).reshape(inputs, -1)
            expected = before + (ALPHA / RANK * up @ down).T
            got = np.asarray(whole["layers"][name][layer]).reshape(inputs, -1)
            assert np.abs(got - before).max() > 1e-2
            np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_array_equal(whole["layers"]["q"], toy_params()["layers"]["q"])


@pytest.mark.parametrize("base_dtype", ["float32", "int4"])
def test_a_run_of_adapters_is_read_as_the_weights_it_stands_for(tmp_path, base_dtype):
    """So it can be exported, talked to and trained further as any other run."""
    hf_folder(tmp_path)
    adapters, zero = trained(("q", "down")), jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, zero, zero, params=adapters, opt_state=None)
    with Checkpoints(tmp_path / "run/checkpoints", 1) as checkpoints:
        checkpoints.save(state)
    source = Source(
        arch=ARCH,
        tokenizer=ToyTokenizer(),
        files=tmp_path,
        workdir=tmp_path / "run",
        lora=LoraConfig(rank=RANK, alpha=ALPHA, targets=("q", "down")),
        base_dtype=base_dtype,
    )
    mesh = mesh_of(fsdp=2)
    with jax.set_mesh(mesh):
        got = source.read(param_shardings(TABLE, mesh))
    expected = merged(adapters, stored(toy_params(), base_dtype), ALPHA / RANK, TABLE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    export_adapter(source, tmp_path / "adapter")
    write_peft(tmp_path / "expected", adapters, ALPHA, str(tmp_path))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        written, wanted = (tmp_path / folder / name for folder in ("adapter", "expected"))
        assert written.read_bytes() == wanted.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        export_adapter(source, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has no adapters"):
        export_adapter(dataclasses.replace(source, lora=None), tmp_path / "other")


def hf_folder(folder: Path) -> None:
    """The toy model as a Hugging Face folder."""
    tensors = {}
    for name, value in toy_params().items():
        if name != "layers":
            tensors[HF_LLAMA_NAMES[name]] = np.asarray(value)
    for name, stacked in toy_params()["layers"].items():
        for layer, value in enumerate(np.asarray(stacked)):
            inputs = 2 if name == "o" else 1
            matrix = value.reshape(int(np.prod(value.shape[:inputs])), -1).T
            stored = value if "norm" in name else np.ascontiguousarray(matrix)
            tensors[HF_LLAMA_NAMES[f"layers/{name}"].format(layer=layer)] = stored
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": ARCH.vocab_size,
        "hidden_size": ARCH.width,
        "intermediate_size": ARCH.mlp_width,
        "num_hidden_layers": ARCH.num_layers,
        "num_attention_heads": ARCH.num_heads,
        "num_key_value_heads": ARCH.num_kv_heads,
        "head_dim": ARCH.head_width,
        "rope_theta": ARCH.rope_theta,
        "rms_norm_eps": ARCH.norm_eps,
        "max_position_embeddings": ARCH.max_positions,
        "tie_word_embeddings": ARCH.tied_head,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.filterwarnings("ignore")  # theirs, not ours
def test_peft_gives_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch", reason="the outside check needs torch")
    transformers = pytest.importorskip("transformers", reason="the outside check needs it")
    peft = pytest.importorskip("peft", reason="the outside check needs peft")
    adapters = trained(("q", "k", "v", "o", "gate", "up", "down"))
    hf_folder(tmp_path)
    write_peft(tmp_path / "adapter", adapters, ALPHA, str(tmp_path))

    tokens_RT = np.random.default_rng(0).integers(0, ARCH.vocab_size, (2, 9)).astype(np.int32)
    ones_RT, zeros_RT = np.ones_like(tokens_RT), np.zeros_like(tokens_RT)
    positions_RT = np.broadcast_to(np.arange(9, dtype=np.int32), tokens_RT.shape)

    def logits(params: Params) -> np.ndarray:
        rows = tokens_RT, positions_RT, ones_RT, zeros_RT
        hidden_RTD = hidden_states(params, ARCH, *rows, dtype="float32", remat="none")  # type: ignore[arg-type]
        return np.asarray(hidden_RTD @ head(params))

    params = jax.tree.map(jnp.asarray, toy_params())
    ours, without = logits(adapted(adapters, params, ALPHA / RANK)), logits(params)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    with torch.no_grad():
        theirs = model(torch.tensor(tokens_RT.astype(np.int64))).logits.numpy()
        merged_there = model.merge_and_unload()(torch.tensor(tokens_RT.astype(np.int64)))
    assert np.abs(ours - without).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours, merged_there.logits.numpy(), rtol=0, atol=1e-4)
