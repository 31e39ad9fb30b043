"""The outside of the sandbox: starts the zygote, hands it jobs, reads what they write.

Everything read here was written by a program that nobody trusts: sizes are capped, time is
limited by a kill, and the contents are data.
"""

import base64
import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rewards.sandbox.filters import seccomp_program
from rewards.sandbox.zygote import LENGTH, READY

NAMESPACES, LANDLOCK, NONE = "namespaces", "landlock", "none"

_START_S = 10.0
_GRACE_S = 5.0  # for the report after a kill
_MAX_FRAME = 4 << 20
_STDERR_BYTES = 4_096
_FAR_UIDS, _NEAR_UIDS = 1_900_000_000, 60_001  # far: where nobody hands out user ids
_SHIPPED = ("values", "lockdown", "zygote")
_BOOT = """
import json, os, sys, types
sys.path[:] = [entry for entry in sys.path if entry]
fd, line = int(sys.argv[1]), b""
while not line.endswith(b"\\n"):
    received = os.read(fd, 1 << 16)
    line += received or sys.exit("nobody told the zygote what to do")
told = json.loads(line)
for name in ("rewards", "rewards.sandbox"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["rewards"].sandbox = sys.modules["rewards.sandbox"]
for name, source in told["sources"].items():
    module = types.ModuleType("rewards.sandbox." + name)
    sys.modules[module.__name__] = module
    setattr(sys.modules["rewards.sandbox"], name, module)
    exec(compile(source, name + ".py", "exec"), module.__dict__)
sys.modules["rewards.sandbox.zygote"].main(fd, told["config"])
"""


class SandboxError(Exception):
    """The sandbox failed, not the program in it."""


