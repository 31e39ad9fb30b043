"""Seconds: of each program by its roofline, of a step by how often each runs."""

import dataclasses
import math
from functools import partial

from grpo.engine.engine import buckets
from grpo.planning import formulas
from grpo.planning.chips import Chip
from grpo.planning.lower import Compiled, Parts
from grpo.planning.memory import split_of, width_of
from grpo.structs import Program


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know.

    Attributes:
      mean_prompt, mean_tokens: of a prompt and of a completion; 0: half of the longest.
      decode_efficiency: share of the roofline that decoding reaches. Published decoders in JAX
        reach 0.5 to 0.85 at tens of rows a device (jax-llm-examples), serving stacks less.
      compute_efficiency: share of the peak operations that the rest reaches; MaxText trains at
        0.45 to 0.7.
      row_fill: share of a packed row that is tokens.
    """

    mean_prompt: int = 0
    mean_tokens: int = 0
    decode_efficiency: float = 0.5
    compute_efficiency: float = 0.4
    row_fill: float = 0.9


@dataclasses.dataclass(frozen=True)
class Timing:
    """One run of a program; of "decode", one token of every slot.

    Attributes:
      runs: times it runs a step.
      roofline_s: by what takes it ("compute", "memory", "interconnect").
      predicted_s: with the assumed efficiency.
    """

    kind: str
    label: str
    work: formulas.Work
    link_bytes: float
    runs: float
    roofline_s: dict[str, float]
    predicted_s: float


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of the run.

    Attributes:
      seconds: predicted; the host's work (scoring, packing, checkpoints) is not in it.
      split_s: seconds of the rollout, the log-probs, the update.
      steps: of the run.
      tokens_per_s_per_chip: sampled.
      limit: the program that takes longest, and what of the chip it waits for.
      chip_hours: of the whole run.
    """

    seconds: float
    steps: int
    split_s: dict[str, float]
    tokens_per_s_per_chip: float
    limit: str
    chip_hours: float


_STAGE = {
    "log-probs": "log-probs",
    "no gradients": "update",
    "gradients": "update",
    "optimiser": "update",
}


def timings(
    parts: Parts,
    programs: list[Program],
    labels: list[str],
    compiled: list[Compiled] | None,
    chip: Chip,
    assumed: Assumptions,
) -> list[Timing]:
    """Of each program; collectives from the compiler where it tells of them, else by formula."""
    found = []
    for number, (program, label) in enumerate(zip(programs, labels, strict=True)):
        work = _work(parts, program, assumed)
        told = compiled[number].link_bytes if compiled is not None else None
        links = sum(told.values()) if told is not None else _link_bytes(parts, program)
        roofline = formulas.parts(work, chip, links)
        share = (
            assumed.decode_efficiency if "decode" in program.kind else assumed.compute_efficiency
        )
        predicted = (roofline["compute"] + roofline["memory"]) / share + roofline["interconnect"]
        runs = _runs(parts, program, assumed)
        found.append(Timing(program.kind, label, work, links, runs, roofline, predicted))
    return found


def step(parts: Parts, found: list[Timing], chips: int, assumed: Assumptions) -> Step:
    """How long a step takes, and the run."""
    split = {"rollout": 0.0, "log-probs": 0.0, "update": 0.0}
    for timing in found:
        split[_STAGE.get(timing.kind, "rollout")] += timing.runs * timing.predicted_s
    seconds = sum(split.values())
    longest = max(found, key=lambda t: t.runs * t.predicted_s)
    waits = max(longest.roofline_s, key=lambda name: longest.roofline_s[name])
    tokens = parts.schedule.completions * _mean_tokens(parts, assumed)
    return Step(
        seconds=seconds,
        steps=parts.config.num_steps,
        split_s=split,
        tokens_per_s_per_chip=tokens / seconds / chips,
        limit=f"{longest.kind}: {waits}",
        chip_hours=parts.config.num_steps * seconds * chips / 3600,
    )


def view_shares(parts: Parts, completions: int) -> dict[int, float]:
    """The views that a rollout's decode steps have, and the share of the steps that each has.

    Where every completion has a slot, they grow together through the compiled views; where slots
    are refilled, some slot nearly always is near the end.
    """
    longest, slots = parts.engine.max_new, parts.engine.num_slots
    if slots < completions:
        return {longest: 1.0}
    views = buckets(longest)
    steps = [view - before for before, view in zip((0, *views), views, strict=False)]
    return {view: count / longest for view, count in zip(views, steps, strict=True)}


