"""On-policy distillation: the policy writes, and learns at every token what a teacher would write.

    python -m grpo.stages.distil --config=experiments/x.py --workdir=DIR

The student (`config.model`) samples completions of `config.data.train`; a divergence between its
distribution and the teacher's (`config.distil`) is made small at every token of them. So it learns
on texts of its own, where it will have to find its way, and gets a signal a token instead of one a
completion. Rewards are only logged, and may be left out. DIR holds what `grpo.train` leaves.

Source: GKD, arXiv:2306.13649, algorithm 1 with all data from the student; MiniLLM,
  arXiv:2306.08543; Thinking Machines, "On-Policy Distillation" (2025).
"""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import numpy as np

from grpo import gates
from grpo.ask import hand_over
from grpo.build import Learner, empty_batch, microbatch_shape, read_by_every_loop, sampling, start
from grpo.config import Config, bind, check_all_read
from grpo.data.order import draw
from grpo.learn import samples_of, update
from grpo.loop import (
    AGREED,
    begin,
    conclude,
    end,
    evaluate_if_due,
    restore_or_start,
    save_if_due,
    saving_first,
)
from grpo.loss import distil_loss
from grpo.metrics import DISTIL_COLUMNS, ConsoleTable, JsonlWriter, MetricLog
from grpo.model.params import Params
from grpo.rollout import readable_rows, sample_and_score
from grpo.runtime import hosts
from grpo.runtime.host_memory import resident_gib, return_free_pages
from grpo.runtime.signals import StopSignal
from grpo.runtime.watchdog import telling
from grpo.schedule import make_schedule
from grpo.source import open_source
from grpo.structs import Rollout, Scores, TrainState
from grpo.teacher import describe_teacher, make_teacher, taught
from grpo.update import (
    Offload,
    Update,
    abstract_state,
    decayed_params,
    init_state,
    learning_rate,
    make_optimizer,
)

# Of the others, some look at rewards and advantages, and those of what is sampled stop a run whose
# texts are poor: here that is how a student begins, and what the teacher mends.
GATES = (
    gates.not_finite,
    gates.wide_gap,
    gates.wide_gap_once,
    gates.sampler_divergence,
    gates.leaping_policy,
)


def distil(config: Config, workdir: str | Path, baseline: Config | None = None) -> TrainState:
    """Distils a teacher into the policy, from the beginning or from where it was stopped.

    Args:
      config: what to run; `distil.teacher` must be set.
      workdir: a folder or a gs:// address.
      baseline: as in `grpo.train.train`.

    Returns:
      The final state, of the student.

    Raises:
      ValueError, TypeError: a configuration that cannot work, or a teacher of another tokenizer.
      RewardFailure: rewards that do not fit the problems.
      GateError: going on is not worth it (grpo/gates.py); the state so far is saved.
      HostError: the run has several processes, and one of them cannot go on.
    """
    with ExitStack() as stack:
        stack.enter_context(telling(AGREED))
        stop = stack.enter_context(StopSignal())
        run = build_distillation(config, workdir, stack, baseline or Config())
        phase = run.watchdog.phase
        checkpoints = begin(run, stack)
        state = restore_or_start(run, checkpoints, run.policy.initial_params)
        first = int(state.step)
        phase("reading the teacher, compiling")
        run.engine.compile(run.policy.for_decoding(state.params))
        run.update.compile(run.empty_batch)
        return_free_pages()
        log = stack.enter_context(MetricLog(run.workdir, resume_step=first))
        texts = None
        if hosts.is_main():
            path = run.workdir / "rollouts.jsonl"
            texts = stack.enter_context(JsonlWriter(path, resume_step=first))
        table = ConsoleTable(DISTIL_COLUMNS, config.num_steps)
        watch = gates.Watch(config.gates, run.workdir)

        for step in range(first, config.num_steps):
            metrics, started = evaluate_if_due(run, state, step), time.monotonic()

            # 1. The student writes G completions of each of P problems.
            phase(f"step {step}: sampling")
            rollout, scores, cursor, report = write(run, state, step)
            metrics |= report | run.scorer.metrics(scores)
            every = config.log.rollouts_every
            if texts is not None and every and step % every == 0:
                for row in readable_rows(step, rollout, scores, run.policy.tokenizer):
                    texts.write(row)

            # 2. The teacher reads them, and the student follows: one update, on-policy.
            phase(f"step {step}: update")
            updating = time.monotonic()
            all_train_B = np.ones(len(rollout.completions), np.bool_)
            state, found = update(run, state, samples_of(rollout, all_train_B))
            moved = cursor - int(state.cursor)
            state = state.replace(step=state.step + 1, cursor=state.cursor + moved)

            metrics |= {name: float(value) for name, value in found.items()}
            metrics |= run.policy.change(state.params) | resident_gib()
            metrics["optim/bad_updates"] = int(state.bad_updates)
            metrics["time/update_s"] = time.monotonic() - updating
            metrics["time/step_s"] = time.monotonic() - started
            metrics["engine/compiled"] = run.engine.num_compiled() + run.update.num_compiled()
            evidence = partial(gates.evidence_rows, step, rollout, scores, run.policy.tokenizer)
            watch.look(GATES, step, metrics, scores, evidence)
            log.log(step, metrics)
            table.row(step, metrics)
            with saving_first(checkpoints, state):
                watch.stop()
            save_if_due(run, checkpoints, state, stop)
        end(run, checkpoints, state, log)
    conclude(run, state)
    return state


