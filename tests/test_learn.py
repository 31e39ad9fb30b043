"""From a scored rollout to updates: what trains, against which log-probs, in which order.

The update is one that only writes down what it is given, and moves the parameters.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import MAX_NEW, MAX_PROMPT, mesh_of, one_a_row, policy_on, toy_params

from grpo import advantage
from grpo.batch import RowShape, Sample
from grpo.config import Config, bind
from grpo.learn import learn, shaped
from grpo.model.params import Params
from grpo.policy import Policy
from grpo.schedule import make_schedule
from grpo.structs import Batch, Completion, Rollout, Scores, Totals, TrainState
from grpo.update import make_logprobs
from rewards.api import Problem

P, G = 4, 4
SHAPE = RowShape(rows=2, tokens=30, completion_tokens=24)
LENGTHS_PG = np.array([[8, 3, 1, 5], [2, 8, 4, 4], [6, 7, 1, 1], [3, 2, 8, 8]])
REWARD_PG = np.array([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0.5, 0, 1, 0]], np.float32)

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def some_rollout() -> Rollout:
    """Completion b begins with token b, so that it is known again; 8 tokens are the limit."""
    rng = np.random.default_rng(0)
    completions = []
    for b, length in enumerate(LENGTHS_PG.reshape(-1)):
        tokens = (b, *rng.integers(0, 32, length - 1).tolist())
        logprobs = rng.normal(-3.5, 0.5, length).astype(np.float32)
        finish = "length" if length == MAX_NEW else "eos"
        completions.append(Completion(b // G, b % G, tokens, logprobs, finish))
    return Rollout(
        problems=[Problem(str(p), prompt="?") for p in range(P)],
        prompts=[list(range(p + 1)) for p in range(P)],
        completions=completions,
        group_size=G,
    )


def some_scores(valid_PG: np.ndarray | None = None) -> Scores:
    return Scores(
        reward_PG=REWARD_PG,
        valid_PG=np.ones((P, G), bool) if valid_PG is None else valid_PG,
        components={"verifier": REWARD_PG},
        weights={"verifier": 1.0},
        statuses={"verifier": ["ok"] * P * G},
    )


@functools.cache
def policy() -> Policy:
    return policy_on(mesh_of())


@functools.cache
def logprobs_program() -> Callable[[Params, Batch], jax.Array]:
    return make_logprobs(policy())


def moved(params: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf * 1.25, params)


@dataclasses.dataclass
class Recorder:
    """An update that keeps its batches; it moves the parameters."""

    calls: list[tuple[list[Batch], Totals]] = dataclasses.field(default_factory=list)
    skips: bool = False

    def __call__(
        self, state: TrainState, microbatches: Sequence[Batch], totals: Totals
    ) -> tuple[TrainState, dict[str, Any]]:
        number = float(len(self.calls))
        self.calls.append(([jax.tree.map(np.asarray, b) for b in microbatches], totals))
        report = {
            "optim/skipped": jnp.float32(self.skips),
            "policy/loss": jnp.float32(number),
            "policy/ratio_max": jnp.float32(-number),
            "policy/ratio_share": jnp.float32([number, 1.0]),
        }
        return state.replace(params=moved(state.params), updates=state.updates + 1), report


def run_of(workdir: Path, *, needs_every_row: bool = False, **algo: Any) -> Any:
    """What `learn` looks at of a run."""
    config = Config()
    for name, value in ({"problems_per_step": P, "group_size": G} | algo).items():
        setattr(config.algo, name, value)
    return SimpleNamespace(
        config=config,
        workdir=workdir,
        policy=policy(),
        schedule=make_schedule(config, SHAPE),
        engine=SimpleNamespace(max_new=MAX_NEW),
        advantage=bind(config.algo.advantage, config.algo),
        update=Recorder(),
        needs_every_row=needs_every_row,
        logprobs=logprobs_program(),
    )


def state_of(ref_params: Params | None = None) -> TrainState:
    zero = jnp.int32(0)
    return TrainState(zero, zero, zero, zero, toy_params(), None, ref_params)


def learnt(
    run: Any,
    scores: Scores | None = None,
    ref_params: Params | None = None,
    state: TrainState | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    with jax.set_mesh(policy().mesh):
        return learn(run, state or state_of(), ref_params, some_rollout(), scores or some_scores())


def completions_in(microbatches: Sequence[Batch]) -> dict[int, dict[str, np.ndarray]]:
    """What an update was given of each completion, by its number; each is there once."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for batch in microbatches:
        for row in range(len(batch.tokens_RT)):
            start = 0
            for branch in range(1, batch.branches_RT[row].max() + 1):
                stop = start + int((batch.branches_RT[row] == branch).sum())
                b = int(batch.targets_RC[row, start])
                assert b not in found
                names = [n for n in Batch.__dataclass_fields__ if n.endswith("_RC")]
                found[b] = {n[:-3]: getattr(batch, n)[row, start:stop] for n in names}
                start = stop
    return found


