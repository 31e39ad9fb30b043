"""One GRPO step is the same on any mesh, explicit or auto; and nobody holds more than its share."""

import dataclasses
import functools
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from toy_model import ARCH, MAX_NEW, MAX_PROMPT, ToyTokenizer, mesh_of, toy_params

from grpo import loss
from grpo.ask import hand_over
from grpo.batch import RowShape, Sample, pack, to_device, totals
from grpo.config import ModelConfig, OptimConfig
from grpo.engine.engine import Engine, Request
from grpo.engine.programs import Programs
from grpo.model.arch import Arch
from grpo.model.params import ParamSpec, decode_table, num_params, param_table
from grpo.policy import Policy, lay_out
from grpo.sharding import AXIS_TYPES, DECODE_RULES, make_mesh, param_shardings
from grpo.update import (
    Offload,
    Sums,
    Update,
    decayed_params,
    init_state,
    learning_rate,
    make_optimizer,
)

MESHES = {
    "8x1": {"data": 8},
    "4x2": {"fsdp": 4, "tensor": 2},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    # Two key/value heads: every device keeps both.
    "2x4": {"fsdp": 2, "tensor": 4},
}
# `make test` leaves out what other tests of it nearly show: those run on auto axes.
BOTH_TYPES = ["explicit", pytest.param("auto", marks=pytest.mark.slow)]
CASES = [
    ("8x1", "explicit"),
    ("4x2", "explicit"),
    ("4x2", "auto"),
    ("2x2x2", "explicit"),
    ("2x4", "explicit"),
    *(pytest.param(name, "auto", marks=pytest.mark.slow) for name in ("8x1", "2x2x2", "2x4")),
]
GROUP, TEMPERATURE = 4, 0.8
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1, eps=1e-4)
SCHEDULE = learning_rate(OPTIM, 1e-2, 0, 10)
OBJECTIVE = partial(
    loss.grpo_loss,
    objective=partial(loss.clipped, clip_low=0.2, clip_high=0.28),
    aggregate=loss.by_token,
    correction=partial(loss.truncated, correction_cap=2.0),
    kl=loss.k3,
    kl_coef=0.0,
    entropy_coef=0.01,
    on_policy=True,
)
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3]]


def policy_on(name: str, axis_types: str) -> Policy:
    return lay_out(
        ARCH,
        ToyTokenizer(),
        mesh_of(**MESHES.get(name, {}), axis_types=axis_types),
        ModelConfig(compute_dtype="float32", logprob_chunk=4),
        temperature=TEMPERATURE,
        read=lambda shardings: jax.device_put(toy_params(), shardings),
    )


def reward(tokens: tuple[int, ...]) -> float:
    return (sum(tokens) + 3 * len(tokens)) % 7 / 6


def samples_of(completions: Any) -> list[Sample]:
    ordered = sorted(completions, key=lambda c: (c.problem, c.sample))
    reward_PG = np.array([reward(c.tokens) for c in ordered]).reshape(-1, GROUP)
    advantage_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
    return [
        Sample(
            group=c.problem,
            prompt=PROMPTS[c.problem],
            completion=c.tokens,
            advantage=float(advantage),
            sampler_logprobs=c.logprobs,
        )
        for c, advantage in zip(ordered, advantage_PG.reshape(-1), strict=True)
    ]


@functools.cache
def two_steps(name: str, axis_types: str) -> dict[str, Any]:
    """What two steps of GRPO leave behind, and what the devices hold."""
    policy = policy_on(name, axis_types)
    optimizer = make_optimizer(OPTIM, SCHEDULE, decayed_params(policy))
    with jax.set_mesh(policy.mesh):
        engine = Engine(
            ARCH,
            policy.tokenizer,
            policy.mesh,
            max_prompt=MAX_PROMPT,
            max_new=MAX_NEW,
            slots=8,
            tokens_per_dispatch=4,
            dtype="float32",
        )
        update = Update(policy, OBJECTIVE, optimizer, SCHEDULE)
        state = init_state(policy, policy.initial_params(), optimizer)
        placed: Any = jax.tree.map(lambda a: a.sharding, state)
        out: dict[str, Any] = {"steps": [], "compiled": []}
        for step in range(2):
            weights = policy.for_decoding(state.params)
            requests = [Request(p, stream, GROUP) for stream, p in enumerate(PROMPTS)]
            key = jax.random.fold_in(jax.random.key(0), step)
            samples = samples_of(engine.run(weights, requests, key, temperature=TEMPERATURE))
            packed = pack(samples, RowShape(rows=8, tokens=24, completion_tokens=20))
            batches = [to_device(batch, policy.mesh) for batch in packed.microbatches]
            sums = update.sums(state.params, batches, totals(samples))
            result = {
                "tokens": [s.completion for s in samples],
                "logprobs": [np.asarray(s.sampler_logprobs) for s in samples],
                "loss": np.asarray(sums.loss),
                "grads": jax.tree.map(np.asarray, sums.grads),
            }
            state, report = update(state, batches, totals(samples))
            result["params"] = jax.tree.map(np.asarray, state.params)
            result["report"] = jax.tree.map(np.asarray, report)
            out["steps"].append(result)
            out["compiled"].append(engine.num_compiled() + update.num_compiled())
    jax.tree.map(lambda a, s: _assert_placed(a, s), state, placed)
    return out | {"state": state, "weights": weights, "policy": policy}


