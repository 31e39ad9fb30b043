"""Memory of the host, which on a CPU is where all arrays are. On Linux with glibc; else no-ops."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGE, _KEPT = 1 << 25, 1 << 26  # bytes


def return_large_blocks() -> None:
    """From now on, blocks of 32 MiB or more go back to the system as soon as they are freed.

    Smaller ones are kept for what asks next, up to 64 MiB at the end of a heap: matrix products ask
    for room to pack their operands into, again and again, and pages that are new each time can take
    as long as the products.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, _LARGE)
    _glibc("mallopt", _M_TRIM_THRESHOLD, _KEPT)


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
