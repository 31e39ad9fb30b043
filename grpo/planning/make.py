"""A plan: what a run needs of a machine, whether that fits, and what would."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from grpo.config import Config, validate
from grpo.model.arch import Arch
from grpo.model.params import num_params
from grpo.planning import advice
from grpo.planning.chips import Chip, Topology, chip_of
from grpo.planning.lower import (
    Compiled,
    Parts,
    compile_all,
    devices_of,
    label,
    largest,
    make_parts,
    stand_ins,
)
from grpo.planning.memory import Footprint, estimate, footprint
from grpo.planning.predict import Assumptions, Step, Timing, step, timings


@dataclasses.dataclass(frozen=True)
class Options:
    """How a plan is made.

    Attributes:
      compiles: asks a compiler, where there is one for the machine; False: formulas alone.
      every_size: compiles every size of a program, not each kind's largest only.
      extrapolate: unrolled programs from 2 and 3 layers (`grpo.planning.lower.compile_all`).
      suggest: looks for a change if the run does not fit.
      assumed: what is not known.
    """

    compiles: bool = True
    every_size: bool = False
    extrapolate: bool = True
    suggest: bool = True
    assumed: Assumptions = dataclasses.field(default_factory=Assumptions)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
      chips: that are paid for.
      mesh: axis -> size.
      capacity: bytes of a device that programs may use.
      compiled: None where there is no compiler.
      timings, step: None where the chip's speed is not known.
      suggestion: a change after which the run fits, if it does not and one was found.
    """

    topology: Topology
    arch: Arch
    chips: int
    mesh: dict[str, int]
    rows: tuple[int, int]
    slots: int
    capacity: float
    footprints: list[Footprint]
    compiled: list[Compiled] | None
    timings: list[Timing] | None
    step: Step | None
    suggestion: advice.Change | None
    extrapolated: bool

    @property
    def programs(self) -> list[tuple[Footprint, Compiled | None, Timing | None]]:
        """What there is of each program."""
        nothing = [None] * len(self.footprints)
        compiled: Sequence[Compiled | None] = self.compiled or nothing
        timed: Sequence[Timing | None] = self.timings or nothing
        return list(zip(self.footprints, compiled, timed, strict=True))

    @property
    def largest(self) -> Footprint:
        return max(self.footprints, key=lambda f: f.total)

    @property
    def fits(self) -> bool:
        return self.largest.total <= self.capacity


def make_plan(
    config: Config, arch: Arch, topology: Topology, options: Options, tell: Callable[[str], None]
) -> Plan:
    """Lays the run out, compiles its programs where there is a compiler, and adds up.

    Args:
      config: of the run.
      arch: of its model.
      topology: of the machine.
      options: of the plan.
      tell: gets a line for each program compiled.

    Raises:
      ValueError, TypeError: the configuration cannot work, whatever the machine; or there is no
        compiler for this one.
    """
    validate(config)
    if arch.experts or arch.latent:
        raise ValueError(
            "a plan's formulas know dense models with plain attention, not mixtures of experts or "
            "latent attention"
        )
    compiles = options.compiles and topology.platform != "gpu"
    devices = devices_of(topology) if compiles else stand_ins(topology)
    chip = topology.chip or chip_of(devices[0].device_kind)
    parts = make_parts(config, arch, devices)
    look = partial(_footprints, options=options, compiles=compiles, tell=tell)
    footprints, compiled = look(parts, "")
    capacity = chip.hbm_bytes if chip is not None else _host_bytes() / len(devices)
    suggestion = None
    if options.suggest and max(f.total for f in footprints) > capacity:
        suggestion = advice.suggest(
            parts,
            footprints,
            capacity,
            again=lambda changed: make_parts(changed, arch, devices),
            look=lambda changed, kind: look(changed, kind)[0],
        )
    chips = len(devices) // (chip.per_chip if chip else 1)
    found = _timings(parts, compiled, chip, options) if chip else None
    return Plan(
        topology=topology,
        arch=arch,
        chips=chips,
        mesh=dict(parts.policy.mesh.shape),
        rows=(parts.row_shape.rows, parts.row_shape.tokens),
        slots=parts.engine.num_slots,
        capacity=capacity,
        footprints=footprints,
        compiled=compiled,
        timings=found,
        step=step(parts, found, chips, options.assumed) if found else None,
        suggestion=suggestion,
        extrapolated=compiles and options.extrapolate,
    )


def _footprints(
    parts: Parts, kind: str, *, options: Options, compiles: bool, tell: Callable[[str], None]
) -> tuple[list[Footprint], list[Compiled] | None]:
    programs = largest(parts, options.every_size, kind)
    if not compiles:
        return [estimate(parts, program) for program in programs], None
    compiled = compile_all(parts, programs, extrapolate=options.extrapolate, tell=tell)
    return [footprint(parts, c) for c in compiled], compiled


def _timings(
    parts: Parts, compiled: list[Compiled] | None, chip: Chip, options: Options
) -> list[Timing]:
    programs = largest(parts, options.every_size)
    return timings(parts, programs, [label(p) for p in programs], compiled, chip, options.assumed)


def _host_bytes() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def as_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Everything of a plan, as plain data; bytes and seconds, of one device unless it says."""
    programs = [
        {
            "kind": f.kind,
            "size": f.label,
            "hbm_bytes": {name: round(size) for name, size in f.bytes.items()},
            "hbm_total_bytes": round(f.total),
            "hbm_estimated": f.estimated,
            "fits": f.total <= plan.capacity,
            "compile_cpu_s": c and round(c.seconds, 1),
            "refused": c and c.refused,
            "collectives_bytes": c
            and c.link_bytes
            and {op: round(size) for op, size in c.link_bytes.items()},
            "flops": t and t.work.flops,
            "memory_traffic_bytes": t and t.work.hbm_bytes,
            "link_bytes": t and t.link_bytes,
            "roofline_s": t and sum(t.roofline_s.values()),
            "predicted_s": t and t.predicted_s,
            "runs_per_step": t and t.runs,
        }
        for f, c, t in plan.programs
    ]
    result: dict[str, Any] = {
        "topology": plan.topology.name,
        "chips": plan.chips,
        "mesh": plan.mesh,
        "params": num_params(plan.arch),
        "slots": plan.slots,
        "microbatch": {"rows": plan.rows[0], "tokens": plan.rows[1]},
        "hbm_capacity_bytes": round(plan.capacity),
        "hbm_peak_bytes": round(plan.largest.total),
        "fits": plan.fits,
        "suggestion": plan.suggestion and plan.suggestion.flags(),
        "compiled": plan.compiled is not None,
        "layers_extrapolated": plan.extrapolated,
        "programs": programs,
    }
    if plan.step:
        result["step"] = dataclasses.asdict(plan.step)
        if price is not None:
            result["cost"] = plan.step.chip_hours * price
    assert not any(isinstance(v, float) and math.isnan(v) for v in result.values())
    return result
