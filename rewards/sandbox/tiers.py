"""Which isolation this machine can give, found out by trying to escape from it.

Versions and permissions say little about whether a sandbox holds; a probe says it at once. So every
sandbox is handed hostile programs of our own first. It is used only if each of them failed at what
it tried, as seen from outside: the bystander lives, the file is as it was, nobody knocked at the
port.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rewards.sandbox.box import LANDLOCK, NAMESPACES, NONE, Finished, Limits, Sandbox, SandboxError

TIERS = (NAMESPACES, LANDLOCK)  # the best first
HELD = "held"

_LIMITS = Limits(memory_mib=256, file_mib=8)
_SECONDS = 5.0


class NoIsolation(Exception):
    """No tier holds on this machine; the message says what each one lacks."""


def open_sandbox(*, allow_unsafe_code: bool = False, tiers: tuple[str, ...] = TIERS) -> Sandbox:
    """A sandbox of the first tier that withstands the self-test.

    Args:
      allow_unsafe_code: where no tier holds, run programs with nothing but limits on memory, time
        and file size, and warn. They can then read, write and send whatever this user can.
      tiers: those to try, in order.

    Raises:
      NoIsolation: no tier holds, and `allow_unsafe_code` is False.
    """
    lacking = []
    for tier in tiers:
        try:
            sandbox = Sandbox(tier)
        except SandboxError as error:
            lacking.append(f"{tier}: {error}")
            continue
        try:
            sandbox.self_test = self_test(sandbox)
        except BaseException as error:
            sandbox.close()
            if not isinstance(error, SandboxError):
                raise
            lacking.append(f"{tier}: {error}")
            continue
        escapes = {name: how for name, how in sandbox.self_test.items() if how != HELD}
        if not escapes:
            return sandbox
        sandbox.close()
        lacking.append(f"{tier}: {'; '.join(f'{name}: {how}' for name, how in escapes.items())}")
    told = "no sandbox for model-written code holds on this machine (" + " | ".join(lacking) + ")"
    if not allow_unsafe_code:
        raise NoIsolation(
            f"{told}. Install bubblewrap and libseccomp2, or allow user namespaces, or use a kernel"
            " with Landlock; allow_unsafe_code=True runs the programs without isolation"
        )
    warnings.warn(f"{told}; running programs WITHOUT isolation", RuntimeWarning, stacklevel=2)
    sandbox = Sandbox(NONE)
    sandbox.self_test = {"isolation": "none, allow_unsafe_code is set"}
    return sandbox


def describe(sandbox: Sandbox) -> str:
    """One line for a run's log."""
    held = sum(how == HELD for how in sandbox.self_test.values())
    return f"code sandbox: {sandbox.tier}, {held} of {len(sandbox.self_test)} escapes failed"


def self_test(sandbox: Sandbox) -> dict[str, str]:
    """Tries to escape; "held", or what got through, for each way out.

    Raises:
      SandboxError: the sandbox does not even run programs.
    """
    found: dict[str, str] = {}
    with _planted() as planted:
        for name, (program, escaped) in _PROBES.items():
            source = f"planted = {planted.told!r}\n{_PRELUDE}\n{program}"
            ended = sandbox.run_python([source], b"", _SECONDS, _LIMITS)
            if ended.ended == "exit" and ended.code == 0:
                found[name] = escaped(ended.stdout.decode(errors="replace"), planted) or HELD
            else:
                found[name] = f"the probe broke: {ended.ended} {ended.code}, {_last_line(ended)}"
        found["time"] = _try_to_outlive(sandbox)
    return found


class _Planted:
    """What the probes go for."""

    def __init__(self, folder: Path, bystander: int, network: list[socket.socket]) -> None:
        self.secret = secrets.token_hex(16)
        self.file = folder / "secret"
        self.file.write_text(self.secret)
        self.file.chmod(0o666)
        self.network = network
        self.folder = folder
        self.told: dict[str, Any] = {
            "file": str(self.file),
            "folder": str(folder),
            "pid": bystander,
            "tcp": network[0].getsockname()[1],
            "udp": network[1].getsockname()[1],
            "unix": str(folder / "socket"),
            "abstract": network[3].getsockname().decode(),
        }

    def untouched(self) -> bool:
        return (
            len(list(self.folder.iterdir())) == 2
            and self.file.stat().st_mode & 0o777 == 0o666
            and self.file.read_text() == self.secret
        )

    def knocked(self) -> bool:
        for sock in self.network:
            with contextlib.suppress(BlockingIOError):
                if sock.type == socket.SOCK_DGRAM:
                    sock.recv(1)
                else:
                    sock.accept()[0].close()
                return True
        return False

    def bystander_lives(self) -> bool:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{self.told['pid']}/stat").read_text().rpartition(")")[2].split()[0]
            return state not in "ZT"
        return False


@contextlib.contextmanager
def _planted() -> Iterator[_Planted]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="probe-")))
        folder.chmod(0o777)
        network = [
            stack.enter_context(socket.socket(family, kind))
            for family, kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
            )
        ]
        places: list[Any] = [("127.0.0.1", 0), ("127.0.0.1", 0), str(folder / "socket")]
        places.append(f"\0probe-{secrets.token_hex(8)}")
        for sock, place in zip(network, places, strict=True):
            sock.bind(place)
            sock.setblocking(False)
            if sock.type == socket.SOCK_STREAM:
                sock.listen()
        (folder / "socket").chmod(0o777)
        bystander = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
        stack.callback(bystander.wait)
        stack.callback(bystander.kill)
        yield _Planted(folder, bystander.pid, network)


_PRELUDE = """
import ctypes, os, signal, socket, sys
def attempt(deed, *args):
    try:
        return deed(*args)
    except BaseException:
        return None
"""

