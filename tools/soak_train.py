"""Runs an experiment for many short steps and prints as JSON whether its memory grows.

  python tools/soak_train.py                    # experiments/tiny.py, 300 steps of 4 x 4
  python tools/soak_train.py --steps=100 --workdir=/tmp/soak

The steps are small, so that there are many. What the process holds is compared between the second
sixth of the run, when everything has been compiled and seen once, and the last. The exit status is
1 if the later median is more than --slack_mib above the earlier, or if anything was compiled
meanwhile.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grpo.launch import load_experiment
from grpo.train import train


def soak(experiment: Path, workdir: Path, steps: int) -> list[dict[str, float]]:
    """The metrics of every step."""
    config = load_experiment(str(experiment))()
    config.num_steps = steps
    config.algo.problems_per_step = config.algo.group_size = 4
    config.algo.minibatches = 1
    config.sample.slots = 16
    config.eval.every, config.log.save_every, config.log.rollouts_every = steps, 50, 1
    train(config, workdir, baseline=config)
    with open(workdir / "metrics.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if "memory/host_gib" in row]


def growth(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of memory, early and late, and programs compiled between the two, of a run."""
    sixth = len(rows) // 6
    early, late = rows[sixth : 2 * sixth], rows[-sixth:]
    held = [statistics.median(row["memory/host_gib"] for row in part) for part in (early, late)]
    return {
        "steps": len(rows),
        "early_gib": round(held[0], 4),
        "late_gib": round(held[1], 4),
        "grown_mib": round((held[1] - held[0]) * 1024, 1),
        "compiled": late[-1]["engine/compiled"] - early[0]["engine/compiled"],
    }


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Many short steps: does memory grow?")
    parser.add_argument("--config", type=Path, default=Path("experiments/tiny.py"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--slack_mib", type=float, default=16.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = growth(soak(args.config, args.workdir or Path(folder), args.steps))
    print(json.dumps(result))
    sys.exit(result["grown_mib"] > args.slack_mib or bool(result["compiled"]))


if __name__ == "__main__":
    main()
