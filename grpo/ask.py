"""Which problems a step asks, and what asking them leaves in the state."""

import dataclasses
import math
import time
from typing import Any

import jax

from grpo import carry
from grpo.build import Run
from grpo.carry import Carried
from grpo.curriculum import PassRates, Round, after_step, choose, solved_share
from grpo.data.order import draw
from grpo.groups import fill_groups
from grpo.model.params import Params
from grpo.policy import Policy
from grpo.rollout import sample_and_score
from grpo.structs import Rollout, Scores, TrainState

Scored = tuple[Rollout, Scores, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The groups of a step, and what is known once they are scored.

    Attributes:
      rollout, scores, metrics: of the groups that train.
      cursor: behind the problems of the step.
      pass_rates: `TrainState.pass_rates` behind it.
      carried: `TrainState.carried` behind it.
    """

    rollout: Rollout
    scores: Scores
    metrics: dict[str, Any]
    cursor: int
    pass_rates: PassRates | None
    carried: Carried | None

    def noted(self, state: TrainState) -> TrainState:
        """`state` with what is known now."""
        cursor = state.cursor + self.cursor - int(state.cursor)
        return state.replace(cursor=cursor, pass_rates=self.pass_rates, carried=self.carried)


def ask(run: Run, state: TrainState, step: int) -> Asked:
    """Samples and scores the groups of `step`."""
    asking = _Asking(run, state, step)
    take = asking.whole_groups if state.carried is None else asking.first_groups
    algo = run.config.algo
    rollout, scores, metrics = fill_groups(take, algo.problems_per_step, algo.dynamic_rounds)
    pass_rates, report = after_step(state.pass_rates, asking.rounds)
    metrics |= {"groups/asked": float(asking.asked)} | asking.handover
    return Asked(rollout, scores, metrics | report, asking.cursor, pass_rates, asking.carried)


def hand_over(policy: Policy, params: Params) -> tuple[Params, dict[str, float]]:
    """The decode form of the parameters, and what it took.

    `handover/weights_bytes` is the size of the decode form over all devices, copies included:
    `data` x `fsdp` of them.
    """
    started = time.monotonic()
    weights = jax.block_until_ready(policy.for_decoding(params))
    seconds = time.monotonic() - started
    per_device = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(weights)
    )
    metrics = {
        "handover/weights_bytes": float(per_device * policy.mesh.size),
        "time/handover_s": seconds,
    }
    return weights, metrics


class _Asking:
    """The rounds of one step; `grpo.groups.Ask` are its methods `whole_groups`, `first_groups`."""

    def __init__(self, run: Run, state: TrainState, step: int):
        self.run, self.known = run, state.pass_rates
        self.cursor, self.carried = int(state.cursor), state.carried
        self.asked, self.rounds = 0, list[Round]()
        self._weights, self.handover = hand_over(run.policy, state.params)
        self._key = jax.random.fold_in(jax.random.key(run.config.seed), step)

    def whole_groups(self, count: int, number: int) -> Scored:
        """Asks `count` problems and waits for all their groups."""
        run = self.run
        considered, rows = self._draw(count)
        found = sample_and_score(
            run.engine,
            run.scorer,
            self._weights,
            [run.problems[i] for i in rows],
            run.config.algo.group_size,
            jax.random.fold_in(self._key, number),
            temperature=run.config.sample.temperature,
        )
        self._saw(considered, rows, found[1])
        return found

    def first_groups(self, count: int, number: int) -> Scored:
        """Goes on with the groups carried over, asks more, and waits for `count` groups of all."""
        run, G = self.run, self.run.config.algo.group_size
        groups, extra = carry.resumed(self.carried), len(self.carried.problem_X)
        considered, rows = self._draw(count + extra - len(groups))
        found, trained, left = carry.first_complete(
            run.engine,
            run.scorer,
            self._weights,
            run.problems,
            [*groups, *(carry.fresh(row, G) for row in rows)],
            count,
            jax.random.fold_in(self._key, number),
            temperature=run.config.sample.temperature,
        )
        self._saw(considered, [group.problem for group in trained], found[1])
        self.carried = carry.stored(left, extra, G, run.engine.max_new)
        return found

    def _draw(self, count: int) -> tuple[list[int], list[int]]:
        """The next problems considered, and the `count` chosen of them."""
        considered = count * max(self.run.config.algo.curriculum, 1)
        drawn, self.cursor = draw(
            len(self.run.problems), self.cursor, considered, self.run.config.seed
        )
        self.asked += count
        return drawn, choose(self.known, drawn, count)

    def _saw(self, considered: list[int], judged: list[int], scores: Scores) -> None:
        share_P = solved_share(self.run.scorer.solved_PG(scores), scores.valid_PG)
        self.rounds.append(Round(considered, judged, share_P))
