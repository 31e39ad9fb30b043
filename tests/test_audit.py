"""The audit: every shipped reward passes it, and it finds what is wrong with bad ones."""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards.answers import exact_answer, gsm8k_answer, last_number, numeric_answer
from rewards.api import Batched, Problem, Reward, Row
from rewards.audit import GOLD_FORMAT, Finding, audit, inline_scorer
from rewards.by_task import by_task
from rewards.choice import choice_answer
from rewards.code_tests import CodeTests, isolation
from rewards.countdown import countdown
from rewards.formats import r1_format, r1_format_lenient
from rewards.gates import gated
from rewards.hostile import hostile_texts
from rewards.json_schema import json_answer
from rewards.language import LanguageShare, language_consistency
from rewards.length import CosineLength, LengthBetween, SoftOverlong
from rewards.math_answer import math_answer
from rewards.repetition import Unrepeated
from rewards.sandbox.tiers import NoIsolation
from rewards.sequences import letters_answer, letters_share, list_answer

ROOT = Path(__file__).parent.parent
LIMIT_MS = 500.0  # a busy machine may take five times as long as the audit's own limit

NUMBERS = [("7", "7"), ("12", "12"), ("-3", "-3"), ("2.5", "2.5")]
WORDS = [("cat", "cat"), ("horse", "horse"), ("New York", "New York")]
LISTS = [(["3", "10"], "3, 10"), (["b", "a"], "b, a"), (["1", "2", "3"], "1, 2, 3")]
SUMS = [
    ({"numbers": [3, 4, 2], "target": 14}, "3*4+2"),
    ({"numbers": [5, 5], "target": 10}, "5+5"),
    ({"numbers": [9, 1], "target": 8}, "9-1"),
]
LETTERS = [("A", "A"), ("B", "B"), ("C", "C"), ("D", "D")]
MATHS = [("12", "12"), (r"\frac{3}{4}", "0.75"), (-7, "-7"), ("(1, 2)", "(1, 2)")]
SCHEMAS = [
    ({"const": {"a": 1}}, '{"a": 1}'),
    ({"type": "array", "minItems": 3, "items": {"type": "integer"}}, "[1, 2, 3]"),
    ({"enum": ["yes"]}, '"yes"'),
]

# Each reward that judges answers, with (reference, gold) pairs and how its completions look.
ANSWERS: list[tuple[Reward, list[tuple[Any, str]], str]] = [
    (exact_answer, WORDS, GOLD_FORMAT),
    (numeric_answer, NUMBERS, GOLD_FORMAT),
    (last_number, NUMBERS, "It is {gold}"),
    (gsm8k_answer, NUMBERS, GOLD_FORMAT),
    (gsm8k_answer, NUMBERS, "So.\n#### {gold}"),
    (countdown, SUMS, GOLD_FORMAT),
    (letters_answer, WORDS, GOLD_FORMAT),
    (list_answer, LISTS, GOLD_FORMAT),
    (choice_answer, LETTERS, GOLD_FORMAT),
    (json_answer, SCHEMAS, GOLD_FORMAT),
    (math_answer, MATHS, GOLD_FORMAT),
    (functools.partial(math_answer, form="boxed"), MATHS, r"So it is \boxed{{gold}}"),
    (functools.partial(math_answer, form="gsm8k"), MATHS, "So.\n#### {gold}"),
    (gated(numeric_answer, by=r1_format), NUMBERS, GOLD_FORMAT),
    (CosineLength(numeric_answer, 10**6, right=(1.0, 1.0)), NUMBERS, GOLD_FORMAT),
    (by_task({"": numeric_answer, "other": exact_answer}), NUMBERS, GOLD_FORMAT),
]
STYLES: list[Reward] = [
    r1_format,
    r1_format_lenient,
    LanguageShare("en"),
    Unrepeated(),
    SoftOverlong(max_tokens=1_000, cache_tokens=500),
    LengthBetween(2, 1_000),
    letters_share,  # graded: it pays what is half right, as no verifier may
    language_consistency,
    gated(r1_format_lenient, by=r1_format),
]


META = {"task": "", "language": "en"}


def rows_of(pairs: Sequence[tuple[Any, str]]) -> list[Row]:
    return [
        ("", Problem(f"p{i}", prompt="What?", reference=reference, gold=gold, meta=META), {})
        for i, (reference, gold) in enumerate(pairs)
    ]


def failed(findings: Sequence[Finding]) -> list[str]:
    return [str(finding) for finding in findings if finding.passed is False]


def name_of(value: Any) -> str | None:
    return getattr(value, "__name__", None) or (type(value).__name__ if callable(value) else None)


@pytest.mark.parametrize(("reward", "pairs", "form"), ANSWERS, ids=name_of)
def test_every_shipped_reward_passes(reward, pairs, form):
    findings = audit(inline_scorer(reward), rows_of(pairs), gold_format=form, max_ms=LIMIT_MS)
    assert not failed(findings), "\n".join(failed(findings))
    assert len(findings) == 9 and all(finding.tried for finding in findings)


