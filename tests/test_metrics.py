"""Metric files, their truncation on resume, and the console table."""

import io
import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from grpo.metrics import (
    GRPO_COLUMNS,
    SFT_COLUMNS,
    Column,
    ConsoleTable,
    JsonlWriter,
    MetricLog,
    hours_minutes_seconds,
    truncate_jsonl,
)


@pytest.fixture
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_row_has_the_step_first_and_the_rest_sorted(tmp_path, no_tensorboard):
    with MetricLog(tmp_path) as log:
        log.log(0, {"b": np.float32(0.5), "a": jnp.array(2), "c": math.nan, "d": -math.inf})
        line = (tmp_path / "metrics.jsonl").read_text()  # on disk before the log is closed
    assert line == '{"step": 0, "a": 2.0, "b": 0.5, "c": null, "d": null}\n'


def test_a_histogram_is_a_list(tmp_path, no_tensorboard):
    with MetricLog(tmp_path) as log:
        log.log(3, {"a": [0, 0.5, math.nan], "b": jnp.array([1.0, 2.0])})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 3, "a": [0, 0.5, None], "b": [1, 2]}]


def test_a_missing_tensorboard_is_said_once_and_nothing_else_is_written(
    tmp_path, no_tensorboard, capsys
):
    with MetricLog(tmp_path) as log:
        log.log(0, {"a": 1.0})
        log.log(1, {"a": 1.0})
    assert capsys.readouterr().out.count("grpo[tensorboard]") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_process_0_writes(tmp_path):
    with MetricLog(tmp_path, process=1) as log:
        log.log(0, {"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_log_equals_an_unbroken_one(tmp_path, no_tensorboard):
    def run(folder, first, last):
        with MetricLog(folder, resume_step=first) as log:
            for step in range(first, last):
                log.log(step, {"a": step / 4})
                log.log(step, {"eval/b": 1.0})  # two rows of one step

    run(tmp_path / "straight", 0, 6)
    run(tmp_path / "broken", 0, 5)  # checkpoint at 3, killed after 5
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "a"')
    run(tmp_path / "broken", 3, 6)
    straight, broken = (tmp_path / name / "metrics.jsonl" for name in ("straight", "broken"))
    assert broken.read_bytes() == straight.read_bytes()
    run(tmp_path / "broken", 0, 6)  # from the start, as if killed before any checkpoint
    assert broken.read_bytes() == straight.read_bytes()


def test_truncate_tolerates_a_torn_end_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    truncate_jsonl(path, key="n", below=3)
    assert not path.exists()
    path.write_text('{"n": 0}\n{"n": 4}\n{"n": 1}\n{"n": 2')
    truncate_jsonl(path, key="n", below=3)
    assert path.read_text() == '{"n": 0}\n{"n": 1}\n'
    path.write_text('{"n": 0}\n{"n"\n{"n": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        truncate_jsonl(path, key="n", below=3)
    assert path.read_text().count("\n") == 3  # a file that is refused is left alone
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".partial"] == ["rows.jsonl"]


@pytest.mark.parametrize("text", ["plain", "a\nb\r\x00\x1b[31m", "\u2028\x85", "\ud800", "汉字🙂"])
def test_any_text_survives_a_round_trip(tmp_path, text):
    path = tmp_path / "deep" / "rollouts.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 1, "text": text, "reward": np.float32(0.5), "ids": np.arange(3)})
    assert path.read_bytes().count(b"\n") == 1
    row = json.loads(path.read_text(encoding="utf-8"))
    assert row == {"step": 1, "text": text, "reward": 0.5, "ids": [0, 1, 2]}


def test_tensorboard_events_are_purged_on_resume(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with MetricLog(tmp_path, resume_step=0) as log:
        log.log(0, {"a": 1.5, "nan": math.nan, "histogram": [1.0, 2.0]})
    with MetricLog(tmp_path, resume_step=7) as log:
        log.log(7, {"a": 2.5})
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length (8), checksum (4), record, checksum (4)
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    scalars = {(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value}
    assert scalars == {(0, "a", 1.5), (7, "a", 2.5)}
    starts = {e.step for e in events if e.session_log.status == SessionLog.START}
    assert starts == {0, 7}


# ---- Console -----------------------------------------------------------------------------------


class Clock:
    """A clock that each reading moves on."""

    def __init__(self, seconds_a_reading):
        self.now, self.pace = 0.0, seconds_a_reading

    def __call__(self):
        self.now += self.pace
        return self.now


def table(columns, total, every=1, pace=1.0):
    stream = io.StringIO()
    return ConsoleTable(columns, total, every, stream, Clock(pace)), stream


def test_a_line_a_step_with_titles_every_twenty():
    console, stream = table(GRPO_COLUMNS, 41)
    for step in range(41):
        console.row(step, {"reward/mean": 0.25})
    lines = stream.getvalue().splitlines()
    assert [i for i, line in enumerate(lines) if "reward" in line] == [0, 21, 42]
    assert len({len(line) for line in lines}) == 1  # columns stay under their titles
    assert len(lines[0]) <= 120


def test_values_missing_ones_and_time_left():
    console, stream = table(GRPO_COLUMNS, 1000, pace=4.0)
    metrics = {
        "reward/mean": 0.5,
        "reward/solved": np.float32(0.25),
        "rollout/tokens_per_s": 12345.6,
        "sampler/gap_nats_max": 2.5e-6,
        "groups/signal": math.nan,
    }
    console.row(10, metrics)
    console.row(11, metrics)
    _, first, second = stream.getvalue().splitlines()
    expected = "0.500 25.0% - 12,346 - - - - - 2.5e-06"
    assert first.split() == ["10/1000", *expected.split(), "-"]
    assert second.split() == ["11/1000", *expected.split(), "1:05:52"]  # 988 steps of 4 s


def test_time_left_follows_the_recent_pace():
    console, stream = table([Column("x", "x", "3.1f")], 200, pace=100.0)
    for step in range(50):
        console.row(step, {})
    console._clock.pace = 1.0
    for step in range(50, 100):
        console.row(step, {})
    assert stream.getvalue().splitlines()[-1].split()[-1] == "0:01:40"


def test_only_due_steps_and_the_last_are_printed():
    console, stream = table([Column("x", "x", "3.1f")], 25, every=10)
    for step in range(3, 25):
        console.row(step, {"x": 1.0})
    lines = [line.split() for line in stream.getvalue().splitlines()[1:]]
    expected = [
        ["10/25", "1.0", "0:00:14"],
        ["20/25", "1.0", "0:00:04"],
        ["24/25", "1.0", "0:00:00"],
    ]
    assert lines == expected


def test_sft_columns():
    console, stream = table(SFT_COLUMNS, 5)
    console.row(4, {"sft/loss_nats": 1.25, "sft/confident": 0.5, "optim/learning_rate": 1e-5})
    assert stream.getvalue().splitlines()[1].split() == "4/5 1.2500 50.0% 1.00e-05 - -".split()


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00:00"), (59.6, "0:01:00"), (360_000, "100:00:00")]
)
def test_durations(seconds, text):
    assert hours_minutes_seconds(seconds) == text
