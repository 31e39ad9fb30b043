"""Judging programs: what is read as the program, how tests are put to it, what the reward says."""

import base64
import gzip
import json
import os
import pickle
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_programs
import pytest

from rewards.api import BadReference, Problem, Status, Verdict, component_names
from rewards.assertions import free_names, split_assertion
from rewards.code_rows import humaneval_problem, livecodebench_problem, mbpp_problem
from rewards.code_tests import (
    CodeTests,
    Report,
    code_tests,
    extract_code,
    same_output,
    same_value,
    shared_sandbox,
)
from rewards.pool import RewardPool
from rewards.sandbox.box import Sandbox
from rewards.sandbox.tiers import NoIsolation

if sys.platform != "linux":
    pytest.skip("the sandbox is for Linux", allow_module_level=True)

PATIENT = CodeTests(budget_s=10.0)
SHARE = CodeTests(budget_s=10.0, share=True)
SQUARE: dict[str, Any] = {"asserts": ["assert f(2) == 4", "assert f(3) == 9", "assert f(1) == 1"]}
# A folder with HumanEval.jsonl.gz and mbpp.jsonl.
CODE_DATA = Path(os.environ.get("GRPO_CODE_DATA", "no such folder"))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        yield shared_sandbox()
    except NoIsolation as error:
        pytest.skip(str(error))


def problem(reference: Any) -> Problem:
    return Problem("p", prompt="?", reference=reference)


@pytest.mark.parametrize(
    "completion, code",
    [
        ("def f(): pass", "def f(): pass"),
        ("<think>```python\nx\n```</think>\ny = 1", "\ny = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\n```py\nx = 2\n```", "x = 2\n"),
        ("```\nx = 1\n```\n```text\n4\n```", "x = 1\n"),
        ("<answer>\n```python\nx = 1\n```\n</answer>", "x = 1\n"),
        ("```python\nx = 1\n```<answer>x = 2</answer>", "x = 2"),
        ("<answer>x</answer><answer>y</answer>", None),
        ("x</answer>", None),
        ("```python\nx = 1\n", None),
        ("```text\nx = 1\n```", None),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        (" \n", None),
        ("```\n" * 200_001, None),
    ],
)
def test_where_the_program_is(completion, code):
    assert extract_code(completion) == code


@pytest.mark.parametrize(
    "line, value, holds",
    [
        ("assert f(2) == 4", 4, True),
        ("assert f(2) == 4", 4.0, True),
        ("assert f(2) == 4", "4", False),
        ("assert 4 == f(2), 'told'", 4, True),
        ("assert f([1], k=(2,)) != {3}", {3}, False),
        ("assert f(-1) is None", None, True),
        ("assert f(1) is True", 1, False),
        ("assert f(1) is not None", 0, True),
        ("assert f(1)", [0], True),
        ("assert not f(1)", [], True),
        ("assert set() == f(1)", set(), True),
        ("assert abs(f(1) - 0.5) < 1e-6", 0.5 + 1e-9, True),
        ("assert abs(f(1) - 0.5) < 1e-6", "0.5", False),
        ("assert abs(f(1) - 0.5) < 1e-6", float("nan"), False),
    ],
)
def test_an_assert_is_a_call_and_a_comparison(line, value, holds):
    assertion = split_assertion(line)
    assert assertion is not None and assertion.name == "f"
    assert assertion.holds(value) is holds


@pytest.mark.parametrize(
    "line",
    [
        "assert len(f(2)) == 4",
        "assert f(f(2)) == 16",
        "assert f(x) == 4",
        "assert f(2) == 4 == g(1)",
        "assert f(2) == 4 and f(3) == 9",
        "assert f(*[1]) == 2",
        "assert f(**{}) == 2",
        "assert o.f(2) == 4",
        "assert sum(1, 2) == 3",
        "f(2) == 4",
        "assert f(2) == 4\nassert f(3) == 9",
        "assert (",
        "assert f(2) < 4",
    ],
)
def test_other_asserts_are_left_whole(line):
    assert split_assertion(line) is None


def test_a_programs_own_function_may_hide_a_builtin():
    assert split_assertion("assert sum(1, 2) == 3", entry="sum") is not None


def test_names_that_only_the_program_can_define():
    tests = ["import math\nassert math.isclose(f(x for x in g(1)), abs(helper(2)))"]
    assert free_names(tests, known=["def helper(n): return n"]) == ["f", "g"]


