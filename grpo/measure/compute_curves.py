"""Accuracy against the tokens spent on a problem: votes, tries, and thoughts held to a budget.

Of one model `measure` makes up to four curves: `majority` (the vote of k samples), `best_of` (the
best of k by the verifier, which is pass@k), `forced` (thoughts cut at a budget) and `extended`
(drawn out to it). The first two spend k completions a problem, the others one, what was put into it
included.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

from grpo.measure.estimators import bootstrap_interval
from grpo.measure.forcing import EXTENDED, FORCED, Forcer, with_drafts
from grpo.measure.held_out import Evaluator, majority_values, pass_values, tries
from grpo.metrics import JsonlWriter
from grpo.model.params import Params
from grpo.rollout import judge, readable_rows
from grpo.runinfo import write_json
from grpo.runtime import hosts
from grpo.structs import Rollout, Scores
from rewards.api import Score

MAJORITY, BEST_OF = "majority", "best_of"

# Of each curve: how its points are named, its title and its colour.
_LOOKS = {
    MAJORITY: ("k", "majority of k", "#2f6db3"),
    BEST_OF: ("k", "best of k by the verifier", "#8a8a8a"),
    FORCED: ("B", "thought cut at B tokens", "#d9792b"),
    EXTENDED: ("B", "thought drawn out to B tokens", "#3a8f5c"),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
      setting: k samples, or B tokens of thought.
      tokens: spent on a problem, on average.
      accuracy: mean over problems.
      low, high: its 95 % bootstrap interval.
    """

    setting: int
    tokens: float
    accuracy: float
    low: float
    high: float


Curves = dict[str, list[Point]]  # method -> its points, cheapest setting first


def measure(
    forcer: Forcer,
    weights: Params,
    rollout: Rollout,
    scores: Scores,
    step: int,
    path: Path,
) -> Curves:
    """All curves of one model.

    Args:
      forcer: holds thoughts to budgets; its evaluator measures.
      weights: the decode form of the model.
      rollout: what `Evaluator.sample` gave for it.
      scores: likewise.
      step: after which the model is measured, for the rows.
      path: JSON lines; gets every completion that was held to a budget.
    """
    evaluator = forcer.evaluator
    solved_PG = evaluator.scorer.solved_PG(scores)
    curves = sampling_curves(rollout, solved_PG, evaluator.answers_PG(rollout))
    rollouts = {
        setting: with_drafts(rollout, drafts)
        for setting, drafts in forcer(weights, rollout).items()
    }
    judged = _judged(evaluator, rollouts)
    if hosts.is_main():
        with JsonlWriter(path) as writer:
            for (method, budget), written in rollouts.items():
                found = judged[method, budget]
                for row in readable_rows(step, written, found, evaluator.engine.tokenizer):
                    writer.write({"method": method, "budget": budget, **row})
    for (method, budget), written in rollouts.items():
        solved_PG = evaluator.scorer.solved_PG(judged[method, budget])
        tokens = float(written.lengths_B.mean())
        curves.setdefault(method, []).append(_point(budget, tokens, solved_PG.mean(axis=1)))
    return curves


def sampling_curves(
    rollout: Rollout, solved_PG: np.ndarray, answers_PG: Sequence[Sequence[str | None]] | None
) -> Curves:
    """`majority`, where answers are known, and `best_of`, for k = 1, 2, 4, … G."""
    tokens, ks = float(rollout.lengths_B.mean()), tries(rollout.group_size)
    curves: Curves = {}
    if answers_PG is not None:
        curves[MAJORITY] = [
            _point(k, k * tokens, majority_values(answers_PG, solved_PG, k)) for k in ks
        ]
    curves[BEST_OF] = [_point(k, k * tokens, pass_values(solved_PG, k)) for k in ks]
    return curves


def _point(setting: int, tokens: float, values_P: Sequence[float] | np.ndarray) -> Point:
    return Point(setting, tokens, float(np.mean(values_P)), *bootstrap_interval(values_P))


def _judged(
    evaluator: Evaluator, rollouts: Mapping[tuple[str, int], Rollout]
) -> dict[tuple[str, int], Scores]:
    """The scores of every setting; a completion that several have in common is judged once."""
    tokenizer, scorer = evaluator.engine.tokenizer, evaluator.scorer
    asked: dict[tuple[int, tuple[int, ...]], Future[list[Score]] | None] = {}
    for rollout in rollouts.values():
        for b, completion in enumerate(rollout.completions):
            if (b, completion.tokens) not in asked:
                problem = rollout.problems[completion.problem]
                asked[b, completion.tokens] = judge(scorer, tokenizer, completion, problem)
    scores = {}
    for setting, rollout in rollouts.items():
        futures = [asked[b, c.tokens] for b, c in enumerate(rollout.completions)]
        G = rollout.group_size
        scores[setting] = scorer.collect([futures[b : b + G] for b in range(0, len(futures), G)])
    return scores


# ---- What is shown -----------------------------------------------------------------------------


def write_curves(workdir: Path, models: Mapping[str, Curves], forcer: Forcer, step: int) -> None:
    """Prints a table and writes budget.json and budget.png, on process 0.

    Args:
      workdir: of the run.
      models: name -> its curves; "before" is drawn dashed.
      forcer: that measured them.
      step: of the checkpoint.
    """
    if not hosts.is_main():
        return
    print(curves_table(models))
    report = {
        "step": step,
        "problems": len(forcer.evaluator.problems),
        "samples": forcer.evaluator.num_samples,
        "settings": dataclasses.asdict(forcer.settings),
        "models": {
            model: {
                method: [dataclasses.asdict(point) for point in points]
                for method, points in curves.items()
            }
            for model, curves in models.items()
        },
    }
    write_json(workdir / "budget.json", report)
    draw_curves(workdir / "budget.png", models)
    print(workdir / "budget.png")


def curves_table(models: Mapping[str, Curves]) -> str:
    """A line a point, methods in the order measured, models beside one another."""
    names = list(models)
    lines = [f"{'method':10s} {'setting':>8s}" + "".join(f"  {name:>32s}" for name in names)]
    methods = dict.fromkeys(method for curves in models.values() for method in curves)
    for method in methods:
        columns = [models[name][method] for name in names]
        for points in zip(*columns, strict=True):
            setting = f"{_LOOKS[method][0]}={points[0].setting}"
            lines.append(f"{method:10s} {setting:>8s}" + "".join(f"  {_cell(p)}" for p in points))
    lines.append("accuracy [95 % interval], tokens a problem")
    return "\n".join(lines)


def _cell(point: Point) -> str:
    accuracy = f"{point.accuracy:.3f} [{point.low:.3f}, {point.high:.3f}]"
    return f"{accuracy} {point.tokens:8.1f}".rjust(32)


def draw_curves(path: Path, models: Mapping[str, Curves]) -> None:
    """Accuracy with its interval against tokens a problem; a colour a method, dashes for before."""
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for model, curves in models.items():
        for method, points in curves.items():
            _, title, colour = _LOOKS[method]
            tokens = [point.tokens for point in points]
            axes.plot(
                tokens,
                [point.accuracy for point in points],
                marker="o",
                markersize=4,
                color=colour,
                linestyle="--" if model == "before" else "-",
                label=title if len(models) == 1 else f"{title}, {model}",
            )
            low, high = [point.low for point in points], [point.high for point in points]
            axes.vlines(tokens, low, high, color=colour, alpha=0.4, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("tokens a problem, mean", fontsize=9)
    axes.set_title("held-out problems solved", fontsize=11, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
