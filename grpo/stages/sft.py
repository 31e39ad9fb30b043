"""Supervised fine-tuning on worked completions: the cold start of a run, or all of one.

Same state, same update, same data order and checkpoints as the main loop; only the objective
differs, and only completion tokens count.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from grpo.batch import Sample, pack, row_shape, to_device, totals
from grpo.checkpoint import Checkpoints
from grpo.config import Config
from grpo.data.order import problems_for_step
from grpo.data.prompts import encode_prompt
from grpo.data.sources import ProblemSource
from grpo.data.tokenizer import Tokenizer
from grpo.loss import sft_loss
from grpo.metrics import SFT_COLUMNS, ConsoleTable, MetricLog
from grpo.model.params import Params, attention_share
from grpo.policy import Policy
from grpo.runtime import hosts
from grpo.runtime.signals import StopSignal
from grpo.runtime.watchdog import Watchdog
from grpo.runtime.workdir import Workdir
from grpo.sharding import batch_ways, platform_of
from grpo.structs import TrainState
from grpo.update import (
    Offload,
    Update,
    abstract_state,
    decayed_params,
    init_state,
    learning_rate,
    make_optimizer,
)
from rewards.api import Problem

_SHOW_EVERY = 10  # steps a console line: supervised steps are short


def worked_samples(
    tokenizer: Tokenizer, problems: Sequence[Problem], max_prompt: int, max_new: int
) -> list[Sample]:
    """One sample a worked problem: its prompt, its completion, and the stop token.

    Raises:
      ValueError: a problem has no worked completion, or is too long; names it.
    """
    samples = []
    for number, problem in enumerate(problems):
        if "worked" not in problem.meta:
            raise ValueError(
                f"problem {problem.uid!r} has no meta['worked'], the completion to learn from"
            )
        prompt = encode_prompt(tokenizer, problem)
        completion = [*tokenizer.encode(problem.meta["worked"]), tokenizer.eos_ids[0]]
        if len(prompt) > max_prompt or len(completion) > max_new:
            raise ValueError(
                f"worked problem {problem.uid!r}: prompt {len(prompt)} and completion "
                f"{len(completion)} tokens; at most {max_prompt} (data.max_prompt_tokens) and "
                f"{max_new} (sample.max_new_tokens) fit"
            )
        samples.append(Sample(group=number, prompt=prompt, completion=completion))
    return samples


class SftStage:
    """Supervised fine-tuning; made before anything runs, so that every setting is read.

    Args:
      config: its `sft`, and what a run of any kind reads.
      policy: what learns.
      source: worked problems.
      folder: of the run.
      name: of the folder in it where checkpoints and metrics go; "": the run is nothing else.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        source: ProblemSource,
        folder: Workdir,
        name: str = "sft",
    ):
        sft, optim = config.sft, config.optim
        if len(source) < sft.rows_per_step:
            raise ValueError(
                f"sft.rows_per_step is {sft.rows_per_step}, but there are only {len(source)} "
                "worked problems to learn from"
            )
        self.policy, self.source, self.folder, self.name = policy, source, folder, name
        self.num_steps, self.rows, self.seed = sft.num_steps, sft.rows_per_step, config.seed
        self.max_prompt = config.data.max_prompt_tokens
        self.max_new = config.sample.max_new_tokens
        self.row_shape = row_shape(
            max_prompt=self.max_prompt,
            max_new=self.max_new,
            group_size=1,
            samples=sft.rows_per_step,
            microbatch_tokens=sft.microbatch_tokens,
            ways=batch_ways(policy.mesh),
            attention_share=attention_share(policy.arch, platform_of(policy.mesh)),
        )
        self.max_bad_updates = config.gates.max_bad_updates
        self.save_every, self.keep = config.log.save_every, config.log.keep_checkpoints
        schedule = learning_rate(optim, sft.learning_rate, sft.warmup_updates, sft.num_steps)
        self.optimizer = make_optimizer(optim, schedule, decayed_params(policy))
        self.offload = Offload(moments=optim.offload)
        self.update = Update(policy, sft_loss, self.optimizer, schedule, offload=self.offload)

    def run(self, params: Params, stop: StopSignal, watchdog: Watchdog) -> TrainState:
        """The state after the stage; goes on from its own checkpoint if there is one.

        Raises:
          FloatingPointError: too many updates in a row were not finite.
        """
        with ExitStack() as stack:
            form: dict[str, Any] = {"offload": self.offload}
            state = init_state(self.policy, params, self.optimizer, **form)
            checkpoints = stack.enter_context(
                Checkpoints(self.folder.saves / self.name / "checkpoints", self.keep)
            )
            like = abstract_state(self.policy, self.optimizer, **form)
            state = checkpoints.restore(like) or state
            done = int(state.step)
            if done < self.num_steps:
                hosts.say(f"{self.num_steps} supervised steps of {self.rows} rows")
            log = stack.enter_context(MetricLog(self.folder.path / self.name, resume_step=done))
            table = ConsoleTable(SFT_COLUMNS, self.num_steps)
            for step in range(done, self.num_steps):
                watchdog.phase(f"supervised step {step}")
                state, metrics = self._step(state, step)
                log.log(step, metrics)
                if step % _SHOW_EVERY == 0 or step + 1 == self.num_steps:
                    table.row(step, metrics)
                if int(state.bad_updates) >= self.max_bad_updates:
                    raise FloatingPointError(
                        f"supervised step {step}: {int(state.bad_updates)} updates in a row were "
                        "not finite and were skipped (gates.max_bad_updates)"
                    )
                stopping = stop.requested()
                if (step + 1) % self.save_every == 0 or stopping:
                    self.folder.push()
                    checkpoints.save(state)
                if stopping:
                    checkpoints.wait()
                    stop.leave(step + 1)
            self.folder.push()
            checkpoints.save(state)
        return state

    def _step(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        started = time.monotonic()
        rows = problems_for_step(len(self.source), step, self.rows, self.seed)
        problems = [self.source[i] for i in rows]
        samples = worked_samples(self.policy.tokenizer, problems, self.max_prompt, self.max_new)
        counts = totals(samples)
        packed = pack(samples, self.row_shape)
        on_device = [to_device(batch, self.policy.mesh) for batch in packed.microbatches]
        state, report = self.update(state, on_device, counts)
        metrics = {name: float(value) for name, value in report.items()}
        metrics["time/step_s"] = time.monotonic() - started
        metrics["sft/tokens_per_s"] = float(counts.tokens) / metrics["time/step_s"]
        return state.replace(step=state.step + 1), metrics
