"""Measures the rewards; prints one JSON line a measurement.

  python tools/bench_rewards.py math --gsm8k=test.jsonl --math500=math500.jsonl

  python tools/bench_rewards.py sandbox

Times are CPU seconds of one core, so other work on the machine disturbs them little.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rewards import math_symbolic
from rewards.api import Problem
from rewards.code_tests import CodeTests, code_tests
from rewards.math_answer import math_answer
from rewards.pool import RewardPool
from rewards.sandbox.box import NONE, Sandbox
from rewards.sandbox.tiers import TIERS, NoIsolation, open_sandbox

Pair = tuple[str, str]  # what a model might answer, the reference
_ENOUGH_S = 1.0
_COLD_IMPORTS = "collections functools heapq itertools math random re string typing".split()
_CORPUS = Path(__file__).parent.parent / "tests" / "corpus" / "math_answers.jsonl"


def math_lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Verdicts a second on the tests' answers and on data sets' gold answers.

    A gold answer is judged against itself and against the next one. Math-Verify alone judges the
    same answers, evenly sampled. Both get references that were parsed before the clock ran.
    """
    rows = [json.loads(line) for line in args.corpus.read_text().splitlines()]
    for right in (True, False):
        pairs = [
            (row["text"], row["reference"])
            for row in rows
            if row["form"] == "bare" and row["right"] is right
        ]
        kind = "right" if right else "wrong"
        yield {"bench": "math", "data": "corpus", "pairs": kind, **_math_row(pairs, len(pairs))}
    for name, path in (("gsm8k", args.gsm8k), ("math500", args.math500)):
        if path is None:
            continue
        golds = [str(json.loads(line)["answer"]) for line in Path(path).read_text().splitlines()]
        golds = [gold.rpartition("####")[2].strip() for gold in golds]
        following = zip(golds, [*golds[1:], golds[0]], strict=True)
        for kind, pairs in (
            ("right", [(gold, gold) for gold in golds]),
            ("wrong", [(other, gold) for gold, other in following if gold != other]),
        ):
            yield {"bench": "math", "data": name, "pairs": kind, **_math_row(pairs, args.sample)}


