"""Pictures and tables of a finished, or still running, training run.

    python -m grpo.report WORKDIR

draws WORKDIR/curves.png from WORKDIR/metrics.jsonl and sets the first held-out evaluation against
the last: printed, and written to WORKDIR/before_after.md. A run does the same when it ends.
"""

import argparse
import collections
import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]  # metric -> its steps, its values


def read_metrics(path: Path) -> Series:
    """Every metric of a `metrics.jsonl` over the steps that logged it; null reads as NaN.

    A last line that is still being written is left out.
    """
    points: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                row = json.loads(line)
                for name in row.keys() - {"step"}:
                    value = math.nan if row[name] is None else row[name]
                    points[name].append((row["step"], value))
    return {
        name: (np.array([s for s, _ in rows]), np.array([v for _, v in rows], np.float64))
        for name, rows in points.items()
    }


# ---- Curves ------------------------------------------------------------------------------------

_BLUE, _ORANGE, _GREEN, _GREY = "#2f6db3", "#d9792b", "#3a8f5c", "#8a8a8a"


@dataclasses.dataclass(frozen=True)
class _Panel:
    title: str
    lines: tuple[tuple[str, str, str], ...]  # metric, label, colour
    percent: bool = False
    log: bool = False
    held_out: bool = False


_SIGNAL = _Panel("groups with a signal", (("groups/signal", "", _BLUE),), percent=True)
_DIVERGENCE = _Panel(
    "divergence from the teacher, nats a token", (("distil/divergence_nats", "", _BLUE),)
)
_PANELS = (
    _Panel(
        "reward and solved problems",
        (("reward/mean", "reward", _GREY), ("reward/solved", "solved (training)", _BLUE)),
        held_out=True,
    ),
    _Panel("completion length, tokens", (("rollout/length_tokens_mean", "", _BLUE),)),
    _Panel("entropy, nats a token", (("policy/entropy_nats", "", _BLUE),)),
    _SIGNAL,
    _Panel("gradient norm", (("optim/grad_norm", "", _BLUE),)),
    _Panel("sampler - trainer gap, nats (max)", (("sampler/gap_nats_max", "", _BLUE),), log=True),
)


