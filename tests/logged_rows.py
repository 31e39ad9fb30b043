"""The rows that a run logs: reading them, comparing them, and stopping the run after so many."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from grpo.metrics import MetricLog

# Starts of the names of what measures the machine, and so differs between runs that are the same.
MACHINE = ("time/", "memory/", "rollout/tokens_per_s", "rollout/idle_share", "sft/tokens_per_s")


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:  # `splitlines` would split a completion's U+2028
        return [json.loads(line) for line in lines]


def timeless(path: Path) -> list[dict[str, Any]]:
    """Rows without the fields that measure the machine."""
    return [{n: v for n, v in row.items() if not n.startswith(MACHINE)} for row in rows(path)]


def stop_after(rows_logged: int, patch: pytest.MonkeyPatch) -> None:
    """The process gets a SIGTERM as soon as so many steps are logged, of any stage."""
    log, left = MetricLog.log, itertools.count(rows_logged, -1)

    def log_then_stop(self, step, metrics):
        log(self, step, metrics)
        if next(left) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(MetricLog, "log", log_then_stop)
