"""Weights out: every round trip bit for bit, and other programs as witnesses where they are."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tiny_experiment import get_config

from grpo import runinfo
from grpo.checkpoint import Checkpoints, params_sha256, read_params, saved_steps
from grpo.config import MeshConfig, ModelConfig
from grpo.data.splits import SPLITS, make_core, split_name
from grpo.data.tokenizer import ByteTokenizer, HfTokenizer, load_tokenizer
from grpo.data.tokenizer_out import byte_core, write_tokenizer
from grpo.export import export
from grpo.model.arch import Arch
from grpo.model.decoder import head, hidden_states
from grpo.model.families import arch_from_hf
from grpo.model.files.families_out import hf_config
from grpo.model.files.gguf_out import write_gguf
from grpo.model.files.weights import half_split_rows, load_weights, read_arch
from grpo.model.files.weights_out import interleaved_rows, rounded, write_safetensors
from grpo.model.params import ParamSpec, map_table, param_table
from grpo.policy import make_policy
from grpo.sharding import param_shardings
from grpo.source import Source, fitting_mesh, is_workdir, open_source
from grpo.structs import TrainState
from tools import tiny_models

# No width equals another, the head is not tied, heads share keys; rows of 32 for Q8_0.
ARCH = Arch(
    vocab_size=300,
    width=32,
    mlp_width=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_width=24,
    rope_theta=5000.0,
    tied_head=False,
    max_positions=128,
)
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|model|>"


def base_params(arch: Arch) -> Any:
    """Drawn by numpy: nothing has to be compiled."""
    rng = np.random.default_rng(1)

    def draw(spec: ParamSpec) -> Any:
        return jnp.asarray(rng.normal(size=spec.shape).astype(np.float32) / 4)

    return map_table(draw, param_table(arch))


def write_model(folder: Path, arch: Arch = ARCH, dtype: str = "float32") -> Path:
    """A model of others: a folder with a byte-level BPE tokenizer, and fields we do not know."""
    folder.mkdir()
    params = base_params(arch)
    write_safetensors(folder, params, arch, dtype=dtype, max_shard_bytes=10**9)
    config = hf_config(arch) | {"dtype": dtype, "initializer_range": 0.5, "eos_token_id": 258}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 258, "top_k": 5}')
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "ab", "12"])}
    core = make_core(SPLITS["smollm"], vocab, [("a", "b"), ("1", "2")])
    core.add_special_tokens(["<|end|>", "<|user|>", "<|model|>"])
    core.add_tokens(["<think>"])
    core.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base")


def write_run(workdir: Path, base: Path | None = None) -> Path:
    """What a run leaves behind, with checkpoints after steps 2 and 3, saved from eight devices."""
    config = get_config()
    config.model.source = "" if base is None else str(base)
    config.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    config.num_steps = 3
    policy = make_policy(config)
    runinfo.write(config, workdir)
    start = policy.initial_params()
    trained = jax.jit(lambda params, step: jax.tree.map(lambda a: a * (1 + step / 7), params))
    with Checkpoints(workdir / "checkpoints", 2) as checkpoints:
        for step in (2, 3):
            number = jnp.int32(step)
            moment = {"moment": jnp.zeros(3)}
            state = TrainState(number, number, number, number, trained(start, step), moment)
            checkpoints.save(state)
            checkpoints.wait()
    rows = [
        {"step": 0, "eval/pass_at_1": 0.25, "eval/pass_at_1_low": 0.1, "eval/pass_at_1_high": 0.4},
        {"step": 3, "eval/pass_at_1": 0.75, "eval/pass_at_1_low": 0.6, "eval/pass_at_1_high": 0.9},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Began as random weights over bytes."""
    return write_run(tmp_path_factory.mktemp("runs") / "from_nothing")


@pytest.fixture(scope="module")
def further(tmp_path_factory, model) -> Path:
    """Began as `model`."""
    return write_run(tmp_path_factory.mktemp("runs") / "further", model)


