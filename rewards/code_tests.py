"""Programs that a model wrote, judged by tests that they never see.

The program runs in a sandbox (rewards/sandbox) and can only answer: it is given arguments or
standard input, and what it returns or prints is compared here. Expected values and test code never
enter its process, so nothing that it prints, patches, forges or exits with can make a test pass.

`problem.reference` is a mapping with one of three kinds of tests:

* "asserts": statements such as "assert add(2, 3) == 5". Where a line is one call and one
  comparison, only the call is sent. Any other statement runs in a second process of the sandbox,
  where the functions under test are stubs that ask the program ("test_setup" is run there first);
* "cases": {"args": [2, 3], "expected": 5}, with "kwargs" if need be, and beside them "entry", the
  function's name, or "Solution.add" for a method. Tuples and lists are the same here;
* "stdio": {"input": "2 3\\n", "output": "5\\n"}; whitespace at the ends of lines does not count.

and optionally "language" (only Python can be called, others take "stdio"), "setup" (source to run
before the program, and before the tests) and "tolerance" (for the numbers of cases and stdio).
"""

import atexit
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rewards.api import BadReference, Problem, Verdict
from rewards.assertions import Assertion, free_names, split_assertion
from rewards.formats import answer_text
from rewards.sandbox.box import NONE, Channel, Limits, ProgramGone, Sandbox, SandboxError
from rewards.sandbox.languages import DoesNotCompile, language
from rewards.sandbox.tiers import describe, open_sandbox
from rewards.sandbox.values import Malformed, decode, encode

MAX_CODE = 100_000  # characters
_MAX_COMPLETION = 1_000_000
_OUTPUT_BYTES = 1 << 20  # besides four times what is expected


@dataclasses.dataclass(frozen=True)
class Report:
    """What the tests said of one program.

    Attributes:
      passed: how many tests.
      total: of how many; after the first failure the others may not have been run.
      reason: of the first failure, one or a few words; "passed" if there is none.
      detail: more about it.
    """

    passed: int
    total: int
    reason: str
    detail: str = ""


class _Failed(Exception):
    """One test failed: (reason, detail)."""


@dataclasses.dataclass(frozen=True)
class CodeTests:
    """The reward; `code_tests` is the one with defaults.

    Attributes:
      share: pay for the share of tests passed rather than only for all.
      budget_s: wall time for all tests of one program; keep it below the pool's deadline.
      memory_mib: address space of the program.
      in_sandbox: run the tests in the program's own process. Needed only where they compare
        objects of the program's own classes. A program can then cheat, so these scores have a
        name of their own, and say so in their reason.
      allow_unsafe_code: where no isolation holds, run programs without. These scores, too, have a
        name of their own and say so.
    """

    share: bool = False
    budget_s: float = 1.6
    memory_mib: int = 512
    in_sandbox: bool = False
    allow_unsafe_code: bool = False

    @property
    def __name__(self) -> str:
        name = "code_tests"
        name += "_in_sandbox" if self.in_sandbox else ""
        return name + ("_unsafe" if self.allow_unsafe_code else "")

    def __call__(self, completion: str, problem: Problem) -> float:
        """A `Verdict`: 1.0 if every test passes; the code, and why not.

        Raises:
          BadReference: the problem's tests cannot be understood.
          SandboxError: the sandbox failed twice.
          NoIsolation: there is none on this machine.
        """
        if not isinstance(problem.reference, Mapping):
            raise BadReference(f"tests should be a mapping, got {problem.reference!r:.100}")
        tests = problem.reference
        code = extract_code(completion, language(tests.get("language", "python")).fences)
        if code is None:
            return Verdict(0.0, "no code")
        sandbox = shared_sandbox(allow_unsafe_code=self.allow_unsafe_code)
        report = self.judge(sandbox, code, tests)
        all_passed = report.passed == report.total
        value = report.passed / report.total if self.share else float(all_passed)
        return Verdict(value, report.reason + self._marks(sandbox), code)

    def judge(self, sandbox: Sandbox, code: str, tests: Mapping[str, Any]) -> Report:
        """Runs the tests; once more on a new zygote if the sandbox fails."""
        kind = _kind(tests)
        if len(code) > MAX_CODE:
            return Report(0, len(tests[kind]), "too long")
        for again in (True, False):
            run = _Run(sandbox, self, code, tests, time.monotonic() + self.budget_s)
            try:
                return run.report(_KINDS[kind](run))
            except SandboxError:
                if not again:
                    raise
                sandbox.restart()
            finally:
                run.close()
        raise AssertionError

    def prepare(self) -> str:
        """Which isolation holds here, for the log; the pool asks once, before it forks workers.

        Raises:
          NoIsolation: there is none on this machine.
        """
        return isolation(allow_unsafe_code=self.allow_unsafe_code)

    def warm_up(self) -> None:
        """Starts this process's sandbox; the pool calls it before the first completion's clock."""
        shared_sandbox(allow_unsafe_code=self.allow_unsafe_code)

    def _marks(self, sandbox: Sandbox) -> str:
        return (" [tests in sandbox]" if self.in_sandbox else "") + (
            " [no isolation]" if sandbox.tier == NONE else ""
        )


