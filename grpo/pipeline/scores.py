"""How good the model of every stage is: one table, as in the paper, and one picture."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from grpo.metrics import hours_minutes_seconds

_COLOURS = ("#2f6db3", "#d9792b", "#3a8f5c", "#8a5fb0", "#8a8a8a")


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured stage.

    Attributes:
      name: of the stage.
      about: what it did.
      metrics: `eval/...` of the model it made.
      seconds: it took.
    """

    name: str
    about: str
    metrics: Mapping[str, float]
    seconds: float


def headings(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, str]:
    """Title -> metric of every column between the stage's name and its time.

    pass@1, pass@k of the largest k, maj@k, then `columns`, then the mean length.
    """
    metrics = rows[-1].metrics if rows else {}
    found: dict[str, str] = {}
    for kind, title in (("pass_at", "pass@"), ("maj_at", "maj@")):
        numbers = sorted(
            int(rest)
            for name in metrics
            if (rest := name.removeprefix(f"eval/{kind}_")) != name and rest.isdigit()
        )
        ends = {numbers[0], numbers[-1]} if numbers else set()
        found |= {f"{title}{k}": f"eval/{kind}_{k}" for k in sorted(ends)}
    return {**found, **columns, "tokens": "eval/length_tokens_mean"}


def cell(metrics: Mapping[str, float], name: str) -> str:
    """A metric's text, with its interval where there is one; "-" if it was not measured."""
    value = metrics.get(name, math.nan)
    if math.isnan(value):
        return "-"
    if name == "eval/length_tokens_mean":
        return f"{value:.1f}"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{interval}"


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> list[list[str]]:
    titles = headings(rows, columns)
    lines = [["stage", *titles, "took"]]
    for row in rows:
        cells = [cell(row.metrics, name) for name in titles.values()]
        lines.append([row.name, *cells, hours_minutes_seconds(row.seconds)])
    return lines


def scores_console(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """The table, aligned for a terminal."""
    lines = _table(rows, columns)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def scores_markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """The table as Markdown, with what each stage did below."""
    head, *body = _table(rows, columns)
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    lines += [f"| {' | '.join(line)} |" for line in body]
    lines += [""] + [f"- {row.name}: {row.about}" for row in rows if row.about]
    return "\n".join(lines) + "\n"


def draw_scores(rows: Sequence[Row], columns: Mapping[str, str], path: Path) -> None:
    """Draws pass@1 of every stage with its 95 % interval, and the other shares beside it."""
    shares = {"pass@1": "eval/pass_at_1", **columns}
    figure = Figure(figsize=(max(6.0, 1.15 * len(rows) + 2), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (title, name) in enumerate(shares.items()):
        # Side by side, in the order of the legend.
        places = [n + 0.16 * (number - (len(shares) - 1) / 2) for n in range(len(rows))]
        values = [row.metrics.get(name, math.nan) for row in rows]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(places, values, "o", color=colour, markersize=6, label=title)
        lows = [row.metrics.get(f"{name}_low", math.nan) for row in rows]
        highs = [row.metrics.get(f"{name}_high", math.nan) for row in rows]
        axes.vlines(places, lows, highs, color=colour, alpha=0.6, linewidth=1.8)
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("held-out problems after each stage", fontsize=11, loc="left")
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
