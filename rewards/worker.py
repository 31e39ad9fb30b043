"""The far side of the pool: one clean process that forks the workers.

The trainer has JAX threads and must never fork. It starts this module in a fresh interpreter (the
zygote), sends it the reward functions once, and from then on only asks it to fork or to kill. A
fork of a process with everything imported costs a millisecond, so killing a worker is cheap.

On the control socket: one frame in (`Setup`), one JSON line out for each thing loaded, then
commands in, each a verb and a worker's number, a fork with the worker's socket beside it. On a
worker's socket: frames (component indices, pickled rows) in; "ready", then for each component one
JSON line out, a list of scores. The worker knows no deadlines; the trainer's side owns the clock.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Sequence
from typing import Any, BinaryIO

from rewards.api import Batched, Reward, Row, Score, Status, judge, judge_batch, parts

COMMAND = struct.Struct("!cQ")
FORK, KILL = b"F", b"K"
READY = b"ready\n"

_LENGTH = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1
_ORPHAN_CHECK_S = 1.0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the zygote is told once.

    Attributes:
      preload: modules to import before anything else.
      functions: each reward, pickled by itself so that a failure can name it.
      memory_bytes: what a worker may map beyond what the zygote has, None for no limit.
    """

    preload: tuple[str, ...]
    functions: tuple[bytes, ...]
    memory_bytes: int | None


def send_frame(sock: socket.socket, content: object) -> None:
    """Sends one pickled object with its length before it."""
    payload = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    sock.sendall(_LENGTH.pack(len(payload)) + payload)


def main(control_fd: int, parent: int) -> None:
    """Runs the zygote until the trainer's process `parent` closes the control socket or dies."""
    # A preemption notice or Ctrl-C is for the trainer, which may still want its scores.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = socket.socket(fileno=control_fd)
    control.set_inheritable(False)
    with control.makefile("rb") as stream:
        setup: Setup = _read_frame(stream)
    functions = _load(control, setup)
    gc.collect()
    gc.freeze()  # else the first collection of each worker copies every page
    _serve(control, functions, setup.memory_bytes, parent)


def _read_frame(stream: BinaryIO) -> Any:
    """The next frame's object; EOFError once the other side is gone."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(_LENGTH.unpack(header)[0]))


def _load(control: socket.socket, setup: Setup) -> list[Reward | Batched]:
    """Imports everything, reporting after each thing; exits at the first that fails."""
    functions: list[Reward | Batched] = []
    try:
        for name in setup.preload:
            importlib.import_module(name)
            _send_line(control, {"notes": []})
        for payload in setup.functions:
            functions.append(pickle.loads(payload))
            for part in parts(functions[-1]):
                home = sys.modules.get(getattr(part, "__module__", ""))
                for name in getattr(home, "PRELOAD", ()):  # what its body imports
                    importlib.import_module(name)
            _send_line(control, {"notes": _start(functions[-1], "prepare")})
    except BaseException:
        _send_line(control, {"failure": traceback.format_exc()[-4_000:]})
        sys.exit(1)
    return functions


def _start(function: Reward | Batched, stage: str) -> list[str]:
    """Lets a reward begin what it needs: `prepare` in the zygote, `warm_up` in each worker.

    Returns:
      The lines that it wants in the log of the run.
    """
    begins = [getattr(part, stage, None) for part in parts(function)]
    return [line for begin in begins if begin is not None and (line := begin())]


def _send_line(sock: socket.socket, content: object) -> None:
    sock.sendall(json.dumps(content).encode() + b"\n")


def _serve(
    control: socket.socket,
    functions: Sequence[Reward | Batched],
    memory_bytes: int | None,
    parent: int,
) -> None:
    alive: dict[int, int] = {}  # worker's number -> pid
    dying: list[int] = []
    # Closing the socket says that the trainer is gone, unless another child of it holds a copy.
    while os.getppid() == parent:
        readable, _, _ = select.select([control], [], [], _ORPHAN_CHECK_S)
        dying = [pid for pid in dying if os.waitpid(pid, os.WNOHANG)[0] == 0]
        if not readable:
            continue
        command, fds, _, _ = socket.recv_fds(control, COMMAND.size, 1)
        if not command:
            break
        verb, number = COMMAND.unpack(command)
        if verb == FORK:
            alive[number] = _fork(control, fds[0], functions, memory_bytes)
        elif number in alive:
            dying.append(alive.pop(number))
            _kill_group(dying[-1])
    for pid in alive.values():
        _kill_group(pid)


def _kill_group(pid: int) -> None:
    """Kills a worker and what it started. It is not reaped yet, so the number is still its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _fork(
    control: socket.socket, fd: int, functions: Sequence[Reward | Batched], memory_bytes: int | None
) -> int:
    zygote = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            control.close()
            _confine(zygote, memory_bytes)
            _work(fd, functions)
        finally:
            os._exit(1)
    os.close(fd)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)  # on both sides of the fork: whichever comes first
    return pid


def _confine(zygote: int, memory_bytes: int | None) -> None:
    """Ties the worker's life to the zygote's, silences it and limits its memory."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != zygote:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None and sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = mapped + memory_bytes
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _work(fd: int, functions: Sequence[Reward | Batched]) -> None:
    """Answers jobs one at a time until the socket is closed."""
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    stream = sock.makefile("rb")
    for function in functions:
        _start(function, "warm_up")
    sock.sendall(READY)
    while True:
        try:
            indices, payloads = _read_frame(stream)
        except EOFError:
            os._exit(0)
        for index in indices:
            scores = _score(functions[index], payloads)
            _send_line(sock, [dataclasses.asdict(score) for score in scores])


def _score(function: Reward | Batched, payloads: Sequence[bytes]) -> list[Score]:
    """Unpickles the rows anew for each reward, so that none sees what another did to a problem."""
    try:
        rows: list[Row] = [pickle.loads(payload) for payload in payloads]
    except Exception as error:
        detail = f"the problem cannot be unpickled: {error!r:.200}"
        return [Score(0.0, False, Status.CRASH, detail)] * len(payloads)
    if isinstance(function, Batched):
        return judge_batch(function, rows)
    return [judge(function, *row) for row in rows]