@pytest.mark.parametrize(
    "said, expected, tolerance, same",
    [
        ("1 2\n3\n", "1 2 \n3", 0.0, True),
        ("1\n\n2", "1\n2", 0.0, False),
        ("1.0000001", "1.0", 0.0, False),
        ("1.0000001 yes", "1.0 yes", 1e-6, True),
        ("1.1 yes", "1.0 yes", 1e-6, False),
        ("nan", "nan", 0.0, True),
    ],
)
def test_outputs(said, expected, tolerance, same):
    assert same_output(said, expected, tolerance) is same


def test_values_of_cases():
    assert same_value([(1, 2), {"a": (3,)}], [[1, 2], {"a": [3]}])
    assert not same_value([1, 2], [1, 2, 3])
    assert not same_value("12", [1, 2])
    assert same_value([0.1 + 0.2], [0.3], 1e-9) and not same_value([0.1 + 0.2], [0.3])
    assert not same_value(float("nan"), float("nan"))


@pytest.mark.parametrize(
    "code, reason, share",
    [
        ("def f(x): return x * x", "passed", 1.0),
        ("f = lambda x: x ** 2", "passed", 1.0),
        ("def f(x): return 4", "wrong answer", 1 / 3),
        ("def f(x): return x * x if x > 1 else 1 / 0", "raised", 2 / 3),
        ("def f(x):\n    if x == 2: exit()\n    return x * x", "raised", 2 / 3),
        ("import os\ndef f(x):\n    if x == 3: os._exit(0)\n    return x * x", "it exited", 2 / 3),
        ("def g(x): return x * x", "raised", 0.0),
        ("def f(x: return", "does not load", 0.0),
        ("def f(x): return object()", "returned no plain value", 0.0),
    ],
)
def test_why_a_program_failed(sandbox, code, reason, share):
    for options in (PATIENT, SHARE):
        verdict = options(code, problem(SQUARE))
        assert isinstance(verdict, Verdict) and verdict.reason == reason
        assert verdict.extracted == code
    assert verdict == pytest.approx(share)
    assert PATIENT(code, problem(SQUARE)) == float(reason == "passed")


def test_time_is_for_all_tests_together(sandbox):
    slow = "import time\ndef f(x):\n    time.sleep(0.4)\n    return x * x"
    report = CodeTests(budget_s=0.7, share=True).judge(sandbox, slow, SQUARE)
    assert (report.passed, report.reason) == (1, "timeout")


def test_tests_that_are_more_than_a_call(sandbox):
    reference = {
        "entry": "f",
        "setup": "from typing import List\nBASE = 1",
        "test_setup": "import random\ndef check(f):\n    for _ in range(9):\n"
        "        n = random.randrange(99)\n        assert f([n, n]) == BASE + 2 * n",
        "asserts": ["check(f)", "assert f([]) == 1", "assert f(f([x]) for x in (1, 2)) == 6"],
    }
    right = "def f(numbers: List[int]): return sum(numbers, BASE)"
    assert PATIENT.judge(sandbox, right, reference) == Report(3, 3, "passed")
    for wrong, passed in (("def f(n): return 1", 1), ("import os\ndef f(n): os._exit(0)", 0)):
        report = SHARE.judge(sandbox, wrong, reference)
        assert report.passed == passed, report


def test_an_exception_can_be_expected(sandbox):
    test = "try:\n    f(-1)\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n"
    reference = {"asserts": [f"{test}    assert False"]}
    assert PATIENT("def f(x): raise ValueError('no')", problem(reference)) == 1.0
    assert PATIENT("def f(x): raise TypeError('no')", problem(reference)) == 0.0
    assert PATIENT("def f(x): return x", problem(reference)) == 0.0


def test_tests_in_the_programs_process_are_asked_for_and_marked(sandbox):
    """They can be cheated, as the last program shows; the same program fails otherwise."""
    inside = CodeTests(budget_s=10.0, in_sandbox=True)
    assert component_names([(1.0, inside), (1.0, code_tests)]) == (
        "code_tests_in_sandbox",
        "code_tests",
    )
    needs_class = problem({"asserts": ["assert P(1) == P(1)", "assert P(1) != P(2)"]})
    pair = "class P:\n    def __init__(s, n): s.n = n\n    def __eq__(s, o): return s.n == o.n"
    verdict = inside(pair, needs_class)
    assert isinstance(verdict, Verdict)
    assert (verdict, verdict.reason) == (1.0, "passed [tests in sandbox]")
    assert inside(pair.replace("==", "!="), needs_class) == 0.0
    evil = hostile_programs.FAMILIES["equality tricks"][0]
    assert inside(evil, problem(SQUARE)) == 1.0
    assert PATIENT(evil, problem(SQUARE)) == 0.0


