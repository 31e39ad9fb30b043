"""Supervised fine-tuning as a run of its own.

    python -m grpo.stages.supervise --config=experiments/x.py --workdir=DIR

learns `config.sft.num_steps` steps from the worked completions of `config.sft.source`, and leaves
in DIR what a reinforcement-learning run leaves there: checkpoints, which `model.source` reads.
"""

from contextlib import ExitStack
from pathlib import Path

from grpo import runinfo
from grpo.build import start
from grpo.checkpoint import params_sha256
from grpo.config import Config, check_all_read
from grpo.runtime import hosts
from grpo.runtime.host_memory import return_free_pages
from grpo.runtime.signals import StopSignal
from grpo.runtime.watchdog import telling
from grpo.stages.sft import SftStage
from grpo.structs import TrainState


def supervise(config: Config, workdir: str | Path, baseline: Config | None = None) -> TrainState:
    """Supervised fine-tuning, from the beginning or from where it was stopped.

    Args:
      config: what to run; reads `model`, `lora`, `sft`, `optim`, `log`, `mesh` and the prompt and
        completion limits, which a worked problem must keep.
      workdir: a folder or a gs:// address.
      baseline: as in `grpo.train.train`.

    Returns:
      The final state.

    Raises:
      ValueError, TypeError: a configuration that cannot work; the message says why.
      FloatingPointError: too many updates in a row were not finite.
    """
    with ExitStack() as stack:
        stack.enter_context(telling((FloatingPointError,)))
        stop = stack.enter_context(StopSignal())
        folder, watchdog, policy = start(config, workdir, stack, scored=False)
        source = config.sft.source or config.data.train
        if not config.sft.num_steps or source is None:
            lacking = "sft.source is not set" if source is None else "sft.num_steps is 0"
            raise ValueError(f"{lacking}: there is nothing to learn")
        stage = SftStage(config, policy, source, folder, name="")
        check_all_read(config, baseline or Config())
        folder.pull()
        stack.callback(folder.push)
        runinfo.write(config, folder.path)
        state = stage.run(policy.initial_params(), stop, watchdog)
        digest = params_sha256(state.params)
        runinfo.write_result(folder.path, params_sha256=digest, steps=int(state.step))
        hosts.say(f"params_sha256 {digest}")
    return_free_pages()
    return state


if __name__ == "__main__":
    from grpo.launch import main

    main(supervise)
