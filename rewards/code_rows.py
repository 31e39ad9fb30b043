"""Rows of the well known code data sets as problems for `code_tests`.

Each function takes one row as its data set stores it. The problem's gold is the row's reference
solution, where it has one, so that a run can check that the tests accept it.
"""

import ast
import base64
import io
import json
import pickle
import textwrap
import zlib
from collections.abc import Mapping
from typing import Any

from rewards.api import Problem
from rewards.assertions import parse

_ASK = "Put the whole program in one ```python fence."


def humaneval_problem(row: Mapping[str, Any]) -> Problem:
    """A row with prompt, entry_point, canonical_solution and test (arXiv:2107.03374)."""
    entry = row["entry_point"]
    prompt, gold = row["prompt"], row["prompt"] + row["canonical_solution"]
    before = prompt[: prompt.rindex(f"def {entry}")]
    lines = _lines_of_check(row["test"], entry)
    reference: dict[str, Any] = {"entry": entry, "setup": before}
    if lines is not None:
        reference["asserts"] = lines
    else:
        reference |= {"test_setup": row["test"], "asserts": [f"check({entry})"]}
    return _problem(
        f"humaneval/{row['task_id'].rpartition('/')[2]}",
        f"Complete this function.\n\n```python\n{prompt.strip()}\n```\n\n{_ASK}",
        reference,
        gold,
    )


def _lines_of_check(test: str, entry: str) -> list[str] | None:
    """The asserts in `check(candidate)`, None if there is more to it than asserts."""
    (check,) = [node for node in parse(test).body if isinstance(node, ast.FunctionDef)][-1:]
    if check.name != "check" or not all(isinstance(node, ast.Assert) for node in check.body):
        return None
    argument = check.args.args[0].arg
    for node in ast.walk(check):
        if isinstance(node, ast.Name) and node.id == argument:
            node.id = entry
    # Some rows begin with "assert True", which asks the program nothing.
    asked = [n for n in check.body if any(isinstance(each, ast.Call) for each in ast.walk(n))]
    return [ast.unparse(node) for node in asked] or None


def mbpp_problem(row: Mapping[str, Any]) -> Problem:
    """A row with text (or prompt), code, test_list and its setup (arXiv:2108.07732)."""
    tests = list(row["test_list"])
    setup = "\n".join(row.get("test_imports") or []) or row.get("test_setup_code") or ""
    shown = "\n".join(tests)
    question = row.get("text") or row["prompt"]
    gold = row["code"].replace("\r\n", "\n")
    return _problem(
        f"mbpp/{row['task_id']}",
        f"{question} Your code should pass these tests:\n\n{shown}\n\n{_ASK}",
        {"entry": _called_function(gold, tests), "asserts": tests, "test_setup": setup},
        gold,
    )


def _called_function(gold: str, tests: list[str]) -> str:
    """The function of `gold` that the tests call; some rows' hide a builtin. "" if unclear."""
    called = {
        node.func.id
        for test in tests
        for node in ast.walk(parse(test))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    defined = [n.name for n in parse(gold).body if isinstance(n, ast.FunctionDef)]
    return next((name for name in reversed(defined) if name in called), "")


def livecodebench_problem(row: Mapping[str, Any]) -> Problem:
    """A row with question_content, starter_code, test cases and metadata (arXiv:2403.07974).

    Raises:
      ValueError: the row mixes kinds of tests.
    """
    cases = json.loads(row["public_test_cases"]) + _private_cases(row["private_test_cases"])
    kinds = {case["testtype"] for case in cases}
    metadata = row.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    question = row["question_content"]
    if kinds == {"stdin"}:
        tests: dict[str, Any] = {
            "stdio": [{"input": case["input"], "output": case["output"]} for case in cases]
        }
        question += "\n\nRead from standard input and write to standard output."
    elif kinds == {"functional"}:
        tests = {
            "setup": _LEETCODE_IMPORTS,
            "entry": f"Solution.{metadata['func_name']}",
            "cases": [
                {
                    "args": [json.loads(line) for line in case["input"].split("\n")],
                    "expected": json.loads(case["output"]),
                }
                for case in cases
            ],
        }
        question += f"\n\n```python\n{row['starter_code']}\n```"
    else:
        raise ValueError(f"test cases of kinds {sorted(kinds)}")
    return _problem(f"livecodebench/{row['question_id']}", f"{question}\n\n{_ASK}", tests, None)


# What starter code takes for granted.
_LEETCODE_IMPORTS = textwrap.dedent(
    """
    import bisect, collections, functools, heapq, itertools, math, random, re, string
    from bisect import *
    from collections import *
    from functools import *
    from heapq import *
    from itertools import *
    from math import *
    from typing import *
    """
)


def _private_cases(text: str) -> list[dict[str, Any]]:
    """JSON, or JSON that was pickled, compressed and encoded; no pickled object is made."""
    try:
        found: list[dict[str, Any]] = json.loads(text)
    except ValueError:
        packed = zlib.decompress(base64.b64decode(text))
        found = json.loads(_TextOnly(io.BytesIO(packed)).load())
    return found


class _TextOnly(pickle.Unpickler):
    """Strings and containers need no class; whatever names one is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"test cases that name {module}.{name}")


def _problem(uid: str, question: str, reference: Mapping[str, Any], gold: str | None) -> Problem:
    reference = {key: value for key, value in reference.items() if value}
    messages = ({"role": "user", "content": question},)
    return Problem(uid=uid, messages=messages, reference=reference, gold=gold)