def on_host(source: Source) -> Any:
    """The parameters, on the mesh that an export would take."""
    return source.read(param_shardings(param_table(source.arch), fitting_mesh(source.arch)))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


# ---- a run as a source -------------------------------------------------------------------------


def test_a_checkpoint_is_read_onto_any_mesh(run):
    source = open_source(str(run))
    assert (source.step, source.files, source.workdir) == (3, None, run)
    digest = params_sha256(on_host(source))
    for data, fsdp, tensor in ((8, 1, 1), (2, 2, 2)):
        config = get_config()
        config.model = ModelConfig(source=str(run), compute_dtype="float32")
        config.mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        params = make_policy(config).initial_params()
        assert params_sha256(params) == digest
    # Laid out as asked: fsdp and tensor each halve this one.
    assert {shard.data.shape for shard in params["embed"].addressable_shards} == {(129, 8)}
    assert params_sha256(on_host(open_source(str(run), step=2))) != digest


def test_what_cannot_be_a_source_says_why(run, further, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoints \[2, 3\], none after step 7"):
        open_source(str(run), step=7)
    runinfo.write(get_config(), tmp_path / "fresh")
    assert is_workdir(tmp_path / "fresh") and not is_workdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        open_source(str(tmp_path / "fresh"))
    with pytest.raises(ValueError, match="neither a model folder"):
        open_source(str(tmp_path / "nowhere"))
    moved = json.loads((further / "config.json").read_text())
    moved["model"]["source"] = str(tmp_path / "gone")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(moved))
    (copy / "checkpoints").symlink_to(further / "checkpoints")
    with pytest.raises(ValueError, match=r"began with model\.source='.*gone'.*--base"):
        open_source(str(copy))
    base = json.loads((further / "config.json").read_text())["model"]["source"]
    assert open_source(str(copy), base=base).arch == ARCH
    with pytest.raises(ValueError, match="no run's workdir"):
        open_source(base, step=3)


def test_another_models_checkpoint_is_refused(run):
    steps = saved_steps(run / "checkpoints")
    shardings = {"embed": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    with pytest.raises(
        ValueError, match=r"checkpoint 3 .* another kind of model: final_norm is in"
    ):
        read_params(run / "checkpoints", steps[-1], shardings)


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_gb", [5.0, 1e-5])
def test_a_run_exported_and_read_again_is_the_same(run, tmp_path, max_shard_gb):
    source, out = open_source(str(run)), tmp_path / "out"
    export(source, out, max_shard_gb=max_shard_gb)
    again = open_source(str(out))
    assert params_sha256(on_host(again)) == params_sha256(on_host(source))
    # A shape as new models have it, with the context of one.
    assert again.arch == source.arch
    files = sorted(out.glob("*.safetensors"))
    if max_shard_gb == 5.0:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
        index = json.loads((out / "model.safetensors.index.json").read_text())
        stored = tensors_of(out)
        assert index["weight_map"].keys() == stored.keys()
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in stored.values())
        # The embedding is 16.5 kB: it has a file of its own, the others are at most 10 kB.
        data = {file.name: sum(a.nbytes for a in load_file(file).values()) for file in files}
        assert sorted(data.values())[-1] == 258 * 16 * 4 and sorted(data.values())[-2] <= 10**4


