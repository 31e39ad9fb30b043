"""From a configuration to the parts of a run: nothing is computed here, everything is checked."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from grpo import loss, runinfo
from grpo.batch import RowShape, pack, row_shape, to_device
from grpo.carry import extra_groups, nothing
from grpo.config import Config, bind, check_all_read, track_reads, validate
from grpo.curriculum import unseen
from grpo.data.prompts import usable_indices
from grpo.data.sources import ProblemSource, Slice
from grpo.data.tokenizer import Tokenizer
from grpo.engine.engine import Engine, shared_slots
from grpo.measure.held_out import Evaluator
from grpo.model.params import Params, attention_share
from grpo.policy import Policy, describe_adapters, make_policy
from grpo.runtime import hosts
from grpo.runtime.watchdog import Watchdog
from grpo.runtime.workdir import Workdir, open_workdir
from grpo.schedule import Schedule, make_schedule
from grpo.scoring import Scorer
from grpo.sharding import batch_ways, platform_of
from grpo.stages.sft import SftStage
from grpo.structs import Batch, Scores, TrainState
from grpo.update import (
    Objective,
    Offload,
    Update,
    abstract_state,
    decayed_params,
    init_state,
    learning_rate,
    make_logprobs,
    make_optimizer,
    reference_shardings,
)
from rewards.api import Problem


@dataclasses.dataclass(frozen=True)
class Learner:
    """What every run is made of that learns from what it samples.

    Attributes:
      problems: those of data.train whose prompts fit.
      state_like: shapes and shardings of the state, to restore a checkpoint into.
      new_state: initial parameters -> state at step 0.
      update: (state, microbatches, totals) -> (state, metrics).
      empty_batch: a microbatch of padding, on the mesh.
      needs_every_row: completions of zero advantage still have a gradient.
      watchdog: is told what the run does.
      folder: `workdir`, and where checkpoints go.
    """

    config: Config
    workdir: Path
    policy: Policy
    schedule: Schedule
    problems: ProblemSource
    engine: Engine
    scorer: Scorer
    evaluator: Evaluator | None
    state_like: TrainState
    new_state: Callable[[Params], TrainState]
    update: Update
    empty_batch: Batch
    needs_every_row: bool
    watchdog: Watchdog
    folder: Workdir


@dataclasses.dataclass(frozen=True)
class Run(Learner):
    """Everything a run of reinforcement learning is made of.

    Attributes:
      advantage: scores -> advantages [P, G].
      keep_reference: puts a reference where it is kept while it is not asked.
      logprobs: (params, microbatch) -> log-probs [R, C], jitted.
    """

    sft: SftStage | None
    advantage: Callable[[Scores], np.ndarray]
    keep_reference: Callable[[Params], Params]
    logprobs: Callable[[Params, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Subset:
    """The problems of `source` at `indices`."""

    source: ProblemSource
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int, /) -> Problem:
        return self.source[self.indices[i]]


def start(
    config: Config, workdir: str | Path, stack: ExitStack, *, scored: bool = True
) -> tuple[Workdir, Watchdog, Policy]:
    """What every stage begins with; the mesh and the watchdog are entered into `stack`.

    From here on the configuration remembers which of its fields are read.

    Args:
      config: what is to run.
      workdir: a folder or a gs:// address.
      stack: is left when the stage ends.
      scored: problems are asked and rewards judge what the model writes.

    Raises:
      ValueError, TypeError, HostError: as `build`.
    """
    folder = open_workdir(workdir)
    validate(config, scored=scored)
    watchdog = stack.enter_context(Watchdog(config.hosts.watch_s))
    runinfo.check_same(config, workdir)
    track_reads(config)
    _keep_programs()
    policy = make_policy(config)
    if config.lora.rank:
        hosts.say(describe_adapters(policy, config.model.base_dtype))
    stack.enter_context(jax.set_mesh(policy.mesh))
    return folder, watchdog, policy


def build(config: Config, workdir: str | Path, stack: ExitStack, baseline: Config) -> Run:
    """All parts of a run; the mesh, the watchdog and the reward workers are entered into `stack`.

    Raises:
      ValueError, TypeError: the configuration cannot work; nothing has been compiled yet.
      HostError: the processes of the run are not about to do the same.
    """
    folder, watchdog, policy = start(config, workdir, stack)
    algo, sample = config.algo, config.sample
    schedule = make_schedule(config, microbatch_shape(config, policy))
    update, optimizer, rate = make_update(config, policy, schedule)
    hosts.say(schedule.describe(rate))
    parts = sampling(config, policy, watchdog, stack)
    extra = extra_groups(algo.problems_per_step, algo.oversample)
    on_host = {
        "pass_rates": unseen(len(parts.problems)) if algo.curriculum > 1 else None,
        "carried": nothing(extra, algo.group_size, sample.max_new_tokens) if extra else None,
    }
    sft = None
    if config.sft.num_steps:
        assert config.data.train is not None  # validate() saw to it
        source = config.sft.source or config.data.train
        sft = SftStage(config, policy, source, folder)
    form = state_form(config)
    state_like = abstract_state(policy, optimizer, **form)

    def new_state(params: Params) -> TrainState:
        state = init_state(policy, params, optimizer, **form)
        return state.replace(**on_host)

    run = Run(
        config=config,
        workdir=folder.path,
        policy=policy,
        schedule=schedule,
        sft=sft,
        state_like=state_like.replace(**on_host),
        new_state=new_state,
        advantage=bind(algo.advantage, algo),
        update=update,
        keep_reference=partial(jax.device_put, device=reference_shardings(policy, form["offload"])),
        empty_batch=empty_batch(schedule, policy),
        needs_every_row=bool(algo.entropy_coef or (algo.kl_coef and not algo.kl_in_reward)),
        logprobs=make_logprobs(policy),
        watchdog=watchdog,
        folder=folder,
        **parts._asdict(),
    )
    read_by_every_loop(config)
    _read_what_the_loop_reads(config)
    check_all_read(config, baseline)
    return run


class Sampling(NamedTuple):
    """What samples and judges; see `Learner`."""

    problems: ProblemSource
    engine: Engine
    scorer: Scorer
    evaluator: Evaluator | None


def sampling(config: Config, policy: Policy, watchdog: Watchdog, stack: ExitStack) -> Sampling:
    """Problems, engine and rewards of a run; the reward workers are entered into `stack`.

    Raises:
      ValueError: there are too few problems, or none that can be used.
    """
    assert config.data.train is not None  # validate() saw to it
    algo, check = config.algo, config.data.check_reference
    max_prompt = config.data.max_prompt_tokens
    problems = usable(policy.tokenizer, config.data.train, max_prompt, check, "train")
    asked = problems_asked(config)
    if len(problems) < asked:
        extra = asked - algo.problems_per_step
        beyond = f" and {extra} more (algo.oversample)" if extra else ""
        raise ValueError(
            f"algo.problems_per_step is {algo.problems_per_step}{beyond}, but data.train has only "
            f"{len(problems)} usable problems"
        )
    considered = asked * max(algo.curriculum, 1)
    if considered > len(problems):
        raise ValueError(
            f"algo.curriculum ({algo.curriculum}) x problems_per_step ({asked}) "
            f"= {considered} problems to choose from, but data.train has only {len(problems)} "
            "usable ones; lower one of the two"
        )
    engine = make_engine(config, policy)
    scorer = stack.enter_context(Scorer(config.reward, watchdog.waits_for))
    evaluator = _evaluator(config, policy, engine, scorer) if config.eval.every else None
    return Sampling(problems, engine, scorer, evaluator)


def empty_batch(schedule: Schedule, policy: Policy) -> Batch:
    """A microbatch of padding, on the mesh."""
    return to_device(pack([], schedule.row_shape).microbatches[0], policy.mesh)


# ---- what follows from a configuration and a policy, for the run and for its plan --------------


def microbatch_shape(config: Config, policy: Policy) -> RowShape:
    """Of every microbatch of the run."""
    algo, experts = config.algo, policy.arch.experts
    return row_shape(
        max_prompt=config.data.max_prompt_tokens,
        max_new=config.sample.max_new_tokens,
        group_size=algo.group_size,
        samples=algo.problems_per_step * algo.group_size // algo.minibatches,
        microbatch_tokens=algo.microbatch_tokens,
        ways=batch_ways(policy.mesh),
        attention_share=attention_share(policy.arch, platform_of(policy.mesh)),
        routed=(policy.arch.routed_layers, experts.per_token) if experts else None,
    )


def problems_asked(config: Config) -> int:
    """Groups under way in a step."""
    algo = config.algo
    return algo.problems_per_step + extra_groups(algo.problems_per_step, algo.oversample)


def state_form(config: Config) -> dict[str, Any]:
    """Arguments of `grpo.update` that say what the state holds, and where."""
    algo = config.algo
    return {
        "keep_reference": bool(algo.kl_coef and algo.ref_every),
        "offload": Offload(
            moments=config.optim.offload, reference=bool(algo.kl_coef and algo.ref_offload)
        ),
    }


def make_engine(config: Config, policy: Policy, **changes: Any) -> Engine:
    """The engine of the run, with `changes` to its arguments; nothing is compiled yet."""
    groups, algo = problems_asked(config), config.algo
    goes_on = {"goes_on": groups > algo.problems_per_step}
    return engine_for(config, policy, groups, algo.group_size, **goes_on | changes)


def engine_for(
    config: Config, policy: Policy, groups: int, group_size: int, **changes: Any
) -> Engine:
    """An engine for `groups` problems at a time, of which `group_size` completions are wanted.

    With `goes_on` among the changes completions may be begun in one rollout and end in another.
    """
    sample = config.sample
    arguments: dict[str, Any] = {
        "max_prompt": config.data.max_prompt_tokens,
        "max_new": sample.max_new_tokens,
        "slots": sample.slots,
        "slots_per_prompt": sample.slots_per_prompt
        or shared_slots(
            sample.slots,
            batch_ways(policy.mesh),
            group_size,
            groups * group_size,
        ),
        "tokens_per_dispatch": sample.tokens_per_dispatch,
        "dtype": "int8" if sample.cache == "int8" else config.model.compute_dtype,
        "stop_strings": sample.stop_strings,
        "tail_slots": sample.tail_slots,
        "draft_tokens": sample.draft_tokens,
    }
    return Engine(policy.arch, policy.tokenizer, policy.mesh, **arguments | changes)


def make_update(
    config: Config, policy: Policy, schedule: Schedule
) -> tuple[Update, optax.GradientTransformation, optax.Schedule]:
    """The update of the run, its optimiser and its learning rate; nothing is compiled yet."""
    optim = config.optim
    rate = learning_rate(optim, optim.learning_rate, optim.warmup_updates, schedule.updates)
    optimizer = make_optimizer(optim, rate, decayed_params(policy))
    update = Update(
        policy,
        _objective(config, schedule.on_policy),
        optimizer,
        rate,
        **state_form(config),
    )
    return update, optimizer, rate


def _keep_programs() -> None:
    """Compiled programs are kept on disk: a run that starts again does not wait for the compiler.

    Where `JAX_COMPILATION_CACHE_DIR` says, by default in ~/.cache/grpo/programs; on a CPU only if
    it says so, since such programs are made for one kind of CPU and a home may be shared.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and jax.default_backend() != "cpu":
        folder = Path.home() / ".cache" / "grpo" / "programs"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _objective(config: Config, on_policy: bool) -> Objective:
    """The loss that `config.algo` puts together."""
    algo = config.algo
    quantised = "int8" in (config.sample.weights, config.sample.cache)
    exact = on_policy and not algo.oversample and not quantised
    corrected = algo.correction or (loss.uncorrected if exact else loss.truncated)
    return partial(
        loss.grpo_loss,
        objective=bind(algo.objective, algo),
        aggregate=bind(algo.aggregate, algo, config.sample),
        correction=bind(corrected, algo),
        kl=algo.kl,
        kl_coef=0.0 if algo.kl_in_reward else algo.kl_coef,
        entropy_coef=algo.entropy_coef,
        on_policy=on_policy,
    )


