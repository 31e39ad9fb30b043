"""Plans of the reference runs, as the table in README.md.

  python tools/reference_plans.py                # the table; minutes for each run
  python tools/reference_plans.py v5e:4x4        # the rows of one slice
  python tools/reference_plans.py --nocompile    # by formula alone, in seconds

Without the last, grpo[plan] has to be installed.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GIB = 2**30
# (experiment, slice, what is set beside)
REFERENCE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("r1_zero_qwen2p5_1p5b", "v5e:4x4", ()),
    ("r1_zero_qwen2p5_7b", "v5e:8x8", ()),
    ("r1_zero_qwen2p5_7b", "v6e:4x4", ("--config.mesh.fsdp=4",)),
    ("r1_zero_qwen2p5_32b", "v5p:4x4x4", ()),
    ("r1_zero_qwen2p5_72b", "v5p:4x4x8", ()),
)
HEAD = (
    "run",
    "slice",
    "mesh",
    "HBM a chip, GiB",
    "fits",
    "HBM from",
    "step",
    "rollout / log-probs / update",
    "sampled tokens/s/chip",
    "limit",
    "chip-hours, 1000 steps",
)


def plan(experiment: str, topology: str, settings: Sequence[str]) -> dict[str, Any]:
    """The plan of one run, as `grpo.plan --json` gives it."""
    command = [sys.executable, "-m", "grpo.plan", f"--config=experiments/{experiment}.py"]
    command += [f"--topology={topology}", "--json", *settings]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"no plan of {experiment} on {topology}: see above")
    return json.loads(done.stdout)


def row(experiment: str, facts: dict[str, Any]) -> list[str]:
    """One line of the table."""
    step = facts["step"]
    largest = max(facts["programs"], key=lambda program: program["hbm_total_bytes"])
    peak, capacity = facts["hbm_peak_bytes"] / GIB, facts["hbm_capacity_bytes"] / GIB
    split = " / ".join(f"{seconds:.1f}" for seconds in step["split_s"].values())
    return [
        f"`{experiment}`",
        facts["topology"],
        " x ".join(f"{name} {size}" for name, size in facts["mesh"].items() if size > 1),
        f"{peak:.1f} of {capacity:.1f} ({largest['kind']})",
        "yes" if facts["fits"] else "**no**",
        "compiler" if facts["compiled"] else "formula",
        f"{step['seconds']:.1f} s",
        f"{split} s",
        f"{step['tokens_per_s_per_chip']:.0f}",
        step["limit"],
        f"{step['chip_hours'] / step['steps'] * 1000:,.0f}",
    ]


def tell(cells: Sequence[str]) -> None:
    """One line of a Markdown table, at once: the next may take minutes."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main(argv: Sequence[str]) -> None:
    flags = [argument for argument in argv if argument.startswith("--")]
    slices = [argument for argument in argv if argument not in flags]
    chosen = [r for r in REFERENCE if not slices or r[1] in slices]
    tell(HEAD)
    tell(["---"] * len(HEAD))
    for name, where, more in chosen:
        tell(row(name, plan(name, where, [*more, *flags])))


if __name__ == "__main__":
    main(sys.argv[1:])
