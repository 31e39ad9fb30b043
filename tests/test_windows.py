"""Sliding layers in the rollout engine: caches of the window's size, and what must not matter."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from toy_model import ARCH, ToyTokenizer, mesh_of, toy_params

from grpo.batch import RowShape, Sample, pack, unpack
from grpo.engine import engine as engine_module
from grpo.engine.engine import Begun, Engine, Request
from grpo.model.arch import Arch, Experts
from grpo.model.decoder import decode_step, empty_cache, hidden_states, prefill, to_decode
from grpo.model.logprobs import completion_logprobs
from grpo.model.params import Params, decode_table, param_table
from grpo.planning.formulas import kv_bytes
from grpo.sharding import DECODE_RULES, param_shardings
from grpo.structs import Completion

MAX_PROMPT, MAX_NEW = 6, 12
# Shorter than the prompts; between them and the completions; longer than both together.
WINDOWS = (3, 8, 32)


def sliding(window: int, **more: Any) -> Arch:
    kinds = ("sliding", "global")
    return dataclasses.replace(
        ARCH, layer_types=kinds, window=window, local_rope_theta=10.0, **more
    )


def in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on sliding layers cache everything, and leave it to masks what is seen."""
    monkeypatch.setattr(
        Arch, "cache_lengths", lambda arch, length, at_once=1: (length,) * arch.num_layers
    )


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is most of the time here, and half of that the optimiser's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def weights_of(arch: Arch) -> Params:
    return jax.jit(partial(to_decode, arch=arch, dtype="float32"))(toy_params(arch))


# ---- lengths -----------------------------------------------------------------------------------


def test_a_sliding_layer_caches_its_window_and_room_for_what_is_fed_together():
    assert sliding(3).cache_lengths(12) == (3, 12)
    assert sliding(3).cache_lengths(12, at_once=4) == (6, 12)
    assert sliding(3).cache_lengths(2) == (2, 2)
    assert sliding(8).cache_lengths(12, at_once=9) == (12, 12)
    assert ARCH.cache_lengths(12) == (12, 12)


def test_the_cache_of_gemma_3_270m_follows_its_window():
    """15 of 18 layers see 512 tokens; a key and a value of 256 numbers each."""
    kinds = tuple("global" if n % 6 == 5 else "sliding" for n in range(18))
    arch = dataclasses.replace(
        ARCH, num_layers=18, num_kv_heads=1, head_width=256, layer_types=kinds, window=512
    )
    cache = jax.eval_shape(lambda: empty_cache(arch, 4, 2048, "bfloat16"))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert held == 4 * (3 * 2048 + 15 * 512) * 2 * 256 * 2
    assert held == 4 * kv_bytes(arch, 2, 2048)
    assert held / (4 * 18 * 2048 * 2 * 256 * 2) == 0.375


# ---- one step ----------------------------------------------------------------------------------


step = jax.jit(decode_step, static_argnums=(1, 7))
read = jax.jit(prefill, static_argnums=1)


@pytest.mark.parametrize("window", WINDOWS)
def test_wrong_guesses_do_not_spoil_the_ring(window):
    """Three tokens at a time, of which one, two or three are right, against the train form."""
    arch, rng, C = sliding(window), np.random.default_rng(0), MAX_NEW
    tokens_RT = rng.integers(0, 32, (3, 6 + C)).astype(np.int32)
    prompt_len_B = np.array([0, 5, 3])
    positions_RT = np.broadcast_to(np.arange(6 + C, dtype=np.int32), tokens_RT.shape)
    params, ones_RT = toy_params(arch), np.ones_like(tokens_RT)
    form: dict[str, Any] = {"dtype": "float32", "remat": "none"}
    hidden_RTD = jax.jit(partial(hidden_states, arch=arch, **form))(
        params,
        tokens_RT=tokens_RT,
        positions_RT=positions_RT,
        groups_RT=ones_RT,
        branches_RT=ones_RT,
    )
    expected_RTV = np.asarray(hidden_RTD @ params["embed"].T)

    weights = weights_of(arch)
    prompts = read(weights, arch, tokens_RT[:, :5])
    # Ones, not zeros: the part of the cache that is not written yet must not matter.
    cache = jax.tree.map(jnp.ones_like, empty_cache(arch, 3, C, "float32", at_once=3))
    assert cache[0][0].shape[2] == min(C, window + 2)
    written_B = np.zeros(3, np.int64)
    while (written_B < C).any():
        right_B = rng.integers(1, 4, 3)
        at_BT = (prompt_len_B + written_B)[:, None] + np.arange(3)
        fed_BT = np.take_along_axis(tokens_RT, np.minimum(at_BT, 5 + C), axis=1)
        fed_BT = np.where(np.arange(3) < right_B[:, None], fed_BT, (fed_BT + 7) % 32)
        logits_BTV, cache = step(weights, arch, prompts, prompt_len_B, cache, fed_BT, written_B, C)
        for b in range(3):
            for t in range(min(right_B[b], C - written_B[b])):
                np.testing.assert_allclose(
                    logits_BTV[b, t], expected_RTV[b, at_BT[b, t]], rtol=1e-5, atol=1e-5
                )
        written_B = np.minimum(written_B + right_B, C)


