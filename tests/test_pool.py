"""The reward pool: what it says of rewards that misbehave, and what it leaves behind."""

import dataclasses
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.api import Component, Problem, Score, Status
from rewards.pool import RewardPool

DEADLINE_S = 0.3
WAIT_S = 10.0  # for what takes milliseconds unless it is broken


def asked(reference: Any = None) -> Problem:
    return Problem("p", prompt="?", reference=reference)


def same(completion: str, problem: Problem) -> float:
    return float(completion == problem.reference)


def kill_the_zygote() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()


def as_told(completion: str, problem: Problem) -> float:
    """Does what the completion says, so that one pool serves many tests."""
    deeds: dict[str, Callable[[], Any]] = {
        "hang": lambda: all(iter(lambda: True, False)),
        "raise": lambda: int("absent"),
        "exit": lambda: sys.exit(0),
        "exit hard": lambda: os._exit(0),
        "kill the zygote": kill_the_zygote,
        "nan": lambda: float("nan"),
        "pid": lambda: Path(problem.reference).write_text(str(os.getpid())),
        "allocate": lambda: len(bytearray(8 << 30)),
        "shout": lambda: [
            print("ok\n" * 100_000),
            print("[1.0, true]", file=sys.stderr),
            os.write(1, b"ready\n"),
        ],
        "spawn": lambda: Path(problem.reference).write_text(
            str(subprocess.Popen(["sleep", "60"]).pid)
        ),
        "modules": lambda: 0.0 if {"jax", "grpo"} & set(sys.modules) else 1.0,
        "change": lambda: problem.reference.append(1),
    }
    deed = deeds.get(completion, float)  # nothing to do is 0.0
    result = deed()
    return result if isinstance(result, float) else 1.0


def untouched(completion: str, problem: Problem) -> float:
    return float(problem.reference == [])


def hangs_once(completion: str, problem: Problem) -> float:
    """Leaves its process id and hangs; is right the second time."""
    left = Path(problem.reference)
    if left.exists():
        return 1.0
    left.with_suffix(".new").write_text(str(os.getpid()))
    left.with_suffix(".new").rename(left)
    signal.pause()
    return 0.0


@dataclasses.dataclass(frozen=True)
class Within:
    limit: int

    def __call__(self, completion: str, problem: Problem) -> float:
        return float(len(completion) <= self.limit)


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    components = [(1.0, same), (0.5, as_told), (0.5, same)]
    with RewardPool(components, workers=2, deadline_s=DEADLINE_S, memory_gib=0.5) as started:
        yield started


def scored(pool: RewardPool, completion: str, reference: Any = None) -> list[Score]:
    return pool.submit(completion, asked(reference)).result(WAIT_S)


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def test_each_future_gets_its_own_scores(pool):
    assert pool.names == ("same", "as_told", "same_2")
    futures = [pool.submit(str(i), asked(str(i - i % 2))) for i in range(200)]
    for i, future in enumerate(futures):
        first, _, last = future.result(WAIT_S)
        assert first == last == Score(float(i % 2 == 0), True, Status.OK)


def test_a_hang_is_a_wrong_answer_and_spares_the_other_scores(pool):
    started = time.monotonic()
    before, hung, after = scored(pool, "hang", "hang")
    assert DEADLINE_S <= time.monotonic() - started < DEADLINE_S + 1
    assert (hung.value, hung.valid, hung.status) == (0.0, True, Status.TIMEOUT)
    assert "as_told" in hung.detail
    assert before == after == Score(1.0, True, Status.OK)


@pytest.mark.parametrize(
    ("completion", "status", "detail"),
    [
        ("raise", Status.CRASH, "ValueError: invalid literal"),
        ("exit", Status.CRASH, "SystemExit: 0"),
        ("allocate", Status.CRASH, "MemoryError"),
        ("exit hard", Status.LOST, "as_told, twice"),
        ("kill the zygote", Status.LOST, "as_told, twice"),
        ("nan", Status.BAD_VALUE, "nan"),
    ],
)
def test_failures_of_a_reward_are_invalid(pool, completion, status, detail):
    before, failed, after = scored(pool, completion, completion)
    assert (failed.value, failed.valid, failed.status) == (0.0, False, status)
    assert detail in failed.detail
    assert before == after == Score(1.0, True, Status.OK)


