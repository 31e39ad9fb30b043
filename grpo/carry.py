"""Over-sampling: a step asks more groups than it needs, and what is unfinished goes on in the next.

A rollout ends when its longest completion does, and by then most slots have long been idle. With
`algo.oversample` a step has more groups under way than the P it trains on. The rollout ends with
the P-th complete group; the others are carried over, each completion with its tokens and their
log-probs, and go on at the start of the next step, before new problems are begun.

The bias: short completions end first, so the first complete groups lean to short ones, and to
problems with short answers. Nothing is thrown away: every group that is asked trains, long ones
some steps later than short ones, so over many steps problems count equally often. But what is
late was sampled, in part, by older policies than the one that is trained. That is what the
correction is for (`algo.correction`, here `loss.truncated` unless it is chosen): every token keeps
the log-prob of the policy that sampled it, and weighs pi_old / pi_sampler, cut off at a cap. The
ratio of the clip is against the policy of this step, as always. Two things are left uncorrected:
the weight is the token's own, not its prefix's, and capped; and the order by length itself.
`groups/late_steps_max` and `rollout/carried_tokens_share` say how much of this there is,
`sampler/corrected_share` how many weights are cut off. The gap of sampler and trainer
(`sampler/gap_nats_...`, `sampler/kl_nats`, and the gates on them) leaves carried tokens out. With
`algo.kl_in_reward` they count against the policies that sampled them.

Which groups come first follows from where dispatches end, never from time, so equal runs carry
equally. What is carried is part of the state, of a fixed shape, and in every checkpoint.

Source: partial rollouts of Kimi k1.5, arXiv:2501.12599, section 2.6.2; ending at the first complete
groups and going on with the rest: APRIL, arXiv:2509.18521.
"""

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from grpo.data.prompts import encode_prompt
from grpo.data.sources import ProblemSource
from grpo.engine.engine import Begun, Engine, Request
from grpo.model.params import Params
from grpo.rollout import judge, rollout_metrics, stream
from grpo.scoring import Scorer
from grpo.structs import EOS, LENGTH, STOP, Completion, Rollout, Scores
from rewards.api import Score

_FINISHES = ("", EOS, STOP, LENGTH)  # why a completion ended; "": it has not
_NOTHING = Begun((), np.zeros(0, np.float32))


class Carried(NamedTuple):
    """The X groups that a step leaves to the next, as arrays of the host.

    Attributes:
      problem_X: int32, the problem's index; -1 where nothing is carried.
      late_X: int32, steps since it was asked.
      tokens_XGC: int32.
      logprobs_XGC: float32 nats, of the policies that sampled them.
      length_XG: int32, tokens so far.
      finish_XG: int32, why a completion ended; 0: it goes on.
    """

    problem_X: np.ndarray
    late_X: np.ndarray
    tokens_XGC: np.ndarray
    logprobs_XGC: np.ndarray
    length_XG: np.ndarray
    finish_XG: np.ndarray


@dataclasses.dataclass
class Group:
    """A group under way.

    Attributes:
      problem: index.
      written: each completion so far.
      finish: why each ended; "" if it has not.
      late: steps since it was asked.
      carried: tokens of each completion that earlier steps sampled.
    """

    problem: int
    written: list[Begun]
    finish: list[str]
    carried: list[int]
    late: int = 0

    @property
    def complete(self) -> bool:
        return all(self.finish)


def extra_groups(problems_per_step: int, oversample: float) -> int:
    """X: groups under way beyond the P that train."""
    return round(problems_per_step * oversample)


def nothing(extra: int, group_size: int, max_new: int) -> Carried:
    """Room for `extra` groups, none carried."""
    X, G, C = extra, group_size, max_new
    return Carried(
        problem_X=np.full(X, -1, np.int32),
        late_X=np.zeros(X, np.int32),
        tokens_XGC=np.zeros((X, G, C), np.int32),
        logprobs_XGC=np.zeros((X, G, C), np.float32),
        length_XG=np.zeros((X, G), np.int32),
        finish_XG=np.zeros((X, G), np.int32),
    )


def stored(groups: Sequence[Group], extra: int, group_size: int, max_new: int) -> Carried:
    """The groups as arrays; no more than `extra`."""
    carried = nothing(extra, group_size, max_new)
    for x, group in enumerate(groups):
        carried.problem_X[x], carried.late_X[x] = group.problem, group.late
        carried.finish_XG[x] = [_FINISHES.index(finish) for finish in group.finish]
        for g, (tokens, logprobs) in enumerate(group.written):
            length = carried.length_XG[x, g] = len(tokens)
            carried.tokens_XGC[x, g, :length] = tokens
            carried.logprobs_XGC[x, g, :length] = logprobs
    return carried