def test_a_ring_too_short_for_what_is_fed_is_refused():
    arch = sliding(3)
    weights = weights_of(arch)
    prompts = read(weights, arch, np.zeros((2, 4), np.int32))
    length_B, cache = jnp.zeros(2, jnp.int32), empty_cache(arch, 2, 12, "float32", at_once=2)
    with pytest.raises(ValueError, match=r"layer 0 caches 4 tokens, but 3 at a time of 12 need 5"):
        fed_BT = jnp.zeros((2, 3), jnp.int32)
        decode_step(weights, arch, prompts, length_B, cache, fed_BT, length_B, 12)


# ---- whole rollouts ----------------------------------------------------------------------------

Samples = dict[tuple[int, int], Completion]


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    lengths = (1, 6, 3, 4, 2, 6, 5)
    return [Request(rng.integers(0, 30, n).tolist(), s, 3) for s, n in enumerate(lengths)]


REQUESTS = requests()


def engine_of(arch: Arch, mesh: Mesh, *, dtype: str = "float32", **more: Any) -> Engine:
    settings: dict[str, Any] = {"slots": 8, "tokens_per_dispatch": 5}
    sizes: dict[str, Any] = {"max_prompt": MAX_PROMPT, "max_new": MAX_NEW}
    with jax.set_mesh(mesh):
        return Engine(arch, ToyTokenizer(), mesh, **sizes, dtype=dtype, **(settings | more))


def sample(
    engine: Engine,
    wanted: Sequence[Request] = REQUESTS,
    *,
    seed: int = 0,
    temperature: float = 0.8,
) -> Samples:
    """Everything the engine yields, by (stream, sample)."""
    arch, mesh = engine.arch, engine.mesh
    table = decode_table(param_table(arch), arch.num_layers)
    weights = jax.device_put(weights_of(arch), param_shardings(table, mesh, DECODE_RULES))
    with jax.set_mesh(mesh):
        done = list(engine.run(weights, wanted, jax.random.key(seed), temperature=temperature))
    return {(wanted[c.problem].stream, c.sample): c for c in done}


def assert_same(got: Samples, expected: Samples) -> None:
    assert got.keys() == expected.keys()
    for name, completion in got.items():
        assert completion.tokens == expected[name].tokens, name
        np.testing.assert_allclose(completion.logprobs, expected[name].logprobs, atol=1e-5)
        np.testing.assert_array_equal(completion.routes, expected[name].routes)


@functools.cache
def plain(window: int) -> Samples:
    return sample(engine_of(sliding(window), mesh_of()))


@pytest.mark.parametrize("window", WINDOWS)
def test_sampler_and_trainer_agree_on_every_token(window):
    arch, found = sliding(window), list(plain(window).values())
    assert max(len(c.tokens) for c in found) == MAX_NEW
    samples = [Sample(c.problem, REQUESTS[c.problem].prompt, c.tokens) for c in found]
    packed = pack(samples, RowShape(rows=len(samples), tokens=54, completion_tokens=36))
    form: Any = {"temperature": 0.8, "dtype": "float32", "remat": "none", "chunk": MAX_NEW}
    score = jax.jit(lambda params, batch: completion_logprobs(params, arch, batch, **form)[0])
    logprobs_RC = np.concatenate([score(toy_params(arch), b) for b in packed.microbatches])
    for completion, logprobs in zip(found, unpack(logprobs_RC, packed, samples), strict=True):
        np.testing.assert_allclose(completion.logprobs, logprobs, rtol=0, atol=1e-5)


def test_looking_at_less_of_the_cache_does_not_change_a_sample(monkeypatch):
    """Views shorter than the ring, as long, and longer; prompts shorter than what is kept."""
    monkeypatch.setattr(engine_module, "_SHORTEST", 4)
    engine = engine_of(sliding(8), mesh_of(), tokens_per_dispatch=2, slots_per_prompt=2)
    assert engine._views == (4, 8, 12) and engine._prompt_lengths == (4, 6)
    assert_same(sample(engine), plain(8))
    assert engine.num_compiled() == 2 + 3 + 2


