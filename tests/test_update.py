"""The update: the same on any mesh and in any pieces, and no update if a number is not finite."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_model import (
    ARCH,
    MAX_NEW,
    MAX_PROMPT,
    mesh_of,
    one_a_row,
    policy_on,
    ragged_samples,
    toy_params,
)

from grpo import loss
from grpo.batch import RowShape, Sample, pack, to_device, totals, unpack
from grpo.config import OptimConfig
from grpo.policy import Policy
from grpo.structs import Batch, Totals, TrainState
from grpo.update import (
    Objective,
    Update,
    decayed_params,
    init_state,
    learning_rate,
    make_logprobs,
    make_optimizer,
)

MESHES: dict[str, dict[str, Any]] = {
    "1": {},
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
}
KEEPS_REFERENCE = "fsdp 4 x tensor 2"
CLIPPED = partial(
    loss.grpo_loss,
    objective=partial(loss.clipped, clip_low=0.2, clip_high=0.28),
    aggregate=loss.by_token,
    correction=partial(loss.truncated, correction_cap=2.0),
    kl=loss.k3,
    kl_coef=0.1,
    entropy_coef=0.01,
    on_policy=False,
)
GSPO = partial(
    loss.grpo_loss,
    objective=partial(loss.gspo, clip_low=0.2, clip_high=0.28),
    aggregate=loss.by_sequence,
    correction=partial(loss.masked_sequences, correction_cap=2.0, sequence_gap_max=0.4),
    kl=loss.k3,
    kl_coef=0.0,
    entropy_coef=0.0,
    on_policy=False,
)


def both(
    logprobs_RC: jax.Array, entropy_RC: jax.Array, batch: Batch, totals: Totals
) -> tuple[jax.Array, Any, Any]:
    """Every kind of term, by the token and by the completion, in one program to compile."""
    values, means, maxima = zip(
        *(one(logprobs_RC, entropy_RC, batch, totals) for one in (CLIPPED, GSPO)), strict=True
    )
    return (
        values[0] + values[1],
        means[0] | {f"{name} of gspo": mean for name, mean in means[1].items()},
        maxima[0],
    )


LOSSES: dict[str, Objective] = {"both": both, "gspo": GSPO}
SAMPLES = ragged_samples()
SHAPE = RowShape(rows=8, tokens=24, completion_tokens=20)  # holds them all
SMALL = RowShape(rows=2, tokens=30, completion_tokens=24)  # makes several microbatches

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
SCHEDULE = learning_rate(OPTIM, 1e-2, 0, 10)


@functools.cache
def policy(name: str = "1") -> Policy:
    return policy_on(mesh_of(**MESHES[name]))


def optimizer_of(policy: Policy) -> optax.GradientTransformation:
    return make_optimizer(OPTIM, SCHEDULE, decayed_params(policy))


@functools.cache
def update_on(name: str, which: str) -> Update:
    return Update(
        policy(name),
        LOSSES[which],
        optimizer_of(policy(name)),
        SCHEDULE,
        keep_reference=name == KEEPS_REFERENCE,
    )


def packed(samples: Sequence[Sample] = SAMPLES, shape: RowShape = SHAPE) -> list[Batch]:
    return pack(samples, shape).microbatches


def sums(microbatches: Sequence[Batch], name: str = "1", which: str = "both") -> Any:
    """Loss, metrics and gradients, on a mesh."""
    mesh = policy(name).mesh
    with jax.set_mesh(mesh):
        placed = [to_device(batch, mesh) for batch in microbatches]
        out = update_on(name, which).sums(params(name), placed, totals(SAMPLES))
    return jax.tree.map(np.asarray, out)


@functools.cache
def params(name: str = "1") -> Any:
    return policy(name).initial_params()


@pytest.fixture(scope="module")
def base() -> Any:
    """What everything is compared with: one row a completion, one device, one microbatch."""
    out = sums([one_a_row(SAMPLES)])
    assert abs(out.loss) > 0.01 and 100 < out.means["policy/objective"].count < 32 * MAX_NEW
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(out.grads))
    for metric in ("policy/clip_fraction", "sampler/corrected_share"):
        for mean in (out.means[metric], out.means[f"{metric} of gspo"]):
            assert 0.05 < mean.total / mean.count < 0.95, metric
    return out


# ---- invariance ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MESHES)
def test_packing_and_devices_change_nothing(base, name):
    [batch] = packed()
    # Prompts are shared, and groups share rows.
    assert batch.branches_RT.max() >= 4 and batch.groups_RT.max() >= 2
    jax.tree.map(close, sums([batch], name), base)


def test_the_shape_of_rows_and_microbatches_changes_nothing(base):
    microbatches = packed(shape=SMALL)
    assert len(microbatches) == 4
    jax.tree.map(close, sums(microbatches), base)


def test_the_order_of_samples_changes_nothing(base):
    order = np.random.default_rng(1).permutation(len(SAMPLES))
    permuted = packed([SAMPLES[i] for i in order], SMALL)
    assert not np.array_equal(permuted[0].tokens_RT, packed(shape=SMALL)[0].tokens_RT)
    jax.tree.map(close, sums(permuted), base)


@pytest.mark.parametrize("last", [True, False])
def test_a_microbatch_of_padding_contributes_nothing(base, last):
    full, padding = packed(shape=SMALL), packed([], SMALL)
    jax.tree.map(close, sums(full + padding if last else padding + full), base)


def some_flat() -> list[Sample]:
    """Every second group has no advantage, as where all rewards are equal."""
    return [dataclasses.replace(s, advantage=s.advantage * (s.group % 2)) for s in SAMPLES]


def test_leaving_out_completions_without_advantage_changes_nothing():
    """Loss, gradients, and the parameters after: they are counted, but not computed."""
    everything = some_flat()
    working = [s for s in everything if s.trains and s.advantage]
    assert 0 < len(working) < 0.6 * len(everything)
    whole, part = (sums(packed(some), which="gspo") for some in (everything, working))
    close(part.loss, whole.loss)
    jax.tree.map(close, part.grads, whole.grads)
    after = [
        step("1", fresh_state("1"), some, "gspo", everything) for some in (everything, working)
    ]
    (state, report), (state_of_part, report_of_part) = after
    near = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)  # Adam divides: see below
    jax.tree.map(near, state.params, state_of_part.params)
    for metric in ("policy/loss", "optim/grad_norm", "optim/param_change"):
        assert float(report_of_part[metric]) == pytest.approx(float(report[metric]), rel=1e-4)


def test_logprobs_do_not_depend_on_rows():
    """What the reference and the old policy say of a token is the same packed and unpacked."""
    run = make_logprobs(policy())
    with jax.set_mesh(policy().mesh):
        plain_RC = np.asarray(run(params(), one_a_row(SAMPLES)))
        together = pack(SAMPLES, SHAPE)
        packed_RC = np.concatenate([run(params(), batch) for batch in together.microbatches])
    for row_C, values, sample in zip(
        plain_RC, unpack(packed_RC, together, SAMPLES), SAMPLES, strict=True
    ):
        close(values, row_C[: len(sample.completion)])


# ---- the state -------------------------------------------------------------------------------


def fresh_state(name: str) -> TrainState:
    with jax.set_mesh(policy(name).mesh):
        return init_state(
            policy(name),
            policy(name).initial_params(),
            optimizer_of(policy(name)),
            keep_reference=name == KEEPS_REFERENCE,
        )


def step(
    name: str,
    state: TrainState,
    samples: Sequence[Sample] = SAMPLES,
    which: str = "both",
    counted: Sequence[Sample] | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    mesh = policy(name).mesh
    with jax.set_mesh(mesh):
        placed = [to_device(batch, mesh) for batch in packed(samples)]
        return update_on(name, which)(state, placed, totals(counted or samples))


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
    after, _ = step(name, fresh_state(name))
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
    one, report = step("1", fresh_state("1"))
    many, report_many = step("fsdp 4 x tensor 2", fresh_state("fsdp 4 x tensor 2"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), one.params, many.params)
    assert report.keys() == report_many.keys()
    for key, value in report.items():
        np.testing.assert_allclose(report_many[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_an_update_is_adamw_on_the_clipped_gradient(base):
    """One step by hand: with zero moments, Adam moves every weight by lr * g / (|g| + eps)."""
    gradients = base.grads
    norm = math.sqrt(
        sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(gradients))
    )
    before, (after, report) = toy_params(), step("1", fresh_state("1"))
    assert float(report["optim/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(report["policy/loss"]) == pytest.approx(float(base.loss), rel=1e-5)
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
    bad = [*SAMPLES[:3], dataclasses.replace(SAMPLES[3], advantage=rubbish, trains=True)]
    state, _ = step("1", fresh_state("1"))
    before = jax.tree.map(np.array, state)
    for count in (1, 2):
        state, report = step("1", state, bad)
        assert (int(state.updates), int(state.bad_updates)) == (1, count)
        assert float(report["optim/skipped"]) == 1
        jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)
    state, report = step("1", state)
    assert (int(state.updates), int(state.bad_updates)) == (2, 0)
    assert float(report["optim/skipped"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not np.array_equal(state.params["embed"], before.params["embed"])


@pytest.mark.parametrize("samples", [[], [dataclasses.replace(SAMPLES[0], trains=False)]])
def test_a_minibatch_without_trained_tokens_is_no_division_by_zero(samples):
    state, report = step("1", fresh_state("1"), samples)
    assert float(report["policy/loss"]) == 0 and float(report["optim/grad_norm"]) == 0
    assert float(report["optim/skipped"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, report)))


def test_the_state_is_donated():
    """Its old buffers are gone: parameters and moments exist once, not twice."""
    state = fresh_state("1")
    old = jax.tree.leaves((state.params, state.opt_state))
    step("1", state)
    assert all(leaf.is_deleted() for leaf in old)


def test_the_reference_is_a_copy_that_updates_leave_alone():
    name = KEEPS_REFERENCE
    state, _ = step(name, fresh_state(name))
    jax.tree.map(np.testing.assert_array_equal, state.ref_params, toy_params())
    jax.tree.map(_assert_placed, state.ref_params, policy(name).shardings)
    assert not np.array_equal(state.params["embed"], state.ref_params["embed"])
    assert fresh_state("1").ref_params is None


def test_every_number_of_microbatches_runs_the_same_three_programs():
    update, state = update_on("1", "both"), fresh_state("1")
    with jax.set_mesh(policy().mesh):
        parts = [to_device(batch, policy().mesh) for batch in packed(shape=SMALL)]
        state, _ = update(state, parts, totals(SAMPLES))
        compiled = update.num_compiled()
        for microbatches in (parts[:1], parts[:2], parts * 2):
            state = state.replace(step=state.step + 1)
            state, _ = update(state, microbatches, totals(SAMPLES))
            assert update.num_compiled() == compiled
        assert len(update.programs(parts[0])) == 3


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
    assert ARCH.width % 8 == 0 and SHAPE.rows % 8 == 0
    assert SHAPE.tokens >= MAX_PROMPT + MAX_NEW
