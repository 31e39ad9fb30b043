"""Adapters: nothing at first, then the weights they stand for, and all that is trained."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import (
    ARCH,
    MAX_NEW,
    MAX_PROMPT,
    ToyTokenizer,
    mesh_of,
    policy_on,
    ragged_samples,
    toy_params,
)

from grpo import loss
from grpo.batch import RowShape, Sample, pack, to_device, totals
from grpo.config import LoraConfig, ModelConfig, OptimConfig
from grpo.engine.engine import Engine, Request
from grpo.model.lora import base_norm, change_norm, target_names
from grpo.model.params import Params, param_table
from grpo.model.quantise import dequantise, stored
from grpo.policy import Policy, describe_adapters, lay_out
from grpo.update import Update, decayed_params, init_state, learning_rate, make_optimizer

LORA = LoraConfig(rank=2, alpha=6.0)
SAMPLES = ragged_samples()
SHAPE = RowShape(rows=8, tokens=24, completion_tokens=20)  # holds them all
OPTIM = OptimConfig(learning_rate=1e-2)
MESHES: dict[str, Any] = {"1": {}, "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}}


@functools.cache
def policy(base_dtype: str = "float32", mesh: str = "1", sampled: str = "compute") -> Policy:
    """Adapters over the toy model, which is read as from a file; "all": the toy model itself."""
    if base_dtype == "all":
        return policy_on(mesh_of())

    def read(shardings: Any, keep: Any) -> Params:
        params = jax.device_put(toy_params(), shardings)
        rest = {n: keep(n, array) for n, array in params.items() if n != "layers"}
        layers = {n: keep(f"layers/{n}", array) for n, array in params["layers"].items()}
        return {**rest, "layers": layers}

    model = ModelConfig(
        compute_dtype="float32", remat="none", logprob_chunk=4, base_dtype=base_dtype
    )
    return lay_out(
        ARCH,
        ToyTokenizer(),
        mesh_of(**MESHES[mesh]),
        model,
        temperature=0.7,
        lora=LORA,
        sampled=sampled,
        read=read,
    )


def moved(params: Params) -> Params:
    """Adapters as after some training: b is no longer zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype("f4"), params)


@functools.cache
def program(*case: str) -> Any:
    """Log-probs, and the gradient of a weighted sum of them."""
    which = policy(*case)

    def value(params: Params, base: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        logprobs_RC, _ = which.logprobs(params, base, batch)
        weight_RC = jnp.where(batch.mask_RC, batch.advantage_RC, 0.0)
        return jnp.sum(weight_RC * logprobs_RC), logprobs_RC

    return jax.jit(jax.grad(value, has_aux=True))


def batch_on(which: Policy, samples: Any = SAMPLES) -> Any:
    return to_device(pack(samples, SHAPE).microbatches[0], which.mesh)


def gradient(params: Params, base: Params, *case: str) -> tuple[Params, np.ndarray]:
    which = policy(*case)
    with jax.set_mesh(which.mesh):
        batch = batch_on(which)
        grads, logprobs_RC = program(*case)(params, base, batch)
    return jax.tree.map(np.asarray, grads), np.asarray(logprobs_RC)[np.asarray(batch.mask_RC)]


# ---- what adapters compute -------------------------------------------------------------------


def test_new_adapters_leave_every_logprob_exactly_as_it_was():
    which = policy("float32")
    before = gradient(toy_params(), {}, "all")[1]
    grads, after = gradient(which.initial_params(), which.base(), "float32")
    np.testing.assert_array_equal(after, before)
    for name, pair in grads["layers"].items():
        assert not pair["a"].any() and np.abs(pair["b"]).max() > 1e-4, name  # d/da is b times ...


@pytest.mark.parametrize("base_dtype", ["float32", "int4"])
def test_values_and_gradients_are_those_of_the_merged_weights(base_dtype):
    """For W = base + s a b the chain rule says dL/da = s dL/dW b', dL/db = s a' dL/dW."""
    which, scale = policy(base_dtype), LORA.alpha / LORA.rank
    params = moved(which.initial_params())
    whole = which.merged(params, which.base())
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, toy_params())
    expected, before = gradient(whole, {}, "all")
    got, after = gradient(params, which.base(), base_dtype)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    for name, pair in got["layers"].items():
        a_LDr, b_LrF = (np.asarray(params["layers"][name][part]) for part in "ab")
        d_LDF = expected["layers"][name].reshape(len(a_LDr), a_LDr.shape[1], -1)
        for value, by_hand in (
            (pair["a"], scale * np.einsum("ldf,lrf->ldr", d_LDF, b_LrF)),
            (pair["b"], scale * np.einsum("ldr,ldf->lrf", a_LDr, d_LDF)),
        ):
            assert np.abs(by_hand).max() > 1e-3
            np.testing.assert_allclose(value, by_hand, rtol=1e-4, atol=1e-4)