code_tests = CodeTests()


def extract_code(completion: str, fences: Sequence[str] = ("python", "py", "")) -> str | None:
    """The program in a completion, None if there is none.

    With an answer tag, the one answer block is looked at, and else what follows the thought. There,
    the last closed Markdown fence of the language, or without a name, is the program; without any
    fence, everything is. A completion with an unclosed fence only has no program.
    """
    if len(completion) > _MAX_COMPLETION:
        return None
    if "<answer>" in completion or "</answer>" in completion:
        text = answer_text(completion)
    else:
        text = completion.rpartition("</think>")[2]
    if text is None:
        return None
    if "```" not in text:
        return text if text.strip() else None
    found = list(_fenced(text, fences))
    return found[-1] if found and found[-1].strip() else None


def _fenced(text: str, fences: Sequence[str]) -> Iterator[str]:
    """The content of each closed fence of these names; one pass over the lines."""
    name: str | None = None
    content: list[str] = []
    for line in text.split("\n"):
        mark = line.strip()
        if name is None:
            if mark.startswith("```"):
                name, content = mark[3:].strip().lower(), []
        elif mark == "```":
            if name in fences:
                yield "\n".join(content) + "\n"
            name = None
        else:
            content.append(line)


def isolation(*, allow_unsafe_code: bool = False) -> str:
    """One line for a run's log: the tier that this machine can give, and how its self-test ended.

    Raises:
      NoIsolation: there is none, and `allow_unsafe_code` is False.
    """
    with open_sandbox(allow_unsafe_code=allow_unsafe_code) as sandbox:
        _TESTED[allow_unsafe_code] = sandbox.tier, sandbox.self_test
        return describe(sandbox)


def shared_sandbox(*, allow_unsafe_code: bool = False) -> Sandbox:
    """The sandbox of this process, started at the first call.

    It is tested, too, unless this process or the one it was forked from has already done so.
    """
    key = (os.getpid(), allow_unsafe_code)
    if key not in _SANDBOXES:
        if allow_unsafe_code not in _TESTED:
            isolation(allow_unsafe_code=allow_unsafe_code)
        tier, found = _TESTED[allow_unsafe_code]
        _SANDBOXES[key] = Sandbox(tier)
        _SANDBOXES[key].self_test = found
    return _SANDBOXES[key]


_SANDBOXES: dict[tuple[int, bool], Sandbox] = {}
_TESTED: dict[bool, tuple[str, dict[str, str]]] = {}  # tier and self-test


@atexit.register
def _close_sandboxes() -> None:
    for (pid, _), sandbox in _SANDBOXES.items():
        if pid == os.getpid():
            sandbox.close()


