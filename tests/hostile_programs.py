"""Programs that try to pass without being right, to get out, or to do harm; and how they fare.

Each family is a list of sources. They are judged by `assert f(2) == 4` and `assert f(3) == 9`, or
by two cases of standard input. None may pass. Run as a script under another user, it prints what
happened as JSON; it needs nothing but the standard library.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rewards.code_tests import CodeTests
from rewards.sandbox.box import Sandbox, spare_uid
from rewards.sandbox.tiers import NoIsolation, open_sandbox

BUDGET_S = 0.2
OPTIONS = CodeTests(budget_s=BUDGET_S, memory_mib=256)
CALLS: dict[str, Any] = {"asserts": ["assert f(2) == 4", "assert f(3) == 9"]}
REFEREED: dict[str, Any] = {"entry": "f", "asserts": ["for i in (2, 3):\n    assert f(i) == i * i"]}
STDIO: dict[str, Any] = {
    "stdio": [{"input": "2\n", "output": "4\n"}, {"input": "3\n", "output": "9\n"}]
}
HONEST = "def f(x):\n    return x * x\n"
WRONG = "def f(x):\n    return x + 1\n"
HONEST_STDIO = "print(int(input()) ** 2)\n"

# What a program may use: PLANTED is a folder that everyone may write to, PID another process.
_HEAD = "import ctypes, os, signal, socket, sys, threading, time, gc, builtins, json\n"
_WRONG = "\ndef f(x): return -1\n"


def _in_call(*lines: str) -> list[str]:
    return [f"{_HEAD}def f(x):\n    {line}\n" for line in lines]


def _at_import(*lines: str) -> list[str]:
    return [f"{_HEAD}{line}{_WRONG}" for line in lines]


def _returning(*values: str) -> list[str]:
    return [f"{_HEAD}import collections, itertools, unittest.mock\n{value}" for value in values]


_EVIL = """class Evil{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __hash__(self): return 0
    def __lt__(self, other): return True
    def __abs__(self): return 0
    def __sub__(self, other): return 0
    def __repr__(self): return "4"
    def __index__(self): return 4
    __class__ = int
def f(x): return Evil({argument})
"""

FAMILIES: dict[str, list[str]] = {
    "early exit": _at_import(
        "sys.exit(0)",
        "os._exit(0)",
        "raise SystemExit",
        "exit()",
        "quit(0)",
        'os.execv("/bin/true", ["true"])',
        'os.execv(sys.executable, [sys.executable, "-c", "print(4)"])',
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "os.abort()",
        "ctypes.string_at(0)",
        "os.closerange(0, 64)",
        "raise KeyboardInterrupt",
    ),
    "exit in the call": _in_call(
        "os._exit(0)",
        "sys.exit(0)",
        "raise type('Quiet', (SystemExit,), {})(0)",
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "import atexit; atexit.register(os._exit, 0); sys.exit(0)",
        "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(1)",
        "return type('Late', (), {'__del__': lambda self: os._exit(0)})()",
        "return 4 if x == 2 else os._exit(0)",
        "return os.fork()",
    ),
    "forged results": _at_import(
        'print("passed"); print("ok", 4, 9, True)',
        "for fd in range(64):\n    try: os.write(fd, b'[\"passed\"]\\n')\n    except OSError: pass",
        "for fd in range(64):\n    try: os.write(fd, (10).to_bytes(4, 'big') + b'[\"passed\"]')\n"
        "    except OSError: pass",
        "import pickle\nfor fd in range(64):\n    try: os.write(fd, pickle.dumps(True))\n"
        "    except OSError: pass",
        'open("/tmp/result", "w").write("passed")',
        'import glob\nfor name in glob.glob("/proc/self/fd/*"): open(name, "wb").write(b"passed")',
        'os.write(3, (7).to_bytes(4, "big") + b\'["ready\')',
        'os.write(3, b"\\xff\\xff\\xff\\xff" + bytes(100))',
        "os.write(3, (200000).to_bytes(4, 'big') + b'[' * 200000)",
    ),
    "equality tricks": [
        _EVIL.format(base="", argument=""),
        _EVIL.format(base="(int)", argument="-1"),
        _EVIL.format(base="(float)", argument="-1"),
        _EVIL.format(base="(str)", argument="''"),
        _EVIL.format(base="(list)", argument="[]"),
        _EVIL.format(base="(dict)", argument=""),
        *_returning(
            "def f(x): return unittest.mock.ANY",
            "def f(x): return unittest.mock.MagicMock()",
            "class M(type):\n    def __eq__(c, o): return True\n    __hash__ = None\n"
            "class C(metaclass=M): pass\ndef f(x): return C",
            "def f(x): return f",
            "def f(x): return lambda: 4",
            "def f(x): return NotImplemented",
            "def f(x): return float('nan')",
            "def f(x): return '4' if x == 2 else '9'",
            "def f(x): return [x * x]",
        ),
    ],
    "monkeypatching": _at_import(
        "builtins.AssertionError = type('Never', (Exception,), {})",
        "builtins.all = builtins.any = builtins.isinstance = lambda *a: True",
        "builtins.eval = builtins.exec = builtins.compile = lambda *a, **k: None",
        "builtins.len = lambda x: 4",
        "builtins.repr = builtins.str = lambda x: '4'",
        'json.dumps = lambda *a, **k: \'["value", ["int", "0x4"]]\'\njson.loads = lambda s: 4',
        "import pickle; pickle.dumps = lambda *a: b''",
        "write = os.write\nos.write = lambda fd, data: write(fd, b'[\"passed\"]')",
        "sys.stdout = sys.stderr = type('W', (), {'write': lambda s, t: 4})()",
        "sys.excepthook = lambda *a: os._exit(0)\nraise ValueError",
        "sys.exit = os._exit = lambda *a: None",
        "sys.settrace(lambda *a: None); sys.setprofile(lambda *a: os._exit(0))",
        "for o in gc.get_objects():\n    if isinstance(o, dict):\n"
        "        for k in list(o):\n            if k == 'error': o[k] = ''",
        "import __main__; __main__.result = True",
        "sys._getframe(1).f_locals.update(passed=True)\nsys._getframe(1).f_globals.clear()",
        "import rewards.sandbox.zygote as z\nz._answer = lambda *a: ['passed']",
        "import rewards.sandbox.zygote as z\nz._answer = lambda *a: ['value', ['any']]",
        "import unittest; unittest.TestCase.assertEqual = lambda *a: None",
        "sys.meta_path.insert(0, type('F', (), {'find_spec': lambda *a: None}))",
        "ctypes.memset(id(4) + 24, 255, 1)",
        "signal.signal(signal.SIGALRM, lambda *a: os._exit(0)); signal.setitimer(0, 0.001)",
    ),
    "deserialisation": _returning(
        "class R:\n    def __reduce__(self): return open, ('PLANTED/pwned', 'w')\n"
        "def f(x): return R()",
        "class R(Exception):\n    def __reduce__(self): return open, ('PLANTED/pwned', 'w')\n"
        "def f(x): raise R('x')",
        "class R:\n    def __repr__(self): return \"open('PLANTED/pwned', 'w')\"\n"
        "def f(x): return R()",
        "def f(x): raise type('A' * 10**6, (Exception,), {})('b' * 10**7)",
        "def f(x):\n    a = []\n    a.append(a)\n    return a",
        "def f(x):\n    a = []\n    for _ in range(200000): a = [a]\n    return a",
        "def f(x): return 10 ** 200000",
        "def f(x): return 'x' * 200_000_000",
        "def f(x): return itertools.count()",
        "def f(x): return [[]] * 10_000_000",
        "def f(x): return {i * (2**61 - 1): i for i in range(3000)}",
        "def f(x):\n    for _ in range(9): os.write(3, (9).to_bytes(4, 'big') + b'[\"raised\"')\n",
        "def f(x):\n    while 1: os.write(3, b'\\x00\\x00\\x00\\x0a[\"opaque\"]')\n",
        "def f(x): os.write(3, b'\\x00\\x00\\x00\\x09[\"value\"]'); time.sleep(1)",
        'def f(x):\n    t = b\'["value", ["dict", [[["list", []], ["none"]]]]]\'\n'
        "    os.write(3, len(t).to_bytes(4, 'big') + t); time.sleep(1)",
        "def f(x):\n    t = b'[\"value\", [\"int\", \"' + b'f' * 100 + b'\"], 4]'\n"
        "    os.write(3, len(t).to_bytes(4, 'big') + t); time.sleep(1)",
        "def f(x): return '\\ud800' * 10",
    ),
    "stealing tests": _in_call(
        "return next(o for o in gc.get_objects() if isinstance(o, dict) and 'asserts' in o)",
        "return [fr.f_locals.get('expected') for fr in [sys._getframe(i) for i in range(4)]]",
        "return open('/proc/self/cmdline').read()",
        "return open('/proc/%d/environ' % os.getppid()).read()",
        "return open('/proc/1/mem', 'rb').read(9)",
        "return int(sys.stdin.read().split()[-1])",
        "import linecache; return linecache.getlines('<test>')",
        "return [open(os.path.join(d, n)).read() for d in ('/tmp', '.') for n in os.listdir(d)]",
        "return sys.argv",
    ),
    "host data": _in_call(
        "return open('PLANTED/secret').read()",
        "return os.listdir('PLANTED')",
        "return os.environ['SECRET_FOR_TESTS']",
        "return open('/proc/PID/environ').read()",
        "return open('/etc/passwd').read() + open('/etc/shadow').read()",
        "return os.listdir(os.path.expanduser('~'))[0]",
        "return open('/proc/1/root/etc/hostname').read()",
        "return open('../../../../../../etc/hostname').read()",
        "os.symlink('/etc/passwd', '/tmp/l'); return open('/tmp/l').read()",
        "import subprocess; return subprocess.check_output(['cat', 'PLANTED/secret'])",
        "os.chroot('/'); return 4",
        "ctypes.CDLL(None).unshare(0x10000000); return open('PLANTED/secret').read()",
        "return ctypes.CDLL(None).setns(os.open('/proc/1/ns/mnt', 0), 0)",
        "return open('/dev/mem', 'rb').read(1) + open('/dev/vda', 'rb').read(1)",
        "return socket.if_nameindex()[1]",
        "return socket.create_connection(('127.0.0.1', TCP), 0.2) and 4",
        "return socket.create_connection(('::1', TCP), 0.2) and 4",
        "return socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 53)) and 4",
        "s = socket.socket(1); s.connect('PLANTED/socket'); return 4",
        "s = socket.socketpair(1, 2)[0]; s.sendto(b'x', 'PLANTED/socket'); return 4",
        "return ctypes.CDLL(None).socket(2, 1, 0) >= 0 and 4",
    ),
    "host writes": _at_import(
        *(
            f"open({path!r}, 'w').write('x')"
            for path in ("PLANTED/pwned", "/var/tmp/pwned", "/pwned", "/etc/pwned", "/usr/pwned")
        ),
        "open(os.path.expanduser('~/pwned'), 'w').write('x')",
        "open(os.path.join(os.path.dirname(os.__file__), 'pwned.py'), 'w').write('x')",
        "open('/dev/pwned', 'w').write('x')",
        "ctypes.CDLL(None).mount(None, b'/', None, ctypes.c_ulong(4128), None)\n"
        "open('/usr/pwned', 'w').write('x')",
        "os.symlink('PLANTED', '/tmp/s'); open('/tmp/s/pwned', 'w').write('x')",
        "os.link('PLANTED/secret', '/tmp/h')",
        "os.chmod('PLANTED/secret', 0)",
        "os.utime('PLANTED/secret', (0, 0))",
        "os.truncate('PLANTED/secret', 0)",
        "os.remove('PLANTED/secret')",
        "os.rename('PLANTED/secret', 'PLANTED/pwned')",
        "os.mkfifo('PLANTED/pwned')",
    ),
    "left for the next job": _at_import(
        "open('/tmp/left', 'w').write('x'); open('/dev/shm/left', 'w').write('x')",
        "os.environ['LEFT'] = 'x'; builtins.f = lambda x: x * x",
        "sys.path.insert(0, '/tmp'); open('/tmp/json.py', 'w').write('x = 1')",
        "ctypes.memset(id(5) + 24, 255, 1)",
    ),
    "time": [
        *_in_call(
            "while True: pass",
            "time.sleep(60)",
            "signal.pause()",
            "return 9 ** (9 ** 9)",
            "return sum(range(10 ** 13))",
            "import re; return re.match('(a+)+$', 'a' * 40 + 'b')",
            "import collections, itertools; collections.deque(itertools.count(), 0)",
            "lock = threading.Lock(); lock.acquire(); lock.acquire()",
            "[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 3, 14, 15, 24)]; time.sleep(60)",
            "signal.signal(14, lambda *a: 0); signal.setitimer(0, 1e-5, 1e-5); time.sleep(60)",
            "os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)",
        ),
        "while True:\n    pass",
        "import time\ndef f(x):\n    while True:\n        try: time.sleep(60)\n"
        "        except BaseException: pass",
    ],
    "memory": _in_call(
        "return len(bytearray(8 << 30))",
        "return [0] * (1 << 34)",
        "s = 'x'\n    while True: s += s",
        "import mmap; return [mmap.mmap(-1, 1 << 30) for _ in range(100)]",
        "kept = []\n    while True:\n        try: kept.append(bytearray(1 << 24))\n"
        "        except MemoryError: pass",
        "open('/dev/shm/big', 'wb').write(bytes(200 << 20))",
        "os.ftruncate(os.memfd_create('x'), 1 << 33); return 0",
        "return ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600)",
        "sys.setrecursionlimit(10 ** 9); return (lambda g: g(g))(lambda g: g(g))",
        "return list(range(10 ** 9))",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return 0",
        "for _ in range(8):\n        if os.fork() == 0: b = bytearray(200 << 20); time.sleep(9)",
    ),
    "processes": _in_call(
        "while True: os.fork()",
        "while True:\n        try: os.fork()\n        except OSError: pass",
        "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "import subprocess\n    while True: subprocess.Popen(['sleep', '60'])",
        "from multiprocessing import Process\n"
        "    while True: Process(target=time.sleep, args=(9,)).start()",
        "while True:\n        if os.fork() == 0: os.execv('/bin/true', ['true'])",
        "if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(60)\n"
        "        os._exit(0)\n    return 0",
        "if os.fork() == 0:\n        [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]\n"
        "        time.sleep(60)\n    return 0",
        "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True); return 0",
    ),
    "signals to others": _in_call(
        "os.kill(PID, signal.SIGKILL)",
        "os.kill(os.getppid(), signal.SIGKILL)",
        "os.kill(-1, signal.SIGKILL)",
        "os.killpg(os.getpgid(0), signal.SIGKILL)",
        "os.kill(PID, signal.SIGSTOP)",
        "os.nice(-20) + os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(9))",
        "return ctypes.CDLL(None).ptrace(16, PID, 0, 0)",
        "import resource; resource.prlimit(PID, resource.RLIMIT_CPU, (0, 0))",
        "os.sched_setaffinity(PID, {0})",
        "import fcntl; [fcntl.ioctl(0, 0x5412, c) for c in b'id']",
        "for pid in range(2, 3000):\n        try: os.kill(pid, 9)\n        except OSError: pass",
    ),
    "files and descriptors": _in_call(
        "open('/tmp/big', 'wb').write(bytes(100 << 20))",
        "for i in range(10 ** 6): open(f'/tmp/{i}', 'w')",
        "for i in range(10 ** 5): os.mkdir('d'); os.chdir('d')",
        "os.truncate(os.open('/tmp/s', 66), 1 << 45)",
        "kept = [os.pipe() for _ in range(10 ** 5)]",
        "kept = [os.open('/dev/null', 0) for _ in range(10 ** 5)]",
        "kept = [socket.socketpair() for _ in range(10 ** 5)]",
        "kept = [ctypes.CDLL(None).inotify_init() for _ in range(99)]; return 0",
    ),
    "source": [
        "",
        "I think that the answer is to multiply x by itself.",
        "def f(x):\n    return x * x\0",
        "x = '\ud800'\n",
        "(" * 100_000,
        "-" * 100_000 + "1",
        "x = " + "+".join(["1"] * 50_000),
        "x = '" + "a" * 5_000_000 + "'",
        "x = 1\n" * 49_000 + "1/0",
        "x = ((((((1,) * 20, ) * 20,) * 20,) * 20,) * 20,) * 20\nx = 2 ** 10000000 ** 2",
        "# -*- coding: utf-7 -*-\ndef f(x): return +AC0-1",
        "'''\n",
        "{tests} {{}} %s ${HOME}",
        "```python\ndef f(x): return x * x\n",
        "def f(x): return x * x\n  indented = 1",
    ],
}
STREAMS = "standard streams"
STDIO_PROGRAMS = [
    *(_HEAD + line for line in ("", "sys.exit(0)", "os._exit(0)", "print(-1)")),
    _HEAD + "while True: print('x' * 10000)",
    _HEAD + "while True: sys.stderr.write('x' * 10000)",
    _HEAD + "print('4\\n' * 300_000_000)",
    _HEAD + "print(int(input()) ** 2); sys.stdout.flush(); os._exit(1)",
    _HEAD + "print(int(input()) ** 2, flush=True); os.kill(os.getpid(), 9); os._exit(3)",
    _HEAD + "print(4, 9)",
    _HEAD + "print(open('/tmp/output').read())",
    _HEAD + "print(int(input()) ** 2, flush=True); time.sleep(60)",
    _HEAD + "print(int(input()) ** 2, flush=True)\nwhile True: pass",
]


def judge_all(sandbox: Sandbox, planted: Path, families: list[str]) -> dict[str, list[str]]:
    """What went wrong, by family: nothing, if the sandbox and the tests hold."""
    bystander = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
    os.environ["SECRET_FOR_TESTS"] = "4"
    (planted / "secret").write_text("4")
    before = processes()
    try:
        return {
            family: _judge_family(sandbox, family, planted, bystander.pid, before)
            for family in families
        }
    finally:
        del os.environ["SECRET_FOR_TESTS"]
        bystander.kill()
        bystander.wait()


def _judge_family(
    sandbox: Sandbox, family: str, planted: Path, pid: int, before: set[str]
) -> list[str]:
    found = []
    memory = _available_mib()
    tests = [(source, CALLS) for source in FAMILIES.get(family, [])]
    tests += [(source, REFEREED) for source in FAMILIES.get(family, [])[::6]]
    if family == STREAMS:
        tests = [(source, STDIO) for source in STDIO_PROGRAMS]
    for source, reference in tests:
        filled = source.replace("PLANTED", str(planted)).replace("PID", str(pid))
        started = time.monotonic()
        report = OPTIONS.judge(sandbox, filled.replace("TCP", "22"), reference)
        if report.passed == report.total:
            found.append(f"passed: {source[-200:]!r}")
        if time.monotonic() - started > BUDGET_S + 5:
            found.append(f"took {time.monotonic() - started:.1f} s: {source[-200:]!r}")
    for source, reference, passes in (
        (HONEST, CALLS, True),
        (HONEST, REFEREED, True),
        (HONEST_STDIO, STDIO, True),
        (WRONG, CALLS, False),
    ):
        report = CodeTests(budget_s=10.0).judge(sandbox, source, reference)
        if (report.passed == report.total) is not passes:
            found.append(f"afterwards {source!r} gives {report}")
    return found + _harm(planted, pid, before, memory)


def _harm(planted: Path, pid: int, before: set[str], memory: int) -> list[str]:
    """What the programs did to the machine."""
    found = []
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    if state in "ZTt":
        found.append("the bystander was hit")
    if [path.name for path in planted.iterdir()] != ["secret"]:
        found.append(f"files were left in {list(planted.iterdir())}")
    if (planted / "secret").read_text() != "4" or (planted / "secret").stat().st_mtime == 0:
        found.append("the secret was changed")
    for folder in (
        "/",
        "/tmp",
        "/var/tmp",
        "/etc",
        "/usr",
        "/dev",
        "/dev/shm",
        os.path.expanduser("~"),
    ):
        for name in ("pwned", "left", "big", "result", "json.py"):
            if os.path.lexists(os.path.join(folder, name)):
                found.append(f"{name} was left in {folder}")
    for _ in range(50):
        left = processes() - before
        if not left:
            break
        time.sleep(0.02)
    else:
        found.append(f"processes were left: {left}")
    if memory - _available_mib() > 2_000:
        found.append(f"{memory - _available_mib()} MiB are gone")
    return found


def processes() -> set[str]:
    """The live processes of the user that this process's sandboxes run under."""
    found = set()
    ours = spare_uid() if os.geteuid() == 0 else os.geteuid()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            told = (folder / "status").read_text()
        except OSError:
            continue
        uid = int(told.partition("\nUid:")[2].split()[0])
        if uid == ours and "State:\tZ" not in told:
            found.add(folder.name)
    return found


def _available_mib() -> int:
    return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) >> 10


def main() -> None:
    """For another user: `hostile_programs.py FOLDER TIER…`, a folder that the user may write to."""
    folder, *tiers = sys.argv[1:]
    tempfile.tempdir = folder
    planted = Path(folder) / "planted"
    planted.mkdir()
    planted.chmod(0o777)
    found: dict[str, Any] = {}
    for tier in tiers:
        try:
            sandbox = open_sandbox(tiers=(tier,))
        except NoIsolation as error:
            found[tier] = {"missing": [str(error)]}
            continue
        with sandbox:
            found[tier] = judge_all(sandbox, planted, [*FAMILIES, STREAMS])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
