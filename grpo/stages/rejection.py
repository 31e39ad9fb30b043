"""Rejection sampling: what a policy gets right becomes data to learn from.

    python -m grpo.stages.rejection --config=experiments/x.py --workdir=DIR

asks every problem of `data.train` several times, judges the completions, and writes those that are
right, whole and clean to DIR/traces.jsonl: a few different ones of each question, no difficulty
more than its share, general data mixed in (`config.rejection`). Each row is a worked problem:
`JsonlProblems(path="DIR/traces.jsonl")` is a source for `grpo.stages.sft`.

Source: arXiv:2501.12948, section 2.3.3: several completions of each prompt, only right ones kept;
those of mixed languages, long paragraphs and code blocks filtered out; 600k of them with 200k
general samples. With `rejection.asked_as` a model that was never taught the form is asked by
example, as for the cold start (section 2.3.1).

DIR/parts/NNNNN.jsonl holds what passed of one chunk of problems, behind a line of counts. It is
written in one step, and a sample depends on the seed, its problem and its number only: a stage that
is killed and started again leaves the same traces.jsonl. What is chosen of the parts (`keep`,
`bucket_share`, `general`) may be changed afterwards; nothing is sampled anew for that.
"""

import dataclasses
import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo import gates, runinfo
from grpo.build import Subset, engine_for, start, usable
from grpo.checkpoint import params_sha256
from grpo.config import Config, check_all_read, describe
from grpo.data.sources import ProblemSource, Slice
from grpo.engine.engine import Engine
from grpo.metrics import Column, ConsoleTable
from grpo.model.params import Params
from grpo.policy import Policy
from grpo.rollout import sample_and_score
from grpo.runtime import hosts
from grpo.runtime.signals import StopSignal
from grpo.runtime.watchdog import Watchdog, telling
from grpo.runtime.workdir import Workdir
from grpo.scoring import Scorer, check_rewards
from grpo.stages.traces import (
    check_rows,
    chosen,
    row_of,
    table_of,
    write_jsonl,
    write_parquet,
)
from grpo.structs import LENGTH, STOP, Rollout, Scores
from rewards.api import Problem

_KEY = 0x72656A  # keeps its random numbers apart from those of training and evaluation
_ROUNDING = 1e-6  # scores are float32: a 0.9 of theirs is less than 0.9
_NOT_TEXT = "\ufffd"  # what a tokenizer makes of bytes that are no UTF-8

COLUMNS = (
    Column("right", "right", "7.1%"),
    Column("passed", "passed", "7.1%"),
    Column("length", "rollout/length_tokens_mean", "7.1f"),
    Column("tok/s", "rollout/tokens_per_s", "7,.0f"),
    Column("sample s", "time/sample_s", "6.2f"),
    Column("score s", "time/score_s", "6.2f"),
)

Row = dict[str, Any]


def sample_traces(config: Config, workdir: str | Path, baseline: Config | None = None) -> Path:
    """Samples and selects, or goes on with it where `workdir` already holds parts.

    Args:
      config: what to ask, of which model; read, never changed.
      workdir: traces.jsonl, summary.json and result.json go here.
      baseline: as in `grpo.train.train`.

    Returns:
      The path of traces.jsonl.

    Raises:
      ValueError, TypeError: a configuration that cannot work, problems that cannot be written as
        rows, parts that were made otherwise, or no trace at all.
      RewardFailure, GateError: the rewards do not fit the problems, or fail too often.
      HostError: there are several processes, and one of them cannot go on.
    """
    with ExitStack() as stack:
        stack.enter_context(telling((gates.GateError,)))
        stop = stack.enter_context(StopSignal())
        run = _build(config, workdir, stack, baseline or Config())
        run.folder.pull()
        runinfo.check_unchanged(run.parts / "made_with.json", _made_with(config))
        runinfo.write(config, run.folder.path)
        _sample_parts(run, stop)
        run.watchdog.phase("selecting")
        with hosts.together():
            if hosts.is_main():
                _select(run)
        run.folder.push()
    return run.folder.path / "traces.jsonl"


