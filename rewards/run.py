"""Scores completions from a file: try a reward without a model.

  python -m rewards.run my_rewards:palindrome --completions tried.jsonl
  python -m rewards.run experiments/mine.py:palindrome --completions WORKDIR/rollouts.jsonl

Rows of the file: {"completion", "reference", and maybe "prompt", "uid", "meta", "length_tokens",
"finish_reason"}, or those that a training run keeps in rollouts.jsonl. One row a completion and
reward goes to the standard output: {"uid", "name", "reward", "status", "reason", "extracted",
"detail", "milliseconds"}. A table goes to the standard error.

A row that holds a score already is compared with it: with the one of the same name in "scores", or
else with "reward". What a run read from its data came through JSON on the way: a tuple is a list.
"""

import argparse
import collections
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.api import Score
from rewards.loading import facts_of, problem_of, read_rows, start_pool

_SAME = 1e-6  # stored scores may have been through float32


def main(arguments: Sequence[str]) -> None:
    """Prints the rows, the table, and the completions on which stored and new scores differ."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rewards", nargs="+", metavar="MODULE_OR_FILE:NAME")
    parser.add_argument("--completions", type=pathlib.Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline_s", type=float, default=2.0)
    parser.add_argument("--show", type=int, default=5, help="differing completions to print")
    options = parser.parse_args(arguments)

    rows = list(read_rows(options.completions))
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("completion"), str):
            raise SystemExit(f"{options.completions}: row {number} has no completion")
    with start_pool(options.rewards, options.workers, options.deadline_s) as pool:
        futures = [
            pool.submit(row["completion"], problem_of(row, number), facts_of(row))
            for number, row in enumerate(rows)
        ]
        scores = [future.result() for future in futures]
        names = pool.names
    for number, (row, of_row) in enumerate(zip(rows, scores, strict=True)):
        for name, score in zip(names, of_row, strict=True):
            print(json.dumps(result(problem_of(row, number).uid, name, score)))
    columns = {name: [of_row[i] for of_row in scores] for i, name in enumerate(names)}
    print("\n".join(table(rows, columns)), file=sys.stderr)
    for name, column in columns.items():
        for line in disagreements(name, rows, column)[: options.show]:
            print(line, file=sys.stderr)


def result(uid: str, name: str, score: Score) -> dict[str, Any]:
    """One row of the output."""
    return {
        "uid": uid,
        "name": name,
        "reward": score.value,
        "status": str(score.status),
        "reason": score.reason,
        "extracted": score.extracted,
        "detail": score.detail,
        "milliseconds": round(1_000 * score.seconds, 3),
    }


def stored_value(name: str, row: Mapping[str, Any]) -> float | None:
    """What the row says this completion got, under this name if it knows it."""
    value = (row.get("scores") or {}).get(name, row.get("reward"))
    return None if value is None else float(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Score]]) -> list[str]:
    """One line a reward, and one of its reasons if it gives any."""
    width = max(len("reward"), *map(len, columns))
    lines = [
        f"{'reward':{width}}  {'rows':>6}  {'mean':>6}  {'stored':>6}  {'differ':>6}  "
        f"{'ms p50':>7}  {'max':>8}  statuses"
    ]
    for name, column in columns.items():
        known = [value for row in rows if (value := stored_value(name, row)) is not None]
        stored = f"{statistics.fmean(known):.4f}" if known else "-"
        differ = str(len(disagreements(name, rows, column))) if known else "-"
        values = [score.value for score in column] or [0.0]
        times = [1_000 * score.seconds for score in column] or [0.0]
        lines.append(
            f"{name:{width}}  {len(rows):6}  {statistics.fmean(values):6.4f}  {stored:>6}  "
            f"{differ:>6}  {statistics.median(times):7.2f}  {max(times):8.2f}  "
            + tally(str(score.status) for score in column)
        )
        reasons = tally(score.reason.partition(":")[0] for score in column if score.reason)
        if reasons:
            lines.append(f"{'':{width}}  {reasons}")
    return lines


def tally(found: Any) -> str:
    """`ok 3, crash 1`, the commonest first."""
    return ", ".join(f"{what} {n}" for what, n in collections.Counter(found).most_common())


def disagreements(
    name: str, rows: Sequence[Mapping[str, Any]], column: Sequence[Score]
) -> list[str]:
    """One line for each completion whose new value is not the stored one."""
    lines = []
    for number, (row, score) in enumerate(zip(rows, column, strict=True)):
        stored = stored_value(name, row)
        if stored is not None and abs(stored - score.value) > _SAME:
            step = f"step {row['step']} " if "step" in row else ""
            sample = f" sample {row['sample']}" if "sample" in row else ""
            ending = f" ({row['finish_reason']})" if "finish_reason" in row else ""
            lines.append(
                f"{name}: {step}{problem_of(row, number).uid}{sample}{ending}: stored {stored:g}, "
                f"new {score.value:g} {score.status} {score.detail} …{row['completion'][-80:]!r}"
            )
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
