"""The loop: what stops it, and that stopping, resuming and measuring change nothing."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_experiment import get_config

from grpo import build, diagnose
from grpo.checkpoint import params_sha256
from grpo.config import Config
from grpo.evaluate import evaluate
from grpo.gates import GateError
from grpo.metrics import MetricLog
from grpo.train import train

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Each run makes its own jitted functions; what they compile to is shared, over processes."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name.upper(), str(value))  # for the runs in processes of their own
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at the settings only once
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


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


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    """Rows without the fields that measure the machine."""
    return [
        {n: v for n, v in row.items() if not n.startswith("time/") and "tokens_per_s" not in n}
        for row in rows(path)
    ]


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
    assert set(compiled) == {4}  # empty slots, prefill, insert, decode


def test_evaluating_alone_gives_what_the_run_measured_last(straight):
    last = timeless(straight[0] / "metrics.jsonl")[-1]
    assert 0 < last["eval/pass_at_1"] < 1  # else equality would show little
    got = evaluate(tiny(), straight[0], baseline=tiny())
    assert {"step": 4} | {n: v for n, v in got.items() if n != "time/eval_s"} == last
    assert json.loads((straight[0] / "evaluation.json").read_text())["step"] == 4


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
        log, left = MetricLog.log, itertools.count(rows_logged, -1)

        def log_then_stop(self, step, metrics, log=log, left=left):
            log(self, step, metrics)
            if next(left) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(MetricLog, "log", log_then_stop)
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
    calls: list[tuple[Any, dict[str, float]]] = []
    make_update = build.make_update

    def recording(*arguments):
        update = make_update(*arguments)

        def call(state, batch):
            state, report = update(state, batch)
            calls.append((batch, {name: float(value) for name, value in report.items()}))
            return state, report

        return call

    monkeypatch.setattr(build, "make_update", recording)
    state = run(tiny(num_steps=1, eval__every=0, algo__minibatches=2, algo__kl_coef=0.1), tmp_path)
    assert int(state.updates) == 2 and len(calls) == 2
    (first_batch, first), (second_batch, second) = calls

    def mean_advantage(batch):
        return np.asarray(batch.advantage_RC)[np.asarray(batch.mask_RC)].mean()

    # At first the policy is the one that sampled and the one the KL holds it to, cold start
    # included: the ratio is 1, so the objective is the advantage, and the KL is 0.
    assert first["policy/objective"] == pytest.approx(mean_advantage(first_batch), abs=1e-5)
    assert first["policy/kl_ref_nats"] == pytest.approx(0, abs=1e-6)
    assert first["sampler/gap_nats_max"] <= 1e-5
    assert second["policy/objective"] != pytest.approx(mean_advantage(second_batch), abs=1e-4)
    assert second["policy/kl_ref_nats"] > 1e-5
    assert second["sampler/gap_nats_max"] <= 1e-5  # old log-probs are of the policy that sampled
    logged = rows(tmp_path / "metrics.jsonl")[0]
    assert logged["policy/kl_ref_nats"] == pytest.approx(second["policy/kl_ref_nats"] / 2, rel=0.1)


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


def test_an_update_that_is_not_finite_is_skipped_kept_and_soon_ends_the_run(tmp_path, monkeypatch):
    config = tiny(**RL_ONLY, gates__max_bad_updates=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            "grpo.train.group_advantage",
            lambda reward_PG, valid_PG, scale_by_std: np.full_like(reward_PG, np.inf),
        )
        with pytest.raises(GateError, match="2 updates in a row were not finite"):
            run(config, tmp_path)
    kept = sorted((tmp_path / "gates").iterdir())
    assert [path.name for path in kept] == ["step_000000", "step_000001"]
    with np.load(kept[0] / "batch.npz") as batch:
        assert np.isinf(batch["advantage_RC"]).any() and batch["tokens_RT"].shape == (16, 56)
    state = run(config, tmp_path)  # the cause is mended: it goes on from there
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