# ---- What it is made of ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
    """Everything the stage is made of.

    Attributes:
      problems: as they are written.
      asked: the same as they are put to the model.
      scorer: of the rewards and, behind them, of the filters.
      parts: where what is sampled is kept.
    """

    config: Config
    folder: Workdir
    policy: Policy
    problems: ProblemSource
    asked: ProblemSource
    engine: Engine
    scorer: Scorer
    watchdog: Watchdog
    parts: Path


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The problems of a source as `rejection.asked_as` puts them; so rewards see them, too."""

    source: ProblemSource
    asked_as: Callable[[Problem], Problem]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int, /) -> Problem:
        plain = self.source[i]
        asked = self.asked_as(plain)
        if asked.uid != plain.uid:
            raise ValueError(
                f"rejection.asked_as made problem {asked.uid!r} of {plain.uid!r}; it may change "
                "what is asked, not which problem it is"
            )
        return asked


def _build(config: Config, workdir: str | Path, stack: ExitStack, baseline: Config) -> _Run:
    if config.lora.rank:
        raise ValueError(
            f"lora.rank is {config.lora.rank}, but sampling trains nothing; the workdir of a run "
            "with adapters is a model.source as it is"
        )
    folder, watchdog, policy = start(config, workdir, stack)
    rejection, data, reward = config.rejection, config.data, config.reward
    assert data.train is not None  # validate() saw to it
    source: ProblemSource = data.train
    if rejection.num_problems:
        source = Slice(source=source, stop=min(rejection.num_problems, len(source)))
    asked: ProblemSource = source
    if rejection.asked_as is not None:
        asked = _Asked(source, rejection.asked_as)
    fitting = usable(policy.tokenizer, asked, data.max_prompt_tokens, data.check_reference, "train")
    problems = Subset(source, fitting.indices)
    check_rows(problems, "data.train")
    if rejection.general is not None:
        check_rows(rejection.general, "rejection.general", worked=True)
    if rejection.parquet and importlib.util.find_spec("pyarrow") is None:
        raise ValueError('rejection.parquet needs pyarrow: pip install "grpo[parquet]"')
    # A filter is a reward that counts nothing: it runs where rewards run, under their deadline.
    filters = tuple((0.0, function) for _, function in rejection.filters)
    judged_by = dataclasses.replace(reward, functions=(*reward.functions, *filters))
    run = _Run(
        config=config,
        folder=folder,
        policy=policy,
        problems=problems,
        asked=fitting,
        engine=engine_for(config, policy, rejection.chunk_problems, rejection.num_samples),
        scorer=stack.enter_context(Scorer(judged_by, watchdog.waits_for)),
        watchdog=watchdog,
        parts=folder.path / "parts",
    )
    _read_what_is_read_later(config)
    check_all_read(config, baseline)
    return run


def _read_what_is_read_later(config: Config) -> None:
    """Touches the fields that are looked at only after everything is built."""
    _ = config.seed, config.sample.temperature, config.hosts.watch_s
    _ = config.gates.max_failure_rate, config.gates.max_timeout_rate
    _ = config.rejection.keep, config.rejection.bucket_share, config.rejection.general_share
    if config.reward.gold_check:
        _ = config.reward.gold_format


def _made_with(config: Config) -> dict[str, Any]:
    """What decides the parts. Not how many problems are asked: more may be asked later."""
    described = describe(config)
    sections = {
        "model": ("source", "tokenizer", "shape", "thinking", "compute_dtype"),
        "data": ("train", "max_prompt_tokens", "check_reference"),
        "sample": ("temperature", "max_new_tokens", "stop_strings", "weights", "cache"),
        "reward": ("functions",),
        "rejection": ("num_samples", "chunk_problems", "asked_as", "filters"),
    }
    named = {s: {name: described[s][name] for name in names} for s, names in sections.items()}
    return {"seed": described["seed"], **named}


# ---- Sampling ----------------------------------------------------------------------------------


def _sample_parts(run: _Run, stop: StopSignal) -> None:
    """Samples the chunks whose parts are not there yet."""
    chunks = _chunks(run)
    there = [_holds(run.parts / _name(c), len(rows)) for c, rows in enumerate(chunks)]
    pending = [c for c, is_there in enumerate(hosts.from_main(there)) if not is_there]
    if len(pending) < len(chunks):
        hosts.say(f"{len(chunks) - len(pending)} of {len(chunks)} chunks are there already")
    if not pending:
        return
    run.watchdog.phase("checking the rewards")
    check_rewards(run.scorer, run.problems, run.config.reward)
    weights, digest = _weights(run)
    watch = gates.Watch(run.config.gates, run.folder.path)
    table = ConsoleTable(COLUMNS, len(chunks))
    for c in pending:
        run.watchdog.phase(f"chunk {c} of {len(chunks)}: sampling")
        started = time.monotonic()
        rollout, scores, metrics = _sample(run, weights, chunks[c])
        evidence = partial(gates.evidence_rows, c, rollout, scores, run.policy.tokenizer)
        watch.look((gates.failing_rewards, gates.late_rewards), c, metrics, scores, evidence)
        watch.stop()
        rows, counts = _passed(run, chunks[c], rollout, scores, digest)
        counts["tokens"] = int(rollout.lengths_B.sum())
        counts["seconds"] = round(time.monotonic() - started, 3)
        if hosts.is_main():
            write_jsonl(run.parts / _name(c), [counts, *rows])
        right = counts["steps"]["right"] / len(rollout.completions)
        table.row(c, metrics | {"right": right, "passed": len(rows) / len(rollout.completions)})
        run.folder.push()
        if stop.requested():
            stop.leave(c + 1)


def _chunks(run: _Run) -> list[range]:
    """The problems of each chunk."""
    size, total = run.config.rejection.chunk_problems, len(run.problems)
    return [range(first, min(first + size, total)) for first in range(0, total, size)]


def _name(chunk: int) -> str:
    return f"{chunk:05d}.jsonl"


def _holds(part: Path, problems: int) -> bool:
    """Whether a part is there, of as many problems: the last chunk grows if more are asked."""
    if not part.exists():
        return False
    with part.open(encoding="utf-8") as lines:
        return bool(json.loads(next(lines))["problems"] == problems)


def _weights(run: _Run) -> tuple[Params, str]:
    """The decode form of the model, with the engine compiled for it, and the parameters' digest."""
    run.watchdog.phase("reading the model")
    params = run.policy.initial_params()
    digest = params_sha256(params)
    runinfo.check_unchanged(run.parts / "model.json", {"params_sha256": digest})
    weights = run.policy.for_decoding(params)
    del params
    run.watchdog.phase("compiling")
    run.engine.compile(weights)
    return weights, digest