@pytest.mark.parametrize(
    "window, at_once, devices, settings",
    [
        (3, 5, 1, {"tokens_per_dispatch": 5, "draft_tokens": 3}),
        (8, 3, 8, {"tokens_per_dispatch": 3, "draft_tokens": 2, "slots_per_prompt": 2}),
    ],
)
def test_replays_guesses_tails_and_devices_do_not_change_a_sample(
    window, at_once, devices, settings, monkeypatch
):
    """Some begin, some go on; what is read at a time is longer than the window, or shorter."""
    monkeypatch.setattr(engine_module, "_REPLAY_TOKENS", 3 * 8)
    expected, rng, wanted = plain(window), np.random.default_rng(1), []
    for request in REQUESTS:
        begun = {}
        for number in range(request.num_samples):
            so_far = expected[request.stream, number]
            if (count := int(rng.integers(-4, len(so_far.tokens)))) > 0:
                begun[number] = Begun(so_far.tokens[:count], so_far.logprobs[:count])
        wanted.append(dataclasses.replace(request, begun=begun))
    lengths = [len(b.tokens) for request in wanted for b in request.begun.values()]
    assert max(lengths) > 8 and len(lengths) < 3 * len(wanted) - 3
    mesh = mesh_of(data=4, tensor=2) if devices == 8 else mesh_of()
    engine = engine_of(sliding(window), mesh, goes_on=True, tail_slots=4, **settings)
    kept = {leaf.shape[2] for leaf in jax.tree.leaves(engine._programs.slots.cache)}
    assert engine.at_once == at_once and kept == {window + at_once - 1, MAX_NEW}
    assert_same(sample(engine, wanted), expected)


def test_only_what_may_be_fed_together_makes_a_ring_longer():
    def kept(**settings: Any) -> int:
        engine = engine_of(sliding(3), mesh_of(), **settings)
        return engine._programs.slots.cache[0][0].shape[2]

    assert kept() == 3
    assert kept(tail_slots=4, draft_tokens=2) == 5
    assert kept(goes_on=True) == MAX_NEW  # 64 tokens at a time are more than there are


def test_eight_bits_are_the_same_eight_bits(monkeypatch):
    """Each token is rounded alone, so a ring of rounded numbers is a part of the whole."""
    got = sample(engine_of(sliding(3), mesh_of(), dtype="int8"))
    in_full(monkeypatch)
    engine = engine_of(sliding(3), mesh_of(), dtype="int8")
    assert {leaf.shape[2] for leaf in jax.tree.leaves(engine._programs.slots.cache)} == {MAX_NEW}
    assert_same(got, sample(engine))
    assert got[1, 0].logprobs[-1] != pytest.approx(plain(3)[1, 0].logprobs[-1], abs=1e-6)


def test_routes_of_all_tokens_are_kept():
    """The trainer needs them of tokens that no other sees any more."""
    arch = sliding(3, experts=Experts(count=4, per_token=2, width=8))
    found = sample(engine_of(arch, mesh_of()), REQUESTS[1:4])
    texts = {name: [*REQUESTS[name[0]].prompt, *c.tokens][:-1] for name, c in found.items()}
    tokens_RQ = np.zeros((len(texts), MAX_PROMPT + MAX_NEW), np.int32)
    for row, text in enumerate(texts.values()):
        tokens_RQ[row, : len(text)] = text
    caches = read(weights_of(arch), arch, tokens_RQ)
    routes_RQLk = np.stack([chosen[:, 0] for *_, chosen in caches], axis=2)
    for routes_QLk, (name, text) in zip(routes_RQLk, texts.items(), strict=True):
        np.testing.assert_array_equal(found[name].routes, routes_QLk[: len(text)])


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
def test_the_state_is_as_large_as_the_formula_says(window):
    shared: dict[str, Any] = {"slots_per_prompt": 2, "tail_slots": 4, "draft_tokens": 2}
    engine = engine_of(sliding(window), mesh_of(), **shared)
    with jax.set_mesh(engine.mesh):
        slots = engine._programs.empty()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((slots.prompts, slots.cache)))
    prompt = kv_bytes(engine.arch, 4, MAX_PROMPT)
    own = kv_bytes(engine.arch, 4, MAX_NEW, at_once=3)
    assert held == 4 * prompt + 8 * own
    layer_token = 2 * ARCH.num_kv_heads * ARCH.head_width * 4
    assert prompt == layer_token * (MAX_PROMPT + min(MAX_PROMPT, window))
    assert own == layer_token * (MAX_NEW + min(MAX_NEW, window + 2))


def test_a_ring_is_written_in_place():
    engine, arch = engine_of(sliding(3), mesh_of()), sliding(3)
    weights = weights_of(arch)
    slots = engine._programs.slots
    arguments = (weights, slots, np.zeros(8, bool), np.int32(8), np.float32(1), None)
    with jax.set_mesh(engine.mesh):
        decode = engine._programs.decode.lower(*arguments, view=MAX_NEW, greedy=False).compile()
    held = sum(math.prod(a.shape) * 4 for a in jax.tree.leaves((slots.prompts, slots.cache)))
    assert decode.memory_analysis().alias_size_in_bytes >= held
