"""Gates: what must hold at every step for the steps after it to be worth their time.

A gate is a pure function `(bounds, now) -> Alarm | None` of a step's metrics. Every bound is a
field of `config.gates`. A gate *stops* the run only where going on is worthless: numbers that are
not finite, sampling that is not what is trained, rewards that cannot be trusted, output without
content several steps long, parameters that stay where they are. What is odd but may pass by itself
*warns*: once on the console, and in the metric `gates/warnings` (how many hold at this step).

Before a run stops, its state is saved (`train.saving_first`) and the step is laid down in
`WORKDIR/gates/step_NNNNNN/`: alarms.json (what was seen, the step's metrics) and completions.jsonl
(texts, token ids, the sampler's log-probs). An update that was not finite leaves batch.npz there.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo.config import GatesConfig
from grpo.data.tokenizer import Tokenizer
from grpo.metrics import JsonlWriter
from grpo.rollout import readable_rows
from grpo.runinfo import write_json
from grpo.runtime import hosts
from grpo.structs import EOS, Rollout, Scores

Metrics = Mapping[str, float | None]


class GateError(RuntimeError):
    """A run that is not worth going on with; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Alarm:
    """What a gate has to say.

    Attributes:
      gate: the function that says it.
      stops: whether the run must end.
      seen: the number, in words.
      bound: the field that it passed, with its value.
      cause: what is most often behind it.
      remedy: what to do.
    """

    gate: str
    stops: bool
    seen: str
    bound: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen} ({self.bound}). Likely cause: {self.cause}. Remedy: {self.remedy}"


@dataclasses.dataclass(frozen=True)
class Now:
    """What gates look at.

    Attributes:
      rows: metrics of the last steps, oldest first; this step's are the last.
      statuses: reward -> status -> how many of this step's completions got it.
    """

    rows: Sequence[Metrics]
    statuses: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """This step's metric; 0 if it was not measured, NaN if it was not a number."""
        return _value(self.rows[-1], name)

    def lasting(self, passes: Callable[[Metrics], bool]) -> int:
        """Steps in a row, up to this one, that `passes` holds for."""
        count = 0
        for row in reversed(self.rows):
            if not passes(row):
                break
            count += 1
        return count


Gate = Callable[[GatesConfig, Now], Alarm | None]


def _value(row: Metrics, name: str) -> float:
    value = row.get(name, 0.0)
    return math.nan if value is None else float(value)


def _beyond(value: float, bound: float) -> bool:
    return not value <= bound  # NaN is beyond any bound


# ---- Before the update: what was sampled, and what the rewards said of it ----------------------