class ProgramGone(Exception):
    """The program does not answer any more; the text says why."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one job may use.

    Attributes:
      memory_mib: address space of each of its processes.
      processes: processes and threads at one time; with `memory_mib`, the bound on all its memory.
      scratch_mib: of /tmp, which starts empty and is in memory. Without namespaces there is none.
      file_mib: the largest file.
      open_files: descriptors at one time.
      output_bytes: of standard output.
    """

    memory_mib: int = 512
    processes: int = 8
    scratch_mib: int = 64
    file_mib: int = 32
    open_files: int = 64
    output_bytes: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a program ended.

    Attributes:
      ended: "exit", "signal", "timeout" or "output" (it wrote too much).
      code: exit status, or minus the signal.
      stdout: what it wrote, cut off at the limit.
      stderr: the beginning of what it wrote there.
      outlived: something that it started still holds on to its output.
    """

    ended: str
    code: int
    stdout: bytes
    stderr: bytes
    outlived: bool


class Sandbox:
    """A zygote and the jobs forked from it. Use as a context manager, or call `close`.

    Attributes:
      tier: the isolation, one of "namespaces", "landlock" and "none".
      self_test: what was tried to escape from it, and how that ended.
    """

    def __init__(self, tier: str) -> None:
        """Starts the zygote; believes that the tier does what it says (see tiers.py).

        Raises:
          SandboxError: it cannot be started; the message says what is missing.
        """
        self.tier = tier
        self.self_test: dict[str, str] = {}  # filled in by tiers.py
        self._start()

    def close(self) -> None:
        """Ends the zygote and with it every job. May be called twice."""
        self._control.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        """Replaces a zygote that died."""
        self._process.kill()
        self.close()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_python(
        self, sources: Sequence[str], stdin: bytes, seconds: float, limits: Limits
    ) -> Finished:
        """Runs sources as one script, each under its own `from __future__` imports."""
        return self._run({"kind": "script", "sources": list(sources)}, stdin, seconds, limits)

    def run_command(
        self,
        argv: Sequence[str],
        files: Mapping[str, bytes],
        stdin: bytes,
        seconds: float,
        limits: Limits,
        *,
        limit_data: bool = False,
    ) -> Finished:
        """Runs a program of the host, in a folder with the given files.

        Args:
          argv: the program's full path and arguments.
          files: name and content; each is executable.
          stdin: all of its standard input.
          seconds: wall time.
          limits: what it may use.
          limit_data: limit the memory it can write to rather than its address space; for
            runtimes that reserve far more than they use.
        """
        encoded = {name: base64.b64encode(text).decode() for name, text in files.items()}
        request = {"kind": "exec", "argv": list(argv), "files": encoded}
        return self._run(request, stdin, seconds, limits, limit_data=limit_data)

    def serve(self, sources: Sequence[str], deadline: float, limits: Limits) -> "Channel":
        """Starts a program whose functions can be called.

        Raises:
          ProgramGone: it did not load.
        """
        channel = self._open({"kind": "serve", "sources": list(sources)}, deadline, limits)
        try:
            said = channel.receive()
            if said[0] != "ready":
                raise ProgramGone(": ".join(map(str, said[1:])))
        except BaseException:
            channel.close()
            raise
        return channel

    def referee(
        self,
        sources: Sequence[str],
        tests: Sequence[str],
        names: Sequence[str],
        deadline: float,
        limits: Limits,
    ) -> "Channel":
        """Starts a process that runs tests; calls of `names` come out of its channel."""
        request = {
            "kind": "referee",
            "sources": list(sources),
            "tests": list(tests),
            "names": list(names),
        }
        return self._open(request, deadline, limits)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as said:
            try:
                self._process = subprocess.Popen(
                    _command(self.tier, theirs.fileno()),
                    env={} if self.tier == NAMESPACES else _ENVIRONMENT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    cwd="/",
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except (OSError, SandboxError) as error:
                ours.close()
                raise SandboxError(str(error)) from None
            theirs.close()
            self._control = ours
            ours.settimeout(_START_S)
            try:
                ours.sendall(json.dumps(_told(self.tier)).encode() + b"\n")
                answer = ours.recv(len(READY))
            except (OSError, RuntimeError) as error:
                answer = str(error).encode()
            if answer != READY:
                self.close()
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                raise SandboxError((lines or [answer.decode() or "it ended at once"])[-1])

    def _begin(
        self,
        request: Mapping[str, Any],
        fds: Sequence[int],
        seconds: float,
        limits: Limits,
        *,
        limit_data: bool = False,
    ) -> socket.socket:
        """Hands a job to the zygote; the socket is for its report."""
        told = {
            **request,
            "scratch_mib": limits.scratch_mib,
            "limits": self._rlimits(seconds, limits, limit_data=limit_data),
        }
        payload = json.dumps(told).encode()
        report, theirs = socket.socketpair()
        report.settimeout(_START_S)
        try:
            with theirs:
                socket.send_fds(self._control, [b"j"], [theirs.fileno(), *fds])
            report.sendall(LENGTH.pack(len(payload)) + payload)
        except OSError as error:
            report.close()
            raise SandboxError(f"the zygote does not take jobs: {error}") from error
        return report

    def _rlimits(self, seconds: float, limits: Limits, *, limit_data: bool) -> dict[str, int]:
        found = {
            "DATA" if limit_data else "AS": limits.memory_mib << 20,
            "CPU": math.ceil(seconds) + 1,
            "FSIZE": limits.file_mib << 20,
            "NOFILE": limits.open_files,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
            "SIGPENDING": 256,
        }
        # Elsewhere it would count what else the user runs; Landlock's tier allows no processes.
        return found | {"NPROC": limits.processes} if self.tier == NAMESPACES else found

    def _open(self, request: Mapping[str, Any], deadline: float, limits: Limits) -> "Channel":
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull, "r+b") as null:
            fds = [null.fileno()] * 3 + [theirs.fileno()]
            try:
                seconds = max(0.0, deadline - time.monotonic())
                report = self._begin(request, fds, seconds, limits)
            except BaseException:
                ours.close()
                raise
        return Channel(ours, report, deadline)

    def _run(
        self,
        request: Mapping[str, Any],
        stdin: bytes,
        seconds: float,
        limits: Limits,
        *,
        limit_data: bool = False,
    ) -> Finished:
        pipes = [os.pipe(), os.pipe(), os.pipe()]
        (in_read, in_write), (out_read, out_write), (error_read, error_write) = pipes
        theirs, ours = [in_read, out_write, error_write], [in_write, out_read, error_read]
        try:
            try:
                report = self._begin(request, theirs, seconds, limits, limit_data=limit_data)
            finally:
                for fd in theirs:
                    os.close(fd)
            with report:
                streams = _Streams(ours, stdin, limits.output_bytes)
                why = streams.pump(report, time.monotonic() + seconds)
                found = _report(report)
                outlived = not streams.drain()
        finally:
            for fd in ours:
                with contextlib.suppress(OSError):  # stdin is closed once it is all written
                    os.close(fd)
        code = found["code"]
        ended = why or ("signal" if code < 0 else "exit")
        return Finished(ended, code, bytes(streams.stdout), bytes(streams.stderr), outlived)


class Channel:
    """Frames to and from one job. Closing it kills the job and waits until it is gone."""

    def __init__(self, sock: socket.socket, report: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._report = report
        self._deadline = deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, frame: Sequence[Any]) -> list[Any]:
        """Sends a frame and returns the answer. Raises ProgramGone if none comes in time."""
        self.send(frame)
        return self.receive()

    def send(self, frame: Sequence[Any]) -> None:
        payload = json.dumps(frame).encode()
        self._wait_at_most()
        try:
            self._sock.sendall(LENGTH.pack(len(payload)) + payload)
        except TimeoutError:
            raise ProgramGone("timeout") from None
        except OSError:
            raise ProgramGone("it exited") from None

    def receive(self) -> list[Any]:
        """The next frame, a list that starts with a word."""
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        if length > _MAX_FRAME:
            raise ProgramGone("too large an answer")
        try:
            frame = json.loads(self._read(length))
        except (ValueError, RecursionError):
            frame = None
        if not isinstance(frame, list) or not frame or not isinstance(frame[0], str):
            raise ProgramGone("it broke the protocol")
        return frame

    def close(self) -> None:
        """Raises SandboxError if the job never ran."""
        with self._report, self._sock:
            with contextlib.suppress(OSError):
                self._report.shutdown(socket.SHUT_WR)
            _report(self._report)

    def _read(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            self._wait_at_most()
            try:
                received = self._sock.recv(min(count - len(found), 1 << 16))
            except TimeoutError:
                raise ProgramGone("timeout") from None
            except OSError:
                received = b""
            if not received:
                raise ProgramGone("it exited")
            found += received
        return bytes(found)

    def _wait_at_most(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise ProgramGone("timeout")
        self._sock.settimeout(left)


class _Streams:
    """The other ends of a program's standard streams."""

    def __init__(self, fds: Sequence[int], text: bytes, limit: int) -> None:
        stdin, stdout, stderr = fds
        self.stdout, self.stderr = bytearray(), bytearray()
        self._stdin, self._rest, self._limit = stdin, memoryview(text), limit
        self._ended: set[int] = set()
        self._readers = {stdout: (self.stdout, limit + 1), stderr: (self.stderr, _STDERR_BYTES)}
        for fd in (stdin, stdout, stderr):
            os.set_blocking(fd, False)

    def pump(self, report: socket.socket, deadline: float) -> str:
        """Feeds and reads until the program ends; returns why it was stopped, or ""."""
        with selectors.DefaultSelector() as selector:
            selector.register(report, selectors.EVENT_READ)
            selector.register(self._stdin, selectors.EVENT_WRITE)
            for fd in self._readers:
                selector.register(fd, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                ready = {key.fd for key, _ in selector.select(left)}
                if report.fileno() in ready:
                    return ""
                for fd in ready:
                    more = self._feed() if fd == self._stdin else self._take(fd)
                    if not more:
                        selector.unregister(fd)
                if len(self.stdout) > self._limit:
                    report.shutdown(socket.SHUT_WR)
                    return "output"
        report.shutdown(socket.SHUT_WR)
        return "timeout"

    def drain(self) -> bool:
        """Reads what is left in the pipes of a program that has ended; True if they are closed."""
        ended = []
        for fd in self._readers:
            while self._take(fd):
                pass
            ended.append(fd in self._ended)
        return all(ended)

    def _feed(self) -> bool:
        try:
            self._rest = self._rest[os.write(self._stdin, self._rest) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:  # it does not read all of its input, as it may
            self._rest = self._rest[:0]
        if not self._rest:
            os.close(self._stdin)
        return bool(self._rest)

    def _take(self, fd: int) -> bool:
        """Reads once; what is over the limit is dropped. False if there is no more, or not now."""
        try:
            received = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        kept, limit = self._readers[fd]
        kept += received[: limit - len(kept)]
        if not received:
            self._ended.add(fd)
        return bool(received)


def _report(report: socket.socket) -> dict[str, Any]:
    """What the zygote says of a job that has ended or is being killed."""
    report.settimeout(_GRACE_S)
    text = b""
    try:
        while received := report.recv(1 << 16):
            text += received
        found: dict[str, Any] = json.loads(text)
    except (OSError, ValueError):
        raise SandboxError("the sandbox died under a job") from None
    if found["error"]:
        raise SandboxError(f"a job could not be started: {found['error']}")
    return found


_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "2",  # an arena a thread would use up the address space
}


def _told(tier: str) -> dict[str, Any]:
    """What the zygote is sent at its start."""
    folder = Path(__file__).parent
    filtered = tier != NONE
    program = seccomp_program(one_process=tier == LANDLOCK) if filtered else b""
    return {
        "sources": {name: (folder / f"{name}.py").read_text() for name in _SHIPPED},
        "config": {
            "tier": tier,
            "uid": spare_uid() if os.geteuid() == 0 and filtered else None,
            "parent": 0 if tier == NAMESPACES else os.getpid(),
            "seccomp": base64.b64encode(program).decode(),
            "readable": ["/usr", "/lib", "/lib64", "/bin", sys.base_prefix],
        },
    }


def spare_uid() -> int:
    """A user id that nothing else on the machine runs under: one for each process that asks."""
    for start, inside, count in _uid_ranges():
        del inside
        if start <= _FAR_UIDS < start + count - (1 << 22):
            return _FAR_UIDS + os.getpid()
    return _NEAR_UIDS + os.getpid() % 4_000


def _uid_ranges() -> list[tuple[int, int, int]]:
    """(first, first outside, count) of the user ids that exist here."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    ranges = [[int(number) for number in line.split()] for line in lines]
    return [(start, outside, count) for start, outside, count in ranges]


def _command(tier: str, fd: int) -> list[str]:
    python = [_interpreter(tier), "-s", "-S", "-c", _BOOT, str(fd)]
    return python if tier != NAMESPACES else [*_bubblewrap(), *python]


def _interpreter(tier: str) -> str:
    """A Python that the sandbox's user may run."""
    own = os.path.realpath(sys.executable)
    if tier in (NAMESPACES, NONE) or os.geteuid() != 0 or _open_to_others(own):
        return own
    other = os.path.realpath("/usr/bin/python3")
    if not os.path.exists(other):
        raise SandboxError(f"other users may not run {own}, and there is no /usr/bin/python3")
    return other


def _open_to_others(path: str) -> bool:
    return all(os.stat(part).st_mode & 0o001 for part in (Path(path), *Path(path).parents))


def _bubblewrap() -> list[str]:
    """The command that gives the zygote its own, nearly empty, machine."""
    arguments = ["bwrap", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        # No user namespace around it, so that the zygote can take a user id of its own: neither
        # root's process limit nor root's file permissions bind anybody.
        arguments += "--unshare-pid --unshare-net --unshare-ipc --unshare-uts".split()
        arguments += "--unshare-cgroup-try --cap-add CAP_SETUID --cap-add CAP_SETGID".split()
    else:
        arguments += ["--unshare-all"]
    arguments += "--ro-bind /usr /usr --perms 0755 --dir /etc".split()
    arguments += "--ro-bind-try /etc/ld.so.cache /etc/ld.so.cache".split()
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for prefix in {sys.base_prefix, sys.base_exec_prefix}:
        if Path(prefix).is_relative_to("/usr"):
            continue
        for parent in reversed(Path(prefix).parents[:-1]):  # else closed to all but the owner
            arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--ro-bind", prefix, prefix]
    arguments += "--proc /proc --dev /dev --dir /tmp --remount-ro / --remount-ro /dev".split()
    arguments += ["--chdir", "/", "--clearenv"]
    for name, value in _ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    path = _find_bubblewrap()
    return [path, *arguments[1:]]


def _find_bubblewrap() -> str:
    for folder in ("/usr/bin", "/bin", "/usr/local/bin"):
        if os.access(f"{folder}/bwrap", os.X_OK):
            return f"{folder}/bwrap"
    raise SandboxError("bubblewrap is missing (apt-get install bubblewrap)")


def signal_name(code: int) -> str:
    """ "SIGKILL" for -9."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
