"""Rewards in worker processes, with deadlines that a kill enforces.

The trainer's side of the pool (rewards/worker.py is the other). One thread here does nothing but
wait on sockets: it hands each idle worker one completion, reads one score a reward, and owns the
clock. A deadline needs a process that can be killed: alarms work only on a main thread and not
inside a C call, and the future of a `ProcessPoolExecutor` cannot be stopped once it runs.

Workers are in lanes: all plain rewards share the first, each batched one has its own, so that a
judge that takes seconds to answer holds up nobody's arithmetic.

Covered: rewards that hang, crash, print, leak, exit, allocate without end or return nonsense;
services that are down for a while. Not covered: running code that a model wrote. Rewards are
trusted, the completions are only data.
"""

import collections
import contextlib
import dataclasses
import heapq
import importlib.machinery
import itertools
import json
import math
import os
import pickle
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import ModuleType, TracebackType
from typing import Self

import cloudpickle

from rewards import worker
from rewards.api import (
    Batched,
    Component,
    Facts,
    Problem,
    Reward,
    Score,
    Status,
    component_names,
    parts,
    reward_name,
    wanted_facts,
)

_IMPORT_S = 300.0  # for all imports of all rewards together
_FORK_S = 30.0
_MAX_FAILED_STARTS = 3
_COUNTED = {
    Status.TIMEOUT: "timeouts",
    Status.CRASH: "crashes",
    Status.BAD_REFERENCE: "bad_references",
    Status.LOST: "lost",
    Status.BAD_VALUE: "bad_values",
    Status.UNAVAILABLE: "unavailable",
}
# Rewards must not take the trainer's accelerator, and must agree on set order on every host; one
# BLAS thread because the workers are the parallelism, and a process with threads must not fork.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rewards.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclasses.dataclass(eq=False)
class _Job:
    """One completion; `scores` has a place for each component."""

    future: "Future[list[Score]]"
    payload: bytes
    scores: list[Score | None]
    dropped: bool = False  # cancelled before anything was done for it


@dataclasses.dataclass(eq=False)
class _Entry:
    """One completion on its way through one lane."""

    job: _Job
    indices: list[int]  # the lane's components that are still to be scored, in order
    due: float  # when it should wait no longer for others to join it
    lost_at: int | None = None  # the component that a worker already died under
    tries: int = 0

    def __lt__(self, other: "_Entry") -> bool:
        return self.due < other.due


@dataclasses.dataclass(eq=False)
class _Lane:
    """Components that run on the same workers, and the completions that wait for them."""

    indices: list[int]
    num_workers: int
    deadline_s: float
    batched: Batched | None = None  # None: plain rewards, one completion at a time
    waiting: collections.deque[_Entry] = dataclasses.field(default_factory=collections.deque)
    later: list[_Entry] = dataclasses.field(default_factory=list)  # heap of what is tried again

    def take(self, now: float) -> list[_Entry]:
        """What the next idle worker should do; nothing while it is better to wait for more."""
        while self.later and self.later[0].due <= now:
            self.waiting.appendleft(heapq.heappop(self.later))
        size = self.batched.size if self.batched else 1
        if not self.waiting or (len(self.waiting) < size and self.waiting[0].due > now):
            return []
        taken = [self.waiting.popleft()]
        # A worker died under what has `lost_at`; alone, it cannot take others with it again.
        while taken[0].lost_at is None and self.waiting and len(taken) < size:
            if self.waiting[0].lost_at is not None:
                break
            taken.append(self.waiting.popleft())
        return taken

    def next_due(self) -> float:
        """When `take` gives something though nothing new comes."""
        return min((entry.due for entry in [*self.later[:1], *self._first()]), default=math.inf)

    def _first(self) -> list[_Entry]:
        return [self.waiting[0]] if self.waiting else []


@dataclasses.dataclass(eq=False)
class _Worker:
    number: int
    lane: _Lane
    sock: socket.socket
    deadline: float
    ready: bool = False
    unread: bytes = b""
    entries: list[_Entry] = dataclasses.field(default_factory=list)
    calls_done: int = 0


