"""What all loops over rollouts do alike: begin, measure, save, end."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from grpo import gates, runinfo
from grpo.build import Learner
from grpo.checkpoint import Checkpoints, params_sha256
from grpo.metrics import MetricLog
from grpo.model.params import Params
from grpo.report import report_run
from grpo.runtime import hosts
from grpo.runtime.signals import StopSignal
from grpo.scoring import check_rewards
from grpo.structs import TrainState

# What ends a run everywhere: it follows from what all processes know.
AGREED = (gates.GateError, FloatingPointError)


def begin(run: Learner, stack: ExitStack) -> Checkpoints:
    """Writes down what is run, checks its rewards and opens its checkpoints.

    Raises:
      RewardFailure: rewards that do not fit the problems.
    """
    run.folder.pull()
    stack.callback(run.folder.push)
    runinfo.write(run.config, run.workdir)
    if run.config.reward.functions:
        check_rewards(run.scorer, run.problems, run.config.reward)
    run.watchdog.phase("opening the checkpoints")
    folder = run.folder.saves / "checkpoints"
    return stack.enter_context(Checkpoints(folder, run.config.log.keep_checkpoints))


def save_if_due(
    run: Learner, checkpoints: Checkpoints, state: TrainState, stop: StopSignal
) -> None:
    """After a step: saves every so many, and where the program is asked to stop leaves it."""
    step = int(state.step)
    run.watchdog.phase(f"step {step - 1}: saving")
    stopping = stop.requested()
    if step % run.config.log.save_every == 0 or stopping:
        run.folder.push()
        checkpoints.save(state)
    if stopping:
        checkpoints.wait()
        stop.leave(step)


def end(run: Learner, checkpoints: Checkpoints, state: TrainState, log: MetricLog) -> None:
    """After the last step: saves, and evaluates."""
    run.folder.push()
    checkpoints.save(state)
    final = evaluate_if_due(run, state, run.config.num_steps)
    if final:
        log.log(run.config.num_steps, final)
    checkpoints.wait()


def conclude(
    run: Learner, state: TrainState, last_words: Callable[[Path], str] | None = None
) -> None:
    """result.json, curves and tables; `last_words` of the workdir are printed with them."""
    digest = params_sha256(state.params)
    runinfo.write_result(run.workdir, params_sha256=digest, steps=int(state.step))
    if hosts.is_main():
        report_run(run.workdir)
        if last_words is not None:
            print(last_words(run.workdir))
        print(f"params_sha256 {digest}")
        run.folder.push()


def evaluate_if_due(run: Learner, state: TrainState, step: int) -> dict[str, float]:
    """Held-out metrics of the parameters after `step` rollouts, every so many and at the end."""
    due = run.evaluator and (step % run.config.eval.every == 0 or step == run.config.num_steps)
    if not run.evaluator or not due:
        return {}
    run.watchdog.phase(f"evaluation after {step} steps")
    weights = run.policy.for_decoding(state.params)
    metrics = run.evaluator(weights, step, run.workdir / "evaluations")
    low, high = metrics["eval/pass_at_1_low"], metrics["eval/pass_at_1_high"]
    hosts.say(
        f"held-out after {step} steps: pass@1 {metrics['eval/pass_at_1']:.3f} "
        f"[{low:.3f}, {high:.3f}] on {len(run.evaluator.problems)} problems"
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


def restore_or_start(
    run: Learner, checkpoints: Checkpoints, params: Callable[[], Params]
) -> TrainState:
    """The newest saved state, or else a new one of `params()`."""
    state = checkpoints.restore(run.state_like)
    if state is not None:
        hosts.say(f"resuming after step {int(state.step)} of {run.config.num_steps}")
        return state
    return run.new_state(params())
