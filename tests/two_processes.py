"""What tests/test_hosts.py runs in two processes at once, and alone to compare with.

    python tests/two_processes.py OUT [PORT ID]

writes what it found to OUT/ID.json. Each process sees as many fake devices as XLA_FLAGS say.
"""

import contextlib
import hashlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from toy_model import ARCH, MAX_NEW, MAX_PROMPT, ToyTokenizer, mesh_of, ragged_samples, toy_params

from grpo import loss
from grpo.batch import RowShape, pack, to_device, totals
from grpo.checkpoint import params_sha256
from grpo.config import ModelConfig, OptimConfig, RewardConfig
from grpo.engine.engine import Engine
from grpo.policy import Policy, lay_out
from grpo.rollout import sample_and_score
from grpo.runtime import hosts
from grpo.scoring import Scorer
from grpo.update import Update, decayed_params, init_state, learning_rate, make_optimizer
from rewards.api import Problem

OBJECTIVE = partial(
    loss.grpo_loss,
    objective=partial(loss.clipped, clip_low=0.2, clip_high=0.28),
    aggregate=loss.by_token,
    correction=partial(loss.truncated, correction_cap=2.0),
    kl=loss.k3,
    kl_coef=0.1,
    entropy_coef=0.01,
    on_policy=False,
)


def toy_policy() -> Policy:
    """The toy model over all devices of all processes; every process reads the same weights."""
    sizes: Any = {1: {}, 8: {"data": 2, "fsdp": 2, "tensor": 2}}[jax.device_count()]
    policy = lay_out(
        ARCH,
        ToyTokenizer(),
        mesh_of(**sizes),
        ModelConfig(compute_dtype="float32", remat="none", logprob_chunk=4),
        temperature=0.7,
    )

    def laid_out() -> Any:
        def put(array: np.ndarray, sharding: Any) -> jax.Array:
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(put, jax.tree.map(np.asarray, toy_params()), policy.shardings)

    return Policy(**vars(policy) | {"initial_params": laid_out})


def everything(tree: Any) -> Any:
    """The arrays, whole, in every process."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(np.asarray, jax.jit(lambda t: t, out_shardings=everywhere)(tree))


def one_update(policy: Policy) -> dict[str, Any]:
    """Loss and gradients of several microbatches, and the parameters after AdamW."""
    optim = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
    schedule = learning_rate(optim, 1e-2, 0, 10)
    optimizer = make_optimizer(optim, schedule, decayed_params(policy))
    samples = ragged_samples()
    microbatches = pack(samples, RowShape(rows=4, tokens=30, completion_tokens=24)).microbatches
    placed = [to_device(batch, policy.mesh) for batch in microbatches]
    update = Update(policy, OBJECTIVE, optimizer, schedule)
    state = init_state(policy, policy.initial_params(), optimizer)
    before = params_sha256(state.params)
    sums = everything(update.sums(state.params, placed, totals(samples)))
    state, report = update(state, placed, totals(samples))
    return {
        "microbatches": len(placed),
        "loss": float(sums.loss),
        "grads": [leaf.tolist() for leaf in jax.tree.leaves(sums.grads)],
        "params_sha256_before": before,
        "params": [leaf.tolist() for leaf in jax.tree.leaves(everything(state.params))],
        "grad_norm": float(report["optim/grad_norm"]),
    }


def local_rewards(process: int) -> Any:
    """A reward that is as good as its host: process 1's raises on some texts, hangs on others."""

    def fair(completion: str, problem: Problem) -> float:
        if process == 1 and problem.uid == "raises":
            raise RuntimeError("only here")
        if process == 1 and problem.uid == "hangs":
            time.sleep(60)
        return float(len(completion) % 2)

    return fair


PROBLEMS = [Problem(uid, prompt=uid[:3]) for uid in ("one", "raises", "two", "hangs", "six")]


def one_rollout(policy: Policy) -> dict[str, Any]:
    """Completions of five problems, judged where they belong."""
    engine = Engine(
        ARCH,
        policy.tokenizer,
        policy.mesh,
        max_prompt=MAX_PROMPT,
        max_new=MAX_NEW,
        slots=8,
        slots_per_prompt=2,
        tokens_per_dispatch=4,
        dtype="float32",
    )
    weights = policy.for_decoding(policy.initial_params())
    config = RewardConfig(
        functions=((1.0, local_rewards(jax.process_index())),),
        workers=6,  # four of them hang
        deadline_s=100.0,
        wait_s=6.0,
    )
    with Scorer(config) as scorer:
        rollout, scores, _ = sample_and_score(
            engine, scorer, weights, PROBLEMS, 4, jax.random.key(3), temperature=1.0
        )
        report = scorer.metrics(scores)
    return {
        "tokens": [list(c.tokens) for c in rollout.completions],
        "logprobs": [c.logprobs.tolist() for c in rollout.completions],
        "reward_PG": scores.reward_PG.tolist(),
        "valid_PG": scores.valid_PG.tolist(),
        "statuses": scores.statuses["fair"],
        "crashes": report["reward/pool/crashes"],
        "compiled": engine.num_compiled(),
    }


def agreements() -> dict[str, Any]:
    """What `grpo.runtime.hosts` makes of values that differ."""
    process = jax.process_index()
    mine = {"a": np.full((2, 3), process + 0.1), "b": np.array(process, np.int32)}
    found = {name: array.tolist() for name, array in hosts.gather(mine).items()}
    found["from_main"] = hosts.from_main({"of": process, "text": "é" * 300})
    found["owned"] = [group for group in range(5) if hosts.owns(group)]
    for culprit in (1, 0):
        try:
            with hosts.together():
                if process == culprit:
                    raise OSError(f"no disk on {culprit}")
        except (hosts.HostError, OSError) as error:
            found[f"failure of {culprit}"] = f"{type(error).__name__}: {error}"
    return found


def main(out: str, port: str = "", process: str = "0") -> None:
    if port:
        hosts.start(f"127.0.0.1:{port}", 2, int(process))
    with contextlib.ExitStack() as stack:
        policy = toy_policy()
        stack.enter_context(jax.set_mesh(policy.mesh))
        found = {
            "devices": jax.device_count(),
            "agreements": agreements(),
            "rollout": one_rollout(policy),
            "update": one_update(policy),
        }
    text = json.dumps(found)
    Path(out, f"{process}.json").write_text(text)
    # Process 0 has waited for nobody yet.
    digests = hosts.gather(
        {"digest": np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)}
    )
    assert len(digests["digest"]) == jax.process_count()
    hosts.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
