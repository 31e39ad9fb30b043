"""Knowing who waits for whom: a thread that watches this process, and looks at the others.

A collective has no time limit: where one process does not come, all others wait, and nothing says
for whom. So each process notes what it is doing where the others can read it (the key-value store
that `jax.distributed` keeps at process 0). What takes too long is spoken of, with what everybody
else is doing; and a process that fails by itself says so there, so that the others end as well.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from grpo.runtime import hosts

_LOOK_EVERY_S = 1.0
_PHASE, _FAILED = "grpo/phase/", "grpo/failed/"
_MENDABLE = (ValueError, OSError)  # errors whose message says enough
_LOST_OTHERS = 134  # exit status; the same as when jax itself finds that another process is gone


class Board(Protocol):
    """Where processes leave notes for one another."""

    def put(self, key: str, text: str) -> None:
        """Leaves a note, in place of an earlier one."""

    def read(self, folder: str) -> dict[str, str]:
        """Notes by key, of keys that begin with `folder`."""


class ServiceBoard:
    """The store of jax's coordination service, by a private way: there is no public one.

    Where that is missing (another jax), or the service is gone, notes are lost and none are found:
    then the watchdog knows this process only.
    """

    def __init__(self) -> None:
        try:
            from jax._src import distributed

            self._client: Any = distributed.global_state.client
        except (ImportError, AttributeError):
            self._client = None

    def put(self, key: str, text: str) -> None:
        """See `Board`."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(key, text, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        """See `Board`."""
        try:
            return dict(self._client.key_value_dir_get(folder))
        except Exception:
            return {}


class Watchdog:
    """Watches while it is the context.

    Args:
      watch_s: seconds from which on a phase is spoken of, and again when it has lasted twice as
        long.
      board: where processes leave notes; by default jax's, if there are several processes.
      clock: seconds since 1970, as all hosts know them.
      end: ends this process at once.
    """

    def __init__(
        self,
        watch_s: float,
        *,
        board: Board | None = None,
        clock: Callable[[], float] = time.time,
        end: Callable[[int], Any] = os._exit,
    ):
        several = jax.process_count() > 1
        self._board = board or (ServiceBoard() if several else None)
        self._watch_s, self._clock, self._end = watch_s, clock, end
        self._phase, self._waits = "starting", ""
        self._since = clock()
        self._limit = watch_s  # of the phase
        self._noted = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def phase(self, what: str) -> None:
        """Notes what begins now, such as "step 12: sampling"."""
        self._phase, self._waits, self._since, self._limit = what, "", self._clock(), self._watch_s

    def waits_for(self, whom: str) -> None:
        """Notes what the phase now waits for."""
        self._waits = whom

    def look(self) -> None:
        """One look, as the thread does every second."""
        waits = f", waits for {self._waits}" if self._waits else ""
        own = json.dumps({"what": self._phase + waits, "since": self._since})
        if self._board is not None and own != self._noted:
            self._board.put(f"{_PHASE}{jax.process_index()}", own)
            self._noted = own
        if self._board is not None:
            failed = self._board.read(_FAILED)
            failed.pop(f"{_FAILED}{jax.process_index()}", None)
            if failed:
                print(
                    f"{hosts.name()} ends too, because another one failed: "
                    f"{'; '.join(failed.values())}",
                    file=sys.stderr,
                )
                hosts.flush()
                self._end(_LOST_OTHERS)
                return
        lasted = self._clock() - self._since
        if lasted >= self._limit:
            self._limit *= 2
            print(self._report(own), file=sys.stderr, flush=True)

    def _report(self, own: str) -> str:
        number = str(jax.process_index())
        notes = self._board.read(_PHASE) if self._board is not None else {}
        found = {key.removeprefix(_PHASE): json.loads(note) for key, note in notes.items()}
        found[number] = json.loads(own)
        lines = [
            f"  process {process}: {found[process]['what']} "
            f"(for {self._clock() - found[process]['since']:.0f} s)"
            for process in sorted(found, key=int)
        ]
        return f"watchdog: {hosts.name()} makes no progress\n" + "\n".join(lines)

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            self.look()


@contextlib.contextmanager
def telling(
    agreed: tuple[type[BaseException], ...],
    *,
    board: Board | None = None,
    end: Callable[[int], Any] = os._exit,
) -> Iterator[None]:
    """An error in the body that is this process's alone ends it at once, and the others by it.

    Unwinding would wait for the others (a checkpoint is closed by all together), which wait for
    this process. By a single process errors pass as they are.

    Args:
      agreed: errors that all processes raise at the same place; they pass as well.
      board: where the error is noted; by default jax's store.
      end: ends this process at once.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, (hosts.HostError, SystemExit, *agreed)):
            raise
        text = f"{hosts.name()}: {type(error).__name__}: {error}"
        (board or ServiceBoard()).put(f"{_FAILED}{jax.process_index()}", text)
        if not isinstance(error, _MENDABLE):
            traceback.print_exception(error)
        print(f"error: {text}", file=sys.stderr)
        hosts.flush()
        if hosts.is_main():  # the notes are kept here: the others need time to read them
            time.sleep(3 * _LOOK_EVERY_S)
        end(1)
