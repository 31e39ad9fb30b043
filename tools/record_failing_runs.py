"""Record small runs that fail, each in its own way, for the tests of the diagnosis.

    python tools/record_failing_runs.py WORK [--out=tests/golden/recorded] [--only=healthy,too_hard]

trains the model of experiments/tiny.py from one cold start (made once, in WORK/cold_start) for
twenty steps with each of the settings below, in WORK/NAME, and keeps in OUT/NAME what the diagnosis
reads: metrics, rounded to what matters; the sections of the configuration it asks for; the
statuses of the last completions; the report of a gate that stopped the run. A run that is already
in WORK is not made again. About ten minutes on two idle cores.
"""

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from grpo.config import Config
from grpo.data.procedural import DigitChain
from grpo.diagnose import brief
from grpo.gates import GateError
from grpo.launch import load_experiment
from grpo.train import train
from rewards.answers import numeric_answer
from rewards.api import Problem
from rewards.formats import r1_format

ROOT = Path(__file__).parent.parent
STEPS = 20

# ---- Rewards that are wrong --------------------------------------------------------------------


def crashing(completion: str, problem: Problem) -> float:
    """The verifier, with a bug that about one text in four meets."""
    if sum(map(ord, completion)) % 4 == 0:
        raise KeyError("a text nobody thought of")
    return numeric_answer(completion, problem)


def slow(completion: str, problem: Problem) -> float:
    """The verifier, past any deadline on about one text in eight."""
    if sum(map(ord, completion)) % 8 == 0:
        time.sleep(60)
    return numeric_answer(completion, problem)


def boxed(completion: str, problem: Problem) -> float:
    """A format that the cold start never showed."""
    return float("\\boxed{" in completion)


def even_teens(completion: str, problem: Problem) -> float:
    """What a hole in a verifier pays for: the same few answers, whatever was asked."""
    return float(re.search("<answer>1[02468]</answer>$", completion) is not None)


# ---- Settings that are wrong -------------------------------------------------------------------


def healthy(config: Config) -> None:
    """The experiment, shorter."""


def rate_zero(config: Config) -> None:
    config.optim.learning_rate = 0.0


def rate_too_small(config: Config) -> None:
    config.optim.learning_rate = 1e-8


def rate_too_large(config: Config) -> None:
    config.optim.learning_rate = 2e-2


def truncated(config: Config) -> None:
    config.sample.max_new_tokens = 24  # the chains need about fifty


def too_hard(config: Config) -> None:
    config.data.train = DigitChain(size=2_000, min_terms=7, max_terms=8, high=9)
    config.data.max_prompt_tokens = 20
    config.sample.max_new_tokens = 160


def too_easy(config: Config) -> None:
    # Every text of the cold start has this form.
    config.reward.functions = ((1.0, r1_format),)
    config.reward.gold_check = 0


def reward_fails(config: Config) -> None:
    config.reward.functions = ((1.0, crashing), (0.1, r1_format))
    config.reward.gold_check = 0
    config.gates.max_failure_rate = 1.0


def reward_late(config: Config) -> None:
    config.reward.functions = ((1.0, slow), (0.1, r1_format))
    config.reward.gold_check = 0
    config.reward.deadline_s = 0.5


def reward_breaks(config: Config) -> None:
    """As `reward_fails`, with the gate as it is."""
    config.reward.functions = ((1.0, crashing), (0.1, r1_format))
    config.reward.gold_check = 0


def format_never_met(config: Config) -> None:
    config.reward.functions = ((1.0, numeric_answer), (0.1, boxed))


def reward_hole(config: Config) -> None:
    config.reward.functions = ((0.1, numeric_answer), (1.0, even_teens))
    config.optim.learning_rate = 5e-4


BROKEN: dict[str, Callable[[Config], None]] = {
    setting.__name__: setting
    for setting in (
        healthy,
        rate_zero,
        rate_too_small,
        rate_too_large,
        truncated,
        too_hard,
        too_easy,
        reward_fails,
        reward_late,
        reward_breaks,
        format_never_met,
        reward_hole,
    )
}

# ---- Running -----------------------------------------------------------------------------------


def base_config(num_steps: int) -> Config:
    """The tiny experiment at half its batch and without evaluations."""
    config = load_experiment(str(ROOT / "experiments/tiny.py"))()
    config.num_steps = num_steps
    config.optim.warmup_updates = min(config.optim.warmup_updates, num_steps)
    config.algo.problems_per_step = 8
    config.eval.every = 0
    config.log.save_every = 1_000
    return config


def run(name: str, work: Path) -> None:
    """Trains with one setting in WORK/NAME, from the shared cold start."""
    cold, workdir = work / "cold_start", work / name
    if not (cold / "result.json").exists():
        config = base_config(num_steps=0)
        train(config, cold, baseline=config)
    if (workdir / "finished").exists():
        return
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(cold / "sft", workdir / "sft")
    config = base_config(STEPS)
    BROKEN[name](config)
    print(f"---- {name}", flush=True)
    try:
        train(config, workdir, baseline=config)
    except GateError as stopped:
        print(stopped)
    (workdir / "finished").touch()


# ---- Keeping -----------------------------------------------------------------------------------

_LEFT_OUT = ("reward/pool/", "policy/ratio", "policy/loss", "policy/objective", "rollout/tokens_")
_SECTIONS = ("algo", "eval", "gates", "optim", "reward", "sample")
_ROLLOUTS_KEPT = 16


def keep(workdir: Path, out: Path) -> None:
    """Copies what the diagnosis reads, and no more, from a run's folder to `out`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    metrics = read_rows(workdir / "metrics.jsonl")
    write_rows(out / "metrics.jsonl", [shortened(row) for row in metrics])
    config = json.loads((workdir / "config.json").read_text())
    sections = {name: config[name] for name in _SECTIONS}
    (out / "config.json").write_text(json.dumps(sections, indent=2) + "\n")
    rollouts = read_rows(workdir / "rollouts.jsonl")[-_ROLLOUTS_KEPT:]
    if any(status != "ok" for row in rollouts for status in row["statuses"].values()):
        kept = [{name: row[name] for name in ("step", "uid", "statuses")} for row in rollouts]
        write_rows(out / "rollouts.jsonl", kept)
    for alarms in workdir.glob("gates/*/alarms.json"):
        copy = out / alarms.relative_to(workdir)
        copy.parent.mkdir(parents=True)
        # Where it was recorded is nobody's business.
        copy.write_text(alarms.read_text().replace(str(workdir), "WORKDIR"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics to three digits, without those that no finder reads."""
    return {
        name: float(f"{value:.3g}") if isinstance(value, float) else value
        for name, value in row.items()
        if not name.startswith(_LEFT_OUT)
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/golden/recorded")
    parser.add_argument("--only", default=",".join(BROKEN), help="names, separated by commas")
    parsed = parser.parse_args()
    parsed.only = parsed.only.split(",")
    if unknown := sorted(set(parsed.only) - BROKEN.keys()):
        parser.error(f"no such settings: {unknown}; there are {sorted(BROKEN)}")
    return parsed


def main() -> None:
    """Records every run asked for, and prints what the diagnosis says of it."""
    arguments = parse()
    # What one run compiles the next ones load.
    jax.config.update("jax_compilation_cache_dir", str(arguments.work / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for name in arguments.only:
        run(name, arguments.work)
        keep(arguments.work / name, arguments.out / name)
    for name in arguments.only:
        print(f"---- {name}\n{brief(arguments.out / name)}")


if __name__ == "__main__":
    main()
