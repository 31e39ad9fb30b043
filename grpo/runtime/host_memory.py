"""Memory of the host, which on a CPU is where all arrays are. On Linux with glibc; else no-ops."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_LARGE = 1 << 20  # bytes


def return_large_blocks() -> None:
    """From now on, blocks of 1 MiB or more go back to the system as soon as they are freed.

    Left to itself glibc learns, from the first large array freed, to keep all up to 32 MiB: the
    decode form of SmolLM2-135M then still takes 0.5 GiB while the update runs.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)


def return_free_pages() -> None:
    """Gives back what is free now; after compiling for SmolLM2-135M that is 0.3 GiB."""
    _glibc("malloc_trim", 0)


def resident_gib() -> dict[str, float]:
    """What this process holds now, as a metric; empty where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return {}
    pages = int(status.read_text().split()[1])
    return {"memory/host_gib": pages * os.sysconf("SC_PAGE_SIZE") / 2**30}


def _glibc(name: str, *arguments: Any) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
