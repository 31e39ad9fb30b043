"""The numbers that follow from the configuration, worked out once and shown at start."""

import dataclasses
from collections.abc import Callable
from typing import Any

from grpo.config import Config


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a step's rows become optimiser updates.

    Attributes:
      rows: completions a step, B.
      rows_per_update: of one minibatch.
      microbatch_rows: on the devices at one time.
      updates: optimiser updates of the whole run.
    """

    problems: int
    group_size: int
    num_steps: int
    rows: int
    rows_per_update: int
    microbatch_rows: int
    updates: int

    def describe(self, learning_rate: Callable[[int], Any]) -> str:
        """Lines for the start of the log, the learning rate at 0, 10, 50 and 100 % included."""
        shares = (0, 10, 50, 100)
        last = max(self.updates - 1, 0)
        rates = [f"{float(learning_rate(last * share // 100)):.3g}" for share in shares]
        return (
            f"each step: {self.problems} problems x {self.group_size} completions = {self.rows} "
            f"rows -> {self.rows // self.rows_per_update} update(s) of {self.rows_per_update} rows "
            f"in {self.rows_per_update // self.microbatch_rows} microbatch(es) of "
            f"{self.microbatch_rows}\n"
            f"the run: {self.num_steps} steps = {self.updates} updates; learning rate at "
            f"{'/'.join(map(str, shares))} %: {' / '.join(rates)}"
        )


def make_schedule(config: Config, ways: int) -> Schedule:
    """Derives the schedule; `ways` is how many parts the mesh splits rows into.

    Raises:
      ValueError: a microbatch does not split evenly over the mesh.
    """
    algo = config.algo
    rows = algo.problems_per_step * algo.group_size
    per_update = rows // algo.minibatches
    micro = algo.microbatch_rows or per_update
    if micro % ways:
        raise ValueError(
            f"a microbatch of {micro} rows cannot be split over data x fsdp = {ways} devices; "
            "choose algo.microbatch_rows (or problems_per_step x group_size / minibatches) as a "
            "multiple of it"
        )
    return Schedule(
        problems=algo.problems_per_step,
        group_size=algo.group_size,
        num_steps=config.num_steps,
        rows=rows,
        rows_per_update=per_update,
        microbatch_rows=micro,
        updates=config.num_steps * algo.minibatches,
    )
