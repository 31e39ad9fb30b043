"""Choosing problems by their running pass rates, alone and in a run that is stopped and resumed."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from logged_rows import rows
from tiny_experiment import get_config

from grpo import presets
from grpo.checkpoint import params_sha256
from grpo.config import Config
from grpo.curriculum import (
    PassRates,
    Round,
    after_step,
    choose,
    observed,
    rate,
    solved_by_rate,
    solved_share,
    unseen,
)
from grpo.data.procedural import DigitChain
from grpo.evaluate import evaluate
from grpo.train import train


def known_as(rates: list[float]) -> PassRates:
    """Something known whose running rates are these."""
    rate_U = np.array(rates, np.float32)
    asked_U = np.full(len(rates), 1000, np.float32)
    return PassRates(rate_U * 1000, asked_U)


def round_of(considered: list[int], asked: list[int], shares: list[float]) -> Round:
    return Round(considered, asked, np.array(shares, np.float32))


# ---- Choosing ----------------------------------------------------------------------------------


def test_a_problem_never_asked_counts_as_one_half():
    assert rate(unseen(3)).tolist() == [0.5, 0.5, 0.5]


def test_the_nearest_to_one_half_are_asked_in_the_order_considered():
    known = known_as([0.0, 0.9, 0.45, 1.0, 0.7, 0.2])
    assert choose(known, [5, 4, 3, 2, 1, 0], 3) == [5, 4, 2]
    assert choose(known, [0, 1, 3], 2) == [0, 1]  # whatever is there, if nothing is near
    assert choose(known, [3, 0], 2) == [3, 0]


def test_of_equally_near_ones_the_first_considered_are_asked():
    assert choose(unseen(9), [7, 2, 5, 0], 2) == [7, 2]
    assert choose(known_as([0.25, 0.75, 0.25, 0.75]), [3, 0, 2, 1], 3) == [3, 0, 2]


def test_without_rates_all_that_were_drawn_are_asked():
    assert choose(None, [4, 1, 3], 3) == [4, 1, 3]
    assert after_step(None, [round_of([4, 1], [4, 1], [0.0, 1.0])]) == (None, {})


# ---- Rates -------------------------------------------------------------------------------------


def test_one_answer_moves_the_rate_most_of_the_way():
    known = observed(unseen(3), round_of([0, 1], [0, 1], [0.0, 1.0]))
    np.testing.assert_allclose(rate(known), [0.1, 0.9, 0.5], rtol=1e-6)  # 0.125 of 1.25


def test_later_answers_count_more():
    known = unseen(1)
    for share in (0.0, 0.0, 1.0):
        known = observed(known, round_of([0], [0], [share]))
    asked = 1 + 0.7 + 0.49
    assert known.asked_U[0] == pytest.approx(asked)
    assert rate(known)[0] == pytest.approx((1 + 0.125) / (asked + 0.25))
    for _ in range(100):
        known = observed(known, round_of([0], [0], [0.75]))
    assert rate(known)[0] == pytest.approx((0.75 / 0.3 + 0.125) / (1 / 0.3 + 0.25))


def test_what_was_passed_over_drifts_back_and_what_was_not_considered_stays():
    known = observed(unseen(3), round_of([0, 1, 2], [0, 1, 2], [0.0, 0.0, 1.0]))
    later = known
    for _ in range(5):
        later = observed(later, round_of([0, 2], [2], [1.0]))
    assert 0.1 < rate(later)[0] < 0.5 and rate(later)[1] == rate(known)[1]
    for _ in range(20):
        later = observed(later, round_of([0], [], []))
    assert rate(later)[0] == pytest.approx(0.5, abs=1e-2)  # it will be tried again


def test_a_group_without_a_valid_verdict_says_nothing():
    solved_PG = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    valid_PG = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    share_P = solved_share(solved_PG, valid_PG)
    np.testing.assert_array_equal(share_P, np.array([2 / 3, np.nan, 0], np.float32))
    known = observed(unseen(3), Round([0, 1, 2], [0, 1, 2], share_P))
    assert known.asked_U.tolist() == [1, 0, 1] and np.isfinite(known.solved_U).all()


def test_nothing_is_changed_in_place():
    known = unseen(2)
    observed(known, round_of([0, 1], [0], [1.0]))
    assert known.asked_U.tolist() == [0, 0] and known.solved_U.tolist() == [0, 0]
    assert known.asked_U.dtype == known.solved_U.dtype == np.float32


def test_the_metrics_of_a_step():
    known = known_as([0.05, 0.95, 0.5, 0.55])
    rounds = [
        round_of([0, 1, 2], [1, 2], [1.0, 0.25]),
        round_of([3, 0], [3], [0.75]),
    ]
    after, metrics = after_step(known, rounds)
    assert after is not None
    expected = observed(observed(known, rounds[0]), rounds[1])
    np.testing.assert_array_equal(rate(after), rate(expected))
    assert metrics["curriculum/rate_mean"] == pytest.approx(float(rate(expected).mean()))
    # By what was known before the step; the mean of the two problems in the middle.
    np.testing.assert_equal(metrics["reward/solved_by_rate"], [np.nan, np.nan, 0.5, np.nan, 1.0])


def test_fifths_hold_their_lower_border_and_the_last_one_both():
    rate_P = np.array([0, 0.125, 0.25, 0.5, 0.75, 0.875, 1])
    share_P = np.array([0, 1, 0.25, np.nan, 0.5, 0.6, 0.8])
    np.testing.assert_allclose(solved_by_rate(rate_P, share_P), [0.5, 0.25, np.nan, 0.5, 0.7])


def test_it_finds_the_problems_in_the_middle():
    """Problems of known difficulty, a fair coin for each completion: the share in the middle."""
    rng = np.random.default_rng(0)
    truth_U = np.repeat([0.0, 0.5, 1.0], 40)
    asked_in_the_middle = []
    known = unseen(len(truth_U))
    for _ in range(200):
        considered = rng.permutation(len(truth_U))[:32].tolist()
        asked = choose(known, considered, 8)
        share_P = rng.binomial(8, truth_U[asked]) / 8
        known = observed(known, Round(considered, asked, share_P.astype(np.float32)))
        asked_in_the_middle.append(np.mean(truth_U[asked] == 0.5))
    # A third of all lie there.
    assert np.mean(asked_in_the_middle[:3]) < 0.4 and np.mean(asked_in_the_middle[50:]) > 0.65


# ---- In a run ----------------------------------------------------------------------------------


def tiny(**changes: Any) -> Config:
    """The tiny experiment, choosing one of two problems and drawing again where groups are flat."""
    config = get_config()
    config.num_steps, config.sft.num_steps = 2, 0
    config.eval.every = 0
    config.sample.max_new_tokens = 8
    config.model.num_layers, config.model.remat = 1, "none"
    config.data.train = DigitChain(min_terms=2, max_terms=2, size=8)  # each is met in every step
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 8, 1, 1
    config.algo.curriculum, config.algo.dynamic_rounds = 2, 1
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(functools.reduce(getattr, path, config), last, value)
    return config


def run(config: Config, workdir: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo.loop.report_run", lambda _: None)  # pictures, which take seconds
        return train(config, workdir, baseline=config)


@pytest.fixture(scope="module")
def straight(compiled_once, tmp_path_factory):
    """A run that nothing disturbs: its folder and its final state."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(tiny(), workdir)