@pytest.mark.parametrize("reward", STYLES, ids=name_of)
def test_every_shipped_style_passes(reward):
    findings = audit(inline_scorer(reward), rows_of(NUMBERS), style=True, max_ms=LIMIT_MS)
    assert not failed(findings), "\n".join(failed(findings))
    assert len(findings) == 4


def test_the_code_reward_passes():
    """Its gold answers are programs; "9**9**9" is one, too, and ends with the budget."""
    try:
        isolation()
    except NoIsolation as error:
        pytest.skip(str(error))
    programs = [
        (
            {"asserts": [f"assert {name}(2, 3) == {value}"]},
            f"def {name}(a, b):\n    return a {op} b",
        )
        for name, op, value in (("add", "+", 5), ("mul", "*", 6), ("sub", "-", -1))
    ]
    findings = audit(inline_scorer(CodeTests(budget_s=0.3)), rows_of(programs), max_ms=1_000.0)
    assert not failed(findings), "\n".join(failed(findings))
    assert len(findings) == 9 and all(finding.tried for finding in findings)


def test_the_reward_of_reasoning_gym_passes():
    gym = pytest.importorskip("reasoning_gym")
    from rewards.gym import gym_reward

    rows: list[Row] = []
    for i, entry in enumerate(gym.create_dataset("chain_sum", size=4, seed=1)):
        meta = {"gym_name": "chain_sum", "gym_config": {}, "gym_entry": entry}
        problem = Problem(f"p{i}", prompt=entry["question"], gold=entry["answer"], meta=meta)
        rows.append(("", problem, {}))
    gym_reward("", rows[0][1])  # imports the library, which is not what is timed
    findings = audit(inline_scorer(gym_reward), rows, max_ms=LIMIT_MS)
    assert not failed(findings), "\n".join(failed(findings))


# ---- What it finds -----------------------------------------------------------------------------


def anywhere(completion: str, problem: Problem) -> float:
    return float(str(problem.reference) in completion)


def lenient_to_all(completion: str, problem: Problem) -> float:
    return float(bool(completion.strip()))


def breaks(completion: str, problem: Problem) -> float:
    return float(int(completion) == problem.reference)


def likes_silence(completion: str, problem: Problem) -> float:
    return 1.0 if completion == "" else numeric_answer(completion, problem) / 2


def slow_at_ones(completion: str, problem: Problem) -> float:
    end = time.thread_time() + 0.02 * completion.startswith("1" * 900_000)
    while time.thread_time() < end:
        pass
    return numeric_answer(completion, problem)


@dataclasses.dataclass
class Moody:
    calls: int = 0

    def __call__(self, completion: str, problem: Problem) -> float:
        self.calls += 1
        return numeric_answer(completion, problem) * (self.calls % 7 > 0)


@pytest.mark.parametrize(
    ("reward", "fault", "example"),
    [
        (anywhere, "tricks are not paid", "every candidate in one answer"),
        (lenient_to_all, "hostile texts are not paid", "1 ok for"),
        (lenient_to_all, "answers to other problems are not", "'12'"),
        (breaks, "every completion gets a value in time", "crash ValueError"),
        (breaks, "right answers are paid", "crash"),
        (likes_silence, "right >= badly formed >= wrong >= silent", "wrong 0, silent 1"),
        (slow_at_ones, "no call takes over 15 ms", "chars]"),
        (Moody(), "the same completion gets the same value", "and then"),
    ],
    ids=name_of,
)
def test_what_a_bad_reward_gets(reward, fault, example):
    findings = audit(inline_scorer(reward), rows_of(NUMBERS), max_ms=15)
    (line,) = [str(f) for f in findings if f.check.startswith(fault)]
    assert line.startswith("FAIL") and example in line


def test_a_style_that_prefers_silence_is_found():
    def short(completion: str, problem: Problem) -> float:
        return 1 / (1 + len(completion))

    findings = audit(inline_scorer(short), rows_of(NUMBERS)[:1], style=True, max_ms=LIMIT_MS)
    assert [f.check for f in findings if not f.passed] == ["silence gets no more than writing"]


def test_rules_are_remarked_on_and_fail_nothing():
    rows = rows_of(NUMBERS)
    findings = audit(inline_scorer(last_number), rows, gold_format="{gold}", max_ms=LIMIT_MS)
    (remark,) = [finding for finding in findings if finding.passed is None]
    assert "note what depends on your rules" in str(remark)
    assert any("wrong, then right" in fault for fault in remark.faults)


def test_an_audit_needs_something_to_try():
    with pytest.raises(ValueError, match="three different gold answers"):
        audit(inline_scorer(numeric_answer), rows_of(NUMBERS[:2]))
    with pytest.raises(ValueError, match="three different gold answers"):
        audit(inline_scorer(r1_format), [], style=True)


def test_hostile_texts_are_many_and_all_different():
    texts = list(hostile_texts())
    assert len(texts) == len(set(texts)) > 200
    assert max(map(len, texts)) > 1_000_000