class RewardPool:
    """Scores completions in worker processes.

    Use it as a context manager, or call `close`. Nothing outlives the trainer: the workers also die
    if it is killed.
    """

    def __init__(
        self,
        components: Sequence[Component],
        *,
        workers: int = 2,
        deadline_s: float = 2.0,
        preload: Sequence[str] = (),
        memory_gib: float | None = 4.0,
        jobs_per_worker: int = 10_000,
        max_open: int = 20_000,
    ) -> None:
        """Starts the workers and returns when every reward is imported there.

        Args:
          components: (weight, function) pairs; the weights are not looked at here.
          workers: how many completions are scored at once; a `Batched` component has its own.
          deadline_s: seconds of wall time for one call of one plain reward.
          preload: modules to import before the clock runs; for imports inside a function's body.
          memory_gib: what a worker may allocate, None for no limit; kept on Linux only.
          jobs_per_worker: after so many completions a worker is replaced, in case a reward leaks.
          max_open: completions that may wait or be under way; `submit` blocks beyond.

        Raises:
          ValueError: no component, no worker, or no time.
          TypeError: a reward cannot be sent to another process, or asks for an unknown fact.
          RuntimeError: a reward or a preloaded module cannot be imported there.
        """
        if not components or min(workers, jobs_per_worker, max_open) < 1 or deadline_s <= 0:
            raise ValueError(
                "a pool needs a component, a worker, a deadline, a job for each worker and room "
                f"for one, got {len(components)} components, {workers=}, {deadline_s=}, "
                f"{jobs_per_worker=}, {max_open=}"
            )
        functions = [function for _, function in components]
        for function in functions:
            wanted_facts(function.function if isinstance(function, Batched) else function)
        self.names = component_names(components)
        self._jobs_per_worker = jobs_per_worker
        self._max_open = max_open
        self._lanes = _lanes(functions, workers, deadline_s)
        self._labels = [*preload, *(f"reward {name!r}" for name in self.names)]
        self._setup = worker.Setup(
            tuple(preload),
            tuple(_pickled(function) for function in functions),
            None if memory_gib is None else int(memory_gib * 2**30),
        )
        self._lock = threading.Condition()  # notified when there is room again
        self._open = 0  # completions submitted and not yet scored
        self._counts = dict.fromkeys(
            ["submitted", "finished", "cancelled", "retries", "restarts", *_COUNTED.values()], 0
        )
        self._workers: dict[int, _Worker] = {}
        self._numbers = itertools.count()
        self._failed_starts = 0
        self._stopped: str | None = None  # why nothing more is taken
        self._zygote, self._control, self.notes = _start_zygote(self._setup, self._labels)
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._supervise, name="reward-pool", daemon=True)
        self._thread.start()

    def submit(
        self, completion: str, problem: Problem, facts: Facts | None = None
    ) -> "Future[list[Score]]":
        """Queues one completion; the result is one `Score` a component.

        Returns at once, unless `max_open` completions are not scored yet: then it waits until one
        is. (Not in a future's callback: it runs on the thread that would make room.)

        Args:
          completion: what the model wrote.
          problem: what it was asked.
          facts: the `rewards.api.FACTS` that are known.

        Raises:
          RuntimeError: the pool is closed, or its workers could not be kept alive.
          TypeError: the problem cannot be pickled.
        """
        try:
            row = (completion, problem, dict(facts or {}))
            payload = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise TypeError(
                f"problem {problem.uid!r} cannot be sent to a reward worker: {error}. Keep its "
                "reference and meta to plain data"
            ) from error
        job = _Job(Future(), payload, [None] * len(self.names))
        with self._lock:
            while self._open >= self._max_open and self._stopped is None:
                if threading.current_thread() is self._thread:
                    break
                self._lock.wait()
            if self._stopped is not None:
                raise RuntimeError(self._stopped)
            self._open += 1
            self._counts["submitted"] += 1
            for lane in self._lanes:
                wait_s = lane.batched.wait_s if lane.batched else 0.0
                lane.waiting.append(_Entry(job, list(lane.indices), time.monotonic() + wait_s))
        self._wake()
        return job.future

    def counts(self) -> dict[str, int]:
        """What happened since the start, and `open`: the completions not scored yet.

        `submitted`, `finished` and `cancelled` count completions; `timeouts`, `crashes`, `lost`,
        `bad_values`, `bad_references` and `unavailable` count scores by status; `retries` counts
        completions given to a batched reward again; `restarts` counts workers replaced because
        they died or ran out of time.
        """
        with self._lock:
            return {**self._counts, "open": self._open}

    def close(self) -> None:
        """Kills the workers; what is not scored yet is cancelled. May be called twice."""
        with self._lock:
            self._stopped = self._stopped or "the reward pool is closed"
            self._lock.notify_all()
        self._wake()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: it is over
            self._wake_in.send(b"\0")

    # All below runs on the supervisor thread, which alone touches workers and sockets.

    def _supervise(self) -> None:
        try:
            with selectors.DefaultSelector() as self._selector:
                self._selector.register(self._wake_out, selectors.EVENT_READ)
                self._selector.register(self._control, selectors.EVENT_READ)
                while self._stopped is None:
                    self._step()
        except BaseException as error:
            with self._lock:
                self._stopped = f"the reward pool stopped: {error}"
                self._lock.notify_all()
        finally:
            self._tear_down()

    def _step(self) -> None:
        for lane in self._lanes:
            alive = sum(each.lane is lane for each in self._workers.values())
            for _ in range(lane.num_workers - alive):
                self._spawn(lane)
        due = self._hand_out()
        # No worker at all: each died as it was handed its job, and the next step starts others.
        soonest = min((each.deadline for each in self._workers.values()), default=0.0)
        soonest = min(soonest, due)
        wait = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
        keys = [key for key, _ in self._selector.select(wait)]
        # If the zygote died, its workers are dying too: they must not be handed each other's jobs.
        for key in sorted(keys, key=lambda key: key.fileobj is not self._control):
            if key.fileobj is self._wake_out:
                self._wake_out.recv(65_536)
            elif key.fileobj is self._control:
                self._replace_zygote()
            elif key.data in self._workers:  # not retired earlier in this loop
                self._read(self._workers[key.data])
        self._expire()

    def _spawn(self, lane: _Lane) -> None:
        if self._failed_starts > _MAX_FAILED_STARTS * sum(each.num_workers for each in self._lanes):
            raise RuntimeError("its workers die before they are ready")
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        with theirs:
            # A worker that does not read must not hold up the others for longer than this.
            ours.settimeout(lane.deadline_s)
            with contextlib.suppress(OSError):  # no zygote: its end of file comes next
                command = worker.COMMAND.pack(worker.FORK, number)
                socket.send_fds(self._control, [command], [theirs.fileno()])
        self._workers[number] = _Worker(number, lane, ours, time.monotonic() + _FORK_S)
        self._selector.register(ours, selectors.EVENT_READ, number)

    def _hand_out(self) -> float:
        """Gives idle workers something to do; returns when to look again though nothing comes."""
        soonest = math.inf
        for each in list(self._workers.values()):
            if not each.ready or each.entries:
                continue
            each.entries = self._next_entries(each.lane)
            if not each.entries:
                soonest = min(soonest, each.lane.next_due())
                continue
            payloads = [entry.job.payload for entry in each.entries]
            try:
                worker.send_frame(each.sock, (each.entries[0].indices, payloads))
            except OSError:
                self._lose(each)
            else:
                each.deadline = time.monotonic() + each.lane.deadline_s
        return soonest

    def _next_entries(self, lane: _Lane) -> list[_Entry]:
        """What is next in a lane, without what was cancelled while it waited."""
        while True:
            with self._lock:
                taken = lane.take(time.monotonic())
            kept = [entry for entry in taken if self._begin(entry.job)]
            if kept or not taken:
                return kept

    def _begin(self, job: _Job) -> bool:
        """Marks a job as running, the first time; False if it was cancelled before that."""
        if job.dropped or job.future.running():
            return not job.dropped
        job.dropped = not job.future.set_running_or_notify_cancel()
        if job.dropped:
            self._close_one("cancelled")
        return not job.dropped

    def _close_one(self, outcome: str) -> None:
        with self._lock:
            self._open -= 1
            self._counts[outcome] += 1
            self._lock.notify()

    def _count(self, event: str) -> None:
        with self._lock:
            self._counts[event] += 1

    def _read(self, each: _Worker) -> None:
        try:
            received = each.sock.recv(65_536)
        except OSError:
            received = b""
        if not received:
            self._failed_starts += not each.ready
            self._lose(each)
            return
        *lines, each.unread = (each.unread + received).split(b"\n")
        for line in lines:
            if not each.ready:
                each.ready, each.deadline = True, math.inf
                self._failed_starts = 0
            elif each.entries:
                each.deadline = time.monotonic() + each.lane.deadline_s
                entries = list(each.entries)
                for entry, fields in zip(entries, json.loads(line), strict=True):
                    self._record(each.lane, entry, Score.from_json(fields))
                if each.lane.batched or not entries[0].indices:
                    self._idle(each)

    def _idle(self, each: _Worker) -> None:
        each.entries, each.deadline = [], math.inf
        each.calls_done += 1
        if each.calls_done >= self._jobs_per_worker:
            self._retire(each)

    def _record(self, lane: _Lane, entry: _Entry, score: Score) -> None:
        """Notes the score of an entry's next component, or has a service asked again later."""
        batched = lane.batched
        if batched and score.status is Status.UNAVAILABLE and entry.tries < batched.retries:
            self._count("retries")
            entry.due = time.monotonic() + batched.backoff_s * 2**entry.tries
            entry.tries += 1
            heapq.heappush(lane.later, entry)
            return
        job = entry.job
        job.scores[entry.indices.pop(0)] = score
        if score.status in _COUNTED:
            self._count(_COUNTED[score.status])
        done = [each for each in job.scores if each is not None]
        if len(done) == len(job.scores):
            self._close_one("finished")
            job.future.set_result(done)

    def _expire(self) -> None:
        """Kills the workers whose time is up, and goes on with the next reward of their job."""
        for each in list(self._workers.values()):
            now = time.monotonic()
            if now < each.deadline or _has_input(each.sock):
                continue  # an answer that this thread was too busy to read was in time
            self._retire(each)
            if not each.entries:
                raise RuntimeError(f"a worker was not ready after {_FORK_S:.0f} s")
            self._count("restarts")
            lane = each.lane
            status, valid = Status.TIMEOUT, True
            if lane.batched:  # says nothing of the completions, so it is not held against them
                status, valid = Status.UNAVAILABLE, False
            detail = f"{self._current(each)} ran for over {lane.deadline_s:g} s"
            seconds = now - each.deadline + lane.deadline_s
            for entry in each.entries:
                late = Score(0.0, valid, status, detail, seconds=seconds)
                self._record(lane, entry, late)
                self._go_on(lane, entry)

    def _lose(self, each: _Worker) -> None:
        """A worker died that we did not kill: its job gets one more try on another."""
        self._retire(each)
        self._count("restarts")
        for entry in each.entries:
            index = entry.indices[0]
            if entry.lost_at == index:
                detail = f"the worker died under {self._current(each)}, twice"
                self._record(each.lane, entry, Score(0.0, False, Status.LOST, detail))
            entry.lost_at = index
            self._go_on(each.lane, entry)

    def _current(self, each: _Worker) -> str:
        return self.names[each.entries[0].indices[0]]

    def _go_on(self, lane: _Lane, entry: _Entry) -> None:
        """Puts an entry back at the head of its lane, if something is left to be scored."""
        if entry.indices and entry not in lane.later:
            with self._lock:
                entry.due = 0.0
                lane.waiting.appendleft(entry)

    def _retire(self, each: _Worker) -> None:
        """Forgets a worker and has it killed; `_step` starts another in its place."""
        del self._workers[each.number]
        self._selector.unregister(each.sock)
        each.sock.close()
        with contextlib.suppress(OSError):
            self._control.sendall(worker.COMMAND.pack(worker.KILL, each.number))

    def _replace_zygote(self) -> None:
        """The zygote was killed, and its workers with it: starts another."""
        self._failed_starts += 1
        for each in list(self._workers.values()):
            self._lose(each)
        self._selector.unregister(self._control)
        _stop_zygote(self._zygote, self._control)
        self._zygote, self._control, _ = _start_zygote(self._setup, self._labels)
        self._selector.register(self._control, selectors.EVENT_READ)

    def _tear_down(self) -> None:
        with self._lock:
            entries = [entry for lane in self._lanes for entry in [*lane.waiting, *lane.later]]
            entries += [entry for each in self._workers.values() for entry in each.entries]
            for lane in self._lanes:
                lane.waiting.clear()
                lane.later.clear()
            self._open = 0
        for each in self._workers.values():
            each.sock.close()
        _stop_zygote(self._zygote, self._control)
        for sock in (self._wake_in, self._wake_out):
            sock.close()
        for job in {id(entry.job): entry.job for entry in entries}.values():
            if not job.future.cancel() and not job.future.done():
                job.future.set_exception(RuntimeError(self._stopped))


