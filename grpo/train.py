"""GRPO on one screen (arXiv:2402.03300, Algorithm 1; no critic anywhere).

P problems a step, G completions each, B = P * G rows; row b belongs to problem b // G.
"""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from grpo import diagnose, gates
from grpo.ask import ask
from grpo.build import Run, build
from grpo.config import Config
from grpo.learn import learn, shaped
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
from grpo.metrics import GRPO_COLUMNS, ConsoleTable, JsonlWriter, MetricLog
from grpo.model.params import Params
from grpo.rollout import readable_rows
from grpo.runtime import hosts
from grpo.runtime.host_memory import resident_gib, return_free_pages
from grpo.runtime.signals import StopSignal
from grpo.runtime.watchdog import telling
from grpo.structs import TrainState


def train(config: Config, workdir: str | Path, baseline: Config | None = None) -> TrainState:
    """Runs an experiment, or goes on with it if `workdir` holds its checkpoints.

    Args:
      config: what to run; read, never changed.
      workdir: checkpoints, metrics, rollouts and pictures go here; a folder or a gs:// address
        (grpo/runtime/workdir.py).
      baseline: what `config` was before the user changed it; a changed field that the run never
        reads is an error. By default the defaults of `Config`.

    Returns:
      The final state.

    Raises:
      ValueError, TypeError: a configuration that cannot work; the message says why.
      RewardFailure: rewards that do not fit the problems.
      GateError: going on is not worth it (grpo/gates.py); the state so far is saved.
      FloatingPointError: too many updates in a row of the cold start were not finite.
      HostError: the run has several processes, and one of them cannot go on.
    """
    with ExitStack() as stack:
        stack.enter_context(telling(AGREED))
        stop = stack.enter_context(StopSignal())
        run = build(config, workdir, stack, baseline or Config())
        workdir, phase = run.workdir, run.watchdog.phase
        checkpoints = begin(run, stack)
        state = restore_or_start(run, checkpoints, lambda: starting_params(run, stop))
        algo, first = config.algo, int(state.step)
        # A reference that is renewed is part of the state.
        fixed = algo.kl_coef and not algo.ref_every
        ref_params = run.keep_reference(starting_params(run, stop)) if fixed else None
        phase("compiling")
        run.engine.compile(run.policy.for_decoding(state.params))
        run.update.compile(run.empty_batch)
        return_free_pages()
        log = stack.enter_context(MetricLog(workdir, resume_step=first))
        texts = None
        if hosts.is_main():
            texts = stack.enter_context(JsonlWriter(workdir / "rollouts.jsonl", resume_step=first))
        table = ConsoleTable(GRPO_COLUMNS, config.num_steps)
        watch = gates.Watch(config.gates, workdir)

        for step in range(first, config.num_steps):
            metrics, started = evaluate_if_due(run, state, step), time.monotonic()

            # 1. Ask P problems, sample G completions of each, and score every one as it ends. The
            # current policy is pi_old for the rest of this step.
            phase(f"step {step}: sampling")
            asked = ask(run, state, step)
            rollout, scores = asked.rollout, shaped(run, asked.rollout, asked.scores)
            metrics |= asked.metrics | run.scorer.metrics(scores)
            every = config.log.rollouts_every
            if texts is not None and every and step % every == 0:
                for row in readable_rows(step, rollout, scores, run.policy.tokenizer):
                    texts.write(row)
            metrics |= gates.degeneration(rollout, run.scorer.solved_PG(scores))
            evidence = partial(gates.evidence_rows, step, rollout, scores, run.policy.tokenizer)
            watch.look(gates.ROLLOUT_GATES, step, metrics, scores, evidence)
            with saving_first(checkpoints, state):
                watch.stop()

            # 2. Compare each completion with its group, and 3. make a few updates with that.
            phase(f"step {step}: update")
            updating = time.monotonic()
            learner = state.replace(pass_rates=None, carried=None)  # which stay on the host
            state, report = learn(run, learner, ref_params, rollout, scores)
            state = asked.noted(state.replace(step=state.step + 1))
            if state.ref_params is not None and (step + 1) % algo.ref_every == 0:
                copy = jax.tree.map(jnp.copy, state.params)
                state = state.replace(ref_params=run.keep_reference(copy))

            metrics |= report | run.policy.change(state.params)
            metrics["optim/bad_updates"] = int(state.bad_updates)
            metrics["time/update_s"] = time.monotonic() - updating
            metrics["time/step_s"] = time.monotonic() - started
            metrics |= resident_gib()
            metrics["engine/compiled"] = run.engine.num_compiled() + run.update.num_compiled()
            watch.look(gates.UPDATE_GATES, step, metrics, scores, evidence)
            log.log(step, metrics)
            table.row(step, metrics)
            with saving_first(checkpoints, state):
                watch.stop()
            save_if_due(run, checkpoints, state, stop)
        end(run, checkpoints, state, log)
    conclude(run, state, diagnose.brief)
    return state


def starting_params(run: Run, stop: StopSignal) -> Params:
    """What reinforcement learning starts from, and is held to by the KL: after any cold start.

    A cold start that is over is not repeated; it left its own checkpoint.
    """
    params = run.policy.initial_params()
    return params if run.sft is None else run.sft.run(params, stop, run.watchdog).params
