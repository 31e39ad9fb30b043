"""GRPO on one screen (arXiv:2402.03300, Algorithm 1; no critic anywhere).

P problems a step, G completions each, B = P * G rows; row b belongs to problem b // G.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np

from grpo import diagnose, gates, runinfo
from grpo.advantage import group_advantage, has_signal
from grpo.batch import make_batch, minibatches, to_device
from grpo.build import Run, build
from grpo.checkpoint import Checkpoints, params_sha256
from grpo.config import Config
from grpo.data.order import problems_for_step
from grpo.metrics import GRPO_COLUMNS, ConsoleTable, JsonlWriter, MetricLog
from grpo.model.params import Params
from grpo.report import report_run
from grpo.rollout import readable_rows, sample_and_score
from grpo.scoring import check_gold
from grpo.signals import StopSignal
from grpo.structs import Rollout, Scores, TrainState


def train(config: Config, workdir: str | Path, baseline: Config | None = None) -> TrainState:
    """Runs an experiment, or goes on with it if `workdir` holds its checkpoints.

    Args:
      config: what to run; read, never changed.
      workdir: checkpoints, metrics, rollouts and pictures go here.
      baseline: what `config` was before the user changed it; a changed field that the run never
        reads is an error. By default the defaults of `Config`.

    Returns:
      The final state.

    Raises:
      ValueError, TypeError: a configuration that cannot work; the message says why.
      RewardFailure: rewards that do not fit the problems.
      GateError: going on is not worth it (grpo/gates.py); the state so far is saved.
      FloatingPointError: too many updates in a row of the cold start were not finite.
    """
    workdir = Path(workdir)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        run = build(config, workdir, stack, baseline or Config())
        config = run.config
        runinfo.write(config, workdir)
        if config.reward.gold_check:
            reward = config.reward
            print(check_gold(run.scorer, run.problems, reward.gold_format, reward.gold_check))
        checkpoints = Checkpoints(workdir / "checkpoints", config.log.keep_checkpoints)
        stack.callback(checkpoints.close)
        state = restore_or_start(run, checkpoints, stop)
        ref_params = starting_params(run, stop) if config.algo.kl_coef else None
        first = int(state.step)
        log = stack.enter_context(MetricLog(workdir, resume_step=first))
        texts = stack.enter_context(JsonlWriter(workdir / "rollouts.jsonl", resume_step=first))
        table = ConsoleTable(GRPO_COLUMNS, config.num_steps)
        watch = gates.Watch(config.gates, workdir)

        for step in range(first, config.num_steps):
            metrics, started = evaluate_if_due(run, state, step), time.monotonic()

            # 1. Ask: P problems, the same for anyone who knows (seed, step).
            algo = config.algo
            rows = problems_for_step(len(run.problems), step, algo.problems_per_step, config.seed)
            asked = [run.problems[i] for i in rows]

            # 2. Sample G completions of each, and 3. score every one as it ends. The current
            # policy is pi_old for the rest of this step.
            weights = run.policy.for_decoding(state.params)
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            temperature = config.sample.temperature
            rollout, scores, timing = sample_and_score(
                run.engine,
                run.scorer,
                weights,
                asked,
                algo.group_size,
                key,
                temperature=temperature,
            )
            del weights
            if config.log.rollouts_every and step % config.log.rollouts_every == 0:
                for row in readable_rows(step, rollout, scores, run.policy.tokenizer):
                    texts.write(row)
            metrics |= timing | run.scorer.metrics(scores)
            metrics |= gates.degeneration(rollout, run.scorer.solved_PG(scores))
            evidence = partial(gates.evidence_rows, step, rollout, scores, run.policy.tokenizer)
            watch.look(gates.ROLLOUT_GATES, step, metrics, scores, evidence)
            with saving_first(checkpoints, state):
                watch.stop()

            # 4. Compare: A = (r - mean_G r) / std_G r. The group is the baseline.
            advantage_PG = np.asarray(
                group_advantage(scores.reward_PG, scores.valid_PG, scale_by_std=algo.scale_by_std)
            )

            # 5. Update: a few clipped steps on this rollout, then throw it away.
            updating = time.monotonic()
            state, report = update_on(run, state, ref_params, rollout, scores, advantage_PG)
            state = state.replace(step=state.step + 1)

            metrics |= report
            metrics["optim/bad_updates"] = int(state.bad_updates)
            metrics["groups/signal"] = float(has_signal(scores.reward_PG, scores.valid_PG).mean())
            metrics["time/update_s"] = time.monotonic() - updating
            metrics["time/step_s"] = time.monotonic() - started
            metrics["engine/compiled"] = run.engine.num_compiled()
            watch.look(gates.UPDATE_GATES, step, metrics, scores, evidence)
            log.log(step, metrics)
            table.row(step, metrics)
            with saving_first(checkpoints, state):
                watch.stop()
            if (step + 1) % config.log.save_every == 0 or stop.requested:
                checkpoints.save(state)
            if stop.requested:
                checkpoints.wait()
                stop.leave(step + 1)

        checkpoints.save(state)
        final = evaluate_if_due(run, state, config.num_steps)
        if final:
            log.log(config.num_steps, final)
        checkpoints.wait()
    digest = params_sha256(state.params)
    runinfo.write_result(workdir, params_sha256=digest, steps=int(state.step))
    report_run(workdir)
    print(diagnose.brief(workdir))
    print(f"params_sha256 {digest}")
    return state


def update_on(
    run: Run,
    state: TrainState,
    ref_params: Params | None,
    rollout: Rollout,
    scores: Scores,
    advantage_PG: np.ndarray,
) -> tuple[TrainState, dict[str, float]]:
    """One optimiser update a minibatch; metrics are means over them, the gap their largest."""
    config, mesh = run.config, run.policy.mesh
    micro = run.schedule.microbatch_rows
    batch = make_batch(
        rollout,
        advantage_PG,
        scores.valid_PG,
        max_prompt=run.engine.max_prompt,
        max_new=run.engine.max_new,
    )

    def recomputed(params: Params) -> np.ndarray:
        logprobs_MRC = run.logprobs(params, to_device(batch, micro, mesh))
        return np.asarray(logprobs_MRC).reshape(batch.mask_RC.shape)

    if config.algo.minibatches > 1:
        batch = batch.replace(old_logprobs_RC=recomputed(state.params))
    if ref_params is not None:
        batch = batch.replace(ref_logprobs_RC=recomputed(ref_params))
    reports = []
    for part in minibatches(batch, config.algo.minibatches, config.seed, int(state.step)):
        state, report = run.update(state, to_device(part, micro, mesh))
        if report["optim/skipped"]:
            runinfo.dump_batch(run.workdir, int(state.step), part)
        reports.append({name: float(value) for name, value in report.items()})
    largest = {"sampler/gap_nats_max": max(r["sampler/gap_nats_max"] for r in reports)}
    return state, {n: float(np.mean([r[n] for r in reports])) for n in reports[0]} | largest


def evaluate_if_due(run: Run, state: TrainState, step: int) -> dict[str, float]:
    """Held-out metrics of the parameters after `step` rollouts, every so many and at the end."""
    due = run.evaluator and (step % run.config.eval.every == 0 or step == run.config.num_steps)
    if not run.evaluator or not due:
        return {}
    weights = run.policy.for_decoding(state.params)
    metrics = run.evaluator(weights, step, run.workdir / "evaluations")
    low, high = metrics["eval/pass_at_1_low"], metrics["eval/pass_at_1_high"]
    print(
        f"held-out after {step} steps: pass@1 {metrics['eval/pass_at_1']:.3f} "
        f"[{low:.3f}, {high:.3f}] on {len(run.evaluator.problems)} problems",
        flush=True,
    )
    return metrics


@contextmanager
def saving_first(checkpoints: Checkpoints, state: TrainState) -> Iterator[None]:
    """For gates, which may end the run: what was earned so far is saved before they do."""
    try:
        yield
    except gates.GateError:
        checkpoints.save(state)
        checkpoints.wait()
        raise


def restore_or_start(run: Run, checkpoints: Checkpoints, stop: StopSignal) -> TrainState:
    """The newest saved state, or else a new one."""
    state = checkpoints.restore(run.state_like)
    if state is not None:
        print(f"resuming after step {int(state.step)} of {run.config.num_steps}", flush=True)
        return state
    return run.new_state(starting_params(run, stop))


def starting_params(run: Run, stop: StopSignal) -> Params:
    """What reinforcement learning starts from, and is held to by the KL: after any cold start.

    A cold start that is over is not repeated; it left its own checkpoint.
    """
    params = run.policy.initial_params()
    return run.sft.run(params, stop) if run.sft is not None else params
