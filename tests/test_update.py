"""The update: the same on any mesh and in any pieces, and no update if a number is not finite."""

import dataclasses
import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from toy_model import ARCH, mesh_of, policy_on, toy_params

from grpo.batch import make_rows, to_device
from grpo.config import OptimConfig
from grpo.loss import grpo_loss
from grpo.policy import Policy
from grpo.structs import Batch, TrainState
from grpo.update import (
    accumulate,
    decayed_params,
    init_state,
    learning_rate,
    make_logprobs,
    make_optimizer,
    make_update,
)

ROWS, MAX_PROMPT, MAX_NEW = 32, 4, 8
LOSS = partial(grpo_loss, clip_low=0.2, clip_high=0.28, kl_coef=0.1, on_policy=False)
MESHES = {
    "1": {},
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
}

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def host_batch(max_prompt: int = MAX_PROMPT, max_new: int = MAX_NEW) -> Batch:
    """Ragged rows, every one with its own advantage; numbers where the mask says none are read."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 30, rng.integers(1, MAX_PROMPT + 1)).tolist() for _ in range(ROWS)]
    written = [rng.integers(0, 32, rng.integers(1, MAX_NEW + 1)).tolist() for _ in range(ROWS)]
    rows = make_rows(prompts, written, max_prompt=max_prompt, max_new=max_new)

    def random_RC(mean: float, spread: float) -> np.ndarray:
        values = np.zeros(rows.mask_RC.shape, np.float32)
        values[:, :MAX_NEW] = rng.normal(mean, spread, (ROWS, MAX_NEW))
        return values

    advantage_RC = np.where(rows.mask_RC, rng.normal(size=(ROWS, 1)), 0).astype(np.float32)
    return dataclasses.replace(
        rows,
        advantage_RC=advantage_RC,
        old_logprobs_RC=random_RC(-3.5, 0.5),
        sampler_logprobs_RC=random_RC(-3.5, 0.5),
        ref_logprobs_RC=random_RC(-3.5, 0.5),
    )


@functools.cache
def policy(name: str = "1") -> Policy:
    return policy_on(mesh_of(**MESHES[name]))


@functools.cache
def gradient_program(name: str):
    return jax.jit(partial(accumulate, policy(name).logprobs, LOSS))


def loss_and_gradients(name: str, batch: Batch, microbatches: int = 1) -> Any:
    """Loss, metrics and gradients, on a mesh, rows in so many pieces."""
    mesh = policy(name).mesh
    rows = batch.tokens_RT.shape[0]
    with jax.set_mesh(mesh):
        on_mesh = to_device(batch, rows // microbatches, mesh)
        out = gradient_program(name)(policy(name).initial_params(), on_mesh)
    return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def base() -> Any:
    value, means, _, gradients = out = loss_and_gradients("1", host_batch())
    assert abs(value) > 0.01 and int(means["policy/objective"].count) > 100
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))
    return out


# ---- invariance ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, microbatches", [("data 8", 1), ("fsdp 8", 4), ("fsdp 4 x tensor 2", 1)]
)
def test_devices_and_microbatches_change_nothing(base, name, microbatches):
    jax.tree.map(close, loss_and_gradients(name, host_batch(), microbatches), base)


def test_padding_changes_nothing(base):
    jax.tree.map(close, loss_and_gradients("1", host_batch(2 * MAX_PROMPT, 2 * MAX_NEW)), base)


def test_the_order_of_rows_changes_nothing(base):
    order = np.random.default_rng(1).permutation(ROWS)
    permuted = jax.tree.map(lambda a: a[order], host_batch())
    jax.tree.map(close, loss_and_gradients("1", permuted), base)


def packed(batch: Batch) -> Batch:
    """Two sequences side by side in a row, nothing between them; the other rows are empty."""
    length_R = (batch.segments_RT > 0).sum(axis=1)
    T, C = 2 * (MAX_PROMPT + MAX_NEW), 2 * MAX_NEW

    def empty(width: int, like: np.ndarray) -> np.ndarray:
        return np.zeros((ROWS, width), like.dtype)

    out = {
        name: empty(T if name.endswith("T") else C, getattr(batch, name))
        for name in Batch.__dataclass_fields__
    }
    for row in range(ROWS):
        pair, second = divmod(row, 2)
        start = length_R[row - 1] if second else 0
        here = slice(start, start + length_R[row])
        for name in ("tokens_RT", "positions_RT"):
            out[name][pair, here] = getattr(batch, name)[row, : length_R[row]]
        out["segments_RT"][pair, here] = 1 + second
        columns = slice(second * MAX_NEW, (second + 1) * MAX_NEW)
        for name in out:
            if name.endswith("C"):
                out[name][pair, columns] = getattr(batch, name)[row]
        out["targets_RC"][pair, columns] += start
    return Batch(**out)


def test_packing_changes_nothing(base):
    jax.tree.map(close, loss_and_gradients("1", packed(host_batch())), base)


def test_logprobs_do_not_depend_on_microbatches():
    run = make_logprobs(policy())
    with jax.set_mesh(policy().mesh):
        params = policy().initial_params()
        whole, parts = (
            run(params, to_device(host_batch(), rows, policy().mesh)) for rows in (ROWS, 8)
        )
    assert whole.shape == (1, ROWS, MAX_NEW) and parts.shape == (4, 8, MAX_NEW)
    close(whole.reshape(ROWS, MAX_NEW), parts.reshape(ROWS, MAX_NEW))


# ---- the state -------------------------------------------------------------------------------

OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
SCHEDULE = learning_rate(OPTIM, 1e-2, 0, 10)


def optimizer_of(policy: Policy) -> optax.GradientTransformation:
    return make_optimizer(OPTIM, SCHEDULE, decayed_params(policy))


@functools.cache
def update_program(name: str):
    return make_update(policy(name), LOSS, optimizer_of(policy(name)), SCHEDULE)


def fresh_state(name: str) -> TrainState:
    with jax.set_mesh(policy(name).mesh):
        return init_state(policy(name), policy(name).initial_params(), optimizer_of(policy(name)))


def step(name: str, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    mesh: Mesh = policy(name).mesh
    with jax.set_mesh(mesh):
        return update_program(name)(state, to_device(batch, 0, mesh))


def moments(state: TrainState) -> list[Any]:
    """The two trees of Adam's moments, found by their shape."""
    like: Any = jax.tree.structure(state.params)

    def is_moment(node: Any) -> bool:
        return like == jax.tree.structure(node)

    return [t for t in jax.tree.leaves(state.opt_state, is_leaf=is_moment) if is_moment(t)]


