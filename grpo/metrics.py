"""What a run says about itself: metrics and rollouts as JSON lines, TensorBoard, a console table.

Every file here can be cut back to the step a run resumes from, so that a run that was killed and
started again leaves the same rows as one that was not.
"""

import collections
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import jax
import numpy as np

from grpo.runtime import hosts

# ---- Files -------------------------------------------------------------------------------------


def truncate_jsonl(path: Path, key: str, below: int) -> None:
    """Keeps the rows of `path` whose `key` is less than `below`; no file is no rows.

    The new file replaces the old one in one step. A last line without its end, which is what a
    killed process leaves, is dropped.

    Raises:
      ValueError: any other line is not a JSON object with that key.
    """
    if not path.exists():
        return
    partial = path.with_name(path.name + ".partial")
    with path.open("rb") as old, partial.open("wb") as new:
        for number, line in enumerate(old, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                keep = json.loads(line)[key] < below
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no row with {key!r}") from error
            if keep:
                new.write(line)
    os.replace(partial, path)


class JsonlWriter:
    """Appends rows to a JSON-lines file; each is on its way to disk when `write` returns.

    Args:
      path: the file; its folder is made.
      resume_step: rows already there whose "step" is not below this are removed. 0, a run that
        begins, removes all.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_jsonl(path, key="step", below=resume_step)
        # A lone surrogate in a text has no UTF-8; backslashreplace writes it as \udxxx, which is
        # also how JSON spells it.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row, in the order of its keys. Numbers JSON does not have become null."""
        text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
        self._file.write(text + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """`value` as what JSON has: dicts, lists, strings, bools, ints, finite floats, None."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


class MetricLog:
    """Metrics of a run: `metrics.jsonl` always, TensorBoard events if tensorboardX is installed.

    Only process 0 writes; elsewhere every method does nothing.

    Args:
      workdir: folder of the run.
      resume_step: first step this process will log. Rows from there on, left by a process that
        was killed after its last checkpoint, are removed, and TensorBoard is told to.
      process: number of this process; by default JAX's.
    """

    def __init__(self, workdir: Path, resume_step: int = 0, process: int | None = None):
        self._rows: JsonlWriter | None = None
        self._events: Any = None
        if (jax.process_index() if process is None else process) == 0:
            self._rows = JsonlWriter(workdir / "metrics.jsonl", resume_step)
            self._events = _summary_writer(workdir / "tensorboard", resume_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row: the step, then the metrics by name. A NaN or infinity is null.

        Args:
          step: number of the training step, from 0.
          metrics: name -> number (Python, numpy or a JAX scalar), or a list of numbers: a
            histogram, which is written to metrics.jsonl alone.
        """
        if self._rows is None:
            return
        values = {name: np.asarray(metrics[name], float).tolist() for name in sorted(metrics)}
        self._rows.write({"step": int(step)} | values)
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, float) and math.isfinite(value):
                    self._events.add_scalar(name, value, step)
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        for writer in (self._rows, self._events):
            if writer is not None:
                writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _summary_writer(folder: Path, resume_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print('no TensorBoard events: pip install "grpo[tensorboard]" to have them')
        return None
    # purge_step makes TensorBoard drop what earlier event files hold from this step on. Without a
    # suffix a file is named after the second it was made in, and may overwrite an earlier one.
    suffix = f".from_step_{resume_step}"
    return SummaryWriter(str(folder), purge_step=resume_step, filename_suffix=suffix)


# ---- Console -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the console table: its title, the metric it shows, and how (`format`)."""

    title: str
    metric: str
    format: str  # of the format() mini-language, with a width

    @property
    def width(self) -> int:
        """Characters that a usual value needs."""
        return max(len(self.title), len(format(0.0, self.format)))

    def cell(self, metrics: Mapping[str, Any]) -> str:
        """The metric's text; "-" if it is missing or not a number."""
        value = float(metrics.get(self.metric, math.nan))
        text = "-" if math.isnan(value) else format(value, self.format)
        return text.rjust(self.width)


GRPO_COLUMNS = (
    Column("reward", "reward/mean", "7.3f"),
    Column("solved", "reward/solved", "7.1%"),
    Column("length", "rollout/length_tokens_mean", "7.1f"),
    Column("tok/s", "rollout/tokens_per_s", "7,.0f"),
    Column("sample s", "time/sample_s", "5.2f"),
    Column("score s", "time/score_s", "5.2f"),
    Column("update s", "time/update_s", "5.2f"),
    Column("step s", "time/step_s", "6.2f"),
    Column("signal", "groups/signal", "6.1%"),
    Column("gap", "sampler/gap_nats_max", "7.1e"),
)

SFT_COLUMNS = (
    Column("loss", "sft/loss_nats", "8.4f"),
    Column("confident", "sft/confident", "8.1%"),
    Column("lr", "optim/learning_rate", "8.2e"),
    Column("tok/s", "sft/tokens_per_s", "8,.0f"),
)

DISTIL_COLUMNS = (
    Column("divergence", "distil/divergence_nats", "8.4f"),
    Column("teacher", "distil/teacher_logprob_nats", "7.3f"),
    Column("entropy", "policy/entropy_nats", "7.3f"),
    Column("solved", "reward/solved", "7.1%"),
    Column("length", "rollout/length_tokens_mean", "7.1f"),
    Column("tok/s", "rollout/tokens_per_s", "7,.0f"),
    Column("sample s", "time/sample_s", "5.2f"),
    Column("update s", "time/update_s", "5.2f"),
    Column("step s", "time/step_s", "6.2f"),
    Column("gap", "sampler/gap_nats_max", "7.1e"),
)

_HEADER_EVERY = 20  # rows: the titles never scroll out of an ordinary window
_PACE_OVER = 20  # steps: long enough to smooth, short enough to follow growing completions


class ConsoleTable:
    """A line a step on the console of process 0, with the time that is left.

    Args:
      columns: what to show after the step.
      total: steps of the run; the last one is total - 1.
      every: print steps that are multiples of this, and the last.
      stream: where to print; by default the standard output.
      clock: seconds.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        total: int,
        every: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._columns = columns
        self._total = total
        self._every = every
        self._stream = stream
        self._clock = clock
        self._num_rows = 0
        self._seen: collections.deque[tuple[int, float]] = collections.deque(maxlen=_PACE_OVER + 1)

    def row(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Prints the line of `step`, if it is due, and the titles before every twentieth."""
        self._seen.append((step, self._clock()))
        if step % self._every and step != self._total - 1:
            return
        width = 2 * len(str(self._total)) + 1
        if self._num_rows % _HEADER_EVERY == 0:
            titles = [column.title.rjust(column.width) for column in self._columns]
            self._print(["step".rjust(width), *titles, "left".rjust(8)])
        self._num_rows += 1
        cells = [column.cell(metrics) for column in self._columns]
        self._print([f"{step}/{self._total}".rjust(width), *cells, self._left(step).rjust(8)])

    def _left(self, step: int) -> str:
        """h:mm:ss to the end at the pace of the last steps; the first pays for compiling."""
        (first_step, first_time), (_, now) = self._seen[0], self._seen[-1]
        if step <= first_step:
            return "-"
        seconds = (now - first_time) / (step - first_step) * (self._total - 1 - step)
        return hours_minutes_seconds(seconds)

    def _print(self, cells: Sequence[str]) -> None:
        if hosts.is_main():
            print("  ".join(cells), file=self._stream or sys.stdout, flush=True)


def hours_minutes_seconds(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
