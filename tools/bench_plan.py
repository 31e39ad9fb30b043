"""How near a plan's memory is to what a run then really uses, on this machine's CPU.

  python tools/bench_plan.py tiny
  python tools/bench_plan.py smollm2 --model=FOLDER     # a Hugging Face folder
  python tools/bench_plan.py all --model=FOLDER         # each in a process of its own

Prints a JSON line: the largest program's bytes as `python -m grpo.plan --topology=local` has them,
and the peak of a real rollout and update. That is the most the process held (VmHWM), less what it
holds with everything loaded and compiled and no array alive.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from grpo.ask import ask
from grpo.build import build
from grpo.config import Config, ModelConfig, SftConfig
from grpo.launch import load_experiment
from grpo.learn import learn, shaped
from grpo.planning.chips import parse_topology
from grpo.planning.make import Options, make_plan
from grpo.planning.shapes import find_arch
from grpo.runtime.host_memory import return_free_pages, return_large_blocks

MIB = 2**20
TINY = Path(__file__).parent.parent / "experiments" / "tiny.py"


def config_of(case: str, model: str) -> Config:
    """The run that is measured: the tiny experiment, or the same problems for SmolLM2-135M."""
    config = load_experiment(str(TINY))()
    config.sft = SftConfig()
    config.eval.every = 0
    if case == "smollm2":
        config.model = ModelConfig(source=model, compute_dtype="float32", remat="attn")
        config.data.max_prompt_tokens, config.sample.max_new_tokens = 128, 64
        config.sample.slots, config.algo.problems_per_step = 16, 2
        config.algo.microbatch_tokens = 1024
    return config


def predicted(config: Config) -> tuple[float, str]:
    """Bytes of the largest program, and its name."""
    options = Options(extrapolate=False, suggest=False, every_size=True)
    plan = make_plan(config, find_arch(config.model), parse_topology("local"), options, print)
    return plan.largest.total, plan.largest.kind


def measured(config: Config) -> float:
    """Bytes of a rollout and an update beyond those of the compiled programs."""
    with ExitStack() as stack:
        workdir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = build(config, workdir, stack, config)
        state = run.new_state(run.policy.initial_params())
        run.engine.compile(run.policy.for_decoding(state.params))
        run.update.compile(run.empty_batch)
        del state
        gc.collect()
        return_free_pages()
        bare = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
        state = run.new_state(run.policy.initial_params())
        asked = ask(run, state, 0)
        # Rewards that differ: a group without advantage would not be computed.
        scores = shaped(run, asked.rollout, asked.scores)
        reward_PG = np.random.default_rng(0).random(scores.reward_PG.shape, np.float32)
        scores = type(scores)(**{**vars(scores), "reward_PG": reward_PG})
        state, _ = learn(run, state, None, asked.rollout, scores)
        jax.block_until_ready(state)
        return _status("VmHWM") - bare


def _status(name: str) -> float:
    """Bytes that /proc/self/status gives under a name."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=("tiny", "smollm2", "all"))
    parser.add_argument("--model", default="", help="folder of SmolLM2-135M")
    args = parser.parse_args(argv)
    if args.case != "tiny" and not args.model:
        parser.error("--model is needed for SmolLM2-135M")
    if args.case == "all":
        for case in ("tiny", "smollm2"):
            command = [sys.executable, __file__, case, f"--model={args.model}"]
            subprocess.run(command, check=True)
        return
    return_large_blocks()
    with tempfile.TemporaryDirectory() as folder:  # so that everything is compiled once
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        expected, kind = predicted(config_of(args.case, args.model))
        found = measured(config_of(args.case, args.model))
    result = {
        "case": args.case,
        "predicted_mib": round(expected / MIB, 1),
        "largest_program": kind,
        "measured_mib": round(found / MIB, 1),
        "error": round(expected / found - 1, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