def read_by_every_loop(config: Config) -> None:
    """Touches the fields that any loop over rollouts looks at, always, while it runs."""
    _ = config.hosts.watch_s
    _ = config.log.save_every, config.log.keep_checkpoints, config.log.rollouts_every
    if config.reward.gold_check:
        _ = config.reward.gold_format


def _read_what_the_loop_reads(config: Config) -> None:
    """Touches the fields that the loop of reinforcement learning looks at besides."""
    algo = config.algo
    _ = algo.passes, algo.mask_truncated, algo.kl_in_reward, algo.dynamic_rounds, algo.curriculum
    if algo.kl_coef:
        _ = algo.ref_every
    if algo.overlong_buffer_tokens:
        _ = algo.overlong_penalty
    for field in dataclasses.fields(config.gates):
        getattr(config.gates, field.name)


def _evaluator(config: Config, policy: Policy, engine: Engine, scorer: Scorer) -> Evaluator:
    assert config.data.held_out is not None  # validate() saw to it
    first = Slice(source=config.data.held_out, start=0, stop=config.eval.num_problems)
    check = config.data.check_reference
    source = usable(policy.tokenizer, first, engine.max_prompt, check, "held-out")
    evaluator = Evaluator(
        engine, scorer, source, config.eval, config.sample.temperature, config.seed
    )
    if evaluator.temperature == 0 and evaluator.num_samples > 1:
        hosts.say(
            f"eval.temperature is 0: the {evaluator.num_samples} samples of a held-out problem "
            "will be the same text; eval.num_samples=1 measures as much"
        )
    return evaluator


def usable(
    tokenizer: Tokenizer,
    source: ProblemSource,
    max_prompt: int,
    check_reference: Callable[[Any], str | None] | None,
    name: str,
) -> Subset:
    """The problems whose prompts fit and whose references can be read; tells what was dropped."""
    indices, dropped = usable_indices(
        tokenizer, source, max_prompt, lambda n, of: hosts.say(f"reading {name} problems {n}/{of}")
    )
    notes = [f"{dropped} dropped, their prompts exceed {max_prompt} tokens"] if dropped else []
    if check_reference is not None:
        faults = {i: check_reference(source[i].reference) for i in indices}
        bad = [i for i in indices if faults[i] is not None]
        if bad:
            first = source[bad[0]]
            notes.append(
                f"{len(bad)} dropped for their references; the first, {first.uid!r}: "
                f"{first.reference!r}: {faults[bad[0]]}"
            )
            indices = [i for i in indices if faults[i] is None]
        if not indices:
            raise ValueError(f"none of the {name} problems is usable: {'; '.join(notes)}")
    hosts.say("; ".join([f"{name} problems: {len(indices)}", *notes]))
    return Subset(source, indices)
