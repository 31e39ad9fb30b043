"""From a scored rollout to optimiser updates: compare, pack, pass over it."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from grpo import runinfo
from grpo.advantage import overlong_penalty, penalised, with_component
from grpo.batch import Packed, Sample, minibatches, pack, to_device, totals, unpack
from grpo.build import Learner, Run
from grpo.model.params import Params
from grpo.structs import LENGTH, Rollout, Scores, TrainState


def shaped(run: Run, rollout: Rollout, scores: Scores) -> Scores:
    """The rewards with what the algorithm itself adds: a soft penalty near the length limit."""
    algo = run.config.algo
    if not algo.overlong_buffer_tokens:
        return scores
    points_B = overlong_penalty(
        rollout.lengths_B, run.engine.max_new, algo.overlong_buffer_tokens, algo.overlong_penalty
    )
    return with_component(scores, "overlong", points_B.reshape(scores.reward_PG.shape), 1.0)


def learn(
    run: Run, state: TrainState, ref_params: Params | None, rollout: Rollout, scores: Scores
) -> tuple[TrainState, dict[str, float]]:
    """Advantages of a rollout, and every pass over it; consumes `state`.

    Args:
      run: the parts of the run.
      state: at the step of the rollout.
      ref_params: the reference, if there is one and it is not in the state.
      rollout: all completions of the step.
      scores: of it.

    Returns:
      The new state, and metrics: means over the updates, of maxima the largest.
    """
    algo, G = run.config.algo, rollout.group_size
    trains_B = scores.valid_PG.reshape(-1)
    if algo.mask_truncated:
        trains_B = trains_B & [c.finish != LENGTH for c in rollout.completions]
    samples = samples_of(rollout, trains_B)
    ref_params = ref_params if state.ref_params is None else state.ref_params
    if ref_params is not None:
        fetched = jax.device_put(ref_params, run.policy.shardings)  # no copy if it is there
        samples = _with_logprobs(run, fetched, samples, "ref_logprobs")
        del fetched
    if algo.kl_in_reward:
        scores = penalised(scores, _kl_PG(samples, G), algo.kl_coef)
    advantage_B = run.advantage(scores).reshape(-1)
    samples = [
        dataclasses.replace(sample, advantage=float(advantage))
        for sample, advantage in zip(samples, advantage_B, strict=True)
    ]
    metrics = _signal_metrics(scores, samples, advantage_B)
    if not run.schedule.on_policy:
        samples = _with_logprobs(run, state.params, samples, "old_logprobs")
    reports = []
    step, seed = int(state.step), run.config.seed
    for number in range(algo.passes):
        for part in minibatches(samples, algo.minibatches, seed=seed, step=step, number=number):
            state, report = update(run, state, part)
            reports.append(report)
    return state, metrics | _merged(reports)


def samples_of(rollout: Rollout, trains_B: np.ndarray) -> list[Sample]:
    """The completions of a rollout as they are packed; bool, which of them train."""
    return [
        Sample(
            group=c.problem,
            prompt=rollout.prompts[c.problem],
            completion=c.tokens,
            trains=bool(trains),
            sampler_logprobs=c.logprobs,
            carried=c.carried,
            routes=c.routes,
        )
        for c, trains in zip(rollout.completions, trains_B, strict=True)
    ]


def _with_logprobs(run: Run, params: Params, samples: Sequence[Sample], name: str) -> list[Sample]:
    """The samples with log-probs of `params` under that name.

    A reference chooses its experts itself: the sampler's choice is that of another policy.
    """
    own = [dataclasses.replace(sample, routes=None) for sample in samples]
    packed = pack(own if name == "ref_logprobs" else samples, run.schedule.row_shape)
    values_RC = np.concatenate(
        [
            np.asarray(run.logprobs(params, to_device(batch, run.policy.mesh)))
            for batch in packed.microbatches
        ]
    )
    values = unpack(values_RC, packed, samples)
    return [
        dataclasses.replace(sample, **{name: value})  # type: ignore[arg-type]
        for sample, value in zip(samples, values, strict=True)
    ]


def _kl_PG(samples: Sequence[Sample], G: int) -> np.ndarray:
    """Sum over each completion of log pi_old - log pi_ref, nats, by the sampler's log-probs."""
    nats = [np.asarray(s.sampler_logprobs) - np.asarray(s.ref_logprobs) for s in samples]
    return np.array([float(gaps.sum()) for gaps in nats]).reshape(-1, G)


def update(
    run: Learner, state: TrainState, samples: Sequence[Sample]
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """One optimiser update. Completions that cannot change it are left out of the computation."""
    counts = totals(samples)
    working = [s for s in samples if s.trains and (s.advantage or run.needs_every_row)]
    packed: Packed = pack(working, run.schedule.row_shape)
    place = partial(to_device, mesh=run.policy.mesh)
    state, report = run.update(state, [place(b) for b in packed.microbatches], counts)
    if report["optim/skipped"]:
        runinfo.dump_batch(run.workdir, int(state.step), packed.microbatches)
    return state, {name: np.asarray(value) for name, value in report.items()}


def _merged(reports: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over updates; of names that end in `_max` the largest."""
    merged = {}
    for name in reports[0]:
        values = np.stack([report[name] for report in reports])
        value = values.max(axis=0) if name.endswith("_max") else values.mean(axis=0)
        merged[name] = value.tolist()
    return merged


def _signal_metrics(
    scores: Scores, samples: Sequence[Sample], advantage_B: np.ndarray
) -> dict[str, float]:
    """What of the rollout there is to learn from."""
    lengths_B = np.array([len(sample.completion) for sample in samples])
    trains_B = np.array([sample.trains for sample in samples])
    moving_B = trains_B & (advantage_B != 0)
    metrics = {
        "groups/zero_advantage_token_share": float(
            1 - lengths_B[moving_B].sum() / max(lengths_B.sum(), 1)
        ),
        "groups/advantage_std": float(advantage_B[trains_B].std()) if trains_B.any() else 0.0,
    }
    for name, value_PG in scores.components.items():
        # Over the valid completions of each group, then over the groups.
        masked_PG = np.ma.masked_array(value_PG.astype(np.float64), ~scores.valid_PG)
        variance_P = masked_PG.var(axis=1).filled(0.0)
        metrics[f"reward/within_group_variance/{name}"] = float(variance_P.mean())
    return metrics
