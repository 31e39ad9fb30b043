"""Scores stored completions again, without a model: try a reward on what a run really wrote.

  python tools/replay_rewards.py WORKDIR/rollouts.jsonl my_rewards:palindrome
  python tools/replay_rewards.py WORKDIR/rollouts.jsonl experiments/mine.py:palindrome --show=20

A reward is compared with the stored score of the same name, or else with the stored total reward.
What the run read from its data came through JSON on the way: a tuple is a list here.
"""

import argparse
import collections
import importlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rewards.api import Problem, Reward, Score
from rewards.pool import RewardPool

_SAME = 1e-6  # stored scores may have been through float32


def main(arguments: Sequence[str]) -> None:
    """Prints one line a reward, then the completions on which it disagrees with the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rollouts", type=pathlib.Path)
    parser.add_argument("rewards", nargs="+", metavar="MODULE_OR_FILE:FUNCTION")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline_s", type=float, default=2.0)
    parser.add_argument("--show", type=int, default=5, help="disagreements to print a reward")
    options = parser.parse_args(arguments)

    sys.path.insert(0, "")  # the user's modules: a script's own path starts at tools/
    components = [(1.0, load_reward(where)) for where in options.rewards]
    with options.rollouts.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    with RewardPool(components, workers=options.workers, deadline_s=options.deadline_s) as pool:
        futures = [pool.submit(row["completion"], stored_problem(row)) for row in rows]
        scores = [future.result() for future in futures]
        names = pool.names
    columns = {name: [row_scores[i] for row_scores in scores] for i, name in enumerate(names)}
    print("\n".join(table(rows, columns)))
    for name, column in columns.items():
        print("\n".join(disagreements(name, rows, column)[: options.show]))


def load_reward(where: str) -> Reward:
    """The function that `module:function` or `path/to/file.py:function` names."""
    source, colon, name = where.rpartition(":")
    if not colon:
        raise SystemExit(f"{where!r} names no function; write my_module:my_reward")
    if source.endswith(".py"):
        spec = importlib.util.spec_from_file_location(pathlib.Path(source).stem, source)
        if spec is None or spec.loader is None:
            raise SystemExit(f"{source!r} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    reward: Reward = getattr(module, name)
    return reward


def stored_problem(row: dict[str, Any]) -> Problem:
    """The problem of one stored row, its messages already rendered into a prompt."""
    problem = row["problem"]
    return Problem(
        uid=problem["uid"],
        prompt=row["prompt"] or " ",
        reference=problem.get("reference"),
        gold=problem.get("gold"),
        meta=problem.get("meta") or {},
    )


def stored_value(name: str, row: dict[str, Any]) -> float:
    """What the run gave this completion, under this name if it knew it."""
    return float((row.get("scores") or {}).get(name, row["reward"]))


def table(rows: list[dict[str, Any]], columns: dict[str, list[Score]]) -> list[str]:
    """One line a reward: stored and new mean, how often they differ, how the calls ended."""
    width = max(len("reward"), *map(len, columns))
    lines = [f"{'reward':{width}}  {'rows':>6}  {'stored':>7}  {'new':>7}  {'differ':>6}  statuses"]
    for name, column in columns.items():
        count = max(len(rows), 1)
        stored = sum(stored_value(name, row) for row in rows) / count
        new = sum(score.value for score in column) / count
        differ = len(disagreements(name, rows, column))
        tally = collections.Counter(str(score.status) for score in column)
        statuses = ", ".join(f"{status} {n}" for status, n in tally.most_common())
        lines.append(
            f"{name:{width}}  {len(rows):6}  {stored:7.4f}  {new:7.4f}  {differ:6}  {statuses}"
        )
    return lines


def disagreements(name: str, rows: list[dict[str, Any]], column: list[Score]) -> list[str]:
    """One line for each completion whose new value is not the stored one."""
    return [
        f"{name}: step {row['step']} {row['uid']} sample {row['sample']} ({row['finish_reason']}): "
        f"stored {stored_value(name, row):g}, new {score.value:g} {score.status} {score.detail} "
        f"…{row['completion'][-80:]!r}"
        for row, score in zip(rows, column, strict=True)
        if abs(stored_value(name, row) - score.value) > _SAME
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
