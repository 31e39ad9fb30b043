"""Mixtures of experts, latent attention, and the routes that the trainer replays."""

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import ARCH, MAX_NEW, MAX_PROMPT, ToyTokenizer, mesh_of, policy_on, toy_params

from grpo.batch import RowShape, Sample, pack, to_device
from grpo.config import Config, ModelConfig
from grpo.engine.engine import Begun, Engine, Request
from grpo.model import moe
from grpo.model.arch import Arch, Experts, Latent
from grpo.model.decoder import empty_cache, to_decode
from grpo.model.families import arch_from_hf
from grpo.model.logprobs import completion_logprobs
from grpo.model.params import active_params, decode_table, num_params, param_table
from grpo.policy import make_policy
from grpo.rollout import expert_load
from grpo.sharding import DECODE_RULES, param_shardings
from grpo.source import new_arch
from grpo.structs import Completion

SOFTMAX = Experts(count=4, per_token=2, width=8)
SIGMOID = Experts(
    count=8,
    per_token=3,
    width=8,
    shared_width=6,
    first_dense=1,
    scoring="sigmoid",
    scale=1.7,
    selection_bias=True,
    groups=4,
    groups_per_token=2,
    group_top=2,
)
MIXED = dataclasses.replace(ARCH, experts=SOFTMAX)
LATENT = dataclasses.replace(
    ARCH,
    num_layers=3,
    num_kv_heads=4,
    head_width=10,
    experts=SIGMOID,
    latent=Latent(kv_rank=6, q_rank=5, plain_width=6, rope_width=4, value_width=3),
)
TIED = dataclasses.replace(ARCH, experts=Experts(count=4, per_token=1, width=8))


def weights_of(experts: Experts, seed: int = 0, width: int = 6) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    E, F = experts.count, experts.width
    shapes = {"router": (width, E), "expert_gate": (E, width, F), "expert_up": (E, width, F)}
    shapes |= {"expert_down": (E, F, width), "router_bias": (E,)}
    if not experts.selection_bias:
        del shapes["router_bias"]
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def tokens_of(count: int, width: int = 6) -> jax.Array:
    noise = np.random.default_rng(5).normal(size=(1, count, width))
    return jnp.asarray(noise, jnp.float32)