def test_tensors_land_entry_by_entry(model):
    params, stored = base_params(ARCH), tensors_of(model)
    assert len(stored) == 3 + 9 * ARCH.num_layers
    H, layers = ARCH.head_width, {name: np.asarray(a) for name, a in params["layers"].items()}
    for layer in range(ARCH.num_layers):
        q = stored[f"model.layers.{layer}.self_attn.q_proj.weight"]
        o = stored[f"model.layers.{layer}.self_attn.o_proj.weight"]
        for h in range(ARCH.num_heads):
            for j in range(H):
                np.testing.assert_array_equal(q[h * H + j], layers["q"][layer, :, h, j])
                np.testing.assert_array_equal(o[:, h * H + j], layers["o"][layer, h, j])
        up = stored[f"model.layers.{layer}.mlp.up_proj.weight"]
        np.testing.assert_array_equal(up, layers["up"][layer].T)
    np.testing.assert_array_equal(stored["lm_head.weight"], params["head"].T)
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], params["embed"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_folder_in_half_precision_goes_round_bit_for_bit(tmp_path, dtype):
    folder = write_model(tmp_path / "in", dtype=dtype)
    export(open_source(str(folder)), tmp_path / "out", dtype=dtype)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
        np.testing.assert_array_equal(after[name].view(np.uint16), value.view(np.uint16))


def test_rounding_is_to_the_nearest_and_refuses_infinity():
    values = np.array([1.0, 1 + 2**-9, 1 + 3 * 2**-9, -3.0e38], np.float32)
    np.testing.assert_array_equal(
        rounded(values[:3], "bfloat16", "w").astype(np.float32), [1.0, 1.0, 1 + 2**-7]
    )
    with pytest.raises(ValueError, match="tensor w: values up to 3e.38 have no finite float16"):
        rounded(values, "float16", "w")


def test_a_folder_keeps_what_its_base_says(further, model, tmp_path):
    out = tmp_path / "out"
    export(open_source(str(further)), out, dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())
    expected = json.loads((model / "config.json").read_text())
    del expected["dtype"]
    assert config == expected | {"torch_dtype": "bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["top_k"] == 5
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'license: "apache-2.0"' in card and "whose licence, apache-2.0, applies" in card
    assert "from `base`" in card and "3 steps of 3" in card and '"group_size": 4' in card
    assert "| pass_at_1 | 0.25 [0.1, 0.4] | 0.75 [0.6, 0.9] |" in card
    assert params_sha256(on_host(open_source(str(further)))) in card


def test_nothing_is_left_where_an_export_fails(further, tmp_path):
    source = open_source(str(further))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        export(source, tmp_path / "full")
    with pytest.raises(ValueError, match="--dtype=q8_0: a folder has one of float32, bfloat16"):
        export(source, tmp_path / "out", dtype="q8_0")
    huge = dataclasses.replace(source, workdir=None, files=write_model(tmp_path / "huge"))
    big = {name: value * 1e7 for name, value in tensors_of(tmp_path / "huge").items()}
    save_file(big, tmp_path / "huge" / "model.safetensors")
    with pytest.raises(ValueError, match="tensor model.embed_tokens.weight: .* float16"):
        export(huge, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "huge"]


# ---- families ----------------------------------------------------------------------------------

FAMILIES: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "families.json").read_text()
)["models"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_goes_round_bit_for_bit(tmp_path, name):
    folder = tiny_models.write_folder(tmp_path / "in", **FAMILIES[name])
    export(Source(read_arch(folder), ByteTokenizer(), folder), tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(after[tensor], value)
    assert read_arch(tmp_path / "out") == read_arch(folder)


def test_gguf_has_the_families_that_its_metadata_can_express(tmp_path):
    written = set()
    for name, model in FAMILIES.items():
        folder = tiny_models.write_folder(tmp_path / name, **model)
        arch, path = read_arch(folder), tmp_path / f"{name}.gguf"
        params = load_weights(folder, arch)
        how: dict[str, Any] = {"dtype": "float32", "name": name, "add_tokenizer": lambda _: None}
        try:
            write_gguf(path, params, arch, **how)
        except ValueError as error:
            assert "convert_hf_to_gguf.py of llama.cpp" in str(error)
            assert not path.exists()
            continue
        assert read_arch(path) == arch and arch_from_hf(hf_config(arch)) == arch
        assert params_sha256(load_weights(path, arch)) == params_sha256(params)
        written.add(str(model["config"]["model_type"]))
    assert written == {"llama", "qwen2", "qwen3"}


# ---- tokenizers --------------------------------------------------------------------------------

TEXTS = ["", " ", "1+9=", "héllo\n\tworld  ", "日本 \U0001f600", "\x00\x7f\xa0\xad", "ab12ab 12 ab"]


def test_the_byte_tokenizer_is_the_same_for_others(tmp_path):
    ours = ByteTokenizer()
    write_tokenizer(tmp_path, ours, None)
    theirs = load_tokenizer(tmp_path)
    assert (theirs.vocab_size, theirs.eos_ids, theirs.pad_id) == (258, (257,), 256)
    for text in [*TEXTS, "".join(map(chr, range(256)))]:
        assert theirs.encode(text) == ours.encode(text)
    for ids in ([104, 195, 169, 257], [226, 130], list(range(258))):
        for skip in (True, False):
            assert theirs.decode(ids, skip) == ours.decode(ids, skip)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["I", "'ve", "Ġ1234", "ĠĠ", "Ġcats"]),
        ("smollm", ["I", "'ve", "Ġ", "1", "2", "3", "4", "ĠĠ", "Ġcats"]),
        ("qwen2", ["I", "'ve", "Ġ", "1", "2", "3", "4", "ĠĠ", "Ġcats"]),
        ("llama-bpe", ["I", "'ve", "Ġ", "123", "4", "ĠĠ", "Ġcats"]),
    ],
)
def test_splits_cut_as_their_models_do(name, pieces):
    core = make_core(SPLITS[name], {"a": 0}, [])
    cut = core.pre_tokenizer.pre_tokenize_str("I've 1234   cats")
    assert [piece for piece, _ in cut] == pieces
    assert split_name(core) == name


