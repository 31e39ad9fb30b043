"""What to change in a run that does not fit: the smallest change first."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from grpo.config import Config
from grpo.planning.lower import Parts
from grpo.planning.memory import Footprint, estimate

_SAMPLING = ("prefill", "insert", "replay", "decode", "empty cache", "tail", "tail decode")
_LEARNING = ("log-probs", "gradients")
_HALVINGS = 5
_ROUNDS = 3  # sampling, learning, and what holds both
_LEANER = {"none": ("attn", "full"), "products": ("attn", "full"), "attn": ("full",), "full": ()}


@dataclasses.dataclass(frozen=True)
class Change:
    """Fields of the configuration, by path below `config`, and their new values."""

    fields: tuple[tuple[str, int | str | bool], ...]

    def flags(self) -> str:
        return " ".join(f"--config.{path}={value}" for path, value in self.fields)

    def applied(self, config: Config) -> Config:
        changed = copy.copy(config)
        for path, value in self.fields:
            section, name = path.split(".")
            setattr(changed, section, copy.copy(getattr(changed, section)))
            setattr(getattr(changed, section), name, value)
        return changed


def changes(parts: Parts, kind: str) -> Iterator[Change]:
    """What may help a program of this kind, from what costs least to what costs most."""
    config, sizes = parts.config, dict(parts.policy.mesh.shape)
    if kind in _LEARNING:
        tokens = config.algo.microbatch_tokens
        for halving in range(1, _HALVINGS + 1):
            yield Change((("algo.microbatch_tokens", tokens >> halving),))
        chunk = config.model.logprob_chunk
        yield Change((("model.logprob_chunk", max(chunk // 4, 1)),))
        # A row for each device is the least there can be: what is left is to keep less of it.
        for remat in _LEANER[config.model.remat]:
            yield Change((("model.remat", remat),))
            yield Change(
                (
                    ("model.remat", remat),
                    ("algo.microbatch_tokens", tokens >> _HALVINGS),
                    ("model.logprob_chunk", max(chunk // 4, 1)),
                )
            )
    if kind in _SAMPLING:
        for halving in range(1, _HALVINGS + 1):
            slots = config.sample.slots >> halving
            if slots and slots % (sizes["data"] * sizes["fsdp"]) == 0:
                yield Change((("sample.slots", slots),))
    if kind != "optimiser" and not config.optim.offload:
        yield Change((("optim.offload", True),))
    if kind != "log-probs" and config.algo.kl_coef and not config.algo.ref_offload:
        yield Change((("algo.ref_offload", True),))
    if sizes["data"] > 1:
        wider = sizes["data"] * sizes["fsdp"]
        yield Change((("mesh.data", 1), ("mesh.fsdp", wider)))
    tensor = sizes["tensor"] * 2
    while (
        tensor <= parts.policy.arch.num_kv_heads and sizes["fsdp"] * sizes["tensor"] % tensor == 0
    ):
        fsdp = sizes["fsdp"] * sizes["tensor"] // tensor
        yield Change((("mesh.fsdp", fsdp), ("mesh.tensor", tensor)))
        tensor *= 2


Look = Callable[[Parts, str], list[Footprint]]  # (run, kind; "" for all) -> its programs


def suggest(
    parts: Parts,
    footprints: Sequence[Footprint],
    capacity: float,
    again: Callable[[Config], Parts],
    look: Look,
) -> Change | None:
    """A change after which everything fits, confirmed by `look`; None if nothing here helps.

    Each candidate is first judged by formula, relative to what was found: only one that should fit
    is looked at.

    Args:
      parts: of the run that does not fit.
      footprints: of its programs.
      capacity: bytes of a device.
      again: lays a changed run out; a ValueError says that it cannot be.
      look: footprints of a run, from the compiler where there is one.
    """
    chosen: dict[str, int | str] = {}
    for _ in range(_ROUNDS):
        worst = max(footprints, key=lambda f: f.total)
        if worst.total <= capacity:
            return Change(tuple(chosen.items()))
        found = _helps(parts, worst, capacity, again, look)
        if found is None:
            return None
        change, parts = found
        chosen |= dict(change.fields)
        footprints = look(parts, "")
    fits = max(f.total for f in footprints) <= capacity
    return Change(tuple(chosen.items())) if fits else None


def _helps(
    parts: Parts,
    worst: Footprint,
    capacity: float,
    again: Callable[[Config], Parts],
    look: Look,
) -> tuple[Change, Parts] | None:
    """The first change after which no program of the worst one's kind is too large."""
    before = _estimated(parts, worst)
    for change in changes(parts, worst.kind):
        try:
            changed = again(change.applied(parts.config))
        except ValueError:
            continue
        if worst.total + _estimated(changed, worst) - before > capacity:
            continue
        if all(f.total <= capacity for f in look(changed, worst.kind)):
            return change, changed
    return None


def _estimated(parts: Parts, of: Footprint) -> float:
    program = next(p for p in parts.programs if p.kind == of.kind)
    return estimate(parts, program).total
