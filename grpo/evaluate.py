"""Measure a trained model, alone.

    python -m grpo.evaluate --config=experiments/x.py --workdir=DIR

evaluates the newest checkpoint of DIR on the experiment's held-out problems (the initial model if
there is no checkpoint), prints a table and writes DIR/evaluation.json.

    python -m grpo.evaluate --config=experiments/x.py --workdir=DIR --budget=8,16,32,64

also measures what it does with more or less computation: accuracy against the tokens spent on a
problem, by majority vote and best of k (k up to --config.eval.num_samples), and by thoughts cut at,
or drawn out to, each budget (grpo/measure/forcing.py). The model that the run started from is
measured beside it. Prints a table and writes DIR/budget.json, DIR/budget.png, and the completions
to DIR/budget/.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from absl import flags

from grpo.build import Run, build, make_engine
from grpo.checkpoint import Checkpoints
from grpo.config import Config
from grpo.engine.engine import Engine
from grpo.measure.compute_curves import Curves, measure, write_curves
from grpo.measure.forcing import BudgetSettings, Forcer
from grpo.model.params import Params
from grpo.runinfo import write_json
from grpo.runtime import hosts
from grpo.runtime.signals import StopSignal
from grpo.runtime.watchdog import telling
from grpo.train import starting_params


def evaluate(
    config: Config,
    workdir: str | Path,
    baseline: Config | None = None,
    settings: BudgetSettings | None = None,
) -> dict[str, float]:
    """`eval/...` metrics of what `workdir` holds; with `settings` its budgets are measured too.

    Raises:
      ValueError: the configuration has no held-out problems, or cannot work; or `settings` do not
        fit the model or what is there.
    """
    if config.data.held_out is None:
        raise ValueError("data.held_out is not set: there is nothing to measure on")
    config.eval.every = config.eval.every or 1
    with ExitStack() as stack:
        stack.enter_context(telling(()))
        run = build(config, workdir, stack, baseline or Config())
        workdir, evaluator = run.workdir, run.evaluator
        assert evaluator is not None  # eval.every is set
        forcer = _forcer(run, settings) if settings is not None else None
        run.folder.pull()
        params, step = _newest(run)
        if settings is not None and settings.before and step is None:
            raise ValueError(
                f"--before is set, but {workdir} has no checkpoint: there is no model after the "
                "one the run starts from. Leave it out, or name the --workdir of a run"
            )
        what = "initial model" if step is None else "checkpoint"
        hosts.say(f"evaluating the {what} after {step or 0} steps")
        run.watchdog.phase("evaluation")
        weights = run.policy.for_decoding(params)
        rollout, scores, measured = evaluator.sample(weights)
        metrics = evaluator.report(rollout, scores, measured, step or 0, workdir / "evaluations")
        if hosts.is_main():
            for name in sorted(metrics):
                print(f"{name:28s} {metrics[name]:.4f}")
            write_json(workdir / "evaluation.json", {"step": step or 0, **metrics})
        if forcer is not None:
            run.watchdog.phase("budgets")
            name = "initial" if step is None else "after"
            path = workdir / "budget" / f"{name}.jsonl"
            models = {name: measure(forcer, weights, rollout, scores, step or 0, path)}
            if step is not None and forcer.settings.before is not False:
                del params, weights
                path = workdir / "budget" / "before.jsonl"
                models = {"before": _before(run, forcer, path), **models}
            write_curves(workdir, models, forcer, step or 0)
        run.folder.push()
    return metrics


def _newest(run: Run) -> tuple[Params, int | None]:
    """The parameters of the newest checkpoint, after how many steps; or initial ones and None."""
    folder, keep = run.folder.saves / "checkpoints", run.config.log.keep_checkpoints
    with Checkpoints(folder, keep) as checkpoints:
        state = checkpoints.restore(run.state_like)
    if state is None:
        return run.policy.initial_params(), None
    return state.params, int(state.step)


def _forcer(run: Run, settings: BudgetSettings) -> Forcer:
    assert run.evaluator is not None

    def engine(max_prompt: int, max_new: int) -> Engine:
        return make_engine(
            run.config, run.policy, max_prompt=max_prompt, max_new=max_new, slots_per_prompt=1
        )

    return Forcer(settings, run.evaluator, engine)


def _before(run: Run, forcer: Forcer, path: Path) -> Curves:
    """The curves of the model that reinforcement learning started from."""
    run.watchdog.phase("the model before")
    with StopSignal() as stop:
        weights = run.policy.for_decoding(starting_params(run, stop))
    rollout, scores, _ = forcer.evaluator.sample(weights)
    return measure(forcer, weights, rollout, scores, 0, path)


def _define_flags() -> Callable[[], BudgetSettings | None]:
    """Defines --budget and what belongs to it; gives what reads them once they are parsed."""
    flags.DEFINE_list("budget", None, "tokens of thought, such as 8,16,32,64: measures those too")
    flags.DEFINE_string("end_of_thought", "</think>", "--budget: what closes the model's thought")
    flags.DEFINE_string(
        "force_answer", "</think><answer>", "--budget: what is put behind a thought that was cut"
    )
    flags.DEFINE_integer("answer_tokens", 32, "--budget: most tokens of the answer behind that")
    flags.DEFINE_float("answer_temperature", 0.0, "--budget: of that answer; 0: the likeliest")
    flags.DEFINE_string("extend_with", "Wait", "--budget: what replaces an end that came before")
    flags.DEFINE_integer("extensions", 1, "--budget: how often in one thought; 0: never")
    flags.DEFINE_boolean(
        "before", None, "--budget: also of the model before; by default where there is a checkpoint"
    )
    names = [field.name for field in dataclasses.fields(BudgetSettings)]

    def read() -> BudgetSettings | None:
        given: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
        texts = given.pop("budget")
        if texts is None:
            idle = [name for name in given if flags.FLAGS[name].present]
            if idle:
                raise ValueError(f"--{idle[0]} is set, but --budget is not, so nothing reads it")
            return None
        try:
            budget = tuple(int(text) for text in texts)
        except ValueError:
            raise ValueError(
                f"--budget={','.join(texts)} must be whole numbers with commas, such as 8,16,32"
            ) from None
        return BudgetSettings(budget=budget, **given)

    return read


if __name__ == "__main__":
    from grpo.launch import main

    settings_given = _define_flags()

    def command(config: Config, workdir: str | Path, baseline: Config | None) -> None:
        evaluate(config, workdir, baseline, settings_given())

    main(command)