def test_devices_change_nothing():
    one, many = policy("int4"), policy("int4", "2x2x2")
    expected = gradient(moved(one.initial_params()), one.base(), "int4")
    got = gradient(moved(many.initial_params()), many.base(), "int4", "2x2x2")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_the_base_is_the_models_weights_as_stored():
    expected = stored(toy_params(), "int8")
    jax.tree.map(np.testing.assert_array_equal, policy("int8").base(), expected)
    assert policy("int8").base() is policy("int8").base()  # read once


def test_how_far_adapters_have_moved_the_policy():
    which, scale = policy("int8"), LORA.alpha / LORA.rank
    params, added, frozen = moved(which.initial_params()), 0.0, 0.0
    for name, pair in params["layers"].items():
        added += np.sum((scale * np.asarray(pair["a"]) @ np.asarray(pair["b"])) ** 2)
        weight = which.base()["layers"][name]
        frozen += np.sum(np.asarray(dequantise(weight, jnp.float32)) ** 2)
    assert change_norm(params, scale) == pytest.approx(added**0.5, rel=1e-5)
    assert base_norm(which.base(), tuple(params["layers"])) == pytest.approx(frozen**0.5, rel=1e-5)
    change = which.change(params)
    assert change == {"lora/weight_change": pytest.approx((added / frozen) ** 0.5, rel=1e-5)}
    assert which.change(which.initial_params()) == {"lora/weight_change": 0.0}
    assert policy("all").change(toy_params()) == {}


def test_patterns_choose_matrices():
    table = param_table(ARCH)
    assert target_names(table, ("*",)) == ("q", "k", "v", "o", "gate", "up", "down")
    assert target_names(table, ("[qv]", "down", "q")) == ("q", "v", "down")
    with pytest.raises(ValueError, match="lora.targets: 'q_proj' matches no matrix; there are"):
        target_names(table, ("q", "q_proj"))
    with pytest.raises(ValueError, match="'attn_norm' matches no matrix"):
        target_names(table, ("attn_norm",))


def test_the_log_says_what_is_trained():
    said = describe_adapters(policy("int4"), "int4")
    # (in + out) * rank * layers of q, k, v, o, gate, up, down
    trained = (32 + 24 + 24 + 32 + 40 + 40 + 40) * 2 * 2
    assert f"adapters on q k v o gate up down: {trained:,} numbers are trained" in said
    assert "4,432 are frozen in int4 (0 MiB)" in said


# ---- training them ---------------------------------------------------------------------------


def update_of(which: Policy) -> tuple[Update, Any]:
    schedule = learning_rate(OPTIM, OPTIM.learning_rate, 0, 10)
    optimizer = make_optimizer(OPTIM, schedule, decayed_params(which))
    return Update(which, loss.sft_loss, optimizer, schedule), optimizer


def compiled_sums(which: Policy) -> Any:
    """The program that adds one microbatch's gradients to earlier ones."""
    with jax.set_mesh(which.mesh):
        counts = jax.tree.map(np.float32, totals(SAMPLES))
        given = which.initial_params(), which.base(), batch_on(which), counts
        update: Any = update_of(which)[0]
        sums = jax.eval_shape(update._nothing, *given)
        return update._add.lower(sums, *given).compile()


