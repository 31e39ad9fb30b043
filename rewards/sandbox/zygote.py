"""The inside of the sandbox: one process with the standard library imported, forked for each job.

Started in an interpreter of its own by rewards/sandbox/box.py. For every byte on the control socket
it forks a process, which gets the job's file descriptors, locks itself up and runs the program, and
it reports how that one ended. A fork costs a millisecond or two, a new interpreter thirty.

Everything in the program's own process is under the program's control, this module's code
included. Nothing that it says is believed: it can only answer calls, and the answers are judged
elsewhere.
"""

import atexit
import base64
import builtins
import contextlib
import dataclasses
import fcntl
import gc
import importlib
import io
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rewards.sandbox import lockdown
from rewards.sandbox.values import Malformed, Opaque, decode, encode

LENGTH = struct.Struct("!I")
READY = b"ready\n"
CHANNEL = 3  # the descriptor that calls come in by, after the three standard ones

_HIGH = 100  # the job's descriptors are moved here while the low ones are rearranged
_MAX_TEXT = 300
_PRELOAD = (
    "ast bisect calendar cmath collections copy dataclasses datetime decimal enum fractions "
    "functools hashlib heapq itertools math operator queue random re statistics string textwrap "
    "time typing _sitebuiltins"
).split()


class CalleeError(Exception):
    """In the test's process: the program raised something that is no builtin exception."""