def _assert_placed(array: jax.Array, sharding: jax.sharding.Sharding) -> None:
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


@pytest.mark.parametrize("name, axis_types", CASES)
def test_a_step_is_the_same_on_any_mesh(name, axis_types, capfd):
    """Tokens are identical; float32 sums in another order, hence the tolerances.

    The second step starts from parameters that Adam has made: it divides by the root of the
    squared gradient, which is another number for small ones. And XLA finds nothing that it has to
    copy whole to every device because it cannot get from one layout to the next.
    """
    pairs = zip(two_steps("1", "auto")["steps"], two_steps(name, axis_types)["steps"], strict=True)
    for (one, many), tolerance in zip(pairs, (1e-5, 3e-4), strict=True):
        close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
        assert one["tokens"] == many["tokens"]
        for key in ("logprobs", "loss", "grads"):
            jax.tree.map(close, one[key], many[key])
        jax.tree.map(partial(close, rtol=3e-4, atol=3e-4), one["params"], many["params"])
        assert one["report"].keys() == many["report"].keys()
    assert "rematerialization" not in capfd.readouterr().err
    first = two_steps("1", "auto")["steps"][0]
    assert abs(first["loss"]) > 1e-3 and np.abs(first["grads"]["embed"]).max() > 1e-3
    assert len({len(tokens) for tokens in first["tokens"]}) > 1


@pytest.mark.parametrize("name, axis_types", CASES)
def test_nothing_is_compiled_after_the_first_step(name, axis_types):
    first, second = two_steps(name, axis_types)["compiled"]
    assert first == second


@pytest.mark.parametrize(
    "name, axis_types", [("4x2", "explicit"), ("4x2", "auto"), ("2x2x2", "explicit")]
)
def test_no_device_holds_more_than_its_share(name, axis_types):
    """Parameters and both moments; what is not split is the norm scales and a few counters."""
    state, policy = (two_steps(name, axis_types)[key] for key in ("state", "policy"))
    arrays = jax.tree.leaves((state.params, state.opt_state))
    whole = sum(array.nbytes for array in arrays)
    scales = 3 * 4 * (2 * 2 * 16 + 16) + 64
    ways = policy.mesh.shape["fsdp"] * policy.mesh.shape["tensor"]
    for device in policy.mesh.devices.flat:
        held = sum(
            shard.data.nbytes
            for array in arrays
            for shard in array.addressable_shards
            if shard.device == device
        )
        assert held <= whole / ways + scales


@pytest.mark.parametrize("axis_types", BOTH_TYPES)
def test_random_parameters_are_made_where_they_stay(axis_types):
    """The compiled program knows a device's part of a matrix only; its numbers are one device's."""
    mesh = mesh_of(fsdp=4, tensor=2, axis_types=axis_types)
    policies = [
        lay_out(ARCH, ToyTokenizer(), some, ModelConfig(), temperature=1.0)
        for some in (mesh, mesh_of())
    ]
    with jax.set_mesh(mesh):
        params = policies[0].initial_params()
        text = str(jax.jit(policies[0].initial_params).lower().compile().as_text())
    assert "f32[2,4,12]" in text and "f32[2,16,24]" not in text  # the MLP's gate
    jax.tree.map(_assert_placed, params, policies[0].shardings)
    jax.tree.map(np.testing.assert_array_equal, params, policies[1].initial_params())


