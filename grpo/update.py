"""The update: gradients summed over microbatches, one AdamW step; nothing if it is not finite."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from grpo.config import OptimConfig
from grpo.loss import Maxima, Means
from grpo.model.params import Params, ParamSpec, map_table
from grpo.model.stack import Summed
from grpo.policy import Logprobs, Policy
from grpo.runtime.host_memory import return_free_pages
from grpo.sharding import in_host_memory, platform_of, propagated, replicated, specs_of
from grpo.structs import Batch, Program, Totals, TrainState


class Offload(NamedTuple):
    """What is kept in the hosts' memory while it is not needed."""

    moments: bool = False
    reference: bool = False


NO_OFFLOAD = Offload()
# (what the policy says of each token, its entropy, ...): see `grpo.policy.Logprobs`
Objective = Callable[[Any, jax.Array, Batch, Totals], tuple[jax.Array, Means, Maxima]]


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
    """True for matrices, False for norm scales and biases."""
    return map_table(lambda spec: spec.fan_in > 0, policy.table)


def init_state(
    policy: Policy,
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    keep_reference: bool = False,
    offload: Offload = NO_OFFLOAD,
) -> TrainState:
    """A state at step 0; the optimiser's moments are created sharded like their parameters."""

    def make(params: Params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            updates=zero,
            bad_updates=zero,
            cursor=zero,
            params=params,
            opt_state=optimizer.init(params),
            ref_params=jax.tree.map(jnp.copy, params) if keep_reference else None,
        )

    shardings = _shardings(
        abstract_state(policy, optimizer, keep_reference=keep_reference, offload=offload)
    )
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params)


def abstract_params(policy: Policy) -> Params:
    """Shapes and shardings of the parameters, without the parameters."""
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding),
        policy.table,
        policy.shardings,
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )


def abstract_state(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    keep_reference: bool = False,
    offload: Offload = NO_OFFLOAD,
) -> TrainState:
    """Shapes and shardings of the state: moments lie as their parameters, counters everywhere."""
    params, everywhere = abstract_params(policy), replicated(policy.mesh)

    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        place,
        jax.eval_shape(optimizer.init, params),
        in_host_memory(policy.shardings) if offload.moments else policy.shardings,
        transform_non_params=lambda leaf: place(leaf, everywhere),
    )
    return TrainState(
        step=counter,
        updates=counter,
        bad_updates=counter,
        cursor=counter,
        params=params,
        opt_state=opt_state,
        ref_params=_reference_like(policy, offload) if keep_reference else None,
    )


def _reference_like(policy: Policy, offload: Offload) -> Params:
    return jax.tree.map(
        lambda param, sharding: jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=sharding),
        abstract_params(policy),
        reference_shardings(policy, offload),
    )


def reference_shardings(policy: Policy, offload: Offload) -> dict[str, Any]:
    """Where the reference is between the times it is asked."""
    return in_host_memory(policy.shardings) if offload.reference else policy.shardings


def _shardings(state_like: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, state_like)


class Sums(struct.PyTreeNode):
    """What microbatches add up to."""

    loss: Any
    means: Any
    maxima: Any
    grads: Any


def no_sums(
    params: Params,
    base: Params,
    batch: Batch,
    totals: Totals,
    *,
    logprobs: Logprobs,
    objective: Objective,
) -> Sums:
    """What nothing adds up to: zeros, and of maxima the least."""

    def outputs(params: Params, base: Params, batch: Batch, totals: Totals) -> Any:
        return objective(*logprobs(params, base, batch), batch, totals)

    loss, means, maxima = jax.eval_shape(outputs, params, base, batch, totals)
    lowest = jax.tree.map(lambda a: jnp.full(a.shape, -jnp.inf, a.dtype), maxima)
    loss, means, grads = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (loss, means, params))
    return Sums(loss=loss, means=means, maxima=lowest, grads=grads)