def microbatches(parts: Parts, assumed: Assumptions) -> int:
    """Of one update, if completions and prompts are all of mean length."""
    shape, G = parts.row_shape, parts.schedule.group_size
    prompt, tokens = _mean_prompt(parts, assumed), _mean_tokens(parts, assumed)
    room = shape.tokens * assumed.row_fill
    fits = max(1, int(min(room // tokens, shape.completion_tokens // tokens)))
    while fits > 1 and math.ceil(fits / G) * prompt + fits * tokens > room:
        fits -= 1
    samples = parts.schedule.completions // parts.schedule.minibatches
    return math.ceil(math.ceil(samples / fits) / shape.rows)


def _runs(parts: Parts, program: Program, assumed: Assumptions) -> float:
    """Times a step; of smaller sizes and of the tail 0: the largest stand for them."""
    engine, algo, kind = parts.engine, parts.config.algo, program.kind
    completions, tokens = parts.schedule.completions, _mean_tokens(parts, assumed)
    prompts = completions / min(engine.slots_per_prompt, parts.schedule.group_size)
    if kind in ("hand-over", "empty cache"):
        return 1
    if kind == "prefill":
        rows, length = program.arguments[2].shape
        return math.ceil(prompts / rows) if length == engine.max_prompt else 0
    if kind == "insert":
        return max(1, prompts / max(1, engine.num_prompts // 8))
    if kind == "decode":
        if program.static["view"] != engine.max_new:
            return 0
        return completions * tokens / min(engine.num_slots, completions) + engine.max_new - tokens
    updates, number = parts.schedule.updates_per_step, microbatches(parts, assumed)
    passes = bool(algo.kl_coef) + (not parts.schedule.on_policy)
    return {
        "log-probs": passes * number * algo.minibatches,
        "no gradients": updates,
        "gradients": updates * number,
        "optimiser": updates,
    }.get(kind, 0)


def _work(parts: Parts, program: Program, assumed: Assumptions) -> formulas.Work:
    arch, split, width = parts.policy.arch, split_of(parts), width_of(parts)
    params = int(parts.kept["parameters"] / 4 * split.tensor * split.fsdp)
    kind, shape = program.kind, parts.row_shape
    if kind == "hand-over":
        return formulas.hand_over(params, split, width=width)
    if kind == "prefill":
        rows, length = program.arguments[2].shape
        return formulas.prefill(arch, split, rows=rows, length=length, width=width)
    if kind in ("decode", "tail decode"):
        slots, view = program.arguments[1], program.static["view"]
        whole = view == parts.engine.max_new
        shares = view_shares(parts, parts.schedule.completions) if whole else {view: 1.0}
        one = partial(
            formulas.decode,
            arch,
            split,
            rows=len(slots.token_B),
            prompts=len(slots.prompt_len_P),
            prompt=parts.engine.max_prompt,
            width=width,
            at_once=parts.engine.at_once,
        )
        return formulas.mean([(one(own=own), share) for own, share in shares.items()])
    if kind == "log-probs":
        return formulas.logprobs(arch, split, shape, width=width)
    if kind == "gradients":
        remat = parts.config.model.remat
        return formulas.gradients(arch, split, shape, width=width, remat=remat)
    if kind == "optimiser":
        return formulas.optimizer(params, split)
    written = {"empty cache": "KV cache", "no gradients": "gradients"}.get(kind, "")
    return formulas.Work(cache_bytes=parts.kept.get(written, 0.0))


def _link_bytes(parts: Parts, program: Program) -> float:
    """Without a compiler: weights gathered over `fsdp`, gradients scattered, sums over `tensor`."""
    arch, split, width = parts.policy.arch, split_of(parts), width_of(parts)
    share = parts.kept["parameters"] / 4 * split.fsdp  # parameters of a tensor part
    gathered = share * width * (split.fsdp - 1) / split.fsdp
    summed = 2 * 2 * arch.num_layers * arch.width * width * (split.tensor - 1) / split.tensor
    shape = parts.row_shape
    tokens = shape.rows / split.batch * shape.tokens
    if program.kind == "hand-over":
        return gathered
    if program.kind in ("decode", "tail decode"):
        return len(program.arguments[1].token_B) / split.batch * summed
    if program.kind == "prefill":
        rows, length = program.arguments[2].shape
        return rows * length / split.batch * summed
    if program.kind == "log-probs":
        return gathered + tokens * summed
    if program.kind == "gradients":
        return 2 * gathered + gathered / width * 4 + 2 * tokens * summed
    return 0.0


def _mean_tokens(parts: Parts, assumed: Assumptions) -> int:
    return assumed.mean_tokens or max(parts.engine.max_new // 2, 1)


def _mean_prompt(parts: Parts, assumed: Assumptions) -> int:
    return assumed.mean_prompt or max(parts.engine.max_prompt // 2, 1)
