"""The reward pool: what it says of rewards that misbehave, and what it leaves behind."""

import asyncio
import dataclasses
import email.message
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.api import (
    Batched,
    Component,
    Problem,
    Score,
    Status,
    Unavailable,
    Verdict,
    score_inline,
)
from rewards.formats import r1_format
from rewards.gates import gated
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


@pytest.mark.parametrize(
    "wrong", [{"workers": 0}, {"deadline_s": 0}, {"jobs_per_worker": 0}, {"max_open": 0}]
)
def test_impossible_pools_are_refused(wrong):
    with pytest.raises(ValueError, match="a pool needs"):
        RewardPool([(1.0, same)], **wrong)
    with pytest.raises(ValueError, match="a pool needs"):
        RewardPool([])


# ---- What a reward may say and ask -------------------------------------------------------------


def says_why(completion: str, problem: Problem) -> float:
    return Verdict(0.5, "half", completion)


def asks(completion: str, problem: Problem, *, length_tokens: int, limit: int = 10) -> float:
    return float(length_tokens <= limit)


async def awaited(completion: str, problem: Problem) -> float:
    return float(completion == problem.reference)


def test_verdicts_arrive():
    with RewardPool([(1.0, says_why)], workers=1) as pool:
        (score,) = scored(pool, "\ud800" + "x" * 1_000)
    assert (score.value, score.reason, score.status) == (0.5, "half", Status.OK)
    assert score.extracted == "\ud800" + "x" * 499 and 0 <= score.seconds < WAIT_S


def test_facts_go_to_those_that_ask():
    strict = functools.partial(asks, limit=3)
    components: list[Component] = [(1.0, asks), (1.0, gated(strict, by=same)), (1.0, awaited)]
    with RewardPool(components, workers=1) as pool:
        assert pool.names == ("asks", "asks_if_same", "awaited")
        facts = {"length_tokens": 5, "finish_reason": "eos"}
        scores = pool.submit("a", asked("a"), facts).result(WAIT_S)
        assert scores == score_inline(components, "a", asked("a"), facts)
        assert [score.value for score in scores] == [1.0, 0.0, 1.0]
        missing, *_ = scored(pool, "a", "a")
        assert missing.status == Status.CRASH and "length_tokens" in missing.detail


def test_a_reward_that_asks_for_what_nobody_knows_is_refused():
    def wants(completion: str, problem: Problem, *, temperature: float) -> float:
        return temperature

    with pytest.raises(TypeError, match="'wants' asks for temperature, .*may ask for length_tok"):
        RewardPool([(1.0, same), (1.0, wants)])


def test_a_gate_within_a_notebook_goes_by_value():
    notebook: dict[str, Any] = {"__name__": "__main__"}
    exec("def short(completion, problem): return float(len(completion) < 3)", notebook)
    with RewardPool([(1.0, gated(same, by=notebook["short"]))], workers=1) as pool:
        assert scored(pool, "ab", "ab")[0].value == 1.0
        assert scored(pool, "abc", "abc")[0].value == 0.0


# ---- Counters and the bound --------------------------------------------------------------------


def test_everything_is_counted():
    components = [(1.0, as_told), (1.0, same)]
    with RewardPool(components, workers=1, deadline_s=DEADLINE_S) as pool:
        for completion in ("hang", "raise", "exit hard", "nan", "modules"):
            scored(pool, completion)
        assert pool.counts() == {
            "submitted": 5,
            "finished": 5,
            "cancelled": 0,
            "timeouts": 1,
            "crashes": 1,
            "lost": 1,
            "bad_values": 1,
            "bad_references": 0,
            "unavailable": 0,
            "retries": 0,
            "restarts": 3,
            "open": 0,
        }


def test_a_full_pool_makes_the_caller_wait():
    with RewardPool([(1.0, as_told)], workers=1, deadline_s=WAIT_S, max_open=2) as pool:
        futures = [pool.submit("hang", asked()), pool.submit("modules", asked())]
        assert eventually(futures[0].running)
        third: list[Any] = []

        def submit() -> None:
            try:
                third.append(pool.submit("modules", asked()))
            except RuntimeError as error:
                third.append(str(error))

        caller = threading.Thread(target=submit)
        caller.start()
        caller.join(0.1)
        assert caller.is_alive() and pool.counts()["open"] == 2
        assert futures[1].cancel()
        pool.close()
        caller.join(WAIT_S)
        assert third == ["the reward pool is closed"]