def test_records_of_runs_without_isolation_are_marked():
    unsafe = CodeTests(allow_unsafe_code=True)
    assert component_names([(1.0, unsafe)]) == ("code_tests_unsafe",)
    with Sandbox("none") as sandbox:
        assert unsafe._marks(sandbox) == " [no isolation]"


@pytest.mark.parametrize("entry", ["add", "Solution.add"])
def test_calls_with_arguments(sandbox, entry):
    reference = {
        "entry": entry,
        "cases": [
            {"args": [[1, 2], 3], "expected": [4, 5]},
            {"args": [[], 3], "kwargs": {"twice": True}, "expected": []},
        ],
    }
    body = "def add({}numbers, n, twice=False): return tuple(x + n for x in numbers)"
    code = body.format("") if entry == "add" else f"class Solution:\n    {body.format('self, ')}"
    assert PATIENT.judge(sandbox, code, reference).reason == "passed"
    wrong = code.replace("x + n", "x - n")
    assert PATIENT.judge(sandbox, wrong, reference).reason == "wrong answer"


@pytest.mark.parametrize(
    "language, right",
    [
        ("python", "a, b = map(int, input().split())\nprint(a + b)"),
        (
            "cpp",
            '#include <cstdio>\nint main() { int a, b; scanf("%d %d", &a, &b); '
            'printf("%d\\n", a + b); }',
        ),
        (
            "javascript",
            "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ')"
            ".map(Number);\nconsole.log(a + b)",
        ),
    ],
)
def test_standard_streams_in_other_languages(sandbox, language, right):
    reference = {
        "language": language,
        "stdio": [{"input": "2 3\n", "output": "5\n"}, {"input": "40 2\n", "output": "42"}],
    }
    try:
        report = PATIENT.judge(sandbox, right, reference)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert report == Report(2, 2, "passed")
    assert PATIENT.judge(sandbox, right.replace("a + b", "a - b"), reference).passed == 0
    assert PATIENT.judge(sandbox, "(((", reference).reason in ("does not load", "raised")


@pytest.mark.parametrize(
    "reference, message",
    [
        (None, "a mapping"),
        ({}, "one kind"),
        ({"asserts": ["assert f(1)"], "stdio": [{}]}, "one kind"),
        ({"stdio": [{}], "language": "cobol"}, "no runner for language 'cobol'"),
        ({"asserts": ["assert f(1)"], "language": "cpp"}, "are for Python"),
        ({"cases": [{"args": [], "expected": 1}]}, "need 'entry'"),
        ({"asserts": ["assert ("]}, "no Python"),
        ({"asserts": ["assert h(f)"], "test_setup": "h = Node(1)"}, "in_sandbox=True"),
    ],
)
def test_a_fault_of_the_data_is_not_the_programs(sandbox, reference, message):
    with pytest.raises(BadReference, match=message):
        PATIENT("f = abs", problem(reference))


def test_in_a_reward_pool(sandbox):
    told = [
        ("```python\ndef f(x): return x * x\n```", 1.0, "passed"),
        ("def f(x): return x", 0.0, "wrong answer"),
        ("while True: pass", 0.0, "timeout"),
        ("```python\nunclosed", 0.0, "no code"),
    ]
    rewards = [(1.0, CodeTests(budget_s=1.0)), (0.5, CodeTests(budget_s=1.0, share=True))]
    with RewardPool(rewards, workers=2, deadline_s=4.0) as pool:
        futures = [pool.submit(completion, problem(SQUARE)) for completion, _, _ in told]
        for future, (completion, value, reason) in zip(futures, told, strict=True):
            score = future.result(30.0)[0]
            assert (score.value, score.status) == (value, Status.OK), completion
            assert score.reason == reason


