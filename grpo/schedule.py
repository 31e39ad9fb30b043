"""The numbers that follow from the configuration, worked out once and shown at start."""

import dataclasses
from collections.abc import Callable
from typing import Any

from grpo.batch import RowShape
from grpo.config import Config


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a step's completions become optimiser updates.

    Attributes:
      completions: a step, B.
      updates_per_step: minibatches x passes.
      updates: of the whole run.
      row_shape: of every microbatch.
    """

    problems: int
    group_size: int
    num_steps: int
    completions: int
    minibatches: int
    updates_per_step: int
    updates: int
    row_shape: RowShape

    @property
    def on_policy(self) -> bool:
        """One update a rollout: the ratio is 1 by construction."""
        return self.updates_per_step == 1

    def describe(self, learning_rate: Callable[[int], Any]) -> str:
        """Lines for the start of the log, the learning rate at 0, 10, 50 and 100 % included."""
        shares = (0, 10, 50, 100)
        last = max(self.updates - 1, 0)
        rates = [f"{float(learning_rate(last * share // 100)):.3g}" for share in shares]
        shape = self.row_shape
        policy = "on-policy: the ratio is 1, nothing is clipped" if self.on_policy else "off-policy"
        return (
            f"each step: {self.problems} problems x {self.group_size} completions = "
            f"{self.completions} -> {self.updates_per_step} update(s) of "
            f"{self.completions // self.minibatches} completions ({policy}), packed into "
            f"microbatches of {shape.rows} row(s) x {shape.tokens} tokens\n"
            f"the run: {self.num_steps} steps = {self.updates} updates; learning rate at "
            f"{'/'.join(map(str, shares))} %: {' / '.join(rates)}"
        )


def make_schedule(config: Config, row_shape: RowShape) -> Schedule:
    """What follows from `config.algo`, and from the shape that rows were given."""
    algo = config.algo
    updates = algo.minibatches * algo.passes
    return Schedule(
        problems=algo.problems_per_step,
        group_size=algo.group_size,
        num_steps=config.num_steps,
        completions=algo.problems_per_step * algo.group_size,
        minibatches=algo.minibatches,
        updates_per_step=updates,
        updates=config.num_steps * updates,
        row_shape=row_shape,
    )
