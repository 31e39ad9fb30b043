"""The comparison with other trainers: what is timed, the table, and the script that takes turns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.peers import compare, workload

ROOT = Path(__file__).parent.parent

# Two rounds as recorded, shortened. In the second round the machine was at half its speed.
RECORDS = """\
{"workload": "fixed", "round": 1, "trainer": "ours", "result": {"rollout_s": [5.0, 5.2], "update_s": [5.0, 5.0], "step_s": [10.0, 10.2], "tokens": 1024, "rollout_tok_s": 200.0, "step_tok_s": 100.0, "peak_rss_gib": 4.0}}
{"workload": "fixed", "round": 1, "trainer": "tunix", "result": {"trainer": "tunix", "versions": {"google-tunix": "0.1.7"}, "parameters": 134515008, "first_step_s": 80.1, "rollout_s": [10.2, 10.4], "step_s": [29.0, 31.0], "tokens": 1024, "rollout_tok_s": 100.0, "step_tok_s": 25.0, "peak_rss_gib": 12.0}}
{"workload": "fixed", "round": 1, "trainer": "trl", "failure": "out of memory"}
{"workload": "fixed", "round": 2, "trainer": "ours", "result": {"step_s": [20.0], "tokens": 1024, "rollout_tok_s": 100.0, "step_tok_s": 50.0, "peak_rss_gib": 4.0}}
{"workload": "fixed", "round": 2, "trainer": "tunix", "result": {"step_s": [60.0], "tokens": 1024, "rollout_tok_s": 40.0, "step_tok_s": 12.5, "peak_rss_gib": 12.0}}
{"workload": "fixed", "round": 2, "trainer": "trl", "failure": "out of memory"}
{"workload": "long", "round": 1, "trainer": "ours", "failure": "exit 1"}
{"workload": "long", "round": 2, "trainer": "ours", "failure": "time-out (9 s)"}
{"workload": "long", "round": 1, "trainer": "trl", "result": {"step_s": [113.0], "tokens": 1024, "rollout_tok_s": 33.0, "step_tok_s": 9.1, "peak_rss_gib": 18.4}}
{"workload": "long", "round": 2, "trainer": "trl", "failure": "out of memory"}
"""  # noqa: E501


def recorded_rows() -> dict[tuple[str, str], compare.Row]:
    rows = compare.compare(compare.parse_run(json.loads(line)) for line in RECORDS.splitlines())
    return {(row.workload, row.trainer): row for row in rows}


def test_ratios_are_formed_within_a_round():
    """Across rounds a machine at half its speed would look like a trainer twice as fast."""
    tunix = recorded_rows()["fixed", "tunix"]
    assert tunix.rollout == compare.Spread(2.25, 2.0, 2.5)
    assert tunix.step == compare.Spread(4.0, 4.0, 4.0)
    assert tunix.memory == compare.Spread(3.0, 3.0, 3.0)
    assert tunix.measured == compare.Measured(
        rollout_tok_s=70.0, step_tok_s=18.75, step_s=45.0, tokens=1024, peak_rss_gib=12.0
    )


def test_where_ours_failed_there_is_no_ratio():
    trl = recorded_rows()["long", "trl"]
    assert trl.measured and trl.measured.step_s == 113.0
    assert trl.rollout is trl.step is trl.memory is None


def test_the_table_says_what_failed():
    lines = compare.markdown(list(recorded_rows().values())).splitlines()
    assert len({line.count("|") for line in lines[:-2]}) == 1
    assert lines[2] == "| fixed | ours | 1,024 | 150 | 15.1 | 75.0 | 4.0 | – | – | – |"
    assert lines[3] == (
        "| fixed | tunix | 1,024 | 70 | 45.0 | 18.8 | 12.0 | 2.2× (2.0–2.5) | 4.0× | 3.0× |"
    )
    assert lines[4] == "| fixed | trl | out of memory | – | – | – | – | – | – | – |"
    assert lines[5].startswith("| long | ours | exit 1 in 1, time-out (9 s) in 1 |")
    assert lines[6] == "| long | trl | 1,024 | 33 | 113.0 | 9.1 | 18.4 | – | – | – |"
    assert lines[7:] == ["", "- long, trl: out of memory in 1 of 2 rounds"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"tokens": None}, "round 1, trl.*garbles"),
        ({"step_s": []}, "round 1, trl.*garbles"),
        ({"rollout_tok_s": 0}, "rollout_tok_s.*cannot be compared"),
        ({"step_tok_s": float("nan")}, "step_tok_s.*cannot be compared"),
    ],
)
def test_a_result_without_its_numbers_is_an_error(changed, message):
    result = {
        "step_s": [1.0],
        "tokens": 8,
        "rollout_tok_s": 8,
        "step_tok_s": 8,
        "peak_rss_gib": 1,
    } | changed
    with pytest.raises(ValueError, match=message):
        compare.parse_run({"workload": "fixed", "round": 1, "trainer": "trl", "result": result})


def test_a_round_recorded_twice_is_an_error():
    run = compare.Run("fixed", 1, "trl", None, "exit 1")
    with pytest.raises(ValueError, match="round 1 has trl twice"):
        compare.compare([run, run])


def test_a_step_lasts_from_rollout_to_rollout():
    rollouts = [
        workload.Rollout(0.0, 9.0, 60),  # compiles
        workload.Rollout(20.0, 22.0, 60),
        workload.Rollout(26.0, 29.0, 40),
    ]
    assert workload.measured(rollouts, end=36.0, steps=3) == {
        "first_step_s": 20.0,
        "rollout_s": [2.0, 3.0],
        "update_s": [4.0, 7.0],
        "step_s": [6.0, 10.0],
        "tokens": 50,
        "rollout_tok_s": 20.0,
        "step_tok_s": 6.2,
    }
    with pytest.raises(RuntimeError, match="2 steps, but the trainer sampled 3 times"):
        workload.measured(rollouts, end=36.0, steps=2)


def test_the_stopwatch_counts_sampled_tokens():
    stopwatch = workload.Stopwatch()
    sample = stopwatch.timed(lambda prompts: ([[1, 2], [3]], prompts), lambda out: out[0])
    assert sample("p") == ([[1, 2], [3]], "p")
    (rollout,) = stopwatch.rollouts
    assert rollout.tokens == 3 and rollout.end >= rollout.start


def test_a_step_must_be_left_to_time(capsys):
    with pytest.raises(SystemExit):
        workload.arguments("", ["--steps=1"])
    assert "leaves none to time" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        workload.arguments("", ["--prompts=4", "--micro=3"])
    assert "no multiple" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        workload.arguments("", ["--model=here"])
    assert "go together" in capsys.readouterr().err


def test_prompts_are_those_of_the_run(tmp_path):
    data = tmp_path / "gsm8k.jsonl"
    data.write_text('{"question": "1+1?"}\n{"question": "2+2?"}\n{"question": "3+3?"}\n')
    flags = ["--prompts=1", "--steps=2", "--model=m", f"--data={data}"]
    args = workload.arguments("", flags)
    assert workload.questions(args) == ["1+1?", "2+2?"]
    ids = workload.random_prompts(args, 7)
    assert [len(prompt) for prompt in ids] == [7, 7]
    assert ids == workload.random_prompts(args, 7)
    with pytest.raises(ValueError, match="3 questions, the run asks 4"):
        workload.questions(workload.arguments("", [*flags, "--steps=4"]))


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_trainers_take_turns_and_a_failure_is_a_row(tmp_path):
    """The trainers are stand-ins: one answers, one is killed for memory, one is too slow."""
    answer = RECORDS.splitlines()[0].partition('"result": ')[2][:-1]
    turn = f'echo "{{}} $*" >> {tmp_path}/turns'
    program(
        tmp_path / "python",
        f'[[ $1 == tools/bench.py ]] || exec {sys.executable} "$@"\n{turn.format("ours")}\n'
        f"echo \"{{'not': 'ours'}}\"\necho '{answer}'\necho done",
    )
    venvs = tmp_path / "venvs"
    program(venvs / "tunix/bin/python", f"{turn.format('tunix')}\nkill -KILL $$")
    program(venvs / "trl/bin/python", f"{turn.format('trl')}\nexit 124")  # as timeout(1) exits
    for trainer in ("tunix", "trl"):
        (venvs / f"{trainer}.stamp").touch()
    done = subprocess.run(
        [ROOT / "tools/bench_peers.sh", "long", "--rounds=2", "--steps=5", "--time_limit_s=60"],
        env=os.environ | {"PYTHON": str(tmp_path / "python"), "PEERS_VENVS": str(venvs)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    turns = [line.split() for line in (tmp_path / "turns").read_text().splitlines()]
    assert [turn[0] for turn in turns] == ["ours", "tunix", "trl"] * 2
    assert {"step", "--prompt_len=512", "--lengths=fixed", "--repeats=4"} <= set(turns[0])
    assert {"tools.peers.tunix_grpo", "--prompt_len=512", "--micro=1", "--steps=5"} <= set(turns[1])
    *table, _, rows = done.stdout.splitlines()
    assert table[2].startswith("| long | ours | 1,024 | 200 |")
    assert table[3].startswith("| long | tunix | out of memory |")
    assert table[4].startswith("| long | trl | time-out (60 s) |")
    assert [row["rounds"] for row in json.loads(rows)] == [2, 2, 2]


def test_the_flags_of_the_script_are_checked(tmp_path):
    for flags, message in [
        (["--rouns=2"], "unknown argument --rouns=2"),
        (["natural"], "natural needs --model"),
        (["--steps=1"], "the first one is not timed"),
        (["--trainers=verl"], "unknown trainer verl"),
    ]:
        done = subprocess.run(
            [ROOT / "tools/bench_peers.sh", *flags],
            env=os.environ | {"PEERS_VENVS": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and message in done.stderr, flags
