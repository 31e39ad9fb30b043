"""The sandbox: what gets out of it, what it leaves behind, and how it says that it cannot hold."""

import collections
import contextlib
import decimal
import fractions
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_programs
import pytest

from rewards.code_tests import CodeTests
from rewards.sandbox import box, tiers, values
from rewards.sandbox.box import Limits, ProgramGone, Sandbox, SandboxError
from rewards.sandbox.tiers import HELD, NoIsolation, describe, open_sandbox

if sys.platform != "linux":
    pytest.skip("the sandbox is for Linux", allow_module_level=True)

ROOT = Path(__file__).parent.parent
NOBODY = 65_534
LIMITS = Limits(memory_mib=256)
ALLOW_ALL = b"\x06\x00\x00\x00\x00\x00\xff\x7f"  # a seccomp filter of one instruction


@pytest.fixture(scope="module", params=tiers.TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        opened = open_sandbox(tiers=(request.param,))
    except NoIsolation as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def started_as_nobody() -> Iterator[subprocess.Popen[str] | str]:
    """Every hostile program under an ordinary user, running beside the other tests; or why not."""
    python = _python_for_others() if os.geteuid() == 0 else None
    if python is None:
        yield "needs root, and a Python 3.11 and this folder open to ordinary users"
        return
    folder = Path("/tmp") / f"grpo-nobody-{os.getpid()}"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    try:
        with subprocess.Popen(
            [python, "-B", ROOT / "tests" / "hostile_programs.py", str(folder), *tiers.TIERS],
            env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": "/usr/bin:/bin"},
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            yield process
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its bystander, too
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)


@pytest.fixture(scope="module")
def as_nobody(started_as_nobody: subprocess.Popen[str] | str) -> dict[str, Any]:
    """What went wrong, by tier and family."""
    if isinstance(started_as_nobody, str):
        pytest.skip(started_as_nobody)
    said, complaint = started_as_nobody.communicate(timeout=300)
    assert started_as_nobody.returncode == 0, complaint[-2_000:]
    found: dict[str, Any] = json.loads(said)
    return found


def _python_for_others() -> str | None:
    """An interpreter, with this repository in reach, that an ordinary user may run."""
    check = "import sys; assert sys.version_info >= (3, 11); import rewards.api"
    for python in filter(_reachable, (sys.executable, "/usr/bin/python3")):
        tried = subprocess.run(
            [python, "-B", "-c", check],
            env={"PYTHONPATH": str(ROOT)},
            cwd="/",
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
        )
        if tried.returncode == 0:
            return python
    return None


def _reachable(path: str) -> bool:
    real = Path(path).resolve()
    return real.exists() and all(
        part.stat().st_mode & 1 for part in (real, *real.parents, *Path(path).parents)
    )


def test_nothing_gets_out_by_the_self_test(sandbox):
    assert set(sandbox.self_test.values()) == {HELD}
    assert describe(sandbox) == f"code sandbox: {sandbox.tier}, 9 of 9 escapes failed"


@pytest.mark.parametrize("family", [*hostile_programs.FAMILIES, hostile_programs.STREAMS])
def test_hostile_programs_neither_pass_nor_do_harm(sandbox, family, tmp_path):
    assert hostile_programs.judge_all(sandbox, tmp_path, [family]) == {family: []}


def test_a_sandbox_with_a_hole_is_refused(monkeypatch):
    """The self-test looks at what happens: a filter that lets everything by is found out."""
    before = hostile_programs.processes()
    monkeypatch.setattr(box, "seccomp_program", lambda **_: ALLOW_ALL)
    with pytest.raises(NoIsolation, match=r"landlock: .*(network|processes): .*allow_unsafe_code"):
        open_sandbox(tiers=("landlock",))
    end = time.monotonic() + 20.0
    while (left := hostile_programs.processes() - before) and time.monotonic() < end:
        time.sleep(0.1)  # the probes that got out go away by themselves
    assert os.geteuid() != 0 or not left


def test_without_isolation_only_on_request(monkeypatch):
    monkeypatch.setattr(box, "_find_bubblewrap", _no_bubblewrap)
    with pytest.raises(NoIsolation, match="bubblewrap is missing.*allow_unsafe_code=True"):
        open_sandbox(tiers=("namespaces",))
    with (
        pytest.warns(RuntimeWarning, match="bubblewrap is missing.*WITHOUT isolation"),
        open_sandbox(tiers=("namespaces",), allow_unsafe_code=True) as unsafe,
    ):
        assert unsafe.tier == "none"
        assert unsafe.run_python(["print(6 * 7)"], b"", 5.0, LIMITS).stdout == b"42\n"
        with pytest.raises(ProgramGone, match="timeout"):
            unsafe.serve(["while True: pass"], time.monotonic() + 0.2, LIMITS)


def _no_bubblewrap() -> str:
    raise SandboxError("bubblewrap is missing (apt-get install bubblewrap)")


def test_a_zygote_that_died_is_replaced(sandbox):
    reference = {"asserts": ["assert f(2) == 4"]}
    sandbox._process.kill()
    sandbox._process.wait()
    report = CodeTests(budget_s=10.0).judge(sandbox, hostile_programs.HONEST, reference)
    assert report.reason == "passed"


def test_nothing_outlives_its_owner(sandbox):
    """The owner is killed in the middle of a job."""
    program = (
        "from rewards.sandbox.box import *\n"
        f"sandbox = Sandbox({sandbox.tier!r})\nprint(sandbox._process.pid, flush=True)\n"
        "sandbox.run_python(['while True: pass'], b'', 60.0, Limits())"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    with owner, owner.stdout:
        started = int(owner.stdout.readline())
        time.sleep(0.2)
        family = [started, *_descendants(started)]
        owner.send_signal(signal.SIGKILL)
    end = time.monotonic() + 5.0
    while (left := [pid for pid in family if _alive(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    assert len(family) > 1 and not left


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *_descendants(child))]


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_script_runs_as_python_would_run_it(sandbox):
    source = (
        "from __future__ import annotations\nimport atexit, sys, threading\n"
        "atexit.register(print, 'last')\n"
        "if __name__ == '__main__':\n    print(sys.stdin.readline().strip(), sys.argv)\n"
        "    threading.Thread(target=print, args=('é',)).start()\n"
    )
    ended = sandbox.run_python(["import math", source], b"in\n", 5.0, LIMITS)
    assert (ended.ended, ended.code) == ("exit", 0), ended.stderr
    assert ended.stdout.decode() == "in ['__main__.py']\né\nlast\n"


@pytest.mark.parametrize(
    "source, ended, code",
    [
        ("raise SystemExit(3)", "exit", 3),
        ("raise SystemExit('why')", "exit", 1),
        ("1 / 0", "exit", 1),
        ("x = (", "exit", 1),
        ("import os; os._exit(7)", "exit", 7),
        ("import ctypes; ctypes.string_at(0)", "signal", -signal.SIGSEGV),
        ("while True: print('x' * 9999)", "output", -signal.SIGKILL),
        ("import time; time.sleep(60)", "timeout", -signal.SIGKILL),
    ],
)
def test_how_a_program_ended(sandbox, source, ended, code):
    found = sandbox.run_python([source], b"never read" * 100_000, 0.5, LIMITS)
    assert (found.ended, found.code) == (ended, code)


def test_input_and_output_larger_than_a_pipe(sandbox):
    text = b"0123456789" * 50_000
    source = "import sys; sys.stdout.write(sys.stdin.read()[::-1])"
    assert sandbox.run_python([source], text, 5.0, LIMITS).stdout == text[::-1]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(10**400),
        0.1,
        float("inf"),
        "é\ud800\0",
        b"\xff",
        1 + 2j,
        [1, (2, {3: [4]}), "x"],
        {1, 2},
        frozenset({3}),
        range(3, 30, 4),
        collections.deque([1]),
        decimal.Decimal("1.50"),
        fractions.Fraction(1, 3),
    ],
)
def test_values_come_back_as_they_were(value):
    back = values.decode(json.loads(json.dumps(values.encode(value))))
    assert back == value and type(back) is type(value)


def test_values_of_other_types():
    assert values.decode(values.encode(collections.Counter("aab"))) == {"a": 2, "b": 1}
    assert list(values.decode(values.encode(n * n for n in range(3)))) == [0, 1, 4]
    assert values.decode(values.encode({1: 2}.keys())) == {1}
    endless: list[Any] = []
    endless.append(endless)
    for opaque in (object(), len, int, [object()], endless, [0] * 200_000):
        with pytest.raises(values.Opaque):
            values.encode(opaque)


@pytest.mark.parametrize(
    "tagged",
    [
        None,
        4,
        [],
        "int",
        ["any"],
        ["int", 4],
        ["int", "0x"],
        ["float", "?"],
        ["str", 4],
        ["list", [4]],
        ["dict", [[["list", []], ["none"]]]],
        ["set", [["list", []]]],
        ["fraction", ["1", "0"]],
        ["range", ["0", "1", "0"]],
        ["int", "1", "2"],
    ],
)
def test_what_is_no_value_is_malformed(tagged):
    with pytest.raises(values.Malformed):
        values.decode(tagged)


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_hostile_programs_of_an_ordinary_user(as_nobody, tier):
    if "missing" in as_nobody[tier]:
        pytest.skip(as_nobody[tier]["missing"][0])
    assert len(as_nobody[tier]) == len(hostile_programs.FAMILIES) + 1
    assert {family: wrong for family, wrong in as_nobody[tier].items() if wrong} == {}