def failing_rewards(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Stops: the rows that are left are not a fair sample, and nobody intended that."""
    rate = now["reward/failure_rate"]
    if not _beyond(rate, bounds.max_failure_rate):
        return None
    return Alarm(
        gate="failing_rewards",
        stops=True,
        seen=f"verifiers failed on {rate:.0%} of this step's rows: {_counts(now)}",
        bound=f"gates.max_failure_rate = {bounds.max_failure_rate:.0%}",
        cause="a reward that raises on texts it did not expect, or references it cannot read",
        remedy="mend the reward (python -m rewards.run tries it on the stored completions), then "
        "run the same command again",
    )


def late_rewards(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Stops: a timeout scores 0, so most of the step would learn the machine's load."""
    rate = now["reward/timeout_rate"]
    if not _beyond(rate, bounds.max_timeout_rate):
        return None
    return Alarm(
        gate="late_rewards",
        stops=True,
        seen=f"{rate:.0%} of this step's rows ran out of time: {_counts(now)}",
        bound=f"gates.max_timeout_rate = {bounds.max_timeout_rate:.0%}",
        cause="a slow reward, more reward.workers than cores, or completions that hang it",
        remedy="raise reward.deadline_s or make the reward faster, then run the same command again",
    )


def _counts(now: Now) -> dict[str, dict[str, int]]:
    return {name: dict(found) for name, found in now.statuses.items()}


def repeated_output(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Warns, and stops when it lasts: text that says one thing over and over earns nothing."""
    return _degenerate(
        bounds,
        now,
        gate="repeated_output",
        metric="rollout/repeated_share",
        field="max_repeated_share",
        what="{share:.0%} of the completions mostly repeat the same one to four tokens",
        cause="a policy that has collapsed (learning rate too high, a reward that pays for length) "
        "or weights that were not loaded as they should be",
    )


def zero_output(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Warns, and stops when it lasts: id 0 everywhere is what logits that are NaN decode to."""
    return _degenerate(
        bounds,
        now,
        gate="zero_output",
        metric="rollout/zero_id_share",
        field="max_zero_id_share",
        what="{share:.0%} of the sampled tokens have id 0",
        cause="logits that are not finite, so that the likeliest token is the first one; or a "
        "policy that has collapsed",
    )


def stuck_output(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Warns, and stops when it lasts: equal completions get equal rewards, and teach nothing.

    Groups that are all the same because they are all right do not count: that is how a run that
    has learnt its problems ends.
    """
    return _degenerate(
        bounds,
        now,
        gate="stuck_output",
        metric="rollout/stuck_share",
        field="max_stuck_share",
        what="in {share:.0%} of the groups all completions are the same, and not right",
        cause="entropy has collapsed on a wrong answer, or every sample of a group gets the same "
        "random numbers",
    )


def _degenerate(
    bounds: GatesConfig, now: Now, *, gate: str, metric: str, field: str, what: str, cause: str
) -> Alarm | None:
    bound = getattr(bounds, field)
    lasted = now.lasting(lambda row: _beyond(_value(row, metric), bound))
    if not lasted:
        return None
    stops = lasted >= bounds.degenerate_steps
    steps = f", {lasted} steps in a row" if lasted > 1 else ""
    limits = f"gates.{field} = {bound:.0%}, gates.degenerate_steps = {bounds.degenerate_steps}"
    return Alarm(
        gate=gate,
        stops=stops,
        seen=what.format(share=now[metric]) + steps,
        bound=limits,
        cause=cause,
        remedy="read the completions; go back to an earlier checkpoint with a lower "
        "optim.learning_rate, or a positive algo.kl_coef",
    )


# ---- After the update: what it did -------------------------------------------------------------


def not_finite(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Stops after some in a row: one may be a freak batch and is skipped, many are a fault."""
    bad = now["optim/bad_updates"]
    if not bad >= bounds.max_bad_updates:
        return None
    return Alarm(
        gate="not_finite",
        stops=True,
        seen=f"{bad:.0f} updates in a row were not finite and were skipped",
        bound=f"gates.max_bad_updates = {bounds.max_bad_updates}",
        cause="rewards or log-probs that are not finite, or parameters grown too large for "
        "model.compute_dtype",
        remedy="look into batch.npz; try a lower optim.learning_rate or model.compute_dtype "
        "float32 from an earlier checkpoint",
    )


_SAMPLER_REMEDY = (
    "compare the sampler's log-probs in completions.jsonl with the trainer's; raise the bound only "
    "if the sampler is meant to differ (quantised, or some steps behind)"
)


def wide_gap(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Stops: what is sampled is not what is trained, so no gradient here is the policy's."""
    gap = now["sampler/gap_nats_mean"]
    if now["optim/skipped"] or not _beyond(gap, bounds.max_gap_nats_mean):
        return None
    return Alarm(
        gate="wide_gap",
        stops=True,
        seen=f"sampler and trainer disagree by {gap:.3g} nats a token on average",
        bound=f"gates.max_gap_nats_mean = {bounds.max_gap_nats_mean}",
        cause="weights, positions, masks or temperature that are not the same in both",
        remedy=_SAMPLER_REMEDY,
    )


def wide_gap_once(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Warns: a single token moves a batch little, but float rounding does not reach this far."""
    gap = now["sampler/gap_nats_max"]
    if now["optim/skipped"] or not _beyond(gap, bounds.max_gap_nats_max):
        return None
    return Alarm(
        gate="wide_gap_once",
        stops=False,
        seen=f"sampler and trainer disagree by {gap:.3g} nats on one token",
        bound=f"gates.max_gap_nats_max = {bounds.max_gap_nats_max}",
        cause="a fault at one place of the text: the first token, the stop token, the longest row",
        remedy=_SAMPLER_REMEDY,
    )


def sampler_divergence(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Warns: the estimate is a mean of exponentials, which a few tokens can rule."""
    nats = now["sampler/kl_nats"]
    if now["optim/skipped"] or not _beyond(nats, bounds.max_sampler_kl_nats):
        return None
    return Alarm(
        gate="sampler_divergence",
        stops=False,
        seen=f"the sampler is {nats:.3g} nats a token away from the trainer, in KL divergence",
        bound=f"gates.max_sampler_kl_nats = {bounds.max_sampler_kl_nats}",
        cause="low precision in one of the two, or a fault on a few tokens",
        remedy=_SAMPLER_REMEDY,
    )


def still_policy(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Stops: steps that change nothing are not training."""

    def still(row: Metrics) -> bool:
        return (
            row.get("optim/param_change") == 0
            and _value(row, "groups/signal") > 0
            and _value(row, "optim/learning_rate") > 0
            and _value(row, "optim/skipped") == 0
        )

    lasted = now.lasting(still)
    if lasted < bounds.still_steps:
        return None
    return Alarm(
        gate="still_policy",
        stops=True,
        seen=f"the parameters did not change at all for {lasted} steps in a row, with "
        f"{now['groups/signal']:.0%} of the groups to learn from, learning rate "
        f"{now['optim/learning_rate']:.3g} and gradient norm {now['optim/grad_norm']:.3g}",
        bound=f"gates.still_steps = {bounds.still_steps}",
        cause="a learning rate that is lost in rounding, or masks that leave nothing to train",
        remedy="raise optim.learning_rate; if the gradient norm is 0, find out which tokens train",
    )


def idle_adapters(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Warns: adapters begin at zero, and a learning rate made for all weights keeps them there."""

    def idle(row: Metrics) -> bool:
        return (
            "lora/weight_change" in row
            and _value(row, "lora/weight_change") < bounds.min_adapter_change
            and _value(row, "groups/signal") > 0
        )

    lasted = now.lasting(idle)
    if lasted < bounds.still_steps:
        return None
    return Alarm(
        gate="idle_adapters",
        stops=False,
        seen=f"after {lasted} steps in a row with something to learn, the adapters have changed "
        f"their matrices by {now['lora/weight_change']:.2g} of the matrices' norm, with learning "
        f"rate {now['optim/learning_rate']:.3g}",
        bound=f"gates.min_adapter_change = {bounds.min_adapter_change:g}, gates.still_steps = "
        f"{bounds.still_steps}",
        cause="a learning rate made for training all weights; adapters want about ten times it",
        remedy="raise optim.learning_rate (1e-5 to 1e-4 is usual for adapters)",
    )


def leaping_policy(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Warns: the damage of this step is done, and whether it is one the next steps will show."""
    change = now["optim/param_change"]
    if not _beyond(change, bounds.max_param_change):
        return None
    return Alarm(
        gate="leaping_policy",
        stops=False,
        seen=f"one update moved the parameters by {change:.1%} of their norm",
        bound=f"gates.max_param_change = {bounds.max_param_change:.0%}",
        cause="a learning rate that is too high for this model",
        remedy="lower optim.learning_rate, or warm up longer (optim.warmup_updates)",
    )


def drifting_policy(bounds: GatesConfig, now: Now) -> Alarm | None:
    """Warns: the clip bounds what this can do, and a few tokens can rule the estimate."""
    nats = now["policy/kl_old_nats"]
    if now["optim/skipped"] or not _beyond(nats, bounds.max_kl_old_nats):
        return None
    return Alarm(
        gate="drifting_policy",
        stops=False,
        seen=f"the updates of this step moved the policy {nats:.3g} nats a token in KL divergence",
        bound=f"gates.max_kl_old_nats = {bounds.max_kl_old_nats}",
        cause="too many updates a rollout, or too high a learning rate",
        remedy="lower optim.learning_rate or algo.minibatches",
    )


ROLLOUT_GATES: tuple[Gate, ...] = (
    failing_rewards,
    late_rewards,
    zero_output,
    repeated_output,
    stuck_output,
)
UPDATE_GATES: tuple[Gate, ...] = (
    not_finite,
    wide_gap,
    wide_gap_once,
    sampler_divergence,
    still_policy,
    idle_adapters,
    leaping_policy,
    drifting_policy,
)


# ---- Degenerate output, measured on token ids --------------------------------------------------

_LONGEST_PERIOD = 4  # of a repetition: "!!!!", "no no no", "1, 1, 1,"
_SHORTEST_JUDGED = 16  # tokens: a short answer repeats nothing, whatever it is
_MOSTLY = 0.5


def degeneration(rollout: Rollout, solved_PG: np.ndarray) -> dict[str, float]:
    """How much of a rollout is no text at all, as shares in [0, 1].

    Args:
      rollout: B completions.
      solved_PG: bool, the verifier gave full marks.

    Returns:
      `rollout/repeated_share`: completions of which more than half of the tokens equal the one p
      places before, for some p of 1 to 4; those of fewer than 16 tokens never count.
      `rollout/zero_id_share`: tokens whose id is 0, the token that ended a completion apart.
      `rollout/duplicate_share`: groups whose completions are all the same.
      `rollout/stuck_share`: those of them that are not right.
    """
    G = rollout.group_size
    texts = [completion.tokens for completion in rollout.completions]
    bodies = [c.tokens[:-1] if c.finish == EOS else c.tokens for c in rollout.completions]
    groups = [texts[start : start + G] for start in range(0, len(texts), G)]
    same_P = np.array([len(set(group)) == 1 for group in groups])
    zeros = sum(body.count(0) for body in bodies)
    return {
        "rollout/repeated_share": float(np.mean([_repetition(t) > _MOSTLY for t in texts])),
        "rollout/zero_id_share": zeros / max(sum(map(len, bodies)), 1),
        "rollout/duplicate_share": float(same_P.mean()),
        "rollout/stuck_share": float((same_P & ~solved_PG.all(axis=1)).mean()),
    }


def _repetition(tokens: Sequence[int]) -> float:
    """Share of the tokens that equal the one p places before, for the p of 1 to 4 with most."""
    if len(tokens) < _SHORTEST_JUDGED:
        return 0.0
    ids_C = np.asarray(tokens)
    repeats = [(ids_C[p:] == ids_C[:-p]).sum() for p in range(1, _LONGEST_PERIOD + 1)]
    return float(max(repeats) / len(tokens))


# ---- Watching a run ----------------------------------------------------------------------------


class Watch:
    """Holds every step of a run against the gates.

    Args:
      bounds: the gates' bounds.
      workdir: folder of the run. The last rows of its metrics.jsonl, which must already be cut
        back to the step the run resumes from, are the steps before: a run that was killed and
        started again meets the gates as one that was not.
      writes: whether this process writes evidence; by default process 0 does.
    """

    def __init__(self, bounds: GatesConfig, workdir: Path, writes: bool | None = None):
        self._bounds, self._folder = bounds, workdir / "gates"
        self._writes = hosts.is_main() if writes is None else writes
        remembered = max(bounds.degenerate_steps, bounds.still_steps)
        # Process 0 wrote the file, and cut it back just now.
        past = hosts.from_main(
            _last_rows(workdir / "metrics.jsonl", remembered) if hosts.is_main() else None
        )
        self._rows: collections.deque[Metrics] = collections.deque(past, maxlen=remembered)
        self._step = -1
        self._alarms: list[Alarm] = []
        self._said: set[str] = set()  # gates that have warned in this process

    def look(
        self,
        gates: Iterable[Gate],
        step: int,
        metrics: dict[str, float],
        scores: Scores,
        completions: Callable[[], list[dict[str, object]]],
    ) -> None:
        """Applies `gates`; prints and keeps what is new; sets `gates/warnings` in `metrics`.

        Args:
          gates: `ROLLOUT_GATES` before the update, `UPDATE_GATES` after it.
          step: number of the step.
          metrics: what is known of the step by now; the same dict at every call of a step.
          scores: of this step.
          completions: makes the rows that are kept as evidence (`evidence_rows`).
        """
        if step != self._step:
            self._step, self._alarms = step, []
            self._rows.append(metrics)
        counts = {n: dict(collections.Counter(found)) for n, found in scores.statuses.items()}
        now = Now(tuple(self._rows), counts)
        alarms = [alarm for gate in gates if (alarm := gate(self._bounds, now)) is not None]
        self._alarms += alarms
        metrics["gates/warnings"] = float(sum(not alarm.stops for alarm in self._alarms))
        new = [alarm for alarm in alarms if alarm.stops or alarm.gate not in self._said]
        self._said |= {alarm.gate for alarm in alarms}
        if not new or not self._writes:
            return
        folder = self.folder(step)
        resumes_at = step + ("optim/bad_updates" in metrics)  # known once the update is made
        save_evidence(folder, step, resumes_at, self._alarms, metrics, completions())
        for alarm in new:
            if not alarm.stops:
                print(f"warning: step {step}: {alarm}; evidence in {folder}", flush=True)

    def stop(self) -> None:
        """Raises GateError if a gate of this step's stops the run."""
        fatal = [str(alarm) for alarm in self._alarms if alarm.stops]
        if fatal:
            where = self.folder(self._step)
            raise GateError(
                f"step {self._step}: {'; and '.join(fatal)}. The evidence is in {where}, the state "
                "is saved"
            )

    def folder(self, step: int) -> Path:
        """Where the evidence of `step` is kept."""
        return self._folder / f"step_{step:06d}"


def save_evidence(
    folder: Path,
    step: int,
    resumes_at: int,
    alarms: Sequence[Alarm],
    metrics: Metrics,
    rows: Iterable[Mapping[str, object]],
) -> None:
    """alarms.json and completions.jsonl in `folder`; see the module's docstring.

    `resumes_at` is the step that a run stopped here goes on with: the same one, unless its update
    was made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finite = {name: v if math.isfinite(v) else None for name, v in _numbers(metrics)}
    report = {
        "step": step,
        "resumes_at": resumes_at,
        "alarms": [dataclasses.asdict(alarm) for alarm in alarms],
        "metrics": finite,
    }
    write_json(folder / "alarms.json", report)
    path = folder / "completions.jsonl"
    path.unlink(missing_ok=True)
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.write(row)


def _numbers(metrics: Metrics) -> Iterable[tuple[str, float]]:
    """By name; a histogram, which is a list, is not one."""
    single = (name for name in sorted(metrics) if not isinstance(metrics[name], list))
    return ((name, _value(metrics, name)) for name in single)


def evidence_rows(
    step: int, rollout: Rollout, scores: Scores, tokenizer: Tokenizer
) -> list[dict[str, object]]:
    """The rows of rollouts.jsonl with token ids and the sampler's log-probs (nats)."""
    rows = readable_rows(step, rollout, scores, tokenizer)
    for row, completion in zip(rows, rollout.completions, strict=True):
        row["tokens"] = list(completion.tokens)
        row["logprobs"] = [round(float(x), 6) for x in completion.logprobs]
    return rows


def _last_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` training steps of a metrics.jsonl; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        lines = collections.deque(file, maxlen=count + 1)  # the last may be an evaluation's alone
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "optim/bad_updates" in row][-count:]