def test_room_is_made_by_what_finishes():
    with RewardPool([(1.0, same)], workers=1, max_open=3) as pool:
        futures = [pool.submit(str(i), asked(str(i))) for i in range(50)]
        assert [future.result(WAIT_S)[0].value for future in futures] == [1.0] * 50
        assert pool.counts()["open"] == 0


# ---- Batched rewards ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Service:
    """A batch function that keeps a diary, and fails in the way and as often as it is told."""

    diary: str
    failure: str = ""
    times: int = 0

    def __call__(self, completions: list[str], problems: list[Problem]) -> list[Any]:
        with open(self.diary, "a") as file:
            file.write(" ".join(completions) + "\n")
        if len(Path(self.diary).read_text().splitlines()) <= self.times:
            self.fail()
        return [
            float(text == problem.reference) for text, problem in self.pairs(completions, problems)
        ]

    def pairs(self, completions: list[str], problems: list[Problem]) -> Any:
        return zip(completions, problems, strict=True)

    def fail(self) -> None:
        if self.failure == "hang":
            signal.pause()
        if self.failure == "exit":
            os._exit(0)
        raise {
            "refused": ConnectionRefusedError(),
            "429": urllib.error.HTTPError("u", 429, "slow down", email.message.Message(), None),
            "503": urllib.error.HTTPError("u", 503, "busy", email.message.Message(), None),
            "401": urllib.error.HTTPError("u", 401, "who?", email.message.Message(), None),
            "unavailable": Unavailable("later"),
            "bug": ValueError("a bug"),
        }[self.failure]


def batch_of(diary: Path, **settings: Any) -> Batched:
    told = {name: settings.pop(name) for name in ("failure", "times") if name in settings}
    defaults = {"size": 4, "wait_s": 0.05, "backoff_s": 0.01, "parallel": 1}
    return Batched(Service(str(diary), **told), **{**defaults, **settings})


def test_batches_fill_up_and_each_future_gets_its_own(tmp_path):
    diary = tmp_path / "diary"
    with RewardPool([(1.0, batch_of(diary, wait_s=WAIT_S)), (1.0, same)], workers=1) as pool:
        assert pool.names == ("Service", "same")
        futures = [pool.submit(str(i), asked(str(i - i % 2))) for i in range(8)]
        for i, future in enumerate(futures):
            assert future.result(WAIT_S) == [Score(float(i % 2 == 0), True, Status.OK)] * 2
    assert diary.read_text() == "0 1 2 3\n4 5 6 7\n"


def test_a_batch_does_not_wait_for_ever(tmp_path):
    diary = tmp_path / "diary"
    with RewardPool([(1.0, batch_of(diary))]) as pool:
        assert scored(pool, "a", "a") == [Score(1.0, True, Status.OK)]
    assert diary.read_text() == "a\n"


@pytest.mark.parametrize("failure", ["refused", "429", "503", "unavailable", "hang"])
def test_a_service_that_is_down_is_asked_again(tmp_path, failure):
    batched = batch_of(tmp_path / "d", failure=failure, times=2, timeout_s=DEADLINE_S)
    with RewardPool([(1.0, batched)]) as pool:
        assert scored(pool, "a", "a") == [Score(1.0, True, Status.OK)]
        assert pool.counts()["retries"] == 2 and pool.counts()["unavailable"] == 0


def test_a_service_that_stays_down_is_a_failure_and_no_zero(tmp_path):
    batched = batch_of(tmp_path / "d", failure="503", times=99, retries=2)
    with RewardPool([(1.0, batched), (1.0, same)], workers=1) as pool:
        down, fine = scored(pool, "a", "a")
    assert (down.value, down.valid, down.status) == (0.0, False, Status.UNAVAILABLE)
    assert "503" in down.detail and fine == Score(1.0, True, Status.OK)
    assert len((tmp_path / "d").read_text().splitlines()) == 3


@pytest.mark.parametrize("failure", ["401", "bug"])
def test_what_is_no_failure_of_the_service_is_not_tried_again(tmp_path, failure):
    with RewardPool([(1.0, batch_of(tmp_path / "d", failure=failure, times=9))]) as pool:
        futures = [pool.submit(text, asked()) for text in "ab"]
        assert {future.result(WAIT_S)[0].status for future in futures} == {Status.CRASH}
    assert len((tmp_path / "d").read_text().splitlines()) <= 2


