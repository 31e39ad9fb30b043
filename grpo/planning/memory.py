"""What is on a device while each program runs, by category."""

import dataclasses
from collections.abc import Mapping, Sequence

from grpo.planning import formulas
from grpo.planning.lower import LIVE, Compiled, Parts, label
from grpo.structs import Program


@dataclasses.dataclass(frozen=True)
class Footprint:
    """The memory of one device while a program runs.

    Attributes:
      kind, label: of the program.
      bytes: category -> bytes. Parameters and the like are exact; "activations" is by formula the
        part of the compiler's temporaries that the backward pass waits for; "other" is what the
        program takes and gives beside these, and what tiles of TPU memory round up.
      estimated: no compiler was asked.
    """

    kind: str
    label: str
    bytes: dict[str, float]
    estimated: bool

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


def split_of(parts: Parts) -> formulas.Split:
    """How the mesh splits the model."""
    sizes = parts.policy.mesh.shape
    return formulas.Split(
        batch=sizes["data"] * sizes["fsdp"], tensor=sizes["tensor"], fsdp=sizes["fsdp"]
    )


def width_of(parts: Parts) -> int:
    """Bytes of a number that blocks compute with."""
    return 2 if parts.config.model.compute_dtype == "bfloat16" else 4


def footprint(parts: Parts, compiled: Compiled) -> Footprint:
    """From what the compiler says of a program."""
    inside, beside = LIVE[compiled.kind]
    if not (parts.config.algo.kl_coef and parts.config.algo.ref_every):
        inside = tuple(name for name in inside if name != "reference")  # not in the state
        beside = (*beside, *(["reference"] if "reference" in LIVE[compiled.kind][0] else []))
    kept = _kept(parts, compiled.kind, (*inside, *beside))
    held = compiled.argument_bytes + compiled.output_bytes - compiled.alias_bytes
    if compiled.refused:
        held = max(held, sum(parts.kept[name] for name in inside))
    other = held - sum(parts.kept[name] for name in inside) + compiled.code_bytes
    saved = min(_activations(parts, compiled.kind), compiled.temp_bytes)
    return _footprint(
        compiled.kind,
        compiled.label,
        kept | {"activations": saved, "temporaries": compiled.temp_bytes - saved, "other": other},
        estimated=False,
    )


def estimate(parts: Parts, program: Program) -> Footprint:
    """Without a compiler: temporaries by a rough formula."""
    inside, beside = LIVE[program.kind]
    kept = _kept(parts, program.kind, (*inside, *beside))
    arch, split, config = parts.policy.arch, split_of(parts), parts.config
    width, shape = width_of(parts), parts.row_shape
    temporaries = 0.0
    if program.kind in ("log-probs", "gradients"):
        chunk = config.model.logprob_chunk
        temporaries = formulas.update_workspace(arch, split, shape, width=width, chunk=chunk)
    elif program.kind in ("decode", "tail decode"):
        rows = len(program.arguments[1].token_B)
        engine, view = parts.engine, program.static["view"]
        own, prompt = (
            arch.cache_lengths(view, engine.at_once),
            arch.cache_lengths(engine.max_prompt),
        )
        places = max(own) + max(prompt)
        temporaries = formulas.decode_workspace(arch, split, rows=rows, places=places)
    elif program.kind == "optimiser":
        temporaries = parts.kept["parameters"]  # the change
        if config.optim.offload:
            temporaries += 2 * parts.kept["parameters"]  # the moments, fetched
    elif program.kind == "prefill":
        rows, length = program.arguments[2].shape
        temporaries = formulas.decode_workspace(arch, split, rows=rows * length, places=length)
    activations = _activations(parts, program.kind)
    return _footprint(
        program.kind,
        label(program),
        kept | {"activations": activations, "temporaries": temporaries},
        estimated=True,
    )


def _kept(parts: Parts, kind: str, names: Sequence[str]) -> dict[str, float]:
    """Of these categories, what there is on a device."""
    kept = {name: parts.kept[name] for name in names}
    if kind == "log-probs" and parts.config.algo.ref_offload:
        kept["reference"] = parts.kept["parameters"]  # fetched for the while
    return kept


def _footprint(kind: str, label: str, found: Mapping[str, float], *, estimated: bool) -> Footprint:
    return Footprint(kind, label, {n: b for n, b in found.items() if b > 0}, estimated)


def _activations(parts: Parts, kind: str) -> float:
    if kind != "gradients":
        return 0.0
    return formulas.saved_activations(
        parts.policy.arch,
        split_of(parts),
        parts.row_shape,
        width=width_of(parts),
        remat=parts.config.model.remat,
    )