def test_long_findings_are_cut():
    lines = str(Finding("c", False, 9, [f"fault {i}" for i in range(9)])).splitlines()
    assert lines[0] == "FAIL c (9 tried, 9 found)"
    assert lines[1:] == [*(f"       fault {i}" for i in range(5)), "       and 4 more"]


def run(module: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(
        "from rewards.api import Verdict\n"
        "from rewards.answers import numeric_answer\n"
        "def anywhere(completion, problem):\n"
        "    return float(str(problem.reference) in completion)\n"
        "def wants(completion, problem, *, mood): return 1.0\n"
        "def twice(completion, problem):\n"
        "    if completion == 'bug': raise KeyError\n"
        "    right = completion == 2 * problem.reference\n"
        "    return Verdict(right, 'right' if right else 'wrong: no double', completion[:5])\n"
    )
    (tmp_path / "few.jsonl").write_text('{"gold": "1"}\n')
    with (tmp_path / "problems.jsonl").open("w") as file:
        for i, (reference, gold) in enumerate(NUMBERS):
            row = {"uid": f"p{i}", "prompt": "?", "reference": reference, "gold": gold}
            file.write(json.dumps(row) + "\n")
    return tmp_path


def test_the_command_says_what_it_finds(folder):
    good = run("rewards.audit", "mine:numeric_answer", "--problems=problems.jsonl", cwd=folder)
    assert good.returncode == 0 and "FAIL" not in good.stdout, good.stdout + good.stderr
    bad = run("rewards.audit", "mine.py:anywhere", "--problems=problems.jsonl", cwd=folder)
    assert bad.returncode == 1 and "FAIL tricks are not paid" in bad.stdout, bad.stderr


@pytest.mark.parametrize(
    ("reward", "problems", "said"),
    [
        ("mine", "problems.jsonl", "names no function"),
        ("mine:none", "problems.jsonl", "has no function 'none'"),
        ("rewards.gates:GatedBatch", "problems.jsonl", "is a class"),
        ("mine:wants", "problems.jsonl", "'wants' asks for mood"),
        ("mine:anywhere", "few.jsonl", "three different gold answers"),
        ("nowhere:none", "problems.jsonl", "there is no module 'nowhere'"),
        ("nowhere.py:none", "problems.jsonl", "'nowhere.py' is no Python file"),
        ("mine:anywhere", "none.jsonl", "none.jsonl: No such file"),
        ("mine:anywhere", "mine.py", "mine.py:1: no JSON"),
    ],
)
def test_mistakes_get_one_line(folder, monkeypatch, reward, problems, said):
    from rewards.audit import main

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(SystemExit) as left:
        main([reward, f"--problems={problems}"])
    assert said in str(left.value)
    sys.modules.pop("mine", None)


# ---- rewards.run -------------------------------------------------------------------------------


def test_completions_of_a_file_are_scored(folder):
    rows = [{"uid": "u", "reference": "ab", "completion": text} for text in ("abab", "x", "bug")]
    (folder / "tried.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run("rewards.run", "mine:twice", "--completions=tried.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r.pop("milliseconds") < 1_000 for r in results] == [True] * 3
    assert "KeyError" in results[2].pop("detail")
    common = {"uid": "u", "name": "twice"}
    assert results == [
        common
        | {"reward": 1, "status": "ok", "reason": "right", "extracted": "abab", "detail": ""},
        common
        | {
            "reward": 0,
            "status": "ok",
            "reason": "wrong: no double",
            "extracted": "x",
            "detail": "",
        },
        common | {"reward": 0, "status": "crash", "reason": "", "extracted": None},
    ]
    table = done.stderr.splitlines()
    assert table[1].split()[:5] == "twice 3 0.3333 - -".split()
    assert table[1].endswith("ok 2, crash 1") and table[2].split() == "right 1, wrong 1".split()


def test_a_runs_completions_are_compared_with_its_scores(folder):
    common: dict[str, Any] = {"step": 3, "uid": "u7", "prompt": "?", "finish_reason": "eos"}
    common["scores"] = {}
    common["problem"] = {"uid": "u7", "reference": "ab", "gold": None, "meta": {}}
    told = [("abab", 1.0), ("ab\u2028", 1.0), ("bug", 0.0), ("\ud800", 0.0)]
    with (folder / "rollouts.jsonl").open("w") as file:
        for sample, (completion, reward) in enumerate(told):
            row = common | {"sample": sample, "completion": completion, "reward": reward}
            file.write(json.dumps(row) + "\n")
    done = run("rewards.run", "mine:twice", "--completions=rollouts.jsonl", cwd=folder)
    said = done.stderr.splitlines()
    assert said[1].split()[:5] == "twice 4 0.2500 0.5000 1".split()
    assert said[-1].startswith("twice: step 3 u7 sample 1 (eos): stored 1, new 0 ok")
    assert len(said) == 4


def test_a_batched_reward_can_be_audited():
    def batch(completions: Sequence[str], problems: Sequence[Problem]) -> list[float]:
        return list(map(numeric_answer, completions, problems))

    findings = audit(inline_scorer(Batched(batch)), rows_of(NUMBERS), max_ms=LIMIT_MS)
    assert not failed(findings)