class _Run:
    """One program under test."""

    def __init__(
        self,
        sandbox: Sandbox,
        options: CodeTests,
        code: str,
        tests: Mapping[str, Any],
        deadline: float,
    ) -> None:
        self.sandbox = sandbox
        self.options = options
        self.code = code
        self.tests = tests
        self.deadline = deadline
        self.limits = Limits(memory_mib=options.memory_mib)
        self.sources = [*filter(None, [tests.get("setup", "")]), code]
        self._callee: Channel | None = None

    def report(self, outcomes: Iterator[_Failed | None]) -> Report:
        """Counts outcomes; stops at the first failure unless every test counts."""
        kind = _kind(self.tests)
        passed, failure = 0, None
        for outcome in outcomes:
            passed += outcome is None
            failure = failure or outcome
            if failure is not None and not self.options.share:
                break
        total = len(self.tests[kind])
        if failure is None:
            return Report(passed, total, "passed")
        return Report(min(passed, total - 1), total, *failure.args)

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The plain value of one call. Raises _Failed."""
        reply = self.ask(["call", name, encode(tuple(args)), encode(dict(kwargs))])
        if reply[0] == "value" and len(reply) == 2:
            try:
                return decode(reply[1])
            except Malformed as error:
                raise _Failed("broke the protocol", str(error)) from None
        if reply[0] == "opaque":
            raise _Failed("returned no plain value", str(reply[1:])[:200])
        raise _Failed("raised", str(reply[1:])[:200])

    def ask(self, call: Sequence[Any]) -> list[Any]:
        """Has the program answer ["call", name, args, kwargs]; starts it if it is not running."""
        try:
            if time.monotonic() >= self.deadline:
                raise ProgramGone("timeout")
            if self._callee is None:
                self._callee = self._served()
            return self._callee.ask(call[1:])
        except ProgramGone as error:
            self.close()
            raise _Failed(_why_gone(error), str(error)[:200]) from None

    def close(self) -> None:
        """Kills the program."""
        callee, self._callee = self._callee, None
        if callee is not None:
            callee.close()

    def _served(self) -> Channel:
        try:
            return self.sandbox.serve(self.sources, self.deadline, self.limits)
        except UnicodeEncodeError as error:
            raise ProgramGone(f"UnicodeEncodeError: {error}") from None


def _why_gone(error: ProgramGone) -> str:
    said = str(error)
    return said if said in ("timeout", "it exited", "too large an answer") else "does not load"


def _assert_outcomes(run: _Run) -> Iterator[_Failed | None]:
    lines = run.tests["asserts"]
    if run.options.in_sandbox:
        yield from _refereed(run, lines)
        return
    tests = [(line, split_assertion(line, run.tests.get("entry", ""))) for line in lines]
    for _, assertion in tests:
        if assertion is not None:
            yield _outcome(functools.partial(_check_assertion, run, assertion))
    hard = [line for line, assertion in tests if assertion is None]
    if hard:
        yield from _refereed(run, hard)


def _check_assertion(run: _Run, assertion: Assertion) -> None:
    value = run.call(assertion.name, assertion.args, assertion.kwargs)
    if not assertion.holds(value):
        raise _Failed("wrong answer", f"{assertion.name}(…) gave {_shown(value)}")


def _shown(value: Any) -> str:
    try:
        return repr(value)[:200]
    except ValueError:  # an integer with more digits than Python prints
        return f"a huge {type(value).__name__}"


def _outcome(check: Callable[[], None]) -> _Failed | None:
    try:
        check()
    except _Failed as failure:
        return failure
    return None


def _refereed(run: _Run, lines: Sequence[str]) -> Iterator[_Failed | None]:
    """Runs statements in a process of their own, and passes their calls on to the program."""
    around = [text for text in (run.tests.get("setup"), run.tests.get("test_setup")) if text]
    try:
        names = free_names(lines, around)
    except SyntaxError as error:
        raise BadReference(f"the tests are no Python: {error}") from None
    if "entry" in run.tests and run.tests["entry"] not in names:
        names.append(run.tests["entry"])
    sources = around
    if run.options.in_sandbox:
        setup = [run.tests["test_setup"]] if run.tests.get("test_setup") else []
        sources, names = [*run.sources, *setup], []
    referee = run.sandbox.referee(sources, lines, names, run.deadline, run.limits)
    with referee:
        for _ in lines:
            try:
                said = _next_verdict(run, referee)
            except ProgramGone as error:
                yield _Failed("timeout" if str(error) == "timeout" else "it exited", str(error))
                return
            yield None if said[0] == "passed" else _Failed("wrong answer", str(said[1:])[:200])


def _next_verdict(run: _Run, referee: Channel) -> list[Any]:
    """What the referee says of the next statement, after all that it asks the program."""
    while True:
        said = referee.receive()
        if said[0] == "raised":  # the tests' own setup, or with tests in the sandbox the program
            if not run.options.in_sandbox:
                raise BadReference(
                    f"the tests' setup raised {said[1:]}; if it needs the program's own classes, "
                    "only in_sandbox=True can run it"
                )
            raise ProgramGone(str(said[1:]))
        if said[0] != "call":
            return said
        try:
            answer = run.ask(said)
        except _Failed as failure:
            answer = ["gone", *map(str, failure.args)]
        referee.send(answer)


def _case_outcomes(run: _Run) -> Iterator[_Failed | None]:
    for case in run.tests["cases"]:
        yield _outcome(functools.partial(_check_case, run, case))


def _check_case(run: _Run, case: Mapping[str, Any]) -> None:
    value = run.call(run.tests["entry"], case.get("args", ()), case.get("kwargs", {}))
    if not same_value(value, case["expected"], run.tests.get("tolerance", 0.0)):
        raise _Failed("wrong answer", f"{run.tests['entry']}(…) gave {_shown(value)}")


def _stdio_outcomes(run: _Run) -> Iterator[_Failed | None]:
    if run.options.in_sandbox:
        raise BadReference("tests of standard output never run in the sandbox")
    spoken = language(run.tests.get("language", "python"))
    try:
        start = spoken.prepare(run.sandbox, run.code, run.deadline, run.limits)
    except DoesNotCompile as error:
        why = "timeout" if str(error) == "timeout" else "does not load"
        yield from [_Failed(why, str(error)[:200])] * len(run.tests["stdio"])
        return
    for case in run.tests["stdio"]:
        yield _outcome(functools.partial(_check_output, run, case, start))


def _check_output(run: _Run, case: Mapping[str, str], start: Callable[..., Any]) -> None:
    left = run.deadline - time.monotonic()
    if left <= 0:
        raise _Failed("timeout", "")
    ended = start(case["input"].encode(errors="replace"), left)
    if ended.ended != "exit" or ended.code != 0:
        why = {"timeout": "timeout", "output": "too much output"}.get(ended.ended, "raised")
        raise _Failed(why, ended.stderr.decode(errors="replace")[-200:])
    said = ended.stdout.decode(errors="replace")
    if not same_output(said, case["output"], run.tests.get("tolerance", 0.0)):
        raise _Failed("wrong answer", f"it wrote {said!r:.200}")


def same_value(value: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Equality of plain values in which tuples are lists, and floats may differ a little."""
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(
            same_value(left, right, tolerance) for left, right in zip(value, expected, strict=True)
        )
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            same_value(value[key], expected[key], tolerance) for key in value
        )
    if tolerance and isinstance(value, float | int) and isinstance(expected, float | int):
        return math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
    try:
        return bool(value == expected)
    except ArithmeticError:  # a signalling NaN
        return False


