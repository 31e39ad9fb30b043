"""What a stage costs, before it runs: counted, and in hours of a machine that is named."""

import dataclasses
from collections.abc import Callable
from typing import Any

from grpo.config import Config
from grpo.model.arch import Arch
from grpo.model.params import active_params
from grpo.planning.chips import Topology
from grpo.planning.make import Options, make_plan
from grpo.planning.predict import Assumptions, Step
from grpo.stages.distil import distil
from grpo.stages.rejection import sample_traces
from grpo.stages.supervise import supervise
from grpo.train import train

_MEAN = 0.5  # of the longest completion, as plans take it where nothing else is said


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stage does, with completions half as long as they may be.

    Attributes:
      completions: sampled.
      sampled_tokens: of them.
      learnt_tokens: of completions and prompts that go through an update.
      updates: of the optimiser.
      flops: 2 a parameter and token read or sampled, 6 one learnt.
      hours: on the machine that was named; None if none was, or its speed is not known.
    """

    completions: int = 0
    sampled_tokens: float = 0.0
    learnt_tokens: float = 0.0
    updates: int = 0
    flops: float = 0.0
    hours: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.updates:,} updates"] if self.updates else []
        if self.completions:
            parts += [f"{self.completions:,} completions"]
            parts += [f"about {_short(self.sampled_tokens)} tokens sampled"]
        if self.learnt_tokens:
            parts += [f"about {_short(self.learnt_tokens)} tokens learnt from"]
        if self.flops:
            parts += [f"{self.flops / 1e12:,.3g} TFLOP"]
        if self.hours is not None:
            parts += [f"{self.hours:,.2f} h"]
        return ", ".join(parts) or "no model work"


def _short(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def expected_cost(
    run: Callable[..., Any], config: Config, arch: Arch, topology: Topology | None = None
) -> Cost:
    """The cost of a stage.

    Args:
      run: its function.
      config: of it.
      arch: of the model that it trains or samples.
      topology: the machine whose hours are wanted.
    """
    if run is train:
        return _of_rollouts(config, arch, topology)
    if run is supervise:
        return _of_sft(config, arch, topology)
    if run is distil:
        return _of_distillation(config, arch, topology)
    if run is sample_traces:
        return _of_traces(config, arch, topology)
    return Cost()


def _of_rollouts(config: Config, arch: Arch, topology: Topology | None) -> Cost:
    algo = config.algo
    problems = config.num_steps * algo.problems_per_step
    completions = problems * algo.group_size
    sampled = completions * config.sample.max_new_tokens * _MEAN
    prompts = problems * config.data.max_prompt_tokens * _MEAN
    updates = config.num_steps * algo.minibatches * algo.passes
    passes = algo.passes + (bool(algo.kl_coef) + (updates > config.num_steps)) / 3
    learnt = sampled + prompts
    return Cost(
        completions=completions,
        sampled_tokens=sampled,
        learnt_tokens=learnt * algo.passes,
        updates=updates,
        flops=active_params(arch) * (2 * learnt + 6 * passes * learnt),
        hours=None if topology is None else _step_hours(config, arch, topology),
    )


def _of_distillation(config: Config, arch: Arch, topology: Topology | None) -> Cost:
    """As a run without rewards; what the teacher, which is larger, takes to read is counted as one
    more update of the student.
    """
    cost = _of_rollouts(config, arch, topology)
    reading = 6 * active_params(arch) * cost.learnt_tokens
    hours = None if topology is None else _peak_hours(reading, topology)
    both = None if hours is None or cost.hours is None else cost.hours + hours
    return dataclasses.replace(cost, flops=cost.flops + reading, hours=both)


def _of_traces(config: Config, arch: Arch, topology: Topology | None) -> Cost:
    rejection = config.rejection
    assert config.data.train is not None  # validate() sees to it
    problems = rejection.num_problems or len(config.data.train)
    completions = problems * rejection.num_samples
    sampled = completions * config.sample.max_new_tokens * _MEAN
    prompts = problems * config.data.max_prompt_tokens * _MEAN
    return Cost(
        completions=completions,
        sampled_tokens=sampled,
        flops=2 * active_params(arch) * (sampled + prompts),
        hours=None if topology is None else _rollout_hours(config, arch, topology, completions),
    )


def _of_sft(config: Config, arch: Arch, topology: Topology | None) -> Cost:
    sft = config.sft
    longest = config.sample.max_new_tokens + config.data.max_prompt_tokens
    learnt = sft.num_steps * sft.rows_per_step * longest * _MEAN
    flops = 6 * active_params(arch) * learnt
    return Cost(
        learnt_tokens=learnt,
        updates=sft.num_steps,
        flops=flops,
        hours=None if topology is None else _peak_hours(flops, topology),
    )


def _planned(config: Config, arch: Arch, topology: Topology) -> Step | None:
    """A step of the run, as `grpo.plan --nocompile` says."""
    options = Options(compiles=False, suggest=False)
    return make_plan(config, arch, topology, options, lambda _: None).step


def _step_hours(config: Config, arch: Arch, topology: Topology) -> float | None:
    step = _planned(config, arch, topology)
    return None if step is None else step.seconds * step.steps / 3600


def _rollout_hours(
    config: Config, arch: Arch, topology: Topology, completions: int
) -> float | None:
    """Hours of so many completions, sampled as a step of reinforcement learning would."""
    step, algo = _planned(config, arch, topology), config.algo
    if step is None:
        return None
    steps = completions / (algo.problems_per_step * algo.group_size)
    return step.split_s["rollout"] * steps / 3600


def _peak_hours(flops: float, topology: Topology) -> float | None:
    if topology.chip is None or topology.num_devices is None:
        return None
    reached = topology.num_devices * topology.chip.flops * Assumptions().compute_efficiency
    return flops / reached / 3600
