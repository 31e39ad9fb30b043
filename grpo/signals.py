"""Being asked to stop: finish the step, save, leave so that the same command goes on."""

import signal
from types import FrameType
from typing import Any, NoReturn


class StopSignal:
    """Notices SIGTERM (a preemption notice) while it is the context; `requested` tells."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> "StopSignal":
        try:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        except ValueError:  # not the main thread (a notebook server): nothing to install
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _notice(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True

    def leave(self, step: int) -> NoReturn:
        """Ends the program as a shell reports SIGTERM, after everything has been saved."""
        print(f"SIGTERM: saved after step {step}; the same command goes on from here", flush=True)
        raise SystemExit(128 + signal.SIGTERM)
