"""The loop: what stops it, and that stopping, resuming and measuring change nothing."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from logged_rows import rows, stop_after, timeless
from tiny_experiment import get_config

from grpo import build, diagnose
from grpo.checkpoint import Checkpoints, _shapes, params_sha256
from grpo.config import Config
from grpo.evaluate import evaluate
from grpo.gates import GateError
from grpo.measure.forcing import BudgetSettings
from grpo.train import train
from grpo.update import Update

pytestmark = pytest.mark.usefixtures("compiled_once")

HERE = Path(__file__).parent


def tiny(**changes: Any) -> Config:
    """The tiny experiment with changes: `tiny(algo__kl_coef=0.1)`."""
    config = get_config()
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(functools.reduce(getattr, path, config), last, value)
    return config


RL_ONLY: dict[str, Any] = {"sft__num_steps": 0, "eval__every": 0}


def run(config: Config, workdir: Path) -> Any:
    return train(config, workdir, baseline=config)


def assert_same_files(workdir: Path, other: Path) -> None:
    assert timeless(workdir / "metrics.jsonl") == timeless(other / "metrics.jsonl")
    assert timeless(workdir / "sft/metrics.jsonl") == timeless(other / "sft/metrics.jsonl")
    for path in (other / "rollouts.jsonl", *sorted((other / "evaluations").iterdir())):
        assert (workdir / path.relative_to(other)).read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbs: its folder and its final state."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(tiny(), workdir)


# ---- An undisturbed run ------------------------------------------------------------------------


def test_a_run_leaves_its_record(straight):
    workdir, state = straight
    result = json.loads((workdir / "result.json").read_text())
    assert result == {"params_sha256": params_sha256(state.params), "steps": 4}
    assert json.loads((workdir / "config.json").read_text())["algo"]["group_size"] == 4
    assert len(json.loads((workdir / "environment.json").read_text())["devices"]) == 8
    assert len(rows(workdir / "rollouts.jsonl")) == 4 * 16
    for name in ("curves.png", "before_after.md"):
        assert (workdir / name).stat().st_size > 0


def test_every_step_is_logged_once_and_evaluations_are_due(straight):
    metrics = rows(straight[0] / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in metrics if "eval/pass_at_1" in row] == [0, 2, 4]
    assert [row["step"] for row in metrics if "reward/mean" in row] == [0, 1, 2, 3]
    assert [row["step"] for row in rows(straight[0] / "sft/metrics.jsonl")] == [0, 1, 2, 3]
    assert all(row["groups/signal"] > 0 for row in metrics[:4])  # else nothing was learnt
    assert all(row["gates/warnings"] == 0 for row in metrics[:4])


def test_sampler_and_trainer_agree_in_float32(straight):
    assert all(
        row["sampler/gap_nats_max"] <= 1e-5 for row in rows(straight[0] / "metrics.jsonl")[:4]
    )


def test_nothing_is_compiled_after_the_first_step(straight):
    compiled = [row["engine/compiled"] for row in rows(straight[0] / "metrics.jsonl")[:4]]
    assert len(set(compiled)) == 1, compiled


def test_evaluating_alone_gives_what_the_run_measured_last(straight):
    last = timeless(straight[0] / "metrics.jsonl")[-1]
    assert 0 < last["eval/pass_at_1"] < 1  # else equality would show little
    got = evaluate(tiny(), straight[0], baseline=tiny())
    assert {"step": 4} | {n: v for n, v in got.items() if n != "time/eval_s"} == last
    assert json.loads((straight[0] / "evaluation.json").read_text())["step"] == 4


def test_budgets_are_measured_before_and_after(straight):
    workdir, _ = straight
    settings = BudgetSettings(
        (4, 16), end_of_thought="e", force_answer="!?", answer_tokens=4, extensions=0
    )
    evaluate(tiny(), workdir, baseline=tiny(), settings=settings)
    report = json.loads((workdir / "budget.json").read_text())
    assert report["step"] == 4 and list(report["models"]) == ["before", "after"]
    assert (workdir / "budget.png").stat().st_size > 0
    metrics = rows(workdir / "metrics.jsonl")
    for name, logged in (("before", metrics[0]), ("after", metrics[-1])):
        curves = report["models"][name]
        assert set(curves) == {"majority", "best_of", "forced"}
        # The model before is that behind the cold start, which the run measured at step 0.
        assert [point["setting"] for point in curves["best_of"]] == [1, 2, 4]
        for point, k in zip(curves["best_of"], (1, 2, 4), strict=True):
            assert point["accuracy"] == logged[f"eval/pass_at_{k}"]
            assert point["tokens"] == pytest.approx(k * logged["eval/length_tokens_mean"])
        assert curves["majority"][-1]["accuracy"] == logged["eval/maj_at_4"]
        written = rows(workdir / "budget" / f"{name}.jsonl")
        assert len(written) == 2 * 4 * 4
        cut = [row for row in written if row["budget"] == 4 and "!?" in row["completion"]]
        assert cut and all(row["length_tokens"] <= 4 + 2 + 4 for row in cut)
    assert report["models"]["before"] != report["models"]["after"]


def test_a_model_before_needs_one_after(tmp_path):
    config, settings = tiny(sft__num_steps=0), BudgetSettings((4,), before=True)
    with pytest.raises(ValueError, match="--before is set, but .* has no checkpoint"):
        evaluate(config, tmp_path, baseline=config, settings=settings)


def test_another_seed_is_another_run(straight, tmp_path):
    state = run(tiny(seed=1, num_steps=1), tmp_path)
    texts = [
        [row["completion"] for row in rows(workdir / "rollouts.jsonl") if row["step"] == 0]
        for workdir in (tmp_path, straight[0])
    ]
    assert texts[0] != texts[1]
    assert params_sha256(state.params) != params_sha256(straight[1].params)
    evaluated = [row["step"] for row in rows(tmp_path / "metrics.jsonl") if "eval/pass_at_1" in row]
    assert evaluated == [0, 1]  # the end is measured although 1 is no multiple of 2


# ---- Stopping and going on ---------------------------------------------------------------------


def test_a_run_stopped_twice_ends_as_one_that_never_stopped(straight, tmp_path, monkeypatch):
    config = tiny(log__save_every=50)  # nothing is saved but by the signal, and at the ends
    for rows_logged in (2, 4):  # in the cold start; then after its end and two steps
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_after(rows_logged, patch)
            run(config, tmp_path)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert not (tmp_path / "result.json").exists()
    state = run(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])
    assert_same_files(tmp_path, straight[0])


def test_a_longer_run_goes_on_from_a_shorter_one(straight, tmp_path):
    run(tiny(num_steps=2), tmp_path)
    state = run(tiny(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])
    assert_same_files(tmp_path, straight[0])


@pytest.mark.slow
def test_killed_in_processes_of_its_own_it_ends_in_the_same_parameters(straight, tmp_path):
    experiment = HERE / "tiny_experiment.py"
    command = [sys.executable, "-m", "grpo.launch", f"--config={experiment}"]
    command += [f"--workdir={tmp_path}", "--config.log.save_every=2"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL)

    for path, sent, expected in (
        (tmp_path / "sft/metrics.jsonl", signal.SIGTERM, 128 + signal.SIGTERM),
        (tmp_path / "metrics.jsonl", signal.SIGKILL, -signal.SIGKILL),
    ):
        with start() as process:
            while not (path.exists() and path.stat().st_size):  # its first row
                assert process.poll() is None
                time.sleep(0.001)
            process.send_signal(sent)
            assert process.wait(120) == expected
    with start() as process:
        assert process.wait(120) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["params_sha256"] == params_sha256(straight[1].params)
    assert_same_files(tmp_path, straight[0])


def test_a_checkpoint_of_another_model_is_refused(straight):
    with pytest.raises(ValueError, match=r"checkpoint 4 .* does not fit this configuration"):
        run(tiny(model__width=32), straight[0])


# ---- Off-policy updates and the reference ------------------------------------------------------


def test_two_minibatches_and_a_reference(tmp_path, monkeypatch):
    calls: list[tuple[list[Any], dict[str, Any]]] = []

    class Recording(Update):
        def __call__(self, state, microbatches, totals):
            state, report = super().__call__(state, microbatches, totals)
            calls.append((microbatches, jax.tree.map(np.asarray, report)))
            return state, report

    monkeypatch.setattr(build, "Update", Recording)
    state = run(tiny(num_steps=1, eval__every=0, algo__minibatches=2, algo__kl_coef=0.1), tmp_path)
    assert int(state.updates) == 2 and len(calls) == 2
    (first_batches, first), (second_batches, second) = calls

    def mean_advantage(batches):
        return np.concatenate([b.advantage_RC[np.asarray(b.mask_RC)] for b in batches]).mean()

    # At first the policy is the one that sampled and the one the KL holds it to, cold start
    # included: the ratio is 1, so the objective is the advantage, and the KL is 0.
    assert first["policy/objective"] == pytest.approx(mean_advantage(first_batches), abs=1e-5)
    assert first["policy/kl_ref_nats"] == pytest.approx(0, abs=1e-6)
    assert first["sampler/gap_nats_max"] <= 1e-5
    assert second["policy/objective"] != pytest.approx(mean_advantage(second_batches), abs=1e-4)
    assert second["policy/kl_ref_nats"] > 1e-5
    assert second["sampler/gap_nats_max"] <= 1e-5  # old log-probs are of the policy that sampled
    logged = rows(tmp_path / "metrics.jsonl")[0]
    assert logged["policy/kl_ref_nats"] == pytest.approx(second["policy/kl_ref_nats"] / 2, rel=0.1)


RENEWED: dict[str, Any] = {
    **RL_ONLY,
    "log__save_every": 50,
    "algo__dynamic_rounds": 2,
    "algo__group_size": 2,  # half of the groups are flat
    "algo__kl_coef": 0.1,
    "algo__ref_every": 2,
}


@pytest.fixture(scope="module")
def renewed(tmp_path_factory):
    """A run that draws more problems where groups are flat, and renews its reference."""
    workdir = tmp_path_factory.mktemp("renewed")
    return workdir, run(verdicts_only(), workdir)


def verdicts_only() -> Config:
    config = tiny(**RENEWED)
    config.reward.functions = config.reward.functions[:1]
    return config


def test_problems_are_drawn_until_groups_teach_something(renewed):
    workdir, state = renewed
    metrics = rows(workdir / "metrics.jsonl")
    asked = [row["groups/asked"] for row in metrics]
    assert int(state.cursor) == sum(asked) > 16 + 4
    for row in metrics:
        assert (row["groups/signal"] == 1) or row["groups/asked"] > 8
        assert row["groups/useful_share"] == pytest.approx(
            1 - row["groups/all_right"] - row["groups/all_wrong"]
        )
    written = rows(workdir / "rollouts.jsonl")
    assert len(written) == 4 * 8  # what the update saw
    for step, row in enumerate(metrics):
        rewards = [r["reward"] for r in written if r["step"] == step]
        useful = [a != b for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
        assert sum(useful) / 4 == row["groups/signal"]


def test_the_reference_is_renewed(renewed):
    """After every second step; the KL is measured before the update, and is 0 right after that."""
    nats = [row["policy/kl_ref_nats"] for row in rows(renewed[0] / "metrics.jsonl")]
    assert max(nats[0], nats[2]) < 1e-8 and min(nats[1], nats[3]) > 1e-6
    state = renewed[1]
    jax.tree.map(np.testing.assert_array_equal, state.ref_params, state.params)


def test_stopping_between_renewals_and_draws_changes_nothing(renewed, tmp_path, monkeypatch):
    """The reference and the place among the problems are in the checkpoint."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(3, patch)
        run(verdicts_only(), tmp_path)
    state = run(verdicts_only(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, renewed[1])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert timeless(tmp_path / name) == timeless(renewed[0] / name)


# ---- Adapters and quantised rollouts -----------------------------------------------------------


QLORA: dict[str, Any] = {
    "lora__rank": 2,
    "model__base_dtype": "int4",
    "algo__kl_coef": 0.1,
    "sample__cache": "int8",
    "eval__every": 0,
}


@pytest.fixture(scope="module")
def qlora(tmp_path_factory):
    """Adapters over four bits, a cold start, a reference, a quantised cache."""
    workdir = tmp_path_factory.mktemp("qlora")
    return workdir, run(tiny(**QLORA), workdir)


def test_adapters_alone_are_trained_and_saved(qlora):
    workdir, state = qlora
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.params)}
    assert len(names) == 2 * 7 and all(name[-5:] in ("['a']", "['b']") for name in names)
    with Checkpoints(workdir / "checkpoints", 2) as saved:
        shapes = _shapes(saved._manager.item_metadata(4).tree)
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    assert largest == 2 * 32 * 2  # layers x mlp_width x rank; the embedding has 259 x 16
    metrics = rows(workdir / "metrics.jsonl")
    change = [row["lora/weight_change"] for row in metrics[:4]]
    assert 0 < change[0] < change[3]
    # The reference is the adapters after the cold start.
    assert metrics[0]["policy/kl_ref_nats"] < 1e-8 < 1e-6 < metrics[1]["policy/kl_ref_nats"]