def same_output(said: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether two outputs are the same text, but for whitespace at the ends of lines and texts."""
    if _lines(said) == _lines(expected):
        return True
    if not tolerance:
        return False
    left, right = said.split(), expected.split()
    return len(left) == len(right) and all(map(_near(tolerance), left, right))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _near(tolerance: float) -> Callable[[str, str], bool]:
    def near(left: str, right: str) -> bool:
        try:
            return math.isclose(float(left), float(right), rel_tol=tolerance, abs_tol=tolerance)
        except ValueError:
            return left == right

    return near


_KINDS: dict[str, Callable[[_Run], Iterator[_Failed | None]]] = {
    "asserts": _assert_outcomes,
    "cases": _case_outcomes,
    "stdio": _stdio_outcomes,
}


def _kind(tests: Mapping[str, Any]) -> str:
    kinds = [kind for kind in _KINDS if tests.get(kind)]
    if len(kinds) != 1:
        raise BadReference(f"a reference needs tests of one kind of {list(_KINDS)}, got {kinds}")
    if kinds[0] != "stdio" and tests.get("language", "python") != "python":
        raise BadReference(f"{kinds[0]!r} are for Python; other languages take 'stdio'")
    if kinds[0] == "cases" and "entry" not in tests:
        raise BadReference("'cases' need 'entry', the name of the function")
    return kinds[0]
