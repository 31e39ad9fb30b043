"""Measuring a policy on held-out problems: avg@k, pass@k, maj@k with their intervals."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from grpo import hosts
from grpo.config import EvalConfig
from grpo.data.sources import ProblemSource
from grpo.engine.engine import Engine
from grpo.engine.sampling import Filters
from grpo.estimators import bootstrap_interval, majority_correct, pass_at_k
from grpo.metrics import JsonlWriter
from grpo.model.params import Params
from grpo.rollout import readable_rows, sample_and_score
from grpo.scoring import Scorer
from grpo.structs import Rollout

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
        key = jax.random.fold_in(jax.random.key(self.seed), _KEY)
        rollout, scores, metrics = sample_and_score(
            self.engine,
            self.scorer,
            weights,
            self.problems,
            self.num_samples,
            key,
            temperature=self.temperature,
            filters=self.filters,
        )
        if folder is not None and hosts.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step_{step:06d}.jsonl"
            path.unlink(missing_ok=True)
            with JsonlWriter(path) as writer:
                for row in readable_rows(step, rollout, scores, self.engine.tokenizer):
                    writer.write(row)
        solved_PG = self.scorer.solved_PG(scores)
        report = held_out_metrics(solved_PG)
        report["eval/length_tokens_mean"] = metrics["rollout/length_tokens_mean"]
        report["eval/truncated"] = metrics["rollout/truncated"]
        report["eval/failure_rate"] = float(1 - scores.valid_PG.mean())
        report["time/eval_s"] = metrics["time/sample_s"] + metrics["time/score_s"]
        if self.answer_of is not None:
            report[f"eval/maj_at_{self.num_samples}"] = self._majority(rollout, solved_PG)
        return report

    def _majority(self, rollout: Rollout, solved_PG: np.ndarray) -> float:
        assert self.answer_of is not None
        texts = [self.engine.tokenizer.decode(c.tokens) for c in rollout.completions]
        answers = [self.answer_of(text) for text in texts]
        G = rollout.group_size
        return float(
            np.mean(
                [
                    majority_correct(answers[p * G : (p + 1) * G], solved_PG[p].tolist())
                    for p in range(len(rollout.problems))
                ]
            )
        )


def filters_of(config: EvalConfig) -> Filters | None:
    """The tokens that an evaluation may draw; None where all may be."""
    top_k, top_p, min_p = config.top_k, config.top_p, config.min_p
    if top_k == 0 and top_p == 1 and min_p == 0:
        return None
    return Filters(np.int32(top_k), np.float32(top_p), np.float32(min_p))


def held_out_metrics(solved_PG: np.ndarray) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, … G, pass@1 with its 95 % bootstrap interval over problems."""
    P, G = solved_PG.shape
    report: dict[str, float] = {"eval/problems": float(P)}
    ks = sorted({1, G} | {2**i for i in range(G.bit_length()) if 2**i <= G})
    for k in ks:
        values_P = [pass_at_k(G, int(row.sum()), k) for row in solved_PG]
        report[f"eval/pass_at_{k}"] = float(np.mean(values_P))
        if k in (1, G):
            low, high = bootstrap_interval(values_P)
            report[f"eval/pass_at_{k}_low"], report[f"eval/pass_at_{k}_high"] = low, high
    return report