def by_loops(weights: dict[str, jax.Array], x_D: np.ndarray, experts: Experts) -> Any:
    """One token, expert by expert: (what comes out, the experts from best to worst)."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    logits_E = x_D @ w["router"]
    if experts.scoring == "softmax":
        score_E = np.exp(logits_E) / np.exp(logits_E).sum()
    else:
        score_E = 1 / (1 + np.exp(-logits_E))
    ranked_E = score_E + w.get("router_bias", 0.0)
    size = experts.count // experts.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(experts.groups)]

    def merit(group: list[int]) -> float:
        return sum(sorted((ranked_E[e] for e in group), reverse=True)[: experts.group_top])

    allowed = sorted(groups, key=merit, reverse=True)[: experts.groups_per_token]
    within = [e for group in allowed for e in group]
    chosen = sorted(within, key=lambda e: -ranked_E[e])[: experts.per_token]
    total = sum(score_E[e] for e in chosen) if experts.normalised else 1.0
    out_D = np.zeros(len(x_D))
    for e in chosen:
        gate_F = x_D @ w["expert_gate"][e]
        hidden_F = gate_F / (1 + np.exp(-gate_F)) * (x_D @ w["expert_up"][e])
        out_D += experts.scale * score_E[e] / total * (hidden_F @ w["expert_down"][e])
    return out_D, chosen


@pytest.mark.parametrize(
    "experts", [SOFTMAX, SIGMOID, dataclasses.replace(SOFTMAX, normalised=False)]
)
def test_a_mixture_is_what_loops_over_tokens_and_experts_give(experts):
    weights, x_BTD = weights_of(experts), tokens_of(12)
    out_BTD, ids_BTk = moe.mixture(weights, x_BTD, experts, jax.nn.silu)
    for t in range(12):
        out_D, chosen = by_loops(weights, np.asarray(x_BTD[0, t], np.float64), experts)
        assert ids_BTk[0, t].tolist() == chosen
        np.testing.assert_allclose(out_BTD[0, t], out_D, rtol=1e-5, atol=1e-5)


def loss(weights, x_BTD, experts, chosen_BTk=None):
    out_BTD, _ = moe.mixture(weights, x_BTD, experts, jax.nn.silu, chosen_BTk)
    return jnp.sum(out_BTD * jnp.arange(out_BTD.size).reshape(out_BTD.shape) / 50)


def everywhere(weights, x_BTD, experts, chosen_BTk):
    """The same loss by computing every expert on every token, without sorting."""
    scores_BTE = moe.scores(x_BTD @ weights["router"], experts)
    picked_BTE = (chosen_BTk[..., None] == jnp.arange(experts.count)).any(axis=-2)
    share_BTE = jnp.where(picked_BTE, scores_BTE, 0.0)
    share_BTE = experts.scale * share_BTE / share_BTE.sum(-1, keepdims=True)
    gate = jnp.einsum("btd,edf->btef", x_BTD, weights["expert_gate"])
    up = jnp.einsum("btd,edf->btef", x_BTD, weights["expert_up"])
    out = jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, weights["expert_down"], share_BTE)
    return jnp.sum(out * jnp.arange(out.size).reshape(out.shape) / 50)


def test_gradients_are_those_of_computing_every_expert_everywhere():
    weights, x_BTD = weights_of(SIGMOID), tokens_of(12)
    _, ids_BTk = moe.mixture(weights, x_BTD, SIGMOID, jax.nn.silu)
    got = jax.grad(loss, argnums=(0, 1))(weights, x_BTD, SIGMOID)
    expected = jax.grad(everywhere, argnums=(0, 1))(weights, x_BTD, SIGMOID, ids_BTk)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)
    assert not got[0]["router_bias"].any() and got[0]["router"].any()


@pytest.mark.parametrize("count", [16, 9], ids=["divided", "as one"])
def test_experts_on_several_devices_are_experts_on_one(count):
    weights, x_BTD = weights_of(SIGMOID), tokens_of(count)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    expected = run(weights, x_BTD, SIGMOID)
    with jax.set_mesh(mesh_of(data=2, tensor=2, expert=2)):
        got = run(weights, x_BTD, SIGMOID)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), got, expected)


def test_chosen_experts_replace_the_routers_choice_token_by_token():
    weights, x_BTD = weights_of(SOFTMAX), tokens_of(3)
    _, own_BTk = moe.mixture(weights, x_BTD, SOFTMAX, jax.nn.silu)
    chosen_BTk = jnp.array([[[3, 0], [-1, -1], [1, 2]]], jnp.int16)
    out_BTD, ids_BTk = moe.mixture(weights, x_BTD, SOFTMAX, jax.nn.silu, chosen_BTk)
    assert ids_BTk[0].tolist() == [[3, 0], own_BTk[0, 1].tolist(), [1, 2]]
    expected = everywhere(weights, x_BTD, SOFTMAX, ids_BTk)
    got = jnp.sum(out_BTD * jnp.arange(out_BTD.size).reshape(out_BTD.shape) / 50)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_cache_of_latent_attention_is_one_narrow_vector_a_token_and_layer():
    """DeepSeek-V2, table 1: (kv_lora_rank + qk_rope_head_dim) numbers."""
    assert LATENT.latent is not None
    dense = dataclasses.replace(LATENT, experts=None)
    for dtype, size in [("float32", 4), ("bfloat16", 2)]:
        held = sum(a.nbytes for a in jax.tree.leaves(empty_cache(dense, 5, 7, dtype)))
        assert held == 5 * 7 * (6 + 4) * 3 * size
    # Experts add their numbers, 2 bytes each, in the two layers that have them.
    held = sum(a.nbytes for a in jax.tree.leaves(empty_cache(LATENT, 5, 7, "float32")))
    assert held == 5 * 7 * ((6 + 4) * 3 * 4 + 2 * 3 * 2)
    r1 = arch_from_hf({"model_type": "deepseek_v3", "vocab_size": 1, **R1})
    token = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(r1, 1, 1, "bfloat16")))
    assert sum(a.size * 2 for a in token if a.dtype == jnp.bfloat16) == 576 * 61 * 2


R1: dict[str, Any] = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
}


def test_parameters_are_those_of_the_published_models():
    """671 billion, 37 of them active (arXiv:2412.19437, section 4.2), embeddings counted once."""
    r1 = arch_from_hf({"model_type": "deepseek_v3", "vocab_size": 129_280, **R1})
    assert round(num_params(r1) / 1e9) == 671
    assert 36.5e9 < active_params(r1) < 38e9
    assert active_params(ARCH) == num_params(ARCH)


def test_what_is_not_supported_is_named():
    qwen = {
        "model_type": "qwen3_moe",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    v3 = {"model_type": "deepseek_v3", "vocab_size": 32, **R1}
    v2 = {**v3, "model_type": "deepseek_v2", "num_experts_per_tok": 2}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (qwen, {"decoder_sparse_step": 2}),
        (qwen, {"mlp_only_layers": [0]}),
        (qwen, {"shared_expert_intermediate_size": 64}),
        (v2, {"norm_topk_prob": True}),
        (v2, {"topk_method": "noaux_tc"}),
        (v3, {"scoring_func": "softmax"}),
        (v3, {"attention_bias": True}),
        (v3, {"index_topk": 2048}),
        (v3, {"quantization_config": {"quant_method": "fp8"}}),
    ]
    for config, changes in cases:
        arch_from_hf(config)
        with pytest.raises(ValueError, match=next(iter(changes))):
            arch_from_hf({**config, **changes})


def test_a_new_model_takes_the_shape_of_a_config_json():
    fields = {"model_type": "deepseek_v3", **R1}
    arch = new_arch(ModelConfig(shape=json.dumps(fields)), 259)
    assert arch.vocab_size == 259 and arch.latent and arch.latent.cached_width == 576
    for shape, message in [
        ("{", "model.shape is no JSON"),
        ("[]", "not an object"),
        (json.dumps({**fields, "vocab_size": 5}), "leave it out"),
        (json.dumps({**fields, "n_group": 3}), "groups must be equal"),
    ]:
        with pytest.raises(ValueError, match=message):
            new_arch(ModelConfig(shape=shape), 259)


def test_the_load_is_that_of_the_busiest_expert_of_the_most_uneven_layer():
    def completion(routes: Any) -> Completion:
        given = None if routes is None else np.array(routes, np.int16)
        return Completion(0, 0, (1,), np.zeros(1), "eos", routes=given)

    even, uneven = [[0, 1], [2, 3]], [[3, 0], [3, 1]]  # tokens by choices
    by_layer = [np.stack([even, uneven], axis=1), np.stack([even, uneven], axis=1)]
    assert expert_load([completion(r) for r in by_layer]) == {"experts/busiest_share": 0.5}
    assert expert_load([completion(None)]) == {}


def test_adapters_and_eight_bits_are_refused():
    shape = json.dumps({"model_type": "deepseek_v3", **R1})
    for section, name, value in [
        ("lora", "rank", 8),
        ("sample", "weights", "int8"),
        ("sample", "cache", "int8"),
    ]:
        config = Config(model=ModelConfig(shape=shape))
        setattr(getattr(config, section), name, value)
        with pytest.raises(ValueError, match=f"{section}.{name} is {value!r}, but the model has"):
            make_policy(config)


# ---- the sampler's routes --------------------------------------------------------------------

PROMPTS = [[3, 17, 9], [4], [8, 8, 20, 1]]


def engine_of(arch: Arch, mesh: Any, **more: Any) -> Engine:
    settings: dict[str, Any] = {"slots": 8, "slots_per_prompt": 1, "tokens_per_dispatch": 3}
    return Engine(
        arch,
        ToyTokenizer(),
        mesh,
        max_prompt=MAX_PROMPT,
        max_new=MAX_NEW,
        dtype="float32",
        **(settings | more),
    )


def sampled(engine: Engine, weights: Any, begun: Any = None) -> list[Any]:
    requests = [Request(p, n, 4, begun=(begun or {}).get(n, {})) for n, p in enumerate(PROMPTS)]
    with jax.set_mesh(engine.mesh):
        found = list(engine.run(weights, requests, jax.random.key(3), temperature=0.7))
    return sorted(found, key=lambda c: (c.problem, c.sample))


def samples_of(completions: list[Any]) -> list[Sample]:
    return [
        Sample(
            group=c.problem,
            prompt=PROMPTS[c.problem],
            completion=c.tokens,
            advantage=1.0,
            sampler_logprobs=c.logprobs,
            routes=c.routes,
        )
        for c in completions
    ]


def row_shape(arch: Arch) -> RowShape:
    assert arch.experts is not None
    routed = (arch.routed_layers, arch.experts.per_token)
    return RowShape(rows=4, tokens=28, completion_tokens=24, routed=routed)


@partial(jax.jit, static_argnums=1)
def trainer_logprobs(params, arch, batch):
    form: dict[str, Any] = {"temperature": 0.7, "dtype": "float32", "remat": "none", "chunk": 8}
    return completion_logprobs(params, arch, batch, **form)[0]


def largest_gap(params: Any, arch: Arch, samples: list[Sample]) -> float:
    gaps = [0.0]
    for batch in pack(samples, row_shape(arch)).microbatches:
        got_RC = np.asarray(trainer_logprobs(params, arch, batch))
        gap_RC = np.where(batch.mask_RC, got_RC - batch.sampler_logprobs_RC, 0.0)
        gaps.append(np.abs(gap_RC).max())
    return float(max(gaps))


@pytest.fixture(scope="module")
def latent_samples() -> list[Any]:
    weights = to_decode(toy_params(LATENT), LATENT, "float32")
    return sampled(engine_of(LATENT, mesh_of()), weights)


def test_sampler_and_trainer_agree_and_routes_are_those_of_every_token(latent_samples):
    params = toy_params(LATENT)
    for c in latent_samples:
        assert c.routes.shape == (len(PROMPTS[c.problem]) + len(c.tokens) - 1, 2, 3)
        assert c.routes.dtype == np.int16 and (c.routes >= 0).all() and (c.routes < 8).all()
    samples = samples_of(latent_samples)
    assert largest_gap(params, LATENT, samples) < 1e-5
    # In float32 the trainer would have chosen the same, prompts included.
    alone = [dataclasses.replace(sample, routes=None) for sample in samples]
    assert largest_gap(params, LATENT, alone) < 1e-5


def test_packing_puts_every_route_at_its_token(latent_samples):
    samples = samples_of(latent_samples)
    packed = pack(samples, row_shape(LATENT))
    for batch in packed.microbatches:
        known = 0
        for row, group, branch in {
            (r, batch.groups_RT[r, t], batch.branches_RT[r, t])
            for r, t in np.argwhere(batch.groups_RT > 0)
        }:
            here = (batch.groups_RT[row] == group) & (batch.branches_RT[row] == branch)
            tokens, routes = batch.tokens_RT[row, here].tolist(), batch.routes_RTLk[row, here]
            if branch == 0:
                fits = [s for s in samples if list(s.prompt) == tokens]
                known_routes: list[Any] = [s.routes for s in fits]
                assert any(np.array_equal(routes, r[: len(tokens)]) for r in known_routes)
            else:
                assert (routes[-1] == -1).all()
                ends = [s for s in samples if list(s.completion) == tokens]
                behind: list[Any] = [(s.routes, len(s.prompt)) for s in ends]
                assert any(np.array_equal(routes[:-1], r[start:]) for r, start in behind)
            known += len(tokens)
        assert known and (batch.routes_RTLk[batch.groups_RT == 0] == -1).all()


def test_samples_and_routes_do_not_depend_on_devices_slots_or_guesses(latent_samples):
    weights = to_decode(toy_params(LATENT), LATENT, "float32")
    mesh = mesh_of(fsdp=2, tensor=2, expert=2, axis_types="explicit")
    placed = jax.device_put(
        weights, param_shardings(decode_table(param_table(LATENT), 3), mesh, DECODE_RULES)
    )
    guessing = {"slots": 12, "tail_slots": 6, "draft_tokens": 2}
    for engine, given in [
        (engine_of(LATENT, mesh), placed),
        (engine_of(LATENT, mesh_of(), **guessing), weights),
    ]:
        for got, expected in zip(sampled(engine, given), latent_samples, strict=True):
            assert got.tokens == expected.tokens
            np.testing.assert_array_equal(got.routes, expected.routes)


def test_a_completion_that_goes_on_has_the_routes_of_what_was_read_again(latent_samples):
    weights = to_decode(toy_params(LATENT), LATENT, "float32")
    begun = {
        c.problem: {c.sample: Begun(c.tokens[:4], c.logprobs[:4])}
        for c in latent_samples
        if len(c.tokens) > 4
    }
    assert begun
    for got, expected in zip(
        sampled(engine_of(LATENT, mesh_of(), goes_on=True), weights, begun),
        latent_samples,
        strict=True,
    ):
        assert got.tokens == expected.tokens
        np.testing.assert_array_equal(got.routes, expected.routes)


def test_the_ratio_stays_one_with_the_samplers_routes_and_not_without():
    """Experts 2i and 2i + 1 have the same router column: a tie, broken otherwise in the sampler."""
    params = toy_params(TIED)
    router = params["layers"]["router"]
    params["layers"]["router"] = jnp.repeat(router[..., ::2], 2, axis=-1)
    weights = to_decode(params, TIED, "float32")
    for number, layer in enumerate(weights["layers"]):
        noise = jax.random.normal(jax.random.key(number), layer["router"].shape)
        layer["router"] = layer["router"] + 1e-7 * noise
    samples = samples_of(sampled(engine_of(TIED, mesh_of()), weights))
    alone = [dataclasses.replace(sample, routes=None) for sample in samples]
    assert largest_gap(params, TIED, samples) < 2e-5
    assert largest_gap(params, TIED, alone) > 0.1


def test_the_update_is_the_same_on_one_device_and_on_eight(latent_samples):
    samples, found = samples_of(latent_samples), []
    split: dict[str, Any] = {"fsdp": 2, "tensor": 2, "expert": 2}
    for mesh in (mesh_of(), mesh_of(**split), mesh_of(**split, axis_types="explicit")):
        policy = policy_on(mesh, LATENT)
        with jax.set_mesh(mesh):
            params = policy.initial_params()
            batch = pack(samples, row_shape(LATENT)).microbatches[0]

            def mean(params: Any, batch: Any, policy: Any = policy) -> jax.Array:
                logprobs_RC = policy.logprobs(params, {}, batch)[0]
                return jnp.sum(logprobs_RC, where=batch.mask_RC) / 30

            found.append(jax.jit(jax.value_and_grad(mean))(params, to_device(batch, mesh)))
    for other in found[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), found[0], other)
