"""The watchdog: what it says, when, and what it does about a process that failed."""

import json
import socket
import threading

import pytest

from grpo.gates import GateError
from grpo.runtime import hosts
from grpo.runtime.watchdog import Watchdog, telling


class FakeBoard:
    """Notes in a dict."""

    def __init__(self, **notes: str):
        self.notes = {key.replace("_", "/"): text for key, text in notes.items()}

    def put(self, key: str, text: str) -> None:
        self.notes[key] = text

    def read(self, folder: str) -> dict[str, str]:
        return {key: text for key, text in self.notes.items() if key.startswith(folder)}


class FakeClock:
    """Seconds, which a test moves on by itself."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def three(monkeypatch):
    """This is process 1 of 3."""
    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr("jax.process_index", lambda: 1)


def note(what, since):
    return json.dumps({"what": what, "since": since})


def test_a_phase_that_lasts_is_spoken_of_with_what_the_others_do(three, clock, capsys):
    board = FakeBoard(grpo_phase_0=note("step 12: sampling", 950.0))
    watchdog = Watchdog(60, board=board, clock=clock)
    watchdog.phase("step 12: sampling")
    watchdog.waits_for("the verdicts of the other processes")
    clock.advance(59)
    watchdog.look()
    assert capsys.readouterr().err == ""
    clock.advance(1)
    watchdog.look()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("watchdog: process 1 of 3 (")
    assert said[1:] == [
        "  process 0: step 12: sampling (for 110 s)",
        "  process 1: step 12: sampling, waits for the verdicts of the other processes (for 60 s)",
    ]
    # What the others will read of it.
    assert json.loads(board.notes["grpo/phase/1"])["what"].endswith("of the other processes")


def test_it_speaks_again_when_that_has_lasted_twice_as_long_and_not_before(clock, capsys):
    watchdog = Watchdog(60, board=FakeBoard(), clock=clock)
    spoke = []
    for _ in range(8):
        clock.advance(30)
        watchdog.look()
        spoke.append(bool(capsys.readouterr().err))
    assert spoke == [False, True, False, True, False, False, False, True]  # at 60, 120 and 240 s
    watchdog.phase("the next one")
    clock.advance(59)
    watchdog.look()
    assert capsys.readouterr().err == ""


def test_a_process_ends_when_another_has_failed(three, clock, capsys):
    ends: list[int] = []
    board = FakeBoard()
    watchdog = Watchdog(60, board=board, clock=clock, end=ends.append)
    board.put("grpo/failed/1", "its own, which another part of it sees to")
    watchdog.look()
    assert ends == []
    board.put("grpo/failed/2", "process 2 of 3 (h): OSError: no disk")
    watchdog.look()
    assert ends == [134]
    assert "because another one failed: process 2 of 3 (h): OSError: no disk" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("error, traced", [(OSError("no disk"), False), (KeyError("bug"), True)])
def test_an_error_of_one_process_is_told_before_anything_is_unwound(three, capsys, error, traced):
    board = FakeBoard()
    ends: list[int] = []
    body = telling((GateError,), board=board, end=ends.append)
    body.__enter__()
    assert body.__exit__(type(error), error, None)  # by now the process would be gone
    assert ends == [1]
    assert board.notes["grpo/failed/1"].endswith(f"{type(error).__name__}: {error}")
    said = capsys.readouterr().err
    assert f"error: process 1 of 3 ({socket.gethostname()}): {type(error).__name__}" in said
    assert (type(error).__name__ + ":" in said.splitlines()[0]) is not traced


@pytest.mark.parametrize("error", [hosts.HostError("x"), GateError("x"), SystemExit(143)])
def test_what_all_processes_raise_passes(three, error):
    board = FakeBoard()
    with (
        pytest.raises(type(error)),
        telling((GateError,), board=board, end=lambda code: pytest.fail("ended")),
    ):
        raise error
    assert board.notes == {}


def test_by_a_single_process_errors_pass_as_they_are():
    with pytest.raises(OSError), telling((), end=lambda code: pytest.fail("ended")):
        raise OSError


def test_it_looks_by_itself_and_ends_with_its_block(monkeypatch):
    looked = threading.Event()
    monkeypatch.setattr("grpo.runtime.watchdog._LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(Watchdog, "look", lambda self: looked.set())
    with Watchdog(60) as watchdog:
        assert looked.wait(10)
    assert not watchdog._thread.is_alive()
