"""Why a run is not learning, in words: what it logged, read most important first.

    python -m grpo.diagnose WORKDIR [--json]

reads WORKDIR/metrics.jsonl, config.json, gates/ and the end of rollouts.jsonl; a run prints the
short form when it ends. Each finder looks for one thing that goes wrong and answers with the
numbers that show it and the field of the configuration that mends it. docs/diagnose.md lists them.
"""

import argparse
import collections
import dataclasses
import enum
import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo.report import visible

# ---- What is read ------------------------------------------------------------------------------

_MIN_STEPS = 8  # below, a rate of reward is noise and nothing is said about learning
_MIN_WINDOW, _MAX_WINDOW = 3, 20  # steps at the start and at the end that are compared
_MAX_STEP = 2**53  # what JSON carries exactly
_ROLLOUT_BYTES = 4_000_000  # the end of rollouts.jsonl: some steps of it are enough


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
      steps: the training steps logged, rising.
      series: metric -> float64, one a step; NaN where it was not logged or not a number.
      held_out: (step, pass@1) of every evaluation.
      config: config.json; empty if there is none.
      rollouts: the last stored completions, as rollouts.jsonl has them.
      stop: alarms.json of the gate that ended the run, if one did.
      unreadable: lines of metrics.jsonl that are not a row.
    """

    steps: np.ndarray
    series: Mapping[str, np.ndarray]
    held_out: Sequence[tuple[int, float]] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rollouts: Sequence[Mapping[str, Any]] = ()
    stop: Mapping[str, Any] | None = None
    unreadable: int = 0

    @property
    def window(self) -> int:
        """Steps that make up the start, and the end, of this run: a fifth each, 3 to 20."""
        half = max(1, len(self.steps) // 2)
        return min(half, max(_MIN_WINDOW, min(_MAX_WINDOW, len(self.steps) // 5)))

    def first(self, name: str) -> float:
        """Mean of the metric over the first steps; NaN if it was never logged there."""
        return _mean(self.series.get(name, np.array([]))[: self.window])

    def last(self, name: str) -> float:
        """Mean of the metric over the last steps; NaN if it was never logged there."""
        return _mean(self.series.get(name, np.array([]))[-self.window :])

    def values(self, name: str) -> np.ndarray:
        """The metric's finite values over the whole run."""
        values = self.series.get(name, np.array([]))
        return values[np.isfinite(values)]

    def setting(self, path: str, default: Any = None) -> Any:
        """The field "section.name" of the run's configuration."""
        value: Any = self.config
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return default
            value = value[name]
        return value

    def said(self, path: str) -> str:
        """The field as "section.name", with its value where that is known."""
        value = self.setting(path)
        return path if value is None else f"{path} ({value})"


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def read_run(workdir: Path) -> Run:
    """Everything `diagnose` looks at; what is missing, cut off or not JSON is left out.

    A step that was logged twice, before and after a resume, counts as logged the second time.

    Raises:
      FileNotFoundError: no metrics.jsonl there.
    """
    rows, unreadable = _metric_rows(workdir / "metrics.jsonl")
    train = {step: row for step, row in sorted(rows.items()) if "reward/mean" in row}
    names = sorted({name for row in train.values() for name in row})
    series = {name: np.array([row.get(name, math.nan) for row in train.values()]) for name in names}
    held_out = [
        (step, row["eval/pass_at_1"])
        for step, row in sorted(rows.items())
        if math.isfinite(row.get("eval/pass_at_1", math.nan))
    ]
    steps = np.array(list(train), dtype=np.int64)
    config = _json(workdir / "config.json")
    return Run(
        steps=steps,
        series=series,
        held_out=held_out,
        config=config if isinstance(config, Mapping) else {},
        rollouts=_last_objects(workdir / "rollouts.jsonl"),
        stop=_stop(workdir / "gates", int(steps[-1]) if len(steps) else -1),
        unreadable=unreadable,
    )


def _metric_rows(path: Path) -> tuple[dict[int, dict[str, float]], int]:
    rows: dict[int, dict[str, float]] = collections.defaultdict(dict)
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                break  # being written
            try:
                step, values = _metric_row(json.loads(line))
                rows[step] |= values
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                unreadable += 1
    return rows, unreadable


