"""How a program in each language is run on standard input and output."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable

from rewards.api import BadReference
from rewards.sandbox.box import NAMESPACES, Finished, Limits, Sandbox

_MAX_BINARY = 16 << 20
_COMPILER_MIB = 1_024

Run = Callable[[bytes, float], Finished]  # standard input, seconds


class DoesNotCompile(Exception):
    """The compiler's complaint."""


@dataclasses.dataclass(frozen=True)
class Language:
    """One row of the table.

    Attributes:
      fences: what a Markdown fence calls it.
      prepare: `(sandbox, source, deadline, limits)` to a function that runs the program once.
    """

    fences: tuple[str, ...]
    prepare: Callable[[Sandbox, str, float, Limits], Run]


def _python(sandbox: Sandbox, source: str, deadline: float, limits: Limits) -> Run:
    del deadline
    return lambda stdin, seconds: sandbox.run_python([source], stdin, seconds, limits)


def _cpp(sandbox: Sandbox, source: str, deadline: float, limits: Limits) -> Run:
    """Compiles in one job; the binary then runs in a fresh one for each input."""
    compiler = _tool(sandbox, "C++", "g++", "clang++")
    script = f"{compiler} -std=c++17 -O1 -o main main.cpp >&2 && cat main"
    compiled = sandbox.run_command(
        ["/bin/sh", "-c", script],
        {"main.cpp": source.encode(errors="replace")},
        b"",
        max(0.0, deadline - time.monotonic()),
        dataclasses.replace(limits, memory_mib=_COMPILER_MIB, output_bytes=_MAX_BINARY),
    )
    if compiled.ended == "timeout":
        raise DoesNotCompile("timeout")
    if compiled.ended != "exit" or compiled.code != 0:
        raise DoesNotCompile(compiled.stderr.decode(errors="replace"))
    files = {"main": compiled.stdout}
    return lambda stdin, seconds: sandbox.run_command(["./main"], files, stdin, seconds, limits)


def _javascript(sandbox: Sandbox, source: str, deadline: float, limits: Limits) -> Run:
    del deadline
    node = _tool(sandbox, "JavaScript", "node", "nodejs")
    argv = [node, f"--max-old-space-size={limits.memory_mib // 2}", "main.js"]
    files = {"main.js": source.encode(errors="replace")}
    threads = dataclasses.replace(limits, processes=max(limits.processes, 32))
    return lambda stdin, seconds: sandbox.run_command(
        argv, files, stdin, seconds, threads, limit_data=True
    )


LANGUAGES = {
    "python": Language(("python", "py", "python3", ""), _python),
    "cpp": Language(("cpp", "c++", "cc", ""), _cpp),
    "javascript": Language(("javascript", "js", "node", ""), _javascript),
}


def language(name: str) -> Language:
    """The row of that name. Raises BadReference, naming those there are."""
    if name not in LANGUAGES:
        raise BadReference(f"no runner for language {name!r}; there are {sorted(LANGUAGES)}")
    return LANGUAGES[name]


def _tool(sandbox: Sandbox, what: str, *names: str) -> str:
    """Full path of the first of these programs that the sandbox can see."""
    if sandbox.tier != NAMESPACES:
        raise RuntimeError(f"{what} needs the sandbox's namespaces, and this machine has none")
    for name in names:
        path = os.path.realpath(shutil.which(name, path="/usr/bin:/bin:/usr/local/bin") or "")
        if path.startswith("/usr/"):
            return path
    raise RuntimeError(f"{what} needs {' or '.join(names)} under /usr, which is not installed")
