"""Says whether a run fits a machine, and how fast it will be, before the machine is paid for.

    python -m grpo.plan --config=experiments/x.py --topology=v5e:16x16

Every program of the run is compiled ahead of time by the machine's real compiler: for TPU slices
(`v5e:16x16`, `v6e:4x4`, `v5p:4x4x8`, `tpu7x:4x4x4`) by libtpu, on any Linux machine without a TPU
(pip install 'grpo[plan]'); for `local` by the devices that are here. For GPUs (`gpu:8xh100`) no
compiler is at hand and everything is by formula, as it is for any machine with --nocompile. Fields
are set as in `grpo.launch`. Ends with status 1 if the run does not fit.

Not planned: a cold start (`config.sft`), the programs of an evaluation, which are as large as those
of the run, and the work of the host.
"""

import json
import sys
from collections.abc import Sequence

from absl import flags

from grpo.config import Config
from grpo.launch import with_config
from grpo.planning.chips import GIB, parse_topology
from grpo.planning.lower import use_no_device
from grpo.planning.make import Options, Plan, as_json, make_plan
from grpo.planning.predict import Assumptions
from grpo.planning.shapes import find_arch

_TOPOLOGY = flags.DEFINE_string(
    "topology", "local", "v5e:16x16, v5p:4x4x8, v6e:4x4, tpu7x:4x4x4, gpu:8xh100 or local"
)
_SHAPE = flags.DEFINE_string("shape", "", "config.json of the model, where its folder is not here")
_JSON = flags.DEFINE_bool("json", False, "print the plan as JSON, and nothing else")
_LAYERS = flags.DEFINE_enum(
    "layers",
    "extrapolate",
    ["extrapolate", "exact"],
    "compile programs with unrolled layers (the sampler's) with 2 and 3 layers and extrapolate, or "
    "with all of them, which takes minutes each",
)
_ALL_SIZES = flags.DEFINE_bool(
    "all_sizes", False, "compile every size of a program, not only the largest of its kind"
)
_COMPILE = flags.DEFINE_bool(
    "compile",
    True,
    "ask the compiler; --nocompile: formulas alone, in seconds, and no libtpu is needed",
)
_PRICE = flags.DEFINE_float("chip_hour_price", None, "of one chip; adds what the run costs")
_MEAN_PROMPT = flags.DEFINE_integer("mean_prompt", 0, "tokens; 0: half of the longest")
_MEAN_TOKENS = flags.DEFINE_integer("mean_tokens", 0, "of a completion; 0: half of the longest")
_DECODE = flags.DEFINE_float("decode_efficiency", 0.5, "share of its roofline decoding reaches")
_COMPUTE = flags.DEFINE_float("compute_efficiency", 0.4, "share of the peak the rest reaches")


def plan(config: Config, baseline: Config | None = None) -> None:
    """Prints the plan of a run for the machine that --topology names."""
    del baseline
    topology = parse_topology(_TOPOLOGY.value)
    compiles = _COMPILE.value and topology.platform != "gpu"
    use_no_device(topology, stand_ins=not compiles)
    arch = find_arch(config.model, _SHAPE.value)
    options = Options(
        compiles=compiles,
        every_size=_ALL_SIZES.value,
        extrapolate=_LAYERS.value == "extrapolate" and topology.platform == "tpu",
        assumed=Assumptions(
            mean_prompt=_MEAN_PROMPT.value,
            mean_tokens=_MEAN_TOKENS.value,
            decode_efficiency=_DECODE.value,
            compute_efficiency=_COMPUTE.value,
        ),
    )

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = make_plan(config, arch, topology, options, tell)
    if _JSON.value:
        print(json.dumps(as_json(found, _PRICE.value), indent=2))
    else:
        print("\n".join(describe(found, _PRICE.value)))
    if not found.fits:
        sys.exit(1)