def _metric_row(row: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    step = row["step"]
    if not isinstance(step, int) or not 0 <= step < _MAX_STEP:
        raise ValueError(f"{step!r} is no step")
    return step, {
        name: math.nan if value is None else float(value)
        for name, value in row.items()
        if value is None or isinstance(value, int | float)
    }


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None


def _last_objects(path: Path) -> list[dict[str, Any]]:
    """The objects in the last few megabytes of a JSON-lines file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _ROLLOUT_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")
    objects = []
    for line in lines[1:] if start else lines:  # the first may begin in its middle
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            objects.append(row)
    return objects


def _stop(folder: Path, last_step: int) -> Mapping[str, Any] | None:
    """The newest report of a gate that stopped the run, unless the run has gone on since."""
    for path in sorted(folder.glob("step_*/alarms.json"), reverse=True):
        report = _json(path)
        if not isinstance(report, Mapping) or not isinstance(report.get("alarms"), list):
            continue
        stops = [a for a in report["alarms"] if isinstance(a, Mapping) and a.get("stops")]
        step, resumes_at = report.get("step"), report.get("resumes_at")
        if stops and isinstance(step, int) and isinstance(resumes_at, int):
            return {"step": step, "alarms": stops} if last_step < resumes_at else None
    return None


# ---- What is found -----------------------------------------------------------------------------


class Severity(enum.IntEnum):
    """How much a finding matters; findings are told from the largest down."""

    NOTE = 1  # worth knowing; the run may be fine
    WARNING = 2  # costs part of what could be learnt
    PROBLEM = 3  # as it is, the run cannot learn, or has been ruined


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
      severity: how much it matters.
      title: what, in a few words.
      evidence: the numbers.
      remedy: what to change.
    """

    severity: Severity
    title: str
    evidence: str
    remedy: str


Finder = Callable[[Run], Finding | None]


def _of(run: Run) -> str:
    return f"over the last {run.window} steps"


def stopped(run: Run) -> Finding | None:
    """A gate ended the run."""
    if run.stop is None:
        return None
    alarms = run.stop["alarms"]
    words = {n: "; ".join(str(a.get(n, "?")) for a in alarms) for n in ("seen", "bound", "remedy")}
    return Finding(
        Severity.PROBLEM,
        f"a gate stopped the run at step {run.stop['step']}",
        f"{words['seen']} ({words['bound']})",
        words["remedy"],
    )


def failing_verifiers(run: Run) -> Finding | None:
    """Rows that are lost because the reward itself failed."""
    rate = _mean(run.series.get("reward/failure_rate", np.array([])))
    if not rate > 0.01:
        return None
    return Finding(
        Severity.PROBLEM if rate > 0.1 else Severity.WARNING,
        "verifiers fail",
        f"{rate:.1%} of all rows were lost (reward/failure_rate){_statuses(run, failed=True)}",
        "mend the reward: python -m rewards.run MODULE:REWARD --completions rollouts.jsonl shows "
        "which texts it raises on; lost rows do not train",
    )


def late_verifiers(run: Run) -> Finding | None:
    """Rows that score 0 because the reward was too slow."""
    rate = _mean(run.series.get("reward/timeout_rate", np.array([])))
    if not rate > 0.01:
        return None
    return Finding(
        Severity.PROBLEM if rate > 0.2 else Severity.WARNING,
        "verifiers run out of time",
        f"{rate:.1%} of all rows timed out and scored 0 (reward/timeout_rate)"
        f"{_statuses(run, failed=False)}",
        f"raise {run.said('reward.deadline_s')}, give {run.said('reward.workers')} no more "
        "processes than there are cores, or make the reward faster",
    )


def _statuses(run: Run, *, failed: bool) -> str:
    """Which rewards did, by the stored completions: " (stored: told crash 12)"."""
    counts: collections.Counter[str] = collections.Counter()
    for row in run.rollouts:
        statuses = row.get("statuses")
        for name, status in statuses.items() if isinstance(statuses, Mapping) else ():
            if status != "ok" and (status != "timeout") == failed:
                counts[f"{name} {status}"] += 1
    if not counts:
        return ""
    return "; stored: " + ", ".join(f"{what} {n}" for what, n in counts.most_common(4))


def sampler_gap(run: Run) -> Finding | None:
    """What is sampled is not quite what is trained."""
    gap, worst = run.last("sampler/gap_nats_mean"), run.values("sampler/gap_nats_max")
    if not gap > 0.02:
        return None
    return Finding(
        Severity.PROBLEM if gap > 0.1 else Severity.WARNING,
        "sampler and trainer disagree",
        f"{gap:.3g} nats a token on average {_of(run)}"
        + (f", {worst.max():.3g} at worst" if len(worst) else "")
        + "; under 0.01 is usual in bfloat16, under 1e-5 in float32",
        "try model.compute_dtype float32: if the gap stays, positions, masks or temperature "
        "differ between the two; if it goes, it was rounding",
    )


def skipped_updates(run: Run) -> Finding | None:
    """Updates that were not finite."""
    skipped = run.values("optim/skipped")
    if not len(skipped) or skipped.sum() == 0:
        return None
    share = float(skipped.mean())
    return Finding(
        Severity.PROBLEM if share > 0.1 else Severity.WARNING,
        "updates were skipped because they were not finite",
        f"in {int((skipped > 0).sum())} of {len(skipped)} steps (optim/skipped); the batches are "
        "in gates/step_*/batch.npz",
        f"lower {run.said('optim.learning_rate')}; try model.compute_dtype float32",
    )


def no_learning_rate(run: Run) -> Finding | None:
    """A learning rate of 0, or parameters that do not move for another reason."""
    rates, changes = run.values("optim/learning_rate"), run.values("optim/param_change")
    if len(rates) and rates.max() == 0:
        return Finding(
            Severity.PROBLEM,
            "the learning rate is 0",
            f"optim/learning_rate is 0 at all {len(rates)} steps",
            "set optim.learning_rate; 1e-6 to 1e-5 for pretrained models, up to 1e-3 for tiny ones",
        )
    if len(changes) >= 3 and changes.max() == 0 and np.nan_to_num(run.last("groups/signal")) > 0:
        return Finding(
            Severity.PROBLEM,
            "the parameters never change",
            f"optim/param_change is 0 at all {len(changes)} steps, learning rate up to "
            f"{rates.max() if len(rates) else math.nan:.3g}",
            "raise optim.learning_rate; find out which completion tokens train",
        )
    return None


def collapsed(run: Run) -> Finding | None:
    """The reward was earned, and lost again: slowly, or by a single update."""
    reward = run.values("reward/mean")
    if len(reward) < _MIN_STEPS:
        return None
    best, now = float(reward.max()), run.last("reward/mean")
    # Of one step, from neighbours: the median does not see the fall itself.
    noise = 1.05 * float(np.median(np.abs(np.diff(reward))))
    if not (now < 0.5 * best and best - now > max(0.05, 5 * noise)):
        return None
    before, after = run.first("policy/entropy_nats"), run.last("policy/entropy_nats")
    best_step = run.steps[int(np.nanargmax(run.series["reward/mean"]))]
    torn = f"; policy/entropy_nats {before:.3g} -> {after:.3g}" if after > 2 * before else ""
    return Finding(
        Severity.PROBLEM,
        "the reward has collapsed",
        f"reward/mean was {best:.3g} at step {best_step} and is "
        f"{now:.3g} {_of(run)}{torn}{_movement(run)}",
        f"lower {run.said('optim.learning_rate')} (by 3 to 10 times), warm up longer "
        f"({run.said('optim.warmup_updates')}), or hold the policy with algo.kl_coef; go on from a "
        "checkpoint before the fall",
    )


def _movement(run: Run) -> str:
    """The numbers that tell how fast the policy moves, those that were logged."""
    specs = {
        "optim/learning_rate": ".3g",
        "optim/param_change": ".2%",
        "policy/kl_old_nats": ".3g",
        "optim/grad_norm": ".3g",
    }
    tops = {name: _top(run, name) for name in specs}
    shown = [f"{name} {format(tops[name], specs[name])}" for name in specs if tops[name] >= 0]
    return "; at most " + ", ".join(shown) if shown else ""


def _top(run: Run, name: str) -> float:
    values = run.values(name)
    return float(values.max()) if len(values) else math.nan


def too_fast(run: Run) -> Finding | None:
    """Steps so large that learning rests on luck."""
    change, kl = run.values("optim/param_change"), run.values("policy/kl_old_nats")
    clipped = run.last("policy/clip_fraction")
    signs = []
    if len(change) and np.median(change) > 0.03:
        signs.append(f"optim/param_change {np.median(change):.1%} at a usual step")
    if len(kl) and np.median(kl) > 0.1:
        signs.append(f"policy/kl_old_nats {np.median(kl):.3g} at a usual step")
    if clipped > 0.4:
        signs.append(f"policy/clip_fraction {clipped:.0%} {_of(run)}")
    if not signs:
        return None
    return Finding(
        Severity.WARNING,
        "the policy moves too far in a step",
        "; ".join(signs) + "; usual are under 1 %, 0.05 nats and 20 %",
        f"lower {run.said('optim.learning_rate')} or {run.said('algo.minibatches')}",
    )


def too_slow(run: Run) -> Finding | None:
    """There is much to learn from, and nothing moves."""
    change, signal = run.values("optim/param_change"), run.last("groups/signal")
    if len(run.steps) < 2 * _MIN_STEPS or not len(change) or not signal > 0.2:
        return None
    usual = float(np.median(change))
    if not 0 < usual < 2e-6 or learning(run) == LEARNING:
        return None
    return Finding(
        Severity.WARNING,
        "the learning rate may be too small",
        f"optim/param_change {usual:.2g} at a usual step, with {signal:.0%} of the groups to learn "
        f"from {_of(run)} and no gain in reward; 1e-5 to 1e-3 is usual",
        f"raise {run.said('optim.learning_rate')} (by 3 to 10 times)",
    )


def cut_gradients(run: Run) -> Finding | None:
    """The gradient's length says nothing any more: it is always cut."""
    clip, norm = run.setting("optim.clip_norm"), run.values("optim/grad_norm")
    if not isinstance(clip, int | float) or not len(norm):
        return None
    usual = float(np.median(norm))
    if not usual > 20 * clip:
        return None
    return Finding(
        Severity.NOTE,
        "gradients are cut far below their length",
        f"optim/grad_norm {usual:.3g} at a usual step, optim.clip_norm {clip:g}",
        "harmless with Adam while the ratio is steady; raise optim.clip_norm if learning stalls",
    )


def all_wrong(run: Run) -> Finding | None:
    """Groups without one right completion: there is nothing to tell them apart by."""
    wrong, signal, solved = _flat(run, "groups/all_wrong"), run.last("groups/signal"), _solved(run)
    if not (wrong > 0.7 and solved < 0.3):
        return None
    return Finding(
        Severity.PROBLEM if wrong > 0.9 else Severity.WARNING,
        "nearly all groups are all wrong",
        f"{wrong:.0%} of the groups have no right completion {_of(run)}; reward/solved "
        f"{solved:.3g}, groups with a signal {signal:.0%}",
        "take easier problems (data.train), a larger algo.group_size, a cold start (sft.num_steps) "
        "or a stronger model; first read rollouts.jsonl for right answers that the verifier "
        "rejects",
    )


def all_right(run: Run) -> Finding | None:
    """Groups without one wrong completion."""
    right, signal, solved = _flat(run, "groups/all_right"), run.last("groups/signal"), _solved(run)
    if not (right > 0.8 and solved > 0.9):
        return None
    easy = run.first("reward/solved") > 0.9
    return Finding(
        Severity.PROBLEM if easy else Severity.NOTE,
        "nearly all groups are all right" + (" from the start" if easy else ": the run is done"),
        f"{right:.0%} of the groups have no wrong completion {_of(run)}; reward/solved "
        f"{run.first('reward/solved'):.3g} -> {solved:.3g}, groups with a signal {signal:.0%}",
        "take harder problems (data.train)"
        + ("; and see that the verifier is no easier to please than you mean" if easy else ""),
    )


def _solved(run: Run) -> float:
    return run.last("reward/solved")


def _flat(run: Run, name: str) -> float:
    """Share of groups all right or all wrong; from older logs, what it is at most."""
    logged = run.last(name)
    if math.isfinite(logged):
        return logged
    signal, solved = run.last("groups/signal"), _solved(run)
    share = 1 - solved if name == "groups/all_wrong" else solved
    return min(1 - signal, share) if math.isfinite(signal) else math.nan


def truncated(run: Run) -> Finding | None:
    """Completions that are cut off before they come to their answer."""
    cut, before = run.last("rollout/truncated"), run.first("rollout/truncated")
    if not cut > 0.1:
        return None
    return Finding(
        Severity.PROBLEM if cut > 0.5 else Severity.WARNING,
        "completions are cut off",
        f"{cut:.0%} reach the limit {_of(run)}, {before:.0%} at the start; mean length "
        f"{run.last('rollout/length_tokens_mean'):.0f} tokens",
        f"raise {run.said('sample.max_new_tokens')}; if they never end, see that the model's stop "
        "token is the tokenizer's, or penalise length",
    )


def component_never_paid(run: Run) -> Finding | None:
    """A part of the reward that no completion earns: most often the format."""
    prefix = "reward/component/"
    unpaid = [
        name.removeprefix(prefix)
        for name in run.series
        if name.startswith(prefix) and run.last(name) < 0.02 and _top(run, name) < 0.1
    ]
    shaping = [name for name in unpaid if name != _verifier(run)]
    if not shaping or len(run.steps) < _MIN_STEPS:
        return None
    means = ", ".join(f"{name} {run.last(prefix + name):.2g}" for name in shaping)
    return Finding(
        Severity.WARNING,
        f"{' and '.join(shaping)}: never paid",
        f"mean {means} {_of(run)}, at most "
        f"{max(_top(run, prefix + name) for name in shaping):.2g} at any step",
        "a reward that nobody gets teaches nothing: show the format in the prompt or in a cold "
        "start (sft.num_steps), or take a lenient form; python -m rewards.run tries it on the "
        "stored completions",
    )


def _verifier(run: Run) -> str | None:
    """Name of the first reward, that `solved` counts; None if config.json does not tell."""
    functions = run.setting("reward.functions")
    try:
        _, function = functions[0]
    except (TypeError, ValueError, IndexError, KeyError):
        return None
    return function.rpartition(".")[2] if isinstance(function, str) else None


def entropy_collapsed(run: Run) -> Finding | None:
    """The policy has made up its mind while much is still wrong."""
    before, now = run.first("policy/entropy_nats"), run.last("policy/entropy_nats")
    signal, solved = run.last("groups/signal"), _solved(run)
    if not (now < 0.5 * before and now < 0.1 and signal < 0.4 and solved < 0.75):
        return None
    same = run.last("rollout/duplicate_share")
    return Finding(
        Severity.PROBLEM if signal < 0.2 else Severity.WARNING,
        "entropy has collapsed before the problems were solved",
        f"policy/entropy_nats {before:.3g} -> {now:.3g}, reward/solved {solved:.3g}, groups with a "
        f"signal {signal:.0%} {_of(run)}"
        + (f", groups of equal completions {same:.0%}" if math.isfinite(same) else ""),
        f"go back to an earlier checkpoint with a lower {run.said('optim.learning_rate')}, a "
        f"higher {run.said('algo.clip_high')} (needs algo.minibatches > 1) or "
        f"{run.said('sample.temperature')}; read rollouts.jsonl for what it settled on",
    )


def reward_without_solving(run: Run) -> Finding | None:
    """What rises is the shaping, not the verifier."""
    if len(run.steps) < _MIN_STEPS or not {"reward/mean", "reward/solved"} <= run.series.keys():
        return None
    reward, solved = _gain(run, "reward/mean"), _gain(run, "reward/solved")
    if not (reward.clear and reward.size > 0.05 and solved.size < 0.1 * reward.size):
        return None
    if not _solved(run) < 0.9:
        return None
    return Finding(
        Severity.WARNING,
        "the reward rises, but no more problems are solved",
        f"reward/mean {run.first('reward/mean'):.3g} -> {run.last('reward/mean'):.3g}, "
        f"reward/solved {run.first('reward/solved'):.3g} -> {_solved(run):.3g}",
        "the policy learns what pays beside the verifier: lower the weights of the other "
        "reward.functions, and read rollouts.jsonl for how they are earned",
    )


def length_changed(run: Run) -> Finding | None:
    """Completions that got much longer, or shrank to nothing."""
    name = "rollout/length_tokens_mean"
    before, now = run.first(name), run.last(name)
    if len(run.steps) < _MIN_STEPS or not (before > 0 and (now > 2 * before or now < before / 3)):
        return None
    falls = _gain(run, "reward/mean")
    worse = falls.clear and falls.size < 0
    return Finding(
        Severity.WARNING if worse else Severity.NOTE,
        "completions got much longer" if now > before else "completions got much shorter",
        f"{before:.0f} -> {now:.0f} tokens on average; reward/mean {run.first('reward/mean'):.3g} "
        f"-> {run.last('reward/mean'):.3g}",
        "no harm while the reward rises; if it does not, read rollouts.jsonl for what the length "
        "is used for",
    )


def held_out_fell(run: Run) -> Finding | None:
    """Better on what it trains on, worse on what it has not seen."""
    if len(run.held_out) < 2 or learning(run) != LEARNING:
        return None
    (_, start), (_, end) = run.held_out[0], run.held_out[-1]
    if not end < start - 0.05:
        return None
    return Finding(
        Severity.WARNING,
        "held-out problems get worse while the training problems get better",
        f"eval/pass_at_1 {start:.3g} -> {end:.3g}; reward/solved {run.first('reward/solved'):.3g} "
        f"-> {_solved(run):.3g}",
        "more, or more various, problems (data.train); a positive algo.kl_coef; stop earlier",
    )


def time_lost(run: Run) -> Finding | None:
    """Time that neither samples at full width nor trains."""
    seconds = {n: float(run.values(f"time/{n}_s").sum()) for n in ("step", "sample", "score")}
    seconds["eval"] = float(run.values("time/eval_s").sum())
    total = seconds["step"] + seconds["eval"]  # a step's time begins after its evaluation
    if not total > 0:
        return None
    share = {name: value / total for name, value in seconds.items()}
    occupancy = run.last("rollout/occupancy")
    causes = []
    if share["score"] > 0.2:
        causes.append(
            (
                f"waiting for rewards {share['score']:.0%}",
                f"raise {run.said('reward.workers')} or make the reward faster",
            )
        )
    if share["eval"] > 0.3:
        causes.append(
            (
                f"evaluation {share['eval']:.0%}",
                f"raise {run.said('eval.every')} or lower {run.said('eval.num_problems')}",
            )
        )
    if share["sample"] > 0.4 and occupancy < 0.5:
        causes.append(
            (
                f"sampling {share['sample']:.0%} with only {occupancy:.0%} of the slots at work",
                f"lower {run.said('sample.slots')}, or ask more problems a step "
                f"({run.said('algo.problems_per_step')})",
            )
        )
    if not causes:
        return None
    return Finding(
        Severity.NOTE,
        "time is lost",
        "of all time: " + "; ".join(what for what, _ in causes),
        "; ".join(remedy for _, remedy in causes),
    )


def compiled_again(run: Run) -> Finding | None:
    """Programs compiled after the first step."""
    programs = run.values("engine/compiled")
    if len(programs) < 2 or not programs.max() > programs[0]:
        return None
    return Finding(
        Severity.NOTE,
        "the sampler compiled again after the first step",
        f"engine/compiled {programs[0]:.0f} -> {programs.max():.0f}",
        "every shape should be met in the first step; look for one that changes",
    )


def warned(run: Run) -> Finding | None:
    """Gates that warned."""
    warnings = run.values("gates/warnings")
    steps = int((warnings > 0).sum())
    if not steps:
        return None
    return Finding(
        Severity.NOTE,
        "gates warned",
        f"at {steps} of {len(warnings)} steps (gates/warnings)",
        "gates/step_*/alarms.json says of what, with the completions beside it",
    )


def unreadable_metrics(run: Run) -> Finding | None:
    """Rows of the log that cannot be read."""
    if not run.unreadable:
        return None
    return Finding(
        Severity.NOTE,
        "part of the log cannot be read",
        f"{run.unreadable} lines of metrics.jsonl are not rows and were left out",
        "see whether two runs write to this folder",
    )


def nothing_gained(run: Run) -> Finding | None:
    """There is a signal, nothing above is wrong, and still the reward does not rise."""
    signal, state = run.last("groups/signal"), learning(run)
    waited = len(run.steps) >= 2 * _MIN_STEPS and signal > 0.1 and not _solved(run) > 0.9
    if state != WORSE and not (state == NO_GAIN and waited):
        return None
    name = "reward/solved" if _gain(run, "reward/solved").clear else "reward/mean"
    fewer = "fewer problems are solved" if name == "reward/solved" else "the reward falls"
    return Finding(
        Severity.WARNING,
        fewer if state == WORSE else "no gain so far",
        f"{name} {run.first(name):.3g} -> {run.last(name):.3g} in "
        f"{len(run.steps)} steps, with {signal:.0%} of the groups to learn from{_movement(run)}",
        f"train longer, or raise {run.said('optim.learning_rate')}; more completions a step "
        f"({run.said('algo.problems_per_step')}, {run.said('algo.group_size')}) make the gradient "
        "less noisy",
    )


# Within a severity, findings are told in this order: causes before what follows from them.
FINDERS: tuple[Finder, ...] = (
    stopped,
    failing_verifiers,
    sampler_gap,
    skipped_updates,
    no_learning_rate,
    collapsed,
    truncated,
    late_verifiers,
    entropy_collapsed,
    all_wrong,
    all_right,
    too_fast,
    too_slow,
    component_never_paid,
    reward_without_solving,
    held_out_fell,
    length_changed,
    cut_gradients,
    time_lost,
    compiled_again,
    warned,
    unreadable_metrics,
)


def diagnose(run: Run) -> list[Finding]:
    """All findings, most important first; the last resort only if nothing else was found."""
    found = [finding for finder in FINDERS if (finding := finder(run)) is not None]
    if all(finding.severity < Severity.WARNING for finding in found):
        found += [finding for finding in [nothing_gained(run)] if finding is not None]
    return sorted(found, key=lambda finding: -finding.severity)


# ---- Is it learning? ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gain:
    """The change of a metric from the first to the last steps, and whether it is a clear one."""

    size: float
    clear: bool


_CLEAR = 3.0  # standard errors of a slope: 20 steps of noise alone pass them once in 130 runs


def _gain(run: Run, name: str) -> Gain:
    """Clear if a straight line through all steps rises, or falls, by over three of its errors."""
    logged = run.series.get(name, np.array([]))
    finite = np.isfinite(logged)
    values, steps = logged[finite], run.steps[: len(logged)][finite].astype(float)
    size = run.last(name) - run.first(name)
    if len(values) < _MIN_STEPS:
        return Gain(size, False)
    steps -= steps.mean()
    slope = float(steps @ values / (steps @ steps))
    rest = values - values.mean() - slope * steps
    error = math.sqrt(float(rest @ rest) / (len(values) - 2) / float(steps @ steps))
    clear = abs(slope) > _CLEAR * error and slope * size > 0 and abs(size) > 1e-3
    return Gain(size, clear)


LEARNING, SOLVED = "learning", "solved"
NO_GAIN, WORSE = "no clear gain", "getting worse"
TOO_SHORT = "too short to tell"


def learning(run: Run) -> str:
    """One of the words above, by the verifier (reward/solved) if that moves, else by the reward."""
    if len(run.steps) < _MIN_STEPS:
        return TOO_SHORT
    solved = _gain(run, "reward/solved")
    gain = solved if solved.clear else _gain(run, "reward/mean")
    if gain.clear:
        return LEARNING if gain.size > 0 else WORSE
    return SOLVED if _solved(run) > 0.95 else NO_GAIN


_FIGURES = (
    ("reward", "reward/mean", ".3f"),
    ("solved", "reward/solved", ".1%"),
    ("groups with a signal", "groups/signal", ".0%"),
    ("entropy, nats", "policy/entropy_nats", ".3g"),
    ("length, tokens", "rollout/length_tokens_mean", ".1f"),
    ("cut off", "rollout/truncated", ".1%"),
    ("seconds a step", "time/step_s", ".2f"),
)


def figures(run: Run) -> dict[str, tuple[float, float]]:
    """Metric -> its mean over the first and over the last steps, of the main ones logged."""
    ends = {name: (run.first(name), run.last(name)) for _, name, _ in _FIGURES}
    return {name: pair for name, pair in ends.items() if any(map(math.isfinite, pair))}


# ---- How it is told ----------------------------------------------------------------------------


def headline(run: Run, findings: Iterable[Finding]) -> str:
    """One line: whether it learns, and whether anything is wrong."""
    worst = max((finding.severity for finding in findings), default=Severity.NOTE)
    health = {Severity.NOTE: "healthy", Severity.WARNING: "with warnings"}.get(worst, "in trouble")
    state = learning(run)
    line = f"{len(run.steps)} steps: {state}"
    if state in (LEARNING, SOLVED) or worst > Severity.NOTE:
        line += f", {health}"
    if run.held_out:
        (_, start), (_, end) = run.held_out[0], run.held_out[-1]
        line += f"; held-out pass@1 {start:.3f}"
        line += f" -> {end:.3f}" if len(run.held_out) > 1 else ""
    return line


def text(run: Run, findings: Sequence[Finding]) -> str:
    """The whole diagnosis, for a terminal; nothing in it can send the terminal commands."""
    lines = [headline(run, findings), ""]
    ends = figures(run)
    if ends:
        lines.append(f"{'':<22}{'first':>10}{'last':>10}   (means of {run.window} steps)")
    for title, name, spec in _FIGURES:
        if name in ends:
            first, last = (format(x, spec) if math.isfinite(x) else "-" for x in ends[name])
            lines.append(f"{title:<22}{first:>10}{last:>10}")
    for number, finding in enumerate(findings, start=1):
        lines += ["", f"{number}. {finding.severity.name}: {_one_line(finding.title)}"]
        lines += _hanging("seen", finding.evidence) + _hanging("remedy", finding.remedy)
    if not findings and learning(run) != TOO_SHORT:
        lines += ["", "nothing wrong was found"]
    return visible("\n".join(lines)) + "\n"


def _one_line(words: str) -> str:
    return " ".join(words.split())


def _hanging(title: str, words: str) -> list[str]:
    return textwrap.wrap(
        words, 96, initial_indent=f"   {title:<8}", subsequent_indent=" " * 11
    ) or [f"   {title}"]


def brief(workdir: Path, most: int = 3) -> str:
    """A few lines for the end of a run; never an error, whatever the folder holds."""
    try:
        run = read_run(workdir)
    except OSError as error:
        return visible(f"no diagnosis: {error}")
    findings = diagnose(run)
    lines = [f"diagnosis: {headline(run, findings)}"]
    lines += [
        f"  {finding.severity.name}: {_one_line(finding.title)}: {_one_line(finding.evidence)}"
        for finding in findings[:most]
    ]
    if findings:
        lines.append(f"  all of it, with remedies: python -m grpo.diagnose {workdir}")
    return visible("\n".join(lines))


def as_json(run: Run, findings: Sequence[Finding]) -> dict[str, Any]:
    """The diagnosis as plain data."""
    return {
        "steps": len(run.steps),
        "learning": learning(run),
        "held_out": [list(pair) for pair in run.held_out],
        "figures": {
            name: [x if math.isfinite(x) else None for x in pair]
            for name, pair in figures(run).items()
        },
        "findings": [
            dataclasses.asdict(finding) | {"severity": finding.severity.name.lower()}
            for finding in findings
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m grpo.diagnose", description="Explain a run.")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_args(argv)
    try:
        run = read_run(arguments.workdir)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error
    findings = diagnose(run)
    if arguments.json:
        print(json.dumps(as_json(run, findings), indent=2))
    else:
        print(text(run, findings), end="")


if __name__ == "__main__":
    main()
