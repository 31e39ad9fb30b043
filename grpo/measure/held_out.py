"""Measuring a policy on held-out problems: pass@k, maj@k with their intervals, every reward."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from grpo.config import EvalConfig
from grpo.data.sources import ProblemSource
from grpo.engine.engine import Engine
from grpo.engine.sampling import Filters
from grpo.measure.estimators import bootstrap_interval, majority_at_k, pass_at_k
from grpo.metrics import JsonlWriter
from grpo.model.params import Params
from grpo.rollout import readable_rows, sample_and_score
from grpo.runtime import hosts
from grpo.scoring import Scorer
from grpo.structs import SOLVED, Rollout, Scores

_KEY = 0x65766C  # keeps evaluation's random numbers apart from those of any training step


@dataclasses.dataclass
class Evaluator:
    """Samples the same held-out problems with the same random numbers, whenever it is asked.

    Two evaluations of one run are therefore paired: what changes is the policy.

    Attributes:
      temperature: the run's, which `config.temperature` may replace.
    """

    engine: Engine
    scorer: Scorer
    source: ProblemSource
    config: EvalConfig
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        self.num_samples = self.config.num_samples
        self.answer_of = self.config.answer_of
        if self.config.temperature is not None:
            self.temperature = self.config.temperature
        # The likeliest token passes every filter: there they are not even read, so that one that
        # is set is known to be idle.
        self.filters = filters_of(self.config) if self.temperature else None
        count = min(self.config.num_problems, len(self.source))
        self.problems = [self.source[i] for i in range(count)]

    def __call__(self, weights: Params, step: int, folder: Path | None = None) -> dict[str, float]:
        """`eval/...` metrics of the decode form `weights`; completions go to `folder`."""
        return self.report(*self.sample(weights), step, folder)

    @property
    def key(self) -> jax.Array:
        """Of the random numbers of every evaluation."""
        return jax.random.fold_in(jax.random.key(self.seed), _KEY)

    def sample(self, weights: Params) -> tuple[Rollout, Scores, Mapping[str, float]]:
        """What `weights` write for the held-out problems, as `sample_and_score` gives it."""
        return sample_and_score(
            self.engine,
            self.scorer,
            weights,
            self.problems,
            self.num_samples,
            self.key,
            temperature=self.temperature,
            filters=self.filters,
        )

    def report(
        self,
        rollout: Rollout,
        scores: Scores,
        metrics: Mapping[str, float],
        step: int,
        folder: Path | None = None,
    ) -> dict[str, float]:
        """`eval/...` metrics of what `sample` gave after `step` steps."""
        if folder is not None and hosts.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step_{step:06d}.jsonl"
            path.unlink(missing_ok=True)
            with JsonlWriter(path) as writer:
                for row in readable_rows(step, rollout, scores, self.engine.tokenizer):
                    writer.write(row)
        solved_PG = self.scorer.solved_PG(scores)
        report = held_out_metrics(solved_PG) | component_metrics(scores)
        report["eval/tokens"] = float(rollout.lengths_B.sum())
        report["eval/length_tokens_mean"] = metrics["rollout/length_tokens_mean"]
        report["eval/truncated"] = metrics["rollout/truncated"]
        report["eval/failure_rate"] = float(1 - scores.valid_PG.mean())
        report["time/eval_s"] = metrics["time/sample_s"] + metrics["time/score_s"]
        answers_PG = self.answers_PG(rollout)
        if answers_PG is not None:
            G = rollout.group_size
            values_P = majority_values(answers_PG, solved_PG, G)
            report |= with_interval(f"eval/maj_at_{G}", values_P)
        return report

    def answers_PG(self, rollout: Rollout) -> list[list[str | None]] | None:
        """The final answer of every completion; None if nothing says what it is."""
        if self.answer_of is None:
            return None
        texts = [self.engine.tokenizer.decode(c.tokens) for c in rollout.completions]
        answers, G = [self.answer_of(text) for text in texts], rollout.group_size
        return [answers[b : b + G] for b in range(0, len(answers), G)]


def filters_of(config: EvalConfig) -> Filters | None:
    """The tokens that an evaluation may draw; None where all may be."""
    top_k, top_p, min_p = config.top_k, config.top_p, config.min_p
    if top_k == 0 and top_p == 1 and min_p == 0:
        return None
    return Filters(np.int32(top_k), np.float32(top_p), np.float32(min_p))


def held_out_metrics(solved_PG: np.ndarray) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, … G; the first and the last with their intervals."""
    P, G = solved_PG.shape
    report: dict[str, float] = {"eval/problems": float(P)}
    for k in tries(G):
        values_P = pass_values(solved_PG, k)
        report[f"eval/pass_at_{k}"] = float(np.mean(values_P))
        if k in (1, G):
            report |= with_interval(f"eval/pass_at_{k}", values_P)
    return report


def component_metrics(scores: Scores) -> dict[str, float]:
    """Of each reward: `eval/component/NAME`, its mean; `eval/full/NAME`, the share of full marks.

    Both are over the completions that could be judged. Full marks for format, or for language, say
    how many completions keep it throughout.
    """
    valid_PG, report = scores.valid_PG, dict[str, float]()
    count = max(int(valid_PG.sum()), 1)
    for name, value_PG in scores.components.items():
        report[f"eval/component/{name}"] = float(value_PG.sum(where=valid_PG) / count)
        full_PG = (value_PG >= SOLVED) & valid_PG
        report[f"eval/full/{name}"] = float(full_PG.sum() / count)
    return report


def with_interval(name: str, values_P: Sequence[float]) -> dict[str, float]:
    """The mean over problems as `name`, its 95 % bootstrap interval as `name`_low and _high."""
    low, high = bootstrap_interval(values_P)
    return {name: float(np.mean(values_P)), f"{name}_low": low, f"{name}_high": high}


def tries(group_size: int) -> list[int]:
    """k = 1, 2, 4, … and all of them."""
    powers = {2**i for i in range(group_size.bit_length()) if 2**i <= group_size}
    return sorted(powers | {group_size})


def pass_values(solved_PG: np.ndarray, k: int) -> list[float]:
    """pass@k of each problem."""
    return [pass_at_k(len(row), int(row.sum()), k) for row in solved_PG]


def majority_values(
    answers_PG: Sequence[Sequence[str | None]], solved_PG: np.ndarray, k: int
) -> list[float]:
    """maj@k of each problem."""
    return [
        majority_at_k(answers, solved.tolist(), k)
        for answers, solved in zip(answers_PG, solved_PG, strict=True)
    ]
