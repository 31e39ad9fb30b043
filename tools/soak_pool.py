"""Soaks the reward pool: mixed jobs, workers killed at random; prints one JSON line.

  python tools/soak_pool.py
  python tools/soak_pool.py --jobs=400 --kill_every_s=0.1

Each completion says what the reward is to do and what it is to return, so every verdict is checked.
The exit status is 1 if a verdict is missing, doubled, someone else's, or late. A job may lose its
worker twice, by chance; then it is reported as lost, which is counted and is no fault.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from rewards.api import Batched, Component, Problem, Score, Status
from rewards.pool import RewardPool

DEADLINE_S = 0.25
LATE_S = 0.5
_NEVER = 3_600.0

# What a job does, and how many of a thousand do it.
MIX = {"quick": 900, "busy": 60, "raise": 20, "hang": 8, "exit": 2, "big": 10}
EXPECTED = {"raise": Status.CRASH, "hang": Status.TIMEOUT, "exit": Status.LOST}


def mixed(completion: str, problem: Problem) -> float:
    """Does as the completion says and returns the share that it names."""
    deed, share, _ = completion.split(" ", 2)
    if deed == "raise":
        raise ValueError(share)
    if deed == "hang":
        time.sleep(_NEVER)
    if deed == "exit":
        os._exit(0)
    if deed == "busy":
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass
    return float(share)


def shares(completions: Sequence[str], problems: Sequence[Problem]) -> list[float]:
    """The batched component."""
    return [float(completion.split(" ", 2)[1]) for completion in completions]


class Killer(threading.Thread):
    """Kills a process of this process's pool every so often, picked at random.

    Mostly a worker; one time in fifty the process that forks them, and they die with it.
    """

    def __init__(self, every_s: float, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.every_s, self.rng = every_s, rng
        self.kills = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(self.rng.expovariate(1 / self.every_s)):
            zygotes = children(os.getpid())
            workers = [pid for zygote in zygotes for pid in children(zygote)]
            pids = zygotes if self.rng.random() < 0.02 else workers
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.rng.choice(pids), signal.SIGKILL)
                    self.kills += 1


def children(pid: int) -> list[int]:
    """The live children of a process; Linux only."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def faults_of(completion: str, scores: Sequence[Score]) -> str | None:
    """What is wrong with a verdict; None if nothing is."""
    deed, share, _ = completion.split(" ", 2)
    plain, batched = scores
    if batched.status is not Status.LOST and batched.value != float(share):
        return f"batched {batched}"
    if plain.status is Status.LOST:  # by its own doing or by two kills; both are counted
        return None
    expected = EXPECTED.get(deed, Status.OK)
    if plain.status is not expected:
        return f"{deed}: {plain}"
    if expected is Status.OK and plain.value != float(share):
        return f"someone else's: {plain}"
    if plain.seconds > DEADLINE_S + LATE_S:
        return f"late: {plain}"
    return None


def main(arguments: Sequence[str]) -> None:
    """Runs the soak and prints what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kill_every_s", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    rng = random.Random(options.seed)
    deeds = rng.choices(list(MIX), list(MIX.values()), k=options.jobs)
    completions = [
        f"{deed} {i / options.jobs!r} {'x' * 200_000 * (deed == 'big')}"
        for i, deed in enumerate(deeds)
    ]
    answered: collections.Counter[int] = collections.Counter()  # each callback runs once a verdict
    components: list[Component] = [(1.0, mixed), (1.0, Batched(shares, wait_s=0.01, retries=9))]
    started = time.monotonic()
    killer = Killer(options.kill_every_s, rng)
    with RewardPool(
        components, workers=options.workers, deadline_s=DEADLINE_S, max_open=500
    ) as pool:
        killer.start()
        futures: list[Future[list[Score]]] = []
        for i, completion in enumerate(completions):
            future = pool.submit(completion, Problem(str(i), prompt="?"))
            future.add_done_callback(lambda _, i=i: answered.update([i]))  # type: ignore[misc]
            futures.append(future)
        scores = [future.result(_NEVER) for future in futures]
        killer.done.set()
        counts = pool.counts()
    pairs = zip(completions, scores, strict=True)
    faults = [fault for completion, verdict in pairs if (fault := faults_of(completion, verdict))]
    plain = [verdict[0] for verdict in scores]
    report = {
        "jobs": options.jobs,
        "answered_once": sum(n == 1 for n in answered.values()),
        "faults": len(faults),
        "kills": killer.kills,
        "lost_by_two_kills": sum(
            verdict.status is Status.LOST and deed != "exit"
            for deed, verdict in zip(deeds, plain, strict=True)
        ),
        "latest_after_deadline_s": round(max(s.seconds for s in plain) - DEADLINE_S, 3),
        "seconds": round(time.monotonic() - started, 1),
        "counts": counts,
    }
    print(json.dumps(report))
    if faults or report["answered_once"] != options.jobs:
        print("\n".join(faults[:20]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