def test_no_gradient_of_a_frozen_weight_is_computed():
    """Of three products a matrix - forward, and back to input and weight - the last is left out.

    Adapters of rank 2 on widths of 16 add a good part of it again; so this counts products by
    their shapes: [D, F] comes out of the gradient of a weight only.
    """
    shapes = ("f32[16,24]", "f32[24,16]")  # of gate, up and down
    full, which = compiled_sums(policy("all")), compiled_sums(policy("float32"))

    def products(compiled: Any) -> int:
        lines = compiled.as_text().splitlines()
        return sum(" dot(" in line and any(f"= {s}" in line for s in shapes) for line in lines)

    assert products(full) == 3 and products(which) == 0


def test_an_update_changes_adapters_and_the_state_holds_nothing_else():
    which = policy("int4")
    update, optimizer = update_of(which)
    with jax.set_mesh(which.mesh):
        before = jax.tree.map(np.array, which.initial_params())
        state = init_state(which, which.initial_params(), optimizer)
        largest = max(leaf.size for leaf in jax.tree.leaves(state))
        assert largest == ARCH.num_layers * ARCH.mlp_width * LORA.rank
        losses = []
        for _ in range(3):
            state, report = update(state, [batch_on(which)], totals(SAMPLES))
            losses.append(float(report["policy/loss"]))
    assert losses[2] < losses[1] < losses[0]
    for name, pair in state.params["layers"].items():
        assert (np.asarray(pair["b"]) != before["layers"][name]["b"]).all(), name


def test_microbatches_change_nothing():
    which = policy("int4")
    update, small = update_of(which)[0], RowShape(rows=2, tokens=30, completion_tokens=24)
    with jax.set_mesh(which.mesh):
        params = moved(which.initial_params())
        parts = [to_device(b, which.mesh) for b in pack(SAMPLES, small).microbatches]
        assert len(parts) > 2
        several = update.sums(params, parts, totals(SAMPLES))
        one = update.sums(params, [batch_on(which)], totals(SAMPLES))
    for got, expected in zip(
        jax.tree.leaves(several.grads), jax.tree.leaves(one.grads), strict=True
    ):
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# ---- sampling with them, and with fewer bits -------------------------------------------------

REQUESTS = [Request(prompt=[n + 1, 7, 3][: n % 3 + 1], stream=n, num_samples=2) for n in range(4)]


def gaps(cache: str, *case: str) -> np.ndarray:
    """|sampler's - trainer's log-prob| of every sampled token, nats."""
    which = policy(*case)
    params = moved(which.initial_params())
    engine = Engine(
        ARCH,
        which.tokenizer,
        which.mesh,
        max_prompt=MAX_PROMPT,
        max_new=MAX_NEW,
        slots=8,
        tokens_per_dispatch=4,
        dtype=cache,
    )
    with jax.set_mesh(which.mesh):
        weights = which.for_decoding(params)
        found = list(engine.run(weights, REQUESTS, jax.random.key(0), temperature=0.7))
        samples = [
            Sample(
                2 * c.problem + c.sample,
                REQUESTS[c.problem].prompt,
                c.tokens,
                sampler_logprobs=c.logprobs,
            )
            for c in found
        ]
        batch = batch_on(which, samples)
        _, logprobs_RC = program(*case)(params, which.base(), batch)
    gap_RC = np.abs(np.asarray(logprobs_RC) - np.asarray(batch.sampler_logprobs_RC))
    return gap_RC[np.asarray(batch.mask_RC)]


@pytest.mark.parametrize("base_dtype", ["float32", "int4"])
def test_sampler_and_trainer_agree_with_adapters(base_dtype):
    """Whatever the base is stored in: both read the same numbers."""
    assert gaps("float32", base_dtype).max() <= 1e-5


def test_a_quantised_sampler_differs_a_little():
    """Weights and cache each leave a gap of the size that 8 bits make: not 0, and far below 1."""
    for gap in (gaps("float32", "float32", "1", "int8"), gaps("int8", "float32")):
        assert 1e-4 < gap.mean() < 0.03 and gap.max() < 0.2
