"""Reads recorded runs of this trainer and its peers; prints how they compare.

  python tools/peers/compare.py bench.jsonl

Prints a Markdown table and then one JSON line. `tools/bench_peers.sh` writes the records, a line
a run: `workload`, `round` (counted from 1) and `trainer`, then either `result`, the JSON line that
the trainer printed, or `failure`, in words.

The machine's speed drifts, so a ratio is formed within a round, whose runs follow each other; what
is shown is the median round's and, when they differ, the lowest and the highest. The standard
library only.
"""

import argparse
import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "ours"
_NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run. `step_s` is the median step's; the rates count sampled tokens only."""

    rollout_tok_s: float
    step_tok_s: float
    step_s: float
    tokens: float
    peak_rss_gib: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A record: what was measured, or why it was not (`failure`)."""

    workload: str
    round: int
    trainer: str
    measured: Measured | None
    failure: str


@dataclasses.dataclass(frozen=True)
class Spread:
    """The middle of some rounds' values, and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None of no values."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


@dataclasses.dataclass(frozen=True)
class Row:
    """A trainer at a workload.

    Attributes:
      measured: medians over the rounds that it finished; None if it finished none.
      rollout, step, memory: how many times better ours is, in the rounds that both finished:
        tokens sampled a second of rollout, tokens a second of the whole step, and peak memory
        (theirs over ours). By token, because at natural lengths nobody samples the same number;
        where all do, `step` is the ratio of the steps' seconds.
      rounds: how many it was run in.
      failures: what became of the rounds that it did not finish.
    """

    workload: str
    trainer: str
    measured: Measured | None
    rollout: Spread | None
    step: Spread | None
    memory: Spread | None
    rounds: int
    failures: list[str]


def parse_run(record: dict[str, Any]) -> Run:
    """One record.

    Raises:
      ValueError: a finished run's result lacks a number, or has one that is not above zero.
    """
    where = f"{record['workload']}, round {record['round']}, {record['trainer']}"
    measured = None
    if "failure" not in record:
        result = dict(record["result"])
        try:
            result["step_s"] = statistics.median(result["step_s"])
            numbers = {f.name: float(result[f.name]) for f in dataclasses.fields(Measured)}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: its JSON line lacks or garbles {error}: {result}") from None
        bad = {name: x for name, x in numbers.items() if not (math.isfinite(x) and x > 0)}
        if bad:
            raise ValueError(f"{where}: {bad} cannot be compared; did the run time a step?")
        measured = Measured(**numbers)
    return Run(
        workload=record["workload"],
        round=record["round"],
        trainer=record["trainer"],
        measured=measured,
        failure=record.get("failure", ""),
    )


def compare(runs: Iterable[Run]) -> list[Row]:
    """A row for each trainer at each workload, in the order of their first runs.

    Raises:
      ValueError: a trainer has two records of one round.
    """
    grouped: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        rounds = grouped.setdefault((run.workload, run.trainer), {})
        if run.round in rounds:
            raise ValueError(f"{run.workload}: round {run.round} has {run.trainer} twice")
        rounds[run.round] = run
    return [_row(rounds, grouped.get((key[0], OURS), {})) for key, rounds in grouped.items()]


def _row(theirs: dict[int, Run], ours: dict[int, Run]) -> Row:
    them = {n: run.measured for n, run in theirs.items() if run.measured}
    us = {n: run.measured for n, run in ours.items() if run.measured}
    pairs = [(us[n], them[n]) for n in them if n in us]
    first = next(iter(theirs.values()))
    return Row(
        workload=first.workload,
        trainer=first.trainer,
        measured=_median(list(them.values())) if them else None,
        rollout=Spread.of([u.rollout_tok_s / t.rollout_tok_s for u, t in pairs]),
        step=Spread.of([u.step_tok_s / t.step_tok_s for u, t in pairs]),
        memory=Spread.of([t.peak_rss_gib / u.peak_rss_gib for u, t in pairs]),
        rounds=len(theirs),
        failures=[run.failure for run in theirs.values() if not run.measured],
    )


def _median(runs: Sequence[Measured]) -> Measured:
    names = [field.name for field in dataclasses.fields(Measured)]
    return Measured(**{name: statistics.median(getattr(r, name) for r in runs) for name in names})


HEADER = (
    "workload",
    "trainer",
    "tokens a step",
    "rollout tokens/s",
    "step s",
    "step tokens/s",
    "peak GiB",
    "ours: rollout",
    "step",
    "memory",
)


def markdown(rows: Sequence[Row]) -> str:
    """The table; ratios as "3.4× (3.2–3.5)", and under it what failed."""
    lines = [HEADER, ("---",) * 2 + ("---:",) * (len(HEADER) - 2)]
    lines += [_cells(row) for row in rows]
    table = [f"| {' | '.join(cells)} |" for cells in lines]
    partly = [row for row in rows if row.measured and row.failures]
    notes = [f"- {r.workload}, {r.trainer}: {_failed(r)} of {r.rounds} rounds" for r in partly]
    return "\n".join(table + (["", *notes] if notes else []))


def _cells(row: Row) -> tuple[str, ...]:
    if row.measured is None:
        empty = (_NOTHING,) * (len(HEADER) - 3)
        return (row.workload, row.trainer, _failed(row), *empty)
    m = row.measured
    numbers = (
        f"{m.tokens:,.0f}",
        f"{m.rollout_tok_s:.0f}",
        f"{m.step_s:.1f}",
        f"{m.step_tok_s:.1f}",
        f"{m.peak_rss_gib:.1f}",
    )
    if row.trainer == OURS:
        return (row.workload, row.trainer, *numbers, *(_NOTHING,) * 3)
    ratios = (_times(row.rollout), _times(row.step), _times(row.memory))
    return (row.workload, row.trainer, *numbers, *ratios)


def _times(ratio: Spread | None) -> str:
    if ratio is None:
        return _NOTHING
    text, low, high = (f"{x:.1f}" for x in (ratio.median, ratio.low, ratio.high))
    return f"{text}×" if low == high else f"{text}× ({low}–{high})"


def _failed(row: Row) -> str:
    """ "out of memory" if every round ended so, else "out of memory in 2, exit 1 in 1"."""
    counts = collections.Counter(row.failures)
    if row.measured is None and len(counts) == 1:
        return row.failures[0]
    return ", ".join(f"{failure} in {count}" for failure, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="JSON lines that bench_peers.sh wrote")
    lines = parser.parse_args().records.read_text(encoding="utf-8").splitlines()
    rows = compare(parse_run(json.loads(line)) for line in lines)
    print(markdown(rows))
    print()
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