def add_sums(
    sums: Sums,
    params: Params,
    base: Params,
    batch: Batch,
    totals: Totals,
    *,
    logprobs: Logprobs,
    objective: Objective,
) -> Sums:
    """`sums` and loss, metrics and gradients of one more microbatch.

    Its loss is divided by the counts of the whole minibatch beforehand, so the sum over
    microbatches is the loss: a mean of microbatch means would not be. `base` (`grpo.policy`) is
    frozen.
    """
    earlier = sums.grads

    def loss(params: Params) -> tuple[jax.Array, tuple[Means, Maxima]]:
        adding = params | {"layers": Summed(params["layers"], earlier["layers"])}
        logprobs_RC, entropy_RC = logprobs(adding, base, batch)
        # The loss knows no mesh.
        on_rows = propagated(objective, PartitionSpec())
        value, means, maxima = on_rows(logprobs_RC, entropy_RC, batch, totals)
        return value, (means, maxima)

    (value, (means, maxima)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    layers = grads.pop("layers")  # the earlier ones are in
    rest = jax.tree.map(jnp.add, {name: earlier[name] for name in grads}, grads)
    return Sums(
        loss=sums.loss + value,
        means=jax.tree.map(jnp.add, sums.means, means),
        maxima=jax.tree.map(jnp.maximum, sums.maxima, maxima),
        grads=rest | {"layers": layers},
    )


class Update:
    """(state, microbatches, totals) -> (state, metrics): one optimiser update.

    Three programs, whatever the number of microbatches: sums of nothing, one microbatch added to
    them, the optimiser. All are dispatched without waiting, but on a CPU one after another.

    Args:
      policy: gives log-probs.
      objective: the loss of a microbatch, already divided by the whole minibatch's counts.
      optimizer: optax.
      schedule: its learning rate, for the log.
      keep_reference: the state holds a reference policy.
      offload: what of the state is in the hosts' memory.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        *,
        keep_reference: bool = False,
        offload: Offload = NO_OFFLOAD,
    ):
        form: Any = {"keep_reference": keep_reference}
        self._like = abstract_state(policy, optimizer, **form, offload=offload)
        state = _shardings(self._like)
        on_device = _shardings(abstract_state(policy, optimizer, **form)).opt_state
        self._everywhere = everywhere = replicated(policy.mesh)
        sums = Sums(loss=everywhere, means=everywhere, maxima=everywhere, grads=state.params)
        self._base, self._base_like = policy.base, policy.base_like
        # On a CPU a program allocates from the process's memory, and before its turn: what the
        # rollout left free would stay, and several microbatches would have their arrays at a time.
        self._shares_memory = platform_of(policy.mesh) == "cpu"
        parts: Any = {"logprobs": policy.logprobs, "objective": objective}
        nothing = propagated(partial(no_sums, **parts), specs_of(sums))
        self._nothing: Any = jax.jit(nothing, out_shardings=sums)
        self._add: Any = jax.jit(partial(add_sums, **parts), out_shardings=sums, donate_argnums=0)
        self._apply: Any = jax.jit(
            partial(
                _apply,
                optimizer=optimizer,
                schedule=schedule,
                fetch=on_device if offload.moments else None,
            ),
            in_shardings=(state, sums),
            out_shardings=(state, everywhere),
            donate_argnums=0,
        )

    def __call__(
        self, state: TrainState, microbatches: Sequence[Batch], totals: Totals
    ) -> tuple[TrainState, dict[str, Any]]:
        """Consumes `state`. `microbatches` are on the mesh (`grpo.batch.to_device`)."""
        sums = self.sums(state.params, microbatches, totals)
        return self._apply(state, sums)

    def compile(self, batch: Batch) -> None:
        """Compiles everything, for microbatches like `batch`, and runs nothing.

        Arrays and what the compiler needs would be there at the same time, and be the peak of
        memory of the whole run.
        """
        self._nothing, self._add, self._apply = (
            program.function.lower(*program.arguments).compile() for program in self.programs(batch)
        )

    def programs(self, batch: Batch) -> list[Program]:
        """What `compile` compiles, for a microbatch that may be abstract; the optimiser last."""
        count = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._everywhere)
        totals, params = Totals(count, count), self._like.params
        given = params, self._base_like, batch, totals
        sums = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._everywhere),
            jax.eval_shape(self._nothing, *given),
        )
        sums = sums.replace(grads=params)  # their shapes and shardings
        return [
            Program("no gradients", self._nothing, given),
            Program("gradients", self._add, (sums, *given)),
            Program("optimiser", self._apply, (self._like, sums)),
        ]

    def sums(self, params: Params, microbatches: Sequence[Batch], totals: Totals) -> Sums:
        """Loss, metrics and gradients of a minibatch."""
        base = self._base()
        totals = Totals(*(np.float32(max(count, 1)) for count in totals))
        if self._shares_memory:
            return_free_pages()
        sums = self._nothing(params, base, microbatches[0], totals)
        for batch in microbatches:
            sums = self._add(sums, params, base, batch, totals)
            if self._shares_memory:
                jax.block_until_ready(sums)
        return sums

    def num_compiled(self) -> int:
        """Programs compiled so far; constant once every shape has been seen."""
        programs: Any = (self._nothing, self._add, self._apply)
        return sum(getattr(program, "_cache_size", lambda: 1)() for program in programs)


def _apply(
    state: TrainState,
    sums: Sums,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    fetch: Any,
) -> tuple[TrainState, dict[str, Any]]:
    """One step of the optimiser; `fetch` says where its state goes first, None leaves it."""
    if fetch is not None:
        state = state.replace(opt_state=jax.device_put(state.opt_state, fetch))
    norm = optax.tree.norm(sums.grads)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)

    def step(params: Params, opt_state: Any, size: jax.Array) -> tuple[Params, Any, jax.Array]:
        changes, opt_state = optimizer.update(sums.grads, opt_state, params)
        share = optax.tree.norm(changes) / size
        return optax.apply_updates(params, changes), opt_state, share

    def skip(params: Params, opt_state: Any, size: jax.Array) -> tuple[Params, Any, jax.Array]:
        return params, opt_state, jnp.zeros(())

    # A branch, not a choice between two results: both would have to exist. What is read of the old
    # parameters is read before it, or they would be copied.
    old = state.params, state.opt_state, optax.tree.norm(state.params)
    params, opt_state, param_change = jax.lax.cond(finite, step, skip, *old)
    new_state = state.replace(
        params=params,
        opt_state=opt_state,
        updates=state.updates + finite,
        bad_updates=jnp.where(finite, 0, state.bad_updates + 1),
    )
    report = {name: mean.total / jnp.maximum(mean.count, 1) for name, mean in sums.means.items()}
    report |= sums.maxima | {
        "policy/loss": sums.loss,
        "optim/grad_norm": norm,
        "optim/learning_rate": schedule(state.updates),
        "optim/skipped": 1.0 - finite,
        "optim/param_change": param_change,
    }
    return new_state, report


def make_logprobs(policy: Policy) -> Callable[[Params, Batch], jax.Array]:
    """(parameters, microbatch) -> log-probs [R, C], jitted."""
    program: Any = logprobs_program(policy)
    return lambda params, batch: program(params, policy.base(), batch)


def logprobs_program(policy: Policy) -> Any:
    """The same with the frozen base as an argument: (parameters, base, microbatch)."""

    def run(params: Params, base: Params, batch: Batch) -> jax.Array:
        return policy.logprobs(params, base, batch)[0]

    return jax.jit(run, out_shardings=replicated(policy.mesh))
