"""Kill a run again and again, and see that it ends as if nothing had happened.

    python tools/resume_check.py OUT --kills=5 -- --config=experiments/tiny.py --config.num_steps=12

runs the same launch command twice: once undisturbed in OUT/straight, once in OUT/killed with
`kill -9` at random moments, started again with the same command each time. Both must end with the
same `params_sha256` and the same metrics, no step missing and none twice; what measures time may
differ. Prints one JSON line; the exit status says whether they agree.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMED = ("time/", "tokens_per_s")


def command(workdir: Path, flags: list[str]) -> list[str]:
    return [sys.executable, "-m", "grpo.launch", f"--workdir={workdir}", *flags]


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of both logs, without what measures time."""
    rows = []
    for path in (workdir / "sft" / "metrics.jsonl", workdir / "metrics.jsonl"):
        if path.exists():
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMED)} for row in rows]


def killed_run(
    workdir: Path, flags: list[str], kills: int, seconds: float, seed: int
) -> list[float]:
    """Runs to the end through `kills` kills; the moments they came, in seconds of running time."""
    rng, moments = random.Random(seed), []
    log = (workdir.parent / "killed.log").open("w")
    for _ in range(kills):
        process = subprocess.Popen(command(workdir, flags), stdout=log, stderr=log)
        moment = rng.uniform(0.1, 0.3) * seconds
        try:
            process.wait(moment)
            break  # done before the kill came
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            moments.append(round(moment, 1))
    subprocess.run(command(workdir, flags), stdout=log, stderr=log, check=True)
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="+", help="flags of grpo.launch, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    straight, killed = args.out / "straight", args.out / "killed"
    started = time.monotonic()
    with (args.out / "straight.log").open("w") as log:
        subprocess.run(command(straight, args.flags), stdout=log, stderr=log, check=True)
    seconds = time.monotonic() - started
    moments = killed_run(killed, args.flags, args.kills, seconds, args.seed)
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
                "undisturbed_s": round(seconds, 1),
                "rows": len(metrics(straight)),
            }
        )
    )
    sys.exit(not (digests[0] == digests[1] and same_metrics))


if __name__ == "__main__":
    main()