def test_moments_lie_as_their_parameters_from_the_first():
    """Under Auto axes a plain jit(tx.init) replicates them: the model thrice on every device."""
    name = "fsdp 4 x tensor 2"
    state = fresh_state(name)
    after, _ = step(name, fresh_state(name), host_batch())
    for some in (state, after):
        assert len(moments(some)) == 2
        for tree in (some.params, *moments(some)):
            jax.tree.map(_assert_placed, tree, policy(name).shardings)
    gate = moments(state)[0]["layers"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 16 // 4, 24 // 2)


def _assert_placed(array: jax.Array, sharding: jax.sharding.Sharding) -> None:
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_the_update_is_the_same_on_any_mesh():
    """Adam divides by the root of the squared gradient, so small ones are compared with care."""
    one, report = step("1", fresh_state("1"), host_batch())
    many, report_many = step("fsdp 4 x tensor 2", fresh_state("fsdp 4 x tensor 2"), host_batch())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), one.params, many.params)
    assert report.keys() == report_many.keys()
    for key, value in report.items():
        assert float(report_many[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), key


def test_an_update_is_adamw_on_the_clipped_gradient(base):
    """One step by hand: with zero moments, Adam moves every weight by lr * g / (|g| + eps)."""
    gradients = base[3]
    norm = math.sqrt(
        sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(gradients))
    )
    before, (after, report) = toy_params(), step("1", fresh_state("1"), host_batch())
    assert float(report["optim/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(report["policy/loss"]) == pytest.approx(float(base[0]), rel=1e-5)
    assert float(report["optim/learning_rate"]) == pytest.approx(1e-2)
    scale = min(1.0, OPTIM.clip_norm / norm)
    for name, decay in (("embed", 0.1), ("final_norm", 0.0)):
        g, p = gradients[name] * scale, np.asarray(before[name])
        expected = p - 1e-2 * (g / (np.abs(g) + 1e-8) + decay * p)
        big = np.abs(g) > 1e-5  # where rounding does not decide the direction
        assert big.mean() > 0.8
        np.testing.assert_allclose(
            np.asarray(after.params[name])[big], expected[big], rtol=1e-5, atol=1e-5
        )


def test_weight_decay_leaves_norms_alone():
    decayed = decayed_params(policy())
    assert not decayed["final_norm"] and decayed["embed"]
    assert {name for name, yes in decayed["layers"].items() if not yes} == {"attn_norm", "mlp_norm"}


@pytest.mark.parametrize("rubbish", [math.inf, math.nan])
def test_a_number_that_is_not_finite_changes_nothing(rubbish):
    good = host_batch()
    advantage_RC = good.advantage_RC.copy()
    advantage_RC[3, 0] = rubbish
    bad = dataclasses.replace(good, advantage_RC=advantage_RC)
    state, _ = step("1", fresh_state("1"), good)
    before = jax.tree.map(np.array, state)
    for count in (1, 2):
        state, report = step("1", state, bad)
        assert (int(state.updates), int(state.bad_updates)) == (1, count)
        assert float(report["optim/skipped"]) == 1
        jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)
    state, report = step("1", state, good)
    assert (int(state.updates), int(state.bad_updates)) == (2, 0)
    assert float(report["optim/skipped"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not np.array_equal(state.params["embed"], before.params["embed"])


def test_a_batch_without_trained_tokens_is_no_division_by_zero():
    batch = host_batch()
    nothing = dataclasses.replace(batch, mask_RC=np.zeros_like(batch.mask_RC))
    state, report = step("1", fresh_state("1"), nothing)
    assert float(report["policy/loss"]) == 0 and float(report["optim/grad_norm"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_state_is_donated():
    """Its old buffers are gone: parameters and moments exist once, not twice."""
    state = fresh_state("1")
    old = jax.tree.leaves((state.params, state.opt_state))
    step("1", state, host_batch())
    assert all(leaf.is_deleted() for leaf in old)


# ---- the learning rate -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "decay, warmup, end_share, expected",
    [
        ("constant", 0, 0.0, {0: 8, 5: 8, 11: 8}),
        ("constant", 4, 0.0, {0: 2, 1: 3.5, 2: 5, 4: 8, 11: 8}),
        ("linear", 0, 0.0, {0: 8, 3: 6, 6: 4, 12: 0, 20: 0}),
        ("linear", 4, 0.5, {0: 2, 4: 8, 8: 6, 12: 4, 20: 4}),
        ("cosine", 0, 0.0, {0: 8, 4: 6, 6: 4, 8: 2, 12: 0}),
        ("cosine", 4, 0.5, {4: 8, 8: 6, 12: 4, 20: 4}),
    ],
)
def test_learning_rate_at_hand_points(decay, warmup, end_share, expected):
    """Of 13 updates with a peak of 8, by the number of updates made before."""
    schedule = learning_rate(OptimConfig(decay=decay, end_share=end_share), 8.0, warmup, 13)
    got = {count: float(schedule(jnp.int32(count))) for count in expected}
    assert got == pytest.approx(expected, abs=1e-5)


def test_toy_shapes_divide_the_meshes():
    assert ARCH.width % 8 == 0 and ROWS % (8 * 4) == 0
