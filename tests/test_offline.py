"""Nothing opens a connection that the user did not name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Loaded by every Python process that finds it on its path, reward workers included. What has
# nothing to do with a network (pipes between processes are Unix sockets) goes on working.
GUARD = """
import os
import socket


def _told(name, address):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{name} {address}\\n")
    raise OSError(f"the network is blocked: {name} {address}")


def _guarded(name):
    own = getattr(socket.socket, name)

    def method(self, address, *more):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _told(name, address)
        return own(self, address, *more)

    return method


class Guarded(socket.socket):
    connect = _guarded("connect")
    connect_ex = _guarded("connect_ex")
    sendto = _guarded("sendto")
    bind = _guarded("bind")


socket.socket = Guarded
socket.getaddrinfo = lambda host, *more, **rest: _told("getaddrinfo", host)
"""


@pytest.fixture
def blocked(tmp_path):
    """Runs a command of Python without network: (arguments) -> exit status, output, attempts."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    attempts = tmp_path / "attempts.txt"

    def run(*arguments: str) -> tuple[int, str, str]:
        path = f"{tmp_path / 'guard'}{os.pathsep}{ROOT}"
        environ = {**os.environ, "PYTHONPATH": path, "ATTEMPTS": str(attempts)}
        environ.pop("XLA_FLAGS", None)  # one device
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
        found = attempts.read_text() if attempts.exists() else ""
        return done.returncode, done.stdout + done.stderr, found

    return run


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.socket().connect(('127.0.0.1', 9))",
        "socket.create_connection(('example.org', 80))",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1:9/')",
    ],
)
def test_the_guard_would_notice(blocked, attempt):
    status, _, attempts = blocked("-c", f"import socket; {attempt}")
    assert status and attempts


def test_the_main_job_opens_no_connection(blocked, tmp_path):
    settings = ("num_steps=1", "sft.num_steps=1", "sft.warmup_updates=0", "mesh.data=1")
    status, output, attempts = blocked(
        "-m",
        "grpo.launch",
        f"--config={ROOT / 'tests' / 'tiny_experiment.py'}",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{setting}" for setting in (*settings, "mesh.fsdp=1", "mesh.tensor=1")),
    )
    assert status == 0, output
    assert "params_sha256" in output
    assert attempts == ""