def test_verdicts_are_not_asked_for_again(tmp_path):
    """Of a batch, only the rows without an answer go back."""

    def first_only(completions: list[str], problems: list[Problem]) -> list[Any]:
        with open(problems[0].reference, "a") as file:
            file.write(" ".join(completions) + "\n")
        busy = Score(0.0, False, Status.UNAVAILABLE, "busy")
        return [1.0, *[busy] * (len(completions) - 1)]

    batched = Batched(first_only, size=3, wait_s=WAIT_S, backoff_s=0.0, retries=9, parallel=1)
    with RewardPool([(1.0, batched)]) as pool:
        futures = [pool.submit(text, asked(str(tmp_path / "d"))) for text in "abc"]
        assert [future.result(WAIT_S)[0].value for future in futures] == [1.0] * 3
    asked_for = [set(line.split()) for line in (tmp_path / "d").read_text().splitlines()]
    assert [len(names) for names in asked_for] == [3, 2, 1]


def test_a_batch_whose_worker_dies_is_tried_one_by_one(tmp_path):
    def poisoned(completions: list[str], problems: list[Problem]) -> list[float]:
        if "poison" in completions:
            os._exit(0)
        return [1.0] * len(completions)

    with RewardPool([(1.0, Batched(poisoned, size=3, wait_s=WAIT_S, parallel=1))]) as pool:
        futures = [pool.submit(text, asked()) for text in ("a", "poison", "b")]
        statuses = [future.result(WAIT_S)[0].status for future in futures]
    assert statuses == [Status.OK, Status.LOST, Status.OK]


@pytest.mark.parametrize(
    ("values", "status", "detail"),
    [
        ([1.0], Status.CRASH, "2 completions went in, 1 values came out"),
        ([0.5, None], Status.BAD_VALUE, "got NoneType"),
        ([0.5, 2.0], Status.BAD_VALUE, "got 2.0"),
    ],
)
def test_a_batch_with_a_bad_value(values, status, detail):
    def told(completions: list[str], problems: list[Problem]) -> Any:
        return values

    with RewardPool([(1.0, Batched(told, size=2, wait_s=WAIT_S, parallel=1))]) as pool:
        futures = [pool.submit("", asked()) for _ in range(2)]
        scores = [future.result(WAIT_S)[0] for future in futures]
    assert scores[1].status == status and detail in scores[1].detail
    assert scores[0].valid == (len(values) == 2)


def test_an_async_batch_overlaps_its_own_waiting():
    async def judge(completions: list[str], problems: list[Problem], *, finish_reason: list) -> Any:
        meeting = asyncio.Barrier(len(completions))  # all must be under way at once

        async def one(text: str) -> float:
            await meeting.wait()
            return float(text in "abc")

        assert finish_reason == ["eos", None, "eos"]
        return await asyncio.gather(*map(one, completions))

    with RewardPool([(1.0, Batched(judge, size=3, wait_s=WAIT_S, parallel=1))]) as pool:
        eos = {"finish_reason": "eos"}
        futures = [
            pool.submit(*row) for row in (("a", asked(), eos), ("x", asked()), ("c", asked(), eos))
        ]
        scores = [future.result(WAIT_S)[0] for future in futures]
    assert [score.value for score in scores] == [1.0, 0.0, 1.0], scores


def test_closing_cancels_what_a_batch_waits_for(tmp_path):
    pool = RewardPool([(1.0, batch_of(tmp_path / "d", wait_s=WAIT_S)), (1.0, same)])
    future = pool.submit("a", asked())
    assert eventually(future.running)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        future.result(0)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"parallel": 0}, {"timeout_s": 0}, {"retries": -1}, {"wait_s": -1}]
)
def test_impossible_batches_are_refused(wrong):
    with pytest.raises(ValueError, match="a batch needs"):
        Batched(lambda completions, problems: [], **wrong)


def test_a_batch_that_is_not_pooled():
    batched = Batched(lambda completions, problems: [0.25])
    assert score_inline([(1.0, batched), (1.0, r1_format)], "", asked())[0].value == 0.25


def test_twenty_thousand_jobs_are_soaked_elsewhere(tmp_path):
    """A short soak: the long one is tools/soak_pool.py without arguments."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, root / "tools/soak_pool.py", "--jobs=400", "--kill_every_s=0.1"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Announced:
    """A reward that says at start what it found on this machine."""

    def prepare(self) -> str:
        return "announced: two cores"

    def __call__(self, completion: str, problem: Problem) -> float:
        return 1.0


def test_what_a_reward_finds_at_start_is_there_for_the_log():
    with RewardPool([(1.0, Announced()), (1.0, Announced())], workers=1) as pool:
        assert pool.notes == ["announced: two cores"] * 2