def _lanes(functions: Sequence[Reward | Batched], workers: int, deadline_s: float) -> list[_Lane]:
    lanes = [
        _Lane([index], function.parallel, function.timeout_s, function)
        for index, function in enumerate(functions)
        if isinstance(function, Batched)
    ]
    plain = [i for i, function in enumerate(functions) if not isinstance(function, Batched)]
    return [_Lane(plain, workers, deadline_s), *lanes] if plain else lanes


def _has_input(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _start_zygote(
    setup: worker.Setup, labels: Sequence[str]
) -> tuple[subprocess.Popen[bytes], socket.socket, list[str]]:
    """Starts the clean process and waits until it has imported everything in `labels`.

    Returns:
      The process, the socket to it, and what the rewards want in the log of the run.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        arguments = [
            json.dumps([str(entry) for entry in sys.path]),
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
    ours.settimeout(_IMPORT_S)
    notes: list[str] = []
    try:
        with contextlib.suppress(ConnectionError):  # told by the missing answer
            worker.send_frame(ours, setup)
        with ours.makefile("rb") as answers:
            for label in labels:
                try:
                    answer = json.loads(answers.readline() or '{"failure": "the process died"}')
                except TimeoutError:
                    answer = {"failure": f"not done after {_IMPORT_S:.0f} s"}
                if "failure" in answer:
                    raise RuntimeError(
                        f"{label} cannot be imported in a worker:\n{answer['failure']}"
                    )
                notes += answer["notes"]
    except BaseException:
        _stop_zygote(process, ours)
        raise
    return process, ours, notes


def _stop_zygote(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """Closing the socket asks it to kill its workers; on Linux they also die with it."""
    control.close()
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pickled(function: Reward | Batched) -> bytes:
    """By reference if a fresh interpreter can import it, else by value."""
    homes = {getattr(part, "__module__", None) or type(part).__module__ for part in parts(function)}
    try:
        with contextlib.ExitStack() as stack:
            for home in sorted(homes):
                stack.enter_context(_by_value_unless_importable(sys.modules.get(home)))
            payload: bytes = cloudpickle.dumps(function)
    except Exception as error:
        raise TypeError(
            f"reward {reward_name(function)!r} cannot be sent to a worker: {error}. Define it at "
            "the top level of an importable module, and let it open files, locks and clients when "
            "it is called"
        ) from error
    return payload


@contextlib.contextmanager
def _by_value_unless_importable(module: ModuleType | None) -> Iterator[None]:
    """Modules loaded from a path, as experiment files are, exist only in this process."""
    if module is None or module.__name__ == "__main__" or _importable(module.__name__):
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    """Whether a fresh interpreter with our `sys.path` would find this very module.

    `importlib.util.find_spec` does not do: it believes `sys.modules`.
    """
    parent, _, _ = name.rpartition(".")
    if parent and (parent not in sys.modules or not _importable(parent)):
        return False
    path = getattr(sys.modules[parent], "__path__", None) if parent else None
    loaded = getattr(sys.modules[name], "__file__", None)
    for finder in sys.meta_path:
        spec: importlib.machinery.ModuleSpec | None = finder.find_spec(name, path)
        if spec is not None:
            return loaded is None or spec.origin == loaded
    return False
