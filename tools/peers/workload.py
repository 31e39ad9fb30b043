"""What every trainer of the comparison is given to do, and how its times become one JSON line.

P prompts a step, G completions each. Two kinds of work: random weights in SmolLM2-135M's shape on
random prompts, where practically no completion ends early and so every step is full length; and
real weights (`--model`) on GSM8K questions (`--data`), where lengths come as they come.

It runs in the environments of the other trainers: the standard library and numpy only.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# SmolLM2-135M, with random weights the vocabulary's last two ids are the stop token and padding.
WIDTH, MLP_WIDTH, HEADS, KV_HEADS, HEAD_WIDTH = 576, 1536, 9, 3, 64
NORM_EPS, ROPE_THETA = 1e-5, 100_000.0
LEARNING_RATE = 1e-6
_FIRST_ID, _LAST_ID = 5, 40_000  # what random prompts are made of: clear of special tokens


def arguments(summary: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags that all trainers share; `eos` and `pad` are added to them.

    Raises:
      SystemExit: a flag is unknown, the microbatches are unequal, there is no step to time, or
        only one of `--model` and `--data` is given.
    """
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt_len", type=int, default=128, help="tokens; with --data, at most")
    parser.add_argument("--new", type=int, default=128, help="tokens a completion, at most")
    parser.add_argument("--steps", type=int, default=4, help="the first warms up: it is not timed")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--micro", type=int, default=0, help="prompts a microbatch; 0: all at once")
    parser.add_argument("--beta", type=float, default=0.0, help="the KL penalty's weight")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", help="Hugging Face folder of SmolLM2-135M")
    parser.add_argument("--data", help="GSM8K as JSON lines: a 'question' each")
    args = parser.parse_args(argv)
    args.micro = args.micro or args.prompts
    if args.prompts % args.micro:
        parser.error(f"--prompts={args.prompts} is no multiple of --micro={args.micro}")
    if args.steps < 2:
        parser.error(f"--steps={args.steps} leaves none to time: the first one warms up")
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together: real weights are asked real questions")
    args.eos, args.pad = args.vocab - 1, args.vocab - 2
    return args


def random_prompts(args: argparse.Namespace, length: int) -> list[list[int]]:
    """`length` random ids for each prompt of the run, the same for every trainer."""
    ids = np.random.default_rng(0).integers(
        _FIRST_ID, _LAST_ID, (args.prompts * args.steps, length)
    )
    return ids.tolist()


def questions(args: argparse.Namespace) -> list[str]:
    """The first questions of `--data`, as many as the run asks.

    Raises:
      ValueError: the file has fewer.
    """
    count = args.prompts * args.steps
    with open(args.data, encoding="utf-8") as lines:
        found = [json.loads(line)["question"] for _, line in zip(range(count), lines, strict=False)]
    if len(found) < count:
        raise ValueError(f"{args.data} has {len(found)} questions, the run asks {count}")
    return found


def random_rewards(count: int) -> list[float]:
    """Rewards that differ within a group, so that every group has an advantage to train on."""
    return np.random.default_rng(1).random(count).tolist()


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One call of the trainer's sampler: seconds of `time.perf_counter`, tokens sampled."""

    start: float
    end: float
    tokens: int


class Stopwatch:
    """Notes each rollout of a trainer; a step lasts from one rollout's start to the next one's."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def timed(
        self, sample: Callable[..., Any], completions: Callable[[Any], Sequence[Any]]
    ) -> Callable[..., Any]:
        """`sample`, timed; `completions` finds the sampled token lists in what it returns."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = sample(*args, **kwargs)
            end = time.perf_counter()
            tokens = sum(len(completion) for completion in completions(out))
            self.rollouts.append(Rollout(start, end, tokens))
            return out

        return wrapped


def measured(rollouts: Sequence[Rollout], end: float, steps: int) -> dict[str, Any]:
    """Times of the steps after the first.

    Args:
      rollouts: one a step, in order.
      end: when training returned, on the rollouts' clock.
      steps: how many rollouts there must be.

    Returns:
      `first_step_s`, compilation included; of the others `rollout_s`, `update_s` (all of a step
      but its rollout) and `step_s`, lists in seconds; `tokens` sampled, the median step's;
      `rollout_tok_s` and `step_tok_s`, all tokens sampled over all seconds.

    Raises:
      RuntimeError: the trainer sampled more or less often than once a step, so that these would
        not be the times of steps.
    """
    if len(rollouts) != steps:
        raise RuntimeError(f"{steps} steps, but the trainer sampled {len(rollouts)} times")
    starts = [rollout.start for rollout in rollouts] + [end]
    step_s = [after - before for before, after in itertools.pairwise(starts)]
    rollout_s = [rollout.end - rollout.start for rollout in rollouts]
    tokens = [rollout.tokens for rollout in rollouts[1:]]
    update_s = [step - part for step, part in zip(step_s, rollout_s, strict=True)]
    return {
        "first_step_s": round(step_s[0], 2),
        "rollout_s": [round(s, 3) for s in rollout_s[1:]],
        "update_s": [round(s, 3) for s in update_s[1:]],
        "step_s": [round(s, 3) for s in step_s[1:]],
        "tokens": statistics.median(tokens),
        "rollout_tok_s": round(sum(tokens) / sum(rollout_s[1:]), 1),
        "step_tok_s": round(sum(tokens) / sum(step_s[1:]), 1),
    }


def report(
    trainer: str,
    versions: dict[str, str],
    parameters: int,
    args: argparse.Namespace,
    stopwatch: Stopwatch,
    end: float,
) -> None:
    """Prints the run as one JSON line: `measured`, what was run, and the most memory held."""
    line = {
        "trainer": trainer,
        "versions": versions,
        "parameters": parameters,
        "workload": vars(args),
        **measured(stopwatch.rollouts, end, args.steps),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(line), flush=True)