def test_a_split_that_gguf_cannot_name_is_refused(further, tmp_path):
    source = open_source(str(further))
    assert isinstance(source.tokenizer, HfTokenizer)
    core = tokenizers.Tokenizer.from_str(source.tokenizer.core.to_str())
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    odd = dataclasses.replace(source, tokenizer=dataclasses.replace(source.tokenizer, core=core))
    with pytest.raises(ValueError, match=r"not byte-level BPE.*convert_hf_to_gguf\.py"):
        export(odd, tmp_path / "out.gguf")
    assert not any(tmp_path.iterdir())


# ---- GGUF --------------------------------------------------------------------------------------


def test_interleaving_is_undone_by_reading():
    weight = np.arange(48.0).reshape(16, 3)  # 2 heads of 8 rows
    stored = interleaved_rows(weight, 2)
    assert (stored[:, 0] / 3).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    np.testing.assert_array_equal(half_split_rows(stored, 2), weight)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_gguf_goes_round(further, tmp_path, dtype):
    source, path = open_source(str(further)), tmp_path / "out.gguf"
    export(source, path, dtype=dtype)
    assert read_arch(path) == source.arch
    got, params = load_weights(path, source.arch), on_host(source)
    if dtype == "float32":
        assert params_sha256(got) == params_sha256(params)
    flat = dict(jax.tree_util.tree_leaves_with_path(params))
    for where, value in jax.tree_util.tree_leaves_with_path(got):
        expected = np.asarray(flat[where])
        if "norm" not in jax.tree_util.keystr(where):
            expected = _as_stored(expected, where[-1].key, dtype)
        np.testing.assert_array_equal(value, expected)


def _as_stored(array: np.ndarray, name: str, dtype: str) -> np.ndarray:
    """What is left of our array after being stored; Q8_0 blocks run along a matrix's inputs."""
    if dtype != "q8_0":
        kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
        return array.astype(kind).astype(np.float32)
    if name == "o":  # two axes are inputs
        flat = array.reshape(array.shape[0], -1, array.shape[-1])
        return _blocks(flat, 1).reshape(array.shape)
    return _blocks(array, 0 if name == "head" else 1)