def logprobs_of(params: Params) -> list[np.ndarray]:
    """Of every completion of the rollout, one a row."""
    rollout = some_rollout()
    samples = [Sample(c.problem, rollout.prompts[c.problem], c.tokens) for c in rollout.completions]
    with jax.set_mesh(policy().mesh):
        values_RC = np.asarray(logprobs_program()(params, one_a_row(samples)))
    return [row_C[: len(c.tokens)] for row_C, c in zip(values_RC, rollout.completions, strict=True)]


# ---- one update ------------------------------------------------------------------------------


def test_what_has_no_advantage_is_counted_and_not_computed(tmp_path):
    """The second group is flat, whose four completions have 18 tokens."""
    run = run_of(tmp_path)
    state, _ = learnt(run)
    [(microbatches, totals)] = run.update.calls
    given = completions_in(microbatches)
    assert sorted(given) == [b for b in range(P * G) if b // G != 1]
    assert totals == (LENGTHS_PG.sum(), P * G) and LENGTHS_PG[1].sum() == 18
    advantage_B = advantage.grpo(some_scores()).reshape(-1)
    for b, completion in given.items():
        assert completion["mask"].all()
        np.testing.assert_array_equal(completion["advantage"], advantage_B[b])
        np.testing.assert_array_equal(
            completion["sampler_logprobs"], some_rollout().completions[b].logprobs
        )
        assert completion["targets"].tolist() == list(some_rollout().completions[b].tokens)
        # The ratio is 1 by construction and there is no reference: neither is computed.
        assert not completion["old_logprobs"].any() and not completion["ref_logprobs"].any()
    assert (int(state.updates), int(state.step)) == (1, 0)


def test_where_it_still_has_a_gradient_it_is_computed(tmp_path):
    run = run_of(tmp_path, needs_every_row=True)
    learnt(run)
    [(microbatches, totals)] = run.update.calls
    assert sorted(completions_in(microbatches)) == list(range(P * G))
    assert totals == (LENGTHS_PG.sum(), P * G)


def test_what_failed_neither_trains_nor_counts(tmp_path):
    valid_PG = np.ones((P, G), bool)
    valid_PG[0, 3] = valid_PG[2, 0] = False
    for needs_every_row in (True, False):
        run = run_of(tmp_path, needs_every_row=needs_every_row)
        learnt(run, some_scores(valid_PG))
        [(microbatches, totals)] = run.update.calls
        assert not {3, 8} & completions_in(microbatches).keys()
        assert totals == (LENGTHS_PG[valid_PG].sum(), P * G - 2)


def test_what_was_cut_off_is_compared_but_does_not_train(tmp_path):
    run = run_of(tmp_path, mask_truncated=True)
    learnt(run)
    [(microbatches, totals)] = run.update.calls
    given = completions_in(microbatches)
    whole_B = LENGTHS_PG.reshape(-1) < MAX_NEW
    assert sorted(given) == [b for b in range(P * G) if whole_B[b] and b // G != 1]
    assert totals == (LENGTHS_PG.reshape(-1)[whole_B].sum(), whole_B.sum())
    advantage_B = advantage.grpo(some_scores()).reshape(-1)  # all four of a group are in its mean
    for b, completion in given.items():
        np.testing.assert_array_equal(completion["advantage"], advantage_B[b])


def test_nothing_to_learn_from_is_an_update_of_padding(tmp_path):
    run = run_of(tmp_path)
    _, metrics = learnt(run, some_scores(np.zeros((P, G), bool)))
    [(microbatches, totals)] = run.update.calls
    assert totals == (0, 0) and not any(batch.mask_RC.any() for batch in microbatches)
    assert metrics["groups/zero_advantage_token_share"] == 1
    assert metrics["groups/advantage_std"] == 0
    assert metrics["reward/within_group_variance/verifier"] == 0


def test_an_update_that_was_skipped_leaves_its_batch(tmp_path):
    run = run_of(tmp_path)
    run.update.skips = True
    learnt(run)
    [(microbatches, _)] = run.update.calls
    with np.load(tmp_path / "gates/step_000000/batch.npz") as kept:
        assert kept["tokens_RT"].shape == (SHAPE.rows * len(microbatches), SHAPE.tokens)
        without_experts = set(Batch.__dataclass_fields__) - {"routes_RTLk"}
        assert set(kept) == without_experts


# ---- several updates -------------------------------------------------------------------------


def test_old_logprobs_are_those_before_the_first_of_all_updates(tmp_path):
    """Three passes over two minibatches; the parameters move with each of the six updates."""
    run = run_of(tmp_path, needs_every_row=True, passes=3, minibatches=2)
    expected = logprobs_of(toy_params())
    state, metrics = learnt(run)
    assert int(state.updates) == 6 == len(run.update.calls)
    assert not np.array_equal(state.params["embed"], toy_params()["embed"])
    orders = []
    for number in range(3):
        seen: dict[int, dict[str, np.ndarray]] = {}
        for microbatches, totals in run.update.calls[2 * number : 2 * number + 2]:
            given = completions_in(microbatches)
            groups = {b // G for b in given}
            assert sorted(given) == [b for b in range(P * G) if b // G in groups]
            lengths = [LENGTHS_PG.reshape(-1)[b] for b in given]
            assert len(groups) == 2 and totals == (sum(lengths), 2 * G)
            seen |= given
            orders.append(sorted(groups))
        assert sorted(seen) == list(range(P * G))
        for b, completion in seen.items():
            close(completion["old_logprobs"], expected[b])
    assert len(orders) == 6 and orders[:2] != orders[2:4]  # each pass has an order of its own
    # Means over updates; of what ends in _max the largest.
    assert metrics["policy/loss"] == 2.5 and metrics["policy/ratio_max"] == 0.0
    assert metrics["policy/ratio_share"] == [2.5, 1.0]


# ---- the reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("in_state", [False, True])
def test_reference_logprobs_are_the_references(tmp_path, in_state):
    """One that is renewed is in the state, and goes before any other."""
    run = run_of(tmp_path, needs_every_row=True, kl_coef=0.1)
    reference, other = moved(toy_params()), toy_params()
    if in_state:
        learnt(run, ref_params=other, state=state_of(reference))
    else:
        learnt(run, ref_params=reference)
    [(microbatches, _)] = run.update.calls
    expected = logprobs_of(reference)
    assert not np.allclose(expected[0], logprobs_of(other)[0], atol=1e-3)
    for b, completion in completions_in(microbatches).items():
        close(completion["ref_logprobs"], expected[b])


def test_kl_in_the_reward_is_subtracted_before_completions_are_compared(tmp_path):
    run = run_of(tmp_path, kl_coef=0.1, kl_in_reward=True, advantage=advantage.dr_grpo)
    reference = moved(toy_params())
    learnt(run, ref_params=reference)
    [(microbatches, _)] = run.update.calls
    nats = [
        float(np.sum(completion.logprobs - ref))
        for completion, ref in zip(some_rollout().completions, logprobs_of(reference), strict=True)
    ]
    reward_PG = REWARD_PG - 0.1 * np.reshape(nats, (P, G))
    expected_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
    given = completions_in(microbatches)
    assert sorted(given) == list(range(P * G))  # no group is flat any more
    for b, completion in given.items():
        close(completion["advantage"], expected_PG.reshape(-1)[b])


# ---- rewards and metrics ---------------------------------------------------------------------


def test_the_overlong_penalty_reaches_the_rewards(tmp_path):
    """A buffer of 4 of 8 tokens: 5 tokens lose a quarter of the points, 8 all of them."""
    run = run_of(tmp_path, overlong_buffer_tokens=4, overlong_penalty=2.0)
    got = shaped(run, some_rollout(), some_scores())
    lost_PG = np.maximum(LENGTHS_PG - 4, 0) / 4 * 2.0
    close(got.reward_PG, REWARD_PG - lost_PG)
    close(got.components["overlong"], -lost_PG)
    _, metrics = learnt(run, got)
    [(microbatches, _)] = run.update.calls
    advantage_B = advantage.grpo(got).reshape(-1)
    for b, completion in completions_in(microbatches).items():
        close(completion["advantage"], advantage_B[b])
    assert metrics["reward/within_group_variance/overlong"] > 0
    assert shaped(run_of(tmp_path), some_rollout(), got) is got  # unless it is switched on


def test_metrics_say_how_much_there_is_to_learn(tmp_path):
    valid_PG = np.ones((P, G), bool)
    valid_PG[0, 3] = False
    run = run_of(tmp_path, advantage=advantage.dr_grpo)
    _, metrics = learnt(run, some_scores(valid_PG))
    idle = LENGTHS_PG[1].sum() + LENGTHS_PG[0, 3]
    assert metrics["groups/zero_advantage_token_share"] == pytest.approx(idle / LENGTHS_PG.sum())
    trained = advantage.dr_grpo(some_scores(valid_PG))[valid_PG]
    assert metrics["groups/advantage_std"] == pytest.approx(trained.std())
    variances = [float(np.var(r)) for r in ([1, 0, 0], [1] * 4, [0, 0, 1, 0], [0.5, 0, 1, 0])]
    assert metrics["reward/within_group_variance/verifier"] == pytest.approx(np.mean(variances))


def test_rows_hold_every_completion_of_the_rollout():
    assert SHAPE.tokens >= MAX_PROMPT + MAX_NEW and LENGTHS_PG.max() == MAX_NEW