HUMANEVAL_ROWS = [
    {
        "task_id": "HumanEval/0",
        "prompt": "from typing import List\n\n\n"
        'def total(numbers: List[int]) -> int:\n    """Sum."""\n',
        "entry_point": "total",
        "canonical_solution": "    return sum(numbers)\n",
        "test": "\nMETADATA = {}\n\n\ndef check(candidate):\n    assert True, 'fine'\n"
        "    assert candidate([1, 2]) == 3\n    assert abs(candidate([0.5]) - 0.5) < 1e-6\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n\n"
        'def root(xs):\n    """A zero of a line."""\n',
        "entry_point": "root",
        "canonical_solution": "    return -xs[0] / xs[1]\n",
        "test": "def check(candidate):\n    for n in range(1, 9):\n"
        "        assert abs(poly([n, 2], candidate([n, 2]))) < 1e-6\n",
    },
]
MBPP_ROWS = [
    {
        "task_id": 11,
        "text": "Write a function to join two lists.",
        "code": "def join(a, b):\r\n  return a + b",
        "test_list": ["assert join([1], [2]) == [1, 2]", "assert len(join([], [])) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    {
        "task_id": 12,
        "prompt": "Write a function to sum a range.",
        "code": "import math\ndef sum(a, b):\n  return math.fsum(range(a, b + 1))",
        "test_list": ["assert math.isclose(sum(1, 4), 10)", "assert sum(2, 2) == 2"],
        "test_imports": ["import math"],
    },
]


@pytest.mark.parametrize(
    "loaded",
    [*map(humaneval_problem, HUMANEVAL_ROWS), *map(mbpp_problem, MBPP_ROWS)],
    ids=lambda loaded: loaded.uid,
)
def test_rows_accept_their_own_solutions_only(sandbox, loaded):
    json.dumps(loaded.reference)
    assert loaded.gold is not None and PATIENT(loaded.gold, loaded) == 1.0
    assert PATIENT(_returning_none(loaded), loaded) == 0.0


def _returning_none(loaded: Problem) -> str:
    return f"def {loaded.reference['entry']}(*args, **kwargs):\n    return None\n"


def _packed(cases: list[dict[str, str]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def test_rows_of_livecodebench(sandbox):
    row = {
        "question_id": "1",
        "question_content": "Add.",
        "starter_code": "class Solution:\n    def add(self, numbers: List[int], n: int) -> int:\n",
        "metadata": json.dumps({"func_name": "add"}),
        "public_test_cases": json.dumps(
            [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]
        ),
        "private_test_cases": _packed(
            [{"input": "[]\n3", "output": "3", "testtype": "functional"}]
        ),
    }
    loaded = livecodebench_problem(row)
    assert len(loaded.reference["cases"]) == 2
    assert SHARE(f"{row['starter_code']}        return sum(numbers) + n", loaded) == 1.0
    assert SHARE(f"{row['starter_code']}        return n", loaded) == 0.5
    stdio = {"input": "1 2\n", "output": "3\n", "testtype": "stdin"}
    row |= {"public_test_cases": json.dumps([stdio]), "private_test_cases": "[]"}
    assert PATIENT("print(sum(map(int, input().split())))", livecodebench_problem(row)) == 1.0


def test_a_pickle_that_names_a_class_is_refused():
    packed = base64.b64encode(zlib.compress(pickle.dumps(os.getcwd))).decode()
    with pytest.raises(pickle.UnpicklingError, match="posix.getcwd"):
        livecodebench_problem({"public_test_cases": "[]", "private_test_cases": packed})


@pytest.mark.slow
@pytest.mark.skipif(not CODE_DATA.is_dir(), reason="GRPO_CODE_DATA names no folder")
@pytest.mark.parametrize(
    "file, load, unjudged",
    [("HumanEval.jsonl.gz", humaneval_problem, 0), ("mbpp.jsonl", mbpp_problem, 5)],
)
def test_reference_solutions_pass_and_empty_ones_do_not(sandbox, file, load, unjudged):
    """Five of MBPP's rows compare objects of their own, or use the solution's imports."""
    opened = gzip.open if file.endswith(".gz") else open
    with opened(CODE_DATA / file, "rt", encoding="utf-8") as lines:
        problems = [load(json.loads(line)) for line in lines]
    failed, fooled = [], []
    for loaded in problems:
        try:
            right = PATIENT(loaded.gold, loaded)
            wrong = PATIENT(_returning_none(loaded), loaded)
        except BadReference:
            right = wrong = 0.0
        failed += [loaded.uid] if right != 1.0 else []
        fooled += [loaded.uid] if wrong else []
    assert len(problems) >= 164 and len(failed) <= unjudged, failed
    assert len(fooled) <= 2, fooled