def _sample(
    run: _Run, weights: Params, chunk: Sequence[int]
) -> tuple[Rollout, Scores, dict[str, float]]:
    """All completions of a chunk's problems, judged, and metrics."""
    config = run.config
    rollout, scores, metrics = sample_and_score(
        run.engine,
        run.scorer,
        weights,
        [run.asked[i] for i in chunk],
        config.rejection.num_samples,
        jax.random.fold_in(jax.random.key(config.seed), _KEY),
        temperature=config.sample.temperature,
    )
    return rollout, scores, metrics | run.scorer.metrics(scores)


def _passed(
    run: _Run, chunk: Sequence[int], rollout: Rollout, scores: Scores, digest: str
) -> tuple[list[Row], dict[str, Any]]:
    """`sift` with what the run knows."""
    filters = run.config.rejection.filters
    names = run.scorer.names[len(run.scorer.names) - len(filters) :]
    return sift(
        [run.problems[i] for i in chunk],
        rollout,
        scores,
        run.scorer.solved_PG(scores),
        [run.policy.tokenizer.decode(completion.tokens) for completion in rollout.completions],
        {name: bound for name, (bound, _) in zip(names, filters, strict=True)},
        {"params_sha256": digest, "seed": run.config.seed},
    )


def sift(
    problems: Sequence[Problem],
    rollout: Rollout,
    scores: Scores,
    solved_PG: np.ndarray,
    texts: Sequence[str],
    bounds: Mapping[str, float],
    origin: Mapping[str, Any],
) -> tuple[list[Row], dict[str, Any]]:
    """The completions that may be learnt from, as rows, and how many were left by each step.

    A completion passes if its verifiers gave a verdict, it is right, it ended by itself, it is
    text (a model over bytes may stop within a character), and no filter gives it less than its
    bound.

    Args:
      problems: of the rollout, as they are to be written.
      rollout: what was sampled.
      scores: of it.
      solved_PG: bool, right according to the verifier.
      texts: of the B completions.
      bounds: component of `scores` -> the least that passes.
      origin: becomes part of every row's provenance.

    Returns:
      The rows, and {"problems", "steps": step -> completions left, "pass_rates": of each problem,
      None where no completion was judged}.
    """
    G = rollout.group_size
    judged_P, right_P = scores.valid_PG.sum(axis=1), solved_PG.sum(axis=1)
    pass_rates = [int(r) / int(n) if n else None for r, n in zip(right_P, judged_P, strict=True)]
    names = ("sampled", "judged", "right", "ended", "text", *(f"filter/{n}" for n in bounds))
    steps = dict.fromkeys(names, 0)
    rows: list[Row] = []
    for b, completion in enumerate(rollout.completions):
        p, g = divmod(b, G)
        found = {name: float(value[p, g]) for name, value in scores.components.items()}
        passes = (
            True,
            bool(scores.valid_PG[p, g]),
            bool(solved_PG[p, g]),
            completion.finish != LENGTH,
            bool(texts[b].strip()) and _NOT_TEXT not in texts[b],
            *(found[name] >= bound - _ROUNDING for name, bound in bounds.items()),
        )
        left = passes.index(False) if False in passes else len(passes)
        for name in names[:left]:
            steps[name] += 1
        if left < len(passes):
            continue
        problem = problems[p]
        # A stop string that only separates is no part of what is learnt; a closing tag is.
        worked = texts[b].rstrip() if completion.finish == STOP else texts[b]
        provenance = {
            "problem": problem.uid,
            "sample": g,
            "pass_rate": pass_rates[p],
            "length_tokens": len(completion.tokens),
            "scores": {name: round(value, 6) for name, value in found.items()},
            **origin,
        }
        rows.append(row_of(problem, f"{problem.uid}#{g}", worked, provenance))
    return rows, {"problems": len(problems), "steps": steps, "pass_rates": pass_rates}


def _select(run: _Run) -> None:
    """Writes traces.jsonl, summary.json and result.json of the parts; prints the table."""
    folder, counts, passed = run.folder.path, list[Any](), list[Row]()
    for c in range(len(_chunks(run))):
        with (run.parts / _name(c)).open(encoding="utf-8") as lines:
            counts.append(json.loads(next(lines)))
            passed += [json.loads(line) for line in lines]
    rows, summary = chosen(passed, counts, run.config.rejection, run.config.seed)
    runinfo.write_json(folder / "summary.json", summary)
    print(table_of(summary))
    if not passed:
        raise ValueError(
            "no completion passed: the table above says which step left none. Ask a better model, "
            "easier problems or more samples, or loosen what drops them"
        )
    path = folder / "traces.jsonl"
    write_jsonl(path, rows)
    if run.config.rejection.parquet:
        write_parquet(folder / "traces.parquet", rows)
    model = json.loads((run.parts / "model.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    runinfo.write_result(folder, **model, rows=len(rows), traces_sha256=digest)
    print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    from grpo.launch import main

    main(sample_traces)