def test_a_run_knows_what_it_asked(straight):
    workdir, state = straight
    metrics = rows(workdir / "metrics.jsonl")
    asked = sum(row["groups/asked"] for row in metrics)
    assert state.pass_rates.asked_U.shape == (8,)
    assert 0 < (state.pass_rates.asked_U > 0).sum() <= asked
    assert int(state.cursor) >= 2 * asked  # twice as many were considered
    for row in metrics:
        by_rate = row["reward/solved_by_rate"]
        assert len(by_rate) == 5 and any(share is not None for share in by_rate)
        assert 0 < row["curriculum/rate_mean"] < 1
    # At first nothing is known: all are in the middle.
    assert [share is not None for share in metrics[0]["reward/solved_by_rate"]] == [
        False, False, True, False, False,
    ]  # fmt: skip
    assert metrics[-1]["curriculum/rate_mean"] == pytest.approx(
        float(rate(state.pass_rates).mean())
    )


def test_a_run_that_was_stopped_ends_as_one_that_was_not(straight, tmp_path):
    """Long enough that the second half chooses by what the first half learnt."""
    run(tiny(num_steps=1), tmp_path)
    state = run(tiny(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])
    assert params_sha256(state.params) == params_sha256(straight[1].params)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == (
        straight[0] / "rollouts.jsonl"
    ).read_bytes()
    names = "curriculum/rate_mean", "reward/solved_by_rate", "reward/mean"
    for one, other in zip(
        rows(tmp_path / "metrics.jsonl"), rows(straight[0] / "metrics.jsonl"), strict=True
    ):
        assert [one[name] for name in names] == [other[name] for name in names]


def test_forgetting_the_rates_would_have_shown(straight, tmp_path, monkeypatch):
    """The test above says something only if the choices after the stop depend on them."""
    run(tiny(num_steps=1), tmp_path)
    monkeypatch.setattr(
        "grpo.ask.choose", lambda known, considered, count: choose(None, considered, count)
    )
    run(tiny(), tmp_path)
    asked, other = (
        [(row["step"], row["uid"]) for row in rows(folder / "rollouts.jsonl")]
        for folder in (straight[0], tmp_path)
    )
    assert asked[:16] == other[:16] and asked[16:] != other[16:]


def test_a_checkpoint_with_rates_can_be_evaluated_and_one_without_is_refused(straight):
    held_out = {"eval__every": 2, "eval__num_samples": 1, "eval__answer_of": None}
    config = tiny(**held_out)
    report = evaluate(config, straight[0], baseline=config)
    assert math.isfinite(report["eval/pass_at_1"])
    with pytest.raises(ValueError, match=r"pass_rates/asked_U has shape \(8,\) there and none"):
        run(tiny(algo__curriculum=1), straight[0])


def test_no_published_algorithm_has_one():
    for name in presets.names():
        config = tiny()
        presets.apply(config, name)
        assert config.algo.curriculum == 0