def resumed(carried: Carried) -> list[Group]:
    """The groups again, in the order they were stored."""
    c = Carried(*map(np.asarray, carried))
    groups = []
    for x in np.flatnonzero(c.problem_X >= 0):
        written = [
            Begun(tuple(tokens_C[:length].tolist()), logprobs_C[:length])
            for tokens_C, logprobs_C, length in zip(
                c.tokens_XGC[x], c.logprobs_XGC[x], c.length_XG[x].tolist(), strict=True
            )
        ]
        finish = [_FINISHES[code] for code in c.finish_XG[x]]
        lengths = c.length_XG[x].tolist()
        groups.append(Group(int(c.problem_X[x]), written, finish, lengths, int(c.late_X[x])))
    return groups


def fresh(problem: int, group_size: int) -> Group:
    """A group nothing of which is written."""
    return Group(problem, [_NOTHING] * group_size, [""] * group_size, [0] * group_size)


def first_complete(
    engine: Engine,
    scorer: Scorer,
    weights: Params,
    source: ProblemSource,
    groups: Sequence[Group],
    wanted: int,
    key: jax.Array,
    *,
    temperature: float,
) -> tuple[tuple[Rollout, Scores, dict[str, float]], list[Group], list[Group]]:
    """Samples until `wanted` groups are complete.

    A group is judged when it is complete, while others decode; one that does not train in this
    step is not judged in it either, so that each completion is judged once.

    Args:
      engine: samples.
      scorer: judges.
      weights: the decode form.
      source: what `Group.problem` is an index of.
      groups: those carried, oldest first, then new ones; they are written to.
      wanted: P, no more than there are groups.
      key: of this step.
      temperature: as in `Engine.run`.

    Returns:
      The rollout of the first `wanted` complete groups, in the order of `groups`, with its scores
      and metrics; these groups; and the others, in order, as the next step gets them. The metrics
      are those of `grpo.rollout.sample_and_score`, with `groups/carried` (how many of `groups`
      were), `groups/late_steps_max` (of those that train) and `rollout/carried_tokens_share` (of
      the rollout's tokens, those that earlier policies sampled).
    """
    started = time.monotonic()
    problems = [source[group.problem] for group in groups]
    prompts = [encode_prompt(engine.tokenizer, problem) for problem in problems]
    requests = [
        _request(group, prompt, stream(problem, group.late))
        for group, prompt, problem in zip(groups, prompts, problems, strict=True)
    ]
    judged: dict[int, list[Future[list[Score]] | None]] = {}  # in the order in which groups end

    def look_at(n: int) -> None:
        if groups[n].complete and len(judged) < wanted:
            completions = _completions(groups[n], n)
            judged[n] = [judge(scorer, engine.tokenizer, c, problems[n]) for c in completions]

    for n in range(len(groups)):
        look_at(n)
    sampling = engine.run(
        weights, requests, key, temperature=temperature, enough=lambda: len(judged) >= wanted
    )
    for c in sampling:
        group = groups[c.problem]
        group.written[c.sample], group.finish[c.sample] = Begun(c.tokens, c.logprobs), c.finish
        look_at(c.problem)
    for (n, sample), begun in engine.unfinished.items():
        groups[n].written[sample] = begun
    sampled = time.monotonic()
    chosen = sorted(judged)
    scores = scorer.collect([judged[n] for n in chosen])
    scored = time.monotonic()
    trained = [groups[n] for n in chosen]
    rollout = Rollout(
        problems=[problems[n] for n in chosen],
        prompts=[prompts[n] for n in chosen],
        completions=[c for p, group in enumerate(trained) for c in _completions(group, p)],
        group_size=len(groups[0].finish),
    )
    metrics = rollout_metrics(rollout, engine.stats, started, sampled, scored) | {
        "groups/carried": float(sum(group.late > 0 for group in groups)),
        "groups/late_steps_max": float(max(group.late for group in trained)),
        "rollout/carried_tokens_share": sum(c.carried for c in rollout.completions)
        / int(rollout.lengths_B.sum()),
    }
    left = [
        dataclasses.replace(group, late=group.late + 1)
        for n, group in enumerate(groups)
        if n not in judged
    ]
    return (rollout, scores, metrics), trained, left


def _request(group: Group, prompt: Sequence[int], name: int) -> Request:
    done = {sample for sample, finish in enumerate(group.finish) if finish}
    begun = {
        sample: begun
        for sample, begun in enumerate(group.written)
        if begun.tokens and sample not in done
    }
    return Request(prompt, name, len(group.finish), done, begun)


def _completions(group: Group, problem: int) -> list[Completion]:
    members = zip(group.written, group.finish, group.carried, strict=True)
    return [
        Completion(problem, sample, begun.tokens, begun.logprobs, finish, carried)
        for sample, (begun, finish, carried) in enumerate(members)
    ]
