"""Traces as files: worked problems as rows that say where they come from, and what was left out."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.config import RejectionConfig
from grpo.data.sources import ProblemSource
from grpo.metrics import JsonlWriter
from grpo.stages import selection
from rewards.api import Problem

Row = Mapping[str, Any]
Counts = Mapping[str, Any]  # of a chunk, as `grpo.stages.rejection.sift` gives them

_TAKEN = ("uid", "messages", "prompt", "question", "answer")  # columns with a meaning of their own


def row_of(problem: Problem, uid: str, worked: str, provenance: Row) -> dict[str, Any]:
    """A worked problem as a row that `grpo.data.sources.JsonlProblems` reads."""
    messages = [dict(message) for message in problem.messages]
    asked: Row = {"messages": messages} if messages else {"prompt": problem.prompt}
    own = {n: v for n, v in problem.meta.items() if n not in ("worked", "provenance")}
    answer = {"answer": problem.reference}
    return {"uid": uid, **asked, **answer, **own, "worked": worked, "provenance": dict(provenance)}


def check_rows(source: ProblemSource, name: str, *, worked: bool = False) -> None:
    """Looks at all problems of a source before anything is sampled.

    Args:
      source: the problems.
      name: of the source, for messages.
      worked: whether each must have a completion already.

    Raises:
      ValueError: a problem's meta has a column that rows need for themselves, or something that is
        no JSON, or it has no completion; names the problem.
    """
    for i in range(len(source)):
        problem = source[i]
        taken = [column for column in _TAKEN if column in problem.meta]
        if taken:
            raise ValueError(
                f"{name}: problem {problem.uid!r} has {taken[0]!r} in its meta, which in a row of "
                "traces means something else; rename or drop that column"
            )
        if worked and not isinstance(problem.meta.get("worked"), str):
            raise ValueError(
                f"{name}: problem {problem.uid!r} has no meta['worked'], the completion to learn "
                "from"
            )
        try:
            json.dumps(row_of(problem, problem.uid, "", {}))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: problem {problem.uid!r} cannot be written as JSON ({error}); its "
                "reference and meta must be plain data"
            ) from error


def chosen(
    rows: Sequence[Row], counts: Sequence[Counts], settings: RejectionConfig, seed: int
) -> tuple[list[Row], dict[str, Any]]:
    """What is written of all rows that passed, general data behind them, and the summary.

    Args:
      rows: in the order of problems and samples.
      counts: of every chunk.
      settings: which rows to take.
      seed: of the choices that are random.

    Raises:
      ValueError: no choice fits the settings.
    """
    different = selection.distinct(rows)
    kept = selection.first_of_each(different, settings.keep)
    traces = selection.balanced(kept, settings.bucket_share, seed)
    written = [*traces, *_general_rows(settings, len(traces), seed)]
    steps: Counter[str] = Counter()
    for part in counts:
        steps.update(part["steps"])
    rates = [rate for part in counts for rate in part["pass_rates"]]
    solvable = Counter(selection.bucket_of(rate) for rate in rates if rate)
    found, left = selection.bucket_counts(kept), selection.bucket_counts(traces)
    general = len(written) - len(traces)
    return written, {
        "problems": len(rates),
        "problems_never_right": sum(not rate for rate in rates),
        "steps": {
            **steps,
            "different": len(different),
            "kept": len(kept),
            "balanced": len(traces),
        },
        "duplicates": len(rows) - len(different),
        "pass_rates": {
            selection.bucket_name(b): {"problems": solvable[b], "kept": found[b], "rows": left[b]}
            for b in range(len(selection.BUCKETS))
        },
        "rows": len(written),
        "general_rows": general,
        "general_share": round(general / len(written), 6) if written else 0.0,
        "tokens": sum(part["tokens"] for part in counts),
        "seconds": round(sum(part["seconds"] for part in counts), 3),
    }


def _general_rows(settings: RejectionConfig, traces: int, seed: int) -> list[Row]:
    source = settings.general
    if source is None:
        return []
    count = selection.general_count(traces, settings.general_share)
    problems = [source[i] for i in selection.general_indices(len(source), count, seed)]
    return [
        row_of(p, f"general/{p.uid}", p.meta["worked"], {"problem": p.uid, "general": True})
        for p in problems
    ]


def table_of(summary: Mapping[str, Any]) -> str:
    """The summary as a person would want to read it."""
    steps = summary["steps"]
    lines = [f"{'completions':30s} {'left':>9s} {'share':>7s}"]
    for name, left in steps.items():
        lines.append(f"  {name:28s} {left:9,d} {left / max(steps['sampled'], 1):7.1%}")
    lines.append(f"{'pass rate':30s} {'problems':>9s} {'kept':>7s} {'rows':>7s}")
    lines.append(f"  {'0':28s} {summary['problems_never_right']:9,d} {0:7d} {0:7d}")
    for name, found in summary["pass_rates"].items():
        numbers = f"{found['problems']:9,d} {found['kept']:7,d} {found['rows']:7,d}"
        lines.append(f"  {name:28s} {numbers}")
    lines.append(
        f"general rows: {summary['general_rows']:,} of {summary['rows']:,} "
        f"({summary['general_share']:.1%}); {summary['tokens']:,} tokens sampled in "
        f"{summary['seconds']:,.0f} s"
    )
    return "\n".join(lines)


# ---- Files -------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """In one step: the file is whole, or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with JsonlWriter(partial) as writer:
        for row in rows:
            writer.write(row)
    os.replace(partial, path)


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """In one step; a column that a row does not have is null in it.

    Raises:
      ValueError: the rows do not agree on the type of a column.
    """
    import pyarrow
    import pyarrow.parquet

    columns = list(dict.fromkeys(name for row in rows for name in row))  # else the first row's
    try:
        table = pyarrow.Table.from_pylist([{n: row.get(n) for n in columns} for row in rows])
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(
            f"{path.name} cannot be written, its rows do not agree on the type of a column "
            f"({error}); traces.jsonl is there: set rejection.parquet to False"
        ) from error
    partial = path.with_name(path.name + ".partial")
    pyarrow.parquet.write_table(table, partial)
    os.replace(partial, path)
