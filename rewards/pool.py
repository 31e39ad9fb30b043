"""Rewards in worker processes, with deadlines that a kill enforces.

The trainer's side of the pool (rewards/worker.py is the other). One thread here does nothing but
wait on sockets: it hands each idle worker one completion, reads one score a reward, and owns the
clock. A deadline needs a process that can be killed: alarms work only on a main thread and not
inside a C call, and the future of a `ProcessPoolExecutor` cannot be stopped once it runs.

Covered: rewards that hang, crash, print, leak, exit, allocate without end or return nonsense.
Not covered: running code that a model wrote. Rewards are trusted, the completions are only data.
"""

import collections
import contextlib
import dataclasses
import functools
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
from typing import Any, Self

import cloudpickle

from rewards import worker
from rewards.api import Component, Problem, Reward, Score, Status, component_names

_IMPORT_S = 300.0  # for all imports of all rewards together
_FORK_S = 30.0
_MAX_FAILED_STARTS = 3
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


@dataclasses.dataclass
class _Job:
    """One completion on its way through the pool; `scores` fills up from the left."""

    future: "Future[list[Score]]"
    payload: bytes
    scores: list[Score]
    lost_at: int | None = None  # the component that a worker already died under


@dataclasses.dataclass
class _Worker:
    number: int
    sock: socket.socket
    deadline: float
    ready: bool = False
    unread: bytes = b""
    job: _Job | None = None
    jobs_done: int = 0


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
    ) -> None:
        """Starts the workers and returns when every reward is imported there.

        Args:
          components: (weight, function) pairs; the weights are not looked at here.
          workers: how many completions are scored at once.
          deadline_s: seconds of wall time for one call of one reward.
          preload: modules to import before the clock runs; for imports inside a function's body.
          memory_gib: what a worker may allocate, None for no limit; kept on Linux only.
          jobs_per_worker: after so many completions a worker is replaced, in case a reward leaks.

        Raises:
          ValueError: no component, no worker, or no time.
          TypeError: a reward cannot be sent to another process.
          RuntimeError: a reward or a preloaded module cannot be imported there.
        """
        if not components or workers < 1 or deadline_s <= 0 or jobs_per_worker < 1:
            raise ValueError(
                "a pool needs a component, a worker, a deadline and a job for each worker, got "
                f"{len(components)} components, {workers=}, {deadline_s=}, {jobs_per_worker=}"
            )
        self.names = component_names(components)
        self._deadline_s = deadline_s
        self._jobs_per_worker = jobs_per_worker
        self._num_workers = workers
        self._labels = [*preload, *(f"reward {name!r}" for name in self.names)]
        self._setup = worker.Setup(
            tuple(preload),
            tuple(_pickled(function) for _, function in components),
            None if memory_gib is None else int(memory_gib * 2**30),
        )
        self._lock = threading.Lock()
        self._queue: collections.deque[_Job] = collections.deque()
        self._workers: dict[int, _Worker] = {}
        self._numbers = itertools.count()
        self._failed_starts = 0
        self._stopped: str | None = None  # why nothing more is taken
        self._zygote, self._control = _start_zygote(self._setup, self._labels)
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._supervise, name="reward-pool", daemon=True)
        self._thread.start()

    def submit(self, completion: str, problem: Problem) -> "Future[list[Score]]":
        """Queues one completion and returns at once; the result is one `Score` a component.

        Raises:
          RuntimeError: the pool is closed, or its workers could not be kept alive.
          TypeError: the problem cannot be pickled.
        """
        try:
            payload = pickle.dumps((completion, problem), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise TypeError(
                f"problem {problem.uid!r} cannot be sent to a reward worker: {error}. Keep its "
                "reference and meta to plain data"
            ) from error
        job = _Job(Future(), payload, [])
        with self._lock:
            if self._stopped is not None:
                raise RuntimeError(self._stopped)
            self._queue.append(job)
        self._wake()
        return job.future

    def close(self) -> None:
        """Kills the workers; what is not scored yet is cancelled. May be called twice."""
        with self._lock:
            self._stopped = self._stopped or "the reward pool is closed"
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
        finally:
            self._tear_down()

    def _step(self) -> None:
        while len(self._workers) < self._num_workers:
            self._spawn()
        self._hand_out()
        # No worker at all: each died as it was handed its job, and the next step starts others.
        soonest = min((each.deadline for each in self._workers.values()), default=0.0)
        wait = None if soonest == math.inf else max(0.0, soonest - time.monotonic())
        for key, _ in self._selector.select(wait):
            if key.fileobj is self._wake_out:
                self._wake_out.recv(65_536)
            elif key.fileobj is self._control:
                self._replace_zygote()
            elif key.data in self._workers:  # not retired earlier in this loop
                self._read(self._workers[key.data])
        self._expire()

    def _spawn(self) -> None:
        if self._failed_starts > _MAX_FAILED_STARTS * self._num_workers:
            raise RuntimeError("its workers die before they are ready")
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        with theirs:
            # A worker that does not read must not hold up the others for longer than this.
            ours.settimeout(self._deadline_s)
            with contextlib.suppress(OSError):  # no zygote: its end of file comes next
                command = worker.COMMAND.pack(worker.FORK, number)
                socket.send_fds(self._control, [command], [theirs.fileno()])
        self._workers[number] = _Worker(number, ours, time.monotonic() + _FORK_S)
        self._selector.register(ours, selectors.EVENT_READ, number)

    def _hand_out(self) -> None:
        for each in list(self._workers.values()):
            if not each.ready or each.job is not None:
                continue
            job = self._next_job()
            if job is None:
                return
            each.job = job
            indices = range(len(job.scores), len(self.names))
            try:
                worker.send_frame(each.sock, (indices, job.payload))
            except OSError:
                self._lose(each)
            else:
                each.deadline = time.monotonic() + self._deadline_s

    def _next_job(self) -> _Job | None:
        """The next job that nobody cancelled while it waited."""
        while True:
            with self._lock:
                if not self._queue:
                    return None
                job = self._queue.popleft()
            if job.future.running() or job.future.set_running_or_notify_cancel():
                return job

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
            elif each.job is not None:
                value, valid, status, detail = json.loads(line)
                each.job.scores.append(Score(value, valid, Status(status), detail))
                each.deadline = time.monotonic() + self._deadline_s
                self._finish_if_scored(each)

    def _finish_if_scored(self, each: _Worker) -> None:
        job = each.job
        if job is None or len(job.scores) < len(self.names):
            return
        each.job, each.deadline = None, math.inf
        each.jobs_done += 1
        job.future.set_result(job.scores)
        if each.jobs_done >= self._jobs_per_worker:
            self._retire(each)

    def _expire(self) -> None:
        """Kills the workers whose time is up, and goes on with the next reward of their job."""
        for each in list(self._workers.values()):
            if time.monotonic() < each.deadline or _has_input(each.sock):
                continue  # an answer that this thread was too busy to read was in time
            self._retire(each)
            if each.job is None:
                raise RuntimeError(f"a worker was not ready after {_FORK_S:.0f} s")
            detail = f"{self.names[len(each.job.scores)]} ran for over {self._deadline_s:g} s"
            each.job.scores.append(Score(0.0, True, Status.TIMEOUT, detail))
            self._go_on(each.job)

    def _lose(self, each: _Worker) -> None:
        """A worker died that we did not kill: its job gets one more try on another."""
        self._retire(each)
        job = each.job
        if job is None:
            return
        index = len(job.scores)
        if job.lost_at == index:
            detail = f"the worker died under {self.names[index]}, twice"
            job.scores.append(Score(0.0, False, Status.LOST, detail))
        job.lost_at = index
        self._go_on(job)

    def _go_on(self, job: _Job) -> None:
        if len(job.scores) == len(self.names):
            job.future.set_result(job.scores)
            return
        with self._lock:
            self._queue.appendleft(job)

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
        self._zygote, self._control = _start_zygote(self._setup, self._labels)
        self._selector.register(self._control, selectors.EVENT_READ)

    def _tear_down(self) -> None:
        with self._lock:
            jobs = [*self._queue, *(each.job for each in self._workers.values() if each.job)]
            self._queue.clear()
        for each in self._workers.values():
            each.sock.close()
        _stop_zygote(self._zygote, self._control)
        for sock in (self._wake_in, self._wake_out):
            sock.close()
        for job in jobs:
            if not job.future.cancel():
                job.future.set_exception(RuntimeError(self._stopped))


def _has_input(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _start_zygote(
    setup: worker.Setup, labels: Sequence[str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts the clean process and waits until it has imported everything in `labels`."""
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
    try:
        with contextlib.suppress(ConnectionError):  # told by the missing answer
            worker.send_frame(ours, setup)
        with ours.makefile("rb") as answers:
            for label in labels:
                try:
                    failure = json.loads(answers.readline() or '"the process died"')
                except TimeoutError:
                    failure = f"not done after {_IMPORT_S:.0f} s"
                if failure is not None:
                    raise RuntimeError(f"{label} cannot be imported in a worker:\n{failure}")
    except BaseException:
        _stop_zygote(process, ours)
        raise
    return process, ours


def _stop_zygote(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """Closing the socket asks it to kill its workers; on Linux they also die with it."""
    control.close()
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pickled(function: Reward) -> bytes:
    """By reference if a fresh interpreter can import it, else by value."""
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    home = getattr(plain, "__module__", None) or type(plain).__module__
    try:
        with _by_value_unless_importable(sys.modules.get(home)):
            payload: bytes = cloudpickle.dumps(function)
    except Exception as error:
        raise TypeError(
            f"reward {getattr(plain, '__name__', type(plain).__name__)!r} cannot be sent to a "
            f"worker: {error}. Define it at the top level of an importable module, and let it open "
            "files, locks and clients when it is called"
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