def test_the_gap_of_a_quantised_cache_is_logged_and_corrected(qlora):
    for row in rows(qlora[0] / "metrics.jsonl")[:4]:
        assert 1e-4 < row["sampler/gap_nats_mean"] < 0.03
        assert 0 <= row["sampler/corrected_share"] < 0.01  # of weights that meet the cap


def test_adapters_stopped_half_way_end_as_if_they_were_not(qlora, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(6, patch)  # four of the cold start, two of the run
        run(tiny(**QLORA), tmp_path)
    state = run(tiny(**QLORA), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, qlora[1])
    assert timeless(tmp_path / "metrics.jsonl") == timeless(qlora[0] / "metrics.jsonl")


# ---- What ends a run ---------------------------------------------------------------------------


def test_rewards_that_fail_stop_the_run_with_everything_saved(tmp_path):
    def broken(completion, problem):
        raise ValueError("a bug of the reward")

    config = tiny(**RL_ONLY, reward__functions=((1.0, broken),))
    with pytest.raises(GateError, match=r"failed on 100% .*'broken': \{'crash': 16\}"):
        run(config, tmp_path)
    assert [row["statuses"] for row in rows(tmp_path / "rollouts.jsonl")] == [
        {"broken": "crash"}
    ] * 16
    assert (tmp_path / "checkpoints/0").is_dir()
    assert not (tmp_path / "result.json").exists()


def test_an_update_that_is_not_finite_is_skipped_kept_and_soon_ends_the_run(tmp_path):
    def rubbish(scores):
        return np.full_like(scores.reward_PG, np.nan)

    changes: dict[str, Any] = {**RL_ONLY, "gates__max_bad_updates": 2}
    with pytest.raises(GateError, match="2 updates in a row were not finite"):
        run(tiny(**changes, algo__advantage=rubbish), tmp_path)
    kept = sorted((tmp_path / "gates").iterdir())
    assert [path.name for path in kept] == ["step_000000", "step_000001"]
    with np.load(kept[0] / "batch.npz") as batch:
        assert np.isnan(batch["advantage_RC"]).any()
        rows_of_microbatch, tokens = 4, 48 + 8  # a completion of full length and its prompt
        assert batch["tokens_RT"].shape[0] % rows_of_microbatch == 0
        assert batch["tokens_RT"].shape[1] == tokens
    state = run(tiny(**changes), tmp_path)  # the cause is mended: it goes on from there
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [row["optim/skipped"] for row in metrics] == [1, 1, 0, 0]
    # Both skipped updates left the parameters as they were.
    assert int(state.updates) == 2 and int(state.bad_updates) == 0
    assert metrics[0]["policy/loss"] is None and metrics[2]["policy/loss"] is not None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_sampler_that_drifts_from_the_trainer_ends_the_run(tmp_path, capsys):
    config = tiny(**RL_ONLY, gates__max_gap_nats_mean=1e-12)  # below what float32 can do
    with pytest.raises(GateError, match=r"step 0: sampler and trainer disagree by .* = 1e-12"):
        run(config, tmp_path)
    assert (tmp_path / "checkpoints/1").is_dir()  # the update was made, and is kept
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0]
    alarms = json.loads((tmp_path / "gates/step_000000/alarms.json").read_text())
    assert [alarm["gate"] for alarm in alarms["alarms"]] == ["wide_gap"]
    kept = rows(tmp_path / "gates/step_000000/completions.jsonl")
    assert len(kept) == 16 and all(len(r["tokens"]) == len(r["logprobs"]) for r in kept)
    assert "a gate stopped the run at step 0" in diagnose.brief(tmp_path)