def test_sizes_that_do_not_fit_the_devices_are_errors():
    with pytest.raises(ValueError, match="3 x 2 x 1 = 6 devices, there are 8"):
        make_mesh(3, 2, 1)
    with pytest.raises(ValueError, match="only one size may be -1"):
        make_mesh(-1, -1, 1)
    mesh = make_mesh(2, -1, 2, "explicit")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}
    assert set(mesh.axis_types) == {AXIS_TYPES["explicit"]}


def test_the_hand_over_says_what_it_took():
    """The decode form is split over `tensor` only: four copies of it, the norm scales eight."""
    state, policy = (two_steps("4x2", "explicit")[key] for key in ("state", "policy"))
    with jax.set_mesh(policy.mesh):
        weights, metrics = hand_over(policy, state.params)
    scales = 2 * 2 * 16 + 16
    expected = 4 * (4 * (num_params(ARCH) - scales) + 8 * scales)
    assert metrics["handover/weights_bytes"] == expected
    held = [
        shard.data.nbytes for leaf in jax.tree.leaves(weights) for shard in leaf.addressable_shards
    ]
    assert sum(held) == expected
    assert metrics["time/handover_s"] > 0


# ---- what stays in the hosts' memory ---------------------------------------------------------


@pytest.mark.parametrize("axis_types", BOTH_TYPES)
def test_offloading_changes_no_bit(axis_types):
    """Moments and reference lie in the hosts' memory before and after an update."""
    policy = policy_on("4x2", axis_types)
    optimizer = make_optimizer(OPTIM, SCHEDULE, decayed_params(policy))
    results = []
    with jax.set_mesh(policy.mesh):
        grads = policy.initial_params()
        for offload in (Offload(), Offload(moments=True, reference=True)):
            form: Any = {"keep_reference": True, "offload": offload}
            state = init_state(policy, policy.initial_params(), optimizer, **form)
            update = Update(policy, OBJECTIVE, optimizer, SCHEDULE, **form)
            placed = jax.tree.map(lambda a: a.sharding, state)
            for _ in range(2):
                # Gradients that are as good as any: the loss is not what is tested.
                sums = Sums(loss=jnp.float32(1), means={}, maxima={}, grads=grads)
                state, _ = update._apply(state, sums)
            assert update.num_compiled() == 1
            kinds = {
                leaf.sharding.memory_kind
                for leaf in jax.tree.leaves((state.opt_state, state.ref_params))
                if leaf.ndim
            }
            assert kinds == ({"pinned_host"} if offload.moments else {device_memory()})
            jax.tree.map(_assert_placed, state, placed)
            results.append(jax.tree.map(np.asarray, state))
    jax.tree.map(np.testing.assert_array_equal, *results)


def device_memory() -> str | None:
    return jax.devices()[0].default_memory().kind


# ---- what travels ----------------------------------------------------------------------------

_COLLECTIVE = re.compile(
    r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_WIDTH = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}


def collective_bytes(text: str) -> list[int]:
    """Of every collective in a compiled program, the bytes of what a device gets from it."""
    found = []
    for shapes in _COLLECTIVE.findall(text):
        parts = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        found.append(
            sum(_WIDTH[kind] * math.prod(int(n) for n in d.split(",") if n) for kind, d in parts)
        )
    return found


def decode_weights_like(arch: Arch, mesh: Mesh) -> Any:
    table = decode_table(param_table(arch), arch.num_layers)
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, "float32", sharding=sharding),
        table,
        param_shardings(table, mesh, DECODE_RULES),
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )


def test_decoding_never_gathers_the_vocabulary():
    """Neither logits nor the embedding: what travels a token is activations, sums and tokens."""
    arch = dataclasses.replace(ARCH, vocab_size=4096, num_layers=1)
    mesh, slots = mesh_of(fsdp=2, tensor=4), 8
    with jax.set_mesh(mesh):
        programs = Programs(
            arch,
            mesh,
            num_prompts=slots,
            slots_per_prompt=1,
            max_prompt=4,
            max_new=8,
            num_tokens=4,
            stop_ids=(0,),
            at_once=4,
            dtype="float32",
        )
        lowered = programs.decode.lower(
            decode_weights_like(arch, mesh),
            programs.empty(),
            np.zeros(slots, bool),
            np.int32(1),
            np.float32(1),
            None,
            view=8,
            greedy=False,
        )
        found = collective_bytes(str(lowered.compile().as_text()))
    assert found and max(found) < 4 * arch.vocab_size, sorted(found)
