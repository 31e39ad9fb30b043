"""Every gate: silent on a healthy step, and provoked by what it is there for."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.config import GatesConfig
from grpo.data.tokenizer import ByteTokenizer
from grpo.gates import (
    ROLLOUT_GATES,
    UPDATE_GATES,
    GateError,
    Now,
    Watch,
    degeneration,
    evidence_rows,
)
from grpo.structs import EOS, LENGTH, Completion, Rollout, Scores
from rewards.api import Problem

BOUNDS = GatesConfig()
GATES = {gate.__name__: gate for gate in ROLLOUT_GATES + UPDATE_GATES}

# A step in the middle of experiments/tiny.py, seed 0; what that run does not log is as one of a
# larger model with two minibatches in bfloat16 has it.
HEALTHY: dict[str, float | None] = {
    "groups/signal": 0.6875,
    "lora/weight_change": 0.002,
    "optim/bad_updates": 0.0,
    "optim/grad_norm": 0.201,
    "optim/learning_rate": 2e-4,
    "optim/param_change": 0.0031,
    "optim/skipped": 0.0,
    "policy/entropy_nats": 0.0204,
    "policy/kl_old_nats": 0.004,
    "reward/failure_rate": 0.0,
    "reward/mean": 0.88,
    "reward/solved": 0.78,
    "reward/timeout_rate": 0.0,
    "rollout/duplicate_share": 0.125,
    "rollout/repeated_share": 0.0078,
    "rollout/stuck_share": 0.0625,
    "rollout/zero_id_share": 0.0,
    "sampler/gap_nats_max": 0.4,
    "sampler/gap_nats_mean": 0.006,
    "sampler/kl_nats": 0.0004,
}


def row(**changes: float | None) -> dict[str, float | None]:
    return HEALTHY | {name.replace("__", "/"): value for name, value in changes.items()}


def told(gate: str, rows: list[dict[str, float | None]], **statuses: dict[str, int]) -> Any:
    return GATES[gate](BOUNDS, Now(rows, statuses))


# ---- Each gate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_a_healthy_run_hears_nothing(gate):
    assert told(gate, [row()] * 5) is None


@pytest.mark.parametrize("gate", GATES)
def test_a_log_from_before_a_metric_existed_hears_nothing(gate):
    assert told(gate, [{"reward/mean": 0.5}] * 5) is None


@pytest.mark.parametrize(
    "gate, changes, stops, said",
    [
        ("failing_rewards", {"reward__failure_rate": 0.25}, True, "failed on 25% of this step"),
        ("late_rewards", {"reward__timeout_rate": 0.75}, True, "75% .* ran out of time"),
        ("repeated_output", {"rollout__repeated_share": 0.6}, False, "60% .* mostly repeat"),
        ("zero_output", {"rollout__zero_id_share": 0.97}, False, "97% .* tokens have id 0"),
        ("stuck_output", {"rollout__stuck_share": 1.0}, False, "in 100% .* the same, and not"),
        ("not_finite", {"optim__bad_updates": 3.0}, True, "3 updates in a row were not finite"),
        ("wide_gap", {"sampler__gap_nats_mean": 0.2}, True, r"0\.2 nats a token on average"),
        ("wide_gap", {"sampler__gap_nats_mean": math.nan}, True, "disagree by nan"),
        ("wide_gap_once", {"sampler__gap_nats_max": 14.0}, False, "14 nats on one token"),
        ("sampler_divergence", {"sampler__kl_nats": 0.3}, False, r"0\.3 nats a token away"),
        ("leaping_policy", {"optim__param_change": 0.14}, False, r"14\.0% of their norm"),
        ("drifting_policy", {"policy__kl_old_nats": 2.5}, False, r"moved the policy 2\.5 nats"),
    ],
)
def test_a_step_beyond_a_bound_is_told(gate, changes, stops, said):
    alarm = told(gate, [row(), row(**changes)])
    assert alarm.gate == gate and alarm.stops is stops
    message = str(alarm)
    assert re.search(said, message)
    field = re.search(r"gates\.(\w+) = ", message)
    assert field and hasattr(BOUNDS, field[1])  # the bound is one a user can set
    assert "Likely cause: " in message and "Remedy: " in message
    assert {name: told(name, [row(), row(**changes)]) is not None for name in GATES} == {
        name: name == gate
        for name in GATES  # and by no other gate
    }


@pytest.mark.parametrize(
    "gate, metric",
    [
        ("repeated_output", "rollout/repeated_share"),
        ("zero_output", "rollout/zero_id_share"),
        ("stuck_output", "rollout/stuck_share"),
    ],
)
def test_degenerate_output_stops_a_run_only_when_it_lasts(gate, metric):
    bad = HEALTHY | {metric: 1.0}
    assert not told(gate, [bad, bad, row(), bad]).stops
    assert not told(gate, [row(), bad, bad]).stops
    alarm = told(gate, [row(), bad, bad, bad])
    assert alarm.stops and "3 steps in a row" in alarm.seen


def test_a_policy_that_stands_still_though_it_could_learn():
    still = row(optim__param_change=0.0)
    assert told("still_policy", [still] * 4) is None
    assert "did not change at all for 5 steps" in told("still_policy", [still] * 5).seen
    for excuse in (
        {"groups__signal": 0.0},  # nothing to learn from
        {"optim__learning_rate": 0.0},  # nothing meant to be learnt
        {"optim__skipped": 1.0},  # another gate's affair
        {"optim__param_change": 1e-9},
    ):
        last = still | {name.replace("__", "/"): value for name, value in excuse.items()}
        assert told("still_policy", [*[still] * 4, last]) is None
    del still["optim/param_change"]
    assert told("still_policy", [still] * 5) is None


def test_adapters_that_hardly_move():
    idle = row(lora__weight_change=1e-6, optim__learning_rate=5e-7)
    assert told("idle_adapters", [idle] * 4) is None
    alarm = told("idle_adapters", [idle] * 5)
    assert not alarm.stops
    assert "changed their matrices by 1e-06 of the matrices' norm" in alarm.seen
    assert "learning rate 5e-07" in alarm.seen
    for excuse in ({"groups__signal": 0.0}, {"lora__weight_change": 1e-5}):
        last = idle | {name.replace("__", "/"): value for name, value in excuse.items()}
        assert told("idle_adapters", [*[idle] * 4, last]) is None


def test_a_skipped_update_says_nothing_about_the_sampler():
    skipped = row(
        optim__skipped=1.0,
        optim__bad_updates=1.0,
        sampler__gap_nats_mean=math.nan,
        sampler__gap_nats_max=None,
        sampler__kl_nats=math.nan,
        policy__kl_old_nats=math.nan,
    )
    assert [name for name in GATES if told(name, [skipped])] == []


def test_failing_rewards_are_named():
    alarm = told(
        "failing_rewards",
        [row(reward__failure_rate=0.5)],
        told={"crash": 8, "ok": 8},
        short={"ok": 16},
    )
    assert "{'told': {'crash': 8, 'ok': 8}, 'short': {'ok': 16}}" in str(alarm)


# ---- Degenerate output -------------------------------------------------------------------------


def rollout_of(texts_PG: list[list[list[int]]], finish: str = LENGTH) -> Rollout:
    completions = [
        Completion(p, g, tuple(tokens), np.full(len(tokens), -0.5, np.float32), finish)
        for p, group in enumerate(texts_PG)
        for g, tokens in enumerate(group)
    ]
    problems = [Problem(f"p{p}", prompt="1+1=", reference=2) for p in range(len(texts_PG))]
    return Rollout(problems, [[49]] * len(texts_PG), completions, len(texts_PG[0]))


def various(P: int = 4, G: int = 4, C: int = 40) -> list[list[list[int]]]:
    """Written digit sums: the same marks again and again, and yet no repetition."""
    rng = np.random.default_rng(0)
    return [[list(rng.choice(list(b"0123456789+= "), C)) for _ in range(G)] for _ in range(P)]


def shares(texts_PG: list[list[list[int]]], solved: bool = False, finish: str = LENGTH) -> dict:
    P, G = len(texts_PG), len(texts_PG[0])
    found = degeneration(rollout_of(texts_PG, finish), np.full((P, G), solved))
    return {name.removeprefix("rollout/"): value for name, value in found.items()}


NONE = {"repeated_share": 0, "zero_id_share": 0, "duplicate_share": 0, "stuck_share": 0}


def test_ordinary_text_is_not_degenerate():
    assert shares(various()) == NONE
    prose = list(b"<think>3+4=7 7+5=12 12+1=13</think><answer>13</answer>")
    assert shares([[prose, prose[:-1]]]) == NONE


@pytest.mark.parametrize("unit", [b"!", b"no", b"1, ", b"ha! "])
def test_one_to_four_tokens_over_and_over(unit):
    texts = various()
    texts[0] = [list(b"So 3+4=7 " + unit * 30) for _ in range(4)]
    texts[1][0] = list(
        b"So 3+4=7 and 7+5=12 and so on, which is 13. " + unit * 4
    )  # only at its end
    found = shares(texts)
    assert found["repeated_share"] == 4 / 16
    assert found["duplicate_share"] == found["stuck_share"] == 1 / 4


def test_a_short_answer_repeats_nothing():
    assert shares([[list(b"7777777"), list(b"no no no")]])["repeated_share"] == 0


def test_a_flood_of_id_0():
    texts = various(P=1, G=2)
    texts[0][1] = [0] * 40
    assert shares(texts)["zero_id_share"] == 0.5
    assert shares(texts)["repeated_share"] == 0.5


def test_a_stop_token_whose_id_is_0_is_no_flood():
    assert shares([[[7, 0], [8, 0]]], finish=EOS)["zero_id_share"] == 0
    assert shares([[[0], [0]]], finish=EOS)["zero_id_share"] == 0  # nothing but stop tokens
    assert shares([[[7, 0], [8, 0]]], finish=LENGTH)["zero_id_share"] == 0.5


def test_groups_that_say_one_thing_are_stuck_unless_it_is_right():
    texts = [[text] * 4 for (text, *_) in various()]
    assert shares(texts) == NONE | {"duplicate_share": 1, "stuck_share": 1}
    assert shares(texts, solved=True) == NONE | {"duplicate_share": 1}


# ---- Watching a run ----------------------------------------------------------------------------

ROLLOUT = rollout_of(various(P=2, G=2))
SCORES = Scores(
    reward_PG=np.ones((2, 2), np.float32),
    valid_PG=np.array([[True, True], [True, False]]),
    components={"told": np.ones((2, 2), np.float32)},
    weights={"told": 1.0},
    statuses={"told": ["ok", "ok", "ok", "crash"]},
)


def evidence() -> list[dict[str, object]]:
    return evidence_rows(7, ROLLOUT, SCORES, ByteTokenizer())


def finite(changes: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in row(**changes).items() if value is not None}


def watch(tmp_path: Path, past: list[dict[str, Any]] = [], **bounds: Any) -> Watch:  # noqa: B006
    rows = [{"step": step} | values for step, values in enumerate(past)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Watch(GatesConfig(**bounds), tmp_path)


def test_a_warning_is_printed_once_and_counted_at_every_step(tmp_path, capsys):
    watching = watch(tmp_path)
    counted = []
    for step, gap in enumerate((0.5, 20.0, 30.0, 0.5)):
        metrics = finite({"sampler__gap_nats_max": gap})
        watching.look(ROLLOUT_GATES, step, metrics, SCORES, evidence)
        watching.look(UPDATE_GATES, step, metrics, SCORES, evidence)
        watching.stop()
        counted.append(metrics["gates/warnings"])
    assert counted == [0, 1, 1, 0]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: step 1: sampler and trainer disagree by 20 nats")
    assert lines[0].endswith(f"evidence in {tmp_path / 'gates/step_000001'}")
    assert [path.name for path in (tmp_path / "gates").iterdir()] == ["step_000001"]


def test_a_stop_before_the_update_leaves_the_step_to_be_done_again(tmp_path):
    watching = watch(tmp_path)
    metrics = {n: v for n, v in finite({"reward__failure_rate": 0.25}).items() if "optim/" not in n}
    watching.look(ROLLOUT_GATES, 7, metrics, SCORES, evidence)
    with pytest.raises(GateError) as stopped:
        watching.stop()
    folder = tmp_path / "gates/step_000007"
    message = str(stopped.value)
    assert message.startswith("step 7: verifiers failed on 25% of this step's rows: {'told': {'ok'")
    assert str(folder) in message
    report = json.loads((folder / "alarms.json").read_text())
    assert report["step"] == report["resumes_at"] == 7
    assert [alarm["gate"] for alarm in report["alarms"]] == ["failing_rewards"]
    assert report["metrics"]["reward/failure_rate"] == 0.25
    kept = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in kept] == [list(c.tokens) for c in ROLLOUT.completions]
    assert kept[3]["statuses"] == {"told": "crash"} and kept[0]["logprobs"] == [-0.5] * 40


def test_everything_wrong_with_a_step_is_in_one_message(tmp_path):
    watching = watch(tmp_path)
    changes = {"optim__bad_updates": 3.0, "sampler__gap_nats_mean": 0.2}
    watching.look(UPDATE_GATES, 3, finite(changes), SCORES, evidence)
    with pytest.raises(GateError, match="not finite.*; and sampler and trainer disagree"):
        watching.stop()
    assert json.loads((tmp_path / "gates/step_000003/alarms.json").read_text())["resumes_at"] == 4


def test_numbers_json_does_not_have_become_null(tmp_path):
    watching = watch(tmp_path)
    changes = {"sampler__gap_nats_mean": math.inf, "policy__loss": math.nan}
    watching.look(UPDATE_GATES, 3, finite(changes), SCORES, evidence)
    report = json.loads((tmp_path / "gates/step_000003/alarms.json").read_text())
    assert report["metrics"]["policy/loss"] is report["metrics"]["sampler/gap_nats_mean"] is None


def test_a_resumed_run_remembers_the_steps_before(tmp_path):
    bad = {"rollout__repeated_share": 1.0}
    evaluation = {"eval/pass_at_1": 0.5}  # the last row of a finished run
    for past, stops in (
        ([finite(bad)] * 2, True),
        ([finite(bad), finite(bad), evaluation], True),
        ([finite(bad), finite({})], False),
        ([], False),
    ):
        watching = watch(tmp_path, past)
        watching.look(ROLLOUT_GATES, len(past), finite(bad), SCORES, evidence)
        if stops:
            with pytest.raises(GateError, match="3 steps in a row"):
                watching.stop()
        else:
            watching.stop()


def test_only_the_first_process_writes(tmp_path, capsys):
    watching = Watch(BOUNDS, tmp_path, writes=False)
    metrics = finite({"sampler__gap_nats_max": 20.0})
    watching.look(UPDATE_GATES, 0, metrics, SCORES, evidence)
    assert metrics["gates/warnings"] == 1  # the same everywhere
    assert not (tmp_path / "gates").exists() and not capsys.readouterr().out
