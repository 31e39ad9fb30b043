"""Curves and before/after tables, fed with what a killed run and a hostile model leave."""

import json
import math
import unicodedata

import numpy as np
import pytest
from matplotlib.image import imread

from grpo import report
from grpo.report import Example, before_after_console, before_after_markdown


def write_run(workdir, num_steps=50):
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(num_steps):
            row = {
                "step": step,
                "reward/mean": step / num_steps,
                "reward/solved": None if step == 3 else step / num_steps,
                "rollout/length_tokens_mean": 20.0 + step,
                "policy/entropy_nats": 2.0,
                "groups/signal": 0.5,
                "optim/grad_norm": 1.0,
                "sampler/gap_nats_max": 0.0 if step == 5 else 1e-6,
            }
            file.write(json.dumps(row) + "\n")
            if step % 20 == 0:
                value = step / num_steps
                row = {"step": step, "eval/pass_at_1": value}
                row |= {"eval/pass_at_1_low": value - 0.1, "eval/pass_at_1_high": value + 0.1}
                file.write(json.dumps(row) + "\n")
        file.write('{"step": 50, "rew')  # being written
    return workdir


def test_read_metrics_keeps_each_metric_with_its_steps(tmp_path):
    series = report.read_metrics(write_run(tmp_path) / "metrics.jsonl")
    steps, values = series["eval/pass_at_1"]
    assert steps.tolist() == [0, 20, 40] and values.tolist() == [0.0, 0.4, 0.8]
    assert math.isnan(series["reward/solved"][1][3])
    assert len(series["reward/mean"][0]) == 50


def test_curves_are_drawn(tmp_path, capsys):
    report.main([str(write_run(tmp_path))])
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 600 and picture.shape[1] > 1200
    assert 0.5 < picture[..., :3].mean() < 0.999  # neither blank nor black
    out = capsys.readouterr().out
    assert "curves.png" in out and "eval/pass_at_1" in out and "+0.8" in out


@pytest.mark.parametrize("rows", ["", '{"step": 0, "reward/mean": null}\n', '{"step": 0}\n'])
def test_a_run_that_logged_nothing_still_has_a_picture(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert report.draw_curves(tmp_path).is_file()


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"metrics\.jsonl"):
        report.main([str(tmp_path)])


def test_smoothing_looks_back_only():
    got = report._smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2)
    assert got.tolist() == [1.0, 2.0, 4.0, 6.0]


def test_markdown_metrics():
    text = before_after_markdown({"eval/pass_at_1": 0.25, "old": 1.0}, {"eval/pass_at_1": 0.75})
    assert text.splitlines() == [
        "| metric | before | after | change |",
        "|---|---:|---:|---:|",
        "| eval/pass_at_1 | 0.25 | 0.75 | +0.5 |",
        "| old | 1 | - | - |",
    ]


HOSTILE = [
    "a | b || c",
    "<script>alert(1)</script> <img src=x>",
    "![x](http://example.com/x.png) [y](javascript:z)",
    "\x1b[2J\x1b[31mred\x07\r\x00",
    "line\n\n# heading\n| new | row |\n|---|---|",
    "\u202egnp.exe \u200b\u2028\u2029\x85\ufeff",
    "`code` **bold** ~~x~~ $x$ \\| &amp;",
    "x" * 10_000,
    "\ud800",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_leaves_its_cell(text):
    table = before_after_markdown({}, {}, [Example("p", text, "after")], max_chars=100)
    row = table.splitlines()[-1]
    assert row.startswith("| p | ") and row.endswith(" | after |")
    cell = row.removeprefix("| p | ").removesuffix(" | after |")
    literal = cell.replace("<br>", "")
    for i, char in enumerate(literal):  # all that Markdown could act on is escaped
        if char in "|<>[]()`*_#&$~!":
            backslashes = len(literal[:i]) - len(literal[:i].rstrip("\\"))
            assert backslashes % 2 == 1, (char, cell)
    assert len(cell) <= 6 * 100 + 10
    table.encode("utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_commands_the_terminal(text):
    shown = before_after_console({"m": 1.0}, {"m": 2.0}, [Example("p", text, "after")], 100)
    assert all(c == "\n" or unicodedata.category(c)[0] != "C" for c in shown)
    shown.encode("utf-8")


def test_ordinary_text_stays_readable():
    assert report.visible("naïve 汉字 🙂 1+1=2\n<answer>") == "naïve 汉字 🙂 1+1=2\n<answer>"
    assert report.visible("\x1b\u202e") == "\\x1b\\u202e"
    assert report.markdown_cell("a\nb|c", 100) == "a<br>b\\|c"
    assert report.markdown_cell("abcdef", 4) == "abc…"


# ---- A run -------------------------------------------------------------------------------------


def write_evaluation(workdir, step, texts):
    folder = workdir / "evaluations"
    folder.mkdir(exist_ok=True)
    with (folder / f"step_{step:06d}.jsonl").open("w") as file:
        for i, text in enumerate(texts):
            for sample in (0, 1):
                row = {"uid": f"p{i}", "sample": sample, "prompt": f"ask {i}"}
                file.write(json.dumps(row | {"completion": f"{text} {sample}"}) + "\n")
        file.write('{"uid": "p9", "sam')  # being written


def test_a_run_is_reported_with_its_first_and_last_completions(tmp_path, capsys):
    write_run(tmp_path)
    for step in (0, 20, 40):
        write_evaluation(tmp_path, step, [f"step {step}: {letter}" for letter in "abcd"])
    report.report_run(tmp_path)
    out, table = capsys.readouterr().out, (tmp_path / "before_after.md").read_text()
    assert (tmp_path / "curves.png").is_file() and "before_after.md" in out
    assert "| eval/pass_at_1 | 0 | 0.8 | +0.8 |" in table
    assert "| ask 0 | step 0\\: a 0 | step 40\\: a 0 |" in table
    assert "before:   step 0: c 0" in out and "after:    step 40: c 0" in out
    assert "ask 3" not in table + out and "step 20" not in table + out


def test_a_single_evaluation_has_no_before(tmp_path, capsys):
    row = {"step": 0, "eval/pass_at_1": 0.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_evaluation(tmp_path, 0, ["text"])
    report.report_run(tmp_path)
    table = (tmp_path / "before_after.md").read_text()
    assert "| eval/pass_at_1 | - | 0.25 | - |" in table and "| ask 0 |  | text 0 |" in table
    assert "after:    text 0" in capsys.readouterr().out


def test_a_problem_only_the_last_evaluation_asked_has_no_before(tmp_path):
    write_evaluation(tmp_path, 0, ["a"])
    write_evaluation(tmp_path, 5, ["b", "c"])
    assert report.held_out_examples(tmp_path / "evaluations", 5) == [
        Example("ask 0", "a 0", "b 0"),
        Example("ask 1", "", "c 0"),
    ]


def test_a_run_that_was_never_evaluated_has_curves_only(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
    report.report_run(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["curves.png", "metrics.jsonl"]
    assert capsys.readouterr().out.strip().endswith("curves.png")
