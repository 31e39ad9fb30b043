"""Measure a trained model, alone.

    python -m grpo.evaluate --config=experiments/x.py --workdir=DIR

evaluates the newest checkpoint of DIR on the experiment's held-out problems (the initial model if
there is no checkpoint), prints a table and writes DIR/evaluation.json.
"""

import json
from contextlib import ExitStack
from pathlib import Path

from grpo import hosts
from grpo.build import build
from grpo.checkpoint import Checkpoints
from grpo.config import Config
from grpo.watchdog import telling


def evaluate(
    config: Config, workdir: str | Path, baseline: Config | None = None
) -> dict[str, float]:
    """`eval/...` metrics of what `workdir` holds.

    Raises:
      ValueError: the configuration has no held-out problems, or cannot work.
    """
    if config.data.held_out is None:
        raise ValueError("data.held_out is not set: there is nothing to measure on")
    config.eval.every = config.eval.every or 1
    with ExitStack() as stack:
        stack.enter_context(telling(()))
        run = build(config, workdir, stack, baseline or Config())
        workdir = run.workdir
        run.folder.pull()
        checkpoints = stack.enter_context(
            Checkpoints(run.folder.saves / "checkpoints", config.log.keep_checkpoints)
        )
        state = checkpoints.restore(run.state_like)
        params = state.params if state is not None else run.policy.initial_params()
        step = int(state.step) if state is not None else 0
        hosts.say(f"evaluating the {'checkpoint' if state else 'initial model'} after {step} steps")
        assert run.evaluator is not None
        metrics = run.evaluator(run.policy.for_decoding(params), step, workdir / "evaluations")
    if hosts.is_main():
        for name in sorted(metrics):
            print(f"{name:28s} {metrics[name]:.4f}")
        report = json.dumps({"step": step, **metrics}, indent=2)
        (workdir / "evaluation.json").write_text(report + "\n")
        run.folder.push()
    return metrics


if __name__ == "__main__":
    from grpo.launch import main

    main(evaluate)