def write(
    run: Learner, state: TrainState, step: int
) -> tuple[Rollout, Scores, int, dict[str, float]]:
    """The completions of `step`, their scores, the cursor behind their problems, and metrics."""
    algo, seed = run.config.algo, run.config.seed
    rows, cursor = draw(len(run.problems), int(state.cursor), algo.problems_per_step, seed)
    weights, handover = hand_over(run.policy, state.params)
    key = jax.random.fold_in(jax.random.key(seed), step)
    rollout, scores, metrics = sample_and_score(
        run.engine,
        run.scorer,
        weights,
        [run.problems[i] for i in rows],
        algo.group_size,
        jax.random.fold_in(key, 0),  # as the only round of grpo.ask
        temperature=run.config.sample.temperature,
    )
    return rollout, scores, cursor, metrics | handover


def build_distillation(
    config: Config, workdir: str | Path, stack: ExitStack, baseline: Config
) -> Learner:
    """All parts of the stage; `stack` gets what `grpo.build.build` enters into it.

    Raises:
      ValueError, TypeError, HostError: as `distil`; nothing has been compiled yet.
    """
    folder, watchdog, policy = start(config, workdir, stack, scored=False)
    _check(config)
    schedule = make_schedule(config, microbatch_shape(config, policy))
    source = open_source(config.distil.teacher)
    teacher = make_teacher(source, policy, config.model)
    hosts.say(describe_teacher(source, teacher, config.model.compute_dtype))
    optim = config.optim
    rate = learning_rate(optim, optim.learning_rate, optim.warmup_updates, schedule.updates)
    optimizer = make_optimizer(optim, rate, decayed_params(policy))
    offload = Offload(moments=optim.offload)
    both = taught(
        policy,
        teacher,
        bind(config.distil.divergence, config.distil),
        temperature=config.sample.temperature,
        chunk=config.model.logprob_chunk,
    )
    hosts.say(schedule.describe(rate))
    parts = sampling(config, policy, watchdog, stack)

    def new_state(params: Params) -> TrainState:
        return init_state(policy, params, optimizer, offload=offload)

    run = Learner(
        config=config,
        workdir=folder.path,
        policy=policy,
        schedule=schedule,
        state_like=abstract_state(policy, optimizer, offload=offload),
        new_state=new_state,
        update=Update(both, distil_loss, optimizer, rate, offload=offload),
        empty_batch=empty_batch(schedule, policy),
        needs_every_row=True,
        watchdog=watchdog,
        folder=folder,
        **parts._asdict(),
    )
    read_by_every_loop(config)
    _read_by_gates(config)
    check_all_read(config, baseline)
    return run


def _check(config: Config) -> None:
    """Raises ValueError for what is missing, and for what the stage cannot do."""
    if not config.distil.teacher:
        raise ValueError("distil.teacher is not set: there is nobody to learn from")
    if config.data.train is None:
        raise ValueError("data.train is not set: there is nothing to ask")
    if config.eval.every and not config.reward.functions:
        raise ValueError("eval.every is set, but reward.functions is empty: nothing tells right")
    algo = config.algo
    for name, off in (("minibatches", 1), ("passes", 1), ("oversample", 0), ("curriculum", 1)):
        value = getattr(algo, name)
        if value > off:
            raise ValueError(
                f"algo.{name} is {value}, but distillation makes one update of each rollout, of "
                f"problems in their order; set it to {off}"
            )


def _read_by_gates(config: Config) -> None:
    """Touches the bounds of `GATES`."""
    bounds = config.gates
    _ = bounds.max_bad_updates, bounds.max_gap_nats_mean, bounds.max_gap_nats_max
    _ = bounds.max_sampler_kl_nats, bounds.max_param_change


if __name__ == "__main__":
    from grpo.launch import main

    main(distil)
