"""Ask, sample, score: one pass over some problems, scoring hidden under sampling."""

import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future

import jax
import numpy as np

from grpo.data.prompts import encode_prompt
from grpo.data.tokenizer import Tokenizer
from grpo.engine.engine import Engine, EngineStats, Request
from grpo.engine.sampling import Filters
from grpo.model.params import Params
from grpo.runtime import hosts
from grpo.scoring import Scorer
from grpo.structs import LENGTH, Completion, Rollout, Scores
from rewards.api import Problem, Score


def sample_and_score(
    engine: Engine,
    scorer: Scorer,
    weights: Params,
    problems: Sequence[Problem],
    group_size: int,
    key: jax.Array,
    *,
    temperature: float,
    filters: Filters | None = None,
) -> tuple[Rollout, Scores, dict[str, float]]:
    """`group_size` completions of every problem, judged; each is judged while others decode.

    `temperature` and `filters` are as in `Engine.run`.

    Returns:
      The rollout, its scores, and metrics (`rollout/...`, `time/...`).
    """
    started = time.monotonic()
    tokenizer = engine.tokenizer
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    requests = [
        Request(prompt, stream(problem), group_size)
        for prompt, problem in zip(prompts, problems, strict=True)
    ]
    done: dict[tuple[int, int], tuple[Completion, Future[list[Score]] | None]] = {}
    for completion in engine.run(weights, requests, key, temperature=temperature, filters=filters):
        future = judge(scorer, tokenizer, completion, problems[completion.problem])
        done[completion.problem, completion.sample] = completion, future
    sampled = time.monotonic()
    order = [[done[p, g] for g in range(group_size)] for p in range(len(problems))]
    scores = scorer.collect([[future for _, future in group] for group in order])
    scored = time.monotonic()
    rollout = Rollout(
        problems=list(problems),
        prompts=prompts,
        completions=[completion for group in order for completion, _ in group],
        group_size=group_size,
    )
    return rollout, scores, rollout_metrics(rollout, engine.stats, started, sampled, scored)


def stream(problem: Problem, late: int = 0) -> int:
    """What names a problem to the random numbers of a step (uint32).

    `late` steps after it was asked it has another name: it may be asked anew beside that.
    """
    return zlib.crc32(f"{problem.uid}+{late}".encode() if late else problem.uid.encode())


def judge(
    scorer: Scorer, tokenizer: Tokenizer, completion: Completion, problem: Problem
) -> "Future[list[Score]] | None":
    """Starts judging what was written for `problem`; None if another process does that.

    An error is the future's: raised here it would leave the other processes waiting for the next
    dispatch. `Scorer.collect` is where they hear of it.
    """
    if not hosts.owns(completion.problem):
        return None
    facts = {"length_tokens": len(completion.tokens), "finish_reason": completion.finish}
    try:
        return scorer.submit(tokenizer.decode(completion.tokens), problem, facts)
    except Exception as error:
        failed: Future[list[Score]] = Future()
        failed.set_exception(error)
        return failed


def rollout_metrics(
    rollout: Rollout, stats: EngineStats, started: float, sampled: float, scored: float
) -> dict[str, float]:
    """Lengths, speed and times; the last three arguments are seconds of one clock."""
    lengths_B = rollout.lengths_B
    return {
        "rollout/length_tokens_mean": float(lengths_B.mean()),
        "rollout/length_tokens_max": float(lengths_B.max()),
        "rollout/truncated": float(np.mean([c.finish == LENGTH for c in rollout.completions])),
        "rollout/tokens_per_s": stats.tokens / max(stats.seconds, 1e-9),
        "rollout/occupancy": stats.tokens / max(stats.slot_steps, 1),
        "rollout/idle_share": stats.idle_s / max(stats.seconds, 1e-9),
        "time/sample_s": sampled - started,
        "time/score_s": scored - sampled,
    } | expert_load(rollout.completions)


def expert_load(completions: Sequence[Completion]) -> dict[str, float]:
    """`experts/busiest_share`: the share of a layer's tokens, each counted once for every expert it
    went to, of the expert with most; in the most uneven layer. 1 / E is even, 1 / k one for all.
    """
    routes = [c.routes for c in completions if c.routes is not None]
    if not routes:
        return {}
    routes_nLk = np.concatenate(routes)
    busiest = [np.bincount(layer_nk.ravel()).max() for layer_nk in routes_nLk.swapaxes(0, 1)]
    return {"experts/busiest_share": float(max(busiest)) / routes_nLk[:, 0].size}


def readable_rows(
    step: int, rollout: Rollout, scores: Scores, tokenizer: Tokenizer
) -> list[dict[str, object]]:
    """One JSON-able row a completion, as a person would want to read it."""
    rows: list[dict[str, object]] = []
    G = rollout.group_size
    for b, completion in enumerate(rollout.completions):
        p, g = divmod(b, G)
        problem = rollout.problems[p]
        rows.append(
            {
                "step": step,
                "uid": problem.uid,
                "sample": g,
                "reward": round(float(scores.reward_PG[p, g]), 6),
                "valid": bool(scores.valid_PG[p, g]),
                "finish_reason": completion.finish,
                "length_tokens": len(completion.tokens),
                "prompt": tokenizer.decode(rollout.prompts[p]),
                "completion": tokenizer.decode(completion.tokens),
                "scores": {n: round(float(v[p, g]), 6) for n, v in scores.components.items()},
                "statuses": {name: found[b] for name, found in scores.statuses.items()},
                "problem": {
                    "uid": problem.uid,
                    "reference": problem.reference,
                    "gold": problem.gold,
                    "meta": dict(problem.meta),
                },
            }
        )
    return rows