def describe(plan: Plan, price: float | None = None) -> list[str]:
    """Lines for people."""
    facts = as_json(plan, price)
    mesh = " x ".join(f"{name}={size}" for name, size in plan.mesh.items())
    lines = [
        f"{facts['params'] / 1e9:.2f}B parameters on {plan.topology.name}: {plan.chips} chip(s), "
        f"mesh {mesh}, {plan.slots} slots, microbatches of {plan.rows[0]} x {plan.rows[1]} tokens"
    ]
    if plan.compiled is None:
        lines.append("no compiler was asked: temporaries and exchanges by formula, roughly")
    elif plan.extrapolated:
        lines.append("programs with unrolled layers: from 2 and 3 layers, extrapolated")
    lines += ["", *_memory_table(plan), "", *_time_table(plan)]
    if plan.step:
        lines += ["", *_step_lines(plan, facts)]
    return [*lines, "", *_verdict(plan)]


def _memory_table(plan: Plan) -> list[str]:
    names = ["parameters", "optimiser", "reference", "gradients", "decode weights", "KV cache"]
    names += ["activations", "temporaries"]
    head = ["GiB a device", "total", *names, "other"]
    rows = []
    for f in plan.footprints:
        rest = f.total - sum(f.bytes.get(name, 0.0) for name in names)
        values = [f.total, *(f.bytes.get(name, 0.0) for name in names), rest]
        shown = [f"{value / GIB:.2f}" if value >= 0.005 * GIB else "-" for value in values]
        rows.append([f"{f.kind} {f.label}".strip(), *shown])
    return _table([head, *rows])


def _time_table(plan: Plan) -> list[str]:
    head = ["a run of it", "compile CPU s", "TFLOP", "GB memory", "GB exchanged", "roofline ms"]
    head += ["predicted ms", "runs a step"]
    rows = []
    for f, c, t in plan.programs:
        row = [f"{f.kind} {f.label}".strip(), f"{c.seconds:.1f}" if c else "-"]
        if t:
            row += [f"{t.work.flops / 1e12:.3g}", f"{t.work.hbm_bytes / 1e9:.3g}"]
            row += [f"{t.link_bytes / 1e9:.3g}", f"{sum(t.roofline_s.values()) * 1e3:.3g}"]
            row += [f"{t.predicted_s * 1e3:.3g}", f"{t.runs:.0f}"]
        else:
            exchanged = sum(c.link_bytes.values()) / 1e9 if c and c.link_bytes else 0.0
            row += ["-", "-", f"{exchanged:.3g}", "-", "-", "-"]
        rows.append(row)
    return _table([head, *rows])


def _step_lines(plan: Plan, facts: dict) -> list[str]:
    step = plan.step
    assert step is not None
    split = ", ".join(
        f"{name} {seconds:.1f} s ({100 * seconds / step.seconds:.0f} %)"
        for name, seconds in step.split_s.items()
    )
    cost = f", {facts['cost']:,.0f} in price" if "cost" in facts else ""
    return [
        f"a step: {step.seconds:.1f} s = {split}",
        f"{step.tokens_per_s_per_chip:.0f} sampled tokens/s/chip; the limit is {step.limit}",
        f"the run: {step.steps} steps, {step.seconds * step.steps / 3600:.1f} h, "
        f"{step.chip_hours:,.0f} chip-hours{cost}",
    ]


def _verdict(plan: Plan) -> list[str]:
    most = plan.largest
    used = f"{most.kind} needs {most.total / GIB:.2f} of {plan.capacity / GIB:.2f} GiB a device"
    if plan.fits:
        return [f"fits: {used}"]
    lines = [f"does not fit: {used}"]
    if plan.suggestion:
        lines.append(f"it fits with {plan.suggestion.flags()}")
    else:
        lines.append(
            "no smaller microbatch, remat, slots or mesh of this slice makes it fit; take a larger "
            "slice"
        )
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


if __name__ == "__main__":
    with_config(plan)