def draw_curves(workdir: Path) -> Path:
    """Draws the training curves of `workdir` and returns the picture's path.

    Raises:
      FileNotFoundError: no metrics.jsonl there.
    """
    series = read_metrics(workdir / "metrics.jsonl")
    figure = Figure(figsize=(13.5, 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    taught = "distil/divergence_nats" in series
    for axes, panel in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        _draw_panel(axes, _DIVERGENCE if taught and panel is _SIGNAL else panel, series)
    path = workdir / "curves.png"
    figure.savefig(path, dpi=110)
    return path


def _draw_panel(axes: Axes, panel: _Panel, series: Series) -> None:
    axes.set_title(panel.title, fontsize=11, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    drawn = [_draw_line(axes, series, *line, log=panel.log) for line in panel.lines]
    if panel.held_out:
        drawn.append(_draw_held_out(axes, series))
    if not any(drawn):
        axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)
        return
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(-0.03, 1.03)
    if panel.log:  # whole decades: automatic limits collapse when all values are nearly equal
        low, high = np.floor(np.log10(axes.dataLim.intervaly))
        axes.set_yscale("log")
        axes.set_ylim(10.0**low, 10.0 ** (high + 1))
    if len(panel.lines) > 1:
        axes.legend(fontsize=9, frameon=False)


def _draw_line(
    axes: Axes, series: Series, metric: str, label: str, colour: str, *, log: bool
) -> bool:
    """The metric as measured, faint, and smoothed over a twentieth of the run; False if absent."""
    if metric not in series:
        return False
    steps, values = series[metric]
    usable = np.isfinite(values) & ((values > 0) | (not log))
    steps, values = steps[usable], values[usable]
    if not len(values):
        return False
    window = max(1, len(values) // 20)
    axes.plot(steps, values, color=colour, alpha=0.3 if window > 1 else 1.0, linewidth=1.0)
    axes.plot(steps, _smooth(values, window), color=colour, linewidth=1.8, label=label or None)
    return True


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, of fewer at the start: no value sees its future."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def _draw_held_out(axes: Axes, series: Series) -> bool:
    """pass@1 on held-out problems, with its interval where one was logged."""
    if "eval/pass_at_1" not in series:
        return False
    steps, values = series["eval/pass_at_1"]
    axes.plot(steps, values, "o-", color=_ORANGE, markersize=5, label="solved (held out)")
    low, high = series.get("eval/pass_at_1_low"), series.get("eval/pass_at_1_high")
    if low is not None and high is not None and len(low[0]) == len(high[0]) == len(steps):
        axes.vlines(steps, low[1], high[1], color=_ORANGE, alpha=0.6, linewidth=1.5)
    return True


# ---- Before and after --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Example:
    """One held-out problem and what the model wrote before and after training."""

    prompt: str
    before: str
    after: str


def before_after_markdown(
    before: Mapping[str, float],
    after: Mapping[str, float],
    examples: Sequence[Example] = (),
    max_chars: int = 600,
) -> str:
    """Held-out metrics before and after, then completions side by side, as Markdown tables.

    Completions are text that a model made up, so nothing in them acts as Markdown or HTML.

    Args:
      before: metric name -> value, at the start.
      after: the same, at the end; a metric of one side only is shown with "-" on the other.
      examples: problems to show.
      max_chars: of each text; the rest is cut.
    """
    lines = ["| metric | before | after | change |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in _metric_rows(before, after)]
    if examples:
        lines += ["", "| prompt | before | after |", "|---|---|---|"]
    for example in examples:
        texts = (example.prompt, example.before, example.after)
        lines.append(f"| {' | '.join(markdown_cell(t, max_chars) for t in texts)} |")
    return "\n".join(lines) + "\n"


def before_after_console(
    before: Mapping[str, float],
    after: Mapping[str, float],
    examples: Sequence[Example] = (),
    max_chars: int = 600,
) -> str:
    """As `before_after_markdown`, aligned for a terminal, which no text can send commands to."""
    rows = [("metric", "before", "after", "change"), *_metric_rows(before, after)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    for example in examples:
        for title, text in dataclasses.asdict(example).items():
            shown = visible(_cut(text, max_chars)).replace("\n", "\n          ")
            lines.append(f"{title + ':':<9} {shown}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _metric_rows(
    before: Mapping[str, float], after: Mapping[str, float]
) -> list[tuple[str, str, str, str]]:
    rows = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, math.nan), after.get(name, math.nan)
        rows.append((name, _number(old), _number(new), _number(new - old, "+.4g")))
    return rows


def _number(value: float, spec: str = ".4g") -> str:
    return format(value, spec) if math.isfinite(value) else "-"


def markdown_cell(text: str, max_chars: int) -> str:
    """`text` as the content of one table cell: literal, on one line, at most `max_chars` long."""
    literal = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", visible(_cut(text, max_chars)))
    return literal.replace("\n", "<br>")


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def visible(text: str) -> str:
    r"""`text` with every character that is not seen, a newline apart, written as \x or \u.

    Control characters move a terminal's cursor or colour; format characters reverse or hide text.
    """
    return "".join(c if c == "\n" or _is_seen(c) else _escape(c) for c in text)


def _is_seen(char: str) -> bool:
    # C*: control, format, surrogate, private, unassigned. Zl, Zp: line and paragraph separators.
    category = unicodedata.category(char)
    return not category.startswith("C") and category not in ("Zl", "Zp")


def _escape(char: str) -> str:
    return (
        char.encode("ascii", "backslashreplace").decode()
        if ord(char) > 127
        else f"\\x{ord(char):02x}"
    )


def first_and_last_eval(series: Series) -> tuple[dict[str, float], dict[str, float]]:
    """The held-out metrics ("eval/...") of the first and of the last evaluation.

    With a single evaluation there is no first; with none, both are empty.
    """
    held_out: dict[str, Any] = {n: v for n, (_, v) in series.items() if n.startswith("eval/")}
    first = {name: float(values[0]) for name, values in held_out.items() if len(values) > 1}
    last = {name: float(values[-1]) for name, values in held_out.items()}
    return first, last


# ---- A run -------------------------------------------------------------------------------------


def report_run(workdir: Path, num_examples: int = 3) -> None:
    """Draws curves.png; after an evaluation also prints and writes before against after.

    Raises:
      FileNotFoundError: no metrics.jsonl there.
    """
    print(draw_curves(workdir))
    first, last = first_and_last_eval(read_metrics(workdir / "metrics.jsonl"))
    if not last:
        return
    examples = held_out_examples(workdir / "evaluations", num_examples)
    path = workdir / "before_after.md"
    path.write_text(before_after_markdown(first, last, examples), encoding="utf-8")
    print(f"{before_after_console(first, last, examples)}{path}")


def held_out_examples(folder: Path, count: int) -> list[Example]:
    """The first sample of the first problems, in the first and in the last evaluation of `folder`.

    "Before" is empty where there is a single evaluation, or where it did not ask this problem.
    """
    paths = sorted(folder.glob("step_*.jsonl"))
    if not paths:
        return []
    before = _first_samples(paths[0]) if len(paths) > 1 else {}
    after = list(_first_samples(paths[-1]).items())[:count]
    return [
        Example(row["prompt"], before.get(uid, {}).get("completion", ""), row["completion"])
        for uid, row in after
    ]


def _first_samples(path: Path) -> dict[str, dict[str, Any]]:
    """Problem -> the row of its first sample; a last line still being written is left out."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.endswith("\n")]
    return {row["uid"]: row for row in rows if row["sample"] == 0}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m grpo.report", description="Draw a run.")
    parser.add_argument("workdir", type=Path)
    try:
        report_run(parser.parse_args(argv).workdir)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
