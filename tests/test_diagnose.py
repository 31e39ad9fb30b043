"""The diagnosis: silent on a healthy run, and right about each way to fail."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo import diagnose
from grpo.diagnose import FINDERS, LEARNING, NO_GAIN, SOLVED, TOO_SHORT, WORSE, Severity, read_run

Row = dict[str, Any]
CONFIG = {
    "optim": {"learning_rate": 2e-4, "clip_norm": 1.0},
    "sample": {"max_new_tokens": 60},
    "reward": {
        "functions": [[1.0, "rewards.answers.numeric_answer"], [0.1, "rewards.formats.r1_format"]]
    },
}


def healthy_row(step: int, of: int, rng: np.random.Generator) -> Row:
    """A step of a run like experiments/tiny.py: from half of the problems solved to nearly all."""
    done = step / (of - 1)
    solved = 0.47 + 0.43 * (1 - (1 - done) ** 2) + 0.03 * rng.standard_normal()
    signal = 0.95 - 0.55 * done + 0.05 * rng.standard_normal()
    return {
        "step": step,
        "engine/compiled": 4.0,
        "gates/warnings": 0.0,
        "groups/all_right": (1 - signal) * 0.9,
        "groups/all_wrong": (1 - signal) * 0.1,
        "groups/signal": signal,
        "optim/grad_norm": 0.15 + 0.02 * rng.standard_normal(),
        "optim/learning_rate": 2e-4,
        "optim/param_change": 0.003,
        "optim/skipped": 0.0,
        "policy/clip_fraction": 0.01,
        "policy/entropy_nats": 0.06 * 0.2**done,
        "policy/kl_old_nats": 0.002,
        "reward/component/numeric_answer": solved,
        "reward/component/r1_format": 0.99,
        "reward/failure_rate": 0.0,
        "reward/mean": solved + 0.099,
        "reward/solved": solved,
        "reward/timeout_rate": 0.0,
        "rollout/duplicate_share": 0.6 * done,
        "rollout/length_tokens_mean": 50.0 + rng.standard_normal(),
        "rollout/occupancy": 0.9,
        "rollout/truncated": 0.002,
        "sampler/gap_nats_max": 2e-5,
        "sampler/gap_nats_mean": 1e-8,
        "time/sample_s": 0.8,
        "time/score_s": 0.01,
        "time/step_s": 3.9,
        "time/update_s": 3.1,
    }


def write_run(
    workdir: Path, change: Callable[[Row, float], object] = lambda row, done: None, steps: int = 40
) -> Path:
    """A healthy run of that many steps but for `change(row, share done)`."""
    rng = np.random.default_rng(0)
    rows = [healthy_row(step, max(steps, 2), rng) for step in range(steps)]
    for row in rows:
        change(row, row["step"] / max(steps - 1, 1))
    evaluations = [{"step": steps, "eval/pass_at_1": 0.93}] if steps else []
    if rows:
        rows[0] |= {"eval/pass_at_1": 0.46}
    write_rows(workdir, rows + evaluations)
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    return workdir


def write_rows(workdir: Path, rows: list[Row]) -> None:
    lines = [json.dumps(row | {n: None for n, v in row.items() if v != v}) for row in rows]
    (workdir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def findings(workdir: Path) -> list[diagnose.Finding]:
    return diagnose.diagnose(read_run(workdir))


def metric(name: str, value: Callable[[float], float] | float) -> Callable[[Row, float], object]:
    """Changes one metric, to a number or to a function of the share done."""

    def change(row: Row, done: float) -> None:
        row[name] = value(done) if callable(value) else value

    return change


def metrics(**values: Callable[[float], float] | float) -> Callable[[Row, float], object]:
    """`metrics(reward__mean=0.1)` changes several."""
    changes = [metric(name.replace("__", "/"), value) for name, value in values.items()]
    return lambda row, done: [change(row, done) for change in changes]


NO_GROUPS: dict[str, float] = {  # and so the policy stays as it is
    "groups__signal": 0.02,
    "optim__grad_norm": 0.0,
    "policy__entropy_nats": 0.06,
}

# name -> (what is wrong, the severity and title of what must be said first, what it must name)
FAILURES: dict[str, tuple[Callable[[Row, float], object], Severity, str, str]] = {
    "failing": (
        metrics(reward__failure_rate=0.3),
        Severity.PROBLEM,
        "verifiers fail",
        "30.0% of all rows",
    ),
    "some failing": (
        metrics(reward__failure_rate=0.04),
        Severity.WARNING,
        "verifiers fail",
        "4.0% of all rows",
    ),
    "late": (
        metrics(reward__timeout_rate=0.4),
        Severity.PROBLEM,
        "verifiers run out of time",
        "reward.deadline_s",
    ),
    "gap": (
        metrics(sampler__gap_nats_mean=0.05),
        Severity.WARNING,
        "sampler and trainer disagree",
        "0.05 nats",
    ),
    "skipped": (
        lambda row, done: row.update({"optim/skipped": float(row["step"] % 4 == 0)}),
        Severity.PROBLEM,
        "updates were skipped because they were not finite",
        "in 10 of 40 steps",
    ),
    "rate 0": (
        metrics(
            optim__learning_rate=0.0,
            optim__param_change=0.0,
            reward__mean=0.5,
            reward__solved=0.4,
        ),
        Severity.PROBLEM,
        "the learning rate is 0",
        "at all 40 steps",
    ),
    "still": (
        metrics(optim__param_change=0.0, reward__mean=0.5, reward__solved=0.4),
        Severity.PROBLEM,
        "the parameters never change",
        "learning rate up to 0.0002",
    ),
    "truncated": (
        metrics(
            rollout__truncated=0.97,
            rollout__length_tokens_mean=24.0,
            reward__mean=0.01,
            reward__solved=0.01,
            groups__all_wrong=0.95,
            **NO_GROUPS,
        ),
        Severity.PROBLEM,
        "completions are cut off",
        "sample.max_new_tokens (60)",
    ),
    "collapsed": (
        metrics(
            reward__mean=lambda done: 0.7 if done < 0.4 else 0.02,
            reward__solved=lambda done: 0.6 if done < 0.4 else 0.0,
            optim__param_change=0.2,
        ),
        Severity.PROBLEM,
        "the reward has collapsed",
        "optim/param_change 20.00%",
    ),
    "collapsed at once": (  # and what follows from it is told after it
        metrics(
            reward__mean=lambda done: 0.6 if done == 0 else 0.0,
            reward__solved=lambda done: 0.5 if done == 0 else 0.0,
            rollout__truncated=lambda done: float(done > 0),
            policy__entropy_nats=lambda done: 0.06 + 4 * done,
            groups__all_wrong=lambda done: float(done > 0),
            groups__signal=0.0,
        ),
        Severity.PROBLEM,
        "the reward has collapsed",
        "reward/mean was 0.6 at step 0 and is 0 over the last 8 steps; policy/entropy_nats",
    ),
    "entropy": (
        metrics(
            policy__entropy_nats=lambda done: 0.8 * 0.005**done,
            reward__solved=0.3,
            reward__mean=lambda done: 0.4,
            groups__signal=0.05,
            groups__all_wrong=0.6,
            groups__all_right=0.3,
        ),
        Severity.PROBLEM,
        "entropy has collapsed before the problems were solved",
        "groups of equal completions",
    ),
    "all wrong": (
        metrics(reward__solved=0.002, reward__mean=0.1, groups__all_wrong=0.98, **NO_GROUPS),
        Severity.PROBLEM,
        "nearly all groups are all wrong",
        "98% of the groups",
    ),
    "all wrong, before it was logged": (
        lambda row, done: (
            metrics(reward__solved=0.002, reward__mean=0.1, **NO_GROUPS)(row, done),
            row.pop("groups/all_wrong"),
        ),
        Severity.PROBLEM,
        "nearly all groups are all wrong",
        "98% of the groups",
    ),
    "all right": (
        metrics(reward__solved=0.995, reward__mean=1.09, groups__all_right=0.97, **NO_GROUPS),
        Severity.PROBLEM,
        "nearly all groups are all right from the start",
        "harder problems",
    ),
    "fast": (
        metrics(optim__param_change=0.05, policy__kl_old_nats=0.3, policy__clip_fraction=0.6),
        Severity.WARNING,
        "the policy moves too far in a step",
        "policy/kl_old_nats 0.3 at a usual step; policy/clip_fraction 60%",
    ),
    "slow": (
        metrics(optim__param_change=4e-7, reward__mean=0.5, reward__solved=0.4),
        Severity.WARNING,
        "the learning rate may be too small",
        "optim.learning_rate (0.0002)",
    ),
    "no format": (
        metrics(reward__component__r1_format=0.0),
        Severity.WARNING,
        "r1_format: never paid",
        "sft.num_steps",
    ),
    "shaping": (
        metrics(reward__solved=0.3, reward__mean=lambda done: 0.3 + 0.1 * done),
        Severity.WARNING,
        "the reward rises, but no more problems are solved",
        "reward.functions",
    ),
    "no gain": (
        metrics(reward__mean=0.5, reward__solved=0.4, groups__signal=0.7),
        Severity.WARNING,
        "no gain so far",
        "with 70% of the groups to learn from",
    ),
    "falling": (
        metrics(
            reward__mean=lambda done: 0.6 - 0.1 * done, reward__solved=lambda done: 0.5 - 0.1 * done
        ),
        Severity.WARNING,
        "fewer problems are solved",
        "0.491 -> 0.409",
    ),
    "shrinking": (
        metrics(
            rollout__length_tokens_mean=lambda done: 50 - 45 * done,
            reward__mean=lambda done: 0.6 - 0.1 * done,
            reward__solved=lambda done: 0.5 - 0.1 * done,
        ),
        Severity.WARNING,
        "completions got much shorter",
        "9 tokens",
    ),
    "growing": (
        metrics(rollout__length_tokens_mean=lambda done: 50 + 100 * done),
        Severity.NOTE,
        "completions got much longer",
        "tokens on average",
    ),
    "cut gradients": (
        metrics(optim__grad_norm=120.0),
        Severity.NOTE,
        "gradients are cut far below their length",
        "optim.clip_norm 1",
    ),
    "waiting": (
        metrics(time__score_s=1.5),
        Severity.NOTE,
        "time is lost",
        "waiting for rewards 38%",
    ),
    "evaluating": (
        metrics(time__eval_s=2.5),
        Severity.NOTE,
        "time is lost",
        "evaluation 39%",
    ),
    "idle slots": (
        metrics(time__sample_s=3.0, rollout__occupancy=0.2),
        Severity.NOTE,
        "time is lost",
        "only 20% of the slots",
    ),
    "compiling": (
        metrics(engine__compiled=lambda done: 4.0 if done < 0.5 else 6.0),
        Severity.NOTE,
        "the sampler compiled again after the first step",
        "4 -> 6",
    ),
    "warned": (
        metrics(gates__warnings=lambda done: float(done > 0.9)),
        Severity.NOTE,
        "gates warned",
        "at 4 of 40 steps",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_way_to_fail_is_told_first(name, tmp_path):
    change, severity, title, named = FAILURES[name]
    found = findings(write_run(tmp_path, change))
    assert found, "nothing was found"
    assert (found[0].severity, found[0].title) == (severity, title), found
    assert named in f"{found[0].evidence} {found[0].remedy}"
    assert found == sorted(found, key=lambda finding: -finding.severity)


def test_a_healthy_run_is_called_so_with_its_figures(tmp_path):
    run = read_run(write_run(tmp_path))
    assert diagnose.diagnose(run) == []
    told = diagnose.text(run, [])
    assert told.startswith("40 steps: learning, healthy; held-out pass@1 0.460 -> 0.930\n")
    assert "nothing wrong was found" in told
    assert "solved" in told and "seconds a step              3.90      3.90" in told
    brief = diagnose.brief(tmp_path)
    assert brief == "diagnosis: 40 steps: learning, healthy; held-out pass@1 0.460 -> 0.930"


@pytest.mark.parametrize("finder", FINDERS, ids=lambda finder: finder.__name__)
def test_every_finder_is_silent_on_a_healthy_run_and_on_one_that_logged_nothing(finder, tmp_path):
    assert finder(read_run(write_run(tmp_path))) is None
    write_rows(tmp_path, [{"step": step, "reward/mean": 0.5} for step in range(40)])
    assert finder(read_run(tmp_path)) is None
    write_rows(tmp_path, [])
    assert finder(read_run(tmp_path)) is None


def test_a_run_that_has_solved_its_problems_is_done_not_failing(tmp_path):
    def change(row, done):
        row["reward/solved"] = min(1.0, 0.5 + done)
        row["reward/mean"] = row["reward/solved"] + 0.1
        row["groups/signal"] = max(0.02, 0.9 - 1.8 * done)
        row["groups/all_right"] = 1 - row["groups/signal"]

    (found,) = findings(write_run(tmp_path, change))
    assert found.severity == Severity.NOTE and found.title.endswith(": the run is done")


def test_held_out_problems_that_get_worse(tmp_path):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "eval/pass_at_1": 0.3}\n')
    (found,) = findings(tmp_path)
    assert found.title.startswith("held-out problems get worse") and "0.46 -> 0.3" in found.evidence


@pytest.mark.parametrize(
    "change, steps, state",
    [
        (lambda row, done: None, 40, LEARNING),
        (lambda row, done: None, 7, TOO_SHORT),
        (lambda row, done: None, 1, TOO_SHORT),
        (metrics(reward__mean=0.5, reward__solved=0.4), 40, NO_GAIN),
        (metrics(reward__mean=1.1, reward__solved=0.99), 40, SOLVED),
        (metrics(reward__mean=lambda done: -done, reward__solved=0.0), 40, WORSE),
        (metrics(reward__mean=math.nan, reward__solved=math.nan), 40, NO_GAIN),
    ],
)
def test_whether_it_learns(change, steps, state, tmp_path):
    run = read_run(write_run(tmp_path, change, steps))
    assert diagnose.learning(run) == state
    assert f"{steps} steps: {state}" in diagnose.text(run, diagnose.diagnose(run))


def test_noise_is_no_gain(tmp_path):
    rng = np.random.default_rng(1)

    def noisy(row, done):
        row["reward/solved"] = row["reward/mean"] = 0.5 + 0.1 * rng.standard_normal()

    assert diagnose.learning(read_run(write_run(tmp_path, noisy, 20))) == NO_GAIN


# ---- What a run leaves behind ------------------------------------------------------------------


def stop_report(step: int, resumes_at: int, **changes: Any) -> Row:
    alarm = {"gate": "wide_gap", "stops": True, "seen": "a gap", "bound": "gates.x = 1"}
    alarm |= {"cause": "?", "remedy": "mend it"}
    return {"step": step, "resumes_at": resumes_at, "alarms": [alarm | changes]}


def write_stop(workdir: Path, report: object, step: int) -> None:
    folder = workdir / f"gates/step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alarms.json").write_text(json.dumps(report))


def test_a_gate_that_stopped_the_run_is_told_before_anything_else(tmp_path):
    write_run(tmp_path, metrics(reward__failure_rate=0.3), steps=12)
    write_stop(tmp_path, stop_report(11, 12), 11)
    first, second, *_ = findings(tmp_path)
    assert first.title == "a gate stopped the run at step 11"
    assert first.evidence == "a gap (gates.x = 1)" and first.remedy == "mend it"
    assert second.title == "verifiers fail"


@pytest.mark.parametrize(
    "report, told",
    [
        (stop_report(12, 12), True),  # before the update: its step has no row
        (stop_report(11, 11), False),  # since done again
        (stop_report(5, 6), False),
        (stop_report(11, 12, stops=False), False),
        ([], False),
        ({"step": "x", "resumes_at": 99, "alarms": [{"stops": True}]}, False),
        ({"step": 11, "resumes_at": 12, "alarms": 3}, False),
        ({"step": 11, "resumes_at": 12, "alarms": [3, {"stops": True}]}, True),
    ],
)
def test_a_stop_counts_until_the_run_goes_on(report, told, tmp_path):
    write_run(tmp_path, steps=12)
    write_stop(tmp_path, report, 11)
    assert any("a gate stopped" in finding.title for finding in findings(tmp_path)) is told


def test_stored_completions_say_which_reward_failed(tmp_path):
    write_run(tmp_path, metrics(reward__failure_rate=0.3))
    rows = [{"statuses": {"numeric_answer": "ok", "mine": s}} for s in ("crash", "ok", "crash")]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "no json\n[1]\n" + '{"statuses": 3}\n'
    (tmp_path / "rollouts.jsonl").write_text(text)
    assert findings(tmp_path)[0].evidence.endswith("; stored: mine crash 2")


def test_only_the_end_of_long_rollouts_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnose, "_ROLLOUT_BYTES", 50)
    write_run(tmp_path)
    lines = [json.dumps({"step": step, "text": "x" * 10}) + "\n" for step in range(100)]
    (tmp_path / "rollouts.jsonl").write_text("".join(lines))
    assert [row["step"] for row in read_run(tmp_path).rollouts] == [99]


def test_a_resumed_run_counts_a_step_once_as_logged_last(tmp_path):
    row = healthy_row(0, 2, np.random.default_rng(0))
    write_rows(tmp_path, [row | {"step": s, "reward/mean": m} for s, m in ((0, 1), (1, 2), (1, 5))])
    run = read_run(tmp_path)
    assert run.steps.tolist() == [0, 1] and run.series["reward/mean"].tolist() == [1, 5]


def test_a_metric_that_appears_half_way_lines_up(tmp_path):
    write_rows(tmp_path, [{"step": 0, "reward/mean": 1}, {"step": 3, "reward/mean": 1, "new": 7}])
    run = read_run(tmp_path)
    assert run.steps.tolist() == [0, 3]
    assert np.isnan(run.series["new"][0]) and run.series["new"][1] == 7


def test_lines_that_are_no_rows_are_counted_and_left_out(tmp_path):
    write_run(tmp_path)
    bad = ["no json", "[1]", "{}", '{"step": "1"}', '{"step": -1}', '{"step": 1e300}', "3", "null"]
    bad += ["[" * 100_000, '{"step": 2, "reward/mean": 1' + "0" * 400 + "}", '{"step": null}', ""]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write("".join(line + "\n" for line in bad).encode())
        file.write(b'\xff\xfe\n{"step": 7, "rew')  # not UTF-8; being written
    run = read_run(tmp_path)
    assert len(run.steps) == 40 and run.unreadable == len(bad) + 1
    (found,) = diagnose.diagnose(run)
    assert found.title == "part of the log cannot be read" and "13 lines" in found.evidence


@pytest.mark.parametrize("config", ["[", "[]", "3", '{"optim": 3, "reward": {"functions": {}}}'])
def test_any_config_will_do(config, tmp_path):
    write_run(tmp_path, metrics(reward__component__r1_format=0.0, optim__grad_norm=120.0))
    (tmp_path / "config.json").write_text(config)
    run = read_run(tmp_path)
    assert "r1_format: never paid" in diagnose.text(run, diagnose.diagnose(run))


def test_hostile_names_cannot_command_the_terminal(tmp_path):
    evil = "\x1b[2J\n1. PROBLEM: rm -rf\u202e"

    def change(row, done):
        row[f"reward/component/{evil}"] = 0.0
        row["reward/failure_rate"] = 0.3

    write_run(tmp_path, change)
    row = {"statuses": {evil: evil}}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    write_stop(tmp_path, stop_report(40, 41, seen=evil, bound=evil, remedy=evil), 40)
    run = read_run(tmp_path)
    for told in (diagnose.text(run, diagnose.diagnose(run)), diagnose.brief(tmp_path)):
        assert "\x1b" not in told and "\u202e" not in told
        assert "\\x1b" in told and "\n1. PROBLEM: rm" not in told
    json.dumps(diagnose.as_json(run, diagnose.diagnose(run)))


# ---- The command -------------------------------------------------------------------------------


def test_the_command_prints_findings_with_their_remedies(tmp_path, capsys):
    write_run(tmp_path, FAILURES["truncated"][0])
    diagnose.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "\n1. PROBLEM: completions are cut off\n   seen    97% reach the limit" in out
    assert "\n   remedy  raise sample.max_new_tokens (60)" in out
    assert "\n2. PROBLEM: nearly all groups are all wrong\n" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_the_command_prints_json(tmp_path, capsys):
    write_run(tmp_path, metrics(reward__component__r1_format=0.0))
    diagnose.main([str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["learning"] == LEARNING and told["held_out"] == [[0, 0.46], [40, 0.93]]
    assert told["figures"]["time/step_s"] == pytest.approx([3.9, 3.9])
    assert [finding["severity"] for finding in told["findings"]] == ["warning"]
    assert told["findings"][0].keys() == {"severity", "title", "evidence", "remedy"}


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"metrics\.jsonl"):
        diagnose.main([str(tmp_path)])
    assert diagnose.brief(tmp_path).startswith("no diagnosis: ")


# ---- Recorded runs -----------------------------------------------------------------------------

RECORDED = Path(__file__).parent / "golden" / "recorded"  # made by tools/record_failing_runs.py

# name -> what must be found, the first of them first
FOUND = {
    "healthy": [],
    "rate_zero": ["the learning rate is 0"],
    "rate_too_small": ["the learning rate may be too small"],
    "rate_too_large": [
        "the reward has collapsed",
        "completions are cut off",
        "entropy has collapsed before the problems were solved",
    ],
    "truncated": ["completions are cut off", "nearly all groups are all wrong"],
    "too_hard": [
        "entropy has collapsed before the problems were solved",
        "nearly all groups are all wrong",
    ],
    "too_easy": ["nearly all groups are all right from the start"],
    "reward_fails": ["verifiers fail"],
    "reward_late": ["verifiers run out of time", "time is lost"],
    "reward_breaks": ["a gate stopped the run at step 0"],
    "format_never_met": ["boxed: never paid"],
    "reward_hole": ["the reward rises, but no more problems are solved"],
}


def test_every_recorded_run_is_looked_at():
    assert {path.name for path in RECORDED.iterdir()} == set(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_a_recorded_run_is_told_why_it_fails(name):
    titles = [found.title for found in findings(RECORDED / name) if found.severity > Severity.NOTE]
    expected = [title for title in FOUND[name] if title != "time is lost"]
    assert titles[: len(expected)] == expected
    assert bool(titles) == bool(expected)
    everything = [found.title for found in findings(RECORDED / name)]
    assert set(FOUND[name]) <= set(everything)
