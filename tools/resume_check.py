"""Kill a run again and again, and see that it ends as if nothing had happened.

    python tools/resume_check.py OUT --kills=5 -- --config=experiments/tiny.py --config.num_steps=12

runs the same launch command twice: once undisturbed in OUT/straight, once in OUT/killed with
`kill -9` at random moments, started again with the same command each time. Both must end with the
same `params_sha256` and the same metrics, no step missing and none twice; what measures time may
differ. Prints one JSON line; the exit status says whether they agree.

With `--processes=2` every run is of two processes on this machine, and each kill takes one of them;
the other must then end by itself before both are started again.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

TIMED = ("time/", "memory/", "tokens_per_s", "idle_share")
_PATIENCE_S = 180.0  # jax takes a silent process for dead after 100 s


class Run:
    """The processes of one run."""

    def __init__(self, workdir: Path, flags: list[str], count: int, log: TextIO):
        command = [sys.executable, "-m", "grpo.launch", f"--workdir={workdir}", *flags]
        several = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        self.processes = [
            subprocess.Popen(
                [*command, *several, f"--process_id={i}"] if count > 1 else command,
                stdout=log,
                stderr=log,
            )
            for i in range(count)
        ]

    def wait(self, seconds: float) -> bool:
        """Whether all have ended, within so many seconds."""
        until = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                return False
        return True

    def finish(self) -> None:
        """Waits for a good end."""
        for process in self.processes:
            if process.wait():
                self.kill()
                sys.exit(f"{process.args!r} ended with status {process.returncode}; see the log")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of both logs, without what measures time."""
    rows = []
    for path in (workdir / "sft" / "metrics.jsonl", workdir / "metrics.jsonl"):
        if path.exists():
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMED)} for row in rows]


def killed_run(
    workdir: Path, flags: list[str], count: int, kills: int, seconds: float, seed: int
) -> tuple[list[float], list[float]]:
    """Runs to the end through `kills` kills.

    Returns:
      The moments they came, in seconds of running time, and for each the seconds until the other
      processes had ended too.
    """
    rng = random.Random(seed)
    moments: list[float] = []
    ended: list[float] = []
    with (workdir.parent / "killed.log").open("w") as log:
        for _ in range(kills):
            run = Run(workdir, flags, count, log)
            moment = rng.uniform(0.1, 0.3) * seconds
            if run.wait(moment):
                break  # done before the kill came
            rng.choice(run.processes).kill()
            killed = time.monotonic()
            if not run.wait(_PATIENCE_S):
                run.kill()
                sys.exit(f"the others still ran {_PATIENCE_S:.0f} s after one was killed")
            moments.append(round(moment, 1))
            ended.append(round(time.monotonic() - killed, 1))
        Run(workdir, flags, count, log).finish()
    return moments, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="+", help="flags of grpo.launch, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    straight, killed = args.out / "straight", args.out / "killed"
    started = time.monotonic()
    with (args.out / "straight.log").open("w") as log:
        Run(straight, args.flags, args.processes, log).finish()
    seconds = time.monotonic() - started
    moments, ended = killed_run(killed, args.flags, args.processes, args.kills, seconds, args.seed)
    digests = [
        json.loads((w / "result.json").read_text())["params_sha256"] for w in (straight, killed)
    ]
    same_metrics = metrics(straight) == metrics(killed)
    print(
        json.dumps(
            {
                "same_params": digests[0] == digests[1],
                "same_metrics": same_metrics,
                "params_sha256": digests[0],
                "killed_after_s": moments,
                "others_ended_after_s": ended,
                "undisturbed_s": round(seconds, 1),
                "rows": len(metrics(straight)),
            }
        )
    )
    sys.exit(not (digests[0] == digests[1] and same_metrics))


if __name__ == "__main__":
    main()