def _math_row(pairs: Sequence[Pair], sample: int) -> dict[str, Any]:
    ours = _ours(pairs)
    few = pairs[:: max(1, len(pairs) // sample)][:sample]
    row = {"rows": len(pairs), "accepted": sum(ours), "last_stage": _last_stage(pairs)}
    seconds = _repeated(lambda: _ours(pairs)) / len(pairs)
    theirs, accepted = _math_verify(few)
    return row | {
        "verdicts_per_s": round(1 / seconds),
        "math_verify_rows": len(few),
        "math_verify_accepted": accepted,
        "math_verify_per_s": round(len(few) / theirs),
        "times_faster": round(theirs / len(few) / seconds, 1),
    }


def _ours(pairs: Sequence[Pair]) -> list[bool]:
    problems = {gold: Problem("p", prompt="?", reference=gold) for _, gold in pairs}
    return [
        math_answer(f"<think>so</think>\n<answer>{said}</answer>", problems[gold]) == 1
        for said, gold in pairs
    ]


def _last_stage(pairs: Sequence[Pair]) -> float:
    """The share of pairs that exact arithmetic does not decide."""
    before, calls = math_symbolic.equal, []

    def counted(gold: Any, said: Any) -> bool:
        calls.append(1)
        return before(gold, said)

    math_symbolic.equal = counted
    try:
        _ours(pairs)
    finally:
        math_symbolic.equal = before
    return round(len(calls) / len(pairs), 3)


def _repeated(work: Callable[[], object]) -> float:
    """CPU seconds of one pass, sympy's cache emptied before each."""
    clear_cache = importlib.import_module("sympy.core.cache").clear_cache
    total, passes = 0.0, 0
    while total < _ENOUGH_S:
        clear_cache()
        started = time.thread_time()
        work()
        total += time.thread_time() - started
        passes += 1
    return total / passes


def _math_verify(pairs: Sequence[Pair]) -> tuple[float, int]:
    """CPU seconds of Math-Verify by itself, and how many pairs it takes for equal."""
    import math_verify

    golds = [math_verify.parse(rf"\boxed{{{gold}}}") for _, gold in pairs]
    started, accepted = time.thread_time(), 0
    for (said, _), gold in zip(pairs, golds, strict=True):
        accepted += math_verify.verify(gold, math_verify.parse(rf"\boxed{{{said}}}"))
    return time.thread_time() - started, accepted


def sandbox_lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Programs judged a second: by tier, in a pool's workers, and in a new interpreter each.

    `per_core_per_s` counts CPU seconds of every process that took part, `per_s` wall time.
    """
    asserts = {"asserts": ["assert f(2, 3) == 5"]}
    stdio = {"stdio": [{"input": "2 3\n", "output": "5\n"}]}
    for tier in (*TIERS, NONE):
        started = time.perf_counter()
        try:
            sandbox = Sandbox(NONE) if tier == NONE else open_sandbox(tiers=(tier,))
        except NoIsolation as error:
            yield {"bench": "sandbox", "tier": tier, "missing": str(error)}
            continue
        sandbox.close()
        ready = round(time.perf_counter() - started, 3)
        yield {"bench": "sandbox", "tier": tier, "what": "start and self-test", "seconds": ready}
        many = {"asserts": asserts["asserts"] * 101}
        calls = _programs(tier, "def f(a, b): return a + b", asserts, args.programs)
        more = _programs(tier, "def f(a, b): return a + b", many, args.programs // 4)
        told = {"bench": "sandbox", "tier": tier}
        yield told | {"what": "one call"} | calls
        yield told | {"what": "each further call", "ms": round((more["ms"] - calls["ms"]) / 100, 3)}
        lines = _programs(tier, "print(sum(map(int, input().split())))", stdio, args.programs)
        yield told | {"what": "standard streams"} | lines
    for workers in (1, 2):
        yield {"bench": "sandbox", "what": f"one call, pool of {workers}"} | _pooled(workers, args)
    yield from _cold_lines(args.programs // 10)


def _programs(tier: str, code: str, tests: dict[str, Any], count: int) -> dict[str, Any]:
    """Judges one right program `count` times, one after the other, in a sandbox of its own."""
    patient = CodeTests(budget_s=60.0)
    with Sandbox(tier) as sandbox:

        def work() -> None:
            for _ in range(count):
                assert patient.judge(sandbox, code, tests).reason == "passed"

        return _both_clocks(work, count)


def _pooled(workers: int, args: argparse.Namespace) -> dict[str, Any]:
    problem = Problem("p", prompt="?", reference={"asserts": ["assert f(2, 3) == 5"]})
    with RewardPool([(1.0, code_tests)], workers=workers, deadline_s=30.0) as pool:
        futures = [pool.submit("def f(a, b): return a + b", problem) for _ in range(2 * workers)]
        assert all(future.result()[0].value == 1.0 for future in futures)
        started = time.perf_counter()
        futures = [pool.submit("def f(a, b): return a + b", problem) for _ in range(args.programs)]
        assert all(future.result()[0].value == 1.0 for future in futures)
        return {"per_s": round(args.programs / (time.perf_counter() - started))}


def _cold_lines(count: int) -> Iterator[dict[str, Any]]:
    """What is usual: a new interpreter for each program, without and with bubblewrap around it."""
    python = [sys.executable, "-I", "-S", "-c", f"import {', '.join(_COLD_IMPORTS)}\nprint(2 + 3)"]
    around = ["bwrap", "--unshare-all", "--cap-drop", "ALL", "--ro-bind", "/", "/", "--dev", "/dev"]
    for what, command in (("no isolation", python), ("bubblewrap", [*around, *python])):
        told = {"bench": "sandbox", "what": f"a new interpreter each, {what}"}
        if shutil.which(command[0]) is None:
            yield told | {"missing": command[0]}
            continue

        started = time.perf_counter()
        for _ in range(count):
            subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        yield told | {"ms": round(1_000 * seconds / count, 2), "per_s": round(count / seconds)}


def _both_clocks(work: Callable[[], None], count: int) -> dict[str, Any]:
    """Wall time, and CPU time of this process and of all below it."""
    cpu, wall = _cpu_s(os.getpid()), time.perf_counter()
    work()
    cpu, wall = _cpu_s(os.getpid()) - cpu, time.perf_counter() - wall
    return {
        "ms": round(1_000 * wall / count, 2),
        "per_s": round(count / wall),
        "cpu_ms": round(1_000 * cpu / count, 2),
        "per_core_per_s": round(count / cpu),
    }


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process, of its children that have ended, and of those that live."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_cpu_s(int(child)) for child in children)


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "math": math_lines,
    "sandbox": sandbox_lines,
}


def main(argv: Sequence[str]) -> None:
    """Runs the sections that are named and prints their lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--gsm8k", help="JSON lines with an answer that ends in #### and a number")
    parser.add_argument("--math500", help="JSON lines with an answer in LaTeX")
    parser.add_argument("--corpus", type=Path, default=_CORPUS, help="the tests' own answers")
    parser.add_argument("--sample", type=int, default=250, help="pairs for Math-Verify alone")
    parser.add_argument("--programs", type=int, default=400, help="runs of each in the sandbox")
    args = parser.parse_args(argv)
    for section in args.sections:
        for line in SECTIONS[section](args):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
