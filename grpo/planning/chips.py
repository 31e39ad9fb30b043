"""What accelerators can do, as published: memory, operations and bytes a second."""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it.

    Attributes:
      name: as in a topology.
      hbm_bytes: what programs may use; a part of the memory is the runtime's own.
      flops: dense bfloat16 operations a second.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second that a device exchanges with others along one mesh axis, both
        directions together.
      per_chip: devices that make up what is billed as a chip.
    """

    name: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    per_chip: int = 1


# TPUs: "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus), table of specifications;
# a link's figure there is one way, here both. tpu7x: cloud.google.com/tpu/docs/tpu7x, a chip is
# two devices. The compiler keeps a quarter of a GiB of a TPU for itself (it refuses a v5e program
# of more than 15.75 GiB). GPUs: NVIDIA's data sheets without sparsity, NVLink's total, and the
# nine tenths of the memory that XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 gives to JAX.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 31.75 * GIB, 2.75e14, 1.2e12, 9e10),
        Chip("v5e", 15.75 * GIB, 1.97e14, 8.1e11, 9e10),
        Chip("v5p", 95.0 * GIB, 4.59e14, 2.8e12, 1.8e11),
        Chip("v6e", 31.75 * GIB, 9.2e14, 1.6e12, 1.8e11),
        Chip("tpu7x", 95.0 * GIB, 1.153e15, 3.69e12, 2e11, per_chip=2),
        Chip("a100", 72e9, 3.12e14, 2.04e12, 6e11),
        Chip("h100", 72e9, 9.89e14, 3.35e12, 9e11),
        Chip("h200", 127e9, 9.89e14, 4.8e12, 9e11),
        Chip("b200", 162e9, 2.25e15, 8e12, 1.8e12),
    )
}
_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# What `jax.Device.device_kind` calls them.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine to plan for.

    Attributes:
      platform: "tpu", "gpu" or "local".
      name: "v5e:4x4", "gpu:8xh100", "local".
      chip: None for `local`, where the devices say.
      num_devices: None likewise.
    """

    platform: str
    name: str
    chip: Chip | None
    num_devices: int | None


def parse_topology(text: str) -> Topology:
    """The machine that `text` names.

    Args:
      text: a TPU slice "v5e:16x16" (chips along each side), GPUs "gpu:8xh100", or "local".

    Raises:
      ValueError: it is none of these; the message lists what is known.
    """
    if text == "local":
        return Topology("local", text, None, None)
    if match := re.fullmatch(r"gpu:(\d+)x(\w+)", text):
        number, name = int(match[1]), match[2].lower()
        if name in CHIPS and name not in _TPUS and number > 0:
            return Topology("gpu", text, CHIPS[name], number)
    if match := re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", text):
        name, sides = match[1].lower(), [int(side) for side in match[2].split("x")]
        if name in _TPUS and min(sides) > 0:
            number = CHIPS[name].per_chip
            for side in sides:
                number *= side
            return Topology("tpu", text, CHIPS[name], number)
    gpus = ", ".join(name for name in CHIPS if name not in _TPUS)
    raise ValueError(
        f"{text!r} is no topology: write a TPU slice such as v5e:16x16 or v5p:4x4x4 "
        f"({', '.join(_TPUS)}), GPUs such as gpu:8xh100 ({gpus}), or local"
    )


def chip_of(kind: str) -> Chip | None:
    """The chip that a device's `device_kind` means, if it is one of ours."""
    if kind in _KINDS:
        return CHIPS[_KINDS[kind]]
    found = [c for n, c in CHIPS.items() if n not in _TPUS and n.upper() in kind.upper()]
    return found[0] if found else None
