"""Being asked to stop: finish the step, save, leave so that the same command goes on."""

import signal
from types import FrameType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from grpo.runtime import hosts


class StopSignal:
    """Notices SIGTERM (a preemption notice) while it is the context; `requested` tells.

    Where `jax.distributed` runs, it has a handler of its own that one installed here would disable:
    then the signal reaches one process or several, and all of them stop after the same step.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._asked = 0
        self._before: Any = None

    def __enter__(self) -> "StopSignal":
        if jax.distributed.is_initialized():
            return self
        try:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        except ValueError:  # not the main thread (a notebook server): nothing to install
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _notice(self, _signal: int, _frame: FrameType | None) -> None:
        self._noticed = True

    def requested(self) -> bool:
        """Whether to stop now; every process asks once a step, and gets the same answer."""
        if not jax.distributed.is_initialized():
            return self._noticed
        # Each stage counts its steps from 0; the notice needs numbers that only grow.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def leave(self, step: int) -> NoReturn:
        """Ends the program as a shell reports SIGTERM, after everything has been saved."""
        hosts.say(f"SIGTERM: saved after step {step}; the same command goes on from here")
        raise SystemExit(128 + signal.SIGTERM)