_READ = """
for path in (planted["file"], f"/proc/{planted['pid']}/environ", "/proc/1/environ", "/etc/passwd"):
    print(attempt(lambda: open(path, "rb").read()))
print(attempt(os.listdir, planted["folder"]), os.environ)
"""

_WRITE = """
import shutil
libc = ctypes.CDLL(None)
libc.mount(None, b"/", None, ctypes.c_ulong(4096 | 32), None)
libc.mount(None, sys.prefix.encode(), None, ctypes.c_ulong(4096 | 32), None)
for path in (planted["file"], planted["folder"] + "/new", sys.prefix + "/new", "/usr/new", "/new"):
    if attempt(lambda: open(path, "w").write("overwritten")):
        print(path)
attempt(os.truncate, planted["file"], 0)
attempt(os.chmod, planted["file"], 0)
attempt(os.remove, planted["file"])
"""

_SIGNAL = """
attempt(os.kill, planted["pid"], signal.SIGSTOP)
attempt(os.kill, planted["pid"], signal.SIGKILL)
attempt(os.kill, os.getppid(), signal.SIGKILL)
"""

_NETWORK = """
def connect(family, kind, place):
    with socket.socket(family, kind) as sock:
        sock.settimeout(0.5)
        sock.connect(place)
        sock.send(b"x")
attempt(connect, socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", planted["tcp"]))
attempt(connect, socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", planted["udp"]))
attempt(connect, socket.AF_UNIX, socket.SOCK_STREAM, planted["unix"])
attempt(connect, socket.AF_UNIX, socket.SOCK_STREAM, planted["abstract"])
"""

# Where nothing stops them, they go away by themselves.
_FORKS = """
children = []
def bomb():
    for _ in range(300):
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            signal.pause()
            os._exit(0)
        children.append(child)
attempt(bomb)
print(len(children))
for child in children:
    attempt(os.kill, child, signal.SIGKILL)
"""

_MEMORY = """
print(attempt(lambda: len(bytearray(1536 << 20))))
"""

_DISK = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def fill():
    block = bytes(1 << 20)
    with open("/tmp/probe-fill", "wb", buffering=0) as file:
        try:
            for _ in range(300):
                file.write(block)
        finally:
            print(file.tell())
attempt(fill)
attempt(os.remove, "/tmp/probe-fill")
"""

_POWERS = """
libc = ctypes.CDLL(None, use_errno=True)
print(attempt(lambda: os.setuid(0) is None), [
    libc.unshare(0x10000000) == 0,
    libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None) == 0,
    libc.ptrace(16, planted["pid"], 0, 0) == 0,
    libc.syscall(425, 1, ctypes.c_char_p(bytes(120))) >= 0,
])
"""


def _read(said: str, planted: _Planted) -> str:
    traces = (planted.secret, "secret", "root:", "PATH=")
    return "files of the machine can be read" if any(each in said for each in traces) else ""


def _written(said: str, planted: _Planted) -> str:
    return said.strip() or ("" if planted.untouched() else "a file was changed")


def _signalled(said: str, planted: _Planted) -> str:
    return "" if planted.bystander_lives() else "another process was killed"


def _connected(said: str, planted: _Planted) -> str:
    return "a connection left the sandbox" if planted.knocked() else ""


def _at_most(limit: int, what: str) -> Callable[[str, _Planted], str]:
    def over(said: str, planted: _Planted) -> str:
        counts = [int(word) for word in said.split() if word.isdigit()]
        return "".join(f"{count} {what}" for count in counts if count > limit)

    return over


def _empowered(said: str, planted: _Planted) -> str:
    return "privileged calls work" if "True" in said else ""


_PROBES: dict[str, tuple[str, Callable[[str, _Planted], str]]] = {
    "read": (_READ, _read),
    "write": (_WRITE, _written),
    "signal": (_SIGNAL, _signalled),
    "network": (_NETWORK, _connected),
    "processes": (_FORKS, _at_most(64, "processes forked")),
    "memory": (_MEMORY, _at_most(1 << 30, "bytes allocated")),
    "disk": (_DISK, _at_most(16 << 20, "bytes written")),
    "powers": (_POWERS, _empowered),
}

# Leaves a child in a session of its own behind, which holds on to standard output.
_OUTLIVE = """
import os, signal, time
def leave():
    if os.fork() == 0:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            time.sleep(5)
        os._exit(0)
try:
    leave()
except OSError:
    pass
print("on its way", flush=True)
while True:
    pass
"""


def _try_to_outlive(sandbox: Sandbox) -> str:
    started = time.monotonic()
    ended = sandbox.run_python([_OUTLIVE], b"", 0.3, _LIMITS)
    late = time.monotonic() - started > 3.0
    if ended.ended != "timeout" or b"on its way" not in ended.stdout or late:
        return f"the probe was not stopped: {ended.ended} after {time.monotonic() - started:.1f} s"
    return "a process outlived its job" if ended.outlived else HELD


def _last_line(ended: Finished) -> str:
    return (ended.stderr.decode(errors="replace").strip().splitlines() or [""])[-1][:200]


def main() -> None:
    """Prints the tier and its self-test as JSON; exits with 1 where nothing holds."""
    started = time.monotonic()
    try:
        with open_sandbox() as sandbox:
            told = {"tier": sandbox.tier, "uid": os.geteuid(), "self_test": sandbox.self_test}
    except NoIsolation as error:
        raise SystemExit(str(error)) from None
    print(json.dumps({**told, "seconds": round(time.monotonic() - started, 2)}, indent=2))


if __name__ == "__main__":
    main()