def test_printing_harms_nothing(pool, capfd):
    assert [score.status for score in scored(pool, "shout")] == [Status.OK] * 3
    assert capfd.readouterr() == ("", "")


def test_workers_have_no_jax(pool):
    assert scored(pool, "modules")[1].value == 1.0


@pytest.mark.parametrize("text", ["\ud800", "\x00", "x" * 5_000_000], ids=["half", "nul", "long"])
def test_any_text_arrives(pool, text):
    assert scored(pool, text, text)[0].value == 1.0


def test_what_a_reward_started_dies_with_its_worker(tmp_path):
    left = tmp_path / "pid"
    with RewardPool([(1.0, as_told)], workers=1, jobs_per_worker=1) as pool:
        scored(pool, "spawn", str(left))
        assert eventually(lambda: gone(int(left.read_text())))


def test_a_worker_killed_from_outside_costs_nothing(tmp_path):
    left = tmp_path / "pid"
    with RewardPool([(1.0, hangs_once)], workers=1, deadline_s=WAIT_S) as pool:
        future = pool.submit("", asked(str(left)))
        assert eventually(left.exists)
        os.kill(int(left.read_text()), signal.SIGKILL)
        assert future.result(WAIT_S) == [Score(1.0, True, Status.OK)]


def test_a_worker_killed_while_idle_costs_nothing(tmp_path):
    left = tmp_path / "pid"
    with RewardPool([(1.0, as_told)], workers=1) as pool:
        for _ in range(5):
            scored(pool, "pid", str(left))
            os.kill(int(left.read_text()), signal.SIGKILL)
            assert scored(pool, "modules") == [Score(1.0, True, Status.OK)]


def test_workers_are_replaced_after_so_many_jobs(tmp_path):
    pids = set()
    with RewardPool([(1.0, as_told)], workers=1, jobs_per_worker=2) as pool:
        for i in range(6):
            scored(pool, "pid", str(tmp_path / str(i)))
            pids.add((tmp_path / str(i)).read_text())
    assert len(pids) == 3


def test_one_reward_cannot_change_the_problem_for_the_next():
    with RewardPool([(1.0, as_told), (1.0, untouched)], workers=1) as pool:
        assert scored(pool, "change", [])[1].value == 1.0


def test_partials_and_callable_records():
    components: list[Component] = [(1.0, functools.partial(same)), (1.0, Within(limit=3))]
    with RewardPool(components, workers=1) as pool:
        assert pool.names == ("same", "Within")
        assert [score.value for score in scored(pool, "four", "four")] == [1.0, 0.0]


def test_functions_of_a_notebook_go_by_value():
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "LIMIT = 3\ndef short(completion, problem): return float(len(completion) < LIMIT)", notebook
    )
    with RewardPool([(1.0, notebook["short"])], workers=1) as pool:
        assert scored(pool, "ab")[0].value == 1.0
        assert scored(pool, "abc")[0].value == 0.0