def _blocks(array: np.ndarray, axis: int) -> np.ndarray:
    """Each 32 values along `axis`: round(x / d) * d with d = max|x| / 127 in float16."""
    rows = np.moveaxis(array, axis, -1)
    if rows.shape[-1] % 32:
        return array.astype(np.float16).astype(np.float32)
    blocks = rows.reshape(*rows.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    whole = blocks / scale
    whole = np.trunc(whole + np.copysign(np.float32(0.5), whole))  # halves away from zero
    back = whole * scale.astype(np.float16).astype(np.float32)
    back = back.astype(ml_dtypes.bfloat16).astype(np.float32)  # as reading does
    return np.moveaxis(back.reshape(rows.shape), -1, axis)


def test_gguf_carries_the_tokenizer(further, tmp_path):
    source = open_source(str(further))
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export(source, first)
    export(open_source(str(first)), second)  # the metadata is copied
    for path in (first, second):
        tokenizer = load_tokenizer(path)
        for text in [*TEXTS, "<|user|>12<think>ab<|end|>"]:
            assert tokenizer.encode(text) == source.tokenizer.encode(text)
        for skip in (True, False):
            ids = source.tokenizer.encode("<|user|>12<think>ab<|end|>")
            assert tokenizer.decode(ids, skip) == source.tokenizer.decode(ids, skip)
        assert (tokenizer.eos_ids, tokenizer.pad_id) == ((258,), 258)
        assert tokenizer.chat_template == TEMPLATE
    # And out of GGUF into a folder, where config.json and tokenizer.json have to be made.
    export(open_source(str(first)), tmp_path / "folder")
    folder = open_source(str(tmp_path / "folder"))
    assert folder.arch == source.arch
    assert folder.tokenizer.encode("<|user|>12 ab") == source.tokenizer.encode("<|user|>12 ab")
    assert folder.tokenizer.chat_template == TEMPLATE


def test_gguf_of_a_byte_model_has_one_row_a_token(run, tmp_path):
    path = tmp_path / "bytes.gguf"
    export(open_source(str(run)), path, dtype="q8_0")
    assert load_tokenizer(path) == ByteTokenizer()
    fields = gguf.GGUFReader(path).fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 258
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 257
    # Rows of 16 are no block of 32: float16, as llama.cpp's own converter does.
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"


# ---- other programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_transformers_gives_the_same_logits(run, further, tmp_path, kind):
    torch = pytest.importorskip("torch", reason="torch and transformers are not installed")
    transformers = pytest.importorskip("transformers")
    for workdir in (run, further):
        out = tmp_path / (f"{workdir.name}.gguf" if kind == "gguf" else workdir.name)
        source = open_source(str(workdir))
        export(source, out, dtype="float32")
        where = {"gguf_file": out.name} if kind == "gguf" else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            out.parent if kind == "gguf" else out, dtype=torch.float32, **where
        )
        tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
        with torch.no_grad():
            theirs = model(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(logits(on_host(source), source.arch, tokens), theirs, atol=1e-4)
        if kind == "folder":
            tokenizer = transformers.AutoTokenizer.from_pretrained(out)
            for text in TEXTS:
                assert tokenizer(text).input_ids == source.tokenizer.encode(text)


def logits(params: Any, arch: Arch, tokens: np.ndarray) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    one = jnp.ones(tokens.shape, jnp.int32)
    hidden = hidden_states(
        params, arch, jnp.asarray(tokens), positions, one, one, dtype="float32", remat="none"
    )
    return np.asarray(hidden @ head(params))


def test_the_command_writes_and_explains(run, tmp_path):
    def call(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "grpo.export", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent.parent
        )

    done = call(run, tmp_path / "out", "--step=2")
    assert (done.returncode, "out: 6 files" in done.stdout) == (0, True), done.stderr
    assert "2 steps of 3" in (tmp_path / "out" / "README.md").read_text()
    done = call(run, tmp_path / "out")
    assert done.returncode == 1 and f"error: {tmp_path / 'out'} exists already" in done.stderr
    assert "Traceback" not in done.stderr
    assert byte_core().get_vocab_size() == 258