def main(control_fd: int, config: Mapping[str, Any]) -> None:
    """Serves jobs until the control socket is closed.

    Args:
      control_fd: one byte in for each job, with [report, stdin, stdout, stderr, channel?].
      config: uid to become, parent to die with, tier, seccomp filter, readable folders.
    """
    for name in _PRELOAD:
        importlib.import_module(name)
    quitter = sys.modules["_sitebuiltins"].Quitter  # `-S` leaves these two out
    for name in ("exit", "quit"):
        setattr(builtins, name, quitter(name, "Ctrl-D (i.e. EOF)"))
    if config["uid"] is not None:
        lockdown.become(config["uid"])
    config = {**config, "own_uid": os.getuid(), "own_gid": os.getgid()}
    if config["parent"]:
        lockdown.die_with_parent(config["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=control_fd)
    control.sendall(READY)
    _Keeper(control, config).run()


@dataclasses.dataclass
class _Job:
    pid: int
    process: int  # a descriptor that becomes readable when it has ended
    report: int
    told: int  # a pipe with "ok", or with why the program was not run


class _Keeper:
    """Starts jobs and ends them."""

    def __init__(self, control: socket.socket, config: Mapping[str, Any]) -> None:
        self._control = control
        self._config = config
        self._jobs: dict[int, _Job] = {}  # by both descriptors that are waited on
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def run(self) -> None:
        """Until the other side closes the control socket."""
        while True:
            for fd, _ in self._poll.poll():
                job = self._jobs.get(fd)
                if fd == self._control.fileno():
                    self._start()
                elif job is not None and fd == job.process:
                    self._finish(job)
                elif job is not None:  # nobody listens any more
                    self._poll.unregister(fd)
                    self._kill(job)

    def _start(self) -> None:
        message, fds, _, _ = socket.recv_fds(self._control, 1, 8)
        if not message:
            for job in self._jobs.values():
                self._kill(job)
            os._exit(0)
        told, telling = os.pipe()
        keeper = os.getpid()
        try:
            pid = lockdown.fork(namespaces=self._config["tier"] == "namespaces")
        except OSError as error:
            os.write(fds[0], json.dumps({"error": str(error)}).encode())
            pid = -1
        if pid == 0:
            _become_program(fds, self._config, telling, keeper)
        for fd in (*fds[1:], telling):
            os.close(fd)
        if pid < 0:
            os.close(fds[0])
            os.close(told)
            return
        job = _Job(pid, os.pidfd_open(pid), fds[0], told)
        self._jobs[job.process] = self._jobs[job.report] = job
        self._poll.register(job.process, select.POLLIN)
        self._poll.register(job.report, select.POLLRDHUP)

    def _kill(self, job: _Job) -> None:
        """In namespaces the whole tree dies; with Landlock there is only this process."""
        os.kill(job.pid, signal.SIGKILL)
        if self._config["tier"] == "none":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)

    def _finish(self, job: _Job) -> None:
        self._kill(job)  # what it left behind, where there are no namespaces
        _, status = os.waitpid(job.pid, 0)
        told = os.read(job.told, 4_096).decode(errors="replace")
        said = {
            "error": "" if told == "ok" else told or "it died before the program ran",
            "code": os.waitstatus_to_exitcode(status),
        }
        with contextlib.suppress(OSError):
            os.write(job.report, json.dumps(said).encode())
        for fd in (job.process, job.report):
            del self._jobs[fd]
            with contextlib.suppress(KeyError):  # a report that was hung up is out already
                self._poll.unregister(fd)
        for fd in (job.process, job.report, job.told):
            os.close(fd)


def _become_program(
    fds: Sequence[int], config: Mapping[str, Any], telling: int, keeper: int
) -> None:
    """Locks this process up and runs the program in it. Never returns."""
    try:
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, _HIGH) for fd in (*fds, telling)]
        for place, fd in enumerate(fds[1:-1]):
            os.dup2(fd, place)
        telling = fds[-1]
        request = json.loads(_read(fds[0], LENGTH.unpack(_read(fds[0], LENGTH.size))[0]))
        _lock_up(request, config, keeper)
        os.write(telling, b"ok")
        os.closerange(len(fds) - 2, 1 << 20)
    except BaseException as error:
        os.write(telling, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    gc.enable()
    try:
        _KINDS[request["kind"]](request)
    finally:
        os._exit(1)


def _lock_up(request: Mapping[str, Any], config: Mapping[str, Any], keeper: int) -> None:
    tier = config["tier"]
    if tier == "namespaces":
        lockdown.set_up_namespaces(config["own_uid"], config["own_gid"], request["scratch_mib"])
    else:  # there the kernel kills it with its parent
        lockdown.die_with_parent(keeper)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    os.chdir("/" if tier == "landlock" else "/tmp")
    os.umask(0o077)
    lockdown.limit(request["limits"])
    if tier == "namespaces":
        lockdown.drop_capabilities()
    if tier != "none":
        lockdown.forbid_new_privileges()
        if tier == "landlock":
            lockdown.landlock(config["readable"])
        lockdown.seccomp(base64.b64decode(config["seccomp"]))


# What the program's process does, by kind of job.


def _script(request: Mapping[str, Any]) -> None:
    """Runs the sources as one script on the standard streams, and exits as Python would."""
    sys.stdin, sys.stdout, sys.stderr = _text(0), _text(1), _text(2)
    code = 0
    try:
        _execute(request["sources"], "__main__")
    except SystemExit as request_to_exit:
        code = _exit_code(request_to_exit.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    os._exit(code)


def _text(fd: int) -> io.TextIOWrapper:
    raw = open(fd, "rb" if fd == 0 else "wb", closefd=False)  # noqa: SIM115  # for good
    return io.TextIOWrapper(raw, encoding="utf-8", line_buffering=fd == 2)


def _exit_code(said: Any) -> int:
    if said is None:
        return 0
    if isinstance(said, int):
        return said & 0xFF
    print(said, file=sys.stderr)
    return 1


def _serve(request: Mapping[str, Any]) -> None:
    """Runs the sources as a module, then answers calls of what it defines."""
    try:
        namespace = _execute(request["sources"], "solution")
    except BaseException as error:
        _send(_raised(error))
        return
    _send(["ready"])
    while True:
        _send(_answer(namespace, *_receive()))


def _answer(namespace: Mapping[str, Any], name: str, args: Any, kwargs: Any) -> list[Any]:
    """What `name(*args, **kwargs)` returns; "Solution.f" is f of a new Solution."""
    try:
        owner, _, method = name.rpartition(".")
        function = getattr(namespace[owner](), method) if owner else namespace[name]
        return ["value", encode(function(*decode(args), **decode(kwargs)))]
    except Opaque as error:
        return ["opaque", str(error)]
    except BaseException as error:
        return _raised(error)


def _raised(error: BaseException) -> list[str]:
    return ["raised", type(error).__name__[:_MAX_TEXT], str(error)[:_MAX_TEXT]]


def _referee(request: Mapping[str, Any]) -> None:
    """Runs tests one after the other; what they call by the given names runs elsewhere."""
    try:
        namespace = _execute(request["sources"], "tests")
    except BaseException as error:
        _send(_raised(error))
        return
    namespace.update({name: _stub(name) for name in request["names"]})
    for test in request["tests"]:
        try:
            exec(compile(test, "<test>", "exec", dont_inherit=True), namespace)
        except Opaque as error:  # the test itself gives the program more than plain values
            _send(_raised(error))
        except BaseException as error:
            _send(["failed", *_raised(error)[1:]])
        else:
            _send(["passed"])


def _stub(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _send(["call", name, encode(args), encode(kwargs)])
        reply = _receive()
        if reply[0] == "value":
            return decode(reply[1])
        if reply[0] == "raised":
            kind = getattr(builtins, reply[1], CalleeError)
            raise (kind if _is_exception(kind) else CalleeError)(reply[2])
        raise Malformed(str(reply[1:])[:_MAX_TEXT])

    call.__name__ = name
    return call


def _is_exception(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)


def _exec(request: Mapping[str, Any]) -> None:
    """Becomes another program, with files written beside it first."""
    for name, content in request["files"].items():
        with open(name, "wb") as file:
            file.write(base64.b64decode(content))
        os.chmod(name, 0o700)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execve(request["argv"][0], request["argv"], {"PATH": "/usr/bin:/bin", "HOME": "/tmp"})


_KINDS = {"script": _script, "serve": _serve, "referee": _referee, "exec": _exec}


def _execute(sources: Iterable[str], name: str) -> dict[str, Any]:
    """Runs sources one after the other in a new module, each with `from __future__`s of its own."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv[:] = [f"{name}.py"]
    random.seed(0)  # a program that draws numbers is judged the same each time
    for source in sources:
        exec(compile(source, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _send(frame: list[Any]) -> None:
    payload = json.dumps(frame).encode()
    rest = memoryview(LENGTH.pack(len(payload)) + payload)
    while rest:
        rest = rest[os.write(CHANNEL, rest) :]


def _receive() -> list[Any]:
    frame: list[Any] = json.loads(_read(CHANNEL, LENGTH.unpack(_read(CHANNEL, LENGTH.size))[0]))
    return frame


def _read(fd: int, count: int) -> bytes:
    """Exactly so many bytes; nobody at the other end means that nobody wants an answer."""
    found = b""
    while len(found) < count:
        received = os.read(fd, count - len(found))
        if not received:
            os._exit(0)
        found += received
    return found