def test_functions_of_a_file_loaded_by_path_go_by_value(tmp_path, monkeypatch):
    path = tmp_path / "experiment_of_mine.py"
    path.write_text("def helper(): return 0.5\ndef half(completion, problem): return helper()\n")
    spec = importlib.util.spec_from_file_location("experiment_of_mine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "experiment_of_mine", module)
    spec.loader.exec_module(module)
    with RewardPool([(1.0, module.half)], workers=1) as pool:
        assert scored(pool, "")[0].value == 0.5


def test_a_reward_that_does_not_pickle_is_named():
    lock = threading.Lock()

    def holds_a_lock(completion: str, problem: Problem) -> float:
        return float(lock.locked())

    with pytest.raises(TypeError, match="'holds_a_lock' cannot be sent.*lock.*top level"):
        RewardPool([(1.0, same), (1.0, holds_a_lock)])


@pytest.mark.parametrize("body", ["1 / 0", "import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_a_reward_that_does_not_import_is_named(tmp_path, monkeypatch, body):
    path = tmp_path / "breaks_elsewhere.py"
    path.write_text("def fine(completion, problem): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("breaks_elsewhere")
    path.write_text(f"{body}  # a worker imports it again\n")
    with pytest.raises(RuntimeError, match="reward 'fine' cannot be imported in a worker"):
        RewardPool([(1.0, same), (1.0, module.fine)])
    del sys.modules["breaks_elsewhere"]


def test_a_preload_that_does_not_import_is_named():
    with pytest.raises(RuntimeError, match=r"^no_such_module cannot be imported"):
        RewardPool([(1.0, same)], preload=["json", "no_such_module"])


def test_a_problem_that_does_not_pickle_is_named(pool):
    with pytest.raises(TypeError, match="problem 'p' cannot be sent"):
        pool.submit("", asked(threading.Lock()))


def test_closing_cancels_what_waits():
    pool = RewardPool([(1.0, as_told)], workers=1, deadline_s=WAIT_S)
    futures = [pool.submit("hang", asked()) for _ in range(3)]
    assert eventually(futures[0].running)
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        futures[0].result(0)
    assert futures[1].cancelled() and futures[2].cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("", asked())


def test_a_cancelled_job_is_not_run(tmp_path):
    with RewardPool([(1.0, as_told)], workers=1, deadline_s=DEADLINE_S) as pool:
        hung = pool.submit("hang", asked())
        assert eventually(hung.running)
        waiting = pool.submit("pid", asked(str(tmp_path / "pid")))
        assert waiting.cancel()
        assert scored(pool, "modules")[0].status == Status.OK
    assert not (tmp_path / "pid").exists()


def test_nothing_outlives_a_killed_trainer(tmp_path):
    program = f"""
import os, sys, test_pool
from rewards.pool import RewardPool
def hang(completion, problem):
    open({str(tmp_path)!r} + "/" + completion, "w").write(f"{{os.getpid()}} {{os.getppid()}}")
    while True: pass
pool = RewardPool([(1.0, hang)], workers=2, deadline_s=1000)
for name in "ab":
    pool.submit(name, test_pool.asked())
pool.submit("c", test_pool.asked()).result()
"""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    trainer = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}
    )
    left = [tmp_path / name for name in "ab"]
    assert eventually(lambda: all(file.exists() and file.read_text() for file in left))
    trainer.kill()
    trainer.wait()
    pids = {int(pid) for file in left for pid in file.read_text().split()}
    assert len(pids) == 3
    assert eventually(lambda: all(map(gone, pids)))


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"deadline_s": 0}, {"jobs_per_worker": 0}])
def test_impossible_pools_are_refused(wrong):
    with pytest.raises(ValueError, match="a pool needs"):
        RewardPool([(1.0, same)], **wrong)
    with pytest.raises(ValueError, match="a pool needs"):
        RewardPool([])


def test_stored_completions_can_be_scored_again(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def twice(completion, problem):\n"
        "    if completion == 'bug': raise KeyError\n"
        "    return float(completion == 2 * problem.reference)\n"
    )
    common: dict[str, Any] = {
        "step": 3,
        "uid": "u7",
        "prompt": "?",
        "finish_reason": "eos",
        "scores": {},
    }
    common["problem"] = {"uid": "u7", "reference": "ab", "gold": None, "meta": {}}
    rows = [("abab", 1.0), ("ab\u2028", 1.0), ("bug", 0.0), ("\ud800", 0.0)]
    with (tmp_path / "rollouts.jsonl").open("w") as file:
        for sample, (completion, reward) in enumerate(rows):
            row = common | {"sample": sample, "completion": completion, "reward": reward}
            file.write(json.dumps(row) + "\n")
    root = Path(__file__).parent.parent
    said = subprocess.run(
        [sys.executable, root / "tools/replay_rewards.py", "rollouts.jsonl", "mine:twice"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[1].split() == "twice 4 0.5000 0.2500 1 ok 3, crash 1".split()
    assert said[2].startswith("twice: step 3 u7 sample 1 (eos): stored 1, new 0 ok")
    assert len(said) == 3
