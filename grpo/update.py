"""The update: gradients summed over microbatches, one AdamW step; nothing if it is not finite."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from grpo.config import OptimConfig
from grpo.loss import Maxima, Means
from grpo.model.params import Params, ParamSpec, map_table, param_table
from grpo.policy import Logprobs, Policy
from grpo.sharding import replicated
from grpo.structs import Batch, TrainState

Objective = Callable[[jax.Array, jax.Array, Batch, jax.Array], tuple[jax.Array, Means, Maxima]]
Update = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def learning_rate(
    optim: OptimConfig, peak: float, warmup: int, total_updates: int
) -> optax.Schedule:
    """Linear warm-up to `peak`, then what `optim.decay` says, ending with the last update."""
    rest = max(total_updates - 1 - warmup, 1)  # the last update has number total_updates - 1
    after: optax.Schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * optim.end_share, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=optim.end_share),
    }[optim.decay]()
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, warmup), after], [warmup]
    )


def make_optimizer(
    optim: OptimConfig, schedule: optax.Schedule, decayed: Any
) -> optax.GradientTransformation:
    """AdamW on clipped gradients; `decayed` marks the parameters that weight decay touches."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            schedule,
            b1=optim.beta1,
            b2=optim.beta2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=decayed,
        ),
    )


def decayed_params(policy: Policy) -> dict[str, Any]:
    """True for matrices, False for norm scales."""
    return map_table(lambda spec: spec.fan_in > 0, param_table(policy.arch))


def init_state(
    policy: Policy, params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """A state at step 0; the optimiser's moments are created sharded like their parameters."""

    def make(params: Params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            updates=zero,
            bad_updates=zero,
            params=params,
            opt_state=optimizer.init(params),
        )

    shardings = _shardings(abstract_state(policy, optimizer))
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def abstract_params(policy: Policy) -> Params:
    """Shapes and shardings of the parameters, without the parameters."""
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding),
        param_table(policy.arch),
        policy.shardings,
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )


def abstract_state(policy: Policy, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and shardings of the state: moments lie as their parameters, counters everywhere."""
    params, everywhere = abstract_params(policy), replicated(policy.mesh)

    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        place,
        jax.eval_shape(optimizer.init, params),
        policy.shardings,
        transform_non_params=lambda leaf: place(leaf, everywhere),
    )
    return TrainState(
        step=counter, updates=counter, bad_updates=counter, params=params, opt_state=opt_state
    )


def _shardings(state_like: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state_like)


def make_update(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Update:
    """The only jit that donates the state: (state, batch [M, R, ...]) -> (state, metrics).

    Args:
      policy: gives log-probs.
      objective: the loss of a microbatch, already divided by the whole batch's token count.
      optimizer: optax.
      schedule: its learning rate, for the log.
    """
    shardings = _shardings(abstract_state(policy, optimizer))
    return jax.jit(
        partial(
            _update,
            logprobs=policy.logprobs,
            objective=objective,
            optimizer=optimizer,
            schedule=schedule,
        ),
        donate_argnums=0,
        out_shardings=(shardings, replicated(policy.mesh)),
    )


def accumulate(
    logprobs: Logprobs, objective: Objective, params: Params, batch: Batch
) -> tuple[jax.Array, Means, Maxima, Params]:
    """Loss, metrics and gradients, added up over the leading axis of `batch`.

    Each microbatch's loss is divided by the token count of the whole batch beforehand, so the sum
    is the loss: a mean of microbatch means would not be.
    """
    num_tokens = jnp.maximum(batch.mask_RC.sum(), 1).astype(jnp.float32)

    def loss(params: Params, micro: Batch) -> tuple[jax.Array, tuple[Means, Maxima]]:
        logprobs_RC, entropy_RC = logprobs(params, micro)
        value, means, maxima = objective(logprobs_RC, entropy_RC, micro, num_tokens)
        return value, (means, maxima)

    grad = jax.value_and_grad(loss, has_aux=True)

    def add(grads: Params, micro: Batch) -> tuple[Params, Any]:
        (value, aux), new = grad(params, micro)
        return jax.tree.map(jnp.add, grads, new), (value, aux)

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (value_M, (means_M, maxima_M)) = jax.lax.scan(add, zeros, batch)
    means, maxima = jax.tree.map(jnp.sum, means_M), jax.tree.map(jnp.max, maxima_M)
    return value_M.sum(), means, maxima, grads


def _update(
    state: TrainState,
    batch: Batch,
    *,
    logprobs: Logprobs,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, dict[str, Any]]:
    loss, means, maxima, grads = accumulate(logprobs, objective, state.params, batch)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
    changed = (optax.apply_updates(state.params, changes), opt_state)
    kept = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
    new_state = state.replace(
        params=params,
        opt_state=opt_state,
        updates=state.updates + finite,
        bad_updates=jnp.where(finite, 0, state.bad_updates + 1),
    )
    report = {name: mean.total / jnp.maximum(mean.count, 1) for name, mean in means.items()}
    report |= maxima | {
        "policy/loss": loss,
        "optim/grad_norm": norm,
        "optim/learning_rate": schedule(state.updates),
        "optim/skipped": 1.0 - finite,
    }
    return new_state, report


def make_logprobs(policy: Policy) -> Callable[[Params, Batch], jax.Array]:
    """Jitted log-probs [M, R, C] of a batch [M, R, ...], one microbatch at a time."""

    def run(params: Params, batch: Batch) -> jax.Array:
        return jax.lax.map(lambda micro: policy.logprobs(params, micro)[0], batch)

    return jax.jit(run, out_shardings=replicated(policy.mesh))
